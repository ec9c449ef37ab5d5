"""Ensembles: what they predict, how they are combined, what they are made from."""

import copy
import itertools
import math
import signal
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException
from fastai.data.block import CategoryBlock
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.metrics import accuracy, accuracy_multi, mse
from fastai.tabular.core import Categorify, Normalize
from fastai.tabular.data import TabularDataLoaders
from fastai.tabular.learner import tabular_learner
from torch import nn
from torch.nn import functional as F

from fastai_swa import Ensemble
from fastai_swa.views import as_lent
from fastai_swa.vision import digits, digits_net

from . import lora
from .helpers import learner, loaders, net


def trained(n=3, **kwargs):
    "A learner, and the models of other short fits on its data."
    learn, models = learner(**kwargs), []
    for seed in range(n):
        torch.manual_seed(seed)
        model = net()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.5)
        model(torch.randn(64, 6))  # statistics
        models.append(model.eval())
    return learn, models


def batches(learn):
    return [(x, y) for x, y in learn.dls.valid]


def naive(models, learn, act=lambda o: o.softmax(1)):
    "The mean of the probabilities, a model and a sample at a time."
    res = []
    with torch.no_grad():
        for x, _ in batches(learn):
            for i in range(len(x)):
                total = 0
                for m in models:
                    total = total + act(m.eval()(x[i : i + 1].float())).double()
                res.append(total[0] / len(models))
    return torch.stack(res)


# predictions


def test_predictions_equal_a_naive_loop_over_samples_and_models():
    learn, models = trained()
    probs, targets = Ensemble(models, learn).get_preds()
    torch.testing.assert_close(probs.double(), naive(models, learn), rtol=0, atol=5e-7)
    assert torch.equal(targets, torch.cat([y for _, y in batches(learn)])) and probs.shape == (40, 3)
    each, same = Ensemble(models, learn).member_preds()
    assert each.shape == (3, 40, 3) and torch.equal(same, targets)
    for one, m in zip(each, models):
        torch.testing.assert_close(one.double(), naive([m], learn), rtol=0, atol=5e-7)


@pytest.mark.parametrize('combine', ['mean', 'vote'])
def test_the_order_of_the_members_does_not_matter(combine):
    learn, models = trained(4)
    ref = Ensemble(models, learn, combine).get_preds()[0]
    for order in itertools.islice(itertools.permutations(models), 1, 24, 5):
        torch.testing.assert_close(Ensemble(order, learn, combine).get_preds()[0], ref, rtol=0, atol=3e-7)


def test_one_member_predicts_and_validates_bitwise_as_it_does_itself():
    learn, (model, *_) = trained()
    learn.model = model
    preds, values = learn.get_preds()[0], learn.validate()
    assert torch.equal(Ensemble([model], learn).get_preds()[0], preds) and list(
        Ensemble(model, learn).validate()
    ) == list(values)


def test_loss_and_metrics_are_those_of_the_mean_probabilities():
    learn, models = trained()
    p, y = naive(models, learn), torch.cat([y for _, y in batches(learn)])
    loss, acc = Ensemble(models, learn).validate()
    assert loss == pytest.approx(float(-p[torch.arange(40), y].log().mean()), rel=1e-5) and acc == pytest.approx(
        float((p.argmax(1) == y).float().mean())
    )
    many = list(Ensemble(models, learn).validate(dl=learn.dls.train))
    assert many[0] != loss and list(Ensemble(models, learn).validate(0)) == pytest.approx(many)


def test_members_of_several_architectures_in_several_precisions():
    learn, (a, b, _) = trained()
    wide = net(width=16)
    half = net()
    half.load_state_dict(b.state_dict())
    half.to(torch.bfloat16)
    other = learner(model=nn.Sequential(nn.Linear(6, 3)), seed=3)
    ens = Ensemble([a, wide, half, other], learn)

    class Bf16:
        def eval(self):
            return lambda x: half.eval()(x.to(torch.bfloat16)).float()

    torch.testing.assert_close(
        ens.get_preds()[0].double(), naive([a, wide, Bf16(), other.model], learn), rtol=0, atol=2e-6
    )
    assert next(half.parameters()).dtype == torch.bfloat16


def test_a_members_probability_of_zero_does_not_make_the_loss_infinite():
    sure = [nn.Linear(6, 3) for _ in range(2)]
    for i, m in enumerate(sure):
        nn.init.zeros_(m.weight)
        m.bias.data = torch.tensor([-500.0, -500.0, -500.0]).index_fill(
            0, torch.tensor([i]), 500.0
        )  # certain, each of another class
    learn = learner()
    y = torch.cat([y for _, y in batches(learn)])
    loss = Ensemble(sure, learn).validate()[0]
    assert math.isfinite(loss) and loss == pytest.approx(
        float(torch.where(y < 2, math.log(2), 1000.0).mean()), rel=1e-5
    )


