"""One photograph, the boxes of its crops, and the crops: before augmentation, augmented by a worker, and on the device.

python examples/show_crops.py                          # writes crops.png
python examples/show_crops.py --image photo.jpg --seed 3 --local-crops 4
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from skimage import data

from logo_plugin import MultiCropCollate

COLORS = {"global": "tab:blue", "local": "tab:orange"}
UNTOUCHED = {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, help="default: scikit-image's picture of a cat")
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--local-crops", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("crops.png"))
    options = parser.parse_args()
    image = Image.open(options.image).convert("RGB") if options.image else Image.fromarray(data.chelsea())
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def crops(**settings):
        """The same seed draws the same boxes, whatever the probabilities are."""
        torch.manual_seed(options.seed)
        collate = MultiCropCollate(local_crops=options.local_crops, return_boxes=True, **settings)
        views, boxes = collate([image] * 8)  # so that the device has a batch; the first is shown
        if collate.defer:
            views = views.to(device)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (collate.mean, collate.std))
        return [(view[0].cpu() * std + mean).clamp(0, 1) for view in views], boxes

    before, boxes = crops(**UNTOUCHED)
    worker, _ = crops()
    on_device, _ = crops(defer="augment")
    kinds = ["global"] * 2 + ["local"] * options.local_crops
    rows = {"crop": before, "augmented\nby the worker": worker, f"augmented\non the device\n({device})": on_device}

    figure = plt.figure(figsize=(1.8 * len(kinds) + 6, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[5, 1.8 * len(kinds) + 1])
    axes = left.subplots()
    axes.imshow(image)
    axes.set_axis_off()
    for i, ((x0, y0, x1, y1), flip, kind) in enumerate(zip(boxes.boxes[:, 0], boxes.flips[:, 0], kinds, strict=True)):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=COLORS[kind], linewidth=2))
        x, ha = ((x0, "left"), (x1, "right"))[i % 2]
        y, va = ((y0, "top"), (y1, "bottom"))[i // 2 % 2]
        label = f"{i} flipped" if flip else str(i)
        axes.text(x, y, label, ha=ha, va=va, color="white", bbox={"facecolor": COLORS[kind], "linewidth": 0, "pad": 2})
    grid = right.subplots(len(rows), len(kinds), squeeze=False)
    for i, (view, kind) in enumerate(zip(before, kinds, strict=True)):
        grid[0, i].set_title(f"{i}: {kind}, {view.shape[-1]} px")
    for line, (label, views) in zip(grid, rows.items(), strict=True):
        for cell, view, kind in zip(line, views, kinds, strict=True):
            cell.imshow(view.permute(1, 2, 0).numpy(), interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set(color=COLORS[kind], linewidth=3)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center")
    largest = max((255 * (a - b).abs()).max().item() for a, b in zip(worker, on_device, strict=True))
    figure.suptitle(f"Worker and device differ by at most {largest:.1g} of 255 levels")
    figure.savefig(options.output, dpi=110)
    print(f"{options.output}: worker and device differ by at most {largest:.1g} of 255 levels")


if __name__ == "__main__":
    main()
