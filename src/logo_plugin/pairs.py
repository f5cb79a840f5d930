"""The affinity's first layer on all pairs of L local crops: each crop is projected once, not once for each pair.

W [z_i, z_j] is W1 z_i + W2 z_j, so that what grows with the number of pairs has the width of the hidden layer, not of
two projections.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logo_plugin.layers import linear


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
    bias = None if layer.bias is None else F.pad(layer.bias.to(dtype), (len(weight), 0))
    repelled = linear(z, halves.detach(), None if bias is None else bias.detach()).chunk(2, dim=-1)
    first, second = linear(z.detach(), halves, bias).chunk(2, dim=-1)
    noisy = second if pairs.noise is None else second + linear(pairs.noise.to(dtype)[:, None], weight, None)
    firsts = torch.stack([repelled[0], first, first], dim=1)
    seconds = torch.stack([repelled[1], noisy, second[pairs.partner]], dim=1)
    everyone = firsts[:, :, :, None] + seconds[:, :, None]  # (N, 3, L, L, H), of which not all are pairs
    return everyone.flatten(1, 3).index_select(1, _places(count, pairs.ordered, z.device))


def _places(count: int, ordered: bool, device: torch.device) -> Tensor:
    """Where in (3, L, L) the pairs are, computed on the device: for a list of Python's a GPU would have to wait."""
    place = torch.arange(3 * count**2, device=device).view(3, count, count)
    i, j = torch.triu_indices(count, count, 1, device=device)
    if not ordered:
        return place[:, i, j].flatten()
    # From the second place on, count + 1 in a row, a diagonal is the last column.
    others = place[1:].flatten(1)[:, 1:].view(2, count - 1, count + 1)[..., :-1]
    return torch.cat([place[0, i, j], others.flatten()])
