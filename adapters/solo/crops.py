"""The crops of a config: how solo-learn counts them, what LoGo needs of them, and the local ones that it adds."""

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from logo_plugin.adapters.solo.options import LOCAL, PREFIX
from omegaconf import DictConfig, ListConfig, OmegaConf

import logo_plugin

_OVERLAYS = {"cifar10": "logo_cifar", "cifar100": "logo_cifar", "stl10": "logo_stl10"}


def usual_augmentations(dataset: str) -> Any:
    """The `augmentations` that LoGo ships for a dataset, whose counts, sizes and scales are those of what it adds."""
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
    cure = (
        "In your list solo-learn takes a crop for a local one when its crop_size differs from the first one's: local "
        "crops of the same size are augmentations.2.crop_size=[32,32], which differs from 32."
    )
    if (large, small) == (2, 0):
        cure = (
            "solo-learn's parse_cfg adds them, if cfg.method is LoGo's and logo_plugin.adapters.solo has been "
            "imported before."
        )
    raise ValueError(
        f"LoGo needs 2 global crops and at least {needed} local {'crops' if needed > 1 else 'crop'}, got {large} and "
        f"{small}{f' (augmentations: {listed})' if listed else ''}. {cure}"
    )


def check_config(cfg: DictConfig, *, affinity: bool) -> None:
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
    check_counts(cfg, *counts, affinity=affinity)


def add_local_crops(cfg: DictConfig, options: Mapping[str, Any]) -> None:
    """Adds local crops to an `augmentations` of two global ones alone, and says so.

    Raises:
        ValueError: If the options of local crops cannot be followed.
    """
    crops = cfg.get("augmentations") or []
    large = [crop for crop in crops if not is_local(crop, crops[0])]
    asked = {name: options[name] for name in LOCAL if options[name] is not None}
    if asked and len(large) < len(crops):
        what = ", ".join(f"{PREFIX}{name}={value}" for name, value in asked.items())
        raise ValueError(
            f"{what}: for an augmentations without local crops, and this one lists its own. Leave it out, and change "
            f"the crops where they are listed, as in augmentations.{len(large)}.num_crops=4."
        )
    if len(large) < len(crops) or sum(crop.num_crops for crop in large) != 2:
        return  # nothing to add, or check_config says what is wrong
    cfg.augmentations = _extended(large, LOCAL | asked)
    *_, local = cfg.augmentations
    low, high = local.rrc.crop_min_scale, local.rrc.crop_max_scale
    begin = [pipeline.rrc.crop_min_scale for pipeline in cfg.augmentations[:-1] if pipeline.rrc.enabled]
    if not getattr(rank_zero_only, "rank", 0):
        print(  # not by a logger: solo-learn's configs turn those off
            f"LoGo adds local crops to your augmentations: {local.num_crops} of "
            f"{' x '.join(map(str, side_lengths(local)))} px, {low} to {high} of the image"
            f"{f'; global crops begin at {min(begin)} of it' if begin else ''}.",
            file=sys.stderr,
        )


def _extended(large: Sequence[Any], options: Mapping[str, Any]) -> ListConfig:
    """The global crops, and local ones that differ from them in size and scale only; with their mean share of blur."""
    low, high = options["local_scale"]
    least = min(high, LOCAL["local_scale"][1])
    crops: list[Any] = [OmegaConf.to_container(crop, resolve=True) for crop in large]
    local = copy.deepcopy(crops[0])
    local |= {"crop_size": _size(large[0], options["local_size"]), "num_crops": options["local_crops"]}
    local["rrc"] = {"enabled": True, "crop_min_scale": low, "crop_max_scale": high}
    for effect, share in (("gaussian_blur", fmean), ("solarization", min)):
        if all(effect in crop for crop in crops):  # a fork of solo-learn may have others
            local[effect] |= {"prob": share(crop[effect]["prob"] for crop in crops for _ in range(crop["num_crops"]))}
    for rrc in (crop["rrc"] for crop in crops if crop["rrc"]["enabled"]):
        if rrc["crop_max_scale"] <= least:
            raise ValueError(
                f"{PREFIX}local_scale reaches {high}, and augmentations has global crops of at most "
                f"{rrc['crop_max_scale']} of the image. Lower it."
            )
        rrc["crop_min_scale"] = max(rrc["crop_min_scale"], least)
    return OmegaConf.create([*crops, local])


def _size(first: Any, asked: Any) -> Any:
    """As asked, else 96 px for 224, in multiples of 16.

    The global crops' own size is written in the other way, by which solo-learn tells the two kinds apart.
    """
    sides = side_lengths(first)
    if len(sides) > 1 and asked in (None, first.crop_size):
        raise ValueError(
            f"augmentations has crops of {' x '.join(map(str, sides))} px: choose another {PREFIX}local_size for the "
            "local ones, as [48,32]."
        )
    size = asked or min(sides[0], max(16, 16 * round(sides[0] * 96 / 224 / 16)))
    if size != first.crop_size:
        return size
    return [size, size] if isinstance(size, int) else size[0]
