"""What `torch.compile` must leave alone: LoGo watches a step from outside its graphs, the networks are compiled."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])
_disable: Any = torch.compiler.disable


def eager(function: F) -> F:
    """Runs the function, and all that it calls, as it is: a graph ends before it."""
    found: F = _disable(function)
    return found


def eager_frame(function: F) -> F:
    """Runs the function as it is; what it calls is compiled."""
    found: F = _disable(function, recursive=False)
    return found


def gradients_inside() -> AbstractContextManager[None]:
    """While it lasts, graphs are compiled so that a gradient can be taken through them before backward."""
    config: Any = sys.modules.get("torch._functorch.config")
    return config.patch(donated_buffer=False) if hasattr(config, "donated_buffer") else nullcontext()
