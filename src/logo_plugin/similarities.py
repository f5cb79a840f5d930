"""How near a prediction is to a target: the cosine, InfoNCE, and the mean of either over pairs of views."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from logo_plugin.affinity import full_precision, unit, unit_and_norm
from logo_plugin.checks import same_shape

Similarity = Callable[[Tensor, Tensor], Tensor]


def negative_cosine(pred: Tensor, target: Tensor) -> Tensor:
    """Negative cosine similarity, mean over the batch (SimSiam, BYOL): (N, D), (N, D) -> scalar in [-1, 1]."""
    return -(unit(pred) * unit(target)).sum(-1).mean(-1)


def info_nce(pred: Tensor, target: Tensor, *, queue: Tensor | None = None, temperature: float = 0.2) -> Tensor:
    """InfoNCE of each prediction against its own target (MoCo, https://arxiv.org/abs/1911.05722).

    Args:
        pred: Online predictions, (N, D); normalised here.
        target: Targets of the same images, (N, D); normalised here.
        queue: Negatives, normalised, (D, K) as MoCo keeps them. None takes the targets of the other
            images in the batch (MoCo v3).
        temperature: Divides the cosine similarities, > 0.

    Returns:
        Scalar, computed in float32 also under autocast.

    Raises:
        ValueError: If shapes do not fit, or the temperature is not positive.
    """
    same_shape("pred", [pred], "target", [target])
    return _info_nce_and_slope(pred, target, queue, temperature, slope=False)[0].mean()


def mean_over_pairs(
    similarity: Similarity | Sequence[Similarity], preds: Sequence[Tensor], targets: Sequence[Tensor], *, apart: bool
) -> Tensor:
    """Mean similarity of views (N, D): of all pairs, or with `apart` of those of two different views.

    The cosine and InfoNCE take all pairs at once, which is a fraction of the kernels; others take them one by one.

    Args:
        similarity: For all targets, or one for each.
        preds: Online predictions.
        targets: Their gradient is not taken; with `apart` one for each prediction.
        apart: Whether to leave out each prediction's own target.
    """
    each = list(similarity) if isinstance(similarity, Sequence) else [similarity] * len(targets)
    targets = [target.detach() for target in targets]
    shared = each[0] if all(score is each[0] for score in each) else None
    if shared is negative_cosine:
        return _mean_cosine(torch.stack(list(preds)), torch.stack(targets), apart)
    nce = shared.func if isinstance(shared, partial) and not shared.args else shared
    options = shared.keywords if isinstance(shared, partial) else {}
    if nce is info_nce and options.keys() <= {"queue", "temperature"}:
        p, t = torch.stack(list(preds)), torch.stack(targets)
        if not apart:
            p, t = p[:, None], t[None]
        elif len(t) == 2:
            t = t.flip(0)
        else:
            pairs = [(i, j) for i in range(len(p)) for j in range(len(t)) if i != j]
            p, t = p[[i for i, _ in pairs]], t[[j for _, j in pairs]]
        return _mean_info_nce(p, t, options.get("queue"), options.get("temperature", 0.2))
    return torch.stack(
        [
            _number(score(pred, target))
            for i, pred in enumerate(preds)
            for j, (score, target) in enumerate(zip(each, targets, strict=True))
            if i != j or not apart
        ]
    ).mean()


def _number(value: object) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"similarity must give a scalar tensor, the lower the nearer, as the mean over the images; got {got}."
        )
    return value


def mean_target(targets: Sequence[Tensor]) -> Tensor:
    """The direction of the targets' mean with their mean norm, so that unit targets give a unit target."""
    stacked = full_precision(torch.stack(list(targets)))
    mean: Tensor = F.normalize(stacked.mean(0), dim=-1) * stacked.norm(dim=-1, keepdim=True).mean(0)
    return mean.to(targets[0])


def _mean_cosine(preds: Tensor, targets: Tensor, apart: bool) -> Tensor:
    """The mean over targets of the cosine is the dot product with the mean of their directions."""
    t = unit(targets)
    if not apart:
        t = t.mean(0)
    elif len(t) == 2:
        t = t.flip(0)
    else:
        t = (t.sum(0) - t) / (len(t) - 1)
    return -mean_cosine(preds, t)


def mean_cosine(x: Tensor, toward: Tensor | None = None) -> Tensor:
    """The mean dot product of the directions of `x` with `toward`, in a fraction of the operators that autograd takes.

    Args:
        x: V views (V, N, D).
        toward: (V, N, D) or (N, D), of which no gradient is taken; of unit length it is the cosine. None is the mean
            direction of the other views of each: then it is the mean cosine of all pairs of views.

    Returns:
        Scalar, computed in float32 from half precision.
    """
    cosine: Tensor = _MeanCosine.apply(x, toward)
    return cosine


class _MeanCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, toward: Tensor | None) -> Tensor:
        cosine, slope = _cosine_and_slope(x, toward)
        ctx.save_for_backward(x, toward, slope)
        ctx.factor = (2 if toward is None else 1) / cosine.numel()  # of a pair both ends move
        return cosine.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, toward, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated, too
            _, slope = _cosine_and_slope(x, toward)
        return (slope * (grad * ctx.factor)).to(x.dtype), None


