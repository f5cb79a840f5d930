"""The solo-learn adapter against a real clone: set SOLO_LEARN_ROOT to run these."""

import copy
import math
import os
import pickle
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapter_contract import CHECKS, AdapterCase, check_device, check_two_ranks
from methods_solo import rows
from solo_clone import (
    HIDDEN_PROJECTION,
    MARKS,
    METHODS,
    ROOT,
    SYMMETRIC,
    batch,
    build,
    config,
    gradients,
    import_solo,
)

from logo_plugin import Affinity, LoGoMonitor, diagnose, wrap

pytestmark = MARKS
QUEUES = ("mocov2plus", "nnbyol", "nnsiam", "nnclr")


def build_logo(method: str, affinity: Any = "learned", backbone: str = "resnet18", **options: Any):
    if method in HIDDEN_PROJECTION and "gradient_ratio" in options:  # refused: test_bad_options
        options["local_weight"] = options.pop("gradient_ratio")
    return build(f"logo_{method}", options | {"affinity": affinity or False}, name=backbone)


def loss(model, views):
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    images = torch.arange(6, device=views[0].device)
    return model.training_step([images + 6 * rank, views, images], 0)  # NT-Xent takes equal indexes for one image


def optimizer(model):
    return model.configure_optimizers()


def case(method, backbone="resnet18", **options):
    return AdapterCase(
        host=partial(build, method, name=backbone),
        build=partial(build_logo, method, backbone=backbone, **options),
        loss=loss,
        optimizer=optimizer,
        shares_batch=method in ("mocov3", "nnclr", *SYMMETRIC),
    )


CONTRACT = {method: case(method) for method in METHODS}
SMALL = {method: case(method, "resnet_small") for method in METHODS}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("method", METHODS)
def test_contract(method, check):
    check(CONTRACT[method])


def test_contract_on_two_ranks(tmp_path):
    cases = SMALL | {"mocov3, local predictor": case("mocov3", "resnet_small", local_predictor=True)}
    check_two_ranks(cases, tmp_path)


def test_contract_on_a_device():
    check_device(SMALL)


def test_every_method():
    """Each of solo-learn's is carried, exactly, or refused by name; docs/solo-learn.md says which."""
    found = {method: (verdict, reason) for _, method, verdict, reason in rows()}
    assert {method for method, (verdict, _) in found.items() if verdict == "works"} == set(METHODS)
    for method, (verdict, reason) in found.items():
        if verdict == "refused":
            assert reason.startswith(("LoGo cannot carry", "wrap() takes", "BaseMethod is a base class")), method
    assert {method for method in METHODS if "no gradient_ratio" in found[method][1]} == set(HIDDEN_PROJECTION)
    assert {m for m in METHODS if "no local_predictor" in found[m][1]} == {"mocov2plus", *SYMMETRIC}


