"""lightly's own example files, from a clone at LIGHTLY_ROOT, with one line added: whole runs, resumed and on two ranks.

What a step computes is in test_methods.py. Each file is run as it is, apart from what makes it small: the data set, the
number of epochs, workers and devices. They are never copied into this repository.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = os.environ.get("LIGHTLY_ROOT")
pytestmark = pytest.mark.skipif(not ROOT, reason="LIGHTLY_ROOT names no clone of lightly")
CLASSES = {"byol": "BYOL", "moco": "MoCo", "simsiam": "SimSiam"}

PREPARE = """
import warnings; warnings.simplefilter("ignore")
import sys, torch; sys.path.insert(0, {here!r})
from photos import tiles
torch.set_num_threads(1); torch.manual_seed(0)
"""
FINISH = """
import copy, math
assert model.current_epoch == {epochs}, model.current_epoch
for name in ("global_global", "local_global", "local_local", "affinity"):
    assert math.isfinite(trainer.callback_metrics["logo/" + name]), trainer.callback_metrics
trainer.save_checkpoint({checkpoint!r})
again = wrap({cls}())
trainer = pl.Trainer(max_epochs={epochs} + 1, devices=1, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(again, dataloader, ckpt_path={checkpoint!r})
assert again.current_epoch == {epochs} + 1
assert trainer.global_step == ({epochs} + 1) * len(dataloader), trainer.global_step
print("resumed at epoch", {epochs})
"""


def shrunk(source, folder):
    """The example on a few photographs, for two epochs on the CPU."""
    source = re.sub(r"torchvision\.datasets\.CIFAR10\(.*?\n\)", "tiles(32)", source, flags=re.S)
    source = re.sub(r"batch_size=256", "batch_size=16", source)
    source = re.sub(r"num_workers=8", "num_workers=0", source)
    source = re.sub(r"max_epochs=10|epochs = 10|range\(10\)", lambda m: m[0].replace("10", "2"), source)
    return source.replace("pl.Trainer(", f"pl.Trainer(default_root_dir={folder!r}, enable_progress_bar=False, ")


def run(source, folder, **environment):
    script = Path(folder, "script.py")
    script.write_text(source)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


COLLATE = "    collate_fn=MultiCropCollate.cifar10(),\n"


def wrapped_example(form, method, folder):
    """A Lightning example with the user's two edits: wrap the model, and let the collate make the crops."""
    cls = CLASSES[method]
    source = shrunk(Path(ROOT, "examples", form, f"{method}.py").read_text(), folder)
    source = source.replace(
        f"model = {cls}()\n", f"from logo_plugin import MultiCropCollate, wrap\nmodel = wrap({cls}())\n"
    )
    return source.replace("    drop_last=True,\n", "    drop_last=True,\n" + COLLATE)


@pytest.mark.parametrize("method", CLASSES)
def test_lightning_example_trains_and_resumes(method, tmp_path):
    source = wrapped_example("pytorch_lightning", method, str(tmp_path))
    source += FINISH.format(cls=CLASSES[method], epochs=2, checkpoint=str(tmp_path / "last.ckpt"))
    out = run(PREPARE.format(here=str(Path(__file__).parent)) + source, tmp_path)
    assert "resumed at epoch 2" in out


@pytest.mark.parametrize("method", CLASSES)
def test_distributed_example_keeps_two_ranks_identical(method, tmp_path):
    source = wrapped_example("pytorch_lightning_distributed", method, str(tmp_path))
    # A machine without GPUs: two gloo processes, and no SyncBatchNorm, which needs GPUs.
    source = source.replace('devices="auto"', "devices=2").replace('accelerator="gpu"', 'accelerator="cpu"')
    source = source.replace('strategy="ddp"', "strategy=pl.strategies.DDPStrategy(process_group_backend='gloo')")
    source = source.replace("sync_batchnorm=True", "sync_batchnorm=False")
    source = re.sub(r"wrap\((\w+)\(\)\)", r'wrap(\1(), affinity="learned")', source)  # parameters to keep equal, too
    source += """
mine = torch.cat([p.detach().flatten() for p in model.parameters()])
both = trainer.strategy.all_gather(mine)
assert torch.equal(both[0], both[1])
assert sum(p.numel() for p in model.logo.parameters()) > 0
print("rank", trainer.global_rank, "identical", mine.numel())
"""
    out = run(PREPARE.format(here=str(Path(__file__).parent)) + source, tmp_path)
    assert "identical" in out


@pytest.mark.parametrize(("file", "cls"), [("byol.py", "BYOL"), ("mocov2.py", "MoCoV2")])
def test_imagenet_benchmark_trains_and_resumes(file, cls, tmp_path):
    """The benchmarks' ResNet-50 classes: own parameter groups, LARS, online classifier, shuffled keys.

    Ten epochs of one step, since their schedule warms up for ten.
    """
    source = Path(ROOT, "benchmarks", "imagenet", "resnet50", file).read_text()
    source += f"""
import pytorch_lightning as pl
from logo_plugin import MultiCropCollate, wrap
make = {cls}
{cls} = lambda: make(batch_size_per_device=8, num_classes=10)
model = wrap({cls}())
dataloader = torch.utils.data.DataLoader(tiles(8), batch_size=8, collate_fn=MultiCropCollate.cifar10())
trainer = pl.Trainer(max_epochs=10, devices=1, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(model, dataloader)
names = [group["name"] for group in trainer.optimizers[0].param_groups]
sizes = [len(group["params"]) for group in trainer.optimizers[0].param_groups]
bare = [len(group["params"]) for group in make.configure_optimizers(model)[0][0].param_groups]
assert len(names) == 3 and [a - b for a, b in zip(sizes, bare)] == [0, len(list(model.logo.parameters())), 0]
"""
    source += FINISH.format(cls=cls, epochs=10, checkpoint=str(tmp_path / "last.ckpt"))
    out = run(PREPARE.format(here=str(Path(__file__).parent)) + source, tmp_path)
    assert "resumed at epoch 10" in out
