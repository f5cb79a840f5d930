"""Every Python block of the README runs, with the user's own names supplied."""

import re
from pathlib import Path

import hosts
import pytest
import pytorch_lightning as pl
import torch
from lightly.loss import NegativeCosineSimilarity
from photos import tiles

from logo_plugin import MultiCropCollate, wrap

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


def users_names(folder):
    """What a reader of the README has already: a model class, data, a Trainer, a criterion."""
    dataset = tiles(32)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "default_root_dir": folder}
    return {
        "torch": torch,
        "wrap": wrap,
        "BYOL": hosts.BYOL,
        "model": hosts.PlainBYOL(),
        "criterion": NegativeCosineSimilarity(),
        "dataset": dataset,
        "dataloader": torch.utils.data.DataLoader(dataset, batch_size=16, collate_fn=MultiCropCollate.cifar10()),
        "trainer": pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, enable_model_summary=False, **options),
    }


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_block_runs(block, tmp_path):
    names = users_names(tmp_path)
    exec(compile(block, "README.md", "exec"), names)
    loss = names["terms"].total if "terms" in names else names["model"].logo_terms.total
    assert loss.isfinite()


def test_the_first_loop_is_short():
    assert len(BLOCKS[0].strip().splitlines()) <= 20


def test_linked_files_exist():
    for link in re.findall(r"\]\(((?!http)[^)#]+)", README):
        assert Path(__file__).parents[1].joinpath(link).exists(), link
