"""Whether local crops go the way that the host's step sends global ones. No host is named here."""

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logo_plugin.compiling import eager
from logo_plugin.graphs import leaves_of
from logo_plugin.modes import kept_random_state, kept_statistics, statistics
from logo_plugin.observing import Observed
from logo_plugin.online import (
    COMPOSED,
    Heads,
    Method,
    Outputs,
    Source,
    calls_of,
    entrances,
    images_of,
    run_online,
)


class HostStep(NamedTuple):
    """What a step of the host showed.

    Attributes:
        views: Its global crops, (N, C, H, W) each.
        observed: What it gave its criterion.
        outputs: What the heads gave.
        images: What it gave the backbone, as often as it called it; None if nobody looked.
        parts: What backbone and heads were given and gave, if anybody looked.
    """

    views: list[Tensor]
    observed: Observed
    outputs: Outputs
    images: list[Tensor] | None
    parts: Mapping[nn.Module, list[tuple[Tensor, Tensor]]]

    def near(self, pred: Tensor, part: Tensor) -> bool:
        """Whether two predictions are the same but for the rounding of this step's precision."""
        outputs = [out for outs in self.outputs.values() for out in outs]
        half = torch.is_autocast_enabled(self.views[0].device.type) or any(out.dtype.itemsize < 4 for out in outputs)
        pred, part = pred.detach().float(), part.float()
        return pred.shape == part.shape and float((pred - part).norm()) <= (0.1 if half else 0.05) * float(part.norm())


class Way(NamedTuple):
    """The way that local crops go.

    Attributes:
        methods: As in `run_online`.
        method: Which of them ran local crops.
        heads: The model's.
        source: As in `run_online`.
        backbone: The model's, if it has one.
    """

    methods: Sequence[tuple[str, Method]]
    method: str
    heads: Heads
    source: Source | None
    backbone: nn.Module | None

    @property
    def parts(self) -> list[nn.Module]:
        """Backbone, projector and predictor, as far as there are."""
        return self.heads.behind(self.backbone)


class _Look(NamedTuple):
    """What the step's global crops give when they go the way of local ones.

    Attributes:
        preds: Their predictions (N, D), forwarded alone and in batches like the step's.
        images: What the backbone was given, before the network drew random numbers.
        comparable: Whether the step's predictions must be among `preds`.
        reached: The ids of the leaves that the gradient of predictions ends at; None if they are hidden.
        moved: Layers whose running statistics are no longer what they were.
        parts: As in `HostStep`.
    """

    preds: list[Tensor]
    images: list[Tensor]
    comparable: bool
    reached: set[int] | None
    moved: set[nn.Module]
    parts: Mapping[nn.Module, list[tuple[Tensor, Tensor]]]


_CURE = (
    "name with online= a method from images to what the criterion is given; if there is none, use LoGoLoss directly."
)


@eager
def check_online(model: nn.Module, step: HostStep, way: Way, *, asked: bool) -> list[nn.Module]:
    """RuntimeError unless what runs local crops gives for global ones what the step gave, and trains what it trains.

    A network that draws random numbers gives nothing to compare, nor has BatchNorm where other images are in the batch:
    there it is what the backbone is given that must be the same. All ranks do the same, whatever they find.

    Args:
        model: The wrapped model.
        step: What the host's showed.
        way: That of local crops.
        asked: The user names methods, so that not all that the criterion was given need be a prediction of the one
            network.

    Returns:
        Layers whose running statistics the way moves though it trains nothing there, as in a target network.
    """
    observed, look = step.observed, _look(model, step, way)
    # On all ranks: the criterion may gather.
    blind = way.source is None and _blind_to_lengths(observed)
    same = _same_predictions(step, look, blind) if look.comparable else []
    _refuse(model, way, _difference(step, look, same, asked))
    if any(same) and not (all(same) or observed.mutual or asked) and len(observed.targets) > 1:
        raise RuntimeError(
            f"the step of {type(model).__name__} predicts of other images than the global crops, too, such as mixed "
            "ones or those of a second data set, and local crops would be pulled to the targets of those: name with "
            "target= a method from global crops to their targets."
        )
    trained, idle = leaves_of(observed.preds), list[nn.Module]()
    if look.reached is not None and trained is not None:
        idle = _check_trained(model, way, look, trained, look.reached, asked)
    if not look.comparable:
        _refuse(model, way, _hidden_difference(model, step, way, look, blind))
    return idle


