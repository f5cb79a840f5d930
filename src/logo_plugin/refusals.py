"""Why LoGo cannot extend a method, in the words that more than one host's adapter needs."""

from typing import NoReturn

OWN_MULTI_CROP = "has a multi-crop of its own: give it local crops as it takes them. LoGo has nothing to add"
DENSE = "compares regions of two images, not their views as a whole. LoGo cannot extend it"


def refuse(subject: str, reason: str) -> NoReturn:
    """ValueError that says of a method, or of a model's loss, why."""
    raise ValueError(f"{subject} {reason} (LoGoLoss can be used directly).")
