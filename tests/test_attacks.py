"What every attack of the registry promises, on small networks: the same in every range and type, safe, and never fooled by its own settings."

import copy
import warnings

import foolbox as fb
import numpy as np
import pytest
import torch
from foolbox.criteria import Misclassification, TargetedMisclassification
from torch import nn

from complement_objectives.attacks import *
from complement_objectives.attacks import ATTACKS, make_attack
from complement_objectives.attacks.base import _radii, _settled
from complement_objectives.attacks.gradient import _in_slices
from complement_objectives.attacks.saliency import choose_targets
from complement_objectives.core import InputError
from complement_objectives.perturbation import check_images, sample_keys

INF = float('inf')
# few steps, so that the tests are quick; `cw_wb` needs a density and has its own page
SHORT = dict(
    cw=dict(steps=20, binary_search_steps=1),
    cw_hc=dict(steps=20, binary_search_steps=1, confidence=0.5),
    square=dict(n_queries=60),
    apgd_ce=dict(steps=8),
    apgd_dlr=dict(steps=8),
    apgd_t=dict(steps=8, n_targets=2),
    fmn=dict(steps=15),
)
TRAITS = {name: row.traits for name, row in ATTACKS.items() if not row.needs}
NAMES = [n for n, t in TRAITS.items() if t['norm'] == 'L∞' or t['radius'] == 'smallest']
GRADIENT = ['fgsm', 'bim', 'pgd', 'mim', 'ilcm']
RANGES = [(0, 1), (-1, 1), (0, 255)]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


class Affine(nn.Module):
    "shift + scale·x before a network, out of place or in place"

    def __init__(self, net, scale=1.0, shift=0.0, inplace=False):
        super().__init__()
        self.net, self.scale, self.shift, self.inplace = net, scale, shift, inplace
        self.eval()

    def forward(self, x):
        return self.net(
            x.mul_(self.scale).add_(self.shift)
            if self.inplace
            else x * self.scale + self.shift
        )


def network(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(144, 5)
    ).double()
    for p in net.parameters():
        p.data.mul_(3)
    return net.to(dtype).eval()


def images(n=6, dtype=torch.float64):
    return torch.rand(
        n, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).to(dtype)


def make(name, **settings):
    return make_attack(name, **SHORT.get(name, {}) | settings)


def radius(
    attack, eps=0.1, width=1
):  # of its norm; None where the attack minimizes in another
    return eps * width if attack.distance.p == INF else None


def answers(model, x):  # by the model itself, on a copy
    with torch.no_grad():
        return model(x.clone()).argmax(1)


def within(x_adv, x, eps, bounds=(0, 1)):  # exactly, in doubles
    assert (
        x_adv.dtype == x.dtype and x_adv.min() >= bounds[0] and x_adv.max() <= bounds[1]
    )
    return eps is None or (x_adv.double() - x.double()).abs().max() <= eps * (1 + 1e-15)


# ------------------------------------------------------------------ one image, many ranges


def forms(net):  # name → (model, range of its pixels), all the same network
    low, spread = 0.4, 0.3
    inner = Affine(net, spread, low)
    preprocessing = dict(
        mean=torch.tensor([low], dtype=torch.float64),
        std=torch.tensor([spread], dtype=torch.float64),
        axis=-3,
    )
    foolbox = {
        f'foolbox {r}': (
            fb.PyTorchModel(
                Affine(net, 1 / (r[1] - r[0]), -r[0] / (r[1] - r[0])),
                bounds=r,
                device='cpu',
            ),
            r,
        )
        for r in RANGES
    }
    moved = {
        f'moved {r}': (
            fb.PyTorchModel(net, bounds=(0, 1), device='cpu').transform_bounds(r),
            r,
        )
        for r in RANGES
    }
    return (
        foolbox
        | moved
        | {
            'mean and std': (
                fb.PyTorchModel(
                    inner, bounds=(0, 1), device='cpu', preprocessing=preprocessing
                ),
                (0, 1),
            ),
            'normalizes itself': (Affine(inner, 1 / spread, -low / spread), (0, 1)),
        }
    )


@pytest.mark.parametrize('name', NAMES)
def test_the_same_in_every_range(name):
    net, x = network(), images()
    y, attack = answers(net, x), make(name)
    _, expected, success = attack(net, x, y, epsilons=radius(attack))
    for form, (model, (low, high)) in forms(net).items():
        width = high - low
        given = low + width * x
        eps = radius(attack, width=width)
        _, x_adv, ok = attack(model, given, y, epsilons=eps)
        assert torch.equal(ok, success), form
        assert torch.equal(ok, answers(model, x_adv) != y), form
        found = (x_adv - low) / width
        assert (found - expected).abs().max() < 1e-9, form
        assert within(x_adv, given, eps, (low, high)), form
        assert torch.equal(x_adv[~ok], given[~ok]), form


