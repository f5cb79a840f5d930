"""The options of `LoGoLoss` as the paper and its official release have them."""

from collections.abc import Mapping
from typing import Any

from logo_plugin.checks import choice

# Each spells out every option, so that no preset moves when a default does.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "local_weight": 1e-4,
        "gradient_ratio": None,
        "anneal_repulsion": False,
        "local_global_weight": 1.0,
        "affinity_loss": "difference",
        "positive_noise": 0.0,
        "repulsion": "logit",
        "reduction": "sum",
        "average_targets": False,
    },
    "release": {
        "local_weight": None,
        "gradient_ratio": 0.015,
        "anneal_repulsion": False,
        "local_global_weight": 1.0,
        "affinity_loss": "logistic",
        "positive_noise": 0.3,
        "repulsion": "softplus",
        "reduction": "pairs",
        "average_targets": False,
    },
}

# The usual strength of the repelled cosine beside a queue of negatives, which keep images apart; else it is LoGoLoss's.
QUEUE_RATIO = 0.3


def with_queue(options: Mapping[str, Any], affinity: object) -> dict[str, Any]:
    """Arguments of `LoGoLoss` for a method with a queue of negatives (MoCo): `QUEUE_RATIO` unless a strength is given.

    Args:
        options: What was given, a preset's included; None counts as not given.
        affinity: The argument of that name. Only the cosine's strength depends on the method.
    """
    told = any(options.get(strength) is not None for strength in ("local_weight", "gradient_ratio"))
    return {**options} if told or affinity != "cosine" else {**options, "gradient_ratio": QUEUE_RATIO}


def with_preset(name: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `LoGoLoss`: the given ones over those of a preset.

    Args:
        name: A key of `PRESETS`, or None for no preset.
        options: What was given; None counts as not given. Either of `local_weight` and `gradient_ratio`
            replaces both of the preset's, since they exclude each other.

    Raises:
        ValueError: If there is no such preset.
    """
    preset = {} if name is None else PRESETS[choice("preset", name, tuple(PRESETS))]
    given = {option: value for option, value in options.items() if value is not None}
    if given.keys() & {"local_weight", "gradient_ratio"}:
        preset = preset | {"local_weight": None, "gradient_ratio": None}
    return preset | given
