#!/usr/bin/env python
"""Training throughput of `dataloaders` against torchvision's data sets.

    python benchmarks/loading.py --root FOLDER [--repeats 5] [--device cuda]

`dataloaders` keep bytes on the device and augment them there; torchvision's data sets
are read by fastai's loader with its default number of worker processes. Trains LeNet-5
on MNIST and ResNet-20 on CIFAR-10 (padded crops, mirroring) through a fastai `Learner`,
the two kinds of loader taking turns, and prints training samples per second, median
over the repeats, and the ratio. 'loading only' is the same pass over the batches
without a network.
"""

import argparse
import gzip
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch
import torchvision.transforms as T
from fastai.callback.core import Callback, CancelValidException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch.utils.data import Subset
from torchvision.datasets import CIFAR10, MNIST

from complement_objectives.core import pick_device
from complement_objectives.data import DATASETS, dataloaders, load_data
from complement_objectives.models import MODELS, create_model

CASES = {'mnist': 12_800, 'cifar10': 1_280}  # training images where there is no GPU
AUGMENTED = {'cifar10'}
BATCH = 128


class NoValidation(Callback):
    def before_validate(self):
        raise CancelValidException


def torchvision_set(name, root, folder):
    "The training set as torchvision serves it; MNIST is unpacked into `folder`."
    if name == 'cifar10':
        changes = [T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.ToTensor()]
        return CIFAR10(root, transform=T.Compose(changes))
    raw = Path(folder) / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for path in (Path(root) / 'MNIST' / 'raw').glob('*.gz'):
        with gzip.open(path) as packed, open(raw / path.stem, 'wb') as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return MNIST(folder, transform=T.ToTensor())


def loaders(name, n, root, folder, device):
    "Both kinds of `DataLoaders` over the same first `n` training images."
    theirs = Subset(torchvision_set(name, root, folder), range(n))
    data = load_data(name, root)
    data.train_x, data.train_y = data.train_x[:n], data.train_y[:n]
    augment = DATASETS[name].augmentation() if name in AUGMENTED else None
    return {
        'torchvision': DataLoaders.from_dsets(theirs, theirs, bs=BATCH, device=device),
        'dataloaders': dataloaders(data, BATCH, device, augment=augment),
    }


def seconds(run, device):
    start = time.perf_counter()
    run()
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(runs, n, repeats, device):
    "Samples per second of each of `runs`, taking turns; the first turn is not counted."
    times = {kind: [] for kind in runs}
    for _ in range(repeats + 1):
        for kind, run in runs.items():
            times[kind].append(seconds(run, device))
    return {kind: n / median(t[1:]) for kind, t in times.items()}


def training(dls, name):
    row = DATASETS[name]
    model = create_model(row.model, in_channels=row.size[0])
    learn = Learner(dls, model, CrossEntropyLossFlat(), cbs=NoValidation())

    def run():
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3)

    return run


def loading(dls):
    def run():
        for _ in dls.train:
            pass

    return run


def measure(name, root, repeats, device):
    "One line each for training and for loading only."
    row = DATASETS[name]
    n = row.n_train if device.type == 'cuda' else CASES[name]
    kinds = {'training': lambda dls: training(dls, name), 'loading only': loading}
    with tempfile.TemporaryDirectory() as folder:
        both = loaders(name, n, root, folder, device)
        for what, make in kinds.items():
            runs = {kind: make(dls) for kind, dls in both.items()}
            rates = compare(runs, n, repeats, device)
            yield {
                'network, data': f'{MODELS[row.model].title}, {row.title}',
                'what': what,
                **{f'{kind} (samples/s)': round(r) for kind, r in rates.items()},
                'ratio': round(rates['dataloaders'] / rates['torchvision'], 2),
            }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--root', help='folder with the data sets')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--only', choices=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    lines = []
    for name in [args.only] if args.only else CASES:
        lines += measure(name, args.root, args.repeats, device)
    print(pd.DataFrame(lines).to_string(index=False))


if __name__ == '__main__':
    main()
