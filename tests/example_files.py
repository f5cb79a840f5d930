"""Runs a file of lightly's examples for two small steps, as it is or with LoGo: `run_lightning`, `run_plain`.

The file's own statements are executed one after the other in one namespace. Only what makes the run small or offline
is replaced, by name: data, device, trainer. `wrap` is called where a user would put it, before the trainer or the
optimizer is made. In a plain loop the lines from the batch to the loss give way to `loss = model(batch[0])`, or become
`step`.
"""

import ast
import io
import logging
import re
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import reduce
from types import CodeType
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from logo_plugin import wrap

STEPS = 2
STEP = "step="  # as the value of the option: the file's own lines


@dataclass
class Run:
    """What happened: losses, gradients by step and name, gradients at the views, LoGo's terms, the error at the end."""

    views: list[list[Tensor]]
    names: dict[str, Any] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    terms: list[Any] = field(default_factory=list)
    own_class: type | None = None
    affinity_before: list[Tensor] = field(default_factory=list)
    error: Exception | None = None

    @property
    def model(self) -> Any:
        return self.names["model"]

    def add_logo(self, options: dict[str, Any]) -> None:
        self.own_class = type(self.model)
        self.names["model"] = wrap(self.model, **options)
        self.model.logo.anneal(0.0)  # a loop's, whose length the file does not say; a Trainer says its own
        if self.model.logo.affinity is not None:
            self.affinity_before = [p.detach().clone() for p in self.model.logo.affinity.parameters()]

    def record_gradients(self) -> None:
        found = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.gradients.append({name: grad for name, grad in found.items() if _is_hosts(name)})

    def record_loss(self, loss: Tensor) -> None:
        self.losses.append(float(loss.detach()))
        self.terms.append(getattr(self.model, "logo_terms", None))

    def state(self) -> dict[str, Tensor]:
        """The tensors of the file's modules, but LoGo's own and BatchNorm's statistics, which local crops move."""
        found = {}
        for key, module in self.names.items():
            for name, part in module.named_modules() if isinstance(module, nn.Module) else ():
                bank = getattr(part, "bank", None)
                if bank is None or bank.numel():  # a bank that is not used has a pointer that nobody set
                    held = {**part._parameters, **part._buffers, **vars(part)}
                    found |= {f"{key}.{name}.{n}": v.detach() for n, v in held.items() if isinstance(v, Tensor)}
        moved = ("running_mean", "running_var", "num_batches_tracked")
        return {name: value for name, value in found.items() if _is_hosts(name) and not name.endswith(moved)}


