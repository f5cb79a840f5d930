"""The affinity's first layer on all pairs of L local crops: each crop is projected once, not once for each pair.

W [z_i, z_j] is W1 z_i + W2 z_j, so that what grows with the number of pairs has the width of the hidden layer, not of
two projections.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pairs(NamedTuple):
    """What the pairs are made of.

    Attributes:
        crops: (N, L, D).
        noise: (N, 2 D), added to both members of every positive pair, or None.
        partner: (N,), the other image in the negative pairs.
        ordered: Whether positive and negative pairs are of both orders, i != j, or of i < j.
    """

    crops: Tensor
    noise: Tensor | None
    partner: Tensor
    ordered: bool


def first_layer(layer: nn.Linear, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """Hidden values (N, P, H): of the pairs i < j to be repelled, of the positive pairs, of the negative ones.

    The gradient of the first reaches the crops only, that of the others the layer's parameters only.
    """
    z, weight = pairs.crops.to(dtype), layer.weight.to(dtype)
    count, features = z.shape[1:]
    halves = weight.view(-1, 2, features).transpose(0, 1).flatten(0, 1)
    bias = F.pad(layer.bias.to(dtype), (len(weight), 0))
    repelled = F.linear(z, halves.detach(), bias.detach()).chunk(2, dim=-1)
    first, second = F.linear(z.detach(), halves, bias).chunk(2, dim=-1)
    noisy = second if pairs.noise is None else second + F.linear(pairs.noise.to(dtype), weight)[:, None]
    firsts = torch.stack([repelled[0], first, first], dim=1)
    seconds = torch.stack([repelled[1], noisy, second[pairs.partner]], dim=1)
    everyone = firsts[:, :, :, None] + seconds[:, :, None]  # (N, 3, L, L, H), of which not all are pairs
    chosen = [
        (group * count + i) * count + j
        for group in range(3)
        for i in range(count)
        for j in range(count)
        if (i != j if group and pairs.ordered else i < j)
    ]
    return everyone.flatten(1, 3).index_select(1, torch.tensor(chosen, device=z.device))
