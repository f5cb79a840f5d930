"""stable-pretraining: `spt.Module` with a forward of two views, and the two-view classes of its methods/.

The joint is the call `model(batch, stage)` of its training step: the forward, probes around it included, gets the global
views as it knows them, and LoGo's terms go into its "loss", before the step's own backward. Its forward is not
overridden: it is an attribute of the instance. stable-pretraining is not imported.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from logo_plugin.local_predictor import join_groups
from logo_plugin.losses import info_nce, negative_cosine
from logo_plugin.observing import Observed, read_pairs
from logo_plugin.online import Heads, Method, Names, Outputs, composed, outputs_of
from logo_plugin.wrapped import LoGoModel, join_optimizer, log_terms, logo_step

_LOSSES = ("byol_loss", "simclr_loss", "vicreg_loss", "barlow_loss", "nnclr_loss")
_OWN_MULTI_CROP = "has a multi-crop of its own: give it local crops as it takes them. LoGo has nothing to add"
_MASKED = "learns from masked or predicted patches, not from two views. LoGo cannot extend it"
_PROTOTYPES = "compares masked views with prototypes, not two views with each other. LoGo cannot extend it"
_WRITTEN_OUT = (
    "computes its loss in its forward, from statistics of both views together, so LoGo cannot call it for local crops. "
    "There is no option for that"
)
_REFUSED = {
    **dict.fromkeys(("DINO", "DINOv2", "DINOv3", "iBOT", "MIMRefiner", "SwAV", "LeJEPA", "VISReg"), _OWN_MULTI_CROP),
    **dict.fromkeys(("DINOv1Loss", "DINOv2Loss", "iBOTPatchLoss", "SwAVLoss"), _OWN_MULTI_CROP),
    **dict.fromkeys(("BEiT", "CMAE", "CrossMAE", "Data2Vec", "IJEPA", "iGPT", "MAE", "MaskFeat", "NEPA"), _MASKED),
    **dict.fromkeys(("SALT", "SimMIM", "MAELoss"), _MASKED),
    **dict.fromkeys(("MSN", "PMSN"), _PROTOTYPES),
    "VICRegL": "compares regions of two images, not their views as a whole. LoGo cannot extend it",
    "PIRL": "compares an image with its own shuffled patches and ignores the second view. LoGo cannot extend it",
    "TiCO": _WRITTEN_OUT,
    "WMSE": _WRITTEN_OUT,
}


class StableModel(LoGoModel):
    """A stable-pretraining Module: its forward is the host's step."""

    logo_names: ClassVar[Names] = Names(projector=("projector",), predictor=("predictor",))
    _logo_met: bool = False  # whether LoGo's terms are in the loss of the step under way

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The host's on the global views; in training plus LoGo's terms, which are logged as `logo/...`."""
        own = super().__call__
        stage = kwargs.get("stage", args[1] if len(args) > 1 else None)
        if not (self.training and torch.is_grad_enabled()) or not isinstance(stage, (str, Tensor)):
            return own(*args, **kwargs)
        if isinstance(stage, Tensor):
            raise ValueError(
                f"{type(self).__name__} with LoGo needs local crops, too: call model(batch, stage='fit') with a batch "
                "from MultiCropCollate instead of model(view1, view2)."
            )
        views, others = _views(args[0] if args else kwargs.pop("batch"), self)
        boxes = others.pop("boxes", None)

        def step(crops: list[Tensor]) -> Any:
            trimmed = [{**view, "image": crop} for view, crop in zip(views, crops, strict=False)]
            return own({**others, "views": trimmed}, *args[1:], **kwargs)

        out, terms = logo_step(self, step, [view["image"] for view in views], boxes)
        log_terms(self, terms, len(views[0]["image"]))
        self._logo_met = True
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """For the classes of methods/, whose own takes view1 and view2, not the batch that their training step gives it."""
        own = super().forward
        if args and isinstance(args[0], dict) and "view1" in inspect.signature(own).parameters:
            return _forward_batch(self, own, *args, **kwargs)
        return own(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, which must call `self(batch, stage=...)`."""
        self._logo_met = False
        out = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._check_met()
        return out

    def manual_backward(self, *args: Any, **kwargs: Any) -> None:
        """The host's."""
        self._check_met()
        super().manual_backward(*args, **kwargs)  # type: ignore[misc]

    def on_fit_start(self) -> None:
        """Now the optimizers exist, and their saved states are not loaded yet: LoGo's parameters join them."""
        super().on_fit_start()  # type: ignore[misc]
        _join(self, self.trainer.optimizers)

    def find_heads(self, projector: str | None) -> Heads:
        """The online ones."""
        heads = super().find_heads(projector)
        return Heads(heads.owner, _student(heads.projector), heads.predictor and _student(heads.predictor))

    def find_criterion(self) -> str | None:
        """The loss module of the forwards and classes, or None for a class that has none."""
        method = self._check_method()
        if method in _INLINE:
            return None
        named = dict(self.named_children())
        found = [name for name in named if name in _LOSSES or _of(type(named[name]), "losses")]
        for name in found:
            self.check_criterion(named[name])
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"{type(self).__name__} has {'several losses' if found else 'no loss'} of two views "
            f"({', '.join(found or _LOSSES)}), as supervised training and methods that mask or cluster do. If it has one, "
            "name its attribute with criterion=."
        )

    def check_criterion(self, criterion: nn.Module) -> None:
        """Refuses what LoGo cannot extend, by the name of the class or of its loss."""
        self._check_method()
        for cls in type(criterion).__mro__:
            if cls.__name__ in _REFUSED and _of(cls, "losses"):
                raise ValueError(_refusal(f"{type(self).__name__} trains with {cls.__name__}, which", cls.__name__))

    @contextmanager
    def watch_step(self, heads: Heads, outputs: Outputs) -> Iterator[Callable[[Tensor], Observed]]:
        """Watches the heads where there is no loss module."""
        if self.logo_settings.criterion is not None:
            with super().watch_step(heads, outputs) as observe:
                yield observe
            return
        teacher, name = getattr(self.projector, "teacher", heads.projector), type(self).__name__
        similarity = partial(_INLINE[self._check_method()], self)
        with outputs_of([teacher]) as ran:
            yield lambda loss: read_pairs(
                _crossed(outputs.get(heads.modules[-1], []), ran.get(teacher, []), name),
                similarity,
                loss,
                name,
                check=not self._logo_sources,
            )

    def online_methods(self, heads: Heads) -> list[tuple[str, Method]]:
        """The student's backbone, then the heads."""
        backbone = getattr(heads.owner, "backbone", None)
        return [composed(heads, _student(backbone))] if isinstance(backbone, nn.Module) else []

    def _check_method(self) -> str | None:
        name = next((cls.__name__ for cls in type(self).__mro__ if _of(cls, "methods")), None)
        if name in _REFUSED:
            raise ValueError(_refusal(name, name))
        return name

    def _check_met(self) -> None:
        if self.training and torch.is_grad_enabled() and not self._logo_met:
            raise RuntimeError(
                f"the training step of {type(self).__name__} did not call self(batch, stage=...), where LoGo adds its "
                "terms. Call that instead of self.forward, and leave __call__ and training_step to stable-pretraining."
            )


