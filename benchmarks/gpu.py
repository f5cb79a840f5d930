"""One command for a GPU that nobody has had yet: what holds on it, and what a step costs there, in one JSON.

    python benchmarks/gpu.py --json gpu.json                 # at most 9 minutes on one H100 or H200
    python benchmarks/gpu.py --device cpu --tiny             # rehearses all of it, under a minute of CPU

Sections run one after the other, each with a time limit of its own; the file is written after every result, so that
neither a failure nor the end of the time loses what is there. A section is "ok", "failed" (with the error, or the
checks that failed), "late" (its time ended; what it had stays) or "skipped" (with the reason). --only takes names.

Needs torch and torchvision; sections that need lightly, timm or pytorch_lightning are skipped where these are
missing, kornia is compared with if it is there. To train on the GPU: benchmarks/accuracy.py, which resumes.
"""

import argparse
import faulthandler
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
import traceback
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

# Before CUDA starts: matrix products that repeat, which the contract's exact comparisons need.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples"), str(ROOT / "tests")]

from logo_plugin import Affinity, LoGoLoss, MultiCropCollate  # noqa: E402

OPTIONAL = ("lightly", "timm", "pytorch_lightning", "kornia", "skimage", "sklearn")
ARMS = ("2 crops", "multi-crop", "LoGo")


class LateError(BaseException):
    """A section's time is over; no Exception, which what runs there might catch."""


