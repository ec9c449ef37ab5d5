"""A model that is several: how a learner's loop runs each member on a batch, and how their outputs become one."""

from functools import partial

import torch
from fastai.callback.core import Callback, CancelBatchException
from torch import fx, nn

from .modules import unwrap
from .probabilities import Probabilities, as_probabilities, features, vote

__all__ = ['Members', 'EachMember', 'Combination', 'as_graph', 'combined', 'one_tensor']


class Members(nn.Module):
    """In the place of a learner's model: one member at a time, as `EachMember` says it; what they
    give combined, where the learner's loop does not run."""

    def __init__(self, members, combination):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.combination = combination
        self.at = None  # the member that it is

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:  # what callbacks ask the model for, such as its configuration
            return getattr(super().__getattr__('members')[self.at or 0], name)

    def train(self, mode: bool = True):
        self.training = mode
        for m in self.members:
            m.train() if mode else m.eval()  # each by its own, as if it were alone
        return self

    def reset(self):
        for m in self.members:
            if hasattr(m, 'reset'):
                m.reset()

    def forward(self, *args, **kwargs):
        if self.at is not None:
            return _in_own_precision(self.members[self.at], args, kwargs)
        return self.combination([one_tensor(_in_own_precision(m, args, kwargs), m) for m in self.members])


class EachMember(Callback):
    """For each batch lets the learner's loop run once for each of `members`, up to the end of
    `after_pred`, and combines what is `learn.pred` then.

    The last one's run is the batch's own, which goes on with the combination. So each output takes
    the way of the learner's own model, through its mixed precision and what else its callbacks do
    to predictions; `before_batch` and what follows the predictions come once.
    """

    order = float('inf')  # after all that prepares a batch, and all that changes a prediction

    def __init__(self, members):
        self.members = members
        self._outputs = []  # of the batch under way
        self._is_last = True  # is the run under way the batch's own?

    def __call__(self, event_name):  # fastai's would put the errors of members into other words
        if event_name not in ('before_batch', 'after_pred', 'after_loss', 'after_cancel_batch', 'after_batch'):
            return
        if unwrap(self.learn.model) is self.members:  # else within another ensemble's prediction
            getattr(self, event_name)()

    def before_batch(self):
        n = len(self.members.members)
        self._outputs = []
        self._is_last = False
        try:
            for i in range(n - 1):
                self.members.at = i
                self._run()
        finally:
            self._is_last = True
            self.members.at = None
        self.members.at = n - 1

    def _run(self):
        try:
            self.learn._do_one_batch()
        except (_NextMember, CancelBatchException):  # the latter: a callback that wants no loss
            self._gather()

    def _gather(self):
        self._outputs.append(one_tensor(self.learn.pred, self.members.members[self.members.at]))

    def after_pred(self):
        if not self._is_last:
            raise _NextMember
        self._combine()

    def after_loss(self):
        "A callback may have put a loss of its own in the place, which is the last member's."
        learn = self.learn
        if len(self.members.members) > 1 and len(learn.yb):
            learn.loss_grad = learn.loss_func(learn.pred, *learn.yb)
            learn.loss = learn.loss_grad.clone()

    def after_cancel_batch(self):
        if self.members.at is not None:  # cancelled after the prediction, before it came here
            self._combine()

    def after_batch(self):
        self.members.at = None

    def _combine(self):
        if len(self._outputs) < len(self.members.members):
            self._gather()
            self.learn.pred = self.members.combination(self._outputs)


class _NextMember(Exception):
    "The prediction of one member is there."


