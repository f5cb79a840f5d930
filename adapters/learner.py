"""Plain PyTorch: a network goes in, a loss comes out, the same network comes back trained."""

import copy
import inspect
import math
import re
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from logo_plugin.affinity import Affinity, full_precision
from logo_plugin.checks import (
    choice,
    flag,
    positive_integer,
    refuse_replica,
    unknown_option,
    views_alone,
    warn_of_large_local_crops,
)
from logo_plugin.compiling import with_gradients_inside
from logo_plugin.losses import LoGoLoss, LoGoTerms
from logo_plugin.modes import eval_mode, image_channels
from logo_plugin.presets import with_queue
from logo_plugin.ranks import in_group, is_sharded
from logo_plugin.recomputing import local_forwards
from logo_plugin.similarities import info_nce

_BELOW = {"momentum": 1.0, "temperature": math.inf}
# The papers': BYOL arXiv 2006.07733, SimSiam 2011.10566, MoCo v2 2003.04297.
_METHODS: dict[str, dict[str, Any]] = {
    "byol": {"hidden_dim": 4096, "output_dim": 256, "predictor_dim": 4096, "momentum": 0.996},
    "simsiam": {"hidden_dim": 2048, "output_dim": 2048, "predictor_dim": 512},
    "moco": {"hidden_dim": 2048, "output_dim": 128, "momentum": 0.999, "temperature": 0.2, "queue_size": 65536},
}