def environment(run):
    """Versions, the device, and its two ceilings: a large copy and a large matrix product."""
    yield "python", platform.python_version()
    yield "machine", f"{platform.machine()}, {os.cpu_count()} CPUs"
    names = ("torch", "torchvision", "lightly", "timm", "pytorch-lightning", "kornia", "triton", "logo-plugin")
    yield "versions", {name: _version(name) for name in names}
    if run.cuda:
        properties = torch.cuda.get_device_properties(0)
        yield "device", properties.name
        yield "capability", f"{properties.major}.{properties.minor}"
        yield "multiprocessors", properties.multi_processor_count
        yield "memory_bytes", properties.total_memory
        yield "cuda", torch.version.cuda
        yield "cudnn", torch.backends.cudnn.version()
        yield "nccl", ".".join(map(str, torch.cuda.nccl.version()))
    else:
        yield "device", f"{torch.get_num_threads()} thread of {platform.processor() or platform.machine()}"
    count = run.pick(2**30, 2**22)
    source = torch.randint(256, (count,), dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    yield "copy_bytes_per_s", 2 * count / statistics.median(run.seconds(lambda: target.copy_(source), 10))
    side = run.pick(8192, 128)
    a = torch.randn(side, side, device=run.device, dtype=torch.bfloat16)
    b = torch.randn(side, side, device=run.device, dtype=torch.bfloat16)
    yield "bf16_matmul_flops", 2 * side**3 / statistics.median(run.seconds(lambda: a @ b, 10))


def objective(run):
    """The loss alone, forward and backward: seconds, ATen operators, kernels, with and without the repulsion."""
    import operators

    operators_of = {"multi-crop": operators.count().total()}
    operators_of["LoGo"] = operators.count(affinity="cosine").total()
    operators_of["learned affinity"] = operators.count(affinity=Affinity(operators.FEATURES)).total()
    yield "operators", operators_of
    shapes = [(256, 128, 2), (4096, 256, 2), (256, 2048, 2), (256, 256, 6), (256, 8192, 6)]
    for images, features, local_crops in run.pick(shapes, [(8, 16, 2)]):
        steps = {
            "multi-crop": _objective_step(run, images, features, local_crops, None),
            "LoGo": _objective_step(run, images, features, local_crops, "cosine"),
            "learned affinity": _objective_step(run, images, features, local_crops, Affinity(features)),
        }
        times = run.in_turn(steps)
        found = {"seconds": {arm: statistics.median(taken) for arm, taken in times.items()}}
        found["own_seconds"] = _median_difference(times)
        found["kernels"] = {arm: run.kernels(step) for arm, step in steps.items()}
        yield f"N {images}, D {features}, L {local_crops}", found


def step_time(run, backbone, sizes, batch_size, budget_of_rounds):
    """Seconds a step of lightly's methods: 2 crops, plain multi-crop, LoGo in turn; LoGo's own share."""
    import lightly_models
    import step_cost

    options = Namespace(global_size=sizes[0], local_size=sizes[1], batch_size=batch_size)
    if run.cuda:
        options.batch_size = _fitting_batch(run, step_cost, backbone, options)
    yield "setting", {**vars(options), "backbone": backbone, "precision": "bf16" if run.cuda else "float32"}
    for method in run.pick(list(lightly_models.METHODS), ["byol"]):
        steps = {arm: step_cost.make_step(method, backbone, arm, options, run.device) for arm in ARMS}
        times = run.in_turn(steps, budget_of_rounds)
        seconds = {arm: statistics.median(taken) for arm, taken in times.items()}
        found = {"seconds": seconds, "images_per_s": {arm: options.batch_size / s for arm, s in seconds.items()}}
        found["multi-crop / 2 crops"] = step_cost.ratio(times, "multi-crop", "2 crops")
        found["LoGo / multi-crop"] = step_cost.ratio(times, "LoGo", "multi-crop")
        found["own_seconds"] = _median_difference(times)
        found["kernels"] = {arm: run.kernels(step) for arm, step in steps.items()}
        found["all_seconds"] = times
        del steps
        yield method, found


def memory(run, backbone, sizes, batch_size):
    """Bytes that a step of BYOL keeps for backward, and the allocator's peak, with and without recomputing."""
    import lightly_models
    import memory as measured

    from logo_plugin import wrap

    yield "setting", {"backbone": backbone, "sizes": sizes, "batch_size": batch_size, "precision": "float32"}
    for count in (0, 2, 6):
        shapes = [(batch_size, 3, side, side) for side in (sizes[0],) * 2 + (sizes[1],) * count]
        batch = [[torch.randn(shape, device=run.device) for shape in shapes], torch.zeros(batch_size)]
        for cheap in (False, True) if count else (None,):
            model = lightly_models.create("byol", backbone, *sizes).to(run.device)
            if cheap is not None:
                wrap(model, checkpoint_local_crops=cheap).logo.anneal(0.3)
            measured.seconds(model, batch)
            found = {"kept_bytes": measured.kept_bytes(model, batch)}
            if run.cuda:
                torch.cuda.empty_cache()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            found["seconds"] = statistics.median(measured.seconds(model, batch) for _ in range(run.pick(5, 1)))
            if run.cuda:
                found["peak_bytes"] = torch.cuda.max_memory_allocated()
                found["peak_over_start_bytes"] = torch.cuda.max_memory_allocated() - before
            name = {None: "", False: ", kept", True: ", recomputed"}[cheap]
            del model
            yield f"2 + {count}{name}", found


def crops(run):
    """What defer="augment" leaves to the device, against kornia's and torchvision's whole pipelines there."""
    images = run.pick(256, 4)
    pixels = torch.randint(256, (images, 3, 375, 500), dtype=torch.uint8)
    yield "setting", {"images": images, "source": "random pixels, 500 x 375", "views": "2 x 224 + 2 x 96 px"}
    for defer in ("normalize", "augment"):
        (views,) = MultiCropCollate(defer=defer)(list(pixels))
        views = views.pin_memory() if run.cuda else views
        taken = run.seconds(lambda views=views: views.to(run.device, non_blocking=True), run.pick(20, 1))
        work = "transfer, normalisation" + (", colour, blur" if defer == "augment" else "")
        found = {"images_per_s": images / statistics.median(taken), "on the device": work}
        both = zip(views.to(run.device), views.to("cpu"), strict=True)
        apart = 255 * 0.229 * max(float((there.cpu() - here).abs().max()) for there, here in both)
        found["levels of 255 apart from the CPU's"] = apart
        if not apart < 0.1:
            found["failed"] = "the device gives other views than the CPU"
        yield f"defer={defer}", found
    few = pixels[: run.pick(64, 2)].to(run.device)
    for name, peer in {"kornia": _kornia, "torchvision v2": _torchvision}.items():
        try:
            taken = run.seconds(partial(peer(), few), run.pick(5, 1))
        except Exception as error:  # a peer that fails is no fault of ours
            yield name, {"skipped": f"{type(error).__name__}: {error}"}
            continue
        found = {"images_per_s": len(few) / statistics.median(taken)}
        yield (
            name,
            {**found, "on the device": "crops, colour, blur, normalisation, of whole uint8 images on the device"},
        )


def transfer(run):
    """Bytes per image from host to device, and what they take."""
    pixels = torch.randint(256, (run.pick(256, 2), 3, 375, 500), dtype=torch.uint8)
    for defer in (None, "normalize", "augment"):
        (views,) = MultiCropCollate(defer=defer, jitter_p=0.0, blur_p=0.0)(list(pixels))
        tensors = views if defer is None else views._views
        size = sum(view.nbytes for view in tensors)
        found = {"bytes_per_image": size / len(pixels)}
        for kind in ("pageable", "pinned") if run.cuda else ("pageable",):
            if kind == "pinned":
                tensors = [view.pin_memory() for view in tensors]
            taken = run.seconds(partial(_move, tensors, run.device), run.pick(10, 1))
            found[f"bytes_per_s, {kind}"] = size / statistics.median(taken)
        yield f"defer={defer}", found


def sections(tiny):
    """Name to (function, seconds at most). In the order of what one would miss most."""
    import gpu_checks

    small, large = ("resnet18", (32, 32), 512), ("resnet50", (224, 96), 512)
    if tiny:
        small, large = ("resnet10t", (32, 32), 4), ("resnet10t", (48, 32), 2)
    held = ("resnet50", (224, 96), 64) if not tiny else ("resnet10t", (48, 32), 2)
    return {
        "environment": (environment, 20),
        "contract": (gpu_checks.contract, 100),
        "precision": (gpu_checks.precision, 30),
        "step_time_small": (partial(step_time, backbone=small[0], sizes=small[1], batch_size=small[2],
                                    budget_of_rounds=30 if not tiny else 1), 50),
        "step_time_large": (partial(step_time, backbone=large[0], sizes=large[1], batch_size=large[2],
                                    budget_of_rounds=10 if not tiny else 1), 110),
        "objective": (objective, 25),
        "memory": (partial(memory, backbone=held[0], sizes=held[1], batch_size=held[2]), 40),
        "channels_last": (gpu_checks.channels_last, 15),
        "sync_batchnorm": (gpu_checks.sync_batchnorm, 40),
        "transfer": (transfer, 20),
        "crops": (crops, 40),
        "compile": (gpu_checks.compiled, 100),
    }  # fmt: skip


class Run:
    """The device, the clock, and how much to do."""

    def __init__(self, device, tiny):
        self.device, self.tiny, self.cuda = device, tiny, device == "cuda"

    def pick(self, full, tiny):
        return tiny if self.tiny else full

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call, rounds, warmup=None):
        """Of each call after the warm-up, by the device's own events; on a CPU, seconds of CPU time."""
        for _ in range(self.pick(3, 0) if warmup is None else warmup):
            call()
        return [self._time(call) for _ in range(rounds)]

    def _time(self, call):
        if not self.cuda:
            start = time.process_time()
            call()
            return max(time.process_time() - start, 1e-9)
        self.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        call()
        events[1].record()
        self.synchronize()
        return events[0].elapsed_time(events[1]) / 1000

    def in_turn(self, steps, rounds=None):
        """Seconds of each step, a list over rounds in which they take turns, every other round backwards."""
        for step in steps.values():
            for _ in range(self.pick(3, 1)):
                step()
        times = {name: [] for name in steps}
        for i in range(rounds or self.pick(20, 1)):
            for name in list(steps)[:: 1 if i % 2 else -1]:
                times[name] += self.seconds(steps[name], 1, warmup=0)
        return times

    def kernels(self, step):
        """How many kernels, copies and fills the step launches; on a CPU, how many ATen operators run."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
        try:
            with profile(activities=activities) as profiled:
                step()
                self.synchronize()
        except RuntimeError as error:  # without the driver's leave to profile
            return f"not counted: {error}"
        events = [event for event in profiled.events() if not getattr(event, "is_user_annotation", False)]
        if self.cuda:
            return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
        return sum(event.name.startswith("aten::") for event in events)


def _objective_step(run, images, features, local_crops, affinity):
    criterion = LoGoLoss(affinity=affinity).to(run.device)
    criterion.anneal(0.3)
    pred = [torch.randn(images, features, device=run.device, requires_grad=True) for _ in range(2 + local_crops)]
    target = [torch.randn(images, features, device=run.device) for _ in range(2)]

    def step():
        criterion(global_pred=pred[:2], local_pred=pred[2:], global_target=target).total.backward()

    return step


def _fitting_batch(run, step_cost, backbone, options):
    """The largest batch, by halving, whose LoGo step of BYOL fits; two other arms' weights lie beside it."""
    while options.batch_size > 1:
        try:
            step_cost.make_step("byol", backbone, "LoGo", options, run.device)()
            used = torch.cuda.max_memory_reserved() / torch.cuda.get_device_properties(0).total_memory
            if used < 0.95:
                return options.batch_size
        except torch.cuda.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        options.batch_size //= 2
    raise RuntimeError(f"not even two images of {backbone} fit")


