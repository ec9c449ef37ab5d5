"""Which fits a checkpoint file knows, and where the one under way stands among them.

A learner is often fitted several times on one path, as by `fine_tune`, which fits twice. The file then holds the
settings of the fits that were completed and, as the last, of the one that was interrupted. When the program runs again,
it calls all of them again: the completed ones are passed by, the last one goes on. All of this is plain data, and knows
no learner.
"""

from dataclasses import dataclass
from pathlib import Path

__all__ = ['Journal', 'Place', 'why_not_the_longer_fit', 'N_EPOCHS', 'SCHEDULE', 'START', 'FOLDER']

# what a call that goes on with a fit may change, if it has more epochs
N_EPOCHS = 'the number of epochs'
SCHEDULE = 'the schedule'
START = 'the first averaged epoch'
FOLDER = 'folder'  # of snapshots: its name

_CHANGING = 'the parameters to train', 'wd'  # what a fit may change by itself


@dataclass
class Place:
    "Where a fit stands among those that a file knows."

    is_past: bool  # whether it was completed before
    settings: dict  # as the file has them


class Journal:
    """The fits of one learner on one `file`, in their order.

    What a fit may be known by are its settings: a dict from their names for a user to plain data.
    """

    def __init__(self, file: Path):
        self.file = file
        self.fits = []  # settings of the completed fits
        self.end = None  # state of the learner after the last of these, once another begins
        self.kept = []  # for each of these, once another begins: callback -> what it kept, such as an average
        self._keep = dict  # gives what is to be kept of the last one
        self._begun_with = {}  # of the fit begun last: settings that it may change by itself, as they were before

    def open(self, saved: dict, settings: dict) -> Place:
        """Take over what the file holds, and find the fit with these `settings` in it.

        - `saved`: what `content` has made.

        Raises `ValueError`, which says what differs, if it is none of them; then nothing has changed.
        """
        _complete_old(saved, settings)
        fits = saved['fits']
        # in a learner whose fit was interrupted, what that fit has changed may still be changed
        candidates = [settings, {**settings, **self._begun_with}]
        number = _find(fits, candidates, len(self.fits))
        if number is None:
            faults = list(_differences(fits[min(len(self.fits), len(fits) - 1)], settings))
            more = ' ...' if len(faults) > 3 else ''
            raise ValueError(
                f'{self.file} is of another fit: {"; ".join(faults[:3])}{more}. It is left as it is: call the same '
                'fit again, move the file away, or pass resume=False to start anew'
            )
        self.fits = fits[:number]
        self.end = saved['end']
        self.kept = saved['kept']
        self._keep = dict
        return Place(number < len(fits) - 1, fits[number])

    def begin(self, settings: dict):
        "A fit with these `settings` begins, as the next one or at its place."
        self._begun_with = {name: settings[name] for name in _CHANGING}

    def begin_another(self, end: dict):
        "A fit begins after completed ones; `end`: the state of the learner before it."
        self.kept = [*self.kept[: len(self.fits) - 1], self._keep()]
        self.end = end

    def content(self, settings: dict, state: dict) -> dict:
        "What the file gets in an epoch of the fit with these `settings`; `state`: of the learner."
        return {'fits': [*self.fits, settings], 'kept': self.kept, 'end': self.end, 'state': state}

    def complete(self, settings: dict, keep):
        """The fit with these `settings` is completed.

        - `keep()` gives what its callbacks keep. It is called when another fit begins: until then an average may be
          used, and its batch norm refreshed.
        """
        self.fits = [*self.fits, settings]
        self._keep = keep
        self._begun_with = {}

    def pass_by(self, settings: dict) -> dict:
        """The next fit, with these `settings`, was completed before; returns what its callbacks
        kept.
        """
        kept = self.kept[len(self.fits)]
        self.fits = [*self.fits, settings]
        return kept


# which fit is it?


def _find(fits: list, candidates: list, n_done: int) -> int | None:
    """The place in `fits`, of which the last is not completed, of the one that has the settings of
    one of the `candidates`, where `n_done` were completed before it in this run of the program.
    """
    last = len(fits) - 1
    # the next in order; else the latest one, where only some are called again, as fine_tune's two after Ctrl-C
    places = [min(n_done, last), *range(last, -1, -1)]
    for settings in candidates:
        for place in places:
            if fits[place] == settings:
                return place
    is_longer = any(_extends(settings, fits[last]) for settings in candidates)
    return last if is_longer else None


def _extends(now: dict, was: dict) -> bool:
    "Are these the settings of the same fit with more epochs?"
    return now[N_EPOCHS] > was[N_EPOCHS] and _without_length(now) == _without_length(was)


def _without_length(settings: dict) -> dict:
    "What does not depend on how long a fit is."
    res = {}
    for name, value in settings.items():
        if name in (N_EPOCHS, SCHEDULE):
            continue
        is_of_average = isinstance(value, dict) and START in value
        res[name] = value | {START: None} if is_of_average else value
    return res


def _complete_old(saved: dict, settings: dict):
    """Complete what earlier formats have of a callback's settings.

    Up to 2 they have the whole path of the folder of snapshots, which may have been moved. Format 1 does not say all
    that is compared now: there the fit's own count.
    """
    for fit in saved['fits'] if saved['version'] < 3 else []:
        folder = fit.get('SnapshotCallback', {}).get(FOLDER)
        if folder is not None:
            fit['SnapshotCallback'][FOLDER] = Path(folder).name
    for fit in saved['fits'] if saved['version'] < 2 else []:
        for name in ('SWACallback', 'SnapshotCallback'):
            if name in fit and name in settings:
                fit[name] = settings[name] | fit[name]


# what differs?


def why_not_the_longer_fit(was: dict, now: dict, n_done: int) -> list[str]:
    """Why a fit that has done `n_done` epochs with the settings `was` will not end, after those of
    `now`, where the longer fit would have ended from the beginning on; empty if it does.
    """
    reasons = []
    if _first_epochs(was, n_done) != _first_epochs(now, n_done):
        reasons.append('the schedule is another one on the epochs done')
    for name, settings in now.items():
        if isinstance(settings, dict) and settings.get(START) != was[name].get(START):
            reasons.append(
                f'averaging starts in epoch {was[name][START]} as in the file, not in epoch {settings[START]}'
            )
    return reasons


def _first_epochs(settings: dict, n_epoch: int) -> list:
    "The schedules on the first epochs."
    res = []
    for scheduler in settings[SCHEDULE]:
        res.append({name: values[:n_epoch] for name, values in scheduler.items()})
    return res


def _differences(was, now, name=''):
    "What differs between two settings, a sentence each."
    if was == now:
        return
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            inner = f'{name}: {key}' if name else key
            if key not in now:
                yield f'{inner} is gone'
            elif key not in was:
                yield f'{inner} is new'
            else:
                yield from _differences(was[key], now[key], inner)
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now) > 3:
        i = next(i for i, (a, b) in enumerate(zip(was, now)) if a != b)
        yield from _differences(was[i], now[i], f'{name}[{i}]')
    else:
        yield f'{name} is {_short(now)} and was {_short(was)}'


def _short(o) -> str:
    text = repr(o)
    return text if len(text) < 80 else text[:77] + '...'
