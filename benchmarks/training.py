#!/usr/bin/env python
"""What an epoch of COT, GCE and RCE costs, against cross-entropy in the same `Learner`.

    python benchmarks/training.py [--threads 2] [--rounds 15] [--steps 20]
                                  [--batch-size 64] [--clock wall] [--device auto]

LeNet-5 on random images in MNIST's shape, held in memory as bytes. Each round trains
every objective for one epoch of `--steps` batches, in turn, so that a busy machine
slows all of them alike; a first round is thrown away.
A ratio is taken in each round; given are the median and, in brackets, the quartiles.
Bounds: 2.0 for COT (two forward and two backward passes), 1.03 for GCE and RCE.
"""

import argparse
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).parent.parent))
warnings.filterwarnings('ignore')
import torch
from fastai.basics import Adam, CrossEntropyLossFlat, Learner, SGD
from fastai.callback.progress import ProgressCallback
from complement_objectives.training.complement import ComplementTraining
from complement_objectives.training.complement_control import JointComplementTraining
from complement_objectives.core import pick_device
from complement_objectives.data import ImageData, dataloaders
from complement_objectives.losses import (
    GuidedComplementEntropyLoss,
    ReverseCrossEntropyLoss,
)
from complement_objectives.models import lenet5

ARMS = {
    'cross-entropy': (CrossEntropyLossFlat, None, None),
    'COT': (CrossEntropyLossFlat, ComplementTraining, 2.0),
    "COT, optimizer='shared'": (
        CrossEntropyLossFlat,
        partial(ComplementTraining, optimizer='shared'),
        2.0,
    ),
    "joint loss (not the paper's)": (
        CrossEntropyLossFlat,
        JointComplementTraining,
        None,
    ),
    'GCE': (GuidedComplementEntropyLoss, None, 1.03),
    'RCE': (ReverseCrossEntropyLoss, None, 1.03),
}
OPTS = {'Adam': partial(Adam, wd=0.0), 'SGD': partial(SGD, mom=0.9)}


def images(n):
    "Random bytes in MNIST's shape."
    x = torch.randint(256, (n + 64, 1, 28, 28), dtype=torch.uint8)
    y = torch.randint(10, (n + 64,))
    return ImageData('random', x[:n], y[:n], x[n:], y[n:], [str(o) for o in range(10)])


def learner(loss, callback, opt, dls):
    "A plain `Learner`."
    torch.manual_seed(0)
    learn = Learner(
        dls,
        lenet5(),
        loss(),
        opt_func=OPTS[opt],
        lr=1e-3,
        cbs=callback() if callback else None,
    )
    return learn.remove_cb(ProgressCallback)


def epoch(learn, sync, clock):
    "Seconds of one epoch of training."
    sync()
    start = clock()
    with learn.no_logging():
        learn.fit(1)
    sync()
    return clock() - start


def main(args):
    device = pick_device(args.device)
    sync = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    clock = dict(wall=time.perf_counter, cpu=time.process_time)[args.clock]
    data = images(args.steps * args.batch_size)
    print(
        f'{device}, {args.threads} threads, torch {torch.__version__}, LeNet-5, '
        f'batches of {args.batch_size}, {args.steps} steps an epoch, '
        f'{args.rounds} rounds: '
        f'{args.clock} time of an epoch over that with cross-entropy'
    )
    print(f'{"":>30} {"bound":>6}  ' + '  '.join(f'{opt:>27}' for opt in OPTS))
    rows = {name: [] for name in ARMS}
    for opt in OPTS:
        learners = {
            name: learner(
                loss, callback, opt, dataloaders(data, args.batch_size, device)
            )
            for name, (loss, callback, _) in ARMS.items()
        }
        seconds = {name: [] for name in ARMS}
        for i in range(args.rounds + 1):
            for name, learn in learners.items():
                t = epoch(learn, sync, clock)
                if i:
                    seconds[name].append(t)
        base = seconds['cross-entropy']
        for name, t in seconds.items():
            low, mid, high = quantiles((a / b for a, b in zip(t, base)), n=4)
            step = median(t) * 1e3 / args.steps
            rows[name].append(f'{step:6.2f}ms {mid:5.2f} ({low:.2f}-{high:.2f})')
    for name, cells in rows.items():
        print(
            f'{name:>30} {ARMS[name][2] or "":>6}  '
            + '  '.join(f'{c:>27}' for c in cells),
            flush=True,
        )


if __name__ == '__main__':
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--rounds', type=int, default=15)
    p.add_argument('--steps', type=int, default=20)
    p.add_argument('--batch-size', type=int, default=64)
    p.add_argument('--clock', choices=['wall', 'cpu'], default='wall')
    p.add_argument('--device', default='auto')
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    main(args)
