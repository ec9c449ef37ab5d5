"""`Curve`: a way between two solutions along which the loss stays low."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import ParamScheduler, SchedLin, SchedNo, combine_scheds
from fastai.learner import Learner, defaults
from fastai.optimizer import OptimWrapper
from fastcore.foundation import L
from fastcore.meta import delegates
from torch import nn

from ..aside import concerns_training, untouched
from ..averaging import all_finite, lent
from ..checks import check_choice, check_count, check_not_negative, check_positive
from ..columns import recorder_of
from ..files import read, write
from ..fitting import FitCallback
from ..interrupts import uninterrupted, unwound_whole
from ..modules import in_train_mode, named_tensors, plain_name, unwrap
from ..solutions import named_solutions
from ..warn import warn
from .geometry import CURVES, arc_lengths, inner_products
from .measure import line, measured
from .space import Grid, Point, Space, as_real, check_ts, fingerprint, modes_put_back, weighted_sum
from .surfaces import Profile

__all__ = ['Curve']


class Curve:
    """A curve between two solutions, whose bends are trained so that the loss along it stays low.
    At first it is the straight line.

    - `learn`: gives model, data, loss, metrics and optimizer; its own weights stay as they are.
    - `solutions`: the two ends, which stay bitwise as they are; see `rays`.
    - `n_bends`: points between them, which begin on the straight line at equal steps.
    - `kind`: 'bezier', or 'chain' for straight pieces.

    `fit` trains it, `evaluate` measures along it, `straight` along the line for comparison. Works
    with any model: the weights at a point of the curve are written into its own parameters, and put
    back in the end. Parameters that require no gradient and are equal at both ends stay so.

    Garipov et al. 2018 (arXiv 1802.10026), section 3. Raises `ValueError` or `TypeError`, naming
    it, for what cannot be used, such as two equal solutions.
    """

    def __init__(self, learn: Learner, solutions, n_bends: int = 1, kind: str = 'bezier'):
        self.learn = learn
        self.kind = check_choice('kind', kind, CURVES)
        self.n_bends = check_count('n_bends', n_bends)
        self._space = Space(learn)
        loaded = self._space.load_all(named_solutions(solutions, 2, 'a curve'))
        self.names = list(loaded)
        self._buffers = self._space.one_set_of_buffers(list(loaded.values()))
        a, b = (point.weights for point in loaded.values())
        if torch.equal(a, b):
            raise ValueError(f'{" and ".join(self.names)} are the same weights: a curve needs two that differ')
        self._points = [a, *_straight(a, b, n_bends), b]  # flat, on the CPU
        self._n_fits = 0

    @property
    def ends(self) -> dict[str, dict]:
        "Name -> state dict of the two solutions."
        first, *_, last = self._points
        return dict(zip(self.names, map(self._state_dict, (first, last))))

    @property
    def bends(self) -> list[dict]:
        """State dicts. With those of the ends they span the plane that a curve with one bend lies
        in.
        """
        return [self._state_dict(p) for p in self._points[1:-1]]

    def solution(self, t: float) -> dict:
        """State dict of the point at `t`, from 0 to 1; its batch-norm statistics are the first
        end's, and not refreshed.
        """
        (t,) = check_ts([t], 0, 1)
        return self._state_dict(weighted_sum(self._points, CURVES[self.kind](t, self.n_bends + 2)))

    def _state_dict(self, weights):
        return self._space.state_dict(weights, self._buffers)

    @property
    def length(self) -> float:
        "Of the curve, in Euclidean distance in weight space."
        return float(arc_lengths(self.kind, inner_products(self._points), [1.0])[0])

    def fit(
        self,
        n_epoch: int,  # number of epochs, to train on as many points of the curve as they have batches
        # learning rate of the first half; then it falls to a hundredth in a straight line until
        # 0.9. Default: the learner's
        lr: float = None,
        # weight decay: `wd / 2` times the squared norm of the weights at the point of the curve is
        # added to the loss
        wd: float = 0.0,
        opt_func=None,  # optimizer; default: the learner's
        cbs=None,  # callbacks, such as a CheckpointCallback
        seed: int = 0,  # of the points, and of order and augmentation of the samples
    ) -> 'Curve':
        """Train the bends: each batch sees the model at a point drawn uniformly in t (Garipov et
        al. 2018, equation 2). A further fit goes on.

        Callbacks of the learner that do not record, show or steer training, such as mixed
        precision, work here as they do there. The learner is afterwards as it was. Interrupted, the
        curve keeps what it has learned; bends that are not finite are dropped, with a warning.
        Raises `ValueError` or `TypeError`, naming the argument, for one that cannot be used, and
        `ValueError` for a model that no gradient reaches or that takes optimizer steps within the
        backward pass.
        """
        n_epoch = check_count('n_epoch', n_epoch)
        lr = check_positive('lr', self.learn.lr if lr is None else lr)
        wd = check_not_negative('wd', wd)
        if any(hasattr(type(cb), 'swa_model') for cb in L(cbs)):  # it averages
            raise TypeError('cbs has a SWACallback, and a curve is no model that could be averaged')
        opt_func = opt_func or self.learn.opt_func
        if isinstance(opt_func, OptimWrapper):
            raise TypeError("opt_func is needed: the learner's is bound to the parameters of its own model")
        _check_backward(self.learn.model)
        low = lr / 100
        falling = combine_scheds([0.5, 0.4, 0.1], [SchedNo(lr, lr), SchedLin(lr, low), SchedNo(low, low)])
        seed = check_count('seed', seed, least=0)
        seed_of_fit = int(np.random.SeedSequence([seed, self._n_fits]).generate_state(1)[0])
        space = self._space
        own = self.learn.model
        shows_progress = space.shows_progress
        space.put(self._points[0], self._buffers)
        with (
            unwound_whole(),
            untouched(self.learn, seed_of_fit),
            in_train_mode(own),
            _gradients_aside(own),
            lent(space.scratch, own),
            modes_put_back(own),
        ):
            first, *bends, last = self._points
            if self._n_fits:  # else they are still on the straight line, and easily made anew
                bends = [bend.clone() for bend in bends]
            model = _OnCurve(own, space, (first, last), bends, self.kind)
            learn = _CurveLearner(self.learn, model, opt_func, lr, shows_progress)
            self._n_fits += 1
            try:
                learn.fit(n_epoch, lr, cbs=[_Points(), _WeightDecay(wd), ParamScheduler({'lr': falling}), *L(cbs)])
            finally:
                with uninterrupted():
                    model.new_point()
                    self._keep(model.flat_bends())
        return self

    def _keep(self, bends):
        if all_finite(bends):
            self._points[1:-1] = bends
            return
        if self._n_fits == 1:
            self._points[1:-1] = _straight(self._points[0], self._points[-1], self.n_bends)
        warn('the bends are not finite after this training, and stay as they were before it: a smaller lr may help')

    @delegates(measured)
    def evaluate(self, ts=61, **kwargs) -> Profile:
        """Loss and metrics at so many points along the curve, or at the points `ts` from 0 to 1;
        further arguments and errors as for `rays`.
        """
        return measured(self._grid(ts), **kwargs)

    def _grid(self, ts=61) -> Grid:
        "The points that `evaluate` measures."
        ts = check_ts(ts, 0, 1)
        products = inner_products(self._points)
        norms = np.sqrt(products.diagonal()[[0, -1]]).tolist()
        points = [p.to(self._space.device) for p in self._points]

        def at(i):
            return Point(weighted_sum(points, CURVES[self.kind](ts[i], len(points))), self._buffers)

        about = {
            'kind': 'curve',
            'curve': self.kind,
            'solutions': dict(zip(self.names, norms)),
            'length': self.length,
            'arc': arc_lengths(self.kind, products, ts).tolist(),
        }
        prints = [[i, fingerprint(p)] for i, p in enumerate(self._points)]
        spec = {'curve': self.kind, 'points': prints, 'ts': ts}
        return Grid(self._space, Profile, about, spec, [(t,) for t in ts], at)

    @delegates(measured)
    def straight(self, ts=61, **kwargs) -> Profile:
        "The same along the straight line between the ends."
        return line(self.learn, self.ends, ts=check_ts(ts, 0, 1), **kwargs)

    def save(self, path):
        """Write ends and bends to `path`, in one step; `torch.load(path, weights_only=True)` reads
        it, too. Raises `OSError`.
        """
        content = {'kind': self.kind, 'ends': self.ends, 'bends': self._points[1:-1], 'n_fits': self._n_fits}
        write(Path(path), 'curve', 1, content)

    @classmethod
    def load(cls, path, learn: Learner) -> 'Curve':
        """What `save` wrote. Raises `ValueError` if it is damaged, something else, or of another
        architecture than `learn` has.
        """
        saved = read(Path(path), 'curve', 1)
        try:
            curve = cls(learn, saved['ends'], len(saved['bends']), saved['kind'])
            curve._points[1:-1] = saved['bends']
            curve._n_fits = saved['n_fits']
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f'{path} is damaged, or it was changed: {type(e).__name__}: {e}') from None
        return curve

    def __repr__(self):
        kind = {'bezier': 'Bezier curve', 'chain': 'Polygonal chain'}[self.kind]
        bends = '1 bend' if self.n_bends == 1 else f'{self.n_bends} bends'
        return f'{kind} with {bends} from {" to ".join(self.names)}, {self.length:.4g} long'


def _straight(a, b, n_bends) -> list:
    "Bends on the straight line, at equal steps."
    return [torch.lerp(a, b, (i + 1) / (n_bends + 1)) for i in range(n_bends)]


# training

# An optimizer takes as much memory for a step, beside what it keeps, as the largest of its parameters some times over.
# So a bend is several; but small ones would cost time.
_N_PARTS = 8
_LEAST_OF_PART = 1 << 18


@dataclass
class _Part:
    "Some parameters of the model, and the stretch of the curve's points that they are."

    params: list  # views of real numbers
    ends: list  # the stretch of both
    bends: list  # and of each bend: parameters of `_OnCurve`
    held: torch.Tensor | None  # which numbers stay: what requires no gradient and is equal at both ends

    @property
    def points(self) -> list:
        first, last = self.ends
        return [first, *(p.detach() for p in self.bends), last]

    def gradient(self, dtype) -> torch.Tensor:
        "What the backward pass has left in the parameters, which is taken from them."
        grads = []
        for p in self.params:
            grads.append(torch.zeros_like(as_real(p)) if p.grad is None else as_real(p.grad.to_dense()))
            p.grad = None
        return torch.cat([g.to(dtype).flatten() for g in grads])


class _OnCurve(nn.Module):
    """`model` with the weights of a random point of the curve, the same one throughout a batch.

    They are written into its own parameters, and what the backward pass leaves in these is handed
    on to the bends. So the model is run and differentiated as in the learner's own training,
    whatever its forward pass refers to and whenever that is run: checkpointing runs parts of it
    within the backward pass.

    - `ends`, `bends`: flat. On the CPU the bends that are given are those that are trained.
    """

    def __init__(self, model, space, ends, bends, kind):
        super().__init__()
        self.inner = model
        self.kind = kind
        own = named_tensors(unwrap(model).named_parameters)
        self._params = [own[plain_name(name)] for name in space.originals]
        self._thawed = []  # parameters that require no gradient and differ at the ends, and get one on the curve
        self._parts = []
        groups = _grouped(self._params)
        lengths = [sum(as_real(p).numel() for p in group) for group in groups]
        ends_apart = [end.to(space.device).split(lengths) for end in ends]
        bends_apart = [bend.to(space.device).split(lengths) for bend in bends]
        for i, group in enumerate(groups):
            stretches = [nn.Parameter(bend[i]) for bend in bends_apart]
            self._parts.append(self._part(group, [end[i] for end in ends_apart], stretches))
        self.bends = nn.ParameterList(p for k in range(len(bends)) for p in (part.bends[k] for part in self._parts))
        self._dtype = space.dtype
        self._shares = None  # what the points of the curve count for in this batch; None: not drawn yet
        self._is_placed = False  # are the weights of that point in the model?
        self._squared_norm = None  # of these weights: a leaf, which gets the gradient of the weight decay
        self._has_begun = False  # whether a gradient has come
        self._has_stepped = False  # whether the gradients of the bends have been used

    def _part(self, params, ends, bends) -> _Part:
        held = []
        lengths = [as_real(p).numel() for p in params]
        for p, a, b in zip(params, *(end.split(lengths) for end in ends)):
            if p.requires_grad:
                held.append(a.new_zeros(len(a), dtype=torch.bool))
                continue
            held.append(a == b)
            if not torch.equal(a, b):
                self._thawed.append(p)
        held = torch.cat(held)
        return _Part(params, ends, bends, held if held.any() else None)

    def forward(self, *args, **kwargs):
        if not self._is_placed:
            self._place()
        return self.inner(*args, **kwargs)

    def reset(self):
        if hasattr(self.inner, 'reset'):
            self.inner.reset()

    @property
    def squared_norm(self):
        "Of the weights; `collect` passes its gradient on to them."
        if self._squared_norm is None:
            norms = torch.stack(torch._foreach_norm([as_real(p) for p in self._params]))
            self._squared_norm = norms.to(self._dtype).square().sum().requires_grad_()
        return self._squared_norm

    def new_point(self):
        self._leave()
        self._shares = None
        if self._has_stepped:
            for p in self.bends:
                p.grad = None
            self._has_stepped = False

    def stepped(self):
        "The optimizer has used the gradients of the bends; whoever looks at them may do so until the next batch."
        self._has_stepped = True

    @torch.no_grad()
    def _place(self):
        if self._shares is None:
            t = torch.rand(()).item()  # drawn on the host: the device does not wait
            self._shares = CURVES[self.kind](t, len(self._parts[0].points))
        for part in self._parts:
            weights = weighted_sum(part.points, self._shares)
            params = [as_real(p) for p in part.params]
            pieces = weights.split([p.numel() for p in params])
            torch._foreach_copy_(params, [w.view(p.shape) for w, p in zip(pieces, params)])
        for p in self._thawed:
            p.requires_grad_(True)
        self._is_placed = True

    @torch.no_grad()
    def collect(self):
        """Hand the gradient on to the bends. Raises `ValueError` if there was none in the first
        batch.
        """
        if not self._is_placed:
            return
        if not self._has_begun and all(p.grad is None for p in self._params):
            raise ValueError(
                'no gradient reaches the parameters of the model, so the curve cannot be trained: does its forward '
                'pass use them?'
            )
        self._has_begun = True
        decay = None if self._squared_norm is None else self._squared_norm.grad
        for part in self._parts:
            grad = part.gradient(self._dtype)
            if decay is not None:
                grad.addcmul_(weighted_sum(part.points, self._shares), 2 * decay)
            if part.held is not None:
                grad.masked_fill_(part.held, 0)
            for p, share in zip(part.bends, self._shares[1:-1].tolist()):
                if p.grad is None:
                    p.grad = grad * share
                else:
                    p.grad.add_(grad, alpha=share)
        self._leave()

    def flat_bends(self) -> list[torch.Tensor]:
        "On the CPU."
        res = []
        for k in range(len(self._parts[0].bends)):
            stretches = [part.bends[k].detach() for part in self._parts]
            res.append((stretches[0] if len(stretches) == 1 else torch.cat(stretches)).cpu())
        return res

    def _leave(self):
        for p in self._params:
            p.grad = None
        for p in self._thawed:
            p.requires_grad_(False)
        self._is_placed = False
        self._squared_norm = None


def _grouped(params) -> list[list]:
    "The parameters in their order, in up to `_N_PARTS` groups of about one size."
    total = sum(as_real(p).numel() for p in params)
    enough = max(_LEAST_OF_PART, total / _N_PARTS)
    groups = [[]]
    n = 0  # numbers in the last group
    for p in params:
        if n >= enough:
            groups.append([])
            n = 0
        groups[-1].append(p)
        n += as_real(p).numel()
    return groups


@contextmanager
def _gradients_aside(model):
    """Within this context the parameters of `model` have no gradients; afterwards they have their
    own again.
    """
    kept = [(p, p.grad) for p in model.parameters()]
    try:
        for p, _ in kept:
            p.grad = None
        yield
    finally:
        with uninterrupted():
            for p, grad in kept:
                p.grad = grad


class _Points(Callback):
    "A new point for each batch; its gradient goes to the bends before anything else looks at it."

    order = -100

    def before_batch(self):
        self.learn.model.new_point()

    def after_backward(self):
        self.learn.model.collect()

    def after_step(self):
        self.learn.model.stepped()


class _WeightDecay(Callback):
    "Adds the penalty to what is differentiated; the loss that is shown is the plain one."

    order = 0  # before the loss is divided or scaled

    def __init__(self, wd):
        self.wd = wd

    def after_loss(self):
        if self.wd:
            self.learn.loss_grad = self.loss_grad + self.wd / 2 * self.learn.model.squared_norm


class _CurveLearner(Learner):
    """Trains `model` as `learn` trains its own, without a validation: which point of the curve
    should it be at?
    """

    def __init__(self, learn, model, opt_func, lr, shows_progress):
        left = *defaults.callbacks, FitCallback  # the learner's averages and files are of its own fits
        own = [copy.copy(cb) for cb in learn.cbs if not isinstance(cb, left) and not concerns_training(cb)]
        super().__init__(
            learn.dls,
            model,
            learn.loss_func,
            opt_func=opt_func,
            lr=lr,
            splitter=_bends_of,
            cbs=own,
            path=learn.path,
            wd=0.0,
            wd_bn_bias=True,
            train_bn=False,
            moms=learn.moms,
        )
        recorder_of(self).valid_metrics = False
        self.logger = learn.logger
        if not shows_progress:
            self.remove_cbs(ProgressCallback)

    def _do_epoch_validate(self, *args, **kwargs):
        pass


def _bends_of(model) -> list:
    "One group of parameters, for the optimizer."
    return [list(model.bends)]


def _check_backward(model):
    if any(p._post_accumulate_grad_hooks for p in model.parameters()):
        raise ValueError(
            'the model has hooks that act as soon as a parameter has its gradient '
            '(register_post_accumulate_grad_hook), as for optimizer steps within the backward pass: a curve cannot be '
            'trained through them, remove them first'
        )
