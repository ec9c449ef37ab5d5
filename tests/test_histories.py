"""What only grows, in a file beside a checkpoint: written once, read whole, and refused if it is another one."""

import json
import math
import random

import numpy as np
import pytest
import torch

from fastai_swa import histories
from fastai_swa.histories import TAG, Histories, joined
from fastai_swa.packing import Packer, unpack


def a_value(rng):
    return rng.choice(
        [
            0.1 * rng.random(),
            float('nan'),
            -0.0,
            float('inf'),
            rng.randrange(10**20),
            True,
            None,
            'ein Wort "x"\n',
            torch.tensor(rng.random()),
            torch.tensor(rng.random(), dtype=torch.bfloat16),
            np.float32(rng.random()),
            [1, 2.5, [torch.arange(3), 'a']],
            {'a': (1, 2)},
            torch.zeros(0, 2),
            1 + 2j,
            torch.Size([2, 3]),
        ]
    )


def some_values(rng, n):
    "A list of one kind, as most histories are, or of all kinds."
    kind = rng.choice(['floats', 'scalars', 'numbers', 'ints', 'any'])
    return {
        'floats': lambda: [rng.random() for _ in range(n)],
        'scalars': lambda: [torch.tensor(rng.random()) for _ in range(n)],
        'numbers': lambda: [np.float64(rng.random()) for _ in range(n)],
        'ints': lambda: [rng.randrange(-5, 5) for _ in range(n)],
        'any': lambda: [a_value(rng) for _ in range(n)],
    }[kind]()


def same(a, b):
    "Bitwise, and of the same types."
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and repr(a) == repr(b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    return repr(a) == repr(b)


def checkpoint(it, lists):
    "What a checkpoint holds of `lists`: their tags, and what it names of the file."
    it.begin()
    tags = {name: it.cut(name, values, Packer()) for name, values in lists.items()}
    return tags, it.write()


def read(file, saved):
    tags, named = saved
    it = Histories(file)
    return it, {name: unpack(packed) for name, packed in joined(tags, it.read(named)).items()}


@pytest.mark.parametrize('seed', range(20))
def test_what_every_checkpoint_of_a_growing_fit_names_is_read_as_it_was_whenever_it_is_killed(tmp_path, seed):
    "The oracle is a deep copy of the lists at each checkpoint; the fit is killed and goes on again and again."
    rng, file = random.Random(seed), tmp_path / 'steps'
    it, lists, saved, was = Histories(file), {'a': [], 'b': []}, None, None
    is_resumed = False  # as yet without a checkpoint of its own: its lists are those that were read
    for _ in range(25):
        for values in lists.values():
            values += some_values(rng, rng.randrange(4))
        if rng.random() < 0.1 and not is_resumed:
            lists['a'] = some_values(rng, rng.randrange(6))  # begun anew
        if rng.random() < 0.1:
            lists.setdefault('c', [])
        after = checkpoint(it, lists)
        is_resumed = False
        if rng.random() < 0.3:  # killed before the checkpoint was replaced
            if saved is None:
                it, lists = Histories(file), {'a': [], 'b': []}
                continue
        else:
            saved, was = after, {name: list(values) for name, values in lists.items()}
            if rng.random() < 0.6:
                continue
        it, lists = read(file, saved)
        is_resumed = True
        assert lists.keys() == was.keys() and all(same(lists[k], was[k]) for k in was)


def test_a_checkpoint_writes_what_is_new_and_nothing_twice(tmp_path):
    it, values = Histories(tmp_path / 'steps'), [0.5 * i for i in range(100_000)]
    checkpoint(it, {'lrs': values})
    size = (tmp_path / 'steps').stat().st_size
    assert 8 * len(values) < size < 11 * len(values)
    checkpoint(it, {'lrs': values})
    assert (tmp_path / 'steps').stat().st_size == size
    packed = []
    values += [1.0] * 100
    it.begin()
    it.cut('lrs', values, lambda new, what: packed.append(len(new)) or list(new))
    it.write()
    assert packed == [100] and (tmp_path / 'steps').stat().st_size - size < 1200


def test_a_resumed_file_goes_on_where_the_checkpoint_ends(tmp_path):
    file = tmp_path / 'steps'
    it, values = Histories(file), [1.0, 2.0]
    saved = checkpoint(it, {'lrs': values})
    checkpoint(it, {'lrs': [1.0, 2.0, 3.0]})  # of a run that was killed
    size = saved[1]['bytes']
    again, lists = read(file, saved)
    later = checkpoint(again, {'lrs': lists['lrs'] + [7.0, 8.0]})
    assert read(file, later)[1] == {'lrs': [1.0, 2.0, 7.0, 8.0]}
    assert b'3.0' not in file.read_bytes() and json.loads(file.read_bytes()[size:])['lrs'][0] == 2


@pytest.mark.parametrize('change', [lambda b: b[:-1], lambda b: b.replace(b'lrs', b'mom'), lambda b: b''])
def test_a_part_that_is_not_as_it_was_written_is_refused(tmp_path, change):
    file = tmp_path / 'steps'
    saved = checkpoint(Histories(file), {'lrs': [1.0, 2.0]})
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError, match='steps is damaged, or was exchanged'):
        read(file, saved)


