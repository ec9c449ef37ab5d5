import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastai_swa.__main__ import main
from fastai_swa.demo import summary
from fastai_swa.vision import digits, digits_net, image_folder


@pytest.fixture
def folder(tmp_path):
    "An image folder of two classes, one darker than the other, as train and test."
    rng = np.random.RandomState(0)
    for part, n in (('train', 10), ('test', 4)):
        for i, name in enumerate(('dark', 'light')):
            (tmp_path / 'images' / part / name).mkdir(parents=True)
            for k in range(n):
                Image.fromarray((rng.rand(20, 16, 3) * 120 + 120 * i).astype('uint8')).save(
                    tmp_path / 'images' / part / name / f'{k}.png'
                )
    return tmp_path / 'images'


def run(*args, cwd):
    "The command line in a process of its own, as a user has it: exit status, output, errors."
    res = subprocess.run(
        [sys.executable, '-m', 'fastai_swa', *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1]), 'OMP_NUM_THREADS': '1'},
    )
    return res.returncode, res.stdout, res.stderr


def test_the_demo_shows_the_table_prints_what_it_found_and_writes_the_figure(tmp_path):
    status, out, err = run('demo', '--epochs', 4, '--seeds', 2, cwd=tmp_path)
    assert status == 0, err
    tables = {}
    for row in out.splitlines():  # each under the line that says which run it is
        if named := re.fullmatch(r'(SWA|SGD|one-cycle), seed 0:', row):
            tables[named[1]] = []
        elif tables and re.match(r'epoch|\d+ +\d', row):
            tables[list(tables)[-1]].append(row.split())
    assert list(tables) == ['SWA', 'SGD', 'one-cycle'] and all(
        [row[0] for row in table] == ['epoch', *'0123'] for table in tables.values()
    )
    header, *rows = tables['SWA']
    assert header == 'epoch train_loss valid_loss error_rate swa_valid_loss swa_error_rate time'.split()
    assert [row[4] == 'nan' for row in rows] == [True, True, False, False] and len(tables['SGD'][0]) == 5
    ends = {name: float(re.search(f'seed 0: .* ([0-9.]+) % with {name}', out)[1]) for name in ('SGD', 'one-cycle')}
    assert ends == {name: pytest.approx(100 * float(tables[name][-1][3]), abs=0.006) for name in ends}
    assert 'mean +- std of 2 seeds' in out and '95 % confidence interval' in out and '(2-3)' in out
    assert '█' not in out
    assert Image.open(tmp_path / 'swa-demo.png').size[0] > 1000


def test_the_demo_repeats_itself_seed_by_seed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from fastai_swa.demo import demo

    a, b = demo(epochs=2, seeds=2), demo(epochs=2, seeds=1)
    assert np.array_equal(a[:1], b)


def test_the_demo_trains_on_a_folder_of_images_and_saves_the_average(folder, tmp_path):
    status, out, err = run(
        'demo', '--data', folder, '--arch', 'resnet18', '--epochs', 2, '--bs', 8, '--out', 'mine', cwd=tmp_path
    )
    assert status == 0, err
    assert '20 training and 8 validation images' in out and 'one seed cannot tell' in out
    from fastai.vision.learner import create_vision_model
    from torchvision.models import resnet18

    create_vision_model(resnet18, 2, pretrained=False).load_state_dict(
        torch.load(tmp_path / 'mine.pth', weights_only=True), strict=True
    )
    assert (tmp_path / 'mine.png').exists()


def spoil_empty(f):
    [p.unlink() for p in f.rglob('*.png')]


def spoil_one_class(f):
    [p.unlink() for p in f.rglob('light/*')]
    [p.rmdir() for p in f.rglob('light')]


def spoil_broken(f):
    (f / 'train' / 'dark' / '3.png').write_bytes(b'no image')


def spoil_truncated(f):
    p = f / 'test' / 'light' / '1.png'
    p.write_bytes(p.read_bytes()[:200])


def spoil_unknown_class(f):
    (f / 'test' / 'light').rename(f / 'test' / 'other')


def spoil_loose(f):
    (f / 'train' / 'dark' / '3.png').rename(f / 'train' / '3.png')


def spoil_no_valid(f):
    (f / 'test').rename(f / 'testing')


def spoil_all(f):
    (f / 'train').rename(f / 'training')


@pytest.mark.parametrize(
    'spoil, sentence',
    [
        (spoil_empty, 'train contains no images'),
        (spoil_one_class, "has only the class 'dark'"),
        (spoil_broken, r'1 of 28 files cannot be read as images, the first is .*dark/3\.png'),
        (spoil_truncated, r'1 of 28 files cannot be read as images, the first is .*light/1\.png'),
        (spoil_unknown_class, "has the class 'other', which .*train lacks"),
        (spoil_loose, r'3\.png lies outside a class folder'),
        (spoil_no_valid, r'must contain the folders train and valid \(or test\)'),
        (spoil_all, 'must contain the folders train'),
    ],
)
def test_an_image_folder_that_cannot_be_used_is_one_clear_sentence(folder, spoil, sentence, capsys):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as e:
        image_folder(folder)
    assert '\n' not in str(e.value)
    with pytest.raises(SystemExit) as e:
        main(['demo', '--data', str(folder)])
    error = capsys.readouterr().err
    assert e.value.code == 2 and 'Traceback' not in error and re.search(sentence, error.splitlines()[-1])


