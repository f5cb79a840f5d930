"""Multi-crop views of a batch: decode once, crop, resize, augment."""

import copy
import functools
import math
import operator
import os
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from logo_plugin.affinity import full_precision
from logo_plugin.augment import Recipe, augment, blur_radius, sent, table
from logo_plugin.checks import choice, unknown_option
from logo_plugin.decoding import ImageLike, UndecodableError, decode, placed_error
from logo_plugin.placement import PLACEMENTS, placed

Range = tuple[float, float]
T = TypeVar("T", bound="MultiCropTransform")


class CropBoxes(NamedTuple):
    """Where the views of a batch come from.

    Attributes:
        boxes: (V, N, 4), float32, as (left, top, right, bottom) in pixels of the source image.
        flips: (V, N), bool, whether the view was mirrored afterwards.
    """

    boxes: Tensor
    flips: Tensor


class DeferredViews:
    """Views as the workers leave them with `defer`: uint8, to be finished on the device.

    Call `.to(device)` once per batch; it gives the list of views. Lightning does so by itself. To
    index or iterate over it raises a TypeError, so that unfinished views never reach a model.
    """

    def __init__(
        self, views: list[Tensor], recipes: list[list[Recipe]] | None, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self._views, self._mean, self._std = views, mean, std
        self._tables = None if recipes is None else [table(of_view) for of_view in recipes]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> list[Tensor]:
        """Moves the crops to `device`, augments them there with the parameters drawn by the workers, normalises.

        Args:
            device: Where the model is, also "cpu".
            non_blocking: As in `Tensor.to`; what is pinned (`pin_memory`) never blocks.

        Returns:
            The views, globals first, each (N, C, H, W), float32.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"views are finished in float32 on a device, got {device}: write .to(device), then convert."
            )
        # Pinned ones as Lightning moves pinned tensors.
        views = [sent(view, device, non_blocking=non_blocking or view.is_pinned()) for view in self._views]
        shift, scale = (sent(x, device) for x in _statistics(tuple(self._mean), tuple(self._std)))
        tables: list[Any] = [None] * len(views) if self._tables is None else self._tables
        if views[0].device.type == "cpu":
            return [_finished(view, drawn, shift, scale) for view, drawn in zip(views, tables, strict=True)]
        done: list[Tensor] = []
        for _, group in groupby(zip(views, tables, strict=True), key=lambda pair: pair[0].shape):
            parts, drawn = zip(*group, strict=True)  # together: each operator is a kernel that has to be launched
            whole = torch.cat(parts) if self._tables is None else augment(torch.cat(parts), np.concatenate(drawn))
            done += whole.sub(shift).mul_(scale).chunk(len(parts))
        return done

    def pin_memory(self) -> "DeferredViews":
        """For `DataLoader(pin_memory=True)`."""
        pinned = copy.copy(self)
        pinned._views = [view.pin_memory() for view in self._views]
        return pinned

    def _unfinished(self, *_: object) -> Any:
        raise TypeError(
            "these views are not finished: MultiCropCollate(defer=...) leaves work to the device. "
            "Write `views = batch[0].to(device)` before using them."
        )

    __iter__ = __len__ = __getitem__ = cuda = _unfinished


@dataclass(frozen=True, kw_only=True)
class MultiCropTransform:
    """An image in, its views out: the paper's crops and augmentations, as a dataset transform.

    Each view is a random resized crop, mirrored, jittered in colour, turned gray, blurred, solarised
    and normalised, each with its own probability. All randomness comes from torch's global generator.

    Args:
        global_crops: Number of global views.
        local_crops: Number of local views, may be 0.
        global_size: Side of a global view in pixels.
        local_size: Side of a local view in pixels.
        global_scale: Range of a global crop's area, as a fraction of the image's.
        local_scale: Range of a local crop's area.
        local_placement: Where local crops lie. Their sizes are drawn alike for all three.

            "anywhere": in the image, uniformly.

            "inside": each inside a global crop of the image, uniformly there; the first local crop in the first
            global, the second in the second, and so on, from the first again. `local_scale` stays a fraction of the
            image. A crop that is wider than its global becomes as wide as that, and so much higher that its area
            stays, at most as high as the global; one that is higher likewise. So its width / height stays between
            its own and the global's, and one whose area is not below the global's becomes the global itself.

            "apart": each local crop in turn chooses, of ten places (its own and nine more, uniform in the image), the
            first where it has the fewest pixels in common with the other local crops. Where two large crops
            can't miss each other an overlap remains. Crops so placed are nearer to the image's border than others.
        ratio: Range of the width / height of a crop.
        flip_p: Probability of mirroring.
        jitter_p: Probability of the colour jitter.
        brightness: Brightness factor is drawn from [1 - brightness, 1 + brightness].
        contrast: The same for contrast.
        saturation: The same for saturation.
        hue: Hue is shifted by up to this part of a full turn, at most 0.5.
        grayscale_p: Probability of grayscale.
        blur_p: Probability of Gaussian blur.
        blur_sigma: Range of the blur's standard deviation in pixels.
        solarize_p: Probability of inverting the pixels >= 128.
        mean: Per channel, subtracted, for images in [0, 1]. As many numbers as the images have channels, which
            may be other than red, green and blue; `hue`, `saturation` and `grayscale_p` must then be 0.
        std: Per channel, divided by.
        return_boxes: Give the crops' boxes too: here as a last item of the list, (V, 4), of which torch's
            own collate makes (N, V, 4).

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an option is out of its range.
    """

    global_crops: int = 2
    local_crops: int = 2
    global_size: int = 224
    local_size: int = 96
    global_scale: Range = (0.4, 1.0)
    local_scale: Range = (0.05, 0.4)
    local_placement: Literal["anywhere", "inside", "apart"] = "anywhere"
    ratio: Range = (3 / 4, 4 / 3)
    flip_p: float = 0.5
    jitter_p: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma: Range = (0.1, 2.0)
    solarize_p: float = 0.0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    return_boxes: bool = False

    def __new__(cls: type[T], *positional: Any, **options: Any) -> T:
        """Refuses what the dataclass's own `__init__` would, with a message that helps."""
        if "__dataclass_fields__" not in vars(next(base for base in cls.__mro__ if "__init__" in vars(base))):
            return super().__new__(cls)  # a subclass whose own __init__ says what it takes
        valid = {option.name for option in fields(cls) if option.init}
        if positional:
            raise TypeError(
                f"{cls.__name__} takes its options by name, as in global_size=224; got {reprlib.repr(positional)}. If "
                f"a DataLoader or dataset was given the class, give it an instance, {cls.__name__}()."
            )
        for name in options.keys() - valid:
            raise TypeError(f"{cls.__name__}: {unknown_option(name, valid)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, least in {"global_crops": 1, "global_size": 1, "local_size": 1, "local_crops": 0}.items():
            _check(self, name, f"an integer >= {least}", functools.partial(_integer, least))
            object.__setattr__(self, name, operator.index(getattr(self, name)))  # numpy's, too
        for name in ("global_scale", "local_scale"):
            _check(self, name, "(low, high) with 0 < low <= high <= 1", lambda v: 0 < v[0] <= v[1] <= 1 and len(v) == 2)
        choice("local_placement", self.local_placement, PLACEMENTS)
        for name in ("ratio", "blur_sigma"):
            _check(
                self, name, "(low, high) with 0 < low <= high", lambda v: 0 < v[0] <= v[1] < math.inf and len(v) == 2
            )
        for name in ("flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p"):
            _check(self, name, "a probability in [0, 1]", lambda v: 0 <= v <= 1)
        for name in ("brightness", "contrast", "saturation"):
            _check(self, name, "a finite number >= 0", lambda v: 0 <= v < math.inf)
        _check(self, "hue", "a number in [0, 0.5]", lambda v: 0 <= v <= 0.5)
        _check(self, "mean", "a number per channel", lambda v: len(v) >= 1 and all(math.isfinite(x) for x in v))
        _check(self, "return_boxes", "True or False", lambda v: isinstance(v, bool))
        channels, rgb_only = len(self.mean), ("hue", "saturation", "grayscale_p")
        expected = f"{channels} numbers > 0, as many as mean has"
        _check(self, "std", expected, lambda v: len(v) == channels and all(0 < x < math.inf for x in v))
        for name in ("mean", "std"):  # tensors and numpy's numbers, too, and not as many new ones for every image
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        if channels != 3 and (given := [f"{name}={getattr(self, name)}" for name in rgb_only if getattr(self, name)]):
            raise ValueError(
                f"{', '.join(given)}: for red, green and blue only, and mean={self.mean} says that images have "
                f"{channels} channel{'s' if channels > 1 else ''}. Set hue=0, saturation=0, grayscale_p=0."
            )
        smallest = min(self.global_size, self.local_size if self.local_crops else self.global_size)
        if self.blur_p and smallest <= blur_radius(self.blur_sigma[1]):
            raise ValueError(
                f"blur_sigma={self.blur_sigma} needs crops larger than {blur_radius(self.blur_sigma[1])} pixels, "
                f"got {smallest}: lower blur_sigma or set blur_p=0."
            )

    @classmethod
    def cifar10(cls: type[T], **overrides: Any) -> T:
        """The options for CIFAR images: views of 32 and 16 pixels, no blur, CIFAR-10's mean and std.

        The paper's local views have 32 pixels, too, and cost as much as global ones: `cifar10(local_size=32)`.

        Args:
            **overrides: Options that replace or add to these.
        """
        options: dict[str, Any] = {
            "global_size": 32,
            "local_size": 16,
            "blur_p": 0.0,
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2023, 0.1994, 0.2010),
        }
        return cls(**(options | overrides))

    def __call__(self, image: ImageLike) -> list[Tensor]:
        """Makes the views of one image.

        Args:
            image: PIL image, encoded bytes (JPEG, PNG, WebP, ...), a path, array (H, W) or (H, W, C), or tensor
                (C, H, W). Arrays and tensors are uint8, uint16 or floating point in [0, 1]; C is as many as `mean` has
                numbers, or 1 where those are 3.

        Returns:
            The views, globals first, each (C, size, size), float32, normalised. With `return_boxes` then
            their boxes, (V, 4), float32, as (left, top, right, bottom) in pixels of the image.

        Raises:
            ValueError: If the image cannot be decoded.
            TypeError: If it is none of these kinds.
        """
        if isinstance(image, Mapping) and image.keys() != {"bytes", "path"}:
            raise TypeError(
                f"MultiCropTransform takes an image, got a dict of {', '.join(map(str, image))}. Hand it the image "
                "alone; or leave the dataset without a transform (Hugging Face's without with_transform) and give the "
                'DataLoader collate_fn=MultiCropCollate(image_key="image", target_key="label"), or what they are named.'
            )
        if isinstance(image, list) and image and isinstance(image[0], (tuple, Mapping, Tensor, Image.Image)):
            raise TypeError(
                f"MultiCropTransform takes one image, got a list of {len(image)}. For a batch, as collate_fn of a "
                "DataLoader, use MultiCropCollate, which has the same options."
            )
        pixels = decode(image, len(self.mean))
        recipes = self.draw(pixels.shape[1], pixels.shape[0])
        views = self._empty(np.float32)
        self._render(pixels, recipes, views)
        if self.return_boxes:
            views.append(torch.tensor([recipe.box for recipe in recipes], dtype=torch.float32))
        return views

    def draw(self, width: int, height: int) -> list[Recipe]:
        """Draws what becomes of each view, globals first, from torch's global generator.

        Args:
            width: Of the source image, in pixels.
            height: Of the source image, in pixels.
        """
        recipes = []
        for view, u in enumerate(torch.rand(self.global_crops + self.local_crops, 54).tolist()):
            scale = self.global_scale if view < self.global_crops else self.local_scale
            jitter = u[1] < self.jitter_p
            recipe = Recipe(
                box=self._draw_box(width, height, scale, u[14:]),
                flip=u[0] < self.flip_p,
                brightness=_between(max(0.0, 1 - self.brightness), 1 + self.brightness, u[2]) if jitter else 1.0,
                contrast=_between(max(0.0, 1 - self.contrast), 1 + self.contrast, u[3]) if jitter else 1.0,
                saturation=_between(max(0.0, 1 - self.saturation), 1 + self.saturation, u[4]) if jitter else 1.0,
                hue=_between(-self.hue, self.hue, u[5]) if jitter else 0.0,
                order=tuple(sorted(range(4), key=u[6:10].__getitem__)),
                gray=u[10] < self.grayscale_p,
                sigma=_between(*self.blur_sigma, u[12]) if u[11] < self.blur_p else 0.0,
                solarize=u[13] < self.solarize_p,
            )
            recipes.append(recipe)
        return placed(recipes, self.global_crops, self.local_placement, width, height)

    def _draw_box(self, width: int, height: int, scale: Range, u: Sequence[float]) -> tuple[int, int, int, int]:
        """As torchvision's RandomResizedCrop: ten attempts, then the largest central crop within `ratio`."""
        low, high = map(math.log, self.ratio)
        for attempt in range(10):
            area = width * height * _between(*scale, u[4 * attempt])
            aspect = math.exp(_between(low, high, u[4 * attempt + 1]))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left = int(u[4 * attempt + 2] * (width - w + 1))
                top = int(u[4 * attempt + 3] * (height - h + 1))
                return left, top, left + w, top + h
        w, h = width, height
        if width / height < self.ratio[0]:
            h = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            w = max(1, round(height * self.ratio[1]))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def _empty(self, dtype: type[np.generic], *batch: int) -> list[Tensor]:
        sizes = [self.global_size] * self.global_crops + [self.local_size] * self.local_crops
        return [_fresh((*batch, len(self.mean), size, size), dtype) for size in sizes]

    def _render(
        self, pixels: Tensor, recipes: Sequence[Recipe], out: list[Tensor], defer: str | None = None, batch: int = 1
    ) -> None:
        """Makes the views of one image in `out`; of one of a batch but for what `_finish` does for all of them."""
        shift, scale = _statistics(self.mean, self.std)
        with torch.inference_mode():  # a tenth less per operation
            for recipe, view in zip(recipes, out, strict=True):
                x = _crop(pixels, recipe, *view.shape[:2])
                if defer == "augment" or _at_once(view, batch) > 1:
                    view.copy_(x[0])
                else:
                    _written(view[None], augment(x, [recipe]), shift, scale)

    def _finish(self, views: list[Tensor], recipes: list[list[Recipe]], defer: str | None) -> None:
        """Augments what `_render` has left, of a batch (N, C, H, W) for each view."""
        shift, scale = _statistics(self.mean, self.std)
        with torch.inference_mode():
            for view, drawn in zip(views, recipes, strict=True):
                count = _at_once(view, len(view))
                if defer != "augment" and count > 1:
                    for n in range(0, len(view), count):
                        some = view[n : n + count]
                        _written(some, augment(some, drawn[n : n + count]), shift, scale)


@dataclass(frozen=True, kw_only=True)
class MultiCropCollate(MultiCropTransform):
    """A batch of samples in, its views out: a `collate_fn` for `DataLoader`.

    Replaces transform and collate at once; leave the dataset without a transform. With
    `ImageFolder(root, loader=str)` decoding happens here too, so that `on_error` covers bad files.

    Args:
        defer: Work left to the device, where it runs when the batch arrives: "normalize" only, or
            "augment" (colour, blur and normalisation; the workers draw the parameters). The views
            then travel as uint8 in a `DeferredViews`. None finishes them in the workers.
        return_boxes: Append `CropBoxes` to the batch (instead of what `MultiCropTransform` does).
        on_error: What to do with an image that cannot be decoded: "raise", or "skip", which warns
            once per file (and worker) and puts new crops of another image of the batch in its place. What is no
            image, or has other channels, is an error with both.
        image_key: Samples are dicts (Hugging Face's, webdataset's), and this is where their image is.
        target_key: And this where their target is; None where they have none.
        **options: Those of `MultiCropTransform`.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> loader = DataLoader(dataset, batch_size=256, collate_fn=MultiCropCollate())
        >>> views, targets = next(iter(loader))
    """

    defer: Literal["normalize", "augment"] | None = None
    on_error: Literal["raise", "skip"] = "raise"
    image_key: str | None = None
    target_key: str | None = None
    _warned: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, "defer", 'None, "normalize" or "augment"', lambda v: v in (None, "normalize", "augment"))
        _check(self, "on_error", '"raise" or "skip"', lambda v: v in ("raise", "skip"))
        for name in ("image_key", "target_key"):
            _check(self, name, "the name of a column or None", lambda v: v is None or isinstance(v, str))
        if self.target_key is not None and self.image_key is None:
            raise ValueError(f"target_key={self.target_key!r} is of dicts: give image_key too.")

    def __call__(self, samples: Sequence[Any] | Mapping[str, Any]) -> Any:  # type: ignore[override]
        """Makes the views of a batch.

        Args:
            samples: N samples (image, target), (image, target, filename) or bare images, an image
                being whatever `MultiCropTransform` takes. Or dicts with an "image", as stable-pretraining has them.
                With `image_key` dicts, or one dict of N images and N targets, as batches of Hugging Face's and
                webdataset's are.

        Returns:
            `[views, targets, filenames]` as far as the samples have them, then `CropBoxes` with
            `return_boxes`. Views are in the order globals first, each (N, C, H, W), float32.
            For dicts without `image_key` `{"views": [{"image": view, "label": ..., and so on}, ...]}`, with "boxes"
            beside "views"; with `defer` the other columns are beside "views", too.

        Raises:
            ValueError: If an image cannot be decoded; the message names the sample. With
                `on_error="skip"` only if none of the batch can.
            TypeError: If the samples are of another kind, or torch's `default_collate` can't stack the targets.
        """
        if isinstance(samples, (str, bytes, Tensor, np.ndarray)) or not isinstance(samples, Iterable):
            raise TypeError(
                f"MultiCropCollate takes a batch, as collate_fn of a DataLoader, got {type(samples).__name__}. As a "
                "dataset's transform use MultiCropTransform, which has the same options."
            )
        if isinstance(samples, Mapping):
            samples = _rows(samples, self.image_key, self.target_key)
        else:
            samples = list(samples)
            if self.image_key is not None:
                name = "sample {} of the batch".format
                samples = [
                    _picked(sample, name(n), self.image_key, self.target_key) for n, sample in enumerate(samples)
                ]
            elif samples and all(isinstance(sample, dict) and "image" in sample for sample in samples):
                return self._of_dicts(samples)
        rows: list[Sequence[Any]] = [s if isinstance(s, (tuple, list)) else (s,) for s in samples]
        if not rows or any(len(row) != len(rows[0]) or not 1 <= len(row) <= 3 for row in rows):
            raise TypeError(
                "MultiCropCollate expects samples that are all (image, target), (image, target, filename), images or "
                f'dicts with an "image", got {len(rows)} samples with {sorted({len(row) for row in rows})} items.'
            )
        views = self._empty(np.float32 if self.defer is None else np.uint8, len(rows))
        recipes: list[list[Recipe]] = []
        bad = []
        for n, row in enumerate(rows):
            try:
                recipes.append(self._made(row[0], [view[n] for view in views], len(rows)))
            except UndecodableError as error:
                self._report(n, row, error)
                recipes.append([])
                bad.append(n)
            except TypeError as error:
                raise TypeError(placed_error(error, f"sample {n} of the batch", _file_name(row))) from error
        good = [n for n in range(len(rows)) if n not in bad]
        if not good:
            raise ValueError(f"none of the {len(rows)} images of the batch can be decoded; see the warnings for each.")
        for n in bad:
            rows[n] = rows[good[int(torch.randint(len(good), ()))]]
            recipes[n] = self._made(rows[n][0], [view[n] for view in views], len(rows))

        per_view = [list(view) for view in zip(*recipes, strict=True)]
        self._finish(views, per_view, self.defer)
        batch: list[Any] = [views]
        if self.defer is not None:
            batch = [DeferredViews(views, per_view if self.defer == "augment" else None, self.mean, self.std)]
        _, *columns = (list(column) for column in zip(*rows, strict=True))
        batch += [_stacked(targets) for targets in columns[:1]] + columns[1:]
        if self.return_boxes:
            boxes = torch.tensor([[recipe.box for recipe in view] for view in per_view], dtype=torch.float32)
            batch.append(CropBoxes(boxes, torch.tensor([[recipe.flip for recipe in view] for view in per_view])))
        return batch

    def _made(self, image: ImageLike, out: list[Tensor], batch: int) -> list[Recipe]:
        """Makes the views of one image of a batch in `out`; gives what was drawn."""
        pixels = decode(image, len(self.mean))
        if self.defer and pixels.dtype != torch.uint8:
            raise TypeError(
                f"defer={self.defer!r} lets crops travel as uint8, and the images have more: give defer=None."
            )
        recipes = self.draw(pixels.shape[1], pixels.shape[0])
        self._render(pixels, recipes, out, self.defer, batch)
        return recipes

    def _of_dicts(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [(s["image"], {key: value for key, value in s.items() if key != "image"}) for s in samples]
        views, columns, *boxes = self(rows)
        batch = {"boxes": boxes[0]} if boxes else {}
        if isinstance(views, DeferredViews):
            return {"views": views, **columns, **batch}
        return {"views": [{"image": view, **columns} for view in views], **batch}

    def _report(self, position: int, row: Sequence[Any], error: UndecodableError) -> None:
        """Raises or warns, naming the sample."""
        name = _file_name(row)
        message = placed_error(error, f"sample {position} of the batch", name)
        if self.on_error == "raise":
            raise ValueError(f'{message} Remove it, or replace bad images with on_error="skip".') from error
        if name is None or name not in self._warned:
            self._warned.add(str(name))
            warnings.warn(f"{message} Another image takes its place.", stacklevel=3)


def crop_overlap(boxes: Tensor) -> Tensor:
    """Intersection over union of the crops of one image, pair by pair.

    Args:
        boxes: (L, N, 4) as (left, top, right, bottom), for example `CropBoxes.boxes[2:]`, the local ones.

    Returns:
        (pairs, N) in [0, 1], the pairs in the order of `itertools.combinations(range(L), 2)`; what
        `LoGoLoss` takes as `local_overlap`.

    Raises:
        ValueError: If `boxes` has another shape or fewer than two crops.
    """
    if boxes.ndim != 3 or boxes.shape[2] != 4 or len(boxes) < 2:
        raise ValueError(f"boxes must have shape (L, N, 4) with L >= 2, got {tuple(boxes.shape)}.")
    boxes = full_precision(boxes)  # those of Lightning's "16-true" would have areas that overflow
    # Computed on the device: for indexes from Python's lists a GPU would have to wait.
    first, second = boxes[torch.triu_indices(len(boxes), len(boxes), 1, device=boxes.device)].unbind()
    corner = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    intersection = corner.clamp_min(0).prod(-1)
    union = sum((side[..., 2:] - side[..., :2]).prod(-1) for side in (first, second)) - intersection
    return intersection / union


def _file_name(row: Sequence[Any]) -> str | None:
    """The third of (image, target, filename), else the path that is the image, if there is one."""
    image = row[0].get("path") if isinstance(row[0], Mapping) else row[0]
    return next((str(item) for item in (*row[2:], image) if isinstance(item, (str, os.PathLike))), None)


def _picked(sample: Any, name: str, image: str, target: str | None) -> tuple[Any, ...]:
    """(image, target) or (image,) of a sample that is a dict."""
    keys = (image,) if target is None else (image, target)
    if not isinstance(sample, Mapping):
        raise TypeError(
            f"image_key={image!r} is for samples that are dicts, and {name} is {type(sample).__name__}: leave it out."
        )
    if missing := [key for key in keys if key not in sample]:
        raise ValueError(
            f"{name} has no {missing[0]!r}, only {', '.join(map(str, sample))}: name "
            "the columns with image_key= and target_key=."
        )
    return tuple(sample[key] for key in keys)


def _rows(batch: Mapping[str, Any], image: str | None, target: str | None) -> list[tuple[Any, ...]]:
    """The same of a batch that is a dict of columns."""
    if image is None:
        raise TypeError(
            f"the batch is a dict of columns, {', '.join(map(str, batch))}: name those of the images and targets with "
            "image_key= and target_key=."
        )
    columns = _picked(batch, "the batch", image, target)
    # Of three dimensions nothing tells whether they are gray images or one image, in rows.
    if not isinstance(columns[0], (list, tuple)) and getattr(columns[0], "ndim", 0) not in (1, 4):
        raise TypeError(
            f"the batch is a dict, so its {image!r} must be a list of images or an array of four dimensions, got "
            f"{type(columns[0]).__name__}. Of single images DataLoader(dataset, batch_size=...) makes batches."
        )
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"the batch has {lengths[0]} images in {image!r} and {lengths[1]} targets in {target!r}.")
    return list(zip(*columns, strict=True))


