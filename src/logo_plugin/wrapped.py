"""What `wrap` makes of a model: its class with LoGo mixed in. No host is named here.

An adapter's mixin says how its host's batches hold views, which call is the step (`stepping.logo_step` takes its place)
and where the optimizer is made.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from logo_plugin.affinity import Affinity
from logo_plugin.checks import flag, positive_integer
from logo_plugin.losses import LoGoLoss, LoGoTerms
from logo_plugin.observing import AS_MODULE, Observed, has_queue, read, watch
from logo_plugin.online import Heads, Method, Names, Outputs, Source, composed, find_heads, width
from logo_plugin.presets import with_preset, with_queue

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
    checkpoint_local_crops: bool = False
    local_running_stats: bool = True
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
    _logo_idle: list[nn.Module]  # layers of a target network that runs along with the online one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attach_logo()

    def attach_logo(self, *, only: bool = False) -> None:
        """Builds what LoGo adds to the model; raises before anything is added.

        Args:
            only: No other model is made with these options, so it takes an affinity that was given, not a copy.
        """
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
        if settings.checkpoint_local_crops and self.find_backbone(heads) is None:
            raise ValueError(
                f"checkpoint_local_crops=True needs an attribute 'backbone' or 'encoder', and {name} has none."
            )
        affinity = settings.affinity if only else copy.deepcopy(settings.affinity)
        if affinity == "learned":
            affinity = Affinity(width(heads.projector))
        if settings.local_predictor and heads.predictor is None:
            raise ValueError(
                f"local_predictor=True copies the predictor, and {name} has no "
                f"{' / '.join(self.logo_names.predictor)}. Methods without a predictor, such as MoCo v2 and SimCLR, go "
                "without the option."
            )
        if self.has_queue(criterion):
            options = with_queue(options, affinity)
        logo = LoGoLoss(affinity=affinity, **options)  # type: ignore[arg-type]
        self.logo_local_predictor = copy.deepcopy(heads.predictor) if settings.local_predictor else None
        self.logo = logo.to(next(self.parameters()).device)
        self.logo_settings, self.logo_terms, self.logo_local_proj = settings, None, None
        self._logo_sources, self._logo_idle = {}, []

    def logo_parameters(self) -> Iterator[nn.Parameter]:
        """What LoGo gave the model to train: the affinity's and the local predictor's."""
        for part in (self.logo, self.logo_local_predictor):
            if part is not None:
                yield from part.parameters()

    def find_heads(self, projector: str | None) -> Heads:
        """The projector and predictor; a host that hides them overrides this."""
        return find_heads(self, self.logo_names, projector)

    def find_backbone(self, heads: Heads) -> nn.Module | None:
        """What takes images to features, beside the heads."""
        parts = (getattr(heads.owner, name, None) for name in ("backbone", "encoder"))
        return next((part for part in parts if isinstance(part, nn.Module)), None)

    def find_criterion(self) -> str | None:
        """The attribute that holds the loss; None where a host overrides `watch_step` and has no such module."""
        if isinstance(getattr(self, "criterion", None), nn.Module):
            return "criterion"
        raise ValueError(
            f"{type(self).__name__} has no loss module named 'criterion', which LoGo observes. "
            f"Name the attribute, or give the module itself, with criterion=. {AS_MODULE}"
        )

    def find_step(self, settings: Settings, criterion: nn.Module | None, heads: Heads) -> Step | None:
        """The step of a host whose models do not bring one, as (model, global views) -> loss."""
        if settings.step is not None:
            raise ValueError(f"step= is for plain PyTorch loops, and {type(self).__name__} brings its own step.")
        return None

    def check_criterion(self, criterion: nn.Module) -> None:
        """Refuses, when wrapping, a criterion that the host's adapter knows to be none for LoGo."""

    def has_queue(self, criterion: nn.Module | None) -> bool:
        """Whether the host's loss compares with a queue of negatives (MoCo)."""
        return has_queue(criterion)

    @contextmanager
    def watch_step(self, heads: Heads, outputs: Outputs) -> Iterator[Callable[[Tensor], Observed | None]]:
        """While it lasts the host's step runs; then what it gives tells, from the step's loss, what was observed.

        None stands for a later step that does without the criterion: it is the host's alone.

        Args:
            heads: The model's.
            outputs: What the heads give in the step; for hosts without a criterion to watch.
        """
        criterion, given = resolve(self, self.logo_settings.criterion), bool(self.logo_settings.target)
        with watch(criterion) as watched:
            losses = [n for n, m in self.named_children() if type(m).__name__.endswith("Loss") and m is not criterion]
            others = ", ".join(name for name in losses if name != "logo")
            yield partial(
                read,
                watched,
                criterion=criterion,
                model=type(self).__name__,
                target_given=given,
                others=others,
                optional=bool(self._logo_sources),
            )

    def online_methods(self, heads: Heads) -> list[tuple[str, Method]]:
        """(name, images -> ...) of what may run backbone and heads, the likeliest first."""
        parts = [part for part in heads.owner.children() if not isinstance(part, (nn.ModuleList, nn.ModuleDict))]
        holders = (part for part in parts if part is not heads.projector and heads.projector in part.modules())
        backbone = self.find_backbone(heads) or next(holders, None)
        return [] if backbone is None else [composed(heads, backbone)]

    def call_logo(self, method: str | Callable[[Tensor], Any], images: Tensor) -> Any:
        """Calls a method given by name or as a function."""
        return getattr(self, method)(images) if isinstance(method, str) else method(images)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As torch's, but says so when it is LoGo's part that does not fit."""
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
                what = "without LoGo's parameters" if own else "with LoGo's parameters, which this model lacks"
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
        return reduced if found is cls else (_new, (_Kind(cls),), *reduced[2:])


def attach(x: Any, mixin: type[LoGoModel], settings: Settings, options: dict[str, Any], preset: str | None) -> Any:
    """Wraps an instance in place, or gives the subclass of a class.

    Raises:
        ValueError: If an option is out of its range or a part is missing; the instance is then as it was.
    """
    _check(settings)
    options = with_preset(preset, options)
    if settings.affinity == "auto":
        settings = replace(settings, affinity="learned" if preset else "cosine")
    # A bad value should fail here, not when the class is instantiated; a module stands in for what is built then.
    LoGoLoss(affinity=nn.CosineSimilarity() if settings.affinity == "learned" else settings.affinity, **options)  # type: ignore[arg-type]
    base: Any = x if isinstance(x, type) else type(x)
    if issubclass(base, LoGoModel):
        raise ValueError(f"{base.__name__} is wrapped already.")
    cls: Any = _subclass(mixin, base, (settings, options))
    if isinstance(x, type):
        return cls
    x.__class__ = cls
    try:
        x.attach_logo(only=True)
    except BaseException:
        x.__class__ = base
        raise
    return x


def resolve(model: nn.Module, criterion: str | nn.Module | None) -> nn.Module:
    """The loss module that a name or the module itself stands for.

    Raises:
        ValueError: If it is neither.
    """
    found = getattr(model, criterion, None) if isinstance(criterion, str) else criterion
    if not isinstance(found, nn.Module):
        also = f" {AS_MODULE}" if callable(found) else ""
        raise ValueError(
            f"criterion={criterion!r} is neither a loss module nor the name of one of {type(model).__name__}.{also}"
        )
    return found


def _check(settings: Settings) -> None:
    if settings.global_crops is not None:
        positive_integer("global_crops", settings.global_crops, least=2)
    for field in fields(settings):
        if isinstance(field.default, bool):
            flag(field.name, getattr(settings, field.name))
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


class _Kind:
    """A wrapped class: a copy of a model has the same one, a pickled model gets one made of the user's class."""

    def __init__(self, cls: Any) -> None:
        self.cls = cls

    def __deepcopy__(self, _: Any) -> "_Kind":
        return self

    def __reduce__(self) -> Any:
        return _kind_of, (*self.cls.__bases__, self.cls._logo_config)  # the host's mixin and the user's class


def _kind_of(mixin: type[LoGoModel], base: type[nn.Module], config: tuple[Settings, Any]) -> _Kind:
    return _Kind(_subclass(mixin, base, config))


def _new(kind: _Kind) -> Any:
    return kind.cls.__new__(kind.cls)
