# %% [markdown]
# # Quickstart: LoGo in ten minutes
#
# You know BYOL, MoCo or SimSiam: two crops of an image, pulled together. LoGo ([Zhang et al., CVPR
# 2022](https://arxiv.org/abs/2203.17205)) adds two small crops and asks a question: if one shows an eye and the other
# a sleeve, why should their features agree? So small crops are pulled to the large ones, and pushed away from each
# other. By default what is repelled is the cosine of their projections, less and less as training goes on. In the paper
# a small network trained alongside, the *affinity*, judges how alike two small crops are (`affinity="learned"`).
#
# ## Install
#
# ```bash
# git clone <this repository> logo-plugin && cd logo-plugin
# python3 -m venv venv && . venv/bin/activate  # or the environment that you train in
# pip install .             # needs torch and torchvision, nothing else
# pip install '.[lightly]'  # with lightly and Lightning; also: solo, stable, timm, examples, all
# python -m logo_plugin     # what is installed, what does not fit, and the command that fixes it
# ```
#
# PyPI's torch for Linux brings CUDA, a download of 2.6 GB. For a machine without a GPU install the small one first:
# `pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu`. Do not `pip install logo-plugin`
# from PyPI: that name belongs to an unrelated package with the same import name.
#
# ## Your line
#
# | you have | the line | then read |
# |---|---|---|
# | a lightly-style model | `model = wrap(model)` | [lightly](../../docs/lightly.md) |
# | a solo-learn clone | `+logo=byol` on the command line | [solo-learn](../../docs/solo-learn.md) |
# | a stable-pretraining module | `module = wrap(module)` | [stable-pretraining](../../docs/stable-pretraining.md) |
# | a network, no framework | `learner = LoGoLearner(net)` | [LoGoLearner](../../docs/learner.md) |
# | your own loop | `LoGoLoss(affinity="cosine")` | [plain PyTorch](../../docs/pytorch.md) |
#
# In all but solo-learn the crops come from the `DataLoader`: `collate_fn=MultiCropCollate()`, and no transform in the
# dataset ([crops](../../docs/crops.md)).
#
# A ResNet takes the 96 px local crops as it is. A ViT or Swin has to be built for them: with timm
# `dynamic_img_size=True` for a ViT, `strict_img_size=False` for a Swin; or use `MultiCropCollate(local_size=224)`.
#
# `make demo` compares two crops, plain multi-crop and LoGo on photographs in a few minutes. The rest of this page takes
# the paper's objective apart, with the affinity. It runs on a CPU, on photographs that come with scikit-image
# (`pip install '.[examples]'`).

# %%
import copy
import sys

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.patches import Rectangle
from PIL import Image
from skimage import data
from torch import nn
from torch.utils.data import DataLoader

from logo_plugin import Affinity, LoGoLearner, LoGoLoss, MultiCropCollate, diagnose

sys.path.insert(0, "..")
from photographs import PHOTOGRAPHS, photograph_tiles

# %% [markdown]
# ## Four crops
#
# `MultiCropCollate` makes the crops of a batch: two global ones of 40 to 100 % of the area, two local ones of 5 to
# 40 %. With `return_boxes=True` it says where they came from.

# %%
photograph = Image.fromarray(data.astronaut())
torch.manual_seed(8)
collate = MultiCropCollate(return_boxes=True, mean=(0, 0, 0), std=(1, 1, 1))
views, boxes = collate([photograph])
names, colours = ("global 1", "global 2", "local 1", "local 2"), ("tab:blue", "tab:cyan", "tab:red", "tab:orange")

layout = [["photograph", 0, 1], ["photograph", 2, 3]]
figure, axes = plt.subplot_mosaic(layout, figsize=(7.5, 3.7), layout="constrained", dpi=80, width_ratios=(2, 1, 1))
axes["photograph"].imshow(photograph)
for i, (name, colour, (x0, y0, x1, y1)) in enumerate(zip(names, colours, boxes.boxes[:, 0].tolist(), strict=True)):
    box = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=3)
    axes["photograph"].add_patch(box)
    axes[i].imshow(views[i][0].permute(1, 2, 0).clamp(0, 1))
    axes[i].set_title(f"{name}, {views[i].shape[-1]} px", color=colour)
for axis in axes.values():
    axis.set_axis_off()

# %% [markdown]
# ## The objective by hand
#
# A tiny network stands for your encoder. `z` is what the projector gives, `p` what the predictor makes of it, and `t`
# the target: here SimSiam's, the projection with the gradient stopped. BYOL and MoCo would take it from a momentum
# encoder. Index 0 and 1 are the global crops, 2 and 3 the local ones.


# %%
def small_network():
    layers = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


torch.manual_seed(0)
train, held_out = photograph_tiles(60)  # squares of 7 photographs; the held-out ones are from another part of each
crops = MultiCropCollate(global_size=48, local_size=32)
views, _ = crops(train[::15])
encoder, predictor, f = nn.Sequential(small_network(), nn.Linear(128, 64)), nn.Linear(64, 64), Affinity(dim=64)
z = [encoder(view) for view in views]
p = [predictor(x) for x in z]
t = [x.detach() for x in z[:2]]
N = len(z[0])


