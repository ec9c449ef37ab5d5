"""`CheckpointCallback`: a fit that is killed goes on where it was, bit for bit."""

import weakref
from dataclasses import dataclass, field
from pathlib import Path

from fastai.callback.core import CancelEpochException
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler
from fastai.callback.tracker import TrackerCallback
from fastai.learner import Learner
from fastcore.foundation import L
from torch import nn

from .attributes import plain_attributes
from .checkpoint_files import CheckpointFiles, damaged, remove_checkpoint
from .checks import check_count
from .columns import recorder_of
from .files import Lock
from .fitting import FitCallback, locked_for
from .journal import N_EPOCHS, SCHEDULE, Journal, why_not_the_longer_fit
from .modules import named_tensors, unwrap
from .packing import Packer, pack, unpack
from .processes import Processes
from .state import restore, take
from .walk import keeps_state, loaders, named_callbacks
from .warn import warn

__all__ = ['CheckpointCallback', 'data_sizes', 'forget_fits', 'look_before_the_first_fit']

_FIRST = -1000  # the `order` of what sees an event before all others
_LAST = 1000

_JOURNALS = '_fastai_swa_journals'  # the learner's attribute that holds them
# Plain attributes before the first fit. There are two kinds of keys: a callback, to its own attributes, and a learner,
# to those of all else that it holds. They are settings unless a fit changes them: a new run of the program makes them
# again.
_before_first_fit = weakref.WeakKeyDictionary()


class _Journals(dict):
    """File -> `Journal`, of one learner: fastai forgets a callback that is passed to a fit when that is over.

    It lies in the learner. A journal refers to callbacks, and an attached one to its learner: kept anywhere else, the
    learner would live as long as the program. A copy or an export of the learner has none.
    """

    def __deepcopy__(self, memo):
        return _Journals()

    def __reduce__(self):
        return dict, ()


def _journals_of(learn) -> _Journals:
    journals = vars(learn).get(_JOURNALS)
    if not isinstance(journals, _Journals):
        journals = vars(learn)[_JOURNALS] = _Journals()
    return journals


def forget_fits(learn: Learner, file: Path):
    "The next fit of `learn` with a checkpoint in `file` counts as the first one there."
    _journals_of(learn).pop(Path(file).resolve(), None)


@dataclass
class _Fit:
    "A fit under way."

    processes: Processes  # that train together
    journal: Journal  # the fits on the same file
    files: CheckpointFiles  # in the first process
    settings: dict = None  # what must be the same where it goes on
    to_restore: dict = None  # state in the file, to be put back at its epoch; `None` once done, or for a fit begun anew
    lock: Lock = None  # on the file, in the first process
    is_past: bool = False  # was it completed before?
    epoch: int = -1  # the one begun last
    is_in_epoch: bool = False  # is that one under way?
    runs_last: bool = False  # has all ended that this callback must see before the others?
    muted: list = field(default_factory=list)  # attributes of callbacks, and the `run` that they had

    def mute(self, learn, but):
        "Let no callback but `but` see the events of an epoch that was trained before."
        if self.muted:
            return
        for cb in learn.cbs:
            if cb is not but:
                self.muted.append((vars(cb), vars(cb).get('run', True)))
                vars(cb)['run'] = False

    def unmute(self):
        for attributes, run in self.muted:
            attributes['run'] = run
        self.muted = []


