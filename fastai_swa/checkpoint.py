"""`CheckpointCallback`: a fit that is killed goes on where it was, bit for bit."""

import warnings
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
from .checks import check_count
from .columns import recorder_of
from .files import Lock, read, write
from .fitting import FitCallback, is_fitting
from .modules import named_tensors, unwrap
from .packing import pack
from .processes import Processes
from .state import restore, take
from .walk import keeps_state, loaders, named_callbacks

__all__ = ['CheckpointCallback']

_KIND = 'checkpoint'
_VERSION = 2  # of the file's format
_CHANGING = 'the parameters to train', 'wd'  # settings that a fit may change by itself
# what a call that goes on with a fit may change, if it has more epochs
_N_EPOCHS = 'the number of epochs'
_SCHEDULE = 'the schedule'
_START = 'the first averaged epoch'


class CheckpointCallback(FitCallback):
    """Keep the whole state of a fit in one file, so that the same call, made again after a crash,
    goes on and ends bitwise as without it.

    The state is written before the first epoch and before each `every`-th one after it, in one
    step: the file is always complete. It is removed when the fit completes. Weights, optimizer,
    averages, the Recorder's history and table, trackers, the gradient scaler and all random
    generators are in it (`state.take`); it loads with `torch.load(weights_only=True)`. Fits of one
    learner on one path are numbered: those before the interrupted one, such as the first stage of
    `fine_tune`, are skipped and leave the learner as it was before the latter; for that the file of
    a second fit holds this state too. A fit that is stopped within an epoch (Ctrl-C, an exception,
    a NaN) leaves the file of the last epoch boundary written.

    A call with more epochs goes on with a file made for fewer: with its own schedule from there on,
    and with the first averaged epoch of the file. That is bitwise the longer fit where the two
    agree on the epochs done, and where not that is said.

    Raises, before anything of the fit has changed: `ValueError` if the file is damaged, foreign or
    newer, none of which is ever overwritten, or if the model, the data's size, the schedule or the
    like is another one than in the file; `RuntimeError` if another run is using the path; `OSError`
    if it cannot be written. A later epoch that cannot be written is a warning: training goes on.
    """

    # sees an epoch before all others. At the end of the fit it comes last: when all is done, the file can go
    order = _FIRST = -1000
    _stateattrs = '_fit', '_lock', '_rows', 'order'

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
        self._fit = self._lock = None  # the fit under way; the lock on the path, held meanwhile
        self._rows, self.order = [], self._FIRST  # rows of the table so far

    def over(self):
        if self._lock is not None:
            self._lock.release()
        self._lock = None
        self.order = self._FIRST

    # the events of a fit

    def before_fit(self):
        learn = self.learn
        self._rows = []
        if sum(isinstance(cb, CheckpointCallback) for cb in learn.cbs) > 1:
            raise ValueError('this fit has two CheckpointCallbacks; pass one')
        processes, past = Processes(learn), _pasts.setdefault(learn, {}).setdefault(self.file, _Past())
        self._fit = _Fit(processes, past)  # from here on `over` gives the lock back, whatever happens
        saved, settings = processes.first(self._open), _settings(learn, processes)
        place = -1
        if saved:
            _complete_old(saved, settings)
            place = _place(saved['fits'], [settings, {**settings, **past.changing}], len(past.fits), self.file)
            was = saved['fits'][place]
            past.fits, past.end, past.kept, past.callbacks = saved['fits'][:place], saved['end'], saved['kept'], []
            if was[_N_EPOCHS] == settings[_N_EPOCHS]:
                settings = was
            elif not processes.rank:
                self._say_extended(was, settings, saved['state']['epoch'])
        elif past.fits:
            past.kept = [*past.kept[: len(past.fits) - 1], past.kept_by_last()]
            past.end = take(learn, _first_held.get(learn))
            _gather(past.end, processes)
        past.changing = {k: settings[k] for k in _CHANGING}
        if any(getattr(dl, 'persistent_workers', False) for dl in loaders(learn)):
            warnings.warn(
                'a loader has persistent_workers, whose random state is not in the checkpoint: a resumed fit draws '
                'other augmentations'
            )
        attributes = plain_attributes(learn)
        for name, cb in named_callbacks(learn):
            _first_seen.setdefault(cb, attributes.pop(name, {}))
        _first_held.setdefault(
            learn, {path: attrs for path, attrs in attributes.items() if path not in dict(named_callbacks(learn))}
        )
        self._fit.settings, self._fit.saved = settings, saved
        self._fit.is_past = bool(saved) and place < len(saved['fits']) - 1

    def _say_extended(self, was, now, n_done):
        "A file of fewer epochs is gone on with: will it end where the longer fit would?"
        self._tell(f'the file is of a fit of {was[_N_EPOCHS]} epochs, which now becomes one of {now[_N_EPOCHS]}')
        reasons = []
        if _done(was, n_done) != _done(now, n_done):
            reasons.append('the schedule is another one on the epochs done')
        for name, settings in now.items():
            if isinstance(settings, dict) and settings.get(_START) != was[name].get(_START):
                reasons.append(
                    f'averaging starts in epoch {was[name][_START]} as in the file, not in epoch {settings[_START]}'
                )
        if reasons:
            warnings.warn(
                f'{self.file.name}: {" and ".join(reasons)}: the fit does not end where one of {now[_N_EPOCHS]} epochs '
                'from the beginning would'
            )

    def _open(self):
        "Lock the path; what the file there holds, if anything."
        self.file.parent.mkdir(parents=True, exist_ok=True)
        owner = _owners.get(self.file)
        # left from an interruption
        if owner not in (None, self) and not (owner.learn and is_fitting(owner.learn, in_all_threads=True)):
            owner.over()
        self._lock = Lock(self.file)
        _owners[self.file] = self
        saved = read(self.file, _KIND, _VERSION) if self.file.exists() else None
        return saved if self.resume else None

    def before_epoch(self):
        fit, learn = self._fit, self.learn
        fit.epoch, fit.within = learn.epoch, True
        if fit.saved is None:
            return self._write()
        if fit.is_past or learn.epoch < fit.saved['state']['epoch']:
            fit.mute(learn, self)
            raise CancelEpochException
        fit.unmute()
        self._go_on()

    def after_epoch(self):
        fit = self._fit
        fit.within = False
        if fit.epoch == self.learn.n_epoch - 1 and not fit.is_past:
            self.order = -self._FIRST

    def after_cancel_fit(self):
        self.order = -self._FIRST

    def after_fit(self):
        fit, learn = self._fit, self.learn
        if fit.is_past:
            self._pass_by(fit)
        elif fit.within:
            self._tell(f'the fit was stopped within epoch {fit.epoch}; the file is kept')
        elif fit.epoch >= 0 and fit.saved is None:  # else a callback cancelled it before it began
            fit.processes.first(self._remove)
            fit.past.completed(fit.settings, learn)

    def _remove(self):
        try:
            self.file.unlink(missing_ok=True)
        except OSError as e:
            warnings.warn(
                f'{self.file} could not be removed ({e}): remove it, or the same fit called again goes on from it'
            )

    def _tell(self, text):
        print(f'{self.file.name}: {text}')

    # writing and going on

    def state_dict(self) -> dict:
        return {'rows': [[_plain(cell) for cell in row] for row in self._rows]}

    def load_state_dict(self, state: dict):
        self._rows = state['rows']

    def _not_written(self, error):
        warnings.warn(f'{error}; training goes on, and the file keeps an earlier epoch')

    def _due(self) -> bool:
        return self.learn.epoch % self.every == 0

    def _write(self):
        fit, learn = self._fit, self.learn
        recorder = recorder_of(learn)
        if learn.epoch > 0 and recorder is not None:
            self._rows.append(list(recorder.log))
        if not self._due():
            return
        for cb in learn.cbs:
            if isinstance(cb, FitCallback):
                cb.unmute_trackers()  # of the epoch before, which is over
        try:
            state = take(learn, _settings_of_objects(learn))
            _gather(state, fit.processes)
            state['data'] = _sizes(learn)
            content = {
                'fits': [*fit.past.fits, fit.settings],
                'kept': fit.past.kept,
                'end': fit.past.end,
                'state': state,
            }
            fit.processes.first(write, self.file, _KIND, _VERSION, content)
        except Exception as e:
            if learn.epoch == 0:
                raise  # before the first step
            if fit.processes.rank == 0:
                self._not_written(e)

    def _go_on(self):
        fit, learn = self._fit, self.learn
        state, fit.saved = fit.saved['state'], None
        if state['data'] != _sizes(learn):
            raise ValueError(
                f'{self.file} is of a fit whose data were exchanged on the way ({_sizes(learn)}, then {state["data"]}: '
                'samples, batch size, batches): it cannot go on'
            )
        recorder = recorder_of(learn)
        columns = None if recorder is None else list(recorder.metric_names)
        restore(learn, {**state, **_own(state, fit.processes)}, _settings_of_objects(learn))
        if recorder is not None:
            self._reorder_rows(recorder, columns)
        if fit.processes.rank:
            return
        number = f'fit {len(fit.past.fits) + 1}, ' * bool(fit.past.fits)
        self._tell(f'going on with {number}epoch {learn.epoch} (from 0) of {learn.n_epoch}')
        for cb in learn.cbs:
            # its bar must begin there
            if isinstance(cb, ProgressCallback) and getattr(cb, 'mbar', None):
                cb.mbar.update(0)
        for row in self._rows:
            learn.logger(L(row))

    def _reorder_rows(self, recorder, columns):
        """Rows written where the averages of a fit were passed in another order get the `columns`
        of this one.
        """
        places = [list(recorder.metric_names).index(name) for name in columns]
        recorder.metric_names = L(columns)
        if places == sorted(places):
            return
        self._rows = [[row[i] for i in places] if len(row) == len(places) else row for row in self._rows]
        places = [i - 1 for i in places[1 : len(places) - bool(recorder.add_time)]]  # without the epoch and the time
        recorder.values = [L(row[i] for i in places) if len(row) == len(places) else row for row in recorder.values]

    def _pass_by(self, fit):
        "End a fit that was completed before: the learner is as it was after that."
        fit.unmute()
        end, kept = fit.past.end, fit.past.kept[len(fit.past.fits)]
        state = {**end, 'states': end['states'] | kept, **_own(end, fit.processes)}
        restore(self.learn, state, _first_held.get(self.learn))
        for cb in self.learn.cbs:
            if isinstance(cb, TrackerCallback):
                cb.run = False  # would load or save its best weights now
        fit.past.fits = [*fit.past.fits, fit.settings]
        if fit.processes.rank == 0:
            self._tell(f'fit {len(fit.past.fits)} was completed before; it is skipped')


