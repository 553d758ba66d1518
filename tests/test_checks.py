"Inputs that the pages on intervals, metrics, checks and threat models do not show."

import math
import pickle
import warnings

import foolbox as fb
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest, norm
from torch import nn

from complement_objectives.attacks import ATTACKS as ROWS
from complement_objectives.attacks import (
    FGSM,
    FMN,
    JSMA,
    L2APGD,
    PGD,
    Restarts,
    Square,
    Transfer,
    WorstCase,
    robust_accuracy,
)
from complement_objectives.core import InputError
from complement_objectives.data import DATASETS
from complement_objectives.detection import DETECTORS
from complement_objectives.evaluation import (
    accuracy,
    auc_interval,
    broken,
    check_gradient_free,
    check_large_eps,
    check_losses,
    check_noise,
    check_randomness,
    check_steps,
    check_unbounded,
    check_zero_gradients,
    chosen_pairs,
    compare_checks,
    correct,
    crafted,
    detection_auc,
    detection_table,
    distortion,
    flags,
    lost_gradients,
    mean_std,
    noise_of_size,
    norm_of,
    parts_of,
    printed,
    run_sanity_checks,
    whole_range,
    with_settings,
    worst_case,
    wrong,
    zero_gradient_share,
)
from complement_objectives.evaluation.gradient_checks import percent
from complement_objectives.intervals import (
    fpr_interval,
    mean_interval,
    normals_needed,
    separation_interval,
    share_interval,
    tpr_interval,
)

from complement_objectives.models import MODELS, Architecture
from complement_objectives.training import PRESETS

torch.set_num_threads(1)
PGD10 = PGD(steps=10, rel_stepsize=0.25)


def data(n=24, k=3, shape=(1, 4, 4), seed=0):
    "Images with ends of the range in them, and a network that is mostly right on them."
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=g).mul(1.4).sub(0.2).clamp(0, 1)
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape), 16), nn.Tanh(), nn.Linear(16, k)
    ).eval()
    return net, x, net(x).argmax(1)


class Around(nn.Module):
    "A network with something done to its input."

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change
        self.eval()

    def forward(self, x):
        return self.model(self.change(x))


# intervals


@pytest.mark.parametrize(
    'n', [2, 3, 7, 10, 13, 49, 98, 103, 107, 161, 187, 196, 197, 300]
)
def test_perfect_separation_has_doubt(n):
    found = auc_interval(np.arange(n) + 1000, np.arange(n))
    assert found.value == 1 and found.high == 1
    assert found.low == pytest.approx(
        binomtest(n, n).proportion_ci(method='wilson').low
    )
    back = auc_interval(np.arange(n), np.arange(n) + 1000)
    assert back == pytest.approx((0, 0, 1 - found.low))


def held(ends, truth):
    return np.mean([low <= truth <= high for low, high in ends])


def scores(rng, n, auc, together=0.0, ties=False):
    x, e = rng.normal(size=(2, n))
    a, b = (
        x + norm.ppf(auc) * math.sqrt(2),
        together * x + math.sqrt(1 - together**2) * e,
    )
    return (np.round(a), np.round(b)) if ties else (a, b)


@pytest.mark.parametrize('n', [10, 20, 30, 100])
@pytest.mark.parametrize('auc', [0.5, 0.8, 0.95, 0.99])
@pytest.mark.parametrize('together', [-0.5, 0.0, 0.7])
def test_auc_interval_holds_its_level(n, auc, together):
    rng = np.random.default_rng(n)
    assert (
        held(
            [auc_interval(*scores(rng, n, auc, together))[1:] for _ in range(300)], auc
        )
        > 0.92
    )


@pytest.mark.parametrize('n', [10, 30])
def test_auc_interval_with_ties(n):
    rng = np.random.default_rng(n)
    a, b = (np.round(rng.normal(m, 1, 200_000)) for m in (1.5, 0))
    truth = separation_interval(a, b).value
    ends = [
        separation_interval(
            np.round(rng.normal(1.5, 1, n)), np.round(rng.normal(0, 1, n))
        )[1:]
        for _ in range(300)
    ]
    assert held(ends, truth) > 0.92


@pytest.mark.parametrize('sizes', [(10, 10), (10, 60), (60, 10), (30, 30)])
@pytest.mark.parametrize('spread', [0.2, 1.0, 5.0])
def test_unpaired_interval_holds_its_level(sizes, spread):
    rng, (n, m) = np.random.default_rng(3), sizes
    gap = norm.ppf(0.9) * math.hypot(1, spread)
    ends = [
        separation_interval(rng.normal(gap, 1, n), rng.normal(0, spread, m))[1:]
        for _ in range(300)
    ]
    assert held(ends, 0.9) > 0.91