@pytest.mark.parametrize(
    'attack',
    [
        L2APGD(steps=8),
        L2FMN(steps=15),
        PGD(steps=5).repeat(2),
        JSMA(target='random', gamma=0.3).repeat(2),
    ],
    ids=repr,
)
def test_the_same_in_every_range_in_other_norms(attack):
    net, x = network(), images()
    y, eps = answers(net, x), 5 if attack.distance.p == 0 else 0.3
    expected = attack(net, x, y, epsilons=eps)
    for low, high in RANGES[1:]:
        model, width = (
            fb.PyTorchModel(net, bounds=(0, 1), device='cpu').transform_bounds(
                (low, high)
            ),
            high - low,
        )
        _, x_adv, ok = attack(
            model,
            low + width * x,
            y,
            epsilons=eps * (1 if attack.distance.p == 0 else width),
        )
        assert torch.equal(ok, expected[2]) and torch.equal(
            ok, answers(model, x_adv) != y
        )
        found = (
            (x_adv - low) / width
        )  # FMN meets points that are equally far up to rounding, and may take the other
        if 'FMN' in repr(attack):
            assert (
                attack.distance(x, found) - attack.distance(x, expected[1])
            ).abs().max() < 1e-9
        else:
            assert (found - expected[1]).abs().max() < 1e-9


@pytest.mark.parametrize('name', [n for n in NAMES if n not in ('ilcm', 'apgd_t')])
def test_the_same_in_every_range_towards_targets(name):
    net, x = network(), images()
    target, attack = (answers(net, x) + 1) % 5, make(name)
    _, expected, success = attack(
        net, x, TargetedMisclassification(target), epsilons=radius(attack, 0.3)
    )
    for r in RANGES[1:]:
        model, width = (
            fb.PyTorchModel(net, bounds=(0, 1), device='cpu').transform_bounds(r),
            r[1] - r[0],
        )
        _, x_adv, ok = attack(
            model,
            r[0] + width * x,
            TargetedMisclassification(target),
            epsilons=radius(attack, 0.3, width),
        )
        assert torch.equal(ok, success) and torch.equal(
            ok, answers(model, x_adv) == target
        )
        found = (x_adv - r[0]) / width
        assert (found - expected).abs().max() < 1e-9


@pytest.mark.parametrize(
    'settings',
    [
        dict(abs_stepsize=0.02),
        dict(rel_stepsize=0.3),
        dict(random_start=True),
        dict(step_rule='full'),
    ],
)
@pytest.mark.parametrize('name', ['bim', 'mim', 'pgd', 'ilcm'])
def test_step_sizes_in_every_range(name, settings):
    net, x = network(), images()
    y = answers(net, x)
    expected = make(name, **settings).craft(net, x, y, epsilon=0.1)
    for low, high in RANGES[1:]:
        width = high - low
        scaled = settings | (
            {'abs_stepsize': 0.02 * width} if 'abs_stepsize' in settings else {}
        )  # in units of the model's range, as foolbox has it
        model = fb.PyTorchModel(net, bounds=(0, 1), device='cpu').transform_bounds(
            (low, high)
        )
        x_adv = make(name, **scaled).craft(
            model, low + width * x, y, epsilon=0.1 * width
        )
        assert ((x_adv - low) / width - expected).abs().max() < 1e-9


@pytest.mark.parametrize(
    'denominator', [2, 3, 15, 16, 31, 63, 64, 100, 128, 255, 256, 1023, 65535]
)
def test_keys_do_not_hang_on_roundings(denominator):
    x = (
        torch.randint(
            0,
            denominator + 1,
            (50, 1, 8, 8),
            generator=torch.Generator().manual_seed(0),
        )
        / denominator
    )
    keys = sample_keys(x)
    for low, high in ((-1, 1), (0, 255), (-2.1179, 2.6400)):
        given = low + (high - low) * x
        assert torch.equal(sample_keys((given - low) / (high - low)), keys)
        assert torch.equal(sample_keys(given, bounds=(low, high)), keys)


def test_an_attack_of_ones_own_sees_one_range():
    class Seen(PlainCall, fb.attacks.base.FixedEpsilonAttack):
        distance = fb.distances.linf

        def run(self, model, inputs, criterion, *, epsilon):
            self.saw = (
                inputs.min().item(),
                inputs.max().item(),
                epsilon,
                tuple(model.bounds),
            )
            return inputs + epsilon

    attack, x = Seen(), images()
    model = fb.PyTorchModel(network(), bounds=(0, 1), device='cpu').transform_bounds(
        (0, 255)
    )
    x_adv = attack.craft(model, 255 * x, answers(network(), x), epsilon=25.5)
    assert attack.saw[1] <= 1 and attack.saw[2:] == (25.5 / 255, (0, 1))
    assert (x_adv - (255 * x + 25.5).clamp(max=255)).abs().max() < 1e-9


# ------------------------------------------------------------------ `run`, as foolbox's own attacks of attacks use it


@pytest.mark.parametrize('name', NAMES)
def test_run_is_as_safe_as_the_call(name):
    net, x, attack = network(), images(), make(name)
    y = answers(net, x)
    model = fb.PyTorchModel(net, bounds=(0, 1), device='cpu').transform_bounds((-1, 1))
    given, word = (
        2 * x - 1,
        'epsilon'
        if isinstance(attack, fb.attacks.base.FixedEpsilonAttack)
        else 'early_stop',
    )
    eps = radius(attack, width=2)
    kept, flags = given.clone(), [p.requires_grad for p in net.parameters()]
    out = attack.run(model, given, Misclassification(y), **{word: eps})
    assert (
        torch.equal(given, kept)
        and out.dtype == given.dtype
        and [p.requires_grad for p in net.parameters()] == flags
    )
    assert within(out, given, eps if word == 'epsilon' else None, (-1, 1))
    assert torch.equal(
        out, attack.run(model, given, y, **{word: eps})
    )  # labels will do
    plain = attack.run(net, x, y, **{word: radius(attack)})  # a plain network, too
    assert ((out + 1) / 2 - plain).abs().max() < 1e-9
    with pytest.raises(InputError, match='pixels span'):
        attack.run(model, given * 1.1, y, **{word: eps})
    with pytest.raises(InputError, match='one class index'):
        attack.run(model, given, y[:2], **{word: eps})
    with pytest.raises(InputError):
        attack.run(model, given, y, **{word: -0.1})


