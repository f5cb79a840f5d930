"""A picture of what the crops of an image are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from logo_plugin.checks import positive_integer
from logo_plugin.crops import MultiCropCollate
from logo_plugin.decoding import ImageLike, decode

_COLORS = {"global": "#1f77b4", "local": "#ff7f0e"}
_GAP = 8


def draw_crops(image: ImageLike, collate: MultiCropCollate, *, rows: int = 3) -> Image.Image:
    """Draws an image with the boxes of its crops, and beside it the crops, augmented.

    Args:
        image: One image, of any kind that `MultiCropTransform` takes. Of other channels than red, green and blue the
            first three are shown, or the first as grey where there are fewer.
        collate: Its options are those of the crops; `defer`, `return_boxes` and the keys of dicts are not looked at.
        rows: How often the crops are drawn anew; the boxes are those of the first row.

    Returns:
        The picture, as high as the rows of crops.

    Raises:
        ValueError: If the image cannot be decoded, or `rows` is not a positive integer.
        TypeError: If it is none of these kinds.
    """
    positive_integer("rows", rows)
    pixels = decode(image, len(collate.mean))
    collate = replace(collate, defer=None, return_boxes=True, image_key=None, target_key=None)
    views, boxes = collate([image] * rows)
    kinds = ["global"] * collate.global_crops + ["local"] * collate.local_crops
    grid = torch.cat([_column(view, kind, collate) for view, kind in zip(views, kinds, strict=True)], dim=2)
    source = _source(pixels, boxes.boxes[:, 0], kinds, height=grid.shape[1])
    picture: Image.Image = to_pil_image(torch.cat([source, grid], dim=2))
    return picture


def headings(widths: Mapping[str, int], height: int = 14) -> Tensor:
    """A white strip, uint8 (3, height, sum of the widths), with each word in the middle of its width."""
    strip = Image.new("RGB", (sum(widths.values()), height), "white")
    draw, left = ImageDraw.Draw(strip), 0
    for word, width in widths.items():
        draw.text((left + (width - draw.textlength(word)) / 2, 1), word, fill="black")
        left += width
    drawn: Tensor = pil_to_tensor(strip)
    return drawn


def visible(views: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What there is to see of normalised images.

    Args:
        views: (N, C, H, W).
        mean: What was subtracted from them, C numbers; of another number of them the first stands for all channels.
        std: What they were divided by.

    Returns:
        (N, 3, H, W) in [0, 1]: the first three channels, or the first as grey where there are fewer.
    """
    images = views.detach()[:, : 3 if views.shape[1] >= 3 else 1].float().cpu()
    known = images.shape[1] if len(mean) == views.shape[1] else 1
    shift, scale = (torch.tensor(values[:known], dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return (images * scale + shift).clamp(0, 1).expand(-1, 3, -1, -1)


def _source(pixels: Tensor, boxes: Tensor, kinds: Sequence[str], height: int) -> Tensor:
    """The decoded image (H, W, C) with its boxes, no more than four times as wide as high."""
    side = min(height, max(64, round(height * 0.9)))
    scale = min(side / pixels.shape[0], 4 * side / pixels.shape[1])
    size = [max(1, round(length * scale)) for length in pixels.shape[:2]]
    image = visible(pixels.permute(2, 0, 1)[None] / 255, (0.0,) * pixels.shape[2], (1.0,) * pixels.shape[2])
    small = F.interpolate(image, size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)
    drawn = draw_bounding_boxes(
        (small * 255).round().to(torch.uint8),
        (boxes * scale).round(),
        colors=[_COLORS[kind] for kind in kinds],
        width=3,
    )
    return F.pad(drawn, (_GAP, _GAP, 0, height - size[0]), value=255)


def _column(views: Tensor, kind: str, collate: MultiCropCollate) -> Tensor:
    """(N, C, S, S) to uint8 (3, N * row, S + gaps), each crop at its own size, framed in the colour of its kind."""
    pixels = (visible(views, collate.mean, collate.std) * 255).round().to(torch.uint8)
    row = max(collate.global_size, collate.local_size if collate.local_crops else 0)
    side = pixels.shape[2]
    frame = torch.tensor([[0, 0, side - 1, side - 1]])
    framed = [draw_bounding_boxes(view, frame, colors=_COLORS[kind], width=2) for view in pixels]
    return torch.cat([F.pad(view, (_GAP, 0, 0, row + _GAP - side), value=255) for view in framed], dim=1)
