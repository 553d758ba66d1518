"The nearest adversarial example of three classes in a plane, against linear and quadratic programming."

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, linprog, minimize

from complement_objectives.core import InputError
from complement_objectives.theory import (
    nearest_adversarial,
    project_polygon,
    sharp_pair_bound,
)


def half_planes(k, weight, bias, gap):
    "Rows of `Gx <= h`: class `k` is ahead of both others, and those differ by `gap` at most."
    i, j = [c for c in range(3) if c != k]
    rows = [
        (weight[i] - weight[k], bias[k] - bias[i]),
        (weight[j] - weight[k], bias[k] - bias[j]),
    ]
    if gap is not None:
        rows += [
            (weight[i] - weight[j], gap + bias[j] - bias[i]),
            (weight[j] - weight[i], gap + bias[i] - bias[j]),
        ]
    return np.array([g for g, _ in rows]), np.array([h for _, h in rows])


def largest_lead(G, h):
    "By how much the class can be ahead of both others, at most 1, and where; linear programming."
    lead = np.zeros(len(h))
    lead[:2] = 1
    found = linprog(
        [0, 0, -1], A_ub=np.c_[G, lead], b_ub=h, bounds=[(None, None)] * 2 + [(None, 1)]
    )
    return (found.x[2], found.x[:2]) if found.status == 0 else (-math.inf, None)


def by_programming(z, weight, bias, gap=None):
    "Distance to the nearest point where another class wins; None where none does."
    y, distances = int((weight @ z + bias).argmax()), []
    for k in set(range(3)) - {y}:
        G, h = half_planes(k, weight, bias, gap)
        lead, start = largest_lead(G, h)
        if lead < 1e-6:
            continue
        best = minimize(
            lambda x: ((x - z) ** 2).sum(),
            start,
            jac=lambda x: 2 * (x - z),
            method='SLSQP',
            options=dict(ftol=1e-14, maxiter=500),
            constraints=dict(type='ineq', fun=lambda x: h - G @ x, jac=lambda x: -G),
        )
        distances.append(best.fun**0.5)
    return min(distances) if distances else None


def layer(seed, kind):
    rng = np.random.default_rng(seed)
    weight, bias, z = rng.normal(size=(3, 2)), rng.normal(size=3), rng.normal(size=2)
    if kind == 'line':
        weight = rng.normal(size=(3, 1)) * rng.normal(
            size=2
        )  # class regions are strips: the middle one may be empty
    if kind == 'twins':
        weight[1], bias[1] = weight[0], bias[0] - rng.integers(0, 2)
    if kind == 'constant':
        weight[:] = weight[0]
    return z, weight, bias


@pytest.mark.parametrize('kind', ['general', 'line', 'twins', 'constant'])
@pytest.mark.parametrize('t', [None, 0.6])
def test_nearest_adversarial(kind, t):
    gap = t and brentq(
        lambda g: math.log1p(math.exp(-g)) + g / (1 + math.exp(g)) - t, 0, 50
    )
    for seed in range(25):
        z, weight, bias = layer(seed, kind)
        expected = by_programming(z, weight, bias, gap)
        args = [torch.from_numpy(a) for a in (z, weight, bias)] + [t]
        if expected is None:
            with pytest.raises(InputError, match='no other class wins'):
                nearest_adversarial(*args)
        else:
            assert np.linalg.norm(
                nearest_adversarial(*args).numpy() - z
            ) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_class_between_two_others_is_left_out():
    weight, bias = (
        torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]),
        torch.tensor([0.0, 0.0, -1.0]),
    )
    assert nearest_adversarial(
        torch.tensor([0.7, 0.3]), weight, bias
    ).tolist() == pytest.approx([0, 0.3])


def test_a_class_that_only_ties_does_not_win():
    weight, bias = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]), torch.zeros(3)
    assert nearest_adversarial(
        torch.tensor([0.5, 0.1]), weight, bias
    ).tolist() == pytest.approx([0, 0.1])


@pytest.mark.parametrize('scale', [1e-12, 1e-3, 1.0, 1e6, 1e100])
@pytest.mark.parametrize('t', [None, 0.6])
def test_the_scale_of_the_weights_is_no_matter(scale, t):
    z, weight, _ = (torch.from_numpy(a) for a in layer(3, 'general'))
    zero, gap = (
        torch.zeros(3),
        t
        and brentq(
            lambda g: math.log1p(math.exp(-g)) + g / (1 + math.exp(g)) - t, 0, 50
        ),
    )
    expected = by_programming(
        z.numpy(),
        weight.numpy(),
        zero.numpy(),
        gap and gap / scale if scale > 1e-12 else None,
    )
    if t and scale == 1e-12:
        expected = by_programming(
            z.numpy(), weight.numpy(), zero.numpy(), None
        )  # the strip is everything
    if t and scale == 1e100:
        expected = by_programming(
            z.numpy(), weight.numpy(), zero.numpy(), 1e-9
        )  # the strip is a line
    found = nearest_adversarial(z, weight * scale, zero, t)
    assert (found - z).norm().item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    small = nearest_adversarial(z * 1e-12, weight * scale * 1e12, zero, t)
    assert (small * 1e12 - found).norm() < 1e-6


@pytest.mark.parametrize('masked', [0, 1, 2])
def test_a_masked_class_wins_nowhere(masked):
    rng = np.random.default_rng(masked)
    for _ in range(20):
        weight, bias, z = (
            rng.normal(size=(3, 2)),
            rng.normal(size=3),
            rng.normal(size=2),
        )
        bias[masked] = -math.inf
        a, c = [k for k in range(3) if k != masked]
        normal, lead = (
            weight[a] - weight[c],
            (weight[a] - weight[c]) @ z + bias[a] - bias[c],
        )
        found = nearest_adversarial(z, weight, bias)
        assert np.allclose(
            found.numpy(), z - lead * normal / (normal @ normal), atol=1e-9
        )
        with pytest.raises(InputError, match='no other class wins'):
            nearest_adversarial(z, weight, bias, 0.3)  # of one class left, non-ME is 0


@pytest.mark.parametrize(
    'z, weight, bias',
    [
        (torch.zeros(2), torch.randn(4, 2), torch.zeros(4)),
        (torch.zeros(3), torch.randn(3, 3), torch.zeros(3)),
        (torch.zeros(5, 2), torch.randn(3, 2), torch.zeros(3)),
        (torch.tensor([0.0, math.nan]), torch.randn(3, 2), torch.zeros(3)),
        (torch.zeros(2), torch.full((3, 2), math.inf), torch.zeros(3)),
        (torch.zeros(2), torch.randn(3, 2), torch.tensor([0.0, math.nan, 0.0])),
        (torch.zeros(2), torch.randn(3, 2), torch.tensor([0.0, math.inf, 0.0])),
    ],
)
def test_no_plane_of_three_classes(z, weight, bias):
    with pytest.raises(InputError):
        nearest_adversarial(z, weight, bias)


def test_empty_polygon():
    with pytest.raises(InputError, match='no point in common'):
        project_polygon(
            torch.zeros(2),
            torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
            torch.tensor([-1.0, -1.0]),
        )


def test_where_the_sharp_bound_crosses_alpha():
    low, high = 1e-3, 0.1  # for ten classes; bisection
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if sharp_pair_bound(middle, 10) < middle else (low, middle)
        )
    assert low == pytest.approx(0.012231, abs=5e-7)
