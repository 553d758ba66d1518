"""The training callbacks in learners that are not theirs: tables, text, masks, callbacks of one's own, interruptions."""

import copy
import inspect
import math
import subprocess
import sys
import warnings
from functools import partial
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastai.basics import (
    Adam,
    CrossEntropyLossFlat,
    DataLoader,
    DataLoaders,
    L,
    Learner,
    SGD,
    TensorImage,
    TrainEvalCallback,
    accuracy,
    load_learner,
    noop,
)
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.rnn import ModelResetter, RNNCallback, RNNRegularizer
from fastai.callback.schedule import SuggestionMethod
from fastai.callback.training import GradientAccumulation
from fastai.data.transforms import Normalize
from fastai.losses import BaseLoss, FocalLossFlat, LabelSmoothingCrossEntropyFlat
from fastai.optimizer import OptimWrapper, ranger

from complement_objectives.training.adversarial import AdversarialTraining
from complement_objectives.training.complement import ComplementTraining
from complement_objectives.training.complement_control import JointComplementTraining
from complement_objectives.core import InputError, seed_everything
from complement_objectives.data import dataloaders, digits
from complement_objectives.training.guided import (
    GuidanceRecorder,
    GuidedComplementTraining,
    _guidance_sums,
    guidance,
)
from complement_objectives.training.reverse import ReverseTraining, accuracy_for
from complement_objectives.losses import (
    ComplementEntropyLoss,
    GuidedComplementEntropyLoss,
    Range,
    ReverseCrossEntropyLoss,
)
from complement_objectives.models import ReverseLogits, digits_cnn
from complement_objectives.training import (
    DeviceMixedPrecision,
    Objective,
    Parameter,
    ResumableTraining,
    check_objective,
    objective_learner,
    train_classifier,
)
from complement_objectives.training.registry import _TAKEN

# --- helpers

N_CLASSES = 4
sgd = partial(SGD, mom=0.9)


def batches(n=4, size=6, shape=(5,), target=(), seed=0, ignore=None):
    "Double precision; every second target is `ignore`, if that is given."
    g = torch.Generator().manual_seed(seed)
    made = [
        (
            torch.rand(size, *shape, generator=g, dtype=torch.double),
            torch.randint(N_CLASSES, (size, *target), generator=g),
        )
        for _ in range(n)
    ]
    if ignore is not None:
        for _, y in made:
            y.view(-1)[::2] = ignore
    return made


def network(width=5, out=N_CLASSES, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, out)).double()


def learner(
    data, model, loss_func=None, cbs=(), opt_func=sgd, default_cbs=False, **kwargs
):
    dls = DataLoaders(data, data[:1], device='cpu')
    cbs = [TrainEvalCallback(), *cbs] if not default_cbs else list(cbs)
    return Learner(
        dls,
        model,
        loss_func or nn.CrossEntropyLoss(),
        opt_func=opt_func,
        default_cbs=default_cbs,
        cbs=cbs,
        wd_bn_bias=True,
        **kwargs,
    )


def quiet(learn, n=1, lr=0.1, **kwargs):
    with learn.no_logging():
        learn.fit(n, lr, **kwargs)
    return learn


def entropy_loss(logits, target):
    "COT Eq 3, negated, from the softmax: (M, K), (M,) → number."
    rows = []
    for z, t in zip(logits, target):
        q = torch.cat([z[:t], z[t + 1 :]]).softmax(0)
        rows.append((q * q.log()).sum() / (len(z) - 1))
    return torch.stack(rows).mean()


def loop(data, model, primary, complement, lr=0.1, epochs=1, before=None):
    "Algorithm 1 written out; `primary` and `complement` take the network, x and y."
    opts = [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9) for _ in range(2)]
    for _ in range(epochs):
        if before:
            before(model)
        for x, y in data:
            for opt, loss in zip(opts, (primary, complement)):
                opt.zero_grad()
                loss(model, x, y).backward()
                opt.step()
    return model


def apart(a, b):
    return max(
        (p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters())
    )


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def moved(model, before):
    return max((p - q).abs().max().item() for p, q in zip(model.parameters(), before))


def finite(model):
    return all(p.isfinite().all() for p in model.parameters())


def columns(learn):
    return [m.name for m in learn.metrics]


class Interrupt(Callback):
    "Ctrl-C at an event of the `n`-th batch."

    run_valid = False

    def __init__(self, event, n=1):
        self.left, self.order = n, 13
        setattr(self, event, self.strike)

    def strike(self):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


# --- tables


@pytest.fixture(scope='module')
def table():
    from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders

    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        dict(
            color=rng.choice(['red', 'blue'], 120),
            size=rng.normal(size=120),
            weight=rng.normal(size=120),
        )
    )
    frame['kind'] = pd.Categorical.from_codes(
        (frame['size'] > 0).astype(int) + (frame['weight'] > 0), ['a', 'b', 'c']
    )
    return TabularDataLoaders.from_df(
        frame,
        procs=[Categorify, Normalize],
        cat_names=['color'],
        cont_names=['size', 'weight'],
        y_names='kind',
        valid_idx=list(range(40)),
        bs=20,
        device='cpu',
        num_workers=0,
    )


def tabular(dls, **kwargs):
    from fastai.tabular.all import tabular_learner

    torch.manual_seed(0)
    return tabular_learner(dls, layers=[16], metrics=accuracy, **kwargs)


WAYS = dict(
    complement=lambda l: l.to_complement(),
    joint=lambda l: l.to_joint_complement(),
    reverse=lambda l: l.to_reverse(),
    guided=lambda l: l.to_guided_complement(record='both'),
    warmup=lambda l: l.to_guided_complement(warmup=1),
    given=lambda l: l.to_complement(loss_func=ComplementEntropyLoss(normalize=False)),
    reverse_complement=lambda l: l.to_reverse().to_complement(),
    recorder=lambda l: l.add_cb(GuidanceRecorder(record='both')),
)


@pytest.mark.parametrize('way', WAYS)
def test_table(table, way):
    assert table.one_batch()[-1].shape == (20, 1)
    learn = WAYS[way](tabular(table))
    with learn.no_bar():
        quiet(learn, 4, 0.01)
    row = dict(
        zip(learn.recorder.metric_names[1:-1], map(float, learn.recorder.values[-1]))
    )
    assert finite(learn.model) and all(map(math.isfinite, row.values()))
    assert row['accuracy'] > 0.5  # of three classes


COT_CBS = [
    ComplementTraining,
    JointComplementTraining,
    GuidedComplementTraining,
    ReverseTraining,
    GuidanceRecorder,
]


@pytest.mark.parametrize('way', ['reverse', 'reverse_complement'])
def test_a_table_after_reversal(table, way):
    "A network of several inputs is left as an ordinary classifier that predicts the same, trains on, and is saved."
    learn = WAYS[way](tabular(table))
    with learn.no_bar():
        quiet(learn, 2, 0.01)
        before = learn.get_preds()[0]
        learn.remove_cbs(COT_CBS)
        assert isinstance(learn.model, ReverseLogits) and torch.allclose(
            learn.get_preds()[0], before, atol=1e-6
        )
        quiet(learn)
    assert finite(learn.model)


def test_parameter_groups_after_reversal(tmp_path):
    "A splitter knows the network, not what is around it."
    data = [(x.float(), y) for x, y in batches()]
    by_layer = lambda model: [list(model[0].parameters()), list(model[2].parameters())]
    learn = learner(
        data, network().float(), CrossEntropyLossFlat(), splitter=by_layer
    ).to_reverse()
    for _ in range(2):
        quiet(learn)
        learn.reverse_logits()
        learn.opt = None
        quiet(learn, lr=slice(1e-3, 1e-2))
        assert [len(group) for group in learn.opt.param_lists] == [2, 2]
        learn.to_reverse()
    plain = learner(
        data, network().float(), ReverseCrossEntropyLoss(), splitter=by_layer
    )
    quiet(plain).reverse_logits().opt = None
    assert finite(quiet(plain).model)


