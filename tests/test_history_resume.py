"""`WeightHistory` with a checkpoint, when it is killed, on a full disk and in several processes."""

import copy
import json
import multiprocessing
import os
import random
import signal
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch

from fastai_swa import CheckpointCallback, SWACallback, WeightHistory, ema
from fastai_swa import history_fit as history_file
from fastai_swa.files import read, write
from fastai_swa.history_fit import writing_seconds
from fastai_swa.weightings import Cuts

from .helpers import At, assert_same, learner, net, raising
from .reference.twins import AllSteps
from .test_distributed import context, run, two_processes
from .test_history import assert_is, kept

# children of a fresh process: one that has trained may have threads
SERVER = multiprocessing.get_context('forkserver')
WHICH = {'last': 0.3}, {'epochs': (0, 12)}, {'ema': 0.9}, {'power': 0.2}


class Killed(Exception):
    pass


def kill(epoch, batch=3):
    return At('before_batch', epoch, raising(Killed()), batch=batch, training=True)


def fit(folder, *cbs, n_epoch=12, n_segments=6, every=2, **kwargs):
    "A fit with a checkpoint that makes thrice as many segments as it keeps, and so merges them; its history."
    wanted = Cuts.wanted
    learn = learner()
    history = WeightHistory(folder / 'h', n_segments=n_segments, **kwargs)
    with mock.patch.object(Cuts, 'wanted', lambda self, left: 3 * wanted(self, left)):
        learn.fit(n_epoch, cbs=[history, CheckpointCallback(folder / 'run.ckpt', every=every), *cbs])
    return learn, history


def averages(history):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that some are missed
        return {f'{which}.{k}': v for which in WHICH for k, v in history.average(**which).items()}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The averages of the fit that nothing happens to."
    return averages(fit(tmp_path_factory.mktemp('whole'))[1])


def is_tidy(folder: Path):
    "Is in the folder what its index names, and nothing else?"
    segments = json.loads((folder / 'index.json').read_text())['segments']
    return {f.name for f in folder.iterdir()} == {s['file'] for s in segments} | {'index.json', 'last.pth'}


# killed


def test_killed_again_and_again_it_ends_as_the_fit_that_was_not(tmp_path, whole):
    for epoch, batch in [(4, 1), (5, 4), (7, 0), (8, 5), (10, 2), (11, 5)]:
        with pytest.raises(Killed):
            fit(tmp_path, kill(epoch, batch), every=3)
    _, history = fit(tmp_path, every=3)
    assert_same(averages(history), whole)
    assert is_tidy(tmp_path / 'h')


def test_a_file_that_the_checkpoint_names_stays_until_a_later_one_is_written(tmp_path):
    def look(cb):
        saved = torch.load(tmp_path / 'run.ckpt', weights_only=True)
        state = next(s for name, s in saved['state']['states'].items() if 'WeightHistory' in name)
        there = {f.name for f in (tmp_path / 'h').iterdir()}
        named = {s['file'] for s in state['fit']['stretches']['segments'] if s['file']}
        seen.append(named <= there and bool(there - named - {'index.json', 'last.pth'}))
        assert named <= there

    seen = []
    looks = [At('before_epoch', epoch, look) for epoch in range(1, 12)]
    for cb in looks:
        cb.order = 1000
    _, history = fit(tmp_path, *looks, every=4)
    assert len(seen) == 11 and any(seen)
    assert is_tidy(tmp_path / 'h')  # once the fit is over and its checkpoint gone


def killed(folder, after):
    "A child that kills itself at the `after`-th renaming or removal of a file."

    def deadly(f):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kwargs)

        return call

    left = after
    torch.set_num_threads(1)
    os.replace, os.unlink, Path.unlink = deadly(os.replace), deadly(os.unlink), deadly(Path.unlink)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(folder)
    (folder / 'n').write_text(str(after - left))
    os._exit(0)


def test_killed_at_any_moment_of_writing_it_goes_on_bitwise(tmp_path, whole):
    def start(folder, after):
        folder.mkdir()
        child = SERVER.Process(target=killed, args=(folder, after))
        child.start()
        child.join(100)
        return child.exitcode

    assert start(tmp_path / 'all', 10**6) == 0
    n = int((tmp_path / 'all' / 'n').read_text())
    rng = random.Random(0)
    for i in [*rng.sample(range(1, n), 5), n - 1, n]:
        folder = tmp_path / str(i)
        assert start(folder, i) == -signal.SIGKILL
        if (folder / 'run.ckpt').exists():
            _, history = fit(folder)
        else:  # killed before its first checkpoint, or after the last one was removed
            history = WeightHistory.load(folder / 'h', learner()) if (folder / 'h' / 'last.pth').exists() else None
        if history is not None:
            assert_same(averages(history), whole)
        assert not list((folder / 'h').glob('*.tmp'))


