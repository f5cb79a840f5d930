"""`LoGoMonitor`, a callback for either Lightning: `lightning.pytorch` (solo-learn) or `pytorch_lightning` (lightly)."""

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from logo_plugin.checks import choice, flag
from logo_plugin.crops import MultiCropTransform
from logo_plugin.diagnostics import diagnose
from logo_plugin.losses import LoGoLoss, LoGoTerms
from logo_plugin.picture import headings, visible

_IMAGES = 128  # measured of a batch: bounds what the eigenvalues cost, however large batch and projection are
_COLLAPSED, _PATIENCE = 0.1, 10
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _callback() -> Any:
    """The base class, of the Lightning that is in use; its hooks are those of the other."""
    for package in sorted(_PACKAGES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(package).Callback
        except ModuleNotFoundError:
            continue
    raise ModuleNotFoundError("LoGoMonitor needs Lightning: pip install lightning, or pip install pytorch_lightning.")


_Callback: Any = _callback()


class LoGoMonitor(_Callback):
    """Logs what `logo_plugin.diagnose` finds in the training batches, and pictures of the crops, to every logger.

    The values are logged as `logo/embedding_std` and so on, with the steps that Lightning's own metrics
    have. They are of the first 128 images of the batch and, with several processes, of the first process
    only: nothing is exchanged. LoGo's terms are logged by the adapters, with or without the monitor.

    It warns of two things, with nothing exchanged and no more than once a run each: that a term was nan or
    infinite, and in which step first (kept on the device at every step, looked at when it is time to measure; on
    every process); and that `embedding_std` was below 0.1 ten measurements in a row, which is a collapse.

    Pictures go to TensorBoard and W&B as `logo/crops`, and beside the file of a `CSVLogger` (or of any
    logger that has a `log_dir`) as `logo_crops/epoch_0000.png`.

    Args:
        every_n_steps: Optimizer steps between two measurements. None takes the trainer's `log_every_n_steps`.
        crops_every_n_epochs: Epochs between two pictures, taken of the epoch's first batch. None: no pictures.
        images: Rows of a picture; each shows the crops of one image, globals first.
        nonfinite: What to do about a term that is nan or infinite: "warn", "raise" a RuntimeError, or "ignore".
        warn_collapse: Whether to warn of a collapse.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> trainer = Trainer(callbacks=[LoGoMonitor()])
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        crops_every_n_epochs: int | None = 1,
        images: int = 8,
        *,
        nonfinite: Literal["warn", "raise", "ignore"] = "warn",
        warn_collapse: bool = True,
    ) -> None:
        super().__init__()
        optional = {"every_n_steps": every_n_steps, "crops_every_n_epochs": crops_every_n_epochs}
        for name, value in {"images": images, **optional}.items():
            if (type(value) is not int or value < 1) and (value is not None or name not in optional):
                expected = "a positive integer" + (" or None" if name in optional else "")
                raise ValueError(f"{name} must be {expected}, got {value!r}.")
        choice("nonfinite", nonfinite, ("warn", "raise", "ignore"))
        flag("warn_collapse", warn_collapse)
        self.every_n_steps, self.crops_every_n_epochs, self.images = every_n_steps, crops_every_n_epochs, images
        self.nonfinite, self.warn_collapse = nonfinite, warn_collapse
        self._measured = self._step = 0
        self._proj: list[Tensor] | None = None  # what was measured last
        self._draw: list[Callable[[Tensor, int, int], None]] = []
        self._first_bad: Tensor | None = None
        self._collapsed, self._said_collapse = 0, False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Checks the model.

        Raises:
            TypeError: If it is not wrapped.
        """
        wrapped = isinstance(getattr(pl_module, "logo", None), LoGoLoss) and hasattr(pl_module, "logo_local_proj")
        if stage == "fit" and not wrapped:
            raise TypeError(
                f"LoGoMonitor measures what LoGo computes, and {type(pl_module).__name__} is not wrapped: use "
                "wrap(model), or one of the logo_* methods in solo-learn."
            )

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Finds out which loggers take pictures, and warns of those that don't."""
        self._draw = []
        self._first_bad, self._collapsed, self._said_collapse = None, 0, False
        if not trainer.is_global_zero or self.crops_every_n_epochs is None:
            return
        for logger in trainer.loggers:
            draw = _picture_writer(logger)
            if draw is not None:
                self._draw.append(draw)
            else:
                warnings.warn(
                    f"LoGoMonitor knows no way to give {type(logger).__name__} a picture; it gets numbers only.",
                    stacklevel=2,
                )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """A run that is resumed knows its step by now."""
        self._measured = self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measures and draws when it is time to."""
        # Where Lightning logs; several optimizers count on their own.
        step = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", max(0, trainer.global_step - 1))
        interval = self.every_n_steps or trainer.log_every_n_steps
        # With accumulated gradients several batches end on one step.
        due = interval and trainer.global_step % interval == 0 and trainer.global_step != self._measured
        if self.nonfinite != "ignore":
            self._watch(getattr(pl_module, "logo_terms", None))
            self._step = trainer.global_step  # that of the next batch
            if due:
                self._report_nonfinite(trainer)
        if not trainer.is_global_zero:
            return
        if self._draw and batch_idx == 0 and trainer.current_epoch % self.crops_every_n_epochs == 0:
            picture = _picture(_views(batch), self.images, trainer, _global_crops(pl_module))
            for draw in self._draw:
                draw(picture, trainer.current_epoch, step)
        if not due:
            return
        self._measured = trainer.global_step
        proj = pl_module.logo_local_proj
        # A last batch of one image; a step that did without LoGo.
        if proj is None or len(proj[0]) < 2 or proj is self._proj or not (trainer.loggers or self.warn_collapse):
            return
        self._proj = proj
        found = diagnose([z[:_IMAGES] for z in proj], pl_module.logo.affinity)
        for logger in trainer.loggers:
            logger.log_metrics({f"logo/{name}": value for name, value in found.items()}, step=step)
        self._look_for_collapse(found["embedding_std"])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Says what a run shorter than an interval had."""
        self._report_nonfinite(trainer)

    def _watch(self, terms: LoGoTerms | None) -> None:
        """Keeps for each term the first step in which it was not finite, where the terms are: no device waits."""
        if terms is None:
            return
        values = torch.stack([term.detach().float() for term in terms])
        if self._first_bad is None:
            self._first_bad = torch.full_like(values, torch.inf)
        # nan is no less than itself, so neither comparison holds for it.
        bad = ~(values.abs() < torch.inf)
        self._first_bad = torch.where(bad & self._first_bad.isinf(), float(self._step), self._first_bad)

    def _report_nonfinite(self, trainer: Any) -> None:
        """The only look at them: it waits for the device."""
        if self._first_bad is None:
            return
        first = zip(LoGoTerms._fields, self._first_bad.tolist(), strict=True)
        found = {name: int(at) for name, at in first if 0 <= at < math.inf}
        if not found:
            return
        self._first_bad = torch.full_like(self._first_bad, -1.0)  # once a run
        step = min(found.values())
        names = [name for name, at in found.items() if at == step]
        rank = f", process {trainer.global_rank}" if trainer.world_size > 1 else ""
        message = (
            f"nan or infinite since step {step}{rank}: LoGo's {', '.join(names)}. Look at that step's batch for values "
            "that are not finite, lower the learning rate, or train in bfloat16 rather than float16. "
            'LoGoMonitor(nonfinite="raise") stops a run there, "ignore" keeps silent.'
        )
        if self.nonfinite == "raise":
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)

    def _look_for_collapse(self, std: float) -> None:
        self._collapsed = self._collapsed + 1 if std < _COLLAPSED else 0
        if self.warn_collapse and self._collapsed == _PATIENCE and not self._said_collapse:
            self._said_collapse = True
            warnings.warn(
                f"the projections have collapsed: logo/embedding_std was below {_COLLAPSED} {_PATIENCE} times in a row "
                f"(now {std:.2g}; 0 is one point for all images, 1 spread evenly). Lower the learning rate, check that "
                "predictor and stop-gradient are in place, and compare with affinity=None. "
                "LoGoMonitor(warn_collapse=False) keeps silent.",
                stacklevel=2,
            )


