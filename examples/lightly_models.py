"""BYOL, MoCo and SimSiam on any timm backbone, written as lightly's examples are.

Nothing here knows of LoGo: these stand for the classes that lightly's users have already.
"""

import copy
import difflib

import pytorch_lightning as pl
import timm
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    MoCoProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum


class _Base(pl.LightningModule):
    lr = 0.06

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)


class _Momentum(_Base):
    def copy_momentum(self):
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward_momentum(self, x):
        y = self.backbone_momentum(x).flatten(start_dim=1)
        return self.projection_head_momentum(y).detach()

    def update(self):
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)


class BYOL(_Momentum):
    def __init__(self, backbone, features):
        super().__init__()
        self.backbone = backbone
        self.projection_head = BYOLProjectionHead(features, 512, 128)
        self.prediction_head = BYOLPredictionHead(128, 512, 128)
        self.copy_momentum()
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        y = self.backbone(x).flatten(start_dim=1)
        return self.prediction_head(self.projection_head(y))

    def training_step(self, batch, batch_idx):
        self.update()
        x0, x1 = batch[0]
        p0, z0 = self.forward(x0), self.forward_momentum(x0)
        p1, z1 = self.forward(x1), self.forward_momentum(x1)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class MoCo(_Momentum):
    def __init__(self, backbone, features):
        super().__init__()
        self.backbone = backbone
        self.projection_head = MoCoProjectionHead(features, 512, 128)
        self.copy_momentum()
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(4096, 128))

    def forward(self, x):
        y = self.backbone(x).flatten(start_dim=1)
        return self.projection_head(y)

    def training_step(self, batch, batch_idx):
        self.update()
        x_query, x_key = batch[0]
        return self.criterion(self.forward(x_query), self.forward_momentum(x_key))


class SimSiam(_Base):
    def __init__(self, backbone, features):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimSiamProjectionHead(features, 512, 128)
        self.prediction_head = SimSiamPredictionHead(128, 64, 128)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        y = self.backbone(x).flatten(start_dim=1)
        z = self.projection_head(y)
        return z.detach(), self.prediction_head(z)

    def training_step(self, batch, batch_idx):
        x0, x1 = batch[0]
        z0, p0 = self.forward(x0)
        z1, p1 = self.forward(x1)
        return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))


METHODS = {"byol": BYOL, "moco": MoCo, "simsiam": SimSiam}


def create(method, backbone, *sizes):
    """A model of METHODS on a timm backbone that takes square images of all the sizes.

    Raises:
        ValueError: If timm does not know the backbone, or it cannot take the sizes.
    """
    if not timm.is_model(backbone):
        close = difflib.get_close_matches(backbone, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {backbone!r}" + (f"; did you mean {', '.join(close)}?" if close else "."))
    # CNNs take any size as they are; ViTs and Swins have a switch each, which others reject.
    errors = []
    for switches in (
        {},
        {"img_size": sizes[0], "dynamic_img_size": True},
        {"img_size": sizes[0], "strict_img_size": False},
    ):
        try:
            net = timm.create_model(backbone, num_classes=0, **switches)
            with torch.no_grad():
                widths = {net.eval()(torch.zeros(2, 3, size, size)).flatten(1).shape[1] for size in sizes}
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            errors.append(f"{switches}: {error}")
            continue
        if len(widths) == 1:
            return METHODS[method](net.train(), widths.pop())
    raise ValueError(f"timm's {backbone!r} does not take images of {sizes} px: " + "; ".join(errors))