class LoGoLearner(nn.Module):
    """BYOL, SimSiam or MoCo v2+ with LoGo around any backbone: `loss = learner(views)`.

    The target of BYOL and MoCo moves at the start of every forward in training mode with gradients on; there
    is nothing to call after `optimizer.step()`. k batches of accumulation move it k times: give
    `momentum ** (1 / k)`. MoCo compares in both directions, as solo-learn's MoCoV2Plus, but with one queue for
    both: after the loss it gets the keys of all global crops, of all ranks under torch.distributed (equal
    batches: `drop_last=True`). BatchNorm is not shuffled. `terms` holds the last forward's terms, detached.

    Args:
        backbone: Trained in place; images (N, C, H, W) to features (N, F) or (N, F, 1, 1); timm: `num_classes=0`.
        method: "byol", "simsiam" or "moco".
        image_size: Sides of the global and local crops, one of each forwarded here in eval mode to find F.
        global_crops: How many of the views are global; they come first.
        affinity: "cosine" (`LoGoLoss`; with "moco" at `gradient_ratio=0.3`); "learned" builds the paper's
            `Affinity(output_dim)`; a module; or None for plain multi-crop. With "cosine" the loop calls
            `learner.criterion.anneal(steps done / steps in all)` before each step, unless `anneal_repulsion=False`.
        checkpoint_local_crops: Compute what the backbone keeps of local crops again in backward, instead of
            keeping it: memory of the global crops alone, time of one forward more per local crop.
        local_running_stats: Whether local crops move BatchNorm's running statistics, which evaluation reads.
        **options: Options of `LoGoLoss` except `similarity`, and of the method, by default the paper's:
            `hidden_dim`, `output_dim` (byol 4096, 256; simsiam 2048, 2048; moco 2048, 128), `predictor_dim`
            (byol 4096, simsiam 512), `momentum` (byol 0.996, moco 0.999; short runs want 0.99; an attribute
            too, for schedules), `temperature`, `queue_size` (moco 0.2, 65536).

    Raises:
        TypeError: If an option is none of `LoGoLoss` or the method, or the backbone no module that gives a tensor.
        ValueError: If an option is out of its range, or the backbone can't take `image_size`, or has no values.
        RuntimeError: In forward, if FSDP shards the whole without `backbone`, `projector` and `target` on their own.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: str = "byol",
        *,
        image_size: Sequence[int] = (224, 96),
        global_crops: int = 2,
        affinity: nn.Module | str | None = "cosine",
        checkpoint_local_crops: bool = False,
        local_running_stats: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        choice("method", method, tuple(_METHODS))
        _check_backbone(backbone)
        positive_integer("global_crops", global_crops, least=2)
        own = _METHODS[method]
        valid = own.keys() | inspect.signature(LoGoLoss).parameters.keys() - {"similarity"}
        for name in options.keys() - valid:
            raise TypeError(f"LoGoLearner(method={method!r}): {unknown_option(name, valid)}")
        chosen: dict[str, Any] = {name: options.pop(name, default) for name, default in own.items()}
        for name, value in chosen.items():
            if name not in _BELOW:
                positive_integer(name, value)
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _BELOW[name]:
                limits = f"between 0 and {_BELOW[name]:g}"
                raise ValueError(f"{name} must be a number {limits}, got {value!r}; the default is {own[name]}.")
        width, simsiam, moco = chosen["output_dim"], method == "simsiam", method == "moco"
        self.momentum, self.temperature = (chosen.get(name, 1.0) for name in ("momentum", "temperature"))
        self.backbone, self.global_crops = backbone, global_crops
        self._local_forwards: dict[str, Any] = {
            "checkpoint": flag("checkpoint_local_crops", checkpoint_local_crops),
            "running_stats": flag("local_running_stats", local_running_stats),
        }
        _warn_of_classifier(backbone)
        dims = [_features(backbone, image_size), *[chosen["hidden_dim"]] * (1 + simsiam), width]
        like = next(backbone.parameters())
        self.projector = _mlp(dims, norm=not moco, norm_last=simsiam).to(like.dtype)
        self.predictor = nn.Identity() if moco else _mlp([width, chosen["predictor_dim"], width]).to(like.dtype)
        online = nn.Sequential(backbone, nn.Flatten(), self.projector)
        self.target = None if simsiam else copy.deepcopy(online).requires_grad_(False)
        self.queue: Tensor | None
        queue = F.normalize(torch.randn(width, chosen["queue_size"]), dim=0).to(like.dtype) if moco else None
        self.register_buffer("queue", queue)
        self.criterion = LoGoLoss(
            affinity=Affinity(width) if affinity == "learned" else affinity,  # type: ignore[arg-type]
            similarity=info_nce if moco else "cosine",
            **with_queue(options, affinity) if moco else options,
        ).to(like.dtype)
        self.terms: LoGoTerms | None = None
        self._warned = self._looked = self._said_eval = False
        self.to(like.device)

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """Gives the loss (scalar) of views (N, C, H, W), globals first, as `MultiCropCollate` makes them."""
        if self.criterion.gradient_ratio is None:
            return self._loss(views)
        return with_gradients_inside(self._loss, views)

    def _loss(self, views: Sequence[Tensor]) -> Tensor:
        if isinstance(views, Tensor):
            raise TypeError("LoGoLearner takes a list of views, got a tensor; learner.backbone(x) gives features.")
        views_alone("LoGoLearner", views)
        refuse_replica(self, "neither the target nor the queue would move")
        count, learns = self.global_crops, self.training and torch.is_grad_enabled()
        if len(views) <= count and self.criterion.affinity is not None:
            raise ValueError(
                f"LoGoLearner got {len(views)} views, of which {count} are global, so there are no local crops. Give "
                "the data loader collate_fn=MultiCropCollate(...), and its dataset no transform; or go without "
                "repulsion, affinity=None."
            )
        if not torch.compiler.is_compiling():
            if not self._looked and len(views) > count and len({view.shape[-2:] for view in views}) > 1:
                warn_of_large_local_crops(views, count)
            self._looked = True
            self._warn_of_eval_mode()
        if learns and self.target is not None:
            # Not [*a, *b], which torch 2.4 does not compile behind a graph break.
            online = list(self.backbone.parameters()) + list(self.projector.parameters())
            _check_sharding(self, online)
            self._warn_of_half_precision(online)
            with torch.no_grad():  # the target may have been unfrozen with the rest
                for old, new in zip(self.target.parameters(), online, strict=True):
                    old.lerp_(new, 1 - self.momentum)
        proj, pred = self._online(views[:count])
        with torch.no_grad():
            target = proj if self.target is None else [self.target(view) for view in views[:count]]
        parts = {"global_pred": pred, "local_pred": [], "local_proj": []}
        if len(views) > count:
            with local_forwards(self, self.backbone, **self._local_forwards):
                parts["local_proj"], parts["local_pred"] = self._online(views[count:])
        contrast = None if self.queue is None else partial(info_nce, queue=self.queue, temperature=self.temperature)
        terms: LoGoTerms = self.criterion(global_target=target, similarity=contrast, **parts)
        if learns and self.queue is not None:
            keys = _of_all_ranks(F.normalize(full_precision(torch.cat(target)), dim=1)).T
            # Not in place: backward needs the old queue.
            self.queue = torch.cat([keys.to(self.queue), self.queue], dim=1)[:, : self.queue.shape[1]].clone()
        self.terms = terms.detach()
        return terms.total

    def _warn_of_eval_mode(self) -> None:
        if self._said_eval or (self.training and self.backbone.training) or not torch.is_grad_enabled():
            return
        if not any(p.requires_grad for p in self.backbone.parameters()):  # frozen
            return
        self._said_eval = True
        what = "backbone" if self.training else "learner"
        rests = "" if self.training else ", and neither the target nor the queue moves"
        warnings.warn(
            f"the {what} is in eval mode while the loss trains it: BatchNorm and dropout don't work as in training"
            f"{rests}. Call learner.train() before the first step and after each evaluation; to look at the loss use "
            "torch.no_grad().",
            stacklevel=4,
        )

    def _warn_of_half_precision(self, online: Sequence[Tensor]) -> None:
        if not self._warned and any(p.dtype.itemsize < 4 for p in online):
            self._warned = True
            warnings.warn(
                f"the target moves by {1 - self.momentum:.2g} of its distance a step, most of which half precision "
                "rounds away: it lags behind. Keep the parameters in float32 and forward under torch.autocast.",
                stacklevel=3,
            )

    def _online(self, views: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        features = [self.backbone(view) for view in views]
        for found in features:
            if not isinstance(found, Tensor):
                raise TypeError(_no_tensor(self.backbone, found, " in training mode"))
        proj = [self.projector(found.flatten(1)) for found in features]
        torch._dynamo.graph_break()  # gradient_ratio takes a gradient at proj, between the graphs of torch.compile
        return proj, [self.predictor(z) for z in proj]


def _check_sharding(learner: LoGoLearner, online: Sequence[Tensor]) -> None:
    """Refuses FSDP around the whole: what the forward then sees is a copy, so that the target would never move."""
    if is_sharded(learner) and not all(hasattr(p, "full_tensor") for p in online):
        raise RuntimeError(
            "FSDP has gathered the learner's parameters for this forward and drops what changes in them, but the "
            "target moves in forward. Shard the parts first: for part in (learner.backbone, learner.projector, "
            "learner.target): fully_shard(part); then the whole: fully_shard(learner)."
        )


def _check_backbone(backbone: Any) -> None:
    if not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be a torch.nn.Module, got {backbone!r}.")
    devices = {p.device.type for p in backbone.parameters()}
    if not devices:
        raise ValueError(f"the backbone has no parameters to train, got {type(backbone).__name__}.")
    if "meta" in devices:
        raise ValueError(
            "the backbone is on the meta device, where parameters have no values: give it some first, as in "
            'backbone.to_empty(device="cpu") and backbone.load_state_dict(...).'
        )


def _warn_of_classifier(backbone: nn.Module) -> None:
    library, (name, last) = type(backbone).__module__.partition(".")[0], [*backbone.named_modules()][-1]
    if library == "timm" and hasattr(backbone, "get_classifier"):
        last = backbone.get_classifier()  # type: ignore[operator]
        name = next((name for name, module in backbone.named_modules() if module is last), "")
    if library in ("torchvision", "timm") and isinstance(last, (nn.Linear, nn.Conv2d)):
        place = re.sub(r"\.(\d+)", r"[\1]", f"backbone.{name}")
        cure = "num_classes=0" if library == "timm" else f"{place} = torch.nn.Identity()"
        outputs = last.out_features if isinstance(last, nn.Linear) else last.out_channels
        warnings.warn(
            f"{type(backbone).__name__} ends with its classifier {name!r}, so that its {outputs} outputs are "
            f"trained as the features. Take it off first: {cure}.",
            stacklevel=3,
        )


def _mlp(dims: Sequence[int], *, norm: bool = True, norm_last: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(dims), start=2):
        last = i == len(dims)
        normed = norm_last if last else norm
        norms, relus = [nn.BatchNorm1d(after, affine=not last)] * normed, [nn.ReLU()] * (not last)
        layers += [nn.Linear(before, after, bias=not normed), *norms, *relus]
    return nn.Sequential(*layers)


def _features(backbone: nn.Module, sizes: Sequence[int]) -> int:
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        raise ValueError(f"image_size must be the sides of the global and local crops, as (224, 96), got {sizes!r}.")
    for size in sizes:
        positive_integer("each of image_size", size)
    like = next(backbone.parameters())
    shapes: dict[int, tuple[int, ...]] = {}
    failed: list[tuple[int, Exception]] = []
    for channels in dict.fromkeys((image_channels(backbone), 3, 1)):  # the first convolution may be no stem
        try:
            with eval_mode(backbone), torch.no_grad():  # BatchNorm's statistics stay
                for size in sizes:
                    found = backbone(torch.zeros(1, channels, size, size).to(like))
                    if not isinstance(found, Tensor):
                        raise TypeError(_no_tensor(backbone, found))
                    shapes[size] = tuple(found.shape)
            break
        except (AssertionError, RuntimeError, ValueError) as error:
            failed.append((size, error))
    else:
        size, reason = failed[0]
        raise ValueError(
            f"the backbone can't take images of {size} x {size} pixels ({reason}): give the sides of your crops, "
            "image_size=(32, 32) or so. For several sizes a ViT of timm wants dynamic_img_size=True, a Swin "
            "strict_img_size=False; others want crops of one size."
        ) from reason
    shape = shapes[size]
    if len(set(shapes.values())) > 1 or shape[1:2] != (math.prod(shape[1:]),):
        raise ValueError(f"the backbone must give (1, F) for every size, got {shapes}; timm: num_classes=0 pools.")
    return shape[1]


def _no_tensor(backbone: nn.Module, found: Any, when: str = "") -> str:
    return (
        f"the backbone must give a tensor of features (N, F), and {type(backbone).__name__} gives "
        f"{type(found).__name__}{when}: put a module around it that returns the features alone, or turn the other "
        "outputs off, as torchvision's aux_logits=False does."
    )


def _of_all_ranks(keys: Tensor) -> Tensor:
    if not in_group():
        return keys
    gathered = [torch.empty_like(keys) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, keys)
    return torch.cat(gathered)
