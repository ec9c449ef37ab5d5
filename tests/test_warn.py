import ast
import inspect
import warnings
from pathlib import Path

import pytest
import torch

import fastai_swa
from fastai_swa import CheckpointCallback, Ensemble, SWACallback, update_bn
from fastai_swa.warn import warn

from .helpers import learner, net


def not_reached():
    learner().fit(1, cbs=SWACallback(swa_start=3))


def swa_lr_above_lr():
    learner().fit_swa(2, lr=0.01, swa_lr=0.1)


def statistics_that_are_not_finite():
    update_bn([torch.full((4, 6), float('nan'))], net())


def no_file_can_be_written():
    learn = learner()
    learn.dls.train.persistent_workers = True
    learn.fit(1, cbs=CheckpointCallback('warned.ckpt'))


def trained_on_what_is_scored():
    learn = learner()
    learn.fit(1)
    Ensemble([learn], learn).validate(0)


@pytest.mark.parametrize(
    'act, sentence',
    [
        (not_reached, 'swa_start=3'),
        (swa_lr_above_lr, 'is above lr'),
        (statistics_that_are_not_finite, 'not finite'),
        (no_file_can_be_written, 'persistent_workers'),
        (trained_on_what_is_scored, 'flatters'),
    ],
)
def test_a_warning_names_the_users_own_line(act, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=sentence) as said:
        act()
    lines, first = inspect.getsourcelines(act)
    for w in said:
        assert w.filename == __file__ and first < w.lineno < first + len(lines), f'{w.filename}:{w.lineno}: {w.message}'


def test_what_failed_beside_a_training_names_the_line_of_the_fit(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError('no memory')

    monkeypatch.setattr('fastai_swa.callback.validate_aside', fails)
    learn = learner()
    with pytest.warns(UserWarning, match='no memory') as said:
        learn.fit(2, cbs=SWACallback(swa_start=0))
    line = inspect.currentframe().f_lineno - 1
    assert {(w.filename, w.lineno) for w in said} == {(__file__, line)} and len(said) == 2


def test_the_line_is_the_innermost_that_is_no_librarys():
    def callers(frame):
        with pytest.warns(UserWarning) as said:
            exec(compile('warn("x")', '<between>', 'exec'), frame)
        return said[0].filename

    assert callers({'warn': warn, '__name__': 'mine'}) == '<between>'
    assert callers({'warn': warn, '__name__': 'fastai_of_mine'}) == '<between>'
    for name in ('fastai_swa.callback', 'fastai.learner', 'fastcore.basics', 'torch.utils._contextlib', 'contextlib'):
        assert callers({'warn': warn, '__name__': name}) == __file__


def test_where_all_is_a_librarys_the_outermost_line_is_named():
    "As in a thread of torch's."
    import threading

    space = {'warn': warn, '__name__': 'torch.thread'}
    exec(compile('def run(): warn("x")', '<thread>', 'exec'), space)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        thread = threading.Thread(target=space['run'])
        thread.start()
        thread.join()
    assert [str(w.message) for w in said] == ['x'] and said[0].filename == threading.__file__


def test_the_package_warns_in_this_way_alone():
    for path in Path(fastai_swa.__file__).parent.rglob('*.py'):
        calls = [
            n
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Attribute) and n.attr == 'warn' and getattr(n.value, 'id', None) == 'warnings'
        ]
        assert not calls or path.name == 'warn.py', path
