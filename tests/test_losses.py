"""What every loss does with ignored rows, masked classes, odd targets and odd arguments.

The values come from `F.cross_entropy`, from the formulas of the papers written out in float64 over the classes that
are left, and from the same call on the rows that count.
"""

import inspect
import math
import pickle
import subprocess
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from complement_objectives import losses
from complement_objectives.losses import base, closed_form
from complement_objectives.losses import objectives as L
from complement_objectives.losses import relatives as R

K, GROUPS = 6, torch.tensor([0, 0, 1, 1, 2, 2])
FUNCTIONS = {
    'complement_entropy_loss': L.complement_entropy_loss,
    'guided_complement_entropy': L.guided_complement_entropy,
    'reverse_cross_entropy': L.reverse_cross_entropy,
    'smoothed_cross_entropy': partial(L.smoothed_cross_entropy, lam=0.3),
    'cross-entropy': partial(L.smoothed_cross_entropy, lam=0.0),
    'published COT': R.published_complement_entropy_loss,
    'published GCE': R.published_guided_complement_entropy,
    'complement_cross_entropy': R.complement_cross_entropy,
    'hierarchical': partial(R.hierarchical_complement_entropy_loss, groups=GROUPS),
    'compact': partial(R.probabilistically_compact_loss, lam=0.05),
}
MODULES = {
    'ComplementEntropyLoss': L.ComplementEntropyLoss,
    'GuidedComplementEntropyLoss': L.GuidedComplementEntropyLoss,
    'ReverseCrossEntropyLoss': L.ReverseCrossEntropyLoss,
    'SmoothedCrossEntropyLoss': partial(L.SmoothedCrossEntropyLoss, 0.3),
    'PublishedComplementEntropyLoss': R.PublishedComplementEntropyLoss,
    'PublishedGuidedComplementEntropyLoss': R.PublishedGuidedComplementEntropyLoss,
    'ComplementCrossEntropyLoss': R.ComplementCrossEntropyLoss,
    'HierarchicalComplementEntropyLoss': partial(
        R.HierarchicalComplementEntropyLoss, GROUPS
    ),
    'ProbabilisticallyCompactLoss': partial(R.ProbabilisticallyCompactLoss, lam=0.05),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
each_loss = pytest.mark.parametrize('f', FUNCTIONS.values(), ids=FUNCTIONS)
each_module = pytest.mark.parametrize('make', MODULES.values(), ids=MODULES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def batch(n=8, k=K, dtype=torch.float64):
    return torch.randn(n, k, dtype=torch.float64).mul(2).to(
        dtype
    ).requires_grad_(), torch.arange(n) % k


def one_line(f, *args, **kwargs):
    with pytest.raises(ValueError) as e:
        f(*args, **kwargs)
    assert len(str(e.value).splitlines()) == 1 and len(str(e.value)) < 200
    return str(e.value)


def gradient(f, z, y, **kwargs):
    loss = f(z, y, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), z)[0]


def second(f, z, y, **kwargs):  # the gradient, and that of its squared norm
    (g,) = torch.autograd.grad(f(z, y, **kwargs).sum(), z, create_graph=True)
    return g.detach(), torch.autograd.grad(g.square().sum(), z)[0]


# ---- ignored rows ----------------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', [(5,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize('ignore_index', [-100, -1, 2, 255])
def test_every_target_ignored(f, dtype, shape, ignore_index):
    n, *d = shape
    z, y = (
        torch.randn(n, K, *d).to(dtype).requires_grad_(),
        torch.full(shape, ignore_index),
    )
    for reduction in ('mean', 'sum', 'none'):
        loss, g = gradient(f, z, y, ignore_index=ignore_index, reduction=reduction)
        expected = F.cross_entropy(
            z.float(), y, ignore_index=ignore_index, reduction=reduction
        )
        assert (
            torch.equal(loss.isnan(), expected.isnan())
            and loss.nan_to_num().eq(0).all()
            and loss.shape == expected.shape
        )
        assert not g.any() and g.dtype == dtype


@each_loss
def test_every_target_ignored_otherwise(f):
    z, y = batch()
    ignored, zero = torch.full_like(y, -100), torch.zeros(K, dtype=z.dtype)
    for kwargs, t in (
        (dict(weight=zero), y),
        (dict(weight=torch.rand(K).double()), ignored),
        (dict(weight=zero), ignored),
    ):
        loss, g = gradient(f, z, t, **kwargs)
        assert loss.isnan() and not g.any()
    assert not any(g.any() for g in second(f, z, ignored))
    g, value = torch.func.grad_and_value(f)(z.detach(), ignored)
    assert value.isnan() and not g.any()
    assert torch.vmap(f)(z.detach()[None], ignored[None]).isnan().all()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss, g = gradient(lambda x, t: f(x @ torch.eye(K).double(), t), z, ignored)
    assert loss.isnan() and not g.any()


@each_loss
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('junk', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('n, k', [(8, 6), (700, 6)])
def test_nothing_leaves_an_ignored_row(f, dtype, junk, n, k):
    z, y = batch(n, k, dtype)
    rows = torch.arange(n) % 3 != 1
    y = y.where(rows, -100)
    dirty = z.detach().masked_fill(~rows[:, None], junk).requires_grad_()
    for kwargs in (
        dict(),
        dict(reduction='none'),
        dict(weight=torch.rand(k).to(dtype) + 0.5),
    ):
        loss, g = gradient(f, dirty, y, **kwargs)
        expected, clean = gradient(
            f, z.detach()[rows].requires_grad_(), y[rows], **kwargs
        )
        assert not g[~rows].any() and torch.allclose(
            g[rows], clean, atol=1e-2 if dtype.itemsize == 2 else 1e-6
        )
        if loss.ndim:
            assert not loss[~rows].any()
            loss = loss[rows]
        assert torch.allclose(loss, expected, atol=1e-5)
    if dtype == torch.float64:
        (g, h), (clean, hc) = (
            second(f, dirty, y),
            second(f, z.detach()[rows].requires_grad_(), y[rows]),
        )
        assert (
            not h[~rows].any()
            and torch.allclose(h[rows], hc, atol=1e-12)
            and torch.allclose(g[rows], clean, atol=1e-12)
        )
        assert torch.allclose(
            torch.func.grad(f)(dirty.detach(), y)[rows], clean, atol=1e-12
        )


def test_nothing_leaves_an_ignored_row_of_many_blocks():
    n, k = 1300, 1000  # 2**19 logits are a block
    for name in (
        'complement_entropy_loss',
        'guided_complement_entropy',
        'reverse_cross_entropy',
        'smoothed_cross_entropy',
    ):
        for dtype in (torch.float64, torch.bfloat16):
            z, y = batch(n, k, dtype)
            y[::7] = -100
            dirty = z.detach().clone()
            dirty[::7] = math.nan
            loss, g = gradient(FUNCTIONS[name], dirty.requires_grad_(), y)
            rows = y >= 0
            expected, clean = gradient(
                FUNCTIONS[name], z.detach()[rows].requires_grad_(), y[rows]
            )
            assert torch.allclose(loss, expected, rtol=1e-5) and not g[~rows].any()
            assert torch.allclose(g[rows], clean, atol=1e-5, rtol=1e-2)


@each_module
def test_a_fit_with_one_such_batch_ends_finite(make):
    net, loss = nn.Linear(4, K), make()
    opt = torch.optim.Adam(net.parameters(), 0.1)
    for step in range(4):
        x, y = torch.randn(8, 4), torch.arange(8) % K
        opt.zero_grad()
        loss(net(x), y if step != 1 else torch.full_like(y, -100)).backward()
        opt.step()
    assert all(p.isfinite().all() for p in net.parameters())


# ---- masked classes --------------------------------------------------------------------------------------------------

OPEN, MASKED = [0, 1, 3, 5], [2, 4]


def q_log_q(z, g):  # sum over the wrong classes
    q = z[[j for j in range(len(z)) if j != g]].softmax(0)
    return (q * q.log()).sum()


def compact(z, g, n_masked):  # the hinge of a masked class is that of probability 0
    p, wrong = z.softmax(0), [j for j in range(len(z)) if j != g]
    q = z[wrong].softmax(0)
    hinge = (p[wrong] + 0.995 - p[g]).relu().sum() + n_masked * (0.995 - p[g]).relu()
    return hinge / (len(z) + n_masked - 1) + 0.05 * (q * (z[g] - z[wrong]).relu()).sum()


def hierarchical(z, g, names):  # `names` of the classes that are left
    same = [j for j, c in enumerate(names) if GROUPS[c] == GROUPS[names[g]] and j != g]
    others = [j for j, c in enumerate(names) if GROUPS[c] != GROUPS[names[g]]]
    h = lambda rows: (
        -(z[rows].softmax(0) * z[rows].log_softmax(0)).sum() if rows else 0 * z.sum()
    )
    return (
        -h(same) / 1 - h(others) / 4
    )  # the groups have two classes each, masked or not


WRITTEN = {  # value of one row over the classes that are left, of K in all
    'complement_entropy_loss': lambda z, g: q_log_q(z, g) / (K - 1),
    'guided_complement_entropy': lambda z, g: (
        z.softmax(0)[g] ** (1 / 3) * q_log_q(z, g) / math.log(K - 1)
    ),
    'cross-entropy': lambda z, g: -z.log_softmax(0)[g],
    'complement_cross_entropy': lambda z, g: (
        -z.log_softmax(0)[g] + q_log_q(z, g) / (K - 1)
    ),
    'compact': lambda z, g: compact(z, g, len(MASKED)),
    'hierarchical': lambda z, g: hierarchical(z, g, OPEN),
}


def written(name, z, y):  # (N,) values by the formula, from the open columns only
    return torch.stack(
        [
            WRITTEN[name](row[OPEN], OPEN.index(g))
            for row, g in zip(z.double(), y.tolist())
        ]
    )


def masked_batch(n=8, dtype=torch.float64):
    z, _ = batch(n, K, dtype)
    return z.detach().index_fill(
        1, torch.tensor(MASKED), -math.inf
    ).requires_grad_(), torch.tensor(OPEN).repeat(n)[:n]


CASES = [(8, name) for name in WRITTEN] + [
    (6000, name)
    for name in (
        'complement_entropy_loss',
        'guided_complement_entropy',
        'cross-entropy',
    )
]


@pytest.mark.parametrize(
    'n, name', CASES
)  # a large batch takes another branch of the closed forms
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_masked_classes_drop_out(name, dtype, n):
    f, (z, y) = FUNCTIONS[name], masked_batch(n, dtype)
    leaf, some = z.detach().double().requires_grad_(), slice(0, 40)
    expected = written(name, leaf[some], y[some])
    (clean,) = torch.autograd.grad(expected.sum(), leaf)
    loss, g = gradient(f, z, y, reduction='none')
    small = (
        dict(atol=1e-12)
        if dtype == torch.float64
        else dict(atol=1e-5)
        if dtype == torch.float32
        else dict(atol=1e-2)
    )
    assert torch.allclose(
        loss[some].double(),
        expected.detach(),
        atol=max(small['atol'] / 100, 1e-12) if dtype != torch.float32 else 1e-5,
    )
    assert (
        torch.allclose(g[some].double(), clean[some], **small)
        and not g[:, MASKED].any()
        and g.isfinite().all()
    )


@pytest.mark.parametrize('name', WRITTEN)
def test_masked_classes_in_second_order_and_transforms(name):
    f, (z, y) = FUNCTIONS[name], masked_batch()
    leaf = z.detach().clone().requires_grad_()
    clean = second(lambda x, t, reduction='mean': written(name, x, t).mean(), leaf, y)
    for got, expected in zip(second(f, z, y), clean):
        assert torch.allclose(got, expected, atol=1e-10) and not got[:, MASKED].any()
    assert torch.allclose(torch.func.grad(f)(z.detach(), y), clean[0], atol=1e-12)
    heavy = torch.full((K,), 1e6).double()
    assert torch.allclose(gradient(f, z, y, weight=heavy)[1], clean[0], atol=1e-10)
    loss, g = gradient(f, z, y, weight=heavy, reduction='sum')
    assert torch.allclose(g / 1e6 / len(y), clean[0], atol=1e-10) and loss.isfinite()
    compiled = f(z, y).item()
    assert math.isclose(
        torch.vmap(f)(z.detach()[None], y[None]).item(), compiled, abs_tol=1e-12
    )


@pytest.mark.parametrize('name', ['published COT', 'published GCE'])
def test_masked_classes_in_the_published_losses(name):
    z, y = masked_batch()
    far = z.detach().clamp(min=-200.0)  # probability 1e-88, as good as 0
    (loss, g), (expected, clean) = (
        gradient(FUNCTIONS[name], z, y),
        gradient(FUNCTIONS[name], far.requires_grad_(), y),
    )
    assert torch.allclose(loss, expected, atol=1e-12) and torch.allclose(
        g, clean, atol=1e-12
    )


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_reverse_label_on_masked_classes(dtype):
    "RCE is +inf where a class of positive share has probability 0, as cross-entropy is; its gradient is F - R."
    z, y = masked_batch(dtype=dtype)
    for name, share in (
        ('reverse_cross_entropy', 0.0),
        ('smoothed_cross_entropy', 1.0),
    ):
        loss, g = gradient(FUNCTIONS[name], z, y, reduction='none')
        b = 1 / (K - 1) if not share else 0.3 / (K - 1)
        c = torch.full((len(y), K), b).double().scatter_(1, y[:, None], share)
        assert torch.equal(loss.double(), torch.full((len(y),), math.inf).double())
        assert torch.allclose(
            g.double(),
            z.detach().double().softmax(1) * c.sum(1, keepdim=True) - c,
            atol=1e-2 if dtype.itemsize == 2 else 1e-6,
        )


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_masked_true_class(dtype):
    z, y = batch(4, K, dtype)
    z = z.detach().scatter(1, y[:, None], -math.inf).requires_grad_()
    others = torch.stack(
        [row[[j for j in range(K) if j != g]] for row, g in zip(z.detach().double(), y)]
    )
    h = -(others.softmax(1) * others.log_softmax(1)).sum(1)
    loss, g = gradient(L.complement_entropy_loss, z, y, reduction='none')
    assert torch.allclose(loss.double(), -h / (K - 1), atol=1e-6) and g.isfinite().all()
    loss, g = gradient(L.guided_complement_entropy, z, y, reduction='none')
    assert not loss.any() and not g.any()  # the guiding factor is 0
    loss, g = gradient(L.reverse_cross_entropy, z, y, reduction='none')
    assert (
        torch.allclose(loss.double(), others.logsumexp(1) - others.mean(1), atol=1e-5)
        and g.isfinite().all()
    )
    for f in (
        FUNCTIONS['cross-entropy'],
        R.complement_cross_entropy,
    ):  # as F.cross_entropy
        loss, g = gradient(f, z, y, reduction='none')
        assert loss.eq(math.inf).all() and g.isfinite().all()
    if dtype == torch.float64:
        for f in (
            L.complement_entropy_loss,
            L.guided_complement_entropy,
            L.reverse_cross_entropy,
        ):
            assert all(v.isfinite().all() for v in second(f, z, y))
            assert torch.allclose(
                torch.func.grad(f)(z.detach(), y), gradient(f, z, y)[1], atol=1e-12
            )


@pytest.mark.parametrize('n', [3, 9000])
def test_only_the_true_class_is_left(n):
    "There is no wrong class to be even over: entropy 0, no gradient."
    z, y = batch(n)
    z = (
        torch.full_like(z, -math.inf)
        .scatter(1, y[:, None], 1.5)
        .detach()
        .requires_grad_()
    )
    for f in (
        L.complement_entropy_loss,
        L.guided_complement_entropy,
        FUNCTIONS['cross-entropy'],
        R.complement_cross_entropy,
        FUNCTIONS['hierarchical'],
    ):
        loss, g = gradient(f, z, y, reduction='none')
        assert not loss.any() and not g.any()
        assert not torch.func.grad(f)(z.detach(), y).any()


# ---- targets ---------------------------------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize('d', [(), (3,), (3, 4)], ids=str)
@pytest.mark.parametrize('axis', [1, -1])
def test_an_axis_of_one_more(f, d, axis):
    z, y = torch.randn(5, K, *d), torch.randint(K, (5, *d))
    y.view(-1)[1] = -100
    for reduction in ('mean', 'sum', 'none'):
        assert torch.equal(
            f(z, y.unsqueeze(axis), reduction=reduction), f(z, y, reduction=reduction)
        )
    assert f(z, y.unsqueeze(axis), reduction='none').shape == y.shape


@each_loss
def test_other_shapes_are_refused(f):
    z, y = batch()
    for wrong in (y[None], y[:-1], y[:, None, None], torch.stack([y, y], 1), y[0]):
        with pytest.raises(ValueError, match='target must have shape'):
            f(z, wrong)


@each_loss
def test_what_is_no_tensor_of_the_right_kind(f):
    z, y = batch()
    for wrong in (z.tolist(), None, z.detach().numpy(), z.long(), z * 1j):
        assert one_line(f, wrong, y).startswith('logits must be ')
    for wrong in (y.tolist(), None, y.numpy(), y.float(), y * 1j):
        assert one_line(f, z, wrong).startswith('target must ')


@each_module
def test_tabular_learner(make, tmp_path):
    pd = pytest.importorskip('pandas')
    from fastai.tabular.all import (
        Categorify,
        CategoryBlock,
        TabularDataLoaders,
        tabular_learner,
    )

    frame = pd.DataFrame(
        dict(
            a=torch.randn(96).tolist(),
            kind=list('xyz') * 32,
            y=[str(i % K) for i in range(96)],
        )
    )
    dls = TabularDataLoaders.from_df(
        frame,
        path=tmp_path,
        procs=[Categorify],
        cat_names=['kind'],
        cont_names=['a'],
        y_names='y',
        y_block=CategoryBlock(),
        valid_idx=range(64, 96),
        bs=16,
    )
    learn = tabular_learner(dls, layers=[8], loss_func=make(), n_out=K)
    assert dls.one_batch()[-1].ndim == 2  # the targets are (N, 1)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        probabilities, _targets, decoded = learn.get_preds(with_decoded=True)
        rows = learn.get_preds(with_loss=True)[2]
    assert all(p.isfinite().all() for p in learn.model.parameters())
    assert (
        torch.equal(decoded.flatten(), probabilities.argmax(1))
        and len(rows) == 32
        and rows.ndim == 1
    )


@each_loss
@pytest.mark.parametrize('ignore_index', [-100, 2, 255])
def test_targets_out_of_bounds(f, ignore_index):
    z, y = batch()
    for wrong in (K, K + 90, -1, -K):
        t = y.clone()
        t[3] = wrong
        t[5] = ignore_index
        for kwargs in (
            dict(),
            dict(reduction='none'),
            dict(weight=torch.ones(K).double()),
        ):
            with pytest.raises(
                ValueError, match=f'target {wrong} is out of bounds'
            ) as e:
                f(z, t, ignore_index=ignore_index, **kwargs)
            assert len(str(e.value).splitlines()) == 1
        with pytest.raises(RuntimeError, match='out of bounds'):
            torch.func.grad(partial(f, ignore_index=ignore_index))(z.detach(), t)
        with pytest.raises(RuntimeError, match='out of bounds'):
            torch.vmap(partial(f, ignore_index=ignore_index))(z.detach()[None], t[None])
        with pytest.raises(ValueError, match='out of bounds'):
            f(z, t.to(torch.int32), ignore_index=ignore_index)


# ---- arguments -------------------------------------------------------------------------------------------------------


@each_loss
def test_class_weights_that_do_not_fit(f):
    z, y = batch()
    for wrong in (
        torch.ones(K - 1),
        torch.ones(K + 1),
        torch.ones(1),
        torch.tensor(1.0),
        torch.ones(1, K),
        [1.0] * K,
    ):
        with pytest.raises(
            ValueError, match=r'weight must be a tensor of shape \(6,\)'
        ):
            f(z, y, weight=wrong)
    with pytest.raises(ValueError, match='device'):
        f(z, y, weight=torch.ones(K, device='meta'))


@each_module
def test_class_weights_of_a_module_that_do_not_fit(make):
    z, y = batch()
    with pytest.raises(ValueError, match=r'weight must be a tensor of shape \(6,\)'):
        make(weight=torch.ones(K - 1))(z, y)


@each_loss
def test_class_weights_are_learned(f):
    z, y = batch()
    w = (torch.rand(K).double() + 0.5).requires_grad_()
    rows, v = f(z, y, reduction='none').detach(), torch.randn(K).double()
    for reduction, value in (
        ('mean', (rows * w[y]).sum() / w[y].sum()),
        ('sum', (rows * w[y]).sum()),
    ):
        (clean,) = torch.autograd.grad(value, w)
        got = torch.autograd.grad(f(z, y, weight=w, reduction=reduction), (w, z))
        assert torch.allclose(got[0], clean, atol=1e-12)
        assert torch.allclose(
            got[1],
            gradient(f, z, y, weight=w.detach(), reduction=reduction)[1],
            atol=1e-12,
        )
        along = torch.func.jvp(
            lambda u: f(z.detach(), y, weight=u, reduction=reduction),
            (w.detach(),),
            (v,),
        )[1]
        assert torch.allclose(along, (clean * v).sum(), atol=1e-12)
        with forward_ad.dual_level():
            dual = f(
                z.detach(),
                y,
                weight=forward_ad.make_dual(w.detach(), v),
                reduction=reduction,
            )
            assert torch.allclose(
                forward_ad.unpack_dual(dual).tangent, (clean * v).sum(), atol=1e-12
            )


@each_loss
def test_numbers_that_are_not_finite_are_refused(f):
    inner, (z, y) = getattr(f, 'func', f), batch()
    for name in ('alpha', 'lam', 'gamma', 'xi'):
        if name not in inspect.signature(inner).parameters:
            continue
        for value in (math.inf, -math.inf, math.nan):
            with pytest.raises(ValueError, match=name):
                inner(z, y, **{**(f.keywords if inner is not f else {}), name: value})


def test_weight_by_position():
    "It is the class weights, as for `F.cross_entropy`, or it is refused: it never becomes another parameter."
    (z, y), w = batch(), torch.rand(K).double() + 0.5
    for f in (L.reverse_cross_entropy, R.published_complement_entropy_loss):
        assert torch.equal(f(z, y, w), f(z, y, weight=w))
    for f in (
        L.complement_entropy_loss,
        L.complement_entropy,
        L.guided_complement_entropy,
        L.smoothed_cross_entropy,
        R.published_guided_complement_entropy,
        R.complement_cross_entropy,
        R.hierarchical_complement_entropy_loss,
        R.probabilistically_compact_loss,
    ):
        with pytest.raises((ValueError, TypeError)) as e:
            f(z, y, w)
        assert len(str(e.value).splitlines()) == 1
    for cls in (L.ReverseCrossEntropyLoss, R.PublishedComplementEntropyLoss):
        assert torch.equal(cls(w)(z, y), cls(weight=w)(z, y))
    for cls in (
        L.ComplementEntropyLoss,
        L.GuidedComplementEntropyLoss,
        L.SmoothedCrossEntropyLoss,
        R.PublishedGuidedComplementEntropyLoss,
        R.ComplementCrossEntropyLoss,
        R.HierarchicalComplementEntropyLoss,
        R.ProbabilisticallyCompactLoss,
    ):
        with pytest.raises((ValueError, TypeError)) as e:
            cls(w)
        assert len(str(e.value).splitlines()) == 1


@each_loss
def test_devices(f):
    z, y = batch()
    for a, b in ((z, y.to('meta')), (z.detach().to('meta'), y)):
        with pytest.raises(ValueError, match='on one device'):
            f(a, b)
    leaf = torch.empty(5, K, device='meta', requires_grad=True)
    target = torch.empty(5, dtype=torch.long, device='meta')
    loss = (
        f(leaf, target)
        if 'groups' not in getattr(f, 'keywords', {})
        else f(leaf, target, groups=GROUPS.to('meta'))
    )
    loss.backward()
    assert loss.shape == () and loss.is_meta and leaf.grad.shape == leaf.shape


# ---- transforms ------------------------------------------------------------------------------------------------------


@each_loss
def test_forward_mode(f):
    z, y = batch()
    y[2] = -100
    v, (_, g) = torch.randn_like(z), gradient(f, z, y)
    assert torch.allclose(
        torch.func.jvp(lambda x: f(x, y), (z.detach(),), (v,))[1],
        (g * v).sum(),
        atol=1e-12,
    )
    assert torch.allclose(
        torch.func.jacfwd(lambda x: f(x, y))(z.detach()), g, atol=1e-12
    )
    row, t = z.detach()[:1], y[:1]
    expected = torch.autograd.functional.hessian(lambda x: f(x, t), row)
    assert torch.allclose(
        torch.func.hessian(lambda x: f(x, t))(row), expected, atol=1e-12
    )
    single = torch.func.jvp(
        lambda x: f(x, y, weight=torch.ones(K)), (z.detach().float(),), (v.float(),)
    )[1]
    assert single.dtype == torch.float32
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(z, v)
        loss = f(dual, y)
        assert torch.allclose(
            forward_ad.unpack_dual(loss).tangent, (g * v).sum(), atol=1e-12
        )
        along = forward_ad.unpack_dual(
            torch.autograd.grad(loss, dual)[0]
        ).tangent  # forward over reverse
    (exact,) = torch.autograd.grad(f(z, y), z, create_graph=True)
    assert torch.allclose(
        along, torch.autograd.grad((exact * v).sum(), z)[0], atol=1e-12
    )


@each_loss
def test_tangent_of_what_comes_from_above(f):
    z, y = batch()
    loss, (_, g) = f(z, y), gradient(f, z, y)
    with forward_ad.dual_level():
        above = forward_ad.make_dual(
            torch.ones((), dtype=z.dtype), torch.tensor(3.0, dtype=z.dtype)
        )
        (along,) = torch.autograd.grad(loss, z, above)
        assert torch.allclose(forward_ad.unpack_dual(along).tangent, 3 * g, atol=1e-12)


@each_loss
def test_many_gradients_at_once(f):
    z, y = batch()
    for reduction in ('mean', 'none'):
        loss = f(z, y, reduction=reduction)
        above = torch.randn(3, *loss.shape).double()
        (got,) = torch.autograd.grad(loss, z, above, is_grads_batched=True)
        for a, g in zip(above, got):
            assert torch.allclose(
                g,
                torch.autograd.grad(f(z, y, reduction=reduction), z, a)[0],
                atol=1e-12,
            )


@each_loss
def test_jit_trace(f):
    z, y = batch()
    z = z.detach()
    with warnings.catch_warnings():
        warnings.simplefilter('error', torch.jit.TracerWarning)
        warnings.filterwarnings('ignore', message='.*is deprecated')
        traced = torch.jit.trace(lambda a, b: f(a, b), (z, y))
        rows = torch.jit.trace(
            lambda a, b: f(a, b, reduction='none'), (z[..., None], y[:, None])
        )
    z, y = torch.randn(13, K).double(), torch.randint(K, (13,))
    y[4] = -100
    assert torch.allclose(traced(z, y), f(z, y), atol=1e-12)
    assert torch.allclose(
        rows(z[..., None], y[:, None])[:, 0], f(z, y, reduction='none'), atol=1e-12
    )
    y[5] = K
    with pytest.raises(RuntimeError, match='out of bounds'):
        traced(z, y)


def test_without_torchs_private_functions(monkeypatch):
    (z, y), close = batch(), partial(torch.allclose, atol=1e-12)
    expected = [(gradient(f, z, y), second(f, z, y)) for f in FUNCTIONS.values()]
    monkeypatch.delattr(torch, '_softmax_backward_data')
    monkeypatch.delattr(torch, '_log_softmax_backward_data')
    for f, (first, twice) in zip(FUNCTIONS.values(), expected):
        assert all(map(close, gradient(f, z, y) + second(f, z, y), first + twice))
    monkeypatch.setattr(
        base, '_transformed', lambda: True
    )  # what a torch without them gets
    monkeypatch.setattr(closed_form, '_many', lambda g: True)
    for f, (first, twice) in zip(FUNCTIONS.values(), expected):
        assert all(map(close, gradient(f, z, y) + second(f, z, y), first + twice))
        assert close(torch.func.grad(f)(z.detach(), y), first[1])


WITHOUT = """
import torch
for name in ('_softmax_backward_data', '_log_softmax_backward_data'):
    delattr(torch, name)
functorch = torch._C._functorch
del functorch.is_legacy_batchedtensor
for name in REMOVED:
    delattr(torch._C, name)
from complement_objectives import losses
from complement_objectives.losses import base, closed_form
assert closed_form._many(None) and base._transformed() == bool(REMOVED)
z = torch.linspace(-3, 3, 24).double().reshape(4, 6).requires_grad_()
y = torch.tensor([0, 5, 2, 2])
for f in (
    losses.complement_entropy_loss,
    losses.guided_complement_entropy,
    losses.reverse_cross_entropy,
):
    print(*torch.autograd.grad(f(z, y), z)[0].flatten().tolist())
"""


@pytest.mark.parametrize('removed', [[], ['_are_functorch_transforms_active']])
def test_a_torch_without_private_functions(removed):
    "In a process of its own, where they are gone before the losses are imported."
    script = WITHOUT.replace('REMOVED', repr(removed))
    run = [sys.executable, '-W', 'ignore', '-c', script]
    out = subprocess.run(run, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    z = torch.linspace(-3, 3, 24).double().reshape(4, 6).requires_grad_()
    y = torch.tensor([0, 5, 2, 2])
    for f, line in zip(
        (
            L.complement_entropy_loss,
            L.guided_complement_entropy,
            L.reverse_cross_entropy,
        ),
        out.stdout.splitlines(),
        strict=True,
    ):
        got = torch.tensor([float(v) for v in line.split()], dtype=torch.float64)
        assert torch.allclose(got, gradient(f, z, y)[1].flatten(), atol=1e-12)


TORCH = tuple(int(n) for n in torch.__version__.split('.')[:2])
COMPILED = ['complement_entropy_loss', 'guided_complement_entropy', 'cross-entropy']


@pytest.mark.parametrize('name', COMPILED)
def test_compiled(name):
    torch._dynamo.reset()
    f = FUNCTIONS[name]
    compiled = torch.compile(f, fullgraph=True)
    z, y = masked_batch(6)
    y[1] = -100
    z.data[1] = math.nan
    batches = [y, torch.full_like(y, -100)]
    if TORCH < (2, 14):  # 2.9 and 2.10, compiled, take 0/0 for 0
        batches.pop()
    for t in batches:
        (loss, g), (expected, clean) = gradient(compiled, z, t), gradient(f, z, t)
        assert torch.allclose(
            loss, expected, atol=1e-12, equal_nan=True
        ) and torch.allclose(g, clean, atol=1e-12)
    for wrong in (K, -1):
        with pytest.raises(RuntimeError, match='out of bounds'):
            compiled(z, torch.full_like(y, wrong))


# ---- modules ---------------------------------------------------------------------------------------------------------

CLASSES = [
    cls
    for cls in vars(losses).values()
    if inspect.isclass(cls) and issubclass(cls, losses.RowLoss)
]


def test_every_class_is_listed_and_says_whether_it_is_reverse():
    made = {make().__class__ for make in MODULES.values()}
    assert made == set(CLASSES) - {losses.RowLoss}
    assert [c for c in CLASSES if c.reverse] == [L.ReverseCrossEntropyLoss]
    assert not any(c.negated for c in CLASSES)


@each_module
def test_settings_repr_and_pickle(make):
    loss = make(weight=torch.ones(K).double(), ignore_index=-1, reduction='sum')
    parameters = inspect.signature(type(loss)).parameters
    assert set(loss.settings()) == set(parameters)
    assert all(name in parameters for name in loss.ranges)
    assert all(f'{name}=' in repr(loss) for name in parameters)
    (z, y), again = batch(), pickle.loads(pickle.dumps(loss))
    assert (
        torch.equal(again(z, y), loss(z, y))
        and again.settings().keys() == parameters.keys()
    )
    with pytest.raises(TypeError, match='unknown'):
        make(unknown=1)


@each_module
def test_ranges_are_kept_by_the_classes(make):
    for name, numbers in make().ranges.items():
        for value in (numbers.low - 1, numbers.high + 1, math.inf, math.nan):
            with pytest.raises(ValueError, match=f'^{name} must be '):
                type(make())(**{**make().settings(), name: value})


def test_a_loss_of_ones_own():
    class Plain(losses.RowLoss):
        def rows(self, z, t):
            return -z.log_softmax(1).gather(1, t[:, None]).squeeze(1)

    (z, y), w = batch(), torch.rand(K).double() + 0.5
    y[3] = -100
    for reduction in ('mean', 'sum', 'none'):
        ours = Plain(w, reduction=reduction)(z, y)
        assert torch.allclose(ours, F.cross_entropy(z, y, w, reduction=reduction))
    assert torch.allclose(
        second(Plain(), z, y)[1], second(FUNCTIONS['cross-entropy'], z, y)[1]
    )
    with pytest.raises(NotImplementedError, match='rows'):
        losses.RowLoss()(z, y)


def test_what_the_package_loads():
    script = "import sys, complement_objectives.losses; print(*{'fastai', 'matplotlib', 'pandas', 'foolbox'} & set(sys.modules))"
    run = [sys.executable, '-c', script]
    assert not subprocess.run(
        run, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
@pytest.mark.parametrize('weight', [None, torch.ones(4)])
@pytest.mark.parametrize('shape', ['a mean', 'a column', 'a matrix'])
def test_rows_of_a_wrong_shape_are_refused(shape, weight, reduction):
    class Wrong(losses.RowLoss):
        def rows(self, z, t):
            values = F.cross_entropy(z, t, reduction='none')
            wrong = {
                'a mean': values.mean(),
                'a column': values[:, None],
                'a matrix': z,
            }
            return wrong[shape]

    loss = Wrong(weight=weight, reduction=reduction)
    with pytest.raises(ValueError, match='rows must return one value a row'):
        loss(torch.randn(6, 4), torch.arange(6) % 4)


# ---- parameters ------------------------------------------------------------------------------------------------------

NUMBERS = [0.5, np.float32(0.5), np.array(0.5), torch.tensor(0.5)]
NO_NUMBERS = [True, np.bool_(True), torch.tensor(True), np.array(True), '1', None, 1j]
NO_NUMBERS += [10**400, 10**5000, [0.5], np.array([0.5]), torch.ones(K), np.array('1')]


@pytest.mark.parametrize('value', NUMBERS, ids=lambda o: type(o).__name__)
def test_a_number_of_any_kind(value):
    z, y = batch()
    loss = L.GuidedComplementEntropyLoss(value)
    assert type(loss.alpha) is float and 'alpha=0.5,' in repr(loss)
    assert torch.equal(loss(z, y), L.GuidedComplementEntropyLoss(0.5)(z, y))
    assert torch.allclose(L.guided_complement_entropy(z, y, value), loss(z, y))
    assert R.ProbabilisticallyCompactLoss(value, lam=value).settings()['lam'] == 0.5
    assert losses.Range(0, 1).allows(value)


@pytest.mark.parametrize('value', NO_NUMBERS, ids=lambda o: type(o).__name__)
def test_what_is_no_number(value):
    (z, y), positive = batch(), losses.Range(low=0)
    assert not positive.allows(value)
    for f in (
        partial(positive.check, 'alpha', value),
        partial(L.GuidedComplementEntropyLoss, value),
        partial(L.guided_complement_entropy, z, y, value),
    ):
        assert one_line(f).startswith('alpha must be ')


class Own(losses.RowLoss):
    ranges = dict(power=losses.Range(low=0), kind=('sum', 'max'))

    def __init__(self, power=1.0, kind='sum', **kwargs):
        super().__init__(**kwargs)
        self.keep_parameters(power=power, kind=kind)

    def rows(self, z, t):
        return z.exp().sum(1) ** self.power


class OwnPassedOn(Own):
    def __init__(self, **kw):
        super().__init__(**kw)


class OwnAndMore(OwnPassedOn):
    ranges = dict(shift=losses.Range())

    def __init__(self, shift=0, *, reduction='sum', **kw):
        super().__init__(reduction=reduction, **kw)
        self.keep_parameters(shift=shift)


def test_parameters_add_up_from_class_to_class():
    loss = OwnAndMore(2, power=3, kind='max', ignore_index=-1)
    rest = dict(weight=None, ignore_index=-1, reduction='sum')
    assert loss.settings() == dict(power=3, kind='max', shift=2, **rest)
    assert repr(loss).startswith("OwnAndMore(power=3, kind='max', shift=2, ")
    assert set(OwnAndMore.ranges) == {'power', 'kind', 'shift'}
    assert set(Own.ranges) == set(OwnPassedOn.ranges) == {'power', 'kind'}
    for cls in (Own, OwnPassedOn, OwnAndMore):
        parameters = inspect.signature(cls).parameters
        assert set(parameters) == set(cls().settings())
        assert parameters['power'].default == 1.0
    for wrong in (dict(power=-1), dict(kind='mean'), dict(kind=None), dict(kind=3)):
        name = next(iter(wrong))
        assert one_line(OwnAndMore, **wrong).startswith(f'{name} must be ')
    assert 'one of sum, max' in one_line(Own, kind=torch.ones(30, 30))
    with pytest.raises(TypeError, match='unknown'):
        OwnAndMore(unknown=1)


def test_a_learned_parameter_and_arrays_in_the_repr():
    loss = Own(nn.Parameter(torch.tensor(0.5)))
    assert [name for name, _ in loss.named_parameters()] == ['power']
    assert 'power=0.5,' in repr(loss)
    loss.keep_parameters(table=np.ones((2, 3)), centers=torch.ones(4, 5))
    assert 'table=(2, 3), centers=(4, 5)' in repr(loss)


NO_GROUPS = [[], [0.0] * K, [0, 0, 1, 1, 2, -1], [0, 0, 1, 1, 2, 10**400], [True] * K]
NO_GROUPS += [torch.ones(K).bool(), 'abcdef', None, 3, torch.tensor(3), [[0, 1]] * 3]
NO_GROUPS += [[0, [1]], ['a'] * K, np.array(['a'] * K), {0: 1}, [0j] * K, torch.ones(K)]
NO_GROUPS += [np.array([2**64 - 1] * K, np.uint64)]


@pytest.mark.parametrize('groups', NO_GROUPS, ids=lambda o: type(o).__name__)
def test_groups_that_are_none(groups):
    for f in (
        partial(R.HierarchicalComplementEntropyLoss, groups),
        partial(R.hierarchical_complement_entropy_loss, *batch(), groups),
    ):
        assert one_line(f).startswith('groups must be whole numbers of at least 0')


def test_groups():
    (z, y), cls = batch(), R.HierarchicalComplementEntropyLoss
    expected = cls(GROUPS)(z, y)
    for groups in (GROUPS.tolist(), tuple(GROUPS.tolist()), GROUPS.numpy()):
        assert torch.equal(cls(groups)(z, y), expected)
    for groups in (GROUPS.byte(), GROUPS.numpy().astype(np.uint64), 2**62 + GROUPS):
        assert torch.equal(cls(groups)(z, y), expected)
    for wrong in ([0], [0] * (K - 1), [0] * (K + 1)):
        assert 'of each of the 6 classes' in one_line(cls(wrong), z, y)


@pytest.mark.parametrize('value', [math.nan, math.inf, -1.0])
@pytest.mark.parametrize('reduction', ['mean', 'sum', 'none'])
def test_odd_class_weights_do_what_they_do_in_cross_entropy(value, reduction):
    (z, y), w = batch(), torch.ones(K).double()
    w[2] = value
    for t in (y, y.clamp(max=1)):
        expected = F.cross_entropy(z, t, w, reduction=reduction)
        found = FUNCTIONS['cross-entropy'](z, t, weight=w, reduction=reduction)
        assert torch.allclose(found, expected, equal_nan=True)


def test_help_says_what_a_function_computes():
    for name in losses.__all__:
        member = getattr(losses, name)
        if name.endswith(('_entropy', '_loss', 'Loss')) and 'plain' not in name:
            first, *rest = inspect.getdoc(member).splitlines()
            assert first and len(' '.join(rest)) > 60, name
    for f in FUNCTIONS.values():
        text = getattr(f, 'func', f).__doc__
        assert 'ValueError' in text and '(N, K)' in text and "'none'" in text
