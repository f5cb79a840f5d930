"""Tables and figures of what benchmarks/accuracy.py measured.

    python benchmarks/accuracy_report.py accuracy_runs --json benchmarks/results/accuracy_small.json
    python benchmarks/accuracy_report.py benchmarks/results/accuracy_small.json --figures docs
    python benchmarks/accuracy_report.py benchmarks/results/imagenette_11.json --into docs/results.md --figures docs

Takes folders of runs and JSON files made of them; a later one replaces equal runs. Of several learning rates an arm has
the one with the best k-NN on the images that --validate kept, by the mean over the seeds; the others are in a table of
their own, which alone has the seeds that chose. Values are means over seeds; the plus-minus is the half width of the
95 % confidence interval (Student's t), from 3 seeds on. Differences are paired by seed. Seconds per step are the
fastest seed's: the others shared their machine.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
from accuracy_arms import ARMS, CHOOSING, best_rate, chooser, cost, validation
from scipy.stats import t as student

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "2 crops": "#b0b0b0",
    "2 crops, equal compute": "#000000",
    "2 crops, equal seconds": "#707070",
    "2 crops, equal seconds, 16 px": "#909090",
    "2 crops, equal compute, lr x 2": "#8c564b",
    "multi-crop": "#1f77b4",
    "local 32 px, equal compute": "#17becf",
    "LoGo, local 32 px, equal compute": "#bcbd22",
    "learned affinity": "#d62728",
    "cosine": "#2ca02c",
    "cosine, annealed": "#9467bd",
    "cosine, annealed, ratio 0.3": "#e377c2",
    "release": "#ff7f0e",
}
MAIN = tuple(COLOURS)
# Whose pairs are one sample: both have momentum, and seeds that lie close. SimSiam's differ several times as much.
POOLED = ("byol", "moco-both")
# The arm that has LoGo's own defaults: the annealed cosine, stronger beside a queue of negatives.
LOGO = "LoGo's default"
DEFAULTS = {"byol": "cosine, annealed", "simsiam": "cosine, annealed", "moco-both": "cosine, annealed, ratio 0.3"}
FIRST = (  # the pairs of the first table
    (LOGO, "2 crops, equal compute"),
    ("multi-crop", "2 crops, equal compute"),
    (LOGO, "multi-crop"),
    ("learned affinity", "multi-crop"),
    (LOGO, "2 crops, equal compute, lr x 2"),
    ("multi-crop", "2 crops, equal compute, lr x 2"),
    (LOGO, "2 crops, equal seconds, 16 px"),
    (LOGO, "LoGo, local 32 px, equal compute"),
    ("LoGo, local 32 px, equal compute", "2 crops, equal compute"),
    ("multi-crop", "local 32 px, equal compute"),
)
PAIRS = (
    *FIRST,
    ("cosine, annealed", "2 crops, equal compute"),
    ("cosine, annealed", "multi-crop"),
    ("multi-crop", "2 crops, equal seconds"),
    ("learned affinity", "2 crops, equal compute"),
    ("cosine", "2 crops, equal compute"),
    ("cosine", "multi-crop"),
    ("cosine, annealed", "cosine"),
    ("cosine, annealed, ratio 0.3", "2 crops, equal compute"),
    ("cosine, annealed, ratio 0.3", "multi-crop"),
    ("cosine, annealed, ratio 0.3", "cosine, annealed"),
    ("local predictor", "multi-crop"),
    ("release", "2 crops, equal compute"),
    ("release", "multi-crop"),
)
QUALITY = (
    "knn",
    "linear",
    "linear_10_percent",
    "scenes_map",
    "cifar10_knn",
    "cifar10_linear",
    "digits_knn",
    "digits_linear",
    "photo tiles_knn",
    "photo tiles_linear",
)
MECHANISM = (
    "local_local_similarity",
    "other_image_similarity",
    "feature_local_local_similarity",
    "feature_other_image_similarity",
    "affinity_accuracy",
    "effective_rank",
)
DIGITS = {name: 2 for name in MECHANISM[:4]} | {"s per step": 3, "lr": 2, "cpu_seconds": 0}
HEADINGS = {
    "knn": "k-NN",
    "linear_10_percent": "linear, 10 % of labels",
    "scenes_map": "collages, mAP",
    "cifar10_knn": "CIFAR-10 k-NN",
    "cifar10_linear": "CIFAR-10 linear",
    "digits_knn": "digits k-NN",
    "photo tiles_knn": "photo tiles k-NN",
    "local_local_similarity": "local crops alike",
    "other_image_similarity": "of two images",
    "feature_local_local_similarity": "their features alike",
    "feature_other_image_similarity": "of two images' features",
    "affinity_accuracy": "affinity accuracy, %",
    "cpu_seconds": "CPU s",
    "byol": "BYOL",
    "moco": "MoCo",
    "moco-both": "MoCo",
    "simsiam": "SimSiam",
    "imagenette": "Imagenette",
    "cifar10": "CIFAR-10",
}
CIFAR = {"global_size": 32, "local_size": 32}  # of the runs that have no cost in them
DOSES = {
    "BatchNorm affinity": {0.1: "ratio 0.1", 0.015: "release", **{r: f"ratio {r:g}" for r in (0.005, 0.05, 0.3)}},
    "LayerNorm affinity": {0.1: "layer norm", **{r: f"layer norm, ratio {r:g}" for r in (0.005, 0.015, 0.05, 0.3)}},
    "cosine": {0.1: "cosine", **{r: f"cosine, ratio {r:g}" for r in (0.005, 0.015, 0.05, 0.3)}},
    "cosine, annealed": {0.1: "cosine, annealed", **{r: f"cosine, annealed, ratio {r:g}" for r in (0.03, 0.3, 1)}},
}


def read(paths):
    """{data set and schedule: {(method, arm): {learning rate: {seed: record}}}}"""
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for path in paths:
        parts = [f"[{file.read_text()}]" for file in sorted(path.glob("*.json"))] or [path.read_text()]
        for record in (record for part in parts for record in json.loads(part)):
            setting = record["setting"]
            name = f"{setting.get('dataset', 'cifar10')} {setting.get('schedule', '')}".strip()
            if "schedule" in setting and setting["precision"] == "32-true":  # the study's others are bf16
                name += " fp32"
            found[name][record["method"], record["arm"]][record.get("lr")][record["seed"]] = record
    return {name: dict(runs) for name, runs in found.items()}


def reported(runs):
    """{(method, arm): {seed: record}} at the learning rate chosen for each.

    Without the seeds by which a method's rates were chosen, if they were: there an arm that chose has the luckier runs.
    """
    choosing = {method for (method, _), of_rates in runs.items() if len(of_rates) > 1}
    return {
        (method, arm): {
            seed: record
            for seed, record in of_rates.get(_chosen_rate(runs, method, arm), {}).items()
            if method not in choosing or seed not in CHOOSING
        }
        for (method, arm), of_rates in runs.items()
    }


def _chosen_rate(runs, method, arm):
    """The rate that the choosing seeds prefer, whether the arm was run at it or not; else that of most seeds."""
    of_rates = runs.get((method, chooser(arm)), {})
    told = {lr: {seed: of_seeds[seed] for seed in CHOOSING if seed in of_seeds} for lr, of_seeds in of_rates.items()}
    return best_rate({lr: of_seeds for lr, of_seeds in told.items() if of_seeds} or runs[method, arm])


def rates(runs):
    """k-NN at every learning rate, on the images to choose by and on the test images, with the number of seeds."""
    columns = sorted({lr for of_rates in runs.values() for lr in of_rates})
    rows = []
    for (method, arm), of_rates in runs.items():
        if len(of_rates) > 1:
            cells = [
                f"{validation(of):.1f} / {interval([r['final']['knn'] for r in of.values()])[0]:.1f} ({len(of)})"
                if of
                else ""
                for of in map(of_rates.get, columns)
            ]
            rows.append([method, arm, *cells])
    return markdown(["method", "arm", *map(str, columns)], rows)


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


def heading(name):
    return HEADINGS.get(name, name.replace("_", " "))


def markdown(columns, rows):
    head, *body = (f"| {' | '.join(heading(c) for c in line)} |\n" for line in (columns, *rows))
    return f"{head}|{'---|' * len(columns)}\n{''.join(body)}"


def value(record, column):
    if column == "s per step":
        return record["seconds_per_step"]
    if column == "lr" and record.get("lr"):
        return record["lr"] * ARMS[record["arm"]][1].get("lr", 1.0)
    return record["final"].get(column, record.get(column))


def present(runs, columns):
    """The columns that any run has something to say in."""
    records = [record for of_seeds in runs.values() for record in of_seeds.values()]
    return [column for column in columns if any(value(record, column) is not None for record in records)]


def table(runs, columns):
    """The main arms, method by method."""
    columns, rows = present(runs, columns), []
    for method in dict.fromkeys(method for method, _ in runs):
        for arm in MAIN:
            of_seeds = runs.get((method, arm))
            if of_seeds:
                cells = []
                for column in columns:
                    values = [v for v in (value(r, column) for r in of_seeds.values()) if v is not None]
                    if column in ("s per step", "lr"):  # the fastest; one and the same
                        values = [min(values)] if values else []
                    cells.append(cell(values, DIGITS.get(column, 1)))
                rows.append([method, arm, str(len(of_seeds)), *cells])
    return markdown(["method", "arm", "seeds", *columns], rows)


def paired(runs, method, arm, base, what="knn"):
    """The arm's differences to the base, of the seeds that both have."""
    arm = DEFAULTS.get(method) if arm == LOGO else arm
    mine, reference = runs.get((method, arm), {}), runs.get((method, base), {})
    return [mine[s]["final"][what] - reference[s]["final"][what] for s in sorted(mine.keys() & reference.keys())]