def test_accuracy_of_a_table():
    logits, y = torch.randn(30, 3), torch.randint(3, (30, 1))
    assert accuracy_for(CrossEntropyLossFlat())(logits, y) == accuracy(logits, y)
    assert accuracy_for(ReverseCrossEntropyLoss())(logits, y) == accuracy(-logits, y)


@pytest.mark.parametrize('way', ['complement', 'joint', 'reverse', 'guided'])
def test_columns_of_targets_train_as_plain_ones(way):
    flat, column = batches(), [(x, y[:, None]) for x, y in batches()]
    ends = []
    for data in (flat, column):
        ends.append(
            quiet(WAYS[way](learner(data, network(), CrossEntropyLossFlat())), 2).model
        )
    assert apart(*ends) < 1e-12 and apart(ends[0], network()) > 1e-3


# --- what the learner's loss ignores and how it flattens


class Pixelwise(nn.Module):
    "A linear classifier of every pixel."

    def __init__(self, axis):
        super().__init__()
        torch.manual_seed(3)
        self.axis, self.head = axis, nn.Linear(3, N_CLASSES).double()

    def forward(self, x):
        return self.head(x).movedim(-1, self.axis)


SHAPES = {
    'sequences': (-1, (7, 3), (7,)),
    'masks': (1, (3, 4, 3), (3, 4)),
    'volumes': (1, (2, 3, 4, 3), (2, 3, 4)),
    'rows': (-1, (3,), ()),
}


def kept_rows(logits, y, axis, ignore):
    z, t = logits.movedim(axis, -1).reshape(-1, N_CLASSES), y.reshape(-1)
    return z[t != ignore], t[t != ignore]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('ignore', [-100, 255, 0])
def test_ignored_targets_and_axis_of_the_loss(shape, ignore):
    axis, x_shape, y_shape = SHAPES[shape]
    data = batches(shape=x_shape, target=y_shape, ignore=ignore)

    def primary(model, x, y):
        return F.cross_entropy(*kept_rows(model(x), y, axis, ignore))

    def complement(model, x, y):
        return entropy_loss(*kept_rows(model(x), y, axis, ignore))

    # torch's loss inside a BaseLoss of the axis; volumes are not for fastai's own flattening, which mixes up their axes
    loss_func = (
        CrossEntropyLossFlat(axis=axis, ignore_index=ignore)
        if shape != 'volumes'
        else nn.CrossEntropyLoss(ignore_index=ignore)
    )
    double = nn.CrossEntropyLoss(ignore_index=ignore)

    class Loss(
        CrossEntropyLossFlat
    ):  # fastai's rounds to single precision nowhere, but its result is a TensorBase
        def __call__(self, z, t):
            return double(*kept_rows(z, t, axis, ignore))

    exact = Loss(axis=axis, ignore_index=ignore)
    cot = quiet(learner(data, Pixelwise(axis), exact).to_complement(), 2).model
    assert (
        apart(cot, loop(data, Pixelwise(axis), primary, complement, epochs=2)) < 1e-10
    )
    joint = quiet(
        learner(data, Pixelwise(axis), exact).to_joint_complement(weight=2.0), 2
    ).model
    summed = Pixelwise(axis)
    opt = torch.optim.SGD(summed.parameters(), lr=0.1, momentum=0.9)
    for x, y in data * 2:
        opt.zero_grad()
        (primary(summed, x, y) + 2 * complement(summed, x, y)).backward()
        opt.step()
    assert apart(joint, summed) < 1e-10
    assert finite(
        quiet(learner(data, Pixelwise(axis), loss_func).to_complement()).model
    )


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('way', ['guided', 'reverse'])
def test_own_losses_read_as_the_former_one(shape, way):
    axis, x_shape, y_shape = SHAPES[shape]
    data = batches(shape=x_shape, target=y_shape, ignore=255)
    learn = learner(
        data,
        Pixelwise(axis),
        CrossEntropyLossFlat(axis=axis, ignore_index=255),
        [GuidanceRecorder(record='train')],
    )
    if way == 'guided':
        learn.remove_cb(GuidanceRecorder)
    plain = (
        GuidedComplementEntropyLoss() if way == 'guided' else ReverseCrossEntropyLoss()
    )
    by_hand = Pixelwise(axis)
    opt = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        opt.zero_grad()
        plain(*kept_rows(by_hand(x), y, axis, 255)).backward()
        opt.step()
    assert apart(quiet(WAYS[way](learn)).model, by_hand) < 1e-10
    x, y = data[0]
    loss = learn.loss_func
    assert torch.equal(
        loss.decodes(loss.activation(learn.model(x))), learn.model(x).argmax(axis)
    )
    assert torch.allclose(
        loss.activation(learn.model(x)).sum(axis), torch.ones(y.shape).double()
    )


@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8])
@pytest.mark.parametrize('own', [-100, 2])
def test_a_given_loss_leaves_out_what_the_learner_s_leaves_out(own, dtype):
    data = batches(shape=(3, 4, 3), target=(3, 4), ignore=255)
    if own == 2:
        for _, y in data:
            y.view(-1)[1::4] = 2
    data = [(x, y.to(dtype)) for x, y in data]

    def rows(model, x, y, skip):
        z, t = model(x).movedim(1, -1).reshape(-1, N_CLASSES), y.reshape(-1).long()
        keep = torch.stack([t != i for i in skip]).all(0)
        return z[keep], t[keep]

    double = nn.CrossEntropyLoss(ignore_index=255)

    class Loss(CrossEntropyLossFlat):
        def __call__(self, z, t):
            return double(z, t.long())

    seen = []

    class Note(Callback):
        order = 70

        def after_train(self):
            seen.append(self.complement_training.epoch_complement.item())

    learn = learner(data, Pixelwise(1), Loss(axis=1, ignore_index=255)).to_complement(
        loss_func=ComplementEntropyLoss(ignore_index=own)
    )
    written = loop(
        data,
        Pixelwise(1),
        lambda m, x, y: F.cross_entropy(*rows(m, x, y, [255])),
        lambda m, x, y: entropy_loss(*rows(m, x, y, [255, own])),
    )
    assert apart(quiet(learn).model, written) < 1e-10
    start = Pixelwise(1)
    still = learner(data, Pixelwise(1), Loss(axis=1, ignore_index=255)).to_complement(
        loss_func=ComplementEntropyLoss(ignore_index=own)
    )
    quiet(still, lr=0.0, cbs=Note())
    pairs = [rows(start, x, y, [255, own]) for x, y in data]
    assert seen[0] == pytest.approx(
        entropy_loss(*map(torch.cat, zip(*pairs))).item(), abs=1e-12
    )


LOSSES = {
    'torch': nn.CrossEntropyLoss(ignore_index=7),
    'function': F.cross_entropy,
    'partial': partial(F.cross_entropy, ignore_index=7),
    'fastai': CrossEntropyLossFlat(ignore_index=7),
    'smoothed': nn.CrossEntropyLoss(ignore_index=7, label_smoothing=0.1),
    'fastai smoothed': LabelSmoothingCrossEntropyFlat(),
    'focal': FocalLossFlat(),
    'BaseLoss': BaseLoss(nn.CrossEntropyLoss, ignore_index=7),
    'GCE': GuidedComplementEntropyLoss(ignore_index=7),
}


@pytest.mark.parametrize('name', LOSSES)
def test_ignored_index_of_every_kind_of_loss(name):
    ignoring = name not in ('function', 'fastai smoothed', 'focal')
    data = batches(ignore=7 if ignoring else None)
    assert finite(quiet(learner(data, network(), LOSSES[name]).to_complement()).model)


