"""`fine_tune_soup`: its runs are those of `fine_tune`; what is killed goes on; what cannot be used is named."""

import copy
import json

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner
from fastai.optimizer import Adam
from fastai.torch_core import params
from torch import nn

from fastai_swa import CheckpointCallback, Ensemble, SWACallback, WeightHistory
from fastai_swa.fine_tune_soup import planned

from .helpers import At, learner, loaders, raising

RATES = [0.02, 0.05, 0.01]


def body_and_head():
    body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
    return nn.Sequential(body, nn.Linear(8, 3))


def pretrained(**kwargs) -> Learner:
    "A learner of two groups, whose first one freezes."
    return learner(body_and_head, splitter=lambda m: [params(m[0]), params(m[1])], **kwargs)


def quiet(learn, call):
    with learn.no_bar(), learn.no_logging():
        return call(learn)


def alone(base_lr, epochs=2, cbs=None):
    "The weights of one run by fastai's own calls: the frozen stage at the first rate, then the second at its own."
    learn = pretrained()

    def call(learn):
        learn.freeze()
        learn.fit_one_cycle(1, slice(RATES[0]), pct_start=0.99, cbs=cbs and cbs())
        learn.unfreeze()
        lr = base_lr / 2
        learn.fit_one_cycle(epochs, slice(lr / 100, lr), pct_start=0.3, div=5.0, cbs=cbs and cbs())

    quiet(learn, call)
    return learn.model.state_dict()


def assert_bitwise(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], v) for k, v in expected.items())


def members(ens):
    return [ens._module(i).state_dict() for i in range(len(ens))]


@pytest.mark.parametrize('folder', [False, True])
def test_each_run_is_bitwise_the_one_trained_alone(folder, tmp_path):
    ens = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES, folder=tmp_path / 'a' if folder else None))
    for state, lr in zip(members(ens), RATES):
        assert_bitwise(state, alone(lr))


def test_the_first_run_is_bitwise_fine_tune():
    ens = quiet(pretrained(), lambda learn: learn.fine_tune_soup(3, RATES[:1]))
    learn = pretrained()
    quiet(learn, lambda learn: learn.fine_tune(3, RATES[0]))
    assert_bitwise(members(ens)[0], learn.model.state_dict())


def test_arguments_of_fine_tune_are_passed_on():
    ens = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, 0.03, lr_mult=5, pct_start=0.5, div=10, wd=0.1))
    learn = pretrained()
    quiet(learn, lambda learn: learn.fine_tune(2, 0.03, lr_mult=5, pct_start=0.5, div=10, wd=0.1))
    assert_bitwise(members(ens)[0], learn.model.state_dict())


def test_the_learner_holds_the_branch_afterwards_and_members_no_optimizer(tmp_path):
    learn = pretrained()
    ens = quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES, folder=tmp_path / 'a'))
    branch = pretrained()

    def frozen_stage(learn):
        learn.freeze()
        learn.fit_one_cycle(1, slice(RATES[0]), pct_start=0.99)

    quiet(branch, frozen_stage)
    assert_bitwise(learn.model.state_dict(), branch.model.state_dict())
    assert learn.opt.frozen_idx == branch.opt.frozen_idx == 1
    assert not any(p.requires_grad for p in learn.model[0][0].parameters())
    assert all(isinstance(v, torch.Tensor) for m in ens.members for v in torch.load(m, weights_only=True).values())


def test_seeds_make_runs_of_one_rate_differ_and_each_is_reproducible():
    ens = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, 0.02, seeds=[1, 2]))
    again = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, 0.02, seeds=[2, 1]))
    first, second = members(ens)
    assert not torch.equal(first['1.weight'], second['1.weight'])
    assert_bitwise(first, members(again)[1])
    assert_bitwise(second, members(again)[0])


def test_a_table_says_what_each_run_came_to():
    learn = pretrained()
    ens = quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES))
    assert list(ens.runs['base_lr']) == RATES and list(ens.runs['member']) == [0, 1, 2]
    for i, state in enumerate(members(ens)):
        other = copy.deepcopy(learn)
        other.model.load_state_dict(state)
        loss, accuracy = quiet(other, lambda learn: learn.validate())
        assert ens.runs['valid_loss'][i] == pytest.approx(loss) and ens.runs['accuracy'][i] == pytest.approx(accuracy)


def test_its_soups_know_the_branch_as_their_anchor(tmp_path):
    learn = pretrained()
    ens = quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES, folder=tmp_path / 'a'))
    stock = ens.soup('stock').state_dict()
    assert_bitwise(Ensemble(tmp_path / 'a', learn).soup('stock').state_dict(), stock)
    assert_bitwise(ens.soup('stock', anchor=learn.model).state_dict(), stock)
    assert len(ens.soup('greedy').members) >= 1 and len(ens.soup().members) == 3


