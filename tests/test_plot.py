import copy
import json
from contextlib import suppress

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from fastai_swa import CheckpointCallback, SWACallback, ema, plot_swa
from fastai_swa.plot import plot_differences, plot_sizes

from .helpers import At, column, learner, raising


def line(ax, label):
    return next(x for x in ax.lines if x.get_label() == label)


@pytest.mark.parametrize(
    'call',
    [
        lambda learn: learn.recorder.plot_swa(),
        lambda learn: plot_swa(learn),
        lambda learn: plot_swa(learn.recorder, plt.subplots(1, 2)[1]),
    ],
)
def test_the_figure_shows_the_recorded_values_of_both_models_and_marks_the_folded_epochs(call):
    learn = learner()
    learn.fit(6, cbs=SWACallback(swa_start=1, cycle_len=2, swa_eval_freq=2))
    axs = call(learn)
    assert len(axs) == 2
    for ax, raw, average in zip(axs, ('valid_loss', 'accuracy'), ('swa_valid_loss', 'swa_accuracy')):
        np.testing.assert_allclose(line(ax, 'model in training').get_ydata(), column(learn, raw))
        assert list(line(ax, 'average').get_xdata()) == [1, 5]
        np.testing.assert_allclose(line(ax, 'average').get_ydata(), [column(learn, average)[e] for e in (1, 5)])
        assert [x.get_xdata()[0] for x in ax.lines if x.get_marker() == '^'] == [1, 3, 5]
        assert ax.get_xlabel() == 'epoch' and ax.get_ylabel() == raw.replace('_', ' ')
    np.testing.assert_allclose(line(axs[0], 'training loss').get_ydata(), column(learn, 'train_loss'))


def test_a_fit_without_time_or_stopped_or_with_skipped_epochs_can_be_drawn():
    learn = learner()
    learn.recorder.add_time = False
    learn.fit(4, cbs=SWACallback(swa_start=0), start_epoch=2)
    assert len(learn.recorder.plot_swa()) == 2


def test_several_averages_of_one_fit_are_in_one_figure():
    learn = learner()
    ema_alone = SWACallback(0, name='ema', every=1, weight=ema(0.9))
    learn.fit(3, cbs=ema_alone)
    axs = learn.recorder.plot_swa()
    assert drawn(axs) == drawn(ema_alone.plot())
    learn.fit(5, cbs=[SWACallback(2, name='late'), SWACallback(1)])  # 'ema' was in another fit
    axs = learn.recorder.plot_swa()
    for ax, metric in zip(axs, ('valid_loss', 'accuracy')):
        labels = [x.get_label() for x in ax.lines if 'average ' in x.get_label()]
        assert labels == ["average 'swa'", "average 'late'"]
        for name, start in [('swa', 1), ('late', 2)]:
            drawn_line = line(ax, f'average {name!r}')
            assert list(drawn_line.get_xdata()) == list(range(start, 5))
            np.testing.assert_allclose(drawn_line.get_ydata(), column(learn, f'{name}_{metric}')[start:])
        assert [x.get_xdata()[0] for x in ax.lines if x.get_marker() == '^'] == [1, 2, 3, 4, 2, 3, 4]
        np.testing.assert_allclose(line(ax, 'model in training').get_ydata(), column(learn, metric))


def test_without_a_swa_callback_it_is_one_clear_sentence():
    learn = learner()
    for prepare in (lambda: None, lambda: learn.fit(1)):
        prepare()
        with pytest.raises(ValueError, match='the recorder holds no fit with a SWACallback'):
            learn.recorder.plot_swa()


def drawn(axs):
    "What lines the axes have, as plain data."
    return [[(line.get_label(), *map(list, line.get_data())) for line in ax.lines] for ax in axs]


def test_the_callback_and_the_recorder_draw_the_fit_after_a_validation_and_after_a_further_fit():
    learn, swa = learner(), SWACallback(swa_start=1)
    learn.fit(3, cbs=swa)
    right_after = drawn(learn.recorder.plot_swa())
    assert drawn(swa.plot()) == right_after
    learn.validate()
    learn.get_preds()
    assert drawn(swa.plot()) == drawn(learn.recorder.plot_swa()) == right_after
    learn.fit(1)
    assert drawn(swa.plot()) == drawn(learn.recorder.plot_swa()) == right_after
    learn.fit(2, cbs=swa)
    assert drawn(swa.plot()) == drawn(learn.recorder.plot_swa()) != right_after
    assert list(line(swa.plot()[0], 'model in training').get_xdata()) == [0, 1]


def test_a_deep_copy_of_a_learner_draws_the_fit_too_and_keeps_it_when_the_other_is_fitted():
    learn = learner().to_swa(swa_start=1)
    learn.fit(3)
    twin = copy.deepcopy(learn)
    expected = drawn(learn.swa.plot())
    learn.fit(2)
    assert drawn(twin.swa.plot()) == expected