def _gather(state: dict, processes: Processes):
    "Random generators, and what data, modules and other objects hold, are each process's own."
    for key in ('random', 'held'):
        state[key] = processes.gather(state[key])


def _own(state: dict, processes: Processes) -> dict:
    "This process's part of what `_gather` has brought together; files of format 1 have no 'held'."
    return {key: state[key][processes.rank] for key in ('random', 'held') if key in state}


@dataclass
class _Fit:
    "A fit under way."

    processes: Processes
    past: '_Past'
    settings: dict = None  # what must be the same where it goes on
    saved: dict = None  # what the file held, until this fit has gone on from it
    is_past: bool = False  # whether it was completed before
    epoch: int = -1  # the epoch begun last
    within: bool = False  # whether that one is not over
    # attributes of callbacks that see nothing of epochs trained before, and their `run`
    muted: list = field(default_factory=list)

    def mute(self, learn, but):
        "Let no callback but `but` see the events of an epoch that was trained before."
        if self.muted:
            return
        self.muted = [(vars(cb), vars(cb).get('run', True)) for cb in learn.cbs if cb is not but]
        for attrs, _ in self.muted:
            attrs['run'] = False

    def unmute(self):
        for attrs, run in self.muted:
            attrs['run'] = run
        self.muted = []


class _Past:
    "What a learner has done on one path so far."

    def __init__(self):
        # the settings of the completed fits; the state after the last one, once another begins
        self.fits, self.end = [], None
        self.callbacks = []  # of the last one: names, and those with a state of their own
        self.kept = []  # for each of the fits, once another begins: what its callbacks kept, such as an average
        self.changing = {}  # settings that a fit may change by itself, as they were before the one begun last

    def completed(self, settings, learn):
        self.fits, self.changing = [*self.fits, settings], {}
        self.callbacks = [
            (name, cb)
            for name, cb in named_callbacks(learn)
            if keeps_state(cb) and not isinstance(cb, CheckpointCallback)
        ]

    def kept_by_last(self) -> dict:
        return {name: pack(cb.state_dict()) for name, cb in self.callbacks}


