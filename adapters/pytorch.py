"""Plain PyTorch modules: the loop is the user's, so `loss = model(views)` takes the place of forwards and criterion.

What such a loop computes from two views is known for lightly's plain examples of BYOL, SimSiam and MoCo and for
symmetric criteria of two projections; for all else the user says it, with `step=`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from logo_plugin.adapters.lightly import LightlyModel, takes_two_views, views_of
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from logo_plugin.checks import views_alone
from logo_plugin.compiling import eager
from logo_plugin.crops import CropBoxes, DeferredViews
from logo_plugin.observing import has_queue, is_symmetric, on_a_copy
from logo_plugin.online import Heads, Method, Source, chosen, run_online, width
from logo_plugin.ranks import rank_and_size
from logo_plugin.stepping import logo_step, loss_of, methods_of
from logo_plugin.wrapped import Settings, Step, resolve

_TARGET = ("forward_momentum", "forward_teacher", "forward_key_encoder")
_STEPS_BEFORE_WARNING = 32


class PlainModel(LightlyModel):
    """A module whose forward takes the list of views as well as a tensor of images."""

    def find_step(self, settings: Settings, criterion: Any, heads: Heads) -> Step:
        """The user's, or the one that follows from the model's parts and the criterion."""
        return settings.step or _known_step(self, settings, criterion, heads)

    def call_logo(self, method: str | Callable[[Tensor], Any], images: Tensor) -> Any:
        """As usual, but past this class's forward: crops of the network's are tensors."""
        return super().forward(images) if method == "forward" else super().call_logo(method, images)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of views (and their boxes), the loss; of a tensor, what the user's own forward gives."""
        if self.__dict__.get("_logo_at_step") == id(self):  # the user's step may give its own forward the list
            return super().forward(*args, **kwargs)
        x, *boxes = args or [kwargs.get("x")]
        if not isinstance(x, (list, tuple, DeferredViews)):
            out = super().forward(*args, **kwargs)
            if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._warn_of_training_without_logo(loss_of(out))
            return out
        if not args:
            del kwargs["x"]
        for other in (*boxes, *kwargs.values()):
            if not isinstance(other, (CropBoxes, type(None))):
                raise TypeError(
                    f"{type(self).__name__}(views, boxes) takes the CropBoxes of MultiCropCollate(return_boxes=True) "
                    f"beside the views, got {type(other).__name__}. Labels and the like have no place in the step."
                )
        step: Any = self.logo_settings.step
        views_alone(type(self).__name__, x)
        views = views_of([x], type(self).__name__)
        self.__dict__["_logo_at_step"] = id(self)  # not that of a copy made meanwhile
        try:
            loss, _ = logo_step(self, lambda crops: step(self, crops), views, *boxes, **kwargs)
        finally:
            self.__dict__.pop("_logo_at_step", None)
        self._warn_if_logo_rests()
        return loss

    def _warn_of_training_without_logo(self, loss: Any) -> None:
        count = self.__dict__["_logo_tensors"] = self.__dict__.get("_logo_tensors", 0) + 1
        if count == _STEPS_BEFORE_WARNING and not self._logo_sources:
            warnings.warn(
                f"{type(self).__name__} was called {count} times in training with a tensor and never with the list of "
                "views, so it trains without LoGo. If that is not meant, loss = model(views) takes the place of the "
                "forwards and the loss in your loop.",
                stacklevel=4,
            )
        if isinstance(loss, Tensor) and not loss.ndim and loss.requires_grad:
            warnings.warn(
                f"{type(self).__name__} was given a tensor and gave its own loss, without LoGo. Give it the list of "
                "views, model(views), and say with step= how the loss comes from them.",
                stacklevel=4,
            )

    @eager
    def _warn_if_logo_rests(self) -> None:
        steps, first = self.__dict__.get("_logo_versions", (0, None))
        if not self.training or steps == _STEPS_BEFORE_WARNING:
            return
        versions = [p._version for p in self.logo_parameters()]
        self.__dict__["_logo_versions"] = (steps + 1, versions if first is None else first)
        if versions and steps + 1 == _STEPS_BEFORE_WARNING and versions == first:
            warnings.warn(
                f"the parameters that LoGo added have not changed in {_STEPS_BEFORE_WARNING} steps: build the "
                "optimizer after wrap(model), so that model.parameters() includes them.",
                stacklevel=4,
            )


