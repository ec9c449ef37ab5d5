import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from fastai_swa import (
    SnapshotCallback,
    Surface,
    SWACallback,
    plot_line,
    plot_paths,
    plot_plane,
    plot_planes,
    plot_width,
)
from fastai_swa.landscape.surfaces import Rays

from .helpers import learner
from .test_landscape_surfaces import a_path, a_plane, filled, some_rays


def is_told_apart_without_colour(lines):
    return len({(str(x.get_linestyle()), x.get_marker()) for x in lines}) == len(lines)


def rays_of(profiles):
    r = some_rays()
    r.values['valid_error_rate'] = np.concatenate([[rows[0][0], *rows[0][1:], *rows[1][1:]] for rows in profiles])
    return r


def test_widths_show_each_ray_their_mean_and_where_they_cross_the_level():
    profiles = ([0.1, 0.2, 0.5, 0.8], [0.1, 0.3, 0.7, 0.9]), ([0.1, 0.1, 0.3, 0.6], [0.1, 0.1, 0.5, 0.7])
    ax = plot_width(rays_of(profiles), level=0.4)
    thin, thick = (
        [x for x in ax.lines if x.get_lw() < 1 and len(x.get_xdata()) == 4],
        [x for x in ax.lines if x.get_lw() > 2],
    )
    assert [x.get_xdata().tolist() for x in thin] == [[0, 1, 2, 3]] * 4
    np.testing.assert_allclose([x.get_ydata() for x in thin], 100 * np.concatenate(profiles))
    np.testing.assert_allclose([x.get_ydata() for x in thick], 100 * np.mean(profiles, 1))
    widths = rays_of(profiles).widths('valid_error_rate', 0.4)
    for (name, w), text in zip(widths.items(), ax.get_legend().get_texts()):
        assert text.get_text() == f'{name}: 40 % error at distance {w.distance:.3g} +- {w.std:.2g}'
    assert ax.get_xlabel() == 'distance in weight space, Euclidean' and ax.get_ylabel() == 'validation error rate, %'
    assert is_told_apart_without_colour(thick)
    marks = [x for x in ax.lines if x.get_marker() == 'o']
    assert [x.get_xdata()[0] for x in marks] == [w.distance for w in widths.values()] and {
        x.get_ydata()[0] for x in marks
    } == {40}


def test_weight_decay_counts_for_the_curves_and_for_the_distances():
    r = rays_of((([0, 1, 2, 3.0],) * 2, ([0, 1, 2, 3.0],) * 2))
    r.values['norm'], r.values['train_loss'] = np.full(len(r.points), 2.0), r.values['valid_error_rate']
    ax = plot_width(r, 'train_loss', level=1.5, wd=0.5)
    thick = [x for x in ax.lines if x.get_lw() > 2]
    assert thick[0].get_ydata().tolist() == [1, 2, 3, 4]
    assert [x.get_xdata()[0] for x in ax.lines if x.get_marker() == 'o'] == pytest.approx([0.5, 0.5])


def test_each_of_many_solutions_is_drawn():
    n = 9
    about = {
        'kind': 'rays',
        'solutions': {f's{i}': 1.0 for i in range(n)},
        'n_rays': 1,
        'distances': [1.0],
        'columns': ['valid_loss', 'norm'],
        'spec': {},
    }
    r = filled(Rays(about, [(k, *p) for k in range(n) for p in ((-1, 0), (0, 1))]))
    ax = plot_width(r)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(r.names)
    assert len({(x.get_color(), str(x.get_linestyle())) for x in ax.lines if x.get_lw() > 2}) == n


