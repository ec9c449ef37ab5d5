"""Grids of points, described before anything is measured: the model of their learner cannot be run."""

import json
import math

import numpy as np
import pytest
import torch

from fastai_swa import Curve, line, plane, rays
from fastai_swa.landscape.space import Space, line_grid, plane_grid, rays_grid, weighted_sum
from fastai_swa.landscape.surfaces import Plane, Profile, Rays

from .test_landscape_measure import SQUARE, Scaled, Weights, surface_learner, weights

A, B, C = [1.0, 0, -1, 2, 0], [0.0, 3, 1, 1, -1], [0.5, 0, 2, 0, 1]


@pytest.fixture
def learn(monkeypatch):
    "A learner whose model has five weights and refuses to be run: no pass is made."

    def refuse(self, x):
        raise AssertionError('a pass')

    monkeypatch.setattr(Weights, 'forward', refuse)
    return surface_learner(SQUARE)


@pytest.fixture
def space(learn):
    return Space(learn)


def named(**values):
    return {name: weights(*v) for name, v in values.items()}


def at(grid):
    "The weights of all points, shape (points, weights)."
    return np.stack([grid.at(i).weights.numpy() for i in range(len(grid.points))])


def norm(values):
    return math.sqrt(sum(v * v for v in values))


# rays


def test_rays_begin_at_each_solution_and_have_all_distances_on_each(space):
    grid = rays_grid(space, named(a=A, b=B), [2, 0.5, 2, 0], n_rays=2)
    assert grid.surface is Rays and grid.about['kind'] == 'rays'
    assert grid.points == [
        *[(0, -1, 0), (0, 0, 0.5), (0, 0, 2), (0, 1, 0.5), (0, 1, 2)],
        *[(1, -1, 0), (1, 0, 0.5), (1, 0, 2), (1, 1, 0.5), (1, 1, 2)],
    ]
    assert grid.about['solutions'] == {'a': pytest.approx(norm(A)), 'b': pytest.approx(norm(B))}
    assert grid.about['distances'] == grid.spec['distances'] == [0.5, 2]
    assert grid.about['n_rays'] == grid.spec['n_rays'] == 2


def test_a_point_lies_at_its_distance_on_its_ray_which_is_the_same_for_all_solutions(space):
    grid = rays_grid(space, named(a=A, b=B), [0.5, 2], n_rays=3, seed=1)
    of_a, of_b = np.split(at(grid), 2)
    np.testing.assert_array_equal(of_a[0], A)
    np.testing.assert_array_equal(of_b[0], B)
    steps = (of_a - of_a[0])[1:].reshape(3, 2, 5)  # ray, distance, weight
    np.testing.assert_allclose(np.linalg.norm(steps, axis=2), [[0.5, 2]] * 3)
    np.testing.assert_allclose(steps[:, 1], 4 * steps[:, 0])
    np.testing.assert_allclose(of_b - of_b[0], of_a - of_a[0], atol=1e-15)
    assert abs(np.corrcoef(steps[:, 0]))[~np.eye(3, dtype=bool)].max() < 0.999  # three directions
    again, other = (at(rays_grid(space, named(a=A), [0.5, 2], 3, seed)) for seed in (1, 2))
    np.testing.assert_array_equal(again, of_a)
    assert not np.isclose(other[1:], of_a[1:]).any()


def test_points_can_be_asked_for_in_any_order(space):
    grid = rays_grid(space, named(a=A, b=B), [0.5, 2], n_rays=2)
    forward = at(grid)
    for i in reversed(range(len(grid.points))):
        np.testing.assert_array_equal(grid.at(i).weights, forward[i])


def test_without_distances_there_are_twenty_up_to_twice_the_norm_of_the_first_solution(space):
    distances = rays_grid(space, named(a=A, b=B)).about['distances']
    assert len(distances) == 20 and distances[-1] == pytest.approx(2 * norm(A), rel=1e-5)
    np.testing.assert_allclose(np.diff([0, *distances]), distances[-1] / 20)


# line


def test_a_point_of_a_line_is_the_mean_of_both_ends_by_its_shares(space):
    grid = line_grid(space, named(a=A, b=B), [-0.25, 0, 0.3, 1])
    assert grid.surface is Profile and grid.points == [(-0.25,), (0,), (0.3,), (1,)]
    expected = [[(1 - t) * a + t * b for a, b in zip(A, B)] for t in (-0.25, 0, 0.3, 1)]
    np.testing.assert_allclose(at(grid), expected, atol=1e-15)
    assert at(grid)[1].tolist() == A and at(grid)[3].tolist() == B
    length = norm([b - a for a, b in zip(A, B)])
    assert grid.about['length'] == pytest.approx(length)
    np.testing.assert_allclose(grid.about['arc'], [t * length for t in (-0.25, 0, 0.3, 1)])
    assert grid.about['solutions'] == {'a': pytest.approx(norm(A)), 'b': pytest.approx(norm(B))}


