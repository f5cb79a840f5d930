"""Every file of lightly's examples/pytorch and examples/pytorch_lightning, run as it is and with LoGo: `rows()`.

A file's own statements are executed one after the other in one namespace. Only what makes the run small or offline is
replaced, by name: data, device, trainer. `wrap` is called where a user would put it: before the trainer or the optimizer is
made. In a plain loop the lines from the batch to the loss give way to `loss = model(batch[0])`, or become `step`.

    LIGHTLY_ROOT=... python tests/methods_lightly.py [part of a path ...]
"""

import ast
import functools
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from logo_plugin import wrap

ROOT = os.environ.get("LIGHTLY_ROOT")
HOSTS = {"pytorch_lightning": "lightly, Lightning", "pytorch": "lightly, plain PyTorch"}
STEP = "step="  # the option whose value is the file's own lines

# What the docs tell the user of this method to give. Other files are tried without options, plain ones then with step=.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "pytorch_lightning/fastsiam.py": [{"global_crops": 4}],
    "pytorch/fastsiam.py": [{"global_crops": 4, "step": STEP}],
}
# Global and local crops for files whose transformer takes one size.
SIZES = dict.fromkeys("aim dinov2 ibot ijepa lejepa mae msn pmsn simmim".split(), (224, 96)) | dict.fromkeys(
    ("capi", "pixio"), (256, 96)
)
IMAGES, STEPS = 6, 2


def rows() -> list[tuple[str, str, str, str]]:
    """(host, method, verdict, reason) of every file; DCL's files have a second loss in a comment."""
    return [result.row for result in results().values()]


@functools.cache
def results() -> dict[str, "Result"]:
    return {name: examine(name) for name in files()}


def files() -> list[str]:
    if not ROOT:
        return []
    found = []
    for folder in HOSTS:
        for path in sorted(Path(ROOT, "examples", folder).glob("*.py")):
            if ast.parse(path.read_text()).body:  # Lightning's I-JEPA is a comment that says where it will be
                found.append(f"{folder}/{path.name}")
                found += [f"{folder}/{path.name}:DCLW"] if path.name == "dcl.py" else []
    return found


@dataclass
class Result:
    """What a file's runs say. `problems` break a promise of the documentation."""

    host: str
    method: str
    verdict: str = ""
    reason: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def row(self) -> tuple[str, str, str, str]:
        return self.host, self.method, self.verdict, self.reason


@dataclass
class Run:
    """A few steps of a file: their losses, gradients, what they left behind, and how they ended."""

    names: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    views: list[list[Tensor]] = field(default_factory=list)
    terms: list[Any] = field(default_factory=list)
    affinity_before: list[Tensor] = field(default_factory=list)
    error: Exception | None = None

    @property
    def model(self) -> Any:
        return self.names["model"]

    def record(self, loss: Tensor) -> None:
        self.losses.append(float(loss))
        self.terms.append(getattr(self.model, "logo_terms", None))

    def record_gradients(self) -> None:
        self.gradients.append(
            {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None and is_own(name)}
        )

    def state(self) -> dict[str, Tensor]:
        """Parameters, queues, averages of all modules of the file, BatchNorm's statistics and LoGo's parts apart."""
        found = {}
        for key, module in self.names.items():
            if isinstance(module, nn.Module):
                for name, part in module.named_modules():
                    held = {**part._parameters, **part._buffers, **vars(part)}
                    found |= {f"{key}.{name}.{n}": v for n, v in held.items() if isinstance(v, Tensor)}
        skipped = ("running_mean", "running_var", "num_batches_tracked")
        return {name: v.detach() for name, v in found.items() if is_own(name) and not name.endswith(skipped)}


def is_own(name: str) -> bool:
    return not re.search(r"\b_?logo(_|\b)", name)


