"""What leaves for elsewhere: exported ensembles; averages and ensembles for ONNX, TorchScript, `torch.export`."""

import random
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.tabular.core import Categorify, Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from fastai.vision.augment import RandTransform
from fastai.vision.core import TensorImageBW
from torch import nn

from fastai_swa import Ensemble, SWACallback
from fastai_swa.vision import digits, digits_net

from .helpers import learner
from .test_ensemble import Heated, Taken, Two

pytestmark = [
    pytest.mark.filterwarnings('ignore:load_learner:UserWarning'),
    pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning'),
    pytest.mark.filterwarnings('ignore:.*torch.jit:FutureWarning'),
]


def images(path, n=3, n_train=200):
    "A learner on digits, and networks for an ensemble."
    torch.manual_seed(0)
    learn = Learner(digits(n_train=n_train), digits_net(), CrossEntropyLossFlat(), metrics=accuracy, path=path)
    return learn, [digits_net().eval() for _ in range(n)]


class Shifted(RandTransform):
    "An augmentation."

    order = 20

    def encodes(self, x: TensorImageBW):
        return x + 0.1


def copies(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


# Ensemble.export


@pytest.mark.parametrize('combine', ['mean', 'vote', 'stack'])
def test_an_exported_ensemble_predicts_as_the_ensemble(tmp_path, combine):
    learn, models = images(tmp_path)
    ens = Ensemble([*models[:2], models[2].state_dict(), digits_net().to(torch.bfloat16)], learn)
    if combine == 'stack':
        items = learn.dls.valid_ds.items[:200]
        ens.stack(learn.dls.test_dl(items, with_labels=True))
    else:
        ens.combine = combine
    ens.get_preds()
    own, before, names = learn.model, copies(learn), set(vars(learn))
    modes = [[m.training for m in model.modules()] for model in models]
    file = ens.export('ens.pkl')
    assert file == tmp_path / 'ens.pkl' and learn.model is own and set(vars(learn)) == names and learn.opt is None
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items()) and len(learn.dls.train_ds)
    assert [[m.training for m in model.modules()] for model in models] == modes
    there = load_learner(file)
    assert not len(there.dls.train_ds)
    items = list(learn.dls.valid_ds.items[200:260])
    with learn.no_bar(), there.no_bar():
        dl = learn.dls.test_dl(items)
        expected, _ = ens.get_preds(dl=dl)
        found, _ = there.get_preds(dl=there.dls.test_dl(items))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert there.predict(items[0])[0] == ens.predict(items[0])[0]
        again = load_learner(there_exported(there, tmp_path))
        again.no_bar().__enter__()
        torch.testing.assert_close(again.get_preds(dl=again.dls.test_dl(items))[0], found)


def there_exported(learn, path):
    learn.path = path
    learn.export('again.pkl')
    return path / 'again.pkl'


def tabular(path, kind='regression'):
    "A learner whose model has two inputs, of whole numbers and of others, and new samples."
    r = np.random.RandomState(0)
    df = pd.DataFrame({'a': r.randn(60), 'kind': r.choice(list('xyz'), 60), 'y': r.randn(60)})
    if kind == 'classes':
        df['y'] = np.where(df.y > 0, 'yes', 'no')
    dls = TabularDataLoaders.from_df(
        df, path, [Categorify, Normalize], cat_names=['kind'], cont_names=['a'], y_names='y', bs=16, device='cpu'
    )
    return tabular_learner(dls, layers=[8], path=path), df.iloc[:20]


@pytest.mark.parametrize('kind', ['regression', 'classes'])
def test_models_with_several_inputs_of_several_kinds_are_exported(tmp_path, kind):
    learn, new = tabular(tmp_path, kind)
    with learn.no_bar(), learn.no_logging():
        ens = learn.fit_snapshots(2, 1, 0.01)
        opt = learn.opt
        there = load_learner(ens.export())
        assert learn.opt is opt
        with there.no_bar():
            found = there.get_preds(dl=there.dls.test_dl(new))[0]
        torch.testing.assert_close(found, ens.get_preds(dl=learn.dls.test_dl(new))[0])


def test_an_exported_ensemble_needs_nothing_of_this_package(tmp_path):
    code = (
        'import sys, warnings\n'
        'warnings.simplefilter("ignore")\n'
        'sys.modules["fastai_swa"] = None\n'  # to import it is an error
        'import torch\n'
        'from fastai.learner import load_learner\n'
        'learn = load_learner("export.pkl")\n'
        'torch.save(learn.model(*torch.load("inputs.pt")), "output.pt")\n'
    )
    learn, new = tabular(tmp_path, 'classes')
    with learn.no_bar(), learn.no_logging():
        ens = learn.fit_snapshots(3, 1, 0.01)
        ens.stack()
        ens.export()
        expected = ens.get_preds(dl=learn.dls.test_dl(new))[0]
    torch.save(tuple(learn.dls.test_dl(new, bs=20).one_batch()[:2]), tmp_path / 'inputs.pt')
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
    torch.testing.assert_close(torch.load(tmp_path / 'output.pt').softmax(1), expected)


@pytest.mark.parametrize('callback', [Taken, Heated])
def test_what_the_callbacks_of_a_learner_do_to_the_members_outputs_is_refused_and_nothing_is_written(
    tmp_path, callback
):
    learn = learner(model=Two if callback is Taken else None, cbs=callback())
    learn.path = tmp_path
    with pytest.raises(ValueError, match='export is not possible: one model .* do callbacks of the learner'):
        Ensemble([Two() if callback is Taken else learner(seed=i).model for i in range(2)], learn).export()
    assert not list(tmp_path.iterdir())


