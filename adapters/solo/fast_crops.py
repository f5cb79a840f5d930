"""solo-learn's crops made by logo_plugin, from the same config."""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, Literal

import numpy as np
import torch
from logo_plugin.adapters.solo.crops import is_local, side_lengths
from logo_plugin.adapters.solo.options import PREFIX
from omegaconf import ListConfig
from solo.data.pretrain_dataloader import FullTransformPipeline
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder

from logo_plugin.crops import DeferredViews, MultiCropTransform
from logo_plugin.decoding import UndecodableError, decode, placed_error
from logo_plugin.placement import placed


class FastCrops:
    """solo-learn's `augmentations` config as a `collate_fn`: each image decoded once, the crops made from it as uint8.

    Args:
        augmentations: The config: one pipeline each entry.
        stock: The transform that solo-learn made of it, for mean and standard deviation.
        defer: What is left to the device, as in `MultiCropCollate`.
        return_boxes: Append the crops' boxes, (N, V, 4), to the batch.
        local_placement: As of `MultiCropTransform`, of the crops that solo-learn takes for local ones.

    Raises:
        ValueError: If a pipeline asks for what `MultiCropTransform` cannot do.
    """

    replaced: tuple[Any, Any]  # the loader's collate_fn, and how an ImageFolder read its files

    def __init__(
        self,
        augmentations: ListConfig,
        stock: FullTransformPipeline,
        *,
        defer: Literal["normalize", "augment"] = "normalize",
        return_boxes: bool = False,
        local_placement: str = "anywhere",
    ) -> None:
        self.stock, self.defer, self.return_boxes, self.local_placement = stock, defer, return_boxes, local_placement
        self.global_crops = sum(crop.num_crops for crop in augmentations if not is_local(crop, augmentations[0]))
        self.pipelines: list[MultiCropTransform] = []
        for i, (crop, pipeline) in enumerate(zip(augmentations, stock.transforms, strict=True)):
            sides, normalize = side_lengths(crop), pipeline.transform.transforms[-1]
            # One number is for all three channels, as solo-learn's transform takes it.
            mean, std = (tuple(np.broadcast_to(values, 3).tolist()) for values in (normalize.mean, normalize.std))
            refused = {
                "rrc.enabled=false": not crop.rrc.enabled,
                "equalization.prob": bool(crop.equalization.prob),
                "crop_size that is not square": len(sides) > 1,
                "mean and std that are not augmentations.0's": any(
                    (mean, std) != (first.mean, first.std) for first in self.pipelines[:1]
                ),
            }
            if any(refused.values()):
                what = ", ".join(name for name, asked in refused.items() if asked)
                raise ValueError(
                    f"{PREFIX}fast_crops cannot do augmentations.{i}.{what}. Set {PREFIX}fast_crops=false for "
                    "solo-learn's own crops, or change the pipeline."
                )
            jitter = crop.color_jitter
            strengths = ("brightness", "contrast", "saturation", "hue") if jitter.prob else ()
            self.pipelines.append(
                MultiCropTransform(
                    global_crops=crop.num_crops,
                    local_crops=0,
                    global_size=sides[0],
                    global_scale=(crop.rrc.crop_min_scale, crop.rrc.crop_max_scale),
                    flip_p=crop.horizontal_flip.prob,
                    jitter_p=jitter.prob,
                    **{name: jitter[name] for name in strengths},
                    grayscale_p=crop.grayscale.prob,
                    blur_p=crop.gaussian_blur.prob,
                    solarize_p=crop.solarization.prob,
                    mean=mean,
                    std=std,
                )
            )
        self.mean, self.std = self.pipelines[0].mean, self.pipelines[0].std

    def __call__(self, samples: Sequence[tuple[int, Any, Any]]) -> list[Any]:
        """Makes the batch of (index, image, target), an image being a PIL image or a path.

        Returns:
            `[indexes, views, targets]`, the views in the order of the pipelines; then boxes with `return_boxes`.

        Raises:
            ValueError: If an image cannot be decoded; the message names its index, and its path where it is one.
        """
        indexes, images, targets = zip(*samples, strict=True)
        views = [pipeline._empty(np.uint8, len(images)) for pipeline in self.pipelines]
        recipes = []
        for n, (index, image) in enumerate(zip(indexes, images, strict=True)):
            try:
                pixels = decode(image)
            except UndecodableError as error:
                what = placed_error(error, f"image {index} of the dataset", image if isinstance(image, str) else None)
                raise ValueError(f"{what} Remove or replace it.") from error
            height, width = pixels.shape[:2]
            drawn = [recipe for pipeline in self.pipelines for recipe in pipeline.draw(width, height)]
            recipes.append(placed(drawn, self.global_crops, self.local_placement, width, height))
            rest = iter(recipes[-1])
            for pipeline, out in zip(self.pipelines, views, strict=True):
                of_image = [view[n] for view in out]
                pipeline._render(pixels, list(islice(rest, len(out))), of_image, self.defer, len(images))
        per_view, made = [list(view) for view in zip(*recipes, strict=True)], [*chain(*views)]
        self.pipelines[0]._finish(made, per_view, self.defer)
        deferred = DeferredViews(made, per_view if self.defer == "augment" else None, self.mean, self.std)
        batch: list[Any] = [default_collate(list(indexes)), deferred, default_collate(list(targets))]
        if self.return_boxes:  # N first, as everywhere in the batch: Lightning takes its size from all tensors
            batch.append(torch.tensor([[recipe.box for recipe in image] for image in recipes], dtype=torch.float32))
        return batch


def install(loader: Any, augmentations: ListConfig, **options: Any) -> None:
    """Makes `FastCrops` the collate function of solo-learn's training `DataLoader`, and takes its transform away.

    Before the loader is iterated over: its workers copy the dataset. `remove` gives both back.

    Args:
        loader: What solo-learn's `prepare_dataloader` gives.
        augmentations: The config: one pipeline each entry.
        **options: Those of `FastCrops`.

    Raises:
        ValueError: If the data are not loaded by solo-learn's own image loading.
    """
    remove(loader)  # a fit that ended in an error has not
    dataset: Any = getattr(loader, "dataset", None)
    stock = getattr(dataset, "transform", None)
    if not isinstance(stock, FullTransformPipeline):
        raise ValueError(
            f"{PREFIX}fast_crops needs solo-learn's own image loading (data.format=image_folder or h5), got "
            f"{type(loader).__name__}. Set {PREFIX}fast_crops=false, or another data.format."
        )
    made = FastCrops(augmentations, stock, **options)
    made.replaced = loader.collate_fn, getattr(dataset, "loader", None)
    loader.collate_fn, dataset.transform = made, None
    if isinstance(dataset, ImageFolder):
        dataset.loader = str  # the path: decoded in the collate, in half of Pillow's time


def remove(loader: Any) -> None:
    """Undoes `install`, if it was: the next model that is fitted on the loader chooses for itself."""
    made = getattr(loader, "collate_fn", None)
    if isinstance(made, FastCrops):
        loader.dataset.transform = made.stock
        loader.collate_fn, read = made.replaced
        if isinstance(loader.dataset, ImageFolder):
            loader.dataset.loader = read