# plane


def test_the_distances_between_points_of_a_plane_are_those_of_their_coordinates(space):
    "Which no sum of the three solutions with other shares has."
    grid = plane_grid(space, named(a=A, b=B, c=C), n_points=(3, 4), margin=(0.5, 0.1))
    assert grid.surface is Plane and len(grid.points) == 12
    found = [*at(grid), A, B, C]
    coordinates = [*grid.points, *grid.about['solutions'].values()]
    for w, p in zip(found, coordinates):
        for other_w, other_p in zip(found, coordinates):
            distance = math.dist(p, other_p)
            assert np.linalg.norm(np.subtract(w, other_w)) == pytest.approx(distance, abs=1e-12)


def test_a_plane_is_walked_through_row_by_row_and_goes_beyond_the_solutions_by_the_margin(space):
    grid = plane_grid(space, named(a=A, b=B, c=C), n_points=(3, 2), margin=(0.5, 0))
    xs, ys = grid.about['xs'], grid.about['ys']
    assert [x for x, _ in grid.points] == xs * 2
    assert [y for _, y in grid.points] == [ys[0]] * 3 + [ys[1]] * 3
    (ax, ay), (bx, by), (cx, cy) = grid.about['solutions'].values()
    assert ax == ay == by == 0 and bx > 0 and cy > 0
    width = max(ax, bx, cx) - min(ax, bx, cx)
    assert xs[0] == pytest.approx(min(ax, cx) - width / 2) and xs[-1] == pytest.approx(max(bx, cx) + width / 2)
    assert ys == pytest.approx([0, cy])


def test_marks_and_trajectory_are_no_part_of_what_a_plane_is_of(space):
    plain = plane_grid(space, named(a=A, b=B, c=C))
    grid = plane_grid(space, named(a=A, b=B, c=C), marks=named(b=B), trajectory=[weights(*A), weights(*C)])
    assert plain.about['marks'] == {} and plain.about['trajectory'] == []
    assert grid.about['marks']['b'] == pytest.approx((*grid.about['solutions']['b'], 0), abs=1e-12)
    path = [(*grid.about['solutions'][name], 0) for name in 'ac']
    np.testing.assert_allclose(grid.about['trajectory'], path, atol=1e-12)
    assert grid.spec == plain.spec


# curve


def casteljau(points, t):
    "The point of a Bezier curve, by halving between neighbours."
    while len(points) > 1:
        points = [(1 - t) * a + t * b for a, b in zip(points, points[1:])]
    return points[0]


def on_chain(points, t):
    piece = min(int(t * (len(points) - 1)), len(points) - 2)
    share = t * (len(points) - 1) - piece
    return (1 - share) * points[piece] + share * points[piece + 1]


@pytest.mark.parametrize('kind, point', [('bezier', casteljau), ('chain', on_chain)])
def test_a_point_of_a_curve_is_where_ends_and_bends_put_it(learn, kind, point):
    curve = Curve(learn, named(a=A, b=B), 2, kind)
    curve._points[1:-1] = [torch.tensor(v, dtype=torch.float64) for v in (C, [2.0, 2, 2, 2, 2])]
    ts = [0, 0.2, 1 / 3, 0.75, 1]
    grid = curve._grid(ts)
    assert grid.surface is Profile and grid.points == [(t,) for t in ts]
    points = [np.array(v) for v in (A, C, [2.0, 2, 2, 2, 2], B)]
    np.testing.assert_allclose(at(grid), [point(points, t) for t in ts], atol=1e-12)
    walked = np.array([point(points, t) for t in np.linspace(0, 1, 3001)])
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(walked, axis=0), axis=1))])
    np.testing.assert_allclose(grid.about['arc'], [lengths[round(3000 * t)] for t in ts], rtol=1e-5)
    assert grid.about['length'] == pytest.approx(lengths[-1], rel=1e-5)
    assert grid.about['solutions'] == {'a': pytest.approx(norm(A)), 'b': pytest.approx(norm(B))}


# buffers


def test_buffers_are_each_solutions_own_on_rays_and_the_first_ones_between_solutions():
    first, other = Scaled().state_dict(), Scaled().state_dict()
    other['calls'].fill_(7)
    other['linear.weight'] += 1
    learn = surface_learner(SQUARE)
    learn.model = Scaled()
    space = Space(learn)
    by_rays = rays_grid(space, [first, other], [1.0], 1)
    assert [float(by_rays.at(i).buffers['calls']) for i in range(4)] == [0, 0, 7, 7]
    with pytest.warns(UserWarning, match='^calls is not recomputed and differs between the solutions'):
        by_line = line_grid(space, [other, first], [0, 1])
    assert [float(by_line.at(i).buffers['calls']) for i in range(2)] == [7, 7]


