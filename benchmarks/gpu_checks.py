"""What must hold on a device, for `gpu.py`: the adapters' contract, precisions, compiled models, one rank of DDP.

Sections as there: generators of (name, result). A result with "failed" says what did not hold.
"""

import contextlib
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial

import torch
from torch.utils.data import DataLoader, TensorDataset

from logo_plugin import MultiCropCollate, wrap

TINY = ("byol", "benchmark moco", "plain simsiam")
LEARNED = partial(wrap, affinity="learned")  # what the contract asks about; _few has the default, too


def contract(run):
    """CHECKS of tests/adapter_contract.py for lightly's styles, and the loss of each against the CPU's."""
    from adapter_contract import CHECKS

    with _repeatable():
        for name, case in _cases(run).items():
            failed = {}
            for check in [*CHECKS, partial(_same_as_cpu, _cases(run, "cpu")[name])]:
                try:
                    check(case)
                except Exception as error:
                    title = getattr(check, "__name__", "same_as_cpu")
                    failed[title] = f"{type(error).__name__}: {str(error)[:600]}"
            yield name, {"failed": failed} if failed else {"passed": len(CHECKS) + 1}


def precision(run):
    """bfloat16 autocast, and float16 with GradScaler: finite, the host's own at weights 0, not far from float32."""
    from adapter_contract import seeded, views

    for name, case in _few(run).items():
        with _repeatable():
            crops = [view.to(run.device) for view in views()]
            exact = float(case.loss(seeded(case.build), crops))
            for dtype in (torch.bfloat16, torch.float16):
                found, autocast = {}, partial(torch.autocast, run.device, dtype=dtype)
                with autocast():
                    found["host"] = float(case.loss(seeded(case.host), crops[:2]))
                    plain = seeded(case.build, affinity=None, local_global_weight=0)
                    found["weights at zero"] = float(case.loss(plain, crops))
                    found["LoGo"] = float(case.loss(seeded(case.build), crops))
                found["LoGo in float32"] = exact
                found["skipped steps"], last, scale = _scaled_steps(run, case, autocast, dtype, views)
                found |= {"last loss": last, "last scale": scale}
                _expect(
                    found,
                    (abs(found["host"] - found["weights at zero"]) < 1e-3, "the host's loss"),
                    (abs(found["LoGo"] - exact) < 0.05 * max(1, abs(exact)), "LoGo's loss against float32"),
                    (last == last and abs(last) < 1e4, "a finite loss"),
                    (found["skipped steps"] <= 3, "at most three steps skipped"),
                )
                yield f"{name}, {str(dtype).removeprefix('torch.')}", found


def channels_last(run):
    """LoGo's loss and gradients in channels_last are those of the usual layout."""
    from adapter_contract import seeded, step, views

    for name, case in _few(run).items():
        with _repeatable():
            results = []
            for layout in (torch.contiguous_format, torch.channels_last):
                model = seeded(case.build).to(memory_format=layout)
                crops = [view.to(run.device, memory_format=layout) for view in views()]
                results.append(step(case, model, crops))
        yield name, _agree(*results)


def compiled(run):
    """torch.compile of wrapped models: eager's losses and gradients, with a learned affinity a finite loss."""
    from adapter_contract import seeded, views

    backend = "inductor" if run.cuda else "aot_eager"
    with _repeatable():
        for name, case in _few(run).items():
            if not name.startswith("plain") or (run.tiny and "ratio" in name):
                continue  # Lightning compiles a module by itself
            cosine = "cosine" in name
            for options in ({},) if cosine else ({"affinity": None}, {}):
                torch._dynamo.reset()
                models = [seeded(case.build, **options) for _ in range(2)]
                calls, start = [models[0], torch.compile(models[1], backend=backend)], time.perf_counter()
                for i in range(3):
                    crops = [view.to(run.device) for view in views(i)]
                    losses = [_step(model, crops, seed=i) for model in calls]
                gradients = [
                    {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None} for model in models
                ]
                found = {"backend": backend, "losses": [float(loss) for loss in losses]}
                found["seconds of three steps, compiling"] = time.perf_counter() - start
                if options or cosine:
                    found |= _agree(*zip(losses, gradients, strict=True))
                elif not all(loss.isfinite() for loss in losses):  # its noise is drawn otherwise in a graph
                    found["failed"] = "the loss is not finite"
                yield f"{name}, {'multi-crop' if options else 'LoGo'}", found
    torch._dynamo.reset()


