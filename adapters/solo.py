"""solo-learn (https://github.com/vturrisi/solo-learn): its methods with LoGo, as `method=logo_byol` and so on.

Importing this module registers them with solo-learn. Each is solo-learn's own class, whose unmodified
training step runs on the two global crops; the local crops and LoGo's terms come on top.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from solo import methods
from solo.data.pretrain_dataloader import FullTransformPipeline
from solo.losses.byol import byol_loss_func
from solo.losses.mocov2plus import mocov2plus_loss_func
from solo.losses.mocov3 import mocov3_loss_func
from solo.losses.simsiam import simsiam_loss_func
from solo.methods.base import BaseMethod, BaseMomentumMethod
from solo.utils.knn import WeightedKNNClassifier
from torch import Tensor, nn
from torchmetrics import Metric

from logo_plugin.affinity import Affinity, full_precision
from logo_plugin.crops import MultiCropTransform, crop_overlap
from logo_plugin.decoding import decode
from logo_plugin.local_predictor import join_groups, stand_in
from logo_plugin.losses import PRESETS, LoGoLoss, LoGoTerms, Similarity, with_preset
from logo_plugin.modes import eval_mode
from logo_plugin.wrapping import unknown_option

# method_kwargs.logo.*: the adapter's own keys, and every keyword of LoGoLoss that a config can hold.
_OWN: dict[str, Any] = {
    "affinity": True,
    "affinity_hidden_dim": 256,
    "affinity_norm": "batch",
    "fast_crops": False,
    "weigh_overlap": False,
    "local_predictor": False,
    "preset": None,
    "monitor": False,
}
OPTIONS: dict[str, Any] = _OWN | {
    name: parameter.default
    for name, parameter in inspect.signature(LoGoLoss).parameters.items()
    if name not in ("affinity", "similarity")
}
_SIZE_HINTS = {"vit": "+backbone.kwargs.dynamic_img_size=True", "swin": "+backbone.kwargs.strict_img_size=False"}


class _Outputs(NamedTuple):
    """As in `wrap`, but `similarity` takes the model, before each step, and gives one loss or one per target."""

    pred: str
    target: str
    proj: str
    scale: float
    similarity: Callable[[Any], Similarity | list[Similarity]]


class _LoGo(BaseMethod):
    """What a LoGo method adds to solo-learn's; stands before it in the method resolution order."""

    outputs: _Outputs
    num_small_crops: int
    logo_terms: LoGoTerms | None = None  # of the last step, detached, as the projections that LoGoMonitor measures
    logo_local_proj: list[Tensor] | None = None

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__(cfg)
        options = dict(cfg.method_kwargs.logo)
        own = {name: options.pop(name) for name in _OWN}
        self.fast_crops, self.weigh_overlap, self.monitor = (own[n] for n in ("fast_crops", "weigh_overlap", "monitor"))
        dim = self._dry_run(cfg)
        affinity = Affinity(dim, own["affinity_hidden_dim"], own["affinity_norm"]) if own["affinity"] else None
        self.logo = LoGoLoss(affinity=affinity, **options)
        predictor = getattr(self, "predictor", None)
        if own["local_predictor"] and not isinstance(predictor, nn.Module):
            raise ValueError(
                f"method_kwargs.logo.local_predictor copies the method's predictor, and {cfg.method} has none. "
                "Set it to false."
            )
        self.logo_local_predictor = copy.deepcopy(predictor) if own["local_predictor"] else None
        # solo-learn's own step sees two crops; the local ones are LoGo's.
        self.num_local_crops: int = self.num_small_crops
        self.num_crops, self.num_small_crops, self.multicrop = self.num_large_crops, 0, False

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: DictConfig) -> DictConfig:
        """Adds and checks `method_kwargs.logo`, and puts what it says into the run's name."""
        cfg = super().add_and_assert_specific_cfg(cfg)
        given = cfg.method_kwargs.get("logo")
        options = _checked(OmegaConf.to_container(given) if OmegaConf.is_config(given) else given or {})
        cfg.method_kwargs.logo = options
        if cfg.data.num_large_crops != 2:
            raise ValueError(f"LoGo needs 2 global crops, got data.num_large_crops={cfg.data.num_large_crops}.")
        needed = 2 if options["affinity"] else 1
        if cfg.data.num_small_crops < needed:
            raise ValueError(
                f"LoGo needs at least {needed} local crops, got data.num_small_crops={cfg.data.num_small_crops}. "
                "Choose augmentations=logo_imagenet, logo_cifar, logo_stl10 or logo_custom; in your own list, "
                "solo-learn counts a crop as local when its crop_size differs from the first one's ([32, 32] and "
                "32 differ)."
            )
        # AutoResumer compares runs by name, not by method_kwargs.
        suffix = _name_suffix(options)
        if "name" in cfg and not str(cfg.name).endswith(suffix):
            cfg.name = f"{cfg.name}{suffix}"
        return cfg

    def _dry_run(self, cfg: DictConfig) -> int:
        """Forwards one image of each size; returns the width of the projection."""
        for size in [crop.crop_size for crop in cfg.get("augmentations") or []] or [224]:
            height, width = size if isinstance(size, (list, tuple, ListConfig)) else (size, size)
            try:
                with eval_mode(self), torch.no_grad():
                    found = self(torch.zeros(1, 3, height, width))
            except (AssertionError, RuntimeError, ValueError) as error:
                reason = str(error).rstrip(".")
                hint = _SIZE_HINTS.get(cfg.backbone.name.split("_")[0], "local crops of the global crops' size")
                raise ValueError(
                    f"backbone {cfg.backbone.name} can't take crops of {height} x {width} pixels: {reason}. "
                    f"Try {hint}, or a backbone that takes any size, such as resnet18."
                ) from error
        return int(_output(found, self.outputs.proj, "proj").shape[-1])

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """solo-learn's parameter groups, and one for the affinity; a local predictor joins the predictor's."""
        group = {"name": "affinity", "params": list(self.logo.parameters()), "weight_decay": 0}
        stock: list[dict[str, Any]] = super().learnable_params
        if self.logo_local_predictor is not None:
            join_groups(stock, self.predictor, self.logo_local_predictor)
        return [*stock, group] if group["params"] else stock

    def configure_callbacks(self) -> Any:
        """With `monitor`, attaches a `LoGoMonitor`: main_pretrain.py takes no callbacks of the user's."""
        stock: Any = super().configure_callbacks()
        if not self.monitor:
            return stock
        from logo_plugin.adapters.lightning import LoGoMonitor

        return [*(stock if isinstance(stock, Sequence) else [stock]), LoGoMonitor()]

    def setup(self, stage: str) -> None:
        """With `fast_crops`, gives the training data logo_plugin's crops in place of solo-learn's."""
        super().setup(stage)
        if stage != "fit" or not self.fast_crops:
            return
        # Before Lightning iterates over the loader: its workers copy the dataset.
        source = self.trainer.fit_loop._data_source.instance
        dataset: Any = getattr(source, "dataset", None)
        stock = getattr(dataset, "transform", None)
        if isinstance(stock, FastCrops):  # a second fit on the same data
            return
        if not isinstance(stock, FullTransformPipeline):
            raise ValueError(
                "method_kwargs.logo.fast_crops needs solo-learn's own image loading (data.format=image_folder), got "
                f"{type(source).__name__}. Set method_kwargs.logo.fast_crops=false, or another data.format."
            )
        dataset.transform = FastCrops(self.cfg.augmentations, stock, return_boxes=self.weigh_overlap)

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        """The method's own step on the global crops, plus LoGo's terms; global crops come first in the batch."""
        indexes, crops, targets = batch
        overlap = None
        if self.weigh_overlap:
            *crops, boxes = crops
            overlap = crop_overlap(boxes[:, self.num_large_crops :].transpose(0, 1))
        if len(crops) != self.num_large_crops + self.num_local_crops:
            raise ValueError(
                f"expected {self.num_large_crops} global and {self.num_local_crops} local crops, got {len(crops)}."
            )
        similarity = self.outputs.similarity(self)  # before the step: it replaces keys of the queue
        host_loss = super().training_step([indexes, crops[: self.num_large_crops], targets], batch_idx)
        found = self.__dict__.pop("_captured", None)
        if found is None or not isinstance(host_loss, Tensor):
            raise TypeError(
                "LoGo needs a training_step that calls super().training_step() and returns the loss as a tensor; "
                f"{type(self).__name__}'s {'does not call it' if found is None else 'returns no tensor'}."
            )
        with stand_in(getattr(self, "predictor", None), self.logo_local_predictor):
            local = [self(crop) for crop in crops[self.num_large_crops :]]
        local_proj = [_output(out, self.outputs.proj, "proj") for out in local]
        terms = self.logo.extend(
            host_loss,
            global_global=host_loss / self.outputs.scale,
            global_pairs=2,
            global_target=_output(found, self.outputs.target, "target"),
            local_pred=[_output(out, self.outputs.pred, "pred") for out in local],
            local_proj=local_proj,
            scale=self.outputs.scale,
            similarity=similarity,
            local_overlap=overlap,
        )
        self.logo_terms = terms.detach()
        self.logo_local_proj = [z.detach() for z in local_proj]
        metrics = {f"train_{name}": value for name, value in self.logo_terms._asdict().items() if name != "total"}
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
        total: Tensor = terms.total + found["class_loss"]
        return total

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops the scheduler's `get_lr` of SimSiam and NNSiam: it holds itself, and nothing can load it."""
        super().on_save_checkpoint(checkpoint)
        for scheduler in checkpoint.get("lr_schedulers", []):
            scheduler.pop("get_lr", None)


