"""What LoGoMonitor adds to a training step, and what a call of diagnose() costs.

A Lightning run of BYOL in which every second step is measured, so that steps with and without a
measurement take turns; the monitor's hook is also timed by itself, which is what the share of a step
is computed from: the difference between neighbouring steps is noisier than it is large. CPU time on
one thread, random pixels, no data loading; logging to a CSV file is included.

    python benchmarks/monitor_cost.py [--rounds 15] [--batch-size 16] [--sizes 96 48]
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lightly_models

from logo_plugin import Affinity, LoGoMonitor, diagnose, wrap


class Timed(pl.Callback):
    """Seconds of each step without the monitor, and of the monitor's hook on it."""

    def __init__(self, monitor):
        self.monitor, self.steps, self.hooks = monitor, [], []

    def on_fit_start(self, trainer, pl_module):
        self.monitor.on_fit_start(trainer, pl_module)

    def on_train_batch_start(self, *_):
        self.start = time.process_time()

    def on_train_batch_end(self, *arguments):
        stepped = time.process_time()
        self.monitor.on_train_batch_end(*arguments)
        self.steps.append(stepped - self.start)
        self.hooks.append(time.process_time() - stepped)


def shown(seconds):
    return f"{1000 * statistics.median(seconds):.2f} ms ({1000 * min(seconds):.2f} to {1000 * max(seconds):.2f})"


def calls(images, features, rounds):
    """Seconds of diagnose(), with the affinity."""
    proj, affinity = torch.randn(2, images, features), Affinity(features)
    taken = []
    for _ in range(rounds + 1):
        start = time.process_time()
        diagnose(proj, affinity)
        taken.append(time.process_time() - start)
    return taken[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs=2, default=(96, 48))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {options.rounds} rounds, CPU time on one thread: median (range)")
    for images in (128, 256):
        for features in (128, 256, 2048):
            print(
                f"diagnose(), 2 x {images} x {features}: {shown(calls(images, features, options.rounds))}", flush=True
            )

    large, small = options.sizes
    model = wrap(lightly_models.create("byol", options.backbone, large, small), affinity="learned")
    views = [torch.randn(options.batch_size, 3, size, size) for size in (large, large, small, small)]
    timed = Timed(LoGoMonitor(every_n_steps=2))
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=2 * options.rounds + 2, accelerator="cpu", devices=1, callbacks=[timed],
            logger=pl.loggers.CSVLogger(folder), enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, DataLoader([[views]] * trainer.max_steps, batch_size=None))
        default = pl.Trainer(logger=False, accelerator="cpu").log_every_n_steps
    picture, *_ = timed.hooks
    steps, hooks = timed.steps[2:], timed.hooks[2:]  # the first two warm up
    idle, due = hooks[::2], hooks[1::2]
    step = statistics.median(steps)
    added = [(b + y) - (a + x) for a, x, b, y in zip(steps[::2], idle, steps[1::2], due, strict=True)]
    share = [(y + (default - 1) * x) / (default * step) for x, y in zip(idle, due, strict=True)]
    print(f"{options.backbone}, batch {options.batch_size}, {large}/{small} px: a step {shown(steps)}")
    print(f"hook with a measurement {shown(due)}, without {shown(idle)}")
    print(f"a step with a measurement minus its neighbour without: {shown(added)}")
    print(f"a picture of 8 images, once an epoch: {1000 * picture:.0f} ms")
    percent = [100 * s for s in share]
    print(
        f"share of the step time at the default interval of {default} steps: "
        f"{statistics.median(percent):.3f} % ({min(percent):.3f} to {max(percent):.3f})"
    )


if __name__ == "__main__":
    main()