class Combination:
    "Makes of several outputs one such that the activation makes the combined probabilities of it."

    def __init__(self, probabilities: Probabilities, combine: str, stacking: dict | None):
        self.probabilities = probabilities
        self.combine = combine
        self.stacking = stacking

    def __call__(self, outputs: list):
        for i, o in enumerate(outputs):
            if o.shape != outputs[0].shape:
                raise ValueError(
                    f'member {i} predicts {tuple(o.shape)}, member 0 {tuple(outputs[0].shape)}: they cannot be combined'
                )
        weights = bias = None
        if self.combine == 'stack':
            weights, bias = [t.to(outputs[0].device) for t in self.weights_and_bias()]
        return combined(outputs, self.probabilities, self.combine, weights, bias)

    def weights_and_bias(self):
        "Of stacking, as tensors on the CPU."
        return torch.tensor(self.stacking['weights']).float(), torch.tensor(self.stacking['bias']).float()


def combined(outputs: list, probabilities: Probabilities, combine: str, weights=None, bias=None):
    """Of several `outputs` one that stands for their combined probabilities.

    - `weights`, of shape (outputs of a model, members * outputs of a model), and `bias`: of stacking.

    It asks no tensor for its shape or its values, so that `torch.fx` can put it into a graph.
    """
    if len(outputs) == 1 and combine != 'stack':
        return outputs[0]
    mean = probabilities.mean(outputs)
    if combine == 'mean':
        return mean
    ps = torch.stack([probabilities.of(o) for o in outputs])
    if combine == 'vote':
        return probabilities.log(vote(ps, probabilities.of(mean), probabilities))
    scores = (features(ps).float() @ weights.T + bias).view_as(mean)
    return scores if probabilities.kind == 'none' else probabilities.log(as_probabilities(scores, probabilities))


def as_graph(modules: list, combination: Combination, inputs: tuple) -> fx.GraphModule:
    """One plain module that calls each of `modules` with inputs like `inputs`, in the precision of its
    own weights, and combines what they give.

    It is of PyTorch's own classes, and files hold its code as text, so that it needs nothing of this
    package where it is read.
    """
    root = nn.Module()
    root.members = nn.ModuleList(modules)
    graph = fx.Graph()
    proxy = partial(fx.Proxy, tracer=fx.proxy.GraphAppendingTracer(graph))
    given = [proxy(graph.placeholder(f'x{i}')) for i in range(len(inputs))]
    outputs = []
    for i, module in enumerate(modules):
        dtype = _own_dtype(module)
        nodes = [(x.to(dtype) if _is_floating(o) else x).node for x, o in zip(given, inputs)]
        output = proxy(graph.call_module(f'members.{i}', tuple(nodes)))
        outputs.append(output.to(torch.promote_types(dtype, torch.float32)))
    weights = bias = None
    if combination.combine == 'stack':
        for name, tensor in zip(('weights', 'bias'), combination.weights_and_bias()):
            root.register_buffer(name, tensor)
        weights = proxy(graph.get_attr('weights'))
        bias = proxy(graph.get_attr('bias'))
    output = combined(outputs, combination.probabilities, combination.combine, weights, bias)
    graph.output(output.node)
    return fx.GraphModule(root, graph, 'Ensemble')


def one_tensor(output, model) -> torch.Tensor:
    "An output in float32 at least. Raises `TypeError` for what is not one tensor."
    if not isinstance(output, torch.Tensor):
        raise TypeError(
            f'members must give one tensor, and {type(model).__name__} gives a {type(output).__name__}: let a callback '
            'of the learner take it apart, as in `def after_pred(self): self.learn.pred = self.pred[0]`'
        )
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _in_own_precision(member, args, kwargs):
    "What `member` gives for inputs in the precision of its own weights."
    dtype = _own_dtype(member)
    return member(*_cast(args, dtype), **_cast(kwargs, dtype))


def _own_dtype(module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _is_floating(o) -> bool:
    return isinstance(o, torch.Tensor) and o.is_floating_point()


def _cast(o, dtype):
    if isinstance(o, torch.Tensor):
        return o.to(dtype) if o.is_floating_point() else o
    if type(o) in (tuple, list):
        return type(o)(_cast(x, dtype) for x in o)
    if type(o) is dict:
        return {k: _cast(v, dtype) for k, v in o.items()}
    return o
