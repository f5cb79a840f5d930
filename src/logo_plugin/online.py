"""A model's projector and predictor, and what they give for local crops. No host is named here."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logo_plugin.affinity import full_precision
from logo_plugin.compiling import eager, eager_frame
from logo_plugin.local_predictor import stand_in
from logo_plugin.modes import kept_random_state, kept_statistics

Outputs = dict[nn.Module, list[Tensor]]
Method = Callable[[Tensor], Any]


class Names(NamedTuple):
    """How a host's models call their parts; the first name that a model has counts."""

    projector: tuple[str, ...]
    predictor: tuple[str, ...]


class Heads(NamedTuple):
    """The heads, and the module whose attributes they are: the model itself or one of its parts."""

    owner: nn.Module
    projector: nn.Module
    predictor: nn.Module | None

    @property
    def modules(self) -> list[nn.Module]:
        """The heads there are."""
        return [self.projector] if self.predictor is None else [self.projector, self.predictor]

    def behind(self, backbone: nn.Module | None) -> list[nn.Module]:
        """The backbone, if there is one, and the heads."""
        return self.modules if backbone is None else [backbone, *self.modules]

    @property
    def trained(self) -> bool:
        """Whether anything trains the projector, unlike a teacher's."""
        return any(parameter.requires_grad for parameter in self.projector.parameters())


class Source(NamedTuple):
    """Where the criterion's predictions come from: a head's output, as it is or with rows of unit length."""

    is_predictor: bool
    normalized: bool


def find_heads(model: nn.Module, names: Names, projector: str | None = None) -> Heads:
    """The projector and predictor, on the model itself or on the first part that has them and trains them.

    Raises:
        ValueError: If there is no projector.
    """
    wanted = (projector,) if projector else names.projector
    first = None
    for owner in model.modules():
        for name in wanted:
            head: Any = owner
            for part in name.split("."):
                head = getattr(head, part, None)
            if isinstance(head, nn.Module):
                predictors = (getattr(part, n, None) for part in (owner, model) for n in names.predictor)
                predictor = next((p for p in predictors if isinstance(p, nn.Module)), None)
                heads = Heads(owner, head, predictor)
                if heads.trained:
                    return heads
                first = first or heads
    if first is not None:
        return first
    raise ValueError(
        f"{type(model).__name__} has no {' / '.join(wanted)}, whose output the affinity compares. If it compares "
        "projections (N, D) of two views, name its projector with projector='...' (one that is a layer of another part "
        "with a dot, as 'encoder.fc'); else LoGo cannot extend it."
    )


def width(projector: nn.Module) -> int:
    """Features of the projector's output.

    Raises:
        ValueError: If no layer tells.
    """
    for layer in reversed(list(projector.modules())):
        features = getattr(layer, "out_features", None) or getattr(layer, "num_features", None)
        if isinstance(features, int):
            return features
    raise ValueError(f"cannot tell the output width of {type(projector).__name__}; give affinity=Affinity(dim=...).")


@contextmanager
def outputs_of(modules: Iterable[nn.Module], rows: int = 0) -> Iterator[Outputs]:
    """While it lasts, the outputs of each call of the modules are recorded.

    With `rows`, each output is split into pieces of that many rows, and what follows in the network computes from
    them: a gradient can be taken there.
    """
    found: Outputs = {}

    @eager
    def remember(module: nn.Module, _: Any, out: Any) -> Any:
        if not isinstance(out, Tensor):
            return out
        if not rows:
            found.setdefault(module, []).append(out)
            return out
        if len(out) == rows:  # itself, which the model may change in place
            found[module] = [out]
            return out
        found[module] = list(torch.split(out, rows))
        return torch.cat(found[module])

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(remember).remove)
        yield found


def entrances(heads: Heads, backbone: nn.Module | None) -> list[nn.Module]:
    """What may be given the images: the backbone, or all parts beside the heads where none has that name."""
    parts = [child for name, child in heads.owner.named_children() if not name.startswith("logo")]
    return [part for part in parts if part not in heads.modules] if backbone is None else [backbone]


@contextmanager
def images_of(modules: Iterable[nn.Module], unless: Callable[[], bool] = lambda: False) -> Iterator[list[Tensor]]:
    """While it lasts, the images (N, C, H, W) that modules are called with are recorded, unless `unless` holds then."""
    found: list[Tensor] = []

    @eager
    def remember(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not unless():
            first = (*args, *kwargs.values())[:1]
            found.extend(x.detach() for x in first if isinstance(x, Tensor) and x.ndim == 4)

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(remember, with_kwargs=True).remove)
        yield found


