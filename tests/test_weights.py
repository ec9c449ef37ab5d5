"""The folder of an ensemble: what it may name, what is written to it, and when."""

import hashlib
import itertools
import json
import os
import shutil
import sys
import warnings

import pytest
import torch

from fastai_swa import CheckpointCallback, Ensemble, SnapshotCallback, average_checkpoints
from fastai_swa.files import InUse
from fastai_swa.solutions import gathered
from fastai_swa.weights import folder_lock, indexed_files, read_index, replace_files, write_index

from .helpers import At, learner, net, raising


def state(value):
    return {'weight': torch.full((3,), float(value))}


@pytest.fixture
def folder(tmp_path):
    "The folder of an ensemble of two, and one file beside it."
    torch.save(state(9), tmp_path / 'outside.pth')
    replace_files(tmp_path / 'ens', [state(1), state(2)], combine='mean')
    return tmp_path / 'ens'


def put_index(folder, **content):
    index = json.loads((folder / 'index.json').read_text())
    (folder / 'index.json').write_text(json.dumps({**index, **content}))


def values(folder):
    return [float(torch.load(file, weights_only=True)['weight'][0]) for file in gathered(folder).values()]


# names


@pytest.mark.parametrize(
    'name',
    ['../outside.pth', '/etc/passwd', 'sub/../member-01.pth', './member-01.pth', '..', '.', '', 'a\0', 'index.json']
    + ['..\\outside.pth', 'C:outside.pth', 'C:\\outside.pth', '\\\\host\\share'],
)
def test_a_name_that_is_no_file_of_the_folder_is_refused_by_all_that_read_it(folder, name):
    put_index(folder, files=[name, 'member-02.pth'])
    learn = learner()
    for read in read_index, gathered, lambda f: Ensemble(f, learn), lambda f: average_checkpoints(f, learn):
        with pytest.raises(ValueError, match='index.json names .* which is no file of its own folder'):
            read(folder)
    with pytest.raises(ValueError, match='no file of its own folder'):
        replace_files(folder, [state(3)])
    assert (folder.parent / 'outside.pth').exists()


def test_an_absolute_name_of_a_file_that_is_there_is_refused(folder):
    put_index(folder, files=[str(folder / 'member-01.pth'), 'member-02.pth'])
    with pytest.raises(ValueError, match='no file of its own folder'):
        gathered(folder)


def test_a_name_that_stands_twice_is_refused(folder):
    put_index(folder, files=['member-01.pth', 'member-01.pth'])
    with pytest.raises(ValueError, match="index.json names 'member-01.pth' twice"):
        gathered(folder)


# what the files hold


def swapped(folder):
    for a, b in ('member-01.pth', 'x'), ('member-02.pth', 'member-01.pth'), ('x', 'member-02.pth'):
        (folder / a).rename(folder / b)


def repeated(folder):
    shutil.copy(folder / 'member-01.pth', folder / 'member-02.pth')


def foreign(folder):
    shutil.copy(folder.parent / 'outside.pth', folder / 'member-02.pth')


def index_of_another(folder):
    replace_files(folder.parent / 'other', [state(3), state(4)])
    shutil.copy(folder.parent / 'other' / 'index.json', folder / 'index.json')


def other_order(folder):
    put_index(folder, files=['member-02.pth', 'member-01.pth'])


def another_hash(folder):
    index = read_index(folder)
    put_index(folder, sha256=[index['sha256'][0], '0' * 64])


@pytest.mark.parametrize('change', [swapped, repeated, foreign, index_of_another, other_order, another_hash])
def test_a_member_or_an_index_that_is_another_is_refused(folder, change):
    change(folder)
    with pytest.raises(ValueError, match=r'member-0\d.pth is damaged, or it is another file than index.json names'):
        gathered(folder)
    with pytest.raises(ValueError, match='another file than index.json names'):
        Ensemble(folder, learner())


def test_a_member_that_is_missing_is_named(folder):
    (folder / 'member-02.pth').unlink()
    with pytest.raises(FileNotFoundError, match='member-02.pth is missing'):
        gathered(folder)


def test_the_index_has_the_hash_of_each_file_and_reads_only_what_was_written(folder, monkeypatch):
    def expected(files):
        return [hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files]

    index = read_index(folder)
    assert index['sha256'] == expected(index['files']) and index['combine'] == 'mean'
    torch.save(state(3), folder / 'new.pth')
    read = []
    monkeypatch.setattr('fastai_swa.weights.sha256', lambda file: read.append(file.name) or 'f' * 64)
    write_index(folder, [*index['files'], 'new.pth'], unchanged=index['files'])
    assert read == ['new.pth'] and read_index(folder)['sha256'] == [*index['sha256'], 'f' * 64]
    (folder / 'index.json').unlink()
    write_index(folder, index['files'], unchanged=index['files'])
    assert read == ['new.pth', *index['files']]


