#!/usr/bin/env python
"""Time and memory of the losses, as ratios to `F.cross_entropy`.

    python benchmarks/losses.py [--threads 2] [--rounds 1.0] [--clock wall]
        [--skip-published] [--csv benchmarks/losses.csv]

Forward and backward are measured together. Each round runs every loss once, in random
order, so that a busy machine, and memory that the one before gave back, slow all of
them alike. A ratio is given twice: of the medians, and (after the slash) of the fastest
runs, which a busy machine disturbs least. Where other work keeps the cores busy, two
threads wait for each other for whole time slices and the medians say nothing; then
`--threads 1 --clock cpu` counts processor time instead. The ratios and their bounds
are also written as CSV, which the page on closed forms shows: `losses.csv` is of one
thread and processor time, `losses_wall.csv` of two threads and wall time.
Memory is the highest sum of live allocations during forward and backward, beyond the
logits, from torch's profiler. The last part needs a GPU and says so if there is none.
"""

import argparse
import csv
import os
import random
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
import torch.nn.functional as F
from torch.profiler import profile, ProfilerActivity
from complement_objectives import losses as L

SHAPES = (
    ((128, 10), 3.0, 800),
    ((4096, 100), 1.5, 120),
    ((512, 10000), 1.5, 30),
    ((64, 50257), 1.5, 40),
)
LOSSES = {
    'cross-entropy': F.cross_entropy,
    'COT': L.complement_entropy_loss,
    'GCE': L.guided_complement_entropy,
    'RCE': L.reverse_cross_entropy,
    'smoothed 0.1': lambda z, t: L.smoothed_cross_entropy(z, t, 0.1),
}


def published(z, t):
    "COT as published: softmax, two epsilons, a mask built on the CPU."
    n, k = z.shape
    p = z.softmax(1)
    pg = p.gather(1, t[:, None]) + 1e-7
    q = p / ((1 - pg) + 1e-7)
    mask = torch.ones(n, k).scatter_(1, t.view(n, 1).cpu(), 0.0).to(z.device)
    return (q * (q + 1e-10).log() * mask).sum() / n / k


def step(f, z, t):
    z.grad = None
    f(z, t).backward()


def times(fs, z, t, rounds, sync=lambda: None, clock=time.perf_counter, limit=60):
    "Seconds of each step, every function once a round, for `limit` seconds at most."
    for f in fs.values():
        for _ in range(3):
            step(f, z, t)
    out = {n: [] for n in fs}
    end = time.time() + limit
    for _ in range(rounds):
        for n, f in random.sample(list(fs.items()), len(fs)):
            sync()
            s = clock()
            step(f, z, t)
            sync()
            out[n].append(clock() - s)
        if time.time() > end:
            break
    return {n: sorted(v) for n, v in out.items()}


@contextmanager
def quiet():
    "Silence what the profiler's library writes to stderr."
    sys.stderr.flush()
    old, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(old, 2)
        os.close(old)
        os.close(null)