def s(pred, target):  # the host method's own similarity loss: this is SimSiam's and BYOL's
    return -F.cosine_similarity(pred, target, dim=-1).mean()


global_global = (s(p[0], t[1]) + s(p[1], t[0])) / 2
local_global = (s(p[2], t[0]) + s(p[2], t[1]) + s(p[3], t[0]) + s(p[3], t[1])) / 4
local_local = F.softplus(f(z[2], z[3])).mean()  # f gives a logit: high if it takes the two for one image

a, b = z[2].detach(), z[3].detach()  # the affinity learns from the features and does not change them
torch.manual_seed(1)
other = (torch.arange(N) + torch.randint(1, N, ())) % N  # for each image another one
same_image = F.softplus(-f(a, b)).mean() + F.softplus(-f(b, a)).mean()
other_image = F.softplus(f(a, b[other])).mean() + F.softplus(f(b, a[other])).mean()
affinity = (same_image + other_image) / 2

total = (2 * global_global + 4 * local_global) / 6 + 1e-4 * local_local + affinity
by_hand = dict(zip(("total", "global_global", "local_global", "local_local", "affinity"),
                   (total, global_global, local_global, local_local, affinity), strict=True))  # fmt: skip

# %% [markdown]
# `LoGoLoss` is this, and the checks around it. (Its default also adds a little noise to the affinity's same-image
# pairs, as the authors' code does; it is turned off here so that the numbers agree.) `total` is what you call
# `backward` on. The others are the terms, each unweighted, for your log:
#
# | term | what it says |
# |---|---|
# | `global_global` | similarity loss between the global crops of an image |
# | `local_global` | the same from local to global crops |
# | `local_local` | how alike the affinity finds two local crops of an image; LoGo pushes this down |
# | `affinity` | how well the affinity tells pairs from one image from pairs from two; 1.39 (2 ln 2) is guessing |
#
# With `affinity="cosine"` there is no `f`: `local_local` is the mean cosine of `z[2]` and `z[3]`, and `affinity` is 0.
# In place of 1e-4 comes the weight that makes the repulsion's gradient a tenth of the pull's (`gradient_ratio=0.1`),
# times a half cosine that falls from 1 to 0 over the training.

# %%
criterion = LoGoLoss(affinity=f, positive_noise=0.0)
torch.manual_seed(1)
terms = criterion(global_pred=p[:2], local_pred=p[2:], global_target=t, local_proj=z[2:])
for name, value in terms._asdict().items():
    torch.testing.assert_close(value, by_hand[name])
    print(f"{name:14} by hand {by_hand[name].item():8.5f}   LoGoLoss {value.item():8.5f}")

# %% [markdown]
# Who learns from which term? Each row is a term, and each number the norm of its gradient. The repulsion
# (`local_local`) reaches the encoder and not the affinity; the affinity's loss reaches the affinity and nothing else.
# That is how one `backward` and one optimizer serve both.

# %%
receivers = {"global crops": p[:2], "local crops": z[2:], "affinity": list(f.parameters())}
print(f"{'':14}" + "".join(f"{name:>14}" for name in receivers))
for name, term in list(terms._asdict().items())[1:]:
    row = f"{name:14}"
    for tensors in receivers.values():
        gradients = torch.autograd.grad(term, tensors, retain_graph=True, allow_unused=True)
        found = [g.norm() for g in gradients if g is not None]
        row += f"{torch.stack(found).norm().item():14.5f}" if found else f"{'none':>14}"
    print(row)

# %% [markdown]
# ## A short training
#
# `LoGoLearner` puts BYOL with LoGo around a network; the loop is yours. With the default affinity it would also call
# `learner.criterion.anneal(step / steps)` before each step. This takes one minute on one core, so it shows what the
# terms do, not how good the features are.

# %%
torch.manual_seed(0)
net = small_network()
learner = LoGoLearner(
    net, method="byol", image_size=(48, 32), affinity="learned", hidden_dim=256, output_dim=64, predictor_dim=256,
    momentum=0.98,
)  # fmt: skip
untrained = copy.deepcopy(learner)
optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
history = []
for _ in range(8):
    for views, _ in DataLoader(train, batch_size=32, shuffle=True, drop_last=True, collate_fn=crops):
        optimizer.zero_grad()
        learner(views).backward()
        optimizer.step()
        history.append(learner.terms)
print(f"{len(history)} steps")

figure, axes = plt.subplots(1, 4, figsize=(12, 2.6), layout="constrained")
for axis, name in zip(axes, learner.terms._fields[1:], strict=True):
    axis.plot([getattr(step, name) for step in history])
    axis.set(title=name, xlabel="step")

# %% [markdown]
# ## What it did to the crops
#
# Held-out tiles, mean cosine of each pair of crops of one image. Rows are predictions and columns targets, except
# between the local crops, where both are projections (those the affinity compares).


# %%
@torch.no_grad()
def outputs(learner, views):
    learner.eval()
    z = torch.stack([learner.projector(learner.backbone(view)) for view in views])
    t = torch.stack([learner.target(view) for view in views[:2]])
    return z, learner.predictor(z.flatten(0, 1)).view_as(z), t


