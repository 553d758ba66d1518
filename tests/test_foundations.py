"Data sets and networks by name, IDX files, and what the foundations may import."

import gzip
import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from complement_objectives.core import (
    InputError,
    as_number,
    check_count,
    check_positive,
    choose,
    derive_seed,
    pick_device,
    seed_everything,
)
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
from complement_objectives.intervals import (
    fpr_interval,
    mean_interval,
    normals_needed,
    separation_interval,
    share_interval,
    tpr_interval,
)
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


# names and numbers


def refused(f, *args, **kwargs):
    with pytest.raises(InputError) as e:
        f(*args, **kwargs)
    message = str(e.value)
    assert len(message) < 200 and len(message.splitlines()) == 1
    return message


NO_NAMES = [None, 3, math.nan, dict, ['a'], {}, b'a', torch.ones(30, 30), 10**5000]


@pytest.mark.parametrize('name', NO_NAMES, ids=lambda o: type(o).__name__)
def test_a_name_that_is_no_text(name):
    assert 'give one of the names a, b' in refused(choose, name, dict(a=1, b=2), 'it')
    assert refused(pick_device, name).startswith('device is ')


def test_names():
    assert choose(np.str_('a'), dict(a=1), 'thing') == 1
    for name in ('', 'x' * 500, 'a\nb', "it's"):
        assert refused(choose, name, dict(a=1), 'thing').startswith('unknown thing ')


WHOLE = [3, np.int64(3), np.uint8(3), np.array(3), np.array([[3]])]
WHOLE += [torch.tensor(3), torch.tensor([3], dtype=torch.int8)]
REAL = [0.5, np.float32(0.5), np.float16(0.5), np.array(0.5), Fraction(1, 2)]
REAL += [torch.tensor(0.5), torch.tensor([0.5]).bfloat16()]
REAL += [torch.nn.Parameter(torch.tensor(0.5))]
NONE = [True, np.bool_(True), torch.tensor(True), np.array(True), 1j, np.complex64(1)]
NONE += ['3', np.array('3'), None, [3], torch.tensor(1j), torch.ones(20, 20)]
NONE += [np.timedelta64(3, 's'), torch.tensor(3, device='meta'), np.array(None)]
HUGE = [10**400, np.array([10**400]), 10**5000]


def test_numbers_become_pythons():
    for value in WHOLE:
        found = (
            check_count(value, 'n'),
            as_number(value, 'n'),
            check_positive(value, 'n'),
        )
        assert found == (3, 3, 3) and [type(v) for v in found] == [int, float, float]
        assert derive_seed(value, 'a') == derive_seed(3, 'a')
        seed_everything(value)
        assert torch.initial_seed() == 3
    for value in REAL:
        found = as_number(value, 'n'), check_positive(value, 'n')
        assert found == (0.5, 0.5) and [type(v) for v in found] == [float, float]
    assert math.isnan(as_number(np.float32('nan'), 'n'))
    assert as_number(torch.tensor(math.inf), 'n') == math.inf


CHECKS = [as_number, check_count, check_positive]


@pytest.mark.parametrize('value', [*NONE, *HUGE], ids=lambda o: type(o).__name__)
def test_what_is_no_number_or_too_large(value):
    assert all(refused(check, value, 'size').startswith('size ') for check in CHECKS)
    for f in (derive_seed, seed_everything):
        assert refused(f, value).startswith('seed must be a whole number')


def test_whole_numbers_in_their_range():
    for value in (*REAL, 3.0, math.nan, math.inf, 0, -(10**400)):
        assert 'whole number of at least 1' in refused(check_count, value, 'n')
    assert 'and below' in refused(check_count, 2**63, 'n')
    assert check_count(2**63 - 1, 'n') == 2**63 - 1
    for seed in (-1, 2**32):
        refused(seed_everything, seed)
    for value in (math.nan, math.inf, 0, -1, torch.tensor(math.nan)):
        assert 'finite and above 0' in refused(check_positive, value, 'n')


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


V = [0.1, 0.2, 0.5, 0.7]
INTERVALS = [
    (mean_interval, [V], 'level'),
    (share_interval, [[True, False]], 'level'),
    (separation_interval, [V, V], 'level'),
    (tpr_interval, [V, V], 'level'),
    (tpr_interval, [V, V], 'fpr'),
    (fpr_interval, [V, V], 'level'),
    (fpr_interval, [V, V], 'tpr'),
    (normals_needed, [], 'level'),
    (normals_needed, [], 'rate'),
]


@pytest.mark.parametrize('f, args, name', INTERVALS)
def test_levels_and_rates(f, args, name):
    for value in (np.float32(0.9), torch.tensor(0.9)):
        assert f(*args, **{name: value}) == f(*args, **{name: float(value)})
    for value in (
        0,
        1,
        -0.1,
        95,
        math.nan,
        math.inf,
        True,
        '0.9',
        None,
        [0.9, 1],
        HUGE[0],
    ):
        assert refused(f, *args, **{name: value}).startswith(f'{name} is ')


def test_counts_and_values_of_intervals():
    for value in (0, -1, 2.5, True, '3', None, HUGE[0]):
        assert 'n_boot must be' in refused(mean_interval, V, n_boot=value)
    for value in (-1, 2.5, True, '3', HUGE[0]):
        assert refused(share_interval, 1, n=value).startswith('n must be')
    for value in (-1, 2.5, 6, math.nan, True, None, HUGE[0]):
        refused(share_interval, value, n=5)
    assert share_interval(np.int64(3), n=torch.tensor(5)) == share_interval(3, n=5)
    for f in (mean_interval, share_interval, partial(separation_interval, V)):
        for values in (['a'], [None], 3, 'abc', [[1]], torch.tensor([1j]), [HUGE[0]]):
            assert 'the values have' in refused(f, values)
