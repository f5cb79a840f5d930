"""One training step with LoGo: the host's on the global crops, watched, then the local crops and LoGo's terms.

batch -> views -> host's step (watched) -> local crops forwarded -> `LoGoLoss.extend` -> loss. A wrong target would come
from `LoGoModel.watch_step`, a wrong prediction from `_source` below, and `check_online` looks for both. No host is
named here.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from logo_plugin.checks import refuse_replica, warn_of_large_local_crops
from logo_plugin.compiling import eager, eager_frame, gradients_inside
from logo_plugin.crops import CropBoxes, crop_overlap
from logo_plugin.graphs import gradient, leaves_of, nodes_of
from logo_plugin.local_predictor import join_groups
from logo_plugin.losses import LoGoTerms
from logo_plugin.modes import kept_random_state, kept_statistics, statistics
from logo_plugin.observing import HALF_PRECISION, Example, Observed, is_symmetric, losses_of_views, versions
from logo_plugin.online import (
    Heads,
    Method,
    Outputs,
    Source,
    calls_of,
    chosen,
    entrances,
    images_of,
    origin_of,
    outputs_of,
    run_online,
    source_of,
)
from logo_plugin.progress import follow_trainer
from logo_plugin.ranks import in_group, is_sharded
from logo_plugin.recomputing import local_forwards
from logo_plugin.verifying import HostStep, Way, check_online
from logo_plugin.wrapped import LoGoModel, resolve


@eager_frame
def logo_step(
    model: LoGoModel, step: Callable[[list[Tensor]], Any], views: Sequence[Tensor], boxes: CropBoxes | None = None
) -> tuple[Any, LoGoTerms | None]:
    """Runs the host's step on the global crops and adds LoGo's terms to its loss.

    Outside training, or with gradients off, it is the host's step alone.

    Args:
        model: The wrapped model.
        step: What the host does with the global crops: gives the loss, or a dict with "loss", or None.
        views: All crops (N, C, H, W), global ones first.
        boxes: The crops' boxes, for `weigh_overlap`.

    Returns:
        What the step gave, with the loss extended; and the terms, detached (None where there are none).

    Raises:
        ValueError: If views or boxes are missing.
        RuntimeError: If the step is none that LoGo can extend; it says why, before any parameter has changed.
    """
    with gradients_inside():
        return _logo_step(model, step, views, boxes)


@eager_frame
def _logo_step(
    model: LoGoModel, step: Callable[[list[Tensor]], Any], views: Sequence[Tensor], boxes: CropBoxes | None
) -> tuple[Any, LoGoTerms | None]:
    settings, name = model.logo_settings, type(model).__name__
    global_views, local_views = list(views[: settings.globals]), list(views[settings.globals :])
    if not (model.training and torch.is_grad_enabled()):
        out = step(global_views)
        warn_of_eval_mode(name, out)
        return out, None
    refuse_replica(model, "what the first step finds out, and the terms of each, would be lost")
    first = not model._logo_sources
    overlap = _check_views(model, views, boxes, first)
    heads, before = model.find_heads(settings.projector), versions(*global_views)
    backbone, given = model.find_backbone(heads), [*global_views]  # a list that the step may change
    look: Any = _first_look(model, heads, backbone) if first else nullcontext((None, {}, {}))
    with look as (fed, parts, more), outputs_of(heads.modules) as ran, model.watch_step(heads, ran) as observe:
        out = _host_step(model, step, given) if first else step(given)
    if versions(*global_views) != before:
        raise RuntimeError(
            f"the step of {name} changes the images of global crops in place, and local crops stay as they are. Do it "
            "in the collate function or the dataset, for all crops; or in the network, but not in place."
        )
    if out is None:
        return None, None
    host_loss = _checked_loss(name, out)
    observed = observe(host_loss)
    if observed is None:
        return _with_loss(out, _in_the_graph(model, host_loss)), None
    if first:
        _check_other_losses(name, heads, more)
    if first and model.logo.reduction == "pairs" and model.logo.local_global_weight:
        _warn_of_a_part(model, host_loss, observed, ran.get(heads.projector, []))
    # How predictions come from the heads may change with the epoch: then it is looked up anew.
    origins = (observed.mutual, *(origin_of(pred, ran, heads) for pred in observed.preds))
    kind = _kind(model, origins)
    new = kind not in model._logo_sources
    source = _source(model, observed, ran, heads, len(global_views[0])) if new else model._logo_sources[kind]
    targets = observed.targets
    if settings.target:
        with torch.no_grad():
            targets = [_call_option(model, "target", view) for view in global_views]
    host = HostStep(global_views, observed, ran, fed, parts)
    method, local_pred, local_proj = _forward_local(model, host, heads, source, local_views, new)
    follow_trainer(model)
    terms = model.logo.extend(
        host_loss,
        global_global=observed.global_global,
        # A call that was given several views' predictions compares as many pairs.
        global_pairs=observed.global_pairs * max(1, len(observed.preds[0]) // len(global_views[0])),
        global_target=targets,
        local_pred=local_pred,
        local_proj=local_proj,
        scale=observed.scale,
        similarity=observed.similarity,
        local_overlap=overlap,
    )
    if new:
        model._logo_sources[_kind(model, origins)] = source
    model.__dict__["_logo_online"] = method
    model.logo_terms = terms.detach()
    model.logo_local_proj = [z.detach() for z in local_proj]
    return _with_loss(out, terms.total), model.logo_terms


@eager_frame
def _forward_local(
    model: LoGoModel, host: HostStep, heads: Heads, source: Source | None, views: Sequence[Tensor], new: bool
) -> tuple[str, list[Tensor], list[Tensor]]:
    """The method that runs local crops, their predictions and projections; after a look at it in a new kind of step."""
    settings, name, backbone = model.logo_settings, type(model).__name__, model.find_backbone(heads)
    options: dict[str, Any] = {
        "features": host.observed.preds[0].shape[1],
        "global_shape": host.views[0].shape[1:],
        "local_predictor": model.logo_local_predictor,
    }
    # Weights, not the statistics or scales that some layers keep as parameters.
    looked_at = model.parameters() if new and not any(map(is_sharded, model.modules())) else ()
    frozen = [p for p in looked_at if p.ndim > 1 and not p.requires_grad]
    held = [p.detach() for p in frozen]  # memory that `.data = ...` frees would be the next value's
    before = {(layer, name): buffer.clone() for layer, name, buffer in statistics(model)} if new else {}
    with local_forwards(
        model,
        backbone,
        checkpoint=settings.checkpoint_local_crops,
        running_stats=settings.local_running_stats,
        idle=[] if new else model._logo_idle,
    ):
        of_frozen = versions(*frozen)
        methods = chosen(model, methods_of(model, heads), heads, source, views[0], **options)
        method, preds, projs = run_online(methods, heads, source, views, concat=settings.concat_local_crops, **options)
    del held
    if versions(*frozen) != of_frozen:
        raise RuntimeError(
            f"{method} of {name} moves parameters that nothing trains, those of a target network, say, and each local "
            "crop would move them again. Move them in the step, or name a method that does not with online=."
        )
    if new:
        way, asked = Way(methods, method, heads, source, backbone), bool(settings.target or settings.online)
        model._logo_idle = check_online(model, host, way, asked=asked)
        for layer, buffer, value in statistics(model):
            if layer in model._logo_idle:
                value.data.copy_(before[layer, buffer])  # the host's graph may hold it
        if model.logo.affinity is not None and heads.trained and not all(z.requires_grad for z in projs):
            raise RuntimeError(
                f"{method} of {name} gives projections of local crops without gradient, so nothing could repel them. "
                "torch.utils.checkpoint needs use_reentrant=False; or give affinity=None."
            )
    return method, preds, projs


def _kind(model: LoGoModel, origins: tuple[Any, ...]) -> tuple[Any, ...]:
    """Steps of one kind send local crops the same way, which is looked up and checked in the first of them."""
    if not model._logo_idle:
        return origins
    # A frozen backbone, perhaps, that is trained from some epoch on.
    return (*origins, sum(parameter.requires_grad for parameter in model.parameters()))


def _with_loss(out: Any, loss: Tensor) -> Any:
    return {**out, "loss": loss} if isinstance(out, dict) else loss


def _in_the_graph(model: LoGoModel, host_loss: Tensor) -> Tensor:
    """The loss of a step without LoGo; DDP waits for a gradient of each parameter, those that LoGo added too."""
    if not in_group():
        return host_loss
    nothing = [p.flatten()[:0].sum().to(host_loss) for p in model.logo_parameters() if p.requires_grad]
    return sum(nothing, host_loss)


@contextmanager
def _first_look(model: LoGoModel, heads: Heads, backbone: nn.Module | None) -> Iterator[tuple[Any, Any, Any]]:
    """What only the first step is watched for: images and parts as in `HostStep`, and other losses by name."""
    with (
        images_of(entrances(heads, backbone)) as images,
        calls_of(heads.behind(backbone)) as parts,
        losses_of_views(_others(model)) as losses,
    ):
        yield images, parts, losses


@eager
def _check_views(model: LoGoModel, views: Sequence[Tensor], boxes: CropBoxes | None, first: bool) -> Tensor | None:
    """The overlap of the local crops where the repulsion is weighed by it; an error if there are none, or no boxes."""
    settings, count = model.logo_settings, model.logo_settings.globals
    if len(views) <= count:
        raise ValueError(
            f"{type(model).__name__} got {len(views)} views, of which {count} are global, so there are no local crops. "
            "Give the data loader collate_fn=MultiCropCollate(...), and its dataset no transform."
        )
    if first and settings.global_crops is None:
        warn_of_large_local_crops(views, count)
    elif first and len(sides := {tuple(view.shape[-2:]) for view in views[:count]}) > 1:
        warnings.warn(
            f"global_crops={count}, and the first {count} views have different sizes, {sorted(sides)}: the smaller "
            f"ones may be local crops. Make as many global ones, MultiCropCollate(global_crops={count}).",
            stacklevel=4,
        )
    if not settings.weigh_overlap:
        return None
    if not isinstance(boxes, CropBoxes):
        raise ValueError("weigh_overlap=True needs the crops' boxes: use MultiCropCollate(return_boxes=True).")
    return crop_overlap(boxes.boxes[count:])


def _checked_loss(name: str, out: Any) -> Tensor:
    loss = loss_of(out)
    if not isinstance(loss, Tensor):
        got = f"a dict of {', '.join(map(str, out))}" if isinstance(out, dict) else type(out).__name__
        raise RuntimeError(
            f"the step of {name} gives {got}, and LoGo adds its terms to a loss: let it give a tensor, or a dict with "
            'the "loss".'
        )
    return loss


@eager
def _check_other_losses(name: str, heads: Heads, losses: dict[str, Tensor]) -> None:
    """RuntimeError if one of these losses, which LoGo does not extend, trains the projector."""
    projector = {id(p) for p in heads.projector.parameters()}
    also = ", ".join(loss for loss, value in losses.items() if projector & (leaves_of([value]) or set()))
    if also:
        raise RuntimeError(
            f"{name} trains its projector with other losses of two tensors (N, D), too ({also}), which local crops "
            'would go without. Say with criterion= which one LoGo extends, and give reduction="sum", which keeps its '
            "balance with the others; or put all into one criterion."
        )


@eager
def _warn_of_a_part(model: LoGoModel, host_loss: Tensor, observed: Observed, projections: Sequence[Tensor]) -> None:
    """Warns if the criterion is but a part of what trains the projector: its gradient there is not the loss's."""
    where = [z for z in projections if z.requires_grad]
    # A compiled graph may keep nothing for a second gradient through it, nor does a checkpoint; and DDP on a part, with
    # static_graph, takes the first gradient for backward's.
    hidden = {"CheckpointFunctionBackward", "CompiledFunctionBackward", "_DDPSinkBackward"}
    if not where or hidden & {type(node).__name__ for node in nodes_of([host_loss])}:
        return
    of_loss = gradient(host_loss, where)
    of_criterion = gradient(observed.scale * observed.global_global, where)
    if float((of_loss - of_criterion).norm()) > 0.1 * float(of_loss.norm()):
        warnings.warn(
            f"the loss of {type(model).__name__} trains its projector by more than the criterion that LoGo extends, as "
            "by the variance and covariance of VICReg. LoGo takes the criterion's mean over global and local pairs, so "
            "beside the rest it counts less than before, and local crops go without the rest. Put all of it into one "
            'criterion; or give reduction="sum", which leaves the global crops the balance that they have.',
            stacklevel=4,
        )


