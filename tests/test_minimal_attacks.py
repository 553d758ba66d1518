"What the minimal-norm attacks, C&W and the audit set owe: settings, types, ranges, budgets, and balls that hold."

import copy
import math
import warnings

import foolbox as fb
import pytest
import torch
from torch import nn

from complement_objectives.attacks import ATTACKS as rows
from complement_objectives.attacks import (
    APGD,
    AUDIT,
    AUDIT_L2,
    APGDTargeted,
    AttackRow,
    DDN,
    FMN,
    L2APGD,
    L2FMN,
    CarliniWagnerL2,
    CarliniWagnerWB,
    NearestOf,
    Square,
    Transfer,
    WorstCase,
    cw,
    cw_hc,
    cw_wb,
    nearest_l2,
    radii,
    robust_accuracy,
)
from complement_objectives.attacks import attack as attack_by_name
from complement_objectives.attacks.registry import norm_name
from complement_objectives.core import InputError
from complement_objectives.detection import KernelDensity
from complement_objectives.evaluation.gradient_checks import with_settings
from complement_objectives.models import Classifier

warnings.filterwarnings('ignore')
L2_RADIUS, LINF_RADIUS = 0.6, 0.12


def network(k=4):
    "A small network that is easy to fool, on images (N, 2, 4, 4) in [0, 1]."
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8), nn.ReLU()
    )
    net, x = Classifier(body, 8, k), torch.rand(400, 2, 4, 4)
    y, opt = (
        ((x - 0.5).flatten(1) @ torch.randn(32, k)).argmax(1),
        torch.optim.Adam(net.parameters(), lr=0.02),
    )
    for _ in range(60):
        opt.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
    return net.eval().requires_grad_(False)


NET = network()
X = (
    torch.randint(0, 256, (12, 2, 4, 4), generator=torch.Generator().manual_seed(1))
    / 255
)
Y = NET(X).argmax(1)
LINF = {
    'APGD': APGD(steps=10),
    'APGD-DLR': APGD(loss='dlr', steps=10),
    'APGD-T': APGDTargeted(steps=5, n_targets=2),
    'Square': Square(n_queries=40),
    'FMN': FMN(steps=20),
    'worst': WorstCase([APGD(steps=5), Square(n_queries=20)]),
}
L2 = {
    'L2APGD': L2APGD(steps=10),
    'DDN': DDN(steps=20),
    'L2FMN': L2FMN(steps=20),
    'nearest': nearest_l2(30),
    'C&W': CarliniWagnerL2(binary_search_steps=3, steps=40),
    'C&W, cold': CarliniWagnerL2(binary_search_steps=3, steps=60, start='cold'),
}
ATTACKS = [
    *((n, a, LINF_RADIUS, math.inf) for n, a in LINF.items()),
    *((n, a, L2_RADIUS, 2) for n, a in L2.items()),
]
each = pytest.mark.parametrize(
    'name,attack,eps,p', ATTACKS, ids=[a[0] for a in ATTACKS]
)


def size(a, b, p):
    return (a.double() - b.double()).flatten(1).norm(p, dim=1)


# -- settings that make nonsense look robust ---------------------------------------------------------------------------------------

BAD = [
    (APGD, dict(steps=0)),
    (APGD, dict(steps=-3)),
    (APGD, dict(budget=-1)),
    (APGD, dict(budget=0)),
    (APGD, dict(n_restarts=0)),
    (L2APGD, dict(steps=0)),
    (APGDTargeted, dict(n_targets=0)),
    (APGDTargeted, dict(steps=0)),
    (APGDTargeted, dict(budget=-1)),
    (Square, dict(n_queries=0)),
    (Square, dict(p=0.0)),
    (Square, dict(p=1.5)),
    (Square, dict(p=-0.1)),
    (Square, dict(p=math.nan)),
    (FMN, dict(steps=0)),
    (FMN, dict(max_stepsize=-1)),
    (FMN, dict(min_stepsize=0)),
    (FMN, dict(gamma=0)),
    (FMN, dict(gamma=1)),
    (L2FMN, dict(max_stepsize=0.0)),
    (L2FMN, dict(max_stepsize=math.inf)),
    (FMN, dict(max_stepsize=math.nan)),
    (DDN, dict(steps=-1)),
    (DDN, dict(init_epsilon=0)),
    (DDN, dict(gamma=-0.1)),
    (DDN, dict(max_stepsize=-1.0)),
    (CarliniWagnerL2, dict(steps=0)),
    (CarliniWagnerL2, dict(binary_search_steps=0)),
    (CarliniWagnerL2, dict(stepsize=0)),
    (CarliniWagnerL2, dict(stepsize=-0.01)),
    (CarliniWagnerL2, dict(initial_const=0)),
    (CarliniWagnerL2, dict(initial_const=-1.0)),
    (CarliniWagnerL2, dict(confidence=-1)),
    (CarliniWagnerL2, dict(confidence=math.inf)),
    (CarliniWagnerL2, dict(start='hot')),
    (CarliniWagnerL2, dict(tolerance=math.nan)),
]


