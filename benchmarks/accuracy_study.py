"""The Imagenette study of docs/results.md: its runs in the order of what they answer. Run it again to continue.

    python benchmarks/accuracy_study.py --data data    # start it twice for two cores

The learning rate of an arm is chosen before its first run, from three, on one half of the training images by k-NN on
the other half; the arms that vary one factor have plain multi-crop's. What benchmarks/results/ holds is not repeated,
and --harvest writes into it what has been done since.
"""

import argparse
import json
import time
from pathlib import Path

import accuracy

RESULTS = Path(__file__).parent / "results"
TUNED = RESULTS / "imagenette_rates.json"
MAIN = ["2 crops, equal compute", "multi-crop", "LoGo", "release"]
RATES = ["0.1", "0.2", "0.4"]
EPOCHS = 30
COMMON = [
    *("--dataset", "imagenette", "--backbone", "tiny", "--batch-size", "64", "--queue", "4096"),
    *("--precision", "bf16-mixed", "--every", "5"),
]
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
# (method, arms, seeds, epochs), the most wanted first
STAGES = [
    ("byol", MAIN, [0, 1, 2], EPOCHS),
    ("moco-both", MAIN, [0, 1, 2], EPOCHS),
    ("simsiam", MAIN, [0, 1, 2], EPOCHS),
    ("byol", ONE_FACTOR, [0], EPOCHS),
    ("moco-both", PREDICTORLESS, [0], EPOCHS),
    ("byol", ["multi-crop", "local predictor"], [0], 200),
    ("byol", ONE_FACTOR, [1, 2], EPOCHS),
    ("moco-both", PREDICTORLESS, [1, 2], EPOCHS),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the data sets' folder, as for accuracy.py")
    parser.add_argument("--output", type=Path, default=Path("accuracy_runs/imagenette"), help="folder of the runs")
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
    for method, arms, seeds, epochs in STAGES:
        for seed in seeds:
            for arm in arms:
                job = [*COMMON, "--data", options.data, "--methods", method]
                tuned = arm if arm in MAIN else "multi-crop"
                attempts = {accuracy.train_run(*one) for one in tuning(job, tuned, options.output)}
                if not attempts & {"ran", "busy"}:
                    job += ["--arms", arm, "--seeds", str(seed), "--epochs", str(epochs)]
                    job += ["--output", f"{options.output}/{epochs}", "--lr", rate(options.output, method, tuned)]
                    attempts = {accuracy.train_run(*one) for one in accuracy.runs(parse(job, found(epochs)))}
                if "ran" in attempts:
                    return "ran"
                states |= attempts
    return "busy" if "busy" in states else "there"


def tuning(job, arm, output):
    """The runs that an arm's learning rate is chosen from."""
    job = [*job, "--arms", arm, "--seeds", "0", "--epochs", "8", "--output", f"{output}/tune", "--tune"]
    return accuracy.runs(parse([*job, "--lr", *RATES], TUNED))


def rate(output, method, arm):
    """The learning rate of the best of them."""
    mine = [record for record in gather(output / "tune", TUNED) if (record["method"], record["arm"]) == (method, arm)]
    return str(max(mine, key=lambda record: record["final"]["knn"])["lr"])


def parse(job, path):
    return accuracy.parse([*job, "--known", str(path)] if path.exists() else job)


def found(epochs):
    """The file of a schedule's runs."""
    return RESULTS / f"imagenette_{epochs}.json"


def harvest(output):
    for folder, path in [("tune", TUNED), *((str(epochs), found(epochs)) for *_, epochs in STAGES)]:
        records = gather(output / folder, path)
        if records:
            path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")


def gather(folder, path):
    """The records of a results file and of a folder of runs, each once."""
    records = json.loads(path.read_text()) if path.exists() else []
    records += [json.loads(run.read_text()) for run in sorted(folder.glob("*.json"))]
    return list({tuple(r[k] for k in ("method", "arm", "seed", "lr")): r for r in records}.values())


if __name__ == "__main__":
    main()
