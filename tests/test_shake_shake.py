"""Shake-Shake: its shifted skip, its random mix forward and backward, against a twin in plain loops."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from fastai_swa import WeightAverage, update_bn
from fastai_swa.vision import ShakeShake

from .reference import shake_shake as twin


def small(seed=0):
    "In float64, with affine parameters and statistics of batch norm that are all of their own."
    torch.manual_seed(seed)
    model = ShakeShake(width=4).double()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.weight.data, m.running_var):
                t.uniform_(0.5, 1.5)
            for t in (m.bias.data, m.running_mean):
                t.normal_(0, 0.3)
    return model


def blocks(model):
    return [m for m in model if hasattr(m, 'branch1')]


def test_a_network_in_evaluation_is_its_twin_with_the_mean_of_the_branches():
    model = small().eval()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
    np.testing.assert_allclose(logits, twin.network(model.state_dict(), x), rtol=1e-9, atol=1e-9)


def test_a_network_in_training_is_its_twin_with_a_share_for_each_image_and_block():
    model = small()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        logits = model(x)
    torch.manual_seed(1)
    shares = np.stack([torch.rand(2, 3)[0].double().numpy() for _ in range(12)])
    np.testing.assert_allclose(logits, twin.network(state, x, shares), rtol=1e-9, atol=1e-9)


def test_the_skip_stands_in_the_first_block_of_each_stage_alone():
    kinds = [type(block.skip).__name__ for block in blocks(ShakeShake(width=4))]
    assert kinds == ['_ShiftedSkip', 'Identity', 'Identity', 'Identity'] * 3
    assert isinstance(blocks(ShakeShake(width=16))[0].skip, nn.Identity)  # channels agree: 16 from the stem


@pytest.mark.parametrize('stride', [1, 2])
def test_the_second_half_of_a_skip_sees_the_image_moved_right_and_down(stride):
    skip = blocks(ShakeShake(width=4))[0 if stride == 1 else 4].skip.eval()
    assert skip.conv1.stride == (stride, stride)
    n_in = skip.conv1.in_channels
    for conv in (skip.conv1, skip.conv2):
        nn.init.ones_(conv.weight)
    x = torch.zeros(1, n_in, 6, 6)
    x[:, 0, 2, 4] = 1.0  # to be seen by the first half
    x[:, 0, 1, 3] = 2.0  # moved to (2, 4)
    x[:, 0, 5, 5] = 3.0  # moved out of the image
    x[:, 0, 4, 2] = -4.0  # nothing after the ReLU
    x[:, 0, 0, 0] = 5.0  # moved to (1, 1), seen without a stride
    with torch.no_grad():
        first, second = skip(x).chunk(2, 1)
    scale = 1 / math.sqrt(1 + 1e-5)
    assert first[0, 0, 2 // stride, 4 // stride] == pytest.approx(scale)
    assert second[0, 0, 2 // stride, 4 // stride] == pytest.approx(2 * scale)
    assert not second[0, 0, 0].any() and not second[0, 0, :, 0].any()  # zeros enter at the top and at the left
    if stride == 1:
        expected = scale * twin.moved_right_and_down(x.clamp_min(0).numpy())[0, 0]
        np.testing.assert_allclose(second[0, 0], expected, rtol=1e-6)
        assert second[0, 0, 1, 1] == pytest.approx(5 * scale)


class Watched:
    "A block's pass forward and backward: what its branches gave, its output, the gradients that they got."

    def __init__(self, block, x, grad=None):
        branches = []
        handles = []
        for branch in (block.branch1, block.branch2):
            handles.append(branch.register_forward_hook(lambda m, args, out: branches.append(out)))
        self.out = block(x)
        for handle in handles:
            handle.remove()
        self.first, self.second = branches
        self.skip = block.skip(x)
        self.grad = torch.randn_like(self.out) if grad is None else grad
        self.grads = torch.autograd.grad(self.out, branches, self.grad, retain_graph=True)

    def shares(self):
        "Of each image, forward and backward, by least squares, which must leave nothing."
        forward = ratio(self.out - self.skip - self.second, self.first - self.second)
        backward = ratio(self.grads[0], self.grad)
        return forward, backward


def ratio(a, b):
    "(n): how many times `b` each image of `a` is."
    a, b = a.detach().flatten(1), b.detach().flatten(1)
    res = (a * b).sum(1) / (b * b).sum(1)
    torch.testing.assert_close(a, res[:, None] * b, rtol=1e-9, atol=1e-9)
    return res


def watched(n=64, seed=0, which=1):
    model = small()
    block = blocks(model)[which]
    torch.manual_seed(seed)
    return Watched(block, torch.randn(n, block.branch1[1].in_channels, 4, 4, dtype=torch.float64))


@pytest.mark.parametrize('which', [0, 1, 4])
def test_the_gradient_is_shared_out_by_a_share_of_its_own_for_each_image(which):
    found = watched(which=which)
    forward, backward = found.shares()
    for share in (forward, backward):
        assert len(share.unique()) == 64 and 0 <= share.min() and share.max() < 1
    assert not (forward - backward).abs().lt(1e-3).any()
    torch.testing.assert_close(found.grads[1], (1 - backward)[:, None, None, None] * found.grad, rtol=1e-9, atol=1e-9)


def test_the_parameters_get_the_gradient_of_a_block_that_mixes_by_the_backward_shares():
    found = watched(n=8)
    block = blocks(small())[1]
    torch.manual_seed(0)
    x = torch.randn(8, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    block(x).backward(found.grad)
    torch.manual_seed(3)
    b = torch.rand(2, 8)[1].double()[:, None, None, None]
    x_plain = x.detach().clone().requires_grad_()
    plain = copy.deepcopy(block)
    plain.zero_grad()
    mixed = x_plain + b * plain.branch1(x_plain) + (1 - b) * plain.branch2(x_plain)
    mixed.backward(found.grad)
    torch.testing.assert_close(x.grad, x_plain.grad)
    for p, q in zip(block.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_shares_are_uniform_and_independent_forward_and_backward_of_images_and_blocks():
    model = small()
    torch.manual_seed(0)
    x = torch.randn(400, 4, 4, 4, dtype=torch.float64)
    drawn = torch.cat([torch.stack(Watched(block, x).shares()) for block in blocks(model)[1:4]])  # (6, 400)
    for share in drawn:
        assert stats.kstest(share.numpy(), 'uniform').pvalue > 1e-3
    correlations = torch.corrcoef(drawn) - torch.eye(6)
    assert correlations.abs().max() < 4 / math.sqrt(400)


def test_evaluation_draws_nothing_and_has_the_gradient_of_the_mean():
    block = blocks(small().eval())[1]
    x = torch.randn(4, 4, 4, 4, dtype=torch.float64)
    before = torch.get_rng_state()
    found = Watched(block, x, torch.ones(4, 4, 4, 4, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), before)
    forward, backward = found.shares()
    torch.testing.assert_close(forward, torch.full((4,), 0.5, dtype=torch.float64))
    assert torch.equal(backward, torch.full((4,), 0.5, dtype=torch.float64))


def test_draws_are_from_torchs_generator_and_a_state_put_back_gives_them_again():
    model = small()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    state = torch.get_rng_state()

    def step():
        model.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return [loss.detach()] + [p.grad.clone() for p in model.parameters()]

    one, two = step(), step()
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(one, step()))
    assert not torch.equal(one[0], two[0])


def test_convolutions_start_with_the_papers_deviation_and_the_last_layer_without_bias():
    torch.manual_seed(0)
    model = ShakeShake(width=32)
    by_size = {}
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            std = math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels))
            by_size.setdefault(m.kernel_size[0], []).append((m.weight.detach() / std).flatten())
            assert m.bias is None
    assert by_size.keys() == {1, 3}
    for parts in by_size.values():
        assert stats.kstest(torch.cat(parts)[:20_000].numpy(), 'norm').pvalue > 1e-3
    assert not model[-1].bias.any()


@pytest.mark.parametrize('width', [0, 1, 33, -2])
def test_a_width_that_cannot_be_halved_is_one_sentence(width):
    with pytest.raises(ValueError, match=f'width must be positive and even.* not {width}'):
        ShakeShake(width=width)


@pytest.mark.parametrize('make', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['copied', 'pickled'])
def test_a_copy_is_the_same_network(make):
    model = ShakeShake(width=4)
    other = make(model)
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(0)
    assert torch.equal(y, other(x))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}


def test_it_is_averaged_and_its_batch_norm_refreshed_without_a_draw():
    torch.manual_seed(0)
    model = ShakeShake(width=4)
    average = WeightAverage(model)
    points = []
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        average.update(model)
        points.append([p.detach().double().clone() for p in model.parameters()])
    for p, *ts in zip(average.swa_model.parameters(), *points):
        torch.testing.assert_close(p.double(), torch.stack(ts).mean(0), rtol=1e-5, atol=1e-7)
    batches = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    before = torch.get_rng_state()
    update_bn(batches, average.swa_model)
    assert torch.equal(before, torch.get_rng_state())  # the branches' mean, as where it is used
    assert all(torch.isfinite(b).all() for b in average.swa_model.buffers())


def test_channels_last_stays_so_from_the_first_layer_to_the_last():
    torch.manual_seed(0)
    model = ShakeShake(width=8)
    x = torch.randn(4, 3, 32, 32)
    state = torch.get_rng_state()
    y = model(x)
    torch.set_rng_state(state)
    model = model.to(memory_format=torch.channels_last)
    seen = []
    for m in blocks(model):
        m.register_forward_hook(lambda m, args, out: seen.append(out.is_contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), y, rtol=1e-3, atol=1e-4)
    assert seen == [True] * 12


def test_in_bf16_autocast_what_is_added_stays_in_bf16():
    torch.manual_seed(0)
    model = ShakeShake(width=8)
    seen = set()
    for m in blocks(model):
        m.register_forward_hook(lambda m, args, out: seen.add(out.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        model(torch.randn(4, 3, 32, 32)).float().sum().backward()
    assert seen == {torch.bfloat16}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
