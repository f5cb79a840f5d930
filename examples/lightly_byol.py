"""Stands for a script that you have: BYOL as in lightly's examples, on photographs, with 2 crops."""

import copy

import pytorch_lightning as pl
import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from photographs import photograph_tiles
from pytorch_lightning.loggers import CSVLogger
from torch import nn


class Tiles(torch.utils.data.Dataset):
    def __init__(self, transform=None):
        self.samples, self.transform = photograph_tiles(60)[0], transform

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        image, label = self.samples[index]
        return (self.transform(image) if self.transform else image), label


class BYOL(pl.LightningModule):
    def __init__(self):
        super().__init__()
        layers = []
        for before, after in ((3, 32), (32, 64), (64, 128)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.backbone = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.projection_head = BYOLProjectionHead(128, 256, 64)
        self.prediction_head = BYOLPredictionHead(64, 256, 64)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        y = self.backbone(x).flatten(start_dim=1)
        return self.prediction_head(self.projection_head(y))

    def forward_momentum(self, x):
        y = self.backbone_momentum(x).flatten(start_dim=1)
        return self.projection_head_momentum(y).detach()

    def training_step(self, batch, batch_idx):
        update_momentum(self.backbone, self.backbone_momentum, m=0.98)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.98)
        x0, x1 = batch[0]
        p0, z0 = self.forward(x0), self.forward_momentum(x0)
        p1, z1 = self.forward(x1), self.forward_momentum(x1)
        loss = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9)


pl.seed_everything(0, verbose=False)
model = BYOL()
transform = BYOLTransform(BYOLView1Transform(input_size=48), BYOLView2Transform(input_size=48))
dataset = Tiles(transform)
dataloader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True, drop_last=True)
trainer = pl.Trainer(
    max_epochs=8,
    accelerator="cpu",
    logger=CSVLogger("."),
    log_every_n_steps=4,
    enable_progress_bar=False,
)
trainer.fit(model, dataloader)