class FastCrops:
    """solo-learn's `augmentations` config through `MultiCropTransform`, each image decoded once.

    Args:
        augmentations: The config: one pipeline each entry.
        stock: What solo-learn made of it, for mean and standard deviation.
        return_boxes: Append the crops' boxes, (V, 4).

    Raises:
        ValueError: If a pipeline asks for what `MultiCropTransform` cannot do.
    """

    def __init__(self, augmentations: ListConfig, stock: FullTransformPipeline, *, return_boxes: bool = False) -> None:
        self.return_boxes = return_boxes
        self.transforms = []
        for i, (crop, pipeline) in enumerate(zip(augmentations, stock.transforms, strict=True)):
            size = {crop.crop_size} if isinstance(crop.crop_size, int) else set(crop.crop_size)
            refused = {
                "rrc.enabled=false": not crop.rrc.enabled,
                "equalization.prob": bool(crop.equalization.prob),
                "crop_size that is not square": len(size) > 1,
            }
            if any(refused.values()):
                what = ", ".join(name for name, asked in refused.items() if asked)
                raise ValueError(f"method_kwargs.logo.fast_crops cannot do augmentations.{i}.{what}; set it to false.")
            normalize = pipeline.transform.transforms[-1]
            jitter = crop.color_jitter
            self.transforms.append(
                MultiCropTransform(
                    global_crops=crop.num_crops,
                    local_crops=0,
                    global_size=size.pop(),
                    global_scale=(crop.rrc.crop_min_scale, crop.rrc.crop_max_scale),
                    flip_p=crop.horizontal_flip.prob,
                    jitter_p=jitter.prob,
                    **(
                        {name: jitter[name] for name in ("brightness", "contrast", "saturation", "hue")}
                        if jitter.prob
                        else {}
                    ),
                    grayscale_p=crop.grayscale.prob,
                    blur_p=crop.gaussian_blur.prob,
                    solarize_p=crop.solarization.prob,
                    mean=tuple(normalize.mean),
                    std=tuple(normalize.std),
                    return_boxes=True,
                )
            )

    def __call__(self, image: Any) -> list[Tensor]:
        """Makes the crops of one image, in the order of the pipelines."""
        pixels = decode(image).permute(2, 0, 1)
        crops, boxes = [], []
        for transform in self.transforms:
            *views, box = transform(pixels)
            crops += views
            boxes.append(box)
        return [*crops, torch.cat(boxes)] if self.return_boxes else crops