# what a file may say


def state_in(saved):
    return next(s for name, s in saved['state']['states'].items() if 'WeightHistory' in name)


def test_neither_settings_nor_places_are_in_the_files(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, kill(5))
    state = state_in(torch.load(tmp_path / 'run.ckpt', weights_only=True))
    assert not {'every', 'n_segments', 'n_epoch', 'folder'} & (state['fit']['index'].keys() | state['fit'].keys())
    for file in [tmp_path / 'run.ckpt', *tmp_path.glob('run.ckpt.*'), *(tmp_path / 'h').iterdir()]:
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_a_fit_whose_folders_were_moved_goes_on(tmp_path, whole):
    (tmp_path / 'a').mkdir()
    with pytest.raises(Killed):
        fit(tmp_path / 'a', kill(5))
    (tmp_path / 'a').rename(tmp_path / 'b')
    assert_same(averages(fit(tmp_path / 'b')[1]), whole)


@pytest.mark.parametrize('kwargs', [{'n_segments': 8}, {'every': 3}, {'dtype': torch.float16}])
def test_other_settings_are_refused(tmp_path, kwargs):
    def start(*cbs, **kwargs):
        history = WeightHistory(tmp_path / 'h', **{'n_segments': 6, **kwargs})
        learner().fit(6, cbs=[history, CheckpointCallback(tmp_path / 'run.ckpt'), *cbs])

    with pytest.raises(Killed):
        start(kill(3))
    with pytest.raises(ValueError, match='run.ckpt'):
        start(**kwargs)


