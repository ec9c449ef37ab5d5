"""Passes through a learner's own loop, aside from its training: to validate other weights, to
refresh batch norm.

A pass is the learner's validation loop with a callback that collects. Nothing that it changes may
be seen by training: `aside.py` has what is put back, and why.
"""

import copy
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from fastai.callback.core import Callback, CancelEpochException, CancelFitException, CancelTrainException
from fastai.callback.training import BnFreeze, bn_types
from fastai.learner import AvgLoss, Recorder
from fastai.torch_core import num_distrib, to_detach
from fastcore.foundation import L
from torch.nn.parallel import DistributedDataParallel

from .aside import aside, buffers_kept
from .batches import FirstBatches, KeptBatches, Taken, as_an_epoch, batches_for, fresh_loader, share, training_loader
from .batchnorm import Moments, batch_moments, tracked_bn
from .columns import plain_values
from .fitting import is_fitting
from .keeping import holders_kept, unrepeatable
from .modules import in_train_mode, unwrap
from .processes import PassFailed, Processes, Together
from .randomness import randomness_kept, seed_all

__all__ = [
    'PassCancelled',
    'PassFailed',
    'copied_measures',
    'validate_aside',
    'refresh_bn',
    'provisional_batches',
    'refreshable',
    'kept_batches',
    'same_output',
    'check_engine',
]


class PassCancelled(Exception):
    "A callback cancelled a pass; it must not cancel the fit that the pass stands aside from."


class _PassCallback(Callback):
    "Takes part in one pass."

    def after_cancel_validate(self):
        raise PassCancelled('a callback cancelled it')


# validation


def validate_aside(learn, dl=None, in_fit: bool = True, taken: Taken | None = None, also=()) -> list:
    """Loss and metrics of `learn.model` on the validation set, or on `dl`, as floats (`nan` where
    there is no value).

    The model's buffers are afterwards what they were, also where a callback validates in train
    mode.

    - `in_fit`: as in `refresh_bn`.
    - `taken`: what the learner's own validations took; more is not taken of a stream.
    - `also`: more callbacks for this pass.

    Raises `PassCancelled` if a callback cancels it, `ValueError` if the validation set can be gone
    through only once, and `PassFailed` if it failed in another process.
    """
    if dl is None:
        _check_repeatable(learn, _VALIDATION)
    with aside(learn, buffers_kept(learn.model)), _events_around(learn, in_fit), _together(learn) as processes:
        if dl is None:
            dl = as_an_epoch(fresh_loader(learn.dls[1], processes=processes), taken)
        collector = _Collector(learn.metrics, processes)
        model = _without_collectives(learn.model, processes)
        with _with_model(learn, model), learn.added_cbs([collector, *L(also)]):
            _run(learn, dl)
        return plain_values(collector.measured)


def copied_measures(metrics) -> list:
    """Loss and `metrics` as objects of one's own, reset: the Recorder's keep the values of the
    model in training.
    """
    res = [AvgLoss(), *map(_copy_metric, metrics)]
    for m in res:
        m.reset()
    return res


def _copy_metric(metric):
    try:
        return copy.deepcopy(metric)
    except Exception:
        return copy.copy(metric)  # what `reset` sets anew is its own even so


class _Collector(_PassCallback):
    """Loss and metrics of a validation.

    Several processes first exchange their predictions, without the samples that fill up the last
    batches, so that each measures the whole set: what fastai's metrics do there, averaging the
    processes' values, counts these samples twice.
    """

    order = Recorder.order

    def __init__(self, metrics, processes):
        self.measured = copied_measures(metrics)
        self.processes = processes

    def after_batch(self):
        if not len(self.yb):
            return
        with self._whole_batch() if self.processes.size > 1 else nullcontext():
            for m in self.measured:
                m.accumulate(self.learn)

    @contextmanager
    def _whole_batch(self):
        """Within this context `learn` has the batch of all processes, which metrics must not gather
        again. A process that failed is noticed first: the others would wait for it.
        """
        learn = self.learn
        own = {k: vars(learn)[k] for k in ('pred', 'yb', 'loss')}
        self.processes.check()
        pred, yb = learn.to_detach((learn.pred, learn.yb), cpu=False)
        loss = learn.loss_func(pred, *yb)
        vars(learn).update(pred=pred, yb=yb, loss=loss, to_detach=partial(to_detach, gather=False))
        try:
            yield
        finally:
            vars(learn).update(own)
            del vars(learn)['to_detach']


