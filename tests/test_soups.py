"""Soups of an ensemble's members: which are in, what they predict, what is refused."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.metrics import accuracy
from torch import nn

from fastai_swa import Ensemble, SWACallback
from fastai_swa.passes import refresh_bn, refreshable

from . import lora
from .helpers import learner, net


def fine_tuned(n=4, model=net, **kwargs):
    "A learner after three epochs, the weights it had then, and models that were each trained on from there."
    learn = learner(model, **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(3)
        anchor = copy.deepcopy(learn.model)
        models = []
        for i in range(n):
            learn.model.load_state_dict(anchor.state_dict())
            torch.manual_seed(10 + i)
            learn.fit(2, 0.02 * (i + 1))
            models.append(copy.deepcopy(learn.model))
    learn.model.load_state_dict(anchor.state_dict())
    return learn, anchor, models


def without_bn(width=8):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def scored(learn, weights):
    "Loss and metrics of a state dict, batch norm refreshed on the training set."
    other = copy.deepcopy(learn)
    other.model.load_state_dict(weights)
    with other.no_bar():
        refresh_bn(other, refreshable(other), None, in_fit=False)
        return list(other.validate())


def naive_mean(models):
    states = [m.state_dict() for m in models]
    res = {}
    for name, value in states[0].items():
        values = torch.stack([s[name].double() for s in states])
        res[name] = values.mean(0).to(value.dtype) if value.is_floating_point() else value
    return res


def assert_parameters(state, expected, rtol=1e-6):
    for name, value in expected.items():
        if 'running' not in name and 'tracked' not in name:
            torch.testing.assert_close(state[name], value, rtol=rtol, atol=1e-7)


def test_the_uniform_soup_is_the_mean_of_all_and_predicts_with_refreshed_batch_norm():
    learn, _, models = fine_tuned()
    soup = Ensemble(models, learn).soup()
    expected = naive_mean(models)
    assert soup.members == [0, 1, 2, 3]
    assert_parameters(soup.state_dict(), expected)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with soup.averaged(), learn.no_bar():
        found = list(learn.validate())
    assert found == pytest.approx(scored(learn, expected), rel=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    soup.apply()
    with learn.no_bar():
        assert list(learn.validate()) == pytest.approx(found)


@pytest.mark.parametrize('by', ['valid_loss', 'accuracy'])
def test_the_greedy_soup_takes_in_whom_the_mean_does_not_lose_by(by):
    learn, _, models = fine_tuned(5)
    with torch.no_grad():  # one that no mean can bear
        for p in models[2].parameters():
            p.add_(torch.randn_like(p))
    soup = Ensemble(models, learn).soup('greedy', by)

    column = 0 if by == 'valid_loss' else 1
    sign = 1 if by == 'valid_loss' else -1
    values = [sign * scored(learn, m.state_dict())[column] for m in models]
    order = sorted(range(5), key=lambda i: values[i])
    members, best = order[:1], values[order[0]]
    for i in order[1:]:
        value = sign * scored(learn, naive_mean([models[j] for j in (*members, i)]))[column]
        if value <= best:
            members, best = [*members, i], value
    assert soup.members == members and 2 not in members
    assert_parameters(soup.state_dict(), naive_mean([models[i] for i in members]))


def test_the_table_has_what_was_validated_and_what_was_kept():
    learn, _, models = fine_tuned(3)
    table = Ensemble(models, learn).soup('greedy').table
    assert list(table) == ['model', 'valid_loss', 'accuracy', 'kept'] and len(table) == 5
    for i, m in enumerate(models):
        row = table.iloc[i]
        assert row['model'] == f'member {i}'
        assert [row['valid_loss'], row['accuracy']] == pytest.approx(scored(learn, m.state_dict()), rel=1e-5)
    first = table['valid_loss'][:3].idxmin()
    assert list(table.index[table['kept']])[0] == first


def test_model_stock_lies_between_anchor_and_mean_tensor_by_tensor():
    learn, anchor, models = fine_tuned(2)
    soup = Ensemble(models, learn).soup('stock', anchor=anchor).state_dict()
    before, mean = anchor.state_dict(), naive_mean(models)
    for name, _ in anchor.named_parameters():
        a, b = ((m.state_dict()[name] - before[name]).double().flatten() for m in models)
        cosine = float(a @ b / (a.norm() * b.norm()))
        t = min(1, max(0, 2 * cosine / (1 + cosine)))
        expected = t * mean[name] + (1 - t) * before[name]
        torch.testing.assert_close(soup[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('how', ['uniform', 'stock'])
def test_the_order_of_the_members_is_irrelevant(how):
    learn, anchor, models = fine_tuned()
    one = Ensemble(models, learn).soup(how, anchor=anchor).state_dict()
    other = Ensemble(models[::-1], learn).soup(how, anchor=anchor).state_dict()
    assert all(torch.equal(one[k], other[k]) for k, _ in learn.model.named_parameters())


def test_members_may_be_files_state_dicts_and_learners(tmp_path):
    learn, _, models = fine_tuned(3)
    torch.save(models[0].state_dict(), tmp_path / 'a.pth')
    other = copy.deepcopy(learn)
    other.model = models[2]
    members = [tmp_path / 'a.pth', models[1].state_dict(), other]
    assert_parameters(Ensemble(members, learn).soup().state_dict(), naive_mean(models))


def test_without_batch_norm_no_pass_over_the_training_set_is_made(monkeypatch):
    learn, _, models = fine_tuned(model=without_bn)

    def refuse(*args, **kwargs):
        raise AssertionError('a pass over the training set')

    monkeypatch.setattr('fastai_swa.one_model.refresh_bn', refuse)
    soup = Ensemble(models, learn).soup()
    with soup.averaged():
        pass
    assert all(torch.equal(v, soup.state_dict()[k]) for k, v in naive_mean(models).items())


def test_frozen_parts_stay_what_they_are_and_tied_weights_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.head = nn.Linear(6, 3)
            self.first.bias.requires_grad_(False)

        def forward(self, x):
            return self.head(self.second(self.first(x).relu()).relu())

    learn, anchor, models = fine_tuned(model=Tied)
    soup = Ensemble(models, learn).soup('stock', anchor=anchor)
    state = soup.state_dict()
    assert torch.equal(state['first.bias'], anchor.first.bias)
    assert torch.equal(state['first.weight'], state['second.weight'])
    assert not torch.equal(state['first.weight'], anchor.first.weight)
    soup.apply()
    assert learn.model.second.weight is learn.model.first.weight


def test_a_model_in_low_precision_is_summed_in_float64():
    learn, _, models = fine_tuned(3, model=without_bn)
    learn.model.bfloat16()
    models = [m.bfloat16() for m in models]
    sets = [[(x.bfloat16(), y) for x, y in dl.dataset] for dl in learn.dls.loaders]
    learn.dls = DataLoaders(*(DataLoader(pairs, bs=16) for pairs in sets))
    soup = Ensemble(models, learn).soup()
    expected = naive_mean(models)
    assert all(torch.equal(v, expected[k]) and v.dtype == torch.bfloat16 for k, v in soup.state_dict().items())


def test_weights_that_modes_move_are_summed_as_training_has_them():
    learn = learner(lora.merged_layers)
    models = []
    for i in range(3):
        m = copy.deepcopy(learn.model)
        with torch.no_grad():
            for p in m.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        models.append(m)
    expected = naive_mean([copy.deepcopy(m) for m in models])
    models[1].eval()
    soup = Ensemble(models, learn).soup()
    assert_parameters(soup.state_dict(), expected, rtol=1e-5)


# what is refused


def test_a_soup_that_is_worse_than_its_worst_member_is_refused_and_greedy_protects_itself():
    learn, _, _ = fine_tuned(1)
    models = []
    for seed in range(2):
        other = learner(net, seed=seed)
        with other.no_bar(), other.no_logging():
            other.fit(20)
        models.append(other.model)
    ens = Ensemble(models, learn)
    if scored(learn, naive_mean(models))[0] > max(scored(learn, m.state_dict())[0] for m in models):
        with pytest.raises(ValueError, match='above that of its worst member.*initialisations.*rate'):
            ens.soup()
    else:
        pytest.fail('these two seeds lie in one basin: take others')
    assert len(ens.soup('greedy').members) == 1


@pytest.mark.parametrize('how', ['uniform', 'stock'])
def test_updates_that_have_nothing_in_common_are_refused_before_any_pass(how, monkeypatch):
    learn, anchor, _ = fine_tuned(1)
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(copy.deepcopy(anchor))
        with torch.no_grad():
            for p in models[-1].parameters():
                p.add_(torch.randn_like(p))

    def refuse(*args, **kwargs):
        raise AssertionError('a pass')

    monkeypatch.setattr('fastai_swa.soups.validate_aside', refuse)
    with pytest.raises(ValueError, match=r'mean cosine of -?0\.0\d+: .*initialisations'):
        Ensemble(models, learn).soup(how, anchor=anchor)


def test_arguments_that_cannot_be_used_are_named(tmp_path):
    learn, anchor, models = fine_tuned(2)
    ens = Ensemble(models, learn)
    with pytest.raises(ValueError, match='how must be'):
        ens.soup('mean')
    with pytest.raises(ValueError, match="'f1_score'.*'valid_loss', 'accuracy'|'f1_score'"):
        ens.soup('greedy', by='f1_score')
    with pytest.raises(ValueError, match='needs two members at least, and anchor'):
        ens.soup('stock')
    with pytest.raises(ValueError, match='anchor does not hold weights of this architecture'):
        ens.soup('stock', anchor=without_bn())
    with pytest.raises(ValueError, match='member 1 does not hold weights of this architecture'):
        Ensemble([models[0], net(width=9)], learn).soup()
    with pytest.raises(ValueError, match='member 2 does not hold weights of this architecture'):
        Ensemble([*models, net(n_out=4)], learn).soup('greedy')
    broken = copy.deepcopy(models[0])
    with torch.no_grad():
        broken[0].weight[0, 0] = float('nan')
    with pytest.raises(ValueError, match="member 1 has a NaN in '0.weight'"):
        Ensemble([models[0], broken], learn).soup()


def test_without_a_validation_set_greedy_is_refused_and_uniform_made_unchecked():
    learn, _, models = fine_tuned(2)
    learn.dls.loaders = learn.dls.loaders[:1]
    with pytest.raises(ValueError, match='needs a validation set'):
        Ensemble(models, learn).soup('greedy')
    soup = Ensemble(models, learn).soup()
    assert isinstance(soup.table, pd.DataFrame) and not len(soup.table)


def test_a_member_whose_loss_is_not_finite_is_not_in_a_greedy_soup():
    learn, _, models = fine_tuned(3, metrics=[accuracy])
    with torch.no_grad():
        models[0][-1].weight.fill_(float('inf'))
    soup = Ensemble(models, learn).soup('greedy')
    assert soup.members and 0 not in soup.members and np.isnan(soup.table['valid_loss'][0])


def test_the_learner_and_random_generators_are_left_as_they_were():
    learn, _, models = fine_tuned(3)
    ens = Ensemble(models, learn)
    torch.manual_seed(5)
    modes = [m.training for m in learn.model.modules()]
    rows = list(learn.recorder.values)
    ens.soup('greedy')
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert [m.training for m in learn.model.modules()] == modes and learn.recorder.values == rows


def test_repr_and_solutions_say_what_it_is():
    learn, _, models = fine_tuned(3)
    soup = Ensemble(models, learn).soup()
    assert repr(soup) == 'Soup (uniform) of 3 of 3 models: use it within `averaged()`, or `apply()`'
    assert list(soup.solutions()) == ['soup'] and len(Ensemble([soup, models[0]], learn)) == 2


def test_a_metric_of_which_less_is_better_is_told_by_comp():
    learn, _, models = fine_tuned(3)
    worst = Ensemble(models, learn).soup('greedy', by='accuracy', comp=np.less)
    values = worst.table['accuracy'][:3]
    assert values[worst.members[0]] == values.min()


def test_members_that_have_not_moved_are_no_strangers():
    learn, anchor, models = fine_tuned(1)
    soup = Ensemble([anchor, models[0]], learn).soup(anchor=anchor)
    assert soup.members == [0, 1]


def test_an_anchor_that_is_none_is_named():
    learn, _, models = fine_tuned(2)
    with pytest.raises(TypeError, match='anchor must be'):
        Ensemble(models, learn).soup(anchor=3)


def test_to_apply_one_model_while_the_learner_is_another_is_refused():
    learn, _, models = fine_tuned(3)
    swa = SWACallback(0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=swa)
    soup, other = Ensemble(models, learn).soup(), Ensemble(models[:2], learn).soup()
    with soup.averaged():
        for one in (other, swa, soup):
            with pytest.raises(RuntimeError, match=r'apply\(\) inside averaged\(\) would be undone|lent|entered'):
                one.apply()
    with swa.averaged(), pytest.raises(RuntimeError, match='would be undone at its end'):
        soup.apply()
    other.apply()