def longhand(method, pred, target, queue=None):
    """The method's loss between two crops, written out; the hyperparameters are those of `solo_clone.config`."""
    n, width = pred.shape
    cosine = F.cosine_similarity(pred, target, dim=-1).mean()
    if method in ("byol", "nnbyol"):
        return 2 - 2 * cosine
    if method in ("simsiam", "nnsiam"):
        return -cosine
    if method == "mocov3":
        logits = F.normalize(pred, dim=1) @ F.normalize(target, dim=1).T / 0.3
        return 2 * 0.3 * F.cross_entropy(logits, torch.arange(n))
    if method == "nnclr":
        logits = F.normalize(target, dim=1) @ F.normalize(pred, dim=1).T / 0.3
        return F.cross_entropy(logits, torch.arange(n))
    if method == "mocov2plus":
        logits = torch.cat([(pred * target).sum(1, keepdim=True), pred @ queue], 1) / 0.3
        return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))
    if method == "simclr":
        z = F.normalize(torch.cat([pred, target]), dim=1)
        logits = (z @ z.T / 0.3).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, torch.arange(2 * n).roll(n))
    off = ~torch.eye(width, dtype=torch.bool)
    if method == "barlow_twins":
        a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in (pred, target))
        matrix = a.T @ b / n
        return 0.2 * ((matrix.diagonal() - 1).square().sum() + 0.03 * matrix[off].square().sum())
    total = 7 * (pred - target).square().mean()
    for x in (pred, target):
        centred = x - x.mean(0)
        total = total + 11 * F.relu(1 - (x.var(0) + 1e-4).sqrt()).mean()
        if method == "vicreg":
            total = total + 3 * (centred.T @ centred / (n - 1))[off].square().sum() / width
        else:
            unit = centred / centred.norm(dim=0, keepdim=True)
            total = total + 3 * (unit.T @ unit)[off].square().sum() / width**2
    return total


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reduction", ["pairs", "sum"])
def test_loss_longhand(method, reduction):
    """The whole objective written out from the model's outputs, with weights that show any mix-up."""
    options = {"local_weight": 0.7, "local_global_weight": 0.4, "positive_noise": 0.0, "reduction": reduction}
    model = build(f"logo_{method}", options)
    indexes, views, targets = batch(2)  # two images: the affinity's random partner is the other one
    twin = copy.deepcopy(model)
    queue = twin.queue.clone() if method in QUEUES else None
    total = model.training_step([indexes, views, targets], 0)

    online = [twin(x) for x in views]
    momentum = [twin.momentum_forward(x) for x in views[:2]] if hasattr(twin, "momentum_forward") else online
    key = "z" if method in SYMMETRIC else {"mocov2plus": "z", "mocov3": "q"}.get(method, "p")
    preds = [out[key] for out in online]
    keys = [out["k" if method == "mocov3" else "z"].detach() for out in momentum]
    if method.startswith("nn"):
        keys = [queue[(k @ queue.T).argmax(1)] for k in keys]

    def similarity(pred, j):
        return longhand(method, pred, keys[j], queue[j] if method == "mocov2plus" else None)

    scale = 2.0 if method in ("byol", "nnbyol", "mocov3") else 1.0
    global_global = (similarity(preds[0], 1) + similarity(preds[1], 0)) / 2
    local_global = sum(similarity(preds[i], j) for i in (2, 3) for j in (0, 1)) / 4
    weight = 0.4 * 4 / (2 + 0.4 * 4)
    if reduction == "pairs":
        pull = (1 - weight) * global_global + weight * local_global
    else:
        pull = global_global + 0.4 * 4 * local_global
    a, b = online[2]["z"].detach(), online[3]["z"].detach()
    f = twin.logo.affinity
    local_local = F.softplus(copy.deepcopy(f)(a, b)).mean()
    positive = (F.softplus(-f(a, b)).mean() + F.softplus(-f(b, a)).mean()) / 2
    negative = (F.softplus(f(a, b.flip(0))).mean() + F.softplus(f(b, a.flip(0))).mean()) / 2
    classes = sum(F.cross_entropy(online[i]["logits"], targets) for i in (0, 1)) / 2
    expected = scale * pull + 0.7 * local_local + positive + negative + classes
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", SYMMETRIC)
def test_symmetric_pull(method):
    """The global crops keep the method's gradient through both sides; local crops get theirs from fixed projections."""
    options = {"affinity": False, "reduction": "sum", "local_global_weight": 0.4}
    host, model = build(method), build(f"logo_{method}", options)
    indexes, views, targets = batch(6)
    total = model.training_step([indexes, views, targets], 0)
    total.backward()
    expected = host.training_step([indexes, views[:2], targets], 0)
    z = [host(view)["z"] for view in views]
    for local in z[2:]:
        for fixed in z[:2]:
            expected = expected + 0.4 * longhand(method, local, fixed.detach())
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(model), gradients(host)
    assert found.keys() == wanted.keys()
    found, wanted = (torch.cat([each[name].flatten() for name in sorted(each)]) for each in (found, wanted))
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def test_one_image_twice_in_a_batch():
    """NT-Xent takes copies of an image for positives, among local crops as in the method's own loss."""
    indexes, views, targets = batch(4)
    found = []
    for chosen in (indexes, torch.tensor([0, 0, 1, 1])):
        model = build("logo_simclr", {"affinity": False, "local_global_weight": 1.0})
        logged = {}
        model.log_dict = lambda metrics, logged=logged, **kwargs: logged.update(metrics)
        model.training_step([chosen, views, targets], 0)
        found.append(logged["train_local_global"])
    assert found[0] > found[1] + 0.1


def test_target_network_never_sees_local_crops():
    model = build("logo_byol")
    seen = []
    model.momentum_backbone.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    data = batch()
    model.training_step(data, 0)
    assert len(seen) == 2
    assert all(torch.equal(x, view) for x, view in zip(seen, data[1], strict=False))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("mocov2plus", *SYMMETRIC)])
