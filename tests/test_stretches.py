"""The means of stretches: merged, written, read, summed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastai_swa.stretches import FoldersIndex, Stretches, read_history, remains
from fastai_swa.weightings import Cuts, Segment


def stretches(folder=None, n_segments=4, n_epoch=100, dtype=None):
    return Stretches(Cuts(n_segments, n_epoch, 1000), folder, dtype)


ID = '0123456789abcdef'


def index_of(**kwargs):
    return FoldersIndex(ID, 1, 4, 100, **kwargs)


def filled(folder=None, lengths=(3, 2, 5), **kwargs):
    "Segments of random points; and all the points."
    res, points = stretches(folder, **kwargs), []
    g = torch.Generator().manual_seed(0)
    for n in lengths:
        new = torch.randn(n, 7, generator=g)
        points.append(new)
        res.add(Segment(n, 1.0), {'w': new.double().mean(0).float()})
    return res, torch.cat(points).double()


def test_merged_segments_hold_the_mean_of_all_their_points():
    s, points = filled(lengths=(3, 2, 5, 1, 4, 6, 2), n_segments=4)
    assert len(s.segments) == 4 and s.n_points == len(points)
    start = 0
    for segment, end in zip(s.segments, s.ends):
        torch.testing.assert_close(s.mean_of(segment)['w'].double(), points[start:end].mean(0), rtol=1e-6, atol=1e-7)
        start = end


def test_the_pair_that_is_wanted_least_is_merged():
    s = stretches(n_segments=4)
    for wanted in (1.0, 0.3, 0.2, 1.0, 1.0):
        s.add(Segment(1, wanted), {'w': torch.ones(1)})
    assert [x.n for x in s.segments] == [1, 2, 1, 1]


def test_an_average_is_the_sum_of_means_times_shares_in_float64():
    s, _ = filled()
    shares = np.array([0.2, 0.5, 0.3])
    got, lost = s.average(shares, {'w': torch.float64})
    want = sum(c * m.mean['w'].double() for c, m in zip(shares, s.segments))
    assert lost == 0
    torch.testing.assert_close(got['w'], want.float().double(), rtol=0, atol=0)


def test_what_was_not_finite_is_left_out_and_the_rest_scaled_up():
    s, _ = filled()
    s.add(Segment(10, 1.0), None)
    got, lost = s.average(np.array([0, 0, 0.25, 0.75]), {})
    assert lost == 0.75 and torch.equal(got['w'], s.segments[2].mean['w'])
    with pytest.raises(ValueError, match='were not finite: there is nothing to average'):
        s.average(np.array([0, 0, 0, 1.0]), {})


def test_a_lost_segment_that_is_merged_leaves_the_other_one():
    s = stretches(n_segments=4)
    s.add(Segment(1, 0.1), {'w': torch.ones(1)})
    s.add(Segment(1, 0.1), None)
    for _ in range(3):
        s.add(Segment(1, 1.0), {'w': torch.zeros(1)})
    assert s.segments[0].n == 2 and not s.segments[0].is_lost and torch.equal(s.segments[0].mean['w'], torch.ones(1))


def test_a_folder_holds_each_mean_in_a_file_and_reads_back(tmp_path):
    s, _ = filled(tmp_path)
    before = [x.mean['w'] for x in s.segments]
    s.write()
    index_of(n_steps=10, epochs=[[0, 10]]).write(s)
    assert all(x.mean is None for x in s.segments)
    index, again = read_history(tmp_path)
    assert index.id == ID and index.epochs == [[0, 10]] and again.ends.tolist() == [3, 5, 10]
    for segment, mean in zip(again.segments, before):
        assert torch.equal(again.mean_of(segment)['w'], mean)


def test_a_smaller_dtype_halves_the_files(tmp_path):
    s, _ = filled(tmp_path, dtype=torch.bfloat16)
    s.write()
    assert s.mean_of(s.segments[0])['w'].dtype is torch.bfloat16


def test_files_of_merged_segments_go_but_those_that_a_checkpoint_names(tmp_path):
    s, _ = filled(tmp_path, lengths=(1, 1, 1, 1))
    s.write()
    s.add(Segment(1, 1.0), {'w': torch.ones(7)})
    s.write()
    assert s.superseded == ['segment-0001.pth', 'segment-0002.pth']
    s.remove_superseded(but=['segment-0002.pth'])
    assert not (tmp_path / 'segment-0001.pth').exists() and (tmp_path / 'segment-0002.pth').exists()
    s.remove_superseded()
    assert {f.name for f in tmp_path.glob('*.pth')} == {x.file for x in s.segments}


def test_a_name_is_not_given_twice_so_that_a_file_that_a_checkpoint_names_is_never_overwritten(tmp_path):
    s, _ = filled(tmp_path, lengths=(1,) * 4)
    s.write()
    names = {x.file for x in s.segments}
    for _ in range(5):
        s.add(Segment(1, 1.0), {'w': torch.ones(7)})
        s.write()
        new = {x.file for x in s.segments} - names
        assert not new & names
        names |= new


def test_a_damaged_segment_is_named_and_the_others_stay_usable(tmp_path):
    s, _ = filled(tmp_path)
    s.write()
    file = tmp_path / s.segments[1].file
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match='segment-0002.pth is damaged'):
        s.average(np.array([0, 1.0, 0]), {})
    s.average(np.array([0.5, 0, 0.5]), {})
    file.unlink()
    with pytest.raises(FileNotFoundError, match='segment-0002.pth is missing'):
        s.average(np.array([0, 1.0, 0]), {})


@pytest.mark.parametrize(
    'change',
    [
        lambda c: c | {'format': 'fastai_swa ensemble 1'},
        lambda c: c | {'segments': [c['segments'][0] | {'file': '../outside.pth'}]},
        lambda c: c | {'segments': [c['segments'][0] | {'file': '/tmp/outside.pth'}]},
        lambda c: c | {'segments': [c['segments'][0] | {'n': True}]},
        lambda c: c | {'segments': 3},
        lambda c: c | {'segments': [c['segments'][0], c['segments'][0]]},
        lambda c: c | {'segments': [c['segments'][0] | {'file': 'index.json'}]},
        lambda c: c | {'segments': [c['segments'][0] | {'sha256': None}]},
        lambda c: c | {'segments': [c['segments'][0] | {'wanted': float('nan')}]},
        lambda c: c | {'epochs': [[0, 5], [1, 3]]},
        lambda c: c | {'epochs': [[0, 5.5]]},
        lambda c: c | {'taken': [1, 1]},
        lambda c: c | {'last': 'last.pth'},
        lambda c: c | {'id': '../elsewhere'},
        lambda c: c | {'every': 0},
        lambda c: c | {'n_epoch': 'many'},
        lambda c: {k: v for k, v in c.items() if k != 'id'},
        lambda c: [],
    ],
)
def test_an_index_that_is_none_is_refused_in_one_sentence(tmp_path, change):
    s, _ = filled(tmp_path)
    s.write()
    index_of().write(s)
    file = tmp_path / 'index.json'
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match='index.json is damaged, or it is no index of a WeightHistory'):
        read_history(tmp_path)


def test_json_nested_too_deep_is_refused(tmp_path):
    (tmp_path / 'index.json').write_text('[' * 100_000)
    with pytest.raises(ValueError, match='is damaged'):
        read_history(tmp_path)


def test_what_a_folder_holds_is_known_before_anything_is_written(tmp_path):
    assert remains(tmp_path / 'none').files == []
    s, _ = filled(tmp_path)
    s.write()
    (tmp_path / 'mine.txt').write_text('')
    there = remains(tmp_path)
    assert there.id is None and len(there.files) == 3
    index_of().write(s)
    assert remains(tmp_path).id == ID
    remains(tmp_path).remove(tmp_path)
    assert [f.name for f in Path(tmp_path).iterdir()] == ['mine.txt']


def test_a_state_puts_all_back_and_says_which_file_is_missing(tmp_path):
    s, _ = filled(tmp_path)
    s.write()
    s.add(Segment(2, 1.0), {'w': torch.ones(7)})
    again = stretches(tmp_path)
    again.load_state_dict(s.state_dict())
    shares = np.full(4, 0.25)
    assert torch.equal(again.average(shares, {})[0]['w'], s.average(shares, {})[0]['w'])
    (tmp_path / 'segment-0002.pth').unlink()
    with pytest.raises(ValueError, match='segment-0002.pth is missing: this fit wrote it'):
        stretches(tmp_path).load_state_dict(s.state_dict())
