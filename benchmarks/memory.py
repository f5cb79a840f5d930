"""What a step keeps in memory for backward, and what checkpoint_local_crops=True costs for keeping less.

lightly's BYOL around a ResNet, with 2 global crops and L local ones: bytes of all tensors that the graph of one step
keeps (torch.autograd.graph.saved_tensors_hooks, each storage once), and CPU seconds of a step, forward and backward,
in turn. On a GPU also the allocator's peak.

    python benchmarks/memory.py --local-crops 0 2 6 --batch-size 16
"""

import argparse
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lightly_models

from logo_plugin import wrap


def forward(model, batch, half):
    with torch.autocast(batch[0][0].device.type, torch.bfloat16, enabled=half):
        return model.training_step(batch, 0)


def kept_bytes(model, batch, half=False):
    kept = {}

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, batch, half)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del loss
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in parameters)


def seconds(model, batch, half=False):
    synchronize = torch.cuda.synchronize if batch[0][0].is_cuda else lambda: None
    clock = time.perf_counter if batch[0][0].is_cuda else time.process_time
    synchronize()
    start = clock()
    forward(model, batch, half).backward()
    synchronize()
    model.zero_grad()
    return clock() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--sizes", type=int, nargs=2, default=(224, 96))
    parser.add_argument("--local-crops", type=int, nargs="+", default=[0, 2, 6])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    base = None
    setting = f"{options.backbone}, {options.sizes[0]} / {options.sizes[1]} px, batch {options.batch_size}"
    print(f"{setting}, {options.device}{', bfloat16 autocast' if options.bf16 else ''}")
    print("| crops | checkpoint_local_crops | MB kept an image | of 2 + 0 | s a step | allocator's peak, MB |")
    print("|---" * 6 + "|")
    for count in options.local_crops:
        sides = (options.sizes[0],) * 2 + (options.sizes[1],) * count
        views = [torch.randn(options.batch_size, 3, side, side, device=options.device) for side in sides]
        batch = [views, torch.zeros(options.batch_size)]
        arms = [False, True] if count else [None]
        models = []
        for cheap in arms:
            model = lightly_models.create("byol", options.backbone, *options.sizes).to(options.device)
            models.append(model if cheap is None else wrap(model, checkpoint_local_crops=cheap))
            if cheap is not None:
                model.logo.anneal(0.3)
        for model in models:
            seconds(model, batch, options.bf16)  # in its first step LoGo looks at more than it trains
        kept = [kept_bytes(model, batch, options.bf16) - sum(v.nbytes for v in views) for model in models]
        base = base or kept[0]
        times = [[] for _ in models]
        for _ in range(options.rounds + 1):
            for model, found in zip(models, times, strict=True):
                found.append(seconds(model, batch, options.bf16))
        for cheap, model, size, found in zip(arms, models, kept, times, strict=True):
            peak = ""
            if options.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
                seconds(model, batch, options.bf16)
                peak = f"{torch.cuda.max_memory_allocated() / 1e6:.0f}"
            on = "" if cheap is None else "on" if cheap else "off"
            each = size / options.batch_size / 1e6
            row = f"| 2 + {count} | {on} | {each:.1f} | {size / base:.2f} | {statistics.median(found[1:]):.2f}"
            print(f"{row} | {peak} |")


if __name__ == "__main__":
    main()