class Counting(Callback):
    def __init__(self):
        self.n = 0

    def before_fit(self):
        self.n += 1
        assert self.n == 1, 'used in a second fit'


def test_callbacks_go_to_each_fit_as_fresh_copies():
    counting = Counting()
    ens = quiet(pretrained(), lambda learn: learn.fine_tune_soup(1, RATES, cbs=[counting, SWACallback(0)]))
    assert counting.n == 0 and len(ens) == 3


# what is killed


class Killed(Exception):
    pass


class KillAt(Callback):
    "Dies in the fit of that number, from 0, in its epoch, in its second batch."

    order = 70
    n_fits = 0

    def __init__(self, fit, epoch):
        self.fit = fit
        self.epoch_of_death = epoch

    def before_fit(self):
        KillAt.n_fits += 1

    def before_batch(self):
        if KillAt.n_fits - 1 == self.fit and self.learn.epoch == self.epoch_of_death and self.learn.iter == 1:
            raise Killed('killed')


@pytest.mark.parametrize('fit, epoch', [(0, 0), (1, 0), (1, 1), (3, 1)])
def test_what_is_killed_at_any_stage_goes_on_and_ends_bitwise_the_same(fit, epoch, tmp_path):
    whole = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES))
    KillAt.n_fits = 0
    learn = pretrained()
    with pytest.raises(Killed):
        quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES, folder=tmp_path / 'a', cbs=KillAt(fit, epoch)))
    again = pretrained()
    fits = []
    again.add_cb(At('before_train', 0, lambda cb: fits.append(cb.learn.n_epoch)))
    ens = quiet(again, lambda learn: learn.fine_tune_soup(2, RATES, folder=tmp_path / 'a'))
    for state, expected in zip(members(ens), members(whole)):
        assert_bitwise(state, expected)
    assert ens.runs.equals(whole.runs)
    assert not list((tmp_path / 'a').glob('*.ckpt*')), 'checkpoints of runs that are over'


def test_an_interrupted_run_leaves_the_learner_at_the_branch():
    whole = pretrained()
    quiet(whole, lambda learn: learn.fine_tune_soup(2, RATES))
    KillAt.n_fits = 0
    learn = pretrained()
    with pytest.raises(Killed):
        quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES, cbs=KillAt(2, 1)))
    assert_bitwise(learn.model.state_dict(), whole.model.state_dict())


def test_what_is_complete_is_read_and_not_trained_again_and_rates_can_be_added(tmp_path):
    first = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES[:2], folder=tmp_path / 'a'))
    learn = pretrained()
    epochs = []
    learn.add_cb(At('before_train', 0, lambda cb: epochs.append(1)))
    more = quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES, folder=tmp_path / 'a'))
    assert len(epochs) == 1 and len(more) == 3
    for state, expected in zip(members(more), [*members(first), alone(RATES[2])]):
        assert_bitwise(state, expected)
    assert len(Ensemble(tmp_path / 'a', learn)) == 3


def test_a_folder_that_was_moved_goes_on(tmp_path):
    first = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES[:2], folder=tmp_path / 'a'))
    states = members(first)
    (tmp_path / 'a').rename(tmp_path / 'b')
    again = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES[:2], folder=tmp_path / 'b'))
    for state, expected in zip(members(again), states):
        assert_bitwise(state, expected)


def test_a_damaged_member_is_named_and_trained_again(tmp_path):
    first = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES[:2], folder=tmp_path / 'a'))
    states = members(first)
    (tmp_path / 'a' / 'lr-0.05.pth').write_bytes(b'nothing')
    with pytest.warns(UserWarning, match='lr-0.05.pth is missing or damaged: that run is trained again'):
        again = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES[:2], folder=tmp_path / 'a'))
    for state, expected in zip(members(again), states):
        assert_bitwise(state, expected)


def test_a_run_that_diverges_is_left_out_and_said():
    with pytest.warns(UserWarning, match='the run lr-1e[+]38 has ended with weights that are not finite'):
        ens = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, [0.02, 1e38]))
    assert len(ens) == 1 and ens.runs['member'].isna().tolist() == [False, True]