@pytest.mark.parametrize(
    'kind,setting', BAD, ids=lambda v: str(v) if isinstance(v, dict) else v.__name__
)
def test_senseless_settings_are_refused(kind, setting):
    with pytest.raises(InputError):
        kind(**setting)
    with pytest.raises(InputError):
        with_settings(kind(), **setting)
    (name, value), attack = *setting.items(), kind()
    before = getattr(attack, name)
    with pytest.raises(InputError):
        setattr(attack, name, value)
    assert getattr(attack, name) == before


@pytest.mark.parametrize(
    'setting',
    [
        dict(eta=math.nan),
        dict(first_steps=0),
        dict(first_searches=0),
        dict(first_confidence=-1),
    ],
    ids=str,
)
def test_senseless_settings_of_the_white_box_attack(setting):
    with pytest.raises(InputError):
        CarliniWagnerWB(**dict(density=None, eta=1.0) | setting)


def test_settings_of_combined_attacks():
    with pytest.raises(InputError):
        NearestOf()
    with pytest.raises(InputError):
        nearest_l2(0)
    with pytest.raises(InputError):
        with_settings(nearest_l2(), steps=0)
    with pytest.raises(InputError):
        WorstCase([APGD()]).attacks = []
    with pytest.raises(InputError):
        WorstCase([APGD(), L2APGD()])


# -- half precision ----------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize(
    'dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16']
)
def test_half_networks(name, attack, eps, p, dtype):
    net, x = copy.deepcopy(NET).to(dtype), X.to(dtype)
    y = net(x).argmax(1)
    _raw, found, ok = attack(net, x, y, epsilons=eps)
    assert found.dtype == dtype and torch.equal(ok, net(found).argmax(1) != y)
    assert (
        (size(found, x, p) <= eps * (1 + 1e-6)).all()
        and found.min() >= 0
        and found.max() <= 1
    )
    full = attack(NET, X, Y, epsilons=eps)[2].float().mean()
    assert ok.float().mean() >= full - 0.25


# -- ranges ------------------------------------------------------------------------------------------------------------------------


class Ranged(nn.Module):
    def __init__(self, net, low, high):
        super().__init__()
        self.net, self.low, self.high = net, low, high

    def forward(self, z):
        return self.net((z - self.low) / (self.high - self.low))


class Denormalized(nn.Module):
    def forward(self, z):
        return NET(z * 0.25 + 0.5)


def framed(bounds, **kwargs):
    return fb.PyTorchModel(
        Ranged(NET, *bounds).eval(), bounds=bounds, device='cpu', **kwargs
    )


FRAMES = {
    'signed': (framed((-1, 1)), (-1, 1)),
    'bytes': (framed((0, 255)), (0, 255)),
    'preprocessing': (
        fb.PyTorchModel(
            Denormalized().eval(),
            bounds=(0, 1),
            device='cpu',
            preprocessing=dict(mean=0.5, std=0.25),
        ),
        (0, 1),
    ),
}


@each
@pytest.mark.parametrize('frame', ['bytes', 'preprocessing'])
def test_same_result_in_every_range(name, attack, eps, p, frame):
    model, (low, high) = FRAMES[frame]
    shown = low + X * (high - low)
    _raw, found, ok = attack(model, shown, Y, epsilons=eps * (high - low))
    _, there, fine = attack(NET, X, Y, epsilons=eps)
    assert torch.equal(
        ok, NET(((found - low) / (high - low)).clamp(0, 1)).argmax(1) != Y
    )
    assert (ok == fine).float().mean() >= 0.9
    near = size((found - low) / (high - low), there, 2) < 0.02 * eps * (
        1 if p == 2 else 6
    )
    assert near.float().mean() >= 0.75