@pytest.mark.parametrize('n', [10, 30, 100, 400])
@pytest.mark.parametrize('fpr', [0.01, 0.05])
def test_rate_interval_holds_its_level(n, fpr):
    rng = np.random.default_rng(n)
    for gap in (1.0, 3.0):
        truth = norm.cdf(norm.ppf(fpr) + gap)
        assert (
            held(
                [
                    tpr_interval(rng.normal(gap, 1, n), rng.normal(0, 1, n), fpr)
                    for _ in range(60)
                ],
                truth,
            )
            > 0.9
        )
        truth = norm.cdf(
            norm.ppf(1 - fpr) - gap
        )  # normal images rejected where so many adversarial ones are
        ends = [
            fpr_interval(rng.normal(gap, 1, n), rng.normal(0, 1, n), 1 - fpr)
            for _ in range(60)
        ]
        assert held(ends, truth) > 0.9


@pytest.mark.parametrize('n', [10, 30, 100])
@pytest.mark.parametrize('values', [2, 3, 8])
def test_rate_interval_with_ties(n, values):
    rng, p = np.random.default_rng(n), np.arange(1.0, values + 1)
    p, q = p / p.sum(), p[::-1] / p.sum()
    below, up_to = np.cumsum(q) - q, np.cumsum(p)
    for rate in (
        0.05,
        0.28,
        p[0] - 0.003,
        p[0] + 0.003,
    ):  # at a step from one value to the next, too
        tpr, fpr = (
            below[np.cumsum(p) - p <= rate].max(),
            up_to[np.cumsum(q) >= 1 - rate].min(),
        )
        pairs = [
            (rng.choice(values, n, p=p), rng.choice(values, n, p=q)) for _ in range(100)
        ]
        assert (
            held([np.add(tpr_interval(*s, rate), (-1e-12, 1e-12)) for s in pairs], tpr)
            > 0.9
        )
        assert (
            held(
                [np.add(fpr_interval(*s, 1 - rate), (-1e-12, 1e-12)) for s in pairs],
                fpr,
            )
            > 0.9
        )


@pytest.mark.parametrize('n', [10, 30, 100, 400])
@pytest.mark.parametrize('sign', [-1, 1])
def test_rate_interval_of_pairs(n, sign):
    rng = np.random.default_rng(n)
    for rate, gap in ((0.3, 0.5), (0.05, 2.5)):
        pairs = [(x + gap, sign * x) for x in rng.normal(size=(150, n))]
        assert (
            held(
                [tpr_interval(*s, rate) for s in pairs], norm.cdf(norm.ppf(rate) + gap)
            )
            > 0.93
        )
        assert (
            held(
                [fpr_interval(*s, 1 - rate) for s in pairs],
                norm.cdf(norm.ppf(1 - rate) - gap),
            )
            > 0.93
        )


@pytest.mark.parametrize('level', [0.01, 0.4, 0.95])
@pytest.mark.parametrize('paired', [False, True])
def test_intervals_hold_the_value_whatever_the_ties(level, paired):
    rng = np.random.default_rng(0)
    for _ in range(100):
        n, m = rng.integers(1, 25, 2)
        x, y = (
            rng.integers(0, 5, n).astype(float),
            rng.integers(-1, 4, n if paired else m).astype(float),
        )
        x[x == 4], y[y == -1] = math.inf, -math.inf
        rate, cuts = rng.choice([0.01, 0.05, 0.25, 0.5, 0.95]), [*x, *y, math.inf]
        tpr = max((y < t).mean() for t in cuts if (x < t).mean() <= rate + 1e-12)
        fpr = min(
            [(x < t).mean() for t in cuts if (y < t).mean() >= rate - 1e-12] + [1.0]
        )
        ends = tpr_interval(x, y, rate, level), fpr_interval(x, y, rate, level)
        for (low, high), value in zip(ends, (tpr, fpr)):
            assert 0 <= low <= value + 1e-12 and value - 1e-12 <= high <= 1
        found = separation_interval(x, y, level, paired)
        assert found.low <= found.value <= found.high


def test_rate_interval_below_a_tie():
    saturated = [0.0] * 50 + [1.0] * 950  # nearly every score is the highest possible
    assert (
        fpr_interval(saturated, saturated)[0] > 0.95
    )  # all of them lie at the threshold or below it
    assert tpr_interval([1.0] * 1000, saturated)[1] < 0.1  # and few below


def test_rate_interval_knows_when_it_cannot_know():
    for fpr in (0.01, 0.05, 0.3):
        n = normals_needed(fpr)
        assert (1 - fpr) ** n <= 0.0125 < (1 - fpr) ** (n - 1)
        assert tpr_interval(np.arange(n - 1) + 1e6, np.arange(n - 1), fpr)[0] == 0
        assert tpr_interval(np.arange(n) + 1e6, np.arange(n), fpr)[0] > 0