@pytest.mark.parametrize('name', NAMES)
def test_on_and_off_without_gradients(name):
    net, x, attack = network(), images(), make(name)
    y = answers(net, x)
    expected = attack(net, x, y, epsilons=radius(attack))[1]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = attack(net, x.clone(), y, epsilons=radius(attack))[1]
        assert torch.equal(found.clone(), expected)


# ------------------------------------------------------------------ types


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', NAMES)
def test_half_networks(name, dtype):
    attack, wide = make(name), images(8, torch.float32)
    net = network(dtype)
    foolbox = fb.PyTorchModel(net, bounds=(0, 1), device='cpu')
    for model, x in ((net, wide.to(dtype)), (net, wide), (foolbox, wide.to(dtype))):
        y, eps = answers(net, x.to(dtype)), radius(attack)
        _, x_adv, ok = attack(model, x, y, epsilons=eps)
        assert within(x_adv, x, eps) and torch.equal(
            ok, answers(net, x_adv.to(dtype)) != y
        )
        assert torch.equal(x_adv[~ok], x[~ok])
    single = network(torch.float32)  # half precision is no defense
    y = answers(single, wide)
    full = attack(single, wide, y, epsilons=radius(attack))[2].float().mean()
    half = attack(net, wide.to(dtype), y, epsilons=radius(attack))[2].float().mean()
    assert half >= full - 0.26


@pytest.mark.parametrize(
    'kinds',
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.float16),
    ],
)
@pytest.mark.parametrize('name', NAMES)
def test_images_of_another_type_than_the_network(name, kinds):
    of_net, of_images = kinds
    attack, net, x = make(name), network(of_net), images(dtype=of_images)
    y = answers(net, x.to(of_net))
    _, x_adv, ok = attack(net, x, y, epsilons=radius(attack))
    assert within(x_adv, x, radius(attack)) and torch.equal(
        ok, answers(net, x_adv.to(of_net)) != y
    )


# ------------------------------------------------------------------ settings that make nonsense look robust

SENSELESS = [(PGD, dict(steps=s)) for s in (0, -1, 2.5, '3', float('nan'), None)]
SENSELESS += [
    (A, {k: v})
    for A in (BIM, PGD, MIM, ILCM)
    for k in ('rel_stepsize', 'abs_stepsize')
    for v in (0, -0.1, float('nan'), INF, '0.1')
]
SENSELESS += [
    (BIM, dict(steps=0)),
    (MIM, dict(steps=-3)),
    (ILCM, dict(steps=0)),
    (MIM, dict(mu=-1)),
    (MIM, dict(mu=float('nan'))),
    (PGD, dict(seed=1.5)),
    (PGD, dict(step_rule='other')),
    (PGD, dict(step_rule='even', rel_stepsize=0.1)),
    (FGSM, dict(seed='a')),
    (GradientAttack, dict(steps=0)),
]
SENSELESS += [
    (JSMA, {k: v})
    for k, vs in dict(
        theta=(0, float('nan'), INF, '1'),
        gamma=(0, -1, 1.5, float('nan'), '1'),
        steps=(0, -1, 2.5),
        per_step=(0, 1.5),
        batch_size=(0, -1, 1.5),
        seed=(0.5,),
        output=('p',),
        target=('next',),
    ).items()
    for v in vs
]


@pytest.mark.parametrize(
    'kind, settings',
    SENSELESS,
    ids=lambda v: str(v) if isinstance(v, dict) else v.__name__,
)
def test_senseless_settings_are_refused(kind, settings):
    with pytest.raises(InputError) as told:
        kind(**settings)
    assert '\n' not in str(told.value)


@pytest.mark.parametrize('times', [0, -1, 1.5, '2', None])
@pytest.mark.parametrize('kind', [PGD, JSMA])
def test_senseless_repeats_are_refused(kind, times):
    with pytest.raises(InputError):
        kind().repeat(times)


def test_a_share_that_leaves_no_feature():
    net, x = network(), images()
    for attack in (JSMA(gamma=0.02), JSMA(gamma=0.04, pairs=True)):
        with pytest.raises(InputError, match='gamma is'):
            attack(net, x, answers(net, x), epsilons=None)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('as_foolbox', [False, True])
def test_one_logit_is_refused(name, as_foolbox):
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 1)).double().eval()
    model, attack = (
        fb.PyTorchModel(net, bounds=(0, 1), device='cpu') if as_foolbox else net,
        make(name),
    )
    with pytest.raises(InputError, match='1 logit'):
        attack(model, images(), torch.zeros(6).long(), epsilons=radius(attack))


@pytest.mark.parametrize(
    'eps', ['0.1', -0.1, float('nan'), INF, [0.1, 'a'], torch.ones(2, 2), 1j, []]
)
def test_senseless_radii_are_refused(eps):
    with pytest.raises(InputError):
        PGD()(network(), images(), torch.zeros(6).long(), epsilons=eps)


def test_a_text_is_told_to_be_text():
    with pytest.raises(InputError, match="text '0.1'"):
        PGD()(network(), images(), torch.zeros(6).long(), epsilons='0.1')
    with pytest.raises(InputError, match="text '0.1'"):
        attack(network(), images(), torch.zeros(6).long(), 'pgd', '0.1')


