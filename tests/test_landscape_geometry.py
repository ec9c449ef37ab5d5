import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastai_swa.landscape import geometry
from fastai_swa.landscape.geometry import (
    CURVES,
    Frame,
    arc_lengths,
    bezier,
    chain,
    crossing,
    direction,
    distance_between,
    inner_products,
    mean_height,
    norm,
    norm_at,
)

# directions


@pytest.mark.parametrize('n', [2, 3, 40])
def test_directions_are_uniform_on_the_sphere(n):
    vs = torch.stack([direction(n, 0, i) for i in range(2000)]).numpy()
    np.testing.assert_allclose(np.linalg.norm(vs, axis=1), 1, rtol=1e-12)
    turned = vs @ np.linalg.qr(np.random.RandomState(0).randn(n, n))[0]  # no axis is special
    for coordinates in (*vs.T[:3], *turned.T[:3]):  # its square is Beta(1/2, (n - 1)/2) distributed, its sign a coin
        assert stats.kstest(coordinates**2, stats.beta(0.5, (n - 1) / 2).cdf).pvalue > 1e-3
        assert stats.binomtest(int((coordinates > 0).sum()), 2000).pvalue > 1e-3
    assert np.abs(vs.T @ vs / 2000 - np.eye(n) / n).max() < 6 / n / 2000**0.5
    successive = (vs[1:] * vs[:-1]).sum(1)  # of two independent directions the same law holds
    assert stats.kstest(successive**2, stats.beta(0.5, (n - 1) / 2).cdf).pvalue > 1e-3


def test_a_direction_depends_on_seed_and_number_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(direction(5, 1, 2), direction(5, 1, 2)) and torch.equal(torch.get_rng_state(), state)
    drawn = [direction(5, seed, i) for seed in range(3) for i in range(3)]
    assert len({tuple(v.tolist()) for v in drawn}) == 9


def whole_direction(n, seed, number):
    "As one vector of float64."
    state = int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]) & (2**63 - 1)
    v = torch.randn(n, generator=torch.Generator().manual_seed(state), dtype=torch.float64)
    return v / v.norm()


@pytest.mark.parametrize('n', [2, 15, 16, 17, 32, 33, 47, 48, 64, 100, 1000])
def test_a_direction_drawn_in_stretches_is_the_one_drawn_whole(n, monkeypatch):
    for stretch in (32, 1 << 18):
        monkeypatch.setattr(geometry, '_STRETCH', stretch)
        found = direction(n, 1, 2)
        torch.testing.assert_close(found, whole_direction(n, 1, 2), rtol=1e-15, atol=0)
        assert torch.equal(direction(n, 1, 2, torch.float32), found.float())
    assert torch.equal(found, whole_direction(n, 1, 2))  # bitwise where it is one stretch


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_what_is_computed_in_stretches_is_what_whole_vectors_of_float64_give(dtype, monkeypatch):
    monkeypatch.setattr(geometry, '_STRETCH', 32)
    a, b, c, w = (p.to(dtype) for p in (*three(1000), torch.linspace(-1, 1, 1000, dtype=torch.float64)))
    x, y, z, p = (v.double().numpy() for v in (a, b, c, w))
    assert norm(a) == pytest.approx(np.linalg.norm(x), rel=1e-14)
    assert distance_between(a, b) == pytest.approx(np.linalg.norm(y - x), rel=1e-14)
    np.testing.assert_allclose(inner_products([a, b, c]), np.stack([x, y, z]) @ np.stack([x, y, z]).T, rtol=1e-13)
    q, _ = np.linalg.qr(np.stack([y - x, z - x]).T)  # an orthonormal basis, up to signs
    q *= np.sign([q[:, 0] @ (y - x), q[:, 1] @ (z - x)])
    frame = Frame.through([a, b, c])
    np.testing.assert_allclose(np.stack([frame.u, frame.v]), q.T, atol=1e-14)
    np.testing.assert_allclose(frame.corners, [[0, 0], (y - x) @ q, (z - x) @ q], atol=1e-12)
    off = p - x
    *coordinates, distance = frame.project(w)
    np.testing.assert_allclose(coordinates, off @ q, rtol=1e-12)
    assert distance == pytest.approx(np.linalg.norm(off - q @ (off @ q)), rel=1e-12)


