"""Are LoGo's features better? CIFAR-10, lightly's SimSiam, BYOL and MoCo, at equal epochs and equal compute.

Each run trains one arm with one seed in Lightning's Trainer, measures weighted k-NN accuracy (k 200, T 0.1) on
the whole test set as it goes, and at the end a linear probe, a probe on 10 % of the labels, transfer to two
other sets and what the representation looks like. One JSON file per run; a run that is there is not
repeated, one that was stopped continues from its last epoch, so stop and restart as you like.

    python benchmarks/accuracy.py --data cifar10 --subset 5000 --backbone tiny --epochs 8 --batch-size 32 --queue 1024
    python benchmarks/accuracy.py --data cifar10 --epochs 200 --batch-size 512  # one GPU
    python benchmarks/accuracy_report.py accuracy_runs                       # tables and figures

--data is a folder for torchvision's CIFAR10 (downloaded if missing), or one with its images as WebP strips.
Needs pip install '.[benchmarks]'.
"""

import argparse
import io
import json
import os
import platform
import sys
import time
import warnings
from functools import partial
from itertools import pairwise
from pathlib import Path

import lightly
import numpy as np
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.utils.benchmarking import knn_predict
from PIL import Image
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lightly_models
import photographs
from accuracy_report import PASSES

from logo_plugin import Affinity, MultiCropCollate, wrap

CROPS = MultiCropCollate.cifar10()


class CosineAffinity(nn.Module):
    """Nothing to learn: the cosine similarity itself is repelled."""

    def forward(self, first, second):
        return F.cosine_similarity(first, second, dim=-1)


class UnitAffinity(Affinity):
    """On projections of unit length, as in the official release: their length is no way out of the repulsion."""

    def forward(self, first, second):
        return super().forward(F.normalize(first, dim=-1), F.normalize(second, dim=-1))


# arm: (options of wrap or None for two crops, options of the run: crops, equal compute, factors of the lr).
# An affinity is given as what makes it, so that the run's seed initialises it.
ARMS = {
    "2 crops": (None, {"crops": {"local_crops": 0, "global_scale": (0.2, 1.0)}}),
    "2 crops, equal compute": (None, {"crops": {"local_crops": 0, "global_scale": (0.2, 1.0)}, "compute": True}),
    "multi-crop": ({"affinity": None}, {}),
    "LoGo": ({"local_weight": 1e-4}, {}),
    "LoGo, ratio 0.1": ({"gradient_ratio": 0.1}, {}),
}
for weight in (1e-5, 1e-3, 1e-2, 1e-1, 1.0):
    ARMS[f"lambda {weight:g}"] = ({"local_weight": weight}, {})
for ratio in (0.005, 0.015, 0.05, 0.3):
    ARMS[f"ratio {ratio:g}"] = ({"gradient_ratio": ratio}, {})
# One factor at a time, at a repulsion that is strong enough for the factor to show.
STRONG = {"gradient_ratio": 0.1}
ARMS |= {
    "difference": ({**STRONG, "affinity_loss": "difference"}, {}),
    "layer norm": ({**STRONG, "affinity": partial(Affinity, 128, norm="layer")}, {}),
    "layer norm, ratio 0.3": ({"gradient_ratio": 0.3, "affinity": partial(Affinity, 128, norm="layer")}, {}),
    "unit z": ({**STRONG, "affinity": partial(UnitAffinity, 128)}, {}),
    "layer norm, unit z": ({**STRONG, "affinity": partial(UnitAffinity, 128, norm="layer")}, {}),
    "logit": ({**STRONG, "repulsion": "logit"}, {}),
    "cosine": ({**STRONG, "affinity": CosineAffinity, "repulsion": "logit"}, {}),
    "no noise": ({**STRONG, "positive_noise": 0.0}, {}),
    "noise 1": ({**STRONG, "positive_noise": 1.0}, {}),
    "affinity lr x 0.1": (STRONG, {"affinity_lr": 0.1}),
    "affinity lr x 3": (STRONG, {"affinity_lr": 3.0}),
    "overlap": ({**STRONG, "weigh_overlap": True}, {"crops": {"return_boxes": True}}),
    "paper": ({"preset": "paper"}, {}),
    "release": ({"preset": "release"}, {}),
    "sum": ({"affinity": None, "reduction": "sum"}, {}),
    "lr x 5": ({"affinity": None}, {"lr": 5.0}),  # "sum" makes the loss 5 times as large
    "2 crops, equal compute, lr x 5": (
        None,
        {"crops": {"local_crops": 0, "global_scale": (0.2, 1.0)}, "compute": True, "lr": 5.0},
    ),
    "local scale 0.15-0.4": ({"affinity": None}, {"crops": {"local_scale": (0.15, 0.4)}}),
    "global scale 0.2-1": ({"affinity": None}, {"crops": {"global_scale": (0.2, 1.0)}}),
    "local predictor": ({"affinity": None, "local_predictor": True}, {}),
    "local predictor, ratio 0.1": ({**STRONG, "local_predictor": True}, {}),
    "averaged targets": ({"affinity": None, "average_targets": True}, {}),
}


