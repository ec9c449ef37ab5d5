"""Transfer learning, seed by seed and resumable: fine-tunings from one frozen stage, what can be made of them, and
what that is worth on images like those trained on, and on shifted ones."""

import gc
import io
from contextlib import redirect_stdout
from pathlib import Path
from time import time

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner  # from there, since its file gives it fit_one_cycle
from fastai.learner import Recorder
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed, trainable_params
from fastai.vision.learner import default_split
from fastcore.foundation import noop

from ..aside import autocast_left
from ..averaging import ema
from ..callback import SWACallback
from ..checkpoint import CheckpointCallback
from ..ensemble import Ensemble
from ..files import Lock, save_weights
from ..fitting import is_fitting
from ..modules import unwrap
from ..passes import kept_batches, refresh_bn, refreshable, validate_aside
from ..randomness import seed_all
from ..weights import read_weights, weights_of
from .machine import TimeIsUp, process_settings
from .recipe_learner import BF16, EpochRecorder
from .record import duration, json_number, snapshots_folder, weights_file
from .rows import REFRESHED
from .scores import scores
from .shifts import SHIFTS
from .store import shortest
from .transfer_record import TransferRecord
from .transfers import FineTuning, Transfer

__all__ = ['fine_tune_seed', 'transfer_learner', 'label_of', 'FROZEN', 'BEST', 'TESTS']

FROZEN = 'frozen stage'
BEST = 'best single run'
TESTS = 'test', *(f'test {how}' for how in SHIFTS)


def fine_tune_seed(
    recipe: Transfer,
    seed: int,
    out: Path,
    settings,
    source=None,
    threads: int | None = None,
    until: float = float('inf'),
    show=noop,
    jobs: int = 1,
) -> dict:
    """Run all stages of a seed of `recipe` (scaled), or what an earlier call has left of them; returns the record that
    `out`/runs.jsonl then holds. In `out` all weights stay: of the pretraining, of the frozen stage and the fine-tunings
    in seed-<seed>-runs, of the EMAs beside these, the tail and one-cycle.

    The record has, beside what `TransferRecord` says:

    - 'rows': all is tested with the batch norm refreshed on the whole training set, but for weights as their training
      has left them, beside which they stand refreshed, too, and for the ensemble of the runs.
    - 'runs': of each fine-tuning its name, rate, and loss and metric of its last epoch on the images to choose on;
      'best': the name of the one that is best there, by the metric.
    - 'soups': way -> 'members', and 'refused': why there is none.
    - 'wise': 'ts', for each set of images to choose on the 'curves' of the metric, and the t 'chosen' there.

    The other arguments, and what it raises, are as for `run_seed`.
    """
    if time() > until:
        raise TimeIsUp
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out / f'seed-{seed}.json')
    try:
        data, images = recipe.task.load(source, settings.images, settings.test_images)
        record = TransferRecord(recipe, seed, out, settings, images, threads or torch.get_num_threads(), jobs)
        with process_settings(settings, record.data['threads']):
            work = _Seed(recipe, seed, out, settings, data, record, until, show)
            for name, (stage, n_passes) in work.stages().items():
                if name not in record.data['stages']:
                    work.run(name, stage, n_passes)
                    gc.collect()  # the stage's learners
        record.finish()
        return record.data
    finally:
        lock.release()


def label_of(recipe: Transfer, run: FineTuning) -> str:
    "What the row of a run is called."
    again = run.seed % 100
    return f'fine_tune at {run.base_lr:g}' + (f', seed {again}' if again else '')


# learners


def transfer_learner(recipe: Transfer, seed: int, settings, data, pretrained: dict | None = None) -> Learner:
    "For the fine-tuning, with the order, the augmentation and the new head of `seed`."
    set_seed(seed)
    dls = recipe.task.loaders(data, recipe.bs, seed)
    return _learner(dls, recipe.task.model(data, pretrained), settings, default_split)  # body and head


def _learner(dls, model, settings, splitter=trainable_params) -> Learner:
    device = torch.device(settings.device)
    model = model.to(device, memory_format=torch.channels_last)
    learn = Learner(dls.to(device), model, CrossEntropyLossFlat(), splitter=splitter, metrics=accuracy)
    learn.remove_cbs([Recorder, ProgressCallback, MixedPrecision])
    learn.add_cb(EpochRecorder())
    if settings.precision == 'bf16':
        learn.add_cb(BF16())
    learn.create_opt()
    return learn


