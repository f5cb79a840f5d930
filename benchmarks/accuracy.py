"""Are LoGo's features better? CIFAR-10 or Imagenette; SimSiam, BYOL and MoCo; at equal epochs and equal compute.

Each run trains one arm with one seed in Lightning's Trainer, measures weighted k-NN accuracy on the whole test set
as it goes, and at the end a linear probe, a probe on 10 % of the labels, transfer to other sets and what the
representation looks like. One JSON file per run; a run that is there is not repeated, one that was stopped
continues from its last epoch, so stop and restart as you like. Start the same command twice, and the two
share the runs: a run is locked while a process is at it.

    python benchmarks/accuracy.py --data data --subset 5000 --backbone tiny --epochs 8 --batch-size 32 --queue 1024
    python benchmarks/accuracy.py --data data --epochs 200 --batch-size 512  # one GPU
    python benchmarks/accuracy_report.py accuracy_runs                       # tables and figures
    python benchmarks/accuracy_study.py --data data                          # the Imagenette study of docs/results.md

--dataset cifar10 (the default) has crops of 32 and 32 px, cifar10_16px of 32 and 16, imagenette (at 96 px) of 64 and
32 px; collages are 64 px scenes of four CIFAR-10 images, crops of 48 and 24 px, judged by other images of CIFAR-10.
--data is a folder for torchvision's CIFAR10 and Imagenette (size "160px"), downloaded if missing, or one with their
images in npz archives.
--validate keeps a fifth of the training images out, to choose the learning rate of an arm by, of several --lr
(accuracy_report.py does it); the test images choose nothing.
--methods moco is lightly's example, moco-both has each crop as query and key, as solo-learn's MoCo v2+.
--precision bf16-mixed is 1.6 times as fast on a CPU with AVX512-BF16. Needs pip install '.[benchmarks]'.

The modules beside this one: accuracy_arms (what is compared), accuracy_data, accuracy_training, accuracy_evaluation.
"""

import argparse
import json
import os
import platform
import sys
import warnings
from copy import copy
from functools import cache
from pathlib import Path

import lightly
import timm
import torch
from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from accuracy_arms import ARMS, cost, epochs_of
from accuracy_data import DATASETS, fifths, first_per_class, other_sets
from accuracy_evaluation import evaluate
from accuracy_training import METHODS, fit

DEFAULT = ["2 crops", "2 crops, equal compute", "multi-crop", "cosine, annealed"]
SELECTION = ("methods", "arms", "seeds", "data", "output", "every", "workers", "known", "lr", "epochs")


def train_run(method, arm, seed, options):
    """One run, or what is left of it. Gives "ran", "there" if it was done before, "busy" if another is at it."""
    name = f"{method}-{arm}-{options.epochs}-s{seed}-lr{options.lr:g}"
    name = name.replace(" ", "_").replace(",", "")
    path, folder = options.output / f"{name}.json", options.output / name
    key = {"method": method, "arm": arm, "seed": seed, "lr": options.lr, "epochs": options.epochs}
    if path.exists() or key in options.known:
        return "there"
    try:
        with FileLock(options.output / f"{name}.lock", timeout=0):
            if path.exists():
                return "there"
            record = key | run(method, arm, seed, options, folder)
            path.with_suffix(".part").write_text(json.dumps(record))
            path.with_suffix(".part").rename(path)
            (folder / "last.ckpt").unlink()
    except Timeout:
        return "busy"
    print(f"{name}: k-NN {record['final']['knn']:.2f}, linear {record['final']['linear']:.2f}", flush=True)
    return "ran"


def run(method, arm, seed, options, folder):
    setting = DATASETS[options.dataset]
    train, validation, test, others, scenes = load(options.dataset, options.data, options.subset, options.validate)
    epochs = epochs_of(method, arm, options.epochs, setting.crops)
    images = scenes[0] if scenes else train
    model, noted = fit(method, arm, seed, options, epochs, setting, images, train, test, folder)
    torch.save(model.state_dict(), folder / "weights.pt")
    return {
        "epochs": epochs,
        "cost": cost(method, arm, setting.crops),
        "steps": noted["steps"],
        "curve": noted["knn"],
        "seconds_per_step": sorted(noted["seconds"])[len(noted["seconds"]) // 2],
        "cpu_seconds": noted["cpu_seconds"],
        "final": evaluate(model, setting, train, validation, test, others, scenes),
        "loss": repr(getattr(model, "logo", None)),
        "setting": {
            **{k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in SELECTION},
            "schedule": options.epochs,
            "machine": torch.cuda.get_device_name() if options.cuda else f"{os.cpu_count()} x {platform.machine()}",
            "torch": torch.__version__,
            "lightly": lightly.__version__,
            "timm": timm.__version__,
        },
    }


@cache
def load(dataset, folder, subset, validate):
    """(images, labels) to know, to choose by (or None) and to judge by; other pairs by name; scenes to learn, ask."""
    setting = DATASETS[dataset]
    train = setting.read(folder, train=True)
    scenes = [setting.scenes(folder, train=part) for part in (True, False)] if setting.scenes else None
    if subset:
        chosen = first_per_class(train[1], subset)
        train = train[0][chosen], train[1][chosen]
    train, validation = fifths(train) if validate else (train, None)
    return train, validation, setting.read(folder, train=False), other_sets(dataset, folder), scenes


def runs(options):
    """(method, arm, seed, options with its learning rate), the seeds one after the other."""
    for seed in options.seeds:
        for arm in ARMS if "all" in options.arms else options.arms:
            for method in options.methods:
                for lr in options.lr:
                    chosen = copy(options)
                    chosen.lr = lr
                    yield method, arm, seed, chosen


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data sets' folder")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["simsiam", "byol", "moco"])
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=[*ARMS, "all"],
        default=DEFAULT,
        metavar="ARM",
        help=f"all, or some of: {', '.join(ARMS)} (default: {', '.join(DEFAULT)})",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=200, help="of multi-crop 2 + 2 where compute is equal")
    parser.add_argument("--subset", type=int, help="this many training images, balanced (default: all)")
    parser.add_argument("--validate", action="store_true", help="keep a fifth of the training images to choose --lr by")
    parser.add_argument("--backbone", default="resnet18", help="tiny, or a timm ResNet")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.06])
    parser.add_argument("--queue", type=int, default=4096, help="MoCo's memory bank")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="default: bf16-mixed on a GPU")
    parser.add_argument("--every", type=int, default=4, help="epochs between k-NN measurements")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("accuracy_runs"))
    parser.add_argument("--known", type=Path, help="JSON file of accuracy_report.py, whose runs are not repeated")
    options = parser.parse_args(arguments)
    if len(options.lr) > 1 and not options.validate:
        parser.error("several --lr want --validate: they would be chosen by the test images")
    options.known = known(options.known)
    options.cuda = torch.cuda.is_available()
    options.precision = options.precision or ("bf16-mixed" if options.cuda else "32-true")
    options.output.mkdir(parents=True, exist_ok=True)
    return options


def known(path):
    """What tells the runs of a JSON file apart."""
    names = ("method", "arm", "seed", "lr")
    return [
        {name: record.get(name) for name in names} | {"epochs": record["setting"].get("schedule")}
        for record in (json.loads(path.read_text()) if path else [])
    ]


def prepare():
    """One thread on a CPU, so that several runs share it well, and none of Lightning's advice."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch)\..*")


if __name__ == "__main__":
    prepare()
    for one in runs(parse()):
        train_run(*one)
