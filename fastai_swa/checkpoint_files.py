"""The files of a checkpoint: what changes with each epoch, and beside it what does not.

    run.ckpt                state and settings of the fit under way; replaced in one step, and whole with what it names
    run.ckpt.<id>.steps     what only grows in the fit (`histories`)
    run.ckpt.<id>.past      of the fits completed before: their settings, what they kept, the state after the last one

What lies beside is written first, under a name that only this fit has, and goes when the checkpoint goes. So a run that
is killed anywhere leaves a checkpoint, and all that it names.
"""

import copy
import re
import secrets
from contextlib import suppress
from pathlib import Path

from .files import read, write
from .histories import Histories, joined
from .journal import N_EPOCHS, SCHEDULE

__all__ = ['CheckpointFiles', 'check_state', 'damaged', 'remove_checkpoint']

_KIND = 'checkpoint'
_VERSION = 3  # of the file's format; up to 2 it was one file
_PAST = 'past of a checkpoint'
_PAST_VERSION = 1

_STATE = {  # what a state has -> its types (a tuple: packed); the rest came with later versions
    'epoch': (int,),
    'model': (dict, tuple),
    'extra': (dict, tuple),
    'losses': (list, tuple),
    'requires_grad': (list,),
    'optimizer': (dict, tuple),
    'masters': (list, tuple),
    'gradients': (list, tuple),
    'scaler': (dict, tuple),
    'learner': (dict,),
    'callbacks': (dict,),
    'states': (dict,),
    'random': (list, dict),  # of each process, or of one
}


class CheckpointFiles:
    """The files of the checkpoint of a fit.

    - `file`: the checkpoint; `None`: another process writes it.
    """

    def __init__(self, file: Path | None):
        self.file = file
        self._begin()

    def _begin(self):
        self._id = secrets.token_hex(8)
        self._has_past = False  # is the past written?
        self._is_alone = False  # is what other fits have left beside the file removed?
        self.histories = Histories(self._beside('steps'))

    def _beside(self, what: str) -> Path | None:
        return None if self.file is None else self.file.with_name(f'{self.file.name}.{self._id}.{what}')

    def read(self) -> dict | None:
        """What the files hold: 'version', 'fits' (settings; the last one is that of the interrupted fit), 'kept', 'end'
        and 'state'; what is written from now on follows that. `None` if there is no checkpoint.

        Raises `ValueError`, naming the file, if it is damaged, none, newer, or if what lies beside it is missing.
        """
        if not self.file.exists():
            return None
        saved = read(self.file, _KIND, _VERSION, mapped=True)
        try:
            if saved['version'] > 2:
                saved = self._joined(saved)
            else:  # what outlives the file, which is replaced, must not be mapped
                saved['kept'] = copy.deepcopy(saved['kept'])
                saved['end'] = copy.deepcopy(saved['end'])
            _check(saved)
        except FileNotFoundError as e:
            raise ValueError(
                f'{Path(e.filename).name} is missing beside {self.file}, which cannot do without it: move it back, or '
                'the latter away'
            ) from None
        except OSError:
            raise
        except Exception as e:
            raise damaged(self.file, e) from None
        return saved

    def _joined(self, saved: dict) -> dict:
        if not re.fullmatch('[0-9a-f]{16}', saved['id']):
            raise ValueError('its id is no id')
        self._id = saved['id']
        self.histories = Histories(self._beside('steps'))
        lists = self.histories.read(saved['steps'])
        past = {'fits': [], 'kept': [], 'end': None}
        if saved['has_past']:
            past = read(self._beside('past'), _PAST, _PAST_VERSION)
        self._has_past = saved['has_past']
        state = saved['state']
        for key in ('callbacks', 'rows'):
            state[key] = joined(state[key], lists)
        return {
            'version': saved['version'],
            'fits': [*past['fits'], saved['fit']],
            'kept': past['kept'],
            'end': past['end'],
            'state': state,
        }

    def begin_anew(self):
        "What was read does not count."
        self._begin()

    def write(self, content: dict):
        """Replace what the files hold by `content`, which is as `read` gives it, but for the lists of the state's
        'callbacks' and 'rows' that `histories.cut` has taken. Raises `OSError`; then the checkpoint is the old one.
        """
        *past, fit = content['fits']
        if past and not self._has_past:
            others = {'fits': past, 'kept': content['kept'], 'end': content['end']}
            write(self._beside('past'), _PAST, _PAST_VERSION, others)
            self._has_past = True
        steps = self.histories.write()
        named = {'id': self._id, 'steps': steps, 'has_past': self._has_past}
        write(self.file, _KIND, _VERSION, {**named, 'fit': fit, 'state': content['state']})
        if not self._is_alone:
            _remove_beside(self.file, but=self._id)
            self._is_alone = True


def damaged(file: Path, error: Exception) -> ValueError:
    "What is raised if what `file` holds cannot be what was written, which is known by `error`."
    said = ' '.join(str(error).split())[:200]
    return ValueError(
        f'{file} is damaged, or it was changed ({type(error).__name__}: {said}). It is left as it is: move it away, or '
        'give another path'
    )


def remove_checkpoint(file: Path):
    "Remove the checkpoint `file`, if it is there, and what lies beside it. Raises `OSError`."
    file.unlink(missing_ok=True)
    _remove_beside(file)


def _remove_beside(file: Path, but: str = ''):
    "Remove what lies beside `file`, but for what is of the fit `but`."
    pattern = re.compile(re.escape(file.name) + r'\.([0-9a-f]{16})\.(steps|past)')
    with suppress(OSError):
        for other in file.parent.iterdir():
            match = pattern.fullmatch(other.name)
            if match and match[1] != but:
                other.unlink(missing_ok=True)


def _check(saved: dict):
    "Raise an error if `saved` cannot be what `CheckpointFiles.read` gives."
    fits, kept, state = saved['fits'], saved['kept'], saved['state']
    if not isinstance(fits, list) or not fits:
        raise TypeError('it has no fits')
    for fit in fits:
        if type(fit[N_EPOCHS]) is not int or type(fit[SCHEDULE]) is not list:
            raise TypeError('the settings of a fit are none')
    if not isinstance(kept, list) or len(kept) < len(fits) - 1:
        raise TypeError('it does not have what its fits kept')
    for s in [state] if len(fits) == 1 else [state, saved['end']]:
        check_state(s)
    if state['epoch'] not in range(fits[-1][N_EPOCHS]):
        raise ValueError(f'epoch {state["epoch"]} of {fits[-1][N_EPOCHS]}')
    if type(state['data']) is not list or saved['version'] > 2 and type(state['rows']) is not list:
        raise TypeError('it does not say what the data are, or what the table has')


def check_state(state: dict):
    "Raise an error if `state` cannot be what `state.take` gives."
    for key, kinds in _STATE.items():
        if type(state[key]) not in kinds:
            raise TypeError(f'{key!r} of its state is a {type(state[key]).__name__}, not a {kinds[0].__name__}')
