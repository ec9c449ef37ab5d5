"""Which names are free in a learner; which of two averages of one name takes part in a fit: `test_several.py`."""

import pytest
from fastai.callback.core import Callback

from fastai_swa import CheckpointCallback, SWACallback
from fastai_swa.names import is_free, is_learners_own

from .helpers import learner


@pytest.mark.parametrize('name', ['model', 'fit', 'xb', 'pct_train', 'scaler', 'recorder', 'state_dict'])
def test_what_a_learner_or_its_model_has_or_gets_in_a_fit_is_its_own(name):
    learn, swa = learner(), SWACallback()
    assert is_learners_own(learn, name, SWACallback) and not is_free(learn, name, swa)


def test_a_name_of_nobody_is_free():
    learn, swa = learner(), SWACallback()
    assert is_free(learn, 'ema', swa) and not is_learners_own(learn, 'ema', SWACallback)


def test_a_name_belongs_to_the_callback_that_has_it():
    learn, swa = learner(), SWACallback(name='ema')
    learn.add_cb(swa)
    assert learn.ema is swa and is_free(learn, 'ema', swa) and not is_free(learn, 'ema', SWACallback())
    assert not is_learners_own(learn, 'ema', SWACallback) and is_learners_own(learn, 'ema', CheckpointCallback)


def test_what_an_exported_callback_has_become_is_in_nobodys_way():
    learn, swa = learner(), SWACallback()
    learn.swa = Callback()
    assert is_free(learn, 'swa', swa) and not is_learners_own(learn, 'swa', SWACallback)
    learn.swa = 3
    assert not is_free(learn, 'swa', swa) and is_learners_own(learn, 'swa', SWACallback)