def test_a_member_that_cannot_be_written_is_raised_at_the_end_and_the_others_are_kept(tmp_path, monkeypatch):
    from fastai_swa import branches

    save = branches.save_weights

    def fail(file, weights):
        if file.name == 'lr-0.05.pth':
            raise OSError(f'{file} cannot be written: No space left on device')
        save(file, weights)

    monkeypatch.setattr(branches, 'save_weights', fail)
    with pytest.raises(OSError, match='lr-0.05.pth cannot be written'):
        quiet(pretrained(), lambda learn: learn.fine_tune_soup(1, RATES, folder=tmp_path / 'a'))
    monkeypatch.undo()
    there = json.loads((tmp_path / 'a' / 'soup.json').read_text())
    assert [run['base_lr'] for run in there['runs']] == [0.02, 0.01]


def test_a_run_that_is_trained_again_in_one_session_and_killed_goes_on_in_the_next(tmp_path):
    learn = pretrained()
    first = quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES[:2], folder=tmp_path / 'a'))
    states = members(first)
    (tmp_path / 'a' / 'lr-0.02.pth').unlink()
    stop = At('before_batch', 1, raising(KeyboardInterrupt), batch=2)
    with pytest.warns(UserWarning, match='trained again'), pytest.raises(KeyboardInterrupt):
        quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES[:2], folder=tmp_path / 'a', cbs=stop))
    with pytest.warns(UserWarning, match='trained again'):
        again = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES[:2], folder=tmp_path / 'a'))
    for state, expected in zip(members(again), states):
        assert_bitwise(state, expected)


def test_what_has_ended_stays_when_other_rates_are_asked_for(tmp_path):
    quiet(pretrained(), lambda learn: learn.fine_tune_soup(1, RATES, folder=tmp_path / 'a'))
    quiet(pretrained(), lambda learn: learn.fine_tune_soup(1, [RATES[0], 0.3], folder=tmp_path / 'a'))
    learn = pretrained()
    fits = []
    learn.add_cb(At('before_train', 0, lambda cb: fits.append(1)))
    ens = quiet(learn, lambda learn: learn.fine_tune_soup(1, [*RATES, 0.3], folder=tmp_path / 'a'))
    assert not fits and len(ens) == 4


def test_a_run_is_recorded_before_its_checkpoint_goes(tmp_path, monkeypatch):
    from fastai_swa import checkpoint

    recorded = []

    def remove(file):
        recorded.append((file.stem, [run['base_lr'] for run in soup_of(tmp_path / 'a')['runs']]))
        remove_checkpoint(file)

    remove_checkpoint = checkpoint.remove_checkpoint
    monkeypatch.setattr(checkpoint, 'remove_checkpoint', remove)
    quiet(pretrained(), lambda learn: learn.fine_tune_soup(1, RATES[:2], folder=tmp_path / 'a'))
    assert recorded[1:] == [('lr-0.02', [0.02]), ('lr-0.05', [0.02, 0.05])]


def soup_of(folder):
    file = folder / 'soup.json'
    return json.loads(file.read_text()) if file.exists() else {'runs': []}


def test_a_branch_that_cannot_be_written_does_not_end_the_training(tmp_path, monkeypatch):
    from fastai_swa import branches

    def fail(*args):
        raise OSError('branch.pth cannot be written: No space left on device')

    monkeypatch.setattr(branches, 'write', fail)
    with pytest.raises(OSError, match='branch.pth cannot be written'):
        quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES[:1], folder=tmp_path / 'a'))
    monkeypatch.undo()
    ens = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES[:1], folder=tmp_path / 'a'))
    assert_bitwise(members(ens)[0], alone(RATES[0]))


@pytest.mark.parametrize('damage', ['unlink', 'exchange'])
def test_an_anchor_that_is_gone_is_written_again_and_another_one_is_not_used(damage, tmp_path):
    learn = pretrained()
    stock = quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES, folder=tmp_path / 'a')).soup('stock').state_dict()
    file = tmp_path / 'a' / 'anchor.pth'
    file.unlink()
    if damage == 'exchange':
        torch.save(body_and_head().state_dict(), file)
    with pytest.warns(UserWarning, match='anchor.pth is missing or damaged'):
        ens = Ensemble(tmp_path / 'a', learn)
    assert ens.anchor is None and len(ens.soup().members) == 3
    quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES, folder=tmp_path / 'a'))
    assert_bitwise(Ensemble(tmp_path / 'a', learn).soup('stock').state_dict(), stock)


def test_a_saved_ensemble_has_its_anchor_and_the_folder_of_the_runs_is_not_written_over(tmp_path):
    learn = pretrained()
    ens = quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES, folder=tmp_path / 'a'))
    stock = ens.soup('stock').state_dict()
    with pytest.raises(ValueError, match='holds the runs of a fine_tune_soup'):
        ens.save(tmp_path / 'a')
    ens.save(tmp_path / 'b')
    assert_bitwise(Ensemble(tmp_path / 'b', learn).soup('stock').state_dict(), stock)


