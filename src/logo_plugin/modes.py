"""Looks at a network that leave its mode, its statistics or the random numbers as they were."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """While it lasts `module` is in eval mode; then each submodule is again in the mode that it had."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        module.train(modes[module])  # for layers that act on a change of mode, such as those that merge for eval
        for child, mode in modes.items():
            child.training = mode


def image_channels(network: nn.Module) -> int:
    """Channels C of the images (N, C, H, W) that a network takes: those of its first convolution, or 3."""
    found = next((layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)), 3)
    return found or 3  # 0 where it is lazy


def statistics(module: nn.Module, *, every: bool = False) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(layer, name, buffer) of running statistics, as BatchNorm has them; with `every` of all buffers."""
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and (every or name.startswith("running_") or name == "num_batches_tracked"):
                yield child, name, buffer


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Afterwards the generators are where they were before: torch's, Python's and, if it is in use, numpy's.

    torch's on the CPU and, if `device` is a GPU, there.
    """
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


@contextmanager
def kept_statistics(module: nn.Module, *, every: bool = False) -> Iterator[None]:
    """While it lasts BatchNorm and layers like it normalise as ever, but their running statistics stay as they are.

    With `every` all buffers do.
    """
    buffers = [(child._buffers, name, buffer) for child, name, buffer in statistics(module, every=every)]
    for holder, name, buffer in buffers:
        holder[name] = buffer.clone()
    try:
        yield
    finally:
        for holder, name, buffer in buffers:
            holder[name] = buffer