def _cosine_and_slope(x: Tensor, toward: Tensor | None) -> tuple[Tensor, Tensor]:
    """(V, N, 1), and its gradient at x (V, N, D), of which what is along x only makes it longer."""
    direction, norm = unit_and_norm(x)
    if toward is None:
        toward = (direction.sum(0) - direction) / (len(x) - 1)
    cosine = (direction * toward).sum(-1, keepdim=True)
    return cosine, torch.addcmul(toward, direction, cosine, value=-1) / norm


def _mean_info_nce(pred: Tensor, target: Tensor, queue: Tensor | None, temperature: float) -> Tensor:
    """The mean InfoNCE of pairs of views, (..., N, D) each, which broadcast; no gradient of `target` is taken."""
    learned = any(isinstance(x, Tensor) and x.requires_grad for x in (queue, temperature))
    if pred.requires_grad and torch.is_grad_enabled() and not learned:
        mean: Tensor = _MeanInfoNCE.apply(pred, target, queue, temperature)
        return mean
    return _info_nce_and_slope(pred, target, queue, temperature, slope=False)[0].mean()


class _MeanInfoNCE(torch.autograd.Function):
    """Keeps its gradient at `pred` for backward, (..., N, D); autograd would keep the logits, (..., N, K)."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, queue: Tensor | None, temperature: float) -> Tensor:
        values, slope = _info_nce_and_slope(pred, target, queue, temperature)
        ctx.save_for_backward(pred, target, queue, slope)
        ctx.temperature, ctx.count = temperature, values.numel()
        return values.mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pred, target, queue, slope = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated, too
            _, slope = _info_nce_and_slope(pred, target, queue, ctx.temperature)
        return (slope * (grad / ctx.count)).to(pred.dtype), None, None, None


def _info_nce_and_slope(
    pred: Tensor, target: Tensor, queue: Tensor | None, temperature: float, *, slope: bool = True
) -> tuple[Tensor, Tensor | None]:
    """InfoNCE of each pair, (..., N, 1), and with `slope` the gradient of their sum at `pred`."""
    if queue is not None and (queue.ndim != 2 or queue.shape[0] != pred.shape[-1]):
        raise ValueError(f"queue must have shape (D, K) with D = {pred.shape[-1]}, got {tuple(queue.shape)}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}.")
    with torch.autocast(pred.device.type, enabled=False):
        direction, norm = unit_and_norm(pred)
        query, target = direction / temperature, unit(target)
        # Each prediction meets the queue once, however many targets it has.
        keys = target if queue is None else queue.mT.to(query)
        logits = query @ keys.mT
        if queue is None:
            log_shares = logits.log_softmax(-1)
            values = -log_shares.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        else:
            negatives = logits.logsumexp(-1, keepdim=True)
            margin = negatives - (query * target).sum(-1, keepdim=True)
            # -log of the share of the positive: log(1 + exp(negatives - positive)).
            values = F.softplus(margin, threshold=40)
        if not slope:
            return values, None
        if queue is None:
            pull = log_shares.exp() @ keys - target
        else:
            pull = margin.sigmoid() * ((logits - negatives).exp() @ keys - target)
        pull = pull.sum_to_size(pred.shape)
        # What is along the prediction only makes it longer.
        along = (direction * pull).sum(-1, keepdim=True)
        return values, torch.addcmul(pull, direction, along, value=-1) / (norm * temperature)
