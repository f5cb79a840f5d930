"""The study of docs/results.md: its runs in the order of what they answer. Run it again to continue.

    python benchmarks/accuracy_study.py --data data              # start it twice for two cores
    python benchmarks/accuracy_study.py --data data --harvest    # finished runs into benchmarks/results/
    python benchmarks/accuracy_report.py benchmarks/results/{imagenette_60,imagenette_11,accuracy_small}.json \\
        --into docs/results.md docs/results_tables.md --figures docs
    python benchmarks/accuracy_report.py --into docs/results.md docs/results_tables.md \\
        benchmarks/results/{collages_11,collages_60,imagenette_200,imagenette_11_fp32,cifar10_16px_6_fp32}.json
    python benchmarks/accuracy_study.py --data data --fp32  # what one factor moves, for CPUs without AVX512-BF16

Every run leaves a fifth of the training images out. By k-NN on that fifth 2 crops and multi-crop choose their learning
rates: three rates with the first seed, the best two of them with three seeds, the better of those by the mean, for
more seeds. The report leaves the three seeds that chose out: in them the rate's luck is the arm's, and an arm that did
not choose, such as LoGo, has none.
Arms that repel, or vary one factor, have multi-crop's rate; longer schedules have the rates of 11 epochs, and collages
and CIFAR-10 those of Imagenette, so that they chose none. What is in benchmarks/results/ is not repeated.
"""

import argparse
import json
import time
from pathlib import Path

import accuracy
from accuracy_arms import CHOOSERS, CHOOSING, best_rate, chooser, validation

