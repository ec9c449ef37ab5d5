import json

import numpy as np
import pytest

from fastai_swa.files import InUse
from fastai_swa.landscape.surfaces import Plane, PointFile, Profile, Rays, Surface

COLUMNS = ['train_loss', 'valid_loss', 'valid_error_rate', 'norm']


def filled(surface, f=lambda i, c: 10.0 * i + c):
    for c, name in enumerate(surface.about['columns']):
        surface.values[name] = np.array([f(i, c) for i in range(len(surface.points))])
    return surface


def a_plane(n_x=3, n_y=2, columns=COLUMNS, **spec):
    xs, ys = np.arange(n_x) - 1.0, np.arange(n_y) * 2.0
    about = {
        'kind': 'plane',
        'solutions': {'a': [0, 0], 'b': [1, 0], 'c': [0.5, 2]},
        'xs': xs.tolist(),
        'ys': ys.tolist(),
        'marks': {'SWA': [0.5, 1, 0.25]},
        'trajectory': [[0, 0, 0], [1, 1, 0.5]],
        'columns': columns,
        'spec': {'seed': 0} | spec,
    }
    return Plane(about, [(x, y) for y in ys for x in xs])


def a_path(ts, length=4.0, kind='line', **about):
    return Profile(
        {
            'kind': kind,
            'solutions': {'a': 1.0, 'b': 2.0},
            'length': length,
            'arc': [t * length for t in ts],
            'columns': COLUMNS,
            'spec': {},
        }
        | about,
        [(t,) for t in ts],
    )


def some_rays(distances=(1.0, 2.0, 3.0), n_rays=2):
    points = [(k, *p) for k in range(2) for p in ((-1, 0), *((r, d) for r in range(n_rays) for d in distances))]
    return Rays(
        {
            'kind': 'rays',
            'solutions': {'SGD': 10.0, 'SWA': 20.0},
            'n_rays': n_rays,
            'distances': list(distances),
            'columns': COLUMNS,
            'spec': {},
        },
        points,
    )


def same(a, b):
    assert (
        type(a) is type(b)
        and a.about == b.about
        and np.array_equal(a.points, b.points)
        and a.values.keys() == b.values.keys()
    )
    for k in a.values:
        np.testing.assert_array_equal(a.values[k], b.values[k])


# what is read off


def test_a_grid_has_a_row_for_each_y_and_a_column_for_each_x():
    p = filled(a_plane(), lambda i, c: i)
    assert p.grid('valid_loss').tolist() == [[0, 1, 2], [3, 4, 5]]
    assert p.points[4].tolist() == [p.xs[1], p.ys[1]]
    assert p.solutions['c'] == (0.5, 2) and p.marks == {'SWA': (0.5, 1, 0.25)} and p.trajectory.shape == (2, 3)


def test_weight_decay_adds_half_of_it_times_the_squared_norm_and_an_unknown_column_is_refused():
    p = filled(a_plane())
    np.testing.assert_allclose(p.column('train_loss', wd=0.1), p.values['train_loss'] + 0.05 * p.values['norm'] ** 2)
    with pytest.raises(
        ValueError, match="column must be one of train_loss, valid_loss, valid_error_rate, norm, not 'accuracy'"
    ):
        p.column('accuracy')


def test_along_a_path_the_ends_count_and_what_lies_beyond_does_not():
    p = a_path([-0.5, 0, 0.25, 1, 1.5])
    p.values['valid_loss'] = np.array([9.0, 1, 5, 3, -9])
    assert (p.max('valid_loss'), p.min('valid_loss')) == (5, 1)
    assert p.mean('valid_loss') == pytest.approx(0.25 * 3 + 0.75 * 4)
    assert p.arc.tolist() == [-2, 0, 1, 4, 6] and p.length == 4
    with pytest.raises(ValueError, match='no point lies between'):
        a_path([-1, 2]).max('valid_loss')


def test_the_mean_over_the_way_is_over_its_length_not_over_t():
    p = a_path([0, 0.5, 1], length=10.0, kind='curve', curve='chain', arc=[0, 9, 10])
    p.values['valid_loss'] = np.array([0.0, 0, 2])
    assert p.mean('valid_loss') == pytest.approx(0.1)