def test_a_tag_that_names_what_is_not_there_is_refused(tmp_path):
    file = tmp_path / 'steps'
    tags, named = checkpoint(Histories(file), {'lrs': [1.0, 2.0]})
    for wrong in ({'lrs': (TAG, ['lrs', 3])}, {'lrs': (TAG, ['moms', 2])}):
        with pytest.raises(ValueError, match='does not have'):
            read(file, (wrong, named))


def test_a_list_that_nobody_promises_to_grow_only_is_taken_once_it_has_and_left_when_it_does_not(tmp_path):
    file, pack = tmp_path / 'steps', Packer()
    it = Histories(file)

    def taken(values):
        it.begin()
        tag = it.cut_if_grown('seen', values, pack)
        return (None, it.write()) if tag is None else ({'seen': tag}, it.write())

    values = [float(i) for i in range(2000)]
    assert taken(values)[0] is None and taken(values)[0] is None  # perhaps a setting
    values += [5.0, 6.0]
    saved = taken(values)
    assert read(file, saved)[1] == {'seen': values}
    saved = taken(values)
    assert read(file, saved)[1] == {'seen': values}  # a checkpoint of which it is no longer
    values[7] = 70.0
    assert taken(values)[0] is None
    values.append(8.0)
    saved = taken(values)
    assert read(file, saved)[1] == {'seen': values}
    del values[-1:]
    assert taken(values)[0] is None
    assert taken(values[:10])[0] is None


def test_a_tensor_that_was_written_to_is_noticed(tmp_path):
    it, pack = Histories(tmp_path / 'steps'), Packer()
    values = list(torch.rand(1500).unbind())
    values = [v.clone() for v in values]
    assert it.cut_if_grown('x', values, pack) is None
    values.append(torch.tensor(1.0))
    assert it.cut_if_grown('x', values, pack) is not None
    values[3].add_(1)
    values.append(torch.tensor(1.0))
    assert it.cut_if_grown('x', values, pack) is None


class Typed(torch.Tensor):
    "As fastai's tensors of a kind."


@pytest.mark.parametrize(
    'make, is_taken',
    [
        (lambda i: (i, 0.5 * i, 'a'), True),
        (lambda i: np.float32(i), True),
        (lambda i: torch.tensor(0.5 * i).as_subclass(Typed), True),
        (lambda i: None if i % 2 else 1.0, True),
        (lambda i: [i], False),
        (lambda i: (i, [i]), False),
        (lambda i: {'loss': i}, False),
        (lambda i: [i] if i == 700 else 0.5, False),
        (lambda i: torch.zeros(2), False),
    ],
)
def test_values_that_cannot_change_are_taken_and_no_others(tmp_path, make, is_taken):
    file, pack = tmp_path / 'steps', Packer()
    it = Histories(file)
    values = [make(i) for i in range(1500)]
    assert it.cut_if_grown('x', values, pack) is None
    values += [make(0), make(0)]
    it.begin()
    tag = it.cut_if_grown('x', values, pack)
    assert (tag is not None) == is_taken
    if is_taken:
        plain = [v.as_subclass(torch.Tensor) if isinstance(v, torch.Tensor) else v for v in values]
        assert same(read(file, ({'x': tag}, it.write()))[1]['x'], plain)


def test_another_process_than_the_first_keeps_nothing():
    assert Histories(None).cut('a', [1, 2], None) == (TAG, ['a', 2])


def test_a_disk_that_is_full_changes_nothing(tmp_path, monkeypatch):
    file = tmp_path / 'steps'
    it, lists = Histories(file), {'a': [1.0]}
    checkpoint(it, lists)
    lists['a'].append(2.0)

    def fail(file, data, at):
        raise OSError('No space left on device')

    monkeypatch.setattr(histories, 'append', fail)
    with pytest.raises(OSError):
        checkpoint(it, lists)
    monkeypatch.undo()
    lists['a'].append(3.0)
    assert read(file, checkpoint(it, lists))[1] == {'a': [1.0, 2.0, 3.0]}