def test_the_snapshots_of_a_fit_that_was_interrupted_stand_in_their_index_by_what_they_hold(tmp_path):
    def fit(cbs):
        return learner().fit_snapshots(3, 1, 0.1, tmp_path / 'a', cbs=[CheckpointCallback(tmp_path / 'x.ckpt'), *cbs])

    with pytest.raises(KeyboardInterrupt):
        fit([At('after_validate', 1, raising(KeyboardInterrupt()), training=False)])
    (tmp_path / 'a' / 'snapshot-02.pth').write_bytes(b'what the epoch will write again')
    fit([])
    index = read_index(tmp_path / 'a')
    assert len(indexed_files(tmp_path / 'a', index)) == len(index['sha256']) == 3
    swapped_ones = [tmp_path / 'a' / f'snapshot-0{i}.pth' for i in (1, 3)]
    one, other = (file.read_bytes() for file in swapped_ones)
    swapped_ones[0].write_bytes(other)
    swapped_ones[1].write_bytes(one)
    with pytest.raises(ValueError, match='snapshot-01.pth is damaged, or it is another file'):
        Ensemble(tmp_path / 'a', learner())


# folders of earlier versions


def without_hashes(folder):
    index = json.loads((folder / 'index.json').read_text())
    del index['sha256']
    (folder / 'index.json').write_text(json.dumps(index))