# the stages


class _Seed:
    "A seed under way. Each stage makes its learners anew, so that it does not matter in which session it runs."

    def __init__(self, recipe: Transfer, seed, out, settings, data, record: TransferRecord, until, show):
        self.recipe = recipe
        self.seed = seed
        self.out = out
        self.settings = settings
        self.data = data
        self.record = record
        self.until = until
        self.show = show
        self.runs = recipe.runs(seed)
        self.pass_seconds = record.data.get('pass_seconds', 0.0)  # of refreshing and testing one model

    def stages(self) -> dict:
        "Name -> method, and how many models it refreshes and tests at most, beside its epochs."
        n = len(self.runs)
        stages = {
            'pretraining': (self.pretrain, 0),
            'fine-tunings': (self.fine_tune, n),
            'single models': (self.test_single_models, 2 * n + 6),
            'soups': (self.make_soups, 4 * n + 6),
            'WiSE-FT': (self.make_wise, len(SHIFTS) * self.recipe.n_wise + 3),
            'tail': (self.train_tail, 4),
            'one-cycle': (self.train_one_cycle, 2),
        }
        if not self.recipe.pretrain_epochs:
            del stages['pretraining']
        return stages

    def run(self, name: str, stage, n_passes: int):
        expected = n_passes * self.pass_seconds
        if time() + expected > self.until:
            raise TimeIsUp
        left = f', about {duration(expected)} and its epochs' if expected else ''
        self.show(self.seed, f'seed {self.seed}  {name}{left}')
        self.record.begin(name)
        with autocast_left(), redirect_stdout(io.StringIO()):  # averages and choices say what they are
            found = stage()
        self.record.end(found)

    # learners and files

    def learner(self, weights=None) -> Learner:
        pretrained = read_weights(self.file('pretrained')) if self.recipe.pretrain_epochs else None
        learn = transfer_learner(self.recipe, self.seed, self.settings, self.data, pretrained)
        if weights is not None:
            unwrap(learn.model).load_state_dict(weights)
        return self.watched(learn)

    def watched(self, learn) -> Learner:
        learn.add_cb(_Watch(self))
        learn.logger = noop
        return learn

    def file(self, what: str) -> Path:
        return weights_file(self.out, self.seed, what)

    def checkpoint(self, what: str) -> CheckpointCallback:
        return CheckpointCallback(self.out / f'seed-{self.seed}.{what}.ckpt')

    def keep(self, model, what: str):
        save_weights(self.file(what), weights_of(model))

    def ensemble(self, learn) -> Ensemble:
        return Ensemble(snapshots_folder(self.out, self.seed, 'runs'), learn)

    def best_run(self) -> FineTuning:
        return next(run for run in self.runs if run.name == self.record.data['best'])

    def weights_of_run(self, run: FineTuning) -> dict:
        return read_weights(snapshots_folder(self.out, self.seed, 'runs') / f'{run.name}.pth')

    # stages; each returns what the record is to hold

    def pretrain(self) -> dict:
        recipe = self.recipe
        set_seed(self.seed)
        dls = recipe.task.loaders_to_pretrain(self.data, 2 * recipe.bs, self.seed)
        learn = self.watched(_learner(dls, recipe.task.network_to_pretrain(), self.settings))
        learn.fit_one_cycle(recipe.pretrain_epochs, recipe.pretrain_lr, cbs=self.checkpoint('pretrained'))
        self.keep(learn.model, 'pretrained')
        return {'pretrained': _numbers(learn.recorder.values[-1][1:])}

    def fine_tune(self) -> dict:
        "One run after the other, so that each can keep an average of its own in a file."
        learn = self.learner()
        for n in range(1, len(self.runs) + 1):
            swa = SWACallback(0, every=1, weight=ema(self.recipe.ema, warmup=True), swa_eval_freq=0, name='ema')
            kept = _KeptAverage(self.file(f'ema {self.runs[n - 1].name}'))
            ensemble = self._fine_tuned(learn, n, [swa, kept])
        table = ensemble.runs
        runs = []
        for run, row in zip(self.runs, table.to_dict('records')):
            values = _numbers([row['valid_loss'], row[self.recipe.metric]])
            runs.append({'name': run.name, 'label': label_of(self.recipe, run), 'choose': values})
        usable = [run for run in runs if None not in run['choose']]
        best = max(usable, key=lambda run: (run['choose'][1], -run['choose'][0]))
        return {'runs': runs, 'best': best['name']}

    def _fine_tuned(self, learn, n: int, cbs=()) -> Ensemble:
        "The first `n` runs; the learner is at the frozen stage's end afterwards."
        recipe = self.recipe
        rates = [run.base_lr for run in self.runs[:n]]
        seeds = [run.seed for run in self.runs[:n]]
        folder = snapshots_folder(self.out, self.seed, 'runs')
        return learn.fine_tune_soup(
            recipe.epochs, rates, recipe.freeze_epochs, folder, seeds, cbs=cbs, lr_mult=recipe.lr_mult
        )

    def test_single_models(self) -> dict:
        learn = self.learner()
        judge = _Judge(self, learn)
        ensemble = self.ensemble(learn)
        rows = judge.both(FROZEN, read_weights(ensemble.anchor))
        for run, of_run in zip(self.runs, self.record.data['runs']):
            if None not in of_run['choose']:
                rows |= judge.both(of_run['label'], self.weights_of_run(run))
        best = label_of(self.recipe, self.best_run())
        for ending in ('', REFRESHED):
            rows[BEST + ending] = rows[best + ending]
        rows['EMA over its steps'] = judge.refreshed(read_weights(self.file(f'ema {self.best_run().name}')))
        rows['ensemble of the runs'] = judge.together(ensemble)
        return {'rows': rows, 'pass_seconds': round(self.pass_seconds, 2)}

    def make_soups(self) -> dict:
        learn = self.learner()
        ensemble = self.ensemble(learn)
        rows, soups, judge = {}, {}, _Judge(self, learn)
        for how in ('uniform', 'greedy', 'stock'):
            try:
                soup = ensemble.soup(how, by=self.recipe.metric)
            except ValueError as e:  # that is a result, too
                soups[how] = {'members': [], 'refused': ' '.join(str(e).split())}
                continue
            soups[how] = {'members': soup.members, 'refused': None}
            rows[f'{how} soup'] = judge.refreshed(soup.state_dict())
        return {'rows': rows, 'soups': soups}

    def make_wise(self) -> dict:
        learn = self.learner(self.weights_of_run(self.best_run()))
        loaders = self.loaders()
        before = read_weights(self.ensemble(learn).anchor)
        metric = self.recipe.metric
        curves, chosen, weights = {}, {}, {}
        for how in SHIFTS:
            profile = learn.wise_ft(before, metric, self.recipe.n_wise, loaders[f'choose {how}'])
            for name, column in (('choose', f'valid_{metric}'), (f'choose {how}', f'dl_{metric}')):
                if name not in curves:
                    curves[name] = _numbers(profile.column(column))
                    chosen[name] = profile.best(column, np.greater)
                    weights[name] = profile.solution(chosen[name])
        judge = _Judge(self, learn)
        rows = {}
        for name, state in weights.items():
            on = name.removeprefix('choose').strip()
            row = 'WiSE-FT' + (f', t chosen on {on} images' if on else '')
            rows[row] = judge.refreshed(state)
        return {'rows': rows, 'wise': {'ts': profile.t.tolist(), 'curves': curves, 'chosen': chosen}}

    def train_tail(self) -> dict:
        run = self.best_run()
        learn = self.learner(self.weights_of_run(run))
        learn.unfreeze()
        seed_all(learn, run.seed)
        lr = self.recipe.tail_rate * run.base_lr / 2  # of which fine_tune's second stage takes the half
        swa = learn.fit_swa(
            self.recipe.tail_epochs,
            slice(lr / self.recipe.lr_mult, lr),
            swa_lr=lr,
            swa_start=0,
            include_start=True,
            swa_eval_freq=0,
            cbs=self.checkpoint('tail'),
        )
        self.keep(swa.swa_model, 'tail average')
        self.keep(learn.model, 'tail')
        judge = _Judge(self, learn)
        average, end = read_weights(self.file('tail average')), read_weights(self.file('tail'))
        return {'rows': {'tail, averaged': judge.refreshed(average)} | judge.both('tail, single weights', end)}

    def train_one_cycle(self) -> dict:
        "From the frozen stage on, as the best run, but as many epochs as that and the tail together."
        recipe = self.recipe
        run = self.best_run()
        learn = self.learner()
        self._fine_tuned(learn, len(self.runs))  # all is there: it brings the learner to the frozen stage's end
        seed_all(learn, run.seed)
        learn.unfreeze()
        lr = run.base_lr / 2
        n = recipe.epochs + recipe.tail_epochs
        cbs = self.checkpoint('one-cycle')
        learn.fit_one_cycle(n, slice(lr / recipe.lr_mult, lr), pct_start=0.3, div=5.0, cbs=cbs)  # as fine_tune's
        self.keep(learn.model, 'one-cycle')
        judge = _Judge(self, learn)
        return {'rows': judge.both('longer one-cycle', read_weights(self.file('one-cycle')))}

    def loaders(self) -> dict:
        "As the task gives them, on the device."
        res = self.recipe.task.judged_on(self.data)
        return {name: dl.to(torch.device(self.settings.device)) for name, dl in res.items()}


