"""Many seeds: one after the other, or side by side in processes of their own; what became of each,
in a sentence."""

import os
import re
import traceback
from functools import partial
from multiprocessing import connection, get_context, parent_process
from threading import Thread

from ..files import InUse
from .machine import TimeIsUp
from .measure_surfaces import measure_seed
from .recipes import LANDSCAPES, RECIPES
from .train import run_seed

__all__ = ['STOPPED', 'attempt', 'side_by_side']

_GOES_ON = 'the same command goes on from there'
STOPPED = f'stopped in time; {_GOES_ON}'


def attempt(name, seed, show, **kwargs) -> str | None:
    "Run a seed; `None`, or a sentence that says why it is not complete."
    run = partial(measure_seed, LANDSCAPES[name]) if name in LANDSCAPES else partial(run_seed, RECIPES[name])
    try:
        run(seed, show=show, **kwargs)
    except TimeIsUp:
        return STOPPED
    except (ValueError, OSError, InUse) as e:
        return _said(e)
    except RuntimeError as e:  # torch.AcceleratorError is one, too
        if 'out of memory' in str(e):
            return f'the GPU is out of memory ({_said(e).split(". ")[0]}); {_GOES_ON}: with fewer --jobs, perhaps'
        traceback.print_exc()
        return f'failed ({type(e).__name__}: {_said(e)[:200]}); {_GOES_ON}'
    show(seed, f'seed {seed}  complete')


# fastai's
def _said(error) -> str:
    return re.sub('^Exception occured in `.*?` when calling event `.*?`: ', '', ' '.join(str(error).split()))


def side_by_side(attempt, seeds, jobs, lines) -> dict:
    "Each seed in a process of its own, `jobs` at a time."
    # CUDA cannot be used in a fork
    context, todo, running, outcomes = get_context('spawn'), list(range(seeds)), {}, {}
    try:
        while todo or running:
            while todo and len(running) < jobs:
                seed, (ours, theirs) = todo.pop(0), context.Pipe(duplex=False)
                process = context.Process(target=_attempt_aside, args=(attempt, seed, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = seed, process
            for pipe in connection.wait(list(running)):
                seed, process = running[pipe]
                try:
                    kind, text = pipe.recv()
                except EOFError:
                    process.join()
                    outcomes.setdefault(seed, f'its process ended with {process.exitcode}; {_GOES_ON}')
                    del running[pipe]
                else:
                    if kind == 'line':
                        lines.show(seed, text)
                    else:
                        outcomes[seed] = text
    finally:
        for _, process in running.values():
            process.terminate()
    return dict(sorted(outcomes.items()))


def _attempt_aside(attempt, seed, pipe):
    Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(('end', attempt(seed, show=lambda seed, line: pipe.send(('line', line)))))


def _end_with_parent():
    connection.wait([parent_process().sentinel])
    os._exit(1)