# -- networks that write on their input, and expanded gradients --------------------------------------------------------------------


class Shifting(nn.Module):
    "Leaves its input far from where it was."

    def forward(self, z):
        out = NET(z + 0)
        z.add_(5.0)
        return out


@each
def test_networks_that_work_in_place(name, attack, eps, p):
    net, x = Shifting().eval(), X.clone()
    model = (
        fb.PyTorchModel(net, bounds=(0, 1), device='cpu')
        if name in ('Square', 'L2FMN', 'APGD')
        else net
    )
    _raw, found, ok = attack(model, x, Y, epsilons=eps)
    assert torch.equal(x, X)
    assert (
        (size(found, X, p) <= eps * (1 + 1e-6)).all()
        and found.min() >= 0
        and found.max() <= 1
    )
    assert torch.equal(ok, NET(found).argmax(1) != Y)


@pytest.mark.parametrize(
    'make',
    [lambda: APGD(steps=5), lambda: fb.attacks.LinfPGD(steps=5)],
    ids=['ours', 'foolbox'],
)
@pytest.mark.parametrize('wrapped', [False, True])
def test_transfer_from_a_source_in_place(make, wrapped):
    source = (
        fb.PyTorchModel(Shifting().eval(), bounds=(0, 1), device='cpu')
        if wrapped
        else Shifting().eval()
    )
    x = X.clone()
    found = Transfer(make(), source)(Shifting().eval(), x, Y, epsilons=LINF_RADIUS)[1]
    assert (
        torch.equal(x, X)
        and (size(found, X, math.inf) <= LINF_RADIUS * (1 + 1e-6)).all()
    )


def test_transfer_between_ranges():
    signed = framed((-1, 1))
    for target, (low, high) in ((NET, (0, 1)), *FRAMES.values()):
        shown = low + X * (high - low)
        for source in (NET, signed):
            ok = Transfer(APGD(steps=10), source)(
                target, shown, Y, epsilons=LINF_RADIUS * (high - low)
            )[2]
            assert (
                ok == APGD(steps=10)(NET, X, Y, epsilons=LINF_RADIUS)[2]
            ).float().mean() >= 0.9


def test_robust_accuracy_in_place_of_foolbox_and_by_norm():
    x = X.clone()
    plain = robust_accuracy(NET, X, Y, [APGD(steps=5)], LINF_RADIUS)
    for model in (
        Shifting().eval(),
        fb.PyTorchModel(Shifting().eval(), bounds=(0, 1), device='cpu'),
    ):
        assert robust_accuracy(model, x, Y, [APGD(steps=5)], LINF_RADIUS).equals(
            plain
        ) and torch.equal(x, X)
    theirs = robust_accuracy(
        NET, X, Y, [fb.attacks.LinfFastGradientAttack()], LINF_RADIUS
    )
    ok = fb.attacks.LinfFastGradientAttack()(
        fb.PyTorchModel(NET, bounds=(0, 1), device='cpu'), X, Y, epsilons=LINF_RADIUS
    )[2]
    assert theirs.alone['worst case'] == pytest.approx(1 - ok.float().mean().item())
    with pytest.raises(InputError, match='norms'):
        robust_accuracy(NET, X, Y, [APGD(), L2APGD()], 0.1)
    both = robust_accuracy(
        NET,
        X,
        Y,
        [APGD(steps=5), L2APGD(steps=5)],
        {math.inf: LINF_RADIUS, 2: L2_RADIUS},
    )
    assert both.alone['2 L2APGD'] == pytest.approx(
        1 - L2APGD(steps=5)(NET, X, Y, epsilons=L2_RADIUS)[2].float().mean().item()
    )


class Summed(nn.Module):
    "Its gradient is one number, shown everywhere."

    def forward(self, z):
        total = z.flatten(1).sum(1, keepdim=True)
        return torch.cat((total - 16, 16 - total, 0 * total - 50, 0 * total - 60), 1)


