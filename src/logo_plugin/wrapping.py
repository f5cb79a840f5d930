"""`wrap`: finds the adapter for what it is given."""

import difflib
import inspect
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")


def wrap(x: T, **options: Any) -> T:
    """Adds LoGo to a self-supervised model written for a framework that logo_plugin knows.

    The model's own training step still runs, on the global crops; LoGo forwards the local crops and
    adds its terms. Give the data loader `collate_fn=MultiCropCollate(...)` and change nothing else.

    Args:
        x: A BYOL, MoCo or SimSiam model as lightly's examples and benchmarks write them: a
            LightningModule or plain `nn.Module`, the instance or its class (also as a decorator).
            Or the class of a solo-learn method.
        **options: Options of the adapter (`logo_plugin.adapters.lightly.wrap`) and of `LoGoLoss`; for a
            solo-learn method those of `logo_plugin.adapters.solo.wrap`.

    Returns:
        The same instance, wrapped in place; or, for a class, a subclass of it.

    Raises:
        TypeError: If `x` is neither a module nor a module class, or an option is unknown.
        ValueError: If `x` has no part that LoGo needs; the message names the option that helps.
    """
    cls = x if inspect.isclass(x) else type(x)
    if not issubclass(cls, nn.Module):
        raise TypeError(
            f"wrap() expects a torch.nn.Module (or LightningModule), or such a class, got {x!r}. "
            "For your own training loop use LoGoLoss directly."
        )
    solo_base = getattr(sys.modules.get("solo.methods.base"), "BaseMethod", None)
    if solo_base is not None and issubclass(cls, solo_base):
        from logo_plugin.adapters import solo

        return solo.wrap(x, **options)  # type: ignore[arg-type, return-value]
    from logo_plugin.adapters import lightly

    return lightly.wrap(x, **options)  # type: ignore[no-any-return]


def unknown_option(name: str, valid: Iterable[str], prefix: str = "") -> str:
    """What an adapter says of an option that is none of `valid`: what is near, if anything is, and all of them."""
    valid = sorted(valid)
    near = ["local_weight"] if name.strip("_").lower() in _LAMBDA and "local_weight" in valid else []
    near = near or difflib.get_close_matches(name, valid, n=1) or [v for v in valid if name in v.split("_")][:3]
    asked = f"did you mean {' or '.join(prefix + v for v in near)}?" if near else "none is near."
    return f"unknown option {prefix}{name}; {asked} There are {', '.join(valid)}."


_LAMBDA = ("lambda", "lamda", "lambd", "lmbda", "lam")
