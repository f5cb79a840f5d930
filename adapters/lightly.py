"""lightly: models written as its examples, tutorials and benchmarks write them.

lightly ships no model classes: users own a class, usually copied from an example. So the class's own
training step runs unchanged on the global crops, and LoGo learns what it needs (targets, predictions,
the scale of the loss) from the calls to its criterion. Neither lightly nor Lightning is imported.
"""

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logo_plugin.affinity import Affinity
from logo_plugin.crops import CropBoxes, crop_overlap
from logo_plugin.local_predictor import join_groups, stand_in
from logo_plugin.losses import LoGoLoss, LoGoTerms, info_nce, with_preset
from logo_plugin.wrapping import unknown_option

_ONLINE = ("forward_student", "forward_query_encoder", "forward")
_TARGET = ("forward_momentum", "forward_teacher", "forward_key_encoder")
_PROJECTOR = ("projection_head", "projection_mlp", "projector")
_PREDICTOR = ("prediction_head", "prediction_mlp", "predictor")
_COMPOSE = "backbone, projector, predictor"  # in place of a method's name
_STEPS_BEFORE_WARNING = 32


def wrap(
    x: Any,
    *,
    affinity: nn.Module | str | None = "auto",
    online: str | Callable[[Tensor], Any] | None = None,
    target: str | Callable[[Tensor], Tensor] | None = None,
    criterion: str | nn.Module | None = None,
    projector: str | None = None,
    global_crops: int = 2,
    concat_local_crops: bool = False,
    weigh_overlap: bool = False,
    local_predictor: bool = False,
    preset: str | None = None,
    **options: Any,
) -> Any:
    """Adds LoGo to a BYOL, MoCo or SimSiam model in lightly's style.

    A LightningModule keeps its `training_step`, which gets the first `global_crops` views; LoGo adds
    its terms to the loss and logs `logo/global_global`, `logo/local_global`, `logo/local_local` and
    `logo/affinity`. A plain module learns to take a list of views: `loss = model(views)`, and keeps the
    terms of the last call in `model.logo_terms`; give it `criterion=`, and wrap it before building the
    optimizer.

    Args:
        x: The model, which is wrapped in place, or its class (also as a decorator).
        affinity: "auto" builds `Affinity` for the projector's width; a module; or None for plain
            multi-crop without repulsion.
        online: Method (name or callable) that takes images to the online prediction; its last output
            counts. Default: `forward_student`, `forward_query_encoder` or `forward`, whichever runs
            the projector (and predictor), else backbone, projector and predictor in turn.
        target: Method (name or callable) that takes global crops to targets. Default: the targets that
            the criterion was given; for plain modules `forward_momentum` and the like, or the
            projection itself (SimSiam).
        criterion: The loss module or its attribute name. Default: `criterion`.
        projector: Attribute whose output the affinity compares. Default: `projection_head` and the like.
        global_crops: How many of the views are global; they come first.
        concat_local_crops: Forward all local crops as one batch. Faster on small crops, but their
            BatchNorm statistics are then shared.
        weigh_overlap: Multiply the repulsion of two local crops by 1 - IoU of their boxes. Needs
            `MultiCropCollate(return_boxes=True)`; a plain module takes them as `model(views, boxes)`.
        local_predictor: Give local crops a predictor of their own (MULAN, arXiv 2602.05845): a copy of the
            model's, made when wrapping, in the same optimizer group and with the same initial values
            (MULAN draws others). The model's own then sees global crops only.
        preset: "paper" or "release": the options of `LoGoLoss.paper` or `LoGoLoss.release`, except those given.
        **options: Options of `LoGoLoss`, except `similarity`: the model's criterion serves.

    Returns:
        The same instance; or for a class a subclass of the same name.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If a part is missing; the message names the option that helps.
    """
    _check_names(options)
    if not isinstance(global_crops, int) or global_crops < 2:
        raise ValueError(f"global_crops must be an integer >= 2, got {global_crops!r}.")
    settings = _Settings(online, target, criterion, projector, global_crops, concat_local_crops, weigh_overlap)
    base: Any = x if inspect.isclass(x) else type(x)
    if issubclass(base, _LoGo):
        raise ValueError(f"{base.__name__} is wrapped already.")
    options = with_preset(preset, options)
    LoGoLoss(**options)  # a bad value should fail here, not when the class is instantiated
    cls: Any = _subclass(
        base, {"affinity": affinity, "local_predictor": local_predictor, "settings": settings, "options": options}
    )
    if inspect.isclass(x):
        return cls
    x.__class__ = cls
    try:
        x._attach_logo()
    except BaseException:
        x.__class__ = base
        raise
    return x


