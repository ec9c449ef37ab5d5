"""Random sequences of what users do to a learner, against a slow model of what should hold after
each of them."""

import re
import shutil
import tempfile
import warnings
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.learner import load_learner
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastai_swa import CheckpointCallback

from .helpers import At, assert_close, learner, loaders, parameters, raising
from .reference import twins


class Interrupt(KeyboardInterrupt):
    pass


class Watch(Callback):
    """Notes, from the weights alone, what should be folded; the first to see an epoch that is
    really trained, the last to see its end.
    """

    order = 1000
    machine = None  # on the class: what a callback holds itself is state of the fit, which a checkpoint brings back

    def before_epoch(self):
        if not self.learn.lock.locked():
            self.machine.epoch_begins(self.learn)

    def after_step(self):
        self.machine.step_taken(self.learn)

    def after_train(self):
        self.machine.training_part_ended(self.learn)


class Samples(list):
    "A data set that an export can leave behind."

    def new_empty(self):
        return Samples()


def split(m):
    return [list(m[:4].parameters()), list(m[4:].parameters())]


class Session(RuleBasedStateMachine):
    @initialize(start=st.integers(0, 1), every=st.sampled_from([None, None, 2, 4]), seed=st.integers(0, 3))
    def open(self, start, every, seed):
        self.folder, self.start, self.every = Path(tempfile.mkdtemp()), start, every
        self.points, self.epochs, self.n_steps, self.new = [], [], 0, True  # what the average should be made of
        self.pending, self.saved, self.n_saves, self.n_epochs, self.enabled = None, None, 0, 0, True
        self.start_process(seed)

    def start_process(self, seed):
        dls = loaders()
        for dl in dls.loaders:
            dl.dataset = Samples(dl.dataset)
        self.learn = learner(dls=dls, seed=seed, path=self.folder, splitter=split)
        self.learn.to_swa(swa_start=self.start, every=self.every)
        Watch.machine = self
        self.learn.add_cb(Watch())
        self.swa, self.enabled, self.calls = self.learn.swa, True, []
        self.weights = [p.clone() for p in parameters(self.learn.model)]

    # the slow model

    def average_state(self):
        return list(self.points), list(self.epochs), self.n_steps, self.new

    def epoch_begins(self, learn):
        self.n_epochs += 1
        if self.resumed is not None and learn.epoch == self.resumed['epoch']:  # what lies before is not trained again
            (self.points, self.epochs, self.n_steps, self.new), resumed = self.resumed['average'], self.resumed
            self.resumed = None
            assert all(map(torch.equal, parameters(learn.model), resumed['weights'])), 'resumed with other weights'
        elif learn.epoch == 0:
            self.n_steps, self.new = 0, True
        self.points, self.epochs = list(self.points), list(self.epochs)
        self.boundary = {
            'epoch': learn.epoch,
            'average': self.average_state(),
            'weights': [p.clone() for p in parameters(learn.model)],
        }

    def fold(self, learn):
        if self.new:
            self.points, self.epochs, self.new = [], [], False
        self.points.append([p.clone() for p in parameters(learn.model)])
        if not self.epochs or self.epochs[-1] != learn.epoch:
            self.epochs.append(learn.epoch)

    def step_taken(self, learn):
        if not (self.every and self.swa.enabled and learn.epoch >= self.start):
            return
        self.n_steps += 1
        if self.n_steps % self.every == 0:
            self.fold(learn)

    def training_part_ended(self, learn):
        if not self.every and self.swa.enabled and learn.epoch >= self.start:
            self.fold(learn)

    def train(self, call, interrupt=None):
        if self.pending is None:
            self.calls.append((call, self.enabled))
        self.resumed = self.pending
        self.fits(call, interrupt)
        self.weights = [p.clone() for p in parameters(self.learn.model)]

    def fits(self, call, interrupt=None):
        kind, n = call
        cbs = [CheckpointCallback(self.folder / 'run.ckpt')]
        if interrupt:
            cbs.append(At('after_batch', interrupt[0], raising(Interrupt()), batch=interrupt[1], training=True))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # a fit too short for its start
            try:
                if kind == 'fit':
                    self.learn.fit(n, 0.05, cbs=cbs)
                else:
                    self.learn.fine_tune(n, 1e-2, cbs=cbs)
                self.pending = None
            except Interrupt:
                self.pending = self.boundary | {'call': call, 'enabled': self.enabled}

    # what a user does

    @precondition(lambda self: self.pending is None)
    @rule(call=st.tuples(st.sampled_from(['fit', 'fit', 'fine_tune']), st.integers(1, 3)))
    def fit(self, call):
        self.train(call)

    @precondition(lambda self: self.pending is None)
    @rule(
        call=st.tuples(st.sampled_from(['fit', 'fit', 'fine_tune']), st.integers(1, 3)),
        epoch=st.integers(0, 2),
        batch=st.integers(0, 5),
    )
    def interrupted_fit(self, call, epoch, batch):
        self.train(call, (epoch, batch))

    @precondition(lambda self: self.pending is not None and self.pending['enabled'] == self.enabled)
    @rule()
    def call_again(self):
        self.train(self.pending['call'])
        assert self.pending is None and not self.learn.opt.frozen_idx

    @precondition(lambda self: self.pending is not None)
    @rule(seed=st.integers(4, 9))
    def crash_and_run_the_script_again(self, seed):
        calls, pending = self.calls, self.pending
        self.start_process(seed)
        self.points, self.epochs, self.calls = [], [], calls
        n_epochs, self.resumed = self.n_epochs, None
        for call, self.swa.enabled in calls[:-1]:
            self.fits(call)  # completed before: nothing is trained
        assert self.n_epochs == n_epochs
        self.pending, self.swa.enabled = pending, pending['enabled']
        self.enabled = self.swa.enabled
        self.call_again()

    @precondition(lambda self: self.pending is not None)
    @rule()
    def call_another_fit(self):
        before = (self.folder / 'run.ckpt').read_bytes()
        try:
            self.learn.fit(7, 0.07, cbs=CheckpointCallback(self.folder / 'run.ckpt'))
        except ValueError as e:
            assert 'of another fit' in str(e)
        else:
            raise AssertionError('not refused')
        assert (self.folder / 'run.ckpt').read_bytes() == before

    @precondition(lambda self: self.pending is not None)
    @rule()
    def give_the_run_up(self):
        for file in self.folder.glob('run.ckpt*'):
            file.unlink()
        self.pending = None
        self.start_process(0)
        self.points, self.epochs = [], []

    @rule()
    def toggle(self):
        self.enabled = self.swa.enabled = not self.enabled

    @precondition(lambda self: self.points)
    @rule()
    def apply(self):
        self.swa.apply()
        self.weights = [p.clone() for p in parameters(self.swa.swa_model)]

    @precondition(lambda self: self.points)
    @rule()
    def predict_with_the_average(self):
        with self.swa.averaged(), self.learn.no_bar():
            preds, _ = self.learn.get_preds(act=lambda x: x)
        self.swa.swa_model.eval()
        with torch.no_grad():
            expected = torch.cat([self.swa.swa_model(x) for x, _ in self.learn.dls.valid])
        assert_close([preds], [expected], tol=1e-5)

    @rule()
    def save(self):
        self.n_saves += 1
        self.learn.save(f'saved{self.n_saves}', with_opt=False)
        self.saved = self.n_saves, list(self.weights)

    @precondition(lambda self: self.points)
    @rule()
    def save_the_average(self):
        self.n_saves += 1
        with self.swa.averaged():
            self.learn.save(f'saved{self.n_saves}', with_opt=False)
        self.saved = self.n_saves, [p.clone() for p in parameters(self.swa.swa_model)]

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self):
        self.learn.load(f'saved{self.saved[0]}', with_opt=False)
        self.weights = self.saved[1]

    @rule(average=st.booleans())
    def export(self, average):
        watch = next(cb for cb in self.learn.cbs if isinstance(cb, Watch))
        machine, watch.machine = watch.machine, None
        if average and self.points:
            with self.swa.averaged():
                self.learn.export('export.pkl')
            expected = parameters(self.swa.swa_model)
        else:
            self.learn.export('export.pkl')
            expected = self.weights
        watch.machine = machine
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert all(map(torch.equal, parameters(load_learner(self.folder / 'export.pkl').model), expected))

    @rule()
    def validate(self):
        with self.learn.no_bar():
            self.learn.validate()

    # what should hold

    @invariant()
    def the_average_is_the_mean_of_its_points(self):
        if not hasattr(self, 'folder'):
            return
        assert self.swa.n_averaged == len(self.points) and self.swa.averaged_epochs == self.epochs
        if self.points:
            assert_close(parameters(self.swa.swa_model), twins.mean(self.points), tol=1e-5)

    @invariant()
    def the_learner_holds_its_own_weights(self):
        if not hasattr(self, 'folder'):
            return
        assert all(map(torch.equal, parameters(self.learn.model), self.weights))
        if self.swa.swa_model is not None:
            average = {p.data_ptr() for p in self.swa.swa_model.parameters()}
            assert not average & {p.data_ptr() for p in self.learn.model.parameters()}
        if self.learn.opt is not None:
            assert {id(p) for group in self.learn.opt.param_lists for p in group} == {
                id(p) for p in self.learn.model.parameters()
            }

    @invariant()
    def nothing_is_left_over(self):
        if not hasattr(self, 'folder'):
            return
        assert sorted(type(cb).__name__ for cb in self.learn.cbs) == [
            'CastToTensor',
            'ProgressCallback',
            'Recorder',
            'SWACallback',
            'TrainEvalCallback',
            'Watch',
        ]
        assert all(vars(cb).get('run', True) for cb in self.learn.cbs)
        files = sorted(p.name for p in self.folder.glob('run*'))
        beside = [name for name in files if re.fullmatch(r'run\.ckpt\.[0-9a-f]{16}\.(steps|past)', name)]
        assert [name for name in files if name not in beside] == ['run.ckpt'] * (self.pending is not None)
        assert len(beside) <= 2 and (not beside or self.pending is not None)

    @invariant()
    def the_table_is_aligned(self):
        if not hasattr(self, 'folder') or not getattr(self.learn.recorder, 'values', None):
            return
        assert len({len(row) for row in self.learn.recorder.values}) == 1

    def teardown(self):
        if hasattr(self, 'folder'):
            shutil.rmtree(self.folder)


Session.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking takes minutes
    suppress_health_check=list(HealthCheck),
)
test_whatever_a_user_does_in_whatever_order = Session.TestCase
