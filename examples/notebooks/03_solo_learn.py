# %% [markdown]
# # solo-learn: one word on the command line
#
# A clone of [solo-learn](https://github.com/vturrisi/solo-learn), as it comes from git, trains LoGo once logo_plugin
# is installed beside it: `+logo=byol`. This notebook runs the clone's own scripts: it shows the composed config,
# trains a minute on photographs, reads the logs and the checkpoint's arguments, and runs the linear probe.
#
# It is executed only where `SOLO_LEARN_ROOT` names a clone; the outputs below are those of a real run.

# %%
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, "..")
from photographs import PHOTOGRAPHS, photograph_tiles

CLONE = Path(os.environ["SOLO_LEARN_ROOT"])
folder = Path(tempfile.mkdtemp())
for part, samples in zip(("train", "val"), photograph_tiles(24), strict=True):
    for i, (tile, label) in enumerate(samples):
        path = folder / part / PHOTOGRAPHS[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        tile.convert("RGB").save(path)
    print(part, {path.name: len(list(path.iterdir())) for path in sorted((folder / part).iterdir())})


def run(script, *arguments):
    """Prints the command and runs it in the folder of the data; gives what it printed."""
    shown = " ".join(f'"{argument}"' if "'" in argument else argument for argument in (script, *arguments))
    print(
        textwrap.fill(f"python {shown}", 100, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)
    )
    command = [sys.executable, "-W", "ignore", CLONE / script, "--config-path", CLONE / arguments[1], *arguments[2:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return done.stdout


# %% [markdown]
# ## Config and overlay
#
# solo-learn's config for your own data, and what makes it LoGo: `+logo=byol`. The rest says that there is no GPU, no
# W&B, and makes everything small. `"devices='1'"` is a string on purpose: solo-learn multiplies the learning rate by
# its length.

# %%
SMALL = (
    *("data.train_path=train", "data.val_path=val", "data.format=image_folder", "data.num_workers=0"),
    *("accelerator=cpu", "devices='1'", "strategy=auto", "precision=32", "sync_batchnorm=False"),
    *("wandb.enabled=False", "auto_resume.enabled=False", "+enable_progress_bar=False", "+num_sanity_val_steps=0"),
)
PRETRAIN = (
    *("--config-path", "scripts/pretrain/custom", "--config-name", "byol.yaml", "+logo=byol"),
    *("augmentations.0.crop_size=48", "augmentations.1.crop_size=48"),
    *("method_kwargs.proj_hidden_dim=256", "method_kwargs.proj_output_dim=64", "method_kwargs.pred_hidden_dim=256"),
    *("method_kwargs.logo.monitor=true", "optimizer.name=sgd", "optimizer.lr=0.2", "~optimizer.kwargs"),
    *("optimizer.batch_size=16", "max_epochs=4", "+log_every_n_steps=2", *SMALL),
)
composed = run("main_pretrain.py", *PRETRAIN, "--cfg", "job", "--package", "method_kwargs.logo")

# %% [markdown]
# `--cfg job` prints the composed config and trains nothing. Every option of LoGo is there to be changed, for example
# with `method_kwargs.logo.affinity=learned`, the paper's; `null` stands for the default.

# %%
print(composed)

# %% [markdown]
# ## Training

# %%
_ = run("main_pretrain.py", *PRETRAIN)

# %%
(checkpoint,) = folder.glob("trained_models/logo_byol/*/*ep=3.ckpt")
(arguments,) = folder.glob("trained_models/logo_byol/*/args.json")
print(checkpoint.name)
saved = json.loads(arguments.read_text())
print({name: saved[name] for name in ("method", "name")}, saved["method_kwargs"]["logo"])
for crop in saved["augmentations"]:
    print({name: crop[name] for name in ("num_crops", "crop_size", "rrc", "color_jitter", "gaussian_blur")})

# %% [markdown]
# The first two lines are the config's own crops; LoGo has added the third, and lets global crops begin where local end.
# What is repelled, how strongly, and the crops are in the run's name, so that solo-learn's auto-resume does not take
# one run of a sweep for another.
#
# ## Reading the logs
#
# Without W&B, Lightning writes for TensorBoard, or CSV files where that is not installed. solo-learn's own metrics are
# there as ever. LoGo's terms are four of the `train_*`; the monitor's values begin with `logo/`. BYOL's loss is 2 - 2
# cos in solo-learn; `train_affinity` is 0 unless `affinity=learned`.

# %%
logs = EventAccumulator(str(folder / "lightning_logs/version_0"))
logs.Reload()
names = logs.Tags()["scalars"]
print(*names)
groups = {
    "terms": [f"train_{name}" for name in ("global_global", "local_global", "local_local")],
    "cosine of local crops": ["logo/local_local_similarity", "logo/other_image_similarity"],
    "spread": ["logo/embedding_std"],
}
figure, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
for axis, (title, group) in zip(axes, groups.items(), strict=True):
    for name in group:
        events = logs.Scalars(name if name in names else f"{name}_step")
        axis.plot([e.step for e in events], [e.value for e in events], label=name.split("/")[-1])
    axis.set(title=title, xlabel="step")
    axis.legend(fontsize=7)
for axis in axes[1:]:
    axis.set_ylim(0, 1)

# %% [markdown]
# ## Linear probe
#
# solo-learn's `main_linear.py`, on the checkpoint as it is. A run of seconds on a few small tiles: what counts here is
# that it runs, not the figure, which changes from run to run.

# %%
_ = run(
    "main_linear.py",
    *("--config-path", "scripts/linear/imagenet-100", "--config-name", "byol.yaml", "data.dataset=custom"),
    *("max_epochs=2", "optimizer.batch_size=16", "+log_every_n_steps=2", *SMALL),
    f"pretrained_feature_extractor='{checkpoint.relative_to(folder)}'",
)

# %%
logs = EventAccumulator(str(folder / "lightning_logs/version_1"))
logs.Reload()
for name, chance in (("val_acc1", 1), ("val_acc5", 5)):
    print(f"{name} {logs.Scalars(name)[-1].value:.1f} %, chance {100 * chance / len(PHOTOGRAPHS):.0f} %")
