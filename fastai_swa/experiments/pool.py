"""The seeds of a job: one after the other, or side by side in processes of their own; what became
of each, in a sentence."""

import os
import re
import traceback
from multiprocessing import connection, get_context, parent_process
from threading import Thread

from ..files import InUse
from .machine import TimeIsUp

__all__ = ['STOPPED', 'run_all']

_GOES_ON = 'the same command goes on from there'
STOPPED = f'stopped in time; {_GOES_ON}'


def run_all(job, lines) -> dict[int, str | None]:
    """Run the seeds of `job`, so many at a time as it says, and show on `lines` where each stands.

    Returns seed -> `None`, or the sentence that says why it is not complete.
    """
    if job.jobs == 1:
        return {seed: _attempt(job, seed, lines.show) for seed in job.seeds}
    return _side_by_side(job, lines)


def _attempt(job, seed, show) -> str | None:
    "Run a seed; `None`, or a sentence that says why it is not complete."
    try:
        job.run(seed, show)
    except TimeIsUp:
        return STOPPED
    except (ValueError, OSError, InUse) as e:
        return _said(e)
    except RuntimeError as e:  # torch.AcceleratorError is one, too
        said = _said(e)
        if 'out of memory' in str(e):
            return f'the GPU is out of memory ({said.split(". ")[0]}); {_GOES_ON}: with fewer --jobs, perhaps'
        traceback.print_exc()
        return f'failed ({type(e).__name__}: {said[:200]}); {_GOES_ON}'
    show(seed, f'seed {seed}  complete')
    return None


def _said(error) -> str:
    "The message of `error` in one line, without what fastai puts in front of it."
    one_line = ' '.join(str(error).split())
    return re.sub('^Exception occured in `.*?` when calling event `.*?`: ', '', one_line)


def _side_by_side(job, lines) -> dict[int, str | None]:
    "Each seed in a process of its own."
    todo = list(job.seeds)
    running = {}  # pipe -> seed, process
    outcomes = {}
    try:
        while todo or running:
            while todo and len(running) < job.jobs:
                seed = todo.pop(0)
                pipe, process = _started(job, seed)
                running[pipe] = seed, process
            for pipe in connection.wait(list(running)):
                seed, process = running[pipe]
                try:
                    kind, text = pipe.recv()
                except EOFError:
                    process.join()
                    outcomes.setdefault(seed, f'its process ended with {process.exitcode}; {_GOES_ON}')
                    del running[pipe]
                    continue
                if kind == 'line':
                    lines.show(seed, text)
                else:
                    outcomes[seed] = text
    finally:
        for _, process in running.values():
            process.terminate()
    return dict(sorted(outcomes.items()))


def _started(job, seed):
    "A process that runs a seed, and the pipe on which it tells of it."
    context = get_context('spawn')  # CUDA cannot be used in a fork
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_attempt_aside, args=(job, seed, theirs), daemon=True)
    process.start()
    theirs.close()
    return ours, process


# within that process


def _attempt_aside(job, seed, pipe):
    def show(seed, line):
        pipe.send(('line', line))

    Thread(target=_end_with_parent, daemon=True).start()
    pipe.send(('end', _attempt(job, seed, show)))


def _end_with_parent():
    connection.wait([parent_process().sentinel])
    os._exit(1)
