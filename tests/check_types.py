"""What mypy must accept of a user's code: public signatures, called as the README does.

Nothing here is run; `mypy` reads it with the package, whose `py.typed` says it may.
"""

from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from complement_objectives.attacks import attack, attack_settings, make_attack
from complement_objectives.core import derive_seed, pick_device
from complement_objectives.data import ImageData, digits, load_data
from complement_objectives.detection import KernelDensity, RobustClassifier, auroc
from complement_objectives.evaluation import accuracy, worst_case
from complement_objectives.intervals import Interval, share_interval
from complement_objectives.losses import (
    ComplementEntropyLoss,
    GuidedComplementEntropyLoss,
    complement_entropy_loss,
    guided_complement_entropy,
    reverse_cross_entropy,
)
from complement_objectives.models import ReverseLogits, create_model, forward_batches
from complement_objectives.study import StudyConfig, study
from complement_objectives.training import (
    ComplementTraining,
    objective_table,
    train_classifier,
)


def losses(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    plain: Tensor = complement_entropy_loss(logits, target, weight=weight)
    guided: Tensor = guided_complement_entropy(logits, target, 0.25, reduction='sum')
    reverse: Tensor = reverse_cross_entropy(logits, target, ignore_index=255)
    modules: list[nn.Module] = [
        ComplementEntropyLoss(),
        GuidedComplementEntropyLoss(0.5),
    ]
    return plain + guided + reverse + sum(loss(logits, target) for loss in modules)


def networks(x: Tensor) -> nn.Module:
    model: nn.Module = create_model('digits_cnn', n_classes=10, in_channels=1)
    _hidden, _logits = forward_batches(model, x)
    return ReverseLogits(model)


def training(root: Path) -> nn.Module:
    data: ImageData = load_data('mnist', root)
    small: ImageData = digits()
    callback = ComplementTraining(optimizer='shared')
    table: pd.DataFrame = objective_table()
    model, report = train_classifier(small, networks(data.train_x), 'gce', 3, alpha=0.5)
    print(callback, table, report['history'], pick_device('cpu'))
    return model


def attacks(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    settings: pd.DataFrame = attack_settings()
    print(settings, make_attack('pgd', steps=10))
    return attack(model, x, y, 'pgd', 0.1, seed=derive_seed(0, 'attack'))


def detection(model: nn.Module, x: Tensor, y: Tensor) -> float:
    robust = RobustClassifier(model, KernelDensity())
    robust.fit(x, y).calibrate(x, 0.05)
    _labels, scores = robust(x)
    return auroc(scores, scores)


def evaluation(right: Tensor) -> Interval:
    share: float = accuracy(worst_case([right, right]))
    print(share)
    return share_interval(right)


def experiment() -> Path:
    config = StudyConfig.create('digits', ['xe', 'rce'], seeds=3, eps=[0.1])
    _runs, report = study(config, 'results', device='cpu')
    return report


if __name__ == '__main__':
    losses(torch.zeros(2, 3), torch.zeros(2).long(), torch.ones(3))
