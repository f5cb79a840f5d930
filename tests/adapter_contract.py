"""What every adapter must do. Describe yours as `AdapterCase`s; run CHECKS, check_two_ranks, check_device on them.

CASES = {"byol": AdapterCase(host=BYOL, build=build, loss=loss)}

@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_contract(case, check):
    check(case)

def test_two_ranks(tmp_path):
    check_two_ranks(CASES, tmp_path)

def test_contract_on_a_device():
    check_device(CASES)
"""

import io
import multiprocessing
import unittest
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import pretended
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# The two ranks are forked from a process that has these (those installed), which saves 20 s of imports.
multiprocessing.set_forkserver_preload(["torch", "torchvision", "pytorch_lightning", "lightly.loss", "timm"])


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05)


@dataclass(frozen=True, kw_only=True)
class AdapterCase:
    """One model, described by functions that pickle (no lambdas): two processes run them.

    host: () -> the model without LoGo.
    build: (**options of LoGoLoss, affinity=None among them) -> the same model with LoGo.
    loss: (model, views) -> the loss of one training step. The host gets two global views, (6, 3, 32, 32)
        each, the model with LoGo two local ones more, (6, 3, 24, 24).
    optimizer: (model) -> the optimizer, as a user of the host gets it.
    affinity: (model) -> the affinity.
    shares_batch: whether the loss of a rank depends on the images of the others.
    """

    host: Callable[..., nn.Module]
    build: Callable[..., nn.Module]
    loss: Callable[..., torch.Tensor]
    optimizer: Callable[..., torch.optim.Optimizer] = sgd
    affinity: Callable[..., nn.Module] = attrgetter("logo.affinity")
    shares_batch: bool = False


def seeded(build, seed=0, **options):
    torch.manual_seed(seed)
    return build(**options)


def views(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 3, side, side, generator=generator) for side in (32, 32, 24, 24)]


def step(case, model, crops, seed=0):
    """Loss and gradients by name of one training step; the affinity draws the same noise for one seed."""
    torch.manual_seed(seed)
    model.zero_grad()
    loss = case.loss(model, crops)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected, what, **tolerance):
    """Equal keys and values of two dicts of tensors."""
    assert found.keys() == expected.keys(), f"{what}: {sorted(found.keys() ^ expected.keys())} in one only"
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{what} {n}: {m}", **tolerance)


def of_affinity(case, model):
    inside = {id(p) for p in case.affinity(model).parameters()}
    return {name for name, p in model.named_parameters() if id(p) in inside}


def weights_at_zero(case):
    """Without affinity and local-global weight: the host's loss, gradients and queue, for two steps."""
    host, model = seeded(case.host), seeded(case.build, affinity=None, local_global_weight=0)
    same(dict(model.named_parameters()), dict(host.named_parameters()), "at the start", rtol=0, atol=0)
    optimizers = case.optimizer(host), case.optimizer(model)
    for i in range(2):
        expected, expected_gradients = step(case, host, views(i)[:2])
        loss, gradients = step(case, model, views(i))
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        same(gradients, expected_gradients, "gradient", rtol=1e-3, atol=5e-5)
        for optimizer in optimizers:
            optimizer.step()
    # Local crops move BatchNorm's running statistics, and nothing else.
    buffers = [
        {name: b for name, b in m.named_buffers() if not name.endswith(("running_mean", "running_var", "_tracked"))}
        for m in (model, host)
    ]
    same(*buffers, "buffer", rtol=1e-3, atol=5e-5)


