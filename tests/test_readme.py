"""Every Python block of the README and of the docs runs, with the user's own names supplied."""

import inspect
import re
from pathlib import Path

import hosts
import pytest
import pytorch_lightning as pl
import torch
from lightly.loss import NegativeCosineSimilarity
from photos import tiles

from logo_plugin import LoGoLoss, LoGoTerms, MultiCropCollate, wrap

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
BLOCKS = {
    f"{page.name}-{i}": block
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    if page.name != "README.md"
}
README_BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
# They need the reader's folders of images, a clone of solo-learn, or each other (tests/test_export.py runs those), and
# are compiled only.
NEED_MORE = ("after-pretraining.md", "crops.md", "solo-learn.md")


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


def stable_pretraining_names(folder):
    """What a reader of that page has: networks, images, a Trainer of the other Lightning."""
    import lightning
    import stable_hosts
    import stable_pretraining

    dataset = stable_pretraining.data.FromTorchDataset(tiles(32), names=["image", "label"])
    parts = {"backbone": stable_hosts.backbone(), "projector": stable_hosts.head(32, 24, 16)}
    return {
        **parts,
        "predictor": stable_hosts.head(16, 24, 16),
        "encoder": stable_hosts.backbone(),
        "images": tiles(32),
        "loader": torch.utils.data.DataLoader(dataset, batch_size=16, collate_fn=MultiCropCollate.cifar10()),
        "trainer": lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=folder),
    }


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", BLOCKS)
def test_block_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # blocks may write files
    code = compile(BLOCKS[name], name, "exec")
    if name.startswith(NEED_MORE):
        return
    names = users_names(tmp_path)
    if name.startswith("stable-pretraining.md"):
        pytest.importorskip("stable_pretraining", reason="stable-pretraining is not installed: make test STABLE=1")
        names |= stable_pretraining_names(tmp_path)
    (tmp_path / "my_images").mkdir()
    names["dataset"][0][0].save(tmp_path / "my_images" / "photograph.png")
    exec(code, names)
    terms = names.get("terms", getattr(names["model"], "logo_terms", None))
    if isinstance(terms, LoGoTerms):
        assert terms.total.isfinite()


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`")
def test_blocks_of_the_readme_run_as_they_stand(tmp_path, monkeypatch):
    """Nothing is supplied: a reader pastes one below the other."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for block in README_BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert names["model"].logo_terms.total.isfinite()


def test_the_first_loop_is_short():
    assert len(README_BLOCKS[0].strip().splitlines()) <= 20


def test_options_are_on_their_page():
    """All that `wrap` and `LoGoLoss` have, and each row of a table is an option of theirs."""
    page = (ROOT / "docs" / "options.md").read_text()
    options = {name for takes in (wrap, LoGoLoss) for name in inspect.signature(takes).parameters} - {"x", "others"}
    assert {name for name in options if f"`{name}`" not in page} == set()
    assert set(re.findall(r"^\| `(\w+)`", page, re.M)) <= options


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page):
    for link in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text()):
        assert page.parent.joinpath(link).exists(), link
