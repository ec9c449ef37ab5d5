"""What the processes of one training have to tell each other. Plain PyTorch."""
import torch
from torch import distributed

__all__ = ['Processes']


class Processes:
    "The processes that train `learn` together within `learn.distrib_ctx()`; elsewhere this one alone. Each call is made by all of them."
    def __init__(self, learn):
        together = any(c.__name__ == 'DistributedTrainer' for cb in learn.cbs for c in type(cb).__mro__)    # fastai's, which may not be installed
        together = together and distributed.is_available() and distributed.is_initialized()
        self.size, self.rank = (distributed.get_world_size(), distributed.get_rank()) if together else (1, 0)

    def gather(self, o) -> list:
        "`o` of each process, in the order of their ranks; tensors of one shape, or any objects."
        if self.size == 1: return [o]
        if not isinstance(o, torch.Tensor):
            res = [None] * self.size
            distributed.all_gather_object(res, o)
            return res
        res = [torch.empty_like(o) for _ in range(self.size)]
        distributed.all_gather(res, o.contiguous())
        return res

    def first(self, f, *args):
        "What `f(*args)` gives in the first process, or the error it raises there, in all."
        if self.size == 1: return f(*args)
        outcome = [None, None]
        if self.rank == 0:
            try: outcome[0] = f(*args)
            except Exception as e: outcome[1] = e
        distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None: raise outcome[1]
        return outcome[0]