@pytest.mark.parametrize('n', [10, 30])
@pytest.mark.parametrize(
    'name, truth', [('normal', 0.0), ('uniform', 0.5), ('exponential', 1.0)]
)
def test_mean_interval_holds_its_level(n, name, truth):
    rng = np.random.default_rng(n)
    ends = [mean_interval(getattr(rng, name)(size=n), 200)[1:] for _ in range(300)]
    assert held(ends, truth) > 0.9


@pytest.mark.parametrize(
    'make',
    [
        lambda: auc_interval([math.nan, 1.0], [0.0, 1.0]),
        lambda: auc_interval([1.0], [0.0, 1.0]),
        lambda: auc_interval([1.0], [0.0], level=95),
        lambda: tpr_interval([], [1.0]),
        lambda: tpr_interval([1.0], [0.0], fpr=1.0),
        lambda: mean_interval([1.0, 2.0], n_boot=0),
        lambda: share_interval([True], level=0),
        lambda: share_interval(3, n=2),
        lambda: share_interval([[True]]),
        lambda: mean_interval([[1.0, 2.0]]),
    ],
)
def test_intervals_refuse(make):
    with pytest.raises(InputError):
        make()


def test_share_and_mean_take_whatever_holds_numbers():
    right = np.array([True, False, True, True])
    for values in (
        right,
        right.tolist(),
        torch.from_numpy(right),
        pd.Series(right, index=[7, 5, 9, 2]),
        list(torch.from_numpy(right)),
    ):
        assert share_interval(values) == share_interval(3, n=4) and mean_interval(
            values
        ) == mean_interval([1.0, 0.0, 1.0, 1.0])
    assert (
        mean_interval(
            torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
        ).value
        == 1.5
    )
    assert share_interval(10**9, n=10**9).low == pytest.approx(
        1 - norm.ppf(0.975) ** 2 / 10**9, abs=1e-12
    )
    assert math.isnan(share_interval(0, n=0).value)


def test_auc_interval_takes_tensors_lists_and_one_pair():
    a, b = [2.0, 1.0], [0.0, 1.5]
    assert auc_interval(torch.tensor(a), pd.Series(b)) == auc_interval(a, b)
    assert auc_interval(a, b).value == 0.75
    assert auc_interval([1.0], [0.0]) == share_interval([True])
    tied = auc_interval([1.0] * 10, [1.0] * 10)
    assert tied.value == 0.5 and tied.low < 0.3 and tied.high > 0.7


# seeds


@pytest.mark.parametrize(
    'values, text',
    [
        ([0.9, math.nan, 0.7], '0.8 ± 0.1 (2 of 3)'),
        ([math.nan, 0.5, None], '0.5 (1 of 3)'),
        ([math.nan] * 3, '–'),
        ([], '–'),
        ([0.5, 0.5], '0.5 ± 0.0'),
    ],
)
def test_mean_std_carries_the_number(values, text):
    assert mean_std(values) == text


# images stay as they are; half networks; empty data

IN_PLACE = [lambda x: x.mul_(0.5), lambda x: x.clamp_(0.2, 0.8), lambda x: x.add_(1e-3)]


@pytest.mark.parametrize('change', IN_PLACE)
def test_networks_that_work_in_place(change):
    net, x, y = data()
    model, shown = Around(net, change), x.clone()
    y = model(x.clone()).argmax(1)
    assert not wrong(model, shown, y).any() and correct(model, shown, y).all()
    broken(model, shown, y, PGD10, 0.1)
    broken(model, shown, y, fb.attacks.LinfPGD(steps=3), 0.1)
    zero_gradient_share(model, shown, y), lost_gradients(model, shown, y)
    run_sanity_checks(model, shown, y, 0.1, PGD(steps=3), n_queries=5)
    assert shown.equal(x)
    foolbox_model = fb.PyTorchModel(model, bounds=(0, 1), device='cpu')
    assert not wrong(foolbox_model, shown, y).any()
    broken(foolbox_model, shown, y, PGD10, 0.1)
    assert shown.equal(x)


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    'attack', [PGD(steps=5, rel_stepsize=0.25), L2APGD(steps=5), None]
)
def test_half_networks(kind, attack):
    net, x, _ = data()
    half = net.to(kind)
    y = half(x.to(kind)).argmax(1)
    assert not wrong(half, x, y).any() and not wrong(half, x.to(kind), y).any()
    report = run_sanity_checks(half, x, y, 0.2, attack, n_queries=5)
    assert report['passed'].notna().sum() >= 7 and report.loc['randomness', 'passed']


