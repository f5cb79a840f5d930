"""The study of docs/results.md: its runs in the order of what they answer. Run it again to continue.

    python benchmarks/accuracy_study.py --data data              # start it twice for two cores
    python benchmarks/accuracy_study.py --data data --harvest    # finished runs into benchmarks/results/
    python benchmarks/accuracy_report.py benchmarks/results/{imagenette_11,accuracy_small}.json \\
        --into docs/results.md --figures docs

The learning rates of 2 crops and of multi-crop are chosen, from three, on one half of the training images by k-NN on
the other half. Arms that repel, or vary one factor, have multi-crop's. What is in benchmarks/results/ is not repeated.
"""

import argparse
import json
import time
from pathlib import Path

import accuracy

RESULTS = Path(__file__).parent / "results"
MAIN = ["2 crops, equal compute", "multi-crop", "LoGo", "release"]
# What twice the chosen learning rate does: the choice was within the noise.
DOUBLED = ["multi-crop, lr x 2", "2 crops, equal compute, lr x 2", "LoGo, lr x 2", "release, lr x 2"]
RATES = ["0.1", "0.2", "0.4"]
COMMON = ["--backbone", "tiny", "--batch-size", "64", "--queue", "4096", "--precision", "bf16-mixed"]
ONE_FACTOR = [
    *("LoGo, ratio 0.1", "ratio 0.005", "ratio 0.05", "ratio 0.3"),  # 0.015 is the release
    *("cosine", "cosine, ratio 0.005", "cosine, ratio 0.015", "cosine, ratio 0.05", "cosine, ratio 0.3"),
    *("layer norm", *(f"layer norm, ratio {ratio}" for ratio in (0.005, 0.015, 0.05, 0.3))),
    *("local predictor", "local predictor, own start", "MULAN"),
    *("4 local crops, equal compute", "6 local crops, equal compute", "averaged targets"),
    *("local scale 0.08-0.25", "local scale 0.05-0.4"),
    *("backbone cosine, ratio 0.1", "backbone, ratio 0.1", "cosine, overlap", "attraction"),
]
PREDICTORLESS = [arm for arm in ONE_FACTOR if "predictor" not in arm and arm != "MULAN"]
# (data set, method, arms, seeds, epochs), the most wanted first
STAGES = [
    ("imagenette", "byol", MAIN, [0, 1, 2], 11),
    ("imagenette", "byol", DOUBLED, [0, 1, 2], 11),
    ("imagenette", "byol", ["2 crops, equal compute, lr x 0.5", "2 crops, equal seconds"], [0, 1, 2], 11),
    ("imagenette", "moco-both", MAIN, [0, 1, 2], 11),
    ("imagenette", "simsiam", MAIN, [0, 1, 2], 11),
    ("imagenette", "byol", MAIN, [0, 1, 2], 60),
    ("imagenette", "byol", ONE_FACTOR, [0], 11),
    ("imagenette", "moco-both", PREDICTORLESS, [0], 11),
    ("collages", "moco-both", [*MAIN, "cosine"], [0, 1, 2], 11),
    ("imagenette", "byol", ["multi-crop", "local predictor"], [0], 200),
    ("imagenette", "byol", ONE_FACTOR, [1, 2], 11),
    ("imagenette", "moco-both", PREDICTORLESS, [1, 2], 11),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the data sets' folder, as for accuracy.py")
    parser.add_argument("--output", type=Path, default=Path("accuracy_runs"), help="folder of the runs")
    parser.add_argument("--harvest", action="store_true", help="write the finished runs into benchmarks/results/")
    options = parser.parse_args()
    if options.harvest:
        harvest(options.output)
        return
    accuracy.prepare()
    # From the top after every run: what another process was at, or what waited for it, may be ready.
    while (state := advance(options)) != "there":
        if state == "busy":
            time.sleep(20)


def advance(options):
    """Does the first run that can be done. Gives "ran", or "busy" if others are at all that is left, or "there"."""
    states = set()
    for dataset, method, arms, seeds, epochs in STAGES:
        for seed in seeds:
            for arm in arms:
                job = [*COMMON, "--data", options.data, "--dataset", dataset, "--methods", method]
                like = "2 crops, equal compute" if arm.startswith("2 crops") else "multi-crop"
                attempts = {accuracy.train_run(*one) for one in tuning(job, like, options.output, dataset)}
                if not attempts & {"ran", "busy"}:
                    job += [
                        "--arms",
                        arm,
                        "--seeds",
                        str(seed),
                        "--epochs",
                        str(epochs),
                        "--every",
                        str(round(epochs / 4)),
                    ]
                    job += ["--lr", rate(options.output, dataset, method, like)]
                    attempts = {accuracy.train_run(*one) for one in runs(job, options.output, dataset, epochs)}
                if "ran" in attempts:
                    return "ran"
                states |= attempts
    return "busy" if "busy" in states else "there"


def tuning(job, arm, output, dataset):
    """The runs that an arm's learning rate is chosen from."""
    job = [*job, "--arms", arm, "--seeds", "0", "--epochs", "8", "--every", "8", "--tune", "--lr", *RATES]
    return runs(job, output, dataset, "tune")


def rate(output, dataset, method, arm):
    """The learning rate of the best of them."""
    tuned = [r for r in gather(output, dataset, "tune") if (r["method"], r["arm"]) == (method, arm)]
    return str(max(tuned, key=lambda record: record["final"]["knn"])["lr"])


def runs(job, output, dataset, part):
    """Of a part of the study: the epochs of a schedule, or "tune"."""
    known = ["--known", str(results(dataset, part))] if results(dataset, part).exists() else []
    return accuracy.runs(accuracy.parse([*job, "--output", f"{output}/{dataset}/{part}", *known]))


def harvest(output):
    for dataset, part in dict.fromkeys((dataset, part) for dataset, *_, epochs in STAGES for part in ("tune", epochs)):
        records = gather(output, dataset, part)
        if records:
            lines = ",\n".join(json.dumps(record) for record in records)
            results(dataset, part).write_text(f"[\n{lines}\n]\n")


def gather(output, dataset, part):
    """The records of a part's results and of its folder of runs, each once."""
    path = results(dataset, part)
    records = json.loads(path.read_text()) if path.exists() else []
    records += [json.loads(run.read_text()) for run in sorted((output / dataset / str(part)).glob("*.json"))]
    return list({tuple(r[k] for k in ("method", "arm", "seed", "lr")): r for r in records}.values())


def results(dataset, part):
    return RESULTS / f"{dataset}_{part}.json"


if __name__ == "__main__":
    main()
