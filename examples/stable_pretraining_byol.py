"""BYOL with LoGo in stable-pretraining, on photographs: k-NN, a linear probe and LoGo's terms in one log.

python examples/stable_pretraining_byol.py            # two global and two local crops
python examples/stable_pretraining_byol.py --without  # stable-pretraining's own two views, the same otherwise
"""

import argparse
from pathlib import Path

import lightning as pl
import stable_pretraining as spt
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from photographs import PHOTOGRAPHS, photograph_tiles
from stable_pretraining.data import transforms
from stable_pretraining.forward import byol
from torch import nn
from torch.utils.data import DataLoader

from logo_plugin import MultiCropCollate, wrap

CLASSES, WIDTH, SIZE = len(PHOTOGRAPHS), 128, 48


def head(*widths):
    into, hidden, out = widths
    return nn.Sequential(nn.Linear(into, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))


def build():
    layers = []
    for before, after in ((3, 32), (32, 64), (64, WIDTH)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    average = {"base_ema_coefficient": 0.98, "final_ema_coefficient": 1.0}
    return spt.Module(
        forward=byol,
        backbone=spt.TeacherStudentWrapper(backbone, **average),
        projector=spt.TeacherStudentWrapper(head(WIDTH, 256, 64), **average),
        predictor=head(64, 256, 64),
        byol_loss=spt.losses.BYOLLoss(),
        optim={
            "optimizer": {"type": "SGD", "lr": 0.06, "momentum": 0.9, "weight_decay": 1e-5},
            "scheduler": {"type": "CosineAnnealingLR"},
        },
    )


def two_views():
    """As in stable-pretraining's own scripts, with the scales and strengths that MultiCropCollate has."""
    view = transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((SIZE, SIZE), scale=(0.4, 1.0)),
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.PILGaussianBlur(p=0.5),
        transforms.RandomHorizontalFlip(p=0.5),
        transforms.ToImage(**spt.data.static.ImageNet),
    )
    return transforms.MultiViewTransform([view, view])


def evaluators(module):
    def accuracy():
        return {"top1": torchmetrics.classification.MulticlassAccuracy(CLASSES)}

    knn = spt.callbacks.OnlineKNN(
        name="knn",
        input="embedding",
        target="label",
        queue_length=512,
        metrics=accuracy(),
        input_dim=WIDTH,
        num_classes=CLASSES,
        k=10,
    )
    probe = spt.callbacks.OnlineProbe(
        module,
        name="probe",
        input="embedding",
        target="label",
        probe=nn.Linear(WIDTH, CLASSES),
        loss=nn.CrossEntropyLoss(),
        metrics=accuracy(),
    )
    return [knn, probe, spt.callbacks.TeacherStudentCallback()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without", action="store_true", help="train without LoGo")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--output", default="stable_runs")
    args = parser.parse_args()

    spt.set(default_callbacks={"env_dump": False, "progress_bar": False}, verbose="warning")
    pl.seed_everything(0, verbose=False)
    samples, held_out = photograph_tiles(60)
    names, module = ["image", "label"], build()
    if args.without:
        dataset = spt.data.FromTorchDataset(samples, names, transform=two_views())
        collate = None
    else:
        module = wrap(module)
        dataset = spt.data.FromTorchDataset(samples, names)
        collate = MultiCropCollate(global_size=SIZE, local_size=SIZE // 2)
    whole = transforms.Compose(transforms.RGB(), transforms.ToImage(**spt.data.static.ImageNet))
    loader = DataLoader(dataset, batch_size=32, shuffle=True, drop_last=True, collate_fn=collate)
    held_out_loader = DataLoader(spt.data.FromTorchDataset(held_out, names, transform=whole), batch_size=64)

    Path(args.output).mkdir(parents=True, exist_ok=True)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        callbacks=evaluators(module),
        logger=CSVLogger(args.output, name="without" if args.without else "logo"),
        log_every_n_steps=4,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, held_out_loader)
    for name, value in sorted(trainer.callback_metrics.items()):
        if name.startswith(("eval/", "logo/", "fit/loss_epoch")):
            print(f"{name:24} {value:.3f}")
    print(f"curves: {trainer.logger.log_dir}/metrics.csv")


if __name__ == "__main__":
    main()
