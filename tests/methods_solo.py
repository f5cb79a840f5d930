"""What LoGo does with each of solo-learn's methods, found by trying: rows of a table."""

from typing import Any

import torch
from solo_clone import batch, build, gradients, import_solo

from logo_plugin import wrap

NOTES = {
    "solo-learn": "All of `solo.methods.METHODS`; [settings for each](solo-learn.md) come with `+logo=...`. "
    'Options after "no" are refused for that method; without `gradient_ratio` nothing is repelled unless a '
    "`local_weight` is given."
}


def rows() -> list[tuple[str, str, str, str]]:
    """(host, method, verdict, reason) for each of `solo.methods.METHODS`; the verdict is works or refused.

    For one that works, loss and gradients without LoGo's terms are its own to the last bit; the reason then names
    how it is chosen and the options that it refuses.
    """
    methods, adapter = import_solo()
    found = []
    for name, method in methods.METHODS.items():
        if name.startswith("logo_"):
            continue
        try:
            wrapped = (wrap if issubclass(method, methods.BaseMethod) else adapter.wrap)(method)
        except TypeError as error:
            found.append(("solo-learn", name, "refused", str(error)))
            continue
        assert wrapped is methods.METHODS[f"logo_{name}"], name
        _same_without_terms(name)
        without = [f"no {option}" for option, value in _TRIED.items() if _refuses(name, {option: value})]
        found.append(("solo-learn", name, "works", "; ".join([f"method=logo_{name}", *without])))
    return found


_TRIED: dict[str, Any] = {"gradient_ratio": 0.1, "local_predictor": True}


def _same_without_terms(name: str) -> None:
    indexes, views, targets = batch(6)
    host, logo = build(name), build(f"logo_{name}", {"affinity": False, "local_global_weight": 0})
    losses = [m.training_step([indexes, v, targets], 0) for m, v in ((host, views[:2]), (logo, views))]
    assert torch.equal(*losses), f"{name}: {losses}"
    for loss in losses:
        loss.backward()
    expected, found = gradients(host), gradients(logo)
    assert expected.keys() == found.keys(), name
    different = [parameter for parameter, gradient in expected.items() if not torch.equal(gradient, found[parameter])]
    assert not different, f"{name}: {different}"


def _refuses(name: str, options: dict[str, Any]) -> bool:
    try:
        model = build(f"logo_{name}", options)
    except ValueError as error:
        if next(iter(options)) not in str(error):
            raise
        return True
    model.training_step(batch(), 0).backward()
    return False


if __name__ == "__main__":
    for row in rows():
        print(" | ".join(row))
