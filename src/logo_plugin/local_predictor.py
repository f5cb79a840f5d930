"""A predictor of their own for local crops (MULAN, https://arxiv.org/abs/2602.05845).

It is a copy of the host's predictor, whatever its architecture and however initialised; MULAN initialises
each predictor independently.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def stand_in(module: nn.Module | None, other: Callable[..., Any] | None) -> Iterator[None]:
    """While it lasts, who calls `module` gets what `other` computes, whatever name the host calls it by.

    With None for either, nothing changes.
    """
    if module is None or other is None:
        yield
        return
    own = {name: value for name, value in module.__dict__.items() if name == "forward"}  # a compiled module has one
    module.__dict__["forward"] = other
    try:
        yield
    finally:
        del module.__dict__["forward"]
        module.__dict__.update(own)


def join_groups(groups: Iterable[dict[str, Any]], module: nn.Module, other: nn.Module) -> None:
    """Adds parameters of `other`, a copy of `module`, to their twins' optimizer groups, unless they are in one."""
    groups = list(groups)
    for group in groups:
        group["params"] = list(group["params"])  # hosts give iterators, too
    known = {id(p) for group in groups for p in group["params"]}
    twins = {id(p): twin for p, twin in zip(module.parameters(), other.parameters(), strict=True)}
    names = {id(p): f"logo_local_predictor.{name}" for name, p in other.named_parameters()}
    for group in groups:
        found = [twins[id(p)] for p in group["params"] if id(p) in twins]
        new = [twin for twin in found if id(twin) not in known]
        group["params"] += new
        if "param_names" in group:
            group["param_names"] += [names[id(twin)] for twin in new]
