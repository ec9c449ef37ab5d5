"""`WeightHistory`: any average of a fit after it, beside a twin that keeps the weights of all steps."""

import copy
import json
import pickle
import pkgutil
import warnings

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException, CancelFitException
from fastai.callback.training import GradientAccumulation, ShortEpochCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader

from fastai_swa import CheckpointCallback, Ensemble, SWACallback, WeightHistory, rays
from fastai_swa.choosing import candidates
from fastai_swa.files import InUse, Lock
from fastai_swa.weights import sha256

from .helpers import At, Overflow, assert_same, fingerprint, learner, loaders, mixed_precision_on_cpu, net, raising
from .reference import twins
from .reference.twins import AllSteps
from .test_batches import STREAMS, Cut, Stream, ending
from .test_combinations import learner_of_a_table, predictions_elsewhere


def kept(n_epoch=8, n_segments=12, learn=None, cbs=(), fit='fit', **kwargs):
    "A learner after a fit, its history, and its twin."
    learn = learn or learner()
    history, steps = WeightHistory(n_segments=n_segments, **kwargs), AllSteps()
    getattr(learn, fit)(n_epoch, cbs=[history, steps, *cbs])
    return learn, history, steps


def assert_is(average, want, ulps=4):
    "Each parameter is within so many float32 units in the last place of the weights in float64."
    for name, w in want.items():
        unit = float(np.spacing(np.float32(w.abs().max())))
        assert ((average[name].double() - w).abs() <= ulps * unit).all(), name


# right numbers


@pytest.mark.parametrize('epochs', [(0, 8), (2, 5), (7, 8), (0, 1)])
def test_a_window_of_whole_epochs_is_the_float64_mean_of_the_weights_of_its_steps(epochs):
    _, history, steps = kept()
    assert history.error(epochs=epochs) == 0
    assert_is(history.average(epochs=epochs), steps.mean(*epochs))


def test_long_stretches_are_as_right_as_short_ones():
    learn, history, steps = kept(3, 4, learner(dls=loaders(n=1600, bs=4)))  # 400 steps an epoch
    assert max(s.n for s in history._kept.stretches.segments) == 400
    assert_is(history.average(epochs=(0, 3)), steps.mean(0, 3))


@pytest.mark.parametrize(
    'which',
    [
        {'last': 0.3},
        {'epochs': (1.5, 6.2)},
        {'ema': 0.95},
        {'power': 0.15},
        {'decay': 'cosine', 'last': 0.5},
        {'decay': 'linear', 'last': 0.5},
        {'decay': 'sqrt', 'last': 0.5},
    ],
)
def test_other_averages_equal_the_twins_within_a_few_times_the_error_said(which):
    _, history, steps = kept(n_segments=16)
    got, want, last = history.average(**which), steps.weighted(history._kept.weighting(which)), steps.weights[-1]
    gap = sum(((got[k].double() - want[k]) ** 2).sum() for k in want) ** 0.5
    way = sum(((last[k] - want[k]) ** 2).sum() for k in want) ** 0.5
    assert gap / way <= 5 * history.error(**which) + 1e-5  # weights that drift do worse than a random walk


def test_with_every_only_each_so_manyth_real_step_is_a_point():
    _, history, steps = kept(every=4)
    assert history._kept.stretches.n_points == 48 // 4
    want = [steps.weights[i] for i in range(3, 48, 4)]
    mean = {k: sum(w[k] for w in want) / len(want) for k in want[0]}
    assert_is(history.average(last=1), mean)


def test_accumulated_batches_are_one_step():
    _, history, steps = kept(cbs=[GradientAccumulation(32)])
    assert 0 < history._kept.stretches.n_points == len(steps.weights) < 48
    assert_is(history.average(last=1), steps.mean(0, 8))