def run_lightning(source: str, views: list[list[Tensor]], options: dict[str, Any] | None = None) -> Run:
    """A file that ends in `trainer.fit`; with LoGo if there are options for `wrap`."""
    run = Run(views)

    class Recorder(pl.Callback):
        def on_after_backward(self, trainer, module):
            run.record_gradients()

        def on_train_batch_end(self, trainer, module, outputs, *_):
            run.record_loss(outputs["loss"])

    with _quiet():
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            callbacks=[Recorder()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    instead = {"trainer": trainer, "dataloader": _Batches(views)}
    with_logo = None if options is None else lambda: run.add_logo(options)
    _execute(run, ast.parse(source), instead, before="trainer", call=with_logo)
    return run


def run_plain(source: str, views: list[list[Tensor]], options: dict[str, Any] | None = None) -> Run:
    """A file that ends in a loop; its first criterion is given to `wrap`."""
    run, tree = Run(views), ast.parse(source)
    step = None if options is None else _shorten_loop(tree, all_in_step="step" in options)

    def with_logo() -> None:
        exec(_code(step), run.names)
        criterion = next(v for n, v in run.names.items() if "criterion" in n and isinstance(v, nn.Module))
        steps = {"step": run.names["step"]} if "step" in options else {}
        run.add_logo({"criterion": criterion, **options, **steps})

    def record(*_: Any) -> None:
        run.record_gradients()
        run.record_loss(run.names["loss"])

    instead = dict.fromkeys(("dataloader", "data_loader"), _Batches(views, then=_EnoughError))
    hook = register_optimizer_step_pre_hook(record)
    _execute(run, tree, instead, before="optimizer", call=None if options is None else with_logo)
    hook.remove()
    return run


def before_training(source: str) -> dict[str, Any]:
    """The file's names before its first step: those of a run, with the same random numbers."""
    tree = ast.parse(source)
    end = next(i for i, line in enumerate(tree.body) if isinstance(line, ast.For) or "trainer" in _assigned(line))
    tree.body = tree.body[:end]
    run = Run(views=[])
    _execute(run, tree, dict.fromkeys(("dataloader", "data_loader"), ()), before="", call=None)
    return run.names


def noise(images: int, sides: tuple[int, int], global_crops: int, local_crops: int) -> list[list[Tensor]]:
    """The views of each step; the global ones do not depend on how many local ones there are."""
    batches = []
    for i in range(STEPS):
        generator = torch.Generator().manual_seed(i)
        shared = torch.randn(images, 3, 8, 8, generator=generator)  # by the views of an image
        views = []
        for side in [sides[0]] * global_crops + [sides[1]] * local_crops:
            view = nn.functional.interpolate(shared, (side, side))
            views.append((view + torch.randn(view.shape, generator=generator)).requires_grad_())
        batches.append(views)
    return batches


class _EnoughError(Exception):
    """Ends a plain loop."""


class _Batches:
    """In the place of the file's data loader: (views, targets), and the same random numbers in every run."""

    def __init__(self, views: list[list[Tensor]], then: type[Exception] | None = None):
        self.views, self.then = views, then

    def __len__(self) -> int:
        return len(self.views)

    def __iter__(self):
        for i, views in enumerate(self.views):
            torch.manual_seed(i)
            yield [views, torch.zeros(len(views[0]), dtype=torch.long)]
        if self.then:
            raise self.then


def _execute(
    run: Run, tree: ast.Module, instead: dict[str, Any], *, before: str, call: Callable[[], None] | None
) -> None:
    """The file's statements, in order, but values of our own for some names; `call` comes before one of them."""
    instead = {"device": "cpu", "dataset": None, "transform": None, "collator": None, **instead}
    run.names["__name__"] = "example"
    torch.manual_seed(0)
    try:
        with _quiet():
            for statement in tree.body:
                assigned = _assigned(statement) if isinstance(statement, ast.Assign) else set()
                if call and before in assigned:
                    call()
                if assigned & instead.keys():
                    run.names |= {name: instead[name] for name in assigned}
                else:
                    exec(_code(statement), run.names)
    except _EnoughError:
        pass
    except Exception as error:
        run.error = error


def _shorten_loop(tree: ast.Module, all_in_step: bool) -> ast.stmt:
    """Puts `loss = model(views)` in the place of the lines that make the loss, and gives these back as a function.

    Unless they are all in the function, updates of the target network stay in the loop.
    """
    loop = next(n for n in ast.walk(tree) if isinstance(n, ast.For) and "loader" in ast.unparse(n.iter))
    uses = re.compile(r"total_loss \+=|loss\.backward")
    at = next(i for i, line in enumerate(loop.body) if uses.match(ast.unparse(line)))
    head, tail = loop.body[:at], loop.body[at:]
    batch = "batch"
    if "batch" not in _assigned(loop.target):
        batch, loop.target = ast.unparse(loop.target), ast.Name("batch", ast.Store())
    kept = [] if all_in_step else [line for line in head if re.match(r"(utils\.)?update_momentum", ast.unparse(line))]
    loop.body = [*kept, *ast.parse("loss = model(batch[0])").body, *tail]
    names = ", ".join(reduce(set.union, map(_assigned, head), set()) - {"model", "views"})
    step = ast.parse(f"def step(model, views):\n global {names}\n {batch} = (views, None)\n return loss").body[0]
    step.body[-1:-1] = head
    return step


@contextmanager
def _quiet():
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def _code(statement: ast.stmt) -> CodeType:
    return compile(ast.fix_missing_locations(ast.Module([statement], [])), "<example>", "exec")


def _assigned(tree: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _is_hosts(name: str) -> bool:
    return not re.search(r"\b_?logo(_|\b)", name)
