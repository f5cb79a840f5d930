"""solo-learn's real methods from a clone, small enough to test: set SOLO_LEARN_ROOT."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = os.environ.get("SOLO_LEARN_ROOT")
MARKS = [
    pytest.mark.skipif(not ROOT, reason="set SOLO_LEARN_ROOT to a clone of solo-learn"),
    # solo-learn leaves args.json open, and calls logging.warn.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:The 'warn' function:DeprecationWarning"),
]
METHODS = [
    *("byol", "simsiam", "mocov2plus", "mocov3", "nnbyol", "nnsiam", "nnclr"),
    *("simclr", "barlow_twins", "vicreg", "vibcreg"),
]
# Both sides of the loss get gradient, and there is no predictor.
SYMMETRIC = ("simclr", "barlow_twins", "vicreg", "vibcreg")
# The projection that forward returns is not the tensor that the prediction is computed from.
HIDDEN_PROJECTION = ("nnsiam", "nnclr")
CONF = Path(__file__).parent.parent / "src" / "logo_plugin" / "conf"


def import_solo():
    """solo-learn warns a lot with current libraries."""
    if ROOT not in sys.path:
        sys.path.insert(0, ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import logo_plugin.adapters.solo
        import solo.methods
    solo.methods.BaseMethod._BACKBONES.setdefault("resnet_small", small_backbone)
    return solo.methods, logo_plugin.adapters.solo


def small_backbone(method: str, **options: Any):
    """torchvision's ResNet-18 up to its second stage: 0.7 of its 11 million parameters."""
    from torchvision.models import resnet18

    model = resnet18(**options)
    model.layer3 = model.layer4 = torch.nn.Identity()
    model.inplanes = 128
    return model


def config(method: str, logo: dict[str, Any] | None = None, small: int = 2, **backbone: Any):
    """Hyperparameters that are not the defaults, so that a mix-up shows."""
    from omegaconf import OmegaConf

    return OmegaConf.create(
        {
            "method": method,
            "name": "run",
            "backbone": {"name": "resnet18", **backbone},
            "data": {"dataset": "custom", "num_classes": 10, "num_large_crops": 2, "num_small_crops": small},
            "augmentations": [{"crop_size": 32}, {"crop_size": [32, 32]}],
            "max_epochs": 1,
            "momentum": {"base_tau": 0.9, "final_tau": 1.0},
            "optimizer": {"name": "sgd", "batch_size": 4, "lr": 0.1, "classifier_lr": 0.1, "weight_decay": 1e-4},
            "scheduler": {"name": "none"},
            "method_kwargs": {
                "proj_hidden_dim": 16,
                "proj_output_dim": 8,
                "pred_hidden_dim": 16,
                "queue_size": 24,
                "temperature": 0.3,
                "lamb": 0.03,
                "scale_loss": 0.2,
                "sim_loss_weight": 7.0,
                "var_loss_weight": 11.0,
                "cov_loss_weight": 3.0,
            }
            | ({} if logo is None else {"logo": logo}),
        }
    )


def build(method: str, logo: dict[str, Any] | None = None, *, seed: int = 0, **options: Any):
    """Unless told otherwise with the learned affinity: it has parameters and draws, and no Trainer is needed."""
    methods, _ = import_solo()
    torch.manual_seed(seed)
    stock = not method.startswith("logo_")
    if not stock:
        logo = {"affinity": "learned"} | (logo or {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = methods.METHODS[method](config(method, logo, small=0 if stock else 2, **options))
    model.log_dict = model.log = lambda *args, **kwargs: None
    return model


def batch(n: int = 4, crops: int = 4, size: int = 32):
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(n, 3, size, size, generator=generator) for _ in range(crops)]
    return [torch.arange(n), views, torch.arange(n) % 10]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compose(config_dir: str, name: str, *overrides: str):
    """A config of the clone's, through Hydra and solo-learn's own parse_cfg."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    import_solo()
    with initialize_config_dir(f"{ROOT}/scripts/pretrain/{config_dir}", version_base="1.2"):
        cfg = compose(name, ["data.train_path=.", "data.val_path=null", "data.format=image_folder", *overrides])
    OmegaConf.set_struct(cfg, False)
    from solo.args.pretrain import parse_cfg

    return parse_cfg(cfg)