def _others(model: LoGoModel) -> dict[str, nn.Module]:
    """What may be a second loss of the two views; none if the user has said which one counts."""
    if model._logo_config[0].criterion is not None:
        return {}
    criterion = model.logo_settings.criterion
    own = resolve(model, criterion) if criterion else None
    return {name: child for name, child in model.named_children() if name != "logo" and child is not own}


def loss_of(out: Any) -> Any:
    """The loss in what a step gave: itself, or a dict with "loss"."""
    return out.get("loss") if isinstance(out, dict) else out


def warn_of_eval_mode(name: str, out: Any) -> None:
    """Warns of what a step gave without LoGo's terms, if one could train with it."""
    loss = loss_of(out)
    if isinstance(loss, Tensor) and loss.requires_grad:
        warnings.warn(
            f"{name} is in eval mode, so its loss is without LoGo's terms. To train it call model.train() first; "
            "to look at it use torch.no_grad().",
            stacklevel=4,
        )


def log_terms(model: Any, terms: LoGoTerms | None, batch_size: int) -> None:
    """Logs `logo/...` where a LightningModule has a Trainer."""
    try:
        running = model.trainer is not None
    except (AttributeError, RuntimeError):
        running = False
    if terms is not None and running:
        logged = {f"logo/{name}": value for name, value in terms._asdict().items() if name != "total"}
        model.log_dict(logged, batch_size=batch_size)


