"""Two gloo ranks under Lightning's own Trainer; adapter_contract.py has what all adapters do on two ranks."""

import csv

import hosts
import pytest
import pytorch_lightning as pl
import torch
from hosts import wrap_learned as wrap
from photos import tiles
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader

from logo_plugin import LoGoMonitor, MultiCropCollate


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