# --- what the learner's callbacks make of a prediction


class Words(nn.Module):
    "A small text classifier as fastai's: logits, raw and dropped-out activations."

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.rnn, self.head = (
            nn.Embedding(20, 6),
            nn.RNN(6, 6, batch_first=True),
            nn.Linear(6, N_CLASSES),
        )

    def forward(self, x):
        out, _ = self.rnn(self.embed(x))
        return self.head(out[:, -1]), out, out

    def reset(self):
        pass


def sentences(n=4, size=6, target=()):
    g = torch.Generator().manual_seed(5)
    return [
        (
            torch.randint(20, (size, 7), generator=g),
            torch.randint(N_CLASSES, (size, *target), generator=g),
        )
        for _ in range(n)
    ]


def test_recurrent_classifier():
    data = sentences()

    def primary(model, x, y):
        z, raw, out = model(x)
        return (
            F.cross_entropy(z, y)
            + 2 * out.pow(2).mean()
            + (raw[:, 1:] - raw[:, :-1]).pow(2).mean()
        )

    written = loop(
        data,
        Words().double(),
        primary,
        lambda model, x, y: entropy_loss(model(x)[0], y),
    )
    learn = learner(
        data,
        Words().double(),
        cbs=[ModelResetter(), RNNCallback(), RNNRegularizer(2.0, 1.0)],
    ).to_complement()
    assert (
        apart(quiet(learn).model, written) < 1e-6
    )  # the regularizer works in single precision
    assert apart(written, Words().double()) > 1e-3


@pytest.mark.parametrize(
    'way', ['complement', 'joint', 'guided', 'reverse', 'reverse_complement']
)
def test_fastai_text_classifier(way, tmp_path):
    from fastai.text.all import AWD_LSTM, awd_lstm_clas_config, text_classifier_learner

    data = sentences()
    dls = DataLoaders(
        DataLoader([(x[i], y[i]) for x, y in data for i in range(6)], bs=6),
        DataLoader([(x[i], y[i]) for x, y in data[:1] for i in range(6)], bs=6),
        device='cpu',
    )
    dls.vocab, dls.c, dls.path = (
        L([f'w{i}' for i in range(20)], list(range(N_CLASSES))),
        N_CLASSES,
        tmp_path,
    )
    config = dict(awd_lstm_clas_config, emb_sz=8, n_hid=8, n_layers=2)
    learn = WAYS[way](
        text_classifier_learner(
            dls,
            AWD_LSTM,
            pretrained=False,
            config=config,
            loss_func=CrossEntropyLossFlat(),
            metrics=accuracy,
            path=tmp_path,
        )
    )
    with learn.no_bar():
        quiet(learn, 2, 0.01)
        assert finite(learn.model) and all(
            math.isfinite(float(v)) for v in learn.recorder.values[-1]
        )
        before = learn.get_preds()[0]
        learn.remove_cbs(COT_CBS)
        assert torch.allclose(learn.get_preds()[0], before, atol=1e-6)
        learn.opt = None  # its splitter and `reset` are those of the network
        assert finite(quiet(learn, lr=0.01).model)


class Tagger(nn.Module):
    "A language model that goes on from where the last batch ended."

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.cell, self.head = (
            nn.Embedding(20, 6),
            nn.RNN(6, 6, batch_first=True),
            nn.Linear(6, N_CLASSES),
        )
        self.hidden = None

    def forward(self, x):
        out, h = self.cell(self.embed(x), self.hidden)
        self.hidden = h.detach()
        return self.head(out)

    def reset(self):
        self.hidden = None


@pytest.mark.parametrize('accumulated', [False, True])
def test_state_of_a_language_model(accumulated):
    data, model = sentences(target=(7,)), Tagger().double()
    opts = [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for _ in range(2)]
    groups = [data[:2], data[2:]] if accumulated else [[b] for b in data]
    flat = lambda z, y: (z.flatten(0, 1), y.flatten())
    for _ in range(2):
        model.reset()
        for group in groups:
            starts = []
            opts[0].zero_grad()
            for x, y in group:
                starts.append(model.hidden)
                (F.cross_entropy(*flat(model(x), y)) / len(group)).backward()
            opts[0].step()
            after = model.hidden
            opts[1].zero_grad()
            for (x, y), start in zip(group, starts):
                model.hidden = start
                (entropy_loss(*flat(model(x), y)) / len(group)).backward()
            opts[1].step()
            model.hidden = after

    class Flat(CrossEntropyLossFlat):
        def __call__(self, z, y):
            return F.cross_entropy(*flat(z, y))

    cbs = [ModelResetter(), *([GradientAccumulation(12)] if accumulated else [])]
    assert (
        apart(
            quiet(
                learner(data, Tagger().double(), Flat(), cbs).to_complement(), 2
            ).model,
            model,
        )
        < 1e-12
    )


def test_reversed_logits_reach_the_complement_loss():
    data = batches()

    def primary(model, x, y):
        return ReverseCrossEntropyLoss()(model(x), y)

    def complement(model, x, y):
        return entropy_loss(-model(x), y)

    written = loop(data, network(), primary, complement)
    ways = dict(
        callback=learner(data, network()).to_reverse().to_complement(),
        other_order=learner(data, network()).to_complement().to_reverse(),
        loss=learner(data, network(), ReverseCrossEntropyLoss()).to_complement(),
    )
    for name, learn in ways.items():
        assert apart(quiet(learn).model, written) < 1e-12, name
    unnegated = loop(
        data, network(), primary, lambda model, x, y: entropy_loss(model(x), y)
    )
    assert apart(written, unnegated) > 1e-3
    joint = [
        quiet(l.to_joint_complement()).model
        for l in (
            learner(data, network()).to_reverse(),
            learner(data, network(), ReverseCrossEntropyLoss()),
        )
    ]
    assert apart(*joint) < 1e-12


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x), x


class First(Callback):
    def after_pred(self):
        self.learn.pred = self.pred[0]


class Permute(Callback):
    "Moves classes about, in logits and targets, after the network has spoken."

    order = 40

    def after_pred(self):
        self.learn.pred, self.learn.yb = (
            self.pred.roll(1, 1),
            ((self.yb[0] + 1) % N_CLASSES,),
        )


class Late(Callback):
    "Changes the batch after `ComplementTraining` has seen the event."

    order = 60

    def before_batch(self):
        self.learn.xb = (self.xb[0] * 2,)


