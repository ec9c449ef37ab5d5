"""What training changes and an average leaves out: named before the first step, or once training has shown it."""

import copy
import warnings
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from torch import nn
from torch.nn import functional as F

from fastai_swa import SWACallback, WeightAverage
from fastai_swa.unaveraged import SampleWatch, beside_weights, loss_parameters, sentences_on_moved, weightlike_buffers

from .helpers import At, assert_close, learner, net, raising


class Codebook(nn.Module):
    "A quantiser whose codes follow what they stand for: buffers that act as weights."

    def __init__(self, n=7, width=8):
        super().__init__()
        self.register_buffer('codes', torch.randn(n, width, generator=torch.Generator().manual_seed(0)))
        self.register_buffer('mask', torch.full((3, 3), -torch.inf).triu(1))
        self.register_buffer('steps', torch.zeros(()))
        self.register_buffer('used', torch.zeros(n, dtype=torch.long))

    def forward(self, x):
        nearest = torch.cdist(x, self.codes).argmin(1)
        if self.training:
            self.steps += 1
            self.used += torch.bincount(nearest, minlength=len(self.codes))
            self.codes.data.copy_(torch.lerp(self.codes, x.detach().mean(0, keepdim=True), 0.1))
        return x + (self.codes[nearest] - x).detach()


def quantised():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), Codebook(), nn.Linear(8, 3))


class Prototypes(nn.Module):
    "A loss with weights of its own."

    y_int = True  # for MixUp

    def __init__(self):
        super().__init__()
        self.reduction = 'mean'
        self.weight = nn.Parameter(torch.eye(3))
        self.margin = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, pred, y):
        return F.cross_entropy(pred @ self.weight, y, reduction=self.reduction)


def with_prototypes(model=None):
    "A learner whose optimizer trains the loss as well."
    learn = learner(model)
    loss = Prototypes()
    learn.loss_func = loss
    learn.splitter = lambda m: [list(m.parameters()), [loss.weight]]
    return learn


def said(f, exception=None):
    "The warnings that `f()` gives about what is left out."
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter('always')
        if exception is None:
            f()
        else:
            with pytest.raises(exception):
                f()
    return [str(w.message) for w in given if 'leaves out' in str(w.message)]


def test_parameters_of_a_loss_that_is_trained_are_named_before_the_first_step():
    class Seen(Exception):
        pass

    learn = with_prototypes()
    stop = At('before_batch', 0, raising(Seen()), batch=0)
    (sentence,) = said(lambda: learn.fit(4, cbs=[SWACallback(3), stop]), Seen)
    assert "the average leaves out what is trained in the loss: 'weight';" in sentence
    (sentence,) = said(lambda: learn.fit(2, cbs=[SWACallback(0), MixUp()]))  # which puts a loss of its own in the place
    assert "'weight'" in sentence


def test_a_loss_trained_by_an_optimizer_of_its_own_is_named_once_training_has_moved_it():
    class Trains(Callback):
        run_valid = False

        def before_step(self):
            with torch.no_grad():
                self.learn.loss_func.weight.sub_(0.1 * self.learn.loss_func.weight.grad)

    learn = learner()
    learn.loss_func = Prototypes()
    (sentence,) = said(lambda: learn.fit(3, cbs=[SWACallback(1), Trains()]))
    assert "trained in the loss: 'weight'" in sentence


def test_a_loss_that_nothing_trains_is_not_named():
    learn = learner()
    learn.loss_func = Prototypes()
    assert not said(lambda: learn.fit(2, cbs=SWACallback(0)))


def test_a_buffer_that_acts_as_a_weight_is_named_once_training_has_moved_it():
    learn = learner(quantised)
    (sentence,) = said(lambda: learn.fit(4, cbs=SWACallback(2)))
    assert "leaves out buffers that training moves: '3.codes'; swa_model" in sentence
    (sentence,) = said(lambda: learn.fit(2, cbs=SWACallback(0, every=1, name='ema')))
    assert "the average 'ema' leaves out" in sentence
    assert not said(lambda: learn.fit(1))


def test_it_is_named_at_the_end_of_a_fit_that_is_interrupted_in_its_first_averaged_epoch():
    learn, swa = learner(quantised), SWACallback(0, every=1)
    stop = At('after_batch', 0, raising(KeyboardInterrupt()), batch=3, training=True)
    (sentence,) = said(lambda: learn.fit(2, cbs=[swa, stop]), KeyboardInterrupt)
    assert "'3.codes'" in sentence


@pytest.mark.parametrize(
    'layer',
    [
        lambda: nn.BatchNorm1d(8),
        lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
        lambda: torch.ao.quantization.HistogramObserver(),
        lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True), nn.Flatten()),
    ],
    ids=['batch norm', 'hook of spectral norm', 'spectral norm', 'observer', 'instance norm'],
)
def test_what_follows_the_weights_by_itself_is_not_named(layer):
    model = nn.Sequential(nn.Linear(6, 8), layer(), nn.Linear(8, 3))
    assert not weightlike_buffers(model)
    assert not said(lambda: learner(model).fit(2, cbs=SWACallback(0)))


def test_a_fit_in_which_no_buffer_moves_says_nothing():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('mask', torch.full((6, 6), -torch.inf).triu(1))
            self.register_buffer('unknown', torch.full((3,), torch.nan))

        def forward(self, x):
            return x + self.mask.softmax(1).sum()

    assert not said(lambda: learner(nn.Sequential(Masked(), net())).fit(2, cbs=SWACallback(0)))


