"""A slow twin of Shake-Shake-26 (Gastaldi 2017): loops over pixels, in float64, on a state dict's arrays."""

import numpy as np


def network(state: dict, x, shares=None):
    """Logits (n, classes) of images `x` (n, 3, h, w). `shares` (12, n): what each of the 12 blocks takes of its first
    branch for each image, with batch norm by the batch; `None`: evaluation, the mean, by the running statistics.
    """
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in state.items()}
    is_training = shares is not None
    x = batch_norm(arrays, '1', convolution(np.asarray(x, dtype=np.float64), arrays['0.weight'], 1), is_training)
    for i in range(12):
        stride = 2 if i in (4, 8) else 1
        share = shares[i] if is_training else [0.5] * len(x)
        x = block(arrays, str(2 + i), x, stride, share, is_training)
    means = np.maximum(x, 0).mean((2, 3))
    return means @ arrays['17.weight'].T + arrays['17.bias']


def block(arrays, name, x, stride, share, is_training):
    first = branch(arrays, f'{name}.branch1', x, stride, is_training)
    second = branch(arrays, f'{name}.branch2', x, stride, is_training)
    skip = x
    if f'{name}.skip.bn.weight' in arrays:
        skip = shifted_skip(arrays, f'{name}.skip', x, stride, is_training)
    res = np.empty_like(first)
    for image in range(len(x)):
        res[image] = skip[image] + share[image] * first[image] + (1 - share[image]) * second[image]
    return res


def branch(arrays, name, x, stride, is_training):
    y = convolution(np.maximum(x, 0), arrays[f'{name}.1.weight'], stride)
    y = np.maximum(batch_norm(arrays, f'{name}.2', y, is_training), 0)
    return batch_norm(arrays, f'{name}.5', convolution(y, arrays[f'{name}.4.weight'], 1), is_training)


def shifted_skip(arrays, name, x, stride, is_training):
    x = np.maximum(x, 0)
    plain = convolution(every(x, stride), arrays[f'{name}.conv1.weight'], 1)
    moved = convolution(every(moved_right_and_down(x), stride), arrays[f'{name}.conv2.weight'], 1)
    return batch_norm(arrays, f'{name}.bn', np.concatenate([plain, moved], 1), is_training)


def moved_right_and_down(x):
    "Pixel (row, column) goes to (row + 1, column + 1); what leaves the image is lost, what enters is 0."
    res = np.zeros_like(x)
    for row in range(x.shape[2] - 1):
        for column in range(x.shape[3] - 1):
            res[:, :, row + 1, column + 1] = x[:, :, row, column]
    return res


def every(x, stride):
    return x[:, :, ::stride, ::stride]


def convolution(x, weight, stride):
    "Of odd size k, with zeros around, so that stride 1 keeps the size."
    n, _, height, width = x.shape
    k = weight.shape[2]
    pad = k // 2
    padded = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    res = np.empty((n, len(weight), -(-height // stride), -(-width // stride)))
    for row in range(res.shape[2]):
        for column in range(res.shape[3]):
            top = row * stride
            left = column * stride
            window = padded[:, :, top : top + k, left : left + k]
            res[:, :, row, column] = window.reshape(n, -1) @ weight.reshape(len(weight), -1).T
    return res


def batch_norm(arrays, name, x, is_training):
    res = np.empty_like(x)
    for channel in range(x.shape[1]):
        values = x[:, channel]
        mean = values.mean() if is_training else arrays[f'{name}.running_mean'][channel]
        var = values.var() if is_training else arrays[f'{name}.running_var'][channel]
        scale = arrays[f'{name}.weight'][channel] / np.sqrt(var + 1e-5)
        res[:, channel] = (values - mean) * scale + arrays[f'{name}.bias'][channel]
    return res
