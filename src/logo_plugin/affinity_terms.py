"""The two terms that an affinity gives: the repulsion of local crops, and what trains the affinity."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from logo_plugin.affinity import Affinity, CosineAffinity, full_precision
from logo_plugin.checks import overlap_in_range
from logo_plugin.pairs import Pairs
from logo_plugin.similarities import mean_cosine


def affinity_terms(
    affinity: nn.Module,
    local_proj: Sequence[Tensor],
    *,
    repulsion: str = "softplus",
    overlap: Tensor | None = None,
    form: str = "logistic",
    noise: float | Tensor = 0.0,
    partner: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`local_local_loss`, and Eq. 6 or the release's logistic form, which trains an `Affinity`; in one pass.

    Args:
        affinity: The pair scorer.
        local_proj: L tensors (N, D), L >= 2, N >= 2.
        repulsion: As in `local_local_loss`.
        overlap: As in `local_local_loss`.
        form: "logistic" (both orders of each pair) or "difference" (one order, as in local_local).
        noise: Added to both members of the positive pairs: a standard deviation, or the values (2, N, D).
        partner: For each image the index of the other image that makes its negative pair, (N,). None
            rotates the batch by a random non-zero shift, so that no image is its own negative.

    Returns:
        Two scalars. The gradient of the first reaches `local_proj` only, that of the second the parameters of
        `affinity` only; the second is 0 if there are none.
    """
    if not list(affinity.parameters()):  # nothing to train
        repelled = local_local_loss(affinity, local_proj, repulsion=repulsion, overlap=overlap)
        return repelled, repelled.new_zeros(())
    count = len(local_proj) * (len(local_proj) - 1) // 2
    own = type(affinity).forward is Affinity.forward
    if own and count > 1 and type(affinity.mlp[0]) is nn.Linear:  # type: ignore[index]
        logits = affinity(_pairs(local_proj, form, noise, partner), frozen=count)
    elif own:  # two crops: the pairs themselves take fewer operators
        members = _repelled_pairs(local_proj) + _trained_pairs(local_proj, form, noise, partner)
        logits = affinity(_side_by_side(members), frozen=count)
    else:
        looked_at = _looked_at(affinity, _side_by_side(_repelled_pairs(local_proj)))
        others = _scored(affinity, _side_by_side(_trained_pairs(local_proj, form, noise, partner)))
        logits = torch.cat([looked_at, others], dim=1)
    trained = (logits.shape[1] - count) // 2
    looked_at, positive, negative = logits.split([count, trained, trained], dim=1)
    return _repulsion(looked_at, repulsion, overlap), _training(positive, negative, form)


def local_local_loss(
    affinity: nn.Module,
    local_proj: Tensor | Sequence[Tensor],
    *,
    repulsion: str = "softplus",
    overlap: Tensor | None = None,
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
        ValueError: If `overlap` is not (pairs, N), floating-point and in [0, 1]. On a GPU, where looking at the values
            would make it wait, those out of range make the result nan.
    """
    if type(affinity) is CosineAffinity and repulsion == "logit" and overlap is None:
        return mean_cosine(torch.stack(list(local_proj)))
    return _repulsion(_looked_at(affinity, _side_by_side(_repelled_pairs(local_proj))), repulsion, overlap)


def _repelled_pairs(local_proj: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The members (N, D) of the pairs, one after the other."""
    views = [full_precision(view) for view in local_proj]
    return [views[k] for i in range(len(views)) for j in range(i + 1, len(views)) for k in (i, j)]


def _trained_pairs(
    local_proj: Tensor | Sequence[Tensor], form: str, noise: float | Tensor, partner: Tensor | None
) -> list[Tensor]:
    """The same of the positive pairs, then of the negative ones; detached."""
    count, (images, features) = len(local_proj), local_proj[0].shape
    z = _stacked([view.detach() for view in local_proj])
    other = z[_rotation(z) if partner is None else partner]
    if isinstance(noise, Tensor):
        noisy = z[:, None] + noise.transpose(0, 1)[:, :, None]
    elif noise:
        noisy = z[:, None].add(z.new_empty(images, 2, 1, features).normal_(), alpha=noise)
    else:
        noisy = z[:, None].expand(-1, 2, -1, -1)
    pairs = [(i, j) for i in range(count) for j in range(count) if (i != j if form == "logistic" else i < j)]
    positive = [noisy[:, side, k[side]] for k in pairs for side in (0, 1)]
    return positive + [(z, other)[side][:, k[side]] for k in pairs for side in (0, 1)]


def _pairs(local_proj: Sequence[Tensor], form: str, noise: float | Tensor, partner: Tensor | None) -> Pairs:
    """What `first_layer` makes these pairs of, and those to be repelled."""
    z = _stacked(local_proj)
    partner = _rotation(z) if partner is None else partner
    added = None
    if isinstance(noise, Tensor):
        added = noise.transpose(0, 1).flatten(1)
    elif noise:
        added = z.new_empty(len(z), 2 * z.shape[2]).normal_(std=noise)
    return Pairs(z, added, partner, form == "logistic")


def _stacked(local_proj: Sequence[Tensor]) -> Tensor:
    """(N, L, D)."""
    images, features = local_proj[0].shape
    return torch.cat([full_precision(view) for view in local_proj], dim=1).view(images, -1, features)


def _rotation(z: Tensor) -> Tensor:
    """Partners that rotate the batch; a negative index counts from the end: the rotation without a remainder."""
    images = len(z)
    return torch.arange(images, device=z.device) + torch.randint(1 - images, 0, (), device=z.device)


def _side_by_side(members: Sequence[Tensor]) -> Tensor:
    """(N, P, 2 D), which a single copy makes."""
    images, features = members[0].shape
    return torch.cat(list(members), dim=1).view(images, -1, 2 * features)


def _looked_at(affinity: nn.Module, pairs: Tensor) -> Tensor:
    frozen = {name: parameter.detach() for name, parameter in affinity.named_parameters()}
    return _scored(affinity, pairs, frozen)


def _scored(affinity: nn.Module, pairs: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """Logits (N, P) of any affinity, asked as a user would."""
    first, second = pairs.transpose(0, 1).chunk(2, dim=-1)
    out = functional_call(affinity, parameters, (first, second)) if parameters else affinity(first, second)
    if not isinstance(out, Tensor) or out.shape != first.shape[:-1]:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(
            f"the affinity must map two tensors (P, N, D) = {tuple(first.shape)} to logits (P, N), and "
            f"{type(affinity).__name__} gave {got}. logo_plugin.Affinity(dim) does."
        )
    return out.T


def _repulsion(logits: Tensor, form: str, overlap: Tensor | None) -> Tensor:
    repelled = F.softplus(logits) if form == "softplus" else logits
    if overlap is not None:
        repelled = (1 - overlap_in_range(overlap, *logits.T.shape).T.to(repelled)) * repelled
    return repelled.mean()


def _training(positive: Tensor, negative: Tensor, form: str) -> Tensor:
    if form == "logistic":
        return (F.softplus(negative) - F.logsigmoid(positive)).mean()  # -logsigmoid(x) is softplus(-x)
    return (negative - positive).mean()