def test_multi_label_and_regression_have_their_own_means():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 6, generator=g)

    def with_targets(y, loss, metric):
        pairs = list(zip(x, y))
        dls = DataLoaders(DataLoader(pairs[:40], bs=16), DataLoader(pairs[40:], bs=16), device='cpu')
        return Learner(dls, net(), loss, metrics=metric)

    _, models = trained()
    labels = (torch.rand(60, 3, generator=g) > 0.5).float()
    learn = with_targets(labels, BCEWithLogitsLossFlat(), accuracy_multi)
    p = naive(models, learn, torch.sigmoid)
    torch.testing.assert_close(Ensemble(models, learn).get_preds()[0].double(), p, rtol=0, atol=2e-7)
    loss, acc = Ensemble(models, learn).validate()
    assert loss == pytest.approx(float(F.binary_cross_entropy(p, labels[40:].double())), rel=1e-5)
    assert acc == pytest.approx(float(((p > 0.5) == labels[40:].bool()).float().mean()))
    votes = torch.stack([naive([m], learn, torch.sigmoid) > 0.5 for m in models]).sum(0)
    assert torch.equal(Ensemble(models, learn, 'vote').get_preds()[0] > 0.5, votes >= 2)
    learn = with_targets(torch.randn(60, 3, generator=g), MSELossFlat(), mse)
    p = naive(models, learn, lambda o: o)
    torch.testing.assert_close(Ensemble(models, learn).get_preds()[0].double(), p, rtol=1e-5, atol=1e-5)
    assert Ensemble(models, learn).validate()[0] == pytest.approx(
        float(F.mse_loss(p, torch.stack([y for _, y in learn.dls.valid.dataset]).double())), rel=1e-5
    )
    with pytest.raises(ValueError, match="combine='vote' needs classes"):
        Ensemble(models, learn, 'vote')


def test_an_unknown_loss_is_one_sentence():
    def my_loss(p, y):
        return F.cross_entropy(p, y)

    learn, models = trained()
    learn.loss_func = my_loss
    with pytest.raises(ValueError, match="the loss my_loss does not say .*: pass activation='softmax'"):
        Ensemble(models, learn)
    torch.testing.assert_close(
        Ensemble(models, learn, activation='softmax').member_preds()[0].mean(0).double(),
        naive(models, learn),
        rtol=0,
        atol=5e-7,
    )
    with pytest.raises(ValueError, match="activation must be 'softmax'"):
        Ensemble(models, learn, activation='relu')


# votes


def certain(p):
    return torch.tensor(p).log()


class Fixed(nn.Module):
    "Predicts what it was given, whatever it gets."

    def __init__(self, p):
        super().__init__()
        self.out = nn.Parameter(certain(p))

    def forward(self, x):
        return self.out.expand(len(x), -1)


@pytest.mark.parametrize(
    'members, winner',
    [
        (
            [[0.4, 0.35, 0.25], [0.1, 0.5, 0.4], [0.4, 0.35, 0.25]],
            0,
        ),  # two votes against one, though the mean prefers class 1
        ([[0.6, 0.3, 0.1], [0.05, 0.9, 0.05]], 1),  # a tie, which the mean decides
        (
            [[0.5, 0.4, 0.1], [0.1, 0.5, 0.4], [0.4, 0.1, 0.5]],
            0,
        ),  # all three tie: means .333 .333 .333, the first of equals or any of them
        ([[0.9, 0.05, 0.05], [0.3, 0.36, 0.34], [0.3, 0.36, 0.34]], 1),
    ],
)
def test_a_vote_goes_to_the_majority_and_ties_to_the_mean(members, winner):
    p = Ensemble([Fixed(m) for m in members], learner(), 'vote').get_preds()[0]
    assert (p.argmax(1) == winner).all() or members[0] == [0.5, 0.4, 0.1]
    torch.testing.assert_close(p.sum(1), torch.ones(40))
    votes = np.bincount([int(np.argmax(m)) for m in members], minlength=3) / len(members)
    torch.testing.assert_close(p[0].double(), torch.tensor(votes), rtol=0, atol=2e-3)


# stacking


def test_stacking_equals_ridge_regression_in_closed_form_with_its_penalty_by_leave_one_out():
    learn, models = trained()
    ens = Ensemble(models, learn)
    alphas = [0.01, 0.1, 1.0, 10.0]
    ens.stack(alphas=alphas)
    each, y = ens.member_preds()
    x = each.permute(1, 0, 2).reshape(40, 9).double()
    targets = F.one_hot(y, 3).double()

    def fit(x, t, alpha):
        mx, mt = x.mean(0), t.mean(0)
        w = torch.linalg.solve((x - mx).T @ (x - mx) + alpha * torch.eye(9).double(), (x - mx).T @ (t - mt))
        return w, mt - mx @ w

    def left_out(alpha):
        errors = []
        for i in range(40):
            kept = torch.arange(40) != i
            w, b = fit(x[kept], targets[kept], alpha)
            errors.append((x[i] @ w + b - targets[i]).square().mean())
        return torch.stack(errors).mean()

    best = min(alphas, key=left_out)
    assert ens.stacking['alpha'] == best
    w, b = fit(x, targets, best)
    torch.testing.assert_close(torch.tensor(ens.stacking['weights']).double(), w.T, rtol=1e-4, atol=1e-5)
    p = ens.get_preds()[0]
    assert torch.equal(p.argmax(1), (x @ w + b).argmax(1)) and ens.combine == 'stack'
    torch.testing.assert_close(p.sum(1), torch.ones(40))


