"""Two gloo ranks: the same gradients as one process, and identical parameters after training."""

import csv

import hosts
import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from lightly.loss import NegativeCosineSimilarity
from photos import tiles
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from logo_plugin import Affinity, LoGoLoss, LoGoMonitor, MultiCropCollate, wrap


class Learner(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.predictor = nn.Linear(12, 8), nn.Linear(8, 8)
        self.criterion = LoGoLoss(affinity=Affinity(8, 16), **options)

    def forward(self, views):
        proj = [self.encoder(view) for view in views]
        pred = [self.predictor(z) for z in proj]
        target = [z.detach() for z in proj[:2]]
        return self.criterion(
            global_pred=pred[:2], local_pred=pred[2:], global_target=target, local_proj=proj[2:]
        ).total


def half(rank):
    return torch.randn(4, 2, 6, 12, generator=torch.Generator().manual_seed(1))[:, rank]


def loss_of_rank(learner, rank):
    torch.manual_seed(rank)  # each rank draws its own noise and negatives
    return learner(half(rank))


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters()}


OPTIONS = [{"local_weight": 0.5}, {"gradient_ratio": 0.1}, {"affinity_loss": "difference"}]


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for i, options in enumerate(OPTIONS):
        learner = DistributedDataParallel(Learner(**options), find_unused_parameters=False)
        for _ in range(2):  # a second step fails if the first left a parameter unused
            learner.zero_grad()
            loss_of_rank(learner, rank).backward()
        torch.save(gradients(learner.module), f"{folder}/{rank}-{i}.pt")
    torch.manual_seed(0)
    model = wrap(hosts.PlainSimSiam(), criterion=NegativeCosineSimilarity(), local_predictor=True)
    learner = DistributedDataParallel(model, find_unused_parameters=False)
    torch.manual_seed(rank)
    for _ in range(2):
        learner(list(torch.randn(4, 4, 3, 24, 24))).backward()
    torch.save(gradients(model.logo_local_predictor), f"{folder}/{rank}-local.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_average_what_one_process_computes(tmp_path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    for i, options in enumerate(OPTIONS):
        learner = Learner(**options)
        (sum(loss_of_rank(learner, rank) for rank in (0, 1)) / 2).backward()
        for rank in (0, 1):
            found = torch.load(tmp_path / f"{rank}-{i}.pt")
            for name, expected in gradients(learner).items():
                torch.testing.assert_close(found[name], expected, msg=lambda text, name=name: f"{name}: {text}")
    first, second = (torch.load(tmp_path / f"{rank}-local.pt") for rank in (0, 1))
    for name, gradient in first.items():  # a predictor of their own for local crops takes part
        assert torch.equal(gradient, second[name]), name


class RanksAgree(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        mine = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
        both = trainer.strategy.all_gather(mine)
        if not torch.equal(both[0], both[1]):
            raise RuntimeError("the ranks differ")
        if trainer.world_size != 2 or trainer.global_step != 4:
            raise RuntimeError(f"{trainer.world_size} ranks made {trainer.global_step} steps")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_lightning_keeps_two_ranks_identical(tmp_path):
    """MoCo, the host with most state; test_lightly_clone.py has all three."""
    model = wrap(hosts.MoCo())
    before = model.logo.affinity.mlp[0].weight.detach().clone()
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", start_method="spawn", find_unused_parameters=False),
        callbacks=[RanksAgree(), LoGoMonitor()],
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, DataLoader(tiles(32), batch_size=8, drop_last=True, collate_fn=MultiCropCollate.cifar10()))
    assert not torch.equal(before, model.logo.affinity.mlp[0].weight)
    (metrics,) = tmp_path.rglob("metrics.csv")
    with metrics.open() as file:
        measured = [row["step"] for row in csv.DictReader(file) if row["logo/embedding_std"]]
    assert measured == ["0", "1", "2", "3"]  # by the first rank only
    assert len(list(tmp_path.rglob("logo_crops/*.png"))) == 2