def test_an_export_that_cannot_be_written_leaves_the_learner_and_the_old_file(tmp_path, monkeypatch):
    learn, models = images(tmp_path)
    (tmp_path / 'export.pkl').write_text('old')
    own, dls = learn.model, learn.dls

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='export.pkl cannot be written: .*No space left'):
        Ensemble(models, learn).export()
    assert learn.model is own and learn.dls is dls and [f.name for f in tmp_path.iterdir()] == ['export.pkl']
    assert (tmp_path / 'export.pkl').read_text() == 'old'


def test_an_export_draws_nothing_from_the_random_generators(tmp_path):
    learn, models = images(tmp_path)
    state, python = torch.get_rng_state(), random.getstate()
    Ensemble(models, learn).export()
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python


def test_a_member_with_a_nan_is_not_exported(tmp_path):
    learn, models = images(tmp_path)
    models[1][0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="member 1 has a NaN in '0.weight'"):
        Ensemble(models, learn).export()


def test_to_export_inside_active_is_refused(tmp_path):
    learn, models = images(tmp_path)
    ens = Ensemble(models, learn)
    with ens.active(), pytest.raises(RuntimeError, match=r'export inside active\(\) is not possible: call it outside'):
        ens.export()
    assert not list(tmp_path.iterdir())


def test_members_whose_modes_move_weights_are_exported_as_they_predict_and_come_back_bitwise(tmp_path):
    learn, _ = images(tmp_path)
    members = [Merging() for _ in range(2)]
    for m in members:
        m.train()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in members]
    ens = Ensemble(members, learn)
    items = list(learn.dls.valid_ds.items[:20])
    with learn.no_bar():
        expected = ens.get_preds(dl=learn.dls.test_dl(items))[0]
        there = load_learner(ens.export())
        with there.no_bar():
            found = there.get_preds(dl=there.dls.test_dl(items))[0]
    torch.testing.assert_close(found, expected)
    for m, was in zip(members, before):
        assert m.training and all(torch.equal(v, was[k]) for k, v in m.state_dict().items())


class Merging(nn.Module):
    "As a LoRA that adds its update to the weights in `eval()`."

    def __init__(self):
        super().__init__()
        self.base, self.update = nn.Linear(64, 10), nn.Parameter(torch.randn(10, 64) * 0.1)
        self.is_merged = False

    def train(self, mode=True):
        if mode == self.is_merged:
            self.base.weight.data += -self.update.data if mode else self.update.data
            self.is_merged = not mode
        return super().train(mode)

    def forward(self, x):
        x = x.as_subclass(torch.Tensor).flatten(1)
        return self.base(x) if self.is_merged else self.base(x) + x @ self.update.T


# a learner's other methods


def test_tta_and_show_results_of_an_ensemble_are_those_of_a_learner_that_is_it(tmp_path):
    learn, models = images(tmp_path)
    ens = Ensemble(models, learn)
    learn.dls.train.after_batch.add(Shifted())
    dl = learn.dls.test_dl(list(learn.dls.valid_ds.items[:30]), with_labels=True)
    with ens.active(), learn.no_bar(), learn.no_logging():
        torch.manual_seed(0)
        expected, targets = learn.tta(dl=dl, n=2, beta=0.5)
    torch.manual_seed(0)
    found, same = ens.tta(dl=dl, n=2, beta=0.5)
    assert torch.equal(found, expected) and torch.equal(targets, same)
    torch.testing.assert_close(found.sum(1), torch.ones(30))
    torch.testing.assert_close(ens.tta(n=1)[0], ens.get_preds()[0], rtol=0.2, atol=0.2)
    seen = []
    dl.show_results = lambda batch, preds, **kwargs: seen.append((preds, kwargs))
    ens.show_results(dl=dl, max_n=2)
    assert torch.equal(seen[0][0], ens.get_preds(dl=dl)[0].argmax(1)) and seen[0][1] == {'max_n': 2}
    assert learn.model is not models[0] and 'get_preds' not in vars(learn)


# ONNX, TorchScript, torch.export: of an average, and of an ensemble


def average(tmp_path):
    "Of the README: an average with fresh batch norm, and inputs."
    learn, _ = images(tmp_path)
    swa = SWACallback(0, swa_eval_freq=0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 0.1, cbs=swa)
        with swa.averaged():
            expected = learn.get_preds(act=lambda o: o)[0]
    swa.refresh()
    return swa.swa_model.eval(), expected, learn


def ensemble(tmp_path):
    learn, models = images(tmp_path)
    ens = Ensemble(models, learn, combine='vote')
    with learn.no_bar(), learn.no_logging():
        expected = ens.get_preds(act=lambda o: o)[0]
    return load_learner(ens.export('ens.pkl')).model, expected, learn


def exported(model, x):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()


def traced(model, x):
    return torch.jit.trace(model, (x,))


def onnx(model, x):
    pytest.importorskip('onnxscript')
    runtime = pytest.importorskip('onnxruntime')
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


@pytest.mark.parametrize('way', [exported, traced, onnx])
@pytest.mark.parametrize('of', [average, ensemble])
def test_averages_and_ensembles_leave_for_other_runtimes(tmp_path, of, way):
    model, expected, learn = of(tmp_path)
    batches = [x.as_subclass(torch.Tensor) for x, _ in learn.dls.valid]
    there = way(model, batches[0][:3])
    with torch.no_grad():
        found = torch.cat([there(x) for x in batches])  # of other sizes than the one it was made with
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
