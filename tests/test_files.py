"""Files that were damaged or edited, runs that failed, and words about numbers: each is said in one line, or is right."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from complement_objectives.cli import main
from complement_objectives.core import InputError
from complement_objectives.data import ImageData, digits
from complement_objectives.detection import RobustClassifier
from complement_objectives.models import ReverseLogits, digits_cnn
from complement_objectives.saving import (
    join_tensors,
    load_classifier,
    load_header,
    load_tensors,
    read_tensors,
    save_classifier,
    save_tensors,
    split_tensors,
)
from complement_objectives.study import recipes
from complement_objectives.study import results as s
from complement_objectives.study import runs as r
from complement_objectives.study import saved


def said(capsys, status, *args):
    "What the command says when it ends with `status`: exactly one line, nothing on standard output."
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, args)))
    out, err = capsys.readouterr()
    assert exit.value.code == status and out == '', (exit.value.code, out, err)
    assert (
        err.startswith('cobj: ')
        and err.count('\n') == 1
        and 'Traceback' not in err
        and 'Exception occured' not in err
    )
    return err


def works(capsys, *args):
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, args)))
    out, err = capsys.readouterr()
    assert not exit.value.code, err
    return out


# Tensors under a checksum

TENSORS = dict(
    a=torch.arange(6.0).reshape(2, 3),
    b=torch.arange(4),
    c=torch.tensor(2.5),
    d=torch.zeros(0, 3),
    e=torch.ones(3).bfloat16(),
    f=torch.tensor([True, False]),
)
HEADER = dict(
    reverse=True,
    k=10,
    temperature=1.5,
    nothing=None,
    more=[1, {'x': 'ε'}],
    nan=float('nan'),
)


@pytest.fixture(scope='module')
def content(tmp_path_factory):
    path = tmp_path_factory.mktemp('content') / 'x.safetensors'
    save_tensors(TENSORS, path, HEADER)
    return path.read_bytes()


def refused(path, content):
    path.write_bytes(content)
    for read in (read_tensors, load_tensors, load_header):
        with pytest.raises(InputError) as error:
            read(path)
        assert '\n' not in str(error.value) and str(path) in str(error.value)


def test_tensors_come_back(content, tmp_path):
    (tmp_path / 'x.safetensors').write_bytes(content)
    tensors, header = read_tensors(tmp_path / 'x.safetensors')
    assert tensors.keys() == TENSORS.keys() and json.dumps(header) == json.dumps(HEADER)
    for name, t in TENSORS.items():
        assert t.dtype == tensors[name].dtype and t.equal(tensors[name])
    save_tensors(TENSORS, tmp_path / 'again.safetensors', HEADER)
    assert (tmp_path / 'again.safetensors').read_bytes() == content


@pytest.mark.parametrize('bit', [1, 64])
def test_a_flipped_byte_anywhere(bit, content, tmp_path):
    for i in range(len(content)):
        refused(
            tmp_path / 'x.safetensors',
            content[:i] + bytes([content[i] ^ bit]) + content[i + 1 :],
        )


def test_truncations_and_rubbish(content, tmp_path):
    draw = random.Random(0)
    for n in range(0, len(content), 7):
        refused(tmp_path / 'x.safetensors', content[:n])
    for _ in range(100):
        refused(tmp_path / 'x.safetensors', draw.randbytes(draw.randrange(400)))
    for n in (0, 1, len(content), 10**9, 2**40, 2**63):
        refused(tmp_path / 'x.safetensors', n.to_bytes(8, 'little') + content[8:])
    for n in (1, 8, 100):
        refused(tmp_path / 'x.safetensors', content + bytes(n))


NO_TENSORS = [
    {1: torch.ones(2)},
    {None: torch.ones(2), 'a': torch.ones(2)},
    {'__metadata__': torch.ones(2)},
    dict(a=np.ones(2)),
    dict(a=0.5),
    dict(a=None),
]


@pytest.mark.parametrize('tensors', NO_TENSORS, ids=repr)
def test_what_is_no_tensor_or_has_no_name_is_not_written(tensors, tmp_path):
    with pytest.raises(InputError, match='give a te(nsor|xt)') as e:
        save_tensors(tensors, tmp_path / 'a')
    assert len(str(e.value).splitlines()) == 1 and not list(tmp_path.iterdir())


def test_odd_tensors_and_headers_come_back(tmp_path):
    whole = torch.arange(6.0)
    odd = {'': whole, 'a/b': whole, '../c': whole[1:], 'ä\n': whole[::2]}
    odd |= dict(
        conj=(whole * 1j).conj(), neg=whole._neg_view(), flat=whole[:1].expand(3)
    )
    header = dict(share=np.float32(0.5), n=np.int64(3), hits=torch.tensor([1, 0]))
    save_tensors(odd, tmp_path / 'a', header)
    tensors, found = read_tensors(tmp_path / 'a')
    assert found == dict(share=0.5, n=3, hits=[1, 0]) and tensors.keys() == odd.keys()
    assert all(torch.equal(tensors[name], odd[name]) for name in odd)
    save_tensors({}, tmp_path / 'a', {})
    assert read_tensors(tmp_path / 'a') == ({}, {})


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent'):
        save_tensors(TENSORS, tmp_path / 'absent' / 'a')


def test_a_nest_whose_names_would_meet():
    nest = {'a': {'b': torch.zeros(1)}, 'a.b': torch.ones(1), (1, 2): [torch.ones(2)]}
    tensors = {}
    text = json.dumps(split_tensors(nest, tensors))
    again = join_tensors(json.loads(text), tensors)
    assert len(tensors) == 3 and repr(again) == repr(nest)


def test_foreign_files(tmp_path):
    from safetensors.torch import save_file

    for metadata in (
        None,
        dict(format='pt'),
        dict(header='{"reverse": true}'),
        dict(header='hello'),
        dict(header='[' * 100_000),
        dict(header='null'),
        dict(header='{"header": {}, "sha256": 3}'),
    ):
        save_file(dict(a=torch.ones(2)), tmp_path / 'x.safetensors', metadata)
        refused(tmp_path / 'x.safetensors', (tmp_path / 'x.safetensors').read_bytes())


# A network's header


def leaves(o, path=()):
    "Every value in a nest with the way to it."
    if isinstance(o, (dict, list)) and o:
        for key, value in o.items() if isinstance(o, dict) else enumerate(o):
            yield from leaves(value, (*path, key))
    yield path, o


def with_value(o, path, value):
    "A copy of `o` with `value` at the end of the way."
    if not path:
        return value
    copy = dict(o) if isinstance(o, dict) else list(o)
    copy[path[0]] = with_value(o[path[0]], path[1:], value)
    return copy


@pytest.fixture(scope='module')
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp('network') / 'rce'
    recipes.train_network(
        recipes.training_config(objective='rce', epochs=2), folder, device='cpu'
    )
    return folder


def copied(folder, into, name=None, content=b''):
    "A copy of a network's folder, one of its files changed."
    into.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_file():
            (into / path.name).write_bytes(path.read_bytes())
    if name:
        (into / name).write_bytes(content)
    return into


def test_every_edited_value_of_a_header_is_refused(network, tmp_path):
    header = json.loads((network / 'model.json').read_text())
    spoilt = copied(network, tmp_path / 'spoilt')
    edits = [
        (path, value)
        for path, old in leaves(header)
        for value in (None, 7, 'text', [], {}, True, not old)
        if json.dumps(value) != json.dumps(old)
    ]
    assert len(edits) > 100
    for path, value in edits:
        (spoilt / 'model.json').write_text(json.dumps(with_value(header, path, value)))
        with pytest.raises(InputError) as error:
            load_classifier(spoilt)
        assert '\n' not in str(error.value), path


@pytest.mark.parametrize('command', ['attack', 'detect', 'report'])
@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'[]',
        b'null',
        b'{}',
        b'3',
        b'"text"',
        b'{"format": "complement_objectives classifier 1"}',
        b'{"format": "complement_objectives classifier 2"}',
        b'\xff\xfe',
        b'[' * 100_000,
        b'{"a": NaN',
    ],
)
def test_headers_of_another_shape(command, content, network, capsys, tmp_path):
    assert 'model.json' in said(
        capsys, 2, command, copied(network, tmp_path / 'net', 'model.json', content)
    )


def test_a_reversed_header_ends_every_command(network, capsys, tmp_path):
    text = (network / 'model.json').read_text()
    assert '"reverse": true' in text
    spoilt = copied(
        network,
        tmp_path / 'net',
        'model.json',
        text.replace('"reverse": true', '"reverse": false').encode(),
    )
    for command in ('attack', 'detect', 'report'):
        assert 'was edited' in said(capsys, 2, command, spoilt)
    assert 'was edited' in said(
        capsys,
        2,
        'train',
        '--objective',
        'rce',
        '--epochs',
        2,
        '--out',
        spoilt,
        '--device',
        'cpu',
    )


def test_layout_of_a_header_does_not_matter(network, tmp_path):
    same = copied(
        network,
        tmp_path / 'net',
        'model.json',
        json.dumps(json.loads((network / 'model.json').read_text())).encode(),
    )
    assert load_classifier(same)[1]['reverse'] and isinstance(
        load_classifier(same)[0], ReverseLogits
    )


@pytest.mark.parametrize(
    'network',
    [
        dict(name='digits_cnn', n_classes=9),
        dict(name='lenet5'),
        dict(name='digits_cnn', width=3),
        dict(n_classes=10),
        dict(name='digitscnn'),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(network, tmp_path):
    with pytest.raises(InputError):
        save_classifier(digits_cnn(), network, tmp_path / 'net')
    assert not (tmp_path / 'net').exists()


@pytest.mark.parametrize(
    'more',
    [
        dict(reverse=True),
        dict(format='mine'),
        dict(weights_sha256=''),
        dict(header_sha256=''),
        dict(tensors=dict(x=torch.ones(1))),
        dict(tensors={'head.weight': torch.zeros(10, 64)}),
    ],
)
def test_what_the_caller_adds_does_not_stand_in_for_what_the_library_writes(
    more, tmp_path
):
    with pytest.raises(InputError):
        save_classifier(digits_cnn(), dict(name='digits_cnn'), tmp_path / 'net', **more)
    with pytest.raises(TypeError):
        save_classifier(
            digits_cnn(), dict(name='digits_cnn'), tmp_path / 'net', classes={1, 2}
        )
    assert not (tmp_path / 'net').exists()


# Runs that fail


@pytest.mark.parametrize('objective', ['xe', 'cot', 'gce', 'rce'])
@pytest.mark.parametrize('lr', ['1e9', '1e30'])
def test_divergence_is_said(objective, lr, capsys, tmp_path):
    args = [
        'train',
        '--objective',
        objective,
        '--lr',
        lr,
        '--epochs',
        2,
        '--out',
        tmp_path / 'net',
        '--device',
        'cpu',
    ]
    for _ in range(2):
        assert 'diverged' in said(capsys, 1, *args)
    assert list((tmp_path / 'net').iterdir()) == []


@pytest.mark.parametrize('preset', ['he2016_cifar', 'rce_mnist'])
def test_divergence_with_a_schedule(preset, capsys, tmp_path):
    assert 'diverged' in said(
        capsys,
        1,
        'train',
        '--preset',
        preset,
        '--lr',
        '1e9',
        '--epochs',
        2,
        '--out',
        tmp_path / 'net',
        '--device',
        'cpu',
    )


def test_a_loss_that_is_absurd_is_divergence_too(capsys, tmp_path):
    assert 'where guessing has 2.3' in said(
        capsys,
        1,
        'train',
        '--lr',
        '1e3',
        '--epochs',
        2,
        '--out',
        tmp_path / 'net',
        '--device',
        'cpu',
    )
    assert 'accuracy' in works(
        capsys, 'train', '--epochs', 1, '--out', tmp_path / 'net', '--device', 'cpu'
    )  # the folder is free for another try


def interrupted(config, out):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipes.train_network(config, out, device='cpu', progress=stop)


def test_a_diverged_checkpoint_is_not_continued(capsys, tmp_path):
    out = tmp_path / 'net'
    interrupted(recipes.training_config(epochs=2), out)
    tensors, header = read_tensors(out / 'checkpoint.safetensors')
    next(t for name, t in tensors.items() if name.endswith('head.bias'))[0] = torch.nan
    save_tensors(tensors, out / 'checkpoint.safetensors', header)
    assert 'diverged' in said(
        capsys, 1, 'train', '--epochs', 2, '--out', out, '--device', 'cpu'
    )
    assert not (out / 'model.json').exists()


def test_an_edited_checkpoint_is_refused(capsys, tmp_path):
    out = tmp_path / 'net'
    interrupted(recipes.training_config(epochs=3), out)
    content = (out / 'checkpoint.safetensors').read_bytes()
    at = (
        content.index(b'accuracy') if b'accuracy' in content else content.index(b'rows')
    )
    for i in (at, 9, len(content) // 2, len(content) - 1):
        (out / 'checkpoint.safetensors').write_bytes(
            content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]
        )
        said(capsys, 2, 'train', '--epochs', 3, '--out', out, '--device', 'cpu')
    for header in (
        [],
        None,
        {},
        dict(settings=3),
        dict(format='complement_objectives checkpoint 1'),
    ):
        save_tensors(TENSORS, out / 'checkpoint.safetensors', header)
        said(capsys, 2, 'train', '--epochs', 3, '--out', out, '--device', 'cpu')


def test_a_study_that_diverges(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(
        recipes.DATASETS, 'digits', replace(recipes.DATASETS['digits'], lr=1e9)
    )
    args = [
        'study',
        '--objectives',
        'rce',
        '--attacks',
        'fgsm',
        '--seeds',
        1,
        '--epochs',
        2,
        '--out',
        tmp_path / 'out',
        '--device',
        'cpu',
    ]
    for _ in range(2):
        assert 'RCE seed 0: the training diverged' in said(capsys, 1, *args)
    assert not [
        p
        for p in (tmp_path / 'out').rglob('*')
        if p.is_file() and p.name != 'study.json'
    ]


# Numbers that make no sense


@pytest.mark.parametrize('option', ['--lr', '--alpha', '--adversarial'])
@pytest.mark.parametrize(
    'value',
    ['0', '-1', 'nan', 'inf', '-inf', '1e999', '', 'x', '1/0', '9' * 400 + '/1'],
)
def test_numbers_of_a_training(option, value, capsys, tmp_path):
    said(capsys, 2, 'train', option, value, '--out', tmp_path / 'net')
    assert not (tmp_path / 'net').exists()


def test_a_learning_rate_beyond_float32(capsys, tmp_path):
    for lr in ('1e38', '1e308'):
        assert 'learning rate' in said(
            capsys, 2, 'train', '--lr', lr, '--out', tmp_path / 'net'
        )
    assert not (tmp_path / 'net').exists()


@pytest.mark.parametrize(
    'command, option',
    [
        ('train', '--epochs'),
        ('train', '--batch-size'),
        ('study', '--epochs'),
        ('study', '--seeds'),
        ('study', '--attack-images'),
    ],
)
@pytest.mark.parametrize('value', ['0', '-3', 'nan', '1.5', '', 'inf', '1e3'])
def test_counts(command, option, value, capsys, tmp_path):
    said(capsys, 2, command, option, value, '--out', tmp_path / 'net')
    assert not (tmp_path / 'net').exists()


@pytest.mark.parametrize(
    'args',
    [
        ('attack', '--images', '0'),
        ('attack', '--images', '-5'),
        ('attack', '--images', 'nan'),
        ('attack', '--eps', 'nan'),
        ('attack', '--eps', '-0.1'),
        ('attack', '--eps', '2'),
        ('attack', '--eps', 'inf'),
        ('attack', '--eps', ''),
        ('attack', '--eps', 'small'),
        ('attack', '--attacks', ''),
        ('attack', '--seed', '1.5'),
        ('attack', '--attacks', 'cw_wb'),
        ('detect', '--fpr', '0'),
        ('detect', '--fpr', '1'),
        ('detect', '--fpr', 'nan'),
        ('detect', '--fpr', '-1'),
        ('detect', '--fpr', '1e-6'),
        ('detect', '--fpr', 'x'),
        ('detect', '--detector', ''),
    ],
)
def test_numbers_of_an_attack_and_a_detector(args, network, capsys, tmp_path):
    folder = copied(network, tmp_path / 'net')
    said(capsys, 2, args[0], folder, *args[1:])
    assert sorted(p.name for p in folder.iterdir()) == [
        'model.json',
        'model.safetensors',
    ]


@pytest.mark.parametrize(
    'settings',
    [
        dict(epochs=float('nan')),
        dict(epochs='3'),
        dict(epochs=2.0),
        dict(batch_size=float('nan')),
        dict(lr='0.1'),
        dict(lr=None, alpha=float('nan')),
        dict(seed=0.5),
        dict(adversarial='0.1'),
        dict(adversarial=float('nan')),
    ],
)
def test_settings_from_python(settings):
    with pytest.raises(InputError):
        recipes.training_config(**settings)


# Data that cannot be learned from


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('part', ['train_x', 'test_x'])
def test_images_that_are_not_finite(value, part):
    data = digits()
    x = getattr(data, part).float()
    x[3, 0, 2, 2] = value
    with pytest.raises(InputError, match='1 of the'):
        replace(data, **{part: x})
    setattr(data, part, x)
    with pytest.raises(InputError, match='1 of the'):
        data.check()
    with pytest.raises(InputError, match='1 of the'):
        r.train_classifier(data, digits_cnn(), 'xe', 1)


@pytest.mark.parametrize(
    'x, y',
    [
        (torch.zeros(0, 1, 8, 8), torch.zeros(0)),
        (torch.zeros(3, 1, 8, 8), torch.zeros(2).long()),
        (torch.zeros(3, 64), torch.zeros(3).long()),
        (torch.zeros(3, 1, 8, 8), torch.zeros(3)),
        (torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, -1])),
        (torch.zeros(3, 1, 8, 8), torch.tensor([0, 1, 2])),
        (torch.zeros(3, 1, 8, 8), torch.zeros(3, 2).long()),
        (torch.zeros(3, 1, 7, 8), torch.zeros(3).long()),
        (torch.zeros(3, 1, 0, 8), torch.zeros(3).long()),
    ],
)
def test_sets_that_do_not_fit(x, y):
    good = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    for parts in ((x, y, *good), (*good, x, y)):
        with pytest.raises(InputError):
            ImageData('mine', *parts, ['no', 'yes'])


def test_forms_of_a_set_that_are_taken():
    x, y = np.zeros((4, 1, 8, 8), np.uint8), np.array([[0], [1], [1], [0]], np.int32)
    data = ImageData('mine', x, y, x, y, ['no', 'yes'])
    assert (
        data.train_y.tolist() == [0, 1, 1, 0]
        and data.train_y.dtype == torch.int64
        and data.test_x.dtype == torch.uint8
    )


# JSON of another shape

STUDY = [
    'study',
    '--objectives',
    'xe,rce',
    '--attacks',
    'fgsm,jsma',
    '--eps',
    '0.1',
    '--seeds',
    '1',
    '--epochs',
    '2',
    '--attack-images',
    '20',
    '--device',
    'cpu',
    '--out',
]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp('finished') / 'out'
    config = r.StudyConfig.create(
        objectives=('xe', 'rce'),
        attacks=('fgsm', 'jsma'),
        eps=0.1,
        seeds=1,
        epochs=2,
        attack_images=20,
    )
    s.study(config, out, device='cpu', quiet=True)
    return out


@pytest.mark.parametrize(
    'name',
    [
        'study.json',
        'runs/xe-0/train.json',
        'runs/xe-0/fgsm.json',
        'runs/rce-0/jsma.json',
    ],
)
@pytest.mark.parametrize(
    'content',
    [
        '',
        '[]',
        'null',
        '{}',
        '3',
        '"text"',
        'true',
        '{"eps": []}',
        '{"config": null}',
        '[' * 100_000,
        '{"accuracy": 1}',
    ],
)
def test_files_of_a_study_of_another_shape(name, content, finished, capsys):
    path = finished / name
    was = path.read_text()
    path.write_text(content)
    said(capsys, 2, *STUDY, finished)
    path.write_text(was)


def test_every_edited_number_of_a_study_is_refused(finished, capsys):
    for name in ('train', 'fgsm', 'jsma'):
        path = finished / 'runs' / 'xe-0' / f'{name}.json'
        was = path.read_text()
        for way, old in leaves(json.loads(was)):
            if isinstance(old, (dict, list)):
                continue
            path.write_text(json.dumps(with_value(json.loads(was), way, 0.123)))
            with pytest.raises(InputError):
                r._load_part(path.parent, name)
        path.write_text(was)
    works(capsys, *STUDY, finished)


@pytest.mark.parametrize('name', ['model', 'density', 'clean', 'fgsm', 'jsma'])
def test_damaged_tensors_of_a_study(name, finished, capsys):
    path = finished / 'runs' / 'rce-0' / f'{name}.safetensors'
    was = path.read_bytes()
    lost = (
        finished / 'runs' / 'rce-0' / 'fgsm.json'
    )  # the part that reads network and density
    report = lost.read_text()
    for content in (b'', was[:-5], was[:-1] + bytes([was[-1] ^ 1])):
        path.write_bytes(content)
        if name in ('model', 'density'):
            lost.unlink(missing_ok=True)
        assert 'and run again' in said(capsys, 2, *STUDY, finished)
    path.write_bytes(was)
    lost.write_text(report)
    works(capsys, *STUDY, finished)


@pytest.fixture
def attacked(network, tmp_path, capsys):
    folder = copied(network, tmp_path / 'net')
    works(
        capsys,
        'attack',
        folder,
        '--attacks',
        'fgsm,bim,jsma',
        '--eps',
        '0.1',
        '--images',
        20,
        '--device',
        'cpu',
    )
    works(capsys, 'detect', folder, '--device', 'cpu')
    return folder


def test_files_of_an_attack_of_another_shape(attacked, capsys):
    path = attacked / 'attacks' / 'fgsm.json'
    was = path.read_text()
    for content in (
        '',
        '[]',
        'null',
        '{}',
        '3',
        was.replace('"clean"', '"clear"'),
        was.replace('"sizes"', '"size"'),
        json.dumps(dict(json.loads(was), sizes=[])),
        json.dumps(dict(json.loads(was), clean=None)),
        json.dumps(dict(json.loads(was), clean=0.999)),
        json.dumps(dict(json.loads(was), attack='pgd')),
    ):
        path.write_text(content)
        for command in ('detect', 'report'):
            assert 'fgsm' in said(capsys, 2, command, attacked)
    path.write_text(was)
    tensors = attacked / 'attacks' / 'fgsm.safetensors'
    good = tensors.read_bytes()
    for content in (
        b'',
        good[:100],
        good[:-1] + b'x',
        (attacked / 'attacks' / 'bim.safetensors').read_bytes(),
    ):
        tensors.write_bytes(content)
        for command in ('detect', 'report'):
            assert 'fgsm' in said(capsys, 2, command, attacked)
    tensors.write_bytes(good)
    works(capsys, 'report', attacked)


def test_detection_of_another_shape(attacked, capsys):
    path = attacked / 'detect.json'
    good = json.loads(path.read_text())
    for content in (
        [],
        None,
        {},
        3,
        dict(good, rows=3),
        dict(good, rows=[3]),
        dict(good, rows=[{}]),
        dict(good, fpr='x'),
        dict(good, threshold=None),
        dict(good, attacks=[]),
    ):
        path.write_text(json.dumps(content))
        assert 'detect.json' in said(capsys, 2, 'report', attacked)


def test_a_folder_where_a_file_belongs(attacked, capsys):
    (attacked / 'report.html').mkdir()
    assert 'report.html: Is a directory' in said(capsys, 1, 'report', attacked)
    (attacked / 'detect.json').unlink()
    (attacked / 'detect.json').mkdir()
    assert '/detect.json: Is a directory' in said(capsys, 1, 'detect', attacked)
    assert not list(attacked.glob('.*'))


# Who judges a detector, and who sets its threshold


def rows(x):
    return {v.numpy().tobytes() for v in x}


@pytest.mark.parametrize(
    'attacks',
    [
        [],
        [('fgsm', 450)],
        [('fgsm', 500)],
        [('fgsm', 60)],
        [('fgsm', 1)],
        [('fgsm', 449)],
        [('fgsm', 450), ('bim', 30)],
        [('fgsm', 200), ('bim', 300)],
        [('fgsm', 224), ('bim', 226), ('pgd', 2)],
    ],
)
def test_disjoint_halves(attacks, network, tmp_path, monkeypatch, capsys):
    folder = copied(network, tmp_path / 'net')
    for name, n in attacks:
        saved.attack_saved(folder, name, 0.15, images=n, device='cpu')
    seen, data = {}, digits()
    calibrate = RobustClassifier.calibrate
    monkeypatch.setattr(
        RobustClassifier,
        'calibrate',
        lambda self, x, fpr: (seen.update(x=x), calibrate(self, x, fpr))[1],
    )
    table = saved.detect_saved(folder, 'confidence', 0.05, device='cpu')
    setting = torch.tensor(
        [v.numpy().tobytes() in rows(seen['x']) for v in data.pixels(data.test_x)]
    )
    assert len(seen['x']) == 225 and table.images['normal', ''] == 225
    for name, _ in attacks:
        t = load_tensors(folder / 'attacks' / f'{name}.safetensors')
        judging = ~setting[t['index']]
        robust = saved.load_robust(folder / 'robust')[0]
        fooled = (
            judging
            & (t['predicted'] == t['labels'])
            & (t['0.15/predicted'] != t['labels'])
        )
        row = table.loc[name, '0.15']
        assert row.images == judging.sum() > 0 and row.fooled == fooled.sum()
        if not fooled.any():
            continue
        with torch.no_grad():
            before, after = (
                robust(v[fooled])[1].double().numpy()
                for v in (data.pixels(data.test_x[t['index']]), t['0.15/images'])
            )
        assert row.AUC == pytest.approx(
            100
            * roc_auc_score(
                np.r_[np.ones(len(before)), np.zeros(len(after))], np.r_[before, after]
            ),
            abs=1e-6,
        )


def test_the_defaults_give_numbers(network, tmp_path, capsys):
    folder = copied(network, tmp_path / 'net')
    works(
        capsys, 'attack', folder, '--attacks', 'fgsm,bim', '--device', 'cpu'
    )  # 500 images where there are 450
    printed = works(capsys, 'detect', folder, '--device', 'cpu').splitlines()
    attacked = [line for line in printed if '0.1' in line or '0.2' in line]
    assert len(attacked) == 4 and not any('–' in line for line in attacked)


def test_a_word_where_nothing_was_fooled(network, tmp_path, capsys):
    folder = copied(network, tmp_path / 'net')
    assert 'nothing fooled' in works(
        capsys, 'attack', folder, '--attacks', 'fgsm', '--eps', '0', '--device', 'cpu'
    )
    assert 'nothing fooled' in works(capsys, 'detect', folder, '--device', 'cpu')
    works(capsys, 'report', folder)
    assert (folder / 'report.html').read_text().count('nothing fooled') == 2


def test_a_white_box_attack_between_two_detections(
    network, tmp_path, capsys, monkeypatch
):
    folder = copied(network, tmp_path / 'net')
    assert 'run cobj detect first' in said(
        capsys, 2, 'attack', folder, '--attacks', 'fgsm,cw_wb'
    )
    assert not (folder / 'attacks').exists()
    works(capsys, 'detect', folder, '--device', 'cpu')
    short = saved.attack
    monkeypatch.setattr(
        saved,
        'attack',
        lambda *args, **settings: short(
            *args,
            **settings
            | (
                dict(steps=3, first_steps=3, binary_search_steps=1)
                if 'cw_wb' in args
                else {}
            ),
        ),
    )
    printed = works(
        capsys,
        'attack',
        folder,
        '--attacks',
        'cw_wb,fgsm',
        '--images',
        '12',
        '--device',
        'cpu',
    )
    assert 'cw_wb knew a detector' in printed and 'none of these' not in printed
    works(capsys, 'report', folder)
    assert (
        'changed after the detector was judged' in (folder / 'report.html').read_text()
    )
    assert 'cw_wb' in works(capsys, 'detect', folder, '--device', 'cpu')
    works(capsys, 'report', folder)
    assert 'changed after' not in (folder / 'report.html').read_text()


# Words about what was run

CASES = dict(
    one=(
        dict(objectives='xe', attacks='fgsm', seeds=1),
        [
            'There is no worst case: only fgsm ran',
            'of one network each (seed 0)',
            'fgsm ran in the L∞ norm',
            'cross-entropy',
        ],
        [
            'standard deviation',
            'GCE',
            'RCE&#x27;s',
            'L2',
            'jsma',
            'every attack',
            ' own',
        ],
    ),
    l0=(
        dict(objectives=('rce',), attacks=('jsma', 'jsma_pairs'), seeds=1),
        ['no attack ran at a given ε', 'jsma and jsma_pairs (L0)', 'logits negated'],
        [
            'L∞',
            'followed the loss',
            'XE',
            'Accuracy against ε',
            'every attack',
            'worst case at',
        ],
    ),
    mixed=(
        dict(
            objectives=('xe', 'gce'),
            attacks=('fgsm', 'bim', 'apgd_dlr', 'jsma'),
            eps=(0.05, 0.1),
            seeds=2,
        ),
        [
            'only if fgsm, bim and apgd_dlr failed on it; jsma, without an ε, is not in it',
            'apgd_dlr followed the loss dlr',
            'fgsm and bim followed the loss cross-entropy',
            'GCE has alpha 0.3333',
            'over 2 seeds (0 to 1)',
            'sizes ε = 0.05 and 0.1',
            '20 of them',
        ],
        ['RCE', 'COT', 'every attack', 'fgsm, bim, apgd_dlr and jsma failed'],
    ),
    pair=(
        dict(objectives='cot', attacks=('fgsm', 'jsma'), eps=0.1, seeds=1),
        [
            'There is no worst case: only fgsm ran at a given ε',
            'COT makes a second update',
        ],
        ['GCE', 'XE', 'worst case at', '± '],
    ),
)


def sentences(page):
    "A report without its pictures and without the table of attacks, which names papers."
    text = re.sub('base64,[^"]*', '', page.read_text(encoding='utf-8'))
    return re.sub('<h2>Attacks</h2>.*?</section>', '', text, flags=re.S)


@pytest.mark.parametrize('name', CASES)
def test_reports_say_what_was_run(name, tmp_path):
    settings, there, absent = CASES[name]
    config = r.StudyConfig.create(epochs=2, attack_images=20, **settings)
    runs, page = s.study(config, tmp_path / 'out', device='cpu', quiet=True)
    text, table = sentences(page), s.accuracy_table(runs)
    for word in there:
        assert word in text, word
    for word in absent:
        assert word not in text, word
    over = [a for a in config.attacks if a != 'jsma' and a != 'jsma_pairs']
    assert ('worst case' in table.index.get_level_values(0)) == (len(over) > 1)
    assert runs[0]['worst_case_over'] == (over if len(over) > 1 else [])
    if len(over) < 2:
        return
    y, index = digits().test_y, r.attacked_indices(config, digits())
    folder = tmp_path / 'out' / 'runs' / 'xe-0'
    for eps in ('0.05', '0.1'):  # image by image, in plain Python
        predicted = [
            load_tensors(folder / f'{a}.safetensors')[f'{eps}/predicted'].tolist()
            for a in over
        ]
        right = [
            all(p[i] == int(y[k]) for p in predicted)
            for i, k in enumerate(index.tolist())
        ]
        assert runs[0]['worst_case'][eps] == pytest.approx(sum(right) / len(right))


def test_missing_seeds_are_counted():
    run = dict(objective='xe', attacks=dict(fgsm=dict(eps={'0.1': dict(auc={})})))

    def runs(*values):
        return [
            dict(
                run,
                seed=i,
                attacks=dict(
                    fgsm=dict(eps={'0.1': dict(auc=dict.fromkeys(s.SCORES, v))})
                ),
            )
            for i, v in enumerate(values)
        ]

    nan = float('nan')
    for values, text in (
        ((0.8, 0.9, nan), '85.0 ± 7.1 (2 of 3 seeds)'),
        ((0.8, nan), '80.0 (1 of 2 seeds)'),
        ((nan, nan), 'nothing fooled'),
        ((0.8, 0.9), '85.0 ± 7.1'),
    ):
        assert (
            s.detection_auc_table(runs(*values)).loc[('fgsm', '0.1', 'K-density'), 'XE']
            == text
        )


def test_worst_cases_are_of_the_same_images(network, tmp_path):
    folder = copied(network, tmp_path / 'net')
    for name, n in (('fgsm', 40), ('bim', 40), ('pgd', 30), ('mim', 30)):
        saved.attack_saved(folder, name, 0.1, images=n, device='cpu')
    table = saved.attack_results(folder)
    assert {i for i in table.index if i[0].startswith('worst')} == {
        ('worst case of bim and fgsm', '0.1'),
        ('worst case of mim and pgd', '0.1'),
    }
    union = len(set(r.spread(450, 40).tolist()) | set(r.spread(450, 30).tolist()))
    assert table.images['clean', ''] == union
    words = ' '.join(saved.attack_words(folder))
    assert (
        'at ε = 0.1 over bim and fgsm; at ε = 0.1 over mim and pgd' in words
        and 'L2' not in words
    )
