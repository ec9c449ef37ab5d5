"""Means, model stock, and how alike updates are, against loops over single numbers."""

import itertools
import math

import pytest
import torch

from fastai_swa.mixing import mean_cosine, mean_of, stock_of, stock_share

NAMES = {'w', 'b', 'scale'}


def weights(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {
        'w': torch.randn(4, 3, generator=g) * scale,
        'b': torch.randn(3, generator=g) * scale,
        'scale': torch.randn((), generator=g) * scale,
        'running_mean': torch.randn(3, generator=g),
        'num_batches_tracked': torch.tensor(7),
    }


def members(n, near=0.5):
    "Weights that lie around those of seed 0, all on one side of them."
    anchor = weights(0)
    common = weights(1)
    res = []
    for i in range(n):
        own = weights(2 + i, near)
        res.append({k: v if k == 'num_batches_tracked' else v + common[k] + own[k] for k, v in anchor.items()})
    return anchor, res


def numbers(t):
    return [float(x) for x in t.double().flatten()]


def slow_mean(tensors):
    columns = zip(*(numbers(t) for t in tensors))
    return [math.fsum(column) / len(tensors) for column in columns]


def slow_cosine(a, b):
    dot = math.fsum(x * y for x, y in zip(a, b))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def slow_updates(anchor, found, name):
    before = numbers(anchor[name])
    return [[x - y for x, y in zip(numbers(m[name]), before)] for m in found]


@pytest.mark.parametrize('n', [1, 2, 5])
def test_the_mean_is_the_mean_of_each_number(n):
    _, found = members(n)
    mean = mean_of(found, found[0])
    for name in ('w', 'b', 'scale', 'running_mean'):
        assert numbers(mean[name]) == pytest.approx(slow_mean([m[name] for m in found]), rel=1e-7)


def test_what_all_members_have_alike_comes_out_bitwise():
    value = weights(3)
    found = [{k: v.clone() for k, v in value.items()} for _ in range(3)]
    assert all(torch.equal(v, value[k]) for k, v in mean_of(found, value).items())


def test_what_has_no_mean_is_the_rests_where_members_differ():
    _, found = members(2)
    rest = dict(found[0], num_batches_tracked=torch.tensor(99))
    assert mean_of(found, rest)['num_batches_tracked'] == 7
    found[1] = dict(found[1], num_batches_tracked=torch.tensor(8))
    assert mean_of(found, rest)['num_batches_tracked'] == 99


@pytest.mark.parametrize('n', [2, 3, 4])
def test_model_stock_is_the_published_formula_for_each_tensor(n):
    anchor, found = members(n)
    stock = stock_of(found, anchor, anchor, NAMES)
    for name in NAMES:
        updates = slow_updates(anchor, found, name)
        pairs = [slow_cosine(a, b) for a, b in itertools.combinations(updates, 2)]
        cosine = math.fsum(pairs) / len(pairs)
        t = min(1, n * cosine / (1 + (n - 1) * cosine)) if cosine > 0 else 0
        mean = slow_mean([m[name] for m in found])
        expected = [t * x + (1 - t) * y for x, y in zip(mean, numbers(anchor[name]))]
        assert numbers(stock[name]) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(stock['running_mean'], mean_of(found, anchor)['running_mean'])


def test_two_members_at_a_right_angle_leave_the_anchor_and_equal_ones_the_mean():
    anchor = {'w': torch.tensor([1.0, 1.0])}
    apart = [{'w': torch.tensor([2.0, 1.0])}, {'w': torch.tensor([1.0, 3.0])}]
    assert torch.equal(stock_of(apart, anchor, anchor, {'w'})['w'], anchor['w'])
    against = [{'w': torch.tensor([2.0, 1.0])}, {'w': torch.tensor([0.0, 1.0])}]
    assert torch.equal(stock_of(against, anchor, anchor, {'w'})['w'], anchor['w'])
    same = [{'w': torch.tensor([2.0, 1.0])}, {'w': torch.tensor([3.0, 1.0])}]
    assert torch.allclose(stock_of(same, anchor, anchor, {'w'})['w'], torch.tensor([2.5, 1.0]))
    # at 60 degrees t = 2 cos / (1 + cos) = 2/3
    slanted = [{'w': torch.tensor([2.0, 1.0])}, {'w': torch.tensor([1.5, 1 + math.sqrt(3) / 2])}]
    expected = torch.tensor([1 + 2 / 3 * 0.75, 1 + 2 / 3 * math.sqrt(3) / 4])
    assert torch.allclose(stock_of(slanted, anchor, anchor, {'w'})['w'], expected)


def test_a_tensor_that_no_member_has_moved_is_the_anchors():
    anchor, found = members(3)
    for m in found:
        m['b'] = anchor['b'].clone()
    stock = stock_of(found, anchor, anchor, NAMES)
    assert torch.equal(stock['b'], anchor['b']) and not torch.equal(stock['w'], anchor['w'])


def test_the_share_of_the_mean_is_within_0_and_1():
    assert [stock_share(c, 3) for c in (-1.0, -0.2, 0.0, 1.0)] == [0, 0, 0, 1]
    assert stock_share(0.5, 2) == pytest.approx(2 / 3)


def test_the_cosine_is_over_all_parameters_and_no_buffer():
    anchor, found = members(3)
    for m in found:
        m['running_mean'] = m['running_mean'] * 1000
    joined = []
    for i in range(3):
        joined.append([x for name in ('w', 'b', 'scale') for x in slow_updates(anchor, found, name)[i]])
    pairs = [slow_cosine(a, b) for a, b in itertools.combinations(joined, 2)]
    assert mean_cosine(found, anchor, NAMES) == pytest.approx(sum(pairs) / 3)
    assert mean_cosine([found[0], anchor], anchor, NAMES) == 0


def test_the_order_of_the_members_does_not_show_in_a_single_bit():
    anchor, found = members(5)
    for order in itertools.islice(itertools.permutations(found), 0, 120, 17):
        for made, again in (
            (mean_of(found, anchor), mean_of(order, anchor)),
            (stock_of(found, anchor, anchor, NAMES), stock_of(list(order), anchor, anchor, NAMES)),
        ):
            assert all(torch.equal(made[k], again[k]) for k in made)
        assert mean_cosine(found, anchor, NAMES) == mean_cosine(list(order), anchor, NAMES)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_sums_are_made_in_float64_and_given_in_the_members_dtype(dtype):
    anchor, found = members(3)
    anchor, *found = ({'w': m['w'].to(dtype)} for m in (anchor, *found))
    mean = mean_of(found, anchor)['w']
    stock = stock_of(found, anchor, anchor, {'w'})['w']
    assert mean.dtype == stock.dtype == dtype
    exact = torch.stack([m['w'].to(torch.complex128) for m in found]).mean(0)
    expected = exact.to(dtype) if dtype.is_complex else exact.real.to(dtype)
    torch.testing.assert_close(mean, expected, rtol=1e-15 if dtype == torch.float64 else 0, atol=0)
