"""Slow twins: what the package computes, said as plainly as possible and in float64."""

import copy

import numpy as np
import torch
from fastai.callback.core import Callback
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def folded_epochs(swa_start: int, cycle_len: int, n_epoch: int) -> list[int]:
    "The epochs folded, by walking through them."
    res, wait = [], 0
    for epoch in range(n_epoch):
        if epoch < swa_start:
            continue
        if wait == 0:
            res.append(epoch)
            wait = cycle_len
        wait -= 1
    return res


def weighted_average(snapshots: list[list[torch.Tensor]], weight) -> list[torch.Tensor]:
    "The running average of `snapshots`, the first taken whole, in float64."
    res = [t.double().clone() for t in snapshots[0]]
    for n, snapshot in enumerate(snapshots[1:], 1):
        res = [(1 - weight(n)) * r + weight(n) * t.double() for r, t in zip(res, snapshot)]
    return res


def mean(snapshots):
    return [torch.stack([t.double() for t in ts]).mean(0) for ts in zip(*snapshots)]


def bn_statistics(model: nn.Module, batches: list[tuple], frozen=()) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> (mean, unbiased variance), float64, of all values that reach each batch-norm layer
    over `batches`.

    A float64 copy of the model runs in eval mode, its batch-norm layers (but for those named in
    `frozen`) in train mode.
    """
    names = [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and name not in frozen]
    inputs = inputs_of(model, names, batches)
    values = {name: torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1) for name, xs in inputs.items()}
    return {name: (v.mean(1), v.var(1)) for name, v in values.items()}


def inputs_of(model: nn.Module, names, batches: list[tuple]) -> dict[str, list[torch.Tensor]]:
    """Name -> all inputs, float64, of each layer in `names` over `batches`, while these layers are
    in train mode and all else is in eval mode.
    """
    model = copy.deepcopy(model).double()
    for m in model.modules():
        m.training = False
    seen = {}
    for name, m in model.named_modules():
        if name in names:
            m.training = True
            seen[name] = []
            m.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0].detach().clone()))
    with torch.no_grad():
        for args in batches:
            model(*(a.double() if a.is_floating_point() else a for a in args))
    return seen


def running_bits(model: nn.Module) -> dict[str, list[bytes]]:
    "Name -> the bytes of the running statistics of each layer that has such."
    res = {}
    for name, m in model.named_modules():
        buffers = [
            b for k, b in m.named_buffers(recurse=False) if k.startswith(('running_', 'moving_', 'sums', 'sqrs'))
        ]
        if buffers:
            res[name] = [b.detach().cpu().clone().view(torch.uint8).numpy().tobytes() for b in buffers]
    return res


def moved_by_training(model: nn.Module, batches: list[tuple]) -> list[str]:
    """Layers whose running statistics are others after a copy of the model has seen `batches` in
    the modes that `model.train()` gives it.
    """
    model = copy.deepcopy(model)
    if not any(m.training for m in model.modules()):
        model.train()
    before = running_bits(model)
    for args in batches:
        model(*args)
    return [name for name, bits in running_bits(model).items() if bits != before[name]]


def evaluate(model: nn.Module, batches, loss_func, metrics=()) -> list[float]:
    """The mean loss over the samples of `batches`, and the mean of each metric, in one sweep with
    all predictions in memory.
    """
    model.eval()
    with torch.no_grad():
        outs = [(model(*b[:-1]), b[-1]) for b in batches]
    preds, targs = torch.cat([o for o, _ in outs]), torch.cat([t for _, t in outs])
    return [f(preds, targs).item() for f in (loss_func, *metrics)]


def papers_lr(epoch: int, swa_start: int, lr_init: float, swa_lr: float) -> float:
    """The SWA run's learning rate in `epoch`, from 0, with `swa_start` counted from 1, as the
    paper's code has it.
    """
    t = epoch / swa_start
    ratio = swa_lr / lr_init
    if t <= 0.5:
        factor = 1.0
    elif t <= 0.9:
        factor = 1.0 - (1.0 - ratio) * (t - 0.5) / 0.4
    else:
        factor = ratio
    return lr_init * factor


def averaging_lr(epoch: int, swa_start: int, lr_init: float, swa_lr: float) -> float:
    """The SWA run's learning rate in `epoch`, both from 0: the corners of the papers' curve, the
    second one no later than epoch `swa_start`, joined by a straight line. It is `papers_lr`
    wherever that has come to `swa_lr` by epoch `swa_start`."""
    falls_from, falls_until = 0.5 * (swa_start + 1), min(0.9 * (swa_start + 1), swa_start)
    if falls_until <= falls_from:
        return lr_init if epoch < swa_start else swa_lr
    return float(np.interp(epoch, [falls_from, falls_until], [lr_init, swa_lr]))


class AllSteps(Callback):
    "Keeps the parameters after every optimizer step that was taken, in float64, and the epoch of each."

    order = 1000

    def __init__(self):
        self.weights, self.epochs, self.cancelled = [], [], False

    def after_cancel_step(self):
        self.cancelled = True

    def after_step(self):
        if not self.cancelled:
            self.weights.append({k: p.detach().double().clone() for k, p in self.model.named_parameters()})
            self.epochs.append(self.epoch)
        self.cancelled = False

    def mean(self, a, b):
        "Of the steps in the epochs a to b - 1."
        points = [w for w, e in zip(self.weights, self.epochs) if a <= e < b]
        return {k: sum(w[k] for w in points) / len(points) for k in points[0]}

    def weighted(self, weights):
        assert len(weights) == len(self.weights)
        return {k: sum(float(c) * w[k] for c, w in zip(weights, self.weights)) for k in self.weights[0]}


def logits(model: nn.Module, weights: dict, images: torch.Tensor, stats, train: torch.Tensor | None = None):
    """What `model` makes of `images`, uint8 of shape (n, 3, h, w), with these `weights`.

    - `stats`: mean and standard deviation of each channel, by which images are normalised, in [0, 1].
    - `train`: images on which batch norm is refreshed before; `None`: it is as the weights have it.
    """
    model.load_state_dict(weights)
    mean, std = (torch.tensor(s).view(3, 1, 1) for s in stats)

    def normal(x):
        return (x / 255 - mean) / std

    if train is not None:
        for layer, (mean_of_layer, var) in bn_statistics(model, [(normal(train),)]).items():
            model.get_submodule(layer).running_mean.copy_(mean_of_layer)
            model.get_submodule(layer).running_var.copy_(var)
    with torch.no_grad():
        return model.eval()(normal(images))


def loss_and_accuracy(outputs, targets) -> list[float]:
    loss = nn.functional.cross_entropy(outputs, targets)
    return [float(loss), float((outputs.argmax(1) == targets).double().mean())]