CHANGES = {
    'tuple': (Pair, [First()], lambda m, x, y: (m(x)[0], y)),
    'permuted': (network, [Permute()], lambda m, x, y: (m(x), y)),
    'late': (network, [Late()], lambda m, x, y: (m(2 * x), y)),
    'all': (Pair, [First(), Permute(), Late()], lambda m, x, y: (m(2 * x)[0], y)),
    'reverse of a tuple': (
        Pair,
        [First(), ReverseTraining()],
        lambda m, x, y: (-m(x)[0], y),
    ),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('accumulated', [False, True])
def test_callbacks_of_one_s_own(change, accumulated):
    make, cbs, read = CHANGES[change]
    data = batches()
    reverse = any(isinstance(cb, ReverseTraining) for cb in cbs)

    def primary(model, x, y):
        z, t = read(model, x, y)
        return ReverseCrossEntropyLoss()(-z, t) if reverse else F.cross_entropy(z, t)

    def complement(model, x, y):
        return entropy_loss(*read(model, x, y))

    big = (
        [
            (torch.cat([a, c]), torch.cat([b, d]))
            for (a, b), (c, d) in zip(data[::2], data[1::2])
        ]
        if accumulated
        else data
    )
    extra = [GradientAccumulation(12)] if accumulated else []
    learn = learner(data, make(), cbs=[*copy.deepcopy(cbs), *extra]).to_complement()
    written = loop(big, make(), primary, complement)
    got = quiet(learn).model
    got = got.model if isinstance(got, ReverseLogits) else got
    assert apart(got, written) < 1e-12


@pytest.mark.parametrize('mix', [MixUp, CutMix])
@pytest.mark.parametrize('way', ['complement', 'joint'])
def test_two_true_classes_are_refused(mix, way):
    learn = WAYS[way](learner(batches(), network(), cbs=[mix()]))
    before = parameters(learn.model)
    with pytest.raises(InputError, match='one true class'):
        quiet(learn)
    assert moved(learn.model, before) == 0


def test_bfloat16_sees_the_prediction_too():
    data = [(x.float(), y) for x, y in batches()]

    def one(*cbs):
        return quiet(
            learner(
                data, Pair().float(), cbs=[First(), ReverseTraining(), *cbs]
            ).to_complement()
        ).model

    exact, half = one(), one(DeviceMixedPrecision('bf16'))
    assert 1e-6 < apart(exact, half) < 0.05
    assert not torch.is_autocast_enabled('cpu')


# --- a batch in which nothing counts

IGNORED = dict(WAYS, plain_gce=lambda l: l, plain_rce=lambda l: l)


@pytest.mark.parametrize('way', IGNORED)
def test_a_batch_without_targets(way, tmp_path):
    data = [(x.float(), y) for x, y in batches(n=6)]
    data[2] = data[2][0], torch.full_like(data[2][1], -100)
    loss_func = dict(
        plain_gce=GuidedComplementEntropyLoss(), plain_rce=ReverseCrossEntropyLoss()
    ).get(way, CrossEntropyLossFlat())
    learn = IGNORED[way](
        learner(data, network().float(), loss_func, default_cbs=True, path=tmp_path)
    )
    with learn.no_bar():
        quiet(learn, 2)
    assert finite(learn.model)
    row = dict(
        zip(learn.recorder.metric_names[1:-1], map(float, learn.recorder.values[-1]))
    )
    assert math.isfinite(row['valid_loss'])
    if 'complement_loss' in row:
        assert -math.log(3) < row['complement_loss'] < 0


def test_the_column_counts_targets():
    data = batches(n=3)
    data[1][1][:4] = -100
    data[2][1][:] = -100
    start = network()
    frozen = learner(data, copy.deepcopy(start), cbs=[ComplementTraining()])
    seen = []

    class Note(Callback):
        order = 70

        def after_train(self):
            seen.append(self.complement_training.epoch_complement.item())

    quiet(frozen, lr=0.0, cbs=Note())
    rows = [(start(x)[y != -100], y[y != -100]) for x, y in data]
    assert seen[0] == pytest.approx(
        entropy_loss(
            torch.cat([z for z, _ in rows]), torch.cat([t for _, t in rows])
        ).item(),
        abs=1e-12,
    )


def test_guidance_of_ignored_nan():
    logits, y = torch.randn(6, 4).double(), torch.tensor([0, 1, -100, 3, 2, -100])
    logits[2] = math.nan
    learn = learner(
        [(logits, y)], nn.Identity(), cbs=[GuidanceRecorder(record='valid')]
    )
    quiet_validate(learn)
    expected = guidance(logits[y >= 0], y[y >= 0])
    for name, value in learn.guidance_recorder._means.items():
        assert value == pytest.approx(expected[name].mean().item(), abs=1e-6)


def quiet_validate(learn):
    learn.model.register_parameter('unused', nn.Parameter(torch.zeros(1)))
    learn.opt = None
    with learn.no_logging():
        learn.validate()


# --- lr_find

SUGGEST = (
    SuggestionMethod.Valley,
    SuggestionMethod.Slide,
    SuggestionMethod.Minimum,
    SuggestionMethod.Steep,
)
FINDERS = {
    'GCE': (GuidedComplementEntropyLoss, lambda l: l),
    'GCE, α = 1': (partial(GuidedComplementEntropyLoss, 1.0), lambda l: l),
    'COT': (CrossEntropyLossFlat, WAYS['complement']),
    'joint': (CrossEntropyLossFlat, WAYS['joint']),
    'guided': (CrossEntropyLossFlat, WAYS['guided']),
    'GCE and COT': (GuidedComplementEntropyLoss, WAYS['complement']),
    'GCE and joint': (GuidedComplementEntropyLoss, WAYS['joint']),
    'complement entropy': (ComplementEntropyLoss, lambda l: l),
    'guided and COT': (
        CrossEntropyLossFlat,
        lambda l: l.to_guided_complement().to_complement(),
    ),
    'reverse': (CrossEntropyLossFlat, WAYS['reverse']),
}


def blobs(n=4, size=30):
    g = torch.Generator().manual_seed(0)
    centers = 3 * torch.randn(N_CLASSES, 5, generator=g)
    ys = [torch.randint(N_CLASSES, (size,), generator=g) for _ in range(n)]
    return [(centers[y] + torch.randn(size, 5, generator=g), y) for y in ys]


@pytest.mark.parametrize('name', FINDERS)
def test_lr_find(name, tmp_path):
    loss_func, way = FINDERS[name]
    learn = way(
        learner(
            blobs(),
            network().float(),
            loss_func(),
            opt_func=Adam,
            default_cbs=True,
            path=tmp_path,
        )
    )
    before = parameters(learn.model)
    with learn.no_bar():
        found = learn.lr_find(show_plot=False, suggest_funcs=SUGGEST)
    assert moved(learn.model, before) == 0
    assert all(1e-7 <= lr <= 10 for lr in found)
    assert 1e-5 < found.valley < 1 and len(learn.recorder.losses) > 20
    if name == 'complement entropy':
        return  # falls for any network
    with learn.no_bar():
        quiet(learn, 8, found.valley)
    right = (
        learn.model(torch.cat([x for x, _ in blobs()])).argmax(1)
        if 'reverse' not in name
        else learn.model(torch.cat([x for x, _ in blobs()])).argmin(1)
    )
    assert (right == torch.cat([y for _, y in blobs()])).float().mean() > 0.7


@pytest.mark.parametrize('name', ['xe', 'cot', 'gce', 'rce'])
def test_lr_find_by_name(name, tmp_path):
    data = blobs()
    dls = DataLoaders(data, data[:1], device='cpu')
    dls.c = N_CLASSES
    learn = objective_learner(dls, network().float(), name, path=tmp_path)
    with learn.no_bar():
        assert 1e-5 < learn.lr_find(show_plot=False).valley < 1


@pytest.mark.parametrize('first', ['fastai', 'losses'])
@pytest.mark.parametrize(
    'loss',
    [
        'guided_complement_entropy',
        'BaseLoss(GuidedComplementEntropyLoss)',
        'pickle.loads(pickle.dumps(GuidedComplementEntropyLoss()))',
    ],
)
def test_lr_find_by_the_losses_alone(first, loss, tmp_path):
    "Functions and modules, whichever of the two packages is imported first."
    imports = {
        'fastai': 'from fastai.basics import *\nfrom fastai.callback.schedule import lr_find',
        'losses': 'from complement_objectives.losses import *\nloss_func = GuidedComplementEntropyLoss()',
    }
    lines = [
        imports[first],
        *imports.values(),
        'import pickle, torch',
        'from fastai.losses import BaseLoss',
        'data = [(torch.randn(8, 5), torch.randint(4, (8,)))]*4',
        f'learn = Learner(DataLoaders(data, data[:1], device="cpu"), torch.nn.Linear(5, 4), {loss}, path={str(tmp_path)!r})',
        'print(learn.lr_find(show_plot=False, num_it=20, end_lr=1.).valley)',
    ]
    out = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', '\n'.join(lines)],
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert 1e-7 < float(out.stdout.split()[-1]) < 1


def test_lr_find_still_stops_where_a_loss_above_zero_explodes(tmp_path):
    learn = learner(
        blobs(),
        network().float(),
        lambda z, y: F.cross_entropy(300 * z, y),
        default_cbs=True,
        path=tmp_path,
    )
    with learn.no_bar():
        learn.lr_find(show_plot=False, end_lr=1e4)
    assert len(learn.recorder.losses) < 100


# --- interruptions


@pytest.mark.parametrize(
    'event', ['after_pred', 'before_step', 'after_step', 'before_validate']
)
@pytest.mark.parametrize(
    'way', ['complement', 'joint', 'warmup', 'reverse_complement', 'recorder']
)
def test_after_ctrl_c(event, way, tmp_path):
    def fresh():
        return learner(
            [(x.float(), y) for x, y in batches()],
            network().float(),
            CrossEntropyLossFlat(),
            default_cbs=True,
            path=tmp_path,
            metrics=accuracy,
        )

    learn = fresh()
    loss_func = learn.loss_func
    WAYS[way](learn)
    with learn.no_bar():
        with pytest.raises(KeyboardInterrupt):
            quiet(
                learn, 2, cbs=Interrupt(event, 2 if event != 'before_validate' else 1)
            )
        quiet(learn)  # goes on
        assert finite(learn.model)
        with pytest.raises(KeyboardInterrupt):
            quiet(
                learn, 2, cbs=Interrupt(event, 2 if event != 'before_validate' else 1)
            )
        learn.remove_cbs(
            [
                ComplementTraining,
                JointComplementTraining,
                GuidedComplementTraining,
                ReverseTraining,
                GuidanceRecorder,
            ]
        )
        assert columns(learn) == ['accuracy'] and learn.loss_func is loss_func
        assert sorted(cb.name for cb in learn.cbs) == sorted(
            cb.name for cb in fresh().cbs if cb.name != 'progress'
        )
        quiet(learn)
        assert list(learn.recorder.metric_names) == [
            'epoch',
            'train_loss',
            'valid_loss',
            'accuracy',
            'time',
        ]
        assert len(learn.validate()) == 2


class Strike(nn.Module):
    "Ctrl-C in the network, in its n-th forward pass in training mode."

    def __init__(self, n):
        super().__init__()
        self.inner, self.left = network().float(), n

    def forward(self, x):
        self.left -= self.training
        if not self.left:
            raise KeyboardInterrupt
        return self.inner(x)


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_after_ctrl_c_in_either_pass(n, tmp_path):
    "The odd passes are primary ones. What follows is as if the interrupted batch had not been."
    data = [(x.float(), y) for x, y in batches()]
    learn = learner(
        data, Strike(n), CrossEntropyLossFlat(), default_cbs=True, path=tmp_path
    ).to_complement()
    with learn.no_bar():
        with pytest.raises(KeyboardInterrupt):
            quiet(learn)
        assert columns(learn) == ['complement_loss']
        learn.remove_cb(ComplementTraining)
        assert columns(learn) == [] and all(
            p.grad is None for p in learn.model.parameters()
        )
        quiet(learn)
        learn.to_complement()
        quiet(learn)
    assert 'complement_loss' in learn.recorder.metric_names


def test_autocast_ends_with_an_interrupted_second_pass(tmp_path):
    data = [(x.float(), y) for x, y in batches()]
    learn = learner(
        data,
        Strike(2),
        CrossEntropyLossFlat(),
        [DeviceMixedPrecision('bf16')],
        default_cbs=True,
        path=tmp_path,
    ).to_complement()
    with learn.no_bar(), pytest.raises(KeyboardInterrupt):
        quiet(learn)
    assert not torch.is_autocast_enabled('cpu')


@pytest.mark.parametrize('event', ['after_pred', 'after_loss'])
def test_autocast_ends_with_our_mixed_precision(event, tmp_path):
    data = [(x.float(), y) for x, y in batches()]
    for remove in (True, False):
        learn = learner(
            data,
            network().float(),
            CrossEntropyLossFlat(),
            [DeviceMixedPrecision('bf16')],
            default_cbs=True,
            path=tmp_path,
        )
        interrupt = Interrupt(event)
        interrupt.order = 9
        with learn.no_bar():
            with pytest.raises(KeyboardInterrupt):
                quiet(learn, cbs=interrupt)
            if remove:
                learn.remove_cb(DeviceMixedPrecision)
            else:
                quiet(learn)
        assert not torch.is_autocast_enabled('cpu')


# --- settings that cannot work


@pytest.mark.parametrize(
    'make, message',
    [
        (lambda: ComplementTraining(loss_func='primry'), 'did you mean primary'),
        (lambda: ComplementTraining(loss_func=3), 'loss_func'),
        (lambda: ComplementTraining(ComplementEntropyLoss), 'Loss\\(\\)'),
        (lambda: ComplementTraining(optimizer='secnd'), 'did you mean second'),
        (lambda: ComplementTraining(wd=-1), 'wd must be'),
        (lambda: ComplementTraining(wd=math.nan), 'wd must be'),
        (lambda: ComplementTraining(wd=math.inf), 'wd must be'),
        (lambda: ComplementTraining(opt_func=3), 'opt_func'),
        (lambda: JointComplementTraining(loss_func='primary'), 'loss_func'),
        (lambda: JointComplementTraining(weight=math.nan), 'weight must be'),
        (lambda: JointComplementTraining(weight=math.inf), 'weight must be'),
        (lambda: JointComplementTraining(weight=-1), 'weight must be'),
        (lambda: JointComplementTraining(weight=[1.0]), 'weight is'),
        (lambda: JointComplementTraining(weight=None), 'weight is'),
        (lambda: GuidedComplementTraining(warmup=math.nan), 'warmup must be'),
        (lambda: GuidedComplementTraining(schedule=0.5), 'schedule'),
        (lambda: GuidanceRecorder(alpha=math.nan), 'alpha must be'),
        (lambda: GuidanceRecorder(alpha=-1), 'alpha must be'),
        (lambda: AdversarialTraining(0.1, step=-1), 'step'),
        (lambda: AdversarialTraining(0.1, step=math.nan), 'step'),
        (lambda: AdversarialTraining(0.1, steps=0), 'steps'),
        (lambda: AdversarialTraining(math.nan), 'eps'),
        (lambda: AdversarialTraining(0.1, trades=math.nan), 'trades'),
        (lambda: AdversarialTraining(0.1, trades=math.inf), 'trades'),
        (lambda: AdversarialTraining(0.1, trades=1.0, random=False), 'random start'),
        (lambda: AdversarialTraining(0.1, inner_loss='xe'), 'inner_loss'),
        (lambda: AdversarialTraining(0.1, bounds=(1, 0)), 'bounds'),
        (lambda: AdversarialTraining(0.1, bounds=(0, math.nan)), 'bounds'),
        (lambda: AdversarialTraining(0.1, bounds=3), 'bounds'),
        (lambda: AdversarialTraining(0.1, bounds=torch.tensor(3.0)), 'bounds'),
        (lambda: AdversarialTraining(0.1, bounds=('0', '1')), 'bounds'),
        (lambda: AdversarialTraining(0.1, bounds=(None, 1)), 'bounds'),
        (
            lambda: AdversarialTraining(0.1, bounds=([0, 0], [1, 1, 1])),
            '2 and for 3 channels',
        ),
        (lambda: AdversarialTraining(0.1, steps=1.5), 'steps'),
        (lambda: AdversarialTraining(0.1, steps='3'), 'steps'),
        (lambda: AdversarialTraining(0.1, step='x'), 'step'),
        (lambda: AdversarialTraining(0.1, trades='x'), 'trades'),
        (lambda: ComplementTraining(wd='x'), 'wd'),
        (lambda: JointComplementTraining(weight='x'), 'weight'),
        (lambda: GuidedComplementTraining(warmup='x'), 'warmup'),
        (lambda: GuidanceRecorder(alpha='x'), 'alpha'),
    ],
)
def test_settings_refused_at_once(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert '\n' not in str(caught.value)


TEN = digits()
NOT_TRAINED = [
    (dict(lr=-1), 'lr must be'),
    (dict(lr=math.nan), 'lr must be'),
    (dict(lr='x'), 'lr is'),
    (dict(epochs='2'), 'epochs must be'),
    (dict(epochs=1.5), 'epochs must be'),
    (dict(epochs=0), 'epochs must be'),
    (dict(epochs=True), 'epochs must be'),
    (dict(batch_size=0), 'batch_size must be'),
    (dict(batch_size=2.5), 'batch_size must be'),
    (dict(seed=-1), 'seed must be'),
    (dict(seed='a'), 'seed must be'),
    (dict(seed=2**32), 'seed must be'),
    (dict(device='foo'), "device is 'foo'"),
    (dict(checkpoint='no/such/folder/x'), 'no/such/folder is no folder'),
    (dict(checkpoint='.'), 'is a folder'),
    (dict(model=digits_cnn(n_classes=12)), r'\(2, 12\), and digits has 10 classes'),
    (dict(model=digits_cnn(n_classes=9)), r'\(2, 9\), and digits has 10 classes'),
    (dict(name='hcot', groups=(0, 0, 1)), '10 for HCOT, got 3'),
    (dict(name='hcot', groups=()), 'groups must be'),
    (dict(name='hcot', groups=(-1,) * 10), 'groups must be'),
    (dict(name='hcot', groups=(10**30,) * 10), 'groups must be'),
    (dict(name='gce', alpha=True), 'alpha must be'),
    (dict(name='gce', alfa=1), 'did you mean alpha'),
    (dict(loss_func=nn.CrossEntropyLoss()), 'XE has no parameters'),
]


@pytest.mark.parametrize('wrong, message', NOT_TRAINED)
def test_a_classifier_refused_before_any_work(wrong, message, tmp_path):
    given = dict(name='xe', epochs=1, checkpoint=tmp_path / 'checkpoint') | wrong
    model = given.pop('model', digits_cnn())
    before = [copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]]
    with pytest.raises(InputError, match=message) as caught:
        train_classifier(TEN, model, **given)
    assert '\n' not in str(caught.value)
    assert not any(tmp_path.iterdir())
    assert [m.training for m in model.modules()] == before[1]
    assert all(p.equal(before[0][k]) for k, p in model.state_dict().items())


@pytest.mark.parametrize('n_classes', [0, 1, -1, 2.5, None, '10'])
@pytest.mark.parametrize('name', ['xe', 'cot', 'gce', 'rce', 'pc'])
def test_a_number_of_classes_that_makes_no_sense(name, n_classes):
    says = 'not defined for|number of classes must be'
    with pytest.raises(InputError, match=says) as caught:
        check_objective(name, n_classes)
    assert '()' not in str(caught.value)


GROUPS = np.arange(10) // 5


@pytest.mark.parametrize(
    'name, given',
    [
        ('gce', dict(alpha=np.float32(0.5))),
        ('gce', dict(alpha=torch.tensor(0.5))),
        ('gce', dict(alpha=np.int64(1))),
        ('hcot', dict(groups=GROUPS)),
        ('hcot', dict(groups=torch.from_numpy(GROUPS))),
    ],
)
def test_a_checkpoint_of_numpy_settings_goes_on(name, given, tmp_path):
    def train():
        seed_everything(0)
        return train_classifier(
            TEN,
            digits_cnn(),
            name,
            epochs=np.int64(1),
            batch_size=np.int32(256),
            lr=np.float32(1e-3),
            seed=np.int64(3),
            checkpoint=tmp_path / 'checkpoint',
            settings=dict(eps=np.float32(0.1), over=(1, 2)),
            **given,
        )[1]['history']

    assert train() == train()


def test_settings_that_no_file_can_hold_are_told_at_once(tmp_path):
    cb = ResumableTraining(tmp_path / 'checkpoint', settings=dict(a={1}))
    learn = learner(batches(), network()).add_cb(cb)
    before = parameters(learn.model)
    with pytest.raises(TypeError, match='cannot write set'):
        quiet(learn)
    assert moved(learn.model, before) == 0


NUMBER = Parameter(1.0, Range(low=0))
NO_ROWS = [
    (dict(title=None), 'title must be a text'),
    (dict(loss=None), 'loss must be a class'),
    (dict(loss=nn.CrossEntropyLoss()), 'loss makes no loss'),
    (dict(loss=lambda z, y: 0), 'loss makes no loss'),
    (dict(loss=lambda: 3), 'loss must be what makes a function'),
    (dict(own=dict(beta=0.1)), 'own must be a dict'),
    (dict(own=dict(beta=NUMBER)), 'loss makes no loss'),
    (dict(own=['beta']), 'own must be a dict'),
    (dict(beside={3: NUMBER}), 'beside must be a dict'),
    (dict(callbacks=[]), 'callbacks must be a class'),
    (dict(min_classes='2'), 'min_classes must be'),
    (dict(beside=dict(alpha=NUMBER)), 'alpha means something else'),
    *[
        (dict(beside={name: NUMBER}), f'{name} means something')
        for name in sorted(_TAKEN)
    ],
]


@pytest.mark.parametrize('wrong, message', NO_ROWS)
def test_a_row_that_could_not_train(wrong, message):
    row = dict(title='X', source='here', loss=GuidedComplementEntropyLoss)
    with pytest.raises(InputError, match=message):
        Objective(**row | wrong)


@pytest.mark.parametrize('make', [objective_learner, train_classifier, check_objective])
def test_arguments_are_no_names_of_parameters(make):
    assert (
        not {'dls', 'model', *inspect.signature(make).parameters}
        - _TAKEN
        - {'kwargs', 'parameters'}
    )


@pytest.mark.parametrize('callbacks, n', [(None, 0), ([], 0), (noop, 1)])
def test_callbacks_of_a_row(callbacks, n):
    row = Objective('X', 'here', nn.CrossEntropyLoss, callbacks=lambda: callbacks)
    assert len(row.learner_callbacks()) == n


@pytest.mark.parametrize('given', [(0.5, float), ('a', Range(high=1)), (1, ['a'])])
def test_a_parameter_whose_default_or_range_is_wrong(given):
    with pytest.raises(InputError):
        Parameter(*given)


def ours(**kwargs):
    return lambda l: l.to_complement(loss_func=ComplementEntropyLoss(**kwargs))


def soft(learn):  # targets that are probabilities
    learn.loss_func = lambda z, y: F.cross_entropy(z, F.one_hot(y, N_CLASSES).double())

    class Soft(Callback):
        def before_batch(self):
            self.learn.yb = (F.one_hot(self.yb[0], N_CLASSES).double(),)

    learn.loss_func = F.cross_entropy
    return learn.add_cb(Soft()).to_complement()


@pytest.mark.parametrize(
    'way',
    {
        'too few weights': ours(weight=torch.ones(3).double()),
        'too many weights': ours(weight=torch.ones(9).double()),
        'no reduction': ours(reduction='none'),
        'no reduction, joint': lambda l: l.to_joint_complement(
            loss_func=ComplementEntropyLoss(reduction='none')
        ),
        'weights, joint': lambda l: l.to_joint_complement(
            loss_func=ComplementEntropyLoss(weight=torch.ones(3).double())
        ),
        'a loss of other things': lambda l: l.to_complement(
            loss_func=lambda z, y: F.mse_loss(z, torch.ones(1, 2, 3))
        ),
        'built optimizer': lambda l: l.to_complement(
            opt_func=OptimWrapper(opt=torch.optim.SGD(network().parameters(), lr=0.1))
        ),
        'two kinds of optimizers': lambda l: l.to_complement(
            opt_func=lambda p, lr: OptimWrapper(p, opt=torch.optim.SGD, lr=lr)
        ),
        'soft targets': soft,
        'decay of more groups': lambda l: l.to_complement(wd=[0.1, 0.2]),
        'decay of no group': lambda l: l.to_complement(wd=[], optimizer='shared'),
        'no optimizer': lambda l: l.to_complement(opt_func=lambda p, lr: None),
        'a bare optimizer': lambda l: l.to_complement(
            opt_func=lambda p, lr: torch.optim.SGD(p[0], lr)
        ),
    }.items(),
    ids=lambda o: o[0],
)
def test_refused_before_the_first_update(way):
    learn = way[1](learner(batches(), network(), opt_func=sgd))
    before = parameters(learn.model)
    with pytest.raises((ValueError, RuntimeError)):
        quiet(learn)
    assert moved(learn.model, before) == 0


def test_a_callback_that_moves_to_another_learner():
    first, second, apart = (learner(batches(), network()) for _ in range(3))
    callback = ComplementTraining()
    quiet(first.add_cb(callback))
    quiet(second.add_cb(callback))
    assert not [cb for cb in first.cbs if not isinstance(cb, TrainEvalCallback)]
    quiet(apart.to_complement())
    assert all(
        p.equal(q) for p, q in zip(second.model.parameters(), apart.model.parameters())
    )


def test_lookahead_is_refused_before_the_first_update():
    learn = learner(batches(), network(), opt_func=ranger).to_complement()
    before = parameters(learn.model)
    with pytest.raises(InputError, match='Lookahead'):
        quiet(learn)
    assert moved(learn.model, before) == 0


@pytest.mark.parametrize('way', ['complement', 'joint', 'guided', 'reverse', 'warmup'])
@pytest.mark.parametrize('target', [N_CLASSES, -1])
def test_targets_out_of_range(way, target):
    data = batches()
    data[0][1][0] = target
    learn = WAYS[way](learner(data, network()))
    before = parameters(learn.model)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        quiet(learn)
    assert moved(learn.model, before) == 0


# --- the range of a pixel


def images(n=2, size=8, channels=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.rand(size, channels, 4, 4, generator=g),
            torch.randint(N_CLASSES, (size,), generator=g),
        )
        for _ in range(n)
    ]


