"""Averages of whole trainings: one is chosen on samples that no training has seen, and all are tested
on others."""

import gc
import io
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from time import perf_counter, time

from fastai.learner import Learner

from ..choosing import STARTS
from ..files import Lock
from ..history import WeightHistory
from ..modules import unwrap
from ..passes import kept_batches, refresh_bn, refreshable, validate_aside
from ..weights import read_weights
from .machine import TimeIsUp, now, process_settings
from .plan import Run, runs, stops
from .recipe_learner import loader_to_test_on, recipe_data, recipe_learner
from .record import duration, history_folder, json_number, weights_file
from .store import shortest, store, stored

__all__ = ['evaluate_seed', 'load_evaluations', 'LIVE']

_KIND = 'averages'
_BN_BATCHES = 20  # on which batch norm is refreshed where averages are only compared, as `choose` does
LIVE = 'swa', 'ema', 'power'  # the averages beside each run


def evaluate_seed(recipe, seed: int, out: Path, settings, source, threads: int, until: float, show) -> dict:
    """Choose averages of the runs that `seed` of `recipe` has left in `out`, or of those that an earlier call has left,
    and test all of them; returns what the file of the row then holds of it. At the end the histories are removed.

    Of each run:

    - 'rows': name -> 'choose' and 'test': loss and metric on the samples to choose on and on the test set, batch norm
      refreshed on the whole training set; and 'which' average of the history it is, if it is one. 'last' is the
      exception: the last weights as they are. 'refreshed' are these otherwise; 'best <column>' and 'mean <column>'
      the end and the mean of the epoch that is best on the samples to choose on; 'chosen <column>' what
      `WeightHistory.choose` has chosen.
    - 'choices': column -> 'gain' and 'std_error' by which the chosen average beats the last weights there, 'seconds'
      that choosing took, 'n' averages compared.
    - 'table': what it compared: average, loss, metric.
    - 'stopped', of the constant rate: number of epochs -> column -> the best mean of the last ones if the run had
      ended there, as in 'rows'.

    The other arguments are as for `run_seed`. Raises `TimeIsUp` if time does not suffice, `FileNotFoundError` or
    `ValueError` if what is needed is not there.
    """
    lock = Lock(out / f'seed-{seed}.json')
    try:
        found = stored(out, _KIND).get(seed)
        if found is None:
            found = {'kind': _KIND, 'seed': seed, 'finished': None, 'runs': {}}
        data, _ = recipe_data(recipe, source, settings)
        todo = [run for run in runs(recipe) if run.name not in found['runs']]
        with process_settings(settings, threads):
            for i, run in enumerate(todo):
                took = [of_run['seconds'] for of_run in found['runs'].values()]
                expected = max(took, default=0)
                if time() + expected > until:
                    raise TimeIsUp
                left = f', {duration(expected * (len(todo) - i))} left' if took else ''
                show(seed, f'seed {seed}  choosing between averages of {run.name}{left}')
                found['runs'][run.name] = _evaluated(recipe, run, seed, out, settings, data)
                store(out, found)
                gc.collect()  # the run's learner
        if not found['finished']:
            found['finished'] = now()
            store(out, found)
        for run in runs(recipe):
            shutil.rmtree(history_folder(out, seed, run.name), ignore_errors=True)
        return found
    finally:
        lock.release()


def _evaluated(recipe, run: Run, seed, out, settings, data) -> dict:
    "What that is worth which `run` has left: see `evaluate_seed`."
    began = perf_counter()
    learn = recipe_learner(recipe, seed, settings, data)
    evaluation = _Evaluation(learn, loader_to_test_on(recipe, settings, data, learn), recipe.metric)
    history = WeightHistory.load(history_folder(out, seed, run.name), learn)

    def file(what=''):
        return weights_file(out, seed, f'{run.name} {what}'.strip())

    res = {'epochs': len(run.lrs), **_chosen(history, evaluation)}
    rows = res['rows']
    rows['last'] = evaluation.tested(read_weights(file()), refreshed=False)
    rows['refreshed'] = evaluation.tested(read_weights(file()))
    for name in LIVE:
        rows[name] = evaluation.tested(read_weights(file(name)))
    for column in evaluation.columns:
        rows[f'best {column}'] = evaluation.tested(read_weights(file(f'best {column}')))
    epochs = [(epoch, epoch + 1) for epoch in range(len(run.lrs))]
    for column, row in _best_windows(history, evaluation, epochs).items():
        rows[f'mean {column}'] = row
    is_constant = len(set(run.lrs)) == 1 and not callable(run.lrs[0])
    if is_constant:
        res['stopped'] = {}
        for end in (*stops(recipe), len(run.lrs)):
            res['stopped'][str(end)] = _best_windows(history, evaluation, windows_to(end))
    res['seconds'] = round(perf_counter() - began, 1)
    return res