def comparisons(runs, columns, pairs=PAIRS, each=True):
    """What the main arms differ by, method by method, and over `POOLED` as one sample.

    Without `each` the methods of `POOLED` have no lines of their own where they are pooled; with it `LOGO` has none but
    there, since by method it is one of the arms.
    """
    columns, rows = present(runs, columns), []
    methods = list(dict.fromkeys(method for method, _ in runs))
    groups = {", ".join(map(heading, POOLED)): POOLED} if set(POOLED) <= set(methods) else {}
    alone = [method for method in methods if each or not groups or method not in POOLED]
    single = {method: [method] for method in alone}
    for name, of in (single | groups if each else groups | single).items():
        for arm, base in pairs:
            having = [method for method in of if paired(runs, method, arm, base)]
            if len(having) > (name in groups) and not (each and arm == LOGO and name in single):
                cells = [[v for m in having for v in paired(runs, m, arm, base, column)] for column in columns]
                rows.append([name, f"{arm} minus {base}", str(len(cells[0])), *map(cell, cells)])
    return markdown(["method", "difference", "seeds", *columns], rows)


def course(runs):
    """How far arms of equal epochs and crops are ahead of multi-crop on the way, in k-NN."""
    found = {}
    for (method, arm), of_seeds in runs.items():
        base = runs.get((method, "multi-crop"), {})
        pairs = [(dict(of_seeds[s]["curve"]), dict(base[s]["curve"])) for s in sorted(of_seeds.keys() & base.keys())]
        if (arm, "multi-crop") in PAIRS and pairs:
            found[method, f"{arm} minus multi-crop"] = pairs
    curves = [set(curve) for pairs in found.values() for pair in pairs for curve in pair]
    epochs = sorted(set.intersection(*curves)) if curves else []
    rows = [
        [*names, str(len(pairs)), *(cell([mine[epoch] - other[epoch] for mine, other in pairs]) for epoch in epochs)]
        for names, pairs in found.items()
    ]
    return markdown(["method", "difference", "seeds", *(f"epoch {epoch}" for epoch in epochs)], rows)