def groups_of(configured: Any) -> Iterator[dict[str, Any]]:
    """The parameter groups of all optimizers in what a LightningModule's `configure_optimizers` gives."""
    if hasattr(configured, "param_groups"):  # torch's, or a wrapper around one
        yield from configured.param_groups
    elif isinstance(configured, (list, tuple, dict)):
        for item in configured.values() if isinstance(configured, dict) else configured:
            yield from groups_of(item)


def join_optimizer(model: Any, predictor: nn.Module | None, groups: Iterable[dict[str, Any]]) -> None:
    """Puts what LoGo added into optimizer groups that are there: the affinity into one without weight decay.

    Not with add_param_group: schedulers built before count the groups.

    Args:
        model: Has `logo` and `logo_local_predictor`.
        predictor: What a local predictor is a copy of.
        groups: The optimizer's.
    """
    groups = list(groups)
    if predictor is not None and model.logo_local_predictor is not None:
        join_groups(groups, predictor, model.logo_local_predictor)
    if model.logo.affinity is None or not groups:
        return
    known = {id(parameter) for group in groups for parameter in group["params"]}
    missing = {f"logo.affinity.{n}": p for n, p in model.logo.affinity.named_parameters() if id(p) not in known}
    if missing:
        home = next((group for group in groups if not group.get("weight_decay")), groups[0])
        home["params"].extend(missing.values())
        if "param_names" in home:
            home["param_names"].extend(missing)