def test_widths_are_where_each_ray_crosses_the_level_absolute_and_in_norms():
    r = some_rays()
    values = {
        'SGD': ([0, 1, 4, 9], [0, 2, 8, 18]),
        'SWA': ([0, 0.5, 2, 4.5], [0, 1, 2, 3]),
    }  # r**2, 2 r**2, r**2 / 2, r
    r.values['train_loss'] = np.concatenate([[rows[0][0], *rows[0][1:], *rows[1][1:]] for rows in values.values()])
    for name, rows in values.items():
        np.testing.assert_array_equal(r.profiles('train_loss')[name], rows)
    widths = r.widths('train_loss', 2)
    np.testing.assert_allclose(widths['SGD'].distances, [2**0.5, 1])
    np.testing.assert_allclose(widths['SWA'].distances, [2, 2])
    sgd, swa = widths['SGD'], widths['SWA']
    assert (
        sgd.distance == pytest.approx((2**0.5 + 1) / 2)
        and sgd.std == pytest.approx((2**0.5 - 1) / 2**0.5)
        and sgd.n_crossed == 2
    )
    assert sgd.relative == pytest.approx(sgd.distance / 10) and sgd.relative_std == pytest.approx(sgd.std / 10)
    assert (swa.distance, swa.relative, swa.std) == (pytest.approx(2), pytest.approx(0.1), pytest.approx(0))


def test_a_mean_width_is_given_only_if_all_rays_cross_the_level():
    r = some_rays()
    r.values['train_loss'] = np.array([0.0, 1, 2, 3, 0, 0, 0] + [0.0] * 7)
    widths = r.widths('train_loss', 0.5)
    assert np.isnan(widths['SGD'].distance) and widths['SGD'].n_crossed == 1 and widths['SWA'].n_crossed == 0
    assert np.isnan(some_rays(n_rays=1).widths('train_loss', 0.5)['SGD'].std)


def test_what_is_not_measured_yet_is_said():
    p = a_plane()
    assert (
        not p.is_measured.any()
        and repr(p)
        == 'Plane through a, b, c, 3 x 2; 0 of 6 points, with train_loss, valid_loss, valid_error_rate, norm'
    )
    p.values['norm'][:2] = 1
    assert p.is_measured.tolist() == [True] * 2 + [False] * 4 and '2 of 6 points' in repr(p)
    assert repr(filled(p)).endswith('; 6 points, with train_loss, valid_loss, valid_error_rate, norm')
    assert repr(some_rays()).startswith('2 rays from each of SGD, SWA, to distance 3;')
    assert repr(a_path([0, 1])).startswith('Line from a to b, 4 long;')
    assert repr(a_path([0, 1], kind='curve', curve='bezier')).startswith('Bezier curve from a to b') and repr(
        a_path([0], kind='curve', curve='chain')
    ).startswith('Polygonal chain')


# files


@pytest.mark.parametrize('ending', ['json', 'npz'])
@pytest.mark.parametrize(
    'make', [a_plane, some_rays, lambda: a_path([0, 0.3, 1]), lambda: a_path([0, 1], kind='curve', curve='chain')]
)
def test_what_is_saved_is_loaded_bitwise(tmp_path, ending, make):
    surface, inf, nan = filled(make()), float('inf'), float('nan')
    surface.values['train_loss'][0], surface.values['valid_loss'][0], surface.values['valid_error_rate'][0] = (
        inf,
        nan,
        1 / 3,
    )
    surface.save(tmp_path / f'it.{ending}')
    same(Surface.load(tmp_path / f'it.{ending}'), surface)


def test_the_json_is_standard_json(tmp_path):
    p = filled(a_plane())
    p.values['train_loss'][:] = [float('inf'), -float('inf'), float('nan'), 0, 1, 2]
    p.save(tmp_path / 'it.json')

    def refuse(name):
        raise AssertionError(name)

    assert json.loads((tmp_path / 'it.json').read_text(), parse_constant=refuse)['values']['train_loss'] == [
        'inf',
        '-inf',
        'nan',
        0,
        1,
        2,
    ]


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'{"format": "something else"}',
        b'PK\x03\x04 no zip',
        b'[1, 2]',
        b'\xff\xfe',
        b'{"format": "fastai_swa surface 1"}',
        b'[' * 100_000,
        b'{"format": "fastai_swa surface 1", "about": ' + b'[' * 100_000,
        b'{"format": "fastai_swa surface 1", "about": [1], "points": []}',
        b'{"format": "fastai_swa surface 1", "about": {"kind": "plane"}, "points": []}',
        b'{"format": "fastai_swa surface 1", "about": {"kind": "plane", "solutions": {}, "columns": ["norm"]}, '
        b'"points": [[0, 1]], "values": {"norm": [1, 2]}}',
    ],
)
def test_a_damaged_or_foreign_file_is_one_clear_sentence(tmp_path, content):
    (tmp_path / 'it').write_bytes(content)
    with pytest.raises(ValueError, match='is damaged, or it is no surface that fastai_swa wrote'):
        Surface.load(tmp_path / 'it')
    with pytest.raises(FileNotFoundError):
        Surface.load(tmp_path / 'missing')


