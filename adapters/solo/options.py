"""`method_kwargs.logo.*`: what there is, and the checks that need no model."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from logo_plugin.checks import choice, positive_integer, unknown_option
from logo_plugin.losses import LoGoLoss
from logo_plugin.placement import PLACEMENTS
from logo_plugin.presets import PRESETS, with_preset, with_queue

# Of the local crops that are added to a config without any. None of size: as `crops.py` has it for the global ones'.
LOCAL: dict[str, Any] = {"local_crops": 2, "local_size": None, "local_scale": (0.05, 0.4)}
OWN: dict[str, Any] = dict.fromkeys(LOCAL) | {
    "affinity": None,
    "affinity_hidden_dim": 256,
    "affinity_norm": "batch",
    "fast_crops": False,
    "weigh_overlap": False,
    "local_placement": "anywhere",
    "local_predictor": False,
    "checkpoint_local_crops": False,
    "local_running_stats": True,
    "preset": None,
    "monitor": False,
}
# The adapter's own keys, and every keyword of LoGoLoss that a config can hold.
OPTIONS: dict[str, Any] = OWN | {
    name: parameter.default
    for name, parameter in inspect.signature(LoGoLoss).parameters.items()
    if name not in ("affinity", "similarity")
}
PREFIX = "method_kwargs.logo."
_LEARNED = ("affinity_hidden_dim", "affinity_norm", "affinity_loss", "positive_noise")
_Setting = Callable[[Mapping[str, Any]], bool]
# (a setting, whether it is made, what then has no effect)
_IDLE: list[tuple[str, _Setting, tuple[str, ...]]] = [
    (
        "affinity=cosine",
        lambda options: options["affinity"] == "cosine",
        (*_LEARNED, "repulsion"),
    ),
    (
        "affinity=false",
        lambda options: not options["affinity"],
        (*_LEARNED, "local_weight", "gradient_ratio", "anneal_repulsion", "repulsion", "weigh_overlap"),
    ),
    (
        "local_weight=0",
        lambda options: options["local_weight"] == 0,
        ("anneal_repulsion", "repulsion", "weigh_overlap"),
    ),
    (
        "local_global_weight=0",
        lambda options: options["local_global_weight"] == 0,
        ("average_targets", "local_predictor"),
    ),
]


def checked(given: Any, *, hidden: bool = False, queue: bool = False) -> dict[str, Any]:
    """All options, each as given, as the preset has it, or at its default.

    Args:
        given: The mapping of the config, if it has one.
        hidden: The method hides how a prediction comes from the projection, which `gradient_ratio` has to know.
        queue: The method compares with a queue of negatives.

    Raises:
        ValueError: If one is unknown, out of its range, or has no effect beside another one.
    """
    given = (
        OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else {} if given is None else given
    )
    if not isinstance(given, dict):
        raise ValueError(f"method_kwargs.logo must be a mapping of options, got {given!r}.")
    for name in given:
        if name not in OPTIONS:
            raise ValueError(unknown_option(str(name), OPTIONS, PREFIX))
    given = {name: value for name, value in given.items() if value is not None}
    fast = given.get("fast_crops", False)
    if not isinstance(fast, bool) and fast != "augment":
        raise ValueError(f'{PREFIX}fast_crops must be true, false or "augment", got {fast!r}.')
    affinity = given.get("affinity")
    if not (affinity is None or affinity is False or affinity in ("cosine", "learned")):
        raise ValueError(f"{PREFIX}affinity must be cosine, learned or false, got {given['affinity']!r}.")
    for name, default in OWN.items():
        if name != "fast_crops" and isinstance(default, bool) and not isinstance(given.get(name, False), bool):
            raise ValueError(f"{PREFIX}{name} must be true or false, got {given[name]!r}.")
    try:
        options = OPTIONS | with_preset(given.get("preset"), given)
        if affinity is None:
            told = options["local_weight"] is not None or options["gradient_ratio"] is not None
            options["affinity"] = "learned" if options["preset"] else (told or not hidden) and "cosine"
        _refuse_idle(options)
        # A module stands in for what is built later.
        scorer = nn.CosineSimilarity() if options["affinity"] == "learned" else options["affinity"] or None
        core = {name: options[name] for name in options if name not in OWN}
        made = LoGoLoss(affinity=scorer, **with_queue(core, scorer) if queue else core)
        # The cosine has defaults of its own.
        options |= {"gradient_ratio": made.gradient_ratio, "anneal_repulsion": made.anneal_repulsion}
    except ValueError as error:
        raise ValueError(f"method_kwargs.logo: {error}") from error
    positive_integer(f"{PREFIX}affinity_hidden_dim", options["affinity_hidden_dim"])
    if options["affinity_norm"] not in ("batch", "layer"):
        raise ValueError(f'{PREFIX}affinity_norm must be "batch" or "layer", got {options["affinity_norm"]!r}.')
    choice(f"{PREFIX}local_placement", options["local_placement"], PLACEMENTS)
    _check_local(options)
    if options["weigh_overlap"] and not options["fast_crops"]:
        raise ValueError(f"{PREFIX}weigh_overlap needs the crops' boxes: set {PREFIX}fast_crops=true.")
    if options["local_placement"] != "anywhere" and not options["fast_crops"]:
        raise ValueError(
            f"{PREFIX}local_placement={options['local_placement']} needs logo_plugin's own crops: set "
            f"{PREFIX}fast_crops=true."
        )
    return options


def differing(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not as the defaults or the named preset have them."""
    usual = OPTIONS | {"anneal_repulsion": options["affinity"] == "cosine"}
    if options["preset"]:
        usual |= {"affinity": "learned"} | PRESETS[options["preset"]]
    return {name: value for name, value in options.items() if value not in (None, usual[name])}


def _check_local(options: Mapping[str, Any]) -> None:
    crops, size, scale = (options[name] for name in LOCAL)
    if crops is not None:
        positive_integer(f"{PREFIX}local_crops", crops)
    if isinstance(size, list) and len(size) != 2:
        raise ValueError(f"{PREFIX}local_size must be one number or two, height and width, got {size}.")
    for side in size if isinstance(size, list) else [] if size is None else [size]:
        positive_integer(f"{PREFIX}local_size", side)
    if scale is None:
        return
    numbers = isinstance(scale, list) and len(scale) == 2 and all(isinstance(x, (int, float)) for x in scale)
    if not (numbers and 0 < scale[0] <= scale[1] <= 1):
        raise ValueError(
            f"{PREFIX}local_scale must be the least and the greatest part of the image, as [0.05,0.4], got {scale}."
        )


def _refuse_idle(options: Mapping[str, Any]) -> None:
    chosen = differing(options)
    for setting, made, idle in _IDLE:
        found = [name for name in idle if name in chosen] if made(options) else []
        if found:
            what = ", ".join(f"{PREFIX}{name}={_as_written(chosen[name])}" for name in found)
            raise ValueError(
                f"{what}: without effect beside {PREFIX}{setting}. Leave {'it' if len(found) == 1 else 'them'} out, "
                f"or change {PREFIX}{setting}."
            )


def _as_written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