def _refuse(model: nn.Module, way: Way, other: str | None) -> None:
    if other:
        raise RuntimeError(
            f"the step of {type(model).__name__} {other} {way.method}, which LoGo forwards local crops with. What the "
            f"step itself does to images or features is not in it: {_CURE}"
        )


def _look(model: nn.Module, step: HostStep, way: Way) -> _Look:
    """Leaves no trace."""
    views, rows, features = step.views, *step.observed.preds[0].shape
    at_once = {len(out) / len(views[0]) for outs in step.outputs.values() for out in outs}  # views in one batch
    device = views[0].device
    takers, images = entrances(way.heads, way.backbone), list[Tensor]()

    def run(views: Sequence[Tensor]) -> Tensor:
        return torch.cat(run_online(way.methods, way.heads, way.source, views, features=features)[1])

    with kept_random_state(device), kept_statistics(model, every=True):
        with torch.no_grad():
            changed, outs = _changes_of(device), []
            for view in views:
                with images_of(takers, _changes_of(device)) as given:
                    outs.append(run([view]))
                images += given
            found = [torch.cat(outs), run(views)]
            drawn = changed() or not step.near(*found)
            usual = at_once <= {*range(1, len(views) + 1)}
            for count in sorted(at_once - {1}) if usual else []:
                found.append(run([torch.cat(views[k : k + int(count)]) for k in range(0, len(views), int(count))]))
        before = {(layer, name): buffer.clone() for layer, name, buffer in statistics(model)}
        with calls_of(way.parts) as parts:
            try:
                # What is at random between the parts is not in all. As often on each rank, whatever it sees.
                for _ in range(4):
                    reached = leaves_of([run([views[0][:2]])])  # two images, whose graph is small
            except (AssertionError, RuntimeError, ValueError):  # which it does not take, if it splits its batch
                parts.clear()
                reached = leaves_of([run([views[0]])])
        moved = {layer for layer, name, buffer in statistics(model) if not torch.equal(buffer, before[layer, name])}
    preds = [part for whole in found for part in torch.split(whole, rows)]
    return _Look(preds, images, usual and not drawn, reached, moved, parts)


def _same_predictions(step: HostStep, look: _Look, blind: bool) -> list[bool]:
    """Which of the predictions that the step gave its criterion the look gave, too."""

    def among(change: Callable[[Tensor], Tensor]) -> list[bool]:
        parts = [change(part) for part in look.preds]
        return [any(step.near(change(pred), part) for part in parts) for pred in step.observed.preds]

    same = among(lambda x: x)
    if blind and not (any(same) or step.observed.mutual):
        same = among(lambda x: F.normalize(x, dim=1))
    return same


def _difference(step: HostStep, look: _Look, same: list[bool], asked: bool) -> str | None:
    """What the step does otherwise than the way of local crops, in words that its name follows."""
    if look.comparable and not any(same):
        return "gives the criterion something else for global crops than"
    images = [x for x in look.images if x.shape[1] == step.views[0].shape[1]]  # others are maps of features
    if step.images is not None and images and not (look.comparable and all(same)):
        known = known_images(images, step.images)
        # A view that nothing is predicted of need not be among them.
        if not (all(known) if look.comparable and len(step.observed.preds) > 1 and not asked else any(known)):
            return "gives the backbone other images for global crops than"
    return None


def _hidden_difference(model: nn.Module, step: HostStep, way: Way, look: _Look, blind: bool) -> str | None:
    """The same, of what random numbers hide in the predictions: what happens between the parts and after them."""
    for before, after in pairwise(way.parts):
        if before not in look.parts or not (before in step.parts or way.method == COMPOSED):
            continue
        host, own = _follows(step.parts, before, after), _follows(look.parts, before, after)
        if host and own and ((all(own) and not any(host)) or (all(host) and not any(own))):
            return f"gives {_name(model, after)} something else than the output of {_name(model, before)}, unlike"
    other_lengths = _are_units(step.observed.preds) != _are_units(look.preds)
    if way.source is None and other_lengths and not blind:
        return "gives the criterion vectors of other lengths than"
    return None


def _follows(parts: Mapping[nn.Module, list[tuple[Tensor, Tensor]]], before: nn.Module, after: nn.Module) -> list[bool]:
    """Of each call of one part, whether it is given, of any image, what the other one gives."""
    gave = [x.flatten(1).float() for _, x in parts.get(before, []) if x.ndim > 1]
    given = [x.flatten(1).float() for x, _ in parts.get(after, []) if x.ndim > 1]
    return [any(_share_a_row(x, out) for out in gave) for x in given]


