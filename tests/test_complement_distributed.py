"""COT in two processes gives the parameters of one process with the doubled batch (gloo on one machine, double precision)."""

import json
import os
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip('accelerate')

from fastai.basics import Adam, DataLoader, DataLoaders, Learner, SGD, TrainEvalCallback
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.distributed import DistributedDL

from complement_objectives.training.complement import ComplementTraining
from complement_objectives.training.complement_control import JointComplementTraining

N, SIZE = 96, 8  # samples and batch size of one process
OPTS = dict(
    sgd=(partial(SGD, mom=0.9, wd=1e-2), 0.1), adam=(partial(Adam, wd=0.1), 1e-2)
)
CALLBACKS = {
    'second': lambda n: [ComplementTraining()],
    'shared, wd=0': lambda n: [ComplementTraining(optimizer='shared', wd=0.0)],
    'clipped': lambda n: [ComplementTraining(), GradientClip(0.05)],
    'accumulated': lambda n: [ComplementTraining(), GradientAccumulation(2 * n)],
    'joint': lambda n: [JointComplementTraining(weight=2.0)],
}


class EpochMean(Callback):
    "Keep the epochs' mean complement loss, which the recorder would show."

    order = 20

    def __init__(self):
        self.means = []

    def after_train(self):
        self.means.append(
            float(
                next(
                    cb for cb in self.learn.cbs if hasattr(cb, 'epoch_complement')
                ).epoch_complement
            )
        )


def learner(opt, callbacks, size, order):
    "The same small network and data in every process; `order` says which sample comes when."
    torch.manual_seed(0)
    x, y = torch.randn(N, 6, dtype=torch.double), torch.randint(5, (N,))
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    items = [(x[i], y[i]) for i in order]
    dls = DataLoaders(
        DataLoader(items, bs=size), DataLoader(items, bs=size), device='cpu'
    )
    opt_func, lr = OPTS[opt]
    cbs = [TrainEvalCallback(), EpochMean(), *CALLBACKS[callbacks](size)]
    return Learner(
        dls,
        model,
        nn.CrossEntropyLoss(),
        opt_func=opt_func,
        lr=lr,
        default_cbs=False,
        cbs=cbs,
    )


def result(learn):
    return dict(
        parameters=torch.cat(
            [p.detach().flatten() for p in learn.model.parameters()]
        ).tolist(),
        means=learn.epoch_mean.means,
    )


def work(path):
    "One of the two processes."

    def broadcast(self, t, rank):  # fastai's sends indices over the GPU
        t = torch.tensor(t)
        torch.distributed.broadcast(t, rank)
        return t.tolist()

    DistributedDL._broadcast = broadcast
    results = {}
    for opt in OPTS:
        for callbacks in CALLBACKS:
            learn = learner(opt, callbacks, SIZE, range(N))
            with learn.distrib_ctx(sync_bn=False, cpu=True):
                learn.fit(3)
            results[f'{opt}: {callbacks}'] = result(learn)
    with open(f'{path}.{os.environ["RANK"]}', 'w') as file:
        json.dump(results, file)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    "What each of two processes ended with."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    path = tmp_path_factory.mktemp('distributed') / 'result'
    common = dict(
        os.environ,
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        OMP_NUM_THREADS='1',
        ACCELERATE_USE_CPU='true',
        CUDA_VISIBLE_DEVICES='',
    )
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(path)],
            env=dict(common, RANK=str(i), LOCAL_RANK=str(i)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [w.communicate(timeout=300)[0] for w in workers]
    finally:
        for w in workers:
            w.kill()
    for w, output in zip(workers, outputs):
        assert w.returncode == 0, output
    return [json.loads(path.with_name(f'result.{i}').read_text()) for i in range(2)]


@pytest.mark.parametrize('callbacks', CALLBACKS)
@pytest.mark.parametrize('opt', OPTS)
def test_two_processes(two_processes, opt, callbacks):
    half = (
        N // 2
    )  # each process has one half of the samples; a doubled batch takes as many from both
    order = [
        i
        for start in range(0, half, SIZE)
        for first in (0, half)
        for i in range(first + start, first + start + SIZE)
    ]
    learn = learner(opt, callbacks, 2 * SIZE, order)
    before = result(learn)['parameters']
    learn.fit(3)
    alone = {k: torch.tensor(v, dtype=torch.double) for k, v in result(learn).items()}
    assert (
        alone['parameters'] - torch.tensor(before, dtype=torch.double)
    ).abs().max() > 1e-2
    for process in two_processes:
        for name, value in process[f'{opt}: {callbacks}'].items():
            assert (
                torch.tensor(value, dtype=torch.double) - alone[name]
            ).abs().max() < 1e-12, name


if __name__ == '__main__':
    work(sys.argv[1])
