"""The worked examples of CONTRIBUTING.md, run as they stand."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from complement_objectives.attacks import ATTACKS, attack, attack_settings
from complement_objectives.core import InputError
from complement_objectives.data import DATASETS, dataloaders, digits, load_data
from complement_objectives.models import digits_cnn
from complement_objectives.study import StudyConfig, train_network, training_config
from complement_objectives.training import (
    OBJECTIVES,
    check_objective,
    objective_learner,
    objective_table,
)

TEXT = (Path(__file__).parents[1] / 'CONTRIBUTING.md').read_text(encoding='utf-8')
HEADINGS = ['A loss', 'An attack', 'A data set', "A paper's table"]


def example(heading):
    "The code of a worked example."
    section = TEXT.split(f'### {heading}')[1].split('\n### ')[0]
    return re.search(r'``` python\n(.*?)```', section, re.S)[1]


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


@pytest.fixture(autouse=True)
def registries_as_before():
    "Rows that an example adds go when the test ends."
    before = [(rows, dict(rows)) for rows in (OBJECTIVES, ATTACKS, DATASETS)]
    yield
    for rows, kept in before:
        rows.clear()
        rows.update(kept)


@pytest.mark.parametrize('heading', HEADINGS)
def test_an_example_is_short(heading):
    assert 3 <= len(lines(example(heading))) <= 15


def test_a_loss():
    exec(example('A loss'), {})
    learn = objective_learner(
        dataloaders(digits(), device='cpu'), digits_cnn(), 'focal', gamma=1.5
    )
    assert learn.loss_func.gamma == 1.5
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 3e-3)
    assert learn.recorder.values[-1][2] > 0.6
    assert 'gamma=2' in objective_table().parameters['focal']
    assert 'focal' in StudyConfig.create(objectives='focal').objectives
    assert training_config(objective='focal').parameters == dict(gamma=2.0)
    with pytest.raises(InputError, match='gamma must be finite and at least 0'):
        check_objective('focal', 10, gamma=-1.0)
    logits, y = torch.randn(5, 10), torch.arange(5)
    by_hand = nn.functional.cross_entropy(logits, y)
    assert torch.allclose(OBJECTIVES['focal'].loss(gamma=0.0)(logits, y), by_hand)


def test_an_attack():
    exec(example('An attack'), {})
    data, net = digits(), digits_cnn().eval()
    x, y = data.pixels(data.test_x[:20]), data.test_y[:20]
    moved = (attack(net, x, y, 'sign', eps=0.1) - x).abs()
    assert 0.05 < moved.max() <= 0.1
    row = attack_settings().loc['sign']
    assert (row['norm'], row['steps']) == ('L∞', 1)
    assert StudyConfig.create(attacks='sign').attacks == ('sign',)


def test_a_data_set(tmp_path):
    exec(example('A data set'), {})
    data = load_data('blobs')
    assert (len(data.train_y), data.n_classes) == (500, 3)
    assert StudyConfig.create('blobs').epochs == 3
    config = training_config('blobs', objective='gce')
    _, header = train_network(config, tmp_path / 'blobs', device='cpu')
    assert header['history'][-1]['accuracy'] > 0.6