def gradient_routing(case):
    """Targets get none, the affinity's loss reaches the affinity only, the repulsion never does."""
    options = {
        "affinity only": {"local_weight": 0, "local_global_weight": 0},
        "repulsion": {"local_weight": 5.0, "local_global_weight": 0},
        "everything": {"local_weight": 5.0},
        "ratio": {"gradient_ratio": 0.5},
    }
    host, crops = seeded(case.host), [view.requires_grad_() for view in views()[:2]]
    _, host_gradients = step(case, host, crops)
    at_host = [view.grad for view in crops]
    found = {}
    for name, chosen in options.items():
        model, crops = seeded(case.build, reduction="sum", **chosen), [view.requires_grad_() for view in views()]
        _, gradients = step(case, model, crops)
        own = of_affinity(case, model)
        assert own, "the model has no affinity parameters"
        assert own <= gradients.keys(), f"{name}: no gradient for {sorted(own - gradients.keys())}"
        targets = {n for n, p in model.named_parameters() if n not in host_gradients and n not in own}
        assert not targets & gradients.keys(), f"{name}: gradient for {sorted(targets & gradients.keys())}"
        # reduction="sum" leaves the host's own loss whole, so whatever differs here came through a target.
        for view, expected in zip(crops, at_host, strict=False):
            torch.testing.assert_close(view.grad, expected, rtol=1e-3, atol=5e-5, msg=f"{name}: reached a global crop")
        found[name] = (
            [0.0 if view.grad is None else float(view.grad.abs().max()) for view in crops[2:]],
            {n: gradients[n] for n in own},
        )
        if name == "affinity only":
            rest = {n: g for n, g in gradients.items() if n not in own}
            same(rest, host_gradients, "the affinity's loss changed the gradient of", rtol=1e-3, atol=5e-5)
    at_local, of_own = zip(*found.values(), strict=True)
    assert at_local[0] == [0.0, 0.0], "the affinity's loss reached a local crop"
    for name, reached in list(zip(options, at_local, strict=True))[1:]:
        assert min(reached) > 0, f"{name}: no gradient at a local crop"
    assert any(gradient.abs().max() > 1e-4 for gradient in of_own[0].values()), "the affinity gets no gradient"
    for name, gradients in zip(options, of_own, strict=True):
        same(gradients, of_own[0], f"{name}: the repulsion reached", rtol=1e-3, atol=5e-5)


def affinity_is_trained(case):
    """The optimizer holds each parameter of the affinity once, and changes it."""
    model = seeded(case.build)
    optimizer = case.optimizer(model)
    held = Counter(id(p) for group in optimizer.param_groups for p in group["params"])
    counts = {name: held[id(p)] for name, p in case.affinity(model).named_parameters()}
    assert set(counts.values()) == {1}, f"times in the optimizer: {counts}"
    weights = {n: p for n, p in case.affinity(model).named_parameters() if p.ndim > 1}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    step(case, model, views())
    optimizer.step()
    for name, weight in weights.items():
        assert not torch.equal(weight, before[name]), f"{name} did not change"


def checkpoint(case):
    """A new model that loads both state_dicts goes on as the first would have."""
    model = seeded(case.build, local_weight=0.5)
    optimizer = case.optimizer(model)
    step(case, model, views())
    optimizer.step()
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    states = torch.load(file)
    other = seeded(case.build, seed=1, local_weight=0.5)
    other.load_state_dict(states[0])
    other_optimizer = case.optimizer(other)
    other_optimizer.load_state_dict(states[1])
    saved_by_host = case.host().state_dict().keys()
    unsaved = {name for name, _ in case.host().named_buffers()} - saved_by_host  # by the host's own choice
    for name, buffer in other.named_buffers():
        if name in unsaved:
            buffer.data = model.get_buffer(name).clone()
    for module, twin in zip(model.modules(), other.modules(), strict=True):  # TiCoLoss' covariance is no buffer
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                setattr(twin, name, value.clone())
    for i in (1, 2):
        expected, _ = step(case, model, views(i))
        loss, _ = step(case, other, views(i))
        assert torch.equal(loss, expected), f"step {i} after loading: {loss}, not {expected}"
        optimizer.step()
        other_optimizer.step()
    same(dict(other.named_parameters()), dict(model.named_parameters()), "after loading", rtol=0, atol=0)


