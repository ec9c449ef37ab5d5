"""Between the weights before a fine-tuning and those after: what is interpolated, what is picked, what is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fastai_swa import line
from fastai_swa.landscape import Surface
from fastai_swa.passes import refresh_bn, refreshable

from .helpers import learner


def one_norm(width=8):
    "Its statistics do not depend on which samples make a batch."
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 3))


def fine_tuned(model=one_norm, **kwargs):
    "A learner, and a copy of its model from before its last epochs."
    learn = learner(model, **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        before = copy.deepcopy(learn.model)
        learn.fit(3)
    return learn, before


def shifted(learn):
    "The validation samples, moved."
    return learn.dls.valid.new([(x + 1.5, y) for x, y in learn.dls.valid.dataset])


def naive(learn, before, t, names=None, dl=None):
    "Loss and metrics of (1 - t) before + t after, a parameter at a time, batch norm refreshed."
    other = copy.deepcopy(learn)
    start = dict(before.named_parameters())
    with torch.no_grad():
        for name, p in other.model.named_parameters():
            if names is None or name in names:
                p.copy_((1 - t) * start[name].double() + t * p.double())
    with other.no_bar():
        refresh_bn(other, refreshable(other), None, in_fit=False)
        return list(other.validate(dl=dl))


def test_each_point_is_the_interpolation_with_refreshed_batch_norm():
    learn, before = fine_tuned()
    profile = learn.wise_ft(before, ts=5)
    assert profile.t.tolist() == [0, 0.25, 0.5, 0.75, 1]
    for i, t in enumerate(profile.t):
        found = [profile.values[name][i] for name in ('valid_loss', 'valid_accuracy')]
        assert found == pytest.approx(naive(learn, before, t), rel=1e-4)


def test_the_ends_are_bitwise_the_two_models():
    learn, before = fine_tuned()
    profile = learn.wise_ft(before.state_dict())
    start, end = profile.solution(0), profile.solution(1)
    assert all(torch.equal(start[name], p) for name, p in before.named_parameters())
    assert all(torch.equal(end[name], v) for name, v in learn.model.state_dict().items())
    # what is no parameter is the learner's at every t
    own = learn.model.state_dict()
    assert all(torch.equal(start[name], own[name]) for name in own if 'running' in name or 'tracked' in name)


def test_a_new_head_and_what_is_excluded_are_the_learners_at_every_t():
    learn, before = fine_tuned(lambda: one_norm(width=32))
    with_other_head = {k: v for k, v in before.state_dict().items() if not k.startswith('3.')}
    with_other_head['3.weight'] = torch.zeros(10, 32)
    profile = learn.wise_ft(with_other_head, exclude='1', ts=3)
    names = {'0.weight', '0.bias'}
    start = profile.solution(0)
    for name, p in learn.model.named_parameters():
        source = dict(before.named_parameters())[name] if name in names else p
        assert torch.equal(start[name], source), name
    assert profile.values['valid_loss'][1] == pytest.approx(naive(learn, before, 0.5, names)[0], rel=1e-4)


@pytest.mark.parametrize('by', ['valid_loss', 'accuracy'])
def test_the_best_t_is_picked_and_said(by, capsys):
    learn, before = fine_tuned()
    capsys.readouterr()
    profile = learn.wise_ft(before, by=by)
    column = 'valid_loss' if by == 'valid_loss' else 'valid_accuracy'
    values = profile.values[column] * (1 if by == 'valid_loss' else -1)
    assert profile.chosen == profile.t[values == values.min()].max()
    at_1 = profile.values[column][-1]
    best = profile.values[column][profile.t == profile.chosen][0]
    said = capsys.readouterr().out
    assert f'Chosen: t = {profile.chosen:g}, {column} {best:.4f} against {at_1:.4f} at t = 1' in said


def test_other_samples_pick_t_and_what_it_costs_on_the_validation_set_is_said(capsys):
    learn, before = fine_tuned()
    dl = shifted(learn)
    capsys.readouterr()
    profile = learn.wise_ft(before, dl=dl, ts=5)
    for i, t in enumerate(profile.t):
        assert profile.values['dl_loss'][i] == pytest.approx(naive(learn, before, t, dl=dl)[0], rel=1e-4)
        assert profile.values['valid_loss'][i] == pytest.approx(naive(learn, before, t)[0], rel=1e-4)
    assert profile.chosen == profile.t[profile.values['dl_loss'].argmin()]
    there = profile.values['valid_loss'][profile.t == profile.chosen][0]
    assert f'valid_loss there {there:.4f} against {profile.values["valid_loss"][-1]:.4f}.' in capsys.readouterr().out


def test_the_learner_stays_as_it_is_until_the_choice_is_applied():
    learn, before = fine_tuned()
    own = {k: v.clone() for k, v in learn.model.state_dict().items()}
    torch.manual_seed(3)
    profile = learn.wise_ft(before, ts=3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(2))
    assert all(torch.equal(v, own[k]) for k, v in learn.model.state_dict().items())
    with profile.averaged(0.5), learn.no_bar():
        inside = list(learn.validate())
    assert inside == pytest.approx(naive(learn, before, 0.5), rel=1e-4)
    profile.apply(0.5)
    with learn.no_bar():
        assert list(learn.validate()) == pytest.approx(inside)


def test_frozen_batch_norm_is_the_learners_at_every_t():
    def frozen():
        model = one_norm()
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d):
                m.momentum = 0.0  # its statistics never move
                m.running_mean.fill_(0.3)
        return model

    learn, before = fine_tuned(frozen)
    profile = learn.wise_ft(before, ts=3)
    assert torch.equal(profile.solution(0.5)['1.running_mean'], learn.model[1].running_mean)


def test_a_model_in_low_precision_has_its_ends_bitwise():
    learn = learner(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16())
    sets = [[(x.bfloat16(), y) for x, y in dl.dataset] for dl in learn.dls.loaders]
    for dl, pairs in zip(learn.dls.loaders, sets):
        dl.dataset = pairs
    before = copy.deepcopy(learn.model)
    with torch.no_grad():
        for p in learn.model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    profile = learn.wise_ft(before, ts=3)
    for t, model in ((0, before), (1, learn.model)):
        state = profile.solution(t)
        assert all(torch.equal(state[k], v) and state[k].dtype == v.dtype for k, v in model.state_dict().items())


def test_a_line_gives_its_best_point_and_the_weights_of_any(tmp_path):
    learn, before = fine_tuned()
    profile = line(learn, [before, learn], ts=5)
    t = profile.best('valid_loss')
    assert profile.values['valid_loss'][profile.t == t][0] == profile.values['valid_loss'].min()
    assert profile.values['valid_accuracy'][profile.t == profile.best('valid_accuracy')][0] == max(
        profile.values['valid_accuracy']
    )
    assert (
        profile.best('valid_accuracy', np.less)
        in profile.t[profile.values['valid_accuracy'] == min(profile.values['valid_accuracy'])]
    )
    weights = profile.solution(0.3)
    for name, p in learn.model.named_parameters():
        start = dict(before.named_parameters())[name]
        torch.testing.assert_close(weights[name], 0.7 * start + 0.3 * p)
    with pytest.raises(ValueError, match='say t'):
        profile.solution()
    profile.save(tmp_path / 'line.json')
    with pytest.raises(RuntimeError, match='has no weights'):
        Surface.load(tmp_path / 'line.json').solution(0.3)


def test_of_equal_values_the_largest_t_is_best_and_nan_is_none():
    learn, before = fine_tuned()
    profile = line(learn, [before, learn], ts=[0, 0.5, 1])
    profile.values['valid_loss'] = np.array([0.5, 0.5, np.nan, 0.7])[: len(profile.t)]
    assert profile.best('valid_loss') == 0.5
    profile.values['valid_loss'] = np.full(len(profile.t), np.nan)
    with pytest.raises(ValueError, match='nowhere a number'):
        profile.best('valid_loss')


def test_what_cannot_be_used_is_named():
    learn, before = fine_tuned()
    with pytest.raises(ValueError, match='before has 0 of the .* numbers of the model'):
        learn.wise_ft({'other': torch.zeros(3)})
    with pytest.raises(ValueError, match="exclude names 'head'"):
        learn.wise_ft(before, exclude='head')
    with pytest.raises(ValueError, match="by must be .*'top_5'"):
        learn.wise_ft(before, by='top_5')
    with pytest.raises(ValueError, match='ts must be from 0 to 1'):
        learn.wise_ft(before, ts=[0, 2])
    with pytest.raises(TypeError, match='before must be'):
        learn.wise_ft(3)
    with pytest.raises(ValueError, match='the same weights'):
        learn.wise_ft(learn)
    broken = copy.deepcopy(before)
    with torch.no_grad():
        broken[0].weight[0, 0] = float('nan')
    with pytest.raises(ValueError, match='not finite'):
        learn.wise_ft(broken)


def test_a_measurement_with_another_loader_goes_on_with_its_file(tmp_path):
    learn, before = fine_tuned()
    whole = line(learn, [before, learn], ts=3, dl=shifted(learn), file=tmp_path / 'line')
    again = line(learn, [before, learn], ts=3, dl=shifted(learn), file=tmp_path / 'line')
    assert all(np.array_equal(v, again.values[k]) for k, v in whole.values.items())
    with pytest.raises(ValueError, match='of another measurement'):
        line(learn, [before, learn], ts=3, file=tmp_path / 'line')


def test_a_metric_of_which_less_is_better_is_told_by_comp():
    learn, before = fine_tuned()
    least = learn.wise_ft(before, by='accuracy', comp=np.less)
    values = least.values['valid_accuracy']
    assert values[least.t == least.chosen][0] == values.min() < values.max()


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'model.'])
def test_names_with_a_wrapper_in_front_are_seen_through(prefix):
    learn, before = fine_tuned()
    wrapped = {prefix + k: v for k, v in before.state_dict().items()}
    start = learn.wise_ft(wrapped, ts=3).solution(0)
    assert all(torch.equal(start[name], p) for name, p in before.named_parameters())


@pytest.mark.parametrize('t', [float('nan'), float('inf')])
def test_a_t_that_is_not_finite_is_refused_and_the_model_stays(t):
    learn, before = fine_tuned()
    profile = learn.wise_ft(before, ts=3)
    own = {k: v.clone() for k, v in learn.model.state_dict().items()}
    with pytest.raises(ValueError, match='t must be finite'):
        profile.apply(t)
    assert all(torch.equal(v, own[k]) for k, v in learn.model.state_dict().items())


def test_one_point_and_an_exclude_of_all_are_said_as_they_are(capsys):
    learn, before = fine_tuned()
    capsys.readouterr()
    learn.wise_ft(before, ts=[0.5])
    assert 'nan' not in capsys.readouterr().out
    with pytest.raises(ValueError, match='exclude names all parameters'):
        learn.wise_ft(before, exclude=['0', '1', '3'])
