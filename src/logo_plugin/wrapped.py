"""What `wrap` makes of a model: its class with LoGo mixed in, whose step is the host's on the global crops plus LoGo's.

batch -> views -> host's step, watched -> local crops forwarded -> `LoGoLoss.extend` -> loss. An adapter says how its
host's batches hold views, which call is the step and where the optimizer is made. No host is named here.
"""

import copy
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from logo_plugin.affinity import Affinity
from logo_plugin.compiling import eager_frame, gradients_inside
from logo_plugin.crops import CropBoxes, crop_overlap
from logo_plugin.local_predictor import join_groups
from logo_plugin.losses import LoGoLoss, LoGoTerms, with_preset
from logo_plugin.observing import Observed, is_symmetric, read, watch
from logo_plugin.online import (
    Heads,
    Method,
    Names,
    Outputs,
    Source,
    composed,
    find_heads,
    outputs_of,
    run_online,
    source_of,
    width,
)

Step = Callable[[Any, list[Tensor]], Tensor]


@dataclass
class Settings:
    """The options of `wrap` that say how to read a model; None is found out."""

    affinity: nn.Module | str | None = "auto"
    online: str | Method | None = None
    target: str | Callable[[Tensor], Tensor] | None = None
    criterion: str | nn.Module | None = None
    step: Step | None = None
    projector: str | None = None
    global_crops: int | None = None
    concat_local_crops: bool = False
    weigh_overlap: bool = False
    local_predictor: bool = False

    @property
    def globals(self) -> int:
        """How many views are global."""
        return self.global_crops or 2