@dataclass
class _Settings:
    online: str | Callable[[Tensor], Any] | None
    target: str | Callable[[Tensor], Tensor] | None
    criterion: str | nn.Module | None
    projector: str | None
    global_crops: int
    concat_local_crops: bool
    weigh_overlap: bool


class _Observed(NamedTuple):
    """What the criterion's calls in one training step say about the host's objective."""

    targets: list[Tensor]
    values: list[Tensor]
    features: int
    similarity: Callable[[Tensor, Tensor], Tensor]


class _LoGo(nn.Module):
    """Mixed in before the user's class; `logo` holds the loss and with it the affinity."""

    _logo_config: dict[str, Any]
    _logo_base: type[nn.Module]
    logo: LoGoLoss
    logo_local_predictor: nn.Module | None
    logo_settings: _Settings
    logo_terms: LoGoTerms | None
    logo_local_proj: list[Tensor] | None  # of the last step, detached: what LoGoMonitor measures

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._attach_logo()

    def _attach_logo(self) -> None:
        if hasattr(self, "logo"):
            raise ValueError(
                f"{type(self).__name__} has an attribute 'logo' already, where the affinity goes; rename it."
            )
        config = self._logo_config
        settings: _Settings = config["settings"]
        affinity = copy.deepcopy(config["affinity"])
        if affinity == "auto":
            affinity = Affinity(_width(_heads(self, settings.projector).projector))
        settings = replace(settings, criterion=settings.criterion or _find_criterion(self))
        _resolve(self, settings.criterion)
        predictor = _heads(self, settings.projector).predictor if config["local_predictor"] else None
        if config["local_predictor"] and predictor is None:
            raise ValueError(
                f"local_predictor=True copies the predictor, and {type(self).__name__} has no "
                f"{' / '.join(_PREDICTOR)}. Methods without a predictor, such as MoCo v2, go without the option."
            )
        self.logo_local_predictor = copy.deepcopy(predictor)
        self.logo = LoGoLoss(affinity=affinity, **config["options"]).to(next(self.parameters()).device)
        self.logo_settings, self.logo_terms, self.logo_local_proj = settings, None, None

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickled by the user's own class unless that name now means the wrapped class (a decorator).
        reduced = super().__reduce_ex__(protocol)
        found: Any = sys.modules.get(type(self).__module__)
        for name in type(self).__qualname__.split("."):
            found = getattr(found, name, None)
        return reduced if found is type(self) else (_unpickle, (self._logo_base,), *reduced[2:])


class _LightningLoGo(_LoGo):
    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "automatic_optimization", True):
            raise RuntimeError(
                f"{type(self).__name__} uses manual optimization, so its training_step has called backward before LoGo "
                "can add its terms. Use automatic optimization, or LoGoLoss directly."
            )
        views = _views(batch, self.logo_settings.global_crops)
        step = super().training_step  # type: ignore[misc]
        count = self.logo_settings.global_crops
        boxes = next((item for item in batch if isinstance(item, CropBoxes)), None)
        trimmed = type(batch)([views[:count], *(item for item in batch[1:] if item is not boxes)])
        out, terms = _logo_step(self, partial(step, trimmed, *args, **kwargs), views, boxes)
        if terms is not None and _has_trainer(self):
            logged = {f"logo/{name}": value for name, value in terms._asdict().items() if name != "total"}
            self.log_dict(logged, batch_size=len(views[0]))  # type: ignore[operator]
        return out

    def configure_optimizers(self) -> Any:
        configured = super().configure_optimizers()  # type: ignore[misc]
        groups = [group for optimizer in _optimizers(configured) for group in optimizer.param_groups]
        predictor = _heads(self, self.logo_settings.projector).predictor
        if predictor is not None and self.logo_local_predictor is not None:
            join_groups(groups, predictor, self.logo_local_predictor)
        if self.logo.affinity is not None:
            known = {id(parameter) for group in groups for parameter in group["params"]}
            missing = [p for p in self.logo.affinity.parameters() if id(p) not in known]
            if groups and missing:
                # Not add_param_group: schedulers built above count the groups.
                undecayed = [group for group in groups if not group.get("weight_decay")]
                (undecayed or groups)[0]["params"].extend(missing)
        return configured