def image_network(mean=0.0, std=1.0):
    "The same classifier for pixels and for images normalized by `mean` and `std`."

    class Undo(nn.Module):
        def forward(self, x):
            return x * torch.as_tensor(std) + torch.as_tensor(mean)

    torch.manual_seed(4)
    return nn.Sequential(
        Undo(), nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, N_CLASSES)
    )


class Watch(Callback):
    order, run_valid = 20, False

    def __init__(self):
        self.seen = []

    def before_batch(self):
        self.seen.append(self.adversarial_training.x_adv.clone())


STATS = {
    'numbers': (0.5, 0.25),
    'channels': (
        torch.tensor([0.485, 0.456, 0.406])[:, None, None],
        torch.tensor([0.229, 0.224, 0.225])[:, None, None],
    ),
    'bytes': (0.0, 1 / 255),
    'both signs': (0.5, 0.5),
}


def found(data, mean, std, after_batch=None, **kwargs):
    "The adversarial images of the first epoch."
    watch = Watch()
    if after_batch is not None:
        items = [(TensorImage(a), b) for x, y in data for a, b in zip(x, y)]
        dls = DataLoaders(
            *[
                DataLoader(items, bs=len(data[0][0]), after_batch=after_batch)
                for _ in range(2)
            ],
            device='cpu',
        )
    else:
        dls = DataLoaders(data, data[:1], device='cpu')
    torch.manual_seed(9)
    learn = Learner(
        dls,
        image_network(mean, std),
        CrossEntropyLossFlat(),
        opt_func=sgd,
        cbs=[watch, AdversarialTraining(0.03, steps=3, **kwargs)],
    )
    with learn.no_bar():
        quiet(learn, lr=0.0)
    return watch.seen


