"""One training step of a host, watched: how it called its criterion says what LoGo must do. No host is named here.

From the calls come the targets, the scale of the loss, and the similarity that pulls local crops: the criterion itself,
called once more as the host called it, with a local crop's prediction in the place of the host's.
"""

import copy
import math
import warnings
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logo_plugin.compiling import eager, eager_frame
from logo_plugin.graphs import gradient
from logo_plugin.similarities import Similarity, info_nce

Key = int | str  # of an argument: its position or its name
AS_MODULE = (
    "A loss that is a function must become a module, whose forward calls it, and which the step calls instead: "
    "class Criterion(nn.Module): def forward(self, p, z): return function(p, z)."
)
HALF_PRECISION = (5e-2, 2e-2)  # how near to each other two values of one loss are there, relative and absolute
_CONTAINERS = (list, tuple, set, dict, deque)
_DICTS = (dict, OrderedDict, defaultdict, Counter)  # others may be read-only
_DEPTH = 3  # of containers in containers, which may hold themselves
_OF_MODULES = frozenset(vars(nn.Module()))


class Call(NamedTuple):
    """One call of the criterion.

    Attributes:
        args: What it was given.
        kwargs: The same, by name.
        value: What it returned, a scalar or one number for each image; the step has a copy, which it may change in
            place.
        negatives: What the criterion's memory bank held before the step, (D, K).
        given: What tells whether `args` and `kwargs` are still what they were.
        autocast: The device type, whether it was under autocast there, and to which dtype.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    value: Any
    negatives: Tensor | None
    given: Any
    autocast: tuple[str, bool, torch.dtype]


class Watched(NamedTuple):
    """What `watch` fills in."""

    calls: list[Call]
    stateful: Callable[[], bool]  # whether the calls changed the criterion
    start: dict[Any, Any]  # its state before them, copied; nothing for one that was never changed


class Example(NamedTuple):
    """What LoGo's repetition of the criterion must give again.

    Attributes:
        pred: A prediction that the host gave the criterion, (N, D), with gradient.
        target: Its target, (N, D).
        value: What came of them, with gradient.
        similarity: The repetition.
        otherwise: What it means if that gives another value: a message with places for the two.
    """

    pred: Tensor
    target: Tensor
    value: Tensor
    similarity: Similarity
    otherwise: str


class Observed(NamedTuple):
    """What one step of the host says about its objective.

    Attributes:
        weights: Of the criterion's calls in the loss, (calls,).
        scale: What the host multiplies its mean similarity with.
        global_global: That mean (scalar).
        global_pairs: Pairs of global crops behind it; a symmetric call compares two.
        preds: Of what the criterion was given, what carries gradient, (N, D) each.
        mutual: Whether both sides of a call learn: each is prediction and, detached, target.
        both_ways: Whether each such call was made with its sides exchanged, too.
        targets: What local crops are pulled to, (N, D) each, without gradient.
        similarity: (prediction of a local crop, target) -> scalar; or one for each target.
        example: Of the step's first call, where that is one of a prediction and a target.
    """

    weights: Tensor
    scale: Tensor
    global_global: Tensor
    global_pairs: int
    preds: list[Tensor]
    mutual: bool
    targets: list[Tensor]
    similarity: Similarity | list[Similarity]
    both_ways: bool = False
    example: Example | None = None

    @property
    def any_similarity(self) -> Similarity:
        """The similarity, or the first of several."""
        return self.similarity[0] if isinstance(self.similarity, list) else self.similarity


def has_queue(criterion: nn.Module | None) -> bool:
    """Whether a criterion keeps negatives, as lightly's NTXentLoss does for MoCo."""
    bank = getattr(criterion, "memory_bank", None)
    size = getattr(bank, "size", None)
    return isinstance(bank, nn.Module) and isinstance(size, tuple) and size[0] > 0


OF_LABELS = (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.MultiMarginLoss)


