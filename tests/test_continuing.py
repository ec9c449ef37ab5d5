"""Going on with an average, and with a fit that becomes longer."""

import warnings

import pytest
import torch
from torch import nn

from fastai_swa import CheckpointCallback, SaveSWAModelCallback, SWACallback, ema

from .helpers import At, Snapshots, assert_close, assert_same, column, fingerprint, learner, net, parameters, raising
from .reference import twins


def interrupted(n_epoch, path, swa_start=0, at=3, method='fit', **kwargs):
    with pytest.raises(KeyboardInterrupt):
        start(n_epoch, path, swa_start, method, At('after_step', at, raising(KeyboardInterrupt()), batch=2), **kwargs)


def start(n_epoch, path, swa_start=0, method='fit', *cbs, **kwargs):
    learn, swa = learner(), SWACallback(swa_start, **kwargs)
    getattr(learn, method)(n_epoch, 0.1, cbs=[swa, *([CheckpointCallback(path)] if path else []), *cbs])
    return learn, swa


@pytest.mark.parametrize('every', [None, 1])
def test_a_killed_fit_goes_on_with_more_epochs_and_is_bitwise_the_longer_one(tmp_path, every):
    interrupted(4, tmp_path / 'run.ckpt', 1, every=every)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        learn, swa = start(7, tmp_path / 'run.ckpt', 1, every=every)
    whole, expected = start(7, None, 1, every=every)
    assert_same(fingerprint(whole), fingerprint(learn))
    assert all(torch.equal(a, b) for a, b in zip(parameters(swa.swa_model), parameters(expected.swa_model)))
    assert repr(column(learn, 'swa_valid_loss')) == repr(column(whole, 'swa_valid_loss')) and swa.averaged_epochs == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]


def test_the_first_averaged_epoch_stays_the_files_and_that_is_said(tmp_path):
    interrupted(4, tmp_path / 'run.ckpt', 0.5)
    with pytest.warns(UserWarning, match='averaging starts in epoch 2 as in the file, not in epoch 4'):
        learn, swa = start(8, tmp_path / 'run.ckpt', 0.5)
    assert swa.averaged_epochs == [2, 3, 4, 5, 6, 7]


def test_another_schedule_on_the_epochs_done_is_said_and_the_new_one_holds_from_there_on(tmp_path):
    interrupted(4, tmp_path / 'run.ckpt', 1, method='fit_one_cycle')
    with pytest.warns(UserWarning, match='the schedule is another one on the epochs done'):
        learn, _ = start(8, tmp_path / 'run.ckpt', 1, 'fit_one_cycle')
    whole, _ = start(8, None, 1, 'fit_one_cycle')
    assert (
        len(learn.recorder.values) == 8
        and learn.recorder.lrs[18:] == whole.recorder.lrs[18:] != whole.recorder.lrs[:18]
    )


def test_an_extended_fit_that_is_killed_again_goes_on(tmp_path):
    interrupted(4, tmp_path / 'run.ckpt', 1)
    interrupted(7, tmp_path / 'run.ckpt', 1, at=5)
    learn, swa = start(7, tmp_path / 'run.ckpt', 1)
    whole, _ = start(7, None, 1)
    assert_same(fingerprint(whole), fingerprint(learn))


def test_fewer_epochs_are_refused_and_the_file_left_alone(tmp_path):
    interrupted(6, tmp_path / 'run.ckpt', 1)
    before = (tmp_path / 'run.ckpt').read_bytes()
    with pytest.raises(ValueError, match='the number of epochs is 5 and was 6'):
        start(5, tmp_path / 'run.ckpt', 1)
    assert (tmp_path / 'run.ckpt').read_bytes() == before


def test_the_second_stage_of_fine_tune_can_be_extended(tmp_path):
    def tune(n_epoch, *cbs):
        learn = learner()
        learn.fine_tune(n_epoch, 0.1, cbs=[SWACallback(0), CheckpointCallback(tmp_path / 'run.ckpt'), *cbs])
        return learn

    with pytest.raises(KeyboardInterrupt):
        tune(3, At('after_step', 2, raising(KeyboardInterrupt()), batch=2))
    with pytest.warns(UserWarning, match='schedule'):
        assert len(tune(5).recorder.values) == 5