def test_more_epochs_than_borders_are_merged_and_all_steps_are_in_them():
    _, history, steps = kept(20, 6)
    assert len(history._kept.stretches.segments) <= 6 and history._kept.stretches.n_points == 120
    assert_is(history.average(last=1), steps.mean(0, 20))


def test_buffers_are_those_of_the_last_step():
    learn, history, _ = kept()
    average = history.average(last=0.5)
    for name, b in learn.model.named_buffers():
        assert torch.equal(average[name], b), name
    assert average.keys() == learn.model.state_dict().keys()


class Narrow(Callback):
    "The model in training gets bfloat16, and the loss float32."

    def before_batch(self):
        self.learn.xb = tuple(x.bfloat16() for x in self.xb)

    def after_pred(self):
        self.learn.pred = self.pred.float()


def test_a_model_in_low_precision_has_its_mean_made_in_float32(capsys):
    learn, history, steps = kept(learn=learner(net(dropout=0).bfloat16(), cbs=Narrow()))
    mean = history._kept.stretches.mean_of(history._kept.stretches.segments[0])
    assert mean['0.weight'].dtype is torch.float32
    assert_is(mean, steps.mean(0, 1))
    average = history.average(last=1)
    assert average['0.weight'].dtype is torch.bfloat16
    for name, w in steps.mean(0, 8).items():
        assert torch.equal(average[name], w.bfloat16()), name
    size = sum(4 * p.numel() for p in learn.model.parameters()) * 12 + 2 * sum(
        p.numel() for p in learn.model.parameters()
    )
    size += sum(b.numel() * b.element_size() for b in learn.model.buffers())
    assert f'13 sets of weights, {size / 1000:.3g} KB' in capsys.readouterr().out


def test_steps_that_the_scaler_skips_are_no_points(monkeypatch):
    mixed_precision_on_cpu(monkeypatch, enabled=True)
    _, history, steps = kept(learn=learner().to_fp16(), cbs=[Overflow((0, 3, 20))])
    assert history._kept.stretches.n_points == len(steps.weights) == 45
    assert_is(history.average(epochs=(0, 4)), steps.mean(0, 4))


@pytest.mark.parametrize('dtype, ulps', [(torch.float16, 2**14), (torch.bfloat16, 2**17)])
def test_a_dtype_of_16_bits_halves_the_files_and_costs_its_rounding(dtype, ulps, tmp_path):
    _, _, steps = kept(learn=learner(lambda: net(width=64)), folder=tmp_path / 'whole')
    _, history, _ = kept(learn=learner(lambda: net(width=64)), folder=tmp_path / 'half', dtype=dtype)
    sizes = []
    for name in ('whole', 'half'):
        sizes.append(sum(f.stat().st_size for f in (tmp_path / name).glob('segment-*.pth')))
    assert sizes[1] < 0.6 * sizes[0]
    assert history.average(last=1)['0.weight'].dtype is torch.float32
    assert_is(history.average(epochs=(2, 5)), steps.mean(2, 5), ulps)


def test_weights_that_a_narrow_dtype_cannot_hold_are_left_out_and_said():
    def grow(cb):
        with torch.no_grad():
            next(cb.learn.model.parameters()).fill_(1e5)

    def shrink(cb):
        with torch.no_grad():
            next(cb.learn.model.parameters()).fill_(0.1)

    cbs = [At('before_train', 2, grow), At('before_train', 3, shrink)]
    with pytest.warns(UserWarning, match='in epoch 2 are not finite'):
        _, history, _ = kept(cbs=cbs, dtype=torch.float16)
    with pytest.raises(ValueError, match='there is nothing to average'):
        history.average(epochs=(2, 3))
    assert all(t.isfinite().all() for t in history.average(epochs=(3, 8)).values())