# planes


def three(n=50, seed=0, dtype=torch.float64):
    return list(torch.randn(3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype))


def test_coordinates_in_the_plane_are_distances_in_weight_space():
    ws = three()
    frame = Frame.through(ws)
    for i in range(3):
        for j in range(3):
            assert np.linalg.norm(frame.corners[i] - frame.corners[j]) == pytest.approx(
                float((ws[i] - ws[j]).norm()), rel=1e-12
            )
        assert frame.project(ws[i]) == pytest.approx((*frame.corners[i], 0), abs=1e-12)
    assert frame.corners[0].tolist() == [0, 0] and frame.corners[1, 1] == 0 and frame.corners[2, 1] > 0


@settings(deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3))
def test_shares_give_the_point_with_these_coordinates(x, y):
    ws = three()
    frame = Frame.through(ws)
    shares = frame.shares(x, y)
    assert shares.sum() == pytest.approx(1)
    point = sum(w * s for w, s in zip(ws, shares))
    assert frame.project(point) == pytest.approx((x, y, 0), abs=1e-10)
    torch.testing.assert_close(point, ws[0] + x * frame.u + y * frame.v)


def test_a_point_off_the_plane_is_projected_and_its_distance_told():
    ws = three()
    frame = Frame.through(ws)
    normal = torch.randn(50, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    normal -= (normal @ frame.u) * frame.u + (normal @ frame.v) * frame.v
    assert frame.project(ws[0] + 2 * frame.u - frame.v + 3 * normal / normal.norm()) == pytest.approx(
        (2, -1, 3), abs=1e-12
    )


def test_the_corners_themselves_have_exact_shares():
    frame = Frame.through(three())
    assert frame.shares(0, 0).tolist() == [1, 0, 0] and frame.shares(*frame.corners[1]).tolist() == [0, 1, 0]
    np.testing.assert_allclose(frame.shares(*frame.corners[2]), [0, 0, 1], atol=1e-15)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_equal_and_collinear_points_are_one_clear_sentence(dtype):
    a, b, c = three(1000, dtype=dtype)
    for points, said in (
        ((a, a, c), 'SGD and SWA are the same'),
        ((a, b, a), 'SGD and last are the same'),
        ((a, b, b), 'SWA and last are the same'),
        ((a, b, (a + b) / 2), 'lie on a line'),
        ((a, b, 3 * b - 2 * a), 'lie on a line'),
        ((a, a + (b - a) * 1e-3, b), 'lie on a line'),
    ):
        with pytest.raises(ValueError, match=said):
            Frame.through(points, ('SGD', 'SWA', 'last'))
    Frame.through((a, b, (a + b) / 2 + 0.01 * c))


# curves


def de_casteljau(points, t):
    while len(points) > 1:
        points = [(1 - t) * p + t * q for p, q in zip(points, points[1:])]
    return points[0]


@settings(deadline=None)
@given(st.integers(2, 6), st.floats(0, 1))
def test_a_bezier_curve_is_what_de_casteljau_draws(n, t):
    points = np.random.RandomState(n).randn(n, 4)
    np.testing.assert_allclose(bezier(t, n) @ points, de_casteljau(list(points), t), atol=1e-12)


@settings(deadline=None)
@given(st.integers(2, 6), st.floats(0, 1))
def test_a_chain_goes_straight_from_point_to_point_in_equal_shares_of_t(n, t):
    points = np.random.RandomState(n).randn(n, 4)
    expected = [np.interp(t, np.linspace(0, 1, n), column) for column in points.T]
    np.testing.assert_allclose(chain(t, n) @ points, expected, atol=1e-12)


@pytest.mark.parametrize('kind', CURVES)
@pytest.mark.parametrize('n', [2, 3, 5])
def test_the_ends_of_a_curve_are_exactly_the_ends(kind, n):
    assert CURVES[kind](0.0, n).tolist() == [1] + [0] * (n - 1) and CURVES[kind](1.0, n).tolist() == [0] * (n - 1) + [1]


@pytest.mark.parametrize('kind', CURVES)
@pytest.mark.parametrize('n', [2, 3, 4])
def test_arc_lengths_are_those_of_a_polygon_of_a_hundred_thousand_sides(kind, n):
    points = np.random.RandomState(n).randn(n, 5)
    ts = np.array([0, 0.2, 0.5, 0.77, 1])
    grid = np.unique([*np.linspace(0, 1, 100_001), *np.linspace(0, 1, n), *ts])
    drawn = np.array([CURVES[kind](t, n) for t in grid]) @ points
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(drawn, axis=0), axis=1))])
    found = arc_lengths(kind, inner_products(torch.from_numpy(points)), ts)
    np.testing.assert_allclose(found, np.interp(ts, grid, lengths), rtol=1e-7, atol=1e-9)