def sync_batchnorm(run):
    """Lightning's Trainer on one rank, DDP with sync_batchnorm=True: nccl on a GPU, gloo without; FSDP on a GPU.

    A single rank has nobody to exchange with, so this shows that the affinity's layers convert and that the step
    passes the collectives, not that several ranks agree: tests/test_distributed.py does that on the CPU.
    """
    import hosts
    import pytorch_lightning as pl
    from pytorch_lightning.strategies import DDPStrategy

    ddp = DDPStrategy(process_group_backend="nccl" if run.cuda else "gloo", find_unused_parameters=False)
    strategies = {"ddp": ddp, "fsdp": "fsdp"}
    pixels = torch.randint(256, (run.pick(64, 8), 3, 40, 40), dtype=torch.uint8)
    loader = DataLoader(
        TensorDataset(pixels), batch_size=len(pixels) // 2, collate_fn=MultiCropCollate.cifar10(defer="augment")
    )
    for name, strategy in strategies.items():
        if name == "fsdp" and not run.cuda:
            yield name, {"skipped": "Lightning's FSDP needs a GPU"}
            continue
        model = LEARNED(hosts.BYOL())
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(
                accelerator="gpu" if run.cuda else "cpu", devices=1, strategy=strategy, max_epochs=1, logger=False,
                precision="bf16-mixed" if run.cuda else "32-true", sync_batchnorm=run.cuda and name == "ddp",
                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                default_root_dir=folder,
            )  # fmt: skip
            try:
                trainer.fit(model, loader)
                terms = {key: float(value) for key, value in trainer.callback_metrics.items()}
                found = {"steps": trainer.global_step, "terms": terms}
                kinds = {type(m).__name__ for m in model.logo.affinity.modules() if "BatchNorm" in type(m).__name__}
                found["the affinity's layers"] = sorted(kinds)
                if not run.cuda:
                    found["without"] = "SyncBatchNorm, which torch runs on GPUs only"
                _expect(
                    found,
                    (found["steps"] == 2, "two steps"),
                    (all(value == value for value in terms.values()), "finite terms"),
                    (kinds == {"SyncBatchNorm"} or name != "ddp" or not run.cuda, "converted layers"),
                )
            except Exception as error:
                found = {"failed": f"{type(error).__name__}: {str(error)[:600]}"}
            finally:
                if torch.distributed.is_initialized():
                    torch.distributed.destroy_process_group()
        yield name, found


def _cases(run, device=None):
    """The contract's cases, whose models live on the device and are given their views there."""
    import hosts
    from adapter_contract import AdapterCase

    device = device or run.device

    def lightning(cls):
        return AdapterCase(
            host=lambda: cls().to(device),
            build=lambda **options: LEARNED(cls(), **options).to(device),
            loss=lambda model, crops: _value(model.training_step([_moved(crops, device), targets, ["a.jpg"] * 6], 0)),
            optimizer=lambda model: _optimizer(model.configure_optimizers()),
        )

    def plain(cls, make_criterion, step):
        def host():
            model = cls()
            model.criterion = make_criterion()  # with the model, so that the memory bank travels with it
            return model

        def build(**options):
            model = host()
            return LEARNED(model, criterion=model.criterion, **step, **options).to(device)

        def loss(model, crops):
            crops = _moved(crops, device)
            return model(crops) if hasattr(model, "logo") else model.host_loss(model.criterion, *crops)

        return AdapterCase(host=lambda: host().to(device), build=build, loss=loss)

    targets = torch.arange(6, device=device) % 4
    cases = {name: lightning(cls) for name, cls in hosts.LIGHTNING.items()}
    cases |= {f"plain {name}": plain(*parts, {}) for name, parts in hosts.PLAIN.items()}
    cases |= {f"plain {name}": plain(*parts, {"step": hosts.own_step}) for name, parts in hosts.SAID.items()}
    return {name: cases[name] for name in TINY} if run.tiny else cases


def _few(run):
    """One of each kind: a predictor with momentum, a queue, a predictor alone, symmetric, a ratio, the cosine."""
    cases = _cases(run)
    names = TINY if run.tiny else ("byol", "benchmark moco", "plain simsiam", "plain moco", "plain simclr", "tico")
    few = {name: cases[name] for name in names}
    base = cases["plain simsiam"]
    few["plain simsiam, gradient ratio"] = replace(base, build=lambda **o: base.build(**({"gradient_ratio": 0.5} | o)))

    def cosine(**options):
        model = base.build(**({"affinity": "cosine"} | options))
        model.logo.anneal(0.25)
        return model

    few["plain simsiam, cosine"] = replace(base, build=cosine)
    return few


def _same_as_cpu(on_cpu, case):
    """Without the affinity, which draws other noise there, the loss is what it is on the CPU."""
    from adapter_contract import seeded, views

    losses = [c.loss(seeded(c.build, affinity=None), views()).cpu() for c in (on_cpu, case)]
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-4, atol=2e-4)


def _scaled_steps(run, case, autocast, dtype, views):
    from adapter_contract import seeded

    model = seeded(case.build)
    optimizer = case.optimizer(model)
    scaler = torch.amp.GradScaler(run.device, enabled=dtype is torch.float16)
    skipped = 0
    for i in range(run.pick(10, 2)):
        crops = [view.to(run.device) for view in views(i)]
        with autocast():
            loss = case.loss(model, crops)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
    return skipped, float(loss), scaler.get_scale()


def _step(model, crops, seed=0):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = None
    loss = model(crops)
    loss.backward()
    return loss.detach()


def _agree(one, other):
    """How far two (loss, gradients by name) are apart, and whether that is too far."""
    apart = {"loss": abs(float(one[0] - other[0])) / max(1, abs(float(one[0])))}
    largest = max(float(g.abs().max()) for g in one[1].values())
    apart["gradients"] = max(float((one[1][n] - other[1][n]).abs().max()) for n in one[1]) / largest
    found = {"apart": apart}
    if one[1].keys() != other[1].keys() or not (apart["loss"] < 1e-4 and apart["gradients"] < 1e-3):
        found["failed"] = "the two differ"
    return found


def _expect(found, *conditions):
    if failed := [what for holds, what in conditions if not holds]:
        found["failed"] = "not so: " + ", ".join(failed)


@contextlib.contextmanager
def _repeatable():
    """While it lasts: float32 is float32, and the same call gives the same bits."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, False, True, False
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark = before


def _value(out):
    return out["loss"] if isinstance(out, dict) else out


def _optimizer(configured):
    return configured[0][0] if isinstance(configured, tuple) else configured


def _moved(crops, device):
    return [crop.to(device) for crop in crops]