@pytest.mark.parametrize(
    'call',
    [
        lambda n, x, y: correct(n, x, y),
        lambda n, x, y: wrong(n, x, y),
        lambda n, x, y: broken(n, x, y, PGD10, 0.1),
        lambda n, x, y: zero_gradient_share(n, x, y),
        lambda n, x, y: lost_gradients(n, x, y),
        lambda n, x, y: run_sanity_checks(n, x, y, 0.1),
        lambda n, x, y: check_randomness(n, x, y),
        lambda n, x, y: accuracy(y == y),
    ],
)
def test_empty_data_is_refused(call):
    net, x, y = data()
    with pytest.raises(InputError, match='no images'):
        call(net, x[:0], y[:0])


@pytest.mark.parametrize(
    'call',
    [
        lambda n, x, y: correct(n, x, y),
        lambda n, x, y: broken(n, x, y, PGD10, 0.1),
        lambda n, x, y: zero_gradient_share(n, x, y),
        lambda n, x, y: run_sanity_checks(n, x, y, 0.1),
    ],
)
def test_one_output_is_refused(call):
    net, x, y = data(k=1)
    with pytest.raises(InputError, match='1 logit'):
        call(net, x, y)


def test_wrong_shapes_and_labels_are_refused():
    net, x, y = data()
    for call in (
        lambda: wrong(net, x, y[:, None]),
        lambda: correct(net, x, y.float()),
        lambda: wrong(net, x, y + 3),
        lambda: wrong(net, x, y, 0),
        lambda: worst_case([]),
        lambda: worst_case([torch.ones(2) > 0, torch.ones(3) > 0]),
        lambda: distortion(x, x[:1]),
        lambda: chosen_pairs(y[:1], y, y),
    ):
        with pytest.raises(InputError):
            call()


def test_chosen_pairs_take_read_only_arrays_without_a_warning():
    predicted = np.array([0, 1, 1])
    predicted.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert chosen_pairs(predicted, [0, 0, 0], torch.tensor([0, 1, 2])).tolist() == [
            False,
            True,
            False,
        ]


# checks in the attack's norm

ATTACKS = {
    math.inf: fb.attacks.LinfPGD(steps=5),
    2: L2APGD(steps=10),
    1: fb.attacks.L1PGD(steps=5),
}


@pytest.mark.parametrize(
    'p, eps', [(math.inf, 0.1), (2, 0.5), (2, 1.5), (1, 2.0), (1, 7.0)]
)
def test_each_check_in_the_attacks_norm(p, eps):
    net, x, y = data()
    assert norm_of(ATTACKS[p]) == p
    report = run_sanity_checks(net, x, y, eps, ATTACKS[p], n_queries=5)
    assert (report.loc['no gradient', 'passed'] is None) == (p != math.inf)
    assert f'{16 ** (1 / p):g}' in report.loc['large ε', 'meaning']
    assert (
        report.loc['random noise', 'passed'] is not None
        and report.loc['no limit', 'passed'] is not None
    )


@pytest.mark.parametrize('p', [2, 1, 0, math.inf])
@pytest.mark.parametrize('bounds', [(0, 1), (-1, 1), (0, 255)])
@pytest.mark.parametrize('shape', [(1, 4, 4), (3, 5, 5), (20,)])
def test_noise_lies_in_the_ball(p, bounds, shape):
    low, high = bounds
    x = low + (high - low) * data(shape=shape)[1]
    eps = 3.0 if p == 0 else 0.05 * whole_range(x, p, bounds)
    size = (
        (noise_of_size(x, eps, p, bounds=bounds) - x).flatten(1).double().norm(p, dim=1)
    )
    assert (size <= eps * (1 + 1e-5)).all() and size.median() > 0.5 * eps
    noisy = noise_of_size(x, eps, p, bounds=bounds)
    assert ((noisy >= low) & (noisy <= high)).all()


def test_l2_claims_raise_no_false_flags():
    net, x, y = data(n=60)
    report = run_sanity_checks(net, x, y, 0.3, L2APGD(steps=30))
    assert not {'random noise', 'no gradient', 'large ε'} & set(flags(report))
    noise = run_sanity_checks(net, x, y, 0.3, FGSM()).loc[
        'random noise', 'measured'
    ]  # of the same radius in L∞: a distance of 1.2
    assert noise > report.loc['random noise', 'measured']


def test_radius_in_the_norm_of_the_claim():
    net, x, y = data()
    for eps in (torch.tensor(0.1), np.float32(0.1), torch.tensor([0.1])):
        assert run_sanity_checks(net, x, y, eps, FGSM()).attrs['eps'] == pytest.approx(
            0.1
        )
    for attack, eps in (
        (FGSM(), 1.5),
        (L2APGD(steps=2), -1),
        (L2APGD(steps=2), math.nan),
        (FGSM(), '0.1'),
        (L2APGD(steps=2), math.inf),
    ):
        with pytest.raises(InputError, match='eps (is|must be)'):
            run_sanity_checks(net, x, y, eps, attack)


