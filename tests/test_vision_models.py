"""The papers' networks."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastai_swa.vision import VGG16, PreResNet, ShakeShake, SmallPreResNet, WideResNet


@pytest.mark.parametrize(
    'make, n',
    [
        (VGG16, 15_245_130),
        (lambda: VGG16(batch_norm=True), 15_253_578),
        (lambda: PreResNet(110), 1_146_842),
        (lambda: PreResNet(164), 1_703_258),
        (lambda: WideResNet(28, 10), 36_489_290),
        (SmallPreResNet, 174_490),
        (lambda: SmallPreResNet(100, 32), 320_548),
        (ShakeShake, 11_653_978),
        (lambda: ShakeShake(width=32), 2_923_162),
    ],
)
def test_parameter_counts_are_the_published_ones(make, n):
    with torch.device('meta'):
        model = make()
    assert sum(p.numel() for p in model.parameters()) == n


NETS = {
    'vgg16': VGG16,
    'vgg16 with batch norm': lambda n_out=10: VGG16(n_out, batch_norm=True),
    'preresnet': lambda n_out=10: PreResNet(29, n_out),
    'small preresnet': SmallPreResNet,
    'wide resnet': lambda n_out=10: WideResNet(16, 2, n_out),
    'shake-shake': lambda n_out=10: ShakeShake(n_out, 8),
}


@pytest.mark.parametrize('name', NETS)
def test_every_convolution_batch_norm_and_linear_layer_runs_once_in_a_forward_pass(name):
    model, ran = NETS[name](), []
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)]
    for m in layers:
        m.register_forward_hook(lambda m, *_: ran.append(m))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(ran) == len(layers) and set(ran) == set(layers)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('n_out', [10, 100])
def test_logits_have_a_row_an_image_and_a_column_a_class(name, n_out):
    assert NETS[name](n_out)(torch.randn(3, 3, 32, 32)).shape == (3, n_out)


@pytest.mark.parametrize('name', ['vgg16', 'preresnet', 'small preresnet', 'shake-shake'])
def test_convolutions_start_as_the_recipe_says(name):
    torch.manual_seed(0)
    for m in NETS[name]().modules():
        if isinstance(m, nn.Conv2d):
            std = math.sqrt(2 / (m.kernel_size[0] * m.kernel_size[1] * m.out_channels))
            assert m.weight.std().item() == pytest.approx(std, rel=6 / math.sqrt(2 * m.weight.numel())) and abs(
                m.weight.mean()
            ) < 6 * std / math.sqrt(m.weight.numel())
            assert m.bias is None or not m.bias.any()


def test_a_wide_resnet_starts_as_pytorch_does_and_its_last_batch_norm_moves_fast():
    torch.manual_seed(0)
    model = WideResNet(16, 2)
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert conv.weight.abs().max() <= 1 / math.sqrt(27) and conv.bias.any()
    assert [m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)] == [0.1] * 12 + [0.9]


def test_a_bottleneck_is_the_papers_formula():
    torch.manual_seed(0)
    block = PreResNet(20)[1].eval()
    x = torch.randn(2, 16, 8, 8)
    y = block.conv1(F.relu(block.bn1(x)))
    y = block.conv2(F.relu(block.bn2(y)))
    assert torch.equal(block(x), block.conv3(F.relu(block.bn3(y))) + F.conv2d(x, block.shortcut.weight))


def test_vgg16s_layers_are_those_of_configuration_d():
    widths = [m.out_channels for m in VGG16().modules() if isinstance(m, nn.Conv2d)]
    assert (
        widths == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
        and sum(isinstance(m, nn.MaxPool2d) for m in VGG16().modules()) == 5
    )
    assert [m.p for m in VGG16().modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


@pytest.mark.parametrize('make', [lambda: PreResNet(112), lambda: PreResNet(2), lambda: WideResNet(27)])
def test_a_depth_that_does_not_exist_is_one_sentence(make):
    with pytest.raises(ValueError, match='depth must be'):
        make()
