#!/usr/bin/env python
"""How near the minimal-norm attacks come at an equal number of passes.

Beside foolbox, torchattacks, ART and adv-lib; peers that are not installed are left
out.

    python benchmarks/attacks_minimal.py [--network ce] [--norm l2]
        [--budgets 200 400 1000 2000] [--only NAME …] [--out FILE.csv]

A pass is one image through the network, forwards or backwards; it is counted by the
network itself. A run that has used up its passes gets zeros from then on. An attack's
result on an image is the nearest image that fooled the network, met or returned.
The measure is the local optimality of AttackBench (Cinà et al. 2024). With ρ(ε) the
share of images whose nearest adversarial image lies beyond ε, A the area below ρ up to
the largest of the best distances, and A* that area for the best distances of all
attacks together: 1 - (A - A*)/(ρ(0)·ε_max - A*); 1 is the best known, 0 an attack that
finds nothing.
64 MNIST images, LeNet-5 trained on the spot with cross-entropy (ce) or reverse
cross-entropy (rce). The file gets the optimality of all that was run for a network and
a norm; those of other networks and norms stay.
"""

import argparse
import importlib
import math
import sys
import time
import types
import warnings
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import foolbox as fb
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from complement_objectives.attacks import DDN, FMN, L2FMN, CarliniWagnerL2, nearest_l2
from complement_objectives.data import load_data
from complement_objectives.losses import reverse_cross_entropy
from complement_objectives.models import ReverseLogits, lenet5


def peer(name):
    "A module, or None where it is not installed. adv-lib's plots ask for visdom."
    sys.modules.setdefault('visdom', types.SimpleNamespace(Visdom=object))
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def trained(name, n=64, n_train=10_000, epochs=3):
    "A network, `n` test images it gets right, and their classes."
    data, loss = (
        load_data('mnist'),
        F.cross_entropy if name == 'ce' else reverse_cross_entropy,
    )
    x, y = data.pixels(data.train_x[:n_train]), data.train_y[:n_train]
    torch.manual_seed(0)
    net = lenet5()
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for b in torch.randperm(len(x)).split(64):
            opt.zero_grad()
            loss(net(x[b]), y[b]).backward()
            opt.step()
    net = (net if name == 'ce' else ReverseLogits(net)).eval().requires_grad_(False)
    x, y = data.pixels(data.test_x[: 4 * n]), data.test_y[: 4 * n]
    with torch.no_grad():
        right = net(x).argmax(1) == y
    return net, x[right][:n].clone(), y[right][:n].clone()


class Metered(nn.Module):
    """A network that counts its passes an image and keeps the nearest that fooled it.

    It answers 0 when the passes are used up.
    """

    def __init__(self, net, x, y, p, budget):
        super().__init__()
        self.net, self.x, self.y, self.p, self.budget = net, x, y, p, budget
        self.passes, self.best = 0.0, torch.full((len(x),), math.inf)

    def forward(self, z):
        if self.passes >= self.budget:
            return 0 * z.flatten(1)[:, :10]
        out, share = self.net(z), len(z) / len(self.x)
        self.passes += share
        if out.requires_grad:
            out.register_hook(lambda g: setattr(self, 'passes', self.passes + share))
        if len(z) == len(self.x):
            self.note(z.detach(), out.detach())
        return out

    def note(self, z, logits):
        good = (
            (logits.argmax(1) != self.y)
            & (z.flatten(1).amin(1) >= 0)
            & (z.flatten(1).amax(1) <= 1)
        )
        self.best = torch.where(
            good,
            torch.minimum(self.best, (z - self.x).flatten(1).norm(self.p, dim=1)),
            self.best,
        )


def measured(net, x, y, p, attack, budget):
    "Distances (N,), inf where nothing was found; passes an image; seconds."
    meter, start = Metered(net, x, y, p, budget).eval(), time.time()
    found = attack(meter, x.clone(), y).detach()
    seconds = time.time() - start
    with torch.no_grad():
        meter.note(found, net(found))
    return meter.best, meter.passes, seconds