@pytest.mark.parametrize('stats', STATS)
@pytest.mark.parametrize('way', ['bounds', 'Normalize'])
@pytest.mark.parametrize('trades, random', [(None, False), (2.0, True)])
def test_normalised_images(stats, way, trades, random):
    mean, std = STATS[stats]
    pixels = images()
    expected = found(
        pixels,
        0.0,
        1.0,
        None if way == 'bounds' else noop,
        random=random,
        trades=trades,
    )
    normalized = [((x - mean) / std, y) for x, y in pixels]
    if way == 'bounds':
        low, high = (
            torch.as_tensor((b - mean) / std).flatten().tolist() for b in (0.0, 1.0)
        )
        bounds = (low, high) if len(low) > 1 else (low[0], high[0])
        seen = found(normalized, mean, std, random=random, trades=trades, bounds=bounds)
    else:
        shape = lambda o: torch.as_tensor(o).reshape(1, -1, 1, 1)
        seen = found(
            pixels,
            mean,
            std,
            Normalize(shape(mean), shape(std)),
            random=random,
            trades=trades,
        )
    for ours, theirs, (x, _) in zip(seen, expected, pixels):
        back = ours * torch.as_tensor(std) + torch.as_tensor(mean)
        assert (
            (back - theirs).abs() < 2e-6
        ).float().mean() > 0.95  # a gradient near 0 may round to the other sign
        assert (
            (back - x).abs().max() <= 0.03 + 2e-6
            and back.min() >= -2e-6
            and back.max() <= 1 + 2e-6
        )
        assert (back - x).abs().amax((1, 2, 3)).min() > 0.01  # every image is moved