class _PlainLoGo(_LoGo):
    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, (list, tuple)):
            return super().forward(x, *args, **kwargs)
        views = _views([x], self.logo_settings.global_crops)
        out, _ = _logo_step(self, partial(_plain_step, self, views), views, *args, **kwargs)
        self._warn_if_affinity_rests()
        return out

    def _warn_if_affinity_rests(self) -> None:
        if self.logo.affinity is None or not self.training:
            return
        versions = [p._version for p in self.logo.affinity.parameters()]
        steps, first = self.__dict__.get("_logo_versions", (0, versions))
        self.__dict__["_logo_versions"] = (steps + 1, first)
        if steps + 1 == _STEPS_BEFORE_WARNING and versions == first:
            warnings.warn(
                f"the affinity's parameters have not changed in {_STEPS_BEFORE_WARNING} steps: build the optimizer "
                "after wrap(model), so that model.parameters() includes them.",
                stacklevel=4,
            )


def _logo_step(
    model: _LoGo, step: Callable[[], Any], views: Sequence[Tensor], boxes: CropBoxes | None = None
) -> tuple[Any, LoGoTerms | None]:
    """Runs the host's step on the global crops and adds LoGo's terms to its loss."""
    settings = model.logo_settings
    overlap = None
    if settings.weigh_overlap:
        if not isinstance(boxes, CropBoxes):
            raise ValueError("weigh_overlap=True needs the crops' boxes: use MultiCropCollate(return_boxes=True).")
        overlap = crop_overlap(boxes.boxes[settings.global_crops :])
    criterion = _resolve(model, settings.criterion)
    with _observe(criterion) as calls:
        out = step()
    if out is None:
        return None, None
    host_loss = out["loss"] if isinstance(out, dict) else out
    observed = _read(calls, criterion, bool(settings.target))
    weights = torch.autograd.grad(host_loss, observed.values, retain_graph=True, allow_unused=True)
    used = [(w, value) for w, value in zip(weights, observed.values, strict=True) if w is not None]
    if not used:
        raise RuntimeError(
            "the loss does not depend on the criterion that LoGo observes; name another with criterion=."
        )
    scale = torch.stack([w for w, _ in used]).sum()
    global_global = torch.stack([w * value for w, value in used]).sum() / scale
    targets = observed.targets
    if settings.target:
        with torch.no_grad():
            targets = [_call(model, settings.target, view) for view in views[: settings.global_crops]]
    local_pred, local_proj = _forward_local(model, views[settings.global_crops :], observed.features, views[0])
    terms = model.logo.extend(
        host_loss,
        global_global=global_global,
        global_pairs=len(used) * (2 if isinstance(calls[0][0][0], (tuple, list)) else 1),
        global_target=targets,
        local_pred=local_pred,
        local_proj=local_proj,
        scale=scale,
        similarity=observed.similarity,
        local_overlap=overlap,
    )
    model.logo_terms = terms.detach()
    model.logo_local_proj = [z.detach() for z in local_proj]
    return ({**out, "loss": terms.total} if isinstance(out, dict) else terms.total), model.logo_terms


@contextmanager
def _observe(criterion: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], Tensor, Tensor | None]]]:
    """Yields a list that fills with (arguments, value, negatives) of each call to the criterion."""
    calls: list[tuple[tuple[Any, ...], Tensor, Tensor | None]] = []
    negatives: list[Tensor] = []
    bank = getattr(criterion, "memory_bank", None)

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> None:
        calls.append(((*args, *kwargs.values()), value, negatives[0] if negatives else None))

    with ExitStack() as stack:
        stack.callback(criterion.register_forward_hook(record, with_kwargs=True).remove)
        if isinstance(bank, nn.Module):
            # NTXentLoss calls memory_bank.forward itself, past any hook. Its answer to the first call are the
            # negatives of this step, before any of this step's keys is among them.
            query = bank.forward

            def remember(*args: Any, **kwargs: Any) -> Any:
                output, bank_negatives = query(*args, **kwargs)
                if bank_negatives is not None:
                    negatives.append(bank_negatives)
                return output, bank_negatives

            bank.__dict__["forward"] = remember
            stack.callback(bank.__dict__.pop, "forward")
        yield calls