class _Judge:
    "What weights are worth in the place of the learner's own: set of images -> loss and metric."

    def __init__(self, work: _Seed, learn: Learner):
        self.work = work
        self.learn = learn
        self.bn = refreshable(learn)
        self.training = kept_batches(learn)
        loaders = work.loaders()
        self.sets = {name: loaders[name] for name in ('choose', *TESTS)}

    def both(self, name: str, weights: dict) -> dict:
        "Two rows: as they are, and with the batch norm refreshed."
        return {name: self._values(weights, None), name + REFRESHED: self.refreshed(weights)}

    def refreshed(self, weights: dict) -> dict:
        began = time()
        res = self._values(weights, self.training)
        self.work.pass_seconds = max(self.work.pass_seconds, time() - began)
        return res

    def together(self, ensemble: Ensemble) -> dict:
        res = {}
        for name, dl in self.sets.items():
            probs, targets = ensemble.member_preds(dl=dl)
            found = scores(probs.mean(0), targets)
            res[name] = _numbers([found['loss'], found['accuracy']])
        return res

    def _values(self, weights, training) -> dict:
        unwrap(self.learn.model).load_state_dict(weights)
        if training is not None and self.bn:
            refresh_bn(self.learn, self.bn, None, in_fit=False, dl=training)
        return {name: _numbers(validate_aside(self.learn, dl, in_fit=False)) for name, dl in self.sets.items()}


