"""What holds in every fit (the mean is the mean, training is untouched, resuming is exact ...), over
models and data drawn from `structures.py`.
"""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from fastai_swa import CheckpointCallback, SWACallback, ema, rays

from .helpers import At, Snapshots, assert_close, assert_same, column, fingerprint, parameters, raising
from .reference import twins
from .structures import Cursor, architectures, datas, learner

drawn = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def callbacks(draw):
    "Arguments of a SWACallback for a fit of four epochs."
    every = draw(st.sampled_from([None, None, 1, 3]))
    return {
        'swa_start': draw(st.integers(0, 2)),
        'every': every,
        'cycle_len': 1 if every else draw(st.integers(1, 2)),
        'bn_batches': draw(st.sampled_from([None, 2])),
        'weight': ema(0.8) if draw(st.booleans()) else (lambda n: 1 / (n + 1)),
    }


def data_state(learn):
    "What the training data know of their passes."
    dl = learn.dls.train
    state = {k: repr(v) for k, v in vars(dl.dataset).items()} if isinstance(dl.dataset, Cursor) else {}
    jitter = dl.after_item
    return state | {'passes': getattr(dl, 'n_passes', None), 'jitter': getattr(jitter, 'n', None)}


def whole(learn):
    modules = {
        f'attributes.{name}': repr({k: v for k, v in vars(m).items() if not k.startswith('_')})
        for name, m in learn.model.named_modules()
    }
    return fingerprint(learn) | modules | {'data': repr(data_state(learn))}


@drawn
@given(architectures(), datas(), callbacks(), st.sampled_from(['sgd', 'adam']))
def test_training_is_untouched(architecture, data, kwargs, opt):
    def run(*cbs):
        learn = learner(architecture, data, opt)
        learn.fit(4, cbs=list(cbs))
        return whole(learn)

    assert_same(run(), run(SWACallback(**kwargs)))


@drawn
@given(architectures(), datas(), callbacks())
def test_the_mean_is_the_mean_and_the_columns_are_true(architecture, data, kwargs):
    learn, swa, snaps = learner(architecture, data), SWACallback(**kwargs), Snapshots()
    learn.fit(4, cbs=[swa, snaps])
    if not kwargs['every']:
        points = [w for w, e in zip(snaps.weights, snaps.epochs) if e in swa.averaged_epochs]
        expected = twins.weighted_average(points, kwargs['weight'])
        for average, mean, (name, p) in zip(
            parameters(swa.swa_model.train()), expected, learn.model.named_parameters()
        ):
            assert_close([average], [mean], tol=1e-5)
    loss = twins.evaluate(swa.swa_model, list(learn.dls.valid), nn.functional.cross_entropy)[0]
    assert column(learn, 'swa_valid_loss')[-1] == pytest.approx(loss, rel=1e-4)
    with swa.averaged():
        assert learn.validate()[0] == pytest.approx(loss, rel=1e-4)


@drawn
@given(architectures(), datas(), callbacks(), st.integers(0, 3), st.integers(0, 1))
def test_an_interrupted_fit_leaves_the_learners_weights_and_resumes_bitwise(architecture, data, kwargs, epoch, batch):
    def run(path, *cbs):
        learn, swa = learner(architecture, data), SWACallback(**kwargs)
        learn.fit(4, cbs=[swa, *([CheckpointCallback(path)] if path else []), *cbs])
        return learn, swa

    expected, average = run(None)
    before = whole(expected)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'run.ckpt'
        with pytest.raises(KeyboardInterrupt):
            run(path, At('after_step', epoch, raising(KeyboardInterrupt()), batch=batch))
        learn, swa = run(path)
    assert_same(before, whole(learn))
    assert all(torch.equal(a, b) for a, b in zip(parameters(average.swa_model), parameters(swa.swa_model)))
    assert repr(column(learn, 'swa_valid_loss')) == repr(column(expected, 'swa_valid_loss'))


@settings(drawn, max_examples=8)
@given(architectures(), datas())
def test_measuring_the_loss_surface_leaves_all_as_it_was(architecture, data):
    def run(measure):
        learn = learner(architecture, data)
        learn.fit(1)
        if measure:
            rays(learn, learn, n_rays=1, distances=[1.0], bn_batches=2, train_batches=2)
        learn.fit(1)
        return whole(learn)

    assert_same(run(False), run(True))


@settings(drawn, max_examples=8)
@given(architectures(), datas(), callbacks())
def test_applied_the_average_is_what_its_column_says(architecture, data, kwargs):
    learn, swa = learner(architecture, data), SWACallback(**kwargs)
    learn.fit(4, cbs=swa)
    loss = column(learn, 'swa_valid_loss')[-1]
    with swa.averaged():
        inside = learn.validate()[0]
    swa.apply()
    assert inside == pytest.approx(loss, rel=1e-4) and learn.validate()[0] == pytest.approx(loss, rel=1e-4)
