"""Whether local crops go the way that the host's step sends global ones. No host is named here."""

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logo_plugin.compiling import eager
from logo_plugin.modes import kept_statistics, statistics
from logo_plugin.observing import Observed
from logo_plugin.online import COMPOSED, Heads, Method, Outputs, Source, entrances, images_of, leaves_of, run_online


class _Look(NamedTuple):
    """What the step's global crops give when they go the way of local ones.

    Attributes:
        preds: Their predictions (N, D), forwarded alone and in batches like the step's.
        images: What the backbone was given, before the network drew random numbers.
        comparable: Whether the step's predictions must be among `preds`.
        reached: The ids of the leaves that the gradient of predictions ends at; None if they are hidden.
        moved: Layers whose running statistics are no longer what they were.
    """

    preds: list[Tensor]
    images: list[Tensor]
    comparable: bool
    reached: set[int] | None
    moved: set[nn.Module]


@eager
def check_online(
    model: nn.Module,
    methods: Sequence[tuple[str, Method]],
    method: str,
    heads: Heads,
    source: Source | None,
    global_views: list[Tensor],
    observed: Observed,
    ran: Outputs,
    backbone: nn.Module | None,
    fed: list[Tensor] | None,
    parts: Mapping[nn.Module, list[tuple[Tensor, Tensor]]],
    *,
    asked: bool,
) -> list[nn.Module]:
    """RuntimeError unless what runs local crops gives for global ones what the step gave, and trains what it trains.

    A network that draws random numbers gives nothing to compare, nor has BatchNorm where other images are in the batch:
    there it is what the backbone is given that must be the same. All ranks do the same, whatever they find.

    Args:
        model: The wrapped model.
        methods: As in `run_online`.
        method: Which of them ran local crops.
        heads: The model's.
        source: As in `run_online`.
        global_views: The global crops of the step, (N, C, H, W) each.
        observed: What the step gave its criterion.
        ran: What the heads gave in the step.
        backbone: The model's, if it has one.
        fed: The images that the step gave the backbone, as often as it called it; None if nobody looked.
        parts: What backbone and heads were given and gave in the step, if anybody looked.
        asked: The user names methods, so that not all in `observed` need be a prediction of the one network.

    Returns:
        Layers whose running statistics the method moves though it trains nothing there, as in a target network.
    """
    outputs = [out for outs in ran.values() for out in outs]
    half = torch.is_autocast_enabled(global_views[0].device.type) or any(out.dtype.itemsize < 4 for out in outputs)

    def run(views: Sequence[Tensor]) -> Tensor:
        return torch.cat(run_online(methods, heads, source, views, features=observed.preds[0].shape[1])[1])

    def near(pred: Tensor, part: Tensor) -> bool:
        pred, part = pred.detach().float(), part.float()
        return pred.shape == part.shape and float((pred - part).norm()) <= (0.1 if half else 0.05) * float(part.norm())

    at_once = {len(out) / len(global_views[0]) for out in outputs}
    look = _look(model, run, near, global_views, entrances(heads, backbone), len(observed.preds[0]), at_once)
    same = [any(near(pred, part) for part in look.preds) for pred in observed.preds]
    if look.comparable and not any(same) and source is None and not observed.mutual and _blind_to_lengths(observed):
        same = [
            any(near(F.normalize(pred, dim=1), F.normalize(part, dim=1)) for part in look.preds)
            for pred in observed.preds
        ]
    other = "gives the criterion something else for global crops than" if look.comparable and not any(same) else ""
    images = [x for x in look.images if x.shape[1] == global_views[0].shape[1]]  # others are maps of features
    if not other and fed is not None and images and not (look.comparable and all(same)):
        known = known_images(images, fed)
        # A view that nothing is predicted of need not be among them.
        if not (all(known) if look.comparable and len(observed.preds) > 1 and not asked else any(known)):
            other = "gives the backbone other images for global crops than"
    if not other and method == COMPOSED and not look.comparable and backbone is not None:
        for before, after in pairwise((backbone, *heads.modules)):
            given, gave = [x for x, _ in parts.get(after, [])], [x.flatten(1) for _, x in parts.get(before, [])]
            if not all(known_images(given, gave)):
                other = f"gives {_name(model, after)} something else than the output of {_name(model, before)}, unlike"
    cure = "name with online= a method from images to what the criterion is given."
    if other:
        raise RuntimeError(
            f"the step of {type(model).__name__} {other} {method}, which LoGo forwards local crops with. What the step "
            f"itself does to images or features is not in it: {cure}"
        )
    if look.comparable and any(same) and not (all(same) or observed.mutual or asked) and len(observed.targets) > 1:
        raise RuntimeError(
            f"the step of {type(model).__name__} predicts of other images than the global crops, too, such as mixed "
            "ones or those of a second data set, and local crops would be pulled to the targets of those: name with "
            "target= a method from global crops to their targets."
        )
    reached, trained = look.reached, leaves_of(observed.preds)
    own = {id(p): n for n, p in model.named_parameters() if not n.startswith("logo")}
    if reached is None or trained is None:
        return []
    more, less = (reached - trained) & own.keys(), (trained - reached) & own.keys()
    networks = [{id(p) for p in part.parameters()} for part in (backbone, *heads.modules) if part is not None]
    if not look.comparable:  # layers may be left out at random, but not all of a network
        children = [{id(p) for p in child.parameters()} for child in heads.owner.children()]
        more = more & set().union(*(ids for ids in networks if not ids & trained))
        less = less & set().union(*(ids for ids in children if not ids & reached))
    less = set() if asked else less.difference(*networks)  # experts choose their images
    for names, what in (
        (more, "local crops would train {} of {}, which its own step does not train with this loss (no_grad, detach)"),
        (less, "local crops would not go through {} of {}, as global ones do"),
    ):
        if names:
            listed = sorted(own[p] for p in names)
            what = what.format(", ".join(listed[:3]) + " and others" * (len(listed) > 3), type(model).__name__)
            raise RuntimeError(f"{what}: {cure}")
    if not reached & own.keys():  # sharded: no layer's own parameters are in the graph
        return []
    return [
        layer for name, layer in model.named_modules() if layer in look.moved and not reached & _around(model, name)
    ]