# checks that cannot run


def test_two_classes():
    net, x, y = data(k=2)
    report = run_sanity_checks(net, x, y, 0.05, PGD10, n_queries=5)
    row = report.loc['other losses']
    assert (
        row.passed is None and 'dlr' in row.meaning and 'not run in full' in row.meaning
    )
    assert run_sanity_checks(
        net, x, y, 0.05, PGD10, n_queries=5, losses=['cross-entropy', 'margin']
    ).loc['other losses', 'passed']
    sharp = Around(net, None)
    sharp.forward = lambda v: (
        1e4 * net(v)
    )  # saturated: the margin breaks more, and that is a failure, not a dash
    assert (
        run_sanity_checks(
            sharp,
            x,
            y,
            0.5,
            PGD(steps=10, rel_stepsize=0.25, random_start=False),
            n_queries=5,
        ).loc['other losses', 'passed']
        is False
    )


def test_flat_inputs():
    net, x, y = data(shape=(12,))
    report = run_sanity_checks(net, x, y, 0.1, PGD10, n_queries=5)
    assert (
        report.loc['no gradient', 'passed'] is None
        and 'squares' in report.loc['no gradient', 'meaning']
    )
    assert report.drop(['no gradient', 'transfer'])['passed'].notna().all()


@pytest.mark.parametrize('bounds', [(0, 1), (-1, 1), (0, 255)])
def test_foolbox_models(bounds):
    net, x, y = data()
    low, high = bounds
    model = fb.PyTorchModel(
        Around(net, lambda v: (v - low) / (high - low)), bounds=bounds, device='cpu'
    )
    plain = run_sanity_checks(net, x, y, 0.1, FGSM(), n_queries=5, source=net)
    report = run_sanity_checks(
        model,
        low + (high - low) * x,
        y,
        0.1 * (high - low),
        FGSM(),
        n_queries=5,
        source=model,
    )
    assert report['passed'].notna().all()
    same = ['other losses', 'zero gradients', 'more steps', 'large ε', 'randomness']
    assert np.allclose(
        report.loc[same, 'measured'].astype(float),
        plain.loc[same, 'measured'].astype(float),
        atol=0.05,
    )


def test_networks_without_gradient_and_attacks_without_norm():
    net, x, y = data()
    report = run_sanity_checks(
        Around(net, lambda v: v.detach().round()),
        x,
        y,
        0.1,
        Square(n_queries=5),
        n_queries=5,
    )
    assert (
        report.loc['zero gradients', 'passed'] is None
        and 'does not depend' in report.loc['zero gradients', 'meaning']
    )
    assert compare_checks({'it': report}).loc['zero gradients', 'it'] == '–'
    nameless = fb.attacks.LinearSearchBlendedUniformNoiseAttack()
    assert norm_of(nameless) is None
    assert check_large_eps(net, x, y, nameless).passed is None


def test_inside_inference_mode():
    net, x, y = data()
    outside = run_sanity_checks(net, x, y, 0.1, PGD10, n_queries=5, source=net)
    with torch.inference_mode():
        inside = run_sanity_checks(
            net, x.clone(), y.clone(), 0.1, PGD10, n_queries=5, source=net
        )
    assert (
        outside['measured'].equals(inside['measured'])
        and inside['passed'].notna().all()
    )


# settings that make nonsense


@pytest.mark.parametrize(
    'call',
    [
        lambda n, x, y, c: check_noise(n, x, y, 0.1, c, draws=0),
        lambda n, x, y, c: check_noise(n, x, y, -0.1, c),
        lambda n, x, y, c: check_noise(n, x, y, 0.1, c, tolerance=math.nan),
        lambda n, x, y, c: check_gradient_free(n, x, y, 0.1, c, n_queries=0),
        lambda n, x, y, c: check_steps(n, x, y, 0.1, PGD10, factor=0),
        lambda n, x, y, c: check_steps(n, x, y, 0.1, PGD10, tolerance=-1),
        lambda n, x, y, c: check_losses(n, x, y, 0.1, PGD10, losses=()),
        lambda n, x, y, c: check_losses(n, x, y, 0.1, PGD10, losses=['crossentropy']),
        lambda n, x, y, c: check_zero_gradients(n, x, y, tolerance=2),
        lambda n, x, y, c: check_large_eps(n, x, y, PGD10, eps=0),
        lambda n, x, y, c: broken(n, x, y, PGD10, 0.1, batch_size=0),
        lambda n, x, y, c: zero_gradient_share(n, x, y, batch_size=-1),
        lambda n, x, y, c: run_sanity_checks(n, x, y, 0.1, n_queries=0),
        lambda n, x, y, c: run_sanity_checks(n, x, y, 0.1, tolerance=math.nan),
        lambda n, x, y, c: run_sanity_checks(n, x, y, 0.1, losses=[]),
        lambda n, x, y, c: run_sanity_checks(n, x, y, 0.1, source='another'),
    ],
)
def test_nonsense_is_refused(call):
    net, x, y = data()
    with pytest.raises(InputError):
        call(net, x, y, wrong(net, x, y))


