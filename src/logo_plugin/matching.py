"""Which module of a state dict holds a network: by its names, or by the order and shapes of its values."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from logo_plugin.architectures import Architecture, common, under

_SHOWN = 4

Shapes = Mapping[str, tuple[int, ...]]


class Match(NamedTuple):
    """A module that fits a network.

    Attributes:
        path: Of the module.
        by: "name" or "order and shape".
        names: The network's to the source's.
        head: What the network goes without.
    """

    path: str
    by: str
    names: dict[str, str]
    head: str | None


def matches(shapes: Shapes, paths: Iterable[str], architecture: Architecture) -> dict[str, Match]:
    """The modules, by their paths, that hold all of a network's values, except its head."""
    found: dict[str, Match] = {}
    for head in architecture.heads or (None,):
        target = architecture.shapes(head)
        for path in paths:
            part = _part(shapes, path)
            if len(part) >= len(target):
                names = _by_name(part, target, head)
                by = "name" if names else "order and shape"
                names = names or _by_order(part, target)
                if names:
                    found[path] = Match(path, by, {a: f"{path}.{b}" if path else b for a, b in names.items()}, head)
        if found:
            break
    return {path: match for path, match in found.items() if not any(_nearer(q, match) for q in found.values())}


def _nearer(other: Match, match: Match) -> bool:
    """Of modules in each other the one with the library's names counts, or the outer, which may hold the pooling."""
    if other.path == match.path or not (under(other.path, match.path) or under(match.path, other.path)):
        return False
    return (other.by, len(other.path)) < (match.by, len(match.path))


def _part(shapes: Shapes, path: str) -> dict[str, tuple[int, ...]]:
    return {name[len(path) + 1 if path else 0 :]: shape for name, shape in shapes.items() if under(name, path)}


def _by_name(part: Shapes, target: Shapes, head: str | None) -> dict[str, str] | None:
    """All of the target, and nothing more in its blocks but a head: a ResNet-34 has all that a ResNet-18 has."""
    blocks = {name.split(".")[0] for name in target}
    if any(part.get(name) != shape for name, shape in target.items()):
        return None
    more = (name for name in part if name not in target and not (head and under(name, head)))
    return None if any(name.split(".")[0] in blocks for name in more) else {name: name for name in target}


def _by_order(part: Shapes, target: Shapes) -> dict[str, str] | None:
    if len(part) != len(target):
        return None
    pairs = dict(zip(target, part, strict=True))
    same = all(target[a] == part[b] and _kind(a) == _kind(b) for a, b in pairs.items())
    return pairs if same else None


def _kind(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def why_none(shapes: Shapes, paths: Iterable[str], architecture: Architecture, wanted: str, library: str) -> str:
    """The message where nothing fits: the nearest module, the first differences, and what would fit."""
    target = architecture.shapes((architecture.heads or (None,))[-1])
    parts = {path: _part(shapes, path) for path in paths}
    path = max(parts, key=lambda path: len(parts[path].keys() & target.keys()))
    named = 5 * len(parts[path].keys() & target.keys()) > len(target)
    differences = _by_name_differences if named else _by_order_differences
    if not named:
        path = min(parts, key=lambda path: len(differences(parts[path], target)))
    wrong = differences(parts[path], target)
    shown = "; ".join(wrong[:_SHOWN]) + ("; …" if len(wrong) > _SHOWN else "")
    message = (
        f"no module of the source fits {wanted} ({len(target)} values). Nearest is "
        f"{repr(path) if path else 'the whole'} ({len(parts[path])} values), with {len(wrong)} "
        f"difference{'s' if len(wrong) > 1 else ''}: {shown}."
    )
    kernel = re.search(r"\(\d+, (\d+), (\d+), \2\)", wrong[0]) if len(wrong) == 1 else None
    if kernel and "conv1" in wrong[0] and kernel[2] == "3":
        return f"{message} That is the stem for small images: --cifar-stem 1, of solo-learn --cifar-stem 2."
    if kernel and wrong[0].endswith("3, 3)"):
        return f"{message} That is the ordinary stem: go without --cifar-stem."
    if kernel and library == "timm":
        return f"{message} For images of {kernel[1]} channels: --option in_chans={kernel[1]}."
    fits = next((name for name, other in common(library) if matches(shapes, paths, other)), None)
    return f"{message} {library}'s {fits} fits: --arch {fits}, in Python arch={fits!r}." if fits else message


def _by_name_differences(part: Shapes, target: Shapes) -> list[str]:
    blocks = {name.split(".")[0] for name in target}
    more = [f"{name} is too much" for name in part if name not in target and name.split(".")[0] in blocks]
    return more + [
        f"{name} is {part[name]}, not {shape}" if name in part else f"{name} {shape} is missing"
        for name, shape in target.items()
        if part.get(name) != shape
    ]


def _by_order_differences(part: Shapes, target: Shapes) -> list[str]:
    found = [
        f"{own} {shape} in the place of {name} {wanted}"
        for (name, wanted), (own, shape) in zip(target.items(), part.items(), strict=False)
        if (wanted, _kind(name)) != (shape, _kind(own))
    ]
    return found + ["values too few or too many"] * abs(len(part) - len(target))