def test_local_predictor(method):
    """Each predictor learns from its own crops, in the same optimizer groups, and starts as the method's."""
    found = {}
    for own in (False, True):
        model = build(f"logo_{method}", {"affinity": False, "reduction": "sum", "local_predictor": own})
        total = model.training_step(batch(), 0)
        total.backward()
        found[own] = model, total
    torch.testing.assert_close(found[True][1], found[False][1], rtol=0, atol=0)
    stock = build(method)
    indexes, views, targets = batch()
    stock.training_step([indexes, views[:2], targets], 0).backward()
    model = found[True][0]
    # Eq. 9 adds the local pairs to the method's own loss: whatever differed would come from local crops.
    for name, parameter in stock.predictor.named_parameters():
        torch.testing.assert_close(model.predictor.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6)
    last = list(model.logo_local_predictor.parameters())[-1]
    assert last.grad.abs().max() > 0
    groups, without = ({g["name"]: g for g in m.learnable_params} for m in (model, stock))
    assert groups.keys() == without.keys()
    assert groups["predictor"].get("static_lr") == without["predictor"].get("static_lr")
    both = [*model.predictor.parameters(), *model.logo_local_predictor.parameters()]
    assert [id(p) for p in groups["predictor"]["params"]] == [id(p) for p in both]
    before = last.detach().clone()
    optimizer = model.configure_optimizers()
    optimizer = optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer[0][0]
    optimizer.step()
    assert not torch.equal(last, before)


def test_local_predictor_needs_a_predictor():
    with pytest.raises(ValueError, match=r"logo\.local_predictor copies .* logo_mocov2plus has none"):
        build("logo_mocov2plus", {"local_predictor": True})


def test_the_affinity_has_a_group_of_its_own():
    group = build("logo_byol").configure_optimizers().param_groups[-1]
    assert (group["name"], group["weight_decay"], group["lr"]) == ("affinity", 0, 0.1)


@pytest.mark.parametrize("monitor", [False, True])
def test_monitor_option(monitor):
    model = build("logo_byol", {"monitor": monitor})
    assert [type(callback) for callback in model.configure_callbacks()] == [LoGoMonitor] * monitor
    assert model.logo_terms is None
    model.training_step(batch(), 0)
    assert diagnose(model.logo_local_proj, model.logo.affinity)["embedding_std"] > 0
    assert not model.logo_terms.total.requires_grad
    assert not any(z.requires_grad for z in model.logo_local_proj)


@pytest.mark.parametrize("affinity", [False, "cosine"])
def test_affinity_group_is_absent_without_affinity(affinity):
    names = [group["name"] for group in build("logo_byol", {"affinity": affinity}).learnable_params]
    assert names == ["backbone", "classifier", "projector", "predictor"]


def test_the_cosine_is_repelled():
    model = build("logo_mocov2plus", {"affinity": "cosine"})
    model.logo.anneal(0.0)
    model.training_step(batch(), 0).backward()
    torch.testing.assert_close(model.logo_terms.local_local, F.cosine_similarity(*model.logo_local_proj).mean())
    assert (model.logo_terms.affinity, model.logo.gradient_ratio) == (0, 0.3)
    assert model.state_dict().keys() == build("mocov2plus", None).state_dict().keys()


@pytest.mark.parametrize("method", HIDDEN_PROJECTION)
def test_nothing_is_repelled_by_default_where_no_ratio_can_be_taken(method):
    methods, _ = import_solo()
    for logo in (None, {"local_weight": 0.5}):
        model = methods.METHODS[f"logo_{method}"](config(f"logo_{method}", logo))
        model.log_dict = model.log = lambda *args, **kwargs: None
        if logo:
            with pytest.raises(RuntimeError, match=r"model\.logo\.anneal"):
                model.training_step(batch(), 0)
            model.logo.anneal(0.0)
        model.training_step(batch(), 0).backward()
        assert (model.logo_terms.local_local != 0) == bool(logo)
        assert model.logo_terms.local_global != 0


@pytest.mark.parametrize("method", METHODS)
def test_wrap_gives_the_registered_class_and_it_pickles(method):
    methods, _ = import_solo()
    logo = methods.METHODS[f"logo_{method}"]
    assert wrap(methods.METHODS[method]) is logo
    assert wrap(logo) is logo
    assert pickle.loads(pickle.dumps(logo)) is logo
    model = build(f"logo_{method}")
    del model.log_dict, model.log
    assert pickle.loads(pickle.dumps(model)).training_step is not None


