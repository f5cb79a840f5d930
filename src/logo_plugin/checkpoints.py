"""From whatever a run left behind to its state dict."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = ("state_dict", "model", "model_state_dict", "learner", "net")
Source = nn.Module | Mapping[str, Any] | str | os.PathLike[str]


def state_dict_of(source: Source, *, trust: bool = False) -> dict[str, Tensor]:
    """The tensors of a module, checkpoint, state dict, or of a file that holds one of them.

    Args:
        source: A module; a state dict; a dict with one under "state_dict" (Lightning, solo-learn) or another of
            `_NAMES`; a path.
        trust: Read a file that holds other objects than tensors and plain values, which may run code.

    Returns:
        Names and tensors, detached, on the CPU, in the order in which the modules were registered.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file can't be read, or holds no state dict.
    """
    found: Any = _read(Path(source), trust) if isinstance(source, (str, os.PathLike)) else source
    if isinstance(found, nn.Module):
        found = found.state_dict()
    if not isinstance(found, Mapping):
        raise ValueError(f"expected a module, a state dict or a checkpoint that holds one, got {type(found).__name__}.")
    held = next((found[key] for key in _NAMES if isinstance(found.get(key), Mapping)), found)
    tensors = {str(name): value.detach().cpu() for name, value in held.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"found no state dict, only {', '.join(map(str, list(found)[:8])) or 'nothing'}: a checkpoint holds names "
            f"and tensors, or has them under one of {', '.join(_NAMES)}."
        )
    return tensors


def _read(path: Path, trust: bool) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if trust or "Unsupported global" not in reason:
            raise ValueError(f"{path} is no checkpoint that torch.load can read ({reason.splitlines()[0]}).") from error
        blocked = next(line.strip() for line in reason.splitlines() if "Unsupported global" in line)
        raise ValueError(
            f"{path} holds Python objects beside tensors, which run code when they are read. If the file is yours, "
            f"read it with --trust, in Python trust=True. ({blocked})"
        ) from error
    except Exception as error:  # torch.load raises nearly anything on what is no checkpoint
        raise ValueError(
            f"{path} is no checkpoint that torch.load can read ({type(error).__name__}: {error})."
        ) from error
