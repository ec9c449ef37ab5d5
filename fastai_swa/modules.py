"""What lies under a wrapper, a clean copy of it, and models whose modes move weights. Plain
PyTorch."""

import copy
import dis
import functools
import gc
import io
import random
import threading
import types
import weakref
from collections import OrderedDict, deque
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from .interrupts import uninterrupted, unwound_whole

__all__ = [
    'unwrap',
    'plain_name',
    'named_tensors',
    'clean_copy',
    'check_copyable',
    'dropped_hooks',
    'moves_weights',
    'in_train_mode',
    'written_in_train_mode',
]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `DataParallel`, `DistributedDataParallel` and `torch.compile`; any other
    module is returned as it is.
    """
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif _is_compiled(model):
            model = model._orig_mod
        else:
            return model


# torch._dynamo's, which is slow to import
def _is_compiled(module):
    return type(module).__name__ == 'OptimizedModule'


def plain_name(name: str) -> str:
    "`name` of a parameter or module as it reads without `torch.compile`."
    return name.replace('_orig_mod.', '')


def named_tensors(named) -> dict[str, torch.Tensor]:
    """Plain name -> tensor for `named`, a model's `named_parameters` or `named_buffers`; tied
    tensors appear under each of their names.
    """
    return {plain_name(name): tensor for name, tensor in named(remove_duplicate=False)}


def clean_copy(model: nn.Module, shared=()) -> nn.Module:
    """A copy of `model` that computes the same, shares no tensor with it and carries nothing
    foreign along.

    The copy has the model's modes, ties and memory formats, and neither wrappers (`unwrap`), nor
    compiled code, nor gradients. A model whose modes move weights is copied as it stands: weights
    and attributes fit each other in the copy, too.

    Functions, such as a `forward` set on a module, are copied with what their closures and defaults
    hold: what refers to the model there refers to the copy here. Hooks stay, as copies, but for
    those of fastai's `Hook` and callbacks, which watch, and those that reach a learner, a loader or
    something `shared` (`dropped_hooks` names these): what such a hook points to is never copied.

    - `shared`: objects that the copy refers to instead of copying.

    Raises `ValueError` for a lazy module that has not seen a batch yet, for a model that holds
    something that cannot be copied, and, naming the module, where the copy would go on using the
    model in training, as a function does that knows it by a global variable.
    """
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(t, nn.parameter.UninitializedTensorMixin):
            raise ValueError(
                f'cannot copy the model: {name!r} belongs to a lazy module that has not seen a batch yet; run one '
                'batch through the model first'
            )
    return _one_chunk(_copy(model, shared, _copy_tensor))


def check_copyable(model: nn.Module, shared=()):
    """Raise `ValueError` if `clean_copy` could not copy `model` for what it holds besides tensors.
    No tensor is copied.
    """
    _copy(model, shared, lambda tensor, is_attribute: tensor)


def dropped_hooks(model: nn.Module, shared=()) -> list[str]:
    """The names of the modules of `model` with hooks that `clean_copy` leaves out although they may
    change what the model computes.

    Hooks of fastai's `Hook` are not counted: these watch. The model itself is `''`.
    """
    model = unwrap(model)
    origin = _Origin(model, shared)
    names = []
    for name, m in model.named_modules():
        hooks = [hook for d in _hook_dicts(m) for hook in d.values() if hook is not True]
        if any(origin.kind(hook) in ('foreign', 'callback') for hook in hooks):
            names.append(plain_name(name))
    return names


def _copy(model, shared, copy_tensor):
    model = unwrap(model)
    origin = _Origin(model, shared)
    attributes = {id(o) for m in model.modules() for d in (vars(m), m._parameters, m._buffers) for o in d.values()}
    hooks = origin.kept_hooks()
    reached = _reachable([model, hooks], origin.stop)
    # deepcopy consults `memo` first: what stands in it is taken, not copied
    memo = {id(o): o for o in shared}
    memo |= {id(o): o for o in reached.values() if _is_stranger(o)}
    memo |= {id(d): OrderedDict() for d in origin.hook_dicts}
    memo |= {id(o): copy_tensor(o, id(o) in attributes) for o in reached.values() if isinstance(o, torch.Tensor)}
    functions = _Functions(reached, origin, memo)
    try:
        for m in reversed(list(model.modules())):  # the innermost first
            if _is_compiled(m):
                memo[id(m)] = copy.deepcopy(unwrap(m), memo)
        res = copy.deepcopy(model, memo)
        for d, kept in zip(origin.hook_dicts, hooks):
            memo[id(d)].update({number: copy.deepcopy(hook, memo) for number, hook in kept.items()})
        functions.fill()
    except _Refused:
        raise
    except Exception as e:
        raise ValueError(f'cannot copy the model ({e}); pass a swa_model of your own') from e
    _check_apart(res, origin)
    return res


def _one_chunk(model):
    """Lay the weights of each recurrent layer out in one piece again, which cuDNN asks for; no
    effect on other devices.
    """
    for m in model.modules():
        if isinstance(m, nn.RNNBase):
            m.flatten_parameters()
    return model


class _Refused(ValueError):
    "The copy would go on using the model in training."


# hooks, and flags (True) under their hook's number
_HOOK_DICTS = [name for name in vars(nn.Module()) if 'hooks' in name]


def _hook_dicts(module):
    return [vars(module)[k] for k in _HOOK_DICTS if k in vars(module)]


class _Origin:
    "A model that is to be copied: what belongs to it, and which of its hooks do."

    def __init__(self, model, shared):
        self.model = model
        self.hook_dicts = [d for m in model.modules() for d in _hook_dicts(m)]
        self.shared = {id(o): o for o in shared}
        self.stop = [*self.hook_dicts, *shared]
        self.tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.parts = self.tensors | {id(m): m for m in model.modules()}
        self.held = _reachable([model], self.stop)

    def kept_hooks(self) -> list[dict]:
        """For each of the `hook_dicts` what a copy keeps of it: hooks, and the flags that stand
        beside them under the same number.
        """
        kept = []
        for m in self.model.modules():
            dicts = _hook_dicts(m)
            numbers = {n for d in dicts for n, hook in d.items() if hook is not True and self.kind(hook) == 'own'}
            kept.extend({n: hook for n, hook in d.items() if n in numbers} for d in dicts)
        return kept

    def kind(self, hook) -> str:
        """'own': part of what the model computes. 'observer': of fastai's `Hook`. 'callback': of
        one. 'foreign': it reaches what is not copied.
        """
        function = hook
        if type(function).__name__ == '_WrappedHook':  # how load_state_dict's hooks are kept
            function = function.hook
        while isinstance(function, functools.partial):
            function = function.func
        owner = getattr(function, '__self__', function)
        if _is_stranger(owner):
            return 'callback'
        if (getattr(function, '__module__', None) or '').startswith('torch.nn.utils.') or id(owner) in self.held:
            return 'own'
        if _is_of(owner, _HOOK):
            return 'observer'
        reached = _reachable([hook], self.hook_dicts).values()
        if any(_is_stranger(o) or id(o) in self.shared for o in reached):
            return 'foreign'
        return 'foreign' if any(map(_names_learner, reached)) else 'own'

    def names_model(self, o) -> bool:
        "Is `o` a function whose code knows a part of the model by a global variable?"
        return any(
            isinstance(v, nn.Module | torch.Tensor) and {id(v), id(unwrap(v))} & self.parts.keys()
            for v in _globals_of(o)
        )

    def is_view(self, o) -> bool:
        "Is `o` a tensor of its own that shares its memory with one of the model's?"
        return (
            isinstance(o, torch.Tensor)
            and id(o) not in self.tensors
            and o.grad_fn is None
            and _address(o) in {_address(t) for t in self.tensors.values()} - {0}
        )


def _refused(model, is_culprit, what) -> _Refused:
    """The error that names the module of `model` with an attribute or a hook that reaches an object
    for which `is_culprit` holds.
    """
    where = 'something that it holds'
    for name, m in model.named_modules():
        for attribute, value in vars(m).items():
            values = value.values() if attribute in _HOOK_DICTS else [value]
            if attribute not in _MODULE_DICTS and any(map(is_culprit, _reachable(values, model.modules()).values())):
                where = f'{attribute!r} of ' + (f'module {plain_name(name)!r}' if name else 'the model itself')
    return _Refused(
        f'cannot copy the model: {where} {what}, so that the copy would go on using the model in training; pass a '
        'swa_model of your own'
    )


_MODULE_DICTS = ('_parameters', '_buffers', '_modules')


def _address(t):
    try:
        return t.untyped_storage().data_ptr()
    except Exception:
        return 0  # no memory of its own: sparse, meta


# classes that are told by their names, since importing them is for the floors above
_LEARNER = {('fastai.learner', 'Learner')}
_HOOK = {('fastai.callback.hook', 'Hook')}
_STRANGERS = _LEARNER | {
    ('fastai.callback.core', 'Callback'),
    ('fastai.data.core', 'DataLoaders'),
    ('fastai.data.load', 'DataLoader'),
    ('torch.utils.data.dataloader', 'DataLoader'),
}


def _is_of(o, classes) -> bool:
    return any((c.__module__, c.__qualname__) in classes for c in type(o).__mro__)


def _is_stranger(o) -> bool:
    """Is `o` a learner, a callback or a loader, which a model may refer to and which no copy takes
    along?
    """
    return _is_of(o, _STRANGERS)


_VALUES = (
    str,
    bytes,
    int,
    float,
    complex,
    types.NoneType,
    type,
    types.ModuleType,
    types.BuiltinFunctionType,
    torch.dtype,
    torch.device,
)
_ATOMIC = (*_VALUES, torch.Tensor, torch.Generator)  # what refers to nothing that a copy would have to copy


def _reachable(roots, stop) -> dict:
    """id -> object for all that a copy of `roots` would meet without passing through an object in
    `stop`.
    """
    seen, stopped, stack = {}, {id(o) for o in stop}, [*roots]
    while stack:
        o = stack.pop()
        if id(o) in seen or id(o) in stopped:
            continue
        seen[id(o)] = o
        stack.extend(_referents(o))
    return seen


def _referents(o):
    if isinstance(o, _ATOMIC) or _is_stranger(o):
        return ()
    if isinstance(o, types.MethodType):
        return (o.__self__,) if _is_of_its_class(o) else (o.__self__, o.__func__)
    if not isinstance(o, types.FunctionType):
        return gc.get_referents(o)
    if _original(o) is not None:
        return (_original(o),)
    return (*(o.__closure__ or ()), *(o.__defaults__ or ()), *(o.__kwdefaults__ or {}).values(), *vars(o).values())


def _original(function):
    "What `torch.compile` made `function` from; `None` for any other."
    return getattr(function, '_torchdynamo_orig_callable', None)


def _is_of_its_class(method) -> bool:
    return any(vars(c).get(method.__func__.__name__) is method.__func__ for c in type(method.__self__).__mro__)


def _names_learner(o) -> bool:
    "Is `o` a function whose code knows a learner by a global variable?"
    return any(_is_of(v, _LEARNER) for v in _globals_of(o))


def _globals_of(function) -> list:
    """The values of the global variables that the code of `function` reads; none for any other
    object.
    """
    if not isinstance(function, types.FunctionType) or _original(function) is not None:
        return []
    codes, names = [function.__code__], set()
    while codes:
        code = codes.pop()
        codes.extend(o for o in code.co_consts if isinstance(o, types.CodeType))
        names.update(i.argval for i in dis.get_instructions(code) if i.opname in ('LOAD_GLOBAL', 'LOAD_NAME'))
    return [function.__globals__[name] for name in names if name in function.__globals__]


class _Functions:
    """The copies of functions, which `copy.deepcopy` would take as they are, with all that they
    refer to.

    A function may refer to the model that refers to it, so its copy is made empty, entered in
    `memo`, and filled when the model's copy is there.
    """

    def __init__(self, reached, origin, memo):
        self.origin, self.memo = origin, memo
        self.empty = []  # (function or method, its copy)
        self.cells = {}  # id of a closure's cell -> its copy: several functions may share one
        for o in reached.values():
            new = self._hollow(o)
            if new is not None:
                self.empty.append((o, new))
                memo[id(o)] = new

    def _hollow(self, o):
        """An empty copy of `o`; `None` where it is no function, or refers to nothing that could
        change.
        """
        if isinstance(o, types.MethodType):
            return None if _is_of_its_class(o) else _delegate()
        if not isinstance(o, types.FunctionType):
            return None
        if _original(o) is not None:
            return _delegate()
        if all(isinstance(r, _UNCHANGING) for r in _reachable([o], ()).values()):
            return None
        cells = tuple(self.cells.setdefault(id(cell), types.CellType()) for cell in o.__closure__ or ())
        new = types.FunctionType(o.__code__, o.__globals__, o.__name__, None, cells)
        new.__qualname__ = o.__qualname__
        new.__module__ = o.__module__
        new.__doc__ = o.__doc__
        return new

    def fill(self):
        "Give the copies what they refer to. Raises `_Refused` where that is the model in training."
        model = self.origin.model
        for o, new in self.empty:
            if any(map(self.origin.is_view, _reachable([o], [*self.origin.stop, *model.modules()]).values())):
                raise _refused(
                    model, self.origin.is_view, "has a function that holds a view of one of the model's tensors"
                )
            try:
                self._fill(o, new, self._copied)
            except Exception as e:
                if self.origin.parts.keys() & _reachable([o], self.origin.stop).keys():
                    raise _refused(model, lambda r, o=o: r is o, f'has a function that cannot be copied ({e})') from e
                self._fill(o, new, lambda held: held)  # it does not know the model: it may be shared with it
        for m in model.modules():
            if not _is_compiled(m):
                self._set_attributes(m, self.memo[id(m)])

    def _set_attributes(self, m, copied):
        """Functions that are attributes of `m` need no delegate in its copy; weak references to the
        model, atoms to deepcopy, are made anew.
        """
        for attribute, value in vars(m).items():
            if attribute not in vars(copied):  # what `compile()` left on the module
                continue
            if isinstance(value, _FUNCTIONS) and id(value) in self.memo:
                vars(copied)[attribute] = _target(self.memo[id(value)])
            elif isinstance(value, weakref.ref) and id(value()) in self.origin.parts and id(value()) in self.memo:
                vars(copied)[attribute] = weakref.ref(self.memo[id(value())])

    def _copied(self, o):
        return copy.deepcopy(o, self.memo)

    def _fill(self, o, new, copied):
        if isinstance(o, types.MethodType):
            new.__closure__[0].cell_contents = types.MethodType(
                self.memo.get(id(o.__func__), o.__func__), copied(o.__self__)
            )
        elif _original(o) is not None:
            new.__closure__[0].cell_contents = copied(_original(o))
        else:
            new.__defaults__ = copied(o.__defaults__)
            new.__kwdefaults__ = copied(o.__kwdefaults__)
            vars(new).update(copied(vars(o)))
            for cell, own in zip(new.__closure__ or (), o.__closure__ or ()):
                if own != types.CellType():  # an empty one has no contents
                    cell.cell_contents = copied(own.cell_contents)


_FUNCTIONS = (types.FunctionType, types.MethodType)
_UNCHANGING = (*_VALUES, types.FunctionType, types.CellType, tuple, frozenset)


def _delegate():
    """A function that calls what its one cell holds: stands for what cannot be made before that is
    there.
    """
    target = None

    def delegate(*args, **kwargs):
        return target(*args, **kwargs)

    return delegate


def _target(function):
    "What a delegate calls; any other function itself."
    while isinstance(function, types.FunctionType) and function.__code__ is _delegate().__code__:
        function = function.__closure__[0].cell_contents
    return function


def _check_apart(res, origin):
    """Raise `_Refused` if `res`, the copy, refers to the model that it was copied from, or one of
    its functions to a learner.
    """

    def is_of_model(o):
        return id(o) in origin.parts and isinstance(o, nn.Module) or origin.names_model(o)

    def is_of_learner(o):
        if _names_learner(o):
            return True
        reached = _reachable([o], res.modules()).values() if isinstance(o, _FUNCTIONS) else ()
        return any(_is_of(r, _LEARNER) for r in reached)

    shared = origin.shared.values()
    held = _reachable([res], [o for o in shared if not _is_stranger(o)]).values()
    if any(map(is_of_model, held)):
        raise _refused(res, is_of_model, 'refers to it')
    if any(map(is_of_learner, held)):
        raise _refused(res, is_of_learner, 'has a function that refers to a learner')


def _copy_tensor(t, is_attribute):
    if t.grad_fn is None and type(t) not in (torch.Tensor, nn.Parameter):
        res = copy.deepcopy(t)
        res.grad = None
        return res
    # an activation that a training forward left in a hook
    if t.grad_fn is not None and not is_attribute:
        return None
    # deepcopy takes gradients along and refuses non-leaves
    res = t.detach().clone()
    return nn.Parameter(res, t.requires_grad) if isinstance(t, nn.Parameter) else res


# modes that move weights


def moves_weights(model: nn.Module) -> bool:
    """May `train()` and `eval()` do more to `model` than set modes, as where LoRA merges its update
    into the weights in `eval()`?

    So it is taken to be where the class of one of its modules, or the module itself, has a `train`
    or an `eval` of its own.
    """
    return any(map(has_own_modes, unwrap(model).modules()))


def has_own_modes(module: nn.Module) -> bool:
    "Does `module` itself have a `train` or an `eval` of its own?"
    cls = type(module)
    return (
        cls.train is not nn.Module.train
        or cls.eval is not nn.Module.eval
        or not {'train', 'eval'}.isdisjoint(vars(module))
    )


def away_from_training(model: nn.Module) -> list[nn.Module]:
    """The modules whose `eval()` may have moved weights: those with modes of their own that are not
    in train mode, the outer ones first.
    """
    return [m for m in model.modules() if has_own_modes(m) and not m.training]


@contextmanager
def in_train_mode(model: nn.Module):
    """Within this context the weights of `model` can be *read* as training has them: not merged,
    where its `eval()` merges something into them.

    Afterwards all is bitwise as before, since it is put back and not moved back: `(w + d) - d` is
    not always `w`. The price is a copy of the tensors that could have moved. Where no weights move,
    or the model is in train mode, nothing is done. Modes of modules whose `train` is PyTorch's own
    stay as they are throughout.
    """
    model = unwrap(model)
    moved = away_from_training(model)
    if not moved:
        yield
        return
    with unwound_whole():
        kept = Kept(moved)
        try:
            with uninterrupted():
                to_train_form(model)
            yield
        finally:
            with uninterrupted():
                kept.put_back()


@contextmanager
def written_in_train_mode(model: nn.Module):
    """Within this context the weights of `model` can be *written* as training has them; afterwards
    the model is in the modes it was in.

    Both by real calls of `train` and `eval`, so that the new weights are merged where the modes ask
    for it. Where no weights move, or the model is in train mode, nothing is done.
    """
    model = unwrap(model)
    if not away_from_training(model):
        yield
        return
    with unwound_whole():
        modes = modes_of(model)
        try:
            with uninterrupted():
                to_train_form(model)
            yield
        finally:
            with uninterrupted():
                set_modes(model, modes)


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    "Module -> whether it is in train mode."
    return {m: m.training for m in model.modules()}


def to_train_form(model: nn.Module):
    """Put the modules of `model` that have modes of their own into train mode, by their `train()`;
    all others keep their modes.
    """
    modes = modes_of(model)
    set_modes(model, {m: mode or has_own_modes(m) for m, mode in modes.items()})


def set_modes(model: nn.Module, modes: dict[nn.Module, bool]):
    """Give the modules of `model` the `modes`, by their own `train` and `eval` where they have
    such.

    As in PyTorch, `model.eval()` reaches the `eval` of `model` itself, and the `train` of the
    modules inside.
    """
    for m, mode in modes.items():
        if has_own_modes(m) and m.training != mode:
            if m is model and not mode:
                m.eval()
            else:
                m.train(mode)
    for m, mode in modes.items():
        m.training = mode


class Kept:
    """What `train()` and `eval()` of `modules` can change in them and in their submodules: to be
    put back bitwise, without calling these.

    That is which tensors, submodules and other attributes they have, what is in their lists, dicts
    and sets, and what is in the tensors.

    - `bits`: whether to keep copies of what is in the tensors.
    """

    def __init__(self, modules, bits: bool = True):
        self.bits = bits
        inner = dict.fromkeys(m for outer in modules for m in outer.modules())  # each once
        self.containers = []  # (container, shallow copy)
        self.tensors = []  # (tensor, its data, a copy of these or None)
        seen = set()
        for m in inner:
            self._keep(vars(m), seen)  # parameters, buffers and submodules are dicts among the attributes

    def _keep(self, value, seen):
        if id(value) in seen:
            return
        if isinstance(value, torch.Tensor):
            seen.add(id(value))
            if value.grad_fn is None and not isinstance(value, nn.parameter.UninitializedTensorMixin):
                self.tensors.append((value, value.data, value.detach().clone() if self.bits else None))
        elif type(value) in (*_CONTAINERS, tuple):
            seen.add(id(value))
            if type(value) is not tuple:
                self.containers.append((value, copy.copy(value)))
            for inner in value.values() if isinstance(value, dict) else value:
                self._keep(inner, seen)

    def put_back(self):
        "Put everything back as it was."
        for container, before in self.containers:
            container.clear()
            container.extend(before) if isinstance(container, list | deque) else container.update(before)
        for tensor, data, bits in self.tensors:
            tensor.data = data
            if bits is not None:
                data.copy_(bits)


_CONTAINERS = (list, dict, set, deque, OrderedDict)


# plain attributes of modules


def plain_data(module: nn.Module) -> dict:
    """Name -> value of what `module` has as plain data in attributes: numbers, strings, tensors,
    arrays, containers and objects of these.

    What PyTorch itself keeps on a module (parameters, buffers, submodules, hooks, its mode), and
    values that hold modules, parameters, results of a forward pass, functions with a state, random
    generators, locks, files, learners and the like are not among them.
    """
    return {name: value for name, value in vars(module).items() if name not in MODULES_OWN and is_plain(value)}


MODULES_OWN = frozenset(vars(nn.Module())) | {'_compiled_call_impl', '_parameters', '_buffers', '_modules'}


def is_plain(value) -> bool:
    "Is `value` data, with nothing in it that is or knows a part of a model or of a program?"
    if isinstance(value, _VALUES):
        return True
    if isinstance(value, torch.Tensor):
        return not isinstance(value, nn.Parameter) and value.grad_fn is None
    return not any(
        isinstance(o, _NOT_DATA) or _is_stranger(o) or isinstance(o, torch.Tensor) and not is_plain(o)
        for o in _reachable([value], ()).values()
    )


_NOT_DATA = (
    nn.Module,
    types.MethodType,
    types.CellType,
    types.GeneratorType,
    weakref.ref,
    torch.Generator,
    random.Random,
    np.random.Generator,
    np.random.RandomState,
    RemovableHandle,
    io.IOBase,
    type(threading.Lock()),
    type(threading.RLock()),
)


def same_data(a, b, known=None) -> bool:
    """Are two plain values equal? Tensors and arrays bitwise; objects where they are of one class
    and their attributes are equal.

    Of different tensors on another device than the CPU that is not asked, since the answer would
    have to wait for it: they are not.
    """
    known = set() if known is None else known  # pairs that have been, or are being, compared
    if a is b or (id(a), id(b)) in known:
        return True
    if type(a) is not type(b):
        return False
    known.add((id(a), id(b)))
    if isinstance(a, torch.Tensor):
        is_alike = (a.shape, a.dtype, a.device, a.layout) == (b.shape, b.dtype, b.device, b.layout)
        return is_alike and a.is_cpu and a.layout is torch.strided and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_data(v, b[k], known) for k, v in a.items())
    if isinstance(a, list | tuple | deque):
        return len(a) == len(b) and all(same_data(v, w, known) for v, w in zip(a, b))
    if not isinstance(a, _VALUES) and getattr(a, '__dict__', None):
        return same_data(vars(a), vars(b), known)
    try:
        return bool(a == b)
    except Exception:  # of a class whose == gives no answer
        return False


def paired_modules(source, model) -> list[tuple[nn.Module, nn.Module]]:
    """(module of one, module of the other) for each name that both have; `source` and `model` are what the
    `named_modules` of the two give. Each module of the second comes once."""
    theirs = {plain_name(name): m for name, m in source}
    own = {}
    for name, m in model:
        if not _is_compiled(m):
            own.setdefault(m, plain_name(name))
    return [(theirs[name], m) for m, name in own.items() if name in theirs]