def _without_collectives(model, processes):
    """Within DistributedDataParallel each forward pass waits for the other processes, which may
    have failed; so the buffers are exchanged once.
    """
    if processes.size == 1:
        return model
    model = unwrap(model)
    processes.broadcast(model.buffers())
    return model


# batch norm


# samples of which a column of an average is what the whole training set gives, but for .12 points of error from draw
# to draw, and .1 % of the loss: results/README.md, "How many samples batch norm needs"
_ENOUGH = 2000
_SEED = 0  # of the order in which a part of the training set is drawn


def provisional_batches(learn, taken: Taken | None = None) -> int | None:
    """How many training batches give statistics that do within a fit; `None`: all, where the training set is small.

    `taken`: as for `refresh_bn`.
    """
    return batches_for(learn, _ENOUGH, Processes(learn).size, taken)


def refresh_bn(
    learn,
    names,
    n_batches: int | None,
    in_fit: bool,
    dl=None,
    taken: Taken | None = None,
    is_provisional: bool = False,
) -> Moments:
    """Refresh the batch-norm layers `names` of `learn.model` on the training set, or `n_batches` of
    it, each sample once; or on `dl`. Other buffers are afterwards what they were.

    Outside a fit the events around a validation are sent as well: they set mixed precision and the
    like up and tear them down. Of several processes each takes a share of the samples, or
    `n_batches` of its own. Raises `PassCancelled` if a callback cancels the pass, `ValueError` if
    the training set can be gone through only once, and `PassFailed` if it failed in another
    process. After any of these the statistics are as they were.

    - `in_fit`: the pass is made from an event of a fit, whose `before_fit` has been sent already.
      (`after_cancel_fit` needs it said: fastai sends it when the epochs are over.)
    - `taken`: what the learner's own epochs took; more is not taken of a stream, which may have no
      end. `None`: what its length says.
    - `is_provisional`: the batches are the same in each such pass.
    """
    if dl is None:
        _check_repeatable(learn, _TRAINING)
    names = set(names)
    model = unwrap(learn.model)  # data-parallel replicas would each keep statistics of their own
    with aside(learn), _events_around(learn, in_fit), _together(learn) as processes:
        if is_provisional:
            seed_all(learn, _SEED)
        if dl is None and processes.size > 1:
            dl = share(learn.dls.train, processes, n_batches)
        elif dl is None:
            dl = training_loader(learn, n_batches, taken)
        # only here: of several processes, the events around a validation exchange the buffers for others
        layers = {name: m for name, m in model.named_modules() if name in names}
        refreshed = [t for m in layers.values() for t in m._buffers.values()]
        with (
            buffers_kept(model, but=refreshed),
            batch_moments(model, layers, processes.gather if processes.size > 1 else None) as moments,
            _with_model(learn, model),
            _gan_put_back(learn),
            learn.added_cbs(_EndBatch(moments)),
        ):
            _run(learn, dl)
    return moments


class _EndBatch(_PassCallback):
    "Tells `moments` where batches end; keeps the critic of a GAN on."

    def __init__(self, moments):
        self.moments = moments

    def before_validate(self):
        """Of a GAN, fastai has just switched to the generator. While the critic is on, a batch reaches both:
        the critic sees real and generated images, as in training."""
        trainer = getattr(self.learn, 'gan_trainer', None)
        if trainer is not None:
            trainer.switch(gen_mode=False)

    def after_batch(self):
        self.moments.end_batch()


@contextmanager
def _gan_put_back(learn):
    "At the end of this context the half of a GAN is on that was on before."
    trainer = getattr(learn, 'gan_trainer', None)
    mode = None if trainer is None else vars(trainer).get('gen_mode')
    try:
        yield
    finally:
        if mode is not None:
            trainer.switch(gen_mode=mode)


def refreshable(learn) -> list[str]:
    """Names of the batch-norm layers of `learn.model` whose statistics follow the weights, where no
    training tells.

    They are `tracked_bn`'s, but for those that a `BnFreeze` of the learner keeps from moving.
    """
    layers = tracked_bn(unwrap(learn.model))
    if any(isinstance(cb, BnFreeze) for cb in learn.cbs):
        layers = {name: m for name, m in layers.items() if not _is_frozen_by_callback(m)}
    return list(layers)


