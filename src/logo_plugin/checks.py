"""What arguments must be, and the messages when they are not."""

import difflib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec

import torch
from torch import Tensor

Views = Tensor | Sequence[Tensor]
P = ParamSpec("P")


def as_views(name: str, value: Views | None) -> list[Tensor]:
    """The views of (V, N, D) or of V tensors (N, D); ValueError if it is neither, or empty in N or D."""
    if isinstance(value, Tensor) and value.ndim != 3:
        raise ValueError(f"{name} must have shape (V, N, D) or be V tensors (N, D), got a tensor {tuple(value.shape)}.")
    if value is None or not isinstance(value, (Tensor, list, tuple)):
        raise ValueError(f"{name} must be a tensor (V, N, D) or V tensors (N, D), got {type(value).__name__}.")
    views = list(value.unbind(0)) if isinstance(value, Tensor) else list(value)
    for view in views:
        if (
            not isinstance(view, Tensor)
            or view.ndim != 2
            or view.shape != views[0].shape
            or not view.is_floating_point()
        ):
            raise ValueError(f"{name} must be floating-point views of one shape (N, D), got {shapes(views)}.")
    if views and not views[0].numel():
        raise ValueError(f"{name} needs at least one image and one feature, got {shapes(views)}; skip empty batches.")
    return views


def views_alone(name: str, views: Any) -> None:
    """TypeError if what should be the views of a batch is the whole batch."""
    if not all(isinstance(view, Tensor) for view in views):
        got = ", ".join(type(item).__name__ for item in views)
        raise TypeError(
            f"{name} takes a list of views (N, C, H, W), got [{got}]. In a batch of MultiCropCollate's it is the first "
            "item, batch[0]."
        )


def refuse_replica(model: Any, lost: str) -> None:
    """RuntimeError for nn.DataParallel's copy of a model, which is there for one forward only."""
    if getattr(model, "_is_replica", False):
        raise RuntimeError(
            f"nn.DataParallel trains a copy of {type(model).__name__} in each step, so that {lost}. Use "
            "torch.nn.parallel.DistributedDataParallel."
        )


def warn_of_large_local_crops(views: Sequence[Tensor], count: int) -> None:
    """32 pixels are CIFAR's, whose local crops are as large as the global ones in the paper."""
    sides = [max(view.shape[-2:]) for view in views]
    if max(sides[count:]) >= min(sides[:count]) and (len(set(sides)) > 1 or sides[0] > 32):
        warnings.warn(
            f"views of {', '.join(map(str, sides))} pixels: LoGo takes the first {count} for global crops, the others "
            f"for local ones, which are smaller as a rule. Put the global ones first, or say how many there are, with "
            f"global_crops={count} if all is as it should be.",
            stacklevel=3,
        )


def same_shape(name: str, views: Sequence[Tensor], other_name: str, others: Sequence[Tensor]) -> None:
    """ValueError unless the first of both are (N, D) and equal in shape."""
    if not others or views[0].shape != others[0].shape or views[0].ndim != 2:
        raise ValueError(
            f"{name} and {other_name} must have the same (N, D), got {shapes(views)} and {shapes(others)}."
        )


def shapes(views: Sequence[object]) -> str:
    """For messages."""
    found = (str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in views)
    return f"{len(views)} views [{', '.join(found)}]"


def overlap_in_range(overlap: Tensor, pairs: int, images: int) -> Tensor:
    """The overlap as given if it is (pairs, N) in [0, 1].

    Looking at values makes a GPU wait, and a graph break under `torch.compile`. There values out of range become
    nan, and local_local with them: loud, late.
    """
    if not isinstance(overlap, Tensor) or not overlap.is_floating_point():
        got = overlap.dtype if isinstance(overlap, Tensor) else type(overlap).__name__
        raise ValueError(f"local_overlap must be a floating-point tensor, got {got}. crop_overlap(boxes) gives it.")
    if overlap.shape != (pairs, images):
        raise ValueError(
            f"local_overlap must have shape (pairs, N) = {(pairs, images)}, a row for each pair of local crops, "
            f"got {tuple(overlap.shape)}. crop_overlap(boxes) gives it."
        )
    inside = (overlap >= 0) & (overlap <= 1)
    if overlap.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.where(inside, overlap, math.nan)
    if not inside.all():
        wrong = overlap[~inside]
        raise ValueError(
            f"local_overlap must be in [0, 1], got {wrong.numel()} values that are not, such as {wrong[0].item():g}. "
            "Give the intersection over union of the crops, as crop_overlap(boxes) does."
        )
    return overlap


def nonnegative(name: str, value: float) -> float:
    """The value if it is a finite number >= 0, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")
    return value


def choice(name: str, value: str, options: tuple[str, ...]) -> str:
    """The value if it is one of the options, else ValueError."""
    if value not in options:
        raise ValueError(f"{name} must be one of {options}, got {value!r}.")
    return value


def positive_integer(name: str, value: int, *, least: int = 1) -> int:
    """The value if it is an integer >= `least`, else ValueError."""
    if type(value) is not int or value < least:
        expected = "a positive integer" if least == 1 else f"an integer >= {least}"
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
    return value


def flag(name: str, value: bool) -> bool:
    """The value if it is True or False, else ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return value


def options_by_name(init: Callable[P, None]) -> Callable[P, None]:
    """For an `__init__`: refuses unknown names, and options by position, with a message that helps."""
    cls, parameters = init.__qualname__.split(".")[0], inspect.signature(init).parameters
    valid, by_name = list(parameters)[1:], [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        for name in kwargs.keys() - valid:
            raise TypeError(f"{cls}: {unknown_option(name, valid)}")
        if by_name and len(args) > len(parameters) - len(by_name):
            got = ", ".join(type(arg).__name__ for arg in args[1:])
            raise TypeError(f"{cls} takes its options by name, as in {by_name[0]}=...; got {got} without one.")
        init(*args, **kwargs)

    return checked


def unknown_option(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """What is said of an option that is none of `valid`: what is near, if anything is, and all of them."""
    valid = sorted(valid)
    near = ["local_weight"] if name.strip("_").lower() in _LAMBDA and "local_weight" in valid else []
    near = near or difflib.get_close_matches(name, valid, n=1) or [v for v in valid if name in v.split("_")][:3]
    asked = f"did you mean {' or '.join(prefix + v for v in near)}?" if near else "none is near."
    return f"unknown option {prefix}{name}; {asked} There are {', '.join(valid)}."


_LAMBDA = ("lambda", "lamda", "lambd", "lmbda", "lam")
