"Data sets and networks by name, IDX files, and what the foundations may import."

import gzip
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from complement_objectives.core import InputError
from complement_objectives.data import (
    DATASETS,
    DataSet,
    ImageData,
    PadCropFlip,
    TensorLoader,
    digits,
    load_data,
    read_idx,
)
from complement_objectives.intervals import mean_interval
from complement_objectives.models import (
    MODELS,
    Architecture,
    Classifier,
    create_model,
    n_parameters,
    on_meta,
)


def test_foundations_need_neither_fastai_nor_foolbox():
    names = ('core', 'models', 'perturbation', 'intervals')
    imports = ', '.join(f'complement_objectives.{name}' for name in names)
    code = f'import sys, {imports}; print(*sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    loaded = {name.split('.')[0] for name in done.stdout.split()}
    assert 'torch' in loaded and not loaded & {'fastai', 'foolbox'}


# networks


def linear(n_classes=10, in_channels=1, side=8, **norm):
    pixels = in_channels * side * side
    takes = (in_channels, side, side)
    return Classifier(nn.Flatten(), pixels, n_classes, takes=takes, **norm)


def test_a_network_is_a_function_and_a_row(monkeypatch):
    row = Architecture('softmax regression', linear, (1, 8, 8), 'Cox, 1958')
    monkeypatch.setitem(MODELS, 'linear', row)
    model = create_model('linear', n_classes=3, mean=0.5)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
    assert n_parameters(row.sample()) == 650
    assert row.parameters() == dict(n_classes=10, in_channels=1, side=8)


@pytest.mark.parametrize('name', MODELS)
def test_every_row_says_what_its_network_takes(name):
    row = MODELS[name]
    model = row.sample()
    assert model.head.out_features == row.parameters()['n_classes']
    channels, smallest, largest = model.takes
    assert channels == row.size[0] and min(row.size[1:]) >= smallest
    assert largest is None or max(row.size[1:]) <= largest
    assert row.title and row.source


def test_a_misspelled_network_gets_the_nearest_names():
    with pytest.raises(InputError, match='did you mean'):
        create_model('resnet22')


# data sets


def stripes(root):
    x, y = torch.load(root / 'stripes.pt')
    names = ['lying', 'standing']
    return ImageData('stripes', x[:16], y[:16], x[16:], y[16:], names, scale=1)


ROW = DataSet('Stripes', stripes, ('lying', 'standing'), (1, 8, 8), 16, 0.5, 0.5)


@pytest.fixture
def striped(tmp_path, monkeypatch):
    x = torch.zeros(20, 1, 8, 8)
    x[::2, :, ::2] = 1
    x[1::2, :, :, ::2] = 1
    torch.save((x, torch.arange(20) % 2), tmp_path / 'stripes.pt')
    monkeypatch.setitem(DATASETS, 'stripes', ROW)
    return tmp_path


def test_a_data_set_is_a_function_and_a_row(striped):
    data = load_data('stripes', striped)
    assert (data.n_classes, len(data.train_x), len(data.test_x)) == (2, 16, 4)
    network = dict(n_classes=2, in_channels=1, mean=0.5, std=0.5)
    assert DATASETS['stripes'].network() == network
    assert DATASETS['stripes'].augmentation() is None


@pytest.mark.parametrize(
    'wrong', [dict(class_names=('one',)), dict(size=(3, 8, 8)), dict(size=(1, 8, 9))]
)
def test_a_row_that_does_not_fit_is_found_out(wrong, striped, monkeypatch):
    monkeypatch.setitem(DATASETS, 'stripes', replace(ROW, **wrong))
    with pytest.raises(InputError, match='its row says'):
        load_data('stripes', striped)


@pytest.mark.parametrize('name', DATASETS)
def test_every_row_names_a_network_for_its_images(name):
    row = DATASETS[name]
    model = on_meta(MODELS[row.model], **row.network())
    channels, smallest, _ = model.takes
    assert channels == row.size[0] and row.size[1] >= smallest
    assert row.epochs > 0 and row.attack_images > 0 and row.n_train > 0
    assert isinstance(row.augmentation(), PadCropFlip)


# IDX files

TINY = bytes([0, 0, 8, 2]) + np.array([2, 3], '>i4').tobytes() + bytes(range(6))


def test_idx_files_packed_and_not(tmp_path):
    (tmp_path / 'a').write_bytes(TINY)
    (tmp_path / 'a.gz').write_bytes(gzip.compress(TINY))
    tmp_path.chmod(0o500)
    for name in ('a', 'a.gz'):
        assert read_idx(tmp_path / name).tolist() == [[0, 1, 2], [3, 4, 5]]
    tmp_path.chmod(0o700)
    assert sorted(o.name for o in tmp_path.iterdir()) == ['a', 'a.gz']


@pytest.mark.parametrize('cut', [*range(len(TINY))])
@pytest.mark.parametrize('packed', [False, True])
def test_idx_files_cut_off(cut, packed, tmp_path):
    path = tmp_path / ('cut.gz' if packed else 'cut')
    content = gzip.compress(TINY[:cut]) if packed else TINY[:cut]
    path.write_bytes(content)
    with pytest.raises(InputError, match='is empty, truncated or no IDX file'):
        read_idx(path)


@pytest.mark.parametrize('kind', [9, 11, 13, 14, 0, 255])
def test_idx_files_of_another_type(kind, tmp_path):
    (tmp_path / 'a').write_bytes(TINY[:2] + bytes([kind]) + TINY[3:])
    with pytest.raises(InputError, match='no IDX file'):
        read_idx(tmp_path / 'a')


def test_idx_files_that_are_missing(tmp_path):
    with pytest.raises(OSError):
        read_idx(tmp_path / 'absent')


def test_archives_cut_off(tmp_path):
    packed = gzip.compress(TINY)
    for cut in range(len(packed)):
        (tmp_path / 'a.gz').write_bytes(packed[:cut])
        with pytest.raises(InputError, match='truncated'):
            read_idx(tmp_path / 'a.gz')


# batches and intervals


def test_a_loader_can_be_copied_with_changes():
    data = digits()
    loader = TensorLoader((data.train_x, data.train_y), scale=16, bs=64, shuffle=True)
    copied = loader.new(bs=8, shuffle=False)
    assert (copied.bs, copied.scale, copied.n) == (8, 16, loader.n)
    assert next(iter(copied))[1].tolist() == data.train_y[:8].tolist()


def test_many_numbers_do_not_take_long():
    v = np.random.default_rng(0).exponential(size=2**21)
    found = mean_interval(v)
    error = v.std(ddof=1) / len(v) ** 0.5
    low, high = (found.value - found.low) / error, (found.high - found.value) / error
    assert low == pytest.approx(1.96, abs=1e-3) and 1.96 < high < 1.97