def _mocov2(model: Any, pred: Tensor, target: Tensor) -> Tensor:
    # The class appends a batch's keys to its queue before it reads the negatives, and so do local crops.
    return info_nce(pred, target, queue=model.queue.get().T, temperature=model.temperature)


def _mocov3(model: Any, pred: Tensor, target: Tensor) -> Tensor:
    host = sys.modules["stable_pretraining.methods.mocov3"]
    return host._info_nce(pred, target, model.temperature)  # type: ignore[no-any-return]  # gathers over ranks


_INLINE: dict[str | None, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "SimSiam": lambda _, pred, target: negative_cosine(pred, target),
    "MoCov2": _mocov2,
    "MoCov3": _mocov3,
}


def _crossed(preds: list[Tensor], targets: list[Tensor], name: str) -> list[tuple[Tensor, Tensor]]:
    """(prediction, target of the other view) of one step."""
    preds = [out for out in preds if out.requires_grad]
    targets = [out for out in targets if not out.requires_grad] or targets  # SimSiam detaches them later
    if len(preds) != len(targets) or len(preds) not in (1, 2):
        raise RuntimeError(
            f"the step of {name} gave {len(preds)} predictions and {len(targets)} targets, and LoGo needs one or two of "
            "each, as the class computes them. Use LoGoLoss directly."
        )
    return list(zip(preds, reversed(targets), strict=True))