@pytest.mark.parametrize('name', ['fgsm', 'pgd', 'fmn', 'cw'])
def test_radii_of_every_kind(name):
    net, x, attack = network(), images(), make(name)
    y = answers(net, x)
    one = attack(net, x, y, epsilons=0.125)
    for eps in (
        torch.tensor(0.125),
        np.float32(0.125),
        np.float64(0.125),
        np.array(0.125),
    ):
        for a, b in zip(attack(net, x, y, epsilons=eps), one):
            assert torch.equal(a, b)
    two = attack(net, x, y, epsilons=[0.125, 0.25])
    for eps in (
        torch.tensor([0.125, 0.25]),
        np.array([0.125, 0.25]),
        (0.125, 0.25),
        [torch.tensor(0.125), np.float32(0.25)],
        iter([0.125, 0.25]),
    ):
        found = attack(net, x, y, epsilons=eps)
        assert torch.equal(found[2], two[2]) and all(
            torch.equal(a, b) for a, b in zip(found[1], two[1])
        )
    assert attack(net, x, y, epsilons=torch.tensor([0.125]))[2].shape == (1, 6)


# ------------------------------------------------------------------ steps that cross the ball


def test_few_steps_do_as_much_as_apgd():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5)).double().eval()
    x = 0.3 + 0.4 * images(40)
    y, eps = answers(net, x), 0.1
    best = APGD(steps=50)(net, x, y, epsilons=eps)[2].double().mean()
    for steps in (1, 2, 5, 10, 40, 100):
        for attack in (
            PGD(steps=steps),
            BIM(steps=steps),
            BIM(steps=steps, random_start=True),
            MIM(steps=steps, random_start=True),
            make('pgd', steps=steps),
        ):
            if steps == 40 and attack.step_rule == 'gce-script':
                continue  # what the paper's authors ran
            assert attack(net, x, y, epsilons=eps)[2].double().mean() >= best - 0.05, (
                attack
            )
    assert (
        PGD(steps=10, step_rule='gce-script')(net, x, y, epsilons=eps)[2]
        .double()
        .mean()
        < best - 0.2
    )


def test_the_papers_rules_by_name():
    assert (
        make_attack('pgd').rel_stepsize == 1 / 30
        and make_attack('pgd').step_rule == 'gce-script'
    )
    assert [make_attack(n).step_rule for n in ('bim', 'mim', 'ilcm', 'fgsm')] == [
        'even'
    ] * 4
    assert [
        BIM(steps=7, step_rule=r).rel_stepsize
        for r in ('crossing', 'even', 'full', 'gce-script')
    ] == [2.5 / 7, 1 / 7, 1, 1 / 30]
    changed = PGD()
    changed.steps = 10
    assert changed.rel_stepsize == 0.25
    assert PGD(rel_stepsize=0.1).rel_stepsize == 0.1


# ------------------------------------------------------------------ networks that work in place


@pytest.mark.parametrize('as_foolbox', [False, True])
@pytest.mark.parametrize('name', NAMES + ['transfer', 'restarts', 'worst case'])
def test_networks_that_work_in_place(name, as_foolbox):
    net, x = network(), images()
    made = {
        'transfer': lambda: Transfer(
            APGD(steps=8), Affine(net, 0.5, 0.2, inplace=True)
        ),
        'restarts': lambda: PGD(steps=5).repeat(2),
        'worst case': lambda: WorstCase([PGD(steps=5), make('square')]),
    }
    attack = made.get(name, lambda: make(name))()
    tame, wild = (Affine(net, 0.5, 0.2, inplace=i) for i in (False, True))
    if as_foolbox:
        tame, wild = (
            fb.PyTorchModel(m, bounds=(0, 1), device='cpu') for m in (tame, wild)
        )
    y, kept, eps = answers(tame, x), x.clone(), radius(attack, 0.2)
    expected, found = (attack(m, x, y, epsilons=eps) for m in (tame, wild))
    assert torch.equal(x, kept) and within(found[1], x, eps)
    assert torch.equal(found[1], expected[1]) and torch.equal(found[2], expected[2])
    assert torch.equal(found[2], answers(wild, found[1]) != y)
    fooled(wild, x, Misclassification(y))
    assert torch.equal(x, kept)


def test_robust_accuracy_leaves_the_images_alone():
    net, x = network(), images()
    y, kept, wild = (
        answers(Affine(net, 0.5, 0.2), x),
        x.clone(),
        Affine(net, 0.5, 0.2, inplace=True),
    )
    for model in (wild, fb.PyTorchModel(wild, bounds=(0, 1), device='cpu')):
        table = robust_accuracy(model, x, y, [PGD(steps=5)], 0.05)
        assert torch.equal(x, kept) and table.loc['clean', 'alone'] == 1


class Sneaky(nn.Module):  # past the version counter
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x):
        x.data.mul_(0.5)
        return self.net(x)


@pytest.mark.parametrize('name', NAMES)
def test_networks_that_write_past_autograd(name):
    net, x, attack = network(), images(), make(name)
    y, kept = answers(Sneaky(net), x), x.clone()
    _, x_adv, ok = attack(Sneaky(net), x, y, epsilons=radius(attack))
    assert (
        torch.equal(x, kept)
        and within(x_adv, x, radius(attack))
        and torch.equal(ok, answers(Sneaky(net), x_adv) != y)
    )


