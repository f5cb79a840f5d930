"""The backbone of any run, under the names that timm or torchvision has for it."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logo_plugin.architectures import Architecture, build, under
from logo_plugin.checkpoints import Source, state_dict_of
from logo_plugin.matching import Match, matches, why_none
from logo_plugin.modes import eval_mode, image_channels

# Words in the names that hosts give to networks without gradient; encoder_k is that of MoCo's own code.
_TARGETS = {"momentum", "target", "teacher", "ema", "key", "k"}


class ExportedBackbone(NamedTuple):
    """What `export_backbone` found.

    Attributes:
        state_dict: The backbone under the library's names; loads with `strict=True`.
        code: Python lines that build the network `model` which takes it.
        path: The module of the source that it was.
        by: How it was matched, "name" or "order and shape".
        left_out: Names in the source of all that is not in `state_dict`.
        others: Paths of other modules that would have fitted, such as a momentum encoder.
        head: Module of the library's network that is replaced by `nn.Identity`, or None (timm).
    """

    state_dict: dict[str, Tensor]
    code: str
    path: str
    by: str
    left_out: list[str]
    others: list[str]
    head: str | None


def export_backbone(
    source: Source,
    to: str = "timm",
    arch: str = "resnet18",
    *,
    backbone: str | None = None,
    cifar_stem: int | None = None,
    trust: bool = False,
    **options: Any,
) -> ExportedBackbone:
    """Finds the backbone in what a run left behind, and names its values as timm or torchvision does.

    The library's own network says what must be there. A module fits if it has the same names and shapes, or, as
    `nn.Sequential(*resnet.children())`, the same shapes and kinds of values in the same order; anything else is an
    error. Of a `source` that can be run, the result is run too, in eval mode on one image, and must agree.

    Args:
        source: A wrapped model, a `LoGoLearner` or any module; a state dict; a Lightning or solo-learn checkpoint; a
            file with one of them.
        to: "timm" or "torchvision".
        arch: The library's name of the network.
        backbone: Path of the backbone in the source, as "backbone_momentum". By default the only module that fits,
            or the only one that fits and is not called a momentum, target, teacher, EMA or key network (encoder_k).
        cifar_stem: For a ResNet whose stem was replaced by a 3 x 3 convolution without pooling: its padding (1 in most
            code, 2 in solo-learn's).
        trust: Read a file that holds more than tensors and plain values, which may run code.
        **options: Of `timm.create_model` or `torchvision.models.get_model`, as `img_size=96`.

    Returns:
        The state dict, and what was left out.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If the library is missing.
        ValueError: If nothing fits, if several modules do, or if outputs differ; the message says what to change.

    Example:
        >>> exported = export_backbone("byol.ckpt", to="timm", arch="resnet18")
        >>> timm.create_model("resnet18", num_classes=0).load_state_dict(exported.state_dict)
        <All keys matched successfully>
    """
    state = state_dict_of(source, trust=trust)
    architecture = build(to, arch, cifar_stem, options)
    match, others = _choose(state, architecture, f"{to}'s {arch}", to, backbone)
    exported = {name: state[own].clone().contiguous() for name, own in match.names.items()}
    used = set(match.names.values())
    left_out = [name for name in state if name not in used]
    architecture = architecture.without(match.head)
    architecture.model.load_state_dict(exported, strict=True)
    if isinstance(source, nn.Module):
        side = options.get("img_size", options.get("image_size"))
        _compare(_without(source, match.path, left_out), architecture.model, side, match.path, f"{to}'s {arch}")
    return ExportedBackbone(exported, architecture.code, match.path, match.by, left_out, others, match.head)


def _choose(
    state: Mapping[str, Tensor], architecture: Architecture, wanted: str, library: str, asked: str | None
) -> tuple[Match, list[str]]:
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    paths = sorted({name[:i] for name in shapes for i, c in enumerate(name) if c == "."} | {""})
    if asked is not None:
        if asked not in paths:
            tops = ", ".join(dict.fromkeys(name.split(".")[0] for name in shapes))
            raise ValueError(f"there is no module {asked!r} in the source; it has {tops}.")
        paths = [asked]
    found = matches(shapes, paths, architecture)
    if not found:
        raise ValueError(why_none(shapes, paths, architecture, wanted, library))
    online = [path for path in found if _TARGETS.isdisjoint(re.split(r"[._]", path.lower()))]
    candidates = online or list(found)
    if len(candidates) > 1:
        raise ValueError(
            f"several modules fit {wanted}: {', '.join(candidates)}. Say which with --backbone {candidates[0]}, in "
            f"Python backbone={candidates[0]!r}."
        )
    return found[candidates[0]], [path for path in found if path != candidates[0]]


def _without(source: nn.Module, path: str, left_out: Iterable[str]) -> nn.Module:
    """A copy of a source's module, float32 on the CPU, that hands on what goes into layers that are left out."""
    own = copy.deepcopy(source.get_submodule(path)).cpu().float()
    for name in left_out:
        layer = name.removeprefix(f"{path}." if path else "").rpartition(".")[0]
        if under(name, path) and layer and isinstance(own.get_submodule(layer), nn.Linear):
            parent, _, attribute = layer.rpartition(".")
            setattr(own.get_submodule(parent), attribute, nn.Identity())
    return own


def _compare(own: nn.Module, model: nn.Module, side: Any, path: str, wanted: str) -> None:
    usual = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-2:]
    sides = usual if side is None else (side, side) if isinstance(side, int) else side
    image = torch.rand(1, image_channels(model), *sides, generator=torch.Generator().manual_seed(0))
    try:
        with eval_mode(own), eval_mode(model), torch.no_grad():
            expected, got = own(image).flatten(1), model(image).flatten(1)
    except Exception as error:  # whatever it is that the source's own code raises
        raise ValueError(
            f"{path or 'the source'} has the values of {wanted} but does not take or give what that does, of an image "
            f"{tuple(image.shape)} ({type(error).__name__}: {error}). Export its state_dict() to go on without this "
            "check."
        ) from error
    if not expected.isfinite().all():
        raise ValueError(
            f"{path or 'the source'} gives nan or inf of an image: it was not trained well. Look at its weights."
        )
    if expected.shape != got.shape or not torch.allclose(expected, got, rtol=1e-3, atol=1e-4):
        by = f"{(expected - got).abs().max():.2g}" if expected.shape == got.shape else (
            f"shape, {tuple(expected.shape)} and {tuple(got.shape)}"
        )  # fmt: skip
        raise ValueError(
            f"{path or 'the source'} has the values of {wanted} but computes something else of an image, the outputs "
            f"differ by {by}: its stem, pooling or normalisation is another. Export its state_dict() to go on without "
            "this check."
        )
