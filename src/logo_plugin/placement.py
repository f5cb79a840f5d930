"""Where local crops lie: anywhere in the image, inside its global crops, or apart from one another."""

from collections.abc import Sequence

import torch

from logo_plugin.augment import Recipe

Box = tuple[int, int, int, int]

PLACEMENTS = ("anywhere", "inside", "apart")
_PLACES = 10  # that a local crop chooses from to be apart


def placed(recipes: Sequence[Recipe], global_crops: int, placement: str, width: int, height: int) -> list[Recipe]:
    """Moves local crops that were drawn anywhere to where `placement` wants them.

    Args:
        recipes: Of the views of one image, globals first.
        global_crops: How many of them are global.
        placement: "anywhere" leaves all as they are and draws no random number; "inside" and "apart" as
            `MultiCropTransform` describes them.
        width: Of the image, in pixels.
        height: Of the image, in pixels.

    Returns:
        The recipes, those of local crops with other boxes.
    """
    if placement == "anywhere":
        return list(recipes)
    boxes = [recipe.box for recipe in recipes]
    large, small = boxes[:global_crops], boxes[global_crops:]
    moved = _inside(small, large) if placement == "inside" else _apart(small, width, height)
    return [recipe._replace(box=box) for recipe, box in zip(recipes, large + moved, strict=True)]


def _inside(boxes: Sequence[Box], large: Sequence[Box]) -> list[Box]:
    """Each in one of the globals, in turn, uniformly; one that is too wide or too high is made to fit."""
    moved = []
    for i, ((left, top, right, bottom), u) in enumerate(zip(boxes, torch.rand(len(boxes), 2).tolist(), strict=True)):
        around = large[i % len(large)]
        most_w, most_h = around[2] - around[0], around[3] - around[1]
        w, h = right - left, bottom - top
        if w > most_w:
            w, h = most_w, min(most_h, round(w * h / most_w))
        elif h > most_h:
            w, h = min(most_w, round(w * h / most_h)), most_h
        left = around[0] + int(u[0] * (most_w - w + 1))
        top = around[1] + int(u[1] * (most_h - h + 1))
        moved.append((left, top, left + w, top + h))
    return moved


def _apart(boxes: Sequence[Box], width: int, height: int) -> list[Box]:
    """Each in turn where it covers the fewest pixels of the others: its own place or one of nine."""
    moved = list(boxes)
    for i, places in enumerate(torch.rand(len(boxes), _PLACES - 1, 2).tolist()):
        others = moved[:i] + moved[i + 1 :]
        w, h = moved[i][2] - moved[i][0], moved[i][3] - moved[i][1]
        least = _covered(moved[i], others)
        for u, v in places:
            if not least:
                break
            left, top = int(u * (width - w + 1)), int(v * (height - h + 1))
            box = left, top, left + w, top + h
            covered = _covered(box, others)
            if covered < least:
                moved[i], least = box, covered
    return moved


def _covered(box: Box, others: Sequence[Box]) -> int:
    """Pixels that a box has in common with others, each counted by itself."""
    left, top, right, bottom = box
    covered = 0
    for x0, y0, x1, y1 in others:
        # Not by min() and max(), which take twice as long: this runs for every place of every local crop.
        across = (right if right < x1 else x1) - (left if left > x0 else x0)
        down = (bottom if bottom < y1 else y1) - (top if top > y0 else y0)
        if across > 0 and down > 0:
            covered += across * down
    return covered
