"""A predictor of their own for local crops (MULAN, https://arxiv.org/abs/2602.05845).

Global and local crops are two prediction tasks; one predictor for both is what MULAN finds to
destabilise multi-crop BYOL, SimSiam and MoCo v3. The copy starts from the host's predictor, so that
any architecture and initialisation is kept; MULAN initialises each predictor independently.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def stand_in(module: nn.Module | None, other: nn.Module | None) -> Iterator[None]:
    """While it lasts, whoever calls `module` gets what `other` computes; with None for `other`, nothing changes.

    The call itself is redirected, not an attribute of the model, so it does not matter where and under
    which name the host keeps the module. torch.compile sees one more variant of it.
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
    """Adds each parameter of `other` to the optimizer group of its twin in `module`, unless it is in one.

    Args:
        groups: Parameter groups; changed in place.
        module: The original.
        other: Its copy.
    """
    groups = list(groups)
    for group in groups:
        group["params"] = list(group["params"])  # hosts give iterators, too
    known = {id(p) for group in groups for p in group["params"]}
    twins = {id(p): twin for p, twin in zip(module.parameters(), other.parameters(), strict=True)}
    for group in groups:
        found = [twins[id(p)] for p in group["params"] if id(p) in twins]
        group["params"] += [twin for twin in found if id(twin) not in known]
