"""One set of weights that a learner can take on: for a while, or for good, with batch norm refreshed. Averages that are
chosen after a fit, soups and points between two models share it.
"""

import weakref
from contextlib import contextmanager

import torch
from fastai.learner import Learner

from .averaging import equal, refuse_mismatch
from .batches import Taken
from .fit_average import FitAverage
from .fitting import no_fit
from .modules import plain_name, unwrap
from .passes import refresh_bn, refreshable
from .views import lending, refuse_lent
from .warn import warn

__all__ = ['OneModel']


class OneModel:
    "A clean copy of the model of `learn`, for weights that `fill` gives it."

    def __init__(self, learn: Learner):
        self._average = FitAverage.begin(learn, equal, None, None)

    def fill(self, weights: dict, bn: list[str] | None = None, taken: Taken | None = None, are_fresh: bool = False):
        """Take on the state dict `weights`.

        - `bn`: names of the layers whose batch norm is refreshed before the weights are used; `None`: those that a
          training would move. `are_fresh`: they need not be.
        - `taken`: as for `passes.refresh_bn`.

        Raises `ValueError`, naming them, for tensors that the learner's model does not have so.
        """
        learn = self._learner()
        own = {plain_name(name): value for name, value in unwrap(learn.model).state_dict().items()}
        refuse_mismatch('the model', own, weights)
        average = self._average
        average.running.load_state_dict({'swa_model': weights, 'n_averaged': 1, 'master': {}})
        average.bn = list(refreshable(learn) if bn is None else bn)
        average.taken = taken
        average.stale = bool(average.bn) and not are_fresh
        return self

    def _learner(self) -> Learner:
        learn = self._average.learner()
        if learn is None:
            raise RuntimeError('the learner of these weights is gone')
        return learn

    @contextmanager
    def lent(self, dl=None):
        """Within this context the learner's model has the weights, batch norm refreshed on `dl`, or on the whole
        training set once."""
        learn = self._learner()
        with self._average.running.lent_to(learn.model):
            self._refresh(learn, dl)
            yield learn

    def _refresh(self, learn, dl=None):
        average = self._average
        if not average.stale:
            return
        moments = refresh_bn(learn, average.bn, None, in_fit=False, dl=dl, taken=average.taken)
        if dl is None:
            average.stale = False
            for sentence in moments.remarks.values():
                warn(sentence)

    @contextmanager
    def averaged(self):
        """Within this context the learner predicts, validates, shows, saves and exports with the weights; gives the
        learner. Batch norm is refreshed first. As `SWACallback.averaged`.
        """
        learn = self._learner()
        running = self._average.running
        with lending(learn, 'averaged()', self.averaged, self._version), running.lent_to(learn.model), no_fit(learn):
            self._refresh(learn)
            yield learn

    def _version(self):
        "What changes when `averaged()` would give other weights."
        return weakref.ref(self._average.running)

    def apply(self):
        """Put the weights into the learner's model for good, in place, batch norm refreshed.

        Raises `RuntimeError` inside a context in which the learner is lent something.
        """
        refuse_lent(self._learner(), 'apply()')
        with self.lent() as learn:
            pass
        self._average.running.copy_to(learn.model)

    def state_dict(self) -> dict:
        """The weights, as plain names and tensors in the host's memory. No pass is made: batch norm has been refreshed
        if they were used.
        """
        res = {}
        for name, value in self._average.running.swa_model.state_dict().items():
            is_tensor = isinstance(value, torch.Tensor)
            res[plain_name(name)] = value.detach().to('cpu', copy=True) if is_tensor else value
        return res