def test_a_folder_of_an_earlier_version_is_read_as_ever_and_saving_it_adds_the_hashes(tmp_path):
    learn, models = learner(), [net(), net()]
    ens = Ensemble(models, learn)
    ens.save(tmp_path)
    without_hashes(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = Ensemble(tmp_path, learn)
    assert torch.equal(again.get_preds()[0], ens.get_preds()[0])
    again.save(tmp_path)
    assert len(read_index(tmp_path)['sha256']) == 2


def test_of_weighted_members_of_an_earlier_version_it_is_said_that_their_order_cannot_be_checked(tmp_path):
    learn = learner()
    ens = Ensemble([net(), net()], learn)
    ens.stack()
    ens.save(tmp_path)
    without_hashes(tmp_path)
    with pytest.warns(UserWarning, match='those that stack.. weighed, in their order, cannot be checked') as said:
        Ensemble(tmp_path, learn)
    assert said[0].filename == __file__


# the index


@pytest.mark.parametrize(
    'content',
    [
        {'files': None},
        {'files': 'member-01.pth'},
        {'files': [1, 2]},
        {'files': [['member-01.pth'], 'member-02.pth']},
        {'sha256': []},
        {'sha256': None},
        {'sha256': [True, False]},
        {'sha256': 'abc'},
        {'epochs': [True, 2]},
        {'epochs': 3},
        {'epochs': [1.5, 2]},
        {'format': 'fastai_swa ensemble 2'},
        {'stacking': {'weights': [[float('nan'), 1]], 'bias': [0]}},
        {'stacking': {'weights': [[float('inf'), 1]], 'bias': [0]}},
        {'stacking': {'weights': [[1, True]], 'bias': [0]}},
        {'stacking': {'weights': [[1, 2, 3]], 'bias': [0]}},
        {'stacking': {'weights': [[1, 2]], 'bias': [0, 1]}},
        {'stacking': {'weights': [], 'bias': []}},
        {'stacking': {'weights': [1, 2], 'bias': [0, 0]}},
        {'stacking': {'weights': [[1, 2, 3, 4]], 'bias': [0]}},
        {'stacking': [1]},
        {'combine': 'stack'},
        {'combine': 'median'},
        {'combine': {}},
        {'activation': 'relu'},
        {'activation': [1]},
        {'other': float('nan')},
    ],
)
def test_an_index_of_another_content_is_one_sentence(folder, content):
    put_index(folder, **content)
    with pytest.raises(ValueError, match='index.json is damaged, or it is no index of an ensemble'):
        Ensemble(folder, learner())


@pytest.mark.parametrize(
    'text',
    ['', '3', 'null', '[]', '{}', '{', '[' * 100_000, '{"a":' * 100_000, '{"format": "fastai_swa ensemble 1"}']
    + ['{"format": "fastai_swa ensemble 1", "files": [], "other": 1' + '0' * 10_000 + '}', '\ud800'],
)
def test_an_index_that_is_none_is_one_sentence_and_nothing_is_written_over_it(folder, text):
    data = text.encode(errors='surrogatepass')
    (folder / 'index.json').write_bytes(data)
    held = {f.name: f.read_bytes() for f in folder.iterdir()}
    for read in gathered, lambda f: replace_files(f, [state(3)]):
        with pytest.raises(ValueError, match='index.json is damaged, or it is no index of an ensemble'):
            read(folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == held


def test_an_infinity_that_only_a_number_too_long_makes_is_refused(folder):
    text = (folder / 'index.json').read_text().rstrip('}') + ', "stacking": {"weights": [[1e999, 1]], "bias": [0]}}'
    (folder / 'index.json').write_text(text)
    with pytest.raises(ValueError, match='index.json is damaged'):
        gathered(folder)


def test_a_folder_in_the_place_of_the_index_is_one_sentence(tmp_path):
    (tmp_path / 'index.json').mkdir()
    with pytest.raises(ValueError, match='index.json is damaged, or it is no index'):
        gathered(tmp_path)


# what is not finite


def broken():
    model = net()
    with torch.no_grad():
        model[4].bias[1] = torch.nan
    return model


def test_a_member_with_a_nan_is_neither_saved_nor_used_from_a_file_and_the_folder_stays(tmp_path):
    learn = learner()
    ens = Ensemble([net(), net()], learn)
    ens.save(tmp_path / 'a')
    with pytest.raises(ValueError, match="member 1 has a NaN in '4.bias': it cannot predict"):
        Ensemble([net(), broken()], learn).save(tmp_path / 'a')
    assert torch.equal(Ensemble(tmp_path / 'a', learn).get_preds()[0], ens.get_preds()[0])
    torch.save(broken().state_dict(), tmp_path / 'b.pth')
    for given, name in (tmp_path / 'b.pth', 'b.pth'), (broken().state_dict(), 'member 0'):
        with pytest.raises(ValueError, match=f"{name} has a NaN in '4.bias'"):
            Ensemble([given], learn).get_preds()


def test_weights_of_stacking_that_are_not_finite_are_not_written(tmp_path):
    learn = learner()
    ens = Ensemble([net(), net()], learn)
    ens.save(tmp_path)
    held = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    ens.stack()
    ens.stacking['bias'][0] = float('nan')
    with pytest.raises(ValueError, match='its index would hold numbers that are not finite'):
        ens.save(tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == held


# when it is written


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('n_before', [0, 2, 3])
def test_a_save_that_is_killed_at_any_line_leaves_the_old_models_or_the_new_never_some_of_each(tmp_path, n_before):
    "And one that follows it is as if nothing had happened."
    folder = tmp_path / 'ens'
    old, new = [state(i) for i in range(n_before)], [state(10 + i) for i in range(3)]
    found = set()

    def killed_at(n):
        shutil.rmtree(folder, ignore_errors=True)
        if old:
            replace_files(folder, old)
            replace_files(folder, old)  # as it is from the second time on
        lines = itertools.count()

        def trace(frame, event, arg):
            if not frame.f_code.co_filename.endswith('fastai_swa/weights.py'):
                return None
            if event == 'line' and next(lines) == n:
                os._exit(7)
            return trace

        child = os.fork()
        if not child:
            sys.settrace(trace)
            replace_files(folder, new)
            os._exit(0)
        return os.waitpid(child, 0)[1] != 0

    n = 0
    while killed_at(n):
        if (folder / 'index.json').exists():
            found.add(tuple(values(folder)))
        replace_files(folder, new)
        assert values(folder) == [10, 11, 12], n
        n += 2 if n > 40 else 1
    whole = {(10.0, 11.0, 12.0)} | ({tuple(map(float, range(n_before)))} if old else set())
    assert found == whole and n > 40


def test_files_get_names_that_no_file_in_the_folder_had(tmp_path):
    "So that a reader that looks late misses a file, and never takes that of another ensemble."
    seen = set()
    for i in range(5):
        files = replace_files(tmp_path, [state(i), state(i)])[1]
        assert not seen & set(files) and values(tmp_path) == [i, i]
        seen |= set(files)
        assert sorted(f.name for f in tmp_path.iterdir()) == ['index.json', *sorted(files)]


def test_a_file_that_lies_there_is_not_overwritten(tmp_path):
    (tmp_path / 'member-02.pth').write_text("a user's")
    replace_files(tmp_path, [state(1), state(2)])
    replace_files(tmp_path, [state(3), state(4)])
    assert (tmp_path / 'member-02.pth').read_text() == "a user's" and values(tmp_path) == [3, 4]


def test_where_another_run_is_writing_nothing_is_saved(folder):
    held = {f.name: f.read_bytes() for f in folder.iterdir()}
    lock = folder_lock(folder)
    with pytest.raises(InUse, match='another run is writing to .*ens: wait for it, or save to another folder'):
        replace_files(folder, [state(3)])
    lock.release()
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == held
    replace_files(folder, [state(3)])
    assert values(folder) == [3]


def test_an_ensemble_is_not_saved_over_the_snapshots_of_a_fit_under_way(tmp_path):
    refused = []

    def save(cb):
        with pytest.raises(InUse, match='another run is writing to'):
            Ensemble([net()], cb.learn).save(tmp_path / 'a')
        refused.append(cb.epoch)

    learn = learner()
    learn.fit(2, cbs=[SnapshotCallback(0, folder=tmp_path / 'a'), At('before_batch', 1, save, batch=0, training=True)])
    assert refused == [1] and list(gathered(tmp_path / 'a')) == ['epoch 0', 'epoch 1']
