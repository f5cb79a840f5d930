"""What is installed, what fits, and what to do about the rest."""

import importlib.util
import os
import pkgutil
import platform
import re
import sys
import warnings
from importlib import metadata
from pathlib import Path

import logo_plugin

HOSTS = ("lightly", "solo", "stable", "timm")
SHOWN = (
    "torch",
    "torchvision",
    "numpy",
    "lightning",
    "pytorch-lightning",
    "torchmetrics",
    "hydra-core",
    "lightly",
    "stable-pretraining",
    "timm",
)


def report(asked: list[str]) -> int:
    """Prints the report.

    Args:
        asked: Those of `HOSTS` that must work.

    Returns:
        1 if the core, or a host asked for, can't work; else 0.
    """
    print(f"{'logo_plugin':19}{logo_plugin.__version__}  {Path(logo_plugin.__file__).parent}")
    print(f"{'python':19}{platform.python_version()}")
    for name in SHOWN:
        print(f"{name:19}{_version(name) or 'not installed'}")
    root = _solo_root()
    print(f"{'solo-learn':19}{f'{_solo_version(root)}  {root}' if root else 'not found'}")
    failed = bool(_report("core", [*_stranger(), *_misfits(None), *_imports()]))
    for host in HOSTS:
        problems = _misfits(host)
        methods: list[str] = []
        if host == "solo":
            if wrong := _wrong_solo_root():
                problems.append(wrong)
            elif root is None:
                problems.append(
                    "solo-learn is used from a clone: git clone https://github.com/vturrisi/solo-learn, then run "
                    "this there or with SOLO_LEARN_ROOT=<the clone>"
                )
            elif not problems:
                methods, problems = _solo_methods()
        elif not problems:
            methods = ["backbones" if host == "timm" else "wrap() for methods of two views"]
        failed |= bool(_report(host, problems, methods, asked=host in asked)) and host in asked
    return int(failed)


def _report(name: str, problems: list[str], methods: list[str] | None = None, asked: bool = True) -> list[str]:
    # Most people want one host: what the others lack is no fault.
    state = ("does not work" if asked else "not ready (only if you want it)") if problems else "ok"
    print(f"\n{name}: {state}{', ' + ', '.join(methods) if methods else ''}")
    for problem in problems:
        print(f"  - {problem}")
    return problems


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _misfits(extra: str | None) -> list[str]:
    """Compares what is installed with the requirements in this package's own metadata."""
    if _version("logo-plugin") is None:
        return ["logo_plugin is not installed, only on the path: pip install . in its folder"]
    found: list[str] = []
    missing: dict[str, str] = {}
    for requirement in metadata.requires("logo-plugin") or []:
        match = re.match(r'([\w.-]+)(?:>=([\d.]+))?[^;]*(?:;.*extra == ["\'](\w+)["\'])?', requirement)
        if match is None or match[3] != extra:
            continue
        name, least = match[1], match[2] or "0"
        version = _version(name)
        if version is None:
            missing[name] = f'"{name}>={least}"' if match[2] else name
        elif _numbers(version) < _numbers(least):
            found.append(f'{name} {version} is older than {least}: pip install --upgrade "{name}>={least}"')
    if missing:
        found.append(f"not installed: {', '.join(missing)}; pip install {' '.join(missing.values())}")
    return found


def _stranger() -> list[str]:
    """Another package on PyPI has our name and our import name, and pip can't tell them apart."""
    theirs = any(
        not any(requirement.startswith("torch") for requirement in found.requires or [])
        for found in metadata.distributions(name="logo-plugin")
    )
    if not theirs and not (Path(logo_plugin.__file__).parent / "service.py").exists():
        return []
    return [
        "the logo-plugin that pip installed is another package of that name, from PyPI: pip uninstall logo-plugin, "
        "then install this one from its clone or wheel (pip install ./logo-plugin)"
    ]


def _imports() -> list[str]:
    """What is installed may still not work together."""
    failure = logo_plugin._failure
    if failure is not None:
        return [f"cannot be imported ({type(failure).__name__}: {failure}): pip install --upgrade torch torchvision"]
    import numpy as np
    import torch

    try:
        torch.from_numpy(np.zeros(1))
    except RuntimeError as error:
        return [
            f"torch {torch.__version__} cannot use numpy {np.__version__} ({error}): "
            'pip install "numpy<2", or a newer torch'
        ]
    return []


def _wrong_solo_root() -> str | None:
    root = os.environ.get("SOLO_LEARN_ROOT")
    if not root or (Path(root) / "solo" / "__init__.py").is_file():
        return None
    what = "has no folder 'solo'" if Path(root).is_dir() else "is no folder"
    return f"SOLO_LEARN_ROOT={root} {what}: set it to the root of a clone of solo-learn"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _solo_root() -> Path | None:
    """Where `import solo` finds solo-learn: SOLO_LEARN_ROOT, the working folder, or what is installed."""
    if root := os.environ.get("SOLO_LEARN_ROOT"):
        if _wrong_solo_root():
            return None
        sys.path.insert(0, root)
    elif (Path.cwd() / "solo" / "__init__.py").is_file():  # the console script's path is without it
        sys.path.insert(0, str(Path.cwd()))
    spec = importlib.util.find_spec("solo")
    locations = list(spec.submodule_search_locations or []) if spec else []
    return Path(locations[0]).parent if locations else None


def _solo_version(root: Path) -> str:
    setup = root / "setup.py"
    match = re.search(r'version="([\d.]+)"', setup.read_text()) if setup.is_file() else None
    return match[1] if match else _version("solo-learn") or "unknown version"


def _solo_methods() -> tuple[list[str], list[str]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import logo_plugin.adapters.solo  # noqa: F401

            methods = [name for name in sys.modules["solo.methods"].METHODS if name.startswith("logo_")]
    except Exception as error:
        return [], [
            f"solo-learn can't be imported ({type(error).__name__}: {error}): use a clone of its main branch "
            "(git pull; the package on PyPI is too old) and its requirements (pip install -r requirements.txt)"
        ]
    import hydra_plugins

    if not any(module.name == "logo_plugin" for module in pkgutil.iter_modules(hydra_plugins.__path__)):
        return methods, ["Hydra can't find hydra_plugins/logo_plugin: install logo_plugin again, with pip"]
    return methods, []