def _read(
    calls: list[tuple[tuple[Any, ...], Tensor, Tensor | None]], criterion: nn.Module, target_given: bool
) -> _Observed:
    name = type(criterion).__name__
    if not calls:
        raise RuntimeError(f"the training step never called its criterion {name}; name the right one with criterion=.")
    targets: list[Tensor] = []
    similarity: Callable[[Tensor, Tensor], Tensor] = criterion
    for args, _, negatives in calls:
        if len(args) == 2 and all(isinstance(a, (tuple, list)) and len(a) == 2 for a in args):
            # SymNegCosineSimilarityLoss((z0, p0), (z1, p1)): with the same pair twice it is s(p, z).
            targets += [args[1][0].detach(), args[0][0].detach()]
            pred = args[0][1]
            similarity = lambda p, t: criterion((t, p), (t, p))  # noqa: E731
            continue
        if len(args) != 2 or not all(isinstance(a, Tensor) and a.ndim == 2 for a in args):
            raise RuntimeError(
                f"{name} is no loss of a prediction (N, D) and a target (N, D); name one with criterion=."
            )
        carries = [a.requires_grad for a in args]
        if not any(carries) or (all(carries) and not target_given):
            raise RuntimeError(
                f"{name} was called with two tensors that {'both' if all(carries) else 'do not'} carry gradient, so "
                "LoGo cannot tell the prediction from the stop-gradient target. Detach the target before the "
                "criterion, or name the method that computes targets with target=."
            )
        position = carries.index(True)
        pred = args[position]
        targets.append(args[1 - position])
        if negatives is not None:
            queue, temperature = calls[0][2], getattr(criterion, "temperature", None)
            if temperature is None:
                raise RuntimeError(f"{name} has a memory bank but no temperature, so its InfoNCE cannot be repeated.")
            similarity = partial(info_nce, queue=queue, temperature=temperature)
        elif position == 1:
            similarity = lambda p, t: criterion(t, p)  # noqa: E731
    unique = list({id(t): t for t in targets}.values())
    return _Observed(unique, [value for _, value, _ in calls], pred.shape[1], similarity)


class _Heads(NamedTuple):
    owner: nn.Module
    projector: nn.Module
    predictor: nn.Module | None


def _heads(model: nn.Module, projector: str | None) -> _Heads:
    """The projector and predictor, on the model itself or on the one submodule that has them."""
    names = (projector,) if projector else _PROJECTOR
    for owner in model.modules():
        for name in names:
            if isinstance(getattr(owner, name, None), nn.Module):
                predictors = (getattr(owner, n, None) for n in _PREDICTOR)
                return _Heads(owner, getattr(owner, name), next((p for p in predictors if p is not None), None))
    raise ValueError(
        f"{type(model).__name__} has no {' / '.join(names)}, whose output the affinity compares. "
        "Name your projector with projector='...'."
    )


