"""The `cobj` command as a person meets it: a process of its own, bad input, and interruptions."""

import gzip
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from complement_objectives.attacks import ATTACKS
from complement_objectives.cli import cli, main
from complement_objectives.training import OBJECTIVES

COBJ = Path(sys.executable).with_name('cobj')
SHORT = [
    'study',
    '--objectives',
    'xe,rce',
    '--attacks',
    'fgsm,bim',
    '--eps',
    '0.1',
    '--seeds',
    '1',
    '--epochs',
    '8',
    '--device',
    'cpu',
]


def refused(capsys, *args):
    "What the command says when it refuses: exactly one line, status 2, nothing on standard output."
    with pytest.raises(SystemExit) as exit:
        main(list(args))
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == ''
    assert err.startswith('cobj: error: ') and err.count('\n') == 1
    return err


@pytest.mark.parametrize(
    'args, said',
    [
        (['--dataset', 'cifra10'], 'did you mean cifar10'),
        (['--objectives', 'xe,cto'], 'did you mean cot'),
        (['--objectives', ','], 'number of objectives'),
        (['--attacks', 'fgms'], 'did you mean fgsm'),
        (['--attacks', ''], 'number of attacks'),
        (['--eps', '-0.01'], 'must lie in [0, 1]'),
        (['--eps', '8'], 'must lie in [0, 1]'),
        (['--eps', 'nan'], 'must lie in [0, 1]'),
        (['--eps', '0.1;0.2'], 'not a list of numbers'),
        (['--alpha', '0'], 'alpha must be finite and greater than 0'),
        (['--alpha', '-1/3'], 'alpha must be finite and greater than 0'),
        (['--alpha', 'third'], 'is not a number'),
        (
            ['--alpha', '1/2', '--objectives', 'xe,cot'],
            'alpha is no parameter of xe (which has none) or cot (which has optimizer)',
        ),
        (['--attacks', 'pgd,apgd_ce_l2', '--eps', '1.5'], 'needs L2 radii'),
        (['--seeds', '0'], 'number of seeds'),
        (['--seeds', 'two'], 'not a valid integer'),
        (['--epochs', '0'], 'number of epochs'),
        (['--device', 'tpu'], 'valid names are auto, cpu, cuda'),
        (['--sedes', '2'], '--seeds'),
    ],
)
def test_bad_options(args, said, capsys, tmp_path):
    out = tmp_path / 'out'
    assert said in refused(capsys, 'study', '--out', str(out), *args)
    assert not out.exists()


