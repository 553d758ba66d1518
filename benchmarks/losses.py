#!/usr/bin/env python
"""Time and memory of the losses, as ratios to `F.cross_entropy` (forward and backward).

    python benchmarks/losses.py [--threads 2] [--rounds 1.0] [--clock wall] [--skip-published]

Each round runs every loss once, in random order, so that a busy machine, and memory that the one before gave back,
slow all of them alike. A ratio is given twice:
of the medians, and (after the slash) of the fastest runs, which a busy machine disturbs least. Where other work keeps
the cores busy, two threads wait for each other for whole time slices and the medians say nothing; then
`--threads 1 --clock cpu` counts processor time instead.
Memory is the highest sum of live allocations during forward and backward, beyond the logits, from torch's profiler.
The last part needs a GPU and says so where there is none.
"""

import argparse, os, random, sys, time
from contextlib import contextmanager
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch, torch.nn.functional as F
from torch.profiler import profile, ProfilerActivity
from complement_objectives.losses import objectives as L

SHAPES = (
    ((128, 10), 2.0, 800),
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


def cpu(args):
    fs = (
        dict(LOSSES)
        if args.skip_published
        else dict(LOSSES, **{'COT, published': published})
    )
    print(
        f'CPU, {torch.get_num_threads()} threads, float32, torch {torch.__version__}: {args.clock} time of forward + backward over that of cross-entropy'
    )
    print(
        f'{"shape":>12} {"bound":>6} {"CE":>9}  '
        + '  '.join(f'{n:>14}' for n in list(fs)[1:])
    )
    for shape, bound, rounds in SHAPES:
        z, t = torch.randn(shape).requires_grad_(), torch.randint(shape[1], shape[:1])
        ts = times(
            fs,
            z,
            t,
            max(5, int(rounds * args.rounds)),
            clock=dict(wall=time.perf_counter, cpu=time.process_time)[args.clock],
        )
        base = ts.pop('cross-entropy')
        cells = [
            f'{median(v) / median(base):.2f} / {v[0] / base[0]:.2f}'
            for v in ts.values()
        ]
        print(
            f'{str(shape):>12} {bound:>6} {median(base) * 1e3:>7.2f}ms  '
            + '  '.join(f'{c:>14}' for c in cells),
            flush=True,
        )
    print('\nPeak extra memory over that of cross-entropy (bound 1.1)')
    for shape, *_ in SHAPES:
        z, t = torch.randn(shape).requires_grad_(), torch.randint(shape[1], shape[:1])
        m = {n: peak(f, z, t) for n, f in fs.items()}
        base = m.pop('cross-entropy')
        print(
            f'{str(shape):>12} {"":>6} {base / 2**20:>7.2f}MB  '
            + '  '.join(f'{v / base:>14.2f}' for v in m.values()),
            flush=True,
        )


def gpu(args, shape=(8192, 50257)):
    if not torch.cuda.is_available():
        return print(
            '\nGPU: none here, part skipped (its bound: 1.2 times the faster of eager and compiled cross-entropy at (8192, 50257) in bfloat16)'
        )
    print(
        f'\n{torch.cuda.get_device_name()}, {shape}, bfloat16: milliseconds, and ratio to the faster cross-entropy (bound 1.2)'
    )
    z, t = (
        torch.randn(shape, device='cuda', dtype=torch.bfloat16).requires_grad_(),
        torch.randint(shape[1], shape[:1], device='cuda'),
    )
    fs = {
        f'{n}, {k}': w(f)
        for n, f in LOSSES.items()
        for k, w in (('eager', lambda f: f), ('compiled', torch.compile))
    }
    m = {n: median(v) for n, v in times(fs, z, t, 20, torch.cuda.synchronize).items()}
    base = min(v for n, v in m.items() if n.startswith('cross'))
    for n, v in m.items():
        torch.cuda.reset_peak_memory_stats()
        z.grad = None
        before = torch.cuda.memory_allocated()
        step(fs[n], z, t)
        print(
            f'{n:>24} {v * 1e3:8.2f}ms  {v / base:5.2f}  {(torch.cuda.max_memory_allocated() - before) / 2**30:6.2f} GB'
        )


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
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    random.seed(0)
    cpu(args)
    gpu(args)
