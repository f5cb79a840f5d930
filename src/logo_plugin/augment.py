"""Colour, blur and solarisation of crops, each image with its own recipe, on any device."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
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


def augment(images: Tensor, recipes: Sequence[Recipe] | np.ndarray) -> Tensor:
    """Applies jitter, grayscale, blur and solarisation, in that order, clamping to [0, 255] but not rounding.

    Args:
        images: Crops in [0, 255], (B, C, H, W), uint8 or floating point, on any device. Where C is not 3 recipes
            must leave saturation, hue and gray alone; contrast is about the mean of all channels.
        recipes: One per image, or what `table` makes of them; `box` and `flip` are not looked at.

    Returns:
        (B, C, H, W), float32, in [0, 255].
    """
    x = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    rows = recipes if isinstance(recipes, np.ndarray) else [_row(recipe) for recipe in recipes]
    if len(rows) == 1:
        for function, given in _steps(*rows):
            x = function(x, *given)  # floats are what the CPU kernels are fast with
        return x.expand_as(images)
    groups = [*_groups(np.asarray(rows, dtype=np.float64))]
    indexes = _sent_together([which for _, which, _ in groups], np.int64, x.device)
    values = _sent_together([numbers for *_, numbers in groups], np.float32, x.device)
    for (function, which, numbers), index, flat in zip(groups, indexes, values, strict=True):
        parameters = flat.view(*numbers.shape, 1, 1, 1).unbind()
        if len(which) == len(x):
            x = function(x, *parameters)
        else:
            x[index] = function(x[index], *parameters)
    return x.expand_as(images)


def table(recipes: Sequence[Recipe]) -> np.ndarray:
    """What `augment` reads of recipes, (B, 11), float64: cheap to send to another process, and to group by."""
    return np.array([_row(recipe) for recipe in recipes], dtype=np.float64)


def sent(x: Tensor, device: torch.device | str | int, *, non_blocking: bool = True) -> Tensor:
    """`x.to` without waiting; but not to Apple's devices, which may then read freed memory (pytorch issue 189690)."""
    return x.to(device, non_blocking=non_blocking and torch.device(device).type != "mps")


def _sent_together(arrays: list[np.ndarray], dtype: type[np.generic], device: torch.device) -> Sequence[Tensor]:
    """The arrays' numbers on the device, sent as one: x[index] of a list would wait, and each copy is a call."""
    whole = np.concatenate([np.empty(0), *map(np.ravel, arrays)]).astype(dtype)
    return torch.split(sent(torch.from_numpy(whole), device), [array.size for array in arrays])


def _row(recipe: Recipe) -> tuple[float, ...]:
    return (*recipe[2:6], *recipe.order, recipe.gray, recipe.sigma, recipe.solarize)


def _steps(row: Sequence[float]) -> Iterator[tuple[Callable[..., Tensor], Sequence[float]]]:
    """What one image goes through: each function with its numbers."""
    for operation in map(int, row[4:8]):
        function, identity, numbers = _JITTER[operation]
        if row[operation] != identity:
            yield function, (numbers(float(row[operation])),)
    gray, sigma, solarize = row[8:]
    if gray:
        yield _luma, ()
    if sigma:
        yield _blur, _kernel(sigma)
    if solarize:
        yield _solarize, ()


def _groups(rows: np.ndarray) -> Iterator[tuple[Callable[..., Tensor], np.ndarray, np.ndarray]]:
    """What several go through: each function with the images that it is for, (b,), and its numbers for them, (K, b)."""
    for place, (operation, (function, identity, numbers)) in product(range(4), enumerate(_JITTER)):
        which = np.flatnonzero((rows[:, 4 + place] == operation) & (rows[:, operation] != identity))
        if len(which):
            yield function, which, numbers(rows[which, operation])[None]
    for values, function in zip(rows.T[8:], (_luma, _blur, _solarize), strict=True):
        which = np.flatnonzero(values)
        if len(which):
            yield function, which, _kernels(values[which]) if function is _blur else np.empty((0, len(which)))


