"""stable-pretraining's forwards and method classes with small networks, built and called as its benchmarks do."""

import itertools
import types

import stable_pretraining as spt
import torch
from loguru import logger
from stable_pretraining import forward, losses, methods
from stable_pretraining.callbacks.queue import OnlineQueue, OrderedQueue
from torch import nn

logger.disable("stable_pretraining")  # it prints a page for every module, and lists all packages in every run
spt.set(default_callbacks={"env_dump": False, "progress_bar": False})
FORWARDS = {
    "byol": {"byol_loss": losses.BYOLLoss()},
    "simclr": {"simclr_loss": losses.NTXEntLoss(temperature=0.3)},
    "vicreg": {"vicreg_loss": losses.VICRegLoss(sim_coeff=9)},
    "barlow_twins": {"barlow_loss": losses.BarlowTwinsLoss(lambd=0.01)},
    "nnclr": {"nnclr_loss": losses.NTXEntLoss(temperature=0.3)},
}
CLASSES = {
    "BYOL": {"projector_dims": (24, 16), "predictor_dims": (24, 16)},
    "SimSiam": {"projector_dim": 16, "predictor_hidden_dim": 8},
    "MoCov2": {"projector_dims": (24, 16), "queue_length": 32, "temperature": 0.3},
    "MoCov3": {"projector_dims": (24, 16), "predictor_hidden_dim": 24, "temperature": 0.3},
    "SimCLR": {"projector_dims": (24, 16), "temperature": 0.3},
    "BarlowTwins": {"projector_dims": (24, 16)},
    "VICReg": {"projector_dims": (24, 16)},
    "NNCLR": {"projector_dims": (24, 16), "queue_length": 32},
}
OPTIM = {"optimizer": {"type": "SGD", "lr": 0.05}, "scheduler": "ConstantLR"}
QUEUE = "nnclr_support_set"


def backbone():
    layers = [nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def head(*widths):
    layers = [
        layer
        for before, after in itertools.pairwise(widths)
        for layer in (nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU())
    ]
    return nn.Sequential(*layers[:-2])


def teacher_student(part):
    return spt.TeacherStudentWrapper(part, base_ema_coefficient=0.9, final_ema_coefficient=0.9)


def module(name, optim=OPTIM, **others):
    """`spt.Module` around one of the forwards."""
    parts = {"backbone": backbone(), "projector": head(32, 24, 16)}
    if name == "byol":
        parts = {key: teacher_student(part) for key, part in parts.items()}
    if name in ("byol", "nnclr"):
        parts["predictor"] = head(16, 24, 16)
    hparams = {"support_set_size": 32, "projection_dim": 16}
    parts |= FORWARDS.get(name, {}) | others
    return spt.Module(forward=getattr(forward, name), hparams=hparams, optim=optim, **parts)


def method(name, optim=OPTIM, cls=None):
    """One of the method classes; it has no optimizer of its own, and a forward of two views that no Trainer calls."""
    model = (cls or getattr(methods, name))(encoder_name=backbone(), **CLASSES[name])
    model.optim = optim
    return model


def glued(name, optim=OPTIM):
    """A method class with the forward that benchmarks/imagenet10/two_view.py gives it."""
    model, cls = method(name, optim), getattr(methods, name)

    def fwd(self, batch, stage):
        if "image" in batch:
            return {"embedding": cls.forward(self, batch["image"]).embedding, "label": batch["label"].long()}
        views = batch["views"] if "views" in batch else list(batch.values())
        if len(views) != 2:
            raise ValueError(f"{cls.__name__} expects 2 views, got {len(views)}")
        output = cls.forward(self, views[0]["image"], views[1]["image"])
        embedding = output.embedding.detach()
        repeats = max(len(embedding) // len(views[0]["label"]), 1)
        label = torch.cat([view["label"] for view in views[:repeats]]).long()
        self.log(f"{stage}/loss", output.loss, on_step=True, on_epoch=True, sync_dist=True)
        return {"loss": output.loss, "embedding": embedding, "label": label}

    model.forward = types.MethodType(fwd, model)
    return model


def host(name, **options):
    return module(name, **options) if name in FORWARDS else glued(name, **options)


def with_queue(model, filled=0):
    """Gives the nnclr forward its support set without a Trainer: stable-pretraining's own callback and queue."""
    callback = OnlineQueue(key=QUEUE, queue_length=32, dim=16)
    queue = OrderedQueue(32, 16)
    if filled:
        queue.append(torch.randn(filled, 16))
    model.callbacks_modules[f"ordered_queue_{QUEUE}"], model._nnclr_queue_callback = queue, callback
    return model


def loss(model, views):
    """One training step's loss, the batch made and the support set fed as a Trainer would."""
    label = torch.arange(len(views[0]))
    queue = dict(model.callbacks_modules.items()).get(f"ordered_queue_{QUEUE}")
    if queue is not None:
        OnlineQueue._shared_queues[QUEUE] = queue  # of the class, not of a model
    out = model({"views": [{"image": view, "label": label} for view in views], "batch_idx": 0}, stage="fit")
    if queue is not None:
        with torch.no_grad():
            queue.append(out[QUEUE].detach())
        del OnlineQueue._shared_queues[QUEUE]  # as runs in the same process expect
    return out["loss"]
