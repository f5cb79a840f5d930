"""What the projections of the local crops say about a run: collapse, spread, and whether the affinity learns."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logo_plugin.affinity import full_precision
from logo_plugin.checks import Views, as_views
from logo_plugin.modes import eval_mode


@torch.no_grad()
def diagnose(local_proj: Views, affinity: nn.Module | None = None) -> dict[str, float]:
    """Measures a batch of projections; changes nothing: no gradient, no buffer, no random number.

    All but the affinity's accuracy are of the projections divided by their norms, since losses of cosines
    see nothing else. If a projection is not finite, every value is nan; if a logit is not, the accuracy is.

    Args:
        local_proj: Projections of the local crops, (L, N, D) or L tensors (N, D), N >= 2.
        affinity: The pair scorer that is trained on them, as `LoGoLoss` takes it. It is scored in eval mode.

    Returns:
        By name, as far as they are defined:

        - `local_local_similarity`: mean cosine of two crops of one image, in [-1, 1]; needs L >= 2.
        - `other_image_similarity`: mean cosine of crops of two images, over all such pairs, in [-1, 1].
        - `embedding_std`: standard deviation over the images, mean over features and crops, times sqrt(D).
          0 when all images are mapped to one point, 1 when they fill all directions alike (SimSiam,
          https://arxiv.org/abs/2011.10566, Fig. 2, which leaves out the factor).
        - `effective_rank`: exp of the entropy of the singular values, normalised to sum 1, of all crops
          minus their view's mean (Roy and Vetterli, EUSIPCO 2007), in [1, min(L (N - 1), D)].
        - `affinity_accuracy`: mean of the fraction of same-image pairs with a logit > 0 and that of
          other-image pairs (each image with the one before it in the batch) with a logit < 0, in [0, 1],
          0.5 being chance; needs `affinity` and L >= 2.

    Raises:
        ValueError: If `local_proj` has another shape or fewer than two images.

    Example:
        >>> diagnose(torch.randn(2, 64, 16))["embedding_std"]  # doctest: +SKIP
        0.99
    """
    views = torch.stack([full_precision(view) for view in as_views("local_proj", local_proj)])
    crops, images, features = views.shape
    if images < 2:
        raise ValueError(f"local_proj must be of at least 2 images, got {tuple(views.shape)} for (L, N, D).")
    # On the CPU, since the eigenvalues need float64, which some devices lack and none is fast at for this size.
    z = F.normalize(views.cpu().double(), dim=-1)
    # The squared norm of a sum of vectors holds the cosines of all its pairs.
    per_image = z.sum(0)
    all_pairs, image_pairs, itself = (x.square().sum().item() for x in (per_image.sum(0), per_image, z))
    found = {}
    if crops > 1:
        found["local_local_similarity"] = (image_pairs - itself) / (images * crops * (crops - 1))
    found["other_image_similarity"] = (all_pairs - image_pairs) / (crops**2 * images * (images - 1))
    found["embedding_std"] = z.std(1).mean().item() * features**0.5
    found["effective_rank"] = _effective_rank((z - z.mean(1, keepdim=True)).flatten(0, 1))
    if affinity is not None and crops > 1:
        found["affinity_accuracy"] = _accuracy(affinity, views)
    return found if z.isfinite().all() else dict.fromkeys(found, float("nan"))


def _effective_rank(rows: Tensor) -> float:
    """Of (M, D) in float64, from the smaller Gram matrix: its eigenvalues cost a fraction of an SVD."""
    if not rows.isfinite().all():
        return float("nan")
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    # What float32 rounding leaves of equal rows is not a direction.
    values = values[values > torch.finfo(torch.float32).eps * len(rows) ** 0.5]
    if not len(values):
        return 1.0
    share = values / values.sum()
    return math.exp(-(share * share.log()).sum().item())


def _accuracy(affinity: nn.Module, z: Tensor) -> float:
    with eval_mode(affinity):
        # Each crop with the next one of its image, then with that of another image.
        same, other = affinity(z, z.roll(1, 0)), affinity(z, z.roll((1, 1), (0, 1)))
    if not (same.isfinite().all() and other.isfinite().all()):
        return float("nan")
    return float((same > 0).double().mean() + (other < 0).double().mean()) / 2
