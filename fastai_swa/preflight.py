"""What is looked at before the first step of a fit that averages, so that nothing shows hours later.

What cannot work raises; what will surprise is a remark, a dict from its kind to a sentence.
"""

from fastai.callback.tracker import EarlyStoppingCallback, ReduceLROnPlateau, SaveModelCallback
from fastai.learner import Learner
from torch import nn

from .averaging import check_match
from .batchnorm import outside_sentence, statistics_outside_buffers, tracked_bn
from .fitting import FitCallback
from .keeping import unrepeatable
from .modules import check_copyable, clean_copy, dropped_hooks, unwrap
from .passes import same_output
from .processes import Processes
from .schedules import cycle_ends
from .unaveraged import loss_parameters, loss_sentence
from .walk import not_copied

__all__ = [
    'check_model',
    'remarks_on_learner',
    'remarks_on_cycles',
    'remarks_on_points',
    'remarks_on_trackers',
    'validated_epochs',
    'nothing_sentence',
]


def check_model(learn: Learner, swa_model: nn.Module | None):
    """Can the learner's model be averaged, into `swa_model` or into a copy? Raises `ValueError`,
    which says why, if not.
    """
    if swa_model is not None:
        check_match(learn.model, swa_model)
        return
    check_copyable(learn.model, not_copied(learn))
    _check_copy(learn)


def _check_copy(learn):
    """Does a copy of the model compute what the model computes? It leaves out hooks that know the
    learner or are of a callback, and something in the model may know its parts by their identity.
    """
    model, shared = learn.model, not_copied(learn)
    if Processes(learn).size > 1 or same_output(learn, clean_copy(model, shared)):
        return
    hooked = dropped_hooks(model, shared)
    why = 'something in it knows its parts by their identity'
    if hooked:
        where = f'module {hooked[0]!r}' if hooked[0] else 'the model'
        of_what = 'which a copy cannot have because it is of a callback or knows the learner'
        why = f'a hook of {where}, {of_what}, changes it'
    raise ValueError(
        f'a copy of the model computes something else than the model: {why}; swa_model would not be what its columns '
        'say. Make a hook a function of its own, or pass a swa_model'
    )


def remarks_on_learner(learn: Learner, loss_func, what: str) -> dict:
    "What of its model, data and loss will surprise in `what`, the average."
    return _remarks_on_model(learn) | _remarks_on_data(learn, what) | _remarks_on_loss(learn, loss_func, what)


def _remarks_on_model(learn) -> dict:
    "Running statistics that are no buffers cannot be refreshed."
    outside = statistics_outside_buffers(unwrap(learn.model))
    return {'outside': outside_sentence(outside)} if outside else {}


def _remarks_on_data(learn, what) -> dict:
    "Data that can be gone through only once are there for training, and `what` gets nothing of them."
    has_batch_norm = bool(tracked_bn(unwrap(learn.model)))
    consequences = {0: 'its batch norm cannot be refreshed', 1: 'it cannot be validated'}
    res = {}
    for i, consequence in consequences.items():
        used_up = unrepeatable(learn, i)
        is_needed = i == 1 or has_batch_norm
        if used_up and is_needed:
            res[consequence] = (
                f'{used_up[0]} can be gone through only once, and {what} gets nothing of it: {consequence}; make it '
                'anew in `__iter__`, or hold it in an attribute of its own'
            )
    return res


def _remarks_on_loss(learn, loss_func, what) -> dict:
    "Parameters of the loss that the learner's optimizer trains, and `what` does not hold."
    optimized = {id(p) for group in learn.opt.param_lists for p in group}
    trained = [name for name, p in loss_parameters(loss_func, unwrap(learn.model)).items() if id(p) in optimized]
    return {'loss': loss_sentence(what, trained)} if trained else {}


def remarks_on_cycles(cycle_len, averaged: list[int], n_epoch: int) -> dict:
    "A list that reads as the lengths of all cycles of this fit, where epochs are meant."
    if not isinstance(cycle_len, list) or sum(cycle_len) != n_epoch or averaged[-1:] == [n_epoch - 1]:
        return {}
    return {
        'cycles': f'cycle_len={cycle_len} are the epochs, counted from 0, that are averaged; of cycles of these '
        f'lengths the last epochs are {cycle_ends(cycle_len)}'
    }


def remarks_on_points(learn: Learner, swa_start, every: int | None, start: int, due: list[int]) -> dict:
    "A fit that will come to no point; arguments as for `nothing_sentence`."
    n_steps = _most_steps(learn, start)
    if due and (not every or n_steps >= every):
        return {}
    return {'nothing': nothing_sentence(swa_start, every, start, due, learn.n_epoch, f'has at most {n_steps}')}


def nothing_sentence(swa_start, every: int | None, start: int, due: list[int], n_epoch: int, n_steps: str) -> str:
    """Why a fit of `n_epoch` epochs averages nothing.

    - `start`: the first epoch that may be averaged; `due`: those that are, if they come to their ends.
    - `n_steps`: optimizer steps from epoch `start` on, as in 'took 3'.
    """
    if every and due:
        return (
            f'every={every} was not reached: this fit {n_steps} optimizer steps from epoch {start} on and averages '
            'nothing'
        )
    if not due and start < n_epoch:
        return (
            f'cycle_len has no epoch from {start} (swa_start={swa_start}) to {n_epoch - 1}, the last one, counted from '
            '0: this fit averages nothing'
        )
    first = due[0] if due else start
    return (
        f'swa_start={swa_start} was not reached: epoch {first} (from 0) would be the first one averaged, so this fit '
        f'of {n_epoch} epochs averages nothing'
    )


def _most_steps(learn, start) -> float:
    "So many optimizer steps, at most, has a fit from epoch `start` on; infinite where that is not known."
    try:
        return len(learn.dls.train) * max(0, learn.n_epoch - start)
    except TypeError:
        return float('inf')  # a stream


def validated_epochs(averaged: list[int], n_epoch: int, swa_eval_freq: int) -> list[int]:
    "The epochs in which an average is validated that gets points in the epochs `averaged`."
    due = averaged[::swa_eval_freq] if swa_eval_freq else ()
    return sorted({*due, n_epoch - 1})


def remarks_on_trackers(learn: Learner, columns: list, validated: list[int], swa_start) -> dict:
    """Trackers of the average's `columns` that would act for want of values, which there are in the
    epochs `validated` alone, or save other weights than they seem to.
    """
    first = validated[0]
    longest_pause = max(b - a - 1 for a, b in zip([-1, *validated], validated))
    res = {}
    for cb in learn.cbs:
        if getattr(cb, 'monitor', None) not in columns:
            continue
        if isinstance(cb, EarlyStoppingCallback | ReduceLROnPlateau) and cb.patience <= longest_pause:
            acts = 'stops this fit' if isinstance(cb, EarlyStoppingCallback) else 'cuts the learning rate'
            res.setdefault(
                acts,
                f'{type(cb).__name__}(monitor={cb.monitor!r}, patience={cb.patience}) {acts} for want of values: the '
                f'average is validated first in epoch {first} (swa_start={swa_start}), and there can be '
                f'{longest_pause} epochs without; use a patience above {longest_pause}',
            )
        elif isinstance(cb, SaveModelCallback) and not isinstance(cb, FitCallback):  # fastai's, not our own
            res['saves'] = (
                f'SaveModelCallback(monitor={cb.monitor!r}) saves the weights in training, not the average; use '
                'SaveSWAModelCallback'
            )
    return res
