"""Draws docs/objective.png, the README's figure: two arrows that pull and one that pushes."""

from pathlib import Path

import matplotlib as mpl
from PIL import Image
from skimage import data

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

PULL, PUSH = "#1f77b4", "#d62728"
BOXES = {  # left, top, width, height in the photograph
    "global 1": (30, 12, 262, 262),
    "global 2": (170, 28, 262, 262),
    "local 1": (128, 72, 72, 72),
    "local 2": (318, 176, 84, 84),
}
PLACES = {"global 1": (4.9, 2.55), "global 2": (8.6, 2.55), "local 1": (5.15, 0.35), "local 2": (8.95, 0.35)}
SIZES = {"global": 1.55, "local": 1.05}


def centre(name):
    x, y = PLACES[name]
    size = SIZES[name.split()[0]]
    return x + size / 2, y + size / 2


def arrow(axes, start, end, style, colour, text, where, **options):
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle=style, color=colour, linewidth=2.6, mutation_scale=20, **options)
    )
    axes.text(*where, text, color=colour, ha="center", va="center", fontsize=12)


def main():
    cat = data.chelsea()
    figure, axes = plt.subplots(figsize=(11, 4.4))
    axes.set(xlim=(0, 10.4), ylim=(0, 4.4))
    axes.set_axis_off()
    width = 4.1
    height = width * cat.shape[0] / cat.shape[1]
    bottom = (4.4 - height) / 2
    axes.imshow(cat, extent=(0.1, 0.1 + width, bottom, bottom + height), aspect="auto")
    scale = width / cat.shape[1]
    for name, (left, top, w, h) in BOXES.items():
        corner = (0.1 + left * scale, bottom + height - (top + h) * scale)
        solid = "-" if name.startswith("global") else "--"
        axes.add_patch(
            Rectangle(corner, w * scale, h * scale, fill=False, edgecolor="white", linewidth=2.2, linestyle=solid)
        )
        x, y = PLACES[name]
        size = SIZES[name.split()[0]]
        axes.imshow(cat[top : top + h, left : left + w], extent=(x, x + size, y, y + size), aspect="auto")
        above = name.startswith("global")
        axes.text(x + size / 2, y + size + 0.14 if above else y - 0.16, name, ha="center", va="center", fontsize=11)
    right, left = PLACES["global 1"][0] + SIZES["global"], PLACES["global 2"][0]
    middle = (right + left) / 2
    arrow(axes, (right + 0.08, 3.35), (left - 0.08, 3.35), "<|-|>", PULL, "pull", (middle, 3.58))
    for local, sign in (("local 1", 1), ("local 2", -1)):
        start = (centre(local)[0], PLACES[local][1] + SIZES["local"] + 0.06)
        end = (start[0], PLACES["global 1"][1] - 0.08)
        arrow(axes, start, end, "-|>", PULL, "pull", (start[0] - sign * 0.34, 2.0))
        start = (centre(local)[0] + sign * 0.56, PLACES[local][1] + SIZES["local"] - 0.05)
        end = (left - 0.05, 2.7) if sign > 0 else (right + 0.05, 2.7)
        axes.add_patch(
            FancyArrowPatch(start, end, arrowstyle="-|>", color=PULL, linewidth=1.6, mutation_scale=14, alpha=0.55)
        )
    inner, outer = PLACES["local 1"][0] + SIZES["local"], PLACES["local 2"][0]
    y = centre("local 1")[1]
    for start, end in (((middle - 0.04, y), (inner + 0.1, y)), ((middle + 0.04, y), (outer - 0.1, y))):
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", color=PUSH, linewidth=2.6, mutation_scale=20))
    axes.text(middle, y + 0.22, "push", color=PUSH, ha="center", va="center", fontsize=12)
    axes.text(middle, y - 0.22, "as measured by the affinity", color=PUSH, ha="center", va="center", fontsize=10)
    path = Path(__file__).with_name("objective.png")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the size


if __name__ == "__main__":
    main()
