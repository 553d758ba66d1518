#!/usr/bin/env python
"""Kernel density: `KernelDensity` against scikit-learn and `torch.cdist`.

    python benchmarks/detection.py [--threads 2] [--repeats 3] [--skip-sklearn]

10,000 queries against 10 classes of 6,000 points, Gaussian clusters in 64 dimensions;
the bandwidth is the one that `KernelDensity.fit` selects. Each query is compared with
all 10 classes (`log_densities`), and then, as the detector does, with the 6,000
points of its predicted class only. Printed are seconds (median of the repeats, each
kind in a process of its own; scikit-learn's tree, single-threaded by nature, on a
tenth of the queries, times ten), the largest relative error of the log-densities
against float64, the resident memory that a call adds at its peak beside the bound
that was asked for (queries and results come on top of the bound), and the seconds
against the numbers of queries and of points.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pandas as pd
import sklearn.neighbors
import torch
from sklearn.base import clone

from complement_objectives.detection import KernelDensity

CLASSES, DIMENSIONS = 10, 64
# glibc: return freed memory at once, so that peaks can be seen
GIVE_BACK = dict(MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536')


def problem(queries, points):
    """Training vectors with labels, and queries with predicted classes.

    Queries are a little off their cluster."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    middles = normal(CLASSES, DIMENSIONS) * 2
    labels = torch.arange(CLASSES).repeat_interleave(points)
    classes = torch.randint(CLASSES, (queries,), generator=generator)
    x = middles[labels] + normal(len(labels), DIMENSIONS)
    z = middles[classes] + 1.3 * normal(queries, DIMENSIONS)
    return x, labels, z, classes


def by_class(f, z, classes, dtype):
    "`f(queries of the class, class)` for every class, back in order."
    out = torch.empty(len(z), dtype=dtype)
    for c in range(CLASSES):
        mine = classes == c
        out[mine] = f(z[mine], c)
    return out


def cdist_density(z, points, sigma2):
    "The formula as one would write it."
    exponents = -(torch.cdist(z, points) ** 2) / sigma2
    return torch.logsumexp(exponents, 1) - math.log(len(points))


def tree_density(z, tree, sigma2):
    normalizer = DIMENSIONS / 2 * math.log(math.pi * sigma2)
    return torch.from_numpy(tree.score_samples(z.numpy()) + normalizer)


def in_float64(x, labels, z, classes, sigma2):
    def one(q, c):  # differences first: nothing cancels
        points = x[labels == c].double()
        parts = q.double().split(50)
        d2 = torch.cat([(part[:, None] - points).square().sum(2) for part in parts])
        return torch.logsumexp(-d2 / sigma2, 1) - math.log(len(points))

    return by_class(one, z, classes, torch.float64)


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def peak_bytes(f):
    "Resident memory at its peak during `f()`, beyond what there was before (Linux)."

    def status(key):
        for line in Path('/proc/self/status').read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024

    Path('/proc/self/clear_refs').write_text('5')
    before = status('VmRSS')
    f()
    return status('VmHWM') - before