def test_the_advice_holds_a_codebook_of_parameters_without_gradients_is_averaged():
    class Averaged(Codebook):
        def __init__(self):
            super().__init__()
            codes = self.codes
            del self.codes
            self.codes = nn.Parameter(codes, requires_grad=False)

    class Points(Callback):
        def after_train(self):
            points.append(self.learn.model[3].codes.detach().clone())

    points = []
    model = quantised()
    model[3] = Averaged()
    learn, swa = learner(model), SWACallback(0)
    assert not said(lambda: learn.fit(3, cbs=[swa, Points()]))
    assert not torch.equal(points[0], points[2])
    assert_close([swa.swa_model[3].codes.detach()], [torch.stack(points).mean(0)])


def test_the_advice_holds_a_loss_is_averaged_by_a_weight_average_of_ones_own():
    class Averages(Callback):
        def before_fit(self):
            self.average = WeightAverage(self.learn.loss_func)

        def after_train(self):
            self.average.update(self.learn.loss_func)
            points.append(self.learn.loss_func.weight.detach().clone())

    points, own = [], Averages()
    learn = with_prototypes()
    learn.fit(3, cbs=[SWACallback(0), own])
    assert not torch.equal(points[0], points[2])
    assert_close([own.average.swa_model.weight.detach()], [torch.stack(points).mean(0)])


# the parts


def test_what_a_loss_has_beside_the_model():
    model, loss = net(), Prototypes()

    class Holds:
        def __init__(self):
            self.func, self.model, self.n = loss, model, 3

        def __call__(self, *args):
            return loss(*args)

    assert list(loss_parameters(loss, model)) == list(loss_parameters(loss.forward, model)) == ['weight']
    assert list(loss_parameters(Holds(), model)) == ['func.weight']
    assert not loss_parameters(F.cross_entropy, model) and not loss_parameters(model, model)
    model.prototypes = loss  # then it is averaged
    assert not loss_parameters(loss, model)


def test_what_has_moved_beside_the_weights_is_named_by_kind():
    model, loss = net(), Prototypes()
    model.codes = nn.Module()
    model.codes.register_buffer('book', torch.randn(3, 2))
    model.codes.register_buffer('weight', torch.randn(3, 2))
    assert list(beside_weights(model, None)) == [('buffers', 'codes.book'), ('buffers', 'codes.weight')]
    beside = beside_weights(model, loss)
    assert list(beside)[2:] == [('loss', 'weight')] and beside['loss', 'weight'] is loss.weight
    assert beside['buffers', 'codes.weight'] is model.codes.weight
    sentences = sentences_on_moved('the average', [('loss', 'weight'), ('buffers', 'codes.book')])
    assert list(sentences) == ['buffers', 'loss'] and sentences_on_moved('the average', []) == {}
    assert sentences['buffers'].startswith("the average leaves out buffers that training moves: 'codes.book';")
    assert sentences['loss'].startswith("the average leaves out what is trained in the loss: 'weight';")


GLOBAL_LOSS = Prototypes()


def test_a_loss_that_is_a_function_or_holds_a_list_is_looked_into():
    model, loss = net(), Prototypes()

    class Sum:
        def __init__(self, losses):
            self.losses = losses

        def __call__(self, *args):
            return sum(f(*args) for f in self.losses)

    summed = Sum([F.cross_entropy, loss])
    assert list(loss_parameters(lambda *args: loss(*args), model)) == ['loss.weight']
    assert list(loss_parameters(lambda *args: GLOBAL_LOSS(*args), model)) == ['GLOBAL_LOSS.weight']
    assert list(loss_parameters(partial(loss), model)) == list(loss_parameters(partial(loss.forward), model))
    assert list(loss_parameters(partial(F.cross_entropy, weight=loss), model)) == ['weight.weight']
    assert list(loss_parameters(summed, model)) == ['losses.1.weight']
    assert list(loss_parameters(lambda *args: summed(*args), model)) == ['summed.losses.1.weight']
    assert not loss_parameters(lambda *args: model(*args), model)
    assert not loss_parameters(lambda *args: later(*args), model)
    later = loss  # has no value where it is looked for
    learn = learner(model, cbs=SWACallback(swa_model=net()))
    assert not loss_parameters(lambda *args: learn.model(*args), model)
    summed.losses.append(summed)  # no end
    assert list(loss_parameters(summed, model)) == ['losses.1.weight']


def test_a_function_around_a_loss_is_named_before_the_first_step():
    learn = with_prototypes()
    loss = learn.loss_func
    learn.loss_func = lambda *args: loss(*args)
    with pytest.warns(UserWarning, match="leaves out what is trained in the loss: 'loss.weight'"):
        learn.fit(1, 0.1, cbs=SWACallback(0))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
def test_a_watch_sees_what_moves_and_keeps_little(dtype):
    large = torch.randn(300, 1000).to(dtype)
    tensors = {'same': torch.tensor([torch.nan, 1, -torch.inf], dtype=dtype), 'large': large, 'small': large[0].clone()}
    watch = SampleWatch(tensors)
    assert sum(t.numel() for t in watch._before.values()) < 10_000
    assert watch.moved(tensors) == []
    large.mul_(2)
    tensors['small'][7] += 1
    assert watch.moved(tensors) == ['large', 'small']
    tensors['small'] = tensors['small'][:5]  # another tensor
    assert watch.moved(tensors | {'new': large}) == ['large']
    assert SampleWatch({}).moved({}) == []


def test_making_a_watch_changes_nothing():
    model = quantised()
    before = copy.deepcopy(model.state_dict())
    SampleWatch(weightlike_buffers(model))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert list(weightlike_buffers(model)) == ['3.codes', '3.mask']
