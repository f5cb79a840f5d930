"""How local crops are forwarded: with their activations or computing them again in backward, counted or not."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils import checkpoint as checkpointing

from logo_plugin.compiling import eager
from logo_plugin.local_predictor import stand_in
from logo_plugin.modes import kept_statistics


@contextmanager
def local_forwards(
    model: nn.Module,
    backbone: nn.Module | None,
    *,
    checkpoint: bool,
    running_stats: bool,
    idle: Sequence[nn.Module] = (),
) -> Iterator[None]:
    """While it lasts, local crops are forwarded as the options say.

    Args:
        model: All that they go through.
        backbone: What takes most of the memory.
        checkpoint: Compute what the backbone keeps for backward again there.
        running_stats: Whether they move BatchNorm's running statistics.
        idle: Layers whose statistics they never move: those of a target network that runs along.
    """
    still: AbstractContextManager[None] = nullcontext()
    if idle or not running_stats:
        still = kept_statistics(nn.ModuleList(idle) if running_stats else model)
    with recomputed(backbone if checkpoint else None), still:
        yield


@contextmanager
def recomputed(backbone: nn.Module | None) -> Iterator[None]:
    """While it lasts, the backbone keeps no activations for backward but computes them again there.

    Random numbers and autocast are then those of the forward, and BatchNorm's running statistics move once. With
    None, nothing changes.

    Raises:
        RuntimeError: If nobody called the backbone.
    """
    if backbone is None:
        yield
        return
    forward, calls = backbone.forward, []

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), kept_statistics(backbone)

    @eager  # its graph could not be built again in backward
    def cheap(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args))
        return checkpointing.checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    with stand_in(backbone, cheap):
        yield
    if not calls:
        raise RuntimeError(
            f"checkpoint_local_crops=True, but nothing called the backbone ({type(backbone).__name__}) as a whole for "
            "local crops, so their activations stay in memory. Call it as backbone(images), or go without the option."
        )