def test_stacking_takes_the_number_of_a_data_set_or_a_loader_in_either_order():
    learn, models = trained()
    ens = Ensemble(models, learn)
    ens.stack()
    expected = ens.stacking
    valid = learn.dls.valid
    for args in (
        (1,),
        (np.int64(1),),
        (-1,),
        (valid,),
        (1, valid),
        (valid, 1),
        (1, None),
        (None,),
        (None, valid),
        (0, valid),
    ):
        ens.stacking = None
        ens.stack(*args)
        assert ens.stacking == expected, args


@pytest.mark.parametrize(
    'given, error, said',
    [
        (2, ValueError, 'ds_idx must be one of the 2 data sets of the learner, from 0, not 2'),
        (-3, ValueError, 'ds_idx must be one of the 2 data sets'),
        (True, ValueError, 'ds_idx must be one of the 2 data sets of the learner, from 0, not True'),
        (1.0, TypeError, r'stack needs a loader, such as learn.dls.test_dl\(items, with_labels=True\), or the number'),
        ('valid', TypeError, "stack needs a loader, .* not 'valid'"),
        (learner, TypeError, 'stack needs a loader'),
    ],
)
def test_what_is_neither_is_one_sentence(given, error, said):
    learn, models = trained()
    ens = Ensemble(models, learn)
    with pytest.raises(error, match=said):
        ens.stack(given)
    assert ens.stacking is None and ens.combine == 'mean'


def test_stacking_of_values_is_a_linear_model_of_them():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(90, 6, generator=g)
    y = x[:, :1] * 2 - x[:, 1:2]
    dls = DataLoaders(
        DataLoader(list(zip(x[:40], y[:40])), bs=16), DataLoader(list(zip(x[40:], y[40:])), bs=16), device='cpu'
    )
    members = [nn.Linear(6, 1, bias=False) for _ in range(2)]
    for i, m in enumerate(members):
        m.weight.data = torch.eye(6)[i : i + 1]  # the two features that it takes
    ens = Ensemble(members, Learner(dls, net(n_out=1), MSELossFlat(), metrics=mse))
    ens.stack(alphas=[1e-6])
    assert ens.validate()[0] < 1e-6 and np.allclose(ens.stacking['weights'], [[2, -1]], atol=1e-4)


def test_stacking_on_the_training_data_of_a_member_is_refused():
    learn, models = trained()
    other = learner(dls=loaders(seed=9), seed=4)
    ens = Ensemble([*models, other], learn)
    for dl in (learn.dls.train, learn.dls.train.new(shuffle=False), other.dls.train):
        with pytest.raises(ValueError, match='the training set of one: hold samples out'):
            ens.stack(dl)
    with pytest.raises(ValueError, match='the training set of one'):
        ens.stack(ds_idx=0)
    assert ens.combine == 'mean' and ens.stacking is None
    with pytest.raises(ValueError, match='needs stack'):
        ens.combine = 'stack'
    ens.stack(other.dls.valid)  # which no member was trained on
    dls = digits(n_train=200)
    with pytest.raises(ValueError, match='training set'):
        Ensemble([digits_net()], Learner(dls, digits_net(), CrossEntropyLossFlat())).stack(dls.train.new())


# a learner's own methods


def test_predict_tta_and_what_else_a_learner_does_go_through_the_ensemble():
    dls = digits(n_train=200)
    learn = Learner(dls, digits_net(), CrossEntropyLossFlat(), metrics=accuracy)
    models = [digits_net() for _ in range(3)]
    ens = Ensemble(models, learn)
    probs, _ = ens.get_preds()
    label, index, p = ens.predict(dls.valid_ds.items[0])
    torch.testing.assert_close(p.as_subclass(torch.Tensor), probs[0], rtol=0, atol=1e-6)
    assert label == str(int(probs[0].argmax())) and int(index) == int(probs[0].argmax())
    with ens.active() as inside, inside.no_bar():
        assert inside is learn
        torch.testing.assert_close(learn.get_preds()[0], probs)


def test_the_learner_and_the_members_are_as_before_also_after_an_error():
    learn, models = trained()
    models[1].train()
    before, modes = copies(learn), [[m.training for m in model.modules()] for model in models]
    own = learn.model
    ens = Ensemble([*models, learn], learn)
    ens.validate(), ens.get_preds(), ens.member_preds()
    with pytest.raises(KeyboardInterrupt), ens.active() as inside:
        inside.model.eval()
        raise KeyboardInterrupt

    class Broken(nn.Linear):
        def forward(self, x):
            raise ZeroDivisionError('broken')

    with pytest.raises(ZeroDivisionError):
        Ensemble([*models, Broken(6, 3)], learn).validate()
    assert learn.model is own and [[m.training for m in model.modules()] for model in models] == modes
    assert all(torch.equal(before[k], v) for k, v in learn.model.state_dict().items())


def copies(learn):
    return {k: v.clone() for k, v in learn.model.state_dict().items()}


# members


def test_state_dicts_paths_learners_and_modules_are_the_same_members(tmp_path):
    learn, models = trained()
    torch.save(models[0].state_dict(), tmp_path / 'a.pth')
    learn.path, learn.model_dir = tmp_path, '.'
    learn.model.load_state_dict(models[1].state_dict())
    saved = learn.save('b', with_opt=False)
    third = learner()
    third.model = models[2]
    ref = Ensemble(models, learn).get_preds()[0]
    assert torch.equal(Ensemble([tmp_path / 'a.pth', str(saved), third], learn).get_preds()[0], ref)
    assert torch.equal(Ensemble([m.state_dict() for m in models], learn).get_preds()[0], ref)
    assert torch.equal(Ensemble(Ensemble(models, learn)).get_preds()[0], ref)
    assert Ensemble([third, models[0]]).learn is third  # the first learner, if none is given


