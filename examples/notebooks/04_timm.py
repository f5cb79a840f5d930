# %% [markdown]
# # timm backbones: a ViT and a ConvNeXt with 96 px crops
#
# LoGo's global crops have 224 px and its local ones 96. A convolutional network takes both. A Vision Transformer has
# one position embedding for each patch of *one* image size, and must be told to interpolate. Here both are built,
# wrapped, trained for a few steps and handed back to timm. Weights are random: nothing is downloaded.

# %%
import copy
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader

from logo_plugin import LoGoLearner, MultiCropCollate, wrap

sys.path.insert(0, "..")
from lightly_models import BYOL  # lightly's example, with the backbone as an argument
from photographs import photograph_tiles

torch.manual_seed(0)
samples, _ = photograph_tiles(12)
collate = MultiCropCollate(blur_p=0)  # 224 and 96 px
views, _ = collate(samples[:6])
print([tuple(view.shape) for view in views])

# %% [markdown]
# ## What takes 96 px and what does not
#
# `LoGoLearner` tries both sizes with one image before anything is trained, and says what to do.

# %%
for name, switches in (
    ("convnext_atto", {}),
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
):
    net = timm.create_model(name, num_classes=0, **switches)
    try:
        LoGoLearner(net, image_size=(224, 96), hidden_dim=64, output_dim=32, predictor_dim=64)
        print(f"{name} {switches}: both sizes, {net.head_hidden_size} features")
    except ValueError as error:
        print(f"{name} {switches}: {error}")

# %% [markdown]
# With `dynamic_img_size=True` the ViT cuts a local crop into 6 x 6 patches where a global one has 14 x 14, and
# resamples the position embedding from the larger grid to the smaller one.

# %%
torch.manual_seed(8)
crops, _ = collate([(Image.fromarray(data.astronaut()), 0)])
figure, axes = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained", width_ratios=(224, 224, 96, 96))
mean, std = (torch.tensor(x).view(3, 1, 1) for x in (collate.mean, collate.std))
for axis, view, kind in zip(axes, crops, ("global", "global", "local", "local"), strict=True):
    size = view.shape[-1]
    axis.imshow((view[0] * std + mean).clamp(0, 1).permute(1, 2, 0))
    for line in range(0, size, 16):
        axis.axhline(line - 0.5, color="white", linewidth=0.5)
        axis.axvline(line - 0.5, color="white", linewidth=0.5)
    axis.set(title=f"{kind}, {size} px\n{(size // 16) ** 2} patches")
    axis.set_axis_off()

# %% [markdown]
# ## A few steps each
#
# `wrap` adds LoGo to lightly's BYOL around the network. `head_hidden_size` is the width of the features
# (`num_features` is another number for some of timm's models). The repulsion falls to nothing over the training; a
# Trainer says how far that is, in this loop `anneal` does.

# %%
networks = {
    "vit_tiny_patch16_224": timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True),
    "convnext_atto": timm.create_model("convnext_atto", num_classes=0),
}
STEPS, models = 4, {}
for name, net in networks.items():
    torch.manual_seed(0)
    model = models[name] = wrap(BYOL(net, net.head_hidden_size))
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    batches = DataLoader(samples, batch_size=6, shuffle=True, drop_last=True, collate_fn=collate)
    print(f"\n{name}, {sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters")
    for step, (views, _) in zip(range(STEPS), batches, strict=False):
        model.logo.anneal(step / STEPS)
        loss = model.training_step([views], step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}:", ", ".join(f"{key} {value:.3f}" for key, value in model.logo_terms._asdict().items()))
    moved = sum(not torch.equal(before[key], value) for key, value in net.state_dict().items())
    print(f"{moved} of {len(before)} tensors of the backbone have changed")

# %% [markdown]
# ## What a local crop costs
#
# Forward and backward of one view of 6 images, in CPU time, the faster of two tries on a machine that was busy. The
# area ratio of the crops, (96 / 224)², is 0.18.

# %%
for name, net in networks.items():
    seconds = {}
    for size, view in ((224, views[0]), (96, views[2])):
        tries = []
        for _ in range(2):
            start = time.process_time()
            net(view).square().mean().backward()
            tries.append(time.process_time() - start)
        seconds[size] = min(tries)
    print(f"{name}: a local view costs {seconds[96] / seconds[224]:.2f} of a global one")

# %% [markdown]
# ## Export
#
# The network that you built was trained in place: heads and momentum copy are around it and stay behind.
# What you save is a plain timm state dict, for a plain timm model, also one built for 224 px only.

# %%
for name, net in networks.items():
    path = Path(tempfile.mkdtemp(), "backbone.pt")
    torch.save(net.state_dict(), path)
    plain = timm.create_model(name, num_classes=0)
    print(name, plain.load_state_dict(torch.load(path)))
    with torch.no_grad():
        same = torch.equal(plain.eval()(views[0]), net.eval()(views[0]))
    print("    same features of 224 px images:", same)
