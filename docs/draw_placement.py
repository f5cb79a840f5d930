"""Draws docs/placement.png: where `local_placement` puts local crops, on a photograph."""

from pathlib import Path

import matplotlib as mpl
import torch
from skimage import data

from logo_plugin import MultiCropTransform

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

COLOURS = {"global": "#1f77b4", "local": "#ff7f0e"}
SEED = 113  # the same for all three: the global crops and the sizes are the same, too


def main():
    cat = data.chelsea()
    height, width = cat.shape[:2]
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.45), layout="constrained")
    for axis, placement in zip(axes, ("anywhere", "inside", "apart"), strict=True):
        torch.manual_seed(SEED)
        recipes = MultiCropTransform(local_scale=(0.05, 0.25), local_placement=placement).draw(width, height)
        axis.imshow(cat)
        axis.set_axis_off()
        axis.set_title(f'"{placement}"', fontsize=15)
        for view, recipe in enumerate(recipes):
            kind, style = ("global", "--") if view < 2 else ("local", "-")
            left, top, right, bottom = recipe.box
            # A white edge under each, so that it shows on light and on dark parts.
            for colour, line in (("white", 5), (COLOURS[kind], 3)):
                corner, size = (left, top), (right - left, bottom - top)
                axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=line, linestyle=style))
    figure.savefig(Path(__file__).with_name("placement.png"), dpi=110)


if __name__ == "__main__":
    main()