@contextmanager
def calls_of(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[tuple[Tensor, Tensor]]]]:
    """While it lasts, what each module gave and what all but the first were given is recorded, if gradient flows.

    As copies, since a head may begin with a layer that works in place.
    """
    found: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
    given: dict[nn.Module, Tensor] = {}
    modules = list(modules)

    @eager
    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(x, Tensor):
            given[module] = x.detach().clone()

    @eager
    def remember(module: nn.Module, _: Any, out: Any) -> None:
        x = given.pop(module, None)
        if isinstance(out, Tensor) and out.requires_grad and (module is modules[0] or x is not None):
            found.setdefault(module, []).append((out if x is None else x, out.detach().clone()))

    with ExitStack() as stack:
        for module in modules[1:]:
            stack.callback(module.register_forward_pre_hook(look, with_kwargs=True).remove)
        for module in modules:
            stack.callback(module.register_forward_hook(remember).remove)
        yield found


@eager
def source_of(pred: Tensor, outputs: Outputs, heads: Heads) -> Source | None:
    """Which head gave the criterion a prediction, None if none did.

    Args:
        pred: Prediction of a global crop (N, D), as the criterion was given it.
        outputs: From `outputs_of(heads.modules)` in the same step.
        heads: The model's.
    """
    given = _plain(pred)
    for head in reversed(heads.modules):
        if _is_sum(pred) and not _is_output(pred, head, outputs):
            continue  # z + h(z) may be z before h has learned anything
        outs = [out for out in outputs.get(head, []) if out.ndim == 2]
        blocks = [_plain(block).to(given.dtype) for out in outs for block in torch.split(out, len(pred))]
        for normalized in (False, True):
            known = [F.normalize(b, dim=1) for b in blocks] if normalized else blocks
            if any(_is_close(given, b) for b in known):
                return Source(head is heads.predictor, normalized)
    return None


def origin_of(pred: Tensor, outputs: Outputs, heads: Heads) -> str:
    """Which head gave a prediction as it is, else what made it of something; without a look at the values."""
    for head, name in zip(heads.modules, ("projector", "predictor"), strict=False):
        if _is_output(pred, head, outputs):
            return name
    return type(pred.grad_fn).__name__


@eager_frame
def run_online(
    methods: Sequence[tuple[str, Method]],
    heads: Heads,
    source: Source | None,
    views: Sequence[Tensor],
    *,
    features: int | None = None,
    global_shape: Sequence[int] = (),
    local_predictor: nn.Module | None = None,
    concat: bool = False,
) -> tuple[str, list[Tensor], list[Tensor]]:
    """Online predictions and projections of crops, by the first of `methods` that runs the heads.

    Args:
        methods: (name, function of images): what may run backbone and heads.
        heads: The model's.
        source: Which output is the prediction; None trusts the last output of the method that runs the heads.
        views: Crops, V of (N, C, H, W).
        features: D that predictions must have.
        global_shape: (C, H, W) of the global crops, for errors about local ones.
        local_predictor: Stands in for the predictor.
        concat: Forward all crops as one batch.

    Returns:
        The method's name, V predictions (N, D) and V projections.

    Raises:
        RuntimeError: If no method runs the heads, or what comes out is no prediction.
    """
    by_predictor = local_predictor is not None if source is None else source.is_predictor
    needed = heads.modules if by_predictor else [heads.projector]
    failures = ""
    if concat and len(shapes := {tuple(view.shape) for view in views}) > 1:
        raise ValueError(f"concat_local_crops=True needs local crops of one shape, got {sorted(shapes)}.")
    for name, method in methods:
        preds: list[Tensor] = []
        projs: list[Tensor] = []
        for batch in [torch.cat(list(views))] if concat else views:
            try:
                with stand_in(heads.predictor, local_predictor), outputs_of(heads.modules, len(views[0])) as ran:
                    out = _sized(method, batch, global_shape)
            except (AttributeError, TypeError) as error:  # it takes something else than images
                failures += f" {name}: {error}."
                break
            if any(head not in ran for head in needed):
                break
            found = _predictions(out, len(views[0]), batch, ran, heads, source, features)
            if torch.is_grad_enabled() and not all(pred.requires_grad for pred in found):
                failures += f" {name} gives predictions without gradient."
                break
            preds += found
            projs += ran[heads.projector]
        else:
            return name, preds, projs
    also = " and predictor" if len(needed) > 1 else ""
    raise RuntimeError(
        f"no method of {type(heads.owner).__name__} that LoGo knows runs the projector{also} (tried "
        f"{[name for name, _ in methods]}).{failures} Name the method from images to predictions with online=, or the "
        "projector with projector=."
    )