def examine(name: str) -> Result:
    path, _, variant = name.partition(":")
    folder, file = path.split("/")
    source = Path(ROOT or "", "examples", path).read_text()
    if variant:  # "or use the weighted DCLW loss", says the file
        source, count = re.subn(rf"# (.*criterion = {variant}Loss)", r"\1", source)
        assert count == 1, path
        source = f"from lightly.loss import {variant}Loss\n{source}"
    run = functools.partial(RUNS[folder], source, sizes=SIZES.get(file[:-3], (32, 24)))
    attempts = OPTIONS.get(path, [{}] if folder == "pytorch_lightning" else [{}, {"step": STEP}])
    result = Result(HOSTS[folder], variant or method_name(source, file))
    for options in attempts:
        wrapped = run(options={**options, "affinity": None, "local_global_weight": 0})
        if not wrapped.error:
            break
        result.problems = refusal_problems(wrapped)
        result.reason = first_sentence(str(wrapped.error))
        result.verdict = "crashes" if result.problems else "refused"
        if STEP not in str(wrapped.error):
            break
    if wrapped.error:
        advised = set(re.findall(r"\b(criterion|projector|online|target|step|global_crops|similarity)=", str(wrapped.error)))
        if advised:
            result.problems.append(f"the refusal advises {sorted(advised)}, which does not help: {wrapped.error}")
        return result
    crops = options.get("global_crops", 2)
    host = run(options=None, global_crops=crops)
    if host.error:
        raise RuntimeError(f"{path} does not run without LoGo") from host.error
    result.problems = [f"weights at zero: {p}" for p in differences(wrapped, host)]
    result.problems += training_problems(run(options=options), host, crops)
    given = ", ".join(f"`{k}=`" if v is STEP else f"`{k}={v}`" for k, v in options.items())
    result.verdict = "trains wrongly" if result.problems else f"works with {given}" if given else "works"
    result.reason = result.problems[0] if result.problems else ""
    return result


def differences(found: Run, expected: Run) -> list[str]:
    """Whether losses, gradients and state of two runs of the same steps differ."""
    problems = []
    if len(found.losses) != STEPS or found.losses != expected.losses:
        close = torch.allclose(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-5, atol=1e-6)
        problems += [] if close else [f"loss {found.losses}, the file's is {expected.losses}"]
    pairs = zip(["gradient"] * STEPS + ["state"], [*found.gradients, found.state()], [*expected.gradients, expected.state()])
    for what, ours, theirs in pairs:
        if ours.keys() != theirs.keys():
            problems.append(f"{what} of {sorted(ours.keys() ^ theirs.keys())[:4]} on one side only")
        common = [n for n in theirs if n in ours]
        off = {n: distance(ours[n], theirs[n]) for n in common}
        worst = max(off, key=off.get, default=None) if off else None
        if worst is not None and off[worst] > 1e-4:
            problems.append(f"{what} {worst} differs by {off[worst]:.2g} of its norm")
    return problems


def distance(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    off = (found.double() - expected.double()).norm()
    # Some gradients are zero but for rounding, as that of a bias before BatchNorm.
    return float(off / expected.double().norm().clamp_min(1e-4)) if off > 1e-6 else 0.0


def training_problems(run: Run, host: Run, global_crops: int) -> list[str]:
    """What a run with LoGo's defaults must show."""
    if run.error:
        return [f"fails with LoGo's defaults: {run.error!r}"]
    problems = []
    for terms in run.terms:
        if terms is None or not all(bool(value.isfinite()) for value in terms):
            problems.append(f"terms {terms}")
    first, alone = run.views[0], host.views[0]
    if not all(view.grad is not None and bool(view.grad.abs().max() > 0) for view in first[global_crops:]):
        problems.append("a local crop has no gradient")
    # LoGo scales the host's own gradient at global crops; anything else came through a target.
    ours, theirs = (
        torch.cat([(torch.zeros_like(v) if v.grad is None else v.grad).flatten() for v in views[:global_crops]])
        for views in (first, alone)
    )
    cosine = float(nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=0))
    if cosine < 0.9999:
        problems.append(f"the gradient at the global crops is not the host's (cosine {cosine:.4f})")
    untouched = run.gradients[0].keys() - host.gradients[0].keys()
    if untouched:
        problems.append(f"gradient for targets {sorted(untouched)[:4]}")
    after = [p.detach() for p in run.model.logo.affinity.parameters()]
    if not any(not torch.equal(a, b) for a, b in zip(after, run.affinity_before, strict=True)):
        problems.append("the affinity does not learn")
    return problems


