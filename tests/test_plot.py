import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from fastai_swa import SWACallback, plot_swa
from fastai_swa.plot import plot_sizes

from .helpers import column, learner


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


def test_without_a_swa_callback_it_is_one_clear_sentence():
    learn = learner()
    for prepare in (lambda: None, lambda: learn.fit(1)):
        prepare()
        with pytest.raises(ValueError, match='the recorder holds no fit with a SWACallback'):
            learn.recorder.plot_swa()


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