# random networks, lost gradients


@pytest.mark.parametrize(
    'change',
    [
        lambda v: F.dropout(v, 0.1),
        lambda v: v + 0.05 * torch.randn_like(v),
        lambda v: v * (1 + 0.1 * torch.rand(())),
    ],
)
def test_random_networks_are_named(change):
    net, x, y = data()
    found = check_randomness(Around(net, change), x, y)
    assert found.passed is False and found.measured > 0.5 and 'random' in found.meaning
    assert 'randomness' in flags(
        run_sanity_checks(Around(net, change), x, y, 0.1, PGD10, n_queries=5)
    )
    model = fb.PyTorchModel(Around(net, change), bounds=(0, 1), device='cpu')
    assert not check_randomness(model, x, y).passed


def test_dropout_that_evaluation_turns_off_is_no_randomness():
    net, x, y = data()
    model = nn.Sequential(net[0], nn.Dropout(0.5), *net[1:]).train()
    assert check_randomness(model, x, y).passed and model.training


def test_a_network_that_looks_at_its_batch_is_named():
    net, x, y = data()
    norm_layer = nn.BatchNorm1d(3, track_running_stats=False)
    found = check_randomness(
        nn.Sequential(net, norm_layer, nn.Softsign()), x, y, batch_size=10
    )
    assert found.passed is False and 'batch' in found.meaning


@pytest.mark.parametrize('kind', [torch.float32, torch.bfloat16])
def test_a_clamp_at_the_input_is_named(kind):
    net, x, y = data()
    model = Around(net.to(kind), lambda v: v.clamp(0, 1))
    y = model(x.to(kind)).argmax(1)
    leaf = torch.zeros(1, requires_grad=True)
    if torch.autograd.grad(leaf.clamp(0, 1).sum(), leaf)[0].item() == 1:
        pytest.skip('this torch has a gradient at the ends of a clamp')
    ends = ((x == 0) | (x == 1)).double().mean().item()
    assert 0.2 < ends < 0.4
    found = check_zero_gradients(model, x, y)
    assert (
        found.passed is False
        and found.measured == pytest.approx(ends, abs=0.03)
        and 'clamps its input' in found.meaning
    )
    assert zero_gradient_share(model, x, y) == 0
    assert lost_gradients(net, x, y).stuck < 0.02
    scaled = fb.PyTorchModel(
        Around(net, lambda v: ((v + 1) / 2).clamp(0, 1).to(kind)),
        bounds=(-1, 1),
        device='cpu',
    )
    assert not check_zero_gradients(scaled, 2 * x - 1, y).passed


def test_unused_pixels_are_no_lost_gradients():
    net, x, _y = data()
    model = Around(
        net, lambda v: torch.cat([v[..., :2], torch.zeros_like(v[..., 2:])], -1)
    )  # half of the pixels are not looked at
    lost = lost_gradients(model, x, model(x).argmax(1))
    assert lost.pixels == pytest.approx(0.5) and lost.stuck == 0


@pytest.mark.parametrize('p', [0, 1, 2, math.inf, None])
def test_attacks_without_a_limit(p):
    net, x, y = data()
    assert check_unbounded(net, x, y, p=p).measured > 0.9
    assert check_unbounded(net, x, y, FMN()).measured > 0.9


# other inputs of the same kinds


@pytest.mark.parametrize(
    'change',
    [
        lambda v: v.clamp(0.02, 0.98),
        lambda v: v.clamp(0.01, 0.99),
        lambda v: v.clamp(0.1, 0.9),
        F.relu6,
        lambda v: F.hardtanh(2 * v - 1),
    ],
)
def test_other_clamps_at_the_input_are_named(change):
    net, x, _ = data()
    model = Around(net, change)
    leaf = torch.zeros(1, requires_grad=True)
    if torch.autograd.grad(change(leaf).sum(), leaf)[0].item() != 0:
        pytest.skip('this torch has a gradient at the ends of a clamp')
    found = check_zero_gradients(model, x, model(x).argmax(1))
    assert (
        found.passed is False
        and found.measured > 0.1
        and 'clamps its input' in found.meaning
    )