class CheckpointCallback(FitCallback):
    """Keep the whole state of a fit in a file, so that the same call, made again after a crash,
    goes on and ends bitwise as without it.

    The state is written before the first epoch and before each `every`-th one after it, in one
    step: the file is always complete. It is removed when the fit completes. What only grows, such as
    the losses of all steps, and what earlier fits have left are written once, to files beside it
    that go when it goes (`<path>.<id>.steps` and `.past`: who moves the file moves them, too); so a
    checkpoint does not cost more the longer a fit is. Weights, optimizer,
    averages, the Recorder's history and table, trackers, the gradient scaler and all random
    generators are in it (`state.take`); it loads with `torch.load(weights_only=True)`. Fits of one
    learner on one path are numbered: those before the interrupted one, such as the first stage of
    `fine_tune`, are skipped and leave the learner as it was before the latter; for that the file of
    a second fit holds this state too. A fit that is stopped within an epoch (Ctrl-C, an exception,
    a NaN) leaves the file of the last epoch boundary written.

    A call with more epochs goes on with a file made for fewer: with its own schedule from there on,
    and with the first averaged epoch of the file. That is bitwise the longer fit where the two
    agree on the epochs done; where they do not, a warning says so.

    Raises, before anything of the fit has changed: `ValueError` if the file is damaged, foreign or
    newer, none of which is ever overwritten, or if the model, the data's size, the schedule or the
    like is another one than in the file; `RuntimeError` if another run is using the path; `OSError`
    if it cannot be written. A later epoch that cannot be written is a warning: training goes on.
    """

    _stateattrs = '_fit', '_rows'

    def __init__(
        self,
        path,  # the file; a relative path is one from the current directory. Two fits that run at once need two
        every: int = 1,  # write it every so many epochs
        resume=True,  # False: start anew, whatever the file holds (but what is no checkpoint is not overwritten)
    ):
        self.file = Path(path).resolve()
        if self.file.is_dir():
            raise ValueError(f'path must be a file, and {self.file} is a folder')
        self.every = check_count('every', every)
        if not isinstance(resume, bool):
            raise TypeError(f'resume must be True or False, not {resume!r}')
        self.resume = resume
        self._init_state()

    def _init_state(self):
        super()._init_state()
        self._fit = None
        self._rows = []  # of the table so far

    @property
    def order(self) -> int:
        """It sees an epoch before all other callbacks, and the end of the fit after them: when all
        is done, the file can go. (fastai sorts the callbacks anew at each event.)
        """
        return _LAST if self._fit is not None and self._fit.runs_last else _FIRST

    # the events of a fit

    def before_fit(self):
        learn = self.learn
        self._rows = []
        if sum(isinstance(cb, CheckpointCallback) for cb in learn.cbs) > 1:
            raise ValueError('this fit has two CheckpointCallbacks; pass one')
        journal = _journals_of(learn).setdefault(self.file, Journal(self.file))
        processes = Processes(learn)
        files = CheckpointFiles(self.file if processes.rank == 0 else None)
        self._fit = _Fit(processes, journal, files)  # from here on `over` gives the lock back, whatever happens
        saved = processes.first(self._open)
        settings = _settings(learn, processes)
        if saved:
            settings = self._go_to_place(saved, settings)
        elif journal.fits:
            end = take(learn, _before_first_fit.get(learn))
            _gather(end, processes)
            journal.begin_another(end)
        self._fit.settings = settings
        journal.begin(settings)
        _warn_of_workers(learn)
        look_before_the_first_fit(learn)

    def before_epoch(self):
        fit, learn = self._fit, self.learn
        fit.epoch = learn.epoch
        fit.is_in_epoch = True
        if fit.to_restore is None:
            self._keep_row()
            if self._due():
                self._write()
        elif fit.is_past or learn.epoch < fit.to_restore['epoch']:
            fit.mute(learn, but=self)
            raise CancelEpochException
        else:
            fit.unmute()
            self._go_on()

    def after_epoch(self):
        fit = self._fit
        fit.is_in_epoch = False
        # a fit that is passed by ends here before the trackers' `after_fit`, which it switches off
        fit.runs_last = fit.epoch == self.learn.n_epoch - 1 and not fit.is_past

    def after_cancel_fit(self):
        self._fit.runs_last = True

    def after_fit(self):
        fit = self._fit
        if fit.is_past:
            self._pass_by()
        elif fit.is_in_epoch:
            self._tell(f'the fit was stopped within epoch {fit.epoch}; the file is kept')
        elif fit.epoch >= 0 and fit.to_restore is None:  # else a callback cancelled it before it began
            fit.processes.first(self._remove)
            self._files_are_replaced()
            fit.journal.complete(fit.settings, _getter_of_states(self.learn))

    def over(self):
        if self._fit.lock is not None:
            self._fit.lock.release()

    # before the first epoch

    def _open(self) -> dict | None:
        "Lock the path; what the file there holds, if that counts."
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._fit.lock = locked_for(self, self.file)
        saved = self._fit.files.read()
        if self.resume:
            return saved
        self._fit.files.begin_anew()
        return None

    def _go_to_place(self, saved: dict, settings: dict) -> dict:
        """Let this fit stand at its place among those of the file. Returns the settings to write from
        now on: the file's or, if it has become longer, its own.
        """
        fit = self._fit
        place = fit.journal.open(saved, settings)
        fit.to_restore = saved['state']
        fit.is_past = place.is_past
        if place.settings[N_EPOCHS] == settings[N_EPOCHS]:
            return place.settings
        if fit.processes.rank == 0:
            self._say_longer(place.settings, settings)
        return settings

    def _say_longer(self, was, now):
        "The file is of a fit of fewer epochs: will this one end where the longer one would?"
        n = now[N_EPOCHS]
        self._tell(f'the file is of a fit of {was[N_EPOCHS]} epochs, which now becomes one of {n}')
        reasons = why_not_the_longer_fit(was, now, self._fit.to_restore['epoch'])
        if reasons:
            warn(
                f'{self.file.name}: {" and ".join(reasons)}: the fit does not end where one of {n} epochs from the '
                'beginning would'
            )

    # writing

    def _due(self) -> bool:
        return self.learn.epoch % self.every == 0

    def _keep_row(self):
        "Take the row of the epoch before."
        recorder = recorder_of(self.learn)
        if self.learn.epoch > 0 and recorder is not None:
            self._rows.append([_plain(cell) for cell in recorder.log])

    def _write(self):
        fit, learn = self._fit, self.learn
        histories = fit.files.histories
        for cb in learn.cbs:
            if isinstance(cb, FitCallback):
                cb.unmute_trackers()  # of the epoch before, which is over
        try:
            histories.begin()
            state = take(learn, _unchanged(learn), histories)
            _gather(state, fit.processes)
            state['data'] = data_sizes(learn)
            state['rows'] = histories.cut('rows', self._rows, Packer())
            fit.processes.first(fit.files.write, fit.journal.content(fit.settings, state))
            self._files_are_replaced()
        except Exception as e:
            if learn.epoch == 0:
                raise  # before the first step
            if fit.processes.rank == 0:
                self._not_written(e)

    def _files_are_replaced(self):
        "Callbacks with files of their own learn that those which only an older checkpoint names may go."
        for cb in self.learn.cbs:
            if hasattr(type(cb), 'after_checkpoint'):
                cb.after_checkpoint()

    def _not_written(self, error):
        warn(f'{error}; training goes on, and the file keeps an earlier epoch')

    def _remove(self):
        try:
            remove_checkpoint(self.file)
        except OSError as e:
            warn(f'{self.file} could not be removed ({e}): remove it, or the same fit called again goes on from it')

    def _tell(self, text):
        if self._fit.processes.rank == 0:
            print(f'{self.file.name}: {text}')

    # going on

    def _go_on(self):
        "Put the state in the file into the learner, and show the rows of the epochs before."
        fit, learn = self._fit, self.learn
        state, fit.to_restore = fit.to_restore, None
        if state['data'] != data_sizes(learn):
            raise ValueError(
                f'{self.file} is of a fit whose data were exchanged on the way ({data_sizes(learn)}, then '
                f'{state["data"]}: samples, batch size, batches): it cannot go on'
            )
        recorder = recorder_of(learn)
        columns = None if recorder is None else list(recorder.metric_names)
        self._restore(state, _unchanged(learn))
        if 'rows' in state:  # since format 3
            self._rows = unpack(state['rows'])
        if recorder is not None:
            self._reorder_rows(recorder, columns)
        if fit.processes.rank == 0:
            self._show_rows()

    def _restore(self, state, unchanged):
        """Put `state` into the learner. Raises `ValueError`, naming the file, if it is of another model or cannot be
        what was written.
        """
        try:
            restore(self.learn, {**state, **_own(state, self._fit.processes)}, unchanged)
        except ValueError as e:
            raise ValueError(f'{self.file} cannot be gone on with: {e}') from e
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as e:
            raise damaged(self.file, e) from e

    def _show_rows(self):
        journal, learn = self._fit.journal, self.learn
        number = f'fit {len(journal.fits) + 1}, ' if journal.fits else ''
        self._tell(f'going on with {number}epoch {learn.epoch} (from 0) of {learn.n_epoch}')
        for cb in learn.cbs:
            if isinstance(cb, ProgressCallback) and getattr(cb, 'mbar', None):
                cb.mbar.update(0)  # its bar must begin there
        for row in self._rows:
            learn.logger(L(row))

    def _reorder_rows(self, recorder, columns):
        """The file's rows have the averages' columns in the order in which their callbacks were
        passed then: bring them into that of `columns`.
        """
        places = [list(recorder.metric_names).index(name) for name in columns]
        recorder.metric_names = L(columns)
        if places == sorted(places):
            return
        self._fit.files.histories.write_anew()
        self._rows = [_in_order(row, places) for row in self._rows]
        without_time = places[: len(places) - bool(recorder.add_time)]
        of_values = [i - 1 for i in without_time[1:]]  # `values` have neither the epoch, which is first, nor the time
        recorder.values = [L(_in_order(row, of_values)) for row in recorder.values]

    def _pass_by(self):
        "End a fit that was completed before: the learner is as it was after that."
        fit, learn = self._fit, self.learn
        fit.unmute()
        end = fit.journal.end
        kept = fit.journal.pass_by(fit.settings)
        self._restore({**end, 'states': end['states'] | kept}, _before_first_fit.get(learn))
        for cb in learn.cbs:
            if isinstance(cb, TrackerCallback):
                cb.run = False  # would load or save its best weights now
        self._tell(f'fit {len(fit.journal.fits)} was completed before; it is skipped')

    # its own state, beside what it writes of the fit

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict):
        self._rows = state.get('rows', [])  # in files of the formats 1 and 2


