"""LoGoLearner: the user's own network in, a loss out, the same network back."""

import copy
import subprocess
import sys
from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from adapter_contract import CHECKS, AdapterCase, check_device, check_two_ranks, seeded, views
from photos import tiles
from torch import nn

from logo_plugin import LoGoLearner, MultiCropCollate

SMALL = {"image_size": (32, 24), "hidden_dim": 24, "output_dim": 16}
OWN = {
    "byol": {"predictor_dim": 24, "momentum": 0.9},
    "simsiam": {"predictor_dim": 8},
    "moco": {"momentum": 0.9, "queue_size": 32},
}


def network():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.AdaptiveAvgPool2d(1)
    )


def build(method, **options):
    """With the paper's affinity, whose parameters and random numbers the tests follow, unless told."""
    return LoGoLearner(network(), method, **{"affinity": "learned"} | SMALL | OWN[method] | options)


class Longhand(LoGoLearner):
    """The method without LoGo, written out."""

    def __init__(self, method):
        super().__init__(network(), method, affinity=None, **SMALL, **OWN[method])

    def forward(self, crops):
        projections = [self.projector(self.backbone(x).flatten(1)) for x in crops]
        if self.target is None:
            p, z = [self.predictor(z) for z in projections], [z.detach() for z in projections]
            return -(F.cosine_similarity(p[0], z[1]).mean() + F.cosine_similarity(p[1], z[0]).mean()) / 2
        online = nn.Sequential(self.backbone, nn.Flatten(), self.projector)
        for target, parameter in zip(self.target.parameters(), online.parameters(), strict=True):
            target.data = 0.9 * target + 0.1 * parameter.detach()
        keys = [self.target(x).detach() for x in crops]
        if self.queue is None:
            p = [self.predictor(z) for z in projections]
            return -(F.cosine_similarity(p[0], keys[1]).mean() + F.cosine_similarity(p[1], keys[0]).mean()) / 2
        queries, keys = ([F.normalize(x, dim=1) for x in xs] for xs in (projections, keys))
        loss = 0
        for q, k in ((queries[0], keys[1]), (queries[1], keys[0])):
            logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue], 1) / 0.2
            loss = loss - logits.log_softmax(1)[:, 0].mean() / 2
        self.queue = torch.cat([*(k.T for k in keys), self.queue], 1)[:, :32]
        return loss


def call(model, crops):
    return model(crops)


COMMON = {"loss": call, "affinity": attrgetter("criterion.affinity")}
CASES = {m: AdapterCase(host=partial(Longhand, m), build=partial(build, m), **COMMON) for m in OWN}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_contract(case, check):
    check(case)


def capped(local_weight, **options):
    return build("simsiam", gradient_ratio=0.1, **options)


def test_contract_on_two_ranks(tmp_path):
    others = {"capped": capped, "difference": partial(build, "byol", affinity_loss="difference")}
    more = {name: AdapterCase(host=partial(Longhand, "byol"), build=b, **COMMON) for name, b in others.items()}
    first, second = check_two_ranks(CASES | more, tmp_path)["moco"]
    assert torch.equal(first["queue"], second["queue"])  # three batches of 6, two views, two ranks: full


def test_contract_on_a_device():
    check_device(CASES)


def test_total_by_hand():
    learner = seeded(partial(build, "byol"), local_weight=0.5)
    crops = views()
    loss = learner(crops)
    global_global = seeded(partial(Longhand, "byol"))(crops[:2])
    p = [learner.predictor(learner.projector(learner.backbone(x).flatten(1))) for x in crops[2:]]
    z = [learner.target(x) for x in crops[:2]]
    local_global = -sum(F.cosine_similarity(a, b).mean() for a in p for b in z) / 4
    terms = learner.terms
    torch.testing.assert_close(terms.global_global, global_global)
    torch.testing.assert_close(terms.local_global, local_global)
    pull = (2 * global_global + 4 * local_global) / 6
    torch.testing.assert_close(loss, pull + 0.5 * terms.local_local + terms.affinity)
    assert not any(term.requires_grad for term in terms)