@contextmanager
def losses_of_views(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """While it lasts, what modules make of two (N, D) is recorded, by name, if it is a loss; not of labels."""
    found: dict[str, Tensor] = {}

    @eager
    def record(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> None:
        sides = [x for x in (*args, *kwargs.values()) if _is_batch(x)]
        if len(sides) == 2 and isinstance(value, Tensor) and value.ndim < 2:
            found[name] = value

    with ExitStack() as stack:
        for name, module in modules.items():
            if not isinstance(module, OF_LABELS):
                stack.callback(module.register_forward_hook(partial(record, name), with_kwargs=True).remove)
        yield found


@contextmanager
def watch(criterion: nn.Module) -> Iterator[Watched]:
    """While it lasts, the criterion's calls are recorded."""
    calls: list[Call] = []
    before: list[_Entry] = []
    start: dict[Any, Any] = {}
    bank = getattr(criterion, "memory_bank", None)
    recorder = _recorder(bank) if isinstance(bank, nn.Module) else None
    copied = _STATEFUL.get(criterion, True)

    @eager
    def look(*_: Any) -> None:
        if not calls:
            before[:] = _state(criterion)
            start.update({(id(holder), key): _copied(value) for holder, key, value, _ in before if copied})

    @eager
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        negatives = recorder.negatives[0] if recorder and recorder.negatives else None
        calls.append(Call(args, kwargs, value, negatives, versions(args, kwargs), _autocast(args, kwargs)))
        return value.clone() if isinstance(value, Tensor) else value

    with ExitStack() as stack:
        stack.callback(criterion.register_forward_pre_hook(look).remove)
        stack.callback(criterion.register_forward_hook(record, with_kwargs=True).remove)
        if recorder:
            # A loss may call memory_bank.forward itself, past any hook. Its answer to the first call are the negatives
            # of this step, before any of this step's keys is among them.
            stack.callback(recorder.negatives.clear)
            stack.callback(vars(bank).pop, "forward")
            vars(bank)["forward"] = recorder.forward
        yield Watched(calls, lambda: _changed(criterion, before), start)


_STATEFUL: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _Recorder(NamedTuple):
    forward: Callable[..., Any]
    negatives: list[Tensor]


_RECORDERS: WeakKeyDictionary[nn.Module, _Recorder] = WeakKeyDictionary()


@eager
def _recorder(bank: nn.Module) -> _Recorder:
    """One for each memory bank: torch.compile would compile anew for every new function.

    Not compiled itself: a guard on a model's recorder would fail when the model is freed meanwhile.
    """
    if bank not in _RECORDERS:
        negatives: list[Tensor] = []
        this = weakref.ref(bank)

        @eager
        def forward(*args: Any, **kwargs: Any) -> Any:
            itself: Any = this()
            out = type(itself).forward(itself, *args, **kwargs)
            if isinstance(out, tuple) and len(out) == 2 and out[1] is not None:
                negatives.append(out[1])
            return out

        _RECORDERS[bank] = _Recorder(forward, negatives)
    return _RECORDERS[bank]


@eager
def read(
    watched: Watched,
    host_loss: Tensor,
    criterion: nn.Module,
    model: str,
    *,
    target_given: bool,
    others: str = "",
    optional: bool = False,
) -> Observed | None:
    """What the calls say; those that the loss does not depend on say nothing.

    Args:
        watched: From `watch`, after the host's step.
        host_loss: What the step computed (scalar).
        criterion: What was watched.
        model: The model's name, for errors.
        target_given: The user says what the targets are, so the criterion's arguments need not tell.
        others: Other losses of the model, for errors.
        optional: Whether a step that does not use the criterion is none of LoGo's, as in an epoch of another loss.

    Returns:
        None for such a step.

    Raises:
        RuntimeError: If the criterion's calls are none that local crops can be pulled by; it says why.
    """
    name = f"{type(criterion).__name__} of {model}"
    if not watched.calls:
        if optional:
            warnings.warn(
                f"this step did not call {name}, as those before did, so it was without LoGo. If that is not meant "
                "(the step of a copied or unpickled model calls another criterion, say), wrap the model anew.",
                stacklevel=2,
            )
            return None
        raise RuntimeError(
            f"the training step never called {name}; name the right criterion with criterion=. {AS_MODULE}"
        )
    used = _used(watched, host_loss, name, optional)
    if not used and optional:
        return None
    if not used:
        for call in watched.calls:  # says why, where the arguments do
            _read_call(call, criterion, name, others)
        raise RuntimeError(f"the loss does not depend on {name}, which LoGo observes; name another with criterion=.")
    if any(versions(call.args, call.kwargs) != call.given for _, call in used):
        raise RuntimeError(
            f"the step changes in place what it has given to {name}, so LoGo cannot tell what local crops are to be "
            "pulled to. Give the criterion a copy, with .clone()."
        )
    parts = [_read_call(call, criterion, name, others) for _, call in used]
    if len({part.mutual for part in parts}) > 1:
        raise RuntimeError(
            f"{name} was called both with and without targets that carry gradient. Use LoGoLoss directly."
        )
    targets = {_identity(target): (target, part.similarity) for part in parts for target in part.targets}
    compared = [tuple(map(_identity, part.preds)) for part in parts if part.mutual]
    similarities, example = [parts[-1].similarity], None
    if used[-1][1].negatives is not None:
        temperature = getattr(criterion, "temperature", None)
        if temperature is None:
            raise RuntimeError(f"{name} has a memory bank but no temperature, so its InfoNCE cannot be repeated.")
        similarities = [partial(info_nce, queue=watched.calls[0].negatives, temperature=temperature)]
        _STATEFUL[criterion] = False  # its state is the bank's, which is known
        example = (similarities[0], _NO_INFO_NCE)
    else:
        if any(part.others != parts[0].others for part in parts):  # a margin, say, that is another in each call
            similarities = [similarity for _, similarity in targets.values()]
        _STATEFUL[criterion] = _STATEFUL.get(criterion, False) or watched.stateful()
        if _STATEFUL[criterion]:
            similarities = [on_a_copy(criterion, similarity, name, watched.start) for similarity in similarities]
        known = watched.start or not _STATEFUL[criterion]  # its state before the first call
        if known and used[0][1].given is watched.calls[0].given and (parts[0].mutual or len(parts[0].preds) == 1):
            first = parts[0].similarity
            repeat = on_a_copy(criterion, first, name, watched.start) if _STATEFUL[criterion] else first
            example = (repeat, _READS_MORE)
    weighed = torch.stack([weight for weight, _ in used])
    found = torch.stack([call.value for _, call in used])
    scale = weighed.sum()
    return Observed(
        weighed,
        scale,
        (weighed * found).sum() / (scale + (scale == 0)),  # a loss that is ramped up may have the scale 0
        2 * len({*map(frozenset, compared)}) if compared and not target_given else sum(part.pairs for part in parts),
        [pred for part in parts for pred in part.preds],
        parts[0].mutual,
        [target for target, _ in targets.values()],
        similarities if len(similarities) > 1 else similarities[0],
        bool(compared) and all(sides[::-1] in compared for sides in compared),
        example and Example(parts[0].preds[0], parts[0].targets[-1], used[0][1].value, *example),
    )


def _used(watched: Watched, host_loss: Tensor, name: str, optional: bool) -> list[tuple[Tensor, Call]]:
    """The calls that the loss depends on, each with its weight in it; numbers for each image as their mean."""
    for call in watched.calls:
        if not isinstance(call.value, Tensor) or call.value.ndim > 1:
            got = f"shape {tuple(call.value.shape)}" if isinstance(call.value, Tensor) else type(call.value).__name__
            raise RuntimeError(
                f"{name} returned {got}, and LoGo needs a loss that is one number, or one for each image. "
                "Let it return the loss alone."
            )
    learning = [call for call in watched.calls if call.value.requires_grad]
    values = [call.value for call in learning]
    if values and not host_loss.requires_grad:
        raise RuntimeError(f"the step's loss carries no gradient, and what {name} gave does: return it undetached.")
    weights = torch.autograd.grad(host_loss, values, retain_graph=True, allow_unused=True) if values else ()
    used = [(weight, call) for weight, call in zip(weights, learning, strict=True) if weight is not None]
    if not optional and any(weight.ndim and bool((weight != weight[0]).any()) for weight, _ in used):
        raise RuntimeError(
            f"{name} returned a number for each image, and the step does not take their mean or sum but weighs images "
            "unequally, which LoGo cannot repeat for local crops. Use LoGoLoss directly."
        )
    # The weights of the means over images.
    return [(w.sum() if w.ndim else w, call._replace(value=_mean(call.value))) for w, call in used]


@eager
def read_pairs(
    pairs: Sequence[tuple[Tensor, Tensor]], similarity: Similarity, host_loss: Tensor, model: str, *, check: bool
) -> Observed:
    """What a step shows that calls no criterion, where one knows which pairs it compares, and by what.

    The scale is that of the loss's gradient at the predictions to the similarity's.

    Args:
        pairs: (prediction, target) of the step, (N, D) each, the predictions with gradient.
        similarity: (prediction, target) -> scalar.
        host_loss: What the step computed (scalar).
        model: The model's name, for errors.
        check: Whether to compare the two gradients.

    Raises:
        RuntimeError: If the loss is not a multiple of the similarity, as far as the predictions go.
    """
    preds, targets = [pred for pred, _ in pairs], [target.detach() for _, target in pairs]
    mean = torch.stack([similarity(pred, target) for pred, target in zip(preds, targets, strict=True)]).mean()
    of_mean, of_loss = gradient(mean, preds), gradient(host_loss, preds)
    scale = (of_loss * of_mean).sum() / (of_mean * of_mean).sum().clamp_min(1e-30)
    if check:
        half = preds[0].dtype.itemsize < 4 or torch.is_autocast_enabled(preds[0].device.type)
        cosine = float(F.cosine_similarity(of_loss, of_mean, dim=0))
        if not cosine > (0.98 if half else 0.9999):
            raise RuntimeError(
                f"the loss of {model} is not the one that LoGo knows of this method: its gradient at the predictions "
                "is another. Name the loss module with criterion=, or use LoGoLoss directly."
            )
    return Observed(scale[None], scale.to(mean.dtype), mean, len(pairs), preds, False, targets, similarity)


class _Part(NamedTuple):
    preds: Sequence[Tensor]
    mutual: bool
    targets: Sequence[Tensor]
    pairs: int
    similarity: Similarity
    others: dict[Key, Any]  # what else the criterion was given


_NO_INFO_NCE = (
    "has a memory bank and gave {:.4g} where InfoNCE with the bank as negatives gives {:.4g}: it is another loss, "
    "which LoGo cannot repeat. Use LoGoLoss directly."
)
_READS_MORE = (
    "gave {:.4g} in the step and gives {:.4g} after it for the same two tensors: it changes them in place, or reads "
    "something that the step has changed by then, as a queue of the model that holds the step's own keys. Make that a "
    "buffer of the criterion, which the step writes to, so that LoGo can call it with what it held before."
)
_BOTH_IN_ONE = (
    " If both views are in one tensor, give the criterion two, first, second = features.chunk(2), and let it do all "
    "that follows, logits and cross-entropy, too."
)


def _read_call(call: Call, criterion: nn.Module, name: str, others: str) -> _Part:
    """The row of the table of criteria (docs/methods.md) that a call falls into."""
    given: dict[Key, Any] = dict([*enumerate(call.args), *call.kwargs.items()])
    if len(given) == 2 and all(isinstance(a, (tuple, list)) and len(a) == 2 for a in given.values()):
        (z0, p0), (z1, p1) = given.values()
        if all(_is_batch(x) for x in (z0, p0, z1, p1)):
            # Symmetric pairs, as SymNegCosineSimilarityLoss takes them: with the same pair twice it is s(p, z).
            learning = _learning(criterion, "pairs", criterion, (z0, p0, z1, p1), name)
            if learning == (False, True, False, True):
                return _Part(
                    [p0, p1], False, [z1.detach(), z0.detach()], 2, lambda p, t: _mean(criterion((t, p), (t, p))), {}
                )
            if learning == (True, False, True, False):
                return _Part(
                    [z0, z1], False, [p1.detach(), p0.detach()], 2, lambda p, t: _mean(criterion((p, t), (p, t))), {}
                )
    nested = [key for key, value in given.items() if isinstance(value, (tuple, list, dict))]
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor) and value.ndim}
    if nested:
        raise RuntimeError(
            f"{name} takes lists of views, so it compares many views in its own way, as methods with a multi-crop of "
            "their own do. LoGo extends a loss of two views; there is no option for this one. Use LoGoLoss directly."
        )
    if len(tensors) != 2 or not all(map(_is_batch, tensors.values())):
        shapes = ", ".join(
            f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" for value in tensors.values()
        )
        raise RuntimeError(
            f"{name} was called with {shapes or 'no tensors'}, and LoGo extends losses of two views, a prediction "
            "(N, D) and a target (N, D): masks, dense maps, prototypes and labels are beyond it."
            + _cure(list(tensors.values()))
            + (f" If one of {others} is such a loss, name it with criterion=." if others else "")
        )
    rest = {key: value for key, value in given.items() if key not in tensors}
    keys, sides = list(tensors), list(tensors.values())
    repeat = _repeat(criterion, call, *keys)
    carries = _learning(criterion, tuple(keys), repeat, sides, name)
    if not any(carries):
        raise RuntimeError(
            f"{name} was called with two tensors that do not carry gradient, so LoGo cannot tell the prediction from "
            "the target. Name the criterion that trains the model with criterion=."
        )
    if all(carries):
        return _Part(sides, True, [side.detach() for side in sides], 1, repeat, rest)
    if not carries[0]:
        return _Part(sides[1:], False, [sides[0].detach()], 1, _repeat(criterion, call, *keys[::-1]), rest)
    return _Part(sides[:1], False, [sides[1].detach()], 1, repeat, rest)