def test_a_weighted_sum_with_one_share_is_bitwise_that_vector():
    vectors = list(torch.randn(3, 50))
    for i, shares in enumerate(np.eye(3)):
        assert torch.equal(weighted_sum(vectors, shares), vectors[i])


# files


def begun(kind, spec, points, rows, **about):
    "What version 0.1 wrote for the first points of a measurement."
    columns = ['valid_loss', 'norm']
    solutions = [['a', 'feb4b7ec5929dd1d'], ['b', '199f6d5b3bd9b3bb'], ['c', '0edcc7a5b89c7615']]
    how = {'columns': columns, 'bn_batches': None, 'train_batches': None, 'seed': 3, 'data': [[7, 4], [3, 4]]}
    if kind != 'curve':
        spec = {'solutions': solutions[: 3 if kind == 'plane' else 2], **spec}
    about = {'kind': kind, **about, 'spec': {'kind': kind, **spec, **how}, 'columns': columns}
    head = {'format': 'fastai_swa surface 1', 'about': about, 'points': points}
    return '\n'.join(map(json.dumps, [head, *rows])) + '\n'


NORMS = {'a': 2.449489742783178, 'b': 3.4641016151377544}
PRINTS = [[0, 'feb4b7ec5929dd1d'], [1, '11d7fda2a89603d1'], [2, '199f6d5b3bd9b3bb']]
XS, YS = [-0.8, 4.8], [-0.6552671211040578, 3.9316027266243467]
BEGUN = {
    'rays': (
        lambda learn, **kw: rays(learn, named(a=A, b=B), [0.5, 2], 1, **kw),
        begun(
            'rays',
            {'n_rays': 1, 'distances': [0.5, 2.0]},
            [[0, -1, 0], [0, 0, 0.5], [0, 0, 2], [1, -1, 0], [1, 0, 0.5], [1, 0, 2]],
            [[0, 3.0, 2.449489742783178], [1, 2.916859280666179, 2.415309206154019]],
            solutions=NORMS,
            n_rays=1,
            distances=[0.5, 2.0],
        ),
    ),
    'line': (
        lambda learn, **kw: line(learn, named(a=A, b=B), 3, **kw),
        begun(
            'line',
            {'ts': [-0.5, 0.0, 0.5, 1.0, 1.5]},
            [[-0.5], [0.0], [0.5], [1.0], [1.5]],
            [[0, 7.5, 3.872983346207417], [1, 3.0, 2.449489742783178]],
            solutions=NORMS,
            length=4.0,
            arc=[-2.0, 0.0, 2.0, 4.0, 6.0],
        ),
    ),
    'plane': (
        lambda learn, **kw: plane(learn, named(a=A, b=B, c=C), 2, **kw),
        begun(
            'plane',
            {'n_points': [2, 2], 'margin': [0.2, 0.2]},
            [[XS[0], YS[0]], [XS[1], YS[0]], [XS[0], YS[1]], [XS[1], YS[1]]],
            [[0, 5.5659374999999995, 3.336446462930283], [1, 9.7659375, 4.419488092528364]],
            solutions={'a': [0.0, 0.0], 'b': [4.0, 0.0], 'c': [1.875, 3.276335605520289]},
            xs=XS,
            ys=YS,
            marks={},
            trajectory=[],
        ),
    ),
    'curve': (
        lambda learn, **kw: Curve(learn, named(a=A, b=B)).evaluate(3, **kw),
        begun(
            'curve',
            {'curve': 'bezier', 'points': PRINTS, 'ts': [0.0, 0.5, 1.0]},
            [[0.0], [0.5], [1.0]],
            [[0, 3.0, 2.449489742783178], [1, 2.5, 2.23606797749979]],
            curve='bezier',
            solutions=NORMS,
            length=4.0,
            arc=[0.0, 2.0, 4.0],
        ),
    ),
}


@pytest.mark.parametrize('measure, begun', BEGUN.values(), ids=BEGUN)
def test_a_file_that_version_0_1_began_is_gone_on_with_and_its_format_is_the_same(measure, begun, tmp_path):
    learn, done = surface_learner(SQUARE), []
    (tmp_path / 'begun').write_text(begun)
    found = measure(learn, sets='valid', seed=3, file=tmp_path / 'begun', progress=lambda i, n: done.append(i))
    assert done == list(range(2, len(found.points)))  # the first two were there
    measure(learn, sets='valid', seed=3, file=tmp_path / 'new')
    old, new = ([json.loads(text) for text in (tmp_path / name).read_text().splitlines()] for name in ('begun', 'new'))
    assert old[0].keys() == new[0].keys() and old[0]['about'].keys() == new[0]['about'].keys()
    assert old[0]['about']['spec'] == new[0]['about']['spec']
    np.testing.assert_allclose(old[0]['points'], new[0]['points'])
    for row, other in zip(old[1:], new[1:], strict=True):
        assert row == pytest.approx(other, rel=1e-12)
