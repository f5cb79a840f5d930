"""stable-pretraining: `spt.Module` with a forward of two views, and the two-view classes of its methods/.

The joint is the call `model(batch, stage)` in its training step: what the forward computes from the global views,
probes around it included, gets LoGo's terms into its "loss" before the step's own backward. The forward itself cannot
be overridden: it is an attribute of the instance. stable-pretraining is not imported.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from logo_plugin.adapters.stable_pretraining.batches import forward_batch, read_batch
from logo_plugin.adapters.stable_pretraining.methods import WRITTEN_OUT, check_loss, crossed, is_of, method_of
from torch import Tensor, nn

from logo_plugin.local_predictor import join_groups
from logo_plugin.observing import Observed, read_pairs
from logo_plugin.online import Heads, Names, Outputs, outputs_of
from logo_plugin.stepping import join_optimizer, log_terms, logo_step, warn_of_eval_mode
from logo_plugin.wrapped import LoGoModel

_LOSSES = ("byol_loss", "simclr_loss", "vicreg_loss", "barlow_loss", "nnclr_loss")


class StableModel(LoGoModel):
    """A Module of stable-pretraining: its forward is the host's step."""

    logo_names: ClassVar[Names] = Names(projector=("projector",), predictor=("predictor",))
    _logo_met: bool = False  # whether the step under way has come past LoGo

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The host's; in training on the global views, plus LoGo's terms, which are logged as `logo/...`."""
        own, (batch, stage) = super().__call__, [*args, None, None][:2]
        batch, stage = kwargs.get("batch", batch), kwargs.get("stage", kwargs.get("view2", stage))
        name = type(self).__name__
        if not (self.training and torch.is_grad_enabled()) or not isinstance(stage, (str, Tensor)):
            out = own(*args, **kwargs)
            if not self.training and stage == "fit":
                warn_of_eval_mode(name, out)
            return out
        if isinstance(stage, Tensor):
            raise ValueError(
                f"{name} with LoGo needs local crops, too: call model(batch, stage='fit') with a batch of "
                "MultiCropCollate instead of model(view1, view2)."
            )
        images, trimmed, boxes = read_batch(batch, self.logo_settings.globals, name)
        given = {**trimmed}
        out, terms = logo_step(self, lambda _: own(trimmed, stage=stage), images, boxes)
        # Its callbacks read what a forward has written into the batch.
        batch.update({key: value for key, value in trimmed.items() if value is not given.get(key)})
        log_terms(self, terms, len(images[0]))
        self._logo_met = True
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's, which in the classes of methods/ takes no batch, although their training step gives it one."""
        own = super().forward
        if args and isinstance(args[0], dict) and "view1" in inspect.signature(own).parameters:
            return forward_batch(self, own, *args, **kwargs)
        return own(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The host's."""
        self._logo_met = False
        out = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self._check_met()
        return out

    def manual_backward(self, *args: Any, **kwargs: Any) -> None:
        """The host's."""
        self._check_met()
        super().manual_backward(*args, **kwargs)  # type: ignore[misc]

    def on_fit_start(self) -> None:
        """Now the optimizers exist, and saved states are not loaded yet: LoGo's parameters join the model's."""
        super().on_fit_start()  # type: ignore[misc]
        trainer: Any = self.trainer
        _join(self, trainer.optimizers)

    def find_heads(self, projector: str | None) -> Heads:
        """The student's."""
        heads = super().find_heads(projector)
        return Heads(heads.owner, _student(heads.projector), heads.predictor and _student(heads.predictor))

    def find_backbone(self, heads: Heads) -> nn.Module | None:
        """The student's."""
        backbone = super().find_backbone(heads)
        return backbone and _student(backbone)

    def has_queue(self, criterion: nn.Module | None) -> bool:
        """As usual, and where the queue is the method's own."""
        return method_of(type(self)) == "MoCov2" or super().has_queue(criterion)

    def find_criterion(self) -> str | None:
        """The loss module of the forwards and classes; None for a class that has none."""
        if method_of(type(self)) in WRITTEN_OUT:
            return None
        children = dict(self.named_children())
        found = [name for name, child in children.items() if name in _LOSSES or is_of("losses", type(child))]
        for name in found:
            self.check_criterion(children[name])
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"{type(self).__name__} has {'several losses' if found else 'no loss'} of two views "
            f"({', '.join(found or _LOSSES)}), as methods do that mask or cluster, and supervised training. If it has "
            "one, name its attribute with criterion=; else LoGo cannot extend it."
        )

    def check_criterion(self, criterion: nn.Module) -> None:
        """Refuses the losses of methods that LoGo cannot extend."""
        check_loss(type(criterion), type(self).__name__)

    @contextmanager
    def watch_step(self, heads: Heads, outputs: Outputs) -> Iterator[Callable[[Tensor], Observed | None]]:
        """Watches the heads where there is no loss module."""
        if self.logo_settings.criterion is not None:
            with super().watch_step(heads, outputs) as observe:
                yield observe
            return
        teacher, name = getattr(self.projector, "teacher", heads.projector), type(self).__name__
        similarity = partial(WRITTEN_OUT[method_of(type(self))], self)
        with outputs_of([teacher]) as ran:

            def observe(loss: Tensor) -> Observed:
                pairs = crossed(outputs.get(heads.modules[-1], []), ran.get(teacher, []), name)
                return read_pairs(pairs, similarity, loss, name, check=not self._logo_sources)

            yield observe

    def _check_met(self) -> None:
        if self.training and torch.is_grad_enabled() and not self._logo_met:
            raise RuntimeError(
                f"the training step of {type(self).__name__} did not call self(batch, stage=...), where LoGo adds its "
                "terms: call that, not self.forward, and give the model a forward instead of a training_step."
            )


def mixin_for(cls: type) -> type[StableModel]:
    """What `wrap` mixes into a class of stable-pretraining.

    Raises:
        ValueError: If it is of a method that LoGo cannot extend.
    """
    method_of(cls)
    return StableModel


def _join(model: StableModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """The affinity into the optimizer that has it, or else has the projector; not where weights decay, if possible."""
    heads = model.find_heads(model.logo_settings.projector)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if heads.predictor is not None and model.logo_local_predictor is not None:
        join_groups(groups, heads.predictor, model.logo_local_predictor)
    own = set(model.logo.parameters())
    homes = [o for part in (own, {*heads.projector.parameters()}) for o in optimizers if part & _parameters(o)]
    if own and optimizers and not homes:
        raise ValueError(
            f"no optimizer of {type(model).__name__} has its projector, so LoGo does not know which one the affinity "
            "belongs to: widen the regex 'modules' of one in optim= so that it matches 'projector' or 'logo'."
        )
    if homes:
        undecayed = [group for group in homes[0].param_groups if not group.get("weight_decay")]
        for group in groups:
            if not any(group is kept for kept in undecayed or homes[0].param_groups):
                group["params"] = [parameter for parameter in group["params"] if parameter not in own]
        join_optimizer(model, heads.predictor, homes[0].param_groups)


def _parameters(optimizer: torch.optim.Optimizer) -> set[Tensor]:
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def _student(module: nn.Module) -> nn.Module:
    """The side of a TeacherStudentWrapper that learns; another module itself."""
    student = getattr(module, "student", None)
    return student if isinstance(student, nn.Module) else module
