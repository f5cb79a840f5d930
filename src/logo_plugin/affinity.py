"""The learned pair scorer: how likely do two local crops show the same image?"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from logo_plugin.checks import positive_integer


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

    def forward(self, first: Tensor, second: Tensor | None = None, *, frozen: int = 0) -> Tensor:
        """Scores `[first, second]`; the order of a pair matters.

        Args:
            first: (N, D), or (P, N, D) for P batches at once. Each of the P has its own BatchNorm
                statistics, as if scored by P calls.
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
        if second is None:
            if first.ndim != 3 or first.shape[-1] != 2 * self.dim:
                raise ValueError(
                    f"Affinity(dim={self.dim}) expects pairs of projections side by side, (N, P, {2 * self.dim}), got "
                    f"{tuple(first.shape)}. Set dim to the width of your projector's output."
                )
        elif first.shape != second.shape or first.ndim not in (2, 3) or first.shape[-1] != self.dim:
            raise ValueError(
                f"Affinity(dim={self.dim}) expects two tensors of one shape (N, {self.dim}) or "
                f"(P, N, {self.dim}), got {tuple(first.shape)} and {tuple(second.shape)}. "
                "Set dim to the width of your projector's output."
            )
        double = torch.float64 in (first.dtype, *(p.dtype for p in self.parameters()))
        dtype = torch.float64 if double else torch.float32
        with torch.autocast(first.device.type, enabled=False):
            # (N, P, 2D): with P beside the features, one batch_norm over (N, P * hidden) keeps the
            # statistics of the P batches apart.
            hidden = first.to(dtype)
            if second is not None:
                hidden = torch.cat([hidden, second.to(dtype)], dim=-1)
                hidden = hidden.reshape(-1, *hidden.shape[-2:]).transpose(0, 1)
            norms = [layer for layer in self.mlp if isinstance(layer, _BatchNorm)]
            # Of one width, as here, all BatchNorms share what they need: a third of the kernels.
            together = [norms] if len({norm.num_features for norm in norms}) == 1 else [[norm] for norm in norms]
            prepared = [_prepare(same, hidden, frozen) for same in together]
            rows = [pair for rows, statistics in prepared for pair in zip(rows, statistics.flatten(1), strict=True)]
            for i, layer in enumerate(self.mlp):
                if isinstance(layer, _BatchNorm):
                    hidden = _batch_norm(layer, hidden, *zip(rows.pop(0), rows.pop(0), strict=True))
                else:
                    hidden = _run(layer, hidden, frozen, routes_input=i == 0)
            for same, (_, statistics) in zip(together, prepared, strict=True):
                _track(same, statistics[:, frozen:])
        logits = hidden.squeeze(-1)
        return logits if second is None else logits.T.reshape(first.shape[:-1])


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors as float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Linear(torch.autograd.Function):
    """A linear layer on (N, P, C) whose parameters get no gradient of the first `frozen` of the P.

    With `routes_input` x gets that of the first `frozen` only.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, frozen: int, routes_input: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.frozen, ctx.routes_input = frozen, routes_input
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rest = grad.shape[1] - ctx.frozen
        to_x = to_weight = to_bias = None
        if ctx.needs_input_grad[0]:
            to_x = F.pad(grad[:, : ctx.frozen] @ weight, (0, 0, 0, rest)) if ctx.routes_input else grad @ weight
        if ctx.needs_input_grad[1]:
            trained = F.pad(grad[:, ctx.frozen :], (0, 0, ctx.frozen, 0)).flatten(0, 1)
            to_weight, to_bias = trained.T @ x.flatten(0, 1), trained.sum(0)
        return to_x, to_weight, to_bias, None, None


def _run(layer: nn.Module, x: Tensor, frozen: int, routes_input: bool) -> Tensor:
    """One layer of the affinity on (N, P, C), its parameters in the precision of x."""
    parameters = {name: p.to(x.dtype) for name, p in layer.named_parameters()}
    if not parameters:
        out: Tensor = layer(x)
    elif frozen and type(layer) is nn.Linear and layer.bias is not None:
        out = _Linear.apply(x, parameters["weight"], parameters["bias"], frozen, routes_input)
    elif frozen:
        kept = {name: p.detach() for name, p in parameters.items()}
        trained = x[:, frozen:].detach() if routes_input else x[:, frozen:]
        sides = ((kept, x[:, :frozen]), (parameters, trained))
        out = torch.cat([_call(layer, p, side) for p, side in sides], dim=1)
    elif next(layer.parameters()).dtype == x.dtype:
        out = layer(x)
    else:
        out = _call(layer, parameters, x)
    return out


def _call(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    if type(layer) is nn.LayerNorm:  # which torch 2.4 can't compile otherwise
        return F.layer_norm(x, layer.normalized_shape, parameters["weight"], parameters.get("bias"), layer.eps)
    out: Tensor = functional_call(layer, parameters, x)
    return out


def _prepare(norms: Sequence[Any], x: Tensor, frozen: int) -> tuple[Sequence[Tensor], Tensor]:
    """For K BatchNorms of one width C weights and biases by turns, each (P * C), and room for statistics (2K, P, C)."""
    groups, channels = x.shape[1], norms[0].num_features
    given = [p for norm in norms for p in (norm.weight, norm.bias)]
    given = [x.new_full((channels,), 1.0 - i % 2) if p is None else p.to(x.dtype) for i, p in enumerate(given)]
    each = torch.stack(given)[:, None]
    rows = each.expand(-1, groups - frozen, -1)
    if frozen:
        rows = torch.cat([each.detach().expand(-1, frozen, -1), rows], dim=1)
    return rows.flatten(1).unbind(0), x.new_zeros(len(given), groups, channels)


def _batch_norm(norm: Any, x: Tensor, affine: tuple[Tensor, Tensor], statistics: tuple[Tensor, Tensor]) -> Tensor:
    """BatchNorm of (N, P, C) with the statistics of each P apart; also serves a SyncBatchNorm, each rank by itself."""
    own = norm.training or norm.running_mean is None
    if not own:
        statistics = tuple(b.to(x.dtype).repeat(x.shape[1]) for b in (norm.running_mean, norm.running_var))
    # Momentum 1 leaves in `statistics` what this very batch has.
    return F.batch_norm(x.flatten(1), *statistics, *affine, own, 1.0, norm.eps).view_as(x)


@torch.no_grad()
def _track(norms: Sequence[Any], statistics: Tensor) -> None:
    """Moves the running statistics, unless the batch's are not finite: one such batch would stay in them for ever.

    Without a look at a value, for which a GPU would have to stop.

    Args:
        norms: K BatchNorms.
        statistics: By turns the means and variances of P batches in each, (2K, P, C).
    """
    moving = [norm.training and norm.running_mean is not None for norm in norms]
    batches = statistics.shape[1]
    if not any(moving) or not batches:
        return
    if not all(moving):
        statistics = statistics[[2 * k + i for k, moves in enumerate(moving) if moves for i in (0, 1)]]
        norms = [norm for norm, moves in zip(norms, moving, strict=True) if moves]
    buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    counts, rates = [norm.num_batches_tracked for norm in norms], [norm.momentum for norm in norms]
    steps = statistics.mean(1) - torch.stack(buffers)
    # Times 0 what is not finite is nan, here for all of them, and nan is no step.
    steps = steps.add(steps.sum(), alpha=0).nan_to_num(0.0)
    if None not in rates and len(set(rates)) == 1:
        torch._foreach_add_(buffers, list(steps), alpha=rates[0])
        torch._foreach_add_(counts, batches)
        return
    # Without momentum they are the mean of all batches; one that is not finite does not count.
    finite = statistics.isfinite().all() * batches
    for i, (count, rate) in enumerate(zip(counts, rates, strict=True)):
        count.add_(finite)
        for buffer, step in zip(buffers[2 * i : 2 * i + 2], steps[2 * i : 2 * i + 2], strict=True):
            buffer.add_(step * (finite / count.clamp_min(1) if rate is None else rate))