def test_wrap_own_methods():
    methods, _ = import_solo()

    class Deeper(methods.BYOL):
        pass

    class Mine(methods.base.BaseMethod):
        def forward(self, x):
            out = super().forward(x)
            return out | {"pooled": out["feats"][:, :8]}

        def training_step(self, batch, batch_idx):
            out = super().training_step(batch, batch_idx)
            a, b = out["pooled"]
            return 3 * (F.mse_loss(a, b.detach()) + F.mse_loss(b, a.detach())) / 2 + out["loss"]

    class Silent(Mine):
        def training_step(self, batch, batch_idx):
            return torch.zeros(())

    assert wrap(Deeper).outputs == wrap(methods.BYOL).outputs
    with pytest.raises(TypeError, match=r"tell wrap.. its pred, target, similarity"):
        wrap(Mine)
    with pytest.raises(TypeError, match="unexpected keyword"):
        wrap(methods.BYOL, local_weight=1.0)
    with pytest.raises(TypeError, match="solo-learn method class"):
        wrap(build("byol"))

    logo = wrap(Mine, pred="pooled", target="pooled", scale=3.0, similarity=F.mse_loss)
    model = logo(config("mine", {"affinity": False}))
    logged = {}
    model.log_dict = lambda metrics, **kwargs: logged.update(metrics)
    data = batch()
    total = model.training_step(data, 0)
    outs = [model(x) for x in data[1]]
    pooled = [out["pooled"] for out in outs]
    expected = F.mse_loss(pooled[0], pooled[1])
    local = sum(F.mse_loss(pooled[i], pooled[j]) for i in (2, 3) for j in (0, 1)) / 4
    torch.testing.assert_close(logged["train_global_global"], expected)
    classes = sum(F.cross_entropy(out["logits"], data[2]) for out in outs[:2]) / 2
    torch.testing.assert_close(total, 3 * (expected / 3 + local * 2 / 3) + classes)

    with pytest.raises(ValueError, match='proj="nothing" is not an output'):
        wrap(Mine, pred="pooled", target="pooled", proj="nothing", similarity=F.mse_loss)(config("mine"))
    silent = wrap(Silent, pred="pooled", target="pooled", similarity=F.mse_loss)(config("mine"))
    with pytest.raises(TypeError, match=r"calls super.*Silent's does not call it"):
        silent.training_step(batch(), 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"similarity": lambda pred, target: -F.cosine_similarity(pred, target, dim=-1).mean()},
            "LoGoSimCLR's own loss",
        ),
        ({"scale": 2.0}, r"= scale 2 \* "),
    ],
)
def test_similarity_is_checked_in_the_first_step(given, message):
    """Another loss than the method's would pull local crops by another measure than global ones."""
    methods, _ = import_solo()
    model = wrap(methods.SimCLR, **given)(config("logo_simclr"))
    model.log_dict = model.log = lambda *args, **kwargs: None
    with pytest.raises(TypeError, match=rf"on the global crops similarity gives .*{message}.*as similarity="):
        model.training_step(batch(), 0)


def test_subclass_with_a_loss_of_its_own():
    methods, _ = import_solo()

    class Squared(methods.BYOL):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) ** 2

    class More(methods.SimSiam):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + 1

    for method in (Squared, More):
        model = wrap(method)(config("mine"))
        model.log_dict = model.log = lambda *args, **kwargs: None
        with pytest.raises(TypeError, match=rf"LoGo{method.__name__}'s own loss is .*with further terms"):
            model.training_step(batch(), 0)


OFF = {"affinity": False, "local_global_weight": 0, "local_running_stats": False}


def of(cls, method="byol", logo=None):
    """A model of a user's class: stock, or with LoGo's options wrapped."""
    cfg = config(
        method if logo is None else f"logo_{method}", logo, small=0 if logo is None else 2, name="resnet_small"
    )
    torch.manual_seed(0)
    model = (cls if logo is None else wrap(cls))(cfg)
    model.log_dict = model.log = lambda *args, **kwargs: None
    return model


@pytest.mark.parametrize("share", [0.1, 0.0, None])
def test_the_class_loss_counts_as_often_as_the_method_counts_it(share):
    """A subclass may train the backbone with labels, by a weight of its own, or leave them out."""
    methods, _ = import_solo()
    from solo.losses.byol import byol_loss_func

    class Labelled(methods.BYOL):
        def forward(self, x):
            out = super().forward(x)
            return out | {"logits": self.classifier(out["feats"])}

        def training_step(self, batch, batch_idx):
            out = super(methods.BYOL, self).training_step(batch, batch_idx)
            pairs = ((out["p"][i], out["momentum_z"][1 - i]) for i in (0, 1))
            similar = sum(byol_loss_func(*pair) for pair in pairs)
            return similar if share is None else similar + share * out["loss"]

    models = of(Labelled), of(Labelled, logo=OFF)
    losses = [m.training_step(batch(crops=n), 0) for m, n in zip(models, (2, 4), strict=True)]
    assert torch.equal(*losses)
    for found in losses:
        found.backward()
    expected, found = map(gradients, models)
    assert all(torch.equal(gradient, found[name]) for name, gradient in expected.items())


@pytest.mark.filterwarnings("ignore")  # Lightning's
def test_manual_optimisation(tmp_path):
    """Of the wrapped method it is refused: Lightning ignores what its step returns. Above LoGo it trains."""
    methods, _ = import_solo()

    def manually(base):
        class Manual(base):
            def __init__(self, cfg):
                super().__init__(cfg)
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                loss = super().training_step(batch, batch_idx)
                self.optimizers().zero_grad()
                self.manual_backward(loss)
                self.optimizers().step()

        return Manual

    with pytest.raises(TypeError, match="optimises manually"):
        fit(of(manually(methods.BYOL), logo={}), tmp_path)
    model = of(manually(wrap(methods.BYOL)), logo={"affinity": "learned"})
    before = copy.deepcopy(model.logo.affinity)
    fit(model, tmp_path)
    assert not torch.equal(before.mlp[0].weight, model.logo.affinity.mlp[0].weight)