def test_the_target_follows_once_per_training_forward():
    learner = build("byol")
    targets, online = list(learner.target.parameters()), [*learner.backbone.parameters()]
    with torch.no_grad():
        online[0].add_(1.0)
    old, new = targets[0].clone(), online[0].detach()
    learner(views())
    torch.testing.assert_close(targets[0], 0.9 * old + 0.1 * new)
    before = targets[0].clone()
    with pytest.warns(UserWarning, match=r"the learner is in eval mode .*neither the target nor the queue moves"):
        learner.eval()(views())
    with torch.no_grad():
        learner.train()(views())
    assert torch.equal(targets[0], before)
    learner.momentum = 0.9**0.5  # two micro-batches for one step
    for _ in range(2):
        learner(views())
    torch.testing.assert_close(targets[0], 0.9 * before + 0.1 * new)
    assert not any(p.requires_grad for p in targets)


def test_the_queue_gets_the_keys_of_a_step_after_its_loss():
    learner = build("moco")
    queue = learner.queue.clone()
    assert "queue" in learner.state_dict()
    crops = views()
    learner(crops).backward()
    keys = F.normalize(torch.cat([learner.target(x) for x in crops[:2]]), dim=1).T
    torch.testing.assert_close(learner.queue[:, :12], keys)
    assert torch.equal(learner.queue[:, 12:], queue[:, :20])
    z = [F.normalize(learner.projector(learner.backbone(x).flatten(1)), dim=1) for x in crops[:2]]
    values = []
    for i, own in ((0, keys[:, 6:]), (1, keys[:, :6])):  # the negatives are the queue before the step
        logits = torch.cat([(z[i] * own.T).sum(1, keepdim=True), z[i] @ queue], 1) / 0.2
        values.append(-logits.log_softmax(1)[:, 0].mean())
    torch.testing.assert_close(learner.terms.global_global, sum(values) / 2)
    with pytest.warns(UserWarning, match="the learner is in eval mode"):
        learner.eval()(crops)
    assert torch.equal(learner.queue[:, 12:], queue[:, :20])
    small = LoGoLearner(network(), "moco", affinity="learned", **SMALL, queue_size=8)
    small(crops).backward()  # more keys than places
    assert small.queue.shape == (16, 8)


@pytest.mark.parametrize("method", OWN)
def test_construction_changes_nothing_in_the_network(method):
    net = network()
    net[1].eval()  # a BatchNorm that its owner froze
    before = {name: value.clone() for name, value in net.state_dict().items()}
    learner = LoGoLearner(net, method, affinity="learned", **SMALL, **OWN[method])
    assert learner.backbone is net
    assert net.training
    assert not net[1].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    learner.train()(views()).backward()
    optimizer.step()
    assert not torch.equal(net[0].weight, before["0.weight"])


def test_crops_that_the_device_finishes():
    learner = LoGoLearner(network(), "moco", affinity="learned", **SMALL, queue_size=8)
    (crops, _) = MultiCropCollate.cifar10(defer="augment")(tiles(4))
    with pytest.raises(TypeError, match=r"batch\[0\]\.to\(device\)"):
        learner(crops)
    assert learner(crops.to("cpu")).isfinite()


def test_views_that_are_none_or_too_few():
    learner = LoGoLearner(network(), affinity="learned", **SMALL)
    with pytest.raises(TypeError, match=r"LoGoLearner takes a list of views .*got \[list, Tensor\].*batch\[0\]"):
        learner(MultiCropCollate.cifar10()(tiles(4)))
    with pytest.raises(ValueError, match=r"got 2 views, of which 2 are global.*MultiCropCollate.*affinity=None"):
        learner(views()[:2])
    assert LoGoLearner(network(), affinity=None, **SMALL)(views()[:2]).isfinite()