def test_some_of_the_members_are_an_ensemble_too():
    learn, models = trained()
    ens = Ensemble(models, learn)
    assert (
        torch.equal(ens[:2].get_preds()[0], Ensemble(models[:2], learn).get_preds()[0])
        and len(ens[:2]) == 2
        and len(ens[1]) == 1
    )
    assert torch.equal(ens[[2, 0]].get_preds()[0], Ensemble([models[2], models[0]], learn).get_preds()[0])


@pytest.mark.parametrize('combine', ['mean', 'vote', 'stack'])
def test_an_ensemble_is_saved_and_loaded_as_one_folder(tmp_path, combine):
    learn, models = trained()
    wide = net(width=16)
    ens = Ensemble([*models, wide], learn)
    if combine == 'stack':
        ens.stack()
    else:
        ens.combine = combine
    ens.save(tmp_path / 'ens')
    again = Ensemble.load(tmp_path / 'ens', learn, archs=[None, None, None, net(width=16)])
    assert again.combine == combine and torch.equal(again.get_preds()[0], ens.get_preds()[0])
    assert sorted(f.name for f in (tmp_path / 'ens').iterdir()) == [
        'index.json',
        *(f'member-0{i}.pth' for i in (1, 2, 3, 4)),
    ]
    assert torch.load(tmp_path / 'ens' / 'member-01.pth', weights_only=True).keys() == models[0].state_dict().keys()
    with pytest.raises(ValueError, match=r'member-04.pth does not hold weights of this architecture'):
        Ensemble(tmp_path / 'ens', learn).get_preds()


def test_a_missing_or_damaged_file_is_named_and_the_others_serve(tmp_path):
    learn, models = trained()
    Ensemble(models, learn).save(tmp_path)
    file = tmp_path / 'member-02.pth'
    data = bytearray(file.read_bytes())
    at = bytes(data).find(models[1][0].weight.detach().numpy().tobytes()[:16])
    data[at] ^= 1  # one bit of a weight
    file.write_bytes(data)
    with pytest.raises(ValueError, match='member-02.pth is damaged'):
        Ensemble(tmp_path, learn)
    file.unlink()
    with pytest.raises(FileNotFoundError, match='member-02.pth is missing'):
        Ensemble(tmp_path, learn)
    rest = Ensemble([tmp_path / 'member-01.pth', tmp_path / 'member-03.pth'], learn)
    assert torch.equal(rest.get_preds()[0], Ensemble([models[0], models[2]], learn).get_preds()[0])
    (tmp_path / 'index.json').write_text('{}')
    with pytest.raises(ValueError, match='index.json is damaged'):
        Ensemble(tmp_path, learn)
    (tmp_path / 'index.json').unlink()
    with pytest.raises(FileNotFoundError, match='has no index.json'):
        Ensemble(tmp_path, learn)


@pytest.mark.parametrize(
    'args, error, sentence',
    [
        (lambda learn, ms: ([], learn), ValueError, 'members is empty'),
        (lambda learn, ms: (ms,), ValueError, 'learn is needed for its data'),
        (lambda learn, ms: ([3], learn), TypeError, 'members must be learners, modules, state dicts or paths, not 3'),
        (
            lambda learn, ms: (ms, learn, 'median'),
            ValueError,
            "combine must be 'mean', 'vote' or 'stack', not 'median'",
        ),
        (lambda learn, ms: (ms, learn, 'mean', None, [net()]), ValueError, 'archs has 1 modules for 3 members'),
    ],
)
def test_what_cannot_be_an_ensemble_is_one_sentence(args, error, sentence):
    with pytest.raises(error, match=sentence):
        Ensemble(*args(*trained()))


def test_a_file_with_more_than_weights_is_refused_and_nothing_in_it_is_run(tmp_path):
    learn = learner()
    learn.path, learn.model_dir = tmp_path, '.'
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    file = learn.save('with_opt', with_opt=True)
    try:
        Ensemble([file], learn).get_preds()  # loads where the optimizer is plain data
    except ValueError as e:
        assert 'with_opt=False' in str(e)


# what a review found


def test_probabilities_are_probabilities_with_torchs_own_losses_too():
    learn, models = trained()
    learn.loss_func = nn.CrossEntropyLoss()
    p = naive(models, learn)
    for ens in Ensemble(models, learn), Ensemble(models, learn, 'vote'):
        torch.testing.assert_close(ens.get_preds()[0].sum(1), torch.ones(40))
    torch.testing.assert_close(Ensemble(models, learn).get_preds()[0].double(), p, rtol=0, atol=5e-7)
    with Ensemble(models, learn).active() as inside:
        torch.testing.assert_close(inside.get_preds()[0].double(), p, rtol=0, atol=5e-7)
    assert 'get_preds' not in vars(learn)