def test_a_level_that_not_all_rays_reach_is_drawn_without_a_distance():
    ax = plot_width(
        rays_of((([0.1, 0.2, 0.2, 0.2],) * 2, ([0.1, 0.2, 0.5, 0.6],) * 2)), level=0.4, ax=plt.subplots()[1]
    )
    assert [t.get_text().partition(':')[0] for t in ax.get_legend().get_texts()] == [
        'SGD',
        'SWA',
    ] and ax.get_legend().get_texts()[0].get_text() == 'SGD: 0 of 2 rays reach 40 % error'
    ax = plot_width(rays_of((([0.1, 0.2, 0.2, 0.2],) * 2,) * 2), level=1.0)
    assert ax.get_ylim()[1] < 30  # per cent: the level does not flatten the rest
    with pytest.raises(ValueError, match='level must be a share from 0 to 1, not 50'):
        plot_width(rays_of((([0.1, 0.2, 0.2, 0.2],) * 2,) * 2), level=50)


def test_a_line_shows_loss_and_metric_on_axes_of_their_own_and_marks_both_solutions():
    p = a_path([-0.5, 0, 1, 1.5])
    p.values.update(
        {
            'train_loss': np.array([3.0, 1, 2, 4]),
            'valid_error_rate': np.array([0.3, 0.2, 0.1, 0.4]),
            'norm': np.array([1.0, 2, 3, 4]),
        }
    )
    left, right = plot_line(p, wd=0.1)
    np.testing.assert_allclose(left.lines[0].get_data(), [[-2, 0, 4, 6], [3.05, 1.2, 2.45, 4.8]])
    np.testing.assert_allclose(right.lines[0].get_data(), [[-2, 0, 4, 6], [30, 20, 10, 40]])
    assert [x.get_xdata()[0] for x in left.lines[1:]] == [0, 4] and [t.get_text() for t in left.texts] == ['a', 'b']
    assert (
        left.get_xlabel() == 'distance from a in weight space, Euclidean'
        and 'training loss + 0.1/2 |w|' in left.get_ylabel()
    )
    assert right.get_ylabel() == 'validation error rate, %' and is_told_apart_without_colour(
        [left.lines[0], right.lines[0]]
    )
    assert len(plot_line(p, 'valid_error_rate')) == 1
    p.values['valid_loss'] = np.array([1.0, 1, 1, 1])
    np.testing.assert_allclose(
        plot_line(p, 'valid_loss', wd=0.1)[0].lines[0].get_ydata(), 1 + 0.05 * np.array([1.0, 4, 9, 16])
    )


def test_paths_are_drawn_over_the_share_of_the_way():
    line, curve = a_path([0, 0.5, 1]), a_path([0, 0.5, 1], length=10.0, kind='curve', curve='chain', arc=[0, 9, 10])
    for p in (line, curve):
        p.values['valid_error_rate'] = np.array([0.1, 0.3, 0.2])
    ax = plot_paths({'line': line, 'chain': curve})
    assert [x.get_xdata().tolist() for x in ax.lines] == [[0, 0.5, 1], [0, 0.9, 1]] and ax.lines[
        0
    ].get_ydata().tolist() == [10, 30, 20]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        'line, 4 long',
        'chain, 10 long',
    ] and ax.get_xlabel() == 'share of the way from a to b'
    assert is_told_apart_without_colour(ax.lines)


def bowl(n=15):
    p = a_plane(n, n)
    r2 = (p.points[:, 0] - 3) ** 2 + (p.points[:, 1] - 8) ** 2
    p.values.update({'valid_error_rate': 0.05 + r2 / 1000, 'train_loss': r2, 'norm': np.sqrt(1 + r2)})
    return p