# ------------------------------------------------------------------ repeats


@pytest.mark.parametrize('name', NAMES)
def test_repeat(name):
    net, x, attack = network(), images(), make(name)
    y, eps = answers(net, x), radius(attack, 0.06)
    before, times = repr(attack), 3
    again = attack.repeat(times)
    _, x_adv, ok = again(net, x, y, epsilons=eps)
    singles = []
    for i in range(times):
        one = copy.copy(attack)
        if hasattr(one, 'seed'):
            one.seed = attack.seed + i
        singles.append(one(net, x, y, epsilons=eps))
    assert torch.equal(ok, torch.stack([s[2] for s in singles]).any(0)) and torch.equal(
        ok, answers(net, x_adv) != y
    )
    if eps is None:  # the nearest
        far = (
            torch.stack(
                [torch.where(s[2], attack.distance(x, s[1]), INF) for s in singles]
            )
            .min(0)
            .values
        )
        assert torch.equal(attack.distance(x, x_adv)[ok], far[ok])
    assert (
        torch.equal(x_adv, again(net, x, y, epsilons=eps)[1]) and repr(attack) == before
    )
    many = again(
        fb.PyTorchModel(net, bounds=(0, 1), device='cpu'), x, y, epsilons=[eps, eps]
    )
    assert torch.equal(many[1][1], x_adv) and many[2].shape == (2, 6)


def test_repeats_of_repeats_take_new_seeds():
    heard = []

    class Listening(PGD):
        def run(self, model, inputs, criterion, *, epsilon):
            heard.append(self.seed)
            return inputs

    attack = Listening(seed=10)
    net, x = network(), images()
    attack.repeat(3).repeat(2)(net, x, answers(net, x), epsilons=0.01)
    assert heard == [10, 11, 12, 13, 14, 15] and attack.seed == 10
    heard.clear()
    WorstCase([attack, FGSM()]).repeat(2)(net, x, answers(net, x), epsilons=0.001)
    assert heard == [10, 11]


# ------------------------------------------------------------------ gradients


class OfTheSum(nn.Module):  # its gradient is one number, expanded
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 5).double()
        self.eval()

    def forward(self, x):
        return self.head(x.flatten(1).sum(1, keepdim=True))


@pytest.mark.parametrize('name', NAMES + ['l2apgd', 'l2fmn'])
def test_gradients_that_are_expanded(name):
    torch.manual_seed(0)
    net, x = OfTheSum(), images()
    attack = {'l2apgd': L2APGD(steps=5), 'l2fmn': L2FMN(steps=5)}.get(name) or make(
        name
    )
    y = answers(net, x)
    _, x_adv, ok = attack(
        net,
        x,
        y,
        epsilons=0.3 if attack.distance.p == INF or name == 'l2apgd' else None,
    )
    assert torch.equal(ok, answers(net, x_adv) != y)


class Loud(nn.Module):
    def __init__(self, net, by):
        super().__init__()
        self.net, self.by = net, by
        self.eval()

    def forward(self, x):
        return self.by * self.net(x)


@pytest.mark.parametrize('name', GRADIENT)
def test_saturated_logits_are_told_once(name):
    net, x = network(torch.float32), images(20, torch.float32)
    y = answers(net, x)

    def told(model, attack, **kwargs):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            attack(model, x, y, **kwargs)
        return [str(w.message) for w in heard if 'exactly zero' in str(w.message)]

    criterion_free = name == 'ilcm'  # it lowers a loss that is never flat there
    assert told(net, make(name), epsilons=[0.01, 0.1]) == []
    loud = told(Loud(net, 1e4), make(name), epsilons=[0.01, 0.02])
    assert len(loud) == (0 if criterion_free else 1)
    assert len(told(Loud(net, 1e4), make(name, loss='margin'), epsilons=0.01)) == 0
    if not criterion_free:
        assert len(told(Loud(net, 1e4), make(name).repeat(2), epsilons=0.01)) == 1


def test_a_cut_off_network_is_told():
    class Cut(nn.Module):  # no pixel of 0 or 1 gets a gradient
        def __init__(self, net):
            super().__init__()
            self.net = net
            self.eval()

        def forward(self, x):
            return self.net(torch.where((x > 0) & (x < 1), x, x.detach()))

    net, x = network(torch.float32), images(20, torch.float32).round()
    for attack in (FGSM(), BIM(), JSMA(gamma=0.2)):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            attack(
                Cut(net),
                x,
                answers(net, x),
                epsilons=0.1 if attack.distance.p == INF else None,
            )
        assert 'exactly zero on 100 %' in str(heard[-1].message)


# ------------------------------------------------------------------ what counts as outside


@pytest.mark.parametrize('name', NAMES)
def test_a_rounding_beyond_the_bounds_is_no_error(name):
    net, x, attack = network(torch.float32), images(dtype=torch.float32), make(name)
    x[:, :, 0, 0], x[:, :, 1, 1] = 1 + 2**-23, -2.98e-8
    y, kept, eps = answers(net, x), x.clone(), radius(attack)
    _, x_adv, ok = attack(net, x, y, epsilons=eps)
    assert (
        torch.equal(x, kept)
        and torch.equal(x_adv[~ok], x[~ok])
        and torch.equal(ok, answers(net, x_adv) != y)
    )
    if eps is not None:
        assert (x_adv.double() - x.double()).abs().max() <= eps
    with pytest.raises(InputError, match='2e-05 is too far out'):
        attack(net, x.clamp(0, 1) * 1.00002 / x.max(), y, epsilons=eps)


