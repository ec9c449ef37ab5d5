"""Solutions, the weights that trainings leave: of whatever a user gives, name -> solution.

A solution is a state dict, a module, a learner, or a path to what `learn.save`, `torch.save` or
safetensors wrote: a state dict, alone or as `model`, `state_dict` or `model_state_dict` beside what
else a training keeps, with names as they are or with `module.` in front. No code in it is run, and
what is neither a tensor nor plain data, such as an optimizer, is left out. What has a method
`solutions()`, which gives such by name, holds solutions: `WeightAverage`, `SWACallback`,
`SnapshotCallback`, `Ensemble`, and any object of a user's.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from fastai.learner import Learner
from torch import nn

from .weights import NoSolution, indexed_files, read_index

__all__ = ['gathered', 'named_solutions', 'one_solution', 'by_epoch', 'has_solutions', 'check_solution', 'source_of']


def named_solutions(given, n: int | None = None, what: str = '') -> dict:
    """`gathered(given)`, checked. Raises what that raises, `ValueError` unless there are `n` of them,
    for `what`, or one at least, and `TypeError` for what is no solution.
    """
    named = gathered(given)
    if not named:
        raise ValueError('solutions is empty: one is needed at least')
    if n is not None and len(named) != n:
        raise ValueError(f'solutions must be {n} for {what}, not {len(named)}')
    for name, solution in named.items():
        check_solution(name, solution)
    return named


def one_solution(name: str, given):
    """The solution that `given` is or holds.

    Raises what `gathered` raises, and `TypeError` or `ValueError`, by `name`, for what is none, or several.
    """
    found = gathered(given)
    if len(found) != 1:
        raise ValueError(f'{name} must be one solution, not {len(found)}')
    [solution] = found.values()
    check_solution(name, solution)
    return solution


def gathered(given) -> dict:
    """Name -> solution, of `given`: a solution; what has `solutions()`; the folder of an ensemble; or
    several of these, in an iterable, or in a dict that names them.

    Names are the user's; else what `solutions()` calls them, a file's own, and for the rest their
    numbers; numbers for all where two would have one name. Raises `NoSolution`, a `ValueError`, for
    what holds none yet, and for a folder what `weights.read_index` and `indexed_files` raise. What is
    no solution at all is passed through, see `check_solution`.
    """
    pairs = []
    for name, holder in _holders(given):
        pairs += _held(holder, name, len(pairs) + 1)
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        names = [f'solution {i + 1}' for i in range(len(names))]
    return {name: solution for name, (_, solution) in zip(names, pairs)}


def by_epoch(solutions: list, epochs: list) -> dict:
    "'epoch 3' -> solution, where for each of them the epoch is known after which it was kept; else as `gathered`."
    if len(epochs) == len(set(epochs)) == len(solutions):
        return {f'epoch {epoch}': solution for epoch, solution in zip(epochs, solutions)}
    return gathered(solutions)


def has_solutions(o) -> bool:
    "Does `o` hold solutions, rather than be one? (A module is one, whatever methods it has.)"
    return not isinstance(o, Learner | nn.Module) and callable(getattr(type(o), 'solutions', None))


def check_solution(name: str, o):
    "Raise `TypeError`, naming it, if `o` is no solution."
    if not isinstance(o, Learner | nn.Module | Mapping | str | Path):
        raise TypeError(
            f'{name} must be a state dict, a module, a learner, a path or a SWACallback, not {repr(o)[:60]}'
        )


def source_of(solution):
    "What the weights of a solution are in: a module, a state dict or a path."
    return solution.model if isinstance(solution, Learner) else solution


def _holders(given) -> list[tuple]:
    "Pairs of the user's name, or `None`, and what is a solution or holds some."
    if isinstance(given, Mapping) and not _is_state_dict(given):
        return [(str(name), o) for name, o in given.items()]
    is_one = isinstance(given, nn.Module | Mapping | str) or has_solutions(given)
    if isinstance(given, Iterable) and not is_one:
        return [(None, o) for o in given]
    return [(None, given)]


def _is_state_dict(o: Mapping) -> bool:
    return any(isinstance(v, torch.Tensor) for v in o.values())


def _held(holder, name: str | None, number: int) -> list[tuple]:
    "Pairs of a name and a solution that `holder` is or holds; `number`: of the first of them."
    is_path = isinstance(holder, str | Path)
    if is_path and Path(holder).is_dir():
        found = _in_folder(Path(holder))
    elif has_solutions(holder):
        found = _called(holder, name)
    elif name is not None:
        return [(name, holder)]
    else:
        return [(Path(holder).stem if is_path else f'solution {number}', holder)]
    if name is None:
        return list(found.items())
    if len(found) == 1:
        return [(name, solution) for solution in found.values()]
    return [(f'{name}, {inner}', solution) for inner, solution in found.items()]


def _called(holder, name: str | None) -> dict:
    "What `holder` holds; that it holds nothing is said of it by the user's `name`, if there is one."
    try:
        return holder.solutions()
    except NoSolution as e:
        if name is None:
            raise
        raise NoSolution(name, e.lack) from None


def _in_folder(folder: Path) -> dict:
    index = read_index(folder)
    if not index['files']:
        raise NoSolution(folder, 'has no models yet: the fit that writes there has not come to one')
    return by_epoch(indexed_files(folder, index), index.get('epochs', []))