def test_bfloat16_and_a_compiled_backbone():
    net = torch.compile(network(), backend="eager")
    learner = LoGoLearner(net, "moco", affinity="learned", **SMALL, **OWN["moco"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = learner(views())
    loss.backward()
    assert loss.dtype == learner.queue.dtype == torch.float32
    assert learner.backbone is net
    assert copy.deepcopy(learner)(views()).isfinite()


class Pair(nn.Conv2d):
    """A backbone that gives more than its features."""

    def __init__(self):
        super().__init__(3, 4, 3)

    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize("method", ["byol", "moco"])
def test_data_parallel_is_refused(method):
    """Each replica is dropped after its forward, with what the target and the queue have become."""
    learner = build(method)
    replica = learner._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"neither the target nor the queue would move.*DistributedDataParallel"):
        replica(views())


def test_a_backbone_left_in_eval_mode():
    """By a look at its features, say. One that is frozen may be, and so may a single layer."""
    net = network()
    learner = LoGoLearner(net, "simsiam", affinity=None, **SMALL)
    net[1].eval()
    learner(views())
    net.eval()
    with torch.no_grad():
        learner(views())
    with pytest.warns(UserWarning, match=r"the backbone is in eval mode .* Call learner\.train\(\)"):
        learner(views())
    learner(views())  # said once
    LoGoLearner(network().requires_grad_(False), "simsiam", affinity=None, **SMALL).backbone.eval()(views()[0])


class Merging(nn.Linear):
    """As LoRA's layers, which act on a change of mode."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


class Stemless(nn.Module):
    """Its first convolution takes what is no image."""

    def __init__(self):
        super().__init__()
        self.layer, self.stem = nn.Conv2d(12, 8, 1), nn.PixelUnshuffle(2)

    def forward(self, x):
        return self.layer(self.stem(x)).mean((2, 3))


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, x):
        return (self.body(x), None) if self.training else self.body(x).flatten(1)


def test_networks_with_ways_of_their_own():
    merging = nn.Sequential(network(), nn.Flatten(), Merging(32, 8))
    LoGoLearner(merging, **SMALL)
    assert not merging[2].merged
    LoGoLearner(Stemless(), "simsiam", affinity=None, **SMALL)(views()).backward()
    lazy = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    LoGoLearner(lazy, "simsiam", affinity=None, **SMALL)(views()).backward()
    with pytest.raises(TypeError, match=r"Auxiliary gives tuple in training mode: put a module around it"):
        LoGoLearner(Auxiliary(), "simsiam", **SMALL)(views())
    learner = build("byol").requires_grad_(True)  # the target with the rest
    learner(views()).backward()
    assert all(p.grad is None for p in learner.target.parameters())


def test_local_crops_as_large_as_global_ones():
    """More global crops than it was told of, or in another order."""
    for wrong in ([*views()[:2], *views()], views()[::-1]):
        with pytest.warns(UserWarning, match=r"takes the first 2 for global crops.*Put the global ones first"):
            build("simsiam")(wrong)


@pytest.mark.parametrize(
    ("made", "cure"),
    [
        (
            lambda: torchvision.models.resnet18(),
            r"ResNet ends with its classifier 'fc', .*1000 outputs.*backbone\.fc = ",
        ),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=7), r"7 outputs .*backbone\.classifier\[3\] = "),
        (lambda: timm.create_model("resnet10t"), "classifier 'fc', .*num_classes=0"),
        (lambda: timm.create_model("regnetx_002"), r"classifier 'head\.fc', .*1000 outputs.*num_classes=0"),
    ],
)
def test_a_classifier_left_on(made, cure):
    with pytest.warns(UserWarning, match=cure):
        learner = LoGoLearner(made(), hidden_dim=8, image_size=(64, 32))
    net = learner.backbone
    *path, last = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)][-1].split(".")
    setattr(net.get_submodule(".".join(path)), last, nn.Identity())
    LoGoLearner(net, hidden_dim=8, image_size=(64, 32))  # no warning, which would be an error here


@pytest.mark.parametrize("method", ["byol", "moco"])
def test_it_has_the_precision_of_the_backbone(method):
    learner = LoGoLearner(network().double(), method, affinity=None, **SMALL, **OWN[method])
    assert {x.dtype for x in learner.state_dict().values() if x.is_floating_point()} == {torch.float64}
    assert learner([view.double() for view in views()]).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "dino"}, ValueError, r"method must be one of .*got 'dino'"),
        ({"momentun": 0.9}, TypeError, r"unknown option momentun; did you mean momentum\?"),
        ({"method": "simsiam", "queue_size": 8}, TypeError, r"method='simsiam'.*unknown option queue_size"),
        ({"similarity": "cosine"}, TypeError, "unknown option similarity"),
        ({"gradient_ratio": 0.1, "local_global_weight": 0}, ValueError, "local_global_weight=0 leaves none"),
        ({"lr": 0.1}, TypeError, r"unknown option lr; none is near\. There are affinity, "),
        ({"lamda": 0.1}, TypeError, r"unknown option lamda; did you mean local_weight\?"),
        ({"lambda": 0.1}, TypeError, r"unknown option lambda; did you mean local_weight\?"),
        ({"momentum": 1.5}, ValueError, r"momentum must be a number between 0 and 1, got 1\.5; the default is 0\.996"),
        ({"momentum": "slow"}, ValueError, "momentum must be a number between 0 and 1, got 'slow'"),
        ({"method": "moco", "temperature": "a"}, ValueError, "temperature must be a number between 0 and inf, got 'a'"),
        ({"method": "moco", "queue_size": 0}, ValueError, "queue_size must be a positive integer, got 0"),
        ({"method": "moco", "queue_size": 2.5}, ValueError, r"queue_size must be a positive integer, got 2\.5"),
        ({"hidden_dim": "a"}, ValueError, "hidden_dim must be a positive integer, got 'a'"),
        ({"output_dim": True}, ValueError, "output_dim must be a positive integer, got True"),
        ({"predictor_dim": 0}, ValueError, "predictor_dim must be a positive integer, got 0"),
        ({"global_crops": "2"}, ValueError, "global_crops must be an integer >= 2, got '2'"),
        ({"global_crops": 1}, ValueError, "global_crops must be an integer >= 2, got 1"),
        ({"image_size": 224}, ValueError, r"image_size must be the sides .* as \(224, 96\), got 224"),
        ({"image_size": ()}, ValueError, r"image_size must be the sides .*got \(\)"),
        ({"image_size": ("a",)}, ValueError, "each of image_size must be a positive integer, got 'a'"),
        ({"affinity": "none"}, ValueError, "affinity must be a module .* LoGoLearner also \"learned\": got 'none'"),
        ({"affinity": 3}, ValueError, "affinity must be a module .* or None; .* got 3"),
        ({"backbone": 3}, TypeError, r"backbone must be a torch\.nn\.Module, got 3"),
        ({"backbone": nn.Flatten()}, ValueError, "the backbone has no parameters to train, got Flatten"),
        ({"backbone": network().to("meta")}, ValueError, r"meta device, where parameters have no values.*to_empty"),
        ({"local_weight": -1}, ValueError, r"local_weight must be a finite number >= 0"),
        ({"backbone": nn.Conv2d(3, 4, 3)}, ValueError, r"must give \(1, F\) for every size.*num_classes=0"),
        ({"backbone": Pair()}, TypeError, "must give a tensor of features .*Pair gives tuple: put a module around it"),
        ({"backbone": nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))}, ValueError, "24 x 24 pixels"),
        ({"backbone": network(), "image_size": (1,)}, ValueError, r"1 x 1 pixels .*image_size=\(32, 32\) or so"),
    ],
)
def test_errors_of_the_constructor(options, error, message):
    with pytest.raises(error, match=message):
        LoGoLearner(**{"backbone": network(), **SMALL, **options})


@pytest.mark.parametrize(("model", "key"), [("vit_tiny_patch16_224", "dynamic_img_size"), ("swin_s3_tiny_224", "")])
def test_timm_networks_of_one_size_are_refused(model, key):
    net = timm.create_model(model, num_classes=0)
    with pytest.raises(ValueError, match=rf"96 x 96 pixels .*{key or 'strict_img_size'}="):
        LoGoLearner(net)
    if key:
        LoGoLearner(timm.create_model(model, num_classes=0, dynamic_img_size=True), hidden_dim=8)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (views()[0], TypeError, r"takes a list of views, got a tensor; learner\.backbone\(x\)"),
        (views()[:1], ValueError, "got 1 views, of which 2 are global, so there are no local crops"),
        (views()[:3], ValueError, "at least 2 local crops"),
    ],
)
def test_errors_of_a_step(given, error, message):
    with pytest.raises(error, match=message):
        build("simsiam")(given)


def test_example(tmp_path):
    script = Path(__file__).parents[1] / "examples" / "timm_learner.py"
    assert len(script.read_text().splitlines()) <= 40
    command = [sys.executable, "-W", "ignore", script, "--epochs", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    net = timm.create_model("resnet10t", num_classes=0)
    net.load_state_dict(torch.load(tmp_path / "backbone.pt"))