@pytest.mark.filterwarnings("ignore")  # Lightning's
@pytest.mark.parametrize("override", ["configure_optimizers", "learnable_params"])
def test_what_logo_adds_is_trained_by_an_optimizer_of_ones_own(override, tmp_path):
    methods, _ = import_solo()

    def groups(model):
        parts = (model.backbone, model.projector, model.predictor, model.classifier)
        return [{"name": "all", "params": [p for part in parts for p in part.parameters()]}]

    own = {
        "configure_optimizers": lambda self: torch.optim.SGD(groups(self), lr=0.1),
        "learnable_params": property(groups),
    }
    base = methods.BYOL if override == "configure_optimizers" else wrap(methods.BYOL)
    cls = type("Own", (base,), {override: own[override]})
    model = of(cls, logo={"affinity": "learned", "local_predictor": True})
    before = copy.deepcopy([model.logo, model.logo_local_predictor])
    fit(model, tmp_path)
    for part, old in zip((model.logo, model.logo_local_predictor), before, strict=True):
        assert all(
            not torch.equal(a, b) for a, b in zip(part.parameters(), old.parameters(), strict=True) if a.ndim > 1
        )


@pytest.mark.filterwarnings("ignore")  # Lightning's
def test_a_further_term_that_begins_later_is_seen(tmp_path):
    methods, _ = import_solo()

    class Ramp(methods.BYOL):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.current_epoch * self.predictor[0].weight.norm()

    with pytest.raises(TypeError, match="on the global crops similarity gives"):
        fit(of(Ramp, logo={}), tmp_path)


def test_neighbours_looked_up_after_the_step_are_no_targets():
    methods, _ = import_solo()

    class Curious(methods.NNBYOL):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.find_nn(F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1))
            return loss

    terms = []
    for cls in (methods.NNBYOL, Curious):
        model = of(cls, "nnbyol", logo={"affinity": False})
        model.training_step(batch(), 0)
        terms.append(model.logo_terms.local_global)
    assert torch.equal(*terms)


def test_what_a_step_may_give():
    methods, _ = import_solo()

    def giving(change):
        class Giving(methods.BYOL):
            def training_step(self, batch, batch_idx):
                return change(super().training_step(batch, batch_idx))

        return Giving

    plain, packed, left_out = (
        of(giving(change), logo={"affinity": False}).training_step(batch(), 0)
        for change in (lambda loss: loss, lambda loss: {"loss": loss, "more": 1}, lambda _: None)
    )
    assert torch.equal(packed["loss"], plain)
    assert (packed["more"], left_out) == (1, None)


def test_unusual_subclasses():
    """Five channels, a batch of four parts, an argument more, and a temperature that the step sets."""
    methods, _ = import_solo()

    class Unusual(methods.MoCoV3):
        def __init__(self, cfg, start=1.0):
            super().__init__(cfg)
            self.start = start
            for network in (self.backbone, self.momentum_backbone):
                network.conv1 = torch.nn.Conv2d(5, 64, 7, 2, 3, bias=False)

        def training_step(self, batch, batch_idx):
            *usual, heat = batch
            self.temperature = float(heat)
            return super().training_step(usual, batch_idx)

    cfg = config("logo_mocov3", {"affinity": False}, name="resnet_small")
    model = wrap(Unusual)(cfg, start=2.0)
    model.log_dict = model.log = lambda *args, **kwargs: None
    data = [torch.arange(4), [torch.randn(4, 5, 32, 32) for _ in range(4)], torch.arange(4), torch.tensor(0.4)]
    assert model.training_step(data, 0).isfinite()
    assert (model.start, model.temperature) == (2.0, pytest.approx(0.4))