@pytest.mark.parametrize(
    'call',
    [
        lambda learn: learn.fit(1),
        lambda learn: learn.fit_one_cycle(1),
        lambda learn: learn.save('x'),
        lambda learn: learn.export('x'),
    ],
)
def test_to_train_or_to_save_the_learner_while_it_is_an_ensemble_is_refused(call):
    learn, models = trained()
    own = learn.model
    with (
        pytest.raises(RuntimeError, match=r'inside active\(\) is not possible: the learner is an ensemble there'),
        Ensemble(models, learn).active() as inside,
    ):
        call(inside)
    assert learn.model is own and learn.opt is None
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
    assert not torch.equal(learn.model[0].weight, models[0][0].weight)


def test_members_may_be_saved_over_their_own_files(tmp_path):
    learn, models = trained()
    Ensemble(models, learn).save(tmp_path)
    ens = Ensemble(tmp_path, learn)
    each = ens.member_preds()[0]
    ens[::-1].save(tmp_path)
    assert torch.equal(Ensemble(tmp_path, learn).member_preds()[0], each.flip(0))


def test_what_is_asked_for_holds_and_what_is_known_is_kept(tmp_path):
    learn, models = trained()
    vote = Ensemble(models, learn, 'vote')
    assert Ensemble(vote).combine == 'vote' and Ensemble(vote, combine='mean').combine == 'mean'
    stacked = Ensemble(models, learn)
    stacked.stack()
    stacked.save(tmp_path)
    assert (
        Ensemble(tmp_path, learn).combine == 'stack'
        and Ensemble(tmp_path, learn, combine='mean').combine == 'mean'
        and Ensemble(stacked).combine == 'stack'
    )

    def my_loss(p, y):
        return F.cross_entropy(p, y)

    learn.loss_func = my_loss
    own = Ensemble(models, learn, activation='softmax')
    own.save(tmp_path / 'own')
    assert (
        Ensemble(tmp_path / 'own', learn).probabilities.kind == Ensemble(own).probabilities.kind == 'softmax'
        and len(own[np.int64(1)]) == 1
    )


def test_samples_of_a_training_set_are_known_again_in_other_loaders():
    dls = digits(n_train=100)
    learn = Learner(dls, digits_net(), CrossEntropyLossFlat())
    ens = Ensemble([digits_net() for _ in range(2)], learn)
    items = list(dls.train_ds.items)
    for few in items[:20], list(dls.valid_ds.items[:50]) + items[:1]:
        with pytest.raises(ValueError, match='training set'):
            ens.stack(dls.test_dl(few, with_labels=True))
    ens.stack(dls.test_dl(list(dls.valid_ds.items[:50]), with_labels=True))
    learn, models = trained()
    data = learn.dls.train.dataset
    for part in data[:30], [data[3]], torch.utils.data.Subset(data, range(5)):
        with pytest.raises(ValueError, match='training set'):
            Ensemble(models, learn).stack(DataLoader(part, bs=8, device='cpu'))


@pytest.mark.parametrize(
    'case, sentence', [('labels', 'these data have none'), ('one-hot', 'one class for each sample')]
)
def test_stacking_without_a_class_for_each_sample_is_one_sentence(case, sentence):
    learn, models = trained()
    pairs = learn.dls.valid.dataset
    data = [(x,) for x, _ in pairs] if case == 'labels' else [(x, F.one_hot(y, 3).float()) for x, y in pairs]
    dl = DataLoader(data, bs=8, device='cpu')
    if case == 'labels':
        dl.n_inp = learn.dls.n_inp = 1
    learn.loss_func, learn.metrics = nn.CrossEntropyLoss(), []
    with pytest.raises(ValueError, match=sentence):
        Ensemble(models, learn).stack(dl)


def test_members_that_predict_different_things_are_refused_and_precisions_may_differ():
    learn, models = trained()
    for other in net(n_out=1), net(n_out=4):
        with pytest.raises(
            ValueError, match=r'member 3 predicts \(32, .\), member 0 \(32, 3\): they cannot be combined'
        ):
            Ensemble([*models, other], learn).get_preds()
    double = net().double()
    for how in 'mean', 'vote':
        assert Ensemble([*models, double], learn, how).get_preds()[0].shape == (40, 3)
    ens = Ensemble([double, double], learn)
    ens.stack()
    assert torch.isfinite(ens.get_preds()[0]).all()


@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat(), BCEWithLogitsLossFlat()])
def test_a_vote_without_dissent_has_a_finite_loss(loss):
    learn, sure = learner(), [nn.Linear(6, 3) for _ in range(2)]
    for m in sure:
        nn.init.zeros_(m.weight)
        m.bias.data = torch.tensor([200.0, -200.0, -200.0])
    learn.loss_func = loss
    if isinstance(loss, BCEWithLogitsLossFlat):
        dls = [
            DataLoader([(x, F.one_hot(y, 3).float()) for x, y in dl.dataset], bs=16, device='cpu')
            for dl in learn.dls.loaders
        ]
        learn = Learner(DataLoaders(*dls, device='cpu'), net(), loss)
    assert math.isfinite(Ensemble(sure, learn, 'vote').validate()[0])


