"""The crops of a config: how solo-learn counts them, what LoGo needs of them, what the overlays ship."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

import logo_plugin

_OVERLAYS = {"cifar10": "logo_cifar", "cifar100": "logo_cifar", "stl10": "logo_stl10"}


def usual_augmentations(dataset: str) -> Any:
    """The `augmentations` that LoGo ships for a dataset."""
    folder = Path(logo_plugin.__file__).parent / "conf" / "augmentations"
    return OmegaConf.load(folder / f"{_OVERLAYS.get(dataset, 'logo_imagenet')}.yaml")


def is_local(crop: Any, first: Any) -> bool:
    """As solo-learn tells: a crop is small when its size is not written as the first one's ([32, 32] is not 32)."""
    return bool(crop.crop_size != first.crop_size)


def side_lengths(crop: Any) -> list[int]:
    """Height and width of a crop, once when they are equal."""
    size = crop.crop_size
    sides = list(size) if isinstance(size, (list, tuple, ListConfig)) else [size]
    return sides[:1] if len(set(sides)) == 1 else sides


def check_counts(cfg: DictConfig, large: int, small: int, *, affinity: bool) -> None:
    """LoGo's numbers of crops.

    Raises:
        ValueError: If there are not 2 global crops and enough local ones.
    """
    needed = 2 if affinity else 1
    if large == 2 and small >= needed:
        return
    crops = cfg.get("augmentations") or []
    listed = ", ".join(f"{crop.get('num_crops', 1)} of crop_size {crop.crop_size}" for crop in crops)
    raise ValueError(
        f"LoGo needs 2 global crops and at least {needed} local {'crops' if needed > 1 else 'crop'}, got {large} and "
        f"{small}{f' (augmentations: {listed})' if listed else ''}. Choose augmentations=logo_imagenet, logo_cifar, "
        "logo_stl10 or logo_custom; in your own list, solo-learn takes a crop for a local one when its crop_size "
        "differs from the first one's: local crops of the same size are augmentations.2.crop_size=[32,32], which "
        "differs from 32."
    )


def check_config(cfg: DictConfig) -> None:
    """As `check_counts`, on a config that solo-learn has not counted yet: its own check has no message.

    Raises:
        ValueError: Also if a local crop is listed before a global one.
    """
    crops = cfg.get("augmentations") or []
    kinds = [is_local(crop, crops[0]) for crop in crops]
    if kinds != sorted(kinds):
        raise ValueError(
            f"augmentations lists crop_size {', '.join(str(crop.crop_size) for crop in crops)}, and solo-learn takes "
            "the first ones for the global crops, whatever their size. List all of the first one's size first."
        )
    counts = [0, 0]
    for crop in crops:
        counts[is_local(crop, crops[0])] += crop.num_crops
    check_counts(cfg, *counts, affinity=OmegaConf.select(cfg, "method_kwargs.logo.affinity", default=True) is not False)


def check_sizes(cfg: DictConfig) -> None:
    """The overlays `+logo=` come with ImageNet's crops, as large as no image of CIFAR or STL-10.

    Raises:
        ValueError: If a config of those data sets has kept them.
    """
    dataset = cfg.data.dataset
    if dataset in _OVERLAYS and cfg.get("augmentations") == usual_augmentations("imagenet"):
        raise ValueError(
            f"data.dataset={dataset} with augmentations=logo_imagenet, which +logo= brings: crops of 224 and 96 px. "
            f"Add augmentations={_OVERLAYS[dataset]} (for vicreg and vibcreg +logo=vicreg_cifar, +logo=vibcreg_cifar), "
            "or another size, as in augmentations.0.crop_size=192, if you want them large."
        )
