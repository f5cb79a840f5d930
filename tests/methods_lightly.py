"""What LoGo does with each file of lightly's examples/pytorch and examples/pytorch_lightning, found by running it.

LIGHTLY_ROOT=... python tests/methods_lightly.py [part of a path ...]
"""

import ast
import functools
import os
import re
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_files import STEP, STEPS, Run, noise, run_lightning, run_plain
from torch import Tensor, nn

import logo_plugin
from logo_plugin import adapters

ROOT = os.environ.get("LIGHTLY_ROOT")
LIGHTNING, PLAIN = "pytorch_lightning", "pytorch"
HOSTS = {LIGHTNING: "lightly, Lightning", PLAIN: "lightly, plain PyTorch"}
_NOTES = {
    LIGHTNING: "The files of lightly's `examples/pytorch_lightning`, with `model = wrap(model)`.",
    PLAIN: "The files of lightly's `examples/pytorch`, with `model = wrap(model, criterion=criterion)` and, in the "
    "loop, `loss = model(views)`. `step=` is a function of model and global views that returns the loss: the lines of "
    "the file's own loop that compute it.",
}
NOTES = {HOSTS[folder]: note for folder, note in _NOTES.items()}

OF_DENSECL = {"projector": "projection_head_global", "reduction": "sum"}
# What the documentation tells the user of these files to give. Others are tried without options, plain ones then with
# step=: the next attempt is made when an error advises an option of it.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    f"{LIGHTNING}/fastsiam.py": [{"global_crops": 4}],
    f"{PLAIN}/fastsiam.py": [{"global_crops": 4}, {"global_crops": 4, "step": STEP}],
    f"{LIGHTNING}/densecl.py": [{}, {"criterion": "criterion_global", **OF_DENSECL}],
    f"{PLAIN}/densecl.py": [{}, {**OF_DENSECL, "step": STEP}],
}
NO_WAY = r"cannot extend|nothing to add|beyond it|of your own"  # how an error says that no option helps
# Images and sides of global and local crops. A transformer takes one size, unless it is told.
SMALL = (6, (32, 24))
OF_TRANSFORMERS = {
    **dict.fromkeys(["aim", "dinov2", "ibot", "ijepa", "lejepa", "mae", "msn", "pmsn", "simmim"], (2, (224, 96))),
    **dict.fromkeys(["capi", "pixio"], (2, (256, 96))),
}
SPELLING = {
    "BarlowTwins": "Barlow Twins",
    "SwaV": "SwAV",
    "SMoGModel": "SMoG",
    "DetConS": "DetCon",
    "IJEPA": "I-JEPA",
    "IBOT": "iBOT",
}
OTHERWISE_NAMED = {"directclr.py": "DirectCLR", "swav_queue.py": "SwAV with a queue"}


@dataclass
class Result:
    """What a file's runs say; `problems` are what the documentation promises otherwise."""

    row: tuple[str, str, str, str]
    problems: list[str]
    options: dict[str, Any]
    crops: list[Tensor]  # of the first step with LoGo's defaults
    local_global: Tensor | None = None  # likewise


def rows() -> list[tuple[str, str, str, str]]:
    """(host, method, verdict, remark) of every file."""
    return [examine(name).row for name in files()]


def files() -> list[str]:
    """Their paths in lightly's examples. A loss that a file offers in a comment is another method, `path:loss`."""
    found = []
    for folder in HOSTS if ROOT else ():
        for path in sorted(Path(ROOT, "examples", folder).glob("*.py")):
            if ast.parse(path.read_text()).body:  # Lightning's I-JEPA says in a comment that it is to be written
                found.append(f"{folder}/{path.name}")
                found += [f"{folder}/{path.name}:DCLW"] if path.name == "dcl.py" else []
    return found


def source_of(name: str) -> str:
    path, _, variant = name.partition(":")
    source = Path(ROOT, "examples", path).read_text()
    if variant:
        source, count = re.subn(rf"# (.*criterion = {variant}Loss)", r"\1", source)
        assert count == 1, f"{path} has no {variant}Loss in a comment"
        source = f"from lightly.loss import {variant}Loss\n{source}"
    return source


@functools.cache
def examine(name: str) -> Result:
    path, _, variant = name.partition(":")
    folder, file = path.split("/")
    source = source_of(name)
    images, sides = OF_TRANSFORMERS.get(file[:-3], SMALL)

    def run(options: dict[str, Any] | None, global_crops: int) -> Run:
        crops = noise(images, sides, global_crops, 0 if options is None else 2)
        runs.append({LIGHTNING: run_lightning, PLAIN: run_plain}[folder](source, crops, options))
        return runs[-1]

    runs: list[Run] = []
    problems: list[str] = []
    local_global = None
    attempts = OPTIONS.get(path, [{}, {"step": STEP}] if folder == PLAIN else [{}])
    for options in attempts:
        global_crops = options.get("global_crops", 2)
        at_zero = run({**options, "affinity": None, "local_global_weight": 0}, global_crops)
        error = at_zero.error
        if error is None:
            break
        problems += refusal_problems(at_zero)
        if not any(f"{option}=" in str(error) for option in set().union(*attempts) - options.keys()):
            break
    if error is not None:
        if not re.search(NO_WAY, str(error)):
            problems.append(f"the last error does not say that there is no way: {error}")
        verdict, remark = "refused", str(error)
    else:
        host = run(None, global_crops)
        if host.error:
            raise RuntimeError(f"{path} does not run without LoGo") from host.error
        trained = run(options, global_crops)
        problems += differences(at_zero, host) + training_problems(trained, host, global_crops)
        learned = run({**options, "affinity": "learned"}, global_crops)
        problems += training_problems(learned, host, global_crops)
        if learned.error is None:
            now = learned.model.logo.affinity.parameters()
            if all(map(torch.equal, now, learned.affinity_before)):
                problems.append("the affinity does not learn")
        local_global = trained.terms[0].local_global if trained.terms else None
        given = ", ".join("`step=`" if value is STEP else f"`{key}={value!r}`" for key, value in options.items())
        verdict, remark = f"works with {given}" if given else "works", ""
    row = (HOSTS[folder], variant or method_name(source, file), verdict, remark)
    crops = [crop.detach() for crop in at_zero.views[0]]
    for done in runs:
        done.names.clear()  # classes live on in caches, and with them their module's names: models, trainers
    return Result(row, problems, options, crops, local_global)