def test_the_excess_is_shown():
    for x, words in (
        (torch.tensor([[0.0, 1.001]]), '0.001 is too far out'),
        (torch.tensor([[-0.25, 1.0]]), '0.25 is too far out'),
    ):
        with pytest.raises(InputError, match=words):
            check_images(x)
    with pytest.raises(InputError, match=r'\[0, 255\], 1 is too far out'):
        check_images(torch.tensor([[256.0]]), (0, 255))


# ------------------------------------------------------------------ settings changed later, other inputs of the same kinds

LATER = [
    (FGSM, 'steps', 0),
    (PGD, 'steps', -1),
    (BIM, 'steps', '3'),
    (MIM, 'mu', -1),
    (MIM, 'mu', float('nan')),
    (ILCM, 'abs_stepsize', -0.1),
    (PGD, 'rel_stepsize', -0.1),
    (PGD, 'step_rule', 'other'),
    (PGD, 'seed', 1.5),
    (JSMA, 'steps', -1),
    (JSMA, 'gamma', float('nan')),
    (JSMA, 'theta', 0),
    (JSMA, 'per_step', 0),
    (JSMA, 'output', 'p'),
    (JSMA, 'target', 'next'),
    (JSMA, 'batch_size', 0),
    (APGD, 'seed', 'a'),
    (Square, 'seed', 0.5),
    (CarliniWagnerL2, 'seed', 1.5),
    (APGD, 'steps', 0),
    (lambda: PGD().repeat(2), 'times', 0),
    (lambda: JSMA().repeat(2), 'times', -1),
]


@pytest.mark.parametrize('kind, name, value', LATER)
def test_senseless_changes_are_refused(kind, name, value):
    attack = kind()
    with pytest.raises(InputError) as told:
        setattr(attack, name, value)
    assert name.split('_')[0] in str(told.value).replace(
        'step rule', 'step_rule'
    ) and '\n' not in str(told.value)


def test_a_step_size_can_be_changed():
    net, x = network(), images()
    y, changed = answers(net, x), PGD(steps=5)
    changed.rel_stepsize = 0.1
    assert torch.equal(
        changed.craft(net, x, y, epsilon=0.1),
        PGD(steps=5, rel_stepsize=0.1).craft(net, x, y, epsilon=0.1),
    )
    mild = APGD(steps=3)
    mild.stop = 0
    assert torch.equal(
        mild(net, x, y, epsilons=0.1)[1],
        APGD(steps=3, stop=False)(net, x, y, epsilons=0.1)[1],
    )


@pytest.mark.parametrize('loss', [None, 3, ['margin']])
def test_a_loss_that_is_none_is_refused(loss):
    with pytest.raises(InputError, match='the loss is'):
        PGD(loss=loss)(network(), images(), torch.zeros(6).long(), epsilons=0.1)


@pytest.mark.parametrize('kind', [JSMA, CarliniWagnerL2, PGD])
def test_no_images_and_repeats(kind):
    attack = kind().repeat(2)
    raw, clipped, ok = attack(
        network(), images()[:0], torch.zeros(0).long(), epsilons=[0.1, 0.2]
    )
    assert len(raw) == 2 and clipped[1].shape == (0, 1, 6, 6) and ok.shape == (2, 0)


@pytest.mark.parametrize('name', NAMES)
def test_everything_made_in_inference_mode(name):
    net, x, attack = network(), images(), make(name)
    expected = attack(net, x, answers(net, x), epsilons=radius(attack))
    with torch.inference_mode():
        given = images()
        found = attack(net, given, answers(net, given), epsilons=radius(attack))
    assert all(torch.equal(a.clone(), b) for a, b in zip(found, expected))


def test_near_attacks_in_inference_mode():
    net, x = network(), images()
    for average in (False, True):
        attack = CarliniWagnerL2(steps=20, binary_search_steps=2, average_case=average)
        expected = attack(net, x, answers(net, x), epsilons=None)[1]
        with torch.inference_mode():
            assert torch.equal(
                attack(net, images(), answers(net, images()), epsilons=None)[1].clone(),
                expected,
            )


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('shift', [5, -5])
def test_labels_that_the_network_does_not_know(name, shift):
    net, x, attack = network(), images(), make(name)
    with pytest.raises(InputError, match='labels span'):
        attack(net, x, answers(net, x) + shift, epsilons=radius(attack))


def passes(attack, n):  # forward passes an image, of one that is slow to fool
    net, seen = network(), []
    net.register_forward_pre_hook(lambda module, images: seen.append(len(images[0])))
    x = images(n)
    y = answers(net, x)
    seen.clear()
    attack(net, x, y, epsilons=None)
    return sum(seen) / n


@pytest.mark.parametrize('n', [1, 5])
@pytest.mark.parametrize('start', ['cold', 'nearest'])
@pytest.mark.parametrize('searches, steps', [(1, 10), (2, 20), (9, 10), (3, 50)])
def test_the_average_case_costs_no_more_than_asked_for(n, start, searches, steps):
    for tolerance in (0.005, -1):
        attack = CarliniWagnerL2(
            binary_search_steps=searches,
            steps=steps,
            start=start,
            average_case=True,
            tolerance=tolerance,
        )
        assert passes(attack, n) <= searches * steps