def test_tied_weights_are_one_and_are_stored_once(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(self.b(self.a(x).relu()))

    _, history, steps = kept(learn=learner(Tied), folder=tmp_path)
    average = history.average(last=1)
    assert torch.equal(average['a.weight'], average['b.weight'])
    mean = torch.load(tmp_path / 'segment-0001.pth', weights_only=True)
    assert mean['a.weight'].data_ptr() == mean['b.weight'].data_ptr()


# training does not feel it


@pytest.mark.parametrize('with_folder', [False, True])
def test_training_is_untouched_bitwise(with_folder, tmp_path):
    plain = learner()
    plain.fit(4)
    learn, history, _ = kept(4, folder=tmp_path / 'h' if with_folder else None)
    assert_same(fingerprint(learn), fingerprint(plain))
    assert [list(r) for r in learn.recorder.values] == [list(r) for r in plain.recorder.values]


def test_using_an_average_leaves_the_learner_as_it_was():
    learn, history, _ = kept(4)
    before = fingerprint(learn)
    with history.averaged(last=0.5):
        pass
    history.average(ema=0.9)
    assert_same(fingerprint(learn), before)


# using an average


def test_averaged_predicts_with_the_average_and_refreshed_batch_norm():
    # one batch an epoch: batch norm does not depend on which samples come together
    learn, history, steps = kept(learn=learner(dls=loaders(bs=90)))
    model = copy.deepcopy(learn.model)
    model.load_state_dict({**model.state_dict(), **{k: w.float() for k, w in steps.mean(4, 8).items()}})
    batch = tuple(map(torch.stack, zip(*learn.dls.train_ds)))
    for name, (mean, var) in twins.bn_statistics(model, [batch[:1]]).items():
        layer = model.get_submodule(name)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    with torch.no_grad():
        want = model.eval()(torch.stack([x for x, _ in learn.dls.valid_ds])).softmax(1)
    with history.averaged(epochs=(4, 8)) as inside:
        got = inside.get_preds()[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_apply_puts_the_average_into_the_learner_for_good():
    learn, history, steps = kept()
    history.apply(epochs=(4, 8))
    assert_is(learn.model.state_dict(), steps.mean(4, 8))
    learn.fit(1)


def test_a_fit_inside_averaged_is_refused():
    learn, history, _ = kept()
    with history.averaged(last=0.5), pytest.raises(RuntimeError, match='leave that context first'):
        learn.fit(1)


def test_a_history_with_a_choice_stands_for_its_average_elsewhere():
    learn, history, _ = kept()
    with pytest.raises(ValueError, match='is not chosen yet'):
        rays(learn, history, n_rays=1)
    history.chosen = {'last': 0.5}
    assert history.solutions()['average'].keys() == learn.model.state_dict().keys()


@pytest.mark.parametrize(
    'call, kind, text',
    [
        (lambda h: h.average(), ValueError, r'or call choose\(\) first'),
        (lambda h: h.average(epochs=(9, 12)), ValueError, 'holds no point of this fit'),
        (lambda h: h.average(last=2), ValueError, 'last must be'),
        (lambda h: h.plot(), RuntimeError, 'call that first'),
        (lambda h: h.choose(by='f1'), ValueError, 'by'),
    ],
)
def test_what_cannot_be_had_is_said_in_one_sentence(call, kind, text):
    _, history, _ = kept()
    with pytest.raises(kind, match=text):
        call(history)


def test_without_a_fit_there_is_nothing():
    with pytest.raises(RuntimeError, match='there is no history yet'):
        WeightHistory().average(last=0.5)


def test_an_average_that_is_missed_says_by_how_much():
    _, history, _ = kept(20, 6)
    with pytest.warns(UserWarning, match=r'ema=0.5 is missed by about \d+ % of its way'):
        history.average(ema=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        history.average(last=1)


# folders


def test_a_folder_is_read_by_another_learner(tmp_path):
    _, history, _ = kept(folder=tmp_path / 'h')
    other = learner()
    again = WeightHistory.load(tmp_path / 'h', other)
    for which in ({'last': 0.3}, {'epochs': (1, 4)}, {'power': 0.2}):
        assert_same(again.average(**which), history.average(**which))
    with again.averaged(last=0.5) as learn:
        assert learn.validate()[0] > 0


def test_a_folder_that_was_moved_is_read(tmp_path):
    _, history, _ = kept(folder=tmp_path / 'h')
    want = history.average(last=0.3)
    (tmp_path / 'h').rename(tmp_path / 'elsewhere')
    assert_same(WeightHistory.load(tmp_path / 'elsewhere', learner()).average(last=0.3), want)


def test_each_fit_of_one_object_has_a_history_of_its_own(tmp_path):
    learn, history, _ = kept(4, folder=tmp_path / 'h')
    first = history.average(last=0.5)
    learn.fit(6, cbs=history)
    assert len(history._kept.index.epochs) == 6
    assert (tmp_path / 'h' / 'fit-2' / 'index.json').exists()
    assert len(WeightHistory.load(tmp_path / 'h', learn)._kept.index.epochs) == 6
    (tmp_path / 'h' / 'fit-2').rename(tmp_path / 'aside')
    assert_same(WeightHistory.load(tmp_path / 'h', learn).average(last=0.5), first)


def test_the_folder_of_another_fit_is_not_touched(tmp_path):
    kept(4, folder=tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(ValueError, match='holds another fit .*overwrite=True'):
        kept(4, folder=tmp_path)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    (tmp_path / 'mine.txt').write_text('')
    _, history, _ = kept(3, folder=tmp_path, overwrite=True)
    assert len(WeightHistory.load(tmp_path, learner())._kept.index.epochs) == 3 and (tmp_path / 'mine.txt').exists()


def test_files_without_an_index_are_not_overwritten(tmp_path):
    (tmp_path / 'last.pth').write_text('mine')
    with pytest.raises(ValueError, match='holds another fit'):
        kept(2, folder=tmp_path)
    assert (tmp_path / 'last.pth').read_text() == 'mine'


def test_a_folder_that_another_run_writes_to_is_refused(tmp_path):
    lock = Lock(tmp_path)
    with pytest.raises(InUse, match='another run is writing its history'):
        kept(2, folder=tmp_path)
    lock.release()
    kept(2, folder=tmp_path)


def test_the_size_is_said_and_refused_where_the_disk_has_less(tmp_path, capsys, monkeypatch):
    kept(2, folder=tmp_path / 'a')
    assert 'WeightHistory: up to 13 sets of weights, ' in capsys.readouterr().out
    full = type('Usage', (), {'free': 100})
    monkeypatch.setattr('shutil.disk_usage', lambda path: full)
    with pytest.raises(OSError, match='has room for 100 bytes, and the history may take'):
        kept(2, folder=tmp_path / 'b')


def test_what_cannot_be_written_stays_in_memory_and_training_goes_on(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError('No space left on device')

    monkeypatch.setattr('fastai_swa.stretches.save_weights', fail)
    with pytest.warns(UserWarning, match='writing the weight history failed, and training goes on; it stays in memory'):
        learn, history, steps = kept(folder=tmp_path)
    assert len(learn.recorder.values) == 8
    assert_is(history.average(epochs=(2, 5)), steps.mean(2, 5))


def test_overwriting_leaves_no_later_fit_of_the_old_history(tmp_path):
    learn, history, _ = kept(4, folder=tmp_path)
    learn.fit(5, cbs=history)
    with pytest.raises(ValueError, match='holds another fit'):
        kept(3, folder=tmp_path)
    kept(3, folder=tmp_path, overwrite=True)
    assert len(WeightHistory.load(tmp_path, learn)._kept.index.epochs) == 3


def test_a_fit_that_ended_before_its_first_step_is_in_nobodys_way(tmp_path):
    learn, history = learner(), WeightHistory(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[history, At('before_batch', 0, raising(KeyboardInterrupt()), batch=0, training=True)])
    with pytest.raises(RuntimeError, match='there is no history yet'):
        history.average(last=0.5)
    with pytest.raises(ValueError, match='holds no means'):
        WeightHistory.load(tmp_path, learn)
    learn.fit(2, cbs=history)
    assert len(WeightHistory.load(tmp_path, learn)._kept.index.epochs) == 2
    with pytest.raises(KeyboardInterrupt):
        learn.fit(2, cbs=[history, At('before_batch', 0, raising(KeyboardInterrupt()), batch=0, training=True)])
    assert len(WeightHistory.load(tmp_path, learn)._kept.index.epochs) == 2  # the latest one that has something


def test_a_damaged_segment_is_named_and_the_others_are_usable(tmp_path):
    learn, history, steps = kept(folder=tmp_path)
    file = tmp_path / history._kept.stretches.segments[1].file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f'{file.name} is damaged'):
        history.average(epochs=(0, 3))
    assert_is(history.average(epochs=(2, 5)), steps.mean(2, 5))
    with pytest.warns(UserWarning, match=f'{file.name} is damaged.*averages with that are left out'):
        table = history.choose()
    assert 'epochs=(0, 8)' not in set(table['average']) and 'epochs=(4, 8)' in set(table['average'])


def test_a_segment_with_a_nan_is_refused(tmp_path):
    _, history, _ = kept(folder=tmp_path)
    segment = history._kept.stretches.segments[0]
    mean = torch.load(tmp_path / segment.file, weights_only=True)
    mean['0.weight'][0] = float('nan')
    torch.save(mean, tmp_path / segment.file)
    segment.sha256 = sha256(tmp_path / segment.file)
    with pytest.raises(ValueError, match=f'{segment.file} has a NaN'):
        history.average(epochs=(0, 1))


def test_a_history_of_another_model_is_refused_in_one_sentence(tmp_path):
    kept(folder=tmp_path)
    other = learner(lambda: net(width=9))
    history = WeightHistory.load(tmp_path, other)
    before = other.model[0].weight.detach().clone()
    with pytest.raises(ValueError, match='average'), history.averaged(last=1):
        pass
    assert torch.equal(other.model[0].weight, before)


def test_what_a_killed_fit_has_written_is_of_use_and_its_end_is_said(tmp_path):
    _, history, steps = kept(folder=tmp_path / 'whole')
    (tmp_path / 'cut').mkdir()

    def copy_folder(cb):
        for f in (tmp_path / 'whole2').iterdir():
            (tmp_path / 'cut' / f.name).write_bytes(f.read_bytes())

    looking = At('before_epoch', 5, copy_folder)
    kept(folder=tmp_path / 'whole2', cbs=[looking])
    other = learner(seed=7)
    again = WeightHistory.load(tmp_path / 'cut', other)
    with pytest.warns(UserWarning, match='did not come to its end: the last mean that it wrote stands for its last'):
        assert_is(again.average(epochs=(1, 4)), steps.mean(1, 4))
    again.chosen = {}
    segment = again._kept.stretches.segments[-1]
    assert again._kept.stretches.n_points == 30
    points = steps.weights[30 - segment.n : 30]
    assert_is(again.average(), {k: sum(w[k] for w in points) / segment.n for k in points[0]})
    with again.averaged() as inside:  # batch norm is not the other learner's
        assert inside.validate()[1] > 0.5


def test_what_is_given_is_the_callers_own():
    _, history, _ = kept()
    want = history.average(epochs=(0, 1))
    for t in history.average(epochs=(0, 1)).values():
        t.zero_()
    history.chosen = {}
    for t in history.average().values():
        t.zero_()
    assert_same(history.average(epochs=(0, 1)), want)
    assert history.average()['0.weight'].abs().sum() > 0


# whatever ends the fit


def test_weights_that_are_not_finite_are_left_out_once_said():
    def spoil(cb):
        with torch.no_grad():
            cb.spared = [p.clone() for p in cb.learn.model.parameters()]
            next(cb.learn.model.parameters()).fill_(float('nan'))

    def heal(cb):
        with torch.no_grad():
            for p in cb.learn.model.parameters():
                p.copy_(torch.zeros_like(p).normal_())

    spoiling = At('before_step', 2, spoil, batch=1)
    healing = At('before_epoch', 3, heal)
    with pytest.warns(UserWarning, match='not finite: stretches with such are left out') as said:
        learn, history, steps = kept(cbs=[spoiling, healing])
    assert sum('not finite' in str(w.message) for w in said) == 1
    assert_is(history.average(epochs=(4, 8)), steps.mean(4, 8))
    with pytest.warns(UserWarning, match='% of epochs=.1, 4. is of weights that were not finite'):
        average = history.average(epochs=(1, 4))
    assert all(average[name].isfinite().all() for name, _ in learn.model.named_parameters())


@pytest.mark.parametrize('error', [CancelFitException, KeyboardInterrupt, ValueError])
def test_what_was_kept_before_the_end_of_a_fit_stays_usable(error, tmp_path):
    def stop(cb):
        raise error('now')

    learn, history, steps = learner(), WeightHistory(tmp_path, n_segments=12), AllSteps()
    try:
        learn.fit(8, cbs=[history, steps, At('before_batch', 4, stop, batch=3, training=True)])
    except (KeyboardInterrupt, ValueError):
        pass
    assert_is(history.average(last=1), steps.mean(0, 8))
    assert_is(WeightHistory.load(tmp_path, learn).average(epochs=(4, 5)), steps.mean(4, 5))


@pytest.mark.parametrize('where', ['fastai_swa.stretches.Stretches.add', 'fastai_swa.averaging.WeightAverage.update'])
@pytest.mark.parametrize('after', [1, 7, 9])
def test_ctrl_c_while_points_are_taken_and_stretches_end_loses_none_and_counts_none_twice(
    where, after, monkeypatch, ctrl_c
):
    def interrupted(*args, **kwargs):
        nonlocal left
        res = original(*args, **kwargs)
        left -= 1
        if not left:
            ctrl_c()
        return res

    left = after
    owner, name = where.rsplit('.', 1)
    original = getattr(pkgutil.resolve_name(owner), name)
    learn, history, steps = learner(), WeightHistory(n_segments=12), AllSteps()
    steps.order = 50  # before the history
    monkeypatch.setattr(where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn.fit(8, cbs=[history, steps])
    assert history._known().stretches.n_points == len(steps.weights) == history._kept.index.epochs[-1][1]
    assert_is(history.average(last=1), steps.mean(0, 8))


def test_points_of_a_cancelled_epoch_count():
    def stop(cb):
        raise CancelEpochException

    _, history, steps = kept(cbs=[At('before_batch', 2, stop, batch=4, training=True)])
    assert steps.epochs.count(2) == 4
    assert_is(history.average(epochs=(2, 3)), steps.mean(2, 3))


def test_skipped_batches_are_no_points():
    class Skip(Callback):
        def before_batch(self):
            if self.training and self.iter % 2:
                raise CancelBatchException

    _, history, steps = kept(cbs=[Skip()])
    assert history._kept.stretches.n_points == len(steps.weights) == 24


def test_validations_and_fits_within_the_fit_are_not_its_points():
    _, history, steps = kept(cbs=[At('before_epoch', 3, lambda cb: cb.learn.validate())])
    assert history._kept.stretches.n_points == 48


# with a checkpoint


def states(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.rglob('*')) if f.is_file() and 'lock' not in f.name}


@pytest.mark.parametrize('n_segments, n_epoch', [(12, 8), (6, 12)])
@pytest.mark.parametrize('with_folder', [True, False])
def test_a_killed_fit_goes_on_bitwise(tmp_path, n_segments, n_epoch, with_folder):
    def fit(name, stop_at=None):
        learn = learner()
        folder = tmp_path / name if with_folder else None
        history = WeightHistory(folder, n_segments=n_segments)
        cbs = [history, CheckpointCallback(tmp_path / f'{name}.ckpt', every=2)]
        if stop_at is not None:

            def stop(cb):
                raise KeyboardInterrupt

            cbs.append(At('before_batch', stop_at, stop, batch=3, training=True))
        learn.fit(n_epoch, cbs=cbs)
        return learn, history

    _, whole = fit('whole')
    with pytest.raises(KeyboardInterrupt):
        fit('cut', stop_at=5)
    _, again = fit('cut')
    assert again._kept.stretches.ends.tolist() == whole._kept.stretches.ends.tolist()
    for which in ({'last': 0.3}, {'epochs': (0, n_epoch)}, {'ema': 0.9}):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            assert_same(again.average(**which), whole.average(**which))
    if with_folder:
        a, b = states(tmp_path / 'whole'), states(tmp_path / 'cut')
        named = {s['file'] for s in json.loads(b['index.json'])['segments']}
        assert named | {'index.json', 'last.pth'} == b.keys()  # nothing is left behind
        assert len(a) == len(b)


def test_fine_tune_killed_in_its_second_stage_keeps_the_history_of_the_first(tmp_path):
    def fit(name, stop=False):
        learn = learner(splitter=lambda m: [list(m[:4].parameters()), list(m[4:].parameters())])
        history = WeightHistory(tmp_path / name, n_segments=12)
        cbs = [history, CheckpointCallback(tmp_path / f'{name}.ckpt')]
        if stop:

            def raise_(cb):
                raise KeyboardInterrupt

            cbs.append(At('before_batch', 3, raise_, batch=3, training=True))
        learn.fine_tune(5, freeze_epochs=2, cbs=cbs)
        return history

    whole = fit('whole')
    with pytest.raises(KeyboardInterrupt):
        fit('cut', stop=True)
    again = fit('cut')
    assert_same(again.average(epochs=(1, 5)), whole.average(epochs=(1, 5)))
    for name in ('whole', 'cut'):
        assert (tmp_path / name / 'fit-2' / 'index.json').exists()


def test_the_folder_of_another_fit_is_not_gone_on_with(tmp_path):
    def stop(cb):
        raise KeyboardInterrupt

    def fit(*more):
        learner().fit(6, cbs=[WeightHistory(tmp_path / 'h'), CheckpointCallback(tmp_path / 'c'), *more])

    with pytest.raises(KeyboardInterrupt):
        fit(At('before_batch', 3, stop, batch=3, training=True))
    kept(2, folder=tmp_path / 'h', overwrite=True)
    with pytest.raises(ValueError, match='holds another fit by now'):
        fit()


# what is said at the end


@pytest.fixture
def no_passes(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('a pass was made unasked')

    for name in ('fastai_swa.one_model.refresh_bn', 'fastai_swa.choosing.validate_aside', 'fastai_swa.history.choose'):
        monkeypatch.setattr(name, refuse)


def test_the_end_of_a_fit_says_how_many_averages_can_be_compared_and_evaluates_nothing(capsys, no_passes):
    _, history, _ = kept()
    [line] = [line for line in capsys.readouterr().out.splitlines() if 'compared' in line]
    found = candidates(history._kept.stretches.ends, history._kept.epochs, 1)
    n = sum(history.error(**c.which) <= 0.05 for c in found[1:]) + 1
    assert line.startswith(f'WeightHistory: {n} averages of this fit can be compared: `history.choose()`, in about ')


def test_of_an_attached_history_it_is_said_as_one_writes_it(capsys):
    learn = learner(cbs=WeightHistory(n_segments=12))
    learn.fit(3)
    assert '`learn.weight_history.choose()`' in capsys.readouterr().out


def test_as_many_are_compared_as_was_said(capsys):
    _, history, _ = kept()
    [line] = [line for line in capsys.readouterr().out.splitlines() if 'compared' in line]
    assert int(line.split()[1]) == len(history.choose())


def test_nothing_is_said_under_no_logging(capsys):
    learn = learner()
    with learn.no_logging(), learn.no_bar():
        learn.fit(2, cbs=WeightHistory())
    assert 'WeightHistory' not in capsys.readouterr().out


# beside other callbacks


def test_beside_swa_each_is_what_it_is_alone():
    _, alone, _ = kept()
    learn = learner()
    history, swa = WeightHistory(n_segments=12), SWACallback(swa_start=4)
    learn.fit(8, cbs=[swa, history])
    assert_same(history.average(last=0.5), alone.average(last=0.5))
    other = learner()
    lone = SWACallback(swa_start=4)
    other.fit(8, cbs=lone)
    assert_same(swa.swa_model.state_dict(), lone.swa_model.state_dict())


@pytest.mark.parametrize(
    'kwargs, kind, text',
    [
        ({'n_segments': 1}, ValueError, 'n_segments'),
        ({'n_segments': 2.5}, TypeError, 'n_segments'),
        ({'every': 0}, ValueError, 'every'),
        ({'overwrite': 1}, TypeError, 'overwrite must be True or False'),
        ({'dtype': 'half'}, TypeError, 'dtype must be a floating-point'),
        ({'dtype': torch.int8}, TypeError, 'dtype must be a floating-point'),
        ({'dtype': torch.float8_e5m2}, ValueError, 'dtype must have 16 bits at least'),
    ],
)
def test_bad_arguments_are_named(kwargs, kind, text):
    with pytest.raises(kind, match=text):
        WeightHistory(**kwargs)


# what else users do


def test_an_export_made_inside_averaged_needs_nothing_of_this_package(tmp_path):
    learn = learner_of_a_table(tmp_path)
    history = WeightHistory(tmp_path / 'h', n_segments=12)
    learn.fit(2, cbs=history)
    learn.add_cb(history)
    with history.averaged(last=0.5):
        expected = learn.get_preds()[0]
        learn.export('average.pkl')
    preds = predictions_elsewhere(learn, 'average.pkl', 'assert "fastai_swa" not in sys.modules')
    torch.testing.assert_close(preds, expected)
    assert type(pickle.loads(pickle.dumps(WeightHistory(tmp_path)))) is Callback


def test_an_ensemble_and_surfaces_take_the_history_itself():
    learn, history, _ = kept()
    history.chosen = {'last': 0.5}
    assert len(Ensemble([history, learn], learn).members) == 2


@pytest.mark.parametrize('kind', STREAMS)
def test_passes_take_of_an_endless_stream_what_the_longest_epoch_took(kind):
    train = STREAMS[kind](10**9)
    learn = learner(dls=DataLoaders(train, DataLoader(list(loaders().valid.dataset), bs=32)))
    history = WeightHistory(n_segments=12)
    with ending():
        learn.fit(3, cbs=[history, Cut(2, 4, 3)])
        with history.averaged(last=0.5) as inside:
            assert int(inside.model[1].num_batches_tracked) == 4
        table = history.choose(bn_batches=None)
    assert len(table) > 3


def test_averages_are_chosen_on_as_much_of_an_endless_stream_as_the_fit_validated_on():
    dls = DataLoaders(TorchDataLoader(Stream(10**9), 16), TorchDataLoader(Stream(10**9), 16))
    learn, history = learner(dls=dls), WeightHistory(n_segments=12)
    with ending():
        learn.fit(2, cbs=[history, ShortEpochCallback(4 / (10**9 // 16))])
        table = history.choose()
    assert table.columns.name == 'on the 80 samples of the validation set'