def _forward_local(
    model: _LoGo, local_views: Sequence[Tensor], features: int, global_view: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Online predictions and projections of the local crops."""
    batches = [torch.cat(list(local_views))] if model.logo_settings.concat_local_crops else local_views
    predictor = _heads(model, model.logo_settings.projector).predictor
    preds: list[Tensor] = []
    projs: list[Tensor] = []
    for batch in batches:
        with stand_in(predictor, model.logo_local_predictor):
            pred, proj = _online(model, batch, global_view)
        if not isinstance(pred, Tensor) or pred.shape != (len(batch), features):
            got = tuple(pred.shape) if isinstance(pred, Tensor) else type(pred).__name__
            raise RuntimeError(
                f"the online network gave {got} for local crops {tuple(batch.shape)}, but the criterion takes "
                f"predictions ({len(batch)}, {features}). Name the method from images to predictions with online=."
            )
        preds += torch.split(pred, len(global_view))
        projs += proj
    return preds, projs


def _online(model: _LoGo, images: Tensor, global_view: Tensor) -> tuple[Any, Sequence[Tensor]]:
    """Predictions, and projections split to the batch size, by the first method that runs the heads."""
    settings, heads = model.logo_settings, _heads(model, model.logo_settings.projector)
    methods: list[str | Callable[[Tensor], Any]] = [settings.online] if settings.online else []
    if not settings.online:
        if not _takes_two_views(heads.owner):
            methods += [name for name in _ONLINE if _defines(model, name)][:1]
        if isinstance(getattr(heads.owner, "backbone", None), nn.Module):
            methods.append(_COMPOSE)
    for method in methods:
        pred, ran = _run(model, method, images, global_view, heads)
        trusted = settings.online and model.logo_local_predictor is None
        if heads.projector in ran and (trusted or heads.predictor is None or heads.predictor in ran):
            settings.online = method
            return pred, ran[heads.projector]
    also = "" if heads.predictor is None else " and predictor"
    raise RuntimeError(
        f"no method of {type(model).__name__} that LoGo knows runs the projector{also} (tried {methods}). Name the "
        "method from images to predictions with online=, or the projector with projector=."
    )


def _run(
    model: _LoGo, method: str | Callable[[Tensor], Any], images: Tensor, global_view: Tensor, heads: _Heads
) -> tuple[Any, dict[nn.Module, Sequence[Tensor]]]:
    """The method's last output, and the outputs of the heads that it ran."""
    ran: dict[nn.Module, Sequence[Tensor]] = {}

    def remember(head: nn.Module, _: Any, out: Tensor) -> Tensor:
        ran[head] = torch.split(out, len(global_view))
        # What follows must compute from the pieces: the gradient ratio is taken at them.
        return ran[head][0] if len(ran[head]) == 1 else torch.cat(list(ran[head]))

    with ExitStack() as stack:
        for head in (heads.projector, heads.predictor):
            if head is not None:
                stack.callback(head.register_forward_hook(remember).remove)
        try:
            if method == _COMPOSE:
                out = heads.projector(heads.owner.backbone(images).flatten(start_dim=1))  # type: ignore[operator]
                out = out if heads.predictor is None else heads.predictor(out)
            else:
                out = _call(model, method, images)
        except (RuntimeError, ValueError, AssertionError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError) or images.shape[1:] == global_view.shape[1:]:
                raise
            raise RuntimeError(
                f"the online network failed on local crops {tuple(images.shape)}, while global crops are "
                f"{tuple(global_view.shape)}. If the backbone takes one size only, use local_size=global_size, "
                "or build it for other sizes (timm: dynamic_img_size=True for ViT, strict_img_size=False for Swin)."
            ) from error
    return (out[-1] if isinstance(out, (tuple, list)) else out), ran


def _plain_step(model: _PlainLoGo, views: Sequence[Tensor]) -> Tensor:
    """The loss on the global crops, as lightly's plain PyTorch examples compute it in their loop."""
    settings = model.logo_settings
    criterion = _resolve(model, settings.criterion)
    if _takes_two_views(model):  # lightly.models of lightly 1.5
        outs = super(_PlainLoGo, model).forward(views[0], views[1])
        if isinstance(outs[0], Tensor) or type(criterion).__name__.startswith("Sym"):
            return criterion(*outs)  # type: ignore[no-any-return]
        (z0, p0), (z1, p1) = outs
        return 0.5 * (criterion(p0, z1.detach()) + criterion(p1, z0.detach()))  # type: ignore[no-any-return]
    target = settings.target or next((name for name in _TARGET if hasattr(model, name)), None)
    # MoCo with a queue: one direction, as in lightly's example, since every call enqueues its keys.
    one_way = target is not None and getattr(getattr(criterion, "memory_bank", None), "size", (0,))[0] > 0
    pairs = ((0, 1),) if one_way else ((0, 1), (1, 0))
    online = [_online(model, view, views[0]) for view in views[: len(pairs)]]
    losses = [
        criterion(online[i][0], (_call(model, target, views[j]) if target else online[j][1][0]).detach())
        for i, j in pairs
    ]
    return torch.stack(losses).mean()


def _views(batch: Any, global_crops: int) -> list[Tensor]:
    views = batch[0] if isinstance(batch, (list, tuple)) and batch else None
    if not isinstance(views, (list, tuple)) or not all(isinstance(view, Tensor) and view.ndim == 4 for view in views):
        raise ValueError(
            f"expected a batch whose first item is the list of views (N, C, H, W), got {_describe(batch)}. "
            "Give the data loader collate_fn=MultiCropCollate(...)."
        )
    if len(views) <= global_crops:
        raise ValueError(
            f"got {len(views)} views, of which {global_crops} are global, so there are no local crops. Give the data "
            "loader collate_fn=MultiCropCollate(...), and its dataset no transform."
        )
    return list(views)


def _call(model: nn.Module, method: str | Callable[[Tensor], Any], images: Tensor) -> Any:
    if not isinstance(method, str):
        return method(images)
    if method == "forward" and isinstance(model, _PlainLoGo):
        return super(_PlainLoGo, model).forward(images)
    return getattr(model, method)(images)


def _resolve(model: nn.Module, criterion: str | nn.Module | None) -> nn.Module:
    found = getattr(model, criterion, None) if isinstance(criterion, str) else criterion
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"criterion={criterion!r} is neither a loss module nor the name of one of {type(model).__name__}."
        )
    return found


