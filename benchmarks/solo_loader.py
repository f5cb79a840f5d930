"""Images per CPU second through solo-learn's own DataLoader: its crops, and the same config with `fast_crops`.

    SOLO_LEARN_ROOT=<clone> python benchmarks/solo_loader.py    # photographs from scikit-image and scikit-learn
    SOLO_LEARN_ROOT=<clone> python benchmarks/solo_loader.py --data DIR    # an ImageFolder: a folder a class

Dataset, transform and loader are made by the unmodified clone's functions, from the config that LoGo's overlay gives
for ImageNet (2 x 224 and 2 x 96 px). Seconds are CPU time of the main process and of its workers, from the first batch
on (starting a worker is paid once an epoch); the contenders take turns, and ratios are medians over rounds. With
`fast_crops` the views arrive as uint8: `true` is normalised here, in the main process, so that everyone delivers the
same; with `augment` colour and blur are the device's, and not counted. Linux only.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from crop_throughput import photographs


def loader(root: Path, batch: int, workers: int, fast: str | None):
    from logo_plugin.adapters.solo.crops import usual_augmentations
    from logo_plugin.adapters.solo.fast_crops import install
    from solo.data import pretrain_dataloader as solo

    augmentations = usual_augmentations("imagenet100")
    transform = solo.FullTransformPipeline(
        [
            solo.NCropAugmentation(solo.build_transform_pipeline("imagenet100", crop), crop.num_crops)
            for crop in augmentations
        ]
    )
    made = solo.prepare_dataloader(
        solo.prepare_datasets("custom", transform, root, "image_folder"), batch_size=batch, num_workers=workers
    )
    if fast:
        install(made, augmentations, defer=fast)
    return made


def rate(made, finish: bool) -> float:
    """Images per second of CPU time, from the first batch to the last."""
    workers, count, before = [], 0, 0.0
    for indexes, views, _ in made:
        if not workers:  # at once, since they are already at the next batch
            workers = multiprocessing.active_children()
            before = seconds(workers)
            continue
        if finish:
            views.to("cpu")
        count += len(indexes)
        after = seconds(workers)
    return count / (after - before)


def seconds(workers) -> float:
    """CPU time so far."""
    files = [Path(f"/proc/{worker.pid}/schedstat") for worker in workers]
    return time.process_time() + sum(int(file.read_text().split()[0]) for file in files) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an ImageFolder, instead of the wheels' photographs")
    parser.add_argument("--images", type=int, default=128, help="per round and contender, of the wheels' photographs")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sys.path.insert(0, os.environ["SOLO_LEARN_ROOT"])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    contenders = {"solo-learn": None, "fast_crops=true": "normalize", "fast_crops=augment": "augment"}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as temporary:
        root = options.data or Path(temporary)
        if not options.data:
            (root / "a").mkdir()
            pictures = photographs()
            for i in range(options.images):
                (root / "a" / f"{i}.jpg").write_bytes(pictures[i % len(pictures)])
        for round_ in range(-1, options.rounds):  # one round to warm up
            for name, fast in contenders.items():
                made = loader(root, options.batch, options.workers, fast)
                found = rate(made, finish=fast == "normalize")
                if round_ >= 0:
                    rates[name].append(found)
    print(f"{len(made.dataset)} images a round, {options.rounds} rounds, {options.workers} worker(s),")
    files = "--data" if options.data else "500 x 375 JPEG"
    print(f"batch {options.batch}, 1 thread, torch {torch.__version__}, {files}\n")
    print("| loader | images per CPU second, median (range) | x solo-learn, median (range) |\n|---|---|---|")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates["solo-learn"], strict=True)]
        cells = [
            f"{statistics.median(v):.{d}f} ({min(v):.{d}f} to {max(v):.{d}f})" for v, d in ((values, 1), (ratios, 2))
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
