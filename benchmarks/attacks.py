#!/usr/bin/env python
"""Time, success and distance of the attacks beside other libraries'.

    python benchmarks/attacks.py [--family gradient] [--network lenet5]
        [--images 256] [--threads 2] [--rounds 1.0] [--out FILE.csv]

The others are foolbox, torchattacks and ART. Same network, same images, same radius
and steps. Each round runs every library once, in turn, so that a busy machine slows
all of them alike. The ratio is a library's time over ours, of the medians and (after
the slash) of the fastest runs: above 1 we are faster.

"with success" is the call that also tests the result; torchattacks and ART only return
images, so they are compared with ours that does the same. Peers that are not installed
are printed as absent. The network is trained on the spot: on MNIST or CIFAR-10 from the
data folder, or on scikit-learn's digits, enlarged, where there is none.
"""

import argparse
import importlib
import sys
import time
import warnings
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
import foolbox as fb
import pandas as pd
import torch
import torch.nn.functional as F

from complement_objectives import attacks
from complement_objectives.core import InputError
from complement_objectives.data import load_data
from complement_objectives.models import cifar_resnet, lenet5

NETWORKS = dict(
    lenet5=('mnist', lenet5, 6000, 2, 0.2),
    resnet8=('cifar10', lambda: cifar_resnet(8), 10_000, 6, 8 / 255),
)

ROWS = []  # what `compare` found


def peer(name):
    "A module, or None where it is not installed."
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def images(name):
    "Training and test images of a data set, or enlarged digits in their place."
    try:
        data = load_data(name)
    except (InputError, OSError):
        print(f'{name} is not here: enlarged digits instead')
        data = load_data('digits')
    size, channels = (32, 3) if name == 'cifar10' else (28, 1)

    def pixels(x):
        x = data.pixels(x)
        if x.shape[-1] > 8:
            return x
        return F.interpolate(x, (size, size)).expand(-1, channels, -1, -1)

    return pixels, data


def trained(network, n):
    "A network, `n` test images it gets right, their classes, and the radius."
    name, make, n_train, epochs, eps = NETWORKS[network]
    pixels, data = images(name)
    x, y = pixels(data.train_x[:n_train]), data.train_y[:n_train]
    torch.manual_seed(0)
    net = make()
    opt = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(epochs):
        for b in torch.randperm(len(x)).split(64):
            opt.zero_grad()
            F.cross_entropy(net(x[b]), y[b]).backward()
            opt.step()
    net.eval()
    x, y = pixels(data.test_x[: 4 * n]).contiguous(), data.test_y[: 4 * n]
    with torch.no_grad():
        right = net(x).argmax(1) == y
    share, attacked = 100 * right.float().mean(), min(n, int(right.sum()))
    print(
        f'{network}: {share:.1f} % of {len(x)} test images right, '
        f'{attacked} of those attacked'
    )
    return net, x[right][:n].clone(), y[right][:n].clone(), eps


def times(fs, rounds, limit=100):
    "Seconds of every function, in turn, for `limit` seconds at most."
    out, end = {k: [] for k in fs}, time.time() + limit
    for _ in range(rounds):
        for k, f in fs.items():
            start = time.perf_counter()
            f()
            out[k].append(time.perf_counter() - start)
        if time.time() > end:
            break
    return out


def compare(
    name, fs, net, x, y, p, rounds, ours='ours', hit=lambda found, y: found != y
):
    "One attack, a line a library: `fs` maps it to what returns images, or to None."
    here = {k: f for k, f in fs.items() if f}
    made = {k: f().detach() for k, f in here.items()}
    ts = times(here, rounds)
    for k in fs:
        if k not in here:
            print(f'{name:>12}  {k:<22} absent')
            continue
        with torch.no_grad():
            fooled = hit(net(made[k]).argmax(1), y)
        size = (made[k] - x).flatten(1).norm(p, dim=1)[fooled]
        middle, share = median(ts[k]), fooled.double().mean().item()
        distance = size.median().item() if len(size) else None
        by_median, by_min = middle / median(ts[ours]), min(ts[k]) / min(ts[ours])
        ROWS.append(
            {
                'attack': name,
                'library': k,
                'images': len(x),
                'time / ours': round(by_median, 2),
                'ms': round(1e3 * middle, 1),
                'success': round(share, 4),
                'median distance': None if distance is None else round(distance, 4),
            }
        )
        ratio = f'{by_median:.2f} / {by_min:.2f}'
        far = float('nan') if distance is None else distance
        print(
            f'{name:>12}  {k:<22} {ratio:>13} {1e3 * middle:>9.1f} ms '
            f'{100 * share:>8.1f} % {far:>9.4f}',
            flush=True,
        )