def optimality(distances, best):
    "AttackBench's local optimality: see above."
    top = best.max()
    area, least = distances.clamp(max=top).mean(), best.mean()
    most = (best > 0).double().mean() * top
    return (1 - (area - least) / (most - least)).item()


def of_foolbox(attack):
    return lambda m, x, y: attack.run(
        fb.PyTorchModel(m, bounds=(0, 1), device='cpu'), x, y
    )


def ours(attack):
    return lambda m, x, y: attack(m, x, y, epsilons=None)[0]


def art_classifier(m, x):
    """ART's classifier, but backwards once where each image has its class.

    Its own goes once for each class in the batch.
    """
    from art.estimators.classification import PyTorchClassifier

    class Once(PyTorchClassifier):
        def class_gradient(self, x, label=None, **kwargs):
            if not hasattr(label, '__len__'):
                return super().class_gradient(x, label, **kwargs)
            z = torch.from_numpy(x).requires_grad_()
            chosen = m(z).gather(1, torch.as_tensor(label)[:, None])
            return torch.autograd.grad(chosen.sum(), z)[0].numpy()[:, None]

    return Once(
        m,
        nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        10,
        clip_values=(0, 1),
        device_type='cpu',
    )


def of_art(cls, **kwargs):
    def run(m, x, y):
        attack = getattr(importlib.import_module('art.attacks.evasion'), cls)(
            art_classifier(m, x), batch_size=len(x), verbose=False, **kwargs
        )
        return torch.from_numpy(attack.generate(x.numpy(), F.one_hot(y, 10).numpy()))

    return run


def of_torchattacks(cls, **kwargs):
    return lambda m, x, y: getattr(peer('torchattacks'), cls)(m, **kwargs)(x, y)


