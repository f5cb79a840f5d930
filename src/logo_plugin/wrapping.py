"""`wrap`: finds the adapter for what it is given."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from logo_plugin.checks import unknown_option
from logo_plugin.wrapped import LoGoModel, Settings, attach

T = TypeVar("T")
# What marks a module that somebody else put around the model, and the call that did.
_CALLS = {"_orig_mod": "torch.compile", "_forward_module": "fabric.setup"}


def wrap(
    x: T,
    *,
    affinity: nn.Module | Literal["auto", "cosine", "learned"] | None = "auto",
    local_weight: float | None = None,
    gradient_ratio: float | None = None,
    anneal_repulsion: bool | None = None,
    local_global_weight: float | None = None,
    affinity_loss: Literal["logistic", "difference"] | None = None,
    positive_noise: float | None = None,
    repulsion: Literal["softplus", "logit"] | None = None,
    reduction: Literal["pairs", "sum"] | None = None,
    average_targets: bool | None = None,
    preset: Literal["paper", "release"] | None = None,
    global_crops: int | None = None,
    criterion: str | nn.Module | None = None,
    projector: str | None = None,
    online: str | Callable[[Tensor], Any] | None = None,
    target: str | Callable[[Tensor], Tensor] | None = None,
    step: Callable[[Any, list[Tensor]], Tensor] | None = None,
    concat_local_crops: bool = False,
    checkpoint_local_crops: bool = False,
    local_running_stats: bool = True,
    weigh_overlap: bool = False,
    local_predictor: bool = False,
    **others: Any,
) -> T:
    """Adds LoGo to a self-supervised model written for a framework that logo_plugin knows.

    The model's own training step still runs, on the global crops; LoGo forwards the local crops and adds its terms.
    Give the data loader `collate_fn=MultiCropCollate(...)` and change nothing else. In the first step LoGo finds out
    from the calls of the model's criterion what local crops are to be pulled to; a model that it cannot extend is
    refused, before anything is trained. With `affinity=None, local_global_weight=0` the loss is the model's own.

    A LightningModule keeps its `training_step`, and logs `logo/global_global`, `logo/local_global`, `logo/local_local`
    and `logo/affinity`. A plain module learns to take a list of views: `loss = model(views)`; give it `criterion=`, and
    wrap it before building the optimizer. Both keep the terms of the last step in `model.logo_terms`.

    Args:
        x: A model of two views as lightly's examples and benchmarks write them, a LightningModule or plain
            `nn.Module`, the instance or its class (also as a decorator). Or the class of a solo-learn method, which
            takes the options of `logo_plugin.adapters.solo.wrap` instead of these.
        affinity: What is repelled: "cosine", the cosine of two projections (`LoGoLoss`); "learned" builds the paper's
            `Affinity` for the projector's width; a module, of which each model of a class has a copy; None repels
            nothing, plain multi-crop. "auto" is "learned" with a preset, else "cosine".
        local_weight: As the next eight, an option of `LoGoLoss`; None leaves it at its default.
        gradient_ratio: See `LoGoLoss`. The cosine's is 0.3 where the criterion has a memory bank (MoCo).
        anneal_repulsion: See `LoGoLoss`. A LightningModule's Trainer says how far the training is; a plain loop calls
            `model.logo.anneal(steps done / steps in all)` before each step.
        local_global_weight: See `LoGoLoss`.
        affinity_loss: See `LoGoLoss`.
        positive_noise: See `LoGoLoss`.
        repulsion: See `LoGoLoss`.
        reduction: See `LoGoLoss`.
        average_targets: See `LoGoLoss`.
        preset: "paper" or "release": the options of `LoGoLoss.paper` or `LoGoLoss.release`, except those given.
        global_crops: How many of the views are global; they come first. Default: 2. FastSiam: 4.
        criterion: The loss module or its attribute name. Default: `criterion`.
        projector: Attribute whose output the affinity compares. Default: `projection_head` and the like.
        online: Method (name or callable) that takes images to what the criterion is given; its last output counts.
            Default: the first of `forward_student`, `forward_query_encoder` and `forward` that the class has, if it
            runs the heads, else backbone, projector and predictor in turn; then the output of the head that the
            criterion is given in the host's step.
        target: Method (name or callable) that takes global crops to targets. Default: the targets that the criterion
            was given.
        step: For a plain module whose loop LoGo does not know: (model, global views) -> loss, as the loop computes it.
        concat_local_crops: Forward all local crops as one batch, whose BatchNorm statistics they then share. Faster on
            small crops.
        checkpoint_local_crops: Compute what the backbone keeps of local crops again in backward, instead of keeping
            it: memory of two views, time of one forward more per local crop.
        local_running_stats: Whether local crops move BatchNorm's running statistics, which evaluation reads, as global
            crops do (and as in other multi-crop methods). With False they are those of the model without LoGo.
        weigh_overlap: Multiply the repulsion of two local crops by 1 - IoU of their boxes. Needs
            `MultiCropCollate(return_boxes=True)`; a plain module takes them as `model(views, boxes)`.
        local_predictor: Give local crops a predictor of their own (MULAN, arXiv 2602.05845): a copy of the model's,
            made when wrapping, in the same optimizer group and with the same initial values (MULAN draws others). The
            model's own then sees global crops only.
        **others: Of solo-learn's methods only; for other models unknown options, which are refused.

    Returns:
        The same instance, wrapped in place; or, for a class, a subclass of it of the same name.

    Raises:
        TypeError: If `x` is neither a module nor a module class, or an option is unknown.
        ValueError: If `x` lacks a part that LoGo needs, or is of a kind that LoGo cannot extend; the message names
            the option that helps, or says that there is none.
    """
    options = {name: value for name, value in locals().items() if name not in ("x", "others")}
    cls: Any = x if inspect.isclass(x) else type(x)
    if not issubclass(cls, nn.Module):
        raise TypeError(
            f"wrap() expects a torch.nn.Module (or LightningModule), or such a class, got {x!r}. "
            "For your own training loop use LoGoLoss directly."
        )
    made = next((call for mark, call in _CALLS.items() if hasattr(x, mark)), None)
    if made or issubclass(cls, (DataParallel, DistributedDataParallel)):
        made = made or "DistributedDataParallel"
        raise TypeError(f"wrap the model first, then the rest: {made}(wrap(model)), not wrap({made}(model)).")
    solo_base = getattr(sys.modules.get("solo.methods.base"), "BaseMethod", None)
    if solo_base is not None and issubclass(cls, solo_base):
        from logo_plugin.adapters import solo

        default = inspect.signature(wrap).parameters
        return solo.wrap(x, **others | {n: v for n, v in options.items() if v is not default[n].default})  # type: ignore[arg-type, return-value]
    for name in others:
        raise TypeError(f"wrap(): {unknown_option(name, options)}")
    settings = Settings(**{field.name: options.pop(field.name) for field in fields(Settings)})
    stable_base = getattr(sys.modules.get("stable_pretraining.module"), "Module", None)
    if stable_base is not None and issubclass(cls, stable_base):
        from logo_plugin.adapters.stable_pretraining.model import mixin_for

        mixin: type[LoGoModel] = mixin_for(cls)
    elif hasattr(cls, "training_step"):
        from logo_plugin.adapters.lightly import LightningModel

        mixin = LightningModel
    else:
        from logo_plugin.adapters.pytorch import PlainModel

        mixin = PlainModel
    preset = options.pop("preset")
    return attach(x, mixin, settings, options, preset)  # type: ignore[no-any-return]
