"""A timm network, a few seconds of LoGo on photographs, and the same network saved."""

import argparse

import timm
import torch
from PIL import Image
from skimage import data
from torch.utils.data import DataLoader

from logo_plugin import LoGoLearner, MultiCropCollate


def tiles(size=96):
    """Neighbouring squares of four photographs, as (PIL image, index of the photograph)."""
    for label, photograph in enumerate((data.astronaut(), data.chelsea(), data.coffee(), data.rocket())):
        height, width = photograph.shape[:2]
        for top in range(0, height - size + 1, size):
            for left in range(0, width - size + 1, size):
                yield Image.fromarray(photograph[top : top + size, left : left + size]), label


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=5)
options = parser.parse_args()

net = timm.create_model("resnet10t", num_classes=0)
learner = LoGoLearner(net, method="byol", image_size=(64, 32), hidden_dim=512, predictor_dim=512, momentum=0.99)
optimizer = torch.optim.SGD(learner.parameters(), lr=0.05, momentum=0.9)
collate = MultiCropCollate(global_size=64, local_size=32)
loader = DataLoader(list(tiles()), batch_size=32, shuffle=True, drop_last=True, collate_fn=collate)
for epoch in range(options.epochs):
    for step, (views, _) in enumerate(loader, start=epoch * len(loader)):
        learner.criterion.anneal(step / (options.epochs * len(loader)))  # the repulsion fades over the training
        optimizer.zero_grad()
        learner(views).backward()
        optimizer.step()
    print(f"epoch {epoch}:", ", ".join(f"{name} {value:.3f}" for name, value in learner.terms._asdict().items()))

torch.save(net.state_dict(), "backbone.pt")  # the network that went in, trained; the heads stay behind