def l2_ours(s):  # attacks for `s` gradients
    return {
        'nearest of DDN and L2FMN': ours(nearest_l2(s - 1)),
        'DDN': ours(DDN(steps=s - 1)),
        'L2FMN': ours(L2FMN(steps=s - 1)),
        'C&W, 9 searches': ours(CarliniWagnerL2(binary_search_steps=9, steps=s // 9)),
        'C&W, 4 searches': ours(CarliniWagnerL2(binary_search_steps=4, steps=s // 4)),
    }


def l2_foolbox(s):
    "EAD looks once more at each step; DeepFool takes two passes a class, of nine."
    L = fb.attacks
    return {
        'foolbox DDN': of_foolbox(L.DDNAttack(steps=s)),
        'foolbox L2FMN': of_foolbox(L.L2FMNAttack(steps=s)),
        'foolbox C&W, 4 searches': of_foolbox(
            L.L2CarliniWagnerAttack(binary_search_steps=4, steps=s // 4)
        ),
        'foolbox EAD, 4 searches': of_foolbox(
            L.EADAttack(binary_search_steps=4, steps=s // 6, decision_rule='EN')
        ),
        'foolbox DeepFool': of_foolbox(L.L2DeepFoolAttack(steps=max(1, s // 9))),
    }


def l2_adv_lib(s):
    A = peer('adv_lib.attacks')
    if not A:
        return {}
    return {
        'adv-lib DDN': partial(A.ddn, steps=s, levels=None),
        'adv-lib FMN': partial(A.fmn, norm=2, steps=s),
        'adv-lib PDGD': partial(A.pdgd, num_steps=s),
        'adv-lib ALMA': partial(A.alma, num_steps=s, α=0.9, init_lr_distance=1),
        'adv-lib FAB': partial(A.fab, norm=2.0, n_iter=s // 5),
        'adv-lib C&W, 4 searches': partial(
            A.carlini_wagner_l2, binary_search_steps=4, max_iterations=s // 4
        ),
    }


def l2_torchattacks(s):
    if not peer('torchattacks'):
        return {}
    return {
        'torchattacks C&W': of_torchattacks('CW', steps=s),
        'torchattacks DeepFool': of_torchattacks('DeepFool', steps=s),
        'torchattacks EAD, 4 searches': of_torchattacks(
            'EADEN', binary_search_steps=4, max_iterations=s // 6
        ),
    }


def l2_art(s):
    """C&W takes about eight passes a step, with its line search, and EAD six.

    Both start at c = 1, as from 0.01 they find next to nothing.
    """
    if not peer('art'):
        return {}
    few = dict(binary_search_steps=4, initial_const=1.0)
    return {
        'ART C&W, 4 searches': of_art('CarliniL2Method', max_iter=s // 16, **few),
        'ART EAD, 4 searches': of_art(
            'ElasticNet', max_iter=s // 12, decision_rule='L2', **few
        ),
        'ART DeepFool': of_art('DeepFool', max_iter=s // 5),
        'ART NewtonFool': of_art('NewtonFool', max_iter=2 * s // 3),
    }


def l2(s):
    return l2_ours(s) | l2_foolbox(s) | l2_adv_lib(s) | l2_torchattacks(s) | l2_art(s)


def linf(s):  # attacks for `s` gradients
    A, L = peer('adv_lib.attacks'), fb.attacks
    out = {
        'FMN': ours(FMN(steps=s - 1)),
        'FMN, step 1': ours(FMN(steps=s - 1, max_stepsize=1.0)),
    }
    out |= {
        f'foolbox FMN, step {a}': of_foolbox(L.LInfFMNAttack(steps=s, max_stepsize=a))
        for a in (1, 10)
    }
    if A:
        out |= {
            f'adv-lib FMN, step {a}': partial(A.fmn, norm=math.inf, steps=s, α_init=a)
            for a in (1, 10)
        }
    if A:
        out['adv-lib PDPGD'] = partial(A.pdpgd, norm=math.inf, num_steps=s)
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--network', choices=('ce', 'rce'), default='ce')
    parser.add_argument('--norm', choices=('l2', 'linf'), default='l2')
    parser.add_argument(
        '--budgets', type=int, nargs='+', default=[200, 400, 1000, 2000]
    )
    parser.add_argument(
        '--only',
        nargs='+',
        help='attacks to run; others are taken from the file of distances',
    )
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument(
        '--distances', help='file that keeps the distances, for runs in parts'
    )
    parser.add_argument('--out', help='CSV file that gets the table')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings('ignore')
    print(f'CPU, {args.threads} threads, torch {torch.__version__}')
    (net, x, y), p = trained(args.network), 2 if args.norm == 'l2' else math.inf
    kept = Path(args.distances) if args.distances else None
    found = torch.load(kept) if kept and kept.exists() else {}
    for budget in args.budgets:
        for name, attack in (l2 if args.norm == 'l2' else linf)(budget // 2).items():
            if args.only and name not in args.only:
                continue
            distances, passes, seconds = measured(net, x, y, p, attack, budget)
            found[name, budget] = distances, passes, seconds
            spent = f'{passes:>7.1f} passes {seconds:>6.1f} s'
            median = f'median {distances.median().item():.4f}'
            print(f'{budget:>6} {name:<28} {spent}  {median}', flush=True)
            if kept:
                torch.save(found, kept)
    best = torch.stack([d for d, *_ in found.values()]).amin(0)
    rows = [
        dict(
            network=args.network,
            norm=args.norm,
            passes=b,
            attack=n,
            optimality=round(optimality(d, best), 4),
            spent=round(used, 1),
            threads=args.threads,
        )
        for (n, b), (d, used, _) in found.items()
    ]
    table = pd.DataFrame(rows)
    print(
        table.pivot(index='attack', columns='passes', values='optimality')
        .round(3)
        .to_string()
    )
    if args.out:
        save(Path(args.out), table)


def save(path, table):
    "The table in place of older rows for the same network and norm."
    if path.exists():
        old = pd.read_csv(path)
        table = pd.concat(
            [
                old[
                    (old['network'] != table['network'][0])
                    | (old['norm'] != table['norm'][0])
                ],
                table,
            ]
        )
    table.sort_values(['norm', 'network', 'passes'], kind='stable').to_csv(
        path, index=False
    )


if __name__ == '__main__':
    main()
