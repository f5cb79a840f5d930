"""The LoGo objective (Zhang et al., CVPR 2022, https://arxiv.org/abs/2203.17205)."""

import inspect
import math
from collections.abc import Sequence
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from logo_plugin.affinity import CosineAffinity, full_precision
from logo_plugin.affinity_terms import affinity_terms
from logo_plugin.checks import Views, as_views, choice, flag, nonnegative, options_by_name, same_shape, shapes
from logo_plugin.compiling import eager, with_gradients_inside
from logo_plugin.graphs import nodes_of
from logo_plugin.presets import PRESETS, with_preset
from logo_plugin.ranks import in_group
from logo_plugin.similarities import Similarity, mean_over_pairs, mean_target, negative_cosine


class LoGoTerms(NamedTuple):
    """What `LoGoLoss` returns: `total` to call backward on, and each term unweighted (scalars), of this rank."""

    total: Tensor
    global_global: Tensor
    local_global: Tensor
    local_local: Tensor
    affinity: Tensor

    def detach(self) -> "LoGoTerms":
        """The same terms without their graphs, to keep or to log."""
        return LoGoTerms(*(term.detach() for term in self))


class LoGoLoss(nn.Module):
    """Pulls global to global and local to global crops, pushes local crops apart.

    `total = similarity + lambda * local_local + affinity`, one backward for one optimizer. Detaching
    routes the gradient: global_global reaches the online global crops, local_global and local_local
    the online local crops, and affinity nothing but the parameters of `affinity`; targets get none.

    In distributed training every term sees the images of its own rank, without communication; data parallelism
    averages the gradients. A `similarity` that gathers makes global_global and local_global gathered, no other term.

    Args:
        affinity: What is repelled. "cosine", which we recommend, is the cosine similarity itself: nothing is learned,
            the affinity's term is 0, and the defaults are `gradient_ratio=0.1, anneal_repulsion=True`. Or a pair
            scorer that is learned alongside, the paper's `Affinity(dim)` or any module that maps two (P, N, D) tensors
            to logits (P, N). None means no repulsion: the host method with multi-crop.
        similarity: The host method's own loss, "cosine" (negative cosine, in [-1, 1]) or any callable
            (pred (N, D), target (N, D)) -> scalar.
        local_weight: lambda, the fixed weight of local_local (default 1e-4, the paper's for SimSiam).
        gradient_ratio: Instead of a fixed weight, scale local_local so that the norm of its gradient
            at `local_proj` is at most this fraction of the similarity's (the release: 0.015, taken
            there on the encoder's gradient). The adapters have 0.3 in place of the cosine's 0.1 for methods with a
            queue of negatives (MoCo). It takes that gradient in `forward`, which under `torch.compile` is a graph
            break: `fullgraph=True` needs a fixed weight. Where gradients are off there is none to take, and `total`
            goes without the repulsion.
        anneal_repulsion: Let the repulsion fall to nothing over the training: its weight, or the gradient ratio, is
            multiplied by (1 + cos(pi * progress)) / 2, the half cosine of learning rate schedules. `anneal` says how
            far the training is; of a wrapped model Lightning's Trainer says it in each step, whatever you say. None:
            True with "cosine", else False.
        local_global_weight: Weight of a local-global pair against a global-global pair.
        affinity_loss: "logistic", softplus(-f(same image)) + softplus(f(other image)) (release), or
            "difference", f(other image) - f(same image) (Eq. 6).
        positive_noise: Gaussian noise of standard deviation `positive_noise / sqrt(D)` on the positive
            pairs of the affinity loss (release: 0.3; 0 turns it off).
        repulsion: a(z, z') of local_local, "softplus" of the logit (release) or the "logit" (Eq. 5). The cosine of
            `affinity="cosine"` is repelled as it is.
        reduction: "pairs" is the mean over all global-global and local-global pairs (release), "sum"
            the mean over global-global plus the sum over local-global pairs (Eq. 9). Without local
            crops both are exactly the host method's loss.
        average_targets: Compare each local crop with the mean of the global targets instead of each of them,
            at unchanged weights ("mean encoding" of asym-siam, https://arxiv.org/abs/2204.00613). As there,
            the mean is of the targets as they come, and normalised afterwards. With the cosine, for unit
            targets of mean m, mean_j cos(p, t_j) = norm(m) cos(p, m): only the images' weights change, those
            whose targets disagree no longer count less.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If an option is out of its range, or two exclude each other.

    Example:
        >>> criterion = LoGoLoss(affinity=Affinity(dim=256))
        >>> terms = criterion(
        ...     global_pred=[predictor(z) for z in global_proj],
        ...     local_pred=[predictor(z) for z in local_proj],
        ...     global_target=target_proj,
        ...     local_proj=local_proj,
        ... )
        >>> terms.total.backward()
    """

    _strength: Tensor | None  # of an annealed repulsion, a scalar in [0, 1]

    @options_by_name
    def __init__(
        self,
        *,
        affinity: nn.Module | Literal["cosine"] | None = None,
        similarity: Literal["cosine"] | Similarity = "cosine",
        local_weight: float | None = None,
        gradient_ratio: float | None = None,
        anneal_repulsion: bool | None = None,
        local_global_weight: float = 1.0,
        affinity_loss: Literal["logistic", "difference"] = "logistic",
        positive_noise: float = 0.3,
        repulsion: Literal["softplus", "logit"] = "softplus",
        reduction: Literal["pairs", "sum"] = "pairs",
        average_targets: bool = False,
    ) -> None:
        super().__init__()
        if affinity == "cosine":
            affinity = CosineAffinity()
            if local_weight is None and gradient_ratio is None:
                gradient_ratio = 0.1
            if anneal_repulsion is None:
                anneal_repulsion = True
        if affinity is not None and not isinstance(affinity, nn.Module):
            raise ValueError(
                'affinity must be a module like Affinity(dim), "cosine" or None; of wrap and LoGoLearner also '
                f'"learned": got {affinity!r}.'
            )
        if affinity is not None and not _takes_pairs(affinity):
            raise ValueError(
                "affinity must be a module such as Affinity(dim), which takes both sides of pairs, (P, N, D) each, and "
                f"gives logits (P, N); got {affinity!r}, whose forward does not take two tensors."
            )
        if similarity != "cosine" and not callable(similarity):
            raise ValueError(f'similarity must be "cosine" or a callable, got {similarity!r}.')
        if local_weight is not None and gradient_ratio is not None:
            raise ValueError(
                f"got both local_weight={local_weight!r} and gradient_ratio={gradient_ratio!r}: "
                "give a fixed weight or a gradient ratio, not both."
            )
        self.affinity = affinity
        self.similarity: Similarity = negative_cosine if similarity == "cosine" else similarity
        self.gradient_ratio = None if gradient_ratio is None else nonnegative("gradient_ratio", gradient_ratio)
        self.local_weight = nonnegative("local_weight", 1e-4 if local_weight is None else local_weight)
        self.local_global_weight = nonnegative("local_global_weight", local_global_weight)
        self.affinity_loss = choice("affinity_loss", affinity_loss, ("logistic", "difference"))
        self.positive_noise = nonnegative("positive_noise", positive_noise)
        choice("repulsion", repulsion, ("softplus", "logit"))
        self.repulsion = "logit" if isinstance(affinity, CosineAffinity) else repulsion
        self.reduction = choice("reduction", reduction, ("pairs", "sum"))
        self.average_targets = flag("average_targets", average_targets)
        self.anneal_repulsion = anneal_repulsion is not None and flag("anneal_repulsion", anneal_repulsion)
        # A tensor, which a compiled step reads without being compiled again; checkpoints are without it.
        self.register_buffer("_strength", torch.ones(()) if self.anneal_repulsion else None, persistent=False)
        self._progress_known = self._told_by_trainer = False
        of_learned = [
            ("affinity_loss", affinity_loss, "logistic"),
            ("positive_noise", positive_noise, 0.3),
            ("repulsion", repulsion, "softplus"),
        ]
        idle = [f"{name}={value!r}" for name, value, usual in of_learned if value != usual]
        if idle and isinstance(affinity, CosineAffinity):
            raise ValueError(
                f"{', '.join(idle)}: without effect beside the cosine, which is not learned. Leave it out, with the "
                "preset that may have set it, or give a learned affinity: affinity=Affinity(dim), of wrap and "
                'LoGoLearner affinity="learned".'
            )
        if affinity is not None and gradient_ratio and not local_global_weight:
            raise ValueError(
                f"gradient_ratio={gradient_ratio} is a fraction of the gradient that pulls local crops to global ones, "
                "and local_global_weight=0 leaves none: nothing would be repelled. Give a fixed local_weight instead "
                "(it replaces a preset's gradient_ratio, too), or local_global_weight > 0."
            )

    @classmethod
    def paper(cls, **options: Any) -> "LoGoLoss":
        """Eq. 3 to 9 of the paper with its lambda for SimSiam, except for the `options` given.

        Eq. 6 has no lower bound: the affinity's logits can run away, and with a fixed lambda the repulsion with
        them. `gradient_ratio` caps it.
        """
        return cls._of_preset("paper", options)

    @classmethod
    def release(cls, **options: Any) -> "LoGoLoss":
        """The official release's settings, except for the `options` given; its three optimizer steps stay one."""
        return cls._of_preset("release", options)

    @classmethod
    def _of_preset(cls, preset: str, options: dict[str, Any]) -> "LoGoLoss":
        made = cls(**with_preset(preset, options))  # other mistakes are named first
        if "affinity" not in options:
            raise ValueError(
                f"LoGoLoss.{preset}() needs the affinity network: {preset}(affinity=Affinity(dim)), dim being the "
                "width of the projections. affinity=None is multi-crop without repulsion."
            )
        return made

    def anneal(self, progress: float) -> None:
        """Sets how strongly the steps from now on repel, with `anneal_repulsion`; without it nothing changes.

        Args:
            progress: The share of the training that is done, in [0, 1]: steps done / steps in all.

        Raises:
            ValueError: If it is out of its range.
        """
        if isinstance(progress, bool) or not isinstance(progress, Real) or not 0 <= progress <= 1:
            raise ValueError(
                f"progress must be the share of the training that is done, a number in [0, 1], got {progress!r}: give "
                "steps done / steps in all."
            )
        if self._strength is not None:
            self._strength.fill_((1 + math.cos(math.pi * float(progress))) / 2)
            self._progress_known, self._told_by_trainer = True, False

    def forward(
        self,
        *,
        global_pred: Views,
        global_target: Views,
        local_pred: Views = (),
        local_proj: Views | None = None,
        local_overlap: Tensor | None = None,
        similarity: Similarity | None = None,
    ) -> LoGoTerms:
        """Computes the objective for G >= 2 global and L >= 0 local crops.

        Args:
            global_pred: Online predictions of the global crops, (G, N, D) or G tensors (N, D).
            global_target: Stop-gradient targets of the same crops in the same order, same shape.
            local_pred: Online predictions of the local crops, (L, N, D) or L tensors (N, D).
            local_proj: Projections of the local crops that the affinity compares, (L, N, D') or L
                tensors (N, D'). None takes `local_pred` (methods without a predictor).
            local_overlap: Intersection over union of the local crops in [0, 1], (pairs, N) with the pairs
                in `itertools.combinations` order, as `crop_overlap` gives it. Each pair's repulsion in
                local_local is then multiplied by 1 - overlap: crops that show the same content are
                not pushed apart. None treats all pairs alike. On a GPU, where looking at them would make
                it wait, values out of range are not refused: local_local is nan.
            similarity: Replaces `self.similarity` for this call (a queue changes every step).

        Returns:
            `LoGoTerms`.

        Raises:
            ValueError: If shapes do not fit each other, there are too few crops or images, or `local_overlap` is
                out of range.
        """
        preds, targets = as_views("global_pred", global_pred), as_views("global_target", global_target)
        if len(preds) < 2:
            raise ValueError(f"global_pred needs at least 2 global crops, got {len(preds)}.")
        if len(targets) != len(preds):
            raise ValueError(f"global_target has {len(targets)} views, global_pred has {len(preds)}; give one each.")
        same_shape("global_target", targets, "global_pred", preds)
        global_global = mean_over_pairs(similarity or self.similarity, preds, targets, apart=True)
        extend = self.extend if self.gradient_ratio is None else partial(with_gradients_inside, self.extend)
        return extend(
            global_global,
            global_global=global_global,
            global_pairs=len(preds) * (len(preds) - 1),
            global_target=targets,
            local_pred=local_pred,
            local_proj=local_proj,
            local_overlap=local_overlap,
            similarity=similarity,
        )

    def extend(
        self,
        host_loss: Tensor,
        *,
        global_global: Tensor,
        global_pairs: int,
        global_target: Views,
        local_pred: Views,
        local_proj: Views | None = None,
        local_overlap: Tensor | None = None,
        scale: float | Tensor = 1.0,
        similarity: Similarity | Sequence[Similarity] | None = None,
    ) -> LoGoTerms:
        """Adds LoGo's local terms to a loss that a host framework computed on the global crops.

        For adapters: whatever else the host put into its loss stays in it.

        Args:
            host_loss: The host's loss, which contains `scale * global_global` (scalar).
            global_global: Mean of the host's similarity over its `global_pairs` pairs (scalar).
            global_pairs: Number of pairs behind `global_global`, at least 1.
            global_target: The targets that the host used, (T, N, D) or T tensors (N, D), T >= 1.
            local_pred: As in `forward`.
            local_proj: As in `forward`.
            local_overlap: As in `forward`.
            scale: What the host multiplies its mean similarity with; LoGo's pairs get the same.
            similarity: Replaces `self.similarity` for this call (a queue changes every step); a sequence
                has one for each target. With `average_targets` each is given the same mean target.

        Returns:
            `LoGoTerms`; `total` is `host_loss` itself when there are no local crops.

        Raises:
            ValueError: As in `forward`.
        """
        preds, targets = as_views("local_pred", local_pred), as_views("global_target", global_target)
        if not preds:
            if self.affinity is not None:
                raise ValueError(
                    "local_pred is missing, and the affinity needs at least 2 local crops: pass local_pred, "
                    "or build LoGoLoss with affinity=None."
                )
            zero = global_global.new_zeros(())
            return LoGoTerms(host_loss, global_global, zero, zero, zero)
        same_shape("local_pred", preds, "global_target", targets)
        similarity = similarity or self.similarity
        compared = targets
        if self.average_targets:
            compared = [mean_target(targets)] * (len(similarity) if isinstance(similarity, Sequence) else 1)
        local_global = mean_over_pairs(similarity, preds, compared, apart=False)
        pairs = self.local_global_weight * len(preds) * len(targets)
        share = scale * (pairs / (global_pairs + pairs) if self.reduction == "pairs" else pairs)
        pull = share * local_global
        total = host_loss + pull
        if self.reduction == "pairs":
            total = total - share * global_global
        if self.affinity is None:
            zero = global_global.new_zeros(())
            return LoGoTerms(total, global_global, local_global, zero, zero)

        proj = preds if local_proj is None else as_views("local_proj", local_proj)
        if len(proj) != len(preds) or len(proj) < 2 or proj[0].shape[0] != preds[0].shape[0] or len(proj[0]) < 2:
            raise ValueError(
                "the affinity compares at least 2 local crops of at least 2 images, and local_proj matches local_pred "
                f"in both; got {shapes(proj)} for local_proj and {shapes(preds)} for local_pred. "
                "Use a larger batch (drop_last=True), more local crops, or affinity=None."
            )
        local_local, affinity = affinity_terms(
            self.affinity,
            proj,
            repulsion=self.repulsion,
            overlap=local_overlap,
            form=self.affinity_loss,
            noise=self.positive_noise / math.sqrt(proj[0].shape[1]),
        )
        if self.anneal_repulsion and torch.is_grad_enabled() and not self._progress_known:
            raise RuntimeError(
                "the repulsion is annealed over the training, and nothing says how far that is. Before each step call "
                "anneal(steps done / steps in all) of the loss (of a wrapped model model.logo.anneal, of a LoGoLearner "
                "learner.criterion.anneal; for a wrapped model Lightning's Trainer does so by itself if it has "
                "max_epochs, max_steps or max_time). Or give anneal_repulsion=False, or affinity=None for multi-crop "
                "without repulsion."
            )
        strength = 1.0 if self._strength is None else self._strength
        if self.gradient_ratio is None:
            learns = torch.is_grad_enabled() and any(pred.requires_grad for pred in preds)
            if self.local_weight and learns and not all(z.requires_grad for z in proj):
                raise ValueError(
                    "local_proj carries no gradient while local_pred does, so nothing would be repelled: pass the "
                    "projections as they are, not detached, or give local_weight=0 or affinity=None."
                )
            total = total + self.local_weight * strength * local_local
        elif torch.is_grad_enabled():  # else there is none to compare
            source = [local_proj] if isinstance(local_proj, Tensor) else proj
            weight = _capped_weight(pull, local_local, source, preds, self.gradient_ratio * strength)
            total = total + weight * local_local
        return LoGoTerms(total + affinity, global_global, local_global, local_local, affinity)

    def extra_repr(self) -> str:
        """What `print(model)` shows of the options."""
        idle = "gradient_ratio" if self.gradient_ratio is None else "local_weight"
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in PRESETS["paper"] if name != idle)