def _views(batch: Any, model: StableModel) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The views of a batch, global ones first, and what else is in it."""
    views = batch.get("views", batch) if isinstance(batch, dict) else None
    if isinstance(views, dict):
        names = {kind: [name for name in views if str(name).startswith(kind)] for kind in ("global", "local")}
        count = len(names["global"])
        if count and count != model.logo_settings.globals:
            raise ValueError(
                f"the batch has {count} global views, and {type(model).__name__} with LoGo takes "
                f"{model.logo_settings.globals}: change the transform, or give global_crops={count}."
            )
        views = [views[name] for kind in names.values() for name in kind]
        others = {key: value for key, value in batch.items() if key not in ("views", *names["global"], *names["local"])}
    else:
        others = {key: value for key, value in batch.items() if key != "views"} if views else {}
    views = [{"image": v, **others} if isinstance(v, Tensor) else v for v in views or []]  # finished on the device
    if not views or not all(isinstance(v, dict) and isinstance(v.get("image"), Tensor) for v in views):
        keys = sorted(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(
            f"{type(model).__name__} with LoGo trains on batches of views, {{'views': [{{'image': ...}}, ...]}} or "
            f"{{'global_0': {{'image': ...}}, ..., 'local_0': ...}}, got {keys}. Give the data loader "
            "collate_fn=MultiCropCollate(...), and its dataset no transform."
        )
    return views, others


def _forward_batch(model: Any, own: Callable[..., Any], batch: dict[str, Any], stage: str) -> dict[str, Any]:
    """As stable-pretraining's benchmarks call these classes (benchmarks/imagenet10/two_view.py)."""
    views = [batch] if "image" in batch else batch["views"]
    output = own(*(view["image"] for view in views))
    out = {"embedding": output.embedding.detach()}
    if len(views) > 1:
        out["loss"] = output.loss
        model.log(f"{stage}/loss", output.loss, on_step=True, on_epoch=True, sync_dist=True)
    if "label" in views[0]:
        copies = max(len(out["embedding"]) // len(views[0]["label"]), 1)
        out["label"] = torch.cat([view["label"] for view in views[:copies]]).long()
    return out


def _join(model: StableModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """The affinity into the optimizer that has it or else the projector, a local predictor to the predictor."""
    heads = model.find_heads(model.logo_settings.projector)
    own = set(model.logo.parameters())
    parts = [own, *({*module.parameters()} for module in (*heads.modules, heads.owner))]
    homes = [o for part in parts for o in optimizers if any(p in part for g in o.param_groups for p in g["params"])]
    if optimizers and not homes:
        raise ValueError(
            f"none of the optimizers of {type(model).__name__} has its projector, so LoGo does not know which one the "
            "affinity belongs to. Widen a 'modules' regex in optim= so that it matches 'projector' or 'logo'."
        )
    if heads.predictor is not None and model.logo_local_predictor is not None:
        join_groups([g for o in optimizers for g in o.param_groups], heads.predictor, model.logo_local_predictor)
    for home in homes[:1]:
        groups = home.param_groups
        if any(not group.get("weight_decay") for group in groups):
            for group in groups:
                if group.get("weight_decay"):
                    group["params"] = [p for p in group["params"] if p not in own]
        join_optimizer(model, groups)


def _student(module: nn.Module) -> nn.Module:
    """The side of a TeacherStudentWrapper that learns; another module itself."""
    student = getattr(module, "student", None)
    return student if isinstance(student, nn.Module) else module


def _of(cls: type, part: str) -> bool:
    return cls.__module__.startswith(f"stable_pretraining.{part}")


def _refusal(subject: str, name: str) -> str:
    return f"{subject} {_REFUSED[name]} (LoGoLoss can be used directly)."
