"""The command line, but for what its commands do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastai_swa import __version__
from fastai_swa.__main__ import main
from fastai_swa.experiments.listing import listing
from fastai_swa.experiments.recipes import LANDSCAPES, RECIPES
from fastai_swa.experiments.transfers import TRANSFERS

ROOT = Path(__file__).resolve().parents[1]
HEAVY = 'fastai', 'fastcore', 'torch', 'torchvision', 'matplotlib', 'numpy', 'scipy', 'pandas', 'sklearn', 'PIL'


def modules_after(code, *args):
    "Names of the modules that are loaded in a process of its own when `code` has run."
    code = f'{code}\nimport sys\nprint("\\n" + " ".join(sys.modules))'
    res = subprocess.run([sys.executable, *args, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    return set(res.stdout.splitlines()[-1].split())


def loaded_by_command(*args):
    "What the command line imports until it ends, by Python's own account of its imports."
    res = subprocess.run(
        [sys.executable, '-X', 'importtime', '-m', 'fastai_swa', *args], cwd=ROOT, capture_output=True, text=True
    )
    names = {line.rsplit('|', 1)[-1].strip() for line in res.stderr.splitlines() if line.startswith('import time:')}
    return res, names


@pytest.mark.parametrize('args', [['--help'], ['demo', '--help'], ['reproduce', '--help'], ['--version'], ['nothing']])
def test_help_version_and_mistakes_import_nothing_heavy(args):
    res, loaded = loaded_by_command(*args)
    assert res.returncode == (2 if args == ['nothing'] else 0)
    assert 'fastai_swa.version' in loaded
    heavy = {name for name in loaded if name.split('.')[0] in HEAVY}
    assert not heavy and {n for n in loaded if n.startswith('fastai_swa.')} <= {
        'fastai_swa.version',
        'fastai_swa.__main__',
    }


def test_the_import_brings_neither_experiments_nor_vision_nor_other_packages_than_fastais():
    learner = modules_after('import fastai.learner')
    own = modules_after('import fastai_swa')
    new = own - learner
    assert 'fastai_swa.callback' in own
    of_ours = {name for name in new if name.startswith('fastai_swa.')}
    assert not {name for name in of_ours if name.split('.')[1] in ('vision', 'experiments', 'demo')}
    others = {name for name in new if name.split('.')[0] not in ('fastai_swa', 'fastai')}
    assert not {name for name in others if not name.startswith('matplotlib.')} and len(others) < 3, others
    assert not {name for name in new if name.startswith('fastai.vision') or name.startswith('fastai.text')}


def test_a_package_that_is_run_as_a_command_of_another_name_has_all_names(tmp_path):
    "Only `python -m fastai_swa` goes without them."
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / '__init__.py').write_text('from fastai_swa import SWACallback\n')
    (tmp_path / 'mine' / '__main__.py').write_text('import fastai_swa\nprint(fastai_swa.SWACallback.__name__)\n')
    env = {'PYTHONPATH': f'{ROOT}:{tmp_path}', 'PATH': ''}
    res = subprocess.run([sys.executable, '-m', 'mine'], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert res.stdout == 'SWACallback\n', res.stderr


def said(capsys, *args):
    with pytest.raises(SystemExit) as e:
        main(list(args))
    return e.value.code, capsys.readouterr()


@pytest.mark.parametrize('command', ['demo', 'reproduce', 'report'])
def test_defaults_are_said_once_and_only_where_there_are_some(command, capsys):
    code, out = said(capsys, command, '--help')
    text = ' '.join(out.out.split())
    assert code == 0 and '(default: None)' not in text and '(default: False)' not in text
    assert not re.search(r'\) \(default', text)


def test_the_version_is_printed(capsys):
    assert said(capsys, '--version') == (0, (f'fastai_swa {__version__}\n', ''))


@pytest.mark.parametrize(
    'name, near', [('vgg-cifar10', 'vgg16-cifar10'), ('small-cifar', 'small-cifar10'), ('width-digit', 'width-digits')]
)
def test_a_wrong_recipe_gets_near_names_and_the_way_to_all(name, near, capsys):
    code, out = said(capsys, 'reproduce', name)
    sentence = out.err.splitlines()[-1]
    assert code == 2 and f'no recipe of the name {name!r}; did you mean ' in sentence and near in sentence
    assert '--list' in sentence and len(sentence) < 250
    assert 'did you mean' not in said(capsys, 'reproduce', 'qqqq')[1].err


def test_a_missing_recipe_is_one_sentence(capsys):
    code, out = said(capsys, 'reproduce')
    assert code == 2 and 'name is missing' in out.err.splitlines()[-1]


def test_the_list_has_all_recipes_with_sizes_and_the_times_of_those_that_were_run(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out = said(capsys, 'reproduce', '--list')
    lines = {line.split()[0]: line for line in out.out.splitlines() if line}
    assert code == 0 and {*RECIPES, *TRANSFERS, *LANDSCAPES} <= lines.keys()
    model = RECIPES['small-cifar100'].network(100)
    assert f'{sum(p.numel() for p in model.parameters()):,}' in lines['small-cifar100']
    assert re.search(r' 5,000 +334  \d+ min \(CPU', lines['small-cifar100'])


@pytest.mark.skipif(sys.platform == 'win32', reason='pipes are other ones there')
def test_a_reader_that_has_seen_enough_is_no_mistake():
    command = [sys.executable, '-W', 'ignore', '-m', 'fastai_swa', 'reproduce', '--list']
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b'' and process.wait() == 1


def test_the_list_needs_no_results(tmp_path):
    assert re.search(r'small-cifar100 +320,548 +5,000 +334  -\n', listing(tmp_path))