BROKEN = {
    'a count in words': lambda s: s['fit'].update(place='here'),
    'a count below zero': lambda s: s['fit'].update(n_batches_before=-1),
    'fits in words': lambda s: s.update(n_fits='two'),
    'no segments': lambda s: s['fit'].pop('stretches'),
    'segments of words': lambda s: s['fit']['stretches'].update(segments=['a', 'b']),
    'a name that leads elsewhere': lambda s: s['fit']['stretches']['segments'][0].update(file='../run.ckpt'),
    'a removal elsewhere': lambda s: s['fit']['stretches'].update(superseded=['../run.ckpt']),
    'a hash in words': lambda s: s['fit']['stretches']['segments'][0].update(sha256='none'),
    'epochs of words': lambda s: s['fit']['index'].update(epochs=['a']),
    'an id in words': lambda s: s['fit']['index'].update(id='mine'),
    'an open stretch of words': lambda s: s['fit'].update(open=['a', 'b']),
    'a choice that is none': lambda s: s.update(chosen={'lst': 0.3}),
    'layers that are none': lambda s: s['fit']['index'].update(bn=[1]),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_contents_are_one_sentence_that_names_the_file_and_nothing_is_touched(tmp_path, name):
    with pytest.raises(Killed):
        fit(tmp_path, kill(5))
    saved = read(tmp_path / 'run.ckpt', 'checkpoint', 3)
    BROKEN[name](state_in(saved))
    write(tmp_path / 'run.ckpt', 'checkpoint', saved.pop('version'), {k: v for k, v in saved.items() if k != 'format'})
    before = {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()}
    with pytest.raises(ValueError, match='run.ckpt') as e:
        fit(tmp_path)
    assert len(str(e.value)) < 600
    assert {f: f.read_bytes() for f in tmp_path.rglob('*') if f.is_file()} == before


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(Killed):
        fit(tmp_path, kill(5))
    saved = state_in(torch.load(tmp_path / 'run.ckpt', weights_only=True))
    name = saved['fit']['stretches']['segments'][0]['file']
    (tmp_path / 'h' / name).unlink()
    with pytest.raises(ValueError, match=f'{name} is missing: this fit wrote it before it was interrupted'):
        fit(tmp_path)


# when means are written


def listing(tmp_path, **kwargs):
    "How many files of means there are at the end of each batch of the first epoch, and after it."
    counts = []

    def look(cb):
        counts.append(len(list(tmp_path.glob('segment-*.pth'))))

    looks = [At('after_batch', 0, look, training=True), At('after_epoch', 0, look)]
    looks[0].order = looks[1].order = 1000
    kept(3, 12, cbs=looks, folder=tmp_path, **kwargs)
    return counts


def test_a_cut_that_would_cost_beside_a_step_waits_for_the_end_of_the_epoch(tmp_path):
    *within, after = listing(tmp_path)
    assert len(within) == 6 and not any(within) and after > 0


def test_where_it_costs_little_or_much_is_waiting_it_is_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(history_file, '_LITTLE', float('inf'))
    *within, after = listing(tmp_path / 'a')
    assert any(within[:-1])
    monkeypatch.setattr(history_file, '_LITTLE', 0)
    monkeypatch.setattr(history_file, '_PENDING', 0)
    *within, after = listing(tmp_path / 'b')
    assert any(within[:-1])


def test_how_long_writing_takes_is_guessed_slow_until_it_is_known():
    assert writing_seconds(2, 10**8, None) == 3
    assert writing_seconds(2, 10**8, 0.01) == 0.02


# beside other averages


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_several_averages_and_a_history_are_each_what_they_are_alone_in_any_order_and_with_a_checkpoint(
    order, tmp_path
):
    kinds = (
        lambda: SWACallback(3),
        lambda: SWACallback(0, name='ema', every=1, weight=ema(0.9, warmup=True)),
        lambda: WeightHistory(n_segments=6),
    )

    def weights(cb):
        if isinstance(cb, WeightHistory):
            return {k: v for k, v in averages(cb).items() if 'running' not in k and 'num_batches' not in k}
        return {k: v.clone() for k, v in cb.swa_model.state_dict().items()}

    def alone(make):
        cb, learn = make(), learner()
        learn.fit(12, cbs=cb)
        return weights(cb)

    def together(*cbs):
        found = {i: kinds[i]() for i in order}
        learn = learner()
        learn.fit(12, cbs=[*found.values(), CheckpointCallback(tmp_path / 'run.ckpt'), *cbs])
        return learn, found

    with pytest.raises(Killed):
        together(kill(5))
    learn, found = together()
    for i, cb in found.items():
        assert_same(weights(cb), alone(kinds[i]))


# several processes


def in_two(rank, folder, stop=None):
    learn = two_processes(lambda: net(dropout=0))
    history, steps = WeightHistory(folder / 'h', n_segments=6), AllSteps()
    cbs = [history, steps, CheckpointCallback(folder / 'run.ckpt')]
    if stop is not None:
        cbs.append(At('after_batch', stop, raising(Killed()), batch=1, training=True))
    try:
        with context(learn):
            learn.fit(8, cbs=cbs)
    except Killed:
        return {}
    with context(learn), history.averaged(last=0.5) as inside:
        inside.validate()
    mean = {k.removeprefix('module.'): v for k, v in steps.mean(0, 8).items()} if stop is None and rank == 0 else {}
    return {'last': history.average(last=0.5), 'all': history.average(last=1), 'mean': mean, 'dir': repr(history)}


def test_of_two_processes_the_first_writes_and_both_can_use_it(tmp_path):
    first, second = run(tmp_path / 'a', in_two, tmp_path / 'a')
    assert_is(first['all'], first['mean'])
    for name in ('last', 'all'):
        assert_same(first[name], second[name])
    assert is_tidy(tmp_path / 'a' / 'h')
    (tmp_path / 'b').mkdir()
    run(tmp_path / 'b', in_two, tmp_path / 'b', 5)
    for resumed in run(tmp_path / 'b', in_two, tmp_path / 'b'):
        assert_same(resumed['last'], first['last'])
    assert is_tidy(tmp_path / 'b' / 'h')


# the learner is copied


def test_a_copied_history_is_of_the_copied_learner():
    learn = learner()
    history = WeightHistory(n_segments=6)
    learn.add_cb(history)
    learn.fit(4)
    want = history.average(last=0.5)
    twin = copy.deepcopy(learn)
    assert_same(twin.weight_history.average(last=0.5), want)
    twin.weight_history.apply(last=0.5)
    assert_same(learn.weight_history.average(last=0.5), want)
    assert not all(map(torch.equal, learn.model.parameters(), twin.model.parameters()))
    twin.fit(2)
    assert len(twin.weight_history._kept.index.epochs) == 2 and len(history._kept.index.epochs) == 4
    del learn
    assert copy.deepcopy(history).n_segments == 6
