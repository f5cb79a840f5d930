"""LoGo on real photographs in a few minutes on a CPU: one method with 2 crops, multi-crop, and LoGo.

Trains lightly's BYOL (or MoCo, SimSiam) on a timm backbone three times for the same wall time, then
compares held-out k-NN accuracy and draws what happened. Without --data it cuts tiles from the colour
photographs in scikit-image's wheel; a tile's class is its photograph, and the held-out tiles come from
a part of each photograph that training never sees. A demonstration, not a benchmark: one seed, tiny data.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from pathlib import Path

import lightly_models
import matplotlib as mpl
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from lightly.utils.benchmarking import knn_predict
from photographs import TILE, photograph_tiles
from pytorch_lightning.callbacks import Callback, OnExceptionCheckpoint, Timer, TQDMProgressBar
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from logo_plugin import LoGoTerms, MultiCropCollate, wrap

mpl.use("Agg")
import matplotlib.pyplot as plt

GLOBAL, LOCAL = 64, 32
ARMS = ("2 crops", "multi-crop 2 + 2", "LoGo 2 + 2")
COLOURS = ("#7f7f7f", "#1f77b4", "#d62728")


def folder_images(folder):
    """(train, held-out) of a folder with one subfolder per class: every fifth image is held out."""
    try:
        images = ImageFolder(folder)
    except FileNotFoundError as error:
        raise SystemExit(f"--data needs a folder with one subfolder of images per class: {error}") from error
    held_out = range(0, len(images), 5)
    train = [i for i in range(len(images)) if i % 5]
    if len(train) < 64:
        raise SystemExit(f"--data {folder} holds {len(images)} images; the demo needs at least 80.")
    return torch.utils.data.Subset(images, train), torch.utils.data.Subset(images, held_out)


class History(Callback):
    """The terms of each step, kept in the checkpoint so that a resumed run has them all."""

    def __init__(self):
        self.terms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        terms = getattr(pl_module, "logo_terms", None)
        self.terms.append([float(term) for term in terms] if terms else [float(outputs["loss"])])

    def state_dict(self):
        return {"terms": self.terms}

    def load_state_dict(self, state):
        self.terms = state["terms"]


def loader(samples, batch_size, **options):
    return DataLoader(samples, batch_size=batch_size, **options)


@torch.no_grad()
def embed(model, samples):
    """Backbone features (N, D), normalised, and labels (N,)."""
    whole = v2.Compose(
        [
            v2.Resize(GLOBAL),
            v2.CenterCrop(GLOBAL),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    model.eval()
    images = torch.stack([whole(image.convert("RGB")) for image, _ in samples])
    features = torch.cat([model.backbone(part).flatten(1) for part in images.split(64)])
    return F.normalize(features, dim=1), torch.tensor([label for _, label in samples])


def knn_accuracy(model, train, held_out):
    """lightly's weighted k-NN, k = 20, T = 0.1, in percent; None for a single class."""
    (bank, bank_labels), (queries, labels) = embed(model, train), embed(model, held_out)
    classes = int(bank_labels.max()) + 1
    if classes < 2:
        return None
    predicted = knn_predict(queries, bank.T, bank_labels, classes, knn_k=20, knn_t=0.1)
    return 100 * float((predicted[:, 0] == labels).float().mean())


@torch.no_grad()
def local_similarity(model, samples, collate):
    """Cosine similarity of the projections of two local crops of one image, for up to 256 images."""
    model.eval()
    torch.manual_seed(0)
    first, second = collate([samples[i] for i in range(min(256, len(samples)))])[0][2:]
    z = [model.projection_head(model.backbone(view).flatten(1)) for view in (first, second)]
    return F.cosine_similarity(*z, dim=1)