def test_rates_and_seeds_may_be_arrays():
    assert [run.base_lr for run in planned(np.array([0.1, 0.2]), None)] == [0.1, 0.2]
    assert [run.seed for run in planned(torch.tensor(0.5), np.arange(3))] == [0, 1, 2]
    assert len(planned([0.1, 0.10000001], None)) == 2


# what cannot be used


def test_arguments_that_cannot_be_used_are_named(tmp_path):
    learn = pretrained()
    for call, words in [
        (lambda: learn.fine_tune_soup(0, RATES), 'epochs'),
        (lambda: learn.fine_tune_soup(1, []), 'base_lrs is empty'),
        (lambda: learn.fine_tune_soup(1, [0.1, -1]), 'base_lrs must be positive'),
        (lambda: learn.fine_tune_soup(1, [0.1, 0.1]), 'two runs of one rate need different seeds'),
        (lambda: learn.fine_tune_soup(1, [0.1, 0.2], seeds=[1, 2, 3]), 'must be as many'),
        (lambda: learn.fine_tune_soup(1, RATES, freeze_epochs=-1), 'freeze_epochs'),
        (lambda: learn.fine_tune_soup(1, 0.1, seeds=[]), 'seeds is empty'),
        (lambda: learn.fine_tune_soup(1, 0.1, cbs=WeightHistory(tmp_path / 'h')), 'WeightHistory writes to'),
        (lambda: learn.fine_tune_soup(1, RATES, cbs=CheckpointCallback(tmp_path / 'c')), 'pass folder= instead of a'),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match='base_lrs'):
        learn.fine_tune_soup(1, 'high')
    with pytest.raises(TypeError, match="got 'foo', which is no argument of fine_tune"):
        learn.fine_tune_soup(1, RATES, foo=3)
    assert all(p.requires_grad for p in learn.model.parameters())


def test_a_folder_of_another_soup_or_of_something_else_is_refused(tmp_path):
    quiet(pretrained(), lambda learn: learn.fine_tune_soup(1, RATES[:1], folder=tmp_path / 'a'))
    with pytest.raises(ValueError, match='holds a soup with epochs=1, not 2'):
        pretrained().fine_tune_soup(2, RATES[:1], folder=tmp_path / 'a')
    with pytest.raises(ValueError, match='holds a soup with first base_lr=0.02, not 0.05'):
        pretrained().fine_tune_soup(1, RATES[1:], folder=tmp_path / 'a')
    with pytest.raises(ValueError, match='holds a soup with data='):
        pretrained(dls=loaders(n=120)).fine_tune_soup(1, RATES[:1], folder=tmp_path / 'a')
    with pytest.raises(ValueError, match='holds a soup with hyperparameters='):
        pretrained(opt_func=Adam).fine_tune_soup(1, RATES[:1], folder=tmp_path / 'a')
    Ensemble([body_and_head()], pretrained()).save(tmp_path / 'b')
    with pytest.raises(ValueError, match='holds the models of something else'):
        pretrained().fine_tune_soup(1, RATES, folder=tmp_path / 'b')
    (tmp_path / 'a' / 'soup.json').write_text('{')
    with pytest.raises(ValueError, match='soup.json is damaged'):
        pretrained().fine_tune_soup(1, RATES[:1], folder=tmp_path / 'a')


def test_without_a_frozen_stage_the_runs_branch_from_the_weights_as_they_are():
    ens = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, 0.02, freeze_epochs=0))
    learn = pretrained()

    def second_stage(learn):
        learn.unfreeze()
        learn.fit_one_cycle(2, slice(0.01 / 100, 0.01), pct_start=0.3, div=5.0)

    quiet(learn, second_stage)
    assert_bitwise(members(ens)[0], learn.model.state_dict())


def test_ctrl_c_within_a_run_goes_on_in_the_same_session(tmp_path):
    whole = quiet(pretrained(), lambda learn: learn.fine_tune_soup(2, RATES[:1]))
    learn = pretrained()
    stop = At('before_batch', 1, raising(KeyboardInterrupt), batch=2)
    with pytest.raises(KeyboardInterrupt):
        quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES[:1], folder=tmp_path / 'a', cbs=stop))
    ens = quiet(learn, lambda learn: learn.fine_tune_soup(2, RATES[:1], folder=tmp_path / 'a'))
    assert_bitwise(members(ens)[0], members(whole)[0])