def timed(kind, args):
    """Seconds of `kind`, in this process.

    'KernelDensity', 'torch.cdist' or 'scikit-learn', a slash, 'predicted' or 'all'."""
    kind, which = kind.split('/')
    x, labels, z, classes = problem(args.queries, args.points)
    density = KernelDensity(max_points=None).fit(x, labels)
    sigma2, sets = density.sigma2_.item(), [x[labels == c] for c in range(CLASSES)]
    if kind == 'scikit-learn':
        z, classes = z[: len(z) // args.fewer], classes[: len(z) // args.fewer]
        tree = sklearn.neighbors.KernelDensity(bandwidth=(sigma2 / 2) ** 0.5)
        sets = [clone(tree).fit(points.numpy()) for points in sets]
        one, dtype = tree_density, torch.float64
    else:
        one, dtype = cdist_density, torch.float32

    def others():
        if which == 'all':
            return torch.stack([one(z, points, sigma2) for points in sets], 1)
        return by_class(lambda q, c: one(q, sets[c], sigma2), z, classes, dtype)

    def ours():
        if which == 'all':
            return density.log_densities(z)
        return density.log_density(z, classes)

    f = ours if kind == 'KernelDensity' else others
    if kind == 'scikit-learn':
        return dict(seconds=seconds(f) * args.fewer)
    times = [seconds(f) for _ in range(args.repeats + 1)][1:]
    values, n = f(), args.checked
    if which == 'all':
        values = values.gather(1, classes[:, None])[:, 0]
    truth = in_float64(x, labels, z[:n], classes[:n], sigma2)
    error = (values[:n] / truth - 1).abs().max().item()
    return dict(seconds=median(times), error=error)


def measured(kind, args):
    """Bytes that one call takes under a bound of `kind` bytes, in this process.

    Forward, and with its gradient."""
    x, labels, z, classes = problem(args.queries, args.points)
    density = KernelDensity(1.0, max_points=None, max_memory=int(kind)).fit(x, labels)

    def run(n, grad):
        query = z[:n].clone().requires_grad_(grad)
        out = density.log_density(query, classes[:n])
        if grad:
            torch.autograd.grad(out.sum(), query)

    run(100, True)  # threads and libraries take memory of their own, once
    return dict(
        forward=peak_bytes(lambda: run(args.queries, False)),
        both=peak_bytes(lambda: run(args.queries, True)),
    )


def in_process(kind, args, env=None):
    "One measurement in a process of its own."
    command = [sys.executable, '-W', 'ignore', __file__, '--measure', kind]
    for name in ('queries', 'points', 'checked', 'threads', 'repeats', 'fewer'):
        command += [f'--{name}', str(getattr(args, name))]
    env = os.environ | (env or {})
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def speed(args):
    for which in ('all', 'predicted'):
        kinds = ['KernelDensity', 'torch.cdist']
        if not args.skip_sklearn:
            kinds.append('scikit-learn')
        results = {kind: in_process(f'{kind}/{which}', args) for kind in kinds}
        ours = results['KernelDensity']['seconds']
        for kind, result in results.items():
            yield {
                'classes': which,
                'what': kind,
                'seconds': round(result['seconds'], 3),
                'times ours': round(result['seconds'] / ours, 1),
                'relative error': f'{result["error"]:.1e}' if 'error' in result else '',
            }


def memory(args):
    mib, n = 2**20, args.queries
    for bound in (1, 8, 64):
        result = in_process(str(bound * mib), args, GIVE_BACK)
        yield {
            'bound (MiB)': bound,
            'peak, forward (MiB)': round(result['forward'] / mib, 1),
            'peak, with gradient (MiB)': round(result['both'] / mib, 1),
            'queries (MiB)': round(n * DIMENSIONS * 4 / mib, 1),
            'all distances (MiB)': round(n * args.points * 4 / mib),
        }


def best(f, repeats):
    f()
    return min(seconds(f) for _ in range(repeats))


def growth(args):
    for queries, points in (
        (2500, 6000),
        (5000, 6000),
        (10_000, 6000),
        (20_000, 6000),
        (10_000, 1500),
        (10_000, 3000),
        (10_000, 12_000),
    ):
        x, labels, z, classes = problem(queries, points)
        density = KernelDensity(20.0, max_points=None).fit(x, labels)
        t = best(lambda: density.log_density(z, classes), args.repeats)
        yield {
            'queries': queries,
            'points a class': points,
            'seconds': round(t, 3),
            'ns a pair': round(1e9 * t / (queries * points), 2),
        }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--queries', type=int, default=10_000)
    parser.add_argument('--points', type=int, default=6_000, help='a class')
    parser.add_argument(
        '--checked', type=int, default=1_000, help='queries compared with float64'
    )
    parser.add_argument(
        '--fewer', type=int, default=10, help='scikit-learn gets one query in so many'
    )
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--only', choices=['speed', 'memory', 'growth'])
    parser.add_argument('--skip-sklearn', action='store_true')
    parser.add_argument('--measure', help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        measure = measured if args.measure.isdigit() else timed
        print(json.dumps(measure(args.measure, args)))
        return
    for part in (speed, memory, growth):
        if args.only in (None, part.__name__):
            table = pd.DataFrame(list(part(args)))
            print(table.to_string(index=False), end='\n\n', flush=True)


if __name__ == '__main__':
    main()