def train_arm(arm, options, train, folder):
    """Trains one arm for the time budget; gives (model, history, steps, seconds)."""
    torch.manual_seed(options.seed)
    model = lightly_models.create(options.method, options.backbone, GLOBAL, LOCAL)
    collate = MultiCropCollate(global_size=GLOBAL, local_size=LOCAL)
    if arm == "2 crops":
        collate = MultiCropCollate(global_size=GLOBAL, local_crops=0)
    elif arm == "multi-crop 2 + 2":
        model = wrap(model, affinity=None)
    else:
        model = wrap(model, gradient_ratio=options.gradient_ratio)  # the one line that adds LoGo
    slug = arm.replace(" ", "").replace("+", "_")
    finished, interrupted = folder / f"{slug}.ckpt", folder / f"{slug}-interrupted.ckpt"
    checkpoint = next((path for path in (finished, interrupted) if options.resume and path.exists()), None)
    history, timer = History(), Timer(duration={"seconds": options.seconds})
    callbacks = [history, timer, OnExceptionCheckpoint(folder, interrupted.stem), TQDMProgressBar(refresh_rate=5)]
    trainer = pl.Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=folder,
    )
    batches = loader(train, options.batch_size, shuffle=True, drop_last=True, collate_fn=collate)
    print(f"\n{arm}: {options.method} on {options.backbone}, {options.seconds:g} s", flush=True)
    try:
        trainer.fit(model, batches, ckpt_path=checkpoint, weights_only=False)
    except SystemExit:
        print(f"\nInterrupted. {interrupted} holds this arm; continue with: make demo ARGS='{options.again}'")
        raise
    if checkpoint != finished:
        trainer.save_checkpoint(finished)
        interrupted.unlink(missing_ok=True)
    return model, history.terms, trainer.global_step, timer.time_elapsed()