def test_each_of_several_averages_draws_its_own_columns():
    learn = learner()
    averages = [SWACallback(0), SWACallback(1, name='swa_late')]
    learn.fit(3, cbs=averages)
    for swa, start in zip(averages, (0, 1)):
        axs = swa.plot()
        assert len(axs) == 2 and [ax.get_ylabel() for ax in axs] == ['valid loss', 'accuracy']
        np.testing.assert_allclose(
            line(axs[1], 'average').get_ydata(), column(learn, f'{swa.name}_accuracy'.replace('other_', ''))[start:]
        )


def test_nothing_to_draw_is_one_clear_sentence():
    swa = SWACallback()
    with pytest.raises(RuntimeError, match='plot.. needs a fit with this callback'):
        swa.plot()
    learn = learner()
    learn.remove_cbs([learn.progress, learn.recorder])
    learn.fit(2, cbs=swa)
    with pytest.raises(RuntimeError, match='with a Recorder'):
        swa.plot()


def test_an_interrupted_fit_is_drawn_as_far_as_it_came_and_one_without_an_epoch_leaves_the_old():
    learn, swa = learner(), SWACallback(swa_start=0)
    for epoch, n_drawn in ((2, 2), (0, 2), (1, 1)):
        with pytest.raises(KeyboardInterrupt):
            learn.fit(3, cbs=[swa, At('before_train', epoch, raising(KeyboardInterrupt()))])
        assert len(line(swa.plot()[0], 'average').get_xdata()) == n_drawn


def test_an_average_gone_on_with_is_drawn_without_the_epochs_of_its_earlier_fit():
    learn, first = learner(), SWACallback(swa_start=1)
    learn.fit(3, cbs=first)
    more = SWACallback(swa_start=1, average=first)
    learn.fit(2, cbs=more)
    assert more.averaged_epochs == [1, 2, 1]
    assert [x.get_xdata()[0] for x in more.plot()[0].lines if x.get_marker() == '^'] == [1]


@pytest.mark.parametrize('at', [1, 2])
def test_a_killed_fit_that_goes_on_has_the_history_of_the_whole_one(tmp_path, at):
    def fit(*cbs):
        learn, swa = learner(), SWACallback(swa_start=1)
        with suppress(KeyboardInterrupt):
            learn.fit(4, cbs=[swa, CheckpointCallback(tmp_path / 'run.ckpt'), *cbs])
        return learn, swa

    learn, whole = fit()
    fit(At('before_train', at, raising(KeyboardInterrupt())))
    again, swa = fit()
    again.validate()
    assert drawn(swa.plot()) == drawn(again.recorder.plot_swa()) == drawn(whole.plot())
    assert len(line(swa.plot()[0], 'model in training').get_xdata()) == 4


def test_what_the_recorder_keeps_is_plain_data_so_that_an_export_needs_nothing_of_ours():
    learn = learner()
    learn.fit(2, cbs=SWACallback(swa_start=1))
    kept = learn.recorder.swa_history
    assert len(json.loads(json.dumps(kept))['rows']) == 2 and type(kept) is dict


def test_sizes_of_ensembles_are_drawn_with_the_interval_of_their_mean_and_one_model_as_a_level():
    values = np.array([[1.0, 2.0], [3.0, 2.0], [5.0, 5.0]])
    ax = plot_sizes(
        {'snapshots': (np.array([1, 2]), values), 'SWA': (np.array([1]), np.array([[4.0], [6.0]]))}, ylabel='error'
    )
    lines = {line.get_label(): line for line in ax.lines}
    assert (
        lines['snapshots'].get_ydata().tolist() == [3, 3]
        and lines['SWA'].get_xdata().tolist() == [1, 2]
        and lines['SWA'].get_ydata().tolist() == [5, 5]
    )
    segments = [s for c in ax.collections for s in c.get_segments()]
    low, high = stats.t.interval(0.95, 2, 3, stats.sem(values[:, 0]))
    assert segments[0][:, 1].tolist() == pytest.approx([low, high]) and segments[0][0, 0] == 1 and len(segments) == 3
    assert ax.get_xlabel() == 'models' and ax.get_ylabel() == 'error'


def test_differences_are_drawn_with_their_intervals_a_line_for_each_and_beside_those_of_other_groups():
    values = np.array([-1.0, -3.0, -2.0])
    ax = plot_differences({'SWA': {'EMA': values, 'mean': values + 5}, 'constant': {'EMA': values, 'mean': values}})
    of_groups = {container.get_label(): container for container in ax.containers}
    points, _, (bars,) = of_groups['SWA']
    assert points.get_xdata().tolist() == pytest.approx([-2, 3])
    low, high = stats.t.interval(0.95, 2, -2, stats.sem(values))
    assert bars.get_segments()[0][:, 0].tolist() == pytest.approx([low, high])
    assert [t.get_text() for t in ax.get_yticklabels()] == ['EMA', 'mean']
    first, second = (of_groups[name][0].get_ydata() for name in ('SWA', 'constant'))
    assert all(abs(a - i) < 0.5 and abs(b - i) < 0.5 and a != b for i, (a, b) in enumerate(zip(first, second)))
    one = plot_differences({'SWA': {'EMA': values[:1]}})  # of one seed there is no interval
    assert not [c for c in one.collections if c.get_segments()]
