"""Models in the styles that lightly's users copy, small, on lightly's own heads and losses."""

import copy
import functools

import pytorch_lightning as pl
import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DCLLoss,
    DCLWLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    TiCoLoss,
    VICRegLoss,
)
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    MoCoProjectionHead,
    NNMemoryBankModule,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
)
from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum
from lightly.utils.benchmarking import OnlineLinearClassifier
from torch import nn

from logo_plugin import wrap

# With the paper's affinity, whose parameters and random numbers the tests follow; the default has tests of its own.
wrap_learned = functools.partial(wrap, affinity="learned")


def small_backbone():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
    )


class Momentum:
    """The target network of lightly's BYOL and MoCo examples."""

    def copy_momentum(self):
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def update(self):
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.9)

    def forward_momentum(self, x):
        y = self.backbone_momentum(x).flatten(start_dim=1)
        return self.projection_head_momentum(y).detach()


class SGD:
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06)


class BYOL(SGD, Momentum, pl.LightningModule):
    def __init__(self, out_dim: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.backbone = small_backbone()
        self.projection_head = BYOLProjectionHead(32, 24, out_dim)
        self.prediction_head = BYOLPredictionHead(out_dim, 24, out_dim)
        self.copy_momentum()
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def training_step(self, batch, batch_idx):
        self.update()
        (x0, x1) = batch[0]
        p0, z0 = self.forward(x0), self.forward_momentum(x0)
        p1, z1 = self.forward(x1), self.forward_momentum(x1)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class MoCo(SGD, Momentum, pl.LightningModule):
    def __init__(self, symmetric: bool = False):
        super().__init__()
        self.symmetric = symmetric
        self.backbone = small_backbone()
        self.projection_head = MoCoProjectionHead(32, 24, 16)
        self.copy_momentum()
        self.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(64, 16))

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch, batch_idx):
        self.update()
        x_query, x_key = batch[0]
        loss = self.criterion(self.forward(x_query), self.forward_momentum(x_key))
        if self.symmetric:
            loss = 0.5 * (loss + self.criterion(self.forward(x_key), self.forward_momentum(x_query)))
        return loss


class SimSiam(SGD, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = SimSiamProjectionHead(32, 24, 16)
        self.prediction_head = SimSiamPredictionHead(16, 8, 16)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z.detach(), self.prediction_head(z)

    def training_step(self, batch, batch_idx):
        (x0, x1) = batch[0]
        z0, p0 = self.forward(x0)
        z1, p1 = self.forward(x1)
        return {"loss": 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0)), "extra": 1}


class BenchmarkBYOL(Momentum, pl.LightningModule):
    """As benchmarks/imagenet: forward gives features, doubled loss, online classifier, parameter groups."""

    def __init__(self):
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = BYOLProjectionHead(32, 24, 16)
        self.prediction_head = BYOLPredictionHead(16, 24, 16)
        self.copy_momentum()
        self.criterion = NegativeCosineSimilarity()
        self.online_classifier = OnlineLinearClassifier(feature_dim=32, num_classes=4, topk=(1,))

    def forward(self, x):
        return self.backbone(x)

    def forward_student(self, x):
        features = self(x).flatten(start_dim=1)
        return features, self.prediction_head(self.projection_head(features))

    @torch.no_grad()
    def forward_teacher(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1))

    def training_step(self, batch, batch_idx):
        self.update()
        views, targets = batch[0], batch[1]
        z0, z1 = self.forward_teacher(views[0]), self.forward_teacher(views[1])
        features, p0 = self.forward_student(views[0])
        _, p1 = self.forward_student(views[1])
        loss = 2 * self.criterion(z0, p1) + 2 * self.criterion(z1, p0)
        classifier_loss, _ = self.online_classifier.training_step((features.detach(), targets), batch_idx)
        return loss + classifier_loss

    def configure_optimizers(self):
        decayed = [*self.backbone.parameters(), *self.projection_head.parameters()]
        optimizer = torch.optim.SGD(
            [
                {"name": "byol", "params": decayed},
                {"name": "undecayed", "params": list(self.prediction_head.parameters()), "weight_decay": 0.0},
                {"name": "classifier", "params": self.online_classifier.parameters(), "weight_decay": 0.0},
            ],
            lr=0.05,
            weight_decay=1e-4,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class BenchmarkMoCo(SGD, Momentum, pl.LightningModule):
    """As benchmarks/imagenet: update between query and key, shuffled keys, forward gives features."""

    def __init__(self):
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = MoCoProjectionHead(32, 24, 16)
        self.copy_momentum()
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(64, 16))

    def forward(self, x):
        return self.backbone(x)

    def forward_query_encoder(self, x):
        features = self(x).flatten(start_dim=1)
        return features, self.projection_head(features)

    @torch.no_grad()
    def forward_key_encoder(self, x):
        x, shuffle = batch_shuffle(x)
        return batch_unshuffle(self.forward_momentum(x), shuffle)

    def training_step(self, batch, batch_idx):
        views = batch[0]
        _, query = self.forward_query_encoder(views[1])
        self.update()
        return self.criterion(query, self.forward_key_encoder(views[0]))