def methods_of(model: LoGoModel, heads: Heads) -> list[tuple[str, Method]]:
    """What may run backbone and heads: the user's `online`, what the first step found, or the host's guesses."""
    online = model.logo_settings.online
    if online is not None:
        name = online if isinstance(online, str) else getattr(online, "__name__", "online")
        return [(name, lambda images: _call_option(model, "online", images))]
    methods = model.online_methods(heads)
    found = model.__dict__.get("_logo_online")  # the first step's
    return [method for method in methods if method[0] == found] or methods


@eager
def _source(model: LoGoModel, observed: Observed, ran: Outputs, heads: Heads, images: int) -> Source | None:
    """Where the predictions come from, as this step showed, or an error: without that no local ones can be had."""
    settings = model.logo_settings
    criterion = "" if settings.criterion is None else f"{type(resolve(model, settings.criterion)).__name__} of "
    name = f"{criterion}{type(model).__name__}"
    if not all(bool(pred.isfinite().all()) for pred in observed.preds):
        raise RuntimeError(
            f"{name} was given predictions that are not finite, so LoGo cannot tell where they come from. Look for nan "
            "or inf in the first batch's images and in the weights; float16 overflows where bfloat16 does not."
        )
    if observed.example is not None:
        _check_example(observed.example, model, name)
    signs = observed.weights.sign().tolist()
    if min(signs) < 0 < max(signs):
        raise RuntimeError(
            f"{name} is added to the loss for some pairs and subtracted for others, as for negatives, and local crops "
            "would be pulled to all of them. Put both into one criterion, or use LoGoLoss directly."
        )
    rows = len(observed.preds[0])
    if rows != images and settings.target is None:
        raise RuntimeError(
            f"{name} was called with {rows} predictions of {images} images, so with those of several views or ranks in "
            "one. Call it once for each view, with the predictions of this process, and take the mean."
        )
    sources = [source_of(pred, ran, heads) for pred in observed.preds]
    found = [source for source in sources if source is not None]
    if observed.mutual:
        if settings.criterion is not None and any(p.ndim > 1 for p in resolve(model, settings.criterion).parameters()):
            raise RuntimeError(
                f"{name} has layers of its own and is given two tensors that both carry gradient, so LoGo cannot tell "
                "which side it makes a prediction of. Put the layers into the model, as its predictor."
            )
        likely = len(set(sources)) == 1 or settings.target is not None
        first, second = (pred.detach() for pred in observed.preds[:2])
        symmetric = observed.both_ways or is_symmetric(observed.any_similarity, first, second)
        if not (likely and symmetric):
            raise RuntimeError(
                f"{name} was called with two tensors that both carry gradient and do not play the same part, so LoGo "
                "cannot tell the prediction from the target. Detach the target before the criterion"
                f"{', or name the method that computes targets with target=' if symmetric else ''}."
            )
    if settings.online is not None:
        return None
    if not found or (len(set(sources)) > 1 and not observed.mutual):
        named = [name for name, module in model.named_modules() if module in heads.modules]
        raise RuntimeError(
            f"{name} is given something else than the output of the {' or '.join(named)}, so LoGo does not know "
            "what to give it for local crops. Name the method from images to what the criterion takes with online=, or "
            "the projector with projector=."
        )
    return max(found)  # a predictor's, if any


