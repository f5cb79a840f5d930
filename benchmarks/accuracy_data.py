"""What is learned from and judged on: CIFAR-10, Imagenette, collages, other sets for transfer; all uint8 tensors."""

import io
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import photographs
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10, Imagenette

from logo_plugin import MultiCropCollate


class Setting(NamedTuple):
    """A data set's options of MultiCropCollate, how it is judged, and what reads it."""

    crops: dict
    view: int  # pixels of the central crop that features are taken of
    neighbours: int  # k of k-NN
    read: Callable  # (folder, train) -> images and labels
    scenes: Callable | None = None  # the same, of the images to learn from, with labels (N, classes) of 0 and 1


def read_cifar10(folder, train):
    """uint8 (N, 3, 32, 32) and labels (N,) in the official order."""
    parts = ["train_a", "train_b"] if train else ["test"]
    packed = [Path(folder) / f"cifar10_{part}.webp.npz" for part in parts]
    if all(path.exists() for path in packed):
        strips, labels = [], []
        for path in packed:
            for strip in _files(path):
                strips.append(np.asarray(strip).reshape(-1, 32, 32, 3))
            labels.append(np.load(path)["labels"])
        images, labels = np.concatenate(strips), np.concatenate(labels)
    else:
        dataset = CIFAR10(folder, train=train, download=True)
        images, labels = dataset.data, np.array(dataset.targets)
    return _tensors(images, labels)


def read_imagenette(folder, train):
    """uint8 (N, 3, 96, 96) and labels (N,), in one random order: the official one is by class."""
    packed = Path(folder) / f"imagenette96_{'train' if train else 'val'}.npz"
    if packed.exists():
        images, labels = list(_files(packed)), np.load(packed)["labels"]
    else:
        ready = (Path(folder) / "imagenette2-160").is_dir()
        dataset = Imagenette(folder, split="train" if train else "val", size="160px", download=not ready)
        images, labels = zip(*dataset, strict=True)
        images = [ImageOps.fit(image.convert("RGB"), (96, 96), Image.Resampling.LANCZOS) for image in images]
    images, labels = _tensors(np.stack([np.asarray(image) for image in images]), labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def read_objects(folder, train):
    """Images of CIFAR-10 that no collage is made of, to judge by what was learned from collages."""
    images, labels = read_cifar10(folder, train)
    chosen = slice(40000, 50000) if train else slice(0, 5000)
    return images[chosen], labels[chosen]


def read_collages(folder, train):
    """uint8 (N, 3, 64, 64) of four images of CIFAR-10 each, rolled on a torus, and which classes are in it, (N, 10).

    Two local crops of a collage truly show different things: the premise of repelling them.
    """
    images, labels = read_cifar10(folder, train)
    images, labels, count = (images[:40000], labels[:40000], 10000) if train else (images[5000:], labels[5000:], 2500)
    generator = torch.Generator().manual_seed(int(train))
    four = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(2)])[: 4 * count].view(count, 4)
    rows = [torch.cat([images[four[:, i]], images[four[:, i + 1]]], 3) for i in (0, 2)]
    shifts = torch.randint(64, (count, 2), generator=generator).tolist()
    collages = [torch.roll(each, shift, (1, 2)) for each, shift in zip(torch.cat(rows, 2), shifts, strict=True)]
    return torch.stack(collages), torch.zeros(count, 10).scatter_(1, labels[four], 1.0)


CIFAR = {name: getattr(MultiCropCollate.cifar10(), name) for name in ("blur_p", "mean", "std")}
DATASETS = {
    "cifar10": Setting(
        {"global_size": 32, "local_size": 32, **CIFAR},
        view=32,
        neighbours=200,
        read=read_cifar10,
    ),
    # As cifar10(): what a step costs is as for imagenette's.
    "cifar10_16px": Setting(
        {"global_size": 32, "local_size": 16, **CIFAR},
        view=32,
        neighbours=200,
        read=read_cifar10,
    ),
    # A 2 + 2 step of BYOL costs 1.19 times one of 2 crops, about as with 224 and 96 px.
    "imagenette": Setting(
        {"global_size": 64, "local_size": 32, "global_scale": (0.25, 1.0), "local_scale": (0.05, 0.25), "blur_p": 0.0},
        view=80,
        neighbours=20,
        read=read_imagenette,
    ),
    "collages": Setting(
        {"global_size": 48, "local_size": 24, "local_scale": (0.05, 0.25), **CIFAR},
        view=32,
        neighbours=200,
        read=read_objects,
        scenes=read_collages,
    ),
}


def first_per_class(labels, count):
    """Indices of the first count / 10 images of each class."""
    return torch.cat([(labels == label).nonzero()[: count // 10, 0] for label in range(10)]).sort().values


def fifths(train):
    """Four random fifths of the training images to learn from, one to choose a learning rate by."""
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(1))
    parts = order[len(order) // 5 :], order[: len(order) // 5]
    return tuple((train[0][part], train[1][part]) for part in parts)


def other_sets(dataset, folder):
    """Sets of another kind, as (known, asked) of uint8 (N, 3, size, size) and labels; only CIFAR-10's is downloaded."""
    size = DATASETS[dataset].crops["global_size"]
    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).float()[:, None].repeat(1, 3, 1, 1)
    images, labels = _resized(images, size), torch.from_numpy(digits.target).long()
    even = torch.arange(len(images)) % 2 == 0
    sets = {"digits": ((images[even], labels[even]), (images[~even], labels[~even]))}
    tiles = []
    for part in photographs.photograph_tiles(150):
        pixels = np.stack([image.convert("RGB").resize((size, size)) for image, _ in part])
        tiles.append((torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([label for _, label in part])))
    sets["photo tiles"] = tuple(tiles)
    if dataset == "imagenette":
        images, labels = read_cifar10(folder, train=False)
        images = _resized(images.float(), size)
        sets["cifar10"] = (images[:5000], labels[:5000]), (images[5000:], labels[5000:])
    return sets


def _resized(images, size):
    return F.interpolate(images, size, mode="bilinear").clamp(0, 255).byte()


def _files(path):
    """The images of an archive, whose `blob` is image files one after the other from `offsets` on."""
    archive = np.load(path)
    blob = archive["blob"].tobytes()
    for start, stop in pairwise(archive["offsets"]):
        yield Image.open(io.BytesIO(blob[start:stop])).convert("RGB")


def _tensors(images, labels):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.as_tensor(np.asarray(labels)).long()
