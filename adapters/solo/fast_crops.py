"""solo-learn's crops made by logo_plugin, from the same config."""

from itertools import islice
from typing import Any

import torch
from logo_plugin.adapters.solo.crops import is_local, side_lengths
from logo_plugin.adapters.solo.options import PREFIX
from omegaconf import ListConfig
from solo.data.pretrain_dataloader import FullTransformPipeline
from torch import Tensor

from logo_plugin.crops import MultiCropTransform
from logo_plugin.decoding import decode
from logo_plugin.placement import placed


class FastCrops:
    """solo-learn's `augmentations` config through `MultiCropTransform`, each image decoded once.

    Args:
        augmentations: The config: one pipeline each entry.
        stock: What solo-learn made of it, for mean and standard deviation.
        return_boxes: Append the crops' boxes, (V, 4).
        local_placement: As of `MultiCropTransform`, of the crops that solo-learn takes for local ones.

    Raises:
        ValueError: If a pipeline asks for what `MultiCropTransform` cannot do.
    """

    def __init__(
        self,
        augmentations: ListConfig,
        stock: FullTransformPipeline,
        *,
        return_boxes: bool = False,
        local_placement: str = "anywhere",
    ) -> None:
        self.return_boxes, self.local_placement = return_boxes, local_placement
        self.global_crops = sum(crop.num_crops for crop in augmentations if not is_local(crop, augmentations[0]))
        self.transforms = []
        for i, (crop, pipeline) in enumerate(zip(augmentations, stock.transforms, strict=True)):
            sides = side_lengths(crop)
            refused = {
                "rrc.enabled=false": not crop.rrc.enabled,
                "equalization.prob": bool(crop.equalization.prob),
                "crop_size that is not square": len(sides) > 1,
            }
            if any(refused.values()):
                what = ", ".join(name for name, asked in refused.items() if asked)
                raise ValueError(
                    f"{PREFIX}fast_crops=true cannot do augmentations.{i}.{what}. Set {PREFIX}fast_crops=false for "
                    "solo-learn's own crops, or change the pipeline."
                )
            normalize = pipeline.transform.transforms[-1]
            jitter = crop.color_jitter
            strengths = ("brightness", "contrast", "saturation", "hue") if jitter.prob else ()
            self.transforms.append(
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
                    mean=tuple(normalize.mean),
                    std=tuple(normalize.std),
                )
            )

    def __call__(self, image: Any) -> list[Tensor]:
        """Makes the crops of one image, in the order of the pipelines."""
        pixels = decode(image)
        height, width = pixels.shape[:2]
        drawn = [recipe for transform in self.transforms for recipe in transform.draw(width, height)]
        recipes = placed(drawn, self.global_crops, self.local_placement, width, height)
        crops, rest = [], iter(recipes)
        for transform in self.transforms:
            crops += transform.render(pixels, list(islice(rest, transform.global_crops)))
        boxes = torch.tensor([recipe.box for recipe in recipes], dtype=torch.float32)
        return [*crops, boxes] if self.return_boxes else crops


def install(model: Any, *, return_boxes: bool, local_placement: str) -> None:
    """Puts `FastCrops` into the training data of a model that is about to be fitted.

    Before Lightning iterates over the loader: its workers copy the dataset.

    Raises:
        ValueError: If the data are not loaded by solo-learn's own image loading.
    """
    source = model.trainer.fit_loop._data_source.instance
    dataset: Any = getattr(source, "dataset", None)
    stock = getattr(dataset, "transform", None)
    if isinstance(stock, FastCrops):  # a second fit on the same data
        return
    if not isinstance(stock, FullTransformPipeline):
        raise ValueError(
            f"{PREFIX}fast_crops needs solo-learn's own image loading (data.format=image_folder or h5), got "
            f"{type(source).__name__}. Set {PREFIX}fast_crops=false, or another data.format."
        )
    dataset.transform = FastCrops(
        model.cfg.augmentations, stock, return_boxes=return_boxes, local_placement=local_placement
    )