def _takes_pairs(module: nn.Module) -> bool:
    try:
        inspect.signature(module.forward).bind(None, None)
    except TypeError:
        return False
    return True


def _is_static_ddp(node: Any) -> bool:
    """Whether it ends a DDP's forward that is the first of a static graph."""
    ddp = getattr(node, "ddp_weakref", None)
    return ddp is not None and bool(ddp().static_graph)


@eager  # torch.compile would see no way from proj to preds, and take the gradient for zero
def _capped_weight(
    pull: Tensor, local_local: Tensor, proj: Sequence[Tensor], preds: Sequence[Tensor], ratio: float | Tensor
) -> Tensor:
    """Largest weight <= 1 that keeps local_local's gradient at proj within `ratio` of pull's."""
    graphs = {z.grad_fn for z in proj} - {None}
    if any(pred.grad_fn in graphs and all(pred is not z for z in proj) for pred in preds):
        raise RuntimeError(
            "gradient_ratio compares gradients at local_proj, and local_pred comes out of one graph of torch.compile "
            "with it, through which no gradient goes from one to the other. Compile encoder and predictor apart, or "
            "give a fixed local_weight."
        )
    if in_group() and any(_is_static_ddp(node) for node in nodes_of(preds, proj)):
        raise RuntimeError(
            "gradient_ratio takes a gradient through the predictor, and its DistributedDataParallel(static_graph=True) "
            "takes the first one for that of backward, so that the ranks would differ. Put one DistributedDataParallel "
            "around the whole model, leave static_graph away, or give a fixed local_weight."
        )
    norms = []
    for term in (pull, local_local):
        gradients: Sequence[Tensor | None] = [None]
        if term.requires_grad and all(z.requires_grad for z in proj):
            # Times N: the gradient of one image does not underflow in half precision, the ratio stays.
            n = term.new_full((), proj[0].shape[-2])
            gradients = torch.autograd.grad(term, proj, n, retain_graph=True, allow_unused=True)
        found = [full_precision(gradient) for gradient in gradients if gradient is not None]
        if len(found) < len(proj):
            raise ValueError(
                "gradient_ratio needs the gradient of the similarity at local_proj: call it with gradients enabled, "
                "local_proj not detached, and local_pred computed from the very tensors passed as local_proj."
            )
        norms.append(torch.stack(torch._foreach_norm(found)).norm())
    weight: Tensor = ratio * norms[0] / norms[1].clamp_min(torch.finfo(norms[1].dtype).tiny)
    return weight.clamp(max=1.0)
