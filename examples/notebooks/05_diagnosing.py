# %% [markdown]
# # Is it learning? Collapse, lambda, overlap
#
# A self-supervised loss can look splendid while nothing is learned. This notebook breaks a run on purpose, turns the
# repulsion up until it shows, and measures how often two local crops are the same crop. The tool is `diagnose`, which
# [`LoGoMonitor`](../../docs/monitor.md) calls during training.
#
# A tiny network, photographs cut into tiles, one seed, a minute of training in all: read the figures as pictures of
# the failure, not as advice on values.

# %%
import sys

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle
from PIL import Image
from skimage import data
from torch import nn
from torch.utils.data import DataLoader

from logo_plugin import LoGoLearner, MultiCropCollate, MultiCropTransform, crop_overlap, diagnose

sys.path.insert(0, "..")
from photographs import photograph_tiles

plt.rcParams["axes.titlesize"] = 10
STEPS = 60
torch.manual_seed(0)
samples, held_out = photograph_tiles(60)
collate = MultiCropCollate(global_size=32, local_size=32)
batches = []  # made once, so that all runs see the same crops
while len(batches) < STEPS:
    batches += [views for views, _ in DataLoader(samples, 32, shuffle=True, drop_last=True, collate_fn=collate)]
test_views = collate(held_out[::2])[0]


def network():
    layers = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))


@torch.no_grad()
def measure(learner):
    """`diagnose` on held-out tiles."""
    learner.eval()
    z = [learner.projector(learner.backbone(view).flatten(1)) for view in test_views[2:]]
    learner.train()
    return diagnose(z)


