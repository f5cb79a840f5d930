"""Draws the pictures of the README and of the monitor's page, from scikit-image's photographs: a few minutes on a CPU.

docs/crops.jpg            what `logo-plugin crops` draws of the astronaut (NASA, public domain)
docs/monitor_crops.png    what `LoGoMonitor` draws of a batch
docs/monitor_curves.png   what it logs of two runs, one of which is broken on purpose
"""

import csv
import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib as mpl
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import CSVLogger
from skimage import data
from torch.utils.data import DataLoader

from logo_plugin import LoGoMonitor, MultiCropCollate, wrap
from logo_plugin.__main__ import main as logo_plugin

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lightly_models
from photographs import photograph_tiles

DOCS = Path(__file__).parent
EPOCHS = 6
RUNS = {"SimSiam": "#1f77b4", "predictor and last BatchNorm removed": "#d62728"}
PANELS = {
    "logo/global_global": "loss between global crops",
    "logo/embedding_std": "embedding_std",
    "logo/effective_rank": "effective_rank",
    "logo/local_local_similarity": "cosine of local crops: one image\n(dotted: two images)",
}


def draw_crops(folder):
    photograph = folder / "astronaut.png"
    Image.fromarray(data.astronaut()).save(photograph)
    logo_plugin(["crops", str(photograph), "--output", str(DOCS / "crops.jpg"), "--rows", "2", "--seed", "2"])


def train(name, folder):
    """A run's log, column by column, as (steps, values)."""
    pl.seed_everything(0, verbose=False)
    collate = MultiCropCollate(global_size=64, local_size=32)
    model = lightly_models.create("simsiam", "resnet10t", 64, 32)
    if name != "SimSiam":
        model.prediction_head, model.projection_head.layers[-1] = torch.nn.Identity(), torch.nn.Identity()
    logger = CSVLogger(folder, name=name)
    trainer = pl.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=logger, log_every_n_steps=2, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[LoGoMonitor(images=3)],
    )  # fmt: skip
    tiles, _ = photograph_tiles(60)
    trainer.fit(wrap(model), DataLoader(tiles, batch_size=32, shuffle=True, drop_last=True, collate_fn=collate))
    log = Path(logger.log_dir)
    if name == "SimSiam":
        shutil.copyfile(log / "logo_crops" / "epoch_0000.png", DOCS / "monitor_crops.png")
    with open(log / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    names = (*PANELS, "logo/other_image_similarity")
    found = {name: [(int(row["step"]), float(row[name])) for row in rows if row[name]] for name in names}
    return {name: tuple(zip(*values, strict=True)) for name, values in found.items()}


def draw_curves(runs):
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.7), layout="constrained")
    for name, found in runs.items():
        for axis, key in zip(axes, PANELS, strict=True):
            axis.plot(*found[key], color=RUNS[name], label=name)
        axes[3].plot(*found["logo/other_image_similarity"], color=RUNS[name], linestyle=":")
    for axis, title in zip(axes, PANELS.values(), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    figure.savefig(DOCS / "monitor_curves.png", dpi=110)


def main():
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="(The dataloader|The 'train_dataloader'|the projections have collapsed)")
    with tempfile.TemporaryDirectory() as folder:
        draw_crops(Path(folder))
        draw_curves({name: train(name, folder) for name in RUNS})


if __name__ == "__main__":
    main()