class LoGoModel(nn.Module):
    """Mixed in before the user's class; `logo` holds the loss and with it the affinity.

    A subclass for a host sets `logo_names`, and calls `logo_step` where the host's step was.
    """

    logo_names: ClassVar[Names]
    _logo_base: ClassVar[type[nn.Module]]
    _logo_config: ClassVar[tuple[Settings, dict[str, Any]]]
    logo: LoGoLoss
    logo_local_predictor: nn.Module | None
    logo_settings: Settings
    logo_terms: LoGoTerms | None  # of the last step, detached
    logo_local_proj: list[Tensor] | None  # likewise: what LoGoMonitor measures
    _logo_sources: dict[Any, Source | None]  # of the criterion's predictions, by kind of step seen so far

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attach_logo()

    def attach_logo(self) -> None:
        """Builds what LoGo adds to the model; raises before anything is added."""
        name = type(self).__name__
        if isinstance(self, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise ValueError(f"{name} runs all that it holds, LoGo's part too; put it into a module of your own.")
        if hasattr(self, "logo"):
            raise ValueError(f"{name} has an attribute 'logo' already, where the affinity goes; rename it.")
        settings, options = self._logo_config
        settings = replace(settings, criterion=settings.criterion or self.find_criterion())
        criterion = None if settings.criterion is None else resolve(self, settings.criterion)
        if criterion is not None:
            self.check_criterion(criterion)
        for option in ("online", "target"):
            method = getattr(settings, option)
            if isinstance(method, str) and not callable(getattr(self, method, None)):
                raise ValueError(f"{option}={method!r} is not a method of {name}.")
        heads = self.find_heads(settings.projector)
        settings = replace(settings, step=self.find_step(settings, criterion, heads))
        affinity = copy.deepcopy(settings.affinity)
        if affinity == "auto":
            affinity = Affinity(width(heads.projector))
        if settings.local_predictor and heads.predictor is None:
            raise ValueError(
                f"local_predictor=True copies the predictor, and {name} has no "
                f"{' / '.join(self.logo_names.predictor)}. Methods without a predictor, such as MoCo v2 and SimCLR, go "
                "without the option."
            )
        logo = LoGoLoss(affinity=affinity, **options)  # type: ignore[arg-type]
        self.logo_local_predictor = copy.deepcopy(heads.predictor) if settings.local_predictor else None
        self.logo = logo.to(next(self.parameters()).device)
        self.logo_settings, self.logo_terms, self.logo_local_proj = settings, None, None
        self._logo_sources = {}

    def find_heads(self, projector: str | None) -> Heads:
        """The projector and predictor; a host that hides them overrides this."""
        return find_heads(self, self.logo_names, projector)

    def find_criterion(self) -> str | None:
        """The attribute that holds the loss; None where a host overrides `watch_step` and has no such module."""
        if isinstance(getattr(self, "criterion", None), nn.Module):
            return "criterion"
        raise ValueError(
            f"{type(self).__name__} has no loss module named 'criterion', which LoGo observes. "
            "Name the attribute, or give the module itself, with criterion=."
        )

    def find_step(self, settings: Settings, criterion: nn.Module | None, heads: Heads) -> Step | None:
        """The step of a host whose models do not bring one, as (model, global views) -> loss."""
        if settings.step is not None:
            raise ValueError(f"step= is for plain PyTorch loops, and {type(self).__name__} brings its own step.")
        return None

    def check_criterion(self, criterion: nn.Module) -> None:
        """Refuses, when wrapping, a criterion that the host's adapter knows to be none for LoGo."""

    @contextmanager
    def watch_step(self, heads: Heads, outputs: Outputs) -> Iterator[Callable[[Tensor], Observed]]:
        """While it lasts the host's step runs; then what it gives tells, from the step's loss, what was observed.

        Args:
            heads: The model's.
            outputs: What the heads give in the step; for hosts without a criterion to watch.
        """
        criterion, given = resolve(self, self.logo_settings.criterion), bool(self.logo_settings.target)
        with watch(criterion) as watched:
            yield lambda loss: read(watched, loss, criterion, type(self).__name__, target_given=given)

    def online_methods(self, heads: Heads) -> list[tuple[str, Method]]:
        """(name, images -> ...) of what may run backbone and heads, the likeliest first."""
        backbone = getattr(heads.owner, "backbone", None)
        return [composed(heads, backbone)] if isinstance(backbone, nn.Module) else []

    def call_logo(self, method: str | Callable[[Tensor], Any], images: Tensor) -> Any:
        """Calls a method given by name or as a function."""
        return getattr(self, method)(images) if isinstance(method, str) else method(images)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As torch's, but says what is the matter when only LoGo's part does not fit."""
        try:
            return super().load_state_dict(state_dict, *args, **kwargs)
        except RuntimeError as error:
            own, found = (
                {key: tuple(value.shape) for key, value in state.items() if key.startswith("logo")}
                for state in (self.state_dict(), state_dict)
            )
            if own == found:
                raise
            if own and found:
                what = "with other options of LoGo (affinity, local_predictor)"
            else:
                what = "without LoGo's parameters" if own else "with LoGo's parameters, which this model has not"
            raise RuntimeError(
                f"the checkpoint was saved {what}. To take over what fits, load_state_dict(..., strict=False); the "
                f"optimizer's state cannot be taken over. {error}"
            ) from error

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickled by the user's own class unless that name now means the wrapped class (a decorator), or another's.
        reduced = super().__reduce_ex__(protocol)
        cls = type(self)
        if "_logo_base" not in vars(cls):
            return reduced  # the user's subclass of a wrapped class
        found: Any = sys.modules.get(cls.__module__)
        for name in cls.__qualname__.split("."):
            found = getattr(found, name, None)
        return reduced if found is cls else (_unpickle, (mixin_of(cls), self._logo_base), *reduced[2:])


def attach(x: Any, mixin: type[LoGoModel], settings: Settings, options: dict[str, Any], preset: str | None) -> Any:
    """Wraps an instance in place, or gives the subclass of a class.

    Raises:
        ValueError: If an option is out of its range or a part is missing; the instance is then as it was.
    """
    _check(settings)
    options = with_preset(preset, options)
    LoGoLoss(**options)  # a bad value should fail here, not when the class is instantiated
    base: Any = x if isinstance(x, type) else type(x)
    if issubclass(base, LoGoModel):
        raise ValueError(f"{base.__name__} is wrapped already.")
    cls: Any = _subclass(mixin, base, (settings, options))
    if isinstance(x, type):
        return cls
    x.__class__ = cls
    try:
        x.attach_logo()
    except BaseException:
        x.__class__ = base
        raise
    return x


def mixin_of(cls: type) -> type[LoGoModel]:
    """The host's mixin that a wrapped class was made with."""
    return cls.__mro__[1]


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
    count = settings.globals
    global_views, local_views = list(views[:count]), list(views[count:])
    if not (model.training and torch.is_grad_enabled()):
        return step(global_views), None
    if not local_views:
        raise ValueError(
            f"{name} got {len(views)} views, of which {count} are global, so there are no local crops. Give the data "
            "loader collate_fn=MultiCropCollate(...), and its dataset no transform."
        )
    overlap = None
    if settings.weigh_overlap:
        if not isinstance(boxes, CropBoxes):
            raise ValueError("weigh_overlap=True needs the crops' boxes: use MultiCropCollate(return_boxes=True).")
        overlap = crop_overlap(boxes.boxes[count:])
    first = not model._logo_sources
    if first and settings.global_crops is None:
        _warn_of_equal_sizes(views, count)
    heads = model.find_heads(settings.projector)
    with outputs_of(heads.modules) as ran, model.watch_step(heads, ran) as observe:
        out = _host_step(model, step, global_views) if first else step(global_views)
    if out is None:
        return None, None
    host_loss = out["loss"] if isinstance(out, dict) else out
    observed = observe(host_loss)
    kind = (observed.mutual, len(observed.preds))
    if kind not in model._logo_sources:
        model._logo_sources[kind] = _source(model, observed, ran, heads)
    targets = observed.targets
    if settings.target:
        with torch.no_grad():
            targets = [model.call_logo(settings.target, view) for view in global_views]
    method, local_pred, local_proj = run_online(
        methods_of(model, heads),
        heads,
        model._logo_sources[kind],
        local_views,
        features=observed.preds[0].shape[1],
        global_shape=views[0].shape[1:],
        local_predictor=model.logo_local_predictor,
        concat=settings.concat_local_crops,
    )
    terms = model.logo.extend(
        host_loss,
        global_global=observed.global_global,
        global_pairs=observed.global_pairs,
        global_target=targets,
        local_pred=local_pred,
        local_proj=local_proj,
        scale=observed.scale,
        similarity=observed.similarity,
        local_overlap=overlap,
    )
    model.__dict__["_logo_online"] = method
    model.logo_terms = terms.detach()
    model.logo_local_proj = [z.detach() for z in local_proj]
    return ({**out, "loss": terms.total} if isinstance(out, dict) else terms.total), model.logo_terms


def log_terms(model: Any, terms: LoGoTerms | None, batch_size: int) -> None:
    """Logs `logo/...` where a LightningModule has a Trainer."""
    try:
        running = model.trainer is not None
    except (AttributeError, RuntimeError):
        running = False
    if terms is not None and running:
        logged = {f"logo/{name}": value for name, value in terms._asdict().items() if name != "total"}
        model.log_dict(logged, batch_size=batch_size)


def join_optimizer(model: LoGoModel, groups: Iterable[dict[str, Any]]) -> None:
    """Puts what LoGo added into optimizer groups that are there: the affinity into one without weight decay.

    Not with add_param_group: schedulers built before count the groups.
    """
    groups = list(groups)
    predictor = model.find_heads(model.logo_settings.projector).predictor
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
        return [(name, lambda images: model.call_logo(online, images))]
    methods = model.online_methods(heads)
    found = model.__dict__.get("_logo_online")  # the first step's
    return [method for method in methods if method[0] == found] or methods


def _source(model: LoGoModel, observed: Observed, ran: Outputs, heads: Heads) -> Source | None:
    """Where the predictions come from, as this step showed, or an error: without that no local ones can be had."""
    settings = model.logo_settings
    criterion = "" if settings.criterion is None else f"{type(resolve(model, settings.criterion)).__name__} of "
    name = f"{criterion}{type(model).__name__}"
    sources = [source_of(pred, ran, heads) for pred in observed.preds]
    found = [source for source in sources if source is not None]
    if observed.mutual:
        likely = len(set(sources)) == 1 or settings.target is not None
        if not likely or not is_symmetric(observed.similarity, *(pred.detach() for pred in observed.preds[:2])):
            raise RuntimeError(
                f"{name} was called with two tensors that both carry gradient and do not play the same part, so LoGo "
                "cannot tell the prediction from the target. Detach the target before the criterion, or name the "
                "method that computes targets with target=."
            )
    if settings.online is not None:
        return None
    if not found or (len(set(sources)) > 1 and not observed.mutual):
        raise RuntimeError(
            f"{name} is given something else than the output of the {' or '.join(heads.names)}, so LoGo does not know "
            "what to give it for local crops. Name the method from images to what the criterion takes with online=, or "
            "the projector with projector=."
        )
    return max(found)  # a predictor's, if any


def _host_step(model: LoGoModel, step: Callable[[list[Tensor]], Any], views: list[Tensor]) -> Any:
    try:
        return step(views)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise RuntimeError(
            f"{type(model).__name__}'s own step failed on its {len(views)} global crops, which are all that LoGo gives "
            f"it ({type(error).__name__}: {error}). If it needs other inputs (masks, lists of views, own local crops), "
            "LoGo cannot extend it: use LoGoLoss directly. If it needs more global crops, give global_crops=."
        ) from error


def _warn_of_equal_sizes(views: Sequence[Tensor], count: int) -> None:
    """32 pixels are CIFAR's, whose local crops are as large as the global ones in the paper."""
    if len({view.shape[-2:] for view in views}) == 1 and max(views[0].shape[-2:]) > 32:
        warnings.warn(
            f"all {len(views)} views are {views[0].shape[-2]} x {views[0].shape[-1]} pixels; LoGo takes the first "
            f"{count} for global crops, the others for local ones. Say so with global_crops={count}, or how many are.",
            stacklevel=3,
        )


def resolve(model: nn.Module, criterion: str | nn.Module | None) -> nn.Module:
    """The loss module that a name or the module itself stands for.

    Raises:
        ValueError: If it is neither.
    """
    found = getattr(model, criterion, None) if isinstance(criterion, str) else criterion
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"criterion={criterion!r} is neither a loss module nor the name of one of {type(model).__name__}."
        )
    return found


