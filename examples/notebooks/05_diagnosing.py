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
from torch import nn
from torch.utils.data import DataLoader

from logo_plugin import LoGoLearner, LoGoLoss, MultiCropCollate, crop_overlap, diagnose

sys.path.insert(0, "..")
from photographs import photograph_tiles

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
    return diagnose(z, learner.criterion.affinity)


def train(learner, lr=0.05):
    """Gives the similarity of the global crops at every step and `diagnose` at every sixth."""
    optimizer = torch.optim.SGD(learner.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    found, similarity = [measure(learner)], []
    for step, views in enumerate(batches[:STEPS], start=1):
        optimizer.zero_grad()
        learner(views).backward()
        optimizer.step()
        similarity.append(learner.terms.global_global.item())
        if step % 6 == 0:
            found.append(measure(learner))
    return similarity, found


# %% [markdown]
# ## A loss that looks great
#
# SimSiam needs its predictor: without it, projecting every image to one point is the easiest way to make crops agree.
# The same run twice, once with the predictor replaced by the identity.

# %%
runs = {}
for name in ("SimSiam", "without predictor"):
    torch.manual_seed(0)
    learner = LoGoLearner(
        network(), method="simsiam", image_size=(32, 32), hidden_dim=256, output_dim=64, predictor_dim=32
    )
    if name == "without predictor":
        learner.predictor = nn.Identity()
    runs[name] = train(learner)

figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
for (name, (similarity, found)), colour in zip(runs.items(), ("tab:blue", "tab:red"), strict=True):
    axes[0].plot(similarity, color=colour, label=name)
    steps = range(0, STEPS + 1, 6)
    for axis, key in zip(axes[1:3], ("embedding_std", "effective_rank"), strict=True):
        axis.plot(steps, [values[key] for values in found], color=colour)
        axis.set(title=key, xlabel="step", ylim=(0, None))
    axes[3].plot(steps, [values["local_local_similarity"] for values in found], color=colour)
    axes[3].plot(steps, [values["other_image_similarity"] for values in found], color=colour, linestyle=":")
axes[0].set(title="global_global, the loss", xlabel="step")
axes[0].legend(fontsize=8)
axes[3].set(title="cosine: one image, two images (dotted)", xlabel="step")
for name, (similarity, found) in runs.items():
    values = ", ".join(f"{key} {found[-1][key]:.2f}" for key in ("embedding_std", "effective_rank"))
    print(f"{name:18} loss {similarity[-1]:.2f}, {values}")

# %% [markdown]
# ## How hard to push
#
# `gradient_ratio` caps the gradient of the repulsion at a fraction of the similarity's gradient, so its values mean
# the same in every run, which those of a fixed `local_weight` don't. The weight never exceeds 1. BYOL, the same crops
# in the same order.

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
axes[1].set(title="cosine of local crops: one image, two images (dotted)", xlabel="step")
axes[2].set(title="effective_rank", xlabel="step", ylim=(0, None))
print("ratio  one image  two images   gap   std  rank")
for ratio, (_, found) in sweep.items():
    one, two, std, rank = (
        found[-1][key]
        for key in ("local_local_similarity", "other_image_similarity", "embedding_std", "effective_rank")
    )
    print(f"{ratio:5g}{one:11.2f}{two:12.2f}{one - two:6.2f}{std:6.2f}{rank:6.1f}")

# %% [markdown]
# ## How often are the two local crops the same?
#
# Two crops that show the same place should not be told to differ. `crop_overlap` gives the intersection over union of
# the boxes.

# %%
torch.manual_seed(0)
figure, axes = plt.subplots(1, 2, figsize=(11, 3), layout="constrained")
for scale, colour in (((0.05, 0.2), "tab:green"), ((0.05, 0.4), "tab:blue"), ((0.15, 0.4), "tab:orange")):
    draw = MultiCropCollate(global_size=16, local_size=16, local_scale=scale, return_boxes=True, jitter_p=0, blur_p=0)
    overlap = torch.cat([crop_overlap(draw(samples)[-1].boxes[2:])[0] for _ in range(4)])
    axes[0].hist(overlap, torch.linspace(0, 1, 41), histtype="step", linewidth=2, color=colour, label=f"scale {scale}")
    print(f"scale {scale}: none {(overlap == 0).float().mean():.0%}, mean {overlap.mean():.2f}, "
          f"above one half {(overlap > 0.5).float().mean():.1%}")  # fmt: skip
axes[0].set(title="overlap of two local crops", xlabel="intersection over union", ylabel="images", yscale="log")
axes[0].legend(fontsize=8)

# With overlaps given, the repulsion of each image is multiplied by 1 - overlap: what is left of its gradient?
draw = MultiCropCollate(global_size=32, local_size=32, return_boxes=True)
views, _, boxes = draw(samples[:256])
overlap = crop_overlap(boxes.boxes[2:])
learner.eval()  # BatchNorm would mix the images' gradients
criterion = LoGoLoss(affinity=learner.criterion.affinity)
with torch.no_grad():
    z, t = (
        torch.stack([learner.projector(learner.backbone(v).flatten(1)) for v in part])
        for part in (views[2:], views[:2])
    )
z.requires_grad_()
norms = []
for weighing in (None, overlap):
    terms = criterion(global_pred=t, global_target=t, local_pred=z, local_proj=z, local_overlap=weighing)
    norms.append(torch.autograd.grad(terms.local_local, z)[0].norm(dim=-1).mean(0))
axes[1].scatter(overlap[0], norms[1] / norms[0], s=8)
axes[1].set(
    title="repulsion that is left with overlap weighing", xlabel="overlap of the image's local crops", ylim=(0, 1.05)
)
print(f"of all repulsion {(norms[1].sum() / norms[0].sum()):.0%} is left at the default scale (0.05, 0.4)")