class TutorialMoCo(SGD, Momentum, pl.LightningModule):
    """As docs/tutorial_moco_memory_bank: no forward at all, memory bank of unknown width, three-part batch."""

    def __init__(self):
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = MoCoProjectionHead(32, 24, 16)
        self.copy_momentum()
        self.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(64, 16))

    def training_step(self, batch, batch_idx):
        (x_query, x_key), *_ = batch
        self.update()
        query = self.projection_head(self.backbone(x_query).flatten(start_dim=1))
        return self.criterion(query, self.forward_momentum(x_key))


class FeatureForwardBYOL(BYOL):
    """forward extracts features for inference; the training step runs the heads itself."""

    def forward(self, x):
        return self.backbone(x).flatten(start_dim=1)

    def training_step(self, batch, batch_idx):
        self.update()
        (x0, x1) = batch[0]
        p0, p1 = (self.prediction_head(self.projection_head(self(x))) for x in (x0, x1))
        return 0.5 * (self.criterion(p0, self.forward_momentum(x1)) + self.criterion(p1, self.forward_momentum(x0)))


def in_batch():
    """NTXentLoss without a bank; the pointer into the bank that it has not would be whatever memory held."""
    loss = NTXentLoss()
    loss.memory_bank.bank_ptr.zero_()
    return loss


class SimCLR(SGD, pl.LightningModule):
    """Two projections, gradient through both: SimCLR and FDA, and with their losses DCL, Barlow Twins, VICReg."""

    def __init__(self, criterion=in_batch):
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = SimCLRProjectionHead(32, 24, 16)
        self.criterion = criterion()

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch, batch_idx):
        x0, x1 = batch[0]
        return self.criterion(self.forward(x0), self.forward(x1))


class BarlowTwins(SimCLR):
    def __init__(self):
        super().__init__(BarlowTwinsLoss)


class DCL(SimCLR):
    def __init__(self):
        super().__init__(DCLLoss)


class DCLW(SimCLR):
    def __init__(self):
        super().__init__(DCLWLoss)


class BenchmarkVICReg(SimCLR):
    """As benchmarks/imagenet: both views in one batch, the loss called by keywords."""

    def __init__(self):
        super().__init__(VICRegLoss)

    def forward(self, x):
        return self.backbone(x)

    def training_step(self, batch, batch_idx):
        z_a, z_b = self.projection_head(self.forward(torch.cat(batch[0])).flatten(start_dim=1)).chunk(2)
        return 2 * self.criterion(z_a=z_a, z_b=z_b)


class NNCLR(SimSiam):
    def __init__(self):
        super().__init__()
        self.memory_bank = NNMemoryBankModule(size=(64, 16))
        self.criterion = in_batch()

    def training_step(self, batch, batch_idx):
        x0, x1 = batch[0]
        (z0, p0), (z1, p1) = self.forward(x0), self.forward(x1)
        z0 = self.memory_bank(z0, update=False)
        z1 = self.memory_bank(z1, update=True)
        return 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))


class FastSiam(SimSiam):
    """Each prediction against the mean of the other views' projections."""

    def training_step(self, batch, batch_idx):
        views = batch[0]
        zs, ps = zip(*(self.forward(view) for view in views), strict=True)
        others = [torch.stack([z for j, z in enumerate(zs) if j != i]).mean(0) for i in range(len(views))]
        return sum(self.criterion(p, z) / len(views) for p, z in zip(ps, others, strict=True))