def _stacked(targets: list[Any]) -> Any:
    try:
        return default_collate(targets)
    except Exception as error:  # torch's message doesn't say of what
        if isinstance(targets[0], dict):
            raise TypeError(
                f"the dicts beside the images, with {', '.join(map(str, targets[0]))} in sample 0, can't be stacked "
                f"({type(error).__name__}: {error}). If the samples are dicts, name the one column that you want "
                'beside the images, or none, as in MultiCropCollate(image_key="image", target_key="label").'
            ) from error
        kinds = [f"a tensor {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__ for t in targets]
        other = next((n for n, kind in enumerate(kinds) if kind != kinds[0]), 0)
        also = f", that of sample {other} is {kinds[other]}" if other else ""
        raise TypeError(
            f"the targets, second items of the samples, can't be stacked: that of sample 0 is {kinds[0]}{also} "
            f"({type(error).__name__}: {error}). Let the dataset give numbers or tensors of one shape, or images alone."
        ) from error


def _crop(pixels: Tensor, recipe: Recipe, channels: int, size: int) -> Tensor:
    """Gives (1, C, size, size), of the type of the pixels."""
    left, top, right, bottom = recipe.box
    # A copy: the fast kernel wants the crop dense, channels last.
    crop = pixels[top:bottom, left:right].contiguous().permute(2, 0, 1)[None]
    crop = F.interpolate(crop, size=(size, size), mode="bicubic", antialias=True)[:, :channels]
    if crop.is_floating_point():
        crop = crop.clamp_(0, 255)  # bicubic overshoots
    return crop.flip(-1) if recipe.flip else crop


def _at_once(view: Tensor, batch: int) -> int:
    """How many images are augmented together: small views are bound by calls, large ones by the cache."""
    return math.ceil(batch / math.ceil(batch / 64)) if view.shape[-1] <= 64 and batch >= 16 else 1


def _written(out: Tensor, x: Tensor, shift: Tensor, scale: Tensor) -> None:
    """Puts pixels in [0, 255] into a batch: rounded if it is uint8, which the device normalises, else normalised."""
    if out.dtype == torch.uint8:
        out.copy_(x.round().to(torch.int16))  # by way of int16: three times as fast as straight to uint8
    else:
        torch.sub(x, shift, out=out).mul_(scale)


def _finished(views: Tensor, drawn: np.ndarray | None, shift: Tensor, scale: Tensor) -> Tensor:
    """Crops that travelled as uint8, augmented if anything was drawn, and normalised: (N, C, H, W), float32."""
    out, count = _fresh(views.shape, np.float32), _at_once(views, len(views))
    for n in range(0, len(views), count):
        some = views[n : n + count]
        out[n : n + count].copy_(some if drawn is None else augment(some, drawn[n : n + count])).sub_(shift).mul_(scale)
    return out


def _fresh(shape: Sequence[int], dtype: type[np.generic]) -> Tensor:
    # numpy asks the kernel for huge pages, which spares a page fault for every 4 KiB of a float batch.
    return torch.from_numpy(np.empty(shape, dtype))


@functools.cache
def _statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """What to subtract from pixels in [0, 255] and then multiply them with, (C, 1, 1) each."""
    shift, deviation = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) * 255 for values in (mean, std))
    return shift, 1 / deviation


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def _integer(least: int, value: Any) -> bool:
    return not isinstance(value, bool) and operator.index(value) >= least


def _check(options: object, name: str, expected: str, valid: Callable[[Any], bool]) -> None:
    value = getattr(options, name)
    try:
        good = valid(value)
    except Exception:  # whatever a value of another kind raises when it is compared
        good = False
    if not good:
        raise ValueError(f"{name} must be {expected}, got {value!r}.")