def test_inner_products_and_norms_are_those_of_float64():
    ws = [w.float() for w in three(10_000)]
    products = inner_products(ws)
    np.testing.assert_allclose(
        products, [[np.dot(a.double().numpy(), b.double().numpy()) for b in ws] for a in ws], rtol=1e-12
    )
    shares = np.array([0.2, -1, 3])
    assert norm_at(shares, products) == pytest.approx(
        float(sum(w.double() * s for w, s in zip(ws, shares)).norm()), rel=1e-10
    )


# profiles


@pytest.mark.parametrize(
    'f, level, radius',
    [
        (lambda r: r**2 / 2, 3, 6**0.5),
        (lambda r: r**3, 20, 20 ** (1 / 3)),
        (lambda r: 1 - r, 0.45, 0.55),
        (lambda r: r**3 + r, 10, 2.0),
    ],
)
@pytest.mark.parametrize('n', [4, 11, 30])
def test_crossings_of_polynomials_up_to_the_third_degree_are_exact(f, level, radius, n):
    for end in (2.75, 3, 100):
        xs = np.linspace(0, end, n)
        assert crossing(xs, f(xs), level) == pytest.approx(radius, rel=1e-9)


def test_a_crossing_draws_nothing():
    state = np.random.get_state()[1].copy()
    crossing(np.arange(6.0), np.arange(6.0) ** 2, 7)
    assert np.array_equal(np.random.get_state()[1], state)


def test_a_crossing_is_the_first_one_whichever_side_the_values_come_from():
    xs = np.arange(8.0)
    assert 1 < crossing(xs, [0, 0, 1, 1, 0, 0, 1, 1], 0.5) < 2
    assert 1 < crossing(xs, [1, 1, 0, 0, 1, 1, 0, 0], 0.5) < 2
    assert crossing(xs, [0.5, 1, 1, 1, 1, 1, 1, 1], 0.5) == 0 and crossing(xs, [0, 0, 0, 0.5, 1, 1, 1, 1], 0.5) == 3
    assert crossing([0, 2], [0, 1], 0.25) == pytest.approx(0.5) and np.isnan(crossing([0.0], [0.0], 1))


def test_a_level_that_is_not_crossed_or_lies_behind_what_is_not_finite_has_no_crossing():
    xs, nan, inf = np.arange(4.0), float('nan'), float('inf')
    for ys in ([0, 0, 0, 0], [0, nan, 1, 1], [0, 0, inf, inf], [nan, 0, 1, 1]):
        assert np.isnan(crossing(xs, ys, 0.5))
    assert 1 < crossing(xs, [0, 0, 1, inf], 0.5) < 2  # what comes after does not matter


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
def test_a_crossing_lies_between_the_two_points_between_which_the_level_is_passed(ys):
    xs = np.arange(len(ys)) * 1.5
    above = np.array(ys) > 0.5
    changed = np.flatnonzero(above[1:] != above[:-1])
    if 0.5 in ys:
        return
    if len(changed) == 0:
        assert np.isnan(crossing(xs, ys, 0.5))
    else:
        assert xs[changed[0]] - 1e-6 <= crossing(xs, ys, 0.5) <= xs[changed[0] + 1] + 1e-6


def test_the_mean_height_is_the_area_below_straight_lines_by_the_width():
    xs, ys = np.array([0.0, 1, 3, 4]), np.array([0.0, 2, 2, 0])
    assert mean_height(xs, ys, 0, 4) == pytest.approx(6 / 4)
    assert mean_height(xs, ys, 0.5, 3.5) == pytest.approx((0.75 + 4 + 0.75) / 3)
