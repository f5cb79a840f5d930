"""lightly: LightningModules written as its examples, tutorials and benchmarks write them.

lightly ships no model classes: users own a class, usually copied from an example. So the class's own training step
runs unchanged on the global crops. Neither lightly nor Lightning is imported.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from logo_plugin.crops import CropBoxes, DeferredViews
from logo_plugin.observing import OF_LABELS, Observed
from logo_plugin.online import Heads, Method, Names, Outputs
from logo_plugin.refusals import DENSE, OWN_MULTI_CROP, refuse
from logo_plugin.similarities import negative_cosine
from logo_plugin.stepping import groups_of, join_optimizer, log_terms, logo_step
from logo_plugin.wrapped import LoGoModel, resolve

NAMES = Names(
    projector=("projection_head", "projection_mlp", "projector"),
    predictor=("prediction_head", "prediction_mlp", "predictor", "online_predictor"),
)
_signature = functools.cache(inspect.signature)  # asked in every step
_ONLINE = ("forward_student", "forward_query_encoder", "forward")
_MASKED = "compares masked views with their prototypes, not two views with each other. LoGo cannot extend it"
_ALL_VIEWS = "takes lists of views, and as many as there are. LoGo has nothing to add: give it local crops as views"
_REFUSED = {
    "DINOLoss": OWN_MULTI_CROP,
    "SwaVLoss": OWN_MULTI_CROP,
    "SWAVLoss": OWN_MULTI_CROP,  # lightning-bolts'
    "LeJEPALoss": OWN_MULTI_CROP,
    "IBOTPatchLoss": OWN_MULTI_CROP,
    "MSNLoss": _MASKED,
    "PMSNLoss": _MASKED,
    "PMSNCustomLoss": _MASKED,
    "CAPILoss": _MASKED,
    "DetConSLoss": DENSE,
    "DetConBLoss": DENSE,
    "VICRegLLoss": DENSE,
    "FroSSLLoss": _ALL_VIEWS,
    "MMCRLoss": _ALL_VIEWS,
}


class LightlyModel(LoGoModel):
    """What both of lightly's styles have in common: their names, and the losses that LoGo cannot extend."""

    logo_names: ClassVar[Names] = NAMES

    def find_criterion(self) -> str | None:
        """`criterion`, or the one loss of lightly's that the model has."""
        losses = [name for name, child in self.named_children() if type(child).__module__.startswith("lightly.loss")]
        for name in losses:
            self.check_criterion(getattr(self, name))
        own = getattr(self, "criterion", None)
        if losses and "criterion" not in losses and isinstance(own, nn.Module) and not isinstance(own, OF_LABELS):
            losses = ["criterion", *losses]
        if len(losses) > 1:
            raise ValueError(
                f"{type(self).__name__} has several losses ({', '.join(losses)}), as methods that compare dense maps "
                "or patches do. LoGo extends one loss of two views (N, D): if one of them is such a loss, name it with "
                'criterion= and the projector behind it with projector=, and give reduction="sum", which keeps its '
                "balance with the others."
            )
        return losses[0] if losses else super().find_criterion()

    def find_heads(self, projector: str | None) -> Heads:
        """As usual, but a model that reconstructs gets no advice to name a projector."""
        try:
            return super().find_heads(projector)
        except ValueError as error:
            parts = [self._logo_config[0].criterion, *self.children()]
            losses = [part for part in parts if isinstance(part, (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss))]
            if projector or not losses:
                raise
            raise ValueError(
                f"{type(self).__name__} has no projector and trains with {type(losses[0]).__name__}, as methods that "
                "reconstruct images or features do: they compare no two views. LoGo cannot extend it."
            ) from error

    def check_criterion(self, criterion: nn.Module) -> None:
        """Refuses lightly's losses of methods that are none of two views."""
        for cls in type(criterion).__mro__:
            if cls.__name__ in _REFUSED:
                refuse(f"{type(self).__name__} trains with {cls.__name__}, which", _REFUSED[cls.__name__])

    def online_methods(self, heads: Heads) -> list[tuple[str, Method]]:
        """The model's own method, where it is one of images, then backbone and heads in turn."""
        methods: list[tuple[str, Method]] = []
        if not takes_two_views(heads.owner):
            names = [name for name in _ONLINE if self._brings(name)][:1]
            methods = [(name, partial(self.call_logo, name)) for name in names]
        return methods + super().online_methods(heads)

    @contextmanager
    def watch_step(self, heads: Heads, outputs: Outputs) -> Iterator[Callable[[Tensor], Observed | None]]:
        """As usual, but lightly's cosine is the core's, which takes all pairs at once instead of one by one."""
        criterion: Any = resolve(self, self.logo_settings.criterion)
        cls = type(criterion)
        cosine = cls.__name__ == "NegativeCosineSimilarity" and cls.__module__.startswith("lightly.loss")
        with super().watch_step(heads, outputs) as observe:
            if cosine and (criterion.dim, criterion.eps) == (1, 1e-8):
                yield lambda loss: (found := observe(loss)) and found._replace(similarity=negative_cosine)
            else:
                yield observe

    def _brings(self, name: str) -> bool:
        """Whether the user's class has a method (LightningModule and Module bring a forward of their own)."""
        brought = getattr(self._logo_base, name, None)
        module = getattr(brought, "__module__", None) or ""  # none of torch.fx's
        return callable(brought) and not module.startswith(("torch.", "lightning.", "pytorch_lightning."))