class _Evaluation:
    "Loss and metric of weights in the place of the learner's own, on batches that are drawn once."

    def __init__(self, learn: Learner, test, metric: str):
        self.learn = learn
        self.columns = 'valid_loss', metric
        self.bn = refreshable(learn)
        self.training = kept_batches(learn)
        self.first_training = kept_batches(learn, _BN_BATCHES)
        self.to_choose_on = kept_batches(learn, train=False)
        self.test = test

    def tested(self, weights: dict, refreshed: bool = True) -> dict:
        "On the samples to choose on, and on the test set."
        self._load(weights, self.training if refreshed else None)
        return {'choose': self._values(self.to_choose_on), 'test': self._values(self.test)}

    def compared(self, weights: dict) -> list[float]:
        "On the samples to choose on, as `choose` does."
        self._load(weights, self.first_training)
        return self._values(self.to_choose_on)

    def _load(self, weights, training):
        unwrap(self.learn.model).load_state_dict(weights)
        if training is not None and self.bn:
            refresh_bn(self.learn, self.bn, None, in_fit=False, dl=training)

    def _values(self, dl) -> list[float]:
        return _as_numbers(validate_aside(self.learn, dl, in_fit=False))


def _chosen(history: WeightHistory, evaluation: _Evaluation) -> dict:
    "What `choose` finds, by each column, and what that is worth."
    rows, choices = {}, {}
    for column in evaluation.columns:
        began = perf_counter()
        with redirect_stdout(io.StringIO()):  # it says what it has chosen
            table = history.choose(column)
        seconds = perf_counter() - began
        which = history.chosen
        weights = history.average()
        # of the last weights the batch norm is the training's own
        rows[f'chosen {column}'] = {'which': which} | evaluation.tested(weights, refreshed=bool(which))
        best = table.iloc[0]
        choices[column] = {
            'gain': json_number(shortest(float(best['gain']))),
            'std_error': json_number(shortest(float(best['std_error']))),
            'seconds': round(seconds, 2),
            'n': len(table),
        }
    compared = table.sort_index()
    values = [_as_numbers(row) for row in compared[list(evaluation.columns)].to_numpy()]
    return {'rows': rows, 'choices': choices, 'table': [[n, *v] for n, v in zip(compared['average'], values)]}


def _best_windows(history: WeightHistory, evaluation: _Evaluation, windows: list) -> dict[str, dict]:
    "Column -> the mean over the best of these windows (pairs of epochs), best on the samples to choose on."
    values = [evaluation.compared(history.average(epochs=window)) for window in windows]
    res = {}
    for i, column in enumerate(evaluation.columns):
        sign = 1 if column == 'valid_loss' else -1
        known = [j for j, v in enumerate(values) if v[i] is not None]
        best = windows[min(known, key=lambda j: sign * values[j][i])]
        res[column] = {'which': {'epochs': best}} | evaluation.tested(history.average(epochs=best))
    return res


def windows_to(end: int) -> list[tuple[int, int]]:
    "Windows, as pairs of epochs, that end with epoch `end` - 1."
    starts = {min(round(share * end), end - 1) for share in (*STARTS, 1)}
    return [(start, end) for start in sorted(starts)]


def _as_numbers(values) -> list:
    return [json_number(shortest(float(v))) for v in values]


# what the file of the row holds


def load_evaluations(folder: Path) -> dict[int, dict]:
    "Seed -> what `evaluate_seed` found, for the seeds that are complete."
    return {seed: found for seed, found in stored(folder, _KIND).items() if found['finished']}