def _share_a_row(first: Tensor, second: Tensor) -> bool:
    """Of the first rows, which is enough: each is a comparison with all of the other."""
    return first.shape[1:] == second.shape[1:] and any(
        bool(((row - second).abs() <= 1e-3 + 1e-2 * second.abs()).all(1).any()) for row in first[:16]
    )


def _are_units(preds: Sequence[Tensor]) -> bool:
    return all(bool(((x.detach().float().norm(dim=1) - 1).abs() < 0.02).all()) for x in preds)


def _check_trained(
    model: nn.Module, way: Way, look: _Look, trained: set[int], reached: set[int], asked: bool
) -> list[nn.Module]:
    """RuntimeError unless the way trains what the step's predictions do; gives what `check_online` gives."""
    own = {id(p): n for n, p in model.named_parameters() if not n.startswith("logo")}
    more, less = (reached - trained) & own.keys(), (trained - reached) & own.keys()
    networks = [{id(p) for p in part.parameters()} for part in way.parts]
    children = [{id(p) for p in child.parameters()} for child in way.heads.owner.children()]
    if not look.comparable:  # layers may be left out at random, but not all of a network
        more = more & set().union(*(ids for ids in networks if not ids & trained))
        less = less & set().union(*(ids for ids in children if not ids & reached))
    # Experts choose their images, but no network goes untrained.
    untrained = set().union(*(ids & trained for ids in (*networks, *children) if not ids & reached))
    less = (set() if asked else less.difference(*networks)) | untrained & own.keys()
    for names, what in (
        (more, "local crops would train {} of {}, which its own step does not train with this loss (no_grad, detach)"),
        (less, "local crops would not go through {} of {}, as global ones do"),
    ):
        if names:
            listed = sorted(own[p] for p in names)
            what = what.format(", ".join(listed[:3]) + " and others" * (len(listed) > 3), type(model).__name__)
            raise RuntimeError(f"{what}: {_CURE}")
    if not reached & own.keys():  # sharded: no layer's own parameters are in the graph
        return []
    return [
        layer for name, layer in model.named_modules() if layer in look.moved and not reached & _around(model, name)
    ]


@torch.no_grad()
def _blind_to_lengths(observed: Observed) -> bool:
    repeat, pred, target = observed.any_similarity, observed.preds[0].detach(), observed.targets[0]
    # Not of length 1, which those that the step gives may have already.
    lengths = torch.logspace(-2, 2, len(pred), device=pred.device, dtype=pred.dtype)[:, None]
    other = F.normalize(pred, dim=1) * lengths
    try:
        return torch.allclose(repeat(other, target), repeat(pred, target), rtol=1e-2, atol=1e-3)
    except (AssertionError, RuntimeError, ValueError):  # it refuses other lengths than 1, say
        return False


def known_images(images: list[Tensor], fed: list[Tensor]) -> list[bool]:
    """Which of the images are among those that the step gave the backbone."""
    joined = [torch.cat([x for x in fed if x.shape[1:] == shape]) for shape in {x.shape[1:] for x in fed}]
    return [any(_equal(x, block) for whole in (*fed, *joined) for block in _blocks(whole, len(x))) for x in images]


def _name(model: nn.Module, part: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is part), type(part).__name__)


def _around(model: nn.Module, name: str) -> set[int]:
    """The ids of a layer's parameters; if it has none, those of the part that it lies in."""
    while not (found := {id(p) for p in model.get_submodule(name).parameters()}) and name:
        name = name.rpartition(".")[0]
    return found


def _blocks(images: Tensor, rows: int) -> list[Tensor]:
    """The parts of a batch that may be one view, one after the other or in turns."""
    turns = len(images) // rows
    return [*torch.split(images, rows), *(images[i::turns] for i in range(turns))]


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first.float(), second.float(), rtol=1e-2, atol=1e-3)


def _random_state(device: torch.device) -> list[Any]:
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    numpy = sys.modules.get("numpy")
    arrays = {} if numpy is None else numpy.random.get_state(legacy=False)["state"]
    others = {key: value for key, value in arrays.items() if key != "key"}  # 624 words that change every 624 draws
    return [*(state.tolist() for state in states), random.getstate(), others]


def _changes_of(device: torch.device) -> Callable[[], bool]:
    """Whether any of it has been drawn from since."""
    before = _random_state(device)
    return lambda: _random_state(device) != before
