"""Images per second that become 2 + 2 crops (224 and 96 px): ours against lightly, solo-learn, torchvision and kornia.

Everyone gets the same JPEG files and the same augmentations (scales 0.4-1 and 0.05-0.4, jitter 0.4/0.4/0.4/0.1 with
p 0.8, gray p 0.2, blur p 0.5 sigma 0.1-2, flip, normalise) and gives a batch of views, decoding included. One thread
each. First in one process, per second of CPU time: the contenders take turns, round by round, so that a machine whose
speed drifts does so for all of them; ratios are medians over rounds. Then through a DataLoader, per second of wall
clock. solo-learn takes part when SOLO_LEARN_ROOT names a clone; kornia, lightly and AlbumentationsX when they are
installed. AlbumentationsX resizes bicubically without antialias, which is less work. In an environment where
pillow-simd takes Pillow's place (`CC="cc -mavx2" pip install --no-binary pillow-simd pillow-simd`) all who use Pillow
are measured with it.

    python benchmarks/crop_throughput.py    # photographs from the wheels of scikit-image and scikit-learn
    python benchmarks/crop_throughput.py --data DIR --json throughput.json
    python benchmarks/crop_throughput.py --picture 96 96 --sizes 64 32 --images 64    # small images
"""

import argparse
import importlib
import io
import json
import os
import platform
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import PIL
import torch
import torchvision
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode, v2

from logo_plugin import MultiCropCollate

