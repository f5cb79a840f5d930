"""Colour, blur and solarisation of crops, each image with its own recipe, on any device."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Recipe(NamedTuple):
    """What was drawn for one view; the defaults change nothing.

    Attributes:
        box: (left, top, right, bottom) in pixels of the source image.
        flip: Whether the view is mirrored.
        brightness: Factor, >= 0.
        contrast: Factor, >= 0.
        saturation: Factor, >= 0.
        hue: Shift in full turns, in [-0.5, 0.5].
        order: Order of those four, 0 brightness to 3 hue.
        gray: Whether the view becomes gray.
        sigma: Standard deviation of the blur in pixels of the view, 0 for none.
        solarize: Whether pixels >= 128 are inverted.
    """

    box: tuple[int, int, int, int]
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    order: tuple[int, ...] = (0, 1, 2, 3)
    gray: bool = False
    sigma: float = 0.0
    solarize: bool = False


def augment(images: Tensor, recipes: Sequence[Recipe]) -> Tensor:
    """Applies jitter, grayscale, blur and solarisation, in that order, clamping to [0, 255] but not rounding.

    Args:
        images: Crops in [0, 255], (B, C, H, W), uint8 or floating point, on any device. Where C is not 3 recipes
            must leave saturation, hue and gray alone; contrast is about the mean of all channels.
        recipes: One per image; `box` and `flip` are not looked at.

    Returns:
        (B, C, H, W), float32, in [0, 255].
    """
    x = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    for step in range(4):
        for operation in {recipe.order[step] for recipe in recipes}:
            function, name, identity = _JITTER[operation]
            values = [getattr(recipe, name) if recipe.order[step] == operation else identity for recipe in recipes]
            x = _apply(function, x, values, identity)
    x = _apply(_grayscale, x, [recipe.gray for recipe in recipes], False)
    x = _apply(_blur, x, [recipe.sigma for recipe in recipes], 0.0)
    x = _apply(_solarize, x, [recipe.solarize for recipe in recipes], False)
    return x.expand_as(images)


def sent(x: Tensor, device: torch.device | str | int, *, non_blocking: bool = True) -> Tensor:
    """`x.to` without waiting; but not to Apple's devices, which may then read freed memory (pytorch issue 189690)."""
    return x.to(device, non_blocking=non_blocking and torch.device(device).type != "mps")


def _apply(
    function: Callable[[Tensor, list[float]], Tensor], x: Tensor, values: list[float], identity: float
) -> Tensor:
    """Runs an operation, which may work in place, on the images whose value is not the identity."""
    index = [i for i, value in enumerate(values) if value != identity]
    if len(index) == len(values):
        return function(x, values)
    if index:
        at = sent(torch.tensor(index), x.device)  # x[index] would wait
        x[at] = function(x[at], [values[i] for i in index])
    return x


def _parameters(rows: Sequence[Sequence[float]], x: Tensor) -> Sequence[float | Tensor]:
    """Of each row, floats for one image, which is what the CPU kernels are fast with; (B, 1, 1, 1) for several."""
    if len(rows[0]) == 1:
        return [row[0] for row in rows]
    return sent(torch.tensor(rows), x.device)[:, :, None, None, None].unbind()


def _parameter(values: Sequence[float], x: Tensor) -> float | Tensor:
    return _parameters([values], x)[0]


def _luma(x: Tensor) -> Tensor:
    r, g, b = x.chunk(3, dim=1)
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)  # torchvision's weights


def _blend(x: Tensor, other: Tensor, factors: list[float]) -> Tensor:
    x.lerp_(other, _parameter([1 - factor for factor in factors], x))
    # Up to 1 it is a mean of values in range.
    return x if max(factors) <= 1 else x.clamp_(0, 255)


def _brightness(x: Tensor, factors: list[float]) -> Tensor:
    x.mul_(_parameter(factors, x))
    return x if max(factors) <= 1 else x.clamp_(max=255)


def _contrast(x: Tensor, factors: list[float]) -> Tensor:
    means = x.mean((2, 3), keepdim=True)
    return _blend(x, _luma(means) if x.shape[1] == 3 else means.mean(1, keepdim=True), factors)


def _saturation(x: Tensor, factors: list[float]) -> Tensor:
    return _blend(x, _luma(x), factors)


def _hue(x: Tensor, shifts: list[float]) -> Tensor:
    """Turns the hue of HSV; value (high) and chroma stay.

    Free of comparisons, which are slow on the CPU. With a_c = (high - c) / chroma the hue in sextants
    is +-(2 + a_r - a_g - a_b), positive where g >= b; back, a_c is a clamped triangle wave of the hue.
    """
    r, g, b = x.chunk(3, dim=1)
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = torch.sub(high, low, out=low).clamp_min_(torch.finfo(x.dtype).tiny)
    hue = (g + b).sub_(r).sub_(high).div_(chroma).add_(2)
    wave = g - b
    hue.copysign_(wave).add_(_parameter([6 * shift for shift in shifts], x))
    hue.sub_(torch.mul(hue, 1 / 6, out=wave).round_(), alpha=6)  # into [-3, 3]
    torch.addcmul(high + chroma, chroma, torch.abs(hue, out=wave).clamp_(1, 2), value=-1, out=r)
    high.sub_(chroma, alpha=2)
    for channel, centre in ((g, -1), (b, 1)):
        torch.addcmul(high, chroma, torch.sub(hue, centre, out=wave).abs_().clamp_(1, 2), out=channel)
    return x


def _grayscale(x: Tensor, _: list[float]) -> Tensor:
    return _luma(x)


def _solarize(x: Tensor, _: list[float]) -> Tensor:
    return torch.where(x >= 128, 255 - x, x)


def blur_radius(sigma: float) -> int:
    """Pixels of the kernel on each side: so many that cutting off the rest moves no pixel by more than 0.5 / 255."""
    return math.ceil(3.29 * sigma - 0.5)


def _blur(x: Tensor, sigmas: list[float]) -> Tensor:
    """Separable Gaussian with reflected borders, summed over shifted copies."""
    radii = [blur_radius(sigma) for sigma in sigmas]
    radius = max(radii)
    # Relative to the centre's; the sum is divided out at the end.
    kernels = [
        [math.exp(-0.5 * (i / sigma) ** 2) if i <= r else 0.0 for i in range(radius + 1)]
        for sigma, r in zip(sigmas, radii, strict=True)
    ]
    rows = [[kernel[i] for kernel in kernels] for i in range(1, radius + 1)]
    *weights, scale = _parameters([*rows, [(2 * sum(kernel) - 1) ** -2 for kernel in kernels]], x)
    height, width = x.shape[2:]
    x = F.pad(x, (radius,) * 4, mode="reflect")
    for dim, size in ((2, height), (3, width)):
        shifted = x.unfold(dim, size, 1).movedim(-1, dim + 1).unbind(dim)
        x, out = shifted[radius], torch.empty_like(shifted[radius], memory_format=torch.contiguous_format)
        for i, weight in enumerate(weights, 1):
            for copy in (shifted[radius - i], shifted[radius + i]):
                if isinstance(weight, Tensor):
                    x = torch.addcmul(x, copy, weight, out=out)
                else:
                    x = torch.add(x, copy, alpha=weight, out=out)
    return x.mul_(scale)


_JITTER = (
    (_brightness, "brightness", 1.0),
    (_contrast, "contrast", 1.0),
    (_saturation, "saturation", 1.0),
    (_hue, "hue", 0.0),
)