def test_attacks_within_attacks_are_told_once():
    net, x = Loud(network(torch.float32), 1e4), images(20, torch.float32)
    for attack in (
        WorstCase([FGSM(), PGD(steps=3)]),
        WorstCase([FGSM(), BIM(steps=3)], nearest=True),
        WorstCase([FGSM()]).repeat(2),
    ):
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter('always')
            attack(net, x, answers(net, x), epsilons=[0.01, 0.02])
        assert sum('exactly zero' in str(w.message) for w in heard) == 1


@pytest.mark.parametrize(
    'attack',
    [
        fb.attacks.LinfBasicIterativeAttack(
            abs_stepsize=1.0, steps=5, rel_stepsize=None
        ),
        fb.attacks.L2CarliniWagnerAttack(steps=20, binary_search_steps=2),
    ],
)
def test_foolbox_attacks_do_in_robust_accuracy_what_they_do_alone(attack):
    net, x = network(), 255 * images(20)
    model, eps = (
        fb.PyTorchModel(net, bounds=(0, 1), device='cpu').transform_bounds((0, 255)),
        15 if attack.distance.p == INF else 150,
    )
    y = answers(model, x)
    alone = attack(model, x, y, epsilons=eps)[2].double().mean().item()
    for given in ([attack], attack):
        assert robust_accuracy(model, x, y, given, eps)['alone'].iloc[
            1
        ] == pytest.approx(1 - alone)
    with pytest.raises(InputError, match='eps is'):
        robust_accuracy(model, x, y, [attack], [eps, eps])


# ------------------------------------------------------------------ what the pages leave to the tests


def mixed_network():
    "One layer in evaluation mode, one parameter frozen, one gradient."
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(32, 5),
    ).train()
    net[2].eval()
    net[1].weight.requires_grad_(False)
    net[5].bias.grad = torch.ones(5)
    return net


def state_of(net):
    modes = [m.training for m in net.modules()]
    parameters = [
        (p.requires_grad, p.grad if p.grad is None else p.grad.tolist(), p.tolist())
        for p in net.parameters()
    ]
    return modes, parameters


@pytest.mark.parametrize('name', NAMES)
def test_the_network_is_left_as_it_was(name):
    net, x, attack = mixed_network(), images(dtype=torch.float32), make(name)
    y, before = torch.arange(6) % 5, state_of(net)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        attack(net, x, y, epsilons=radius(attack))
    assert state_of(net) == before
    assert sum('in training mode' in str(w.message) for w in heard) == 1
    with pytest.raises(RuntimeError):  # also where the attack breaks off
        attack(net, torch.rand(6, 1, 9, 9), y, epsilons=radius(attack))
    assert state_of(net) == before


def test_radii_and_images_are_read():
    assert _radii(None, False) == ([None], False)
    for one in (0.5, torch.tensor(0.5), np.float32(0.5)):
        assert _radii(one, True) == ([0.5], False)
    for several in ([0.5], torch.tensor([0.5]), np.array([0.5])):
        assert _radii(several, True) == ([0.5], True)
    for bad in (-1, float('nan')):
        with pytest.raises(InputError, match='at least 0'):
            _radii(bad, False)
    with pytest.raises(InputError, match='images are ndarray'):
        PGD()(network(), np.zeros((2, 1, 6, 6)), torch.zeros(2).long(), epsilons=0.1)


def test_an_image_that_is_repaired_was_adversarial_before():
    net, x = network(), images(30)
    y = torch.arange(30) % 5  # many are wrong from the start
    repaired = FGSM().craft(net, x, TargetedMisclassification(y), epsilon=0.3)
    kept, success = _settled(net, repaired, x, Misclassification(y))
    assert torch.equal(success, answers(net, x) != y)
    assert kept.sum() < success.sum()


GRADIENT_ATTACKS = [FGSM(), BIM(), PGD(), MIM(), ILCM(), PGD(seed=5, loss='dlr')]


@pytest.mark.parametrize('attack', GRADIENT_ATTACKS, ids=repr)
def test_gradient_attacks_in_any_batch_and_order(attack):
    net, x = network(), images(20)
    y, order = answers(net, x), torch.randperm(20)
    whole = attack.craft(net, x, y, epsilon=0.1)
    shuffled = attack.craft(net, x[order], y[order], epsilon=0.1)
    parts = [
        attack.craft(net, a, b, epsilon=0.1) for a, b in zip(x.split(7), y.split(7))
    ]
    assert (shuffled - whole[order]).abs().max() < 1e-9
    assert (torch.cat(parts) - whole).abs().max() < 1e-9


class Shifted(nn.Module):
    "A constant added to every logit."

    def __init__(self, net, by):
        super().__init__()
        self.net, self.by = net, by
        self.eval()

    def forward(self, x):
        return self.net(x) + self.by


@pytest.mark.parametrize(
    'attack',
    GRADIENT_ATTACKS
    + [PGD(loss=loss) for loss in LOSSES]
    + [JSMA(output=output, gamma=0.3) for output in ('softmax', 'logits')],
    ids=repr,
)
def test_a_constant_added_to_all_logits_changes_nothing(attack):
    net, x = network(), images(20)
    y, eps = answers(net, x), radius(attack)
    plain = attack.craft(net, x, y, epsilon=eps)
    lowered = attack.craft(Shifted(net, -50), x, y, epsilon=eps)
    assert (plain - lowered).abs().max() < 1e-9