_pasts = weakref.WeakKeyDictionary()  # learner -> file -> _Past
_owners = weakref.WeakValueDictionary()  # file -> the callback that locked it last
# callback -> its plain attributes before its first fit: settings, unless the fit changes them
_first_seen = weakref.WeakKeyDictionary()
_first_held = weakref.WeakKeyDictionary()  # learner -> the same of data, modules, losses and what callbacks hold


def _settings_of_objects(learn) -> dict:
    """What `take` may leave out, since a new run of the program makes it again, and `restore` puts
    back where an interrupted fit has moved it.
    """
    return _first_held.get(learn, {}) | {
        name: _first_seen[cb] for name, cb in named_callbacks(learn) if cb in _first_seen
    }


def _plain(cell):
    try:
        pack(cell)
    except TypeError:
        return str(cell)
    return cell


def _settings(learn: Learner, processes: Processes) -> dict:
    "What must be the same where a fit goes on, under the name that it has for a user."
    model, opt = unwrap(learn.model), learn.opt
    if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in model.parameters()):
        raise ValueError(
            'the model has a lazy module that has not seen a batch yet; run one batch through the model first'
        )
    res = {
        _N_EPOCHS: learn.n_epoch,
        'the model': {
            name: [*p.shape, str(p.dtype).removeprefix('torch.')]
            for name, p in named_tensors(model.named_parameters).items()
        },
        'the parameters to train': [name for name, p in model.named_parameters() if p.requires_grad],
        'the optimizer': [[len(group) for group in opt.param_lists], sorted(opt.hypers[0])],
        'lr': [float(h['lr']) for h in opt.hypers],
        'wd': [float(h['wd']) for h in opt.hypers if h.get('wd') is not None],
        _SCHEDULE: [
            _sampled(cb, learn.n_epoch, _len(learn.dls.train) or 1)
            for cb in learn.cbs
            if isinstance(cb, ParamScheduler)
        ],
        'the data (samples, batch size, batches)': _sizes(learn),
        'the metrics': [str(m.name) for m in learn.metrics],
        'the number of processes': processes.size,
    }
    for cb in learn.cbs:
        if hasattr(type(cb), 'fit_settings'):
            key = getattr(cb, 'key', '0')  # of several averages
            res[type(cb).__name__ if key == '0' else f'{type(cb).__name__} {key!r}'] = pack(cb.fit_settings())
    return res


