"""Tables and figures of what benchmarks/accuracy.py measured.

    python benchmarks/accuracy_report.py accuracy_runs --json benchmarks/results/accuracy_small.json
    python benchmarks/accuracy_report.py benchmarks/results/accuracy_small.json --figures docs

Takes folders of runs and JSON files made of them, all of one setting; a later one replaces equal runs. Values are means
over seeds; the plus-minus is the half width of the 95 % confidence interval (Student's t), from 3 seeds on. Differences
are paired by seed. Seconds per step are the fastest seed's: the others shared their machine with something.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
from scipy.stats import t as student

mpl.use("Agg")
import matplotlib.pyplot as plt

MAIN = ("2 crops", "2 crops, equal compute", "multi-crop", "LoGo")
COLOURS = dict(zip(MAIN, ("#7f7f7f", "#000000", "#1f77b4", "#d62728"), strict=True))
# Passes of the network for an image: forward and backward of an online view costs 3, forward of a target view 1.
PASSES = {"simsiam": (6, 12), "byol": (8, 14), "moco": (4, 10)}
QUALITY = ("knn", "linear", "linear_10_percent", "digits_knn", "digits_linear", "photo tiles_knn", "photo tiles_linear")
DIGITS = {"local_local_similarity": 2, "other_image_similarity": 2}
HEADINGS = {
    "knn": "k-NN",
    "linear_10_percent": "linear, 10 % of labels",
    "digits_knn": "digits k-NN",
    "photo tiles_knn": "photo tiles k-NN",
    "local_local_similarity": "local crops alike",
    "other_image_similarity": "of two images",
    "affinity_accuracy": "affinity accuracy, %",
}
MECHANISM = ("local_local_similarity", "other_image_similarity", "affinity_accuracy", "effective_rank")


def read(paths):
    """{(method, arm): {seed: record}}"""
    runs = defaultdict(dict)
    for path in paths:
        parts = [f"[{file.read_text()}]" for file in sorted(path.glob("*.json"))] or [path.read_text()]
        for record in (record for part in parts for record in json.loads(part)):
            runs[record["method"], record["arm"]][record["seed"]] = record
    return dict(runs)


def interval(values):
    """Mean and half width of its 95 % confidence interval (None for fewer than three values)."""
    mean = sum(values) / len(values)
    if len(values) < 3:
        return mean, None
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, float(student.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))


def cell(values, digits=1):
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def print_header(*columns):
    names = (HEADINGS.get(column, column.replace("_", " ")) for column in columns)
    print("| " + " | ".join(names) + " |\n|" + "---|" * len(columns))


def table(runs, methods, arms, columns):
    print_header("method", "arm", "seeds", *columns)
    for method in methods:
        for arm in arms:
            of_seeds = runs.get((method, arm))
            if of_seeds:
                finals = [record["final"] for record in of_seeds.values()]
                cells = [cell([f[c] for f in finals if c in f], DIGITS.get(c, 1)) for c in columns]
                if "s per step" in columns:
                    cells[columns.index("s per step")] = f"{min(r['seconds_per_step'] for r in of_seeds.values()):.3f}"
                print(f"| {method} | {arm} | {len(of_seeds)} | " + " | ".join(cells) + " |")
    print()


def differences(runs, method, base, what="knn"):
    """{arm: paired differences to the base}, of arms that share a seed with it, the lowest mean first."""
    found = {}
    reference = runs.get((method, base), {})
    for (of, arm), of_seeds in runs.items():
        shared = of_seeds.keys() & reference.keys()
        if of == method and arm != base and shared:
            found[arm] = [of_seeds[s]["final"][what] - reference[s]["final"][what] for s in sorted(shared)]
    return dict(sorted(found.items(), key=lambda item: interval(item[1])[0]))


def factors(runs, method, base):
    """Each arm's paired differences to the base, and what the representation looks like."""
    print(f"{method}, minus {base}'s:\n")
    print_header("arm", "seeds", *QUALITY[:3], *MECHANISM)
    of = {what: differences(runs, method, base, what) for what in QUALITY[:3]}
    for arm in reversed(of["knn"]):
        finals = [record["final"] for record in runs[method, arm].values()]
        cells = [cell(of[what][arm]) for what in QUALITY[:3]]
        cells += [cell([f[c] for f in finals if c in f], DIGITS.get(c, 1)) for c in MECHANISM]
        print(f"| {arm} | {len(of['knn'][arm])} | " + " | ".join(cells) + " |")
    print()


