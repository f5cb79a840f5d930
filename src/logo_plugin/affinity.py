"""The learned pair scorer: how likely do two local crops show the same image?"""

from typing import Literal

import torch
from torch import Tensor, nn

from logo_plugin.checks import options_by_name, positive_integer
from logo_plugin.layers import run_layers
from logo_plugin.pairs import Pairs, first_layer


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
        TypeError: If an option is unknown.
        ValueError: If `dim` or `hidden_dim` is not a positive integer, or `norm` is unknown.

    Example:
        >>> Affinity(dim=128)(torch.randn(32, 128), torch.randn(32, 128)).shape
        torch.Size([32])
    """

    @options_by_name
    def __init__(self, dim: int, hidden_dim: int = 256, norm: Literal["batch", "layer"] = "batch") -> None:
        super().__init__()
        positive_integer("dim", dim)
        positive_integer("hidden_dim", hidden_dim)
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

    def forward(self, first: Tensor | Pairs, second: Tensor | None = None, *, frozen: int = 0) -> Tensor:
        """Scores `[first, second]`; the order of a pair matters.

        Args:
            first: (N, D), or (P, N, D) for P batches at once. Each of the P has its own BatchNorm
                statistics, as if scored by P calls. Or `Pairs`, of which `frozen` must be those to be repelled.
            second: Same shape as `first`. None if `first` has the pairs side by side, (N, P, 2 D), which
                spares copies.
            frozen: If > 0, the first `frozen` of the P batches are only looked at: their gradient reaches the
                projections and no parameter, and they don't move BatchNorm's running statistics. That of the
                others reaches the parameters and no projection.

        Returns:
            Logits, (N,) or (P, N), or (N, P) without `second`; whatever the dtypes of parameters and input,
            and also under autocast, computed in float32, or float64 if either has it.

        Raises:
            ValueError: If the shapes differ, or are not (N, D) or (P, N, D) with D = `dim`.
        """
        if isinstance(first, Pairs) or (second is None and first.ndim == 3):
            features = first.crops.shape[-1] if isinstance(first, Pairs) else first.shape[-1] / 2
            if features != self.dim:
                raise ValueError(
                    f"Affinity(dim={self.dim}) expects projections of {self.dim} features, got {features:g}. "
                    f"Set dim={features:g}, the width of your projector's output."
                )
        elif second is None or first.shape != second.shape or first.ndim not in (2, 3) or first.shape[-1] != self.dim:
            raise ValueError(
                f"Affinity(dim={self.dim}) expects two tensors of one shape (N, {self.dim}) or "
                f"(P, N, {self.dim}), got {tuple(first.shape)} and {None if second is None else tuple(second.shape)}. "
                "Set dim to the width of your projector's output."
            )
        given = first.crops if isinstance(first, Pairs) else first
        double = torch.float64 in (given.dtype, *(p.dtype for p in self.parameters()))
        dtype = torch.float64 if double else torch.float32
        with torch.autocast(given.device.type, enabled=False):
            if isinstance(first, Pairs):
                hidden = first_layer(self.mlp[0], first, dtype)  # type: ignore[arg-type]
                return run_layers(self.mlp[1:], hidden, frozen, routed=True).squeeze(-1)
            # (N, P, 2D): with P beside the features, one batch_norm over (N, P * hidden) keeps the
            # statistics of the P batches apart.
            hidden = first.to(dtype)
            if second is not None:
                hidden = torch.cat([hidden, second.to(dtype)], dim=-1)
                hidden = hidden.reshape(-1, *hidden.shape[-2:]).transpose(0, 1)
            hidden = run_layers(self.mlp, hidden, frozen)
        logits = hidden.squeeze(-1)
        return logits if second is None else logits.T.reshape(first.shape[:-1])


class CosineAffinity(nn.Module):
    """Scores pairs of projections with their cosine similarity, which has nothing to learn.

    `LoGoLoss(affinity="cosine")` repels it. It has no part that could be fooled or grow steeper as training goes on.
    """

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Scores pairs.

        Args:
            first: (..., D).
            second: Same shape.

        Returns:
            Cosine similarities, (...), in [-1, 1].
        """
        return (unit(first) * unit(second)).sum(-1)


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit(x: Tensor) -> Tensor:
    """Divided by the norm, unless that is nothing in x's precision: then the gradient, 1 / norm, would overflow."""
    return unit_and_norm(x)[0]


def unit_and_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and what it was divided by."""
    least = max(1e-8, torch.finfo(x.dtype).tiny)  # the cosine's usual one; in float16 6e-5
    x = full_precision(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    norm = torch.where(norm > least, norm, 1.0)
    return x / norm, norm
