"""The process group, where there is one; torch can be built without."""

import torch.distributed as dist
from torch import nn


def in_group() -> bool:
    """Whether torch.distributed is initialised, be it for one process."""
    return dist.is_available() and dist.is_initialized()


def rank_and_size() -> tuple[int, int]:
    """Of this process in the default group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if in_group() else (0, 1)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP, of either kind, shards this very module: it moves its parameters with each forward."""
    return any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__)
