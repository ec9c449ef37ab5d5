"""What objects hold: read and set without running code of theirs."""

from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from fastcore.foundation import L
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastai_swa.contents import attributes, elements, nested, put_elements, set_attribute, set_items

drawn = settings(max_examples=200, deadline=None, derandomize=True, database=None)


@dataclass
class Record:
    value: object


@pytest.mark.parametrize('cls', [list, deque, set, bytearray, dict, OrderedDict])
def test_a_container_of_a_users_class_is_read_and_filled_without_its_methods(cls):
    def refuse(self, *args, **kwargs):
        raise AssertionError

    names = '__iter__ __getitem__ __setitem__ append extend add update items keys values clear __len__ __eq__'.split()
    own = type('Own', (cls,), {name: refuse for name in names if hasattr(cls, name)})
    is_dict = issubclass(cls, dict)
    o = own.__new__(own)
    cls.__init__(o)
    new = [(3, 4), (1, 2)] if is_dict else [3, 1]
    assert put_elements(o, new) is o
    assert elements(o) == new if is_dict or cls is not set else set(elements(o)) == set(new)
    put_elements(o, [])
    assert elements(o) == []


@pytest.mark.parametrize('cls', [list, L])
def test_what_a_list_or_an_L_holds_is_exchanged_in_place(cls):
    o = cls([1, 2, 3])
    for new in ([4], [], [5, 6, 7, 8]):
        set_items(o, new)
        assert list(o) == new


class Plain:
    def __init__(self):
        self.a = 1

    @property
    def b(self):
        raise AssertionError


class Slotted(Plain):
    __slots__ = ('c', 'empty')

    def __init__(self):
        super().__init__()
        self.c = 1


def closure():
    a = 1
    return lambda x=1, *, y=1: a


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.inner = 1, nn.Linear(1, 1)
        self.register_buffer('buffer', torch.ones(1))


@pytest.mark.parametrize(
    'make, names',
    [
        (Plain, ['a']),
        (Slotted, ['a', 'c']),
        (closure, [0, 'defaults', 'keywords']),
        (lambda: closure().__closure__[0], ['contents']),
        (lambda: partial(print, 1, end=''), ['func', 'args', 'keywords']),
        (lambda: Plain().__init__, ['self', 'func']),
        (Module, ['a', 'inner']),
    ],
)
def test_what_an_object_holds_is_named_and_no_property_is_read(make, names):
    assert [name for name, _ in attributes(make())] == names


@pytest.mark.parametrize('make, name', [(Plain, 'a'), (Slotted, 'c'), (closure, 'defaults'), (Module, 'a')])
def test_what_is_set_is_what_is_read(make, name):
    o, value = make(), (7,)
    set_attribute(o, name, value)
    assert dict(attributes(o))[name] is value


def test_what_is_set_in_a_cell_is_what_the_function_sees():
    f = closure()
    set_attribute(f.__closure__[0], 'contents', 7)
    assert f() == 7


def test_the_functions_in_fastais_transforms_are_seen_and_set_compiled_or_not():  # plum-dispatch 2.10 compiles them
    plum = pytest.importorskip('plum')

    def f(x):
        return x

    function = plum.Function(f)
    assert {'_f', '_pending', '_cache'} <= {name for name, _ in attributes(function)}
    assert dict(attributes(function))['_f'] is f
    set_attribute(function, '_pending', [(f, None, 7)])
    assert dict(attributes(function))['_pending'] == [(f, None, 7)] == function._pending


def test_what_cannot_be_exchanged_is_refused_by_name():
    with pytest.raises(TypeError, match='args of a partial'):
        set_attribute(partial(print, 1), 'args', (2,))
    with pytest.raises(TypeError, match='self of a method'):
        set_attribute(Plain().__init__, 'self', Plain())


# what is nested

leaves = st.integers() | st.text(max_size=2) | st.just(print) | st.builds(object)
arrays = st.builds(lambda n: torch.zeros(n), st.integers(0, 3)) | st.builds(lambda n: np.zeros(n), st.integers(0, 3))
trees = st.recursive(
    leaves | arrays,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(lambda v: [v, v])
        | st.lists(inner, max_size=3).map(tuple)
        | st.lists(inner, max_size=3).map(L)
        | st.lists(inner, max_size=3).map(lambda v: defaultdict(int, enumerate(v)))
        | st.builds(Record, inner)
    ),
    max_leaves=10,
)


def counted(o, seen):
    "Containers, leaves, bytes and elements, by recursion."
    if isinstance(o, torch.Tensor | np.ndarray):
        return 0, 1, o.nbytes, 0
    if not isinstance(o, list | tuple | dict | L | Record):
        return 0, 1, 0, 0
    if id(o) in seen:
        return 0, 0, 0, 0
    seen.add(id(o))
    if isinstance(o, dict):
        values = list(o.values())
    elif isinstance(o, L | Record):
        values = list(vars(o).values())
    else:
        values = list(o)
    parts = [counted(v, seen) for v in values]
    n, n_leaves, n_bytes, n_elements = (sum(column) for column in zip((0, 0, 0, 0), *parts))
    return n + 1, n_leaves, n_bytes, n_elements + len(values)


@drawn
@given(st.lists(trees, max_size=3), st.integers(0, 8))
def test_what_is_nested_is_counted_and_what_is_larger_than_the_limit_is_not_gone_through(tree, limit):
    n, n_leaves, n_bytes, n_elements = counted(tree, set())
    found = nested(tree)
    assert (len(found.containers), found.n_leaves, found.n_bytes) == (n, n_leaves, n_bytes)
    found = nested(tree, max_leaves=limit)
    if n_leaves > limit:
        assert found is None
    elif n_elements <= limit:
        assert found.n_leaves == n_leaves
    assert nested(tree, max_bytes=n_bytes) is not None
    assert n_bytes == 0 or nested(tree, max_bytes=n_bytes - 1) is None