def draw_curves(runs, methods, path):
    figure, axes = plt.subplots(1, len(methods), figsize=(3.6 * len(methods), 3.6), layout="constrained", squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        for arm in MAIN:
            of_seeds = list(runs.get((method, arm), {}).values())
            if not of_seeds:
                continue
            passes = PASSES[method]["2 crops" not in arm]
            compute = [epoch * passes / PASSES[method][0] for epoch, _ in of_seeds[0]["curve"]]
            curves = [[accuracy for _, accuracy in record["curve"]] for record in of_seeds]
            means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            axis.plot(compute, means, color=COLOURS[arm], label=arm)
            for curve in curves:
                axis.plot(compute, curve, "o", color=COLOURS[arm], markersize=3.5, alpha=0.6)
        axis.set(title=method, xlabel="compute, in epochs of 2 crops", ylabel="k-NN accuracy, %")
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def draw_factors(runs, method, base, path):
    """Of each arm: k-NN against the base's, and what the representation looks like."""
    rows = sorted(
        [*differences(runs, method, base).items(), (base, [])], key=lambda row: sum(row[1]) / max(1, len(row[1]))
    )
    panels = (("affinity_accuracy", "affinity accuracy, %"), ("effective_rank", "effective rank of the features"))
    figure, axes = plt.subplots(1, 4, figsize=(14, 1 + 0.24 * len(rows)), layout="constrained", sharey=True)
    for y, (arm, pairs) in enumerate(rows):
        colour = COLOURS.get(arm, "#2ca02c")
        finals = [record["final"] for record in runs[method, arm].values()]
        if pairs:
            mean, half = interval(pairs)
            axes[0].plot(pairs, [y] * len(pairs), ".", color="#bbbbbb")
            axes[0].errorbar(mean, y, xerr=half, fmt="o", color=colour, capsize=3)  # no bar below 3 seeds
        for name, fill in (("local_local_similarity", colour), ("other_image_similarity", "white")):
            axes[1].plot(interval([f[name] for f in finals])[0], y, "o", color=colour, markerfacecolor=fill)
        for axis, (name, _) in zip(axes[2:], panels, strict=True):
            values = [f[name] for f in finals if name in f]
            axis.plot(values, [y] * len(values), "o", color=colour, alpha=0.6)
    axes[0].axvline(0, color="black", linewidth=0.8)
    axes[2].axvline(50, color="black", linewidth=0.8)
    axes[0].set_yticks(range(len(rows)), [f"{arm} ({len(runs[method, arm])})" for arm, _ in rows])
    axes[0].set(title=f"{method}: k-NN minus {base}'s (seeds)", xlabel="percentage points")
    axes[1].set(title="alike: local crops of one image", xlabel="cosine; hollow: of two images")
    for axis, (_, title) in zip(axes[2:], panels, strict=True):
        axis.set(title=title, xlabel="each seed")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of accuracy.py, or JSON files made of them")
    parser.add_argument("--json", type=Path, help="write all runs into one file")
    parser.add_argument("--figures", type=Path, help="folder for accuracy_curves.png and accuracy_factors.png")
    options = parser.parse_args()
    runs = read(options.runs)
    records = [record for of_seeds in runs.values() for record in of_seeds.values()]
    if options.json:
        options.json.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    methods = list(dict.fromkeys(record["method"] for record in records))
    table(runs, methods, MAIN, (*QUALITY, "s per step"))
    table(runs, methods, MAIN, MECHANISM)
    for method in methods:
        factors(runs, method, "multi-crop")
    if options.figures:
        draw_curves(runs, methods, options.figures / "accuracy_curves.png")
        most = max(methods, key=lambda method: sum(of == method for of, _ in runs))
        draw_factors(runs, most, "multi-crop", options.figures / "accuracy_factors.png")


if __name__ == "__main__":
    main()
