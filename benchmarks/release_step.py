"""Time per training step: LoGo's official release, run by its own loop, against ours.

    git clone https://github.com/ztt1024/LoGo-SSL
    python benchmarks/release_step.py --release LoGo-SSL                                   # CIFAR sizes
    python benchmarks/release_step.py --release LoGo-SSL --size 224 96 --batch-size 8

Both get the same crops (2 global, 2 local, random pixels), copies of one ResNet-18 (the release's, with its CIFAR stem
up to 64 px) and projector (512-512-128), an affinity of hidden width 256, a queue of 4096 keys, SGD with momentum and
weight decay, float32; both compute 2 global-global and 4 local-global InfoNCE pairs, the repulsion and the logistic
affinity loss.

Release: one batch of `trainers.train_moco`, from the moment its loader hands the batch over until it asks for the next:
6 online forwards and backwards (each local crop twice), 4 key forwards (local crops too, for keys that no pair uses),
3 optimizer steps, 2 gradient clippings, 2 momentum updates, batch shuffle, its meters. Ours: zero_grad, training_step,
backward and optimizer step of examples/lightly_models.MoCo in both directions, through `wrap`: 4 online forwards and
backwards, 2 key forwards, 1 optimizer step, 1 momentum update; once with a fixed lambda, once with the cap of the
release, `gradient_ratio=0.015`. Ours has no batch shuffle (nor has lightly's example) and no meters, and its second
direction finds the first one's keys in the queue, as lightly's memory bank has it.

As published the release does not start. Patched from outside, nothing copied:
- its files lie in the root but import each other as `logo.*`: an empty package `logo` points to the clone;
- `Encoder_Base` takes 3 arguments and is given 4: the fourth, which nothing reads, is dropped;
- pandas (a CSV after the last step) and `kornia_transform` (augmentation, which the loop skips when `gpu` is None) are
  stand-ins for what is not timed;
- its gathers run in a group of one process, and `model.module` is the model itself: no DistributedDataParallel, which
  spares the release time;
- on a CPU `Tensor.cuda` returns the tensor: the loop calls it on seven small tensors a step.

The arms take turns in one process, every other round backwards; CPU seconds on a CPU, seconds on the clock on CUDA.
"""

import argparse
import contextlib
import copy
import importlib
import json
import platform
import statistics
import sys
import time
import types
from pathlib import Path
from unittest import mock

import torch
from lightly.loss import NTXentLoss
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lightly_models

from logo_plugin import Affinity, wrap

DIM, QUEUE, TEMPERATURE, CAP = 128, 4096, 0.07, 0.015  # the release's defaults
MOMENTUM = 0.99  # lightly_models.MoCo's
RELEASE, OURS, CAPPED = "release", "ours", "ours, gradient ratio"


class MoCo(lightly_models.MoCo):
    """In both directions, on copies of the release's encoder."""

    def __init__(self, encoder):
        super().__init__(copy.deepcopy(encoder.f), 512)
        self.projection_head = copy.deepcopy(encoder.fc)
        self.copy_momentum()
        self.criterion = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(QUEUE, DIM))

    def training_step(self, batch, batch_idx):
        self.update()
        x0, x1 = batch[0]
        loss = self.criterion(self.forward(x0), self.forward_momentum(x1))
        return 0.5 * (loss + self.criterion(self.forward(x1), self.forward_momentum(x0)))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


def import_release(root):
    """The release's builder and trainers."""
    package = types.ModuleType("logo")
    package.__path__ = [str(root)]
    sys.modules["logo"] = package
    with mock.patch.dict(sys.modules, {"pandas": mock.MagicMock(), "kornia_transform": mock.MagicMock()}):
        builder, trainers = importlib.import_module("logo.builder"), importlib.import_module("logo.trainers")
    encoder = builder.Encoder_Base
    builder.Encoder_Base = lambda arch, dim, dataset, _: encoder(arch, dim, dataset)
    return builder, trainers


def make_step(encoder, views, device, **wrapping):
    model = wrap(MoCo(encoder), affinity=Affinity(DIM, 256), **wrapping).to(device)
    optimizer = sgd(model)

    def step():
        optimizer.zero_grad()
        model.training_step([views, None], 0).backward()
        optimizer.step()

    return step


def measure(builder, trainers, batch_size, options):
    """Seconds per step of each arm, one list entry a round."""
    device = options.device
    torch.manual_seed(0)
    stem = "cifar10" if options.size[0] <= 64 else "imagenet100"
    model = builder.MoCo_LoGo("resnet18", DIM, QUEUE, MOMENTUM, TEMPERATURE, stem).to(device)
    model.__dict__["module"] = model
    regressor = builder.Regressor_softplus(DIM, 256).to(device)
    views = [torch.randn(batch_size, 3, options.size[i // 2], options.size[i // 2], device=device) for i in range(4)]
    steps = {
        OURS: make_step(model.encoder_q, views, device),
        CAPPED: make_step(model.encoder_q, views, device, gradient_ratio=CAP),
    }
    times = {arm: [] for arm in (RELEASE, *steps)}

    def now():
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() if device == "cuda" else time.process_time()

    class Rounds:
        """The release's loader: while its loop waits for the next batch, our arms have their turn."""

        def __len__(self):
            return options.warmup + options.rounds

        def __iter__(self):
            for i in range(len(self)):
                for arm in list(times)[:: 1 if i % 2 else -1]:
                    start = now()
                    if arm == RELEASE:
                        yield list(views), None
                    else:
                        steps[arm]()
                    taken = now() - start
                    if i >= options.warmup:
                        times[arm].append(taken)

    settings = {"gpu": None, "mc": True, "logo": True, "fea_dim": DIM, "moco_t": TEMPERATURE, "store_path": ""}
    args = argparse.Namespace(**settings, print_freq=len(Rounds()) + 1)
    optimizers = [sgd(model), sgd(model), sgd(regressor)]
    on_cpu = mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor)
    with contextlib.redirect_stdout(None), on_cpu if device == "cpu" else contextlib.nullcontext():
        trainers.train_moco(Rounds(), [model, regressor], nn.CrossEntropyLoss(), optimizers, 0, args, CAP)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, required=True, help="a clone of github.com/ztt1024/LoGo-SSL")
    parser.add_argument("--size", type=int, nargs=2, default=[32, 32], help="of global and local crops, pixels")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True  # as the release sets it
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo",
        store=torch.distributed.HashStore(),
        rank=0,
        world_size=1,
    )
    name = (
        torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads {platform.machine()}"
    )
    release = import_release(options.release)
    sizes = f"2 x {options.size[0]} + 2 x {options.size[1]} px"
    print(f"{name}, torch {torch.__version__}, {options.rounds} rounds, {sizes}\n")
    print("| batch | release, s | ours, s | release / ours (range) | release / ours with gradient ratio (range) |")
    print("|---|---|---|---|---|")
    results = []
    for batch_size in options.batch_size:
        times = measure(*release, batch_size, options)
        cells = [f"{statistics.median(times[arm]):.2f}" for arm in (RELEASE, OURS)]
        for arm in (OURS, CAPPED):
            ratios = [theirs / own for theirs, own in zip(times[RELEASE], times[arm], strict=True)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        print(f"| {batch_size} | " + " | ".join(cells) + " |", flush=True)
        setting = {k: v for k, v in vars(options).items() if k not in ("json", "release")}
        setting |= {"batch_size": batch_size, "torch": torch.__version__}
        results.append({"device": name, "seconds": times, "setting": setting})
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
