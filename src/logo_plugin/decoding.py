"""From whatever a dataset holds to pixels."""

import contextlib
import os
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401, registers torch.ops.image
from PIL import Image
from torch import Tensor

Array = np.ndarray[Any, Any]
Encoded = bytes | bytearray | memoryview | str | os.PathLike[str]
ImageLike = Image.Image | Tensor | Array | Encoded | Mapping[str, Encoded | None]

# Pillow's pixels in three quarters of its time. torchvision has deprecated it: where it is gone, Pillow decodes.
_decode_jpeg: Callable[[Tensor, int], Tensor] | None = getattr(torch.ops.image, "decode_jpeg", None)
_RGB = 3  # torchvision.io.ImageReadMode.RGB


class UndecodableError(ValueError):
    """The image cannot be decoded."""


def placed_error(error: Exception, place: str, name: str | None) -> str:
    """The message for who has many images: where this one is, and its name if it has one."""
    return f"{place}{'' if name is None else f' ({name})'}: {error}"


def decode(image: ImageLike, channels: int = _RGB) -> Tensor:
    """Decodes an image of any kind and mode, once.

    Args:
        image: PIL image, encoded bytes (JPEG, PNG, WebP, ..., also as an array or tensor of one dimension, as in HDF5),
            a path, {"bytes": ..., "path": ...} with one of them (Hugging Face's), array (H, W) or (H, W, 1 or 3), or
            tensor (1 or 3, H, W). Arrays and tensors are uint8, uint16 or floating point in [0, 1]. Of a file's or PIL
            image's 16 bits the upper eight are kept, its transparency is dropped, EXIF orientation is ignored.
        channels: Of another number than 3 none is dropped and none made up: arrays and tensors have as many, and what
            Pillow opens as many bands (L, LA, I;16, RGBA), whose 16 bits are kept.

    Returns:
        (H, W, channels), or (H, W, 3 or 4), of which the first three channels are red, green and blue: uint8, or
        float32 in [0, 255] of more than 8 bits.

    Raises:
        UndecodableError: If the image cannot be decoded, is None, or has more than twice `Image.MAX_IMAGE_PIXELS`,
            Pillow's limit against decompression bombs (with more than once there is Pillow's warning).
        TypeError: If it is none of these kinds, or has another number of channels.
    """
    if isinstance(image, (Tensor, np.ndarray)) and image.ndim == 1 and str(image.dtype) in ("torch.uint8", "uint8"):
        image = np.asarray(image).tobytes()
    if channels != _RGB:
        return _decode_channels(image, channels)
    if isinstance(image, (Tensor, np.ndarray)):
        pixels = _in_range(image)
        if pixels.shape[2] not in (1, 3):
            raise TypeError(
                f"an image must have 1 or 3 channels, got {_described(image)}, and none is dropped unasked. For "
                f"images of other channels give mean= and std= of as many numbers. {_layout(image, (1, 3))}"
                "Without transparency it is image[..., :3], of a tensor image[:3]."
            )
        return pixels.expand(-1, -1, 3)
    image = _encoded(image)
    try:
        if isinstance(image, Image.Image):
            return _pixels(image)
        if not isinstance(image, bytes):
            image = Path(image).read_bytes()
        opened = Image.open(BytesIO(image))  # reads the header, and refuses what is too large
        if _decode_jpeg is not None and opened.format in ("JPEG", "MPO"):
            with contextlib.suppress(RuntimeError):  # what it refuses, Pillow judges
                encoded = torch.frombuffer(bytearray(image), dtype=torch.uint8)
                return _decode_jpeg(encoded, _RGB).permute(1, 2, 0)
        return _pixels(opened)
    # Pillow's decoders raise nearly anything on a damaged file.
    except Exception as error:
        raise UndecodableError(f"cannot decode the image ({type(error).__name__}: {error}).") from error


def _decode_channels(image: ImageLike, channels: int) -> Tensor:
    """The same for images of other channels than red, green and blue, of which none is dropped and none made up."""
    if not isinstance(image, (Tensor, np.ndarray)):
        image = _bands(_encoded(image))
    pixels = _in_range(image)
    if pixels.shape[2] != channels:
        raise TypeError(
            f"mean has {channels} number{'s' if channels > 1 else ''}, so images must have as many channels; "
            f"got {_described(image)}. {_layout(image, (channels,))}Give mean= and std= of {pixels.shape[2]} "
            "numbers, or the channels you want."
        )
    return pixels