def _is_frozen_by_callback(layer) -> bool:
    "As fastai's `set_bn_eval` decides; a layer without parameters, at which that fails, is none."
    first = next(layer.parameters(), None)
    return isinstance(layer, bn_types) and first is not None and not first.requires_grad


# batches for several passes, and a comparison


def _validation_loader(learn, taken):
    return as_an_epoch(fresh_loader(learn.dls[1]), taken)


def kept_batches(learn, n_batches: int | None = None, train: bool = True, taken: Taken | None = None) -> KeptBatches:
    """Of the training set, each sample once, or `n_batches` of it; or of the validation set: for
    several passes over the same. `taken`: as for `refresh_bn`, or `validate_aside`.
    """
    _check_repeatable(learn, _TRAINING if train else _VALIDATION)
    if train:
        make = partial(training_loader, learn, n_batches, taken)
    else:
        make = partial(_validation_loader, learn, taken)
    with aside(learn):
        return KeptBatches(make)


def same_output(learn, other) -> bool:
    """Does `other`, a copy of `learn.model`, make the same of a validation batch as that does now,
    both in eval mode? Nothing of the learner is changed. `True` also where that cannot be told: the
    model cannot be called like that, or differs by itself from one time to the next."""
    own = unwrap(learn.model)
    try:
        with in_train_mode(own), aside(learn), torch.no_grad():
            first = FirstBatches(fresh_loader(learn.dls[1]), 1)
            batch = KeptBatches(lambda: first).batches[0]
            learn._split(learn._set_device(batch))
            outputs = []
            for model in (own, other, own):
                with randomness_kept(learn), holders_kept(learn), buffers_kept(own):
                    outputs.append(model.eval()(*learn.xb))
    except Exception:
        return True
    return _are_close(outputs[0], outputs[1]) or not _are_close(outputs[0], outputs[2])


def _are_close(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-5, equal_nan=True)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_are_close, a, b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_are_close(v, b[k]) for k, v in a.items())
    return True  # nothing that could be compared


# what passes share


_TRAINING, _VALIDATION = 0, 1  # places in `learn.dls`


def _check_repeatable(learn, which):
    "Raise `ValueError` if a pass through that loader would use up what training needs."
    used_up = unrepeatable(learn, which)
    if used_up:
        raise ValueError(
            f'{used_up[0]} can be gone through only once, and a pass aside from training would take from it what '
            'training needs: make it anew in `__iter__`, or hold it in an attribute of its own'
        )


def _events_around(learn, in_fit):
    "The events that fastai sends around a validation, unless those of a fit stand around the pass already."
    return nullcontext() if in_fit or is_fitting(learn, '_do_fit') else learn.validation_context()


@contextmanager
def _together(learn):
    """The processes that make a pass together. An error in one of them ends the pass in all: each
    waits for the others at its end.
    """
    together = Together(Processes(learn))
    try:
        yield together
    except Exception as e:
        together.fail(e)
        raise
    together.check()


def _run(learn, dl):
    "The learner's own validation loop over `dl`; the callbacks added to it collect what is wanted."
    try:
        learn._do_epoch_validate(dl=dl)
    except (CancelFitException, CancelEpochException, CancelTrainException):
        raise PassCancelled('a callback cancelled it') from None


@contextmanager
def _with_model(learn, model):
    "Within this context `model` stands in the place of the learner's."
    own = learn.model
    try:
        learn.model = model
        yield
    finally:
        learn.model = own


# which learners passes can serve


def check_engine(learn):
    """Raise `NotImplementedError` if the model is trained in a way in which it cannot be averaged
    and validated as a whole.
    """
    processes, model = Processes(learn), unwrap(learn.model)
    kinds = {type(o).__name__ for o in (*learn.model.modules(), *model.parameters())}
    sharded = sorted(kinds & {'FullyShardedDataParallel', 'FSDPModule', 'DTensor', 'DeepSpeedEngine'})
    if sharded:
        raise NotImplementedError(
            f'weights that are spread over processes ({sharded[0]}) cannot be averaged; use plain DDP'
        )
    if processes.size == 1 and num_distrib() > 1:
        raise NotImplementedError(
            f'this is one of {num_distrib()} processes (WORLD_SIZE), and the learner trains alone in it: call the fit '
            'within `with learn.distrib_ctx():`'
        )
    if processes.size > 1 and not isinstance(learn.model, DistributedDataParallel):
        raise NotImplementedError(
            f'averages know several processes with DistributedDataParallel only, not {type(learn.model).__name__}'
        )