class TiCo(SGD, Momentum, pl.LightningModule):
    """Its loss keeps a moving covariance, an attribute that is no buffer."""

    def __init__(self):
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = BYOLProjectionHead(32, 24, 16)
        self.copy_momentum()
        self.criterion = TiCoLoss()

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def training_step(self, batch, batch_idx):
        self.update()
        x0, x1 = batch[0]
        return self.criterion(self.forward(x0), self.forward_momentum(x1))


class NormalizedBYOL(BYOL):
    """The step normalises by hand what a plain squared error compares."""

    def __init__(self):
        super().__init__()
        self.criterion = nn.MSELoss()

    def training_step(self, batch, batch_idx):
        self.update()
        x0, x1 = batch[0]
        p0, p1, z0, z1 = (
            nn.functional.normalize(part, dim=1)
            for part in (self(x0), self(x1), self.forward_momentum(x0), self.forward_momentum(x1))
        )
        return self.criterion(p0, z1) + self.criterion(p1, z0)


LIGHTNING = {
    "byol": BYOL,
    "moco": MoCo,
    "simsiam": SimSiam,
    "benchmark byol": BenchmarkBYOL,
    "benchmark moco": BenchmarkMoCo,
    "tutorial moco": TutorialMoCo,
    "feature forward byol": FeatureForwardBYOL,
    "simclr": SimCLR,
    "barlow twins": BarlowTwins,
    "dcl": DCL,
    "dclw": DCLW,
    "benchmark vicreg": BenchmarkVICReg,
    "nnclr": NNCLR,
    "fastsiam": FastSiam,
    "tico": TiCo,
    "normalized byol": NormalizedBYOL,
}


class PlainBYOL(Momentum, nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = BYOLProjectionHead(32, 24, 16)
        self.prediction_head = BYOLPredictionHead(16, 24, 16)
        self.copy_momentum()

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def host_loss(self, criterion, x0, x1):
        return 0.5 * (criterion(self(x0), self.forward_momentum(x1)) + criterion(self(x1), self.forward_momentum(x0)))


class PlainMoCo(Momentum, nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = MoCoProjectionHead(32, 24, 16)
        self.copy_momentum()

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def host_loss(self, criterion, x0, x1):
        return criterion(self(x0), self.forward_momentum(x1))


class PlainSimSiam(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = SimSiamProjectionHead(32, 24, 16)
        self.prediction_head = SimSiamPredictionHead(16, 8, 16)

    def forward(self, x):
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z.detach(), self.prediction_head(z)

    def host_loss(self, criterion, x0, x1):
        (z0, p0), (z1, p1) = self(x0), self(x1)
        return 0.5 * (criterion(z0, p1) + criterion(z1, p0))


class PlainSimCLR(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = small_backbone()
        self.projection_head = SimCLRProjectionHead(32, 24, 16)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def host_loss(self, criterion, x0, x1):
        return criterion(self(x0), self(x1))


class PlainTiCo(PlainMoCo):
    pass


class PlainNNCLR(PlainSimSiam):
    def __init__(self):
        super().__init__()
        self.memory_bank = NNMemoryBankModule(size=(64, 16))

    def host_loss(self, criterion, x0, x1):
        (z0, p0), (z1, p1) = self(x0), self(x1)
        z0, z1 = self.memory_bank(z0, update=False), self.memory_bank(z1, update=True)
        return 0.5 * (criterion(z0, p1) + criterion(z1, p0))


def own_step(model, views):
    """A loop's step, said with step=."""
    return model.host_loss(model.criterion, *views)


PLAIN = {
    "byol": (PlainBYOL, NegativeCosineSimilarity),
    "moco": (PlainMoCo, lambda: NTXentLoss(temperature=0.1, memory_bank_size=(64, 16))),
    "simsiam": (PlainSimSiam, NegativeCosineSimilarity),
    "simclr": (PlainSimCLR, in_batch),
    "barlow twins": (PlainSimCLR, BarlowTwinsLoss),
    "vicreg": (PlainSimCLR, VICRegLoss),
    "dcl": (PlainSimCLR, DCLLoss),
}
SAID = {  # their loops' steps cannot be told from model and criterion
    "nnclr": (PlainNNCLR, in_batch),
    "tico": (PlainTiCo, TiCoLoss),
}