@pytest.mark.parametrize('trades', [None, 1.0])
@pytest.mark.parametrize(
    'change',
    {
        'N(0, 1.2²)': lambda x: (
            1.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        ),
        'bytes': lambda x: 255 * x,
        'both signs': lambda x: 2 * x - 1,
        'NaN': lambda x: x.masked_fill(x > 0.99, math.nan),
        'integers': lambda x: (255 * x).to(torch.uint8),
    }.items(),
    ids=lambda o: o[0],
)
def test_images_of_an_unknown_range_are_refused(trades, change):
    data = [(change[1](x), y) for x, y in images()]
    learn = learner(
        data, image_network(), cbs=[AdversarialTraining(0.03, trades=trades)]
    )
    before = parameters(learn.model)
    with pytest.raises(
        InputError, match='floating point' if change[0] == 'integers' else 'bounds='
    ):
        quiet(learn)
    assert moved(learn.model, before) == 0


@pytest.mark.parametrize(
    'channels, bounds',
    [(3, ([0, 0], [1, 1])), (3, ([0] * 4, [1] * 4)), (1, ([0] * 3, [1] * 3))],
)
def test_bounds_of_other_channels_are_refused(channels, bounds):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16 * channels, N_CLASSES))
    learn = learner(
        images(channels=channels), model, cbs=[AdversarialTraining(0.03, bounds=bounds)]
    )
    before = parameters(model)
    with pytest.raises(InputError, match=f'bounds are for {len(bounds[0])} channels'):
        quiet(learn)
    assert moved(model, before) == 0


@pytest.mark.parametrize('make', [torch.tensor, np.array, tuple])
def test_bounds_as_an_array(make):
    exact = found(images(), 0.0, 1.0, bounds=(0.0, 1.0))
    for a, b in zip(exact, found(images(), 0.0, 1.0, bounds=make([0.0, 1.0]))):
        assert torch.equal(a, b)


def test_a_later_batch_out_of_range_is_told():
    data = images()
    data[1][0][0, 0, 0, 0] = 3.0
    with pytest.raises(InputError, match='span'):
        quiet(learner(data, image_network(), cbs=[AdversarialTraining(0.03)]))