def _find_criterion(model: nn.Module) -> str:
    losses = [name for name, child in model.named_children() if type(child).__module__.startswith("lightly.loss")]
    if "criterion" in dict(model.named_children()):
        return "criterion"
    if len(losses) == 1:
        return losses[0]
    raise ValueError(
        f"{type(model).__name__} has no loss module named 'criterion', which LoGo observes. "
        "Name the attribute, or give the module itself, with criterion=."
    )


def _width(projector: nn.Module) -> int:
    for layer in reversed(list(projector.modules())):
        width = getattr(layer, "out_features", None) or getattr(layer, "num_features", None)
        if isinstance(width, int):
            return width
    raise ValueError(f"cannot tell the output width of {type(projector).__name__}; give affinity=Affinity(dim=...).")


def _defines(model: nn.Module, name: str) -> bool:
    """Whether the user's class brings a method (LightningModule and Module bring a forward of their own)."""
    brought = getattr(model._logo_base, name, None)
    return callable(brought) and not brought.__module__.startswith(("torch.", "lightning.", "pytorch_lightning."))


def _takes_two_views(module: nn.Module) -> bool:
    forward = getattr(module, "_logo_base", type(module)).forward
    return "x1" in inspect.signature(forward).parameters


def _optimizers(configured: Any) -> Iterator[torch.optim.Optimizer]:
    if isinstance(configured, torch.optim.Optimizer):
        yield configured
    elif isinstance(configured, (list, tuple, dict)):
        for item in configured.values() if isinstance(configured, dict) else configured:
            yield from _optimizers(item)


def _has_trainer(model: Any) -> bool:
    try:
        return model.trainer is not None
    except (AttributeError, RuntimeError):
        return False


def _describe(batch: Any) -> str:
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__} [{', '.join(_describe(item) for item in batch[:4])}]"
    return f"tensor {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__


def _check_names(options: dict[str, Any]) -> None:
    own, loss = (inspect.signature(f).parameters for f in (wrap, LoGoLoss.__init__))
    valid = (set(own) | set(loss)) - {"x", "self", "options", "similarity"}
    for name in options:
        if name not in valid:
            raise TypeError(f"wrap(): {unknown_option(name, valid)}")


def _subclass(base: type[nn.Module], config: dict[str, Any]) -> type[_LoGo]:
    mixin = _LightningLoGo if hasattr(base, "training_step") else _PlainLoGo
    cls = type(base.__name__, (mixin, base), {"_logo_config": config, "_logo_base": base, "__doc__": base.__doc__})
    cls.__module__, cls.__qualname__ = base.__module__, base.__qualname__
    return cls


def _unpickle(base: type[nn.Module]) -> Any:
    cls = _subclass(base, {})
    return cls.__new__(cls)
