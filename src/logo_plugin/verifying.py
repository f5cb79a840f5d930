"""Whether local crops go the way that the host's step sends global ones. No host is named here."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logo_plugin.compiling import eager
from logo_plugin.modes import kept_statistics, statistics
from logo_plugin.observing import Observed
from logo_plugin.online import Heads, Method, Outputs, Source, images_of, leaves_of, run_online


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
    fed: list[Tensor],
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
        fed: The images that the step gave the backbone, as often as it called it.
        asked: The user names methods, so that not all in `observed` need be a prediction of the one network.

    Returns:
        Layers whose running statistics the method moves though it trains nothing there, as in a target network.
    """
    rows, features = observed.preds[0].shape
    images, seen = len(global_views[0]), [out for outs in ran.values() for out in outs]
    at_once = {len(out) / images for out in seen}
    half = torch.is_autocast_enabled(global_views[0].device.type) or any(x.dtype.itemsize < 4 for x in seen)

    def run(views: Sequence[Tensor]) -> Tensor:
        return torch.cat(run_online(methods, heads, source, views, features=features)[1])

    def batched(count: int) -> list[Tensor]:
        return [torch.cat(global_views[k : k + count]) for k in range(0, len(global_views), count)]

    def near(pred: Tensor, part: Tensor) -> bool:
        pred, part = pred.detach().float(), part.float()
        return pred.shape == part.shape and float((pred - part).norm()) <= (0.1 if half else 0.05) * float(part.norm())

    devices = [global_views[0].device] if global_views[0].is_cuda else []
    images_here: list[Tensor] = []  # before the network draws any random numbers
    with _kept_random_state(devices), kept_statistics(model, every=True):
        with torch.no_grad():
            changed, outs = _changes_of(devices), []
            for view in global_views:
                with images_of(backbone, _changes_of(devices)) as given:
                    outs.append(run([view]))
                images_here += given
            found = [torch.cat(outs), run(global_views)]
            drawn = changed() or not near(*found)
            usual = at_once <= {*range(1, len(global_views) + 1)}
            found += [run(batched(int(count))) for count in sorted(at_once - {1})] if usual else []
        before = {(layer, name): buffer.clone() for layer, name, buffer in statistics(model)}
        reached = leaves_of([run([global_views[0][:2]])])
        moved = {layer for layer, name, buffer in statistics(model) if not torch.equal(buffer, before[layer, name])}
    parts = [part for whole in found for part in torch.split(whole, rows)]
    same = [any(near(pred, part) for part in parts) for pred in observed.preds]
    comparable = usual and not drawn
    if comparable and not any(same) and source is None and not observed.mutual:
        repeat, pred, target = observed.any_similarity, observed.preds[0].detach(), observed.targets[0]
        with torch.no_grad():  # lengths may be nothing to the criterion
            blind = torch.allclose(repeat(F.normalize(pred, dim=1), target), repeat(pred, target), rtol=1e-2, atol=1e-3)
        same = [
            blind and any(near(F.normalize(p, dim=1), F.normalize(q, dim=1)) for q in parts) for p in observed.preds
        ]
    other = "gives the criterion something else for global crops than" if comparable and not any(same) else ""
    if not other and fed and images_here and not (comparable and all(same)):
        joined = [torch.cat([x for x in fed if x.shape[1:] == shape]) for shape in {x.shape[1:] for x in fed}]
        known = [any(_equal(x, b) for whole in (*fed, *joined) for b in _blocks(whole, len(x))) for x in images_here]
        # A view that nothing is predicted of need not be among them.
        if not (all(known) if comparable and len(observed.preds) > 1 and not asked else any(known)):
            other = "gives the backbone other images for global crops than"
    cure = "name with online= a method from images to what the criterion is given."
    if other:
        raise RuntimeError(
            f"the step of {type(model).__name__} {other} {method}, which LoGo forwards local crops with. What the step "
            f"itself does to images or features is not in it: {cure}"
        )
    trained = leaves_of(observed.preds)
    if reached is None or trained is None:
        return []
    own = {id(p): n for n, p in model.named_parameters() if not n.startswith("logo")}
    more, less = (reached - trained) & own.keys(), (trained - reached) & own.keys()
    networks = [{id(p) for p in part.parameters()} for part in (backbone, *heads.modules) if part is not None]
    if not comparable:  # layers may be left out at random, but not all of a network
        more = more & set().union(*(ids for ids in networks if not ids & trained))
    less = less.difference(*networks) if comparable and not asked else set()  # experts choose their images
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
    return [layer for name, layer in model.named_modules() if layer in moved and not reached & _around(model, name)]


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