@pytest.mark.parametrize(
    'was, now, match',
    [
        (dict(weight=ema(0.9)), dict(), r'SWACallback: weight\[\d+\]'),
        (dict(), dict(weight=ema(0.9)), r'SWACallback: weight\[\d+\]'),
        (dict(weight=ema(0.9)), dict(weight=ema(0.99)), r'SWACallback: weight\[1\]'),
        (dict(bn_batches=2), dict(bn_batches=3), 'SWACallback: bn_batches is 3 and was 2'),
        (dict(bn_batches=2), dict(), 'SWACallback: bn_batches is None and was 2'),
        (dict(weight=lambda n: 1 / (n + 1)), dict(weight=lambda n: 1 / (n + 1) if n < 900 else 0.5), r'weight\[900\]'),
    ],
)
def test_a_resume_with_another_weight_or_other_batches_is_refused(tmp_path, was, now, match):
    interrupted(5, tmp_path / 'run.ckpt', **was)
    with pytest.raises(ValueError, match=match):
        start(5, tmp_path / 'run.ckpt', **now)


def test_a_resume_with_the_same_weight_written_another_way_goes_on(tmp_path):
    interrupted(5, tmp_path / 'run.ckpt')
    assert start(5, tmp_path / 'run.ckpt', weight=lambda n: 1 / (1 + n))[1].n_averaged == 5


# average=


@pytest.mark.parametrize('kwargs', [{}, {'every': 1}, {'weight': ema(0.6)}])
def test_a_further_fit_goes_on_with_an_average_points_and_all(kwargs):
    learn, snaps = learner(), Snapshots()
    first = SWACallback(1, **kwargs)
    learn.fit(4, cbs=[snaps, first])
    kept = [p.clone() for p in parameters(first.swa_model)]
    further = SWACallback(0, average=first, **kwargs)
    learn.fit(3, cbs=[snaps, further])
    if 'every' not in kwargs:
        points = snaps.weights[1:4] + snaps.weights[4:]
        assert further.n_averaged == 6
        assert_close(
            parameters(further.swa_model), twins.weighted_average(points, kwargs.get('weight', lambda n: 1 / (n + 1)))
        )
    else:
        assert further.n_averaged == 18 + 18
    assert further.averaged_epochs == [1, 2, 3, 0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(kept, parameters(first.swa_model))), 'the earlier one stays as it was'
    with further.averaged():
        learn.validate()


def test_a_low_precision_average_goes_on_with_its_master():
    def before_batch(cb):
        cb.learn.xb = (cb.xb[0].bfloat16(),)

    from fastai.callback.core import Callback

    class Cast(Callback):
        def before_batch(self):
            self.learn.xb = (self.xb[0].bfloat16(),)

        def after_pred(self):
            self.learn.pred = self.pred.float()

    learn, snaps, first = learner(lambda: net(dropout=0).bfloat16(), lr=1e-3), Snapshots(), SWACallback(0)
    learn.fit(3, cbs=[Cast(), snaps, first])
    further = SWACallback(0, average=first)
    learn.fit(3, cbs=[Cast(), snaps, further])
    masters = [further._average.running.master[name] for name, _ in further.swa_model.named_parameters()]
    assert_close(masters, twins.mean(snaps.weights), tol=1e-6)


def test_it_goes_on_from_a_file_of_the_best_average(tmp_path):
    learn, snaps = learner(path=tmp_path), Snapshots()
    learn.fit(4, cbs=[snaps, SWACallback(1), SaveSWAModelCallback(at_end=True)])
    again = learner(path=tmp_path, seed=5)
    again.model.load_state_dict(learn.model.state_dict())
    further = SWACallback(0, average=tmp_path / 'models' / 'swa_model.pth')
    again.fit(2, cbs=[snaps, further])
    assert further.n_averaged == 5 and further.averaged_epochs == [1, 2, 3, 0, 1]
    assert_close(parameters(further.swa_model), twins.mean(snaps.weights[1:]))
    fresh = learner(path=tmp_path)
    fresh.load('swa_model', with_opt=False)  # it is a plain file of weights besides


def test_an_average_is_gone_on_with_once_and_a_later_fit_starts_anew():
    learn, first = learner(), SWACallback(0)
    learn.fit(2, cbs=first)
    further = SWACallback(0, average=first)
    learn.fit(1, cbs=further)
    assert further.n_averaged == 3
    learn.fit(2, cbs=further)
    assert further.n_averaged == 2 and further.averaged_epochs == [0, 1]


def test_a_killed_fit_that_went_on_with_an_average_is_resumed(tmp_path):
    def run(*cbs):
        learn, first = learner(), SWACallback(0)
        learn.fit(2, cbs=first)
        further = SWACallback(0, average=first)
        learn.fit(4, cbs=[further, *cbs])
        return learn, further

    checkpoint = lambda: CheckpointCallback(tmp_path / 'run.ckpt')
    whole, expected = run()
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint(), At('after_step', 2, raising(KeyboardInterrupt()), batch=1))
    learn, further = run(checkpoint())
    assert further.n_averaged == 6 and all(
        torch.equal(a, b) for a, b in zip(parameters(further.swa_model), parameters(expected.swa_model))
    )


