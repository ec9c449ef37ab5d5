"`Soup`: one model of several that were fine-tuned from the same weights. How these are summed is in `mixing`."

import math

import pandas as pd
import torch
from fastai.learner import Learner

from .batches import has_validation_set
from .checks import check_choice, check_known
from .columns import less_is_better, validated_columns
from .mixing import mean_cosine, mean_of, stock_of
from .modules import clean_copy, named_tensors, unwrap
from .one_model import OneModel
from .passes import kept_batches, provisional_batches, validate_aside
from .processes import Processes
from .solutions import one_solution, source_of
from .walk import not_copied
from .weights import load_into, refuse_nan, weights_of

__all__ = ['Soup', 'make_soup']

_APART = 0.05  # mean cosine of the updates below which members have nothing in common
_CAUSES = (
    'the members do not lie in one basin. Were they trained from different initialisations, or at too high a rate? '
    "how='greedy' leaves out those that do not fit"
)


class Soup:
    """One model made of several members, as `Ensemble.soup` gives it.

    - `members`: numbers, from 0, of the ensemble's members that are in it, in the order in which they came in.
    - `table`: a DataFrame of all that was validated, members and soups: what, loss and metrics, and whether it was
      kept. All had their batch norm refreshed on the same training batches.
    """

    def __init__(self, model: OneModel, how: str, members: list[int], of: int, table: pd.DataFrame):
        self._model = model
        self.how = how
        self.members = members
        self.of = of  # members of the ensemble
        self.table = table

    def averaged(self):
        """Within this context the learner predicts, validates, shows, saves and exports with the soup; gives the
        learner. Batch norm is refreshed on the whole training set first. As `SWACallback.averaged`.
        """
        return self._model.averaged()

    def apply(self):
        "Put the soup into the learner's model for good, in place, batch norm refreshed."
        self._model.apply()

    def state_dict(self) -> dict:
        """Its weights, as plain names and tensors in the host's memory. No pass is made: batch norm is refreshed once
        `averaged()` or `apply()` was used.
        """
        return self._model.state_dict()

    def solutions(self) -> dict:
        "So `rays`, `Curve`, `Ensemble` and `average_checkpoints` take the soup itself."
        return {'soup': self.state_dict()}

    def __repr__(self):
        return f'Soup ({self.how}) of {len(self.members)} of {self.of} models: use it within `averaged()`, or `apply()`'


def make_soup(learn: Learner, named: dict, how: str, by: str, anchor, comp=None) -> Soup:
    """As `Ensemble.soup`, of the solutions `named`, in their order."""
    check_choice('how', how, ('uniform', 'greedy', 'stock'))
    columns = validated_columns(learn)
    check_known('by', by, columns)
    if how == 'greedy' and not has_validation_set(learn):
        raise ValueError("how='greedy' needs a validation set, by which it decides")
    if how == 'stock' and (anchor is None or len(named) < 2):
        raise ValueError(
            "how='stock' needs two members at least, and anchor, the weights that they were fine-tuned from"
        )
    if Processes(learn).size > 1:
        raise RuntimeError('soup() validates in one process: call it outside of distrib_ctx')
    pot = _Pot(learn, named, anchor)
    if how != 'greedy':
        pot.refuse_strangers()
    validation = _Validation(learn, columns) if has_validation_set(learn) else None
    if how == 'greedy':
        members = _greedy(pot, validation, by, less_is_better(by, comp))
    else:
        members = list(range(len(named)))
        _refuse_if_worse(pot, validation, how)
    model = OneModel(learn).fill(pot.soup(members, how))
    table = pd.DataFrame([] if validation is None else validation.rows, columns=['model', *columns, 'kept'])
    return Soup(model, how, members, len(named), table)


