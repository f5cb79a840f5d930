"""stable-pretraining: which of its methods LoGo cannot extend, and the losses that some write into their forward."""

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from logo_plugin.refusals import DENSE, OWN_MULTI_CROP, refuse
from logo_plugin.similarities import info_nce, negative_cosine

_MASKED = "learns from masked or predicted patches, not from two views alone. LoGo cannot extend it"
_PROTOTYPES = "compares views with prototypes, not with each other. LoGo cannot extend it"
_JIGSAW = "compares an image with its own shuffled patches and ignores the second view. LoGo cannot extend it"
_JOINT = "computes its loss from statistics of both views together, inside its forward. LoGo cannot call it"
_TEXTS = "compares images with texts. LoGo cannot extend it"
REFUSED = {
    **dict.fromkeys(("DINO", "DINOv2", "DINOv3", "SwAV", "LeJEPA", "VISReg"), OWN_MULTI_CROP),
    **dict.fromkeys(("DINOv1Loss", "DINOv2Loss"), OWN_MULTI_CROP),
    **dict.fromkeys(("BEiT", "CMAE", "CrossMAE", "Data2Vec", "iBOT", "IJEPA", "iGPT", "MAE", "MaskFeat"), _MASKED),
    **dict.fromkeys(("MIMRefiner", "NEPA", "SALT", "SimMIM", "iBOTPatchLoss", "MAELoss"), _MASKED),
    **dict.fromkeys(("MSN", "PMSN", "SwAVLoss"), _PROTOTYPES),
    **dict.fromkeys(("TiCO", "WMSE"), _JOINT),
    "VICRegL": DENSE,
    "PIRL": _JIGSAW,
    "CLIPLoss": _TEXTS,
}


def method_of(cls: type) -> str | None:
    """Which class of methods/ a class is or derives from, None if none.

    Raises:
        ValueError: If it is one that LoGo cannot extend.
    """
    name = next((base.__name__ for base in cls.__mro__ if is_of("methods", base)), None)
    if name in REFUSED:
        refuse(name, REFUSED[name])
    return name


def check_loss(loss: type, model: str) -> None:
    """Refuses what LoGo cannot extend by the class of its loss.

    Raises:
        ValueError: If it is one of those.
    """
    for base in loss.__mro__:
        if base.__name__ in REFUSED and is_of("losses", base):
            refuse(f"{model} trains with {base.__name__}, which", REFUSED[base.__name__])


def is_of(part: str, cls: type) -> bool:
    """Whether a class is defined in a part of stable-pretraining."""
    return cls.__module__.startswith(f"stable_pretraining.{part}")


def _mocov2(model: Any, pred: Tensor, target: Tensor) -> Tensor:
    # The host appends the batch's keys to its queue before it reads the negatives, so its own loss has them, too.
    return info_nce(pred, target, queue=model.queue.get().T, temperature=model.temperature)


def _mocov3(model: Any, pred: Tensor, target: Tensor) -> Tensor:
    host = sys.modules["stable_pretraining.methods.mocov3"]
    return host._info_nce(pred, target, model.temperature)  # type: ignore[no-any-return]  # over all ranks


WRITTEN_OUT: dict[str | None, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "SimSiam": lambda _, pred, target: negative_cosine(pred, target),
    "MoCov2": _mocov2,
    "MoCov3": _mocov3,
}


def crossed(preds: list[Tensor], targets: list[Tensor], name: str) -> list[tuple[Tensor, Tensor]]:
    """(prediction, target of the other view) of one step."""
    preds = [out for out in preds if out.requires_grad]
    targets = [out for out in targets if not out.requires_grad] or targets  # SimSiam detaches them later
    if len(preds) != len(targets) or len(preds) not in (1, 2):
        raise RuntimeError(
            f"the step of {name} gave {len(preds)} predictions and {len(targets)} targets, and LoGo needs one or two "
            "of each, as the class computes them. Use LoGoLoss directly."
        )
    return list(zip(preds, reversed(targets), strict=True))
