"""The learned pair scorer: how likely do two local crops show the same image?"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class Affinity(nn.Module):
    """Scores pairs of projections with one logit: Linear-norm-ReLU twice, then Linear.

    The paper's f (Eq. 6), called "regressor" in its release and a "critic" elsewhere. `LoGoLoss`
    trains it to give pairs of one image a high logit and pairs of two images a low one.

    Args:
        dim: Features D of one projection; pairs are concatenated to 2 D.
        hidden_dim: Width of both hidden layers (release: 256).
        norm: "batch" (BatchNorm, release) or "layer" (LayerNorm). BatchNorm sees same-image and other-image
            pairs in batches of their own, and lets the network tell the two batches apart rather than
            the pairs; LayerNorm makes it judge each pair by itself.

    Raises:
        ValueError: If `dim` or `hidden_dim` is not a positive integer, or `norm` is unknown.

    Example:
        >>> Affinity(dim=128)(torch.randn(32, 128), torch.randn(32, 128)).shape
        torch.Size([32])
    """

    def __init__(self, dim: int, hidden_dim: int = 256, norm: Literal["batch", "layer"] = "batch") -> None:
        super().__init__()
        for name, value in (("dim", dim), ("hidden_dim", hidden_dim)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if norm not in ("batch", "layer"):
            raise ValueError(f'norm must be "batch" or "layer", got {norm!r}.')
        normed = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
        self.dim = dim
        self.mlp = nn.Sequential(
            nn.Linear(2 * dim, hidden_dim),
            normed(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            normed(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, 1),
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Scores `[first, second]`; the order of a pair matters.

        Args:
            first: (N, D), or (P, N, D) for P batches at once. Each of the P has its own BatchNorm
                statistics, as if scored by P calls.
            second: Same shape as `first`.

        Returns:
            Logits, (N,) or (P, N), in float32 (float64 for float64 input) also under autocast.

        Raises:
            ValueError: If the shapes differ, or are not (N, D) or (P, N, D) with D = `dim`.
        """
        if first.shape != second.shape or first.ndim not in (2, 3) or first.shape[-1] != self.dim:
            raise ValueError(
                f"Affinity(dim={self.dim}) expects two tensors of one shape (N, {self.dim}) or "
                f"(P, N, {self.dim}), got {tuple(first.shape)} and {tuple(second.shape)}. "
                "Set dim to the width of your projector's output."
            )
        with torch.autocast(first.device.type, enabled=False):
            pairs = torch.cat([full_precision(first), full_precision(second)], dim=-1)
            # (N, P, 2D): with P beside the features, one batch_norm over (N, P * hidden) keeps the
            # statistics of the P batches apart.
            hidden = pairs.reshape(-1, *pairs.shape[-2:]).transpose(0, 1)
            for layer in self.mlp:
                hidden = _grouped_batch_norm(layer, hidden) if isinstance(layer, _BatchNorm) else layer(hidden)
        return hidden.squeeze(-1).T.reshape(first.shape[:-1])


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _grouped_batch_norm(norm: Any, x: Tensor) -> Tensor:
    """BatchNorm of (N, P, C) with the statistics of each P apart; also serves a SyncBatchNorm."""
    groups = x.shape[1]
    mean, var, weight, bias = (
        tensor.repeat(groups) for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    out = F.batch_norm(x.flatten(1), mean, var, weight, bias, norm.training, norm.momentum, norm.eps)
    if norm.training:
        with torch.no_grad():
            norm.running_mean.copy_(mean.view(groups, -1).mean(0))
            norm.running_var.copy_(var.view(groups, -1).mean(0))
            norm.num_batches_tracked.add_(groups)
    return out.view_as(x)