@each
def test_expanded_gradients(name, attack, eps, p):
    net = Summed().eval()
    y = net(X).argmax(1)
    found, ok = attack(net, X, y, epsilons=eps)[1:]
    assert (
        torch.equal(ok, net(found).argmax(1) != y)
        and (size(found, X, p) <= eps * (1 + 1e-6)).all()
    )


# -- the detector-aware attack -----------------------------------------------------------------------------------------------------


def detector():
    torch.manual_seed(2)
    x = torch.rand(400, 2, 4, 4)
    with torch.no_grad():
        z, logits = NET.hidden_and_logits(x)
    density = KernelDensity(sigma2=1.0).fit(z, logits.argmax(1))
    return density, -density.log_density(z, logits.argmax(1)).quantile(0.1).item()


class Inside(nn.Module):
    "A network with its own normalization before the one with hidden vectors."

    def __init__(self, low, high):
        super().__init__()
        self.net, self.low, self.high = NET, low, high

    def forward(self, z):
        return self.net((z - self.low) / (self.high - self.low))


WB = {
    'signed': (
        lambda: fb.PyTorchModel(
            NET, bounds=(-1, 1), device='cpu', preprocessing=dict(mean=-1.0, std=2.0)
        ),
        (-1, 1),
    ),
    'bytes': (
        lambda: fb.PyTorchModel(Inside(0, 255).eval(), bounds=(0, 255), device='cpu'),
        (0, 255),
    ),
    'moved': (
        lambda: fb.PyTorchModel(NET, bounds=(0, 1), device='cpu').transform_bounds(
            (-1, 1)
        ),
        (-1, 1),
    ),
    'layers before': (lambda: Inside(0, 1).eval(), (0, 1)),
    'plain': (lambda: NET, (0, 1)),
}


@pytest.mark.parametrize('frame', WB)
def test_white_box_reports_what_the_attacked_model_says(frame):
    (make, (low, high)), (density, eta) = WB[frame], detector()
    model, shown = make(), low + X * (high - low)
    attack = CarliniWagnerWB(
        density,
        eta,
        network=NET,
        first_steps=30,
        first_searches=2,
        binary_search_steps=3,
        steps=60,
        average_case=False,
    )
    raw, _, ok = attack(model, shown, Y, epsilons=None)
    seen = ((raw - low) / (high - low)).clamp(0, 1)
    with torch.no_grad():
        z, logits = NET.hidden_and_logits(seen)
    wanted = logits.scatter(1, Y[:, None], -math.inf).argmax(1)
    true = (logits.argmax(1) != Y) & (-density.log_density(z, wanted) <= eta + 1e-3)
    assert ok.any() and true[ok].all()
    plain = attack(NET, X, Y, epsilons=None)[2]
    assert abs(ok.float().mean() - plain.float().mean()) <= 0.2


def test_white_box_in_half_precision():
    density, eta = detector()
    net, x = copy.deepcopy(NET).bfloat16(), X.bfloat16()
    attack = CarliniWagnerWB(
        density,
        eta,
        first_steps=20,
        first_searches=2,
        binary_search_steps=2,
        steps=40,
        average_case=False,
    )
    raw, _, ok = attack(net, x, net(x).argmax(1), epsilons=None)
    assert raw.dtype == torch.bfloat16 and torch.equal(
        ok & (net(raw).argmax(1) == net(x).argmax(1)), torch.zeros_like(ok)
    )


# -- budgets -----------------------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = NET, 0

    def forward(self, z):
        self.seen += len(z)
        return self.net(z)


@pytest.mark.parametrize('searches,steps', [(6, 50), (9, 5), (1, 40)])
@pytest.mark.parametrize(
    'setting',
    [
        {},
        dict(start='cold'),
        dict(tolerance=-1.0),
        dict(start='cold', tolerance=-1.0),
        dict(confidence=2.0),
    ],
    ids=str,
)
def test_no_more_passes_than_asked_for(searches, steps, setting):
    net = Counted().eval()
    CarliniWagnerL2(binary_search_steps=searches, steps=steps, **setting)(
        net, X, Y, epsilons=None
    )
    assert net.seen <= searches * steps * len(X)