def test_a_file_that_is_compressed_is_refused_before_it_is_unpacked(tmp_path):
    np.savez_compressed(tmp_path / 'it.npz', about=json.dumps(a_plane().about), points=np.zeros((2_000_000, 2)))
    assert (tmp_path / 'it.npz').stat().st_size < 100_000
    with pytest.raises(ValueError, match='is damaged, or it is no surface that fastai_swa wrote'):
        Surface.load(tmp_path / 'it.npz')


# a file that grows


def add(rows, i):
    rows.add(i, {name: 10.0 * i + c for c, name in enumerate(COLUMNS)})


def test_points_are_in_the_file_as_soon_as_they_are_added(tmp_path):
    rows = PointFile(tmp_path / 'new' / 'it.jsonl', a_plane())
    for i in (0, 3):
        add(rows, i)
        assert int(Surface.load(tmp_path / 'new' / 'it.jsonl').is_measured.sum()) == (1 if i == 0 else 2)
    rows.close()
    assert Surface.load(tmp_path / 'new' / 'it.jsonl').values['valid_loss'][3] == 31


def test_a_file_goes_on_with_what_it_holds_and_without_a_line_that_was_cut(tmp_path):
    file = tmp_path / 'it.jsonl'
    rows = PointFile(file, a_plane())
    for i in (0, 1, 2):
        add(rows, i)
    rows.close()
    whole = file.read_bytes()
    for cut in range(1, len(whole.split(b'\n')[-2]) + 1):
        file.write_bytes(whole[:-cut])
        rows = PointFile(file, a_plane())
        assert rows.surface.is_measured.tolist() == [True, True, False, False, False, False]
        for i in (2, 3, 4, 5):
            add(rows, i)
        rows.close()
        same(Surface.load(file), filled(a_plane()))
        assert not list(tmp_path.glob('*.lock'))


def test_a_line_damaged_in_the_middle_is_not_passed_over(tmp_path):
    file = tmp_path / 'it.jsonl'
    rows = PointFile(file, a_plane())
    for i in (0, 1, 2):
        add(rows, i)
    rows.close()
    lines = file.read_bytes().split(b'\n')
    for bad in (
        b'[1, 2',
        b'[1, 2]',
        b'[99, 0, 0, 0, 0]',
        b'[true, 0, 0, 0, 0]',
        b'[1.0, 0, 0, 0, 0]',
        b'[1, 0, 0, false, 0]',
        b'{"1": 2}',
        b'[' * 100_000,
    ):
        file.write_bytes(b'\n'.join([lines[0], lines[1], bad, lines[3], b'']))
        before = file.read_bytes()
        with pytest.raises(ValueError, match='is damaged'):
            PointFile(file, a_plane())
        assert file.read_bytes() == before and not list(tmp_path.glob('*.lock'))


def test_a_file_of_another_measurement_is_refused_and_left_as_it_is(tmp_path):
    file = tmp_path / 'it.jsonl'
    PointFile(file, a_plane(seed=1)).close()
    before = file.read_bytes()
    with pytest.raises(
        ValueError, match='it.jsonl is of another measurement, with seed=1, not 2: give another file, or remove it'
    ):
        PointFile(file, a_plane(seed=2))
    assert file.read_bytes() == before


@pytest.mark.parametrize('ending', ['json', 'npz'])
def test_what_save_wrote_is_not_taken_for_a_file_that_grows(tmp_path, ending):
    file = tmp_path / f'it.{ending}'
    filled(a_plane()).save(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match='was written by save, and does not grow: give another file'):
        PointFile(file, a_plane())
    assert file.read_bytes() == before


def test_a_file_goes_on_with_new_marks(tmp_path):
    file, other = tmp_path / 'it.jsonl', a_plane()
    rows = PointFile(file, a_plane())
    add(rows, 0)
    rows.close()
    other.about |= {'marks': {'new': [1, 2, 3]}, 'trajectory': []}
    PointFile(file, other).close()
    found = Surface.load(file)
    assert found.marks == {'new': (1, 2, 3)} and found.trajectory.shape == (0, 3) and found.is_measured.sum() == 1


def test_a_file_in_use_is_refused(tmp_path):
    rows = PointFile(tmp_path / 'it.jsonl', a_plane())
    with pytest.raises(InUse):
        PointFile(tmp_path / 'it.jsonl', a_plane())
    rows.close()
    PointFile(tmp_path / 'it.jsonl', a_plane()).close()


def test_a_full_disk_is_a_sentence_that_names_the_file(tmp_path):
    rows = PointFile(tmp_path / 'it.jsonl', a_plane())
    rows.handle.close()
    rows.handle = open('/dev/full', 'wb')
    with pytest.raises(OSError, match='it.jsonl cannot be written: .*No space left'):
        add(rows, 0)
    with pytest.raises(OSError, match='it.jsonl cannot be written: .*No space left'):
        rows.close()  # what could not be written then cannot be now
    PointFile(tmp_path / 'it.jsonl', a_plane()).close()  # it is not locked any more