def _check(settings: Settings) -> None:
    count = settings.global_crops
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 2):
        raise ValueError(f"global_crops must be an integer >= 2, got {count!r}.")
    for option in ("concat_local_crops", "weigh_overlap", "local_predictor"):
        if not isinstance(getattr(settings, option), bool):
            raise ValueError(f"{option} must be True or False, got {getattr(settings, option)!r}.")
    if not isinstance(settings.projector, (str, type(None))):
        raise ValueError(f"projector must be the name of an attribute, got {settings.projector!r}.")
    for option in ("online", "target"):
        value = getattr(settings, option)
        if not (value is None or isinstance(value, str) or callable(value)):
            raise ValueError(f"{option} must be a method's name or a function of images, got {value!r}.")
    if settings.step is not None and not callable(settings.step):
        raise ValueError(f"step must be a function (model, global views) -> loss, got {settings.step!r}.")


def _subclass(mixin: type[LoGoModel], base: type[nn.Module], config: tuple[Settings, Any]) -> type[LoGoModel]:
    def init(self: LoGoModel, *args: Any, **kwargs: Any) -> None:
        LoGoModel.__init__(self, *args, **kwargs)

    # load_from_checkpoint passes only what the signature names.
    init.__signature__ = inspect.signature(base.__init__)  # type: ignore[attr-defined]
    content = {"_logo_config": config, "_logo_base": base, "__init__": init, "__doc__": base.__doc__}
    cls = type(base.__name__, (mixin, base), content)
    cls.__module__, cls.__qualname__ = base.__module__, base.__qualname__
    return cls


def _unpickle(mixin: type[LoGoModel], base: type[nn.Module]) -> Any:
    cls = _subclass(mixin, base, (Settings(), {}))
    return cls.__new__(cls)