@pytest.mark.parametrize(
    'attack',
    [DDN(steps=30), L2FMN(steps=30), FMN(steps=30), nearest_l2(30)],
    ids=lambda a: type(a).__name__,
)
def test_steps_are_gradients(attack):
    net = Counted().eval()
    attack(net, X, Y, epsilons=None)
    assert net.seen <= (attack.steps + 2) * len(X)  # two last looks


def test_paper_presets_start_cold():
    assert [
        cw().start,
        cw_hc().start,
        cw_wb(None, None).start,
        CarliniWagnerL2().start,
    ] == ['cold', 'cold', 'cold', 'nearest']


def test_a_warm_start_needs_few_passes():
    few, many = (
        CarliniWagnerL2(binary_search_steps=b, steps=s, start=w)(
            NET, X, Y, epsilons=None
        )
        for b, s, w in ((9, 12, 'nearest'), (9, 400, 'cold'))
    )
    assert (
        few[2].all() and size(few[0], X, 2).mean() <= 1.03 * size(many[0], X, 2).mean()
    )
    assert not CarliniWagnerL2(binary_search_steps=9, steps=2, start='cold')(
        NET, X, Y, epsilons=None
    )[2].all()


def test_a_given_start_is_never_made_worse():
    given = DDN(steps=30)(NET, X, Y, epsilons=None)[0]
    raw, _, ok = CarliniWagnerL2(binary_search_steps=2, steps=30, start=given)(
        NET, X, Y, epsilons=None
    )
    assert ok.all() and (size(raw, X, 2) <= size(given, X, 2) + 1e-6).all()
    with pytest.raises(InputError):
        CarliniWagnerL2(start=given[:3])(NET, X, Y, epsilons=None)


# -- against oracles ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'attack',
    [
        DDN(steps=100),
        L2FMN(steps=100),
        nearest_l2(150),
        CarliniWagnerL2(binary_search_steps=4, steps=100),
    ],
    ids=lambda a: type(a).__name__,
)
def test_distance_to_a_linear_boundary(attack):
    torch.manual_seed(0)
    net = (
        nn.Sequential(nn.Flatten(), nn.Linear(32, 2)).double().eval()
    )  # with more classes DDN does not follow the margin
    x = 0.5 + 0.1 * (torch.rand(10, 2, 4, 4, dtype=torch.float64) - 0.5)
    z, w = net(x), net[1].weight
    top = z.argmax(1)
    gap = (z.gather(1, top[:, None]) - z) / (w[top][:, None] - w).norm(dim=2)
    exact = gap.masked_fill(torch.arange(2) == top[:, None], math.inf).amin(1)
    raw, _, ok = attack(net, x, top, epsilons=None)
    ratio = size(raw, x, 2) / exact
    assert ok.all() and ratio.min() >= 1 - 1e-6 and ratio.median() <= 1.01


def test_ddn_with_the_papers_settings_is_foolboxs():
    theirs = fb.attacks.DDNAttack(steps=60)(
        fb.PyTorchModel(NET, bounds=(0, 1), device='cpu'), X, Y, epsilons=None
    )
    ours = DDN(steps=60, init_epsilon=1.0, min_gamma=0.05)(NET, X, Y, epsilons=None)
    assert ours[2].all() and theirs[2].all()
    assert size(ours[0], X, 2).mean() <= 1.01 * size(theirs[0], X, 2).mean()


def test_steps_of_the_nearest_are_shared():
    longer = with_settings(nearest_l2(60), steps=300)
    assert [a.steps for a in longer.attacks] == [100] * 3 and nearest_l2(60).steps == 60


@pytest.mark.parametrize('steps, n', [(3, 3), (10, 3), (400, 3), (401, 4), (999, 4)])
def test_nearest_has_a_fourth_member_where_there_are_many_steps(steps, n):
    attack = nearest_l2(steps)
    assert (
        attack.steps == steps
        and len(attack.attacks) == n
        and min(a.steps for a in attack.attacks) >= steps // n
    )


def test_nearest_with_an_attack_of_foolbox():
    theirs = fb.attacks.L2CarliniWagnerAttack(steps=10, binary_search_steps=1)
    for model, (low, high) in ((NET, (0, 1)), FRAMES['bytes']):
        shown = low + X * (high - low)
        one, both = (
            a(model, shown, Y, epsilons=None)
            for a in (DDN(steps=10), NearestOf(DDN(steps=10), theirs))
        )
        assert (
            both[2].all()
            and (size(both[0], shown, 2) <= size(one[0], shown, 2) * (1 + 1e-6)).all()
        )