@pytest.mark.parametrize('kind', [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_other_types(kind):
    net, x, y = data()
    plain, other = (
        run_sanity_checks(net, x, t, 0.1, PGD(steps=3), n_queries=5)
        for t in (y, y.to(kind))
    )
    assert plain.drop(columns='limit').equals(other.drop(columns='limit'))
    attack = fb.attacks.LinfPGD(steps=3, random_start=False)
    assert broken(net, x, y, attack, 0.1).equal(broken(net, x, y.to(kind), attack, 0.1))
    assert crafted(net, x, y, attack, 0.1).equal(
        crafted(net, x, y.to(kind), attack, 0.1)
    )


def test_attacks_with_words_of_their_own():
    net, x, y = data()
    report = run_sanity_checks(
        net, x, y, 0.5, fb.attacks.L2DeepFoolAttack(steps=5)
    )  # its loss is called 'logits'
    assert (
        report.loc['zero gradients', 'passed'] is not None
        and 'takes no other loss' in report.loc['other losses', 'meaning']
    )
    report = run_sanity_checks(net, x, y, 3, JSMA(gamma=1.0))  # steps=None
    assert 'no number of steps' in report.loc['more steps', 'meaning']
    assert (
        run_sanity_checks(
            net, x, y, 0.1, PGD(steps=3), losses='margin', n_queries=5
        ).loc['other losses', 'passed']
        is not None
    )
    for attack in (PGD, 'pgd'):
        with pytest.raises(InputError, match='the attack is'):
            run_sanity_checks(net, x, y, 0.1, attack)


@pytest.mark.parametrize('kind', [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_gradients_at_labels_of_any_integer_type(kind):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3)).eval()
    x, y = torch.rand(6, 1, 4, 4), torch.arange(6) % 3
    assert (
        zero_gradient_share(net, x, y.to(kind)) == zero_gradient_share(net, x, y) == 0
    )
    assert lost_gradients(net, x, y.to(kind)) == lost_gradients(net, x, y)


# attacks that are put together of others

HASTY = PGD(steps=1, rel_stepsize=0.1, random_start=False)
TOGETHER = {
    'restarts': lambda net: Restarts(HASTY, 2),
    'worst case': lambda net: WorstCase([HASTY, HASTY]),
    'transfer': lambda net: Transfer(HASTY, net),
    'deep': lambda net: WorstCase([Restarts(HASTY, 2), Transfer(HASTY, net)]),
}


@pytest.mark.parametrize('name', TOGETHER)
def test_checks_reach_the_parts(name):
    net, x, y = data(n=40)
    attack = TOGETHER[name](net)
    before = repr(attack)
    steps = check_steps(net, x, y, 0.3, attack)
    assert steps.passed is False and steps.meaning.startswith('5')
    losses = check_losses(net, x, y, 0.3, attack)
    assert losses.passed is not None and 0 <= losses.measured <= 1
    report = run_sanity_checks(net, x, y, 0.3, attack, source=net, n_queries=5)
    assert report['passed'].notna().all()
    assert repr(attack) == before and all(part.steps == 1 for part in parts_of(attack))


def test_the_loss_of_a_part_is_the_one_that_is_followed():
    net, x, y = data()
    sharp = Around(net, None)
    sharp.forward = lambda v: 1e4 * net(v)
    margin = with_settings(PGD10, loss='margin')
    for attack, passed in ((PGD10, False), (margin, True)):
        for claimed in (attack, Restarts(attack, 2), WorstCase([attack])):
            report = run_sanity_checks(sharp, x, y, 0.1, claimed, n_queries=5)
            assert report.loc['zero gradients', 'passed'] is passed
    both = run_sanity_checks(sharp, x, y, 0.1, WorstCase([PGD10, margin]), n_queries=5)
    assert both.loc['zero gradients', 'passed'] is True


@pytest.mark.parametrize('loss', ['cross-entropy', 'margin', 'dlr'])
def test_the_margin_is_no_advice_where_it_is_flat_too(loss):
    net, x, y = data()
    rounding = Around(net, lambda v: (4 * v).round() / 4)
    found = check_zero_gradients(rounding, x, y, loss=loss)
    assert found.passed is False and 'follow the margin' not in found.meaning
    assert 'without gradients' in found.meaning


def test_the_margin_is_advised_where_it_helps():
    net, x, y = data()
    sharp = Around(net, None)
    sharp.forward = lambda v: 1e4 * net(v)
    assert 'follow the margin' in check_zero_gradients(sharp, x, y).meaning


def test_the_sentence_on_randomness_says_what_was_measured():
    net, x, y = data()
    some = Around(net, lambda v: v + 0.1 * (torch.rand(len(v), 1, 1, 1) < 0.5))
    found = check_randomness(some, x, y)
    assert 0 < found.measured < 1
    assert found.meaning.startswith(percent(found.measured))


def test_claims_that_cannot_be_checked_are_refused():
    net, x, y = data()
    for images, classes, eps, message in (
        (255 * x, y, 0.1, 'must lie in'),
        (x, y[:5], 0.1, 'one class index each'),
        (x, y, 8, 'eps is 8'),
    ):
        with pytest.raises(InputError, match=message):
            run_sanity_checks(net, images, classes, eps)


def test_a_large_l2_radius_is_none_to_refuse():
    net, x, y = data()
    assert 'random noise' not in flags(
        run_sanity_checks(net, x, y, 1.5, L2APGD(steps=20))
    )


def test_tables_are_printed_in_their_units():
    row = {('pairs', 'value'): 3.0}
    for name, ends in (('AUC', (0.5, 0.25, 0.75)), ('distortion', (2.0, 1.0, 3.0))):
        row |= dict(zip([(name, end) for end in ('value', 'low', 'high')], ends))
    row[('success', 'value')] = math.nan
    text = printed(pd.DataFrame([row])).iloc[0].tolist()
    assert text == ['3', '50.0 [25.0, 75.0]', '2.0 [1.0, 3.0]', '–']


@pytest.mark.parametrize(
    'table', [ROWS, DATASETS, DETECTORS, MODELS, PRESETS], ids=lambda t: next(iter(t))
)
def test_rows_go_to_another_process(table):
    for name, row in table.items():
        sent = pickle.loads(pickle.dumps(row))
        assert type(sent) is type(row) and sent.title == row.title, name
        if isinstance(row, Architecture):
            assert sent.parameters() == row.parameters(), name
        else:
            assert sent == row, name


@pytest.mark.parametrize(
    'rights',
    [
        [np.array([1, 0, 1]) > 0, [True, True, False]],
        dict(a=torch.tensor([1, 0, 1]), b=torch.tensor([1.0, 1.0, 0.0])),
        (torch.tensor(r) > 0 for r in ([1, 0, 1], [1, 1, 0])),
        [pd.Series([1, 0, 1]) > 0, pd.Series([1, 1, 0])],
    ],
)
def test_the_worst_case_of_booleans_of_any_kind(rights):
    found = worst_case(rights)
    assert found.dtype == torch.bool and found.tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    'right',
    [[0.5, 1.0], [math.nan, 1.0], torch.ones(2, 2), torch.tensor(True), [2], 'ab'],
)
def test_what_is_no_boolean_an_image_is_refused(right):
    for call in (lambda: accuracy(right), lambda: worst_case([right])):
        with pytest.raises(InputError, match='one boolean an image|numbers are needed'):
            call()
    with pytest.raises(InputError, match='one boolean an image'):
        worst_case(torch.tensor([1, 0]))  # the results of one attack, in no list


@pytest.mark.parametrize(
    'change, words',
    [
        (lambda x, y: (x.numpy(), y), 'images are ndarray'),
        (lambda x, y: (x, y.tolist()), 'labels are list'),
        (lambda x, y: (255 * x, y), 'normalize inside'),
        (lambda x, y: (x * math.nan, y), 'nan'),
        (lambda x, y: ((255 * x).byte(), y), 'x.float.*255'),
        (lambda x, y: (x, y.float()), 'as integers'),
        (lambda x, y: (x, y[:, None]), 'one class index each'),
        (lambda x, y: (x, y + 10), 'the model has 3 classes'),
        (lambda x, y: (x, y - 1), 'the model has 3 classes'),
    ],
)
def test_images_and_classes_that_cannot_be_judged(change, words):
    net, x, y = data()
    x, y = change(x, y)
    for call in (
        lambda: correct(net, x, y),
        lambda: zero_gradient_share(net, x, y),
        lambda: robust_accuracy(net, x, y, [FGSM()], 0.1),
        lambda: robust_accuracy(net, x, y, fb.attacks.FGSM(), 0.1),
    ):
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize('given', ['fgsm', FGSM, None, 3])
def test_what_is_no_attack_is_refused(given):
    net, x, y = data()
    for call in (
        lambda: WorstCase([FGSM(), given]),
        lambda: Transfer(given, net),
        lambda: robust_accuracy(net, x, y, [FGSM(), given], 0.1),
        lambda: robust_accuracy(net, x, y, dict(a=given), {math.inf: 0.1}),
    ):
        with pytest.raises(InputError, match='give attacks'):
            call()
    assert WorstCase(FGSM()).attacks[0].distance == FGSM().distance


def test_tables_of_scores_that_do_not_fit():
    columns = ('confidence', 'non-ME', 'K-density')
    scores = pd.DataFrame({'predicted': [0, 1], **{c: [1.0, 2.0] for c in columns}})
    for other, y, words in (
        (scores.drop(columns='non-ME'), [0, 1], "no column 'non-ME'"),
        (scores.drop(columns='predicted'), [0, 1], "no column 'predicted'"),
        (scores, torch.tensor(1), 'give one of each'),
        (scores, [[0], [1]], 'give one of each'),
    ):
        for judge in (detection_auc, detection_table):
            with pytest.raises(InputError, match=words):
                judge(scores, other, y)