def _encoded(image: Any) -> Image.Image | bytes | str | os.PathLike[str]:
    """What Pillow opens."""
    if isinstance(image, Mapping) and image.keys() == {"bytes", "path"}:  # Hugging Face's Image(decode=False)
        image = image["path"] if image["bytes"] is None else image["bytes"]
    if isinstance(image, (bytearray, memoryview)):
        return bytes(image)
    if image is None:
        raise UndecodableError("there is no image, only None.")
    if isinstance(image, (list, tuple)):
        if image and isinstance(image[0], (list, int, float)):
            raise TypeError(
                "an image must be an array or tensor, not nested lists of numbers. Hugging Face's columns of arrays "
                'are such lists without dataset.with_format("numpy", dtype="uint8").'
            )
        raise TypeError(
            f"an image is a {type(image).__name__} of {len(image)} already: the dataset has a transform that makes "
            "views. Remove the transform; MultiCropCollate makes the views."
        )
    if not isinstance(image, (Image.Image, bytes, str, os.PathLike)):
        also = " Of dicts, image_key= says where the image is." if isinstance(image, Mapping) else ""
        also += " Of an open file give what its read() gives." if hasattr(image, "read") else ""
        raise TypeError(
            "an image must be a PIL image, an array (H, W, C), a tensor (C, H, W), encoded bytes or a path, "
            f"got {type(image).__name__}.{also}"
        )
    return image


def _in_range(image: Tensor | Array) -> Tensor:
    """(H, W, C), uint8, or float32 in [0, 255]."""
    if isinstance(image, Tensor):  # numpy has no bfloat16
        array = (image.float() if image.dtype == torch.bfloat16 else image).detach().cpu().numpy()
    else:
        array = image
    if (array.ndim != 3 and (isinstance(image, Tensor) or array.ndim != 2)) or not array.size:
        raise TypeError(
            f"an image must be an array (H, W) or (H, W, C), or a tensor (C, H, W), got {_described(image)}."
        )
    if array.ndim == 2:
        array = array[..., None]
    elif isinstance(image, Tensor):
        array = array.transpose(1, 2, 0)
    if array.dtype == np.uint8:
        # A copy where torch can't share it.
        return torch.from_numpy(array if array.flags.writeable and min(array.strides) >= 0 else array.copy())
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        return torch.from_numpy(np.multiply(array, np.float32(255 / 65535), dtype=np.float32))
    if array.dtype.kind != "f":
        raise TypeError(
            f"an image must be uint8, uint16 or floating point in [0, 1], got {_described(image)}. Divide it by its "
            'largest possible value; of Hugging Face\'s dataset.with_format, dtype="uint8" keeps eight bits.'
        )
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):
        raise TypeError(
            f"a floating-point image must be in [0, 1], got values from {low:.3g} to {high:.3g}. If a transform of the "
            "dataset's has normalised it, remove the transform; else divide it by its largest possible value."
        )
    return torch.from_numpy(np.multiply(array, np.float32(255), dtype=np.float32))


def _bands(image: Image.Image | bytes | str | os.PathLike[str]) -> Array:
    try:
        if not isinstance(image, Image.Image):
            image = Image.open(BytesIO(image) if isinstance(image, bytes) else Path(image))
        mode, array = image.mode, np.asarray(image)
    except Exception as error:  # as above
        raise UndecodableError(f"cannot decode the image ({type(error).__name__}: {error}).") from error
    if mode in ("P", "PA", "1", "I"):
        raise TypeError(f"an image of mode {mode} has no plain channels: convert it, or give an array.")
    return array


def _described(image: Tensor | Array) -> str:
    return f"{'a tensor' if isinstance(image, Tensor) else 'an array'} {tuple(image.shape)} of {image.dtype}"


def _layout(image: Tensor | Array, channels: tuple[int, ...]) -> str:
    if isinstance(image, Tensor):
        last = image.shape[-1] in channels
        return "If the channels are last, image.permute(2, 0, 1) puts them first. " if last else ""
    return "If the channels are first, np.moveaxis(image, 0, -1) puts them last. " if image.shape[0] in channels else ""


def _pixels(image: Image.Image) -> Tensor:
    if image.mode == "F":
        raise ValueError("floating-point images have no fixed range; convert them to 8 bits")
    if image.mode == "I":
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or 0 < high < 256 or high > 65535:  # old Pillows open 16 bits as I
            raise ValueError(f"integers of 32 bits, here {low} to {high}, have no fixed range; convert to 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode != "RGB":
        image = image.convert("RGB")
    # RGBX is how Pillow stores RGB: a plain copy, half the time of packing three bytes.
    raw = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
    return raw.view(image.height, image.width, 4)