def _cure(tensors: list[Tensor]) -> str:
    """What helps where a criterion was not given two (N, D), in the shapes that are met most."""
    batches = [_is_batch(x) for x in tensors]
    if len(tensors) == 1 and (batches[0] or tensors[0].ndim == 3):
        return _BOTH_IN_ONE
    if len(tensors) == 2 and batches[0] and tensors[1].ndim == 1:
        return " If these are logits and labels made of two projections, give the criterion the projections."
    if len(tensors) > 2 and all(batches):
        return (
            " Call it with one prediction and its target, once for each pair; a queue of negatives goes into the "
            "criterion, as a buffer of its own."
        )
    return ""


_LEARNING: WeakKeyDictionary[nn.Module, dict[Any, tuple[bool, ...]]] = WeakKeyDictionary()


@eager
def _learning(criterion: nn.Module, kind: Any, similarity: Any, sides: Sequence[Tensor], name: str) -> tuple[bool, ...]:
    """Which of two tensors, or two pairs, learn by a criterion: it may detach one itself, as SimSiam's D(p, z) does."""
    carries = tuple(side.requires_grad for side in sides)
    if sum(carries) < 2:
        return carries
    found = _LEARNING.setdefault(criterion, {})
    if kind not in found:
        leaves = [tensor.detach().requires_grad_() for tensor in sides]
        copies = [leaf.clone() for leaf in leaves]  # which the criterion may change in place
        given: Any = copies if len(copies) == 2 else (copies[:2], copies[2:])
        value = _mean(on_a_copy(criterion, similarity, name)(*given))
        gradients = (
            torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        )
        found[kind] = tuple(gradient is not None for gradient in gradients)
    return tuple(learns and carry for learns, carry in zip(found[kind], carries, strict=True))