CHECKS = [weights_at_zero, gradient_routing, affinity_is_trained, checkpoint]


def check_two_ranks(cases, folder):
    """Two gloo ranks stay equal and use all parameters; their gradient is the mean of one process's two.

    Gives for each case the buffers of both ranks, for what only the adapter can say of them.
    """
    buffers = {}
    mp.start_processes(_train_rank, (cases, str(folder)), nprocs=2, start_method="forkserver")
    for name, case in cases.items():
        first, second = (torch.load(f"{folder}/{name}{rank}.pt") for rank in (0, 1))
        buffers[name] = first[2], second[2]
        for mine, other in zip(first[:2], second[:2], strict=True):
            same(mine, other, f"{name}: ranks differ in", rtol=0, atol=0)
        gradients, parameters, _ = first
        start = seeded(case.build, local_weight=0.5)
        for weight in of_affinity(case, start):
            if weight.endswith("0.weight"):
                assert not torch.equal(parameters[weight], start.get_parameter(weight)), f"{name}: {weight} rests"
        if not case.shares_batch:
            halves = [step(case, seeded(case.build, local_weight=0.5), views(rank), rank)[1] for rank in (0, 1)]
            mean = {key: (halves[0][key] + halves[1][key]) / 2 for key in halves[0]}
            same(gradients, mean, f"{name}: gradient of two ranks", rtol=1e-3, atol=5e-5)
    return buffers


def check_device(cases):
    """On another device than the CPU, which is pretended, all that a step needs is there; and LoGo never waits for it.

    But in its first step, which looks at values. Hosts of which not even their own step can be pretended are left out.
    """
    if not pretended.POSSIBLE:
        raise unittest.SkipTest("this torch has no backends in Python")  # benchmarks/gpu.py runs without pytest
    mp.start_processes(_on_a_device, (cases,), start_method="forkserver")


def _on_a_device(_, cases):
    pretended.begin()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ran = []
    for name, case in cases.items():
        try:
            _steps_on_a_device(case, case.host, 2)
        except Exception:
            continue
        fixed = {"affinity": "cosine", "anneal_repulsion": False, "local_weight": 0.1, "checkpoint_local_crops": True}
        for options in ({"gradient_ratio": 0.5}, fixed):
            try:
                _steps_on_a_device(case, partial(case.build, **options), 4)
            except Exception as error:
                raise AssertionError(f"{name} with {options}") from error
        ran.append(name)
    assert len(ran) > len(cases) / 2, f"only {ran} of {[*cases]}"


def _steps_on_a_device(case, build, crops):
    model = seeded(build)
    step(case, model, views()[:crops])
    model.zero_grad()
    with pretended.Device() as device:
        optimizer = case.optimizer(device.put(model))
        for i in (1, 2):
            loss = case.loss(model, [device.put(view) for view in views(i)[:crops]])
            assert loss.device.type == pretended.NAME
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


class _Step(nn.Module):
    """What DistributedDataParallel wraps: its forward is one training step, as in Lightning's strategy."""

    def __init__(self, case, model):
        super().__init__()
        self.case, self.model = case, model

    def forward(self, crops):
        return self.case.loss(self.model, crops)


def _train_rank(rank, cases, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for name, case in cases.items():
        model = seeded(case.build, local_weight=0.5)
        optimizer = case.optimizer(model)
        replica = DistributedDataParallel(_Step(case, model), find_unused_parameters=False)
        torch.manual_seed(rank)  # each rank draws its own noise and negatives
        replica(views(rank)).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        with replica.no_sync():  # gradient accumulation
            replica(views(2 + rank)).backward()
        replica(views(4 + rank)).backward()  # raises if a parameter was left unused
        optimizer.step()
        state = gradients, dict(model.named_parameters()), dict(model.named_buffers())
        torch.save(state, f"{folder}/{name}{rank}.pt")
    torch.distributed.destroy_process_group()
