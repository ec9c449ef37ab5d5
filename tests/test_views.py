"""What is made inside a context keeps what the learner predicts with there, or is refused outside."""

import copy
from contextlib import contextmanager

import fastai.vision.learner  # noqa: F401  (plot_top_losses of images)
import numpy as np
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.interpret import ClassificationInterpretation, Interpretation, SegmentationInterpretation
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy

from fastai_swa import Ensemble, SWACallback
from fastai_swa.views import as_lent, lending
from fastai_swa.vision import digits, digits_net


@pytest.fixture(scope='module')
def data():
    dls = digits(n_train=64, bs=16)
    return DataLoaders(dls.train, dls.test_dl(list(dls.valid_ds.items[:60]), with_labels=True), device='cpu')


def fitted(data):
    "A learner, and an average that predicts something else."
    torch.manual_seed(0)
    learn, swa = Learner(data, digits_net(), CrossEntropyLossFlat(), lr=0.05, metrics=accuracy), SWACallback(0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3, cbs=swa)
        learn.fit(1, 0.1)  # away from the average
    return learn, swa


def contexts(data, kind):
    "The learner, and a context in which it is something else."
    learn, swa = fitted(data)
    if kind == 'averaged':
        return learn, swa.averaged
    torch.manual_seed(1)
    return learn, Ensemble([digits_net(), digits_net()], learn).active


class Own(Interpretation):
    "A user's, which does not call what it inherits."

    def __init__(self, learn, dl, losses, act=None):
        self.learn, self.dl, self.losses, self.act = learn, dl, losses, act

    def scores(self):
        return self.learn.get_preds(dl=self.dl)[0].numpy()


READINGS = {
    'confusion_matrix': (ClassificationInterpretation, lambda interp: interp.confusion_matrix()),
    'most_confused': (ClassificationInterpretation, lambda interp: [count for *_, count in interp.most_confused()]),
    'items': (ClassificationInterpretation, lambda interp: interp[[3, 5, 8]][1].numpy()),
    'of a tensor of places': (SegmentationInterpretation, lambda interp: interp[torch.tensor([1, 2])][1].numpy()),
    'a class of the user': (Own, lambda interp: interp.scores()),
}


@pytest.mark.parametrize('reading', READINGS)
@pytest.mark.parametrize('kind', ['averaged', 'active'])
def test_an_interpretation_reads_the_same_inside_and_after_the_context(data, kind, reading):
    learn, context = contexts(data, kind)
    cls, read = READINGS[reading]
    with learn.no_bar():
        with context():
            interp = cls.from_learner(learn)
            inside = read(interp)
        np.testing.assert_array_equal(read(interp), inside)
        own = cls.from_learner(learn)  # one that is made outside is of the learner's own model
        assert not np.array_equal(read(own), inside)
        with context():
            np.testing.assert_array_equal(read(interp), inside)


@pytest.mark.parametrize('kind', ['averaged', 'active'])
def test_top_losses_are_plotted_after_the_context_with_the_predictions_that_have_them(data, kind):
    learn, context = contexts(data, kind)
    with learn.no_bar():
        with context():
            interp = ClassificationInterpretation.from_learner(learn)
        losses, places = interp.top_losses(4)
        _, preds, targets, _, again = interp[places]
        interp.plot_top_losses(4)
    found = -preds[range(4), targets.long()].log()
    torch.testing.assert_close(found, losses.as_subclass(torch.Tensor), rtol=1e-3, atol=1e-4)
    assert torch.equal(again, losses)


def test_the_learner_is_its_own_again_after_a_view_was_read(data):
    learn, context = contexts(data, 'active')
    own, before = learn.model, {k: v.clone() for k, v in learn.model.state_dict().items()}
    with learn.no_bar():
        with context():
            interp = ClassificationInterpretation.from_learner(learn)
        interp.confusion_matrix()
    assert learn.model is own and 'get_preds' not in vars(learn)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_a_view_passes_for_the_learner_but_its_model_and_training_are_refused_outside(data):
    learn, context = contexts(data, 'active')
    with context():
        interp = ClassificationInterpretation.from_learner(learn)
        assert interp.learn.model is learn.model
    view = interp.learn
    assert isinstance(view, Learner) and view.dls is learn.dls and 'inside active()' in repr(view)
    with pytest.raises(RuntimeError, match=r"'model' is the model's, which has other weights outside of active\(\)"):
        view.model  # noqa: B018
    with pytest.raises(RuntimeError, match='fit inside active'):
        view.fit(1)
    with pytest.raises(TypeError, match='cannot be copied or pickled'):
        copy.deepcopy(interp)
    with pytest.raises(AttributeError):
        view.no_such_name  # noqa: B018
    view.path = 'elsewhere'
    assert learn.path == 'elsewhere'


def test_after_the_members_have_changed_an_interpretation_is_refused(data):
    learn, _ = fitted(data)
    ens = Ensemble([digits_net(), learn.model], learn)
    with learn.no_bar(), learn.no_logging():
        with ens.active():
            interp = ClassificationInterpretation.from_learner(learn)
        ens.combine = 'vote'
        with pytest.raises(RuntimeError, match=r'made inside active\(\), which would predict with other weights'):
            interp.confusion_matrix()
        ens.combine = 'mean'
        interp.confusion_matrix()
        learn.fit(1)
        with pytest.raises(RuntimeError, match='make it again'):
            interp.confusion_matrix()


class Doubled:
    "A context of its own kind, entered in another one."

    def __init__(self, learn, name):
        self.learn, self.name, self.n_entered = learn, name, 0

    @contextmanager
    def entered(self):
        with lending(self.learn, self.name, self.entered, lambda: 0):
            self.n_entered += 1
            yield


def test_contexts_within_contexts_are_all_entered_again_in_their_order_and_no_foreign_one(data):
    learn = Learner(data, digits_net(), CrossEntropyLossFlat())
    outer, inner, other = (Doubled(learn, name) for name in ('outer()', 'inner()', 'other()'))
    with outer.entered(), inner.entered():
        view = as_lent(learn)
        assert as_lent(view) is view
    assert as_lent(learn) is learn
    view.no_bar()
    assert outer.n_entered == inner.n_entered == 2
    with outer.entered():
        view.no_bar()
    assert outer.n_entered == inner.n_entered == 3
    refused = r'made inside outer\(\) and inner\(\), and the learner is inside other\(\) now'
    with other.entered(), pytest.raises(RuntimeError, match=refused):
        view.no_bar()