class LightningModel(LightlyModel):
    """A LightningModule: its `training_step` is the host's step."""

    def attach_logo(self, *, only: bool = False) -> None:
        """As usual, after a look at how Lightning calls the model."""
        for name in ("training_step", "configure_optimizers"):
            if name in vars(self):
                raise ValueError(
                    f"{type(self).__name__} gives each instance a {name} of its own (self.{name} = ...), which LoGo's "
                    "would never reach: make it a method of the class."
                )
        # Lightning passes batch_idx to those that take it, and the one below takes everything.
        step = list(inspect.signature(super().training_step).parameters.values())  # type: ignore[misc]
        more = len(step) > 1 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in step)
        super().attach_logo(only=only)
        self.__dict__["_logo_indexed"] = more

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Warns of a step that stands in the way of LoGo's: that of a class derived from a wrapped one."""
        super().__init_subclass__(**kwargs)
        step: Any = vars(cls).get("training_step")
        if step is not None and "training_step" not in getattr(getattr(step, "__code__", None), "co_names", ()):
            warnings.warn(
                f"{cls.__name__}.training_step takes the place of the step of a class that is wrapped, so LoGo is off. "
                f"Wrap {cls.__name__}, not its base.",
                stacklevel=2,
            )

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """The model's own on the global crops, plus LoGo's terms, which are logged as `logo/...`."""
        if not getattr(self, "automatic_optimization", True):
            raise RuntimeError(
                f"{type(self).__name__} uses manual optimization, so its training_step has called backward before LoGo "
                "can add its terms. Use automatic optimization, or LoGoLoss directly."
            )
        views = views_of(batch, type(self).__name__)
        boxes = next((item for item in batch if isinstance(item, CropBoxes)), None)
        rest = [item for item in batch[1:] if not isinstance(item, CropBoxes)]
        make = getattr(type(batch), "_make", type(batch))  # of a named tuple
        own = super().training_step  # type: ignore[misc]
        if not self.__dict__.get("_logo_indexed", True):
            args, kwargs = (), {}
        out, terms = logo_step(self, lambda crops: own(make([crops, *rest]), *args, **kwargs), views, boxes)
        log_terms(self, terms, len(views[0]))
        return out

    def configure_optimizers(self) -> Any:
        """The model's own, with LoGo's parameters in one of its groups."""
        configured = super().configure_optimizers()  # type: ignore[misc]
        predictor = self.find_heads(self.logo_settings.projector).predictor
        join_optimizer(self, predictor, groups_of(configured))
        return configured


def views_of(batch: Any, name: str) -> list[Tensor]:
    """The views (N, C, H, W) of a batch (views, targets, ...).

    Raises:
        ValueError: If there are none.
    """
    views = batch[0] if isinstance(batch, (list, tuple)) and batch else None
    if isinstance(views, DeferredViews):
        views = list(views)  # says that they are not finished
    if not isinstance(views, (list, tuple)) or not all(isinstance(view, Tensor) and view.ndim == 4 for view in views):
        raise ValueError(
            f"{name} expected a batch whose first item is the list of views (N, C, H, W), got {_describe(batch)}. "
            "Give the data loader collate_fn=MultiCropCollate(...). A method that needs masks or other inputs beside "
            "the views is not one that LoGo can extend."
        )
    return list(views)


def takes_two_views(module: nn.Module) -> bool:
    """Whether forward takes a pair of views, as lightly.models' of lightly 1.5."""
    forward: Any = getattr(module, "_logo_base", type(module)).forward
    return "x1" in _signature(forward).parameters


def _describe(batch: Any) -> str:
    if isinstance(batch, dict):
        return (
            f"a dict of {sorted(map(str, batch))}; for samples that are dicts give it MultiCropCollate(image_key=...)"
        )
    if isinstance(batch, (list, tuple)):
        return f"{type(batch).__name__} [{', '.join(_describe(item) for item in batch[:4])}]"
    return f"tensor {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
