import ast
import configparser
import inspect
import re
from pathlib import Path

import pytest

import fastai_swa
from fastai_swa import landscape

from .core import CORE

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'fastai_swa'
FLOORS = [
    {'checks', 'interrupts', 'processes', 'version', 'warn'},
    {'modules', 'files', 'schedules', 'columns', 'journal', 'contents', 'weightings', 'mixing'},
    {'weight_formats'},
    {'arguments', 'fit_history', 'packing', 'probabilities', 'weights', 'replay', 'views', 'vision', 'histories'},
    {'averaging', 'batchnorm', 'walk', 'fitting', 'members', 'outcome', 'plot', 'stretches'},
    {'attributes', 'checkpoint_files', 'keeping', 'kept_fit', 'randomness', 'solutions', 'unaveraged'},
    {'state', 'aside'},
    {'batches', 'names', 'samples'},
    {'passes', 'fit_average', 'fit_progress'},
    {'one_model', 'preflight', 'choosing'},
    {'soups'},
    {'soups'},
    {'ensemble'},
    {'callback', 'checkpoint', 'snapshots', 'history_fit', 'history_folder'},
    {'history', 'branches'},
    {'fine_tune_soup'},
    {'landscape', 'saving'},
    {'learner'},
    {'experiments'},
    {'demo'},
    {'__main__', '__init__'},
]
# within a folder, which is one place above
FLOORS_WITHIN = {
    'averaging': [
        {'weight', 'tensors', 'kernels', 'following'},
        {'lending'},
        {'links'},
        {'average'},
        {'__init__'},
    ],
    'landscape': [{'geometry'}, {'surfaces'}, {'space', 'figures'}, {'measure'}, {'curve', 'wise_ft'}, {'__init__'}],
    'experiments': [
        {'imagenet', 'progress', 'scores', 'shifts', 'store', 'tables', 'tasks'},
        {'machine', 'recipes', 'transfer_tasks'},
        {'plan'},
        {'pool', 'recipe_learner', 'record', 'rows', 'transfers'},
        {'choose_averages', 'compare_ensembles', 'report_trainings', 'surface_record', 'train', 'transfer_record'},
        {'measure_surfaces', 'measure_transfers', 'report_averages', 'report_ensembles', 'report_surfaces'},
        {'listing', 'report_transfers'},
        {'jobs', 'report'},
        {'run'},
        {'__init__'},
    ],
}
SOURCES = sorted(PACKAGE.rglob('*.py'))


def floor(name, floors=FLOORS):
    return next(i for i, names in enumerate(floors) if name in names)


def place(path) -> tuple:
    "Of a file of the package: its name, or its folder and its name."
    return path.relative_to(PACKAGE).with_suffix('').parts


def imported_places(path) -> list[tuple]:
    "The places that `path` imports from, relative as all imports within the package are."
    folder = place(path)[:-1]
    places = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder[: len(folder) + 1 - node.level]
            names = [node.module] if node.module else [a.name for a in node.names]
            places += [(*base, *name.split('.')) for name in names]
    return places


each_source = pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.relative_to(ROOT)))


@each_source
def test_each_floor_imports_only_from_floors_below_it(path):
    own = place(path)[0]
    for name, *_ in imported_places(path):
        is_within_its_folder = name == own and path.parent != PACKAGE
        assert is_within_its_folder or floor(name) < floor(own), f'{path.name} imports {name}'


@pytest.mark.parametrize('folder', FLOORS_WITHIN)
def test_each_floor_within_a_folder_imports_only_from_floors_below_it(folder):
    floors = FLOORS_WITHIN[folder]
    paths = sorted((PACKAGE / folder).glob('*.py'))
    assert {path.stem for path in paths} == set.union(*floors)
    for path in paths:
        for other, *rest in imported_places(path):
            if other == folder:
                assert floor(rest[0], floors) < floor(path.stem, floors), f'{path.name} imports {rest[0]}'


@each_source
def test_the_package_imports_itself_by_relative_imports_alone(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        assert not [name for name in names if name.split('.')[0] == 'fastai_swa']


@pytest.mark.parametrize(
    'name',
    [
        'checks',
        'interrupts',
        'modules',
        'files',
        'processes',
        'warn',
        'weights',
        'weight_formats',
        'averaging',
        'batchnorm',
        'schedules',
    ],
)
def test_the_lowest_floors_are_plain_pytorch(name):
    paths = [path for path in SOURCES if place(path)[0] == name]
    assert paths
    for node in [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]:
        modules = []
        if isinstance(node, ast.Import):
            modules = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or '']
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
        'power_ema',
        'WeightHistory',
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


def test_the_landscape_gives_its_public_names_itself_too():
    for name in landscape.__all__:
        assert getattr(landscape, name) is getattr(fastai_swa, name)
    assert {'rays', 'line', 'plane', 'Curve', 'Surface'} < set(landscape.__all__)


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
    history = inspect.signature(fastai_swa.WeightHistory).parameters
    assert list(history) == 'folder n_segments every overwrite dtype'.split()
    assert [p.default for p in history.values()] == [None, 32, 1, False, None]
    choose = list(inspect.signature(fastai_swa.WeightHistory.choose).parameters.values())[1:]
    assert {p.name: p.default for p in choose} == {
        'by': 'valid_loss',
        'dl': None,
        'bn_batches': 20,
        'comp': None,
        'ends': True,
    }
    assert list(inspect.signature(fastai_swa.WeightHistory.load).parameters) == ['folder', 'learn']
    assert list(inspect.signature(fastai_swa.ema).parameters) == ['decay', 'warmup']
    assert list(inspect.signature(fastai_swa.power_ema).parameters) == ['width']
    assert list(inspect.signature(fastai_swa.update_bn).parameters) == 'loader model device n_batches inputs'.split()
    from fastai.learner import Learner

    assert (
        list(inspect.signature(Learner.fit_swa).parameters)[1:]
        == 'n_epoch lr swa_lr swa_start cycle_len wd cbs swa_kwargs'.split()
    )


def test_the_readmes_python_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)
    assert len(blocks) == 1
    space = {}
    for block in blocks:
        exec(block, space)
    assert space['swa'].n_averaged == 3 and len(space['preds']) == len(space['learn'].dls.valid_ds)


def test_the_version_is_in_the_changelog():
    assert f'## {fastai_swa.__version__}' in (ROOT / 'CHANGELOG.md').read_text()


def test_the_lower_bounds_are_the_versions_tested():
    setup = configparser.ConfigParser()
    setup.read(ROOT / 'setup.cfg')
    bounds = dict(line.split('>=') for line in setup['options']['install_requires'].split())
    lines = (ROOT / 'constraints-lowest.txt').read_text().splitlines()
    tested = dict(line.split('==') for line in lines if not line.startswith('#'))
    assert bounds.items() <= tested.items()


def test_the_core_set_is_there():
    for files in CORE.values():
        for file, names in files.items():
            functions = re.findall(r'^def (test_\w+)', (ROOT / 'tests' / f'{file}.py').read_text(), re.M)
            assert functions and set(names or ()) <= set(functions), file
