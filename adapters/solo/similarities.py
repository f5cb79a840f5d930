"""solo-learn's losses between two crops, with a model's own hyperparameters, as (pred, target) -> scalar.

Each takes the model and the images' indexes before a step: the step replaces keys of the queues. Those of two
sides that both get gradient in solo-learn (SimCLR, Barlow Twins, VICReg, VIbCReg) get it on `pred` alone here,
since `LoGoLoss` detaches targets.
"""

from collections.abc import Callable
from typing import Any

import torch
from solo.losses.barlow import barlow_loss_func
from solo.losses.byol import byol_loss_func
from solo.losses.mocov2plus import mocov2plus_loss_func
from solo.losses.mocov3 import mocov3_loss_func
from solo.losses.nnclr import nnclr_loss_func
from solo.losses.simclr import simclr_loss_func
from solo.losses.simsiam import simsiam_loss_func
from solo.losses.vibcreg import vibcreg_loss_func
from solo.losses.vicreg import vicreg_loss_func
from torch import Tensor

from logo_plugin.affinity import full_precision
from logo_plugin.similarities import Similarity


def byol(model: Any, indexes: Tensor) -> Similarity:
    """2 - 2 cos."""
    return _exact(byol_loss_func)


def simsiam(model: Any, indexes: Tensor) -> Similarity:
    """Negative cosine."""
    return _exact(simsiam_loss_func)


def mocov2plus(model: Any, indexes: Tensor) -> list[Similarity]:
    """InfoNCE over the queue as it is before the step; one for each target, since each global crop has its own."""
    queues = full_precision(model.queue.clone())

    def similarity(pred: Tensor, target: Tensor, queue: Tensor) -> Tensor:
        loss: Tensor = mocov2plus_loss_func(pred, target, queue=queue, temperature=model.temperature)
        return loss

    return [_exact(similarity, queue=queue) for queue in queues]


def mocov3(model: Any, indexes: Tensor) -> Similarity:
    """InfoNCE over the targets of the batch and of all ranks."""

    def similarity(pred: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = mocov3_loss_func(pred, target, temperature=model.temperature)  # the step may set it
        return loss

    return _exact(similarity)


def nnclr(model: Any, indexes: Tensor) -> Similarity:
    """InfoNCE of each target over the predictions of the batch and of all ranks."""

    def similarity(pred: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = nnclr_loss_func(target, pred, temperature=model.temperature)
        return loss

    return _exact(similarity)


def simclr(model: Any, indexes: Tensor) -> Similarity:
    """NT-Xent; copies of one image within a batch are positives of each other, as in the method's own step."""

    def similarity(pred: Tensor, target: Tensor) -> Tensor:
        both = torch.cat([pred, target])
        loss: Tensor = simclr_loss_func(both, indexes=indexes.repeat(2), temperature=model.temperature)
        return loss

    return _exact(similarity)


def barlow_twins(model: Any, indexes: Tensor) -> Similarity:
    """Cross-correlation matrix of the two crops against the identity."""

    def similarity(pred: Tensor, target: Tensor) -> Tensor:
        # The function builds a BatchNorm of the default dtype, which is bfloat16 in Lightning's bf16-true.
        default = torch.get_default_dtype()
        torch.set_default_dtype(pred.dtype)
        try:
            loss: Tensor = barlow_loss_func(pred, target, lamb=model.lamb, scale_loss=model.scale_loss)
        finally:
            torch.set_default_dtype(default)
        return loss

    return _exact(similarity)


def vicreg(model: Any, indexes: Tensor) -> Similarity:
    """Invariance, variance and covariance; those of the target are constants."""
    return _exact(vicreg_loss_func, **_weights(model))


def vibcreg(model: Any, indexes: Tensor) -> Similarity:
    """As VICReg, with normalised covariance."""
    return _exact(vibcreg_loss_func, **_weights(model))


def _weights(model: Any) -> dict[str, float]:
    return {name: getattr(model, name) for name in ("sim_loss_weight", "var_loss_weight", "cov_loss_weight")}


def _exact(similarity: Callable[..., Tensor], **options: Any) -> Similarity:
    """In float32, under autocast and for a model in half precision."""

    def exact(pred: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(pred.device.type, enabled=False):
            return similarity(full_precision(pred), full_precision(target), **options)

    return exact