@pytest.mark.parametrize(
    'args, said',
    [
        (['--dataset', 'cifra10'], 'did you mean cifar10'),
        (['--model', 'lenet'], 'did you mean lenet5'),
        (['--objective', 'xe,cot'], "unknown objective 'xe,cot'"),
        (['--preset', 'he2016'], 'did you mean he2016_cifar'),
        (['--alpha', '0'], 'alpha must be finite and greater than 0'),
        (['--alpha', '0.5'], 'alpha is no parameter of xe (which has none)'),
        (['--objective', 'cot', '--alpha', '1/2'], 'of cot (which has optimizer)'),
        (
            ['--objective', 'gce', '--alpha', '1/2', '--parameter', 'alpha=1'],
            'alpha is given twice',
        ),
        (['--epochs', '0'], 'epochs must be a whole number of at least 1'),
        (['--batch-size', '0'], 'batch size must be'),
        (['--lr', 'nan'], 'learning rate must be a number above 0'),
        (['--adversarial', '8'], 'must be in (0, 1]'),
        (['--precision', 'fp8'], 'unknown precision'),
        (['--seed', '-1'], 'seed must be a whole number of at least 0'),
        (['--device', 'tpu'], 'valid names are auto, cpu, cuda'),
        (['--parameter', 'lam'], 'is not NAME=VALUE'),
        (['--objective', 'smoothed', '--parameter', 'lamb=0.2'], 'lam'),
        (['--objective', 'smoothed'], 'lam'),
        (['--objective', 'smoothed', '--parameter', 'lam=-1'], 'lam must be finite'),
        (['--objective', 'hcot'], 'groups'),
        (['--objective', 'hcot', '--parameter', 'groups=²,1'], 'whole numbers'),
        (['--parameter', 'lam=1', '--parameter', 'lam=2'], 'lam is given twice'),
        (['--objective', 'smoothed', '--lam', '0.2'], '--parameter lam=VALUE'),
        (['--objective', 'smoothed', '--lam=0.2'], '--parameter lam=VALUE'),
        (['--sede', '1'], '--seed'),
    ],
)
def test_bad_training_options(args, said, capsys, tmp_path):
    assert said in refused(capsys, 'train', *args, '--out', str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def parameters_of(out, *args):
    "Objective and parameters of a network that the command trained for an epoch."
    with pytest.raises(SystemExit) as exit:
        main(['train', *args, '--epochs', '1', '--device', 'cpu', '--out', str(out)])
    assert not exit.value.code
    training = json.loads((out / 'model.json').read_text())['training']
    return training['objective'], training['parameters']


def test_parameters_of_an_objective(tmp_path):
    args = ('--objective', 'smoothed', '--parameter', 'lam=1/5')
    assert parameters_of(tmp_path / 'smoothed', *args) == ('smoothed', {'lam': 0.2})


def test_groups_are_whole_numbers(tmp_path):
    groups = [0] * 5 + [1] * 5
    given = f'groups={",".join(map(str, groups))}'
    args = ('--objective', 'hcot', '--parameter', given)
    assert parameters_of(tmp_path / 'hcot', *args) == ('hcot', {'groups': groups})


@pytest.mark.parametrize(
    'args, name',
    [
        (['--objective', 'cot'], 'digits-digits_cnn-cot-0'),
        (
            ['--objective', 'smoothed', '--parameter', 'lam=1/5', '--seed', '2'],
            'digits-digits_cnn-smoothed-lam=0.2-2',
        ),
    ],
)
def test_place_of_a_network_without_out(args, name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(['train', *args, '--epochs', '1', '--device', 'cpu'])
    assert not exit.value.code
    assert [o.name for o in (tmp_path / 'models').iterdir()] == [name]
    said = capsys.readouterr().out
    assert 'after 1 epoch (' in said and f'models/{name}' in said


def test_a_row_whose_name_is_a_path(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(OBJECTIVES, 'a/b', OBJECTIVES['xe'])
    monkeypatch.setitem(ATTACKS, 'a/b', ATTACKS['fgsm'])
    for args in (
        ['study', '--objectives', 'a/b'],
        ['study', '--attacks', 'a/b'],
        ['train', '--objective', 'a/b'],
    ):
        assert 'cannot be the name of a file' in refused(capsys, *args)
    assert not list(tmp_path.iterdir())


def test_ce_is_another_name_for_xe(tmp_path):
    assert parameters_of(tmp_path / 'ce', '--objective', 'ce') == ('xe', {})


def test_bad_command(capsys):
    assert 'studdy' in refused(capsys, 'studdy')


def test_missing_device(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert 'not available here' in refused(
        capsys, 'study', '--device', 'cuda', '--out', str(tmp_path / 'out')
    )
    assert not (tmp_path / 'out').exists()


def test_bad_folders(capsys, tmp_path):
    (tmp_path / 'file').write_text('mine')
    assert 'is a file' in refused(capsys, 'study', '--out', str(tmp_path / 'file'))
    assert 'cannot write' in refused(
        capsys, 'study', '--out', str(tmp_path / 'file' / 'below')
    )
    assert 'holds other files' in refused(capsys, 'study', '--out', str(tmp_path))
    assert 'cannot write' in refused(capsys, 'study', '--out', '/proc/study')
    assert [o.name for o in tmp_path.iterdir()] == ['file'] and (
        tmp_path / 'file'
    ).read_text() == 'mine'


@pytest.mark.parametrize(
    'content, said',
    [
        (b'', 'd41d8cd98f00b204e9800998ecf8427e'),
        (gzip.compress(bytes(100)), 'f68b3c2dcbeaaa9fbdd348bbdeb94873'),
        (None, 'is missing'),
    ],
)
def test_damaged_data(content, said, capsys, tmp_path):
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    if content is not None:
        (raw / 'train-images-idx3-ubyte.gz').write_bytes(content)
    message = refused(
        capsys,
        'study',
        '--dataset',
        'mnist',
        '--root',
        str(tmp_path),
        '--out',
        str(tmp_path / 'out'),
    )
    assert said in message and 'train-images-idx3-ubyte.gz' in message
    assert not (tmp_path / 'out').exists()


def test_damaged_cifar(capsys, tmp_path):
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    (folder / 'data_batch_1').write_bytes(b'not a pickle')
    assert 'c99cafc152244af753f735de768cd75f' in refused(
        capsys,
        'study',
        '--dataset',
        'cifar10',
        '--root',
        str(tmp_path),
        '--out',
        str(tmp_path / 'out'),
    )


def listens():
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs inherit a deaf ear


def run(out, command=SHORT):
    return subprocess.Popen(
        [COBJ, *command, '--out', out],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listens,
    )


def numbers(out):
    "Every number of a study that does not depend on the clock."

    def strip(o):
        if isinstance(o, dict):
            return {k: strip(v) for k, v in o.items() if 'seconds' not in k}
        return o

    return {
        path.name: strip(json.loads(path.read_text()))
        for path in sorted((out / 'runs').glob('*.json'))
    }


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp('undisturbed') / 'out'
    process = run(out)
    printed, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return out, printed


def test_study_leaves_everything(undisturbed):
    out, printed = undisturbed
    assert sorted(p.name for p in (out / 'figures').iterdir()) == [
        'accuracy.png',
        'hidden.png',
        'roc.png',
        'scores.png',
    ]
    assert sorted(p.name for p in (out / 'tables').iterdir()) == [
        'accuracy.csv',
        'detection.csv',
    ]
    assert sorted(numbers(out)) == ['rce-0.json', 'xe-0.json']
    assert (
        'worst case' in printed and 'K-density' in printed and 'report.html' in printed
    )
    assert not [p for p in out.rglob('.*')]


@pytest.mark.parametrize(
    'how, status', [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_interrupted_study_continues(how, status, undisturbed, tmp_path):
    out = tmp_path / 'out'
    process = run(out)
    deadline = time.time() + 200
    while (
        not (out / 'runs' / 'xe-0' / 'train.json').exists() and time.time() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == status
    if how == signal.SIGINT:
        assert (
            said.strip() == 'cobj: interrupted: the same command continues where it was'
        )
    assert not (out / 'report.html').exists()
    trained = (out / 'runs' / 'xe-0' / 'model.safetensors').stat().st_mtime_ns
    process = run(out)
    assert process.communicate(timeout=300) and process.returncode == 0
    assert (out / 'runs' / 'xe-0' / 'model.safetensors').stat().st_mtime_ns == trained
    assert numbers(out) == numbers(undisturbed[0])


@pytest.mark.parametrize(
    'error',
    [
        RuntimeError('cannot release un-acquired lock'),
        AssertionError('not owned'),
        SystemError('no result'),
    ],
)
def test_an_interruption_that_a_library_turned_into_another_error(
    error, capsys, monkeypatch
):
    def interrupted(*args):
        try:
            raise KeyboardInterrupt
        finally:
            raise error

    monkeypatch.setattr('complement_objectives.study.saved.report_saved', interrupted)
    with pytest.raises(SystemExit) as exit:
        main(['report', 'net'])
    assert (
        exit.value.code == 130
        and capsys.readouterr().err
        == 'cobj: interrupted: the same command continues where it was\n'
    )


def test_an_interruption_in_the_lock_of_the_bar(capsys, monkeypatch):
    from tqdm import tqdm

    def acquire(*args, **kwargs):
        raise KeyboardInterrupt

    def said(*args):
        with monkeypatch.context() as m:
            m.setattr(type(tqdm.get_lock()), 'acquire', acquire)
            tqdm.write('one line')

    monkeypatch.setattr('complement_objectives.study.saved.report_saved', said)
    with pytest.raises(SystemExit) as exit:
        main(['report', 'net'])
    assert exit.value.code == 130 and 'interrupted' in capsys.readouterr().err


def test_a_fault_keeps_its_traceback(monkeypatch):
    def fault(*args):
        raise TypeError('a fault of ours')

    monkeypatch.setattr('complement_objectives.study.saved.report_saved', fault)
    with pytest.raises(TypeError, match='of ours'):
        main(['report', 'net'])


def header(
    folder,
):  # of a trained network, without the clock and the checksum that covers it
    clocked = 'seconds', 'header_sha256'
    return {
        k: v
        for k, v in json.loads((folder / 'model.json').read_text()).items()
        if k not in clocked
    }


@pytest.mark.parametrize(
    'how, status', [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_interrupted_training_continues(how, status, tmp_path):
    command = [
        'train',
        '--objective',
        'cot',
        '--epochs',
        '25',
        '--preset',
        'he2016_cifar',
        '--lr',
        '0.02',
        '--augment',
        '--device',
        'cpu',
    ]
    whole, broken = run(tmp_path / 'whole', command), run(tmp_path / 'broken', command)
    deadline = time.time() + 200
    while (
        not (tmp_path / 'broken' / 'checkpoint.safetensors').exists()
        and time.time() < deadline
    ):
        time.sleep(0.02)
    broken.send_signal(how)
    broken.communicate(timeout=60)
    assert broken.returncode == status
    assert [p.name for p in (tmp_path / 'broken').iterdir() if p.name[0] != '.'] == [
        'checkpoint.safetensors'
    ]
    broken = run(tmp_path / 'broken', command)
    for process in (whole, broken):
        assert process.communicate(timeout=300) and process.returncode == 0
    assert header(tmp_path / 'broken') == header(tmp_path / 'whole')
    assert len(header(tmp_path / 'whole')['history']) == 25
    assert sorted(p.name for p in (tmp_path / 'whole').iterdir()) == [
        'model.json',
        'model.safetensors',
    ]


@pytest.mark.parametrize('command', ['attack', 'detect', 'report'])
def test_folder_without_a_network(command, capsys, tmp_path):
    assert 'holds no trained network' in refused(capsys, command, str(tmp_path))
    (tmp_path / 'model.json').write_text('{"format": ')
    assert 'not a whole JSON file' in refused(capsys, command, str(tmp_path))


def test_damaged_network(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit:
        main(
            [
                'train',
                '--epochs',
                '1',
                '--device',
                'cpu',
                '--out',
                str(tmp_path / 'net'),
            ]
        )
    assert not exit.value.code
    capsys.readouterr()
    weights = tmp_path / 'net' / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-3])
    for command in ('attack', 'detect', 'report'):
        assert 'truncated' in refused(capsys, command, str(tmp_path / 'net'))
    assert sorted(p.name for p in (tmp_path / 'net').iterdir()) == [
        'model.json',
        'model.safetensors',
    ]


def test_other_configuration_is_refused(undisturbed, capsys):
    message = refused(capsys, *SHORT, '--out', str(undisturbed[0]), '--seeds', '2')
    assert 'belongs to another study (seeds' in message


def test_run_as_a_module():
    command = [sys.executable, '-m', 'complement_objectives.cli', 'studdy']
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == 2 and 'studdy' in process.stderr


@pytest.mark.parametrize('command', [None, *cli.commands])
def test_help_is_complete(command):
    args = [command] if command else []
    page = subprocess.run(
        [COBJ, *args, '--help'], capture_output=True, text=True, timeout=60
    )
    assert page.returncode == 0 and ' '.join(['cobj', *args]) in page.stdout
    params = cli.commands[command].params if command else []
    for option in (param for param in params if isinstance(param, click.Option)):
        assert option.opts[0] in page.stdout and option.help
