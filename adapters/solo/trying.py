"""One image of each crop size through a new model: what does not fit must not wait for the first step."""

from collections.abc import Mapping
from typing import Any

import torch
from logo_plugin.adapters.solo.crops import side_lengths
from logo_plugin.adapters.solo.options import PREFIX
from omegaconf import DictConfig

from logo_plugin.losses import LoGoLoss
from logo_plugin.modes import eval_mode, image_channels
from logo_plugin.presets import PRESETS

_SIZE_HINTS = {"vit": "+backbone.kwargs.dynamic_img_size=True", "swin": "+backbone.kwargs.strict_img_size=False"}


def dry_run(model: Any, cfg: DictConfig) -> int:
    """Forwards one image of each size; returns the width of the projection.

    Raises:
        ValueError: If the backbone cannot take a size, an output has another name, or `gradient_ratio` is asked of
            a method that hides from it how the prediction comes from the projection.
    """
    weight = next(model.parameters())
    channels = image_channels(model.backbone)
    for sides in [side_lengths(crop) for crop in cfg.get("augmentations") or []] or [[224]]:
        height, width = sides[0], sides[-1]
        try:
            with eval_mode(model), torch.set_grad_enabled(cfg.method_kwargs.logo.gradient_ratio is not None):
                found = model(torch.zeros(1, channels, height, width, dtype=weight.dtype, device=weight.device))
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).rstrip(".")
            hint = _SIZE_HINTS.get(cfg.backbone.name.split("_")[0], "local crops of the global crops' size")
            raise ValueError(
                f"backbone {cfg.backbone.name} can't take crops of {height} x {width} pixels: {reason}. "
                f"Try {hint}, or a backbone that takes any size, such as resnet18."
            ) from error
    pred, proj = (output(found, getattr(model.outputs, name), name) for name in ("pred", "proj"))
    if cfg.method_kwargs.logo.gradient_ratio is not None and pred is not proj and proj.requires_grad:
        (gradient,) = torch.autograd.grad(pred.sum(), proj, allow_unused=True)
        if gradient is None:
            refuse_ratio(cfg.method_kwargs.logo, cfg.method)
    return int(proj.shape[-1])


def output(found: dict[str, Any], key: str, name: str) -> Any:
    """What a method gave under `key`; the error names wrap's argument."""
    if key not in found:
        raise ValueError(f'{name}="{key}" is not an output of this method; it has {", ".join(sorted(found))}.')
    return found[key]


def refuse_ratio(options: Mapping[str, Any], method: str) -> None:
    """ValueError if the options ask for `gradient_ratio`, of a method that hides its projection."""
    ratio, preset = options["gradient_ratio"], options["preset"]
    if ratio is not None and options["affinity"]:
        origin = ""
        if ratio == PRESETS.get(preset, {}).get("gradient_ratio"):
            origin = f" (of {PREFIX}preset={preset})"
        elif options["affinity"] == "cosine" and ratio == LoGoLoss(affinity="cosine").gradient_ratio:
            origin = f" (which {PREFIX}affinity=cosine has unless told)"
        raise ValueError(
            f"{PREFIX}gradient_ratio={ratio}{origin} compares gradients at the projection, and {method} does not "
            f"compute its prediction from it, but from what it normalises to get it. Set a fixed {PREFIX}local_weight "
            "instead."
        )