def art_classifier(net, x):
    "A network as ART wants it."
    from art.estimators.classification import PyTorchClassifier

    shape, loss = tuple(x.shape[1:]), torch.nn.CrossEntropyLoss()
    return PyTorchClassifier(
        net, loss, shape, 10, clip_values=(0, 1), device_type='cpu'
    )


def gradient(net, x, y, eps, rounds):
    """FGSM, BIM-10, PGD-40 and MIM-40.

    Bounds: no slower than the fastest peer; FGSM, BIM, PGD at least 1.2 times foolbox."""
    ta, art = peer('torchattacks'), peer('art')
    L, fmodel = fb.attacks, fb.PyTorchModel(net, bounds=(0, 1), device='cpu')
    if art:
        from art.attacks import evasion as E

        classifier, one_hot = art_classifier(net, x), F.one_hot(y, 10).numpy()

    def of_art(cls, **kw):
        def run():
            attack = cls(classifier, eps=eps, batch_size=len(x), **kw)
            return torch.from_numpy(attack.generate(x.numpy(), one_hot))

        return run

    def of_ta(cls, **kw):
        return (lambda: getattr(ta, cls)(net, eps=eps, **kw)(x, y)) if ta else None

    rows = {
        'FGSM': (
            attacks.FGSM(),
            L.LinfFastGradientAttack(),
            of_ta('FGSM'),
            art and of_art(E.FastGradientMethod),
            20,
        ),
        'BIM-10': (
            attacks.BIM(),
            L.LinfBasicIterativeAttack(steps=10, rel_stepsize=0.1),
            of_ta('BIM', alpha=eps / 10, steps=10),
            art
            and of_art(
                E.BasicIterativeMethod, eps_step=eps / 10, max_iter=10, verbose=False
            ),
            8,
        ),
        'PGD-40': (
            attacks.PGD(step_rule='gce-script'),
            L.LinfPGD(steps=40, rel_stepsize=1 / 30),
            of_ta('PGD', alpha=eps / 30, steps=40),
            art
            and of_art(
                E.ProjectedGradientDescentPyTorch,
                eps_step=eps / 30,
                max_iter=40,
                num_random_init=1,
                verbose=False,
            ),
            3,
        ),
        'MIM-40': (
            attacks.MIM(),
            L.LinfMomentumIterativeFastGradientMethod(steps=40, rel_stepsize=1 / 40),
            of_ta('MIFGSM', alpha=eps / 40, steps=40),
            art
            and of_art(
                E.MomentumIterativeMethod, eps_step=eps / 40, max_iter=40, verbose=False
            ),
            3,
        ),
    }
    for name, (mine, theirs, torchattacks, of_art_, n) in rows.items():
        fs = {
            'ours': lambda: mine.craft(net, x, y, epsilon=eps),
            'foolbox': lambda: theirs.run(fmodel, x, y, epsilon=eps),
            'torchattacks': torchattacks,
            'ART': of_art_ or None,
        }
        compare(name, fs, net, x, y, float('inf'), max(2, round(n * rounds)))
        fs = {
            'ours': lambda: mine(net, x, y, epsilons=eps)[1],
            'foolbox': lambda: theirs(fmodel, x, y, epsilons=eps)[1],
        }
        compare(
            name,
            {f'{k}, with success': f for k, f in fs.items()},
            net,
            x,
            y,
            float('inf'),
            max(2, round(n * rounds)),
            ours='ours, with success',
        )


def saliency(net, x, y, eps, rounds):
    """JSMA, targeted, theta 1, gamma 0.1; the distance is the number of changed features.

    Bound: at least 20 times the fastest peer."""
    x, y = x[:48], y[:48]
    target = (y + 1 + torch.arange(len(y)) % 9) % 10
    ta, art = peer('torchattacks'), peer('art')
    towards = fb.criteria.TargetedMisclassification(target)

    def mine(**kw):
        jsma = attacks.JSMA(theta=1.0, gamma=0.1, **kw)
        return lambda: jsma(net, x, towards, epsilons=None)[1]

    fs = {
        'ours': mine(),
        'ours, pairs': mine(pairs=True),
        'ours, 8 a step': mine(per_step=8),
        'torchattacks': None,
        'ART': None,
        'ART, default batch': None,
    }
    if ta:

        def of_ta():
            attack = ta.JSMA(net, theta=1.0, gamma=0.1)
            attack.set_mode_targeted_by_label(quiet=True)
            return attack(x, target)

        fs['torchattacks'] = of_ta
    if art:
        from art.attacks.evasion import SaliencyMapMethod

        settings = dict(theta=1.0, gamma=0.1, verbose=False)
        classifier = art_classifier(net, x)

        def of_art(n):
            attack = SaliencyMapMethod(classifier, batch_size=n, **settings)
            return lambda: torch.from_numpy(attack.generate(x.numpy(), target.numpy()))

        fs |= {'ART': of_art(len(x)), 'ART, default batch': of_art(1)}
    compare(
        'JSMA',
        fs,
        net,
        x,
        y,
        0,
        max(1, round(rounds)),
        hit=lambda found, y: found == target,
    )


