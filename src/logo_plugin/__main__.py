"""`python -m logo_plugin` and `logo-plugin`: `doctor` (the default), `export`, `crops`."""

import argparse
import ast
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import logo_plugin
from logo_plugin import doctor


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command and its own arguments; the process's by default. Without a command it is the doctor.

    Returns:
        0, or 1 if something is the matter.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"export": _export, "crops": _crops}
    if arguments and arguments[0] in commands:
        try:
            return commands[arguments[0]](arguments[1:])
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            print(f"logo-plugin {arguments[0]}: {error}", file=sys.stderr)
            return 1
    if arguments[:1] == ["doctor"]:
        arguments = arguments[1:]
    parser = argparse.ArgumentParser(
        prog="logo-plugin",
        description="What is installed, what fits, and what to do about the rest.",
        epilog="Other commands: logo-plugin export CHECKPOINT OUTPUT, logo-plugin crops IMAGE; each takes --help.",
    )
    parser.add_argument("hosts", nargs="*", metavar="host", help=f"must work: {', '.join(doctor.HOSTS)}")
    parser.add_argument("--version", action="version", version=f"logo_plugin {logo_plugin.__version__}")
    asked = parser.parse_args(arguments).hosts
    if unknown := sorted(set(asked) - set(doctor.HOSTS)):
        parser.error(
            f"unknown host or command {', '.join(unknown)}; hosts are {', '.join(doctor.HOSTS)}, commands doctor, "
            "export and crops"
        )
    return doctor.report(asked)


def _export(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="logo-plugin export", description="The backbone of a checkpoint, under timm's or torchvision's names."
    )
    parser.add_argument("checkpoint", type=Path, help="Lightning's, solo-learn's, or a state dict")
    parser.add_argument("output", type=Path, help="the file to write, as backbone.pt")
    parser.add_argument("--to", default="timm", choices=("timm", "torchvision"))
    parser.add_argument("--arch", required=True, help="the library's name of the network, as resnet18")
    parser.add_argument("--backbone", metavar="PATH", help="where in the model it is, as backbone_momentum")
    parser.add_argument("--cifar-stem", type=int, metavar="PADDING", help="ResNet with a 3 x 3 stem and no pooling")
    _add_option(parser, "of the library's network, as img_size=96")
    parser.add_argument("--trust", action="store_true", help="read a file that may run code: your own")
    given = parser.parse_args(arguments)
    if given.output.exists() and given.output.samefile(given.checkpoint):
        parser.error("the output would replace the checkpoint; give another name")
    if given.output.is_dir():
        parser.error(f"{given.output} is a folder; give the name of a file in it, as {given.output / 'backbone.pt'}")
    if not given.output.absolute().parent.is_dir():
        parser.error(f"there is no folder {given.output.parent} to write {given.output.name} to; make it first")
    import torch

    from logo_plugin.export import export_backbone

    found = export_backbone(
        given.checkpoint, given.to, given.arch,
        backbone=given.backbone, cifar_stem=given.cifar_stem, trust=given.trust, **dict(given.option),
    )  # fmt: skip
    torch.save(found.state_dict, given.output)
    where = found.path or "the whole source"
    print(f"{given.output}: {given.arch} of {given.to}, {len(found.state_dict)} values, from {where}, by {found.by}")
    for name, count in Counter(_owner(name, found.path) for name in found.left_out).items():
        print(f"  left out: {name}" + (f" ({count} values)" if count > 1 else ""))
    if found.others:
        print(f"  {', '.join(found.others)} would fit too: --backbone {found.others[0]}")
    print(f"\nIt loads with\n\n{found.code}\nmodel.load_state_dict(torch.load({str(given.output)!r}), strict=True)")
    return 0


def _owner(name: str, backbone: str) -> str:
    """What is left out is told module by module, but of the backbone itself name by name."""
    inside = not backbone or name.startswith(backbone + ".")
    return name if inside else name.split(".")[0]


def _add_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--option", action="append", default=[], type=_option, metavar="NAME=VALUE", help=what)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _crops(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="logo-plugin crops", description="Draws the boxes of a picture's crops, and the crops, augmented."
    )
    parser.add_argument("image", type=Path)
    parser.add_argument("--output", type=Path, default=Path("crops.png"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=3, help="how often the crops are drawn")
    _add_option(parser, "of MultiCropCollate, as local_size=32")
    given = parser.parse_args(arguments)
    import torch

    from logo_plugin.crops import MultiCropCollate
    from logo_plugin.picture import draw_crops

    torch.manual_seed(given.seed)
    draw_crops(given.image, MultiCropCollate(**dict(given.option)), rows=given.rows).save(given.output)
    print(f"{given.output}: global crops in blue, local crops in orange")
    return 0


if __name__ == "__main__":
    sys.exit(main())
