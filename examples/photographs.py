"""Tiles of the colour photographs in scikit-image's wheel: real images, nothing to download."""

import torch
from PIL import Image
from skimage import data

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "retina", "immunohistochemistry", "hubble_deep_field")
TILE = 96


def photograph_tiles(per_photograph):
    """(train, held-out) lists of (PIL tile, class), from disjoint parts of each photograph."""
    train, held_out = [], []
    for label, name in enumerate(PHOTOGRAPHS):
        photograph = Image.fromarray(getattr(data, name)())
        photograph.thumbnail((720, 720))
        width, height = photograph.size
        border = round(0.65 * width)
        for samples, left, right, count in (
            (train, 0, border, per_photograph),
            (held_out, border, width, per_photograph // 3),
        ):
            corners = [(x, y) for y in range(0, height - TILE + 1, 12) for x in range(left, right - TILE + 1, 12)]
            for i in torch.linspace(0, len(corners) - 1, min(count, len(corners))).long().tolist():
                x, y = corners[i]
                samples.append((photograph.crop((x, y, x + TILE, y + TILE)), label))
    return train, held_out