class Other:
    pass


def test_an_average_that_cannot_be_gone_on_with_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(TypeError, match='average must be'):
        SWACallback(average=Other())
    with pytest.raises(FileNotFoundError, match='no file'):
        SWACallback(average=tmp_path / 'none.pth')
    torch.save(net().state_dict(), tmp_path / 'plain.pth')
    other = learner(lambda: net(width=9))
    swa = SWACallback(0)
    other.fit(1, cbs=swa)
    for average, match in (
        (SWACallback(), 'averaged nothing'),
        (tmp_path / 'plain.pth', 'how many points'),
        (swa, 'does not match'),
    ):
        learn = learner()
        before = [p.clone() for p in parameters(learn.model)]
        with pytest.raises(ValueError, match=match):
            learn.fit(1, cbs=SWACallback(0, average=average))
        assert all(torch.equal(a, b) for a, b in zip(before, parameters(learn.model)))


def test_buffers_of_a_plain_linear_network_need_no_pass():
    learn, first = learner(nn.Linear(6, 3)), SWACallback(0)
    learn.fit(2, cbs=first)
    further = SWACallback(0, average=first)
    learn.fit(2, cbs=further)
    assert further.n_averaged == 4


def test_plain_attributes_of_the_latest_model_averaged_survive_a_resume(tmp_path):
    from fastai.callback.core import Callback

    class Anneals(Callback):
        def before_train(self):
            self.model.temperature, self.model.seen = (
                1 + self.epoch,
                [*getattr(self.model, 'seen', []), (self.epoch, torch.ones(2))],
            )

    def run(*cbs):
        learn, swa = learner(), SWACallback(0, cycle_len=3)
        learn.fit(5, cbs=[swa, Anneals(), *cbs])
        return swa.swa_model

    def checkpoint():
        return CheckpointCallback(tmp_path / 'run.ckpt')

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint(), At('after_step', 2, raising(KeyboardInterrupt()), batch=2))
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint(), At('after_step', 4, raising(KeyboardInterrupt()), batch=2))
    swa_model, expected = run(checkpoint()), run()
    assert swa_model.temperature == expected.temperature == 4 and repr(swa_model.seen) == repr(expected.seen)


def test_the_average_gone_on_with_is_that_of_the_beginning_also_where_its_callback_starts_anew_in_the_same_fit():
    learn = learner().to_swa(swa_start=0)
    learn.fit(3)
    more = SWACallback(0, name='more', average=learn.swa)
    learn.fit(2, cbs=more)
    assert more.averaged_epochs == [0, 1, 2, 0, 1] and more.n_averaged == 5 and learn.swa.n_averaged == 2


def test_a_file_that_the_fit_itself_writes_again_counts_once_after_a_resume(tmp_path):
    first = learner(path=tmp_path)
    first.fit(3, cbs=[SWACallback(0), SaveSWAModelCallback(at_end=True)])

    def run(*cbs):
        learn, swa = learner(path=tmp_path), SWACallback(1, average=tmp_path / 'models' / 'swa_model.pth')
        learn.fit(5, cbs=[swa, SaveSWAModelCallback(comp=lambda a, b: True), *cbs])
        return swa

    def checkpoint():
        return CheckpointCallback(tmp_path / 'run.ckpt', every=2)

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint(), At('after_step', 3, raising(KeyboardInterrupt()), batch=2))
    assert run(checkpoint()).averaged_epochs == [0, 1, 2, 1, 2, 3, 4]


def test_a_resume_with_or_without_an_average_to_go_on_with_is_another_fit(tmp_path):
    learn, first = learner(), SWACallback(0)
    learn.fit(2, cbs=first)
    interrupted(5, tmp_path / 'run.ckpt', average=first)
    with pytest.raises(ValueError, match='going on with an average is False and was True'):
        start(5, tmp_path / 'run.ckpt')


def test_an_average_over_steps_goes_on_after_an_epoch_that_was_not_finite():
    learn, first = learner(), SWACallback(0, every=1)
    learn.fit(2, cbs=first)
    kept = []

    def spoil(cb):
        kept[:] = [p.detach().clone() for p in cb.learn.model.parameters()]
        for p in cb.learn.model.parameters():
            p.data.fill_(float('nan'))

    def mend(cb):
        for p, old in zip(cb.learn.model.parameters(), kept):
            p.data.copy_(old)

    more = SWACallback(0, every=1, average=first)
    with pytest.warns(UserWarning, match='not finite'):
        learn.fit(3, cbs=[At('before_batch', 0, spoil, batch=4, training=True), At('before_train', 1, mend), more])
    assert more.n_averaged == 12 + 12 and more.averaged_epochs == [0, 1, 1, 2]
