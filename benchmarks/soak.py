"""What a long run must not do: grow, leave hooks behind, or stop at one bad file.

    python benchmarks/soak.py                # 2,000 steps each, 10,000 images
    python benchmarks/soak.py --steps 200000 --only wrapped

Each part trains for `--steps` steps, every tenth of which fails half-way, as a run does that goes on after an error.
A part fails when memory or the number of live tensors or context variables still grows in the second half, or hooks
remain. `make soak` runs this and ten times the examples of tests/test_properties.py; exit status 1 if anything failed.
"""

import argparse
import contextvars
import copy
import gc
import io
import resource
import sys
import time
import warnings

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from logo_plugin import Affinity, LoGoLearner, LoGoLoss, MultiCropCollate, diagnose, info_nce, wrap

MIB = 2**20
ALLOWED = 4 * MIB  # in the second half: what the allocator does by itself


def network():
    return nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def hooks(module):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(child, kind)) for child in module.modules() for kind in kinds)


def patched(module):
    """Methods that somebody put on an instance."""
    return sum("forward" in vars(child) for child in module.modules())


def watch(name, module, step, steps):
    """Runs a part; gives whether it held."""
    before = hooks(module), patched(module)
    marks, failures = [], 0
    start = time.process_time()
    for i in range(steps):
        try:
            step(fail=i % 10 == 9)
        except (RuntimeError, ValueError):
            failures += 1
        if i in (steps // 2, steps - 1):
            gc.collect()
            tensors = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
            # Memory last: the list of all objects is memory, too.
            marks.append((tensors, len(contextvars.copy_context()), resident()))
    more, set_more, grown = (last - middle for middle, last in zip(*marks, strict=True))
    left = hooks(module) - before[0] + patched(module) - before[1]
    good = grown < ALLOWED and more <= 0 and set_more <= 0 and not left and failures == steps // 10
    cost = (time.process_time() - start) / steps * 1e3
    print(
        f"{name:24}{steps:9} steps, {failures} failed, {cost:.1f} ms each; second half: memory {grown / MIB:+.2f} MiB, "
        f"tensors {more:+}, context variables {set_more:+}; hooks left {left}: {'ok' if good else 'FAILED'}",
        flush=True,
    )
    return good


def loss_part(similarity, **options):
    criterion = LoGoLoss(affinity=Affinity(16, 32), similarity=similarity, **options)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.01)
    encoder = nn.Linear(16, 16)

    def step(fail):
        x = torch.randn(4, 12, 16)
        z = encoder(x)
        local = z[2:, :1] if fail else z[2:]  # one image only, after global_global was computed
        terms = criterion(global_pred=z[:2], global_target=z[:2].detach().flip(0), local_pred=local)
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        diagnose(z[2:].detach(), criterion.affinity)

    return criterion, step


def learner_part(method, **options):
    learner = LoGoLearner(network(), method, image_size=(32, 24), hidden_dim=32, output_dim=16, **options)
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.01)

    def step(fail):
        learner.criterion.anneal(0.5)
        sides = (32, 32, 24) if fail else (32, 32, 24, 24)  # too few local crops
        loss = learner([torch.randn(6, 3, side, side) for side in sides])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return learner, step


class BYOL(nn.Module):
    """A model as lightly's plain examples have it."""

    def __init__(self):
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

        super().__init__()
        self.backbone = network()
        self.projection_head = BYOLProjectionHead(16, 32, 16)
        self.prediction_head = BYOLPredictionHead(16, 32, 16)
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.projection_head_momentum = copy.deepcopy(self.projection_head).requires_grad_(False)
        self.criterion = NegativeCosineSimilarity()

    def forward(self, x):
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def forward_momentum(self, x):
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()


def wrapped_part(affinity):
    model = wrap(BYOL(), affinity=affinity)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(fail):
        views = [torch.randn(6, 3, side, side) for side in (32, 32, 24, 24)]
        model.logo.anneal(0.5)
        if fail:
            views[3] = views[3][:, :1]  # the last local crop has one channel
        loss = model(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return model, step


class Files(Dataset):
    """Encoded photographs of scikit-image in turns, of which one is damaged."""

    def __init__(self, count):
        from PIL import Image
        from skimage import data

        self.files, self.count = [], count
        for pixels in (data.astronaut(), data.chelsea(), data.coffee()):
            file = io.BytesIO()
            Image.fromarray(pixels).resize((96, 72)).save(file, "JPEG")
            self.files.append(file.getvalue())

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return (b"damaged" if i == self.count // 2 else self.files[i % 3]), i, f"{i}.jpg"


def loader_part(images, **options):
    loader = DataLoader(Files(images), batch_size=100, collate_fn=MultiCropCollate.cifar10(on_error="skip"), **options)
    for _ in range(2):
        seen, finite = set(), True
        for views, targets, _ in loader:
            seen.update(targets.tolist())
            finite &= all(view.isfinite().all() for view in views)
        missing = set(range(images)) - seen
        good = finite and missing == {images // 2}
        print(
            f"{'one bad file':24}{images:9} images, {options}: left out {sorted(missing)}  {'ok' if good else 'FAILED'}"
        )
        if not good:
            return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--only", default="", help="parts whose name has this in it: loss, learner, wrapped, bad file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, python {sys.version.split()[0]}")
    parts = {
        "loss, cosine": lambda: loss_part("cosine"),
        "loss, InfoNCE, ratio": lambda: loss_part(info_nce, gradient_ratio=0.1),
        "learner byol": lambda: learner_part("byol", affinity="learned"),
        "learner byol, cosine": lambda: learner_part("byol"),
        "learner simsiam": lambda: learner_part("simsiam", affinity="learned"),
        "learner moco": lambda: learner_part("moco", affinity="learned", queue_size=64),
        "wrapped BYOL of lightly": lambda: wrapped_part("learned"),
        "wrapped BYOL, cosine": lambda: wrapped_part("cosine"),
    }
    good = [watch(name, *make(), arguments.steps) for name, make in parts.items() if arguments.only in name]
    for options in (
        {"num_workers": 0},
        {"num_workers": 2, "persistent_workers": True},
        {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "spawn"},
    ):
        if arguments.only in "one bad file":
            good.append(loader_part(arguments.images, **options))
    if not good:
        parser.error(f"no part's name has {arguments.only!r} in it; there are {', '.join(parts)}, one bad file")
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
