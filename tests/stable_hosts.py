"""stable-pretraining's forwards and method classes with small networks, as its benchmarks build them."""

import types

import stable_pretraining as spt
import torch
from stable_pretraining import forward, methods
from torch import nn

FORWARDS = ("byol", "simclr", "vicreg", "barlow_twins", "nnclr")
CLASSES = ("BYOL", "SimSiam", "MoCov2", "MoCov3", "SimCLR", "BarlowTwins", "VICReg", "NNCLR")
SMALL = {
    "BYOL": {"projector_dims": (24, 16), "predictor_dims": (24, 16)},
    "SimSiam": {"projector_dim": 16, "predictor_hidden_dim": 8},
    "MoCov2": {"projector_dims": (24, 16), "queue_length": 32},
    "MoCov3": {"projector_dims": (24, 16), "predictor_hidden_dim": 24},
    "SimCLR": {"projector_dims": (24, 16)},
    "BarlowTwins": {"projector_dims": (24, 16)},
    "VICReg": {"projector_dims": (24, 16)},
    "NNCLR": {"projector_dims": (24, 16), "queue_length": 32},
}
LOSSES = {
    "byol": ("byol_loss", spt.losses.BYOLLoss),
    "simclr": ("simclr_loss", spt.losses.NTXEntLoss),
    "vicreg": ("vicreg_loss", spt.losses.VICRegLoss),
    "barlow_twins": ("barlow_loss", spt.losses.BarlowTwinsLoss),
    "nnclr": ("nnclr_loss", spt.losses.NTXEntLoss),
}
SGD = {"optimizer": {"type": "SGD", "lr": 0.05}, "scheduler": "ConstantLR"}


def backbone():
    layers = [nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def head(*widths):
    layers = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers[:-2])


def teacher_student(module):
    return spt.TeacherStudentWrapper(module, base_ema_coefficient=0.9, final_ema_coefficient=0.9)


def module(name, optim=SGD):
    """`spt.Module` around one of the forwards."""
    parts = {"backbone": backbone(), "projector": head(32, 24, 16)}
    if name == "byol":
        parts = {key: teacher_student(part) for key, part in parts.items()}
    if name in ("byol", "nnclr"):
        parts["predictor"] = head(16, 24, 16)
    attribute, loss = LOSSES[name]
    hparams = {"support_set_size": 32, "projection_dim": 16}
    return spt.Module(forward=getattr(forward, name), hparams=hparams, optim=optim, **{attribute: loss()}, **parts)


def method(name, optim=SGD, cls=None):
    """One of the method classes; it has no optimizer of its own."""
    model = (cls or getattr(methods, name))(encoder_name=backbone(), **SMALL[name])
    model.optim = optim
    return model


def glued(name, optim=SGD):
    """A method class with the forward that the benchmarks give it (benchmarks/imagenet10/two_view.py)."""
    model = method(name, optim)
    cls = getattr(methods, name)

    def fwd(self, batch, stage):
        if "image" in batch:
            return {"embedding": cls.forward(self, batch["image"]).embedding, "label": batch["label"].long()}
        first, second = batch["views"]
        output = cls.forward(self, first["image"], second["image"])
        embedding = output.embedding.detach()
        repeats = max(len(embedding) // len(first["label"]), 1)
        label = torch.cat([view["label"] for view in batch["views"][:repeats]]).long()
        self.log(f"{stage}/loss", output.loss, on_step=True, on_epoch=True, sync_dist=True)
        return {"loss": output.loss, "embedding": embedding, "label": label}

    model.forward = types.MethodType(fwd, model)
    return model