def peak(f, z, t):
    "Bytes alive at the worst moment of a step, beyond what was alive before."
    step(f, z, t)
    z.grad = None
    with (
        quiet(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof,
    ):
        step(f, z, t)
    live = top = 0
    for e in sorted(
        (e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]'),
        key=lambda e: e.start_ns(),
    ):
        live += e.nbytes()
        top = max(top, live)
    return top


def measured(args):
    "A row for each shape and loss: ratios of medians and of the fastest runs."
    fs = dict(LOSSES)
    if not args.skip_published:
        fs['COT, published'] = published
    clock = dict(wall=time.perf_counter, cpu=time.process_time)[args.clock]
    for shape, bound, rounds in SHAPES:
        z, t = torch.randn(shape).requires_grad_(), torch.randint(shape[1], shape[:1])
        ts = times(fs, z, t, max(5, int(rounds * args.rounds)), clock=clock)
        base = ts.pop('cross-entropy')
        print(f'{shape!s:>12} {bound:>6} {median(base) * 1e3:>7.2f}ms  ', end='')
        for name, v in ts.items():
            ratio, fastest = median(v) / median(base), v[0] / base[0]
            print(f'{f"{ratio:.2f} / {fastest:.2f}":>14}', end='  ', flush=True)
            yield dict(
                rows=shape[0],
                classes=shape[1],
                loss=name,
                ratio=round(ratio, 3),
                fastest=round(fastest, 3),
                bound='' if name == 'COT, published' else bound,
                cross_entropy_ms=round(median(base) * 1e3, 4),
                threads=args.threads,
                clock=args.clock,
            )
        print()


def head(args):
    names = [n for n in LOSSES if n != 'cross-entropy']
    if not args.skip_published:
        names.append('COT, published')
    return '  '.join(f'{n:>14}' for n in names)


def cpu(args):
    "Time, printed and written."
    print(
        f'CPU, {torch.get_num_threads()} threads, float32, torch {torch.__version__}: '
        f'{args.clock} time of forward + backward over that of cross-entropy'
    )
    print(f'{"shape":>12} {"bound":>6} {"CE":>9}  ' + head(args))
    rows = list(measured(args))
    over = [r for r in rows if r['bound'] and r['ratio'] > r['bound']]
    for r in over:
        print(f'over its bound: {r["loss"]} at ({r["rows"]}, {r["classes"]})')
    if args.csv:
        with open(args.csv, 'w', newline='') as f:
            writer = csv.DictWriter(f, rows[0], lineterminator='\n')
            writer.writeheader()
            writer.writerows(rows)


def memory(args):
    "Peak of live allocations, printed."
    fs = dict(LOSSES)
    if not args.skip_published:
        fs['COT, published'] = published
    print('\nPeak extra memory over that of cross-entropy (bound 1.1)')
    for shape, *_ in SHAPES:
        z, t = torch.randn(shape).requires_grad_(), torch.randint(shape[1], shape[:1])
        peaks = {n: peak(f, z, t) for n, f in fs.items()}
        base = peaks.pop('cross-entropy')
        print(
            f'{shape!s:>12} {"":>6} {base / 2**20:>7.2f}MB  '
            + '  '.join(f'{v / base:>14.2f}' for v in peaks.values()),
            flush=True,
        )


def gpu(shape=(8192, 50257)):
    "Milliseconds and memory of eager and compiled losses on a GPU, printed."
    if not torch.cuda.is_available():
        print(
            '\nGPU: none here, part skipped (its bound: 1.2 times the faster of eager '
            f'and compiled cross-entropy at {shape} in bfloat16)'
        )
        return
    print(
        f'\n{torch.cuda.get_device_name()}, {shape}, bfloat16: milliseconds, and '
        'ratio to the faster cross-entropy (bound 1.2)'
    )
    z = torch.randn(shape, device='cuda', dtype=torch.bfloat16).requires_grad_()
    t = torch.randint(shape[1], shape[:1], device='cuda')
    fs = {}
    for name, f in LOSSES.items():
        fs[f'{name}, eager'] = f
        fs[f'{name}, compiled'] = torch.compile(f)
    ts = times(fs, z, t, 20, torch.cuda.synchronize)
    medians = {name: median(v) for name, v in ts.items()}
    base = min(v for name, v in medians.items() if name.startswith('cross'))
    for name, v in medians.items():
        torch.cuda.reset_peak_memory_stats()
        z.grad = None
        before = torch.cuda.memory_allocated()
        step(fs[name], z, t)
        extra = (torch.cuda.max_memory_allocated() - before) / 2**30
        print(f'{name:>24} {v * 1e3:8.2f}ms  {v / base:5.2f}  {extra:6.2f} GB')


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--threads', type=int, default=2)
    p.add_argument(
        '--rounds', type=float, default=1.0, help='factor on the number of rounds'
    )
    p.add_argument('--clock', choices=['wall', 'cpu'], default='wall')
    p.add_argument('--skip-published', action='store_true')
    p.add_argument(
        '--csv',
        default=str(Path(__file__).with_suffix('.csv')),
        help='where to write the ratios; empty: nowhere',
    )
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    cpu(args)
    memory(args)
    gpu()
