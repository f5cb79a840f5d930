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
    cache: Any = sys.modules.get("torch.compiler.config")  # since torch 2.6, whose buffers are the first to be donated
    if cache is None or not getattr(config, "donated_buffer", False):
        yield
        return
    # inductor's cache on disk does not tell graphs with and without apart.
    tag = cache.cache_key_tag
    config.donated_buffer, cache.cache_key_tag = False, f"{tag} gradients inside"
    try:
        yield
    finally:
        config.donated_buffer, cache.cache_key_tag = True, tag


@eager_frame
def with_gradients_inside(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls the function, whose own frame is compiled, within `gradients_inside`."""
    with gradients_inside():
        return function(*args, **kwargs)
