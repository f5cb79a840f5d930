"""What a LoGo method adds to solo-learn's: options, parameters, and the step itself."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from logo_plugin.adapters.solo import fast_crops
from logo_plugin.adapters.solo.crops import check_counts
from logo_plugin.adapters.solo.names import named
from logo_plugin.adapters.solo.options import OWN, PREFIX, checked
from logo_plugin.adapters.solo.trying import dry_run, output, refuse_ratio
from omegaconf import DictConfig
from solo.methods.base import BaseMethod
from torch import Tensor, nn

from logo_plugin.affinity import Affinity
from logo_plugin.crops import crop_overlap
from logo_plugin.local_predictor import join_groups, stand_in
from logo_plugin.losses import LoGoLoss, LoGoTerms
from logo_plugin.observing import HALF_PRECISION
from logo_plugin.online import images_of
from logo_plugin.progress import follow_trainer
from logo_plugin.recomputing import local_forwards
from logo_plugin.similarities import Similarity
from logo_plugin.stepping import groups_of, join_optimizer, loss_of
from logo_plugin.verifying import known_images


class Outputs(NamedTuple):
    """As in `wrap`, but `similarity` takes the model and the batch's indexes before each step.

    It gives one loss, or one for each target. `hidden`: the prediction is not computed from `proj` itself. `queue`: the
    loss compares with a queue of negatives.
    """

    pred: str
    target: str
    proj: str
    scale: float
    similarity: Callable[[Any, Tensor], Similarity | list[Similarity]]
    hidden: bool = False
    queue: bool = False


class LoGo(BaseMethod):
    """Stands before a method of solo-learn in the method resolution order."""

    outputs: Outputs
    num_small_crops: int
    logo_terms: LoGoTerms | None = None  # of the last step, detached, as the projections that LoGoMonitor measures
    logo_local_proj: list[Tensor] | None = None
    _checked_epoch = -1

    def __init__(self, cfg: DictConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, *args, **kwargs)
        options = dict(cfg.method_kwargs.logo)
        own = {name: options.pop(name) for name in OWN}
        self.fast_crops, self.weigh_overlap, self.monitor = (own[n] for n in ("fast_crops", "weigh_overlap", "monitor"))
        self.local_placement = own["local_placement"]
        self.local_forwards = {"checkpoint": own["checkpoint_local_crops"], "running_stats": own["local_running_stats"]}
        dim = dry_run(self, cfg)
        affinity = own["affinity"] or None
        if affinity == "learned":
            affinity = Affinity(dim, own["affinity_hidden_dim"], own["affinity_norm"])
        self.logo = LoGoLoss(affinity=affinity, **options)
        predictor = getattr(self, "predictor", None)
        if own["local_predictor"] and not isinstance(predictor, nn.Module):
            raise ValueError(
                f"{PREFIX}local_predictor copies the method's predictor, and {cfg.method} has none. "
                f"Set {PREFIX}local_predictor=false."
            )
        self.logo_local_predictor = copy.deepcopy(predictor) if own["local_predictor"] else None
        # solo-learn's own step sees two crops; the local ones are LoGo's.
        self.num_local_crops: int = self.num_small_crops
        self.num_crops, self.num_small_crops, self.multicrop = self.num_large_crops, 0, False

    @classmethod
    def add_and_assert_specific_cfg(cls, cfg: DictConfig) -> DictConfig:
        """Adds and checks `method_kwargs.logo`, and puts what it says into the run's name."""
        cfg = super().add_and_assert_specific_cfg(cfg)
        options = checked(cfg.method_kwargs.get("logo"), hidden=cls.outputs.hidden, queue=cls.outputs.queue)
        if cls.outputs.hidden:
            refuse_ratio(options, cfg.method)
        cfg.method_kwargs.logo = options
        check_counts(cfg, cfg.data.num_large_crops, cfg.data.num_small_crops, affinity=options["affinity"])
        if "name" in cfg:
            cfg.name = named(cfg, options)
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """solo-learn's parameter groups, and one for the affinity; a local predictor joins the predictor's."""
        group = {"name": "affinity", "params": list(self.logo.parameters()), "weight_decay": 0}
        stock: list[dict[str, Any]] = super().learnable_params
        if self.logo_local_predictor is not None:
            join_groups(stock, self.predictor, self.logo_local_predictor)
        return [*stock, group] if group["params"] else stock

    def configure_optimizers(self) -> Any:
        """The method's own; what LoGo added joins a group if the method has built them by itself."""
        configured: Any = super().configure_optimizers()
        predictor = getattr(self, "predictor", None)
        join_optimizer(self, predictor, groups_of(configured))
        return configured

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
        if stage != "fit":
            return
        loader = self.trainer.fit_loop._data_source.instance
        if self.fast_crops:
            fast_crops.install(
                loader,
                self.cfg.augmentations,
                defer="augment" if self.fast_crops == "augment" else "normalize",
                return_boxes=self.weigh_overlap,
                local_placement=self.local_placement,
            )
        else:
            fast_crops.remove(loader)  # another model's, of a fit that ended in an error

    def teardown(self, stage: str) -> None:
        """Gives solo-learn's own crops back."""
        super().teardown(stage)
        if stage == "fit" and self.fast_crops:
            fast_crops.remove(self.trainer.fit_loop._data_source.instance)

    def training_step(self, batch: list[Any], batch_idx: int) -> Any:
        """The method's own step on the global crops, plus LoGo's terms; global crops come first in the batch."""
        indexes, crops, targets, *others = batch
        overlap = None
        if self.weigh_overlap:
            boxes, *others = others
            overlap = crop_overlap(boxes[:, self.num_large_crops :].transpose(0, 1))
        if len(crops) != self.num_large_crops + self.num_local_crops:
            raise ValueError(
                f"expected {self.num_large_crops} global and {self.num_local_crops} local crops, got {len(crops)}."
            )
        if not self.automatic_optimization and type(self).training_step is LoGo.training_step:
            raise TypeError(
                f"{type(self).__name__} optimises manually, so Lightning ignores the loss that training_step returns, "
                "to which LoGo adds its terms. Wrap a method that does not, and optimise manually in a subclass of "
                "what wrap() gives."
            )
        similarity = self.outputs.similarity(self, indexes)  # before the step: it replaces keys of the queue
        # Each epoch anew: a further term may have begun meanwhile.
        first, global_crops = self._checked_epoch != self.current_epoch, crops[: self.num_large_crops]
        with images_of([self] if first else []) as fed:
            out = super().training_step([indexes, [*global_crops], targets, *others], batch_idx)
        host_loss = loss_of(out)
        found = self.__dict__.pop("_captured", None)
        if out is None or (not torch.is_grad_enabled() and isinstance(host_loss, Tensor)):
            return out  # a batch to leave out; a loss to look at
        if found is None or not isinstance(host_loss, Tensor):
            raise TypeError(
                "LoGo needs a training_step that calls super().training_step() and returns the loss as a tensor; "
                f"{type(self).__name__}'s {'does not call it' if found is None else 'returns no tensor'}."
            )
        pred, target, proj, scale, *_ = self.outputs
        global_target = output(found, target, "target")[: self.num_large_crops]
        # The method adds the class loss to its own, LoGo after weighting the method's: as often as the method does.
        (share,) = torch.autograd.grad(host_loss, found["loss"], retain_graph=True, allow_unused=True)
        class_loss = 0.0 if share is None else share * found["class_loss"]
        if first:
            self._checked_epoch = self.current_epoch
            self._check_images(global_crops, fed)
            self._check_similarity(host_loss / scale, output(found, pred, "pred"), global_target, similarity)
        predictor = getattr(self, "predictor", None)
        with (
            stand_in(predictor, self.logo_local_predictor),
            local_forwards(self, self.backbone, **self.local_forwards),
        ):
            local = [self(crop) for crop in crops[self.num_large_crops :]]
        local_proj = [output(out, proj, "proj") for out in local]
        follow_trainer(self)
        terms = self.logo.extend(
            host_loss,
            global_global=host_loss / scale,
            global_pairs=2,
            global_target=global_target,
            local_pred=[output(out, pred, "pred") for out in local],
            local_proj=local_proj,
            scale=scale,
            similarity=similarity,
            local_overlap=overlap,
        )
        self.logo_terms = terms.detach()
        self.logo_local_proj = [z.detach() for z in local_proj]
        metrics = {f"train_{name}": value for name, value in self.logo_terms._asdict().items() if name != "total"}
        self.log_dict(metrics, on_epoch=True, sync_dist=True)
        total: Tensor = terms.total + class_loss
        return {**out, "loss": total} if isinstance(out, dict) else total

    def _check_images(self, crops: Sequence[Tensor], fed: list[Tensor]) -> None:
        """What a training_step makes of images, local crops would go without."""
        if not all(known_images([*crops], fed)):
            raise TypeError(
                f"{type(self).__name__}'s training_step calls the method with other images than the global crops that "
                "it is given, and local crops would go as they come. Change images in the data or in forward, which "
                "all crops pass."
            )

    @torch.no_grad()
    def _check_similarity(
        self,
        expected: Tensor,
        preds: Sequence[Tensor],
        targets: Sequence[Tensor],
        similarity: Similarity | list[Similarity],
    ) -> None:
        """Local crops must be scored by the very loss that the global ones are."""
        first, second = similarity if isinstance(similarity, list) else [similarity] * 2
        # On every rank, whatever comes of it: it may gather.
        found = (first(preds[1], targets[0]) + second(preds[0], targets[1])) / 2
        one = preds[0].new_ones(1, 1)
        half = (one @ one).dtype in (torch.float16, torch.bfloat16)  # also under autocast
        relative, absolute = HALF_PRECISION if half else (5e-3, 1e-3)
        near = torch.isclose(found.cpu().double(), expected.cpu().double(), rtol=relative, atol=absolute)
        if torch.isfinite(expected) and not near:
            raise TypeError(
                f"on the global crops similarity gives {float(found):.6g}, and {type(self).__name__}'s own loss is "
                f"{float(expected * self.outputs.scale):.6g} = scale {self.outputs.scale:g} * {float(expected):.6g}. "
                "Give wrap() the loss that training_step calls, as similarity=, with its hyperparameters, and scale=2 "
                "for a sum over both directions or 1 for their mean. A loss with further terms can only be carried "
                "with those in what base_training_step returns as loss."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drops the scheduler's `get_lr` of SimSiam and NNSiam: it holds itself, and nothing can load it."""
        super().on_save_checkpoint(checkpoint)
        for scheduler in checkpoint.get("lr_schedulers", []):
            scheduler.pop("get_lr", None)