@pytest.mark.parametrize(
    'args, sentence',
    [
        (['--epochs', '0'], "expected a positive whole number, not '0'"),
        (['--swa-start', 'x'], "expected an epoch or a share"),
        (
            ['--swa-start', '5', '--epochs', '2'],
            'swa_start=5 is never reached: the epochs are counted from 0, and 2 end',
        ),
        (['--swa-start', '2', '--epochs', '2'], 'swa_start=2 is never reached'),
        (['--swa-start', '-1'], 'swa_start must be an epoch counted from 0, not -1'),
        (['--swa-lr', '-1'], 'swa_lr must be positive'),
        (['--label-noise', '2'], 'label_noise must be a share from 0 to 1, not 2.0'),
        (['--data', '/nowhere'], '/nowhere must contain'),
        (['--data', '.', '--arch', 'resnet19'], "arch must be one of torchvision's classifiers"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_clear_sentence(args, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(['demo', *args])
    assert e.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


def test_the_summary_is_honest():
    better = summary(np.array([[3.0, 3.1, 2.0, 1.8], [3.2, 3.3, 2.3, 2.5], [2.9, 3.3, 2.0, 2.2]]), 5)
    assert (
        'SWA is 0.93 points better than SGD (seed by seed; 95 % confidence interval 0.79 to 1.08; better in 3 of 3)\n'
        in better
    )
    of_one_cycle = (
        'SWA is 0.07 points better than one-cycle (seed by seed; 95 % confidence interval -0.51 to 0.64; better in 2 '
        'of 3); that may be chance'
    )
    assert of_one_cycle in better
    assert re.search(r'average of 5 epochs +2\.10 \+- 0\.17', better) and re.search(
        r'one-cycle, at its end +2\.17 \+- 0\.35', better
    )
    worse = summary(np.array([[3.0, 3.0, 3.2, 3.2]]), 5)
    assert (
        'SWA is 0.20 points worse than SGD; one seed cannot tell' in worse
        and 'SWA is level with one-cycle; one seed cannot tell' in worse
    )


def test_a_run_that_diverges_is_said_to_have_and_the_picture_is_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    from fastai_swa.demo import demo

    demo(epochs=2, seeds=1, lr=1e18)
    assert (
        'cannot be compared with SGD: one of them diverged' in capsys.readouterr().out
        and (tmp_path / 'swa-demo.png').exists()
    )


def test_digits_are_the_data_set_split_without_overlap():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    dls = digits(n_train=1000, seed=3)
    assert len(dls.train_ds) == 1000 and len(dls.valid_ds) == 797 and dls.c == 10
    items = [*dls.train_ds.items, *dls.valid_ds.items]
    assert sorted(items) == list(range(1797))
    x, y = dls.valid_ds[5]
    i = dls.valid_ds.items[5]
    torch.testing.assert_close(torch.as_tensor(x.numpy()), torch.tensor(bunch.images[i][None] / 16).float())
    assert int(y) == bunch.target[i]
    assert len(list(dls.train)) == 32 and digits(n_train=1000, seed=3).train_ds.items == dls.train_ds.items
    for bad in (0, 1797):
        with pytest.raises(ValueError, match='n_train must be between 1 and 1796'):
            digits(n_train=bad)


@pytest.mark.parametrize('share, n_train', [(0.0, 1000), (0.2, 1000), (0.333, 100), (1.0, 50)])
def test_label_noise_is_of_that_share_of_the_training_labels_and_of_no_other(share, n_train):
    clean, noisy, again = (
        digits(n_train=n_train),
        digits(n_train=n_train, label_noise=share),
        digits(n_train=n_train, label_noise=share),
    )

    def labels(dls, part):
        return torch.tensor([int(getattr(dls, part)[i][1]) for i in range(len(getattr(dls, part)))])

    assert (
        torch.equal(labels(clean, 'valid_ds'), labels(noisy, 'valid_ds'))
        and clean.train_ds.items == noisy.train_ds.items
    )
    changed = labels(clean, 'train_ds') != labels(noisy, 'train_ds')
    drawn = int(share * n_train)
    assert not changed[drawn:].any() and torch.equal(labels(noisy, 'train_ds'), labels(again, 'train_ds'))
    assert abs(int(changed.sum()) - 0.9 * drawn) <= 4 * (0.09 * drawn) ** 0.5  # one in ten is drawn as it was


@pytest.mark.parametrize('share', [-0.1, 1.1, float('nan')])
def test_a_share_of_label_noise_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match='label_noise must be a share from 0 to 1, not'):
        digits(label_noise=share)


def test_the_digits_network_is_as_documented():
    model = digits_net()
    assert sum(p.numel() for p in model.parameters()) == 24_058 and model(torch.randn(5, 1, 8, 8)).shape == (5, 10)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 3