def draw(path, train, rows, untrained):
    figure, axes = plt.subplot_mosaic(
        [["crops", "crops", "crops"], ["terms", "similarity", "accuracy"]],
        figsize=(13, 6.6),
        layout="constrained",
        height_ratios=(1, 1.7),
    )
    torch.manual_seed(1)
    collate = MultiCropCollate(global_size=GLOBAL, local_size=LOCAL, mean=(0, 0, 0), std=(1, 1, 1))
    chosen = [train[i] for i in torch.linspace(0, len(train) - 1, 10).long().tolist()]
    height, gap = TILE, 6
    sheet = torch.ones(3, 3 * height + 2 * gap, len(chosen) * (2 * GLOBAL + 3 * gap))
    views = collate(chosen)[0]
    for i, (image, _) in enumerate(chosen):
        x = i * (2 * GLOBAL + 3 * gap)
        tile = v2.functional.to_dtype(
            v2.functional.pil_to_tensor(image.resize((TILE, TILE))), torch.float32, scale=True
        )
        sheet[:, :height, x + 16 : x + 16 + TILE] = tile
        for j in (0, 1):
            left = x + j * (GLOBAL + gap)
            sheet[:, height + gap : height + gap + GLOBAL, left : left + GLOBAL] = views[j][i]
            left += (GLOBAL - LOCAL) // 2
            top = height + 2 * gap + GLOBAL
            sheet[:, top : top + LOCAL, left : left + LOCAL] = views[2 + j][i]
    sheet = sheet[:, : height + 3 * gap + GLOBAL + LOCAL]
    axes["crops"].imshow(sheet.permute(1, 2, 0).clamp(0, 1))
    axes["crops"].set_axis_off()
    axes["crops"].set_title("Photograph tiles, their two global and two local crops")

    terms = torch.tensor(rows[-1]["terms"])
    window = min(9, 1 + len(terms) // 4)
    for name in LoGoTerms._fields[1:4]:
        values = terms[:, LoGoTerms._fields.index(name)]
        smooth = values.unfold(0, window, 1).mean(1)
        axes["terms"].plot(range(window - 1, len(values)), smooth, label=name)
    smoothed = f" (mean of {window} steps)" if window > 1 else ""
    axes["terms"].set(title=f"LoGo's terms{smoothed}", xlabel="step")
    axes["terms"].legend(fontsize=9)
    for row, colour in zip(rows, COLOURS, strict=True):
        axes["similarity"].hist(
            row["similarity"], bins=30, range=(-0.2, 1), histtype="step", linewidth=2, color=colour,
            label=f"{row['arm']}, mean {row['local_local_cosine']:.2f}",
        )  # fmt: skip
    axes["similarity"].set(
        title="Two local crops of one tile: similarity", xlabel="cosine of projections", ylabel="tiles"
    )
    axes["similarity"].legend(fontsize=9, loc="upper left")
    if rows[0]["knn"] is not None:
        bars = axes["accuracy"].bar([row["arm"] for row in rows], [row["knn"] for row in rows], color=COLOURS)
        axes["accuracy"].bar_label(bars, fmt="%.1f")
        axes["accuracy"].axhline(untrained, color="black", linestyle=":", label=f"untrained {untrained:.1f}")
        axes["accuracy"].legend(fontsize=9, loc="upper right")
    axes["accuracy"].set(title="Held-out k-NN, %: equal time, one seed", ylim=(0, 119))
    axes["accuracy"].tick_params(axis="x", labelsize=9)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--method", choices=lightly_models.METHODS, default="byol")
    parser.add_argument("--backbone", default="regnetx_002", help="any timm model name")
    parser.add_argument("--data", type=Path, help="your images, one subfolder per class")
    parser.add_argument("--seconds", type=float, default=55, help="training time of each arm")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--gradient-ratio", type=float, help="strength of the repulsion at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--resume", action="store_true", help="continue where an interrupted run stopped")
    options = parser.parse_args()
    options.again = " ".join([*(a for a in sys.argv[1:] if a != "--resume"), "--resume"])
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch)\..*")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    options.output.mkdir(parents=True, exist_ok=True)
    train, held_out = folder_images(options.data) if options.data else photograph_tiles(72)
    print(f"{len(train)} training images, {len(held_out)} held out")

    torch.manual_seed(options.seed)
    try:
        model = lightly_models.create(options.method, options.backbone, GLOBAL, LOCAL)
    except ValueError as error:
        raise SystemExit(f"--backbone: {error}") from error
    untrained = knn_accuracy(model, train, held_out)
    rows = []
    for arm in ARMS:
        model, terms, steps, seconds = train_arm(arm, options, train, options.output)
        similarity = local_similarity(model, train, MultiCropCollate(global_size=GLOBAL, local_size=LOCAL))
        rows.append(
            {
                "arm": arm,
                "steps": steps,
                "seconds_per_step": seconds / steps,
                "knn": knn_accuracy(model, train, held_out),
                "local_local_cosine": float(similarity.mean()),
                "similarity": similarity.tolist(),
                "terms": terms,
            }
        )

    print(f"\n{options.method} on {options.backbone}, {options.seconds:g} s an arm, seed {options.seed}")
    print(f"{'':18}{'steps':>7}{'s/step':>9}{'k-NN %':>9}{'local-local cos':>17}")
    accuracy = "-" if untrained is None else f"{untrained:.1f}"
    print(f"{'untrained':18}{0:7}{'':9}{accuracy:>9}")
    for row in rows:
        accuracy = "-" if row["knn"] is None else f"{row['knn']:.1f}"
        print(
            f"{row['arm']:18}{row['steps']:7}{row['seconds_per_step']:9.3f}{accuracy:>9}{row['local_local_cosine']:17.3f}"
        )
    print("One seed on tiny data: it shows that LoGo trains, not what it is worth.")
    (options.output / "demo.json").write_text(json.dumps(rows))
    draw(options.output / "demo.png", train, rows, untrained)
    print(f"Figure: {options.output / 'demo.png'}")


if __name__ == "__main__":
    start = time.time()
    main()
    print(f"Done in {time.time() - start:.0f} s")