def test_nearest_is_the_minimum():
    members = [DDN(steps=20), DDN(steps=20, loss='margin'), L2FMN(steps=20)]
    each = torch.stack(
        [
            torch.where(ok, size(raw, X, 2), math.inf)
            for raw, _, ok in (a(NET, X, Y, epsilons=None) for a in members)
        ]
    )
    raw, _, ok = NearestOf(*members)(NET, X, Y, epsilons=None)
    assert ok.all() and torch.allclose(size(raw, X, 2), each.amin(0), rtol=1e-3)


@pytest.mark.parametrize('make', [FMN, L2FMN, DDN])
def test_starting_points(make):
    others = torch.stack([X[(Y != c).nonzero()[0, 0]] for c in Y])
    for model, (low, high) in (
        (fb.PyTorchModel(NET, bounds=(0, 1), device='cpu'), (0, 1)),
        FRAMES['bytes'],
    ):
        shown, start = (low + v * (high - low) for v in (X, others))
        found = make(steps=1).run(model, shown, Y, starting_points=start)
        again = make(steps=30).run(model, shown, Y, starting_points=start)
        p = make().distance.p
        for v in (found, again):
            assert (NET(((v - low) / (high - low)).clamp(0, 1)).argmax(1) != Y).all()
        assert (size(found, shown, p) < size(start, shown, p)).all() and size(
            again, shown, p
        ).mean() < size(found, shown, p).mean()
    with pytest.raises(InputError, match='do not fool'):
        make().run(model, shown, Y, starting_points=shown)
    with pytest.raises(InputError, match='shape'):
        make().run(model, shown, Y, starting_points=start[:3])


@pytest.mark.parametrize(
    'attack',
    [a for *_, a in [(n, a) for n, a in (LINF | L2).items()]],
    ids=[*LINF, *L2],
)
def test_run_checks_the_bounds(attack):
    eps = (
        {}
        if isinstance(attack, fb.attacks.base.MinimizationAttack)
        else dict(epsilon=0.1)
    )
    with pytest.raises(InputError, match='must lie in'):
        attack.run(fb.PyTorchModel(NET, bounds=(0, 1), device='cpu'), 2 * X, Y, **eps)


class Level(nn.Module):  # two classes lead together, and neither moves
    def forward(self, x):
        return (
            torch.stack([x.flatten(1).sum(1)] * 2 + [x.flatten(1)[:, 0]], 1) * self.by
        )

    def __init__(self, by):
        super().__init__()
        self.by = by
        self.eval()


@pytest.mark.parametrize(
    'attack',
    [
        FMN(steps=5),
        L2FMN(steps=5),
        DDN(steps=5),
        nearest_l2(9),
        CarliniWagnerL2(steps=20, binary_search_steps=2),
    ],
    ids=repr,
)
@pytest.mark.parametrize('by', [0.0, 1.0])
def test_a_margin_that_is_flat_and_zero_is_no_nan(attack, by):
    _, x_adv, ok = attack(Level(by), X, torch.zeros(len(X)).long(), epsilons=None)
    assert not ok.any() and torch.equal(x_adv, X)


class Loud(nn.Module):
    def forward(self, x):
        return 1e5 * NET(x)


def test_saturated_logits_are_told_by_ddn():
    def told(attack):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            attack(Loud().eval(), X, Y, epsilons=None)
        return sum('exactly zero' in str(w.message) for w in heard)

    assert told(DDN(steps=10)) == 1 and told(DDN(steps=10, loss='margin')) == 0 == told(
        L2FMN(steps=10)
    )
    assert told(nearest_l2(60)) == 0  # the margin has a gradient


# ------------------------------------------------------------------ logits of every scale