RESULTS = Path(__file__).parent / "results"
MAIN = [*CHOOSERS, "learned affinity", "release"]
RATES = {"byol": [0.2, 0.4, 0.8], "moco-both": [0.1, 0.2, 0.4], "simsiam": [0.1, 0.2, 0.4]}
MOVED = {("simsiam", "multi-crop"): [0.05, 0.1, 0.2, 0.4]}  # the best was at the edge
COMMON = ["--backbone", "tiny", "--batch-size", "64", "--queue", "4096", "--validate"]
ONE_FACTOR = [
    *("ratio 0.1", "ratio 0.005", "ratio 0.05", "ratio 0.3"),  # 0.015 is the release
    *("cosine", "cosine, ratio 0.005", "cosine, ratio 0.015", "cosine, ratio 0.05", "cosine, ratio 0.3"),
    *("layer norm", *(f"layer norm, ratio {ratio}" for ratio in (0.005, 0.015, 0.05, 0.3))),
    *("local predictor", "local predictor, own start", "MULAN"),
    *("4 local crops, equal compute", "6 local crops, equal compute", "averaged targets"),
    *("local scale 0.08-0.25", "local scale 0.05-0.4"),
    *("backbone cosine, ratio 0.1", "backbone, ratio 0.1", "cosine, overlap", "attraction"),
    *("local inside global", "local apart", "cosine, local apart"),
    *(f"backbone, ratio {ratio}" for ratio in (0.005, 0.015, 0.05, 0.3)),
    *(f"backbone cosine, ratio {ratio}" for ratio in (0.005, 0.015, 0.05, 0.3)),
    *(f"backbone layer norm, ratio {ratio}" for ratio in (0.005, 0.015, 0.05, 0.1, 0.3)),
]
# What the others refine: of MoCo first, whose seeds differ least. What would change a default leads.
KEY = [
    *("4 local crops, equal compute", "6 local crops, equal compute", "cosine, annealed, ratio 0.03"),
    *("local inside global", "local apart"),
]
ALSO_KEY = [
    *("ratio 0.1", "ratio 0.3", "cosine, ratio 0.015", "cosine, ratio 0.3", "attraction", "averaged targets"),
    *("layer norm", "cosine, local apart", "local scale 0.05-0.4", "local scale 0.08-0.25"),
]
PREDICTORLESS = [arm for arm in ONE_FACTOR if "predictor" not in arm and arm != "MULAN"]
CHOSEN = ("imagenette", 11)  # the data set and the epochs that the rates are chosen by
# Methods whose seeds differ so much that the first one may not rule out a rate.
UNSTEADY = ["simsiam"]
# (data set, method, arms, seeds, epochs), the most wanted first
STAGES = [
    ("imagenette", "byol", MAIN[:3], [0, 1, 2, 3, 4], 11),
    ("imagenette", "moco-both", MAIN[:3], [0, 1, 2, 3, 4], 11),
    ("imagenette", "byol", MAIN[:3], [0, 1, 2], 60),
    ("imagenette", "byol", MAIN[3:], [0, 1, 2], 11),
    ("imagenette", "moco-both", MAIN[3:], [0, 1, 2], 11),
    ("imagenette", "moco-both", MAIN[:3], [0, 3, 4], 60),
    # Its rate was the lowest tried, half of multi-crop's: does multi-crop lead by that alone?
    ("imagenette", "moco-both", ["2 crops, equal compute, lr x 2"], [0], 60),
    # LoGo's defaults are lower after 60 epochs, with a share of the gradient below 1 %: is it the repulsion? And the
    # cosine, repelled ten times as strongly and more, was no lower.
    ("imagenette", "moco-both", ["cosine"], [0, 3, 4], 60),
    ("imagenette", "moco-both", ["cosine"], [3, 4, 5, 6], 11),
    ("imagenette", "byol", ["cosine"], [3, 4, 5, 6], 11),
    # Were multi-crop's runs, which all are compared with, lucky?
    ("imagenette", "moco-both", MAIN[1:3], [5, 6], 60),
    # The repelled cosine is ahead at first and no more at the end: and if it is repelled at first only?
    ("imagenette", "moco-both", ["cosine, annealed"], [3, 4, 5, 6], 11),
    ("imagenette", "moco-both", ["cosine, annealed"], [3, 4, 5, 6], 60),
    ("imagenette", "byol", ["cosine, annealed"], [3, 4, 5, 6], 11),
    ("imagenette", "byol", ["cosine, annealed"], [0, 1, 2], 60),
    ("imagenette", "moco-both", ["cosine, annealed"], [0], 60),
    # It ends above multi-crop in the first six pairs: more of them.
    ("imagenette", "byol", ["multi-crop", "cosine, annealed"], [3, 4], 60),
    ("collages", "moco-both", [*MAIN[:3], "cosine", "cosine, annealed"], [3, 4, 5], 11),
    ("imagenette", "simsiam", CHOOSERS, [0, 1, 2], 11),
    # Multi-crop is behind 2 crops after 11 epochs: is it at the end of a longer schedule?
    ("imagenette", "simsiam", [*MAIN[:2], "cosine, annealed"], [3], 60),
    ("imagenette", "simsiam", [*MAIN[:2], "cosine, annealed"], [3, 4, 5], 11),
    ("imagenette", "simsiam", [*MAIN[:2], "cosine, annealed"], [4, 5], 60),
    # All of this has smaller crops than MultiCropCollate by itself.
    ("imagenette", "moco-both", ["default scales"], [3, 4, 5], 11),
    ("imagenette", "byol", ["default scales"], [3, 4, 5], 11),
    # Three times the default's strength: twice as far ahead of multi-crop with MoCo. After 60 epochs, too?
    ("imagenette", "moco-both", ["cosine, annealed, ratio 0.3"], [3, 4, 5], 11),
    ("imagenette", "byol", ["cosine, annealed, ratio 0.3"], [3, 4, 5], 11),
    ("imagenette", "moco-both", ["cosine, annealed, ratio 0.3"], [6, 5, 0, 3, 4], 60),
    ("imagenette", "moco-both", ["cosine, annealed, ratio 1"], [3, 4, 5], 11),
    ("imagenette", "byol", ["cosine, annealed, ratio 0.3"], [3, 4], 60),
    # On seeds that had no part in suggesting it.
    ("imagenette", "moco-both", [MAIN[1], "cosine, annealed, ratio 0.3"], [7, 8], 60),
    ("collages", "moco-both", ["cosine, annealed, ratio 0.3"], [3, 4, 5], 11),
    # There it is ahead of 2 crops, too: at the end of a longer schedule as well?
    ("collages", "moco-both", [*MAIN[:2], "cosine, annealed, ratio 0.3"], [3, 4, 5], 60),
    # It is worth more there than on single objects: does scenes' repulsion bear more, too?
    ("collages", "moco-both", ["cosine, annealed, ratio 1"], [3, 4, 5], 11),
    # Does BYOL with a predictor shared by both kinds of crops fall behind after long training?
    ("imagenette", "byol", ["multi-crop", "local predictor"], [0], 200),
    # The official release's own weighting, which the main table still lacks.
    ("imagenette", "moco-both", ["release"], [0, 3, 4], 60),
    ("imagenette", "byol", ["release"], [0, 1, 2], 60),
    ("imagenette", "moco-both", KEY, [3, 4, 5], 11),
    ("imagenette", "moco-both", [*MAIN[3:], *ALSO_KEY], [3, 4, 5], 11),
    ("imagenette", "simsiam", [MAIN[2]], [3, 4, 5], 11),
    ("imagenette", "byol", ["cosine"], [0, 1, 2], 60),
    ("imagenette", "moco-both", ["lambda 1e-05"], [0, 3, 4], 60),
    ("imagenette", "byol", ["cosine"], [7], 11),
    ("imagenette", "byol", MAIN[3:], [3, 4, 5], 11),
    ("imagenette", "simsiam", MAIN[3:], [3, 4, 5], 11),
    ("collages", "moco-both", MAIN[3:], [3, 4, 5], 11),
    ("imagenette", "byol", ONE_FACTOR, [3], 11),
    ("imagenette", "moco-both", PREDICTORLESS, [3], 11),
    ("imagenette", "byol", ["2 crops, equal seconds"], [3, 4, 5], 11),
    ("imagenette", "byol", ["cosine, annealed, ratio 0.3"], [0], 60),
    ("imagenette", "moco-both", MAIN[:3], [5, 6, 7, 8, 9], 11),
    ("imagenette", "byol", MAIN[:3], [5, 6, 7, 8, 9], 11),
    ("imagenette", "byol", ONE_FACTOR, [4, 5], 11),
    ("imagenette", "moco-both", PREDICTORLESS, [4, 5], 11),
]
# The same in full precision, whose runs are compared with each other only.
FP32_STAGES = [
    ("imagenette", "moco-both", [MAIN[1], "local inside global", "local apart"], [3, 4, 5], 11),
    # The first seed with 4 was the best of what was tried here.
    ("imagenette", "moco-both", KEY[:1], [3, 4, 5], 11),
    ("imagenette", "moco-both", ["cosine, annealed, ratio 0.3", KEY[1]], [3, 4, 5], 11),
    # On CIFAR-10, too, are local crops worth their cost if they are of half the side?
    ("cifar10_16px", "moco-both", [*CHOOSERS, "cosine, annealed, ratio 0.3"], [3, 4, 5], 6),
    # Is that lead over 2 crops one of the learning rate, which is half of multi-crop's?
    ("cifar10_16px", "moco-both", ["2 crops, equal compute, lr x 2"], [3, 4, 5], 6),
    # And with local crops of the usual 32 px?
    ("cifar10_16px", "moco-both", ["LoGo, local 32 px, equal compute"], [3, 4, 5], 6),
    # So small crops cost more seconds than their pixels say, and all crops have to be made.
    ("cifar10_16px", "moco-both", ["2 crops, equal seconds, 16 px"], [3, 4, 5], 6),
    ("cifar10_16px", "moco-both", ["local 32 px, equal compute"], [3, 4, 5], 6),
    # The official release's own weighting, which no table has yet.
    ("imagenette", "moco-both", ["release"], [3, 4, 5], 11),
    # Three seeds with 4 say +2.0 +- 2.4 of k-NN: two more, and no more than these.
    ("imagenette", "moco-both", [MAIN[1], KEY[0]], [6, 7], 11),
    # The same two questions with BYOL.
    ("imagenette", "byol", [MAIN[1], "release", KEY[0]], [3, 4, 5], 11),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the data sets' folder, as for accuracy.py")
    parser.add_argument("--output", type=Path, default=Path("accuracy_runs"), help="folder of the runs")
    parser.add_argument("--harvest", action="store_true", help="write the finished runs into benchmarks/results/")
    parser.add_argument("--fp32", action="store_true", help="the runs of FP32_STAGES, without autocast")
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
    for dataset, method, arms, seeds, epochs in FP32_STAGES if options.fp32 else STAGES:
        schedule = schedule_name(epochs, options.fp32)
        for seed in seeds:
            for arm in arms:
                rates = candidates(options.output, dataset, method, arm, seed, epochs)
                if not rates:  # runs that tell are under way
                    states.add("busy")
                    continue
                job = [*COMMON, "--data", options.data, "--dataset", dataset, "--methods", method, "--arms", arm]
                job += ["--seeds", str(seed), "--epochs", str(epochs), "--every", str(round(epochs / 4))]
                job += ["--precision", "32-true" if options.fp32 else "bf16-mixed"]
                job += ["--lr", *map(str, rates), "--output", f"{options.output}/{dataset}/{schedule}"]
                if results(dataset, schedule).exists():
                    job += ["--known", str(results(dataset, schedule))]
                attempts = {accuracy.train_run(*one) for one in accuracy.runs(accuracy.parse(job))}
                if "ran" in attempts:
                    return "ran"
                states |= attempts
    return "busy" if "busy" in states else "there"


def candidates(output, dataset, method, arm, seed, epochs):
    """The learning rates that an arm still has to be trained at; none if that is not known yet."""
    chooses = arm in CHOOSERS and (dataset, epochs) == CHOSEN and seed in CHOOSING
    rates = MOVED.get((method, chooser(arm)), RATES[method])
    if chooses and (seed == CHOOSING[0] or method in UNSTEADY):
        return rates
    found = {lr: {} for lr in rates}
    for record in gather(output, *CHOSEN):
        if (
            (record["method"], record["arm"]) == (method, chooser(arm))
            and record["lr"] in found
            and record["seed"] in CHOOSING
        ):
            found[record["lr"]][record["seed"]] = record
    first = CHOOSING[0]
    if not all(first in of_seeds for of_seeds in found.values()):
        return []
    if method not in UNSTEADY:
        del found[min(found, key=lambda lr: validation({first: found[lr][first]}))]
    if chooses:
        return list(found)
    if not all(of_seeds.keys() >= set(CHOOSING) for of_seeds in found.values()):
        return []
    return [best_rate(found)]


def harvest(output):
    schedules = [
        (dataset, schedule_name(epochs, fp32))
        for fp32, stages in ((False, STAGES), (True, FP32_STAGES))
        for dataset, *_, epochs in stages
    ]
    for dataset, schedule in dict.fromkeys(schedules):
        records = gather(output, dataset, schedule)
        if records:
            lines = ",\n".join(json.dumps(record) for record in records)
            results(dataset, schedule).write_text(f"[\n{lines}\n]\n")


def gather(output, dataset, schedule):
    """The records of a schedule's results and of its folder of runs, each once."""
    path = results(dataset, schedule)
    records = json.loads(path.read_text()) if path.exists() else []
    records += [json.loads(run.read_text()) for run in sorted((output / dataset / str(schedule)).glob("*.json"))]
    return list({tuple(r[k] for k in ("method", "arm", "seed", "lr")): r for r in records}.values())


def schedule_name(epochs, fp32):
    return f"{epochs}_fp32" if fp32 else str(epochs)


def results(dataset, schedule):
    return RESULTS / f"{dataset}_{schedule}.json"


if __name__ == "__main__":
    main()
