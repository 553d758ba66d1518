"""Detectors, thresholds and the reject option on inputs that are hard.

Each expected value is written out or computed another way."""

import json
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from complement_objectives.core import InputError
from complement_objectives.detection import (
    DETECTORS,
    NOT_SURE,
    Confidence,
    Detector,
    DetectorRow,
    Energy,
    KernelDensity,
    Mahalanobis,
    NamedLayer,
    NearestNeighbors,
    RejectOption,
    RobustClassifier,
    auroc,
    bandwidth_sweep,
    confidence,
    coverage,
    create_detector,
    detector_table,
    detection_metrics,
    export_robust,
    fpr_at_tpr,
    load_robust,
    log_kernel_density,
    log_odds,
    non_max_entropy,
    risk_coverage,
    roc,
    save_robust,
    select_sigma2,
    selective_accuracy,
    threshold_at,
    tpr_at_fpr,
)
from complement_objectives.detection.scores import _non_maximal
from complement_objectives.models import ReverseLogits, create_model

torch.set_num_threads(1)
LOGITS = [name for name, kind in DETECTORS.items() if kind.reads == 'logits']
VECTORS = [name for name in DETECTORS if name not in LOGITS]
BAD = [math.nan, math.inf, -math.inf]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype
    )


def clusters(n=40, classes=3, dim=6, seed=0, far=3.0, dtype=torch.float64):
    "Vectors about a middle for each class, and their classes."
    labels = torch.arange(classes).repeat_interleave(n)
    return (
        far * normal(classes, dim, seed=seed, dtype=dtype)[labels]
        + normal(len(labels), dim, seed=seed + 1, dtype=dtype)
    ), labels


def squared(a, b):  # (N, D), (M, D) → (N, M), in float64 and from the differences
    return (a.double()[:, None] - b.double()).square().sum(2)


def density(z, points, sigma2):
    return torch.logsumexp(-squared(z, points) / sigma2, 1) - math.log(len(points))


# ---- kernel density ------------------------------------------------------------------