def _known_step(model: PlainModel, settings: Settings, criterion: nn.Module, heads: Heads) -> Step:
    if any(is_lazy(p) for part in heads.behind(model.find_backbone(heads)) for p in part.parameters()):
        raise ValueError(
            f"{type(model).__name__} has layers whose sizes are not known yet (LazyLinear and the like). Run it on one "
            "batch before wrap()."
        )
    if takes_two_views(model) and (_is_lightlys(criterion) or _is_lightlys(model)):
        return _two_view_step
    target, kind = _target(model, settings), "bank" if has_queue(criterion) else _kind(criterion, heads)
    parts = (kind, heads.predictor is not None, target is not None)
    known: dict[Any, Step] = {
        ("similarity", True, True): _prediction_step,  # BYOL
        ("similarity", True, False): _prediction_step,  # SimSiam
        ("bank", False, True): _queue_step,  # MoCo
        ("contrast", False, False): _symmetric_step,  # SimCLR, Barlow Twins, VICReg, DCL
    }
    others = [name for name, child in model.named_children() if _may_give_targets(child, model, heads)]
    step = known.get(parts) if settings.globals == 2 and (target or not others) else None
    if step is None:
        has = [type(criterion).__name__] + ["a predictor"] * parts[1]
        if target or others:
            has += [f"targets from {target}" if target else f"networks that may give targets ({', '.join(others)})"]
        raise ValueError(
            f"LoGo cannot tell what your loop computes for {type(model).__name__} with {' and '.join(has)}"
            f"{f' and {settings.globals} global crops' if settings.globals != 2 else ''}. Say it: wrap(model, "
            "criterion=criterion, step=step), where step(model, global_views) returns the loss as your loop computes "
            "it, calling criterion. Known without are BYOL and SimSiam (predictor, cosine), MoCo (memory bank) and "
            "lightly's symmetric losses of two projections, each with 2 global crops."
        )
    return step


def _may_give_targets(module: nn.Module, model: PlainModel, heads: Heads) -> bool:
    """Whether it has layers, and nothing trains them or they are made as those of the backbone or the projector."""
    if not any(p.ndim > 1 for p in module.parameters()):
        return False
    backbone, projector = model.find_backbone(heads) or nn.Identity(), heads.projector
    trunk, head, own = ([p.shape for p in part.parameters()] for part in (backbone, projector, module))
    alike = own in (trunk, head, trunk + head) and not {backbone, *heads.modules} & {*module.modules()}
    return alike or not any(p.requires_grad for p in module.parameters())


def _kind(criterion: nn.Module, heads: Heads) -> str | None:
    """A symmetric criterion is a "similarity" of each image's pair or a "contrast" over the batch; others are None."""
    try:
        # Other rows on each rank: a criterion that gathers would find copies among the negatives.
        rank, ranks = rank_and_size()
        drawn = torch.randn(2, 8 * ranks, width(heads.projector), generator=torch.Generator().manual_seed(0))
        first, second = drawn[:, rank::ranks].to(next(heads.projector.parameters()).device)
        loss = on_a_copy(criterion, criterion, type(criterion).__name__)
        symmetric = is_symmetric(loss, first, second)
        with torch.no_grad():  # all of it on all ranks
            whole, unit = loss(first, second), loss(F.normalize(first, dim=1), F.normalize(second, dim=1))
            best = loss(first, first)
            halves = (loss(first[:4], second[:4]) + loss(first[4:], second[4:])) / 2
        if not (symmetric and (_is_lightlys(criterion) or torch.allclose(unit, whole, rtol=1e-3))):
            return None  # the loop may normalise, or not
        if best > whole:
            return None  # a similarity, not a loss: the loop takes its negative
        return "similarity" if torch.allclose(halves, whole, rtol=1e-3) else "contrast"
    except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None


def _is_lightlys(module: nn.Module) -> bool:
    return any(cls.__module__.startswith("lightly.") for cls in type(module).__mro__)


