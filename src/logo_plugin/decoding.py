"""From whatever a dataset holds to pixels."""

import contextlib
import os
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
import torchvision  # noqa: F401, registers torch.ops.image
from PIL import Image
from torch import Tensor

ImageLike = Image.Image | Tensor | bytes | str | os.PathLike[str]

# Pillow's pixels in three quarters of its time. torchvision has deprecated it: where it is gone, Pillow decodes.
_decode_jpeg: Callable[[Tensor, int], Tensor] | None = getattr(torch.ops.image, "decode_jpeg", None)
_RGB = 3  # torchvision.io.ImageReadMode.RGB


class UndecodableError(ValueError):
    """The image cannot be decoded."""


def decode(image: ImageLike) -> Tensor:
    """Decodes an image of any kind and mode, once.

    Args:
        image: PIL image, uint8 tensor (1 or 3, H, W), encoded bytes (JPEG, PNG, WebP, ...) or a path. Of 16 bits
            the upper eight are kept; a file's or PIL image's transparency is dropped; EXIF orientation is ignored.

    Returns:
        (H, W, 3 or 4), uint8; the first three channels are red, green and blue.

    Raises:
        UndecodableError: If the image cannot be decoded, or has more than twice `Image.MAX_IMAGE_PIXELS`, Pillow's
            limit against decompression bombs (with more than once there is Pillow's warning).
        TypeError: If it is none of these kinds.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or not image.numel():
            raise TypeError(
                f"an image tensor must be uint8 (C, H, W), got {image.dtype} {tuple(image.shape)}. "
                "Give it before any conversion to float."
            )
        if image.shape[0] not in (1, 3):
            raise TypeError(
                f"an image tensor must have 1 or 3 channels, got {tuple(image.shape)}, and none is dropped unasked. "
                "Without transparency it is image[:3]; in torchvision.io.decode_image, mode='RGB'."
            )
        return image.expand(3, -1, -1).permute(1, 2, 0)
    if not isinstance(image, (Image.Image, bytes, str, os.PathLike)):
        raise TypeError(
            "an image must be a PIL image, a uint8 tensor (C, H, W), encoded bytes or a path, "
            f"got {type(image).__name__}."
        )
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


def _pixels(image: Image.Image) -> Tensor:
    if image.mode == "F":
        raise ValueError("floating-point images have no fixed range; convert them to 8 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16 bits at 255.
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.mode != "RGB":
        image = image.convert("RGB")
    # RGBX is how Pillow stores RGB: a plain copy, half the time of packing three bytes.
    raw = torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8)
    return raw.view(image.height, image.width, 4)
