"""Cost of a training step: logo_byol against solo-learn's own multi-crop BYOL, same crops, alternating.

SOLO_LEARN_ROOT=<clone> python benchmarks/solo_step.py [--batch 8] [--sizes 224 96] [--pairs 12] [--device cpu]

Forward, backward and optimizer step of both methods on random images; no data loading, no Lightning
trainer, no logging.
Prints the median seconds of each (CPU time on the CPU, so that a shared machine disturbs less) and
their ratio.
"""

import argparse
import os
import statistics
import sys
import time
import warnings

import torch


def build(method: str, size: int):
    from omegaconf import OmegaConf
    from solo.methods import METHODS

    cfg = OmegaConf.create(
        {
            "method": method,
            "backbone": {"name": "resnet18"},
            "data": {"dataset": "imagenet100", "num_classes": 100, "num_large_crops": 2, "num_small_crops": 2},
            "augmentations": [{"crop_size": size}],
            "max_epochs": 1,
            "momentum": {"base_tau": 0.99, "final_tau": 1.0},
            "optimizer": {"name": "sgd", "batch_size": 1, "lr": 0.01, "classifier_lr": 0.1, "weight_decay": 1e-4},
            "scheduler": {"name": "none"},
            # scripts/pretrain/imagenet-100-multicrop/byol.yaml
            "method_kwargs": {
                "proj_hidden_dim": 4096,
                "proj_output_dim": 256,
                "pred_hidden_dim": 8192,
            },
        }
    )
    torch.manual_seed(0)
    model = METHODS[method](cfg)
    model.log_dict = lambda *args, **kwargs: None
    if hasattr(model, "logo"):
        model.logo.anneal(0.3)  # as a Trainer would
    return model.to(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--sizes", type=int, nargs=2, default=(224, 96))
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    sys.path.insert(0, os.environ["SOLO_LEARN_ROOT"])
    warnings.simplefilter("ignore")
    import logo_plugin.adapters.solo  # noqa: F401

    big, small = arguments.sizes
    device, batch = arguments.device, arguments.batch
    crops = [torch.randn(batch, 3, size, size, device=device) for size in (big, big, small, small)]
    data = [torch.arange(batch), crops, torch.arange(batch, device=device) % 100]
    models = {method: build(method, big).to(device) for method in ("byol", "logo_byol")}
    optimizers = {method: model.configure_optimizers() for method, model in models.items()}
    clock = time.process_time if device == "cpu" else time.perf_counter

    def step(method: str) -> float:
        start = clock()
        optimizers[method].zero_grad()
        models[method].training_step(data, 0).backward()
        optimizers[method].step()
        if device != "cpu":
            torch.cuda.synchronize()
        return clock() - start

    seconds: dict[str, list[float]] = {method: [] for method in models}
    for i in range(arguments.pairs + 2):
        for method in models if i % 2 else reversed(models):  # neither is always the first of a pair
            taken = step(method)
            if i >= 2:
                seconds[method].append(taken)
    ratios = [logo / stock for logo, stock in zip(seconds["logo_byol"], seconds["byol"], strict=True)]
    medians = {method: statistics.median(taken) for method, taken in seconds.items()}
    for method, taken in seconds.items():
        spread = f"({min(taken):.4f} to {max(taken):.4f})"
        print(f"{method:10} {medians[method]:.4f} s a step, {1 / medians[method]:.3f} steps/s {spread}")
    print(
        f"logo_byol / byol: ratio of medians {medians['logo_byol'] / medians['byol']:.4f}, "
        f"median of {len(ratios)} neighbouring pairs {statistics.median(ratios):.4f}"
    )
    print(f"batch {batch}, crops {big}/{small}, {device}, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