torch.manual_seed(2)
test_views, _ = crops(held_out)
figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.8), layout="constrained")
for axis, (title, model) in zip(axes, (("untrained", untrained), ("trained", learner)), strict=True):
    z, p, t = outputs(model, test_views)
    table = torch.full((4, 4), torch.nan)
    for i in range(4):
        for j in range(4):
            if i != j and (j < 2 or i >= 2):
                pair = (p[i], t[j]) if j < 2 else (z[i], z[j])
                table[i, j] = F.cosine_similarity(*pair, dim=-1).mean()
                force = "pull" if j < 2 else "push"
                axis.text(j, i, f"{table[i, j]:.2f}\n{force}", ha="center", va="center")
    axis.imshow(table, vmin=-1, vmax=1, cmap="RdBu_r", alpha=0.6)
    axis.set(title=title, xticks=range(4), yticks=range(4), xticklabels=names, yticklabels=names)
    axis.tick_params(length=0, labelsize=8)

# %% [markdown]
# ## What the affinity learned
#
# Its loss, the last curve above, fell. But what can it do? It is given two local crops of one held-out tile, or crops
# of two tiles, and should answer with a logit above 0 for the first and below 0 for the second. Four ways to ask:
# untrained; trained, each pair by itself (BatchNorm in eval mode); trained, with BatchNorm as in training, where the
# same-image pairs are one batch and the other pairs another; and the same with both kinds mixed in one batch.

# %%
PANELS = ("untrained", "trained, pair by pair", "trained, batches apart", "trained, kinds mixed")
figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained", sharey=True)
for axis, title in zip(axes, PANELS, strict=True):
    model = untrained if title == "untrained" else learner
    with torch.no_grad():
        z, _, _ = outputs(model, test_views)
        f, a, b, other_b = copy.deepcopy(model.criterion.affinity), z[2], z[3], z[3].roll(5, 0)
        f.train("apart" in title or "mixed" in title)
        if "mixed" in title:
            same, other = f(torch.cat([a, a]), torch.cat([b, other_b])).chunk(2)
        else:
            same, other = f(a, b), f(a, other_b)
    both = torch.cat([same, other])
    bins = torch.linspace(both.min(), both.max(), 30)
    axis.hist(same, bins, alpha=0.6, label="one image", color="tab:red")
    axis.hist(other, bins, alpha=0.6, label="two images", color="tab:gray")
    right = ((same > 0).float().mean() + (other < 0).float().mean()) / 2
    axis.set_title(f"{title}: {right:.0%}", fontsize=10)
    axis.set_xlabel("logit")
axes[0].legend(fontsize=8)
print({name: round(value, 2) for name, value in diagnose(z[2:], learner.criterion.affinity).items()})

# %% [markdown]
# Pair by pair the affinity is hardly better than chance. Only where the same-image pairs are a batch of their own, as
# in training, do the two kinds come apart: the statistics of the batch then give away which kind it is, and the loss
# can fall without a single pair being judged. Mixed into one batch, it is gone. So a falling affinity loss is no proof
# that the affinity has learned which crops belong together; `affinity_accuracy` of `diagnose` and of
# [LoGoMonitor](../../docs/monitor.md) asks pair by pair, for this reason. This was a hundred steps of a tiny network;
# whether longer runs get further is not shown here.
#
# Pair by pair, three tiles of each photograph: row and column are the first and second local crop of a tile.

# %%
per_photograph = len(held_out) // len(PHOTOGRAPHS)
chosen = [per_photograph * label + i for label in range(7) for i in (0, per_photograph // 2, per_photograph - 1)]
first, second = z[2][chosen], z[3][chosen]
with torch.no_grad():
    n = len(chosen)
    logits = learner.criterion.affinity.eval()(first.repeat_interleave(n, 0), second.repeat(n, 1)).view(n, n)
cosines = F.cosine_similarity(first[:, None], second[None], dim=-1)
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for axis, (title, table) in zip(axes, (("cosine", cosines), ("affinity's logit", logits)), strict=True):
    figure.colorbar(axis.imshow(table, cmap="viridis"), ax=axis, shrink=0.8)
    axis.set(title=title, xticks=[], yticks=range(1, n, 3), xlabel="second local crop of the same tiles")
    axis.set_yticklabels([name[:10] for name in PHOTOGRAPHS], fontsize=8)
    for border in range(3, n, 3):
        axis.axhline(border - 0.5, color="white", linewidth=0.5)
        axis.axvline(border - 0.5, color="white", linewidth=0.5)

# %% [markdown]
# The features, on the left, have blocks: tiles of one photograph are often alike, and some photographs look like
# others. If the affinity judged pairs, its diagonal would stand out. Instead there are columns and rows: the logit
# depends on each crop by itself more than on the two together.
#
# Next: [one line in lightly](02_lightly.ipynb), [one word in solo-learn](03_solo_learn.ipynb), [backbones of
# timm](04_timm.ipynb), and [what to watch during a run](05_diagnosing.ipynb).