def test_a_plane_shows_its_solutions_marks_and_trajectory_on_contours_spaced_in_log():
    ax = plot_plane(bowl())
    filled_contours = ax.collections[0]
    levels = np.array(filled_contours.levels)
    low, high = 5, 100 * bowl().values['valid_error_rate'].max()
    assert levels[0] == pytest.approx(low) and levels[-1] == pytest.approx(high)
    # equal steps of the log of what lies above the least, but for rounding
    expected = low + (high - low) * np.geomspace(0.01, 1, 9)
    assert (np.abs(levels[1:] - expected) <= np.gradient(expected) / 4).all()
    assert levels[1:-1].tolist() == pytest.approx([5.4, 5.8, 6.6, 8, 10, 14, 21, 33], rel=0.1)
    assert all(len(f'{level:.10g}') <= 4 for level in levels[1:-1])
    drawn = {text.get_text(): text.xy for text in ax.texts}
    assert drawn == {'a': (0, 0), 'b': (1, 0), 'c': (0.5, 2), 'SWA, 0.25 off': (0.5, 1)}
    path = next(x for x in ax.lines if len(x.get_xdata()) == 2)
    assert path.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert {x.get_marker() for x in ax.lines if len(x.get_xdata()) == 1} == {'x', '*'}
    assert ax.get_xlabel() == ax.get_ylabel() == 'distance in weight space, Euclidean'
    bar = ax.figure.axes[-1]
    assert bar.get_ylabel() == 'validation error rate, %'
    texts = [t.get_text() for t in bar.get_yticklabels()]
    assert [float(t) for t in texts] == pytest.approx(levels, rel=0.01) and len(set(texts)) == len(levels)


def test_of_a_metric_of_which_more_is_better_the_levels_are_close_below_the_greatest_value():
    p = bowl()
    p.values['valid_accuracy'] = 1 - p.values['valid_error_rate']
    p.values['valid_accuracy'][0] = float('nan')  # where it is measured and undefined
    ax = plot_plane(p, 'valid_accuracy')
    levels = np.array(ax.collections[0].levels)
    assert levels[-1] == pytest.approx(95) and np.diff(levels)[-1] < np.diff(levels)[0] / 20
    greys = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in map(to_rgb, ax.collections[0].get_facecolor())]
    assert (np.diff(greys) > 0.02).all()


@pytest.mark.parametrize('value', [0, 1e-9, 0.9, 1, 1e4])
@pytest.mark.parametrize('column', ['valid_accuracy', 'valid_loss'])
def test_a_flat_plane_is_drawn(value, column):
    p = bowl()
    p.values[column] = np.full(len(p.points), float(value))
    assert (np.diff(plot_plane(p, column).collections[0].levels) > 0).all()


def test_a_top_that_is_not_above_the_least_value_is_one_clear_sentence():
    with pytest.raises(ValueError, match='top must be worse than the best value, 0.05, not 0.01'):
        plot_plane(bowl(), top=0.01)


@pytest.mark.parametrize('name', ['mse', '_rmse', 'mae', 'perplexity', 'error_rate', 'hamming_loss'])
def test_of_errors_by_other_names_less_is_better_too(name):
    p = bowl()
    p.values[f'valid_{name}'] = p.values['valid_error_rate']
    levels = np.array(plot_plane(p, f'valid_{name}').collections[0].levels)
    assert np.diff(levels)[0] < np.diff(levels)[-1] / 20


def test_levels_that_lie_close_are_written_with_digits_enough_to_tell_them_apart():
    p = bowl()
    p.values['valid_error_rate'] = 0.5 + p.values['valid_error_rate'] * 1e-3
    texts = [t.get_text() for t in plot_plane(p).figure.axes[-1].get_yticklabels()]
    assert len(set(texts)) == len(texts) == 10


def test_the_colours_of_a_plane_can_be_read_in_grey():
    colours = [to_rgb(c) for c in plot_plane(bowl()).collections[0].get_facecolor()]
    grey = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in colours]
    assert (np.diff(grey) < -0.02).all()  # the higher the darker


def test_points_that_are_not_measured_stay_white_and_those_that_diverged_lie_above_all_levels():
    p = bowl()
    for v in p.values.values():
        v[: 3 * 15] = np.nan
    p.values['valid_error_rate'][-1] = float('inf')
    ax = plot_plane(p)
    low = min(path.vertices[:, 1].min() for path in ax.collections[0].get_paths() if len(path.vertices))
    assert low >= p.ys[3] - 1e-9
    with pytest.raises(ValueError, match='no point of the plane is measured'):
        plot_plane(a_plane())


