"""What autograd's graph of a step tells."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from logo_plugin.affinity import full_precision


def nodes_of(tensors: Iterable[Tensor], until: Iterable[Tensor] = ()) -> set[Any]:
    """All that the gradient of these goes through, down to `until`, without computing it."""
    seen, todo = set(), [tensor.grad_fn for tensor in tensors]
    ends = {None, *(tensor.grad_fn for tensor in until)}
    while todo:
        node: Any = todo.pop()
        if node not in seen and node not in ends:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return seen


def leaves_of(tensors: Iterable[Tensor]) -> set[int] | None:
    """The ids of the tensors that the gradient of these ends at; None if they are hidden."""
    nodes = nodes_of(tensors)
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes):
        return None
    return {id(getattr(node, "variable", None)) for node in nodes}


def gradient(loss: Tensor, where: Sequence[Tensor]) -> Tensor:
    """Of a loss at some tensors of its graph, which stays; flat, of float32 or wider, times 4,096.

    Scaled as by a GradScaler: float16 has no room for the gradient of a mean over many images.
    """
    scale = torch.full_like(loss, 4096)
    parts = torch.autograd.grad(loss, where, scale, retain_graph=True, materialize_grads=True)
    return torch.cat([full_precision(part).flatten() for part in parts])