class _Neighbours(BaseMethod):
    """NNBYOL and NNSiam: the targets are the nearest neighbours that the method looks up in its queue."""

    def find_nn(self, z: Tensor) -> tuple[Tensor, Tensor]:
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
        target: Key of the stop-gradient target in what the base's `training_step` returns.
        proj: Key of the projection that the affinity compares, as `pred` (default: `pred` itself).
        scale: What the method multiplies its mean similarity with: 2 for a sum over both directions,
            1 (default) for their mean.
        similarity: The method's similarity loss, (pred, target) -> scalar.

    Returns:
        The class. LoGo's options are read from `cfg.method_kwargs.logo`. Assign it to the name
        `LoGo<method's name>` in the method's module if it is to be pickled, and add it to
        `solo.methods.METHODS` to choose it as `method=`.

    Raises:
        TypeError: If `method` is no solo-learn method class, or its outputs are not known.
    """
    if not inspect.isclass(method) or not issubclass(method, BaseMethod):
        raise TypeError(f"wrap() takes a solo-learn method class such as solo.methods.BYOL, got {method!r}.")
    constant = None if similarity is None else lambda model: similarity
    given: dict[str, Any] = dict(pred=pred, target=target, proj=proj, scale=scale, similarity=constant)
    given = {name: value for name, value in given.items() if value is not None}
    if not given and (method in _KNOWN or issubclass(method, _LoGo)):
        return _KNOWN.get(method, method)  # type: ignore[no-any-return]
    parent = next((_KNOWN[base] for base in method.__mro__ if base in _KNOWN), None)
    if parent is None:
        missing = [name for name in ("pred", "target", "similarity") if name not in given]
        if missing:
            raise TypeError(
                f"{method.__name__} is not one of {[known.__name__ for known in _KNOWN]}: "
                f"tell wrap() its {', '.join(missing)}, as in wrap({method.__name__}, "
                'pred="p", target="momentum_z", proj="z", scale=2.0, similarity=loss_function).'
            )
        return _logo_class(method, _Outputs(**{"proj": pred, "scale": 1.0} | given))
    mixins = (_Neighbours,) if issubclass(parent, _Neighbours) else ()
    return _logo_class(method, parent.outputs._replace(**given), *mixins)


def _logo_class(method: type, outputs: _Outputs, *mixins: type, module: str | None = None) -> type:
    base = BaseMomentumMethod if issubclass(method, BaseMomentumMethod) else BaseMethod

    class Capture(base):  # type: ignore[misc, valid-type]
        """Stands between the method and its base: keeps what the base's step returns."""

        def training_step(self, batch: list[Any], batch_idx: int) -> dict[str, Any]:
            outputs: dict[str, Any] = super().training_step(batch, batch_idx)
            # The method adds this loss to its own; LoGo does so after weighting the method's.
            class_loss = outputs["loss"]
            self.__dict__["_captured"] = outputs
            outputs.update(class_loss=class_loss, loss=torch.zeros_like(class_loss))
            return outputs

    namespace = {"outputs": outputs, "__module__": module or method.__module__, "__doc__": f"{method.__name__}, LoGo."}
    return type(f"LoGo{method.__name__}", (*mixins, _LoGo, method, Capture), namespace)