def read_cifar10(folder, train):
    """uint8 (N, 3, 32, 32) and labels (N,) in the official order."""
    parts = ["train_a", "train_b"] if train else ["test"]
    packed = [Path(folder) / f"cifar10_{part}.webp.npz" for part in parts]
    if all(path.exists() for path in packed):
        strips, labels = [], []
        for path in packed:
            archive = np.load(path)
            blob, offsets = archive["blob"].tobytes(), archive["offsets"]
            for start, stop in pairwise(offsets):
                strip = Image.open(io.BytesIO(blob[start:stop])).convert("RGB")
                strips.append(np.asarray(strip).reshape(-1, 32, 32, 3))
            labels.append(archive["labels"])
        images, labels = np.concatenate(strips), np.concatenate(labels)
    else:
        dataset = CIFAR10(folder, train=train, download=True)
        images, labels = dataset.data, np.array(dataset.targets)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels).long()


def first_per_class(labels, count):
    """Indices of the first count / 10 images of each class, in the official order."""
    return torch.cat([(labels == label).nonzero()[: count // 10, 0] for label in range(10)]).sort().values


def backbone(name):
    """ "tiny" (0.3 M parameters, for a CPU), or a timm ResNet with the stem usual for CIFAR."""
    if name == "tiny":
        blocks = tuple(ByoBlockCfg("basic", d=1, c=width, s=2, gs=0, br=1.0) for width in (32, 64, 128))
        config = ByoModelCfg(blocks, stem_chs=16, stem_type="3x3", stem_pool="")
        return ByobNet(config, num_classes=0, zero_init_last=False)
    net = timm.create_model(name, num_classes=0)
    net.conv1, net.maxpool = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False), nn.Identity()
    return net


def build(method, arm, options, batches, epochs):
    """lightly's class on the backbone, wrapped by one line, with a cosine schedule."""
    wrapping, run = ARMS[arm]
    lr = options.lr * run.get("lr", 1.0)

    class Scheduled(lightly_models.METHODS[method]):
        def configure_optimizers(self):
            affinity = [p for name, p in self.named_parameters() if name.startswith("logo.affinity")]
            others = [p for name, p in self.named_parameters() if not name.startswith("logo.affinity")]
            groups = [{"params": others}, {"params": affinity, "lr": lr * run.get("affinity_lr", 1.0)}]
            optimizer = torch.optim.SGD(groups[: 1 + bool(affinity)], lr, momentum=0.9, weight_decay=5e-4)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=[group["lr"] for group in optimizer.param_groups],
                total_steps=epochs * batches + 1,
                pct_start=0.05,
                cycle_momentum=False,
                final_div_factor=1e4,
            )
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    net = backbone(options.backbone)
    model = Scheduled(net, net.num_features)
    if method == "moco":
        model.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(options.queue, 128))
    if wrapping is None:
        return model
    made = {"affinity": wrapping["affinity"]()} if wrapping.get("affinity") else {}
    return wrap(model, **wrapping | made)


