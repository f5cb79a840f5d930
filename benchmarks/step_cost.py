"""Seconds per training step of lightly's BYOL, MoCo and SimSiam: as they are, with multi-crop, with LoGo.

The arms take turns, round by round, in one process, so that a machine whose speed drifts does so for
all of them; the ratios are medians over rounds. On a CPU a step is timed in seconds of CPU time on one
thread, which other programs disturb least; on CUDA in seconds on the clock. A step is zero_grad,
training_step, backward and the optimizer's step on random pixels: no data loading, no Trainer.

    python benchmarks/step_cost.py                       # ImageNet sizes, CPU, and CUDA where there is one
    python benchmarks/step_cost.py --global-size 32 --local-size 32 --batch-size 64   # CIFAR sizes
"""

import argparse
import json
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lightly_models

from logo_plugin import LoGoLoss, wrap

ARMS = {
    "2 crops": None,
    "multi-crop": {"affinity": None},
    "LoGo": {},
    "learned affinity": {"affinity": "learned"},
    "LoGo, local crops in one batch": {"concat_local_crops": True},
}


def make_step(method, backbone, arm, options, device):
    torch.manual_seed(0)
    model = lightly_models.create(method, backbone, options.global_size, options.local_size).to(device)
    wrapping = ARMS[arm]
    if wrapping is not None:
        model = wrap(model, **wrapping)
        model.logo.anneal(0.3)
    if device == "cuda":
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    sizes = [options.global_size] * 2 + ([options.local_size] * 2 if wrapping is not None else [])
    views = [torch.randn(options.batch_size, 3, size, size, device=device) for size in sizes]

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = model.training_step([views, None], 0)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def seconds(step, clock):
    start = clock()
    step()
    return clock() - start


def measure(method, backbone, options, device):
    """Seconds per step of each arm, one list entry a round."""
    steps = {arm: make_step(method, backbone, arm, options, device) for arm in ARMS}
    for _ in range(options.warmup):
        for step in steps.values():
            step()
    times = {arm: [] for arm in ARMS}
    for i in range(options.rounds):
        # Every other round backwards, so that no arm always follows the same one.
        for arm in list(ARMS)[:: 1 if i % 2 else -1]:
            times[arm].append(seconds(steps[arm], time.perf_counter if device == "cuda" else time.process_time))
    return times


def own_cost(images, features, rounds):
    """Seconds that the repulsion adds to the objective, forward and backward, on the CPU."""
    pred = [torch.randn(images, features, requires_grad=True) for _ in range(4)]
    target = [torch.randn(images, features) for _ in range(2)]
    objectives = [LoGoLoss(), LoGoLoss(affinity="cosine")]
    objectives[1].anneal(0.3)
    times = [[], []]

    def step(criterion):
        criterion(global_pred=pred[:2], local_pred=pred[2:], global_target=target).total.backward()

    for _ in range(rounds):
        for taken, criterion in zip(times, objectives, strict=True):
            taken.append(seconds(partial(step, criterion), time.process_time))
    return statistics.median(logo - plain for plain, logo in zip(*times, strict=True))


def ratio(times, arm, base):
    return statistics.median(a / b for a, b in zip(times[arm], times[base], strict=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(lightly_models.METHODS))
    parser.add_argument("--backbones", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--global-size", type=int, default=224)
    parser.add_argument("--local-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, help="default: 8 on a CPU, 256 on CUDA")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--devices", nargs="+", default=["cpu"] + ["cuda"] * torch.cuda.is_available())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"LoGo's own terms for 64 images of 128 features: {1000 * own_cost(64, 128, 200):.1f} ms of CPU time")
    results = []
    batch_size = options.batch_size
    for device in options.devices:
        options.batch_size = batch_size or (256 if device == "cuda" else 8)
        name = (
            torch.cuda.get_device_name()
            if device == "cuda"
            else f"{torch.get_num_threads()} threads {platform.machine()}"
        )
        print(f"\n{device} ({name}), torch {torch.__version__}, {options.rounds} rounds, batch {options.batch_size},")
        print(
            f"2 x {options.global_size} px + 2 x {options.local_size} px, {'bf16' if device == 'cuda' else 'float32'}\n"
        )
        print(
            "| method | backbone | 2 crops, s | multi-crop / 2 crops | LoGo / multi-crop "
            "| learned affinity | one batch |"
        )
        print("|---|---|---|---|---|---|---|")
        for backbone in options.backbones:
            for method in options.methods:
                times = measure(method, backbone, options, device)
                cells = [f"{statistics.median(times['2 crops']):.4f}", f"{ratio(times, 'multi-crop', '2 crops'):.2f}"]
                cells += [f"{ratio(times, arm, 'multi-crop'):.3f}" for arm in list(ARMS)[2:]]
                print(f"| {method} | {backbone} | " + " | ".join(cells) + " |", flush=True)
                results.append({"device": name, "method": method, "backbone": backbone, "seconds": times})
                setting = {k: v for k, v in vars(options).items() if k != "json"}
                results[-1]["setting"] = {**setting, "torch": torch.__version__}
                if options.json:
                    options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