def test_seeds_and_the_generator():
    net, x = network(), images()
    y, state = answers(net, x), torch.get_rng_state()
    first, again, other = (
        PGD(seed=s, steps=3).craft(net, x, y, epsilon=0.1) for s in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_large_batches_are_worked_off_in_even_slices():
    sizes = []

    def listen(x, classes):
        sizes.append(len(x))
        return x

    x = torch.arange(600.0)[:, None].expand(600, 784)
    assert torch.equal(_in_slices(listen, x, torch.arange(600)), x)
    assert sizes == [300, 300]


class BrokenFor(nn.Module):
    "NaN where an image is bright."

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x):
        bright = x.sum((1, 2, 3)) > 18
        return self.net(x) * torch.where(bright, float('nan'), 1.0)[:, None]


@pytest.mark.parametrize('name', GRADIENT)
def test_a_broken_network_is_no_robust_one(name):
    net, x = network(), images(20)
    bright = (x.sum((1, 2, 3)) > 18).sum().item()
    assert 0 < bright < 20
    with pytest.raises(InputError, match=f'NaN for {bright} of 20 images: its logits'):
        make(name).craft(BrokenFor(net), x, answers(net, x), epsilon=1e-6)


class Root(nn.Module):
    "Its derivative is infinite where a pixel is 0."

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x):
        return self.net(x.sqrt())


@pytest.mark.parametrize('attack', [FGSM(), MIM(steps=2), JSMA(gamma=0.3)], ids=repr)
def test_an_infinite_gradient_is_told_as_such(attack):
    net, x = network(), images(20)
    x[:4] = 0
    y = answers(Root(net), x)
    with pytest.raises(InputError, match='infinite for 4 of 20 images'):
        attack.run(Root(net), x, y, **{_word(attack): radius(attack, 1e-9)})


def _word(attack):
    fixed = isinstance(attack, fb.attacks.base.FixedEpsilonAttack)
    return 'epsilon' if fixed else 'early_stop'


@pytest.mark.parametrize('by', [1e20, 1e-20, 1e30])
@pytest.mark.parametrize(
    'attack',
    [FGSM(loss='margin'), MIM(loss='margin'), PGD(loss='margin', steps=5)]
    + [JSMA(gamma=0.3, output='logits', pairs=pairs) for pairs in (False, True)],
    ids=repr,
)
def test_huge_and_tiny_gradients_lead_the_same_way(attack, by):
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 5)).eval()
    x = images(20, torch.float32)
    y = answers(net, x)
    plain = attack(net, x, y, epsilons=radius(attack))
    scaled = attack(Loud(net, by), x, y, epsilons=radius(attack))
    assert (plain[2] == scaled[2]).float().mean() > 0.9
    assert (plain[1] == scaled[1]).float().mean() > 0.9


@pytest.mark.parametrize('theta', [0.01, -0.01])
@pytest.mark.parametrize('target', ['random', 'least_likely', 'runner_up'])
def test_a_step_of_jsma_raises_the_target_and_moves_one_way(theta, target):
    net, x = network(), 0.1 + 0.8 * images(20)
    y = answers(net, x)
    aim = choose_targets(net(x), y, target, sample_keys(x))
    _, a, b = output_derivatives(net, x, aim)
    i = saliency_map(a, b, theta).argmax(1, keepdim=True)
    moved = (x.flatten(1).scatter_add(1, i, torch.full_like(a, theta))).view_as(x)

    def log_prob(x):
        return net(x).log_softmax(1).gather(1, aim[:, None])

    assert (log_prob(moved) > log_prob(x)).double().mean() > 0.9
    changes = JSMA(50 * theta, 0.3).craft(net, x, y, epsilon=None) - x
    assert (changes * theta >= 0).all() and changes.any()


@pytest.mark.parametrize('size', [1, 7, 20])
def test_jsma_in_any_batch_and_order(size):
    net, x = network(), images(20)
    y, order = answers(net, x), torch.randperm(20)
    whole = JSMA(gamma=0.3, target='random')(net, x, y, epsilons=None)
    small = JSMA(gamma=0.3, target='random', batch_size=size)
    assert torch.equal(small(net, x, y, epsilons=None)[1], whole[1])
    shuffled = small(net, x[order], y[order], epsilons=None)
    assert torch.equal(shuffled[1], whole[1][order])
    other = JSMA(gamma=0.3, target='random', seed=1)(net, x, y, epsilons=None)
    assert not torch.equal(other[1], whole[1])


@pytest.mark.parametrize('attack', [JSMA(gamma=0.3), PGD(steps=2)], ids=repr)
def test_probabilities_are_attacked_with_a_warning(attack):
    net, x = network(), images()
    model = nn.Sequential(net, nn.Softmax(1)).eval()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        attack(model, x, answers(net, x), epsilons=radius(attack))
    assert any('look like probabilities' in str(w.message) for w in heard)


@pytest.mark.parametrize('name', NAMES)
def test_attacks_say_what_they_set(name):
    attack = make(name)
    if not isinstance(attack, PlainCall):
        pytest.skip('of foolbox')
    for setting in ('loss', 'steps', 'step_rule', 'rel_stepsize', 'random_start'):
        assert hasattr(attack, setting)
    assert attack.distance.p in (0, 2, INF)
    if name in GRADIENT:
        assert attack.loss == 'cross-entropy' and attack.steps >= 1
        assert attack.rel_stepsize > 0 and attack.random_start == (name == 'pgd')
    if name == 'jsma':
        assert attack.loss is None and attack.random_start is None