def versions(*values: Any) -> Any:
    """What tells whether tensors, and those in lists and the like, were changed in place."""
    return [_version(value) for value in values]


@eager
def is_symmetric(similarity: Similarity, first: Tensor, second: Tensor) -> bool:
    """Whether the order of the two views makes no difference, on these (N, D)."""
    relative, absolute = HALF_PRECISION if first.dtype.itemsize < 4 else (1e-3, 1e-5)
    with torch.no_grad():
        return torch.allclose(similarity(first, second), similarity(second, first), rtol=relative, atol=absolute)


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


def _mean(value: Tensor) -> Tensor:
    """Over images, of a criterion that gives a number for each."""
    return value.mean() if value.ndim else value


def _repeat(criterion: nn.Module, call: Call, pred_key: Key, target_key: Key) -> Similarity:
    """The criterion as a function of prediction and target, all else as in the host's call, precision too."""
    device, enabled, dtype = call.autocast

    def similarity(pred: Tensor, target: Tensor) -> Tensor:
        args: Any = list(call.args)
        kwargs: Any = dict(call.kwargs)
        for key, value in ((pred_key, pred), (target_key, target)):
            holder = kwargs if isinstance(key, str) else args
            holder[key] = value.to(holder[key].dtype)
        same = torch.is_autocast_enabled(device) == enabled
        with nullcontext() if same else torch.autocast(device, dtype, enabled):
            return _mean(criterion(*args, **kwargs))

    return similarity