def _checked(given: Any) -> dict[str, Any]:
    """All options, each as given, as the preset has it, or at its default."""
    if not isinstance(given, dict):
        raise ValueError(f"method_kwargs.logo must be a mapping of options, got {given!r}.")
    for name in given:
        if name not in OPTIONS:
            raise ValueError(unknown_option(str(name), OPTIONS, "method_kwargs.logo."))
    for name in ("affinity", "fast_crops", "weigh_overlap", "local_predictor", "monitor"):
        if not isinstance(given.get(name, False), bool):
            raise ValueError(f"method_kwargs.logo.{name} must be true or false, got {given[name]!r}.")
    try:
        options = OPTIONS | with_preset(given.get("preset"), given)
        LoGoLoss(**{name: options[name] for name in options if name not in _OWN})
    except ValueError as error:
        raise ValueError(f"method_kwargs.logo: {error}") from error
    if options["weigh_overlap"] and not options["fast_crops"]:
        raise ValueError(
            "method_kwargs.logo.weigh_overlap needs the crops' boxes: set method_kwargs.logo.fast_crops=true."
        )
    return options


def _name_suffix(options: Mapping[str, Any]) -> str:
    """What is not as the defaults or the named preset have it, and always lambda; not `monitor`, which only looks."""
    usual = OPTIONS | PRESETS.get(options["preset"], {})
    differing = {n: v for n, v in options.items() if v not in (None, usual[n]) and n != "monitor"}
    if options["gradient_ratio"] is None and options["affinity"]:
        weight = LoGoLoss(local_weight=options["local_weight"]).local_weight
        differing = {"lambda": f"{weight:g}"} | {n: v for n, v in differing.items() if n != "local_weight"}
    return "-logo" + "".join(f"-{name}{value}" for name, value in differing.items())