def train(learner, lr=0.05):
    """Gives the similarity of the global crops at every step and `diagnose` at every sixth."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    found, similarity = [measure(learner)], []
    for step, views in enumerate(batches[:STEPS]):
        learner.criterion.anneal(step / STEPS)
        optimizer.zero_grad()
        learner(views).backward()
        optimizer.step()
        similarity.append(learner.terms.global_global.item())
        if step % 6 == 5:
            found.append(measure(learner))
    return similarity, found


# %% [markdown]
# ## A loss that looks great
#
# SimSiam needs its predictor: without it, mapping every image to one point is the easiest way to make crops agree.
# Three runs: SimSiam; its predictor replaced by the identity; and also the BatchNorm after its projector taken away.

# %%
runs = {}
for name in ("SimSiam", "no predictor", "no predictor, no BatchNorm"):
    torch.manual_seed(0)
    learner = LoGoLearner(
        network(), method="simsiam", image_size=(32, 32), hidden_dim=256, output_dim=64, predictor_dim=32
    )
    if name != "SimSiam":
        learner.predictor = nn.Identity()
    if name.endswith("no BatchNorm"):
        learner.projector[-1] = nn.Identity()
    runs[name] = train(learner)

figure, axes = plt.subplots(1, 4, figsize=(12, 3), layout="constrained")
steps = range(0, STEPS + 1, 6)
for (name, (similarity, found)), colour in zip(runs.items(), ("tab:blue", "tab:orange", "tab:red"), strict=True):
    axes[0].plot(similarity, color=colour, label=name)
    for axis, key in zip(axes[1:3], ("embedding_std", "effective_rank"), strict=True):
        axis.plot(steps, [values[key] for values in found], color=colour)
        axis.set(title=key, xlabel="step", ylim=(0, None))
    axes[3].plot(steps, [values["local_local_similarity"] for values in found], color=colour)
    axes[3].plot(steps, [values["other_image_similarity"] for values in found], color=colour, linestyle=":")
    print(
        f"{name:27} loss {similarity[-1]:.2f}, std {found[-1]['embedding_std']:.2f}, "
        f"rank {found[-1]['effective_rank']:.1f}"
    )
axes[0].set(title="the loss (global_global)", xlabel="step", ylim=(-1.05, 0.4))
axes[0].legend(fontsize=8)
_ = axes[3].set(title="cosine, same image; other image dotted", xlabel="step")

# %% [markdown]
# Judged by the loss the broken runs win. The other numbers tell them apart, and it takes more than one of them. Without
# BatchNorm everything goes to one point: `embedding_std` falls, and other images become as similar as the same image;
# `effective_rank`, which sees directions and not their length, notices nothing. With BatchNorm after the projector the
# std cannot fall; there it is the rank that does. It also falls in the healthy run: no value is right or wrong by
# itself, compare with a run that you trust.

# %% [markdown]
# ## How hard to push
#
# `gradient_ratio` caps the gradient of the repulsion at a fraction of the similarity's gradient, so its values mean
# the same in every run, which those of a fixed `local_weight` don't. The weight never exceeds 1. The default is 0.1,
# for MoCo 0.3; over the run it falls to nothing, as the other values here do. BYOL, the same crops in the same order.

# %%
sweep = {}
for ratio in (0.0, 0.1, 1.0, 3.0):
    torch.manual_seed(0)
    learner = LoGoLearner(
        network(), method="byol", image_size=(32, 32), hidden_dim=256, output_dim=64, predictor_dim=256,
        momentum=0.98, gradient_ratio=ratio,
    )  # fmt: skip
    sweep[ratio] = train(learner)

figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
for i, (ratio, (similarity, found)) in enumerate(sweep.items()):
    colour = plt.cm.plasma(i / 4)
    axes[0].plot(similarity, color=colour, label=f"ratio {ratio:g}")
    axes[1].plot(steps, [values["local_local_similarity"] for values in found], color=colour)
    axes[1].plot(steps, [values["other_image_similarity"] for values in found], color=colour, linestyle=":")
    axes[2].plot(steps, [values["effective_rank"] for values in found], color=colour)
axes[0].set(title="global_global", xlabel="step")
axes[0].legend(fontsize=8)
axes[1].set(title="cosine, same image; other image dotted", xlabel="step")
axes[2].set(title="effective_rank", xlabel="step", ylim=(0, None))
print("ratio  same image  other image   gap   std  rank")
for ratio, (_, found) in sweep.items():
    one, two, std, rank = (
        found[-1][key]
        for key in ("local_local_similarity", "other_image_similarity", "embedding_std", "effective_rank")
    )
    print(f"{ratio:5g}{one:12.2f}{two:13.2f}{one - two:6.2f}{std:6.2f}{rank:6.1f}")

# %% [markdown]
# At 0.1 crops of one image are a little less alike than without repulsion, crops of two images less still: the gap is
# wider. At 1 and 3 the repulsion wins: the gap shrinks, and the global crops agree far less, also at the end, where
# next to nothing is repelled any more. Local crops that differ are not a goal in themselves; the gap is what to watch.
# Which strength gives the best features is not a question for sixty steps: see [Results](../../docs/results.md).
#
# ## How often are the two local crops the same?
#
# Crops that show the same place should not be told to differ. `crop_overlap` gives the intersection over union of
# their boxes, and `weigh_overlap=True` in `wrap`, or `local_overlap=` of `LoGoLoss`, multiplies the repulsion of each
# image by 1 - overlap.

# %%
torch.manual_seed(0)
photograph = Image.fromarray(data.astronaut())
figure, axes = plt.subplots(1, 5, figsize=(12, 2.8), layout="constrained", width_ratios=(1.9, 1, 1, 1, 1))
for scale, colour in (((0.05, 0.2), "tab:green"), ((0.05, 0.4), "tab:blue"), ((0.15, 0.4), "tab:orange")):
    draw = MultiCropTransform(local_scale=scale).draw
    boxes = torch.tensor([[recipe.box for recipe in draw(*photograph.size)[2:]] for _ in range(5000)])
    overlap = crop_overlap(boxes.transpose(0, 1).float())[0]
    axes[0].hist(overlap, torch.linspace(0, 1, 41), histtype="step", linewidth=2, color=colour, label=f"scale {scale}")
    print(
        f"scale {scale}: none {(overlap == 0).float().mean():.0%}, "
        f"above one half {(overlap > 0.5).float().mean():.1%}, "
        f"repulsion left by weighing {(1 - overlap).mean():.0%}"
    )
    if scale == (0.05, 0.4):  # the default
        examples = [(overlap - wanted).abs().argmin() for wanted in (0, 0.25, 0.5, 0.75)]
        shown = [(boxes[i].tolist(), overlap[i]) for i in examples]
axes[0].set(title="overlap of the two local crops", xlabel="intersection over union", ylabel="of 5000", yscale="log")
axes[0].legend(fontsize=8)
for axis, (pair, overlap) in zip(axes[1:], shown, strict=True):
    axis.imshow(photograph)
    for (x0, y0, x1, y1), colour in zip(pair, ("tab:red", "tab:orange"), strict=True):
        axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=3))
    axis.set(title=f"overlap {overlap:.2f}, x {1 - overlap:.2f}")
    axis.set_axis_off()

# %% [markdown]
# At the default scale, (0.05, 0.4), one pair in ten overlaps by more than a half, and weighing takes about a quarter
# of the repulsion away. Smaller local crops overlap less. Whether weighing makes better features is not shown here.