def test_a_copy_of_a_local_subclass_keeps_its_class():
    methods, _ = import_solo()

    class Deeper(wrap(methods.BYOL)):
        def forward(self, x):
            return super().forward(x) | {"deeper": True}

    model = Deeper(config("logo_byol"))
    assert type(copy.deepcopy(model)) is Deeper
    with pytest.raises(Exception, match="Deeper"):  # of no module: said, not replaced by its base
        pickle.dumps(model)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_and_channels_last(method):
    ratio = {} if method in HIDDEN_PROJECTION else {"gradient_ratio": 0.1}
    model = build(f"logo_{method}", ratio).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(batch(), 0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((method, torch.bfloat16) for method in METHODS),
        *((method, torch.float64) for method in METHODS),
        *((method, torch.float16) for method in ("byol", "mocov2plus", "vicreg")),  # slow on a CPU
    ],
)
def test_whole_model_in_another_precision(method, dtype):
    """LoGo's pairs are in float32 where the method's own are in half precision."""
    # The affinity takes any precision by itself: tests of the core.
    model = build(f"logo_{method}", {"affinity": False, "local_global_weight": 0.5}).to(dtype)
    indexes, views, targets = batch()
    torch.set_default_dtype(dtype)  # as Trainer(precision="bf16-true") has it during a step
    try:
        loss = model.training_step([indexes, [view.to(dtype) for view in views], targets], 0)
    finally:
        torch.set_default_dtype(torch.float32)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


@pytest.mark.parametrize("method", ["byol", "mocov2plus"])
def test_whole_objective_in_bfloat16(method):
    model = build(f"logo_{method}", {"gradient_ratio": 0.1}).to(torch.bfloat16)
    indexes, views, targets = batch()
    model.training_step([indexes, [view.bfloat16() for view in views], targets], 0).backward()
    assert all(torch.isfinite(value).all() for value in (*gradients(model).values(), *model.logo_terms))


def test_built_in_double_precision():
    methods, _ = import_solo()
    torch.set_default_dtype(torch.float64)
    try:
        model = methods.METHODS["logo_byol"](config("logo_byol", {"affinity": "learned"}))
        assert next(model.logo.parameters()).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("method", ["byol", "simclr"])
def test_without_gradients_the_loss_is_the_methods_own(method):
    host, model = build(method), build(f"logo_{method}", {"gradient_ratio": 0.1})
    indexes, views, targets = batch()
    with torch.no_grad():
        expected = host.training_step([indexes, views[:2], targets], 0)
        assert torch.equal(model.training_step([indexes, views, targets], 0), expected)


def fit(model, folder, *callbacks):
    """Three epochs of two steps."""
    from lightning.pytorch import Trainer

    indexes, views, targets = batch(8)
    loader = torch.utils.data.DataLoader([(indexes[i], [v[i] for v in views], targets[i]) for i in range(8)], 4)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(model, loader)


@pytest.mark.filterwarnings("ignore")  # Lightning's
def test_stochastic_weight_averaging(tmp_path):
    """Its last epoch recomputes BatchNorm's statistics, with a momentum of None."""
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    methods, _ = import_solo()
    model = methods.METHODS["logo_byol"](config("logo_byol"))
    fit(model, tmp_path, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1))
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)} == {0.1}


@pytest.mark.filterwarnings("ignore")  # Lightning's
@pytest.mark.parametrize("logo", [None, {"local_weight": 0.5}, {"local_weight": 0.5, "anneal_repulsion": False}])
def test_the_repulsion_follows_the_trainer(logo, tmp_path):
    """It falls along half a cosine, step by step; with a fixed weight the loss shows it."""
    methods, _ = import_solo()
    from lightning.pytorch import Callback

    model = methods.METHODS["logo_byol"](config("logo_byol", logo))
    expected = [1.0 if "anneal_repulsion" in (logo or {}) else (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    found = []

    class Record(Callback):
        def on_train_batch_end(self, *_):
            total, global_global, local_global, local_local, _ = model.logo_terms
            pull = 2 * (2 * global_global + 4 * local_global) / 6
            found.append(float((total - pull) / (0.5 * local_local) if logo else model.logo._strength))

    fit(model, tmp_path, Record())
    assert found == pytest.approx(expected, abs=1e-4)


def test_local_crops_move_running_statistics_and_nothing_else():
    """Why val_loss differs from stock even with LoGo off: eval mode reads statistics that saw four crops, not two."""
    options = {"affinity": False, "local_global_weight": 0}
    host, model = build("byol"), build("logo_byol", options)
    kept = build("logo_byol", options | {"local_running_stats": False})
    indexes, views, targets = batch()
    for each in (host, model, kept):
        each.training_step([indexes, views if each is not host else views[:2], targets], 0).backward()
    buffers = dict(host.named_buffers())
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, buffers[name])}
    online = {n for n in buffers if n.startswith(("backbone.", "projector.", "predictor.")) and "running_" in n}
    assert {name for name in moved if "running_" in name} == online
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in kept.named_buffers())
    for each in (host, model, kept):
        each.eval()
    expected = host(views[0])["feats"]
    assert not torch.allclose(model(views[0])["feats"], expected)
    assert torch.equal(kept(views[0])["feats"], expected)


