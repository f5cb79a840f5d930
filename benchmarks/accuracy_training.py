"""How an arm is trained: the network, lightly's class wrapped by one line, the schedule, k-NN along the way."""

import time

import lightly_models
import numpy as np
import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from accuracy_arms import ARMS
from accuracy_evaluation import features, knn
from lightly.loss import NTXentLoss
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from logo_plugin import MultiCropCollate, info_nce, wrap


class QueueInfoNCE(nn.Module):
    """InfoNCE on a queue that a call does not change: the keys of a step join it at the next."""

    def __init__(self, size=4096, features=128, temperature=0.2):
        super().__init__()
        self.temperature = temperature
        self.register_buffer("queue", F.normalize(torch.randn(features, size), dim=0))
        self.register_buffer("keys", torch.zeros(0, features))

    def forward(self, query, key):
        return info_nce(query, key, queue=self.queue, temperature=self.temperature)

    def enqueue(self, keys):
        """Moves the last step's keys into the queue, the oldest out of it, and keeps these for the next step."""
        self.queue = torch.cat([self.queue, self.keys.T], 1)[:, len(self.keys) :]
        self.keys = F.normalize(keys.float(), dim=1)


class MoCoBothWays(lightly_models.MoCo):
    """MoCo v2+ as solo-learn has it: each crop is query and key, both keys enter the queue after the step."""

    def training_step(self, batch, batch_idx):
        self.update()
        x0, x1 = batch[0]
        q0, k0 = self.forward(x0), self.forward_momentum(x0)
        q1, k1 = self.forward(x1), self.forward_momentum(x1)
        self.criterion.enqueue(torch.cat([k0, k1]))
        return 0.5 * (self.criterion(q0, k1) + self.criterion(q1, k0))

    def on_load_checkpoint(self, checkpoint):
        self.criterion.keys = checkpoint["state_dict"]["criterion.keys"]  # as long as it was, which is no fixed size


METHODS = lightly_models.METHODS | {"moco-both": MoCoBothWays}


def backbone(name):
    """ "tiny" (0.3 M parameters, for a CPU), or a timm ResNet with the stem usual for CIFAR."""
    if name == "tiny":
        blocks = tuple(ByoBlockCfg("basic", d=1, c=width, s=2, gs=0, br=1.0) for width in (32, 64, 128))
        config = ByoModelCfg(blocks, stem_chs=16, stem_type="3x3", stem_pool="")
        return ByobNet(config, num_classes=0, zero_init_last=False)
    net = timm.create_model(name, num_classes=0)
    net.conv1, net.maxpool = nn.Conv2d(3, net.conv1.out_channels, 3, padding=1, bias=False), nn.Identity()
    return net


def build(method, arm, options, batches, epochs):
    """lightly's class on the backbone, wrapped by one line, with a cosine schedule."""
    wrapping, run = ARMS[arm]
    lr = options.lr * run.get("lr", 1.0)

    class Scheduled(METHODS[method]):
        def configure_optimizers(self):
            affinity = [p for name, p in self.named_parameters() if name.startswith("logo.affinity")]
            others = [p for name, p in self.named_parameters() if not name.startswith("logo.affinity")]
            groups = [{"params": others}, {"params": affinity, "lr": lr * run.get("affinity_lr", 1.0)}]
            optimizer = torch.optim.SGD(groups[: 1 + bool(affinity)], lr, momentum=0.9, weight_decay=5e-4)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                max_lr=[group["lr"] for group in optimizer.param_groups],
                total_steps=epochs * batches + 1,
                pct_start=0.05,
                cycle_momentum=False,
                final_div_factor=1e4,
            )
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    net = backbone(options.backbone)
    model = Scheduled(net, net.num_features)
    if method == "moco":
        model.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(options.queue, 128))
    elif method == "moco-both":
        model.criterion = QueueInfoNCE(options.queue)
    if wrapping is None:
        return model
    made = {"affinity": wrapping["affinity"]()} if callable(wrapping.get("affinity")) else {}
    model = wrap(model, **wrapping | made)
    if run.get("reinitialise"):
        for module in model.logo_local_predictor.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return model


class Curve(Callback):
    """k-NN accuracy every few epochs; seeds each epoch, so that a resumed run differs by one epoch's order only."""

    def __init__(self, seed, every, epochs, setting, train, test):
        self.seed, self.every, self.epochs = seed, every, epochs
        self.setting, self.train, self.test = setting, train, test
        self.state, self.seconds = {"knn": [], "seconds": [], "steps": 0, "cpu_seconds": 0.0}, []

    def on_train_epoch_start(self, trainer, pl_module):
        torch.manual_seed(1000 * self.seed + trainer.current_epoch)
        self.began = time.process_time()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.start = clock(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seconds.append(clock(pl_module) - self.start)

    def on_train_epoch_end(self, trainer, pl_module):
        self.state["cpu_seconds"] = self.state.get("cpu_seconds", 0.0) + time.process_time() - self.began
        self.state["seconds"].append(float(np.median(self.seconds)))
        self.seconds = []
        self.state["steps"] = trainer.global_step
        epoch = trainer.current_epoch + 1
        if epoch % self.every == 0 or epoch == self.epochs:
            found = (features(pl_module, self.setting, *part) for part in (self.train, self.test))
            self.state["knn"].append([epoch, knn(*found, k=self.setting.neighbours)])

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def clock(model):
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def fit(method, arm, seed, options, epochs, setting, images, train, test, folder):
    """The model that learned from `images`, and what was noted on the way: k-NN of test from train.

    Continues from the folder's last epoch, if there is one.
    """
    torch.manual_seed(seed)
    data = DataLoader(
        TensorDataset(*images),
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=MultiCropCollate(**setting.crops | ARMS[arm][1].get("crops", {}), defer="augment"),
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
    )
    model = build(method, arm, options, len(data), epochs).to(memory_format=torch.channels_last)
    curve = Curve(seed, options.every, epochs, setting, train, test)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="gpu" if options.cuda else "cpu",
        devices=1,
        precision=options.precision,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[curve, ModelCheckpoint(folder, "last", enable_version_counter=False)],
    )
    last = folder / "last.ckpt"
    trainer.fit(model, data, ckpt_path=last if last.exists() else None, weights_only=False)
    return model.to("cuda" if options.cuda else "cpu"), curve.state