def test_rounding_is_no_fault():
    data = [(x + 2.98e-8 * (x > 0.9), y) for x, y in images()]
    data[0][0][0, 0, 0, :2] = torch.tensor([1 + 1.2e-7, -2.98e-8])
    assert finite(
        quiet(learner(data, image_network(), cbs=[AdversarialTraining(0.03)])).model
    )


def test_random_starts_move_all_images():
    for trades in (None, 2.0):
        for seen, (x, _) in zip(found(images(), 0.0, 1.0, trades=trades), images()):
            assert (seen - x).abs().amax((1, 2, 3)).min() > 0.01


def test_an_inner_loss_at_a_standstill_is_refused():
    model = image_network()

    def change(logits, y):  # the divergence from the clean answer, as in TRADES
        log_p = model(change.x).detach().log_softmax(1)
        return F.kl_div(
            logits.log_softmax(1), log_p, reduction='none', log_target=True
        ).sum(1)

    change.x = images()[0][0]
    learn = learner(
        images(1),
        model,
        cbs=[AdversarialTraining(0.05, random=False, inner_loss=change)],
    )
    before = parameters(model)
    with pytest.raises(InputError, match='random=True'):
        quiet(learn)
    assert moved(model, before) == 0
    assert finite(
        quiet(
            learner(
                images(1), model, cbs=[AdversarialTraining(0.05, inner_loss=change)]
            )
        ).model
    )
    margin = lambda z, y: z.logsumexp(1) - z.gather(1, y[:, None])[:, 0]
    assert finite(
        quiet(
            learner(
                images(),
                model,
                cbs=[AdversarialTraining(0.05, random=False, inner_loss=margin)],
            )
        ).model
    )


@pytest.mark.parametrize('trades', [None, 2.0])
def test_the_inner_loop_sees_the_prediction_of_the_callbacks(trades):
    "A network that returns a tuple of negated logits, and callbacks that put it right, is attacked as the plain network is."

    class Negated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = image_network()

        def forward(self, x):
            return -self.inner(x), x

    class Right(Callback):
        def after_pred(self):
            self.learn.pred = -self.pred[0]

    ends = []
    for model, cbs in ((image_network(), []), (Negated(), [Right()])):
        torch.manual_seed(9)
        ends.append(
            quiet(
                learner(
                    images(),
                    model,
                    cbs=[
                        *cbs,
                        AdversarialTraining(0.05, trades=trades),
                        ComplementTraining(),
                    ],
                )
            ).model
        )
    assert apart(ends[0], ends[1].inner) == 0 and apart(ends[0], image_network()) > 1e-3


# --- the recorder of guidance


class NoHostSync(TorchDispatchMode):
    "Forbids the few operators through which Python waits for the device."

    forbidden = {'_local_scalar_dense', 'nonzero', 'index', 'equal'}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.forbidden:
            raise RuntimeError(f'{func} waits for the device')
        return func(*args, **(kwargs or {}))


def test_no_step_of_the_recorder_waits_for_the_device():
    with NoHostSync():
        total = _guidance_sums(
            torch.randn(64, 10), torch.randint(10, (64,)), 1 / 3, -100
        )
    waits = (
        lambda: total[0].item(),
        lambda: bool(total[0] > 0),
        lambda: total[total > 0],
    )
    for wait in waits:
        with NoHostSync(), pytest.raises(RuntimeError, match='waits for the device'):
            wait()


def test_several_processes_talk_once_in_a_pass(tmp_path):
    "With a stand-in for a second process that has seen the same samples."
    learn = learner(
        batches(), network(), cbs=[GuidanceRecorder()], default_cbs=True, path=tmp_path
    )
    with learn.no_bar():
        alone = list(learn.validate())
    learn.distributed_trainer = True  # what `distrib_ctx` puts there
    double = mock.patch(
        'torch.distributed.all_reduce', side_effect=lambda sums: sums.mul_(2)
    )
    with learn.no_bar(), double as reduce:
        assert list(learn.validate()) == alone
    assert reduce.call_count == 1


def test_guidance_of_pixels_and_of_a_language_model():
    z, t = torch.randn(2, 5, 3, 3), torch.randint(5, (2, 3, 3))
    t[0, 0, 0], z[0, :, 0, 0] = -100, math.nan
    kept = guidance(z.movedim(1, -1)[t != -100], t[t != -100])
    sums = torch.stack([*(v.sum() for v in kept.values()), torch.tensor(17.0)])
    by_pixel = _guidance_sums(z, t, 1 / 3, -100)
    by_word = _guidance_sums(z.movedim(1, -1), t, 1 / 3, -100, axis=-1)
    assert torch.allclose(by_pixel, sums, atol=1e-4)
    assert torch.allclose(by_word, sums, atol=1e-4)


# --- mixed precision, and learners in files


class OnCPU(MixedPrecision):
    "fastai turns autocast on for CUDA only; this twin asks for the CPU's."

    def before_fit(self):
        super().before_fit()
        dtype = torch.bfloat16 if self.amp_mode.value == 'bf16' else torch.float16
        self.autocast = torch.autocast('cpu', dtype)
        self.learn.scaler = torch.amp.GradScaler(
            'cpu', init_scale=128.0, enabled=dtype == torch.float16
        )


class LogitType(Callback):
    order = -20

    def after_pred(self):
        self.learn.logit_type = self.pred.dtype


def on_digits(**kwargs):
    seed_everything(0)
    dls = dataloaders(digits(), 64, device='cpu')
    adam = partial(Adam, mom=0.9, sqr_mom=0.99, eps=1e-8, wd=0.0)
    return Learner(
        dls,
        digits_cnn(),
        CrossEntropyLossFlat(),
        opt_func=adam,
        lr=1e-3,
        metrics=accuracy,
        **kwargs,
    )


def test_guided_training_in_16_bits():
    "The logits are of 16 bits, the losses of 32."

    def last_row(cbs):
        learn = on_digits(cbs=cbs).to_guided_complement()
        seed_everything(1)
        with warnings.catch_warnings(), learn.no_bar():
            warnings.simplefilter('ignore')  # no CUDA here
            quiet(learn, lr=1e-3)
        return learn, torch.tensor(list(map(float, learn.recorder.values[-1])))

    _, single = last_row([])
    types = dict(bf16=torch.bfloat16, fp16=torch.float16)
    for mode, dtype in types.items():
        learn, half = last_row([OnCPU(mode), LogitType()])
        assert learn.logit_type == dtype
        assert 0 < (half - single).abs().max() < 0.02


class Items(list):
    "fastai exports loaders without their items, and asks for an empty twin."

    def new_empty(self):
        return Items()


def reloaded(learn):
    learn.export()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of pickle
        return load_learner(learn.path / 'export.pkl')


def test_export_with_and_without_the_callback(tmp_path):
    data = digits()
    items = Items(zip(data.pixels(data.train_x[:400]), data.train_y))

    def fresh():
        dls = DataLoaders.from_dsets(items, Items(items[:100]), bs=50, device='cpu')
        return Learner(dls, digits_cnn(), CrossEntropyLossFlat(), path=tmp_path)

    def predictions(learn):
        with learn.no_bar():
            return learn.get_preds(dl=dls.valid)[0].tolist()

    learn = fresh().to_guided_complement()
    dls = learn.dls
    with learn.no_bar():
        quiet(learn, 2)
    kept, preds = reloaded(learn), predictions(learn)
    learn.remove_cb(GuidedComplementTraining)
    removed = reloaded(learn)
    assert isinstance(kept.loss_func, GuidedComplementEntropyLoss)
    assert not isinstance(removed.loss_func, GuidedComplementEntropyLoss)
    assert predictions(kept) == preds == predictions(removed)

    learn = fresh().to_reverse()
    dls = learn.dls
    with learn.no_bar():
        quiet(learn)
    preds = predictions(learn)
    assert predictions(reloaded(learn)) == preds
    assert predictions(reloaded(learn.reverse_logits())) == preds