def _greedy(pot: '_Pot', validation: '_Validation', by: str, is_less: bool) -> list[int]:
    """The best member, then one after the other, the better first, each that does not make the mean worse (Wortsman et
    al. 2022, recipe 1).
    """
    sign = 1 if is_less else -1
    values = [sign * validation.add(f'member {i}', weights)[by] for i, weights in enumerate(pot.members)]
    order = sorted(range(len(values)), key=lambda i: values[i] if math.isfinite(values[i]) else math.inf)
    members = order[:1]
    best = values[order[0]]
    validation.keep(order[0])
    for i in order[1:]:
        trial = [*members, i]
        value = sign * validation.add(_called(trial), pot.soup(trial, 'uniform'))[by]
        if value <= best:
            members = trial
            best = value
            validation.keep()
    return members


def _refuse_if_worse(pot: '_Pot', validation: '_Validation | None', how: str):
    "Raise `ValueError` if the loss of the soup of all is above that of its worst member."
    if validation is None:
        return
    losses = [validation.add(f'member {i}', weights)['valid_loss'] for i, weights in enumerate(pot.members)]
    everyone = list(range(len(losses)))
    loss = validation.add(_called(everyone), pot.soup(everyone, how))['valid_loss']
    validation.keep()
    if not loss <= max(losses):  # a loss that is nan is worse, too
        raise ValueError(
            f'the {how} soup has a loss of {loss:.4g}, above that of its worst member, {max(losses):.4g}: {_CAUSES}'
        )


def _called(members: list[int]) -> str:
    return f'soup of {", ".join(map(str, members))}'


class _Pot:
    "The members' weights, checked to be of the learner's architecture."

    def __init__(self, learn, named: dict, anchor):
        scratch = clean_copy(learn.model, not_copied(learn))
        self.members = [_weights_as_of(scratch, solution, name) for name, solution in named.items()]
        self.anchor = None
        if anchor is not None:
            self.anchor = _weights_as_of(scratch, one_solution('anchor', anchor), 'anchor')
        self.rest = weights_of(learn.model)
        self.parameters = set(named_tensors(unwrap(learn.model).named_parameters))

    def refuse_strangers(self):
        "Raise `ValueError` if the members' updates from the anchor have nothing in common."
        if self.anchor is None:
            return
        moved = [m for m in self.members if not self._is_anchor(m)]
        if len(moved) < 2:
            return
        cosine = mean_cosine(moved, self.anchor, self.parameters)
        if cosine < _APART:
            raise ValueError(f'the updates of the members from anchor have a mean cosine of {cosine:.3f}: {_CAUSES}')

    def _is_anchor(self, member: dict) -> bool:
        return all(torch.equal(member[name], self.anchor[name]) for name in self.parameters & member.keys())

    def soup(self, members: list[int], how: str) -> dict:
        weights = [self.members[i] for i in members]
        if how == 'stock':
            return stock_of(weights, self.anchor, self.rest, self.parameters)
        return mean_of(weights, self.rest)


def _weights_as_of(scratch, solution, name: str) -> dict:
    load_into(scratch, source_of(solution), name)
    weights = weights_of(scratch)
    refuse_nan(weights, name)
    return weights


class _Validation:
    "Validates state dicts, each with its batch norm refreshed on the same training batches."

    def __init__(self, learn, columns: list[str]):
        self.learn = learn
        self.columns = columns
        self.model = OneModel(learn)
        self.training = kept_batches(learn, provisional_batches(learn))
        self.validation = kept_batches(learn, train=False)
        self.rows = []  # of the table

    def add(self, name: str, weights: dict) -> dict:
        "Column -> value."
        with self.learn.no_bar(), self.model.fill(weights).lent(self.training), torch.no_grad():
            values = validate_aside(self.learn, self.validation, in_fit=False)
        row = dict(zip(self.columns, values))
        self.rows.append({'model': name, **row, 'kept': False})
        return row

    def keep(self, number: int = -1):
        "What was validated at that place, or last, is kept."
        self.rows[number]['kept'] = True
