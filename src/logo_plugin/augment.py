"""Colour, blur and solarisation of a batch of crops, each image with its own parameters, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDER = slice(4, 8)
GRAY, SIGMA, SOLARIZE = 8, 9, 10
IDENTITY = (1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 0.0)
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights


def augment(images: Tensor, recipes: Tensor) -> Tensor:
    """Applies jitter, grayscale, blur and solarisation, in that order.

    Args:
        images: Crops in [0, 255], (B, 3, H, W), uint8 or floating point, on any device.
        recipes: Parameters per image on the CPU, (B, 11) as `IDENTITY` lists them: factors of
            brightness, contrast and saturation, hue shift in turns, the order of those four,
            grayscale (0 or 1), sigma of the blur in pixels (0 for none), solarisation (0 or 1).

    Returns:
        (B, 3, H, W), float32, in [0, 255], not rounded.
    """
    x = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for step in range(4):
        operation = recipes[:, 4 + step]
        for index, (function, identity) in enumerate(_JITTER):
            factors = recipes[:, index]
            _apply(function, x, (operation == index) & (factors != identity), factors)
    _apply(_grayscale, x, recipes[:, GRAY] > 0)
    _apply(_blur, x, recipes[:, SIGMA] > 0, recipes[:, SIGMA])
    _apply(_solarize, x, recipes[:, SOLARIZE] > 0)
    return x


def _apply(function, x, rows, *parameters):
    """Replaces the chosen rows of x."""
    if not rows.any():
        return
    if rows.all():
        x.copy_(function(x, *parameters))
    else:
        index = rows.nonzero().squeeze(1)
        parameters = [p[index] for p in parameters]
        index = index.to(x.device)
        x[index] = function(x[index], *parameters)


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x.device, x.dtype).view(-1, 1, 1, 1)


def _luma(x: Tensor) -> Tensor:
    r, g, b = x.split(1, dim=1)
    return (r * _LUMA[0]).add_(g, alpha=_LUMA[1]).add_(b, alpha=_LUMA[2])


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * _per_image(factor, x)).clamp_(max=255)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    factor = _per_image(factor, x)
    return (x * factor).add_((1 - factor) * _luma(x.mean((2, 3), keepdim=True))).clamp_(0, 255)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    factor = _per_image(factor, x)
    return (x * factor).add_(_luma(x).mul_(1 - factor)).clamp_(0, 255)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue of HSV; value and chroma stay."""
    r, g, b = x.split(1, dim=1)
    high = torch.maximum(torch.maximum(r, g), b)
    chroma = high - torch.minimum(torch.minimum(r, g), b)
    red, green = r == high, g == high
    # Sextants: 0 red, 2 green, 4 blue.
    hue = torch.where(red, g - b, torch.where(green, b - r, r - g))
    hue.div_(chroma.clamp_min(torch.finfo(x.dtype).tiny))
    hue.add_(torch.where(red, 0.0, torch.where(green, 2.0, 4.0))).add_(_per_image(6 * shift, x))
    hue.sub_((hue / 6).floor_(), alpha=6)
    red = 2 - (hue - 3).abs_()
    green = (hue - 2).abs_() - 1
    blue = (hue - 4).abs_() - 1
    return torch.addcmul(high, chroma, torch.cat([red, green, blue], dim=1).clamp_(0, 1), value=-1)


def _grayscale(x: Tensor) -> Tensor:
    return _luma(x).expand_as(x)


def _solarize(x: Tensor) -> Tensor:
    return torch.where(x >= 128, 255 - x, x)


def blur_radius(sigma: float) -> int:
    """Pixels on each side of the kernel: what lies beyond weighs less than 0.1 %."""
    return int(3 * sigma + 0.999)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian with reflected borders, summed over shifted copies."""
    radii = (3 * sigma).ceil().clamp_min(1)
    radius = int(radii.max())
    offsets = torch.arange(radius + 1)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2) * (offsets <= radii[:, None])
    weights /= 2 * weights.sum(1, keepdim=True) - weights[:, :1]
    for dim in (2, 3):
        size = x.shape[dim]
        padded = F.pad(x, (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius), mode="reflect")
        x = padded.narrow(dim, radius, size) * _per_image(weights[:, 0], x)
        for offset in range(1, radius + 1):
            pair = padded.narrow(dim, radius - offset, size) + padded.narrow(dim, radius + offset, size)
            x.addcmul_(pair, _per_image(weights[:, offset], x))
    return x


_JITTER = ((_brightness, 1.0), (_contrast, 1.0), (_saturation, 1.0), (_hue, 0.0))