def test_recurrent_models_whose_first_output_counts_are_combined_as_they_are_trained():
    from fastai.callback.rnn import RNNCallback

    class Recurrent(nn.Linear):
        def forward(self, x):
            return super().forward(x), [x], [x]

    learn = learner(model=lambda: Recurrent(6, 3), cbs=RNNCallback())
    ens = learn.fit_snapshots(2, 1, 0.1)
    last = learn.recorder.values[-1]
    assert list(ens.validate()) == pytest.approx(list(last[-2:]), rel=1e-5)
    with pytest.raises(TypeError, match='members must give one tensor'):
        Ensemble([Recurrent(6, 3)], learner()).get_preds()


def test_files_in_torchs_old_format_serve_too(tmp_path):
    learn, models = trained()
    torch.save(models[0].state_dict(), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert torch.equal(
        Ensemble([tmp_path / 'old.pth'], learn).get_preds()[0], Ensemble([models[0]], learn).get_preds()[0]
    )


# outputs that the learner's callbacks take apart


class Two(nn.Linear):
    "Gives more than its prediction."

    def __init__(self, n_in=6, n_out=3, kind=tuple):
        super().__init__(n_in, n_out)
        self.kind = kind

    def forward(self, x):
        logits = super().forward(x)
        return (logits, x) if self.kind is tuple else {'logits': logits, 'hidden': x}


class Taken(Callback):
    "As Hugging Face's models are used: what counts is taken out of their output."

    order = 5

    def after_pred(self):
        if not isinstance(self.pred, torch.Tensor):
            self.learn.pred = self.pred['logits'] if isinstance(self.pred, dict) else self.pred[0]


class Heated(Callback):
    "Changes what the one before it has left, so that the order matters; it counts its calls."

    order = 6

    def __init__(self):
        self.n_batches = self.n_preds = 0

    def before_batch(self):
        self.n_batches += 1

    def after_pred(self):
        self.n_preds += 1
        self.learn.pred = self.pred * 2


@pytest.mark.parametrize('kind', [tuple, dict])
def test_outputs_that_a_callback_takes_apart_are_combined_in_all_ways_of_predicting(kind):
    plain, models = trained()
    twos = [Two(kind=kind) for _ in range(3)]
    linear = [nn.Linear(6, 3) for _ in range(3)]
    for two, m in zip(twos, linear):
        m.load_state_dict(two.state_dict())
    heated = Heated()
    learn = learner(model=lambda: Two(kind=kind), cbs=[Taken(), heated])
    ens = Ensemble(twos, learn)
    p = naive(linear, plain, lambda o: (2 * o).softmax(1))
    torch.testing.assert_close(ens.get_preds()[0].double(), p, rtol=0, atol=5e-7)
    assert heated.n_batches == 2 and heated.n_preds == 6
    torch.testing.assert_close(ens.member_preds()[0].double().mean(0), p, rtol=0, atol=5e-7)
    y = torch.cat([y for _, y in batches(learn)])
    assert ens.validate()[0] == pytest.approx(float(-p[torch.arange(40), y].log().mean()), rel=1e-5)
    with ens.active() as inside:
        assert list(inside.validate()) == pytest.approx(list(ens.validate()))
    one = Ensemble(twos[0], learn).validate()
    learn.model = twos[0]
    assert list(one) == pytest.approx(list(learn.validate()))
    ens.stack()
    assert torch.isfinite(ens.get_preds()[0]).all()


def test_callbacks_that_are_passed_to_a_prediction_take_part_in_it():
    plain, _ = trained()
    twos = [Two() for _ in range(2)]
    learn = learner(model=Two)
    ens = Ensemble(twos, learn)
    with pytest.raises(TypeError, match='members must give one tensor, and Two gives a tuple: let a callback'):
        ens.validate()
    p = naive([lambda_of(m) for m in twos], plain)
    torch.testing.assert_close(ens.get_preds(cbs=Taken())[0].double(), p, rtol=0, atol=5e-7)
    assert len(ens.validate(cbs=Taken())) == 2 and ens.member_preds(cbs=Taken())[0].shape == (2, 40, 3)


def lambda_of(two):
    m = nn.Linear(6, 3)
    m.load_state_dict(two.state_dict())
    return m


def test_a_learner_that_calls_its_model_in_a_way_of_its_own_does_so_with_each_member():
    class Keywords(nn.Linear):
        def forward(self, *, x, scale):
            return super().forward(x) * scale

    class OwnLoop(Learner):
        def _do_one_batch(self):
            self.pred = self.model(x=self.xb[0], scale=2.0)
            self('after_pred')
            if len(self.yb):
                self.loss_grad = self.loss_func(self.pred, *self.yb)
                self.loss = self.loss_grad.clone()
            self('after_loss')

    members = [Keywords(6, 3) for _ in range(3)]
    learn = OwnLoop(loaders(), Keywords(6, 3), CrossEntropyLossFlat(), metrics=accuracy)
    plain = [nn.Linear(6, 3) for _ in members]
    for m, source in zip(plain, members):
        m.load_state_dict(source.state_dict())
    p = naive(plain, learn, lambda o: (2 * o).softmax(1))
    torch.testing.assert_close(Ensemble(members, learn).get_preds()[0].double(), p, rtol=0, atol=5e-7)


def test_a_callback_that_wants_no_loss_gets_the_combined_predictions():
    class NoLoss(Callback):
        def after_pred(self):
            raise CancelBatchException

    learn, models = trained()
    preds = Ensemble(models, learn).get_preds(cbs=NoLoss())[0]
    torch.testing.assert_close(preds.double(), naive(models, learn), rtol=0, atol=5e-7)


def test_each_members_output_passes_mixed_precision_and_autocast_is_left_after_an_error():
    class Autocast(Callback):
        "fastai's MixedPrecision, on the CPU."

        order = 10

        def before_batch(self):
            self.autocast = torch.autocast('cpu', torch.bfloat16)
            self.autocast.__enter__()

        def after_pred(self):
            assert self.pred.dtype == torch.bfloat16
            self.learn.pred = self.pred.float()

        def after_loss(self):
            self.autocast.__exit__(None, None, None)

    learn, models = trained()
    p = naive(models, learn)
    learn.add_cb(Autocast())
    preds = Ensemble(models, learn).get_preds()[0]
    torch.testing.assert_close(preds.double(), p, rtol=0, atol=0.02)
    assert preds.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')

    class Broken(nn.Linear):
        def forward(self, x):
            raise ZeroDivisionError('broken')

    with pytest.raises(ZeroDivisionError, match='^broken$'):
        Ensemble([*models, Broken(6, 3), models[0]], learn).validate()
    assert not torch.is_autocast_enabled('cpu')


def test_the_model_is_the_ensemble_also_for_who_calls_it_and_asks_it_for_what_members_have():
    learn, models = trained()
    models[0].config = 'of the first'
    x = torch.randn(5, 6)
    with torch.no_grad(), Ensemble(models, learn).active() as inside:
        inside.get_preds()
        p = inside.model.eval()(x).softmax(1)
        assert inside.model.config == 'of the first' and not hasattr(inside.model, 'no_such_name')
    torch.testing.assert_close(p, torch.stack([m.eval()(x).softmax(1) for m in models]).mean(0))


# what a score is worth


def folds(n=60, n_folds=3, seed=0):
    "Learners of a cross-validation over numbers, each with transforms of its own."
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    y = torch.randint(3, (n,), generator=g)
    learners = []
    for k in range(n_folds):
        valid = list(range(k, n, n_folds))
        train = [i for i in range(n) if i % n_folds != k]
        parts = Datasets(range(n), [[lambda i: x[i]], [lambda i: y[i]]], splits=[train, valid])
        learners.append(
            Learner(parts.dataloaders(bs=16, device='cpu'), net(), CrossEntropyLossFlat(), metrics=accuracy)
        )
    return learners


def test_stacking_over_numbers_on_what_a_fold_was_trained_on_is_refused():
    first, *others = folds()
    for ens in Ensemble([first, *others]), Ensemble(others, first):
        with pytest.raises(ValueError, match='the training set of one: hold samples out'):
            ens.stack()
    Ensemble([first, nn.Linear(6, 3)], first).stack()
    stranger = folds(seed=1)[1]
    Ensemble([first, stranger]).stack()  # equal numbers, other samples


@pytest.mark.parametrize(
    'call',
    [
        lambda ens: ens.validate(),
        lambda ens: ens.get_preds(),
        lambda ens: ens.validate(dl=ens.learn.dls.valid),
        lambda ens: within(ens, lambda learn: learn.validate()),
        lambda ens: within(ens, lambda learn: learn.get_preds()),
    ],
    ids='validate get_preds dl active-validate active-get_preds'.split(),
)
def test_a_score_on_what_members_were_trained_on_warns_with_how_many(call):
    ens = Ensemble(folds())
    with pytest.warns(
        UserWarning,
        match='20 of the 20 samples are training data of 2 of the 3 members: what the ensemble scores there flatters '
        'it',
    ):
        call(ens)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        call(ens[:1])  # its own held-out fold
        call(Ensemble([*folds()[:1], *folds(seed=1)[1:]]))


def within(ens, f):
    with ens.active() as learn, learn.no_bar(), learn.no_logging():
        f(learn)


def test_a_score_on_what_stacking_was_fitted_on_warns_and_on_other_samples_does_not():
    learn, models = trained()
    data = learn.dls.valid.dataset
    fitted, others = (DataLoader(part, bs=8, device='cpu') for part in (data[:25], data[25:]))
    ens = Ensemble(models, learn)
    ens.stack(fitted)
    with pytest.warns(UserWarning, match=r'stack\(\) was fitted on 25 of the 40 samples'):
        ens.validate()
    with pytest.warns(UserWarning, match=r'stack\(\) was fitted on 25 of the 25 samples'):
        Ensemble(ens).get_preds(dl=fitted)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        ens.validate(dl=others)
        ens.combine = 'mean'
        ens.validate()


def test_targets_in_a_column_as_tabular_data_have_them_can_be_stacked():
    r = np.random.RandomState(0)
    df = pd.DataFrame({'a': r.randn(120), 'b': r.randn(120), 'kind': r.choice(list('xyz'), 120)})
    df['y'] = np.where(df.a + df.b > 0, 'yes', 'no')
    dls = TabularDataLoaders.from_df(
        df,
        procs=[Categorify, Normalize],
        cat_names=['kind'],
        cont_names=['a', 'b'],
        y_names='y',
        y_block=CategoryBlock(),
        valid_idx=list(range(60, 120)),
        bs=16,
        device='cpu',
    )
    learn = tabular_learner(dls, layers=[8], metrics=accuracy)
    with learn.no_bar(), learn.no_logging():
        ens = learn.fit_snapshots(2, 1, 0.01)
        other = DataLoaders(dls.train, dls.test_dl(df.iloc[60:90], with_labels=True))
        assert ens.get_preds()[1].shape == (60, 1)
        ens.stack(other.valid)
        assert ens.combine == 'stack' and ens.validate(dl=dls.test_dl(df.iloc[90:], with_labels=True))[1] > 0.5


# models whose modes move weights


@pytest.mark.parametrize('is_training', [True, False])
@pytest.mark.parametrize('kind', lora.models)
def test_members_whose_eval_merges_weights_predict_as_they_do_alone_and_come_back_bitwise(kind, is_training, tmp_path):
    learn = learner()
    models = [lora.models[kind]() for _ in range(3)]
    expected = naive([copy.deepcopy(m) for m in models], learn)
    for m in models:
        m.train(is_training)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    ens = Ensemble(models, learn, archs=models)
    torch.testing.assert_close(ens.get_preds()[0].double(), expected, rtol=0, atol=2e-6)
    ens.save(tmp_path)
    for m, was in zip(models, before):
        assert m.training == is_training and all(torch.equal(v, was[k]) for k, v in m.state_dict().items())
    for m in models:
        m.train(not is_training)  # of whatever form the architectures are
    again = Ensemble.load(tmp_path, learn, archs=models)
    torch.testing.assert_close(again.get_preds()[0].double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize('kind', lora.models)
def test_snapshots_are_of_the_weights_as_training_has_them_and_average_as_such(kind):
    seen = []

    class Look(Callback):
        def after_batch(self):
            if self.training and self.iter == self.n_iter - 1:
                seen.append({k: v.detach().clone() for k, v in self.model.state_dict().items()})

    learn = learner(model=lora.models[kind])
    ens = learn.fit_snapshots(3, 1, 0.05, cbs=Look())
    last = learn.recorder.values[-1]
    for weights, expected in zip(ens.members, seen, strict=True):
        assert all(torch.equal(v, expected[k]) for k, v in weights.items())
    assert list(ens.validate()) == pytest.approx(list(last[-2:]), rel=1e-5)
    torch.testing.assert_close(ens[-1].get_preds()[0], learn.get_preds()[0], rtol=0, atol=2e-6)


class OwnEval(nn.Linear):
    "Has an `eval` of its own, which PyTorch calls for the outermost module alone."

    def eval(self):
        self.is_ready = True
        return super().eval()

    def forward(self, x):
        return super().forward(x) * (2 if getattr(self, 'is_ready', False) else 1)


def test_the_eval_of_a_member_is_called_as_if_it_were_alone():
    learn = learner()
    models = [OwnEval(6, 3) for _ in range(2)]
    expected = naive(copy.deepcopy(models), learn)
    torch.testing.assert_close(Ensemble(models, learn).get_preds()[0].double(), expected, rtol=0, atol=5e-7)


def test_ctrl_c_at_any_line_of_the_way_in_and_out_leaves_the_learner_as_it_was():
    learn, models = trained()
    own, names, cbs = learn.model, set(vars(learn)), [type(cb) for cb in learn.cbs]
    ens = Ensemble(models, learn)
    files = [f'fastai_swa/{name}.py' for name in ('ensemble', 'fitting', 'views', 'aside')]

    def interrupted_at(n):
        "Whether there is an n-th line on the way."
        lines = itertools.count(1)

        def trace(frame, event, arg):
            if not frame.f_code.co_filename.endswith((*files, 'fastai/learner.py')):
                return None
            if event == 'line' and next(lines) == n:
                signal.raise_signal(signal.SIGINT)
            return trace

        sys.settrace(trace)
        try:
            with ens.active():
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return next(lines) > n

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        n = 1
        while interrupted_at(n):
            assert learn.model is own and set(vars(learn)) == names and [type(cb) for cb in learn.cbs] == cbs, n
            assert as_lent(learn) is learn, n
            n += 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert n > 30


def test_a_save_over_an_ensemble_that_fails_leaves_the_old_one_whole(tmp_path, monkeypatch):
    from fastai_swa import weights as files

    learn = learner()
    old, new = ([net() for _ in range(3)] for _ in range(2))
    Ensemble(old, learn).save(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    save, calls = files.save_weights, []

    def full(file, weights):
        calls.append(file)
        if len(calls) == 2:
            raise OSError(28, 'No space left on device')
        save(file, weights)

    monkeypatch.setattr(files, 'save_weights', full)
    with pytest.raises(OSError, match='No space left'):
        Ensemble(new, learn).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    for module, file in zip(old, Ensemble(tmp_path, learn).members):
        assert torch.equal(module[0].weight, torch.load(file, weights_only=True)['0.weight'])


def test_a_save_over_an_ensemble_replaces_it_and_one_of_its_own_members_can_go_on(tmp_path):
    learn = learner()
    Ensemble([net(), net()], learn).save(tmp_path)
    again = Ensemble(tmp_path, learn)
    preds = again.get_preds()[0]
    again[[1, 0]].save(tmp_path)
    again = Ensemble(tmp_path, learn)
    again.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    torch.testing.assert_close(again.get_preds()[0], preds)
    assert torch.equal(again.get_preds()[0], Ensemble(tmp_path, learn).get_preds()[0])
