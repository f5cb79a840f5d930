"""timm's and torchvision's networks: what an exported backbone must fit."""

import difflib
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import nn

from logo_plugin.checks import choice

# Where a library has its networks, what builds one, and the option that leaves classifier or values out.
_CALLS = {
    "timm": ("timm", "create_model", "num_classes", 0),
    "torchvision": ("torchvision.models", "get_model", "weights", None),
}
# Tried where the one asked for does not fit.
_COMMON = {
    "timm": ("resnet18", "resnet34", "resnet50", "resnet101", "vit_tiny_patch16_224", "vit_small_patch16_224"),
    "torchvision": ("resnet18", "resnet34", "resnet50", "resnet101", "vit_b_16"),
}


class Architecture(NamedTuple):
    """A network of a library's.

    Attributes:
        model: The network, with the library's initial values.
        heads: Paths of the modules that a backbone goes without, from the classifier's last layer to the whole block
            that it is in; none for timm, whose `num_classes=0` has done it.
        code: The Python lines that build it.
    """

    model: nn.Module
    heads: tuple[str, ...]
    code: str

    def shapes(self, head: str | None) -> dict[str, tuple[int, ...]]:
        """Of all that its state dict holds, except the head."""
        state = self.model.state_dict()
        return {key: tuple(value.shape) for key, value in state.items() if head is None or not under(key, head)}

    def without(self, head: str | None) -> "Architecture":
        """The same, with an `nn.Identity` in the place of the head."""
        if head is None:
            return self
        parent, _, name = head.rpartition(".")
        setattr(self.model.get_submodule(parent), name, nn.Identity())
        steps = "".join(f"[{step}]" if step.isdigit() else f".{step}" for step in head.split("."))
        return Architecture(self.model, (), f"{self.code}\nmodel{steps} = torch.nn.Identity()")


def build(library: str, name: str, cifar_stem: int | None, options: dict[str, Any]) -> Architecture:
    """Builds a network.

    Args:
        library: "timm" or "torchvision".
        name: The library's name of it.
        cifar_stem: Padding of the 3 x 3 convolution, without pooling, that replaces a ResNet's stem; None keeps it.
        options: Of the library's own function, such as timm's `img_size`.

    Raises:
        ModuleNotFoundError: If the library is missing.
        ValueError: If it has no such network, or that has no such option or stem.
    """
    choice("to", library, tuple(_CALLS))
    where, function, own, none = _CALLS[library]
    if own in options:
        raise ValueError(f"{own}={options[own]!r}: a backbone goes without classifier and given values; leave it out.")
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    models = _library(where)
    names = models.list_models() if library == "timm" else models.list_models(module=models)
    if name.split(".")[0] not in names:
        near = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.5))
        raise ValueError(
            f"{library} has no network {name!r}{f'; near it are {near}' if near else ''}. "
            f"{where}.list_models() has all."
        )
    try:
        model = getattr(models, function)(name, **{own: none}, **options)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{library} can't build {name}{arguments} ({error}).") from error
    code = f"import torch, {library}\n\nmodel = {where}.{function}({name!r}, {own}={none}{arguments})"
    if cifar_stem is not None:
        code += _put_cifar_stem(model, name, cifar_stem)
    return Architecture(model, () if library == "timm" else _heads(model), code)


def common(library: str) -> Iterator[tuple[str, Architecture]]:
    """Networks of a library's that people use, without values."""
    for name in _COMMON[library]:
        with torch.device("meta"), suppress(RuntimeError, NotImplementedError):
            yield name, build(library, name, None, {})


def under(key: str, module: str) -> bool:
    """Whether a name of a state dict lies in a module; all lie in the root, whose path is empty."""
    return not module or key.startswith(module + ".")


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"exporting to {name} needs it: pip install {name}.") from error


def _heads(model: nn.Module) -> tuple[str, ...]:
    last = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]
    return tuple(dict.fromkeys(last + [path.split(".")[0] for path in last]))


def _put_cifar_stem(model: nn.Module, name: str, padding: int) -> str:
    old = getattr(model, "conv1", None)
    if not isinstance(old, nn.Conv2d) or not isinstance(getattr(model, "maxpool", None), nn.Module):
        raise ValueError(f"cifar_stem is for ResNets, whose first layers are conv1 and maxpool; {name} has others.")
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=padding, bias=False)
    model.maxpool = nn.Identity()
    return (
        f"\nmodel.conv1 = torch.nn.Conv2d({old.in_channels}, {old.out_channels}, 3, padding={padding}, bias=False)"
        "\nmodel.maxpool = torch.nn.Identity()"
    )
