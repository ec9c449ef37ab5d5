"""What the processes of one training have to tell each other. Plain PyTorch."""

import io

import torch
from torch import distributed

__all__ = ['Processes', 'Together', 'PassFailed']


class Processes:
    """The processes that train `learn` together within `learn.distrib_ctx()`; elsewhere this one
    alone. Each call is made by all of them.
    """

    def __init__(self, learn):
        # fastai's, which may not be installed
        together = any(c.__name__ == 'DistributedTrainer' for cb in learn.cbs for c in type(cb).__mro__)
        together = together and distributed.is_available() and distributed.is_initialized()
        self.size, self.rank = (distributed.get_world_size(), distributed.get_rank()) if together else (1, 0)

    def gather(self, o) -> list:
        """`o` of each process, numbers, strings, tensors and what holds them, in the order of their
        ranks.
        """
        if self.size == 1:
            return [o]
        res = [None] * self.size
        distributed.all_gather_object(res, _encoded(o))
        return list(map(_decoded, res))

    def first(self, f, *args):
        "What `f(*args)` gives in the first process, or the error it raises there, in all."
        if self.size == 1:
            return f(*args)
        outcome = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = _encoded(f(*args))
            except Exception as e:
                outcome[1] = e
        distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return _decoded(outcome[0])


class PassFailed(Exception):
    "What processes do together failed in another one of them."


class Together:
    """What `processes` do together, where an error in one must end it in all: each exchange is
    preceded by one of errors, which the process that failed joins with `fail` instead of the next
    exchange. At the end all call `check` once more.

    The calls raise `PassFailed` with the first text of those that failed. (An interruption is not
    exchanged: it ends the training of all.)
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self.size = processes.size
        self.rank = processes.rank
        self.is_over = False  # an error was exchanged: nobody waits any more

    def fail(self, error: Exception):
        "This process failed with `error`; tell the others, unless they know."
        if not self.is_over:
            self.is_over = True
            self.processes.gather(f'{type(error).__name__}: {error}')

    def check(self):
        errors = [(rank, e) for rank, e in enumerate(self.processes.gather(None)) if e is not None]
        if errors:
            self.is_over = True
            rank, text = errors[0]
            raise PassFailed(f'it failed in process {rank} ({text})')

    def gather(self, o) -> list:
        self.check()
        return self.processes.gather(o)

    def first(self, f, *args):
        self.check()
        return self.processes.first(f, *args)

    def broadcast(self, tensors):
        "Let all have the `tensors` of the first."
        self.check()
        for t in tensors:
            distributed.broadcast(t.data, src=0)


def _encoded(o) -> bytes:
    "As torch itself writes it; pickled, tensors of some dtypes do not come back."
    torch.save(o, f := io.BytesIO())
    return f.getvalue()


def _decoded(data):
    return torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