def _picture_writer(logger: Any) -> Callable[[Tensor, int, int], None] | None:
    """Asks for methods, not classes: each Lightning has its own classes."""
    if callable(getattr(logger, "log_image", None)):  # W&B
        return lambda picture, epoch, step: logger.log_image("logo/crops", [to_pil_image(picture)], step=step)
    if callable(getattr(getattr(logger, "experiment", None), "add_image", None)):  # TensorBoard
        return lambda picture, epoch, step: logger.experiment.add_image("logo/crops", picture, step)
    if logger.log_dir is not None:
        return partial(_save, Path(logger.log_dir) / "logo_crops")
    return None


def _views(batch: Any) -> list[Tensor]:
    """The views of a batch, which the hosts have as a list among its items, or as dicts with an "image"."""
    if isinstance(batch, dict):
        views = batch.get("views", batch)
        if isinstance(views, dict):
            views = [views[name] for kind in ("global", "local") for name in views if str(name).startswith(kind)]
        batch = [[view["image"] if isinstance(view, dict) else view for view in views]]
    for item in batch:
        if isinstance(item, (list, tuple)) and item and isinstance(item[0], Tensor) and item[0].ndim == 4:
            return [view for view in item if view.ndim == 4]  # MultiCropTransform's may end with the crops' boxes
    raise ValueError(
        f"LoGoMonitor found no views (N, C, H, W) in a batch of {[type(item).__name__ for item in batch]}."
    )


def _global_crops(model: Any) -> int:
    settings = getattr(model, "logo_settings", None)
    return int(settings.globals if settings else getattr(model, "num_large_crops", 2))  # solo-learn's name


def _picture(views: Sequence[Tensor], images: int, trainer: Any, global_crops: int) -> Tensor:
    """A grid, uint8 (3, H, W), with a row for each image: its crops, each at its own size, under two headings."""
    loader = trainer.train_dataloader
    makers, dataset = [getattr(loader, "collate_fn", None)], getattr(loader, "dataset", None)
    while dataset is not None:  # inside Subset, random_split's
        makers.append(getattr(dataset, "transform", None))
        dataset = getattr(dataset, "dataset", None)
    # MultiCropTransform's or solo-learn's FastCrops'. Where they are not known ImageNet's: colours are off by little.
    known: Any = next((maker for maker in makers if isinstance(getattr(maker, "std", None), tuple)), MultiCropTransform)
    height, width = (max(view.shape[i] for view in views) for i in (2, 3))
    columns = []
    for view in views:
        down, across = height - view.shape[2], width - view.shape[3]
        pixels = visible(view[:images], known.mean, known.std)
        columns.append(F.pad(pixels, (across // 2, across - across // 2, down // 2, down - down // 2), value=1.0))
    grid: Tensor = make_grid(torch.stack(columns, 1).flatten(0, 1), nrow=len(views), pad_value=1.0)
    column = grid.shape[2] // len(views)
    left = column * global_crops
    words = headings({"global": left, "local": grid.shape[2] - left})
    return torch.cat([words, (grid * 255).round().to(torch.uint8)], dim=1)


def _save(folder: Path, picture: Tensor, epoch: int, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    to_pil_image(picture).save(folder / f"epoch_{epoch:04}.png")
