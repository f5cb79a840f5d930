"""`data.format`: what solo-learn has for which data, said where its own assertions have no text."""

import importlib.util

from logo_plugin.adapters.solo.options import PREFIX
from omegaconf import DictConfig, ListConfig, OmegaConf

_DATASETS = {"h5": ("imagenet", "imagenet100"), "dali": ("imagenet", "imagenet100", "custom")}


def check_format(cfg: DictConfig) -> None:
    """Before solo-learn opens the data.

    Raises:
        ModuleNotFoundError: If h5 files are asked for and h5py is missing.
        ValueError: If solo-learn doesn't read this dataset in this format, or DALI can't make these crops.
    """
    name, dataset = cfg.data.get("format"), cfg.data.get("dataset")
    readable = _DATASETS.get(name, (dataset,))
    if dataset not in readable:
        raise ValueError(
            f"data.format={name}: solo-learn reads {', '.join(readable)} in this format, and data.dataset is "
            f"{dataset}. Set data.format=image_folder."
        )
    if name == "h5" and importlib.util.find_spec("h5py") is None:
        raise ModuleNotFoundError("data.format=h5 needs h5py, which is missing: pip install h5py.")
    if name == "dali":
        _check_dali(cfg)


def _check_dali(cfg: DictConfig) -> None:
    if OmegaConf.select(cfg, f"{PREFIX}fast_crops"):
        raise ValueError(
            f"{PREFIX}fast_crops=true makes the crops itself, and data.format=dali has DALI make them. Set "
            f"{PREFIX}fast_crops=false, or data.format=image_folder."
        )
    for i, crop in enumerate(cfg.get("augmentations") or []):
        if isinstance(crop.crop_size, ListConfig):
            raise ValueError(
                f"data.format=dali takes crop_size as one number, and augmentations.{i}.crop_size is {crop.crop_size}. "
                "Local crops must then have another size than global ones; else set data.format=image_folder."
            )
