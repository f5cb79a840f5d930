"""Makes LoGo's methods known to solo-learn, whose files stay as they are."""

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

from logo_plugin.adapters.solo.checkpoints import check_checkpoint
from logo_plugin.adapters.solo.crops import add_local_crops, check_config
from logo_plugin.adapters.solo.formats import check_format
from logo_plugin.adapters.solo.methods import KNOWN
from logo_plugin.adapters.solo.options import checked
from logo_plugin.adapters.solo.refused import reason
from logo_plugin.adapters.solo.step import LoGo
from omegaconf import DictConfig, OmegaConf
from solo import methods
from solo.methods.base import BaseMethod
from solo.utils.auto_resumer import AutoResumer
from solo.utils.checkpointer import Checkpointer
from solo.utils.knn import WeightedKNNClassifier
from torchmetrics import Metric


def register() -> None:
    """Adds the methods, mends solo-learn's k-NN, and puts LoGo's messages before errors that have none."""
    backbones = BaseMethod._BACKBONES  # also what main_linear.py reads
    backbones.update({name: partial(_stock_backbone, build) for name, build in backbones.items()})
    if WeightedKNNClassifier.__bases__ == (Metric,):
        WeightedKNNClassifier.__bases__ = (_KNNMetric,)
    # The first that solo-learn's parse_cfg calls; what comes next asserts without a message.
    Checkpointer.add_and_assert_specific_cfg = staticmethod(
        partial(_after_check, Checkpointer.add_and_assert_specific_cfg)
    )
    AutoResumer.SHOULD_MATCH.append("logo_augmentations")
    # On the base class, so that a stock method says that it was given a checkpoint of LoGo's.
    BaseMethod.on_load_checkpoint = check_checkpoint
    names = {cls: name for name, cls in methods.METHODS.items()}
    methods.METHODS.update({f"logo_{names[method]}": logo for method, logo in KNOWN.items()})


class _KNNMetric(Metric):
    """Takes the argument that torchmetrics dropped in 0.12 and solo-learn still gives."""

    def __init__(self, *, compute_on_step: bool = False, **options: Any) -> None:
        super().__init__(**options)


def _stock_backbone(build: Callable[..., Any], method: str, **options: Any) -> Any:
    """solo-learn picks ViT variants by the method's name."""
    return build(str(method).removeprefix("logo_"), **options)


def _after_check(stock: Callable[[DictConfig], DictConfig], cfg: DictConfig) -> DictConfig:
    method = str(cfg.get("method"))
    cls = methods.METHODS.get(method)
    host = methods.METHODS.get(method.removeprefix("logo_"))
    given = OmegaConf.select(cfg, "method_kwargs.logo")
    if isinstance(cls, type) and issubclass(cls, LoGo):
        options = checked(given, hidden=cls.outputs.hidden, queue=cls.outputs.queue)
        add_local_crops(cfg, options)
        check_config(cfg, affinity=bool(options["affinity"]))
        check_format(cfg)
        # AutoResumer looks at it, other than at augmentations, which stock runs may change.
        cfg.logo_augmentations = hashlib.sha256(OmegaConf.to_yaml(cfg.augmentations).encode()).hexdigest()
    elif method.startswith("logo_") and host is not None and reason(host):
        raise TypeError(f"LoGo cannot carry {host.__name__}: {reason(host)}")
    elif method.startswith("logo_") and cls is None:
        ours = ", ".join(sorted(name for name in methods.METHODS if name.startswith("logo_")))
        raise ValueError(f"method={method} is none of solo-learn's with LoGo, which are {ours}.")
    elif given is not None:
        known = f"logo_{method}" in methods.METHODS
        cure = f"Set method=logo_{method}, or leave it out." if known else "Leave it out."
        raise ValueError(
            f"method={method} knows nothing of method_kwargs.logo, and would train without LoGo. {cure} In a config's "
            "defaults list, +logo= and its kind must come after what sets the method."
        )
    return stock(cfg)
