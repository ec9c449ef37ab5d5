"Lists of tensors of an average beside those of a model, for the multi-tensor kernels."

from dataclasses import dataclass, field

import torch

__all__ = ['Group', 'Vectors', 'LowGroup', 'by_kind', 'low_groups']


@dataclass
class Group:
    "Weights of one dtype and device."

    average: list  # tensors of swa_model
    model: list  # tensors of the model in training
    means: list = field(default_factory=list)  # of the block, once there was one
    pieces: list | None = None  # what is merged at once: of the average, of the means, and room for as much
    pointers: list = field(default_factory=list)  # of the average when these were made

    def fold(self, weight):
        _lerp(self.average, self.model, weight)

    def open_block(self, carried):
        _open_block(self, self.average, self.model, carried)

    def collect(self, weight):
        _lerp(self.means, self.model, weight)

    def merge(self, weight, pointers):
        if self.pieces is None or pointers != self.pointers:
            self.pieces = _pieces(self.average, self.means)
            self.pointers = pointers
        _merge(self.pieces, weight)


@dataclass
class Vectors:
    """Short vectors of one dtype on a CPU, such as biases and the weights of norms. In small networks
    they are most of the tensors, and a kernel that is called for each costs more than its work; so the
    mean of the block is one long vector. (Whether they are still as long as they were shows when they
    are put together.)
    """

    average: list  # tensors of swa_model
    model: list  # tensors of the model in training
    means: list = field(default_factory=list)  # one vector, once there was a block
    joined: list = field(default_factory=list)  # one vector, once there was a block: the model's

    def join(self) -> bool:
        "Put the model's vectors together; `False` if they are not of one kind and as long as they were."
        if not self.joined:
            self.joined = [torch.empty(sum(t.numel() for t in self.average), dtype=self.average[0].dtype)]
        n = self.joined[0].numel()
        try:
            with torch.inference_mode():
                torch.cat(self.model, out=self.joined[0])  # which makes room for more, or less
        except RuntimeError:
            n = None
        if self.joined[0].numel() != n:
            self.joined = []
        return bool(self.joined)

    def fold(self, weight):
        _lerp(self.average, self.model, weight)

    def open_block(self, carried):
        _open_block(self, self.joined, self.joined, carried)

    def collect(self, weight):
        _lerp(self.means, self.joined, weight)

    def merge(self, weight, pointers):
        own = torch.cat(self.average)
        _merge([([own], self.means, [torch.empty_like(own)])], weight)
        torch._foreach_copy_(self.average, list(own.split([t.numel() for t in self.average])))


@dataclass
class LowGroup:
    "Pieces of weights in low precision, whose average is kept in float32."

    average: list  # of swa_model
    model: list  # of the model in training
    master: list  # the average itself, in float32
    scratch: list  # room for the model's in float32
    means: list = field(default_factory=list)  # of the block, in float32, once there was one
    pieces: list | None = None  # what is merged at once: of the master, of the means, and room for as much

    def fold(self, weight):
        torch._foreach_copy_(self.scratch, self.model)
        _lerp(self.master, self.scratch, weight)
        torch._foreach_copy_(self.average, self.master)

    def open_block(self, carried):
        _open_block(self, self.master, self.model, carried)

    def collect(self, weight):
        torch._foreach_copy_(self.scratch, self.model)
        _lerp(self.means, self.scratch, weight)

    def merge(self, weight, pointers):
        if self.pieces is None:
            self.pieces = _pieces(self.master, self.means)
        _merge(self.pieces, weight)
        torch._foreach_copy_(self.average, self.master)


def _lerp(dst, src, weight):
    if weight == 1:
        torch._foreach_copy_(dst, src)
    else:
        torch._foreach_lerp_(dst, src, weight)


def _open_block(group, like, model, carried):
    """The means of `group`, tensors like those in `like`, become those of the model and `carried`
    times what they hold.
    """
    if not group.means:
        group.means = [torch.empty_like(t) for t in like]
    if not carried:
        return torch._foreach_copy_(group.means, model)
    torch._foreach_mul_(group.means, carried)
    torch._foreach_add_(group.means, model)


def _merge(pieces, weight):
    """average <- average + weight * (means - average), for `pieces`: lists of tensors of the average, of
    the means, and of room for as much. Then the means hold how much more the average should be (a
    compensated sum, Dekker 1971).
    """
    for own, change, total in pieces:
        torch._foreach_sub_(change, own)
        torch._foreach_mul_(change, weight)
        torch._foreach_copy_(total, own)
        torch._foreach_add_(total, change)
        torch._foreach_sub_(own, total)
        torch._foreach_add_(change, own)
        torch._foreach_copy_(own, total)


def _pieces(average, means) -> list:
    """For `_merge`; the room is that of the largest list. In pieces: room for a whole set of sums
    would be another set of weights in memory.
    """
    n = _SCRATCH if average[0].is_cuda else _CACHED
    runs = [list(map(list, zip(*run))) for run in _runs(zip(average, means), n)]
    size = max(sum(t.numel() for t in own) for own, _ in runs)
    room = torch.empty(size, dtype=average[0].dtype, device=average[0].device)
    return [(own, change, _laid_out(room, own)) for own, change in runs]


def _laid_out(room, tensors) -> list:
    "Views of `room`, a vector, in the shapes of `tensors`."
    sizes = [t.numel() for t in tensors]
    return [s.view(t.shape) for s, t in zip(room[: sum(sizes)].split(sizes), tensors)]


def by_kind(pairs):
    """Lists of `pairs`, one for each dtype and device: the multi-tensor kernels are fast on uniform
    lists.
    """
    groups = {}
    for d, p in pairs:
        dst, src = groups.setdefault((p.dtype, p.device), ([], []))
        dst.append(d)
        src.append(p)
    return list(groups.values())


_SCRATCH = 2**20  # elements: enough to fill a GPU, few enough for a CPU's outer cache
_CACHED = 2**16  # elements: few enough to stay in the inner cache of a CPU's core through several kernels


def _runs(tuples, size=_SCRATCH):
    """Pieces of the tensors in `tuples`, each of tensors of one shape, in lists of at most `size`
    elements or one row together.
    """
    run, n = [], 0
    for tensors in tuples:
        first = tensors[0]
        rows = max(1, size * len(first) // max(1, first.numel())) if first.dim() else 1
        for piece in zip(*(t.detach().split(rows) if t.dim() else (t.detach(),) for t in tensors)):
            if run and n + piece[0].numel() > size:
                yield run
                run, n = [], 0
            run.append(piece)
            n += piece[0].numel()
    if run:
        yield run


def low_groups(triples):
    """Groups of the pieces of (average, model, master), one for each dtype, device and run; all of
    a device use one scratch.
    """
    kinds, scratch, groups = {}, {}, []
    for triple in triples:
        kinds.setdefault((triple[1].dtype, triple[1].device), []).append(triple)
    runs = [(device, list(map(list, zip(*run)))) for (_, device), tensors in kinds.items() for run in _runs(tensors)]
    for device, (average, _, _) in runs:
        scratch[device] = max(scratch.get(device, 0), sum(t.numel() for t in average))
    scratch = {device: torch.empty(n, device=device) for device, n in scratch.items()}
    for device, (average, model, master) in runs:
        groups.append(LowGroup(average, model, master, _laid_out(scratch[device], average)))
    return groups
