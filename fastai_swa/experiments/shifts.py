"""Images as they are not trained on: blurred, or with noise. Pure functions of uint8 tensors (n, c, h, w)."""

import torch
from torchvision.transforms.functional import gaussian_blur

__all__ = ['SHIFTS', 'shifted']

SHIFTS = 'blurred', 'noisy'


def shifted(images: torch.Tensor, how: str, blur: float, noise: float) -> torch.Tensor:
    """`images` after one of the `SHIFTS`: a Gaussian blur with standard deviation `blur`, in pixels; or with
    independent Gaussian noise of standard deviation `noise`, in units of the full range, always the same.
    """
    if how == 'blurred':
        reach = int(3 * blur + 0.5)
        return gaussian_blur(images, [2 * reach + 1] * 2, [blur] * 2)
    rng = torch.Generator().manual_seed(0)
    res = torch.empty_like(images)
    for part, out in zip(images.split(256), res.split(256)):  # little memory
        drawn = torch.randn(part.shape, generator=rng)
        out.copy_((part + 255 * noise * drawn).round().clamp(0, 255))
    return res