@eager_frame
def chosen(
    model: nn.Module,
    methods: Sequence[tuple[str, Method]],
    heads: Heads,
    source: Source | None,
    view: Tensor,
    **options: Any,
) -> Sequence[tuple[str, Method]]:
    """Of several methods the one that runs the heads, as `run_online` finds it, by a try that leaves no trace."""
    if len(methods) < 2:
        return methods
    with kept_random_state(view.device), kept_statistics(model, every=True):
        name, *_ = run_online(methods, heads, source, [view], **options)
    return [method for method in methods if method[0] == name]


COMPOSED = "backbone, projector, predictor"


def composed(heads: Heads, backbone: nn.Module) -> tuple[str, Method]:
    """Backbone, projector and predictor in turn; or a network whose last layer the projector is, and the predictor."""
    whole = heads.projector in backbone.modules()

    def run(images: Tensor) -> Any:
        out = backbone(images)
        out = out if whole else heads.projector(out.flatten(start_dim=1))
        return out if heads.predictor is None else heads.predictor(out)

    return "the network that ends with the projector, predictor" if whole else COMPOSED, run


def _sized(method: Method, images: Tensor, global_shape: Sequence[int]) -> Any:
    try:
        return method(images)
    except (RuntimeError, ValueError, AssertionError) as error:
        of_call = isinstance(error.__cause__, (AttributeError, TypeError))  # what online= names takes something else
        if (
            isinstance(error, torch.cuda.OutOfMemoryError)
            or of_call
            or tuple(images.shape[1:]) == tuple(global_shape or images.shape[1:])
        ):
            raise
        raise RuntimeError(
            f"the online network failed on local crops {tuple(images.shape)}, while global crops are "
            f"(N, {', '.join(map(str, global_shape))}): {error}. If the backbone takes one size only, use "
            "local_size=global_size, or build it for other sizes (timm: dynamic_img_size=True for ViT, "
            "strict_img_size=False for Swin). Else name with online= a method from images to what the criterion takes."
        ) from error


def _predictions(
    out: Any, rows: int, batch: Tensor, ran: Outputs, heads: Heads, source: Source | None, features: int | None
) -> Sequence[Tensor]:
    if source is not None:
        preds = ran[heads.modules[-1] if source.is_predictor else heads.projector]
        if (made := sum(map(len, preds))) != len(batch):
            raise RuntimeError(
                f"{type(heads.owner).__name__} makes {made} predictions of {len(batch)} crops, as a method does that "
                "makes or takes several views of an image. Name the method from images to predictions with online=."
            )
        return [F.normalize(p, dim=1) for p in preds] if source.normalized else preds
    pred = out[-1] if isinstance(out, (tuple, list)) else out
    if not isinstance(pred, Tensor) or pred.ndim != 2 or pred.shape != (len(batch), features or pred.shape[1]):
        got = tuple(pred.shape) if isinstance(pred, Tensor) else type(pred).__name__
        raise RuntimeError(
            f"the online network gave {got} for crops {tuple(batch.shape)}, but the criterion takes predictions "
            f"({len(batch)}, {features or 'D'}). Name the method from images to predictions with online=."
        )
    return torch.split(pred, rows)


def _is_output(x: Tensor, head: nn.Module, outputs: Outputs) -> bool:
    return any(x is out for out in outputs.get(head, []))


def _is_sum(x: Tensor) -> bool:
    return type(x.grad_fn).__name__.startswith(("AddBackward", "SubBackward"))


def _plain(x: Tensor) -> Tensor:
    return full_precision(x.detach())


def _is_close(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same but for rounding."""
    same = first.shape == second.shape
    return same and torch.allclose(first, second, rtol=1e-2, atol=1e-3 * float(second.abs().max()))