def _complete_old(saved: dict, settings: dict):
    """A file of format 1 does not say all that is compared now of a callback's settings: there the
    fit's own count.
    """
    if saved['version'] > 1:
        return
    for fit in saved['fits']:
        for name in ('SWACallback', 'SnapshotCallback'):
            if name in fit and name in settings:
                fit[name] = settings[name] | fit[name]


def _sizes(learn) -> list:
    def size(dl):
        return [_len(getattr(dl, 'dataset', None)), getattr(dl, 'bs', getattr(dl, 'batch_size', None)), _len(dl)]

    return [size(dl) for dl in loaders(learn)]


def _len(o):
    try:
        return len(o)
    except TypeError:
        return None  # a stream


def _sampled(scheduler, n_epoch, n_steps) -> dict:
    "The values of a schedule at the starts of the epochs."

    def value(f, e):
        v = f(e, 0, n_steps) if getattr(scheduler, 'by_epoch', False) else f(e / n_epoch)
        return list(map(float, v)) if hasattr(v, '__len__') else float(v)

    return {name: [value(f, e) for e in range(n_epoch)] for name, f in scheduler.scheds.items()}


def _place(fits: list, candidates: list, n_done: int, file: Path) -> int:
    """Which of the `fits` that a file knows (the last one is unfinished) has the settings of one of
    the `candidates`, after `n_done` completed fits here. Raises `ValueError` with what differs if
    none has."""
    last = len(fits) - 1
    for settings in candidates:
        # the next in order; else the latest one, where only some are called again, as fine_tune's two after Ctrl-C
        for place in (min(n_done, last), *range(last, -1, -1)):
            if fits[place] == settings:
                return place
    if any(_extends(settings, fits[last]) for settings in candidates):
        return last
    faults = list(_differences(fits[min(n_done, last)], candidates[0]))
    raise ValueError(
        f'{file} is of another fit: {"; ".join(faults[:3])}{" ..." * (len(faults) > 3)}. It is left as it is: call the '
        'same fit again, move the file away, or pass resume=False to start anew'
    )


def _extends(now: dict, was: dict) -> bool:
    "Are these the settings of the same fit with more epochs?"
    return now[_N_EPOCHS] > was[_N_EPOCHS] and _without_length(now) == _without_length(was)


def _without_length(settings: dict) -> dict:
    "What does not depend on how long a fit is."
    res = {k: v for k, v in settings.items() if k not in (_N_EPOCHS, _SCHEDULE)}
    return {k: v | {_START: None} if isinstance(v, dict) and _START in v else v for k, v in res.items()}


def _done(settings: dict, n_epoch: int) -> list:
    "The schedules on the first epochs."
    return [{name: values[:n_epoch] for name, values in scheduler.items()} for scheduler in settings[_SCHEDULE]]


def _differences(was, now, name=''):
    if was == now:
        return
    if isinstance(was, dict) and isinstance(now, dict):
        for k in {**was, **now}:
            inner = f'{name}: {k}' if name else k
            if k not in now:
                yield f'{inner} is gone'
            elif k not in was:
                yield f'{inner} is new'
            else:
                yield from _differences(was[k], now[k], inner)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now) > 3:
        i = next(i for i, (a, b) in enumerate(zip(was, now)) if a != b)
        yield from _differences(was[i], now[i], f'{name}[{i}]')
    else:
        yield f'{name} is {_short(now)} and was {_short(was)}'


def _short(o):
    return s if len(s := repr(o)) < 80 else s[:77] + '...'