@pytest.mark.parametrize('far', [1e2, 1e4, 1e5, 1e7, 1e8])
def test_density_of_far_modes(far):
    points, _which = clusters(60, 2, 16, far=far)
    points, query = points.float(), (points[::3] + 0.3).float()
    found, true = log_kernel_density(query, points, 3.0), density(query, points, 3.0)
    assert found.dtype == torch.float32 and found.max() <= 0
    torch.testing.assert_close(found.double(), true, rtol=1e-3, atol=1e-2)
    fitted = KernelDensity(3.0).fit(points, torch.zeros(len(points), dtype=torch.long))
    torch.testing.assert_close(
        fitted.log_density(query, torch.zeros(len(query), dtype=torch.long)).double(),
        true,
        rtol=1e-3,
        atol=1e-2,
    )
    both = fitted.log_densities(query)[:, 0]
    torch.testing.assert_close(both.double(), true, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('memory', [None, 1000])
def test_density_of_modes_too_far_apart_for_float64(dtype, memory):
    points, _ = clusters(60, 2, 16, far=1e8)
    points, query = points.to(dtype), (points[::3] + 0.3).to(dtype)
    found = log_kernel_density(query, points, 1.0, max_memory=memory)
    torch.testing.assert_close(
        found.double(), density(query, points, 1.0), rtol=1e-5, atol=1e-4
    )
    query = query[:2].double().requires_grad_()
    slope = torch.autograd.grad(
        log_kernel_density(query, points.double(), 1.0).sum(), query, create_graph=True
    )[0]
    again = torch.autograd.grad(
        log_kernel_density(query, points.double(), 1.0).sum(), query
    )[0]
    right = torch.autograd.grad(density_of(query, points).sum(), query)[0]
    for s in (slope, again):
        torch.testing.assert_close(s, right, rtol=1e-6, atol=1e-6)


def density_of(query, points):  # differentiable
    d2 = (query[:, None] - points.double()).square().sum(2)
    return torch.logsumexp(-d2, 1)


@pytest.mark.parametrize('dtype', [None, 'float32'])
def test_an_origin_far_away_does_not_matter(dtype):
    points, labels = clusters(40, 3, 6)
    query = points[::4] + 0.3
    here = KernelDensity(1.0).fit(points, labels).log_density(query, labels[::4])
    there = KernelDensity(1.0, dtype=dtype).fit(points + 1e8, labels)
    found = there.log_density(query + 1e8, labels[::4])
    torch.testing.assert_close(found.double(), here, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('far', [1e4, 1e8])
def test_density_of_far_modes_has_the_right_slope(far):
    points, _ = clusters(30, 2, 8, far=far)
    query = (points[:5].float() + 0.5).requires_grad_()
    true = query.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(
        log_kernel_density(query, points.float(), 3.0).sum(), query
    )
    (right,) = torch.autograd.grad(density(true, points.float(), 3.0).sum(), true)
    torch.testing.assert_close(slope.double(), right, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_density_of_half_precision_vectors(dtype):
    points, query = normal(50, 8).to(dtype), normal(9, 8, seed=1).to(dtype)
    torch.testing.assert_close(
        log_kernel_density(query, points, 5.0).double(),
        density(query, points, 5.0),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize('scale', [1e-30, 1e-20, 1e20, 1e30])
def test_bandwidth_outside_of_float32(scale):
    features, labels = clusters(30)
    small = KernelDensity().fit((scale * features).float(), labels)
    usual = KernelDensity().fit(features.float(), labels)
    assert small.sigma2_.item() == pytest.approx(
        scale**2 * usual.sigma2_.item(), rel=1e-3
    )
    torch.testing.assert_close(
        small((scale * features).float(), labels).double(),
        usual(features.float(), labels).double(),
        rtol=1e-3,
        atol=1e-3,
    )


def test_bandwidths_that_cannot_be_computed_with_are_refused():
    features, labels = clusters()
    with pytest.raises(InputError, match='float32 cannot hold'):
        KernelDensity(1e-60, dtype='float32').fit(features, labels)
    with pytest.raises(InputError, match='every density is 0'):
        KernelDensity(1e-320).fit(features, labels)


@pytest.mark.parametrize('sigma2', [0, -1, math.nan, math.inf, None, 'wide', True])
def test_a_density_needs_a_bandwidth(sigma2):
    with pytest.raises(InputError, match='sigma2'):
        log_kernel_density(normal(2, 3), normal(4, 3), sigma2)


def test_densities_of_nothing():
    z = normal(0, 3).requires_grad_()
    found = log_kernel_density(z, normal(4, 3), 1.0)
    assert (
        found.shape == (0,) and torch.autograd.grad(found.sum(), z)[0].shape == z.shape
    )
    with pytest.raises(InputError, match='no points'):
        log_kernel_density(normal(2, 3), normal(0, 3), 1.0)
    with pytest.raises(InputError, match='no features'):
        select_sigma2(normal(0, 3), torch.zeros(0, dtype=torch.long))


def test_sweep_goes_on_to_its_peak():
    points, labels = clusters(60, 2, 16, far=1e4)
    one = select_sigma2(points[:60], labels[:60])
    both = select_sigma2(points.float(), torch.zeros(len(points), dtype=torch.long))
    assert 0.5 < both / one < 2
    sweep = bandwidth_sweep(points, torch.zeros(len(points), dtype=torch.long))
    assert (
        sweep.idxmax() not in (sweep.index[0], sweep.index[-1])
        and sweep.index.is_monotonic_increasing
    )
    d2 = squared(points, points).fill_diagonal_(math.inf)
    true = (
        torch.logsumexp(-d2 / both, 1) - math.log(len(points) - 1)
    ).mean() - 8 * math.log(math.pi * both)
    assert sweep.max() == pytest.approx(true.item(), abs=0.05)


@pytest.mark.parametrize('copies', [2, 5])
def test_copies_do_not_shrink_the_bandwidth(copies):
    points = normal(60, 4, dtype=torch.float64)
    alone = select_sigma2(points, torch.zeros(60, dtype=torch.long))
    found = select_sigma2(
        points.repeat(copies, 1), torch.zeros(60 * copies, dtype=torch.long)
    )
    assert 1 / 4 < found / alone < 4


def test_a_collapsed_class_leaves_the_bandwidth_to_the_others():
    features, labels = clusters()
    whole = (
        torch.cat([features, torch.ones(20, 6).double()]),
        torch.cat([labels, torch.full((20,), 3)]),
    )
    assert select_sigma2(*whole) == pytest.approx(
        select_sigma2(features, labels), rel=0.5
    )
    assert KernelDensity().fit(*whole)(*whole).isfinite().all()


# ---- Mahalanobis and nearest neighbors -----------------------------------------------


class Largest(TorchDispatchMode):
    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.bytes = max(self.bytes, out.numel() * out.element_size())
        return out


def test_mahalanobis_needs_no_matrix_of_inputs_times_classes_times_dimensions():
    features, labels = normal(1000, 64), torch.arange(1000) % 100
    fitted, query = Mahalanobis().fit(features, labels), normal(2000, 64, seed=1)
    with Largest() as watch:
        fitted(query, None)
    assert watch.bytes <= 8 * 2000 * 100  # not × 64


@pytest.mark.parametrize('offset', [0.0, 1e4, 1e6])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_mahalanobis_by_its_formula(offset, dtype):
    features, labels = clusters(50, 4, 5)
    features, query = (
        (features + offset).to(dtype),
        (normal(30, 5, seed=7, dtype=torch.float64) * 4 + offset).to(dtype),
    )
    found = Mahalanobis(shrinkage=0.0).fit(features, labels)(query, None)
    x, q = features.double().numpy(), query.double().numpy()
    means = np.stack([x[labels.numpy() == c].mean(0) for c in range(4)])
    rest = x - means[labels.numpy()]
    inverse = np.linalg.inv(rest.T @ rest / len(rest))
    true = [max(-(z - m) @ inverse @ (z - m) for m in means) for z in q]
    assert found.dtype == dtype
    np.testing.assert_allclose(
        found.numpy(),
        true,
        rtol=1e-9 if dtype == torch.float64 and not offset else 1e-3,
    )


def kth_distance(query, points, k, unit):
    if unit:
        query, points = [
            v / np.linalg.norm(v, axis=1, keepdims=True) for v in (query, points)
        ]
    return np.sort(np.linalg.norm(query[:, None] - points, axis=2), 1)[:, k - 1]


@pytest.mark.parametrize('offset', [0.0, 1e3, 1e4, 1e6])
@pytest.mark.parametrize('unit', [False, True])
@pytest.mark.parametrize('k', [1, 10])
def test_neighbors_with_a_shared_offset(offset, unit, k):
    points, query = (normal(400, 16) + offset), (normal(100, 16, seed=1) + offset)
    found = NearestNeighbors(k, None, unit).fit(
        points, torch.zeros(400, dtype=torch.long)
    )(query, None)
    np.testing.assert_allclose(
        -found.double().numpy(),
        kth_distance(query.double().numpy(), points.double().numpy(), k, unit),
        rtol=1e-5,
    )


@pytest.mark.parametrize('width', [1e-3, 1e-5])
@pytest.mark.parametrize('unit', [False, True])
def test_neighbors_among_collapsed_features(width, unit):
    middles, labels = (
        normal(4, 16, dtype=torch.float64),
        torch.arange(4).repeat_interleave(100),
    )
    points = middles[labels] + width * normal(400, 16, seed=1, dtype=torch.float64)
    query = middles[labels[::10]] + width * normal(40, 16, seed=2, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        p, q = points.to(dtype), query.to(dtype)
        found = NearestNeighbors(5, None, unit).fit(p, labels)(q, None)
        np.testing.assert_allclose(
            -found.double().numpy(),
            kth_distance(q.double().numpy(), p.double().numpy(), 5, unit),
            rtol=1e-4,
        )


def test_neighbors_of_an_older_file():
    points, query = normal(50, 4), normal(9, 4, seed=1)
    older, now = (
        NearestNeighbors(3, None, False),
        NearestNeighbors(3, None, False).fit(points, torch.zeros(50, dtype=torch.long)),
    )
    older.load_state_dict(dict(points_=points))
    torch.testing.assert_close(
        older(query, None).double(), now(query, None).double(), rtol=1e-5, atol=1e-6
    )


# ---- thresholds and AUC --------------------------------------------------------------


@pytest.mark.parametrize('n', [19, 99, 1000])
def test_threshold_with_infinities_and_ties(n):
    scores = np.random.default_rng(n).integers(-3, 4, n).astype(float)
    scores[scores == -3], scores[scores == 3] = -math.inf, math.inf
    for fpr in (0.06, 0.3, 0.9):
        assert (
            threshold_at(scores, fpr)
            == sorted(scores)[math.floor(fpr * (n + 1) + 1e-9) - 1]
        )


def test_threshold_of_many_scores():
    assert (
        threshold_at(torch.arange(2.0**22).flip(0), 0.01)
        == math.floor(0.01 * (2**22 + 1)) - 1
    )


@pytest.mark.parametrize('seed', range(3))
def test_auc_ranks_infinities(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-3, 5, 60).astype(float), rng.integers(-4, 4, 40).astype(float)
    a[a == 4], a[a == -3], b[b == 3], b[b == -4] = (
        math.inf,
        -math.inf,
        math.inf,
        -math.inf,
    )
    pairs = (a[:, None] > b).mean() + 0.5 * (a[:, None] == b).mean()
    assert auroc(a, b) == pytest.approx(pairs, abs=1e-12)
    fpr, tpr = roc(a, b)
    assert np.trapezoid(tpr, fpr) == pytest.approx(pairs, abs=1e-12)
    assert detection_metrics(a, b).loc['AUC', 'value'] == pytest.approx(
        pairs, abs=1e-12
    )
    assert risk_coverage(a, a > 0)['coverage'].iloc[-1] == 1
    finite = (
        np.nan_to_num(a, posinf=99, neginf=-99),
        np.nan_to_num(b, posinf=99, neginf=-99),
    )
    assert auroc(a, b) == pytest.approx(
        roc_auc_score([1] * 60 + [0] * 40, np.r_[finite]), abs=1e-12
    )


@pytest.mark.parametrize(
    'f',
    [auroc, roc, detection_metrics, lambda a, b: threshold_at(a, 0.5), risk_coverage],
)
def test_nan_scores_are_refused(f):
    with pytest.raises(InputError, match='NaN'):
        f([1.0, math.nan, 2.0], [1.0, 0.0, 1.0])


@pytest.mark.parametrize('rate', [math.nan, -0.1, 1.1])
def test_rates_outside_of_their_range_are_refused(rate):
    for f in (tpr_at_fpr, fpr_at_tpr, threshold_at):
        with pytest.raises(InputError, match='it must lie'):
            f(
                np.arange(99.0),
                *([np.arange(9.0)] if f is not threshold_at else []),
                rate,
            )


@pytest.mark.parametrize('rate', ['0.1', True, [0.1, 0.2], 'x'])
def test_rates_that_are_no_numbers_are_refused(rate):
    scores = np.arange(99.0)
    for call in (
        lambda: tpr_at_fpr(scores, scores, rate),
        lambda: fpr_at_tpr(scores, scores, rate),
        lambda: threshold_at(scores, rate),
        lambda: RejectOption(Confidence(), rate),
        lambda: RejectOption(Confidence()).fit(None, normal(99, 3), rate),
    ):
        with pytest.raises(InputError, match='[ft]pr is'):
            call()
    option = RejectOption(Confidence(), torch.tensor(0.25)).fit(None, normal(99, 3))
    assert option.fpr == 0.25 and type(option.fpr) is float


@pytest.mark.parametrize(
    'answers, labels', [([0, 1, -1], [0, 1]), ([0, 1], [[0], [1]]), ([0, 1], [1])]
)
def test_answers_without_their_labels_are_refused(answers, labels):
    with pytest.raises(InputError, match='give one of each'):
        selective_accuracy(answers, labels)


@pytest.mark.parametrize('right', [[1], [0.5, 1, 1], [2, 1, 0], []])
def test_risks_without_booleans_are_refused(right):
    with pytest.raises(InputError, match='3 scores need 3 booleans'):
        risk_coverage([3.0, 2.0, 1.0], right)


@pytest.mark.parametrize('n', [3, 10, 49, 97, 300])
def test_auc_of_separated_scores_is_exactly_one(n):
    row = detection_metrics(np.arange(n) + 1000, np.arange(n)).loc['AUC']
    assert row['value'] == row['high'] == 1 and row['low'] < 1
    assert (
        auroc(np.arange(n) + 1000, np.arange(n)) == 1
        and auroc(np.arange(n), np.arange(n) + 1000) == 0
    )


# ---- intervals -----------------------------------------------------------------------


def two_bells(rng, n, m, apart, pairs):
    shared = rng.normal(size=n) * pairs**0.5 if pairs else 0.0
    return apart + shared + (1 - pairs) ** 0.5 * rng.normal(size=n), shared + (
        1 - pairs
    ) ** 0.5 * rng.normal(size=m)


@pytest.mark.parametrize(
    'n, m, pairs',
    [
        (10, 10, 0),
        (10, 10, 0.6),
        (30, 30, 0),
        (30, 30, 0.6),
        (100, 10, 0),
        (100, 100, 0),
        (300, 300, 0.6),
    ],
)
@pytest.mark.parametrize('apart', [0.5, 2.5])
def test_intervals_hold_their_level(n, m, pairs, apart):
    rng, bell, trials = np.random.default_rng(n + m), stats.norm, 100
    true = {
        'AUC': bell.cdf(apart / 2**0.5),
        'TPR at 1 % FPR': bell.cdf(apart + bell.ppf(0.01)),
        'TPR at 5 % FPR': bell.cdf(apart + bell.ppf(0.05)),
        'FPR at 95 % TPR': bell.cdf(bell.ppf(0.95) - apart),
    }
    held, wide = dict.fromkeys(true, 0), dict.fromkeys(true, 0)
    for _ in range(trials):
        found = detection_metrics(
            *two_bells(rng, n, m, apart, pairs), paired=bool(pairs)
        )
        assert (found['low'] <= found['value']).all() and (
            found['value'] <= found['high']
        ).all()
        for name, value in true.items():
            held[name] += found.loc[name, 'low'] <= value <= found.loc[name, 'high']
            wide[name] += found.loc[name, 'high'] - found.loc[name, 'low']
    assert all(
        stats.binom.sf(trials - h - 1, trials, 0.05) > 1e-3 for h in held.values()
    ), held  # no evidence against 95 %
    del wide['TPR at 1 % FPR']  # which needs 437 scores for a lower end
    assert n < 300 or max(wide.values()) / trials < 0.35  # and they say something


@pytest.mark.parametrize('values', [3, 8])
@pytest.mark.parametrize('n', [10, 60])
def test_intervals_hold_their_level_with_ties(values, n):
    rng, trials = np.random.default_rng(0), 100
    p, q = (
        np.arange(1, values + 1) / np.arange(1, values + 1).sum(),
        np.ones(values) / values,
    )
    below, at = np.cumsum(p) - p, np.cumsum(q)
    true = {
        'TPR at 5 % FPR': (np.cumsum(q) - q)[below <= 0.05].max(),
        'FPR at 95 % TPR': np.cumsum(p)[at >= 0.95].min(),
        'AUC': (p * (np.cumsum(q) - q / 2)).sum(),
    }
    held = dict.fromkeys(true, 0)
    for _ in range(trials):
        found = detection_metrics(
            rng.choice(values, n, p=p), rng.choice(values, n, p=q)
        )
        for name, value in true.items():
            held[name] += (
                found.loc[name, 'low'] <= value + 1e-12
                and value <= found.loc[name, 'high'] + 1e-12
            )
    assert min(held.values()) >= 0.9 * trials


@pytest.mark.parametrize('n', [10, 85, 86, 436, 437])
def test_intervals_say_where_the_scores_are_too_few(n):
    found = detection_metrics(
        np.arange(n) + 1000, np.arange(n), paired=n % 2 == 0
    )  # separated perfectly
    assert (found.loc['TPR at 1 % FPR', 'low'] == 0) == (0.99**n > 0.0125)
    assert (
        (found.loc['TPR at 5 % FPR', 'low'] == 0)
        == (0.95**n > 0.0125)
        == (found.loc['FPR at 95 % TPR', 'high'] == 1)
    )


def test_metrics_take_scores_of_any_type_and_shape():
    a, b = normal(30) + 1, normal(30, seed=1)
    found = detection_metrics(a, b)
    for x, y in (
        (a[:, None], b[:, None]),
        (a.tolist(), b.numpy()),
        (a.double().view(5, 6), list(b)),
    ):
        assert detection_metrics(x, y).values.tolist() == found.values.tolist()
    assert (
        found['value'].tolist()
        == detection_metrics(a.flip(0), b.flip(0), level=0.8)['value'].tolist()
    )
    with pytest.raises(InputError, match='level is 95'):
        detection_metrics(a, b, level=95)


# ---- NaN, infinities, types ----------------------------------------------------------


def fitted_options():
    features, labels = clusters(40, 4, 6)
    head = normal(6, 4, seed=5, dtype=torch.float64)
    for name in DETECTORS:
        option = RejectOption(
            create_detector(name).fit(features.float(), labels), fpr=0.2
        ).fit(features.float(), (features @ head).float())
        yield name, option, features.float(), (features @ head).float()


@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('where', ['hidden', 'logits'])
def test_one_bad_input_is_not_sure_and_the_others_have_their_answers(bad, where):
    for name, option, z, logits in fitted_options():
        z, logits = z[:9].clone(), logits[:9].clone()
        answers, scores = option(z, logits)
        (z if where == 'hidden' else logits)[3] = bad
        spoilt, again = option(z, logits)
        others = torch.arange(9) != 3
        assert spoilt[3] == NOT_SURE and again[3].isnan(), name
        assert spoilt[others].tolist() == answers[others].tolist() and torch.allclose(
            again[others], scores[others]
        )
        if bad != -math.inf or where == 'hidden':  # a single one is enough
            z, logits = z.clone().fill_(1.0), logits.clone().fill_(1.0)
            (z if where == 'hidden' else logits)[3, 2] = bad
            assert option(z, logits)[0][3] == NOT_SURE, name


@pytest.mark.parametrize('name', LOGITS)
def test_a_masked_class_takes_no_part(name):
    logits = normal(20, 5)
    masked = torch.cat([logits, torch.full((20, 2), -math.inf)], 1)
    torch.testing.assert_close(
        create_detector(name)(None, masked), create_detector(name)(None, logits)
    )


def test_all_logits_but_one_largest():
    for logits, rest in (([3.0, 1.0, 2.0], [1.0, 2.0]), ([2.0, 2.0, 0.0], [0.0, 2.0])):
        assert _non_maximal([logits]).sort().values.tolist() == [rest]
    with pytest.raises(InputError, match='two classes or more'):
        _non_maximal(torch.zeros(4, 1))


def test_entropy_with_one_class_left():
    assert non_max_entropy([[3.0, -math.inf, -math.inf]]).tolist() == [0.0]
    assert log_odds([[3.0, -math.inf, -math.inf]]).tolist() == [math.inf]


class Small(nn.Module):
    "Images (N, 1, 4, 4) to hidden vectors and logits, for any number of classes."

    def __init__(self, classes=4):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = (
            nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU()),
            nn.Linear(6, classes),
        )

    def hidden_and_logits(self, x):
        return (z := self.body(x)), self.head(z)

    def forward(self, x):
        return self.head(self.body(x))


def small_robust(name='k-density', classes=4, **settings):
    x, y = (
        torch.rand(80, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.arange(80) % 4,
    )
    return (
        RobustClassifier(Small(classes), create_detector(name, **settings))
        .fit(x[:50], y[:50])
        .calibrate(x[50:], 0.2),
        x,
        y,
    )


@pytest.mark.parametrize('name', DETECTORS)
def test_eager_and_exported_agree(name):
    robust, x, _ = small_robust(
        name, classes=7
    )  # classes 4 to 6 have no training points
    graph, images = export_robust(robust, x[:3]).module(), x.clone()
    images[3], images[9, 0, 1, 1], images[12, 0, 0, 0] = math.nan, math.inf, -math.inf
    with torch.no_grad():
        (a, s), (b, t) = robust(images), graph(images)
    assert (
        a.tolist() == b.tolist()
        and (a[[3, 9, 12]] == NOT_SURE).all()
        and s[[3, 9, 12]].isnan().all()
    )
    torch.testing.assert_close(s, t, equal_nan=True, rtol=1e-4, atol=1e-5)
    clean, _ = robust(x)
    keep = ~torch.isin(torch.arange(80), torch.tensor([3, 9, 12]))
    assert a[keep].tolist() == clean[keep].tolist()


def test_eager_and_exported_agree_on_far_modes():
    robust, _x, _y = small_robust('k-density', sigma2=3.0, dtype='float32')
    points = clusters(40, 2, 6, far=1e4)[0].float()
    robust.option.detector.fit(points, torch.zeros(80, dtype=torch.long))
    detector = robust.option.detector

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.detector = detector

        def forward(self, z):
            return self.detector.log_densities(z)

    graph = torch.export.export(
        Scores(), (points[:2],), dynamic_shapes=({0: torch.export.Dim('batch')},)
    ).module()
    torch.testing.assert_close(
        graph(points), detector.log_densities(points), rtol=1e-3, atol=1e-2
    )
    assert graph(points).max() <= 0


@pytest.mark.parametrize('name', VECTORS)
def test_scores_inside_autocast(name):
    features, labels = clusters(40, 3, 32)
    fitted = create_detector(name).fit(features.float(), labels)
    plain = fitted(features.float(), labels)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        torch.testing.assert_close(fitted(features.float(), labels), plain)


@pytest.mark.parametrize('name', DETECTORS)
def test_arrays_are_taken_as_tensors_are(name):
    z, labels = clusters()
    logits = normal(len(z), 3, dtype=torch.float64)
    by_tensor = create_detector(name).fit(z, labels).score(z, logits)
    as_array = [v.numpy()[::-1][::-1] for v in (z, labels, logits)]  # with a stride
    by_array = (
        create_detector(name)
        .fit(as_array[0], as_array[1])
        .score(as_array[0], as_array[2])
    )
    assert (
        isinstance(by_array, torch.Tensor) and by_array.tolist() == by_tensor.tolist()
    )
    column = create_detector(name).fit(z, labels[:, None]).score(z, logits)
    assert column.tolist() == by_tensor.tolist()


def test_reject_option_takes_arrays():
    z, labels = clusters()
    logits = normal(len(z), 3, dtype=torch.float64)
    option = RejectOption(Mahalanobis().fit(z, labels)).fit(z.numpy(), logits.numpy())
    answers, _ = option(z.numpy(), logits.numpy())
    assert coverage(answers.numpy()) == coverage(answers) > 0.9
    assert selective_accuracy(answers.numpy(), labels.numpy()) == selective_accuracy(
        answers, labels
    )


def test_robust_classifier_takes_arrays():
    robust, x, y = small_robust()
    other = (
        RobustClassifier(Small(), KernelDensity())
        .fit(x[:50].double().numpy(), y[:50].numpy())
        .calibrate(x[50:].numpy(), 0.2)
    )
    assert other(x.numpy())[0].tolist() == robust(x)[0].tolist()


@pytest.mark.parametrize('name', DETECTORS)
@pytest.mark.parametrize('of', [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_of_another_type_takes_float32_images(name, of):
    x, y = torch.rand(60, 1, 4, 4), torch.arange(60) % 4
    robust = (
        RobustClassifier(Small().to(of), create_detector(name))
        .fit(x[:40], y[:40])
        .calibrate(x[40:], 0.2)
    )
    (a, s), (b, t) = robust(x), robust(x.to(of))
    assert (
        a.tolist() == b.tolist() and s.tolist() == t.tolist() and (a != NOT_SURE).any()
    )
    for kind in (
        torch.bfloat16,
        torch.float16,
    ):  # the whole classifier, detector and all
        answers, scores = robust.to(kind)(x)
        assert answers.shape == scores.shape == (60,)


class NoWeights(nn.Module):
    def hidden_and_logits(self, x):
        return (z := x.flatten(1)), z[:, :4]


def test_a_network_without_weights_takes_arrays():
    x, y = torch.rand(60, 1, 4, 4), torch.arange(60) % 4
    robust = RobustClassifier(NoWeights(), Confidence()).fit(x, y).calibrate(x, 0.2)
    assert robust(x.numpy())[0].tolist() == robust(x)[0].tolist()


@pytest.mark.parametrize('wrong', ['knn', KernelDensity, DETECTORS['knn'], None, 3])
def test_what_is_no_detector_is_refused(wrong):
    with pytest.raises(InputError, match='the detector is'):
        RejectOption(wrong)
    if wrong is not None:
        with pytest.raises(InputError, match='the detector is'):
            RobustClassifier(Small(), wrong)


@pytest.mark.parametrize('threshold', ['0.1', True, math.nan, [0.1, 0.2]])
def test_what_is_no_threshold_is_refused(threshold):
    with pytest.raises(InputError, match='threshold is'):
        RobustClassifier(Small(), Confidence(), threshold)


def test_bytes_are_no_pixels():
    robust, x, y = small_robust()
    for images in ((255 * x).byte(), (255 * x).byte().numpy(), x.int()):
        for call in (robust, robust.calibrate, lambda images: robust.fit(images, y)):
            with pytest.raises(InputError, match='x.float'):
                call(images)


@pytest.mark.parametrize('name', DETECTORS)
def test_vectors_and_logits_in_different_numbers(name):
    z, labels = clusters()
    detector = create_detector(name).fit(z, labels)
    for score in (detector.score, RejectOption(detector).score):
        with pytest.raises(InputError, match='give one of each an input'):
            score(z[:5], normal(4, 3))
    if name in VECTORS:
        with pytest.raises(InputError, match='no features to fit on'):
            create_detector(name).fit(z[:, :0], labels)
    if name in ('knn', 'k-density'):
        with pytest.raises(InputError, match='seed must be a whole number'):
            create_detector(name).fit(z, labels, seed=1.5)


@pytest.mark.parametrize('name', DETECTORS)
def test_images_that_nothing_can_be_learned_from(name):
    robust, x, y = small_robust(name)
    for bad in BAD:
        spoilt = x.clone()
        spoilt[3, 0, 1, 1] = bad
        for call in (lambda: robust.fit(spoilt, y), lambda: robust.calibrate(spoilt)):
            with pytest.raises(InputError, match='1 of the 80 images'):
                call()
    for call in (lambda: robust.fit(x[:0], y[:0]), lambda: robust.calibrate(x[:0])):
        with pytest.raises(InputError, match='no images'):
            call()
    assert robust(x)[0].shape == (80,)


# ---- scikit-learn --------------------------------------------------------------------


@pytest.mark.parametrize('name', DETECTORS)
def test_pipeline_of_scikit_learn(name):
    z, labels = (v.numpy() for v in clusters())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        line = Pipeline(
            [('scale', StandardScaler()), ('detect', create_detector(name))]
        ).fit(z, labels)
        scores = line.score_samples(z)
    scaled = StandardScaler().fit_transform(z)
    own = create_detector(name).fit(scaled, labels)
    expected = (
        own.score(None, scaled)
        if name in LOGITS
        else own.log_densities(scaled).amax(1)
        if name == 'k-density'
        else own.score(scaled, None)
    )
    assert isinstance(scores, np.ndarray) and np.allclose(scores, expected)
    assert np.array_equal(line.decision_function(z), scores)
    assert np.allclose(
        clone(line).fit(z[::2], labels[::2]).score_samples(z[::2]),
        line.fit(z[::2], labels[::2]).score_samples(z[::2]),
    )


@pytest.mark.parametrize(
    'detector',
    [
        KernelDensity(3.0, 20, 10**6, 'float64'),
        NearestNeighbors(4, 9, False, 100),
        Energy(3),
        Mahalanobis(0.3),
        Confidence(),
    ],
)
def test_clone_and_parameters(detector):
    twin = clone(detector)
    assert (
        twin is not detector
        and twin.get_params() == detector.get_params() == detector.settings
    )
    for name, value in detector.settings.items():
        assert detector.set_params(**{name: value}).settings[name] == value
    with pytest.raises(InputError, match='unknown argument'):
        twin.set_params(nonsense=1)


@pytest.mark.parametrize('name', DETECTORS)
def test_scikit_learns_names(name):
    z, labels = clusters()
    detector = DETECTORS[name]()
    assert detector.fit(z, labels) is detector
    samples = detector.score_samples(z)
    assert isinstance(samples, torch.Tensor) and samples.shape == (len(z),)
    assert (detector.decision_function(z) == samples - detector.offset_).all()
    assert detector.offset_ == 0 and not hasattr(detector, 'predict')


# ---- the registry --------------------------------------------------------------------


class Length(Detector):
    title, learned = 'length', ('usual_',)

    def fit(self, hidden, labels=None, seed=0):
        return self.keep(usual_=hidden.norm(dim=1).mean())

    def raw_scores(self, hidden, logits):
        return -(hidden.norm(dim=1) - self.usual_).abs()


def test_a_detector_of_ones_own_is_known_saved_and_exported(tmp_path, monkeypatch):
    robust, _, _ = small_robust()
    robust = RobustClassifier(robust.model, Length())
    with pytest.raises(InputError, match='Length is none of `DETECTORS`'):
        save_robust(robust, None, tmp_path)
    monkeypatch.setitem(DETECTORS, 'length', DetectorRow(Length))
    assert DETECTORS['length'].title == 'length' and 'length' in DETECTORS
    with pytest.raises(InputError, match='did you mean length'):
        create_detector('lenght')
    robust, x, _ = small_robust('length')
    again, header = load_robust(save_robust(robust, None, tmp_path), model=Small())
    graph = export_robust(robust, x[:3]).module()
    with torch.no_grad():
        answers = robust(x)[0].tolist()
        assert again(x)[0].tolist() == graph(x)[0].tolist() == answers
    assert header['detector']['name'] == 'length'


@pytest.mark.parametrize('name', DETECTORS)
def test_rows_say_what_the_detector_takes(name):
    row = DETECTORS[name]
    assert isinstance(row(), row.build) and row.parameters() == row().settings
    assert row.ranges.keys() == row.parameters().keys()
    assert (row.title, row.reads) == (row.build.title, row.build.reads)
    with pytest.raises(InputError, match='unknown parameter'):
        create_detector(name, nonsense=1)


class Narrow(Detector):
    def __init__(self, size):
        super().__init__()
        self.size = size


def test_the_table_of_detectors(monkeypatch):
    monkeypatch.setitem(DETECTORS, 'narrow', DetectorRow(Narrow, dict(size='odd')))
    table = detector_table()
    assert list(table.index) == list(DETECTORS) and (table.source[:-1] != '').all()
    assert table['needs fit'].to_dict() == {n: n in VECTORS for n in DETECTORS}
    assert table.loc['narrow', 'parameters'] == 'size (odd)'
    assert table.loc['knn', 'parameters'].startswith('k=10 (a whole number from 1')


@pytest.mark.parametrize(
    'build', [Energy(), lambda: Energy(2.0), partial(Energy, 2.0), 'energy', Small]
)
def test_a_row_holds_a_class_of_detectors(build):
    with pytest.raises(InputError, match='give a class of detectors'):
        DetectorRow(build)
    with pytest.raises(InputError, match='did you mean temperature'):
        DetectorRow(Energy, dict(temprature='above 0'))


WRONG_VALUES = {
    'k': [True, '3', 2.5, 0, -1, None, math.nan, [3]],
    'max_points': [True, '3', 2.5, 0, math.inf],
    'max_memory': [True, '3', 2.5, 0, -1],
    'normalize': ['no', 0, None],
    'temperature': [True, '1', 0, -1.0, math.nan, math.inf, None, [1.0]],
    'sigma2': [True, '1', 0, -1.0, math.nan, math.inf, [1.0]],
    'shrinkage': [True, '0', -0.1, 1.1, math.nan, [0.5]],
    'dtype': [True, 'int8', 32, torch.int8],
}


@pytest.mark.parametrize('name', DETECTORS)
def test_values_that_no_detector_can_have_are_refused(name):
    for setting in DETECTORS[name].parameters():
        for value in WRONG_VALUES[setting]:
            with pytest.raises(InputError, match=setting):
                create_detector(name, **{setting: value})


@pytest.mark.parametrize('value', [np.float32(2), np.int64(2), torch.tensor(2), 2])
def test_numbers_of_any_kind_are_kept_as_plain_ones(value):
    kept = Energy(value).temperature, KernelDensity(value).sigma2
    assert kept == (2, 2) and {type(v) for v in kept} == {float}
    assert type(NearestNeighbors(int(value)).k) is int
    json.dumps(KernelDensity(value, max_points=int(value)).settings)


@pytest.mark.parametrize(
    'wrong',
    [
        lambda s: s[:, None],
        lambda s: s.mean(),
        lambda s: s[:-1],
        list,
        torch.Tensor.numpy,
    ],
)
@pytest.mark.parametrize('reads', ['hidden', 'logits'])
def test_scores_of_a_wrong_shape_are_refused(reads, wrong):
    class Wrong(Detector):
        def raw_scores(self, hidden, logits):
            return wrong((hidden if reads == 'hidden' else logits).sum(1))

    detector = Wrong()
    detector.reads = reads
    for score in (detector.score, detector, RejectOption(detector).score):
        with pytest.raises(InputError, match='Wrong must be one number an input, '):
            score(normal(5, 3), normal(5, 4))
    with pytest.raises(InputError, match='one number an input'):
        detector.score_samples(normal(5, 3))


def test_what_is_missing_is_told_in_the_words_of_the_class():
    x, y = torch.rand(60, 1, 4, 4), torch.arange(60) % 4
    robust = RobustClassifier(Small(), KernelDensity())
    for call in (robust, robust.calibrate):
        with pytest.raises(NotFittedError, match='RobustClassifier is not fitted'):
            call(x)
    with pytest.raises(NotFittedError, match='RobustClassifier has no threshold'):
        robust.fit(x, y)(x)
    with pytest.raises(NotFittedError, match='RejectOption has no threshold'):
        RejectOption(Confidence())(None, normal(3, 4))


# ---- direction -----------------------------------------------------------------------


def test_a_positive_is_an_adversarial_input_that_is_rejected():
    fine, attacked = [3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 3.5]
    fpr, tpr = roc(fine, attacked)
    theirs = roc_curve(
        [0] * 4 + [1] * 3, [-s for s in fine + attacked], drop_intermediate=False
    )
    np.testing.assert_allclose(fpr, theirs[0])
    np.testing.assert_allclose(tpr, theirs[1])
    assert tpr_at_fpr(fine, attacked, 0) == pytest.approx(2 / 3)
    assert fpr_at_tpr(fine, attacked, 1) == pytest.approx(1 / 4)
    threshold = threshold_at(fine, 0.4)  # rejects less than that share of normal ones
    assert np.mean(np.array(fine) < threshold) <= 0.4


# ---- pixels --------------------------------------------------------------------------


@pytest.mark.parametrize('name', LOGITS)
@pytest.mark.parametrize('shape', [(2, 5, 3), (2, 5, 3, 4), (2, 5, 3, 4, 2)])
def test_a_score_for_every_pixel(name, shape):
    logits, detector = normal(*shape, dtype=torch.float64), create_detector(name)
    flat = logits.movedim(1, -1).reshape(-1, 5)
    found = detector(None, logits)
    assert found.shape == (shape[0], *shape[2:])
    torch.testing.assert_close(found.flatten(), detector(None, flat))
    option = RejectOption(detector, threshold=found.median().item())
    answers, _scores = option(None, logits)
    assert (
        answers.shape == found.shape
        and answers.flatten().tolist() == option(None, flat)[0].tolist()
    )
    assert confidence(logits).shape == found.shape


@pytest.mark.parametrize('name', VECTORS)
def test_detectors_of_hidden_vectors_refuse_maps(name):
    z, labels = clusters()
    fitted = create_detector(name).fit(z, labels)
    with pytest.raises(InputError, match='whole inputs'):
        fitted(z[:2], normal(2, 3, 4, 4))
    with pytest.raises(InputError, match='hidden vectors have shape'):
        fitted(normal(2, 6, 4, 4), normal(2, 3))
    with pytest.raises(InputError, match='dimension 5'):
        fitted(z[:, :5], normal(len(z), 3))


@pytest.mark.parametrize('name', LOGITS)
def test_logits_without_a_class_axis_are_refused(name):
    with pytest.raises(InputError, match='N, L'):
        create_detector(name)(None, normal(5))
    with pytest.raises(InputError, match='N, L'):
        create_detector(name)(normal(2, 3), None)


# ---- a fit that fails ----------------------------------------------------------------


class Interrupt(TorchDispatchMode):
    "Ctrl-C at the n-th operation."

    def __init__(self, at):
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def failing(refit):
    "Interrupt `refit()` after 0, 1, 2, … operations until it comes through; yields after each failure."
    at, done = 0, False
    while not done:
        try:
            with Interrupt(at):
                refit()
            done = True
        except KeyboardInterrupt:
            yield
        at += 1 + at // 8


@pytest.mark.parametrize('name', VECTORS)
def test_an_interrupted_refit_changes_nothing(name):
    (z, labels), (other, others) = clusters(), clusters(30, 5, 6, seed=9)
    detector = create_detector(name).fit(z, labels)
    before, count = detector(z, labels), 0
    for _ in failing(lambda: detector.fit(other, others)):
        assert detector(z, labels).tolist() == before.tolist()
        count += 1
    assert (
        count > 5
        and detector(other, others).tolist()
        == create_detector(name).fit(other, others)(other, others).tolist()
    )


@pytest.mark.parametrize('name', VECTORS)
@pytest.mark.parametrize('wrong', ['nan', 'labels', 'same'])
def test_a_failed_refit_changes_nothing(name, wrong):
    z, labels = clusters()
    detector = create_detector(name, k=30) if name == 'knn' else create_detector(name)
    before = detector.fit(z, labels)(z, labels).tolist()
    spoilt = dict(
        nan=(z * math.nan, labels),
        labels=(z, labels - 1),
        same=(torch.ones(20, 9), torch.zeros(20, dtype=torch.long)),
    )[wrong]
    with pytest.raises(InputError):
        detector.fit(*spoilt)
    assert detector(z, labels).tolist() == before


@pytest.mark.parametrize('name', DETECTORS)
def test_a_robust_classifier_is_never_mixed(name):
    robust, x, y = small_robust(name)
    other, count = x.flip(0) + 0.5, 0

    def state():
        return (
            robust.option.threshold_.item(),
            robust.option.fpr,
            [t.tolist() for t in robust.option.detector.state_dict().values()],
        )

    before = state()
    for _ in failing(lambda: robust.fit(other, y)):
        now = state()
        assert repr(now) == repr(before) or math.isnan(now[0])
        count += 1
    assert (
        math.isnan(robust.option.threshold_) and count > 2
    )  # the threshold was of the detector before
    fitted = state()
    for _ in failing(lambda: robust.calibrate(other, 0.3)):
        assert repr(state()) == repr(fitted)
    assert robust.option.fpr == 0.3 and robust(x)[0].shape == (80,)
    calibrated = state()
    with pytest.raises(InputError):
        robust.calibrate(other[:2], 0.1)
    with pytest.raises(InputError):
        robust.calibrate(other * math.nan, 0.4)
    assert repr(state()) == repr(calibrated)


def test_a_threshold_that_was_given_outlives_a_fit():
    x, y = torch.rand(40, 1, 4, 4), torch.arange(40) % 4
    robust = RobustClassifier(Small(), KernelDensity(), threshold=-5.0).fit(x, y)
    assert robust.option.threshold_ == -5


# ---- a network by the name of a layer ------------------------------------------------


class Two(nn.Module):
    def forward(self, z):
        return z, z


class Plain(nn.Module):
    "A network as others write them."

    def __init__(self, twice=False):
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.act, self.pool, self.fc, self.unused = (
            nn.Conv2d(1, 5, 3),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Linear(5, 4),
            nn.Identity(),
        )
        self.twice, self.memory = twice, Two()

    def forward(self, x):
        z = self.pool(self.act(self.conv(x))).flatten(1)
        if self.twice:
            z = self.act(z)
        return self.fc(self.memory(z)[0])


def test_a_named_layer_is_the_hidden_vector():
    net, x = Plain().eval(), normal(7, 1, 6, 6)
    z, logits = NamedLayer(net, 'pool').hidden_and_logits(x)
    assert torch.equal(z, net.pool(net.act(net.conv(x))).flatten(1)) and torch.equal(
        logits, net(x)
    )
    before, _ = NamedLayer(net, 'conv').hidden_and_logits(
        x
    )  # the layer after it works in place
    assert torch.equal(before, net.conv(x).flatten(1)) and before.min() < 0


@pytest.mark.parametrize(
    'layer, word',
    [
        ('poool', 'did you mean pool'),
        ('', 'has no layer'),
        ('act', 'called 2 times'),
        ('unused', 'called 0 times'),
        ('memory', 'no tensor'),
    ],
)
def test_layers_that_cannot_be_used_are_told(layer, word):
    x, y = normal(40, 1, 6, 6), torch.arange(40) % 4
    with pytest.raises(InputError, match=word):
        RobustClassifier(Plain(twice=True), layer=layer).fit(x, y)


def test_a_layer_by_its_number():
    net, x = (
        nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 4)),
        normal(7, 1, 6, 6),
    )
    assert torch.equal(NamedLayer(net, 2).hidden(x), NamedLayer(net, '2').hidden(x))


def test_hooks_are_removed_even_after_a_failure():
    net = Plain(twice=True)
    with pytest.raises(InputError):
        NamedLayer(net, 'act').hidden_and_logits(normal(2, 1, 6, 6))
    with pytest.raises(RuntimeError):
        NamedLayer(net, 'fc').hidden_and_logits(normal(2, 3, 6, 6))
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize('name', DETECTORS)
@pytest.mark.parametrize('reverse', [False, True])
def test_a_named_layer_through_file_and_graph(name, reverse, tmp_path):
    x, y = normal(60, 1, 6, 6), torch.arange(60) % 4
    net, layer = (
        (ReverseLogits(Plain()), 'model.pool') if reverse else (Plain(), 'pool')
    )
    robust = (
        RobustClassifier(net, create_detector(name), layer=layer)
        .fit(x[:40], y[:40])
        .calibrate(x[40:], 0.2)
    )
    again, _ = load_robust(save_robust(robust, None, tmp_path), model=Plain())
    with torch.no_grad():
        (a, s), (b, t), (c, u) = (
            robust(x),
            again(x),
            export_robust(robust, x[:3]).module()(x),
        )
    assert a.tolist() == b.tolist() == c.tolist() and s.tolist() == t.tolist()
    torch.testing.assert_close(s, u, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match='give it as model='):
        load_robust(tmp_path)
    with pytest.raises(InputError, match='do not fit'):
        load_robust(tmp_path, model=nn.Linear(2, 2))


# ---- files ---------------------------------------------------------------------------

NETWORK = dict(name='digits_cnn', n_classes=4)


def digits_robust(
    name='k-density', reverse=False, of=torch.float32, layer=None, **settings
):
    torch.manual_seed(0)
    model = create_model(**NETWORK).to(of)
    if reverse:
        model = ReverseLogits(model)
    x, y = (
        torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(of),
        torch.arange(60) % 4,
    )
    return RobustClassifier(model, create_detector(name, **settings), layer=layer).fit(
        x[:40], y[:40]
    ).calibrate(x[40:], 0.2), x


@pytest.mark.parametrize(
    'entry',
    [
        'format',
        'reverse',
        'detector',
        'weights_sha256',
        'header_sha256',
        'model',
        'tensors',
    ],
)
def test_entries_of_the_library_are_not_the_callers(entry, tmp_path):
    for network in (NETWORK, None):
        with pytest.raises(InputError, match=f"'{entry}' is an entry"):
            save_robust(
                digits_robust('confidence')[0], network, tmp_path / 'net', **{entry: 3}
            )
    assert not (tmp_path / 'net').exists()


CASES = [(name, {}) for name in DETECTORS] + [
    ('k-density', dict(sigma2=2.0)),
    ('k-density', dict(sigma2=1e-60)),
    ('k-density', dict(sigma2=np.float32(3))),
    ('k-density', dict(max_points=None)),
    ('k-density', dict(max_points=np.int64(5), max_memory=10**4)),
    ('k-density', dict(dtype='float64')),
    ('k-density', dict(dtype=torch.float32)),
    ('energy', dict(temperature=0.1)),
    ('energy', dict(temperature=np.float64(3))),
    ('mahalanobis', dict(shrinkage=1)),
    ('mahalanobis', dict(shrinkage=0.5)),
    ('knn', dict(k=3, normalize=False)),
    ('knn', dict(k=np.int64(2), max_points=3, max_memory=100)),
]


@pytest.mark.parametrize('name, settings', CASES)
@pytest.mark.parametrize('reverse', [False, True])
def test_what_is_saved_can_be_loaded(name, settings, reverse, tmp_path):
    robust, x = digits_robust(name, reverse, **settings)
    again, header = load_robust(
        save_robust(
            robust,
            NETWORK,
            tmp_path,
            class_names=['é', '\ud800', '', 'd'],
            numbers={1: np.float32(2), 'inf': math.inf},
        )
    )
    with torch.no_grad():
        assert [o.tolist() for o in again(x)] == [o.tolist() for o in robust(x)]
    assert header['class_names'][0] == 'é' and again.option.fpr == 0.2
    ours, theirs = robust.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k], theirs[k])
        for k in ours
    )


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_types_are_kept(dtype, tmp_path):
    robust, x = digits_robust(of=dtype)
    again, _ = load_robust(save_robust(robust, NETWORK, tmp_path))
    with torch.no_grad():
        assert [o.tolist() for o in again(x)] == [o.tolist() for o in robust(x)]


def test_layer_of_a_network_by_name_and_infinite_thresholds(tmp_path):
    robust, x = digits_robust(layer='body.6')
    robust.option.threshold_.fill_(-math.inf)
    again, _ = load_robust(save_robust(robust, NETWORK, tmp_path))
    with torch.no_grad():
        assert [o.tolist() for o in again(x)] == [o.tolist() for o in robust(x)]
    bare = RobustClassifier(
        create_model(**NETWORK), KernelDensity()
    )  # neither fitted nor calibrated
    loaded, _ = load_robust(save_robust(bare, NETWORK, tmp_path / 'bare'))
    assert math.isnan(loaded.option.threshold_)


@pytest.mark.parametrize(
    'network, info, word',
    [
        (dict(name='lenet5'), {}, 'weights are of another'),
        (dict(name='digits_cnn'), {}, 'weights are of another'),
        (dict(name='digitscnn'), {}, 'did you mean'),
        (dict(name='digits_cnn', klasses=4), {}, 'network is'),
        ('digits_cnn', {}, 'as a dict'),
        ({}, {}, 'as a dict'),
        (NETWORK, dict(reverse=True), 'an entry'),
        (NETWORK, dict(versions=1), 'an entry'),
        (NETWORK, dict(format='x'), 'an entry'),
        (NETWORK, dict(words={1, 2}), 'JSON'),
        (NETWORK, dict(words=b'x'), 'JSON'),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(network, info, word, tmp_path):
    robust, _ = digits_robust()
    with pytest.raises(InputError, match=word):
        save_robust(robust, network, tmp_path / 'new', **info)
    assert not (tmp_path / 'new').exists()


def test_settings_that_could_not_be_loaded_are_not_saved(tmp_path):
    robust, _ = digits_robust('knn')
    robust.option.detector.k = 0
    with pytest.raises(InputError, match='k must be a whole number'):
        save_robust(robust, NETWORK, tmp_path / 'new')

    class Named(Plain):
        def __init__(self):
            super().__init__()
            self.detector = nn.Linear(2, 2)

    with pytest.raises(InputError, match="called 'detector'"):
        save_robust(RobustClassifier(Named(), layer='pool'), None, tmp_path / 'new')


@pytest.fixture(scope='module', params=['by name', 'own'])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('saved')
    if request.param == 'own':
        robust = (
            RobustClassifier(Plain(), NearestNeighbors(k=3), layer='pool')
            .fit(normal(40, 1, 6, 6), torch.arange(40) % 4)
            .calibrate(normal(40, 1, 6, 6, seed=2))
        )
        return save_robust(robust, None, folder, class_names=list('abcd')), dict(
            model=Plain()
        )
    return save_robust(
        digits_robust('energy', True)[0], NETWORK, folder, class_names=list('abcd')
    ), {}


EDITS = [
    lambda h: h.update(reverse=not h['reverse']),
    lambda h: h['detector'].update(name='max-logit'),
    lambda h: h['detector'].update(fpr=0.5),
    lambda h: h.pop('reverse'),
    lambda h: h['detector']['settings'].update(temperature=2.0, k=1),
    lambda h: h['detector'].pop('sha256'),
    lambda h: h['detector'].pop('covers'),
    lambda h: h['detector'].update(covers=[]),
    lambda h: h['detector'].update(covers=[[]]),
    lambda h: h['detector'].update(covers={}),
    lambda h: h.update(detector=[]),
    lambda h: h.update(detector={}),
    lambda h: h.update(network=None, x=1) if h['network'] else h.update(network={}),
    lambda h: h.pop('class_names'),
    lambda h: h.update(class_names=[]),
    lambda h: h.pop('format'),
    lambda h: h.update(format=[]),
    lambda h: h['detector'].update(settings=None),
    lambda h: h['detector'].update(layer='fc'),
    lambda h: h['versions'].update(torch='0'),
    lambda h: h.clear(),
]


@pytest.mark.parametrize('edit', range(len(EDITS)))
def test_edited_headers_are_refused(edit, saved, tmp_path):
    (folder, more), header = saved, json.loads((saved[0] / 'model.json').read_text())
    EDITS[edit](header)
    (tmp_path / 'model.json').write_text(json.dumps(header))
    (tmp_path / 'model.safetensors').write_bytes(
        (folder / 'model.safetensors').read_bytes()
    )
    with pytest.raises(InputError) as told:
        load_robust(tmp_path, **more)
    assert '\n' not in str(told.value)


def changed(content, rng, how):
    at = int(rng.integers(len(content)))
    if how == 'cut':
        return content[:at]
    if how == 'add':
        return content + b'}'
    if how == 'drop':
        return content[:at] + content[at + 1 :]
    return (
        content[:at]
        + bytes([content[at] ^ int(rng.integers(1, 256))])
        + content[at + 1 :]
    )


@pytest.mark.parametrize('name', ['model.json', 'model.safetensors'])
@pytest.mark.parametrize('how', ['flip', 'cut', 'drop', 'add'])
def test_damaged_files_are_refused_in_one_line(name, how, saved, tmp_path):
    (folder, more), rng = saved, np.random.default_rng(0)
    files = {n: (folder / n).read_bytes() for n in ('model.json', 'model.safetensors')}
    for n, content in files.items():
        (tmp_path / n).write_bytes(content)
    start = files[name][:1200]  # most of the damage goes where the structure is
    for i in range(1 if how == 'add' else 60):
        content = (
            changed(start, rng, how) + (b'' if how == 'cut' else files[name][1200:])
            if i % 3
            else changed(files[name], rng, how)
        )
        (tmp_path / name).write_bytes(content)
        if name == 'model.json' and same_json(content, files[name]):
            continue
        with pytest.raises(InputError) as told:
            load_robust(tmp_path, **more)
        assert '\n' not in str(told.value)


def same_json(a, b):  # white space may change
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize(
    'content',
    [b'', b'{}', b'[]', b'null', b'3', b'"x"', b'\xff\xfe', b'{"format":', 1000 * b'['],
)
def test_strange_headers_are_refused(content, saved, tmp_path):
    (folder, more) = saved
    (tmp_path / 'model.json').write_bytes(content)
    (tmp_path / 'model.safetensors').write_bytes(
        (folder / 'model.safetensors').read_bytes()
    )
    with pytest.raises(InputError):
        load_robust(tmp_path, **more)


@pytest.mark.parametrize('length', [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_lengths_that_lie_are_refused(length, saved, tmp_path):
    (folder, more) = saved
    weights = (folder / 'model.safetensors').read_bytes()
    (tmp_path / 'model.json').write_bytes((folder / 'model.json').read_bytes())
    for content in (
        length.to_bytes(8, 'little') + weights[8:],
        length.to_bytes(8, 'little'),
    ):
        (tmp_path / 'model.safetensors').write_bytes(content)
        with pytest.raises(InputError):
            load_robust(tmp_path, **more)


def test_missing_files_are_told(saved, tmp_path):
    (folder, more) = saved
    with pytest.raises(InputError, match='model.json is missing'):
        load_robust(tmp_path, **more)
    (tmp_path / 'model.json').write_bytes((folder / 'model.json').read_bytes())
    with pytest.raises(InputError, match='missing'):
        load_robust(tmp_path, **more)
