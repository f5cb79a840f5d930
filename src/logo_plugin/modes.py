"""Looks at a network that leave its mode or its statistics as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """While it lasts `module` is in eval mode; then each submodule is again in the mode that it had."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """While it lasts BatchNorm normalises as ever, but its running statistics stay as they are."""
    norms = [child for child in module.modules() if isinstance(child, _NormBase)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