def differences(runs, method, base, what="knn"):
    """{arm: paired differences to the base}, of arms that share a seed with it, the lowest mean first."""
    found = {arm: paired(runs, method, arm, base, what) for of, arm in runs if of == method and arm != base}
    return dict(sorted((item for item in found.items() if item[1]), key=lambda item: interval(item[1])[0]))


def factors(runs, method, base):
    """Each arm's paired differences to the base, and what the representation looks like."""
    of = {what: differences(runs, method, base, what) for what in QUALITY[:3]}
    columns, rows = present(runs, MECHANISM), []
    for arm in reversed(of["knn"]):
        finals = [record["final"] for record in runs[method, arm].values()]
        cells = [cell(of[what][arm]) for what in QUALITY[:3]]
        cells += [cell([f[c] for f in finals if c in f], DIGITS.get(c, 1)) for c in columns]
        rows.append([arm, str(len(of["knn"][arm])), *cells])
    return markdown(["arm", "seeds", *QUALITY[:3], *columns], rows)


def draw_curves(everything, path):
    """k-NN against compute, mean and seeds of the arms with three or more.

    `everything` are (data set and schedule, runs, method).
    """
    columns = 2 if len(everything) == 4 else min(3, len(everything))
    rows = math.ceil(len(everything) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.8 * rows), layout="constrained", squeeze=False)
    lines = {}
    for axis, (dataset, runs, method) in zip(axes.flat, everything, strict=False):
        seeds = set()
        for arm in MAIN:
            of_seeds = list(runs.get((method, arm), {}).values())
            if len(of_seeds) < 3:
                continue
            seeds.add(len(of_seeds))
            factor = of_seeds[0].get("cost") or cost(method, arm, CIFAR)
            compute = [epoch * factor for epoch, _ in of_seeds[0]["curve"]]
            curves = [[accuracy for _, accuracy in record["curve"]] for record in of_seeds]
            means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            (lines[arm],) = axis.plot(compute, means, color=COLOURS[arm])
            for curve in curves:
                axis.plot(compute, curve, "o", color=COLOURS[arm], markersize=2.5, alpha=0.35)
        name, *schedule = dataset.split()
        axis.set(xlabel="compute, in epochs of 2 crops", ylabel="k-NN accuracy, %")
        of = [heading(method), heading(name), *(f"{epochs} epochs" for epochs in schedule)]
        least, most = min(seeds), max(seeds)
        of.append(f"{least} seeds" if least == most else f"{least} to {most} seeds")
        axis.set_title(", ".join(of), fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(everything) :]:
        axis.set_axis_off()
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


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
    axes[0].set(title=f"{heading(method)}: k-NN minus {base}'s (seeds)", xlabel="percentage points")
    axes[1].set(title="alike: local crops of one image", xlabel="cosine; hollow: of two images")
    for axis, (_, title) in zip(axes[2:], panels, strict=True):
        axis.set(title=title, xlabel="each seed")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_doses(runs, path):
    """k-NN against the repulsion's cap, minus plain multi-crop's of the same seeds, of methods with several doses."""
    panels = {}
    for method in dict.fromkeys(method for method, _ in runs):
        of = {
            name: {d: pairs for d, arm in sorted(arms.items()) if (pairs := paired(runs, method, arm, "multi-crop"))}
            for name, arms in DOSES.items()
        }
        if any(len(doses) > 1 for doses in of.values()):
            panels[method] = of
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.6), layout="constrained", squeeze=False)
    for axis, (method, of) in zip(axes[0], panels.items(), strict=True):
        for (name, doses), colour in zip(of.items(), ("#ff7f0e", "#8c564b", "#2ca02c", "#9467bd"), strict=True):
            if doses:
                means, halves = zip(*map(interval, doses.values()), strict=True)
                axis.errorbar(list(doses), means, [half or 0 for half in halves], color=colour, capsize=3, label=name)
            for dose, pairs in doses.items():
                axis.plot([dose] * len(pairs), pairs, "o", color=colour, markersize=3.5, alpha=0.6)
        axis.axhline(0, color="#1f77b4", linewidth=0.8)
        axis.set(title=heading(method), xlabel="gradient_ratio", ylabel="k-NN minus multi-crop's, points", xscale="log")
        ticks = sorted({dose for doses in of.values() for dose in doses})
        axis.set_xticks(ticks, [f"{dose:g}" for dose in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def put(text, document):
    """Replaces what stands between `<!-- name -->` and `<!-- end -->` in a document by the tables of these names."""
    page = document.read_text()
    for name, content in text.items():
        page = re.sub(f"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", rf"\g<1>{content}\g<2>", page, flags=re.S)
    document.write_text(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of accuracy.py, or JSON files made of them")
    parser.add_argument("--json", type=Path, help="write all runs into one file")
    parser.add_argument("--figures", type=Path, help="folder for accuracy_*.png")
    parser.add_argument(
        "--into", type=Path, nargs="+", default=[], help="documents to fill, <!-- imagenette main --> and the like"
    )
    options = parser.parse_args()
    swept = read(options.runs)
    everything = {name: reported(runs) for name, runs in swept.items()}
    sweeps = [of_rates for runs in swept.values() for of_rates in runs.values()]
    records = [r for of_rates in sweeps for of_seeds in of_rates.values() for r in of_seeds.values()]
    if options.json:
        options.json.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    panels = {
        dataset: [
            (dataset, runs, method)
            for method in dict.fromkeys(method for method, _ in runs)
            if any(len(runs.get((method, arm), {})) > 2 for arm in MAIN)
        ]
        for dataset, runs in everything.items()
    }
    if options.figures:
        apart = list(panels)
        if len(apart) > 1:
            first, *apart, last = apart  # of the last data set one method stands for all
            draw_curves([*panels[first], panels[last][0]], options.figures / "accuracy_curves.png")
        for dataset in apart:
            draw_curves(panels[dataset], options.figures / f"accuracy_curves_{dataset.replace(' ', '_')}.png")
    for dataset, runs in everything.items():
        methods = list(dict.fromkeys(method for method, _ in runs))
        text = {
            f"{dataset} main": table(runs, ("lr", *QUALITY, "s per step", "cpu_seconds")),
            f"{dataset} mechanism": table(runs, MECHANISM),
            f"{dataset} summary": comparisons(runs, (*QUALITY[:3], "cifar10_knn"), FIRST, each=False),
            f"{dataset} differences": comparisons(runs, QUALITY),
            f"{dataset} rates": rates(swept[dataset]),
            f"{dataset} course": course(runs),
        }
        text |= {f"{dataset} {method} factors": factors(runs, method, "multi-crop") for method in methods}
        for name, content in text.items():
            print(f"{name}\n\n{content}")
        for document in options.into:
            put(text, document)
        file = dataset.replace(" ", "_")
        if options.figures and sum(arm not in MAIN for _, arm in runs) > 4:
            most = max(methods, key=lambda method: sum(of == method for of, _ in runs))
            draw_factors(runs, most, "multi-crop", options.figures / f"accuracy_factors_{file}.png")
            draw_doses(runs, options.figures / f"accuracy_doses_{file}.png")


if __name__ == "__main__":
    main()