def _autocast(*values: Any) -> tuple[str, bool, torch.dtype]:
    """Device type, whether autocast is on there, and its dtype; of the first tensor among arguments."""
    tensors = (x for value in values for x in (value.values() if isinstance(value, dict) else value))
    device = next((x.device.type for x in tensors if isinstance(x, Tensor)), "cpu")
    return device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def on_a_copy(
    criterion: nn.Module, similarity: Similarity, name: str, start: dict[Any, Any] | None = None
) -> Similarity:
    """The similarity on copies of the criterion's state, which is then as if LoGo had never called it.

    The copies are of `start`, by holder and key, where that has them: the state before the host's step, in which no
    queue holds what local crops are pulled to.
    Its calls raise RuntimeError if there is a state that cannot be put back.
    """

    @eager_frame
    def kept(pred: Tensor, target: Tensor) -> Tensor:
        before = _state(criterion)
        for holder, key, value, _ in before:
            holder[key] = _copied((start or {}).get((id(holder), key), value))
        try:
            value = similarity(pred, target)
        finally:
            for holder, key, value_before, _ in before:
                holder[key] = value_before
        if _changed(criterion, before):
            raise RuntimeError(
                f"{name} keeps a state that changes with every call and that LoGo cannot put back, so calling it for "
                "local crops would change the method. Use LoGoLoss directly."
            )
        return value

    return kept


