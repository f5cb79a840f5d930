# %% [markdown]
# # One line in lightly
#
# `examples/lightly_byol.py` stands for the script that you have: BYOL as lightly's examples write it, a dataset with
# lightly's transform, a Trainer. This notebook runs it as it is, adds LoGo to its text, shows the difference, and runs
# it again.

# %%
import csv
import difflib
import logging
import os
import runpy
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import pytorch_lightning  # noqa: F401  (sets its log level when imported, so before ours)
import torch
from PIL import Image

examples = Path("..").resolve()
sys.path.insert(0, str(examples))
before = (examples / "lightly_byol.py").read_text()
print(before[before.index("class BYOL") :])

# %%
folder = Path(tempfile.mkdtemp())
os.chdir(folder)  # logs and checkpoints go there
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|torch)\..*")  # hints about workers


def run(text, name):
    """Runs a script in a folder of its own; gives its variables and, by name, what it logged as (steps, values)."""
    (folder / name).mkdir()
    os.chdir(folder / name)
    Path("script.py").write_text(text)
    variables = runpy.run_path("script.py")
    curves = {}
    with open("lightning_logs/version_0/metrics.csv") as file:
        for row in csv.DictReader(file):
            for key, value in row.items():
                if value and key not in ("step", "epoch"):
                    curves.setdefault(key, ([], []))
                    curves[key][0].append(int(row["step"]))
                    curves[key][1].append(float(value))
    return variables, curves


two_crops, curves_before = run(before, "before")
print(f"{two_crops['trainer'].global_step} steps, logged:", *curves_before)

# %% [markdown]
# ## The line
#
# `wrap(model)` is the line. The crops come from a collate function, so the dataset loses its transform: lightly's
# makes two views, LoGo needs four. `LoGoMonitor` is optional and logs what the features look like.

# %%
after = before
for old, new in {
    "from torch import nn\n": "from torch import nn\n\nfrom logo_plugin import LoGoMonitor, MultiCropCollate, wrap\n",
    "model = BYOL()": "model = wrap(BYOL())",
    "transform = BYOLTransform(BYOLView1Transform(input_size=48), BYOLView2Transform(input_size=48))\n": "",
    "Tiles(transform)\n": "Tiles()\ncollate = MultiCropCollate(global_size=48, local_size=32)\n",
    "drop_last=True)": "drop_last=True, collate_fn=collate)",
    "    max_epochs=8,\n": "    max_epochs=8,\n    callbacks=[LoGoMonitor(every_n_steps=4)],\n",
}.items():
    assert before.count(old) == 1, old
    after = after.replace(old, new)
print(
    *difflib.unified_diff(before.splitlines(), after.splitlines(), "before.py", "after.py", n=0, lineterm=""), sep="\n"
)

# %%
logo, curves_after = run(after, "after")
print(f"{logo['trainer'].global_step} steps, logged:", *curves_after)

# %% [markdown]
# ## Before and after
#
# Left, the one number that both scripts log: your own `loss`, on the two global crops. With LoGo it is still what your
# `training_step` computes. The crops of the two scripts differ (lightly's transform and `MultiCropCollate`'s default),
# and it is a run of a minute on small photographs with one seed: the curves show that training goes on, not which is
# better.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
axes[0].plot(*curves_before["loss"], color="tab:gray", label="before")
axes[0].plot(*curves_after["loss"], color="tab:red", label="after")
axes[0].set(title="loss of your training_step", xlabel="step")
axes[0].legend()
for name in ("global_global", "local_global", "local_local"):
    axes[1].plot(*curves_after[f"logo/{name}"], label=name)
axes[1].set(title="after: LoGo's terms, unweighted", xlabel="step")
_ = axes[1].legend(fontsize=8, ncols=2)

# %% [markdown]
# ## What the monitor logged
#
# Similarities of local crops and spread of the features ([what the numbers mean](../../docs/monitor.md)).

# %%
figure, axes = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
axes[0].plot(*curves_after["logo/local_local_similarity"], label="same image")
axes[0].plot(*curves_after["logo/other_image_similarity"], label="other image")
axes[0].set(title="cosine of local crops", xlabel="step", ylim=(-0.1, 1))
axes[0].legend(fontsize=8)
for axis, name, limits in zip(axes[1:], ("embedding_std", "effective_rank"), ((0, 1.1), (0, None)), strict=True):
    axis.plot(*curves_after[f"logo/{name}"])
    axis.set(title=name, xlabel="step", ylim=limits)

# %% [markdown]
# Once an epoch it also keeps a picture of the crops, here of the first: one row for each image, globals first.

# %%
Image.open(folder / "after/lightning_logs/version_0/logo_crops/epoch_0000.png").crop((0, 0, 202, 202)).resize(
    (404, 404)
)

# %% [markdown]
# ## The backbone is yours
#
# `wrap` changes nothing of what was there, and as it comes adds no parameter: the trained backbone loads into an
# unwrapped one, and so does the whole checkpoint.

# %%
fresh = two_crops["BYOL"]().backbone
print(fresh.load_state_dict(logo["model"].backbone.state_dict()))
print(two_crops["BYOL"]().load_state_dict(logo["model"].state_dict()))
x = torch.rand(2, 3, 48, 48)
with torch.no_grad():
    print("same features:", torch.equal(fresh.eval()(x), logo["model"].backbone.eval()(x)))

# %% [markdown]
# More: [classes and checkpoints, plain PyTorch, several GPUs](../../docs/lightly.md) and [all
# options](../../docs/options.md). `examples/demo.py` compares 2 crops, multi-crop and LoGo at equal time.