def test_planes_side_by_side_have_the_same_levels_up_to_the_top_that_is_asked_for():
    other = bowl()
    other.values['valid_error_rate'] = other.values['valid_error_rate'] * 2
    axs = plot_planes({'one': bowl(), 'two': other}, top=0.2)
    levels = [ax.collections[0].levels.tolist() for ax in axs]
    assert (
        levels[0] == levels[1]
        and levels[0][-1] == pytest.approx(20)
        and [ax.get_title() for ax in axs] == ['one', 'two']
    )
    decayed = plot_plane(bowl(), 'train_loss', wd=0.2)
    assert max(decayed.collections[0].levels) == pytest.approx(
        (bowl().values['train_loss'] + 0.1 * (1 + bowl().values['train_loss'])).max()
    )


def test_a_column_that_there_is_not_is_one_clear_sentence():
    for call in (
        lambda: plot_width(filled(some_rays()), 'valid_f1'),
        lambda: plot_line(filled(a_path([0, 1])), 'valid_f1'),
        lambda: plot_plane(filled(a_plane()), 'valid_f1'),
        lambda: plot_paths({'a': filled(a_path([0, 1]))}, 'valid_f1'),
    ):
        with pytest.raises(ValueError, match="column must be one of train_loss, .* not 'valid_f1'"):
            call()


@pytest.mark.parametrize(
    'call',
    [
        lambda: plot_width(learner()),
        lambda: plot_line(a_plane()),
        lambda: plot_plane(some_rays()),
        lambda: plot_paths([a_path([0])]),
        lambda: plot_paths(a_path([0])),
        lambda: plot_planes({'a': a_path([0])}),
        lambda: plot_paths({'a': a_plane()}),
    ],
)
def test_what_is_not_measured_that_way_is_one_clear_sentence(call):
    with pytest.raises(
        TypeError, match='^plot_[a-z]+ draws .* as rays, line, plane and Curve.evaluate measure them, not '
    ):
        call()


def test_axes_that_are_not_to_scale_say_so():
    p = bowl()
    p.about['ys'] = [y / 100 for y in p.about['ys']]
    assert plot_plane(p).get_xlabel().endswith('(axes not to scale)') and plot_plane(bowl()).get_xlabel().endswith(
        'Euclidean'
    )


def test_a_learner_after_a_fit_draws_width_line_and_plane(tmp_path):
    learn, swa, snapshots = learner(), SWACallback(1), SnapshotCallback(0)
    with learn.no_bar(), learn.no_logging():
        learn.fit(5, cbs=[swa, snapshots])
    ax = learn.plot_width(swa, level=0.4, distances=[1, 2], n_rays=2, file=tmp_path / 'rays')
    assert (
        [x.get_label().partition(':')[0] for x in ax.lines if x.get_lw() > 2]
        == ['own weights', 'average']
        == Surface.load(tmp_path / 'rays').names
    )
    left, right = learn.plot_line(swa, ts=3, file=tmp_path / 'line')
    np.testing.assert_allclose(
        right.lines[0].get_ydata(), 100 * Surface.load(tmp_path / 'line').column('valid_accuracy')
    )
    ax = learn.plot_plane(snapshots, n_points=2, marks={'SWA': swa}, file=tmp_path / 'plane')
    found = Surface.load(tmp_path / 'plane')
    assert (
        found.names == ['epoch 0', 'epoch 2', 'epoch 4'] and len(found.trajectory) == 5 and list(found.marks) == ['SWA']
    )
    assert ax.figure.axes[-1].get_ylabel() == 'validation accuracy, %'
    assert learn.plot_plane(snapshots.snapshots[:3], 'train_loss', n_points=2, ax=plt.subplots()[1]).get_title() == ''