SIZES = [(224, (0.4, 1.0)), (96, (0.05, 0.4))]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def photographs(size=(500, 375)):
    """JPEG of quality 90, as large as ImageNet's are on average."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.stereo_motorcycle()[0]]
    files = []
    for picture in [*pictures, *load_sample_images().images]:
        buffer = io.BytesIO()
        ImageOps.fit(Image.fromarray(picture), size).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def decode(file):
    return Image.open(io.BytesIO(file)).convert("RGB")


class Repeated(Dataset):
    """`count` samples, the files in turn, through a transform."""

    def __init__(self, files, count, transform=None):
        self.files, self.count, self.transform = files, count, transform

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        file = self.files[index % len(self.files)]
        return self.transform(file) if self.transform else file


class Decoded:
    def __init__(self, transform, convert=None):
        self.transform, self.convert = transform, convert

    def __call__(self, file):
        image = decode(file)
        return self.transform(self.convert(image) if self.convert else image)


class Views:
    def __init__(self, per_size):
        self.per_size = per_size

    def __call__(self, image):
        return [transform(image) for transform in self.per_size for _ in range(2)]


class Batched:
    def __init__(self, transform):
        self.transform = transform

    def __call__(self, files):
        return [self.transform(torch.stack([v2.functional.pil_to_tensor(decode(file)) for file in files]) / 255)]


def lightly():
    from lightly.transforms import DINOTransform

    # Its defaults have these scales, jitter, gray and sigma.
    (global_size, _), (local_size, _) = SIZES
    options = {"global_crop_size": global_size, "local_crop_size": local_size, "n_local_views": 2}
    return Decoded(DINOTransform(**options, gaussian_blur=(0.5, 0.5, 0.5), solarization_prob=0.0))


class Config(SimpleNamespace):
    def get(self, name, default):
        return getattr(self, name, default)


def solo_learn():
    root = os.environ.get("SOLO_LEARN_ROOT")
    if not root:
        raise ImportError("SOLO_LEARN_ROOT is not set")
    sys.path.insert(0, root)
    pipeline = importlib.import_module("solo.data.pretrain_dataloader")
    transforms = []
    for size, scale in SIZES:
        config = Config(
            crop_size=size,
            rrc=Config(enabled=True, crop_min_scale=scale[0], crop_max_scale=scale[1]),
            color_jitter=Config(prob=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
            grayscale=Config(prob=0.2),
            gaussian_blur=Config(prob=0.5),
            solarization=Config(prob=0),
            equalization=Config(prob=0),
            horizontal_flip=Config(prob=0.5),
        )
        transforms.append(pipeline.build_transform_pipeline("imagenet", config))
    return Decoded(pipeline.prepare_n_crop_transform(transforms, num_crops_per_aug=[2, 2]))


def torchvision_v2(convert=None):
    def one(size, scale):
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True),
                v2.RandomHorizontalFlip(),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(23 if size > 100 else 9, sigma=(0.1, 2.0))], p=0.5),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )

    views = Views([one(size, scale) for size, scale in SIZES])
    return Decoded(views, convert)


def kornia():
    """Batched over the images, on the CPU; the images must have one size."""
    kornia = importlib.import_module("kornia.augmentation")

    def one(size, scale):
        return kornia.AugmentationSequential(
            kornia.RandomResizedCrop((size, size), scale=scale, resample="BICUBIC", cropping_mode="slice"),
            kornia.RandomHorizontalFlip(),
            kornia.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
            kornia.RandomGrayscale(p=0.2),
            kornia.RandomGaussianBlur((23, 23) if size > 100 else (9, 9), (0.1, 2.0), p=0.5),
            kornia.Normalize(MEAN, STD),
        )

    views = Views([one(size, scale) for size, scale in SIZES])
    return Batched(views)


def albumentationsx():
    """AGPL; only measured here. OpenCV decodes."""
    import albumentations as A
    import cv2
    import numpy as np

    cv2.setNumThreads(1)

    def one(size, scale):
        return A.Compose(
            [
                A.RandomResizedCrop((size, size), scale=scale, interpolation=cv2.INTER_CUBIC),
                A.HorizontalFlip(),
                A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1), p=0.8),
                A.ToGray(p=0.2),
                A.GaussianBlur(blur_limit=0, sigma_limit=(0.1, 2.0), p=0.5),
                A.Normalize(MEAN, STD),
                A.ToTensorV2(),
            ]
        )

    pipelines = [one(size, scale) for size, scale in SIZES for _ in range(2)]

    def views(file):
        image = cv2.cvtColor(cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        return [pipeline(image=image)["image"] for pipeline in pipelines]

    return views


def contenders():
    """Name to (transform of the dataset, collate)."""
    ours = partial(MultiCropCollate, global_size=SIZES[0][0], local_size=SIZES[1][0])
    made = {
        "logo-plugin": (None, ours()),
        "logo-plugin, normalised on the device": (None, ours(defer="normalize")),
        "logo-plugin, colour and blur on the device": (None, ours(defer="augment")),
        "torchvision v2 on PIL": (torchvision_v2(), default_collate),
        "torchvision v2 on uint8": (torchvision_v2(v2.functional.pil_to_tensor), default_collate),
    }
    for name, make in (("lightly", lightly), ("solo-learn", solo_learn), ("AlbumentationsX", albumentationsx)):
        try:
            made[name] = (make(), default_collate)
        except ImportError as error:
            print(f"without {name}: {error}", file=sys.stderr)
    try:
        made["kornia, batched"] = (None, kornia())
    except ImportError as error:
        print(f"without kornia: {error}", file=sys.stderr)
    return made


def cpu_rates(made, files, count, rounds):
    """Images per second of CPU time, a list over rounds for each contender."""
    rates = {name: [] for name in made}
    for round_ in range(-1, rounds):  # one round to warm up
        batch = [files[(round_ + i) % len(files)] for i in range(count)]
        for name, (transform, collate) in made.items():
            start = time.process_time()
            collate([transform(file) for file in batch] if transform else batch)
            elapsed = time.process_time() - start
            if round_ >= 0:
                rates[name].append(count / elapsed)
    return rates


def loader_rate(transform, collate, files, workers, batches, batch_size):
    """Images per second of wall clock once the workers run."""
    dataset = Repeated(files, (batches + workers) * batch_size, transform)
    loader = iter(
        DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate, prefetch_factor=1)
    )
    for _ in range(workers):
        next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return batches * batch_size / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of JPEG files, instead of the wheels' photographs")
    parser.add_argument("--picture", type=int, nargs=2, default=(500, 375), help="width and height of the photographs")
    parser.add_argument("--sizes", type=int, nargs=2, default=[size for size, _ in SIZES], help="of the crops, pixels")
    parser.add_argument("--images", type=int, default=32, help="per round and contender")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--loader-batches", type=int, default=6)
    parser.add_argument("--only", nargs="+", help="contenders whose name contains one of these")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.data:
        files = [
            path.read_bytes() for path in sorted(options.data.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")
        ]
    else:
        files = photographs(options.picture)
    SIZES[:] = [(size, scale) for size, (_, scale) in zip(options.sizes, SIZES, strict=True)]
    made = contenders()
    if options.only:
        made = {name: value for name, value in made.items() if any(part in name for part in options.only)}
    rates = cpu_rates(made, files, options.images, options.rounds)
    peers = [name for name in ("lightly", "solo-learn", "AlbumentationsX") if name in rates]
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, PIL)}
    print(", ".join([platform.machine(), *map(" ".join, versions.items())]))
    print(f"{len(files)} photographs, {options.rounds} rounds of {options.images} images, 1 thread each\n")
    header = ["pipeline", "images/s of CPU time, median (range)", *(f"x {peer}" for peer in peers)]
    header += [f"DataLoader, {workers} worker{'s' * (workers > 1)}, images/s" for workers in options.workers]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    results = {}
    for name, values in rates.items():
        ratios = {peer: statistics.median(a / b for a, b in zip(values, rates[peer], strict=True)) for peer in peers}
        loader = partial(loader_rate, *made[name], files, batches=options.loader_batches, batch_size=options.images)
        walls = [loader(workers=workers) for workers in options.workers]
        cells = [name, f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"]
        cells += [f"{ratio:.2f}" for ratio in ratios.values()] + [f"{wall:.1f}" for wall in walls]
        print("| " + " | ".join(cells) + " |", flush=True)
        results[name] = {"cpu": values, "ratios": ratios, "loader": dict(zip(options.workers, walls, strict=True))}
    if options.json:
        setting = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"}
        setting |= versions | {"machine": platform.machine()}
        options.json.write_text(json.dumps({"setting": setting, "results": results}, indent=1))


if __name__ == "__main__":
    main()