class Times(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by
        self.eval()

    def forward(self, x):
        return self.by * NET(x)


@pytest.mark.parametrize(
    'attack',
    [
        FMN(steps=30),
        L2FMN(steps=30),
        DDN(steps=30, loss='margin'),
        nearest_l2(60),
        CarliniWagnerL2(binary_search_steps=3, steps=40),
        CarliniWagnerL2(binary_search_steps=3, steps=60, start='cold'),
    ],
    ids=lambda a: type(a).__name__,
)
@pytest.mark.parametrize('by', [1e22, 1e-22])
def test_the_scale_of_the_logits_does_not_matter(attack, by):
    p = attack.distance.p
    once, scaled = (attack(Times(b), X, Y, epsilons=None) for b in (1.0, by))
    assert torch.equal(once[2], scaled[2]) and once[2].any()
    here, there = size(once[0], X, p), size(scaled[0], X, p)
    assert (there <= 1.02 * here + 1e-6)[once[2]].float().mean() >= 0.75


@pytest.mark.parametrize('kind', [APGD, L2APGD])
def test_apgd_on_a_margin_of_every_scale(kind):
    eps = LINF_RADIUS if kind is APGD else L2_RADIUS
    attack = kind(steps=10, loss='margin')
    found = [attack(Times(by), X, Y, epsilons=eps)[2] for by in (1.0, 1e22, 1e-22)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# ------------------------------------------------------------------ members, rows, radii


def test_a_step_of_a_member_from_foolbox_is_in_the_pixels_of_the_model():
    model, (low, high) = FRAMES['bytes']
    shown, eps = low + X * (high - low), LINF_RADIUS * (high - low)
    attack = fb.attacks.LinfPGD(steps=8, abs_stepsize=0.3 * eps, random_start=False)
    alone = attack(model, shown, Y, epsilons=eps)[2]
    assert alone.any()
    for nearest in (False, True):
        within = WorstCase([attack], nearest=nearest)(model, shown, Y, epsilons=eps)
        assert torch.equal(within[2], alone)


def test_every_row_makes_what_it_says():
    for name, row in rows.items():
        assert row.name == name and row.title and row.source
        if not row.needs:
            attack = row()
            assert row.traits['norm'] == row.norm == norm_name(attack)
            assert row() is not attack
            assert set(row.settings) <= set(row.parameters)


def test_the_audit_is_read_from_the_rows():
    assert list(AUDIT) == ['apgd_ce', 'apgd_dlr', 'fmn', 'apgd_t', 'square']
    assert list(AUDIT_L2) == ['apgd_ce_l2', 'apgd_dlr_l2', 'nearest_l2']
    assert all(rows[n] is row for n, row in (AUDIT | AUDIT_L2).items())
    assert {row.norm for row in AUDIT_L2.values()} == {'L2'}


def test_an_attack_in_an_l2_ball_by_name():
    found = attack_by_name(NET, X, Y, 'apgd_ce_l2', L2_RADIUS, steps=10)
    ok = L2APGD(steps=10)(NET, X, Y, epsilons=L2_RADIUS)[2]
    assert torch.equal(NET(found).argmax(1) != Y, ok)
    with pytest.raises(InputError, match='needs L2 radii'):
        radii('apgd_ce_l2', [0.1])


@pytest.mark.parametrize('name', ['cw_wb', 'jsma', 'nearest_l2', 'pgd'])
def test_an_unknown_setting_is_told(name):
    given = dict.fromkeys(rows[name].needs)
    with pytest.raises(InputError, match='unknown setting'):
        rows[name](nonsense=3, **given)


def test_a_maker_that_does_not_say_what_it_takes():
    row = AttackRow('own', 'Own', 'here', lambda **settings: APGD(**settings))
    assert row(steps=3).steps == 3 and row.needs == []
    with pytest.raises(InputError, match='unknown setting'):
        AttackRow('own', 'Own', 'here', APGD)(nonsense=3)


@pytest.mark.parametrize(
    'make, settings, words',
    [
        (APGD(), {}, 'give a class or a function'),
        (None, {}, 'give a class or a function'),
        (APGD, dict(stepz=3), 'did you mean steps'),
        (APGD, dict(steps=0), 'steps must be a whole number'),
        (lambda: 3, {}, 'comes out as int'),
    ],
)
def test_a_row_that_makes_no_attack_is_refused(make, settings, words):
    with pytest.raises(InputError, match=words):
        AttackRow('own', 'Own', 'here', make, settings)


def test_what_is_made_with_the_detector():
    knowing = [name for name, row in rows.items() if row.knows_detector]
    assert knowing == [n for n, row in rows.items() if 'density' in row.needs]