def _look(
    model: nn.Module,
    run: Callable[[Sequence[Tensor]], Tensor],
    near: Callable[[Tensor, Tensor], bool],
    views: list[Tensor],
    takers: Sequence[nn.Module],
    rows: int,
    at_once: set[float],
) -> _Look:
    """Leaves no trace. A prediction has `rows` rows, and the step forwarded `at_once` views in one batch."""
    devices = [views[0].device] if views[0].is_cuda else []
    images: list[Tensor] = []
    with _kept_random_state(devices), kept_statistics(model, every=True):
        with torch.no_grad():
            changed, outs = _changes_of(devices), []
            for view in views:
                with images_of(takers, _changes_of(devices)) as given:
                    outs.append(run([view]))
                images += given
            found = [torch.cat(outs), run(views)]
            drawn = changed() or not near(*found)
            usual = at_once <= {*range(1, len(views) + 1)}
            for count in sorted(at_once - {1}) if usual else []:
                found.append(run([torch.cat(views[k : k + int(count)]) for k in range(0, len(views), int(count))]))
        before = {(layer, name): buffer.clone() for layer, name, buffer in statistics(model)}
        reached = leaves_of([run([views[0][:2]])])
        moved = {layer for layer, name, buffer in statistics(model) if not torch.equal(buffer, before[layer, name])}
    preds = [part for whole in found for part in torch.split(whole, rows)]
    return _Look(preds, images, usual and not drawn, reached, moved)


@torch.no_grad()
def _blind_to_lengths(observed: Observed) -> bool:
    repeat, pred, target = observed.any_similarity, observed.preds[0].detach(), observed.targets[0]
    return torch.allclose(repeat(F.normalize(pred, dim=1), target), repeat(pred, target), rtol=1e-2, atol=1e-3)


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


def _random_state(devices: list[torch.device]) -> list[Any]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    numpy = sys.modules.get("numpy")
    arrays = {} if numpy is None else numpy.random.get_state(legacy=False)["state"]
    others = {key: value for key, value in arrays.items() if key != "key"}  # 624 words that change every 624 draws
    return [*(state.tolist() for state in states), random.getstate(), others]


def _changes_of(devices: list[torch.device]) -> Callable[[], bool]:
    """Whether any of it has been drawn from since."""
    before = _random_state(devices)
    return lambda: _random_state(devices) != before


@contextmanager
def _kept_random_state(devices: list[torch.device]) -> Iterator[None]:
    """torch's, Python's and, if it is in use, numpy's."""
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)