@pytest.mark.parametrize("method", ["logo_byol", "logo_simclr"])
def test_checkpointed_local_crops_train_the_same_model(method):
    """checkpoint_local_crops changes what is kept in memory, and neither gradients nor buffers."""
    plain, cheap = (build(method, {"checkpoint_local_crops": c}) for c in (False, True))
    for each in (plain, cheap):
        torch.manual_seed(0)
        each.training_step(batch(), 0).backward()
    for (name, expected), found in zip(plain.named_parameters(), cheap.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, msg=lambda m, n=name: f"{n}: {m}")
    for expected, found in zip(plain.buffers(), cheap.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        (("byol", None), ("logo_byol", {}), "made without LoGo's affinity or local predictor, and this run has added"),
        (("logo_byol", {}), ("byol", None), "made with LoGo, and this run is without its affinity"),
        (("logo_byol", {}), ("logo_byol", {"affinity": False}), "made with LoGo, and this run is without its affinity"),
        (
            ("logo_byol", {}),
            ("logo_byol", {"affinity": "cosine"}),
            "made with LoGo, and this run is without its affinity",
        ),
        (
            ("logo_byol", {"local_predictor": True}),
            ("logo_byol", {"local_predictor": True, "affinity": "cosine"}),
            r"in the checkpoint method_kwargs\.logo\.affinity=learned, in this run .*\.affinity=cosine or false",
        ),
        (
            ("logo_byol", {}),
            ("logo_byol", {"affinity_hidden_dim": 64, "affinity_norm": "layer"}),
            r"in the checkpoint method_kwargs\.logo\.affinity_hidden_dim=256, .*\.affinity_norm=batch, "
            r"in this run method_kwargs\.logo\.affinity_hidden_dim=64, .*\.affinity_norm=layer",
        ),
        (
            ("logo_byol", {}),
            ("logo_byol", {"local_predictor": True}),
            r"local_predictor=false, in this run method_kwargs\.logo\.local_predictor=true",
        ),
    ],
)
def test_checkpoints_of_other_settings(saved, here, message):
    checkpoint = {"state_dict": build(*saved).state_dict()}
    model = build(*here)
    with pytest.raises(RuntimeError, match=rf"{message}.*args\.json beside the checkpoint"):
        model.on_load_checkpoint(checkpoint)
    # What the message says does load.
    weights = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("logo")}
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys
    assert all(name.startswith("logo") for name in found.missing_keys)


def test_checkpoints_of_the_same_settings():
    given = [{}, {"affinity": False}, {"affinity": "cosine"}]
    for method, logo in (("byol", None), *(("logo_byol", each) for each in given)):
        checkpoint = {"state_dict": build(method, logo).state_dict()}
        build(method, None if logo is None else logo | {"reduction": "sum"}).on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("backbone", "key"), [("vit_tiny", "dynamic_img_size"), ("swin_tiny", "strict_img_size"), ("poolformer_s12", None)]
)
def test_backbones_at_two_sizes(backbone, key):
    """Runs with the key that the error message names."""
    _, adapter = import_solo()
    sizes = [{"crop_size": 224}, {"crop_size": 96}]
    method = adapter.LoGoMoCoV3 if backbone == "vit_tiny" else adapter.LoGoBYOL
    cfg = config("logo_mocov3" if backbone == "vit_tiny" else "logo_byol", name=backbone)
    cfg.augmentations = sizes
    cfg.backbone.kwargs = {}
    if key is not None:
        with pytest.raises(ValueError, match=rf"96 x 96 pixels: .*\+backbone\.kwargs\.{key}="):
            method(copy.deepcopy(cfg))
        cfg.backbone.kwargs[key] = key == "dynamic_img_size"
    model = method(cfg)
    model.log_dict = lambda *args, **kwargs: None
    model.logo.anneal(0.0)
    assert model.training
    assert all(module.training for module in model.modules())
    indexes, views, targets = batch(2, size=224)
    views[2:] = batch(2, size=96)[1][2:]
    assert torch.isfinite(model.training_step([indexes, views, targets], 0))
    if backbone == "vit_tiny":  # solo-learn picks its MoCo v3 ViT by the method's name
        assert type(model.backbone).__name__ == "VisionTransformerMoCo"


def test_online_knn():
    """solo-learn's k-NN passes an argument that torchmetrics 0.12 dropped."""
    import_solo()
    from solo.utils.knn import WeightedKNNClassifier

    knn = WeightedKNNClassifier(k=1)
    features, targets = torch.eye(6), torch.arange(6)
    knn(train_features=features, train_targets=targets)
    knn(test_features=features, test_targets=targets)
    assert knn.compute() == (100.0, 100.0)