def _check_example(example: Example, model: LoGoModel, name: str) -> None:
    """RuntimeError if the repetition gives another value, unless that is random, as four of it tell."""
    pred, value = example.pred.detach(), example.value.detach().float()
    with kept_random_state(pred.device), kept_statistics(model, every=True), torch.enable_grad():
        # Of copies, which the criterion may change in place, and with gradient, as in the step.
        sides = [(pred.clone().requires_grad_().clone(), example.target.clone()) for _ in range(4)]
        repeated, *again = (example.similarity(p, t).detach().float() for p, t in sides)
    relative, absolute = HALF_PRECISION if pred.dtype.itemsize < 4 else (1e-2, 1e-3)
    same = torch.allclose(repeated, value, rtol=relative, atol=absolute)
    if not same and all(torch.equal(repeated, x) for x in again):
        raise RuntimeError(f"{name} {example.otherwise.format(float(value), float(repeated))}")


def _host_step(model: LoGoModel, step: Callable[[list[Tensor]], Any], views: list[Tensor]) -> Any:
    alone = "If BatchNorm needs more than the batch's one image, give drop_last=True. " if len(views[0]) == 1 else ""
    with _explained(
        f"{type(model).__name__}'s own step failed on its {len(views)} global crops, which are all that LoGo gives it "
        f"({{}}). {alone}If it needs other inputs (masks, lists of views, own local crops), LoGo cannot extend it: use "
        "LoGoLoss directly. If it needs more global crops, give global_crops=."
    ):
        return step(views)


@eager_frame
def _call_option(model: LoGoModel, option: str, images: Tensor) -> Any:
    """What the user named with online= or target=, on crops."""
    method, shape = getattr(model.logo_settings, option), tuple(images.shape)
    name, wanted = getattr(method, "__name__", method), {"online": "predictions", "target": "targets"}[option]
    with _explained(f"{option}={name!r} failed on crops {shape} ({{}}). Name a method from images to {wanted}."):
        return model.call_logo(method, images)


@contextmanager
def _explained(message: str) -> Iterator[None]:
    """Puts what the host's code raises into a message with a cure."""
    try:
        yield
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        # Not format: the repr of what the user named may hold braces.
        raise RuntimeError(message.replace("{}", f"{type(error).__name__}: {error}")) from error
