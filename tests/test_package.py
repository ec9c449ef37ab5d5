import ast
import inspect
import re
from pathlib import Path

import pytest

import fastai_swa

ROOT = Path(__file__).resolve().parents[1]
FLOORS = [
    {'checks', 'interrupts', 'version'},
    {'modules', 'files', 'processes', 'contents'},
    {'averaging', 'batchnorm', 'schedules', 'geometry', 'probabilities', 'weights', 'packing', 'replay'},
    {'vision', 'fitting', 'columns', 'surfaces', 'views', 'walk'},
    {'keeping', 'randomness', 'attributes'},
    {'state', 'aside'},
    {'batches', 'samples'},
    {'passes'},
    {'ensemble'},
    {'callback', 'checkpoint', 'snapshots'},
    {'weight_space'},
    {'landscape'},
    {'connectivity', 'plot'},
    {'learner'},
    {'experiments'},
    {'demo'},
    {'__main__', '__init__'},
]
SOURCES = sorted((ROOT / 'fastai_swa').rglob('*.py'))


def floor(name):
    return next(i for i, names in enumerate(FLOORS) if name in names)


def place(path):
    return path.relative_to(ROOT / 'fastai_swa').parts[0].removesuffix('.py')


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_floor_imports_only_from_floors_below_it(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and path.parent.name == 'fastai_swa':
            names = [node.module.split('.')[0]] if node.module else [a.name for a in node.names]
            for name in names:
                assert floor(name) < floor(place(path)), f'{path.name} imports {name}'


@pytest.mark.parametrize(
    'name', ['checks', 'interrupts', 'modules', 'files', 'processes', 'averaging', 'batchnorm', 'schedules']
)
def test_the_lowest_floors_are_plain_pytorch(name):
    for node in ast.walk(ast.parse((ROOT / 'fastai_swa' / f'{name}.py').read_text())):
        modules = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module or '']
            if isinstance(node, ast.ImportFrom)
            else []
        )
        assert not [m for m in modules if m.startswith('fast')]


def test_a_star_import_brings_the_public_names_and_nothing_else():
    space = {}
    exec('from fastai_swa import *', space)
    public = {
        'SWACallback',
        'SaveSWAModelCallback',
        'WeightAverage',
        'equal',
        'ema',
        'update_bn',
        'plot_swa',
        'CheckpointCallback',
        'SnapshotCallback',
        'Ensemble',
        'average_checkpoints',
        'rays',
        'line',
        'plane',
        'Curve',
        'Surface',
        'plot_width',
        'plot_line',
        'plot_plane',
        'plot_planes',
        'plot_paths',
    }
    assert set(space) - {'__builtins__'} == public == set(fastai_swa.__all__)


def test_all_that_is_public_says_what_it_does_and_which_errors_it_raises():
    for name in fastai_swa.__all__:
        doc = inspect.getdoc(getattr(fastai_swa, name))
        assert doc and (name == 'equal' or 'Raises' in doc), name


def test_signatures_are_the_contract():
    assert (
        list(inspect.signature(fastai_swa.SWACallback).parameters)
        == 'swa_start swa_model cycle_len swa_eval_freq bn_batches weight every name average'.split()
    )
    defaults = [p.default for p in inspect.signature(fastai_swa.SWACallback).parameters.values()]
    assert defaults == [0.75, None, 1, 1, None, fastai_swa.equal, None, 'swa', None]
    assert list(inspect.signature(fastai_swa.WeightAverage).parameters) == ['model', 'weight', 'swa_model']
    assert list(inspect.signature(fastai_swa.update_bn).parameters) == 'loader model device n_batches inputs'.split()
    from fastai.learner import Learner

    assert (
        list(inspect.signature(Learner.fit_swa).parameters)[1:]
        == 'n_epoch lr swa_lr swa_start cycle_len wd cbs swa_kwargs'.split()
    )


def test_the_readmes_python_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    assert len(blocks) == 12
    space = {}
    for block in blocks:
        exec(block, space)
    assert space['swa'].n_averaged == 1 and sorted(p.name for p in (tmp_path / 'models').iterdir()) == [
        'average.pth',
        'best.pth',
    ]
    assert space['fresh'].validate()[1] < 0.2


def test_the_version_is_in_the_changelog():
    assert f'## {fastai_swa.__version__}' in (ROOT / 'CHANGELOG.md').read_text()