_Entry = tuple[dict[str, Any], str, Any, Any]  # holder, key, value, what tells that the value was changed in place


@eager
def _state(criterion: nn.Module) -> list[_Entry]:
    """All that a module keeps between calls: buffers, tensors that nothing trains, containers of them, numbers."""
    return [
        (holder, key, value, _version(value))
        for module in criterion.modules()
        for holder in (vars(module), module._buffers, module._parameters, *_objects(module))
        for key, value in holder.items()
        if not (holder is vars(module) and key in _OF_MODULES)
        and not (isinstance(value, nn.Parameter) and value.requires_grad)
        and (isinstance(value, (Tensor, int, float, str, type(None), *_CONTAINERS)) or _is_array(value))
    ]


def _objects(module: nn.Module) -> list[dict[str, Any]]:
    """What a module keeps in objects of other classes, a queue of one's own, say."""
    plain = (nn.Module, Tensor, type, ModuleType, *_CONTAINERS)
    values = [x for x in vars(module).values() if not (isinstance(x, plain) or callable(x))]
    return [x.__dict__ for x in values if hasattr(x, "__dict__")]


def _is_array(value: Any) -> bool:
    """numpy's, but none so large that it would be data."""
    return type(value).__module__ == "numpy" and getattr(value, "nbytes", math.inf) <= 2**20


def _changed(criterion: nn.Module, before: list[_Entry]) -> bool:
    """Whether anything is not as it was, without a look at the tensors' values."""
    after = _state(criterion)
    return len(after) != len(before) or any(
        new_key != key
        or (new is not value and (isinstance(value, Tensor) or isinstance(new, Tensor)))
        or not (new is value or isinstance(value, (Tensor, *_CONTAINERS)) or _is_array(value) or new == value)
        or new_version != version
        for (_, new_key, new, new_version), (_, key, value, version) in zip(after, before, strict=True)
    )


def _address(value: Tensor) -> Any:
    """Which memory a tensor has, on any device, and where it begins there; None for kinds that don't tell."""
    try:
        return value.untyped_storage()._cdata, value.storage_offset()
    except RuntimeError:  # sparse
        return None


def _identity(value: Tensor) -> Any:
    """The same for two tensors that are one in memory, as `x` and `x.detach()` are."""
    address = _address(value)
    return id(value) if address is None else (address, value.shape, value.stride())


def _version(value: Any, depth: int = _DEPTH) -> Any:
    if isinstance(value, Tensor):  # `.data = ...` moves it without a new version
        address = _address(value)
        return None if address is None or value.is_inference() else (value._version, address)
    if _is_array(value):
        return value.tobytes()
    if not depth or not isinstance(value, _CONTAINERS):
        return None
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(key, id(item), _version(item, depth - 1)) for key, item in items]


def _copied(value: Any, depth: int = _DEPTH) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if _is_array(value):
        return value.copy()
    if not depth:
        return value
    if type(value) in _DICTS:
        new = copy.copy(value)
        for key, item in value.items():
            new[key] = _copied(item, depth - 1)
        return new
    items = (_copied(item, depth - 1) for item in value) if isinstance(value, _CONTAINERS) else ()
    if isinstance(value, deque):
        return deque(items, value.maxlen)
    return type(value)(items) if type(value) in (list, tuple, set) else value