def refusal_problems(run: Run) -> list[str]:
    """What is wrong with an error that stopped a file."""
    error, problems = run.error, []
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    where = last.f_globals.get("__name__", "?")
    if not where.startswith("logo_plugin") or not isinstance(error, (ValueError, TypeError, RuntimeError)):
        line = traceback.extract_tb(error.__traceback__)[-1]
        problems.append(f"not an error of ours: {type(error).__name__} in {where}:{line.lineno}: {str(error)[:200]}")
    if run.gradients:
        problems.append(f"came after {len(run.gradients)} steps of the optimizer")
    model = run.names["model"]
    modules = [m for m in run.names.values() if isinstance(m, nn.Module)] + list(model.children())
    names = {type(model).__name__} | {type(m).__name__ for m in modules if type(m).__name__.endswith("Loss")}
    if not any(name in str(error) for name in names):
        problems.append(f"names none of {sorted(names)}: {str(error)[:200]}")
    return problems


def first_sentence(text: str) -> str:
    return re.match(r".*?(?:[.](?=\s)|$)", " ".join(text.split()))[0].rstrip(".") + "."


def method_name(source: str, file: str) -> str:
    """The name of the file's model class, told apart where two files share one."""
    if file in ("directclr.py", "swav_queue.py"):
        return {"directclr.py": "DirectCLR", "swav_queue.py": "SwAV with a queue"}[file]
    classes = re.findall(r"^class (\w+)\(", source, flags=re.M)
    return {"SwaV": "SwAV", "SMoGModel": "SMoG", "DetConS": "DetCon", "IJEPA": "I-JEPA", "IBOT": "iBOT"}.get(
        classes[-1], classes[-1]
    )


# Running a file.


class Enough(Exception):
    """Ends a plain loop."""


class Batches:
    """In the place of the file's data loader: the same few batches of noise in every run, then `then`."""

    def __init__(self, views: list[list[Tensor]], then: type[Exception] | None = None):
        self.views, self.then = views, then

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self):
        for i, views in enumerate(self.views):
            torch.manual_seed(i)
            yield [views, torch.zeros(IMAGES, dtype=torch.long)]
        if self.then:
            raise self.then


def noise(sizes: tuple[int, int], global_crops: int, local_crops: int) -> list[list[Tensor]]:
    """The views of each step; the global ones do not depend on how many local ones there are."""
    batches = []
    for i in range(STEPS):
        generator = torch.Generator().manual_seed(i)
        images = torch.randn(IMAGES, 3, 8, 8, generator=generator)  # what the views share, as of one photograph
        views = []
        for side in [sizes[0]] * global_crops + [sizes[1]] * local_crops:
            view = nn.functional.interpolate(images, (side, side))
            views.append((view + torch.randn(view.shape, generator=generator)).requires_grad_())
        batches.append(views)
    return batches


