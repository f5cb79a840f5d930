"""stable-pretraining: how its batches hold views, and how its method classes are called with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from logo_plugin.crops import CropBoxes


def read_batch(batch: Any, count: int, model: str) -> tuple[list[Tensor], dict[str, Any], CropBoxes | None]:
    """The images of a batch, global ones first; the batch with its global views alone; and the crops' boxes.

    Args:
        batch: {"views": [view, ...]}, {"global_0": view, ..., "local_0": view, ...}, or such a dict as "views", a view
            being {"image": (N, C, H, W), ...}; a tensor counts as one that has the batch's other columns.
        count: How many views are global.
        model: The model's name, for errors.

    Raises:
        ValueError: If it is another.
    """
    columns: dict[Any, Any] = batch if isinstance(batch, dict) else {}
    views, names, local = columns.get("views", columns), list[Any](), list[Any]()
    if isinstance(views, dict):
        names, local = ([name for name in views if str(name).startswith(kind)] for kind in ("global", "local"))
        if len(names) not in (0, count):
            raise ValueError(
                f"the batch has {len(names)} global views, and {model} with LoGo takes {count}: change the transform, "
                f"or give global_crops={len(names)}."
            )
        views = [views[name] for name in (*names, *local)]
    others = {name: value for name, value in columns.items() if name not in {"views", *names, *local}}
    boxes = others.pop("boxes", None)
    views = [{**others, "image": view} if isinstance(view, Tensor) else view for view in views or []]
    if not views or not all(isinstance(view, dict) and isinstance(view.get("image"), Tensor) for view in views):
        got = f"a dict of {sorted(map(str, batch))}" if isinstance(batch, dict) else f"a {type(batch).__name__}"
        raise ValueError(
            f"{model} with LoGo trains on batches of views, {{'views': [{{'image': ...}}, ...]}} or {{'global_0': "
            f"{{'image': ...}}, ..., 'local_0': ...}}, got {got}. Give the data loader "
            "collate_fn=MultiCropCollate(...), and its dataset no transform."
        )
    # Always as a list: the host's forwards count "batch_idx" among named views.
    own = {**others, **dict(zip(names, views, strict=False)), "views": views[:count]}
    return [view["image"] for view in views], own, boxes


def forward_batch(model: Any, forward: Callable[..., Any], batch: dict[str, Any], stage: str) -> dict[str, Any]:
    """What the classes of methods/ lack, a forward that takes a batch, as benchmarks/imagenet10/two_view.py has it."""
    views = [batch] if "image" in batch else batch["views"]
    output = forward(*(view["image"] for view in views))
    out = {"embedding": output.embedding.detach()}
    if len(views) > 1:
        out["loss"] = output.loss
        model.log(f"{stage}/loss", output.loss, on_step=True, on_epoch=True, sync_dist=True)
    if "label" in views[0]:
        copies = max(len(out["embedding"]) // len(views[0]["label"]), 1)
        out["label"] = torch.cat([view["label"] for view in views[:copies]]).long()
    return out