def optimization(net, x, y, eps, rounds):
    """C&W, 9 searches of 1000 steps, untargeted.

    Bound: at least 3 times foolbox at a median L2 within 1 %, success no lower."""
    n = 32 if x.shape[1] == 1 else 12
    x, y, fmodel = x[:n], y[:n], fb.PyTorchModel(net, bounds=(0, 1), device='cpu')
    theirs = fb.attacks.L2CarliniWagnerAttack(
        binary_search_steps=9, steps=1000, initial_const=1e-3, stepsize=1e-2
    )
    fs = {
        'ours': lambda: attacks.CarliniWagnerL2(binary_search_steps=9, steps=1000)(
            net, x, y, epsilons=None
        )[1],
        'foolbox': lambda: theirs(
            fmodel, x, fb.criteria.Misclassification(y), epsilons=None
        )[1],
    }
    compare('C&W 9 × 1000', fs, net, x, y, 2, max(1, round(rounds)))


def audit(net, x, y, eps, rounds):
    """APGD and Square beside torchattacks'.

    Bound: no slower, at equal or lower robust accuracy."""
    ta = peer('torchattacks')
    steps, queries, n = (50, 300, 128) if x.shape[1] == 1 else (20, 200, 48)
    x, y = x[:n], y[:n]
    pairs = {
        'APGD-CE': (attacks.APGD(steps=steps), 'APGD', dict(steps=steps, loss='ce')),
        'APGD-DLR': (
            attacks.APGD(steps=steps, loss='dlr'),
            'APGD',
            dict(steps=steps, loss='dlr'),
        ),
        'APGD-T': (
            attacks.APGDTargeted(steps=steps // 2, n_targets=3),
            'APGDT',
            dict(steps=steps // 2, n_classes=4),
        ),
        'Square': (
            attacks.Square(n_queries=queries),
            'Square',
            dict(n_queries=queries),
        ),
    }
    for name, (mine, cls, kw) in pairs.items():
        fs = {
            'ours': lambda: mine(net, x, y, epsilons=eps)[1],
            'torchattacks': (lambda: getattr(ta, cls)(net, eps=eps, **kw)(x, y))
            if ta
            else None,
        }
        compare(name, fs, net, x, y, float('inf'), max(2, round(3 * rounds)))


def save(path, network, threads):
    "The rows as a table; rows of other networks and attacks that are in the file stay."
    new = pd.DataFrame(ROWS)
    new.insert(0, 'network', network)
    new['threads'] = threads
    if path.exists():
        old = pd.read_csv(path)
        again = (old['network'] == network) & old['attack'].isin(new['attack'])
        new = pd.concat([old[~again], new]).sort_values('network', kind='stable')
    new.to_csv(path, index=False)


FAMILIES = dict(
    gradient=gradient, saliency=saliency, optimization=optimization, audit=audit
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--family', choices=[*FAMILIES, 'all'], default='all')
    parser.add_argument('--network', choices=NETWORKS, default='lenet5')
    parser.add_argument('--images', type=int, default=256)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=float, default=1.0)
    parser.add_argument(
        '--out',
        help='CSV file that gets the rows, in place of older ones of the same kind',
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings('ignore')
    net, x, y, eps = trained(args.network, args.images)
    print(f'CPU, {args.threads} threads, torch {torch.__version__}, eps {eps:.4f}')
    print(
        f'{"attack":>12}  {"library":<22} {"time / ours":>13} {"time":>12} '
        f'{"success":>10} {"distance":>9}'
    )
    for name in FAMILIES if args.family == 'all' else [args.family]:
        FAMILIES[name](net, x, y, eps, args.rounds)
    if args.out:
        save(Path(args.out), args.network, args.threads)


if __name__ == '__main__':
    main()