def _output(found: Mapping[str, Any], key: str, name: str) -> Any:
    if key not in found:
        raise ValueError(f'{name}="{key}" is not an output of this method; it has {", ".join(sorted(found))}.')
    return found[key]


def _exact(similarity: Callable[..., Tensor], **options: Any) -> Similarity:
    """solo-learn's similarity in float32 under autocast."""

    def exact(pred: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(pred.device.type, enabled=False):
            return similarity(full_precision(pred), full_precision(target), **options)

    return exact


_KNOWN: dict[type, Any] = {}


def _known(method: type, *outputs: Any, mixins: tuple[type, ...] = ()) -> Any:
    _KNOWN[method] = _logo_class(method, _Outputs(*outputs), *mixins, module=__name__)
    return _KNOWN[method]


def _queues(model: Any) -> list[Similarity]:
    return [_exact(mocov2plus_loss_func, queue=q, temperature=model.temperature) for q in model.queue.clone()]


def _in_batch(model: Any) -> Similarity:
    return _exact(mocov3_loss_func, temperature=model.temperature)


LoGoBYOL = _known(methods.BYOL, "p", "momentum_z", "z", 2.0, lambda model: _exact(byol_loss_func))
LoGoSimSiam = _known(methods.SimSiam, "p", "z", "z", 1.0, lambda model: _exact(simsiam_loss_func))
LoGoMoCoV2Plus = _known(methods.MoCoV2Plus, "z", "momentum_z", "z", 1.0, _queues)
LoGoMoCoV3 = _known(methods.MoCoV3, "q", "momentum_k", "z", 2.0, _in_batch)
LoGoNNBYOL = _known(methods.NNBYOL, "p", "neighbours", *LoGoBYOL.outputs[2:], mixins=(_Neighbours,))
LoGoNNSiam = _known(methods.NNSiam, "p", "neighbours", *LoGoSimSiam.outputs[2:], mixins=(_Neighbours,))


class _KNNMetric(Metric):
    """Takes the argument that torchmetrics dropped in 0.12 and solo-learn still gives."""

    def __init__(self, *, compute_on_step: bool = False, **options: Any) -> None:
        super().__init__(**options)


def _stock_backbone(build: Callable[..., Any], method: str, **options: Any) -> Any:
    """solo-learn picks ViT variants by the method's name."""
    return build(str(method).removeprefix("logo_"), **options)


def _register() -> None:
    backbones = BaseMethod._BACKBONES  # also what main_linear.py reads
    backbones.update({name: partial(_stock_backbone, build) for name, build in backbones.items()})
    if WeightedKNNClassifier.__bases__ == (Metric,):
        WeightedKNNClassifier.__bases__ = (_KNNMetric,)
    names = {cls: name for name, cls in methods.METHODS.items()}
    methods.METHODS.update({f"logo_{names[method]}": logo for method, logo in _KNOWN.items()})


_register()