def _numbers(values) -> list:
    return [json_number(shortest(float(v))) for v in values]


# callbacks


class _Watch(Callback):
    "Says where a fit stands, and ends it when there is no time for another epoch."

    order = 101  # behind what writes a checkpoint

    def __init__(self, work: _Seed):
        self.work = work
        self.longest = 0.0  # seconds of an epoch

    # a checkpoint keeps nothing of it
    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        pass

    def before_train(self):
        if time() + 1.2 * self.longest > self.work.until:
            raise TimeIsUp('there is no time for another epoch')

    def after_epoch(self):
        if not is_fitting(self.learn):  # fastai sends it in a validation, too
            return
        work = self.work
        self.longest = max(self.longest, work.record.epoch_is_over())
        done = f'epoch {self.epoch + 1} of {self.n_epoch}'
        row = dict(zip(self.recorder.metric_names, self.recorder.log))
        metric = work.recipe.metric
        said = f'{metric} {100 * row[metric]:.2f} %'
        work.show(work.seed, f'seed {work.seed}  {work.record.stage}  {done}  {said}')


class _KeptAverage(Callback):
    "Writes the average called `ema` to a file when a fit ends; that of the last fit stays."

    order = 100  # before the checkpoint goes

    def __init__(self, file: Path):
        self.file = file

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        pass

    def after_fit(self):
        if self.learn.epoch == self.learn.n_epoch - 1 and self.learn.ema.swa_model is not None:
            save_weights(self.file, weights_of(self.learn.ema.swa_model))