def _kornia():
    import crop_throughput

    batched = crop_throughput.kornia().transform
    return lambda images: batched(images / 255)


def _torchvision():
    """Image by image, since of a batch all would get the same crop and colours."""
    import crop_throughput

    one = crop_throughput.torchvision_v2().transform
    return lambda images: [one(image) for image in images]


def _move(tensors, device):
    return [tensor.to(device, non_blocking=True, copy=True) for tensor in tensors]


def _median_difference(times):
    return statistics.median(logo - plain for plain, logo in zip(times["multi-crop"], times["LoGo"], strict=True))


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def run_section(run, function, seconds, result, write):
    """Fills `result` with what the section yields; whatever happens, it says what."""
    result["status"] = "running"
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        for name, found in function(run):
            result[name] = found
            write()
        run.synchronize()
        failed = [name for name, found in result.items() if isinstance(found, dict) and found.get("failed")]
        result["status"] = "failed" if failed else "ok"
    except LateError:
        result["status"] = "late"
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in OPTIONAL:
            result.update(status="skipped", reason=f"{error.name} is not installed")
        else:
            result.update(status="failed", error=traceback.format_exc(limit=-6))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        result["wall_seconds"] = round(time.perf_counter() - start, 2)
        if run.cuda:
            torch.cuda.empty_cache()
        write()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes and one round: to rehearse")
    parser.add_argument("--minutes", type=float, default=9, help="for all of it (default: 9)")
    parser.add_argument("--only", nargs="+", metavar="SECTION")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --device cpu --tiny rehearses without one")
    planned = sections(options.tiny)
    if unknown := set(options.only or ()) - planned.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(planned)}")
    # A call that never returns to Python is ended here; the results so far are in the file.
    faulthandler.dump_traceback_later(60 * options.minutes, exit=True)
    warnings.simplefilter("ignore")
    if options.device == "cpu":
        torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _late)
    run = Run(options.device, options.tiny)
    results = {"command": " ".join(sys.argv), "device": options.device, "tiny": options.tiny, "sections": {}}

    def write():
        partial_file = options.json.with_suffix(".part")
        partial_file.write_text(json.dumps(_finite(results), indent=1))
        partial_file.replace(options.json)

    for name, (function, seconds) in planned.items():
        if options.only and name not in options.only:
            continue
        result = results["sections"].setdefault(name, {})
        left = end - time.monotonic() - 5
        if left < 5:
            result.update(status="skipped", reason=f"no time left of {options.minutes} minutes")
            write()
            continue
        run_section(run, function, left if options.tiny else min(seconds, left), result, write)
        why = result.get("reason") or result.get("error", "").strip().rpartition("\n")[2]
        print(f"{name:16} {result['status']:8} {result['wall_seconds']:6.1f} s  {why}", flush=True)
    faulthandler.cancel_dump_traceback_later()
    print(f"written to {options.json}")
    if any(result["status"] == "failed" for result in results["sections"].values()):
        sys.exit(1)


def _late(*_):
    raise LateError


def _finite(found):
    """Without nan and infinity, which JSON has no words for."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, (list, tuple)):
        return [_finite(value) for value in found]
    return str(found) if isinstance(found, float) and not math.isfinite(found) else found


if __name__ == "__main__":
    main()
