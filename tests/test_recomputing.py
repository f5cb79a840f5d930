"""checkpoint_local_crops=True: the same training without the local crops' activations."""

import copy

import hosts
import pytest
import torch
from hosts import wrap_learned as wrap
from torch import nn

from logo_plugin import LoGoLearner


def batch(locals_=2, n=6):
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(n, 3, side, side, generator=generator) for side in (32, 32, *[24] * locals_)]
    return [views, torch.arange(n) % 4]


class Dropping(hosts.BYOL):
    """With random numbers in the backbone."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(*hosts.small_backbone()[:4], nn.Dropout(0.3), nn.AdaptiveAvgPool2d(1))
        self.copy_momentum()


def train(model, whole, steps=2, context=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for i in range(steps):
        torch.manual_seed(i)
        optimizer.zero_grad()
        with context() if context else torch.enable_grad():
            out = model.training_step(whole, i)
        (out["loss"] if isinstance(out, dict) else out).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("options", [{}, {"concat_local_crops": True}, {"gradient_ratio": 0.2}])
@pytest.mark.parametrize("cls", [hosts.BYOL, hosts.MoCo, hosts.SimSiam, hosts.SimCLR, hosts.BenchmarkBYOL, Dropping])
def test_it_trains_the_same_model(cls, options):
    """Parameters and BatchNorm's statistics after two steps are those of training without it."""
    torch.manual_seed(0)
    plain = wrap(cls(), **options)
    cheap = copy.deepcopy(plain)
    cheap.logo_settings.checkpoint_local_crops = True
    train(plain, batch())
    train(cheap, batch())
    for (name, expected), found in zip(plain.state_dict().items(), cheap.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["byol", "simsiam", "moco"])
def test_learner(method):
    sizes = {"hidden_dim": 24, "output_dim": 16, "image_size": (32, 24), "affinity": "learned"}
    sizes |= {"queue_size": 32} if method == "moco" else {"predictor_dim": 8}
    torch.manual_seed(0)
    plain = LoGoLearner(nn.Sequential(*hosts.small_backbone(), nn.Flatten()), method, **sizes)
    torch.manual_seed(0)
    cheap = LoGoLearner(
        nn.Sequential(*hosts.small_backbone(), nn.Flatten()), method, checkpoint_local_crops=True, **sizes
    )
    for learner in (plain, cheap):
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.05)
        for i in range(2):
            torch.manual_seed(i)
            optimizer.zero_grad()
            learner(batch()[0]).backward()
            optimizer.step()
    for (name, expected), found in zip(plain.state_dict().items(), cheap.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(ValueError, match="checkpoint_local_crops must be True or False, got 1"):
        LoGoLearner(hosts.small_backbone(), method, checkpoint_local_crops=1, **sizes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ["learner", "byol", "simclr"])
def test_compiled(make):
    """In a compiled learner or wrapped model it trains as an eager one without it does."""
    states = []
    for cheap in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        if make == "learner":
            sizes = {"image_size": (32, 24), "hidden_dim": 24, "output_dim": 16, "predictor_dim": 8}
            net = nn.Sequential(*hosts.small_backbone(), nn.Flatten())
            model = LoGoLearner(net, checkpoint_local_crops=cheap, anneal_repulsion=False, **sizes)
        else:
            cls, make_criterion = hosts.PLAIN[make]
            model = wrap(cls(), criterion=make_criterion(), checkpoint_local_crops=cheap)
        run = torch.compile(model, backend="aot_eager") if cheap else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            run(batch()[0]).backward()
            optimizer.step()
        states.append(model.state_dict())
    for (name, expected), found in zip(states[0].items(), states[1].values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_under_autocast():
    torch.manual_seed(0)
    plain = wrap(hosts.SimSiam())
    cheap = copy.deepcopy(plain)
    cheap.logo_settings.checkpoint_local_crops = True
    for model in (plain, cheap):
        train(model, batch(), context=lambda: torch.autocast("cpu", torch.bfloat16))
    for expected, found in zip(plain.parameters(), cheap.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def saved_bytes(model, whole):
    """Bytes of all tensors that the graph of one step keeps for backward; not of the first, whose look makes more."""
    model.training_step(whole, 0)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.training_step(whole, 0)
    return sum(kept.values())


def test_two_and_six_crops_need_the_memory_of_two():
    plain, cheap = wrap(hosts.BYOL(), affinity=None), wrap(hosts.BYOL(), affinity=None, checkpoint_local_crops=True)
    views = [torch.randn(16, 3, side, side) for side in (64, 64, *[48] * 6)]
    images = sum(view.untyped_storage().nbytes() for view in views[2:])
    two = saved_bytes(hosts.BYOL(), [views[:2], None])
    assert saved_bytes(cheap, [views, None]) - images < 1.1 * two
    assert saved_bytes(plain, [views, None]) - images > 1.5 * two


def test_what_it_cannot_do_is_refused():
    class Piecewise(hosts.BYOL):
        def forward(self, x):
            for layer in self.backbone:
                x = layer(x)
            return self.prediction_head(self.projection_head(x.flatten(1)))

    with pytest.raises(RuntimeError, match=r"nothing called the backbone \(Sequential\).*go without the option"):
        wrap(Piecewise(), checkpoint_local_crops=True).training_step(batch(), 0)

    class Renamed(hosts.SimCLR):
        def __init__(self):
            super().__init__()
            self.net = self.backbone
            del self.backbone

    with pytest.raises(ValueError, match="needs an attribute 'backbone' or 'encoder', and Renamed has none"):
        wrap(Renamed(), checkpoint_local_crops=True)
