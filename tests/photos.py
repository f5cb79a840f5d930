"""Real images for tests: tiles of the photographs that scikit-image carries in its wheel."""

import numpy as np
from PIL import Image
from skimage import data


def tiles(count: int, size: int = 48) -> list[tuple[Image.Image, int]]:
    """`count` tiles as (PIL image, index of the photograph), a list that serves as a dataset."""
    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    rng = np.random.default_rng(0)
    samples = []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        top, left = (rng.integers(0, side - size) for side in photograph.shape[:2])
        samples.append((Image.fromarray(photograph[top : top + size, left : left + size]), i % len(photographs)))
    return samples
