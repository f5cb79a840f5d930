"""The run's name: solo-learn's AutoResumer tells runs apart by it, not by `method_kwargs` or `augmentations`."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from logo_plugin.adapters.solo.crops import is_local, side_lengths, usual_augmentations
from logo_plugin.adapters.solo.options import LOCAL, differing
from logo_plugin.adapters.solo.refused import reason
from omegaconf import DictConfig
from solo import methods

from logo_plugin.losses import LoGoLoss

# Options with values that speak for themselves have the value alone.
_SHORT = {
    "affinity": "aff",
    "affinity_hidden_dim": "hid",
    "affinity_norm": "",
    "fast_crops": "fast",
    "weigh_overlap": "iou",
    "local_placement": "",
    "local_predictor": "lpred",
    "local_running_stats": "lstats",
    "preset": "",
    "local_weight": "lambda",
    "gradient_ratio": "ratio",
    "anneal_repulsion": "anneal",
    "local_global_weight": "lg",
    "affinity_loss": "",
    "positive_noise": "noise",
    "repulsion": "",
    "reduction": "",
    "average_targets": "avg",
}
_CONFIGS = {"barlow_twins": "barlow"}
# A file name holds 255 bytes; solo-learn appends a version of up to 16 and the epoch to the checkpoint's.
_COMFORTABLE, _LONGEST = 160, 220


def named(cfg: DictConfig, options: Mapping[str, Any]) -> str:
    """`cfg.name` with what sets the run apart: LoGo's options and crops, or their hash where that is too long.

    Raises:
        ValueError: If the name is one that begins with another method, or leaves no room.
    """
    name = str(cfg.name)
    _refuse_other_method(name, cfg.method)
    suffix = f"-logo{_of_options(options)}{_of_crops(cfg)}"
    short = f"-logo-{hashlib.sha256(suffix.encode()).hexdigest()[:12]}"
    if name.endswith((suffix, short)):
        return name
    found = name + suffix
    if len(found.encode()) > _COMFORTABLE:
        found = name + short
    if len(found.encode()) > _LONGEST:
        raise ValueError(
            f"name has {len(name.encode())} bytes, and with LoGo's suffix and solo-learn's own the checkpoints' file "
            f"names would pass the 255 that a file system allows. Choose name= with at most {_LONGEST - len(short)}."
        )
    return found


def _of_options(options: Mapping[str, Any]) -> str:
    """Always lambda, then what is unusual; not what leaves the training as it is, nor the crops."""
    neutral = ("monitor", "checkpoint_local_crops", *LOCAL)
    chosen = {name: value for name, value in differing(options).items() if name not in neutral}
    if options["gradient_ratio"] is None and options["affinity"]:
        chosen = {"local_weight": LoGoLoss(local_weight=options["local_weight"]).local_weight} | chosen
    return "".join(f"-{_short(name, value)}" for name, value in chosen.items())


def _short(name: str, value: Any) -> str:
    short = _SHORT.get(name, name)
    if isinstance(value, bool):
        return short if value else f"no{short}"
    return f"{short}{_number(value)}" if isinstance(value, (int, float)) else f"{short}{value}"


def _number(value: float) -> str:
    return f"{value:.12g}"


def _of_crops(cfg: DictConfig) -> str:
    """The counts, sizes and scales that are not those of the dataset's overlay, as -l4x96s0.05-0.4."""
    crops = cfg.get("augmentations")
    if not crops:
        return ""
    usual = usual_augmentations(cfg.data.dataset)
    found = ""
    for short, local in (("g", False), ("l", True)):
        described, expected = (
            _described(crop for crop in each if is_local(crop, each[0]) == local) for each in (crops, usual)
        )
        if described != expected:
            found += f"-{short}{described}"
    return found


def _described(crops: Iterable[Any]) -> str:
    counts: Counter[str] = Counter()
    for crop in crops:
        rrc = crop.get("rrc") or {}
        scales = f"s{_number(rrc['crop_min_scale'])}-{_number(rrc['crop_max_scale'])}" if rrc.get("enabled") else ""
        counts["x".join(map(str, side_lengths(crop))) + scales] += crop.get("num_crops", 1)
    return "+".join(f"{count}x{text}" for text, count in counts.items())


def _refuse_other_method(name: str, method: str) -> None:
    """byol.yaml with +logo=simsiam would train SimSiam as byol-imagenet100, with BYOL's hyperparameters."""
    own = method.removeprefix("logo_")
    others = [known for known in methods.METHODS if known not in ("base", "linear") and not known.startswith("logo_")]
    other = next((known for known in others if re.match(rf"{known}(?![a-z0-9])", name.lower())), own)
    if own not in others or other == own:
        return
    why_not = reason(methods.METHODS[other])
    cure = f"LoGo cannot carry {other}: {why_not}" if why_not else f"With {other}'s config choose +logo={other}."
    raise ValueError(
        f"method={method} in a run named {name}: the name, and it seems the config, are {other}'s. For {own} choose "
        f"--config-name={_CONFIGS.get(own, own)}.yaml +logo={own}, or your own name=. {cure}"
    )
