"""The affinity's layers on P batches at once, each with its own BatchNorm statistics, some of them only looked at.

In as few kernels as it takes: these tensors are small, so on a GPU a kernel costs its launch.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm


def run_layers(layers: Iterable[nn.Module], x: Tensor, frozen: int = 0, *, routed: bool = False) -> Tensor:
    """Runs the layers, their parameters in the precision of x.

    Args:
        layers: From the first to the last.
        x: (N, P, C). P beside the features: one batch_norm over (N, P * C) keeps the batches apart.
        frozen: The gradient of the first `frozen` of the P reaches x and no parameter, and they move no running
            statistics; that of the others reaches the parameters and not x. With 0 all reach both.
        routed: x takes its gradients where they belong by itself: let it have all of them.
    """
    layers = list(layers)
    norms = [layer for layer in layers if isinstance(layer, _BatchNorm)]
    # Of one width, as usual, all BatchNorms share what they need.
    together = [norms] if len({norm.num_features for norm in norms}) == 1 else [[norm] for norm in norms]
    prepared = [_prepare(same, x, frozen) for same in together]
    affine = [row for rows, _ in prepared for row in rows]
    statistics = [row for _, rows in prepared for row in rows.flatten(1)]
    for i, layer in enumerate(layers):
        if isinstance(layer, _BatchNorm):
            x = _batch_norm(layer, x, affine[:2], statistics[:2])
            affine, statistics = affine[2:], statistics[2:]
        else:
            x = _run(layer, x, frozen, routes_input=i == 0 and not routed)
    for same, (_, rows) in zip(together, prepared, strict=True):
        _track(same, rows[:, frozen:])
    return x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, frozen: int = 0, routes_input: bool = False) -> Tensor:
    """A linear layer on (N, P, C), whose backward is in the precision of x, too, whatever autocast says there.

    Its parameters get no gradient of the first `frozen` of the P; with `routes_input` x gets that of these only.
    """
    out: Tensor = _Linear.apply(x, weight, bias, frozen, routes_input)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, frozen: int, routes_input: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.frozen, ctx.routes_input = frozen, routes_input
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), frozen = ctx.saved_tensors, ctx.frozen
        to_x = to_weight = to_bias = None
        with torch.autocast(grad.device.type, enabled=False):  # some call backward inside of it
            if ctx.needs_input_grad[0] and ctx.routes_input:
                to_x = F.pad(grad[:, :frozen] @ weight, (0, 0, 0, grad.shape[1] - frozen))
            elif ctx.needs_input_grad[0]:
                to_x = grad @ weight
            if any(ctx.needs_input_grad[1:3]):
                trained = F.pad(grad[:, frozen:], (0, 0, frozen, 0)).flatten(0, 1)
                to_weight = trained.T @ x.flatten(0, 1) if ctx.needs_input_grad[1] else None
                to_bias = trained.sum(0) if ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias, None, None


def _run(layer: nn.Module, x: Tensor, frozen: int, routes_input: bool) -> Tensor:
    """One layer of the affinity on (N, P, C), its parameters in the precision of x."""
    parameters = {name: p.to(x.dtype) for name, p in layer.named_parameters()}
    if not parameters:
        out: Tensor = layer(x)
    elif frozen and type(layer) is nn.Linear:
        out = linear(x, parameters["weight"], parameters.get("bias"), frozen, routes_input)
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


def _batch_norm(norm: Any, x: Tensor, affine: Sequence[Tensor], statistics: Sequence[Tensor]) -> Tensor:
    """BatchNorm of (N, P, C) with the statistics of each P apart; also serves a SyncBatchNorm, each rank by itself."""
    own = norm.training or norm.running_mean is None
    mean, var = statistics if own else [b.to(x.dtype).repeat(x.shape[1]) for b in (norm.running_mean, norm.running_var)]
    # Momentum 1 leaves in `statistics` what this very batch has.
    return F.batch_norm(x.flatten(1), mean, var, affine[0], affine[1], own, 1.0, norm.eps).view_as(x)


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