def differences(at_zero: Run, host: Run) -> list[str]:
    """Where a run with LoGo's weights at zero is not the file's own: losses, gradients, what it keeps."""
    problems = []
    if len(at_zero.losses) != STEPS or not torch.allclose(torch.tensor(at_zero.losses), torch.tensor(host.losses)):
        problems.append(f"weights at zero: loss {at_zero.losses}, without LoGo {host.losses}")
    ours, theirs = [*at_zero.gradients, at_zero.state()], [*host.gradients, host.state()]
    for what, found, expected in zip(["gradient"] * STEPS + ["state"], ours, theirs, strict=True):
        if found.keys() != expected.keys():
            problems.append(f"weights at zero: {what} of {sorted(found.keys() ^ expected.keys())[:4]} on one side only")
        off = {name: distance(found[name], value) for name, value in expected.items() if name in found}
        worst = max(off, key=off.__getitem__)
        if off[worst] > 1e-4:
            problems.append(f"weights at zero: {what} of {worst} differs by {off[worst]:.2g} of its norm")
    return problems


def training_problems(run: Run, host: Run, global_crops: int) -> list[str]:
    """Where a run with LoGo does not train as it should."""
    if run.error:
        return [f"with LoGo: {run.error!r}"]
    problems = []
    if len(run.terms) != STEPS or not all(bool(value.isfinite()) for terms in run.terms for value in terms):
        problems.append(f"terms {run.terms}")
    if not all(view.grad is not None and view.grad.any() for view in run.views[0][global_crops:]):
        problems.append("a local crop has no gradient")
    # Whatever of the gradient at the global crops is not the host's own, scaled, came through a target.
    ours, theirs = (
        torch.cat([(torch.zeros_like(v) if v.grad is None else v.grad).flatten() for v in views[0][:global_crops]])
        for views in (run.views, host.views)
    )
    cosine = float(nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=0))
    if cosine < 0.9999:
        problems.append(f"the gradient at the global crops is not the host's (cosine {cosine:.4f})")
    if reached := sorted(run.gradients[0].keys() - host.gradients[0].keys()):
        problems.append(f"gradient for {reached[:4]}, which have none without LoGo")
    return problems


def refusal_problems(run: Run) -> list[str]:
    """What is wrong with the error that stopped a file."""
    error, model, problems = run.error, run.model, []
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).parent in {Path(package.__file__).parent for package in (logo_plugin, adapters)}
    # Wrong arguments are an error of the line that calls: an error of ours is one that our code raises.
    if not (ours and last.line.startswith("raise ") and isinstance(error, (ValueError, TypeError, RuntimeError))):
        problems.append(f"not an error of ours: {type(error).__name__} in {last.filename}:{last.lineno}: {error}")
    if run.gradients:
        problems.append(f"came in step {1 + len(run.gradients)}")
    if not hasattr(model, "logo") and type(model) is not run.own_class:
        problems.append("wrap() failed and left the model changed")
    modules = [*run.names.values(), *model.children()]
    names = {type(model).__name__, *(type(m).__name__ for m in modules if type(m).__name__.endswith("Loss"))}
    if not any(name in str(error) for name in names - {"LoGoLoss"}):
        problems.append(f"names none of {sorted(names)}: {error}")
    return problems


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the norm; some gradients are zero but for rounding, as that of a bias before BatchNorm."""
    if found.shape != expected.shape:
        return float("inf")
    off = (found.double() - expected.double()).norm()
    return float(off / expected.double().norm().clamp_min(1e-4)) if off > 1e-6 else 0.0


def method_name(source: str, file: str) -> str:
    """That of the file's last class, as it is usually spelled."""
    if file in OTHERWISE_NAMED:
        return OTHERWISE_NAMED[file]
    name = re.findall(r"^class (\w+)\(", source, flags=re.M)[-1]
    return SPELLING.get(name, name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in files():
        if not sys.argv[1:] or any(part in name for part in sys.argv[1:]):
            began = time.process_time()
            result = examine(name)
            print(f"{name} ({time.process_time() - began:.1f} s) | {result.row[2]} | {result.row[3]}", flush=True)
            for problem in result.problems:
                print("    !", problem, flush=True)