def test_scripts_of_the_clone(tmp_path):
    """Trains, resumes, evaluates: the commands of docs/solo-learn.md, on tiles of two photographs."""
    from sklearn.datasets import load_sample_images
    from torchvision.transforms.functional import to_pil_image

    data = tmp_path / "data"
    images = load_sample_images().images
    for label in range(5):  # main_linear.py reports the top 5
        (data / str(label)).mkdir(parents=True)
        for i in range(4):
            tile = images[i % 2][i * 80 : i * 80 + 64, label * 100 : label * 100 + 64]
            to_pil_image(tile).save(data / str(label) / f"{i}.png")

    def run(*command: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    common = [
        *("accelerator=cpu", "devices='1'", "strategy=auto", "precision=32", "sync_batchnorm=False"),
        *("data.format=image_folder", "wandb.enabled=False", "data.dataset=custom", "data.num_workers=0"),
        *(f"data.train_path={data}", f"data.val_path={data}", "optimizer.batch_size=4", "checkpoint.dir=ck"),
        *("auto_resume.enabled=False", "+enable_progress_bar=False", "+num_sanity_val_steps=0"),
    ]
    pretrain = [
        *(f"{ROOT}/main_pretrain.py", "--config-path", f"{ROOT}/scripts/pretrain/cifar", "--config-name", "simsiam"),
        *("method=logo_simsiam", "augmentations=logo_cifar", "+method_kwargs.logo.local_predictor=true", *common),
        *("method_kwargs.proj_hidden_dim=16", "method_kwargs.proj_output_dim=16", "method_kwargs.pred_hidden_dim=16"),
    ]
    # Without W&B solo-learn leaves the logger to Lightning: TensorBoard, or CSV files.
    run(*pretrain, "max_epochs=1", "+knn_eval.enabled=True", "+method_kwargs.logo.monitor=true", "+log_every_n_steps=2")
    logged = b"".join(path.read_bytes() for path in tmp_path.glob("lightning_logs/version_0/*") if path.is_file())
    assert all(f"logo/{name}".encode() in logged for name in diagnose(torch.randn(2, 4, 3), Affinity(3)))
    assert b"logo/crops" in logged or list(tmp_path.glob("lightning_logs/version_0/logo_crops/epoch_0000.png"))
    (first,) = tmp_path.glob("ck/logo_simsiam/*/*-logo-affcosine-lpred-ratio0.1-*ep=0.ckpt")
    run(*pretrain, "max_epochs=2", f"+resume_from_checkpoint='{first}'")
    (second,) = tmp_path.glob("ck/logo_simsiam/*/*ep=1.ckpt")
    # Lightning takes the batch size from the tensors of the batch, and warns where they differ in length.
    fast = ["-W", "error:Trying to infer", *pretrain, "max_epochs=1", "data.num_workers=1", "optimizer.batch_size=5"]
    fast += [f"+method_kwargs.logo.{o}" for o in ("fast_crops=augment", "weigh_overlap=true", "local_placement=apart")]
    run(*fast)
    assert list(tmp_path.glob("ck/logo_simsiam/*/*-fastaugment-iou-apart-lpred-*ep=0.ckpt"))
    assert torch.load(second)["global_step"] == 2 * torch.load(first)["global_step"] == 10
    linear = [f"{ROOT}/main_linear.py", "--config-path", f"{ROOT}/scripts/linear/imagenet-100", "--config-name"]
    run(*linear, "simsiam", *common, "max_epochs=1", f"pretrained_feature_extractor='{second}'")
    assert list(tmp_path.glob("ck/linear/*/*.ckpt"))
    knn = ["-m", "logo_plugin.solo", f"{ROOT}/main_knn.py", "--dataset", "custom", "--data_format", "image_folder"]
    knn += ["--train_data_path", str(data), "--val_data_path", str(data), "--num_workers", "0", "--batch_size", "4"]
    knn += ["--pretrained_checkpoint_dir", str(second.parent), "--k", "1", "--temperature", "0.1"]
    assert "Result: acc@1=" in run(*knn, "--distance_function", "cosine", "--feature_type", "backbone")
    dirty = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True, check=True)
    assert dirty.stdout == ""


def test_overlap_weighs_the_repulsion():
    """Local crops at one place are not pushed apart; far apart they are, as without boxes."""
    *stock, targets = batch()
    together, apart = torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[20.0, 20, 29, 29]])
    found = []
    for boxes in (None, [together, together], [together, apart]):
        options = {"local_weight": 1.0} | ({} if boxes is None else {"fast_crops": True, "weigh_overlap": True})
        model = build("logo_byol", options)
        logged = {}
        model.log_dict = lambda metrics, logged=logged, **kwargs: logged.update(metrics)
        crops = [] if boxes is None else [torch.cat([together, together, *boxes]).expand(4, 4, 4)]
        model.training_step([*stock, targets, *crops], 0)
        found.append(logged["train_local_local"])
    assert found[1] == 0
    torch.testing.assert_close(found[2], found[0])