def _in_order(row, places) -> list:
    "The cells of `row` at `places`; a row of another length stays as it is."
    return [row[i] for i in places] if len(row) == len(places) else row


def _plain(cell):
    try:
        pack(cell)
    except TypeError:
        return str(cell)
    return cell


def _getter_of_states(learn):
    """A function that gives what the callbacks of a fit keep of it: name -> packed state. It is called
    later: until then an average may still be refreshed.
    """
    keeping = []
    for name, cb in named_callbacks(learn):
        if keeps_state(cb) and not isinstance(cb, CheckpointCallback):
            keeping.append((name, cb))
    return lambda: {name: pack(cb.state_dict()) for name, cb in keeping}


# what a process has of its own


def _gather(state: dict, processes: Processes):
    """Put into `state` what is each process's own, of all of them: random generators, and what data,
    modules and other objects hold.
    """
    for key in ('random', 'held'):
        state[key] = processes.gather(state[key])


def _own(state: dict, processes: Processes) -> dict:
    "This process's part of what `_gather` has brought together; files of format 1 have no 'held'."
    return {key: state[key][processes.rank] for key in ('random', 'held') if key in state}


# what a new run of the program makes again


def look_before_the_first_fit(learn):
    "Note the plain attributes of what has not been in a fit yet."
    attributes = plain_attributes(learn)
    for name, cb in named_callbacks(learn):
        _before_first_fit.setdefault(cb, attributes.pop(name, {}))
    _before_first_fit.setdefault(learn, attributes)