def run_lightning(source: str, *, sizes: tuple[int, int], options: dict[str, Any] | None, global_crops: int = 2) -> Run:
    run = start(sizes, options, global_crops)

    class Recorder(pl.Callback):
        def on_after_backward(self, trainer, module):
            run.record_gradients()

        def on_train_batch_end(self, trainer, module, outputs, *_):
            run.record(outputs["loss"])

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, callbacks=[Recorder()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    instead = {"trainer": trainer, "dataloader": Batches(run.views)}
    execute(run, ast.parse(source), instead, before="trainer", then=lambda: wrap_it(run, options))
    return run


def run_plain(source: str, *, sizes: tuple[int, int], options: dict[str, Any] | None, global_crops: int = 2) -> Run:
    run, tree = start(sizes, options, global_crops), ast.parse(source)
    instead = dict.fromkeys(("dataloader", "data_loader"), Batches(run.views, then=Enough))
    step = None if options is None else shorten_loop(tree, options.get("step") is STEP)

    def then() -> None:
        if options is not None:
            exec(code([step]), run.names)
            losses = [n for n, v in run.names.items() if "criterion" in n and isinstance(v, nn.Module)]
            steps = {"step": run.names["step"]} if options.get("step") is STEP else {}
            wrap_it(run, {"criterion": run.names[losses[0]], **options, **steps})

    def record(*_: Any) -> None:
        run.record_gradients()
        run.record(run.names["loss"].detach())

    hook = register_optimizer_step_pre_hook(record)
    execute(run, tree, instead, before="optimizer", then=then)
    hook.remove()
    return run


RUNS = {"pytorch_lightning": run_lightning, "pytorch": run_plain}


def start(sizes: tuple[int, int], options: dict[str, Any] | None, global_crops: int) -> Run:
    """Two local crops join the global ones when there are options, that is, LoGo."""
    crops = global_crops if options is None else options.get("global_crops", 2)
    return Run(views=noise(sizes, crops, 0 if options is None else 2))


def wrap_it(run: Run, options: dict[str, Any] | None) -> None:
    if options is not None:
        run.names["model"] = wrap(run.model, **options)
        if run.model.logo.affinity is not None:
            run.affinity_before = [p.detach().clone() for p in run.model.logo.affinity.parameters()]


def execute(run: Run, tree: ast.Module, instead: dict[str, Any], *, before: str, then: Callable[[], None]) -> None:
    """The file's statements, in order; `then` is called before the name `before` gets its value."""
    instead = {"device": "cpu", "dataset": None, "transform": None, "collator": None, **instead}
    run.names["__name__"] = "example"
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for statement in tree.body:
                assigned = assigned_in(statement) if isinstance(statement, ast.Assign) else set()
                if before in assigned:
                    then()
                if assigned & instead.keys():
                    run.names |= {name: instead[name] for name in assigned}
                else:
                    exec(code([statement]), run.names)
    except Enough:
        pass
    except Exception as error:
        run.error = error


def shorten_loop(tree: ast.Module, all_in_step: bool) -> ast.stmt:
    """Puts `loss = model(views)` in the place of the lines that make the loss, and gives these back as a function.

    Unless they are all in the function, updates of the target network stay in the loop.
    """
    loop = next(n for n in ast.walk(tree) if isinstance(n, ast.For) and "loader" in ast.unparse(n.iter))
    uses = re.compile(r"total_loss \+=|loss\.backward")
    at = next(i for i, line in enumerate(loop.body) if uses.match(ast.unparse(line)))
    head, tail = loop.body[:at], loop.body[at:]
    batch = "batch" if "batch" in assigned_in(loop.target) else ast.unparse(loop.target)
    views = "batch[0]" if batch == "batch" else loop.target.elts[0].id
    kept = [] if all_in_step else [line for line in head if re.match(r"(utils\.)?update_momentum", ast.unparse(line))]
    loop.body = [*kept, *ast.parse(f"loss = model({views})").body, *tail]
    names = set().union(*map(assigned_in, head)) - {"model", "views"}
    step = ast.parse(f"def step(model, views):\n global {', '.join(names)}\n {batch} = (views, None)\n return loss").body[0]
    step.body[-1:-1] = head
    return step


def code(statements: list[ast.stmt]) -> CodeType:
    return compile(ast.fix_missing_locations(ast.Module(statements, [])), "<example>", "exec")


def assigned_in(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    for name in files():
        if not sys.argv[1:] or any(part in name for part in sys.argv[1:]):
            began = time.process_time()
            result = examine(name)
            print(f"{name} ({time.process_time() - began:.1f} s) | {result.verdict} | {result.reason}", flush=True)
            print(*(f"    ! {problem}" for problem in result.problems), sep="\n", end="\n" * bool(result.problems))