def _target(model: PlainModel, settings: Settings) -> str | Callable[[Tensor], Tensor] | None:
    return settings.target or next((name for name in _TARGET if hasattr(model, name)), None)


def _prediction_step(model: PlainModel, views: Sequence[Tensor]) -> Tensor:
    """Each view's prediction against the other's target, or its projection detached."""
    criterion, target = resolve(model, model.logo_settings.criterion), _target(model, model.logo_settings)
    preds, projs = _online(model, views)
    targets = [model.call_logo(target, view) for view in views] if target else projs
    return torch.stack([criterion(preds[i], targets[1 - i].detach()) for i in (0, 1)]).mean()


def _queue_step(model: PlainModel, views: Sequence[Tensor]) -> Tensor:
    """MoCo in one direction, as in lightly's example, since every call enqueues its keys."""
    criterion, target = resolve(model, model.logo_settings.criterion), _target(model, model.logo_settings)
    preds, _ = _online(model, views[:1])
    return criterion(preds[0], model.call_logo(target, views[1]).detach())  # type: ignore[arg-type, no-any-return]


def _symmetric_step(model: PlainModel, views: Sequence[Tensor]) -> Tensor:
    """The two projections, gradient through both."""
    preds, _ = _online(model, views)
    return resolve(model, model.logo_settings.criterion)(*preds)  # type: ignore[no-any-return]


def _two_view_step(model: PlainModel, views: Sequence[Tensor]) -> Tensor:
    """lightly.models of lightly 1.5, whose forward takes both views."""
    criterion = resolve(model, model.logo_settings.criterion)
    outs = super(PlainModel, model).forward(views[0], views[1])
    pair = isinstance(outs, (tuple, list)) and len(outs) == 2
    if pair and (isinstance(outs[0], Tensor) or type(criterion).__name__.startswith("Sym")):
        return criterion(*outs)  # type: ignore[no-any-return]
    if not (pair and _is_lightlys(model)):  # whose pairs are (projection, prediction); others' may be the other way
        raise RuntimeError(
            f"forward gives {type(outs).__name__}, which does not say what is compared with what; say with step= what "
            "your loop computes, as step=lambda model, views: model(*views) if that is the loss itself."
        )
    (z0, p0), (z1, p1) = outs
    return 0.5 * (criterion(p0, z1.detach()) + criterion(p1, z0.detach()))  # type: ignore[no-any-return]


def _online(model: PlainModel, views: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    heads = model.find_heads(model.logo_settings.projector)
    source = None if model.logo_settings.online else Source(heads.predictor is not None, False)
    outs: list[Any] = []
    found = chosen(model, methods_of(model, heads), heads, source, views[0])
    methods: list[tuple[str, Method]] = [(name, _noting(method, outs)) for name, method in found]
    _, preds, projs = run_online(methods, heads, source, views)
    if source is not None:
        # Where a method makes something else of them, that is what the loop has, and `logo_step` judges it.
        if "_logo_heads_give" not in model.__dict__:
            model.__dict__["_logo_heads_give"] = _gives(outs[-1], preds[-1], model)
        if not model.__dict__["_logo_heads_give"]:
            preds = [out[-1] if isinstance(out, (tuple, list)) else out for out in outs[-len(views) :]]
    return preds, projs


def _noting(method: Method, outs: list[Any]) -> Method:
    def noted(images: Tensor) -> Any:
        outs.append(method(images))
        return outs[-1]

    return noted


@eager
@torch.no_grad()
def _gives(out: Any, pred: Tensor, model: PlainModel) -> bool:
    """Whether a prediction is among what a method gave, or of one length there where the criterion is blind to it."""
    unit = F.normalize(pred, dim=1)
    found = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.shape == pred.shape]
    same = any(torch.allclose(x, pred, rtol=1e-2, atol=1e-3) for x in found)
    # On all ranks: the criterion may gather.
    criterion = resolve(model, model.logo_settings.criterion)
    loss = on_a_copy(criterion, criterion, type(criterion).__name__)
    blind = torch.allclose(loss(pred, pred.flip(0)), loss(unit, unit.flip(0)), rtol=1e-2, atol=1e-3)
    return same or (blind and any(torch.allclose(x, unit, rtol=1e-2, atol=1e-3) for x in found))