class Curve(Callback):
    """k-NN accuracy every few epochs; seeds each epoch, so that a resumed run is the same run."""

    def __init__(self, seed, every, epochs, train, test):
        self.seed, self.every, self.epochs, self.train, self.test = seed, every, epochs, train, test
        self.state, self.seconds = {"knn": [], "seconds": [], "steps": 0}, []

    def on_train_epoch_start(self, trainer, pl_module):
        torch.manual_seed(1000 * self.seed + trainer.current_epoch)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.start = clock(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seconds.append(clock(pl_module) - self.start)

    def on_train_epoch_end(self, trainer, pl_module):
        self.state["seconds"].append(float(np.median(self.seconds)))
        self.seconds = []
        self.state["steps"] = trainer.global_step
        epoch = trainer.current_epoch + 1
        if epoch % self.every == 0 or epoch == self.epochs:
            self.state["knn"].append([epoch, knn(*(features(pl_module, *part) for part in (self.train, self.test)))])

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def clock(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@torch.no_grad()
def features(model, images, labels):
    """Backbone features (N, D), float32, and labels, of whole images."""
    mode = model.training
    model.eval()
    found = []
    mean, std = (torch.tensor(values, device=model.device).view(3, 1, 1) for values in (CROPS.mean, CROPS.std))
    for part in images.split(500):
        found.append(model.backbone((part.to(model.device).float() / 255 - mean) / std).flatten(1))
    model.train(mode)
    return torch.cat(found).float(), labels.to(model.device)


def knn(bank, queries, k=200, classes=10):
    """Weighted k-NN (k 200, T 0.1) in percent."""
    (known, labels), (asked, answers) = bank, queries
    known, asked = F.normalize(known, dim=1), F.normalize(asked, dim=1)
    k = min(k, len(known) // 2)
    predicted = torch.cat(
        [knn_predict(part, known.T, labels, classes, knn_k=k, knn_t=0.1)[:, 0] for part in asked.split(1000)]
    )
    return 100 * float((predicted == answers).float().mean())


def linear(bank, queries):
    """Logistic regression (C 1) on standardised features, in percent."""
    (x, y), (asked, answers) = ((part.cpu().numpy() for part in pair) for pair in (bank, queries))
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged in 500 iterations
        return 100 * float(probe.fit(x, y).score(asked, answers))


def other_sets():
    """Two sets that need no download, as (train, test) of uint8 (N, 3, 32, 32) and labels."""
    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).float()[:, None]
    images = F.interpolate(images, 32, mode="bilinear").clamp(0, 255).byte().repeat(1, 3, 1, 1)
    labels, even = torch.from_numpy(digits.target).long(), torch.arange(len(images)) % 2 == 0
    sets = {"digits": ((images[even], labels[even]), (images[~even], labels[~even]))}
    tiles = []
    for part in photographs.photograph_tiles(150):
        pixels = np.stack([image.convert("RGB").resize((32, 32)) for image, _ in part])
        tiles.append((torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([label for _, label in part])))
    return sets | {"photo tiles": tuple(tiles)}


def effective_rank(x):
    """exp(entropy) of the normalised singular values of centred features (Roy and Vetterli, 2007)."""
    share = torch.linalg.svdvals((x - x.mean(0)).double())
    share = share / share.sum()
    return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def mechanism(model, images):
    """How alike two local crops are, whether an affinity tells images apart, and the rank of the features."""
    model.eval()
    torch.manual_seed(0)
    views = CROPS(list(images[:1000]))[0][2:]
    z = [model.projection_head(model.backbone(view.to(model.device)).flatten(1)).float() for view in views]
    unit = [F.normalize(part, dim=1) for part in z]
    same = (unit[0] * unit[1]).sum(1)
    found = {
        "local_local_similarity": float(same.mean()),
        "other_image_similarity": float((unit[0] * unit[1].roll(1, 0)).sum(1).mean()),
    }
    affinity = getattr(getattr(model, "logo", None), "affinity", None)
    if affinity is not None:
        right = [(affinity(*z) > 0).float().mean(), (affinity(z[0], z[1].roll(1, 0)) < 0).float().mean()]
        found["affinity_accuracy"] = 50 * float(sum(right))
    whole, _ = features(model, images[:2000], torch.zeros(2000))
    return found | {"effective_rank": effective_rank(whole)}


def evaluate(model, train, test, others):
    banks = [features(model, *part) for part in (train, test)]
    tenth = first_per_class(train[1], len(train[1]) // 10)
    found = {"knn": knn(*banks), "linear": linear(*banks)}
    found["linear_10_percent"] = linear(tuple(part[tenth] for part in banks[0]), banks[1])
    for name, (known, asked) in others.items():
        pair = features(model, *known), features(model, *asked)
        found[f"{name}_knn"], found[f"{name}_linear"] = knn(*pair, k=20), linear(*pair)
    return found | mechanism(model, test[0])


def train_run(method, arm, seed, options, train, test, others):
    """One run, or what is left of it."""
    crops = MultiCropCollate.cifar10(**ARMS[arm][1].get("crops", {}), defer="augment")
    epochs = options.epochs
    if ARMS[arm][1].get("compute"):
        two_crops, multi_crop = PASSES[method]
        epochs = round(epochs * multi_crop / two_crops)
    name = f"{method}-{arm}-{options.epochs}-s{seed}".replace(" ", "_").replace(",", "")
    path, folder = options.output / f"{name}.json", options.output / name
    if path.exists() or (method, arm, seed) in options.known:
        return
    torch.manual_seed(seed)
    data = DataLoader(
        TensorDataset(*train),
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=crops,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    model = build(method, arm, options, len(data), epochs).to(memory_format=torch.channels_last)
    curve = Curve(seed, options.every, epochs, train, test)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="gpu" if options.cuda else "cpu",
        devices=1,
        precision="bf16-mixed" if options.cuda else "32-true",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[curve, ModelCheckpoint(folder, "last", enable_version_counter=False)],
    )
    last = folder / "last.ckpt"
    began = time.time()
    trainer.fit(model, data, ckpt_path=last if last.exists() else None, weights_only=False)
    model = model.to("cuda" if options.cuda else "cpu")
    record = {
        "method": method,
        "arm": arm,
        "seed": seed,
        "epochs": epochs,
        "steps": curve.state["steps"],
        "curve": curve.state["knn"],
        "seconds_per_step": float(np.median(curve.state["seconds"])),
        "wall_seconds_of_last_session": time.time() - began,
        "final": evaluate(model, train, test, others),
        "setting": {
            **{k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k not in SELECTION},
            "machine": torch.cuda.get_device_name() if options.cuda else f"{os.cpu_count()} x {platform.machine()}",
            "torch": torch.__version__,
            "lightly": lightly.__version__,
            "timm": timm.__version__,
        },
    }
    path.with_suffix(".part").write_text(json.dumps(record))
    path.with_suffix(".part").rename(path)
    torch.save(model.state_dict(), folder / "weights.pt")
    last.unlink()
    print(f"{name}: k-NN {record['final']['knn']:.2f}, linear {record['final']['linear']:.2f}", flush=True)


SELECTION = ("methods", "arms", "seeds", "data", "output", "every", "workers", "known")


def run(options):
    options.output.mkdir(parents=True, exist_ok=True)
    train, test = read_cifar10(options.data, train=True), read_cifar10(options.data, train=False)
    if options.subset:
        chosen = first_per_class(train[1], options.subset)
        train = train[0][chosen], train[1][chosen]
    others = other_sets()
    for seed in options.seeds:
        for arm in ARMS if "all" in options.arms else options.arms:
            for method in options.methods:
                train_run(method, arm, seed, options, train, test, others)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=lightly_models.METHODS, default=["simsiam", "byol", "moco"])
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=[*ARMS, "all"],
        default=list(ARMS)[:4],
        metavar="ARM",
        help=f"all, or some of: {', '.join(ARMS)} (default: the first four)",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--subset", type=int, help="this many training images, balanced (default: all)")
    parser.add_argument("--backbone", default="resnet18", help="tiny, or a timm ResNet")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.06)
    parser.add_argument("--queue", type=int, default=4096, help="MoCo's memory bank")
    parser.add_argument("--every", type=int, default=4, help="epochs between k-NN measurements")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("accuracy_runs"))
    parser.add_argument("--known", type=Path, help="JSON file of accuracy_report.py, whose runs are not repeated")
    options = parser.parse_args()
    known = json.loads(options.known.read_text()) if options.known else []
    options.known = {(record["method"], record["arm"], record["seed"]) for record in known}
    options.cuda = torch.cuda.is_available()
    if not options.cuda:
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch)\..*")
    run(options)


if __name__ == "__main__":
    main()
