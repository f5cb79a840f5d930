"""Draws why strong repulsion costs: what becomes of local crops that are repelled in three ways, on CIFAR-10.

python benchmarks/draw_mechanism.py      # writes docs/mechanism.png, from benchmarks/results/accuracy_small.json
"""

from pathlib import Path

import matplotlib as mpl
from accuracy_report import interval, paired, read

mpl.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ARMS = {  # gradient_ratio=0.1 but for the first
    "multi-crop": "nothing",
    "cosine": "plain cosine",
    "ratio 0.1": "BatchNorm\naffinity",
    "layer norm": "LayerNorm\naffinity",
}
ONE, TWO, PLAIN = "#d62728", "#1f77b4", "#444444"


def main():
    runs = read([HERE / "results" / "accuracy_small.json"])["cifar10"]
    figure, axes = plt.subplots(2, 2, figsize=(7.4, 5.9), layout="constrained", sharey=True)
    alike, accuracy, right, rank = axes.flat
    for y, arm in enumerate(ARMS):
        finals = [record["final"] for record in runs["byol", arm].values()]

        def of(name, finals=finals):
            return [final[name] for final in finals if name in final]

        one, two = of("local_local_similarity"), of("other_image_similarity")
        alike.plot([sum(two) / len(two), sum(one) / len(one)], [y, y], color="#bbbbbb", linewidth=2, zorder=0)
        point(alike, y, two, TWO)
        point(alike, y, one, ONE)
        if arm != "multi-crop":
            point(accuracy, y, paired(runs, "byol", arm, "multi-crop"), PLAIN)
            point(right, y, of("affinity_accuracy"), PLAIN)
        point(rank, y, of("effective_rank"), PLAIN)
    alike.set(xlim=(-0.05, 1), title="Cosine of local crops")
    alike.text(0.4, -0.62, "of two images", color=TWO, ha="right", fontsize=13)
    alike.text(0.52, -0.62, "of one image", color=ONE, ha="left", fontsize=13)
    accuracy.plot(0, 0, "o", color=PLAIN, markerfacecolor="white", markersize=8)
    accuracy.axvline(0, color="#bbbbbb", zorder=0)
    accuracy.set(title="k-NN against multi-crop")
    right.axvline(50, color="#bbbbbb", zorder=0)
    right.text(51, 0, "none to judge", va="center", color=PLAIN, fontsize=12)
    right.set(xlim=(45, 75), title="Affinity right, %")
    rank.set(xlim=(0, 100), title="Effective rank")
    for axis in axes.flat:
        axis.title.set_size(14)
        axis.tick_params(labelsize=13, length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.set_ylim(len(ARMS) - 0.5, -1)
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(ARMS)), ARMS.values())
    figure.suptitle("What is repelled, and what becomes of it", fontsize=16)
    figure.get_layout_engine().set(hspace=0.09, wspace=0.05)
    figure.savefig(HERE.parent / "docs" / "mechanism.png", dpi=120)


def point(axis, y, values, colour):
    """Mean and 95 % interval."""
    mean, half = interval(values)
    axis.errorbar(mean, y, xerr=half, fmt="o", color=colour, markersize=8, linewidth=2, capsize=4)


if __name__ == "__main__":
    main()