def _unchanged(learn) -> dict:
    """What `take` may leave out, since a new run of the program makes it again, and `restore` puts
    back where an interrupted fit has moved it.
    """
    res = dict(_before_first_fit.get(learn, {}))
    for name, cb in named_callbacks(learn):
        if cb in _before_first_fit:
            res[name] = _before_first_fit[cb]
    return res


# by what a fit is known


def _settings(learn: Learner, processes: Processes) -> dict:
    "What must be the same where a fit goes on, under the name that it has for a user."
    model, opt = unwrap(learn.model), learn.opt
    if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in model.parameters()):
        raise ValueError(
            'the model has a lazy module that has not seen a batch yet; run one batch through the model first'
        )
    shapes = {}
    for name, p in named_tensors(model.named_parameters).items():
        shapes[name] = [*p.shape, str(p.dtype).removeprefix('torch.')]
    res = {
        N_EPOCHS: learn.n_epoch,
        'the model': shapes,
        'the parameters to train': [name for name, p in model.named_parameters() if p.requires_grad],
        'the optimizer': [[len(group) for group in opt.param_lists], sorted(opt.hypers[0])],
        'lr': [float(h['lr']) for h in opt.hypers],
        'wd': [float(h['wd']) for h in opt.hypers if h.get('wd') is not None],
        SCHEDULE: [_sampled(cb, learn) for cb in learn.cbs if isinstance(cb, ParamScheduler)],
        'the data (samples, batch size, batches)': data_sizes(learn),
        'the metrics': [str(m.name) for m in learn.metrics],
        'the number of processes': processes.size,
    }
    for cb in learn.cbs:
        if hasattr(type(cb), 'fit_settings'):
            key = getattr(cb, 'key', '0')  # '0': the only one, or the average of the name 'swa'
            name = type(cb).__name__
            res[name if key == '0' else f'{name} {key!r}'] = pack(cb.fit_settings())
    return res


def _sampled(scheduler, learn) -> dict:
    "The values of a schedule at the starts of the epochs."
    n_steps = _len(learn.dls.train) or 1

    def value(f, epoch):
        v = f(epoch, 0, n_steps) if getattr(scheduler, 'by_epoch', False) else f(epoch / learn.n_epoch)
        return list(map(float, v)) if hasattr(v, '__len__') else float(v)

    return {name: [value(f, epoch) for epoch in range(learn.n_epoch)] for name, f in scheduler.scheds.items()}


def data_sizes(learn) -> list:
    "Of each loader: numbers of samples, batch size, and batches; `None` where that is not known."
    res = []
    for dl in loaders(learn):
        batch_size = getattr(dl, 'bs', getattr(dl, 'batch_size', None))
        res.append([_len(getattr(dl, 'dataset', None)), batch_size, _len(dl)])
    return res


def _len(o):
    try:
        return len(o)
    except TypeError:
        return None  # a stream


def _warn_of_workers(learn):
    if any(getattr(dl, 'persistent_workers', False) for dl in loaders(learn)):
        warn(
            'a loader has persistent_workers, whose random state is not in the checkpoint: a resumed fit draws other '
            'augmentations'
        )
