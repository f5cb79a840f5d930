"""What `torch.compile` must leave alone: LoGo watches a step from outside its graphs, the networks are compiled."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
_disable: Any = torch.compiler.disable


def eager(function: F) -> F:
    """Runs the function, and all that it calls, as it is: a graph ends before it."""
    found: F = _disable(function)
    return found


def eager_frame(function: F) -> F:
    """Runs the function as it is; what it calls is compiled."""
    found: F = _disable(function, recursive=False)
    return found


@contextmanager
def gradients_inside() -> Iterator[None]:
    """While it lasts, graphs are compiled so that a gradient can be taken through them before backward.

    Not by `config.patch`, which in torch 2.14 leaves a new context variable behind at each use: memory would grow.
    """
    config: Any = sys.modules.get("torch._functorch.config")
    if not getattr(config, "donated_buffer", False):
        yield
        return
    # inductor's cache on disk does not tell graphs with and without apart.
    cache: Any = sys.modules.get("torch.compiler.config")
    tag = getattr(cache, "cache_key_tag", None)
    config.donated_buffer = False
    if tag is not None:
        cache.cache_key_tag = f"{tag} gradients inside"
    try:
        yield
    finally:
        config.donated_buffer = True
        if tag is not None:
            cache.cache_key_tag = tag


@eager_frame
def with_gradients_inside(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls the function, whose own frame is compiled, within `gradients_inside`."""
    with gradients_inside():
        return function(*args, **kwargs)
