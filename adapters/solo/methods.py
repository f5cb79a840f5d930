"""Which of solo-learn's methods LoGo carries, and what in each of them is prediction, target and projection."""

import inspect
from typing import Any

import torch
from logo_plugin.adapters.solo import similarities
from logo_plugin.adapters.solo.refused import reason
from logo_plugin.adapters.solo.step import LoGo, Outputs
from solo import methods
from solo.methods.base import BaseMethod, BaseMomentumMethod
from torch import Tensor

from logo_plugin.similarities import Similarity

KNOWN: dict[type, Any] = {}


class Neighbours(BaseMethod):
    """The NN methods: the targets are the nearest neighbours that the method looks up in its queue."""

    def find_nn(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """As the method's, and kept for the local crops."""
        found: tuple[Tensor, Tensor] = super().find_nn(z)
        self.__dict__.get("_captured", {}).setdefault("neighbours", []).append(found[1])
        return found


def wrap(
    method: type,
    *,
    pred: str | None = None,
    target: str | None = None,
    proj: str | None = None,
    scale: float | None = None,
    similarity: Similarity | None = None,
) -> type:
    """Gives the LoGo class of a solo-learn method.

    Args:
        method: A class of `solo.methods`, a subclass of one, or your own subclass of `BaseMethod` or
            `BaseMomentumMethod`: then name its outputs.
        pred: Key of the online prediction in what `forward` returns.
        target: Key of the target in what the base's `training_step` returns. LoGo compares local crops with
            it detached.
        proj: Key of the projection that the affinity compares, as `pred` (default: `pred` itself).
        scale: What the method multiplies its mean similarity with: 2 for a sum over both directions,
            1 (default) for their mean.
        similarity: The method's similarity loss, (pred, target) -> scalar. The first training step checks it:
            `scale` times its mean over the two global pairs must be the method's loss.

    Returns:
        The class. LoGo's options are read from `cfg.method_kwargs.logo`. Assign it to the name
        `LoGo<method's name>` in the method's module if it is to be pickled, and add it to
        `solo.methods.METHODS` to choose it as `method=`.

    Raises:
        TypeError: If `method` is no solo-learn method class, is one that LoGo cannot carry, or its outputs are not
            known.
    """
    if not inspect.isclass(method) or not issubclass(method, BaseMethod):
        raise TypeError(f"wrap() takes a solo-learn method class such as solo.methods.BYOL, got {method!r}.")
    if method in (BaseMethod, BaseMomentumMethod):
        raise TypeError(f"{method.__name__} is a base class and has no loss between crops: wrap a subclass of it.")
    why_not = reason(method)
    if why_not:
        raise TypeError(f"LoGo cannot carry {method.__name__}: {why_not}")
    constant = None if similarity is None else lambda model, indexes: similarity
    given: dict[str, Any] = dict(pred=pred, target=target, proj=proj, scale=scale, similarity=constant)
    given = {name: value for name, value in given.items() if value is not None}
    if not given and (method in KNOWN or issubclass(method, LoGo)):
        return KNOWN.get(method, method)  # type: ignore[no-any-return]
    parent = next((KNOWN[base] for base in method.__mro__ if base in KNOWN), None)
    if parent is None:
        missing = [name for name in ("pred", "target", "similarity") if name not in given]
        if missing:
            raise TypeError(
                f"{method.__name__} is not one of {[known.__name__ for known in KNOWN]}: "
                f"tell wrap() its {', '.join(missing)}, as in wrap({method.__name__}, "
                'pred="p", target="momentum_z", proj="z", scale=2.0, similarity=loss_function).'
            )
        return _logo_class(method, Outputs(**{"proj": pred, "scale": 1.0} | given))
    mixins = (Neighbours,) if issubclass(parent, Neighbours) else ()
    if given.keys() & {"pred", "proj"}:
        given["hidden"] = False  # the first forward finds out
    return _logo_class(method, parent.outputs._replace(**given), *mixins)


def _logo_class(method: type, outputs: Outputs, *mixins: type, module: str | None = None) -> type:
    base = BaseMomentumMethod if issubclass(method, BaseMomentumMethod) else BaseMethod

    class Capture(base):  # type: ignore[misc, valid-type]
        """Stands between the method and its base: keeps what the base's step returns."""

        def training_step(self, batch: list[Any], batch_idx: int) -> dict[str, Any]:
            outputs: dict[str, Any] = super().training_step(batch, batch_idx)
            if torch.is_grad_enabled():
                # A nothing in its place, at whose gradient LoGo sees what the method makes of it.
                class_loss = outputs["loss"]
                self.__dict__["_captured"] = outputs
                outputs.update(class_loss=class_loss, loss=torch.zeros_like(class_loss, requires_grad=True))
            return outputs

    namespace = {"outputs": outputs, "__module__": module or method.__module__, "__doc__": f"{method.__name__}, LoGo."}
    return type(f"LoGo{method.__name__}", (*mixins, LoGo, method, Capture), namespace)


def _known(method: type, *outputs: Any, mixins: tuple[type, ...] = (), **flags: Any) -> Any:
    KNOWN[method] = _logo_class(method, Outputs(*outputs)._replace(**flags), *mixins, module=__name__)
    return KNOWN[method]


# prediction, target, projection, scale and similarity
LoGoBYOL = _known(methods.BYOL, "p", "momentum_z", "z", 2.0, similarities.byol)
LoGoSimSiam = _known(methods.SimSiam, "p", "z", "z", 1.0, similarities.simsiam)
LoGoMoCoV2Plus = _known(methods.MoCoV2Plus, "z", "momentum_z", "z", 1.0, similarities.mocov2plus, queue=True)
LoGoMoCoV3 = _known(methods.MoCoV3, "q", "momentum_k", "z", 2.0, similarities.mocov3)
LoGoNNBYOL = _known(methods.NNBYOL, "p", "neighbours", "z", 2.0, similarities.byol, mixins=(Neighbours,))
LoGoNNSiam = _known(
    methods.NNSiam, "p", "neighbours", "z", 1.0, similarities.simsiam, hidden=True, mixins=(Neighbours,)
)
LoGoNNCLR = _known(methods.NNCLR, "p", "neighbours", "z", 1.0, similarities.nnclr, hidden=True, mixins=(Neighbours,))
# Of two sides with gradient one is the prediction of local crops, the other their target.
LoGoSimCLR = _known(methods.SimCLR, "z", "z", "z", 1.0, similarities.simclr)
LoGoBarlowTwins = _known(methods.BarlowTwins, "z", "z", "z", 1.0, similarities.barlow_twins)
LoGoVICReg = _known(methods.VICReg, "z", "z", "z", 1.0, similarities.vicreg)
LoGoVIbCReg = _known(methods.VIbCReg, "z", "z", "z", 1.0, similarities.vibcreg)
