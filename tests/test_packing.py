"""Objects as plain data, and back."""

import enum
import multiprocessing
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from fastcore.foundation import L
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastai_swa import packing
from fastai_swa.packing import Packer, Unpacker, pack, unpack


class Phase(enum.Enum):
    WARM = 1
    MAIN = 2


@dataclass
class Record:
    n: int
    values: list


Point = namedtuple('Point', 'x y')

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**130), 2**130)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.builds(lambda x: torch.tensor(x), st.floats(width=32))
    | st.builds(lambda n: torch.arange(n).view(1, n), st.integers(0, 4))
    | st.builds(np.float32, st.floats(width=32))
    | st.builds(np.int64, st.integers(-9, 9))
    | st.builds(lambda n: np.arange(n, dtype=np.uint8), st.integers(0, 3))
    | st.just(Path('a/b'))
    | st.complex_numbers(allow_nan=False)
    | st.just(torch.bfloat16)
    | st.just(torch.device('cpu'))
    | st.sampled_from(Phase)
    | st.builds(Record, st.integers(), st.lists(st.integers(), max_size=2))
    | st.builds(Point, st.integers(), st.just(2))
    | st.just(torch.Size([2, 3]))
    | st.just(range(1, 9, 2))
    | st.builds(lambda s: deque(s, 3), st.lists(st.integers(), max_size=5))
    | st.sets(st.integers())
    | st.builds(Counter, st.text(max_size=4))
    | st.builds(OrderedDict, st.just({'b': 1, 'a': (2,)}))
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.lists(inner, max_size=4).map(L)
        | st.dictionaries(
            st.text(max_size=3) | st.integers(-3, 3) | st.tuples(st.integers(-3, 3), st.booleans()), inner, max_size=3
        )
    ),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return (
            type(a) is type(b)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        )
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.tolist() == b.tolist()
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple | L):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(values)
def test_what_is_packed_written_and_unpacked_is_the_same_in_value_and_type(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / 'packed'
    torch.save(pack(value), path)
    assert same(value, unpack(torch.load(path, weights_only=True)))


READ_BY_TORCH_2_6 = {
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    list,
    dict,
    tuple,
    torch.Tensor,
    torch.Size,
    torch.device,
}


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(values)
def test_packed_data_hold_nothing_but_what_the_oldest_supported_torch_reads_by_itself(value):
    stack = [pack(value)]
    while stack:
        o = stack.pop()
        assert type(o) in READ_BY_TORCH_2_6
        if type(o) in (list, tuple):
            stack.extend(o)
        elif type(o) is dict:
            stack.extend([*o, *o.values()])


def test_the_table_of_types_has_each_tag():
    tags = {*packing._TAGS.values(), *packing._LEAVES, *packing._FORMER, *packing._KINDS}
    assert len(tags) == 29 and all(f"'{tag}'" in packing.__doc__ for tag in tags)


@pytest.mark.parametrize(
    'value',
    [
        object(),
        lambda: 0,
        nn.Linear(1, 1),
        {'a': [1, object()]},
        {object(): 3},
        np.array(['a']),
        torch.zeros(2, device='meta'),
    ],
)
def test_what_is_no_plain_data_is_refused(value):
    with pytest.raises(TypeError, match='checkpoint'):
        pack(value)


def test_the_losses_of_all_steps_are_one_tensor():
    assert len(pack([torch.tensor(float(i)) for i in range(1000)])) == 2


def test_a_tied_tensor_is_written_once():
    t = torch.randn(3)
    a, b = pack([t, t])
    assert a.data_ptr() == b.data_ptr() != t.data_ptr()


# into what is there


def through(value, now):
    """`value`, packed with holes and put into `now`; the result and the places that could not be
    filled.
    """
    unpacker = Unpacker()
    return unpacker(Packer(holes=[])(value, 'it'), now, 'it'), unpacker.missing


def test_a_function_among_other_values_does_not_take_these_along():
    def new():
        pass

    was = {'f': print, 'n': 3, 'inner': [1, {'g': print, 'm': (4, print)}]}
    now = {'f': new, 'n': 0, 'inner': [0, {'g': print, 'm': (0, print)}]}
    got, missing = through(was, now)
    assert got is now and got['n'] == 3 and got['inner'][0] == 1 and got['inner'][1]['m'] == (4, print)
    assert got['f'] is new and missing == ["it['f']"]  # of another class than print: said


def test_what_cannot_be_filled_is_named():
    assert through([1, print, 2], [1])[1] == ['it[1]']
    with pytest.raises(ValueError, match=r"cannot be made anew: it\[1\]"):
        unpack(Packer(holes=[])([1, print]))


def test_containers_keep_their_identity_and_their_sharing():
    shared = {'epoch': 3}
    now_shared = {'epoch': 0}
    now = {
        'sampler': now_shared,
        'data': now_shared,
        'list': [],
        'deque': deque(maxlen=2),
        'default': defaultdict(list),
    }
    inner = now['list'], now['deque'], now['default']
    got, _ = through(
        {
            'sampler': shared,
            'data': shared,
            'list': [1, 2],
            'deque': deque([1], 2),
            'default': defaultdict(list, a=[1]),
        },
        now,
    )
    assert got['sampler'] is got['data'] is now_shared and now_shared == {'epoch': 3}
    assert all(a is b for a, b in zip(inner, (got['list'], got['deque'], got['default']))) and got['default'] == {
        'a': [1]
    }
    got['default']['b'].append(1)


def test_two_that_were_one_and_went_apart_stay_apart():
    one = []
    got, _ = through({'a': [1], 'b': [2]}, {'a': one, 'b': one})
    assert got == {'a': [1], 'b': [2]}


def test_tensors_and_arrays_are_written_in_place_but_for_those_of_the_model():
    weight, mine, array = torch.zeros(3), torch.zeros(3), np.zeros(2)
    view = weight[:2]
    unpacker = Unpacker(protected={weight.untyped_storage().data_ptr()})
    got = unpacker(
        pack({'mine': torch.ones(3), 'view': torch.ones(2), 'array': np.ones(2)}),
        {'mine': mine, 'view': view, 'array': array},
    )
    assert got['mine'] is mine and mine.sum() == 3 and got['array'] is array and array.sum() == 2
    assert got['view'].sum() == 2 and weight.sum() == 0


def test_classes_of_a_function_are_found_in_what_is_there_and_no_code_of_a_file_is_run():
    @dataclass
    class Local:
        n: int

        def __post_init__(self):
            assert self.n >= 0

    class Mode(enum.Enum):
        A = 1
        B = 2

    record = Local(0)
    got, missing = through({'r': Local(3), 'm': Mode.B}, {'r': record, 'm': Mode.A})
    assert got['r'] is record and record.n == 3 and got['m'] is Mode.B and not missing
    assert through([Local(3)], [])[1] == ['it[0]']
    before = set(sys.modules)
    unpacker = Unpacker()
    assert unpacker(('record', ['antigravity:Flight', {}])) is None and unpacker.missing and set(sys.modules) == before
    assert unpacker(('record', ['subprocess:Popen', {'args': 'ls'}])) is None  # no dataclass


def test_subclasses_of_containers_get_their_contents_back_and_their_methods_are_not_called():
    class Log(list):
        def append(self, v):
            raise AssertionError

        def __iter__(self):
            raise AssertionError

    class Table(dict):
        def __setitem__(self, k, v):
            raise AssertionError

        def items(self):
            raise AssertionError

    log, table = Log(), Table()
    got, missing = through({'log': Log([1, 2]), 'table': Table(a=1)}, {'log': log, 'table': table})
    assert (
        got['log'] is log
        and list.__len__(log) == 2
        and got['table'] is table
        and dict.__len__(table) == 1
        and not missing
    )


def test_a_number_that_processes_share_is_written_where_it_is():
    was, now = multiprocessing.Value('i', 7), multiprocessing.Value('i', 0)
    got, missing = through({'epoch': was}, {'epoch': now})
    assert got['epoch'] is now and now.value == 7 and not missing


def test_files_of_the_first_format_are_read():
    old = {
        'a': ('tuple', [1, ('on', ['cpu', torch.ones(2)])]),
        'c': ('Counter', [['x', 2]]),
        'd': ('deque', [[1, 2], 3]),
        's': ('scalars', torch.arange(2.0)),
        'n': ('numbers', ('array', torch.arange(2))),
        'l': ('L', [1]),
        'f': ('frozenset', [1]),
        'p': ('path', 'a/b'),
        'z': ('size', [2, 3]),
    }
    got = unpack(old)
    assert (
        got['a'][0] == 1
        and got['c'] == Counter('xx')
        and got['d'] == deque([1, 2], 3)
        and got['s'] == [0.0, 1.0]
        and got['n'] == [0, 1]
    )
    assert got['l'] == L(1) and got['f'] == {1} and got['p'] == Path('a/b') and got['z'] == torch.Size([2, 3])
    with pytest.raises(ValueError, match='unknown kind'):
        unpack(('eval', 'code'))


def test_what_had_a_tag_before_torch_read_it_by_itself_is_read(tmp_path):
    old = {
        'size': ('size', [2, 3]),
        'device': ('device', 'cpu'),
        'complex': ('complex', [1.0, -2.0]),
        'keys': ('dict', [[('complex', [0.0, 1.0]), ('tuple', [('size', [])])]]),
    }
    torch.save(old, tmp_path / 'old')
    got = unpack(torch.load(tmp_path / 'old', weights_only=True))
    assert same(
        got,
        {
            'size': torch.Size([2, 3]),
            'device': torch.device('cpu'),
            'complex': 1 - 2j,
            'keys': {1j: (torch.Size([]),)},
        },
    )


def test_paths_in_the_folder_lead_to_wherever_it_is_then_and_never_out_of_it(tmp_path):
    here, there = tmp_path / 'here', tmp_path / 'there'
    given = [here / 'a' / 'b', str(here / 'a'), str(here), {str(here / 'k'): (here,)}, f'{here}r/a', 'a/b', Path('a/b')]
    packed = Packer(holes=[], folder=here)(given)
    got = Unpacker(folder=there)(packed)
    assert got[:4] == [there / 'a' / 'b', str(there / 'a'), str(there), {str(there / 'k'): (there,)}]
    assert got[4:] == given[4:]
    for out in (('below', '../x'), ('below', '/x'), ('text below', '/../x'), ('text below', 'x'), ('text below', 3)):
        unpacker = Unpacker(folder=there)
        assert unpacker(out) is None and unpacker.missing


def test_a_dict_whose_keys_are_paths_elsewhere_is_left_out(tmp_path):
    holes = []
    assert Packer(holes=holes, folder=tmp_path / 'here')({tmp_path / 'x': 1})[0] == 'hole' and len(holes) == 1
