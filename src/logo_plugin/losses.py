"""The LoGo objective (Zhang et al., CVPR 2022, https://arxiv.org/abs/2203.17205)."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, permutations
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from logo_plugin.affinity import full_precision

Views = Tensor | Sequence[Tensor]
Similarity = Callable[[Tensor, Tensor], Tensor]

# Each spells out every option, so that no preset moves when a default does.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "local_weight": 1e-4,
        "gradient_ratio": None,
        "local_global_weight": 1.0,
        "affinity_loss": "difference",
        "positive_noise": 0.0,
        "repulsion": "logit",
        "reduction": "sum",
        "average_targets": False,
    },
    "release": {
        "local_weight": None,
        "gradient_ratio": 0.015,
        "local_global_weight": 1.0,
        "affinity_loss": "logistic",
        "positive_noise": 0.3,
        "repulsion": "softplus",
        "reduction": "pairs",
        "average_targets": False,
    },
}


class LoGoTerms(NamedTuple):
    """What `LoGoLoss` returns: `total` to call backward on, and each term unweighted (scalars)."""

    total: Tensor
    global_global: Tensor
    local_global: Tensor
    local_local: Tensor
    affinity: Tensor

    def detach(self) -> "LoGoTerms":
        """The same terms without their graphs, to keep or to log."""
        return LoGoTerms(*(term.detach() for term in self))


class LoGoLoss(nn.Module):
    """Pulls global to global and local to global crops, pushes local crops apart.

    `total = similarity + lambda * local_local + affinity`, one backward for one optimizer. Detaching
    routes the gradient: global_global reaches the online global crops, local_global and local_local
    the online local crops, and affinity nothing but the parameters of `affinity`; targets get none.

    Args:
        affinity: The pair scorer, usually `Affinity(dim)`; any module that maps two (P, N, D) tensors
            to logits (P, N). None means no repulsion: the host method with multi-crop.
        similarity: The host method's own loss, "cosine" (negative cosine, in [-1, 1]) or any callable
            (pred (N, D), target (N, D)) -> scalar.
        local_weight: lambda, the fixed weight of local_local (default 1e-4, the paper's for SimSiam).
        gradient_ratio: Instead of a fixed weight, scale local_local so that the norm of its gradient
            at `local_proj` is at most this fraction of the similarity's (the release: 0.015, taken
            there on the encoder's gradient). It takes that gradient in `forward`, which under
            `torch.compile` is a graph break: `fullgraph=True` needs a fixed weight.
        local_global_weight: Weight of a local-global pair against a global-global pair.
        affinity_loss: "logistic", softplus(-f(same image)) + softplus(f(other image)) (release), or
            "difference", f(other image) - f(same image) (Eq. 6).
        positive_noise: Gaussian noise of standard deviation `positive_noise / sqrt(D)` on the positive
            pairs of the affinity loss (release: 0.3; 0 turns it off).
        repulsion: a(z, z') of local_local, "softplus" of the logit (release) or the "logit" (Eq. 5).
        reduction: "pairs" is the mean over all global-global and local-global pairs (release), "sum"
            the mean over global-global plus the sum over local-global pairs (Eq. 9). Without local
            crops both are exactly the host method's loss.
        average_targets: Compare each local crop with the mean of the global targets instead of each of them,
            at unchanged weights ("mean encoding" of asym-siam, https://arxiv.org/abs/2204.00613). As there,
            the mean is of the targets as they come, and normalised afterwards. With the cosine, for unit
            targets of mean m, mean_j cos(p, t_j) = norm(m) cos(p, m): only the images' weights change, those
            whose targets disagree no longer count less.

    Raises:
        ValueError: If an option is unknown or out of its range.

    Example:
        >>> criterion = LoGoLoss(affinity=Affinity(dim=256))
        >>> terms = criterion(
        ...     global_pred=[predictor(z) for z in global_proj],
        ...     local_pred=[predictor(z) for z in local_proj],
        ...     global_target=target_proj,
        ...     local_proj=local_proj,
        ... )
        >>> terms.total.backward()
    """

    def __init__(
        self,
        *,
        affinity: nn.Module | None = None,
        similarity: Literal["cosine"] | Similarity = "cosine",
        local_weight: float | None = None,
        gradient_ratio: float | None = None,
        local_global_weight: float = 1.0,
        affinity_loss: Literal["logistic", "difference"] = "logistic",
        positive_noise: float = 0.3,
        repulsion: Literal["softplus", "logit"] = "softplus",
        reduction: Literal["pairs", "sum"] = "pairs",
        average_targets: bool = False,
    ) -> None:
        super().__init__()
        if affinity is not None and not isinstance(affinity, nn.Module):
            raise ValueError(f"affinity must be a module such as Affinity(dim), or None, got {affinity!r}.")
        if similarity != "cosine" and not callable(similarity):
            raise ValueError(f'similarity must be "cosine" or a callable, got {similarity!r}.')
        if local_weight is not None and gradient_ratio is not None:
            raise ValueError(
                f"got both local_weight={local_weight!r} and gradient_ratio={gradient_ratio!r}: "
                "give a fixed weight or a gradient ratio, not both."
            )
        self.affinity = affinity
        self.similarity: Similarity = negative_cosine if similarity == "cosine" else similarity
        self.gradient_ratio = None if gradient_ratio is None else _weight("gradient_ratio", gradient_ratio)
        self.local_weight = _weight("local_weight", 1e-4 if local_weight is None else local_weight)
        self.local_global_weight = _weight("local_global_weight", local_global_weight)
        self.affinity_loss = _choice("affinity_loss", affinity_loss, ("logistic", "difference"))
        self.positive_noise = _weight("positive_noise", positive_noise)
        self.repulsion = _choice("repulsion", repulsion, ("softplus", "logit"))
        self.reduction = _choice("reduction", reduction, ("pairs", "sum"))
        if not isinstance(average_targets, bool):
            raise ValueError(f"average_targets must be True or False, got {average_targets!r}.")
        self.average_targets = average_targets

    @classmethod
    def paper(cls, **options: Any) -> "LoGoLoss":
        """Eq. 3 to 9 of the paper with its lambda for SimSiam, except for the `options` given.

        Eq. 6 has no lower bound: the affinity's logits can run away, and with a fixed lambda the repulsion with
        them. `gradient_ratio` caps it.
        """
        return cls(**with_preset("paper", options))

    @classmethod
    def release(cls, **options: Any) -> "LoGoLoss":
        """The official release's settings, except for the `options` given; its three optimizer steps stay one."""
        return cls(**with_preset("release", options))

    def forward(
        self,
        *,
        global_pred: Views,
        global_target: Views,
        local_pred: Views = (),
        local_proj: Views | None = None,
        local_overlap: Tensor | None = None,
    ) -> LoGoTerms:
        """Computes the objective for G >= 2 global and L >= 0 local crops.

        Args:
            global_pred: Online predictions of the global crops, (G, N, D) or G tensors (N, D).
            global_target: Stop-gradient targets of the same crops in the same order, same shape.
            local_pred: Online predictions of the local crops, (L, N, D) or L tensors (N, D).
            local_proj: Projections of the local crops that the affinity compares, (L, N, D') or L
                tensors (N, D'). None takes `local_pred` (methods without a predictor).
            local_overlap: Intersection over union of the local crops in [0, 1], (pairs, N) with the pairs
                in `itertools.combinations` order, as `crop_overlap` gives it. Each pair's repulsion in
                local_local is then multiplied by 1 - overlap: crops that show the same content are
                not pushed apart. None treats all pairs alike.

        Returns:
            `LoGoTerms`.

        Raises:
            ValueError: If shapes do not fit each other, or there are too few crops or images.
        """
        preds, targets = _views("global_pred", global_pred), _views("global_target", global_target)
        if len(preds) < 2:
            raise ValueError(f"global_pred needs at least 2 global crops, got {len(preds)}.")
        if len(targets) != len(preds):
            raise ValueError(f"global_target has {len(targets)} views, global_pred has {len(preds)}; give one each.")
        _same_shape("global_target", targets, "global_pred", preds)
        pairs = list(permutations(range(len(preds)), 2))
        global_global = torch.stack([self.similarity(preds[i], targets[j].detach()) for i, j in pairs]).mean()
        return self.extend(
            global_global,
            global_global=global_global,
            global_pairs=len(pairs),
            global_target=targets,
            local_pred=local_pred,
            local_proj=local_proj,
            local_overlap=local_overlap,
        )

    def extend(
        self,
        host_loss: Tensor,
        *,
        global_global: Tensor,
        global_pairs: int,
        global_target: Views,
        local_pred: Views,
        local_proj: Views | None = None,
        local_overlap: Tensor | None = None,
        scale: float | Tensor = 1.0,
        similarity: Similarity | Sequence[Similarity] | None = None,
    ) -> LoGoTerms:
        """Adds LoGo's local terms to a loss that a host framework computed on the global crops.

        For adapters: whatever else the host put into its loss stays in it.

        Args:
            host_loss: The host's loss, which contains `scale * global_global` (scalar).
            global_global: Mean of the host's similarity over its `global_pairs` pairs (scalar).
            global_pairs: Number of pairs behind `global_global`, at least 1.
            global_target: The targets that the host used, (T, N, D) or T tensors (N, D), T >= 1.
            local_pred: As in `forward`.
            local_proj: As in `forward`.
            local_overlap: As in `forward`.
            scale: What the host multiplies its mean similarity with; LoGo's pairs get the same.
            similarity: Replaces `self.similarity` for this call (a queue changes every step); a sequence
                has one for each target. With `average_targets` each is given the same mean target.

        Returns:
            `LoGoTerms`; `total` is `host_loss` itself when there are no local crops.

        Raises:
            ValueError: As in `forward`.
        """
        preds, targets = _views("local_pred", local_pred), _views("global_target", global_target)
        if not isinstance(similarity, Sequence):
            similarity = [similarity or self.similarity] * (1 if self.average_targets else len(targets))
        zero = global_global.new_zeros(())
        if not preds:
            if self.affinity is not None:
                raise ValueError(
                    "local_pred is missing, and the affinity needs at least 2 local crops: pass local_pred, "
                    "or build LoGoLoss with affinity=None."
                )
            return LoGoTerms(host_loss, global_global, zero, zero, zero)
        _same_shape("local_pred", preds, "global_target", targets)
        compared = [_mean_target(targets)] * len(similarity) if self.average_targets else targets
        local_global = torch.stack(
            [score(pred, t.detach()) for pred in preds for score, t in zip(similarity, compared, strict=True)]
        ).mean()
        pairs = self.local_global_weight * len(preds) * len(targets)
        if self.reduction == "pairs":
            fraction = pairs / (global_pairs + pairs)
            pull = scale * fraction * local_global
            total = host_loss + pull - scale * fraction * global_global
        else:
            pull = scale * pairs * local_global
            total = host_loss + pull
        if self.affinity is None:
            return LoGoTerms(total, global_global, local_global, zero, zero)

        proj = preds if local_proj is None else _views("local_proj", local_proj)
        if len(proj) != len(preds) or len(proj) < 2 or proj[0].shape[0] != preds[0].shape[0] or len(proj[0]) < 2:
            raise ValueError(
                "the affinity compares at least 2 local crops of at least 2 images, and local_proj matches local_pred "
                f"in both; got {_shapes(proj)} for local_proj and {_shapes(preds)} for local_pred. "
                "Use a larger batch (drop_last=True), more local crops, or affinity=None."
            )
        z = torch.stack(proj)
        local_local = local_local_loss(self.affinity, z, repulsion=self.repulsion, overlap=local_overlap)
        affinity = affinity_loss(
            self.affinity, z, form=self.affinity_loss, noise=self.positive_noise / math.sqrt(z.shape[-1])
        )
        weight: float | Tensor = self.local_weight
        if self.gradient_ratio is not None:
            source = [local_proj] if isinstance(local_proj, Tensor) else proj
            weight = _capped_weight(pull, local_local, source, self.gradient_ratio)
        return LoGoTerms(total + weight * local_local + affinity, global_global, local_global, local_local, affinity)

    def extra_repr(self) -> str:
        """What `print(model)` shows of the options."""
        weight = "local_weight" if self.gradient_ratio is None else "gradient_ratio"
        names = (
            weight,
            "local_global_weight",
            "affinity_loss",
            "positive_noise",
            "repulsion",
            "reduction",
            "average_targets",
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def with_preset(name: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `LoGoLoss`: the given ones over those of a preset.

    Args:
        name: A key of `PRESETS`, or None for no preset.
        options: What was given; None counts as not given. Either of `local_weight` and `gradient_ratio`
            replaces both of the preset's, since they exclude each other.

    Raises:
        ValueError: If there is no such preset.
    """
    preset = {} if name is None else PRESETS[_choice("preset", name, tuple(PRESETS))]
    given = {option: value for option, value in options.items() if value is not None}
    if given.keys() & {"local_weight", "gradient_ratio"}:
        preset = preset | {"local_weight": None, "gradient_ratio": None}
    return preset | given


def negative_cosine(pred: Tensor, target: Tensor) -> Tensor:
    """Negative cosine similarity, mean over the batch (SimSiam, BYOL): (N, D), (N, D) -> scalar in [-1, 1]."""
    return -F.cosine_similarity(full_precision(pred), full_precision(target), dim=-1).mean()


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
    _same_shape("pred", [pred], "target", [target])
    if queue is not None and (queue.ndim != 2 or queue.shape[0] != pred.shape[1]):
        raise ValueError(f"queue must have shape (D, K) with D = {pred.shape[1]}, got {tuple(queue.shape)}.")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature!r}.")
    with torch.autocast(pred.device.type, enabled=False):
        pred, target = (F.normalize(full_precision(x), dim=1) for x in (pred, target))
        if queue is None:
            logits = pred @ target.T
            labels = torch.arange(len(pred), device=pred.device)
        else:
            positive = (pred * target).sum(1, keepdim=True)
            logits = torch.cat([positive, pred @ queue.to(pred)], dim=1)
            labels = torch.zeros(len(pred), dtype=torch.long, device=pred.device)
        return F.cross_entropy(logits / temperature, labels)


def local_local_loss(
    affinity: nn.Module, local_proj: Tensor, *, repulsion: str = "softplus", overlap: Tensor | None = None
) -> Tensor:
    """Eq. 5: the mean affinity of the local crops of one image, over unordered pairs.

    Args:
        affinity: The pair scorer; its parameters get no gradient.
        local_proj: (L, N, D), L >= 2.
        repulsion: "softplus" or "logit".
        overlap: Multiplies each pair by 1 - overlap, (pairs, N) in [0, 1]. None multiplies nothing.

    Returns:
        Scalar; its gradient reaches `local_proj` only.

    Raises:
        ValueError: If `overlap` has another shape.
    """
    first, second = _pairs(local_proj, combinations)
    if overlap is not None and overlap.shape != (len(first), local_proj.shape[1]):
        raise ValueError(
            f"local_overlap must have shape (pairs, N) = {(len(first), local_proj.shape[1])} for "
            f"{len(local_proj)} local crops, got {tuple(overlap.shape)}. crop_overlap(boxes) gives it."
        )
    frozen = {name: parameter.detach() for name, parameter in affinity.named_parameters()}
    logits: Tensor = functional_call(affinity, frozen, (first, second))
    repelled = F.softplus(logits) if repulsion == "softplus" else logits
    return (repelled if overlap is None else (1 - overlap.to(repelled)) * repelled).mean()


def affinity_loss(
    affinity: nn.Module,
    local_proj: Tensor,
    *,
    form: str = "logistic",
    noise: float | Tensor = 0.0,
    partner: Tensor | None = None,
) -> Tensor:
    """Eq. 6 or the release's logistic form: trains the affinity on detached projections.

    Args:
        affinity: The pair scorer.
        local_proj: (L, N, D), L >= 2, N >= 2.
        form: "logistic" (both orders of each pair) or "difference" (one order, as in local_local).
        noise: Added to both members of the positive pairs: a standard deviation, or the values (2, N, D).
        partner: For each image the index of the other image that makes its negative pair, (N,). None
            rotates the batch by a random non-zero shift, so that no image is its own negative.

    Returns:
        Scalar; its gradient reaches the parameters of `affinity` only.
    """
    z = full_precision(local_proj.detach())
    first, second = _pairs(z, permutations if form == "logistic" else combinations)
    n = z.shape[1]
    if partner is None:
        shift = torch.randint(1, n, (), device=z.device)
        partner = (torch.arange(n, device=z.device) + shift) % n
    if not isinstance(noise, Tensor):
        noise = noise * torch.randn(2, *z.shape[1:], device=z.device, dtype=z.dtype)
    logits: Tensor = affinity(
        torch.cat([first + noise[0], first]),
        torch.cat([second + noise[1], second[:, partner]]),
    )
    positive, negative = logits.chunk(2)
    if form == "logistic":
        return F.softplus(-positive).mean() + F.softplus(negative).mean()
    return negative.mean() - positive.mean()


def _mean_target(targets: Sequence[Tensor]) -> Tensor:
    """The direction of the targets' mean with their mean norm, so that unit targets give a unit target."""
    stacked = full_precision(torch.stack(list(targets)))
    mean: Tensor = F.normalize(stacked.mean(0), dim=-1) * stacked.norm(dim=-1, keepdim=True).mean(0)
    return mean.to(targets[0])


def _pairs(views: Tensor, pairing: Callable[[range, int], Iterable[tuple[int, ...]]]) -> list[Tensor]:
    """First and second members of the pairs of views, each (P, N, D); stacked, since indexing is slow backward."""
    each = views.unbind(0)
    sides = zip(*pairing(range(len(each)), 2), strict=True)
    return [torch.stack([each[i] for i in side]) for side in sides]


def _capped_weight(pull: Tensor, local_local: Tensor, proj: Sequence[Tensor], ratio: float) -> Tensor:
    """Largest weight <= 1 that keeps local_local's gradient at proj within `ratio` of pull's."""
    norms = []
    for term in (pull, local_local):
        gradients: Sequence[Tensor | None] = [None]
        if term.requires_grad and all(z.requires_grad for z in proj):
            # Times N: the gradient of one image does not underflow in half precision, the ratio stays.
            n = term.new_full((), proj[0].shape[-2])
            gradients = torch.autograd.grad(term, proj, n, retain_graph=True, allow_unused=True)
        found = [full_precision(gradient).norm() for gradient in gradients if gradient is not None]
        if len(found) < len(proj):
            raise ValueError(
                "gradient_ratio needs the gradient of the similarity at local_proj: call it with gradients enabled, "
                "local_proj not detached, and local_pred computed from the very tensors passed as local_proj."
            )
        norms.append(torch.stack(found).norm())
    weight: Tensor = ratio * norms[0] / norms[1].clamp_min(torch.finfo(norms[1].dtype).tiny)
    return weight.clamp(max=1.0)


def _views(name: str, value: Views | None) -> list[Tensor]:
    if isinstance(value, Tensor) and value.ndim != 3:
        raise ValueError(f"{name} must have shape (V, N, D) or be V tensors (N, D), got a tensor {tuple(value.shape)}.")
    if value is None or not isinstance(value, (Tensor, list, tuple)):
        raise ValueError(f"{name} must be a tensor (V, N, D) or V tensors (N, D), got {type(value).__name__}.")
    views = list(value.unbind(0)) if isinstance(value, Tensor) else list(value)
    for view in views:
        if (
            not isinstance(view, Tensor)
            or view.ndim != 2
            or view.shape != views[0].shape
            or not view.is_floating_point()
        ):
            raise ValueError(f"{name} must be floating-point views of one shape (N, D), got {_shapes(views)}.")
    return views


def _same_shape(name: str, views: Sequence[Tensor], other_name: str, others: Sequence[Tensor]) -> None:
    if not others or views[0].shape != others[0].shape or views[0].ndim != 2:
        raise ValueError(
            f"{name} and {other_name} must have the same (N, D), got {_shapes(views)} and {_shapes(others)}."
        )


def _shapes(views: Sequence[object]) -> str:
    shapes = (str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in views)
    return f"{len(views)} views [{', '.join(shapes)}]"


def _weight(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")
    return value


def _choice(name: str, value: str, options: tuple[str, ...]) -> str:
    if value not in options:
        raise ValueError(f"{name} must be one of {options}, got {value!r}.")
    return value