def _luma(x: Tensor) -> Tensor:
    r, g, b = x.chunk(3, dim=1)
    return (r * 0.2989).add_(g, alpha=0.587).add_(b, alpha=0.114)  # torchvision's weights


def _blend(x: Tensor, other: Tensor, share: float | Tensor) -> Tensor:
    x.lerp_(other, share)
    # A mean of values in range is in range.
    return x if isinstance(share, float) and share >= 0 else x.clamp_(0, 255)


def _brightness(x: Tensor, factor: float | Tensor) -> Tensor:
    x.mul_(factor)
    return x if isinstance(factor, float) and factor <= 1 else x.clamp_(max=255)


def _contrast(x: Tensor, share: float | Tensor) -> Tensor:
    means = x.mean((2, 3), keepdim=True)
    return _blend(x, _luma(means) if x.shape[1] == 3 else means.mean(1, keepdim=True), share)


def _saturation(x: Tensor, share: float | Tensor) -> Tensor:
    return _blend(x, _luma(x), share)


def _hue(x: Tensor, sextants: float | Tensor) -> Tensor:
    """Turns the hue of HSV; value (high) and chroma stay.

    Free of comparisons, which are slow on the CPU. With a_c = (high - c) / chroma the hue in sextants
    is +-(2 + a_r - a_g - a_b), positive where g >= b; back, a_c is a clamped triangle wave of the hue.
    """
    r, g, b = x.chunk(3, dim=1)
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = torch.sub(high, low, out=low).clamp_min_(torch.finfo(x.dtype).tiny)
    hue = (g + b).sub_(r).sub_(high).div_(chroma).add_(2)
    wave = g - b
    hue.copysign_(wave).add_(sextants)
    hue.sub_(torch.mul(hue, 1 / 6, out=wave).round_(), alpha=6)  # into [-3, 3]
    torch.addcmul(high + chroma, chroma, torch.abs(hue, out=wave).clamp_(1, 2), value=-1, out=r)
    high.sub_(chroma, alpha=2)
    for channel, centre in ((g, -1), (b, 1)):
        torch.addcmul(high, chroma, torch.sub(hue, centre, out=wave).abs_().clamp_(1, 2), out=channel)
    return x


def _solarize(x: Tensor) -> Tensor:
    return torch.where(x >= 128, 255 - x, x)


def blur_radius(sigma: float) -> int:
    """Pixels of the kernel on each side: so many that cutting off the rest moves no pixel by more than 0.5 / 255."""
    return math.ceil(3.29 * sigma - 0.5)


def _kernel(sigma: float) -> list[float]:
    """What pixels 1, 2, ... away from the centre count, relative to it; then what makes the sum over a square 1."""
    weights = [math.exp(-0.5 * (away / sigma) ** 2) for away in range(1, blur_radius(sigma) + 1)]
    return [*weights, (1 + 2 * sum(weights)) ** -2]


def _kernels(sigmas: np.ndarray) -> np.ndarray:
    """The same of many, 0 beyond the radius of each, (K, b): a loop over a large batch would take milliseconds."""
    away = np.arange(1, blur_radius(sigmas.max()) + 1)[:, None]
    weights = np.exp(-0.5 * (away / sigmas) ** 2) * (away <= np.ceil(3.29 * sigmas - 0.5))
    return np.concatenate([weights, (1 + 2 * weights.sum(0, keepdims=True)) ** -2])


def _blur(x: Tensor, *kernel: float | Tensor) -> Tensor:
    """Separable Gaussian with reflected borders, summed over shifted copies."""
    *weights, scale = kernel
    radius = len(weights)
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


# Function, factor that changes nothing, and what the function wants of others.
_JITTER: tuple[tuple[Callable[..., Tensor], float, Callable[[Any], Any]], ...] = (
    (_brightness, 1.0, lambda factor: factor),
    (_contrast, 1.0, lambda factor: 1 - factor),
    (_saturation, 1.0, lambda factor: 1 - factor),
    (_hue, 0.0, lambda turns: 6 * turns),
)
