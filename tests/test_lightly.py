"""wrap() for models in lightly's styles, on lightly's own heads, losses and Lightning's Trainer."""

import contextvars
import copy
import pickle
from dataclasses import replace
from functools import partial

import hosts
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from adapter_contract import CHECKS, AdapterCase, check_device, check_two_ranks
from hosts import wrap_learned as wrap
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from photos import tiles
from torch import nn
from torch.utils.data import DataLoader

from logo_plugin import Affinity, LoGoLoss, MultiCropCollate
from logo_plugin.crops import crop_overlap

pytestmark = [
    # Lightning's advice on data loaders and loggers, and what it does to torch, is not what is tested here.
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Memory bank size:UserWarning"),
    pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning"),  # DCLWLoss
    pytest.mark.filterwarnings("ignore:(The high-level building block|SymNegCosine):Warning"),
]
STYLES = pytest.mark.parametrize("cls", hosts.LIGHTNING.values(), ids=hosts.LIGHTNING)
CIFAR = MultiCropCollate.cifar10()


def batch(n=6, parts=3, locals_=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(n, 3, 32, 32, generator=generator) for _ in range(2)]
    views += [torch.randn(n, 3, 24, 24, generator=generator) for _ in range(locals_)]
    return [views, torch.arange(n) % 4, [f"{i}.jpg" for i in range(n)]][:parts]


def globals_only(whole):
    return [whole[0][:2], *whole[1:]]


def loss_of(out):
    return out["loss"] if isinstance(out, dict) else out


def step(model, whole):
    """One training step without a Trainer: loss, gradients by name, memory bank."""
    torch.manual_seed(0)
    loss = loss_of(model.training_step(whole, 0))
    loss.backward()
    bank = model.criterion.memory_bank.bank.clone() if hasattr(model.criterion, "memory_bank") else None
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, bank


def trainer(folder, epochs=2, **options):
    options = {"logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip


def loader(n=16, collate=CIFAR):
    return DataLoader(tiles(n), batch_size=8, drop_last=True, collate_fn=collate)


def build(cls, **options):
    return wrap(cls(), **options)


def lightning_loss(model, views):
    targets = torch.arange(6, device=views[0].device) % 4
    return loss_of(model.training_step([views, targets, ["a.jpg"] * 6], 0))


def lightning_optimizer(model):
    configured = model.configure_optimizers()
    return configured[0][0] if isinstance(configured, tuple) else configured


def plain_host(method):
    cls, make_criterion = (hosts.PLAIN | hosts.SAID)[method]
    model = cls()
    model.criterion = make_criterion()  # with the model, so that the memory bank travels with it
    return model


def plain_build(method, **options):
    model = plain_host(method)
    step = {"step": hosts.own_step} if method in hosts.SAID else {}
    return wrap(model, criterion=model.criterion, **step, **options)


def plain_loss(model, views):
    return model(views) if hasattr(model, "logo") else model.host_loss(model.criterion, *views)


CONTRACT = {
    name: AdapterCase(host=cls, build=partial(build, cls), loss=lightning_loss, optimizer=lightning_optimizer)
    for name, cls in hosts.LIGHTNING.items()
} | {
    f"plain {name}": AdapterCase(host=partial(plain_host, name), build=partial(plain_build, name), loss=plain_loss)
    for name in hosts.PLAIN | hosts.SAID
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CONTRACT.values(), ids=CONTRACT)
def test_contract(case, check):
    check(case)


def test_contract_on_two_ranks(tmp_path):
    own_predictor = replace(CONTRACT["plain simsiam"], build=partial(plain_build, "simsiam", local_predictor=True))
    check_two_ranks(CONTRACT | {"local predictor": own_predictor}, tmp_path)


def test_contract_on_a_device():
    check_device(CONTRACT)


class TestTerms:
    def test_byol_by_hand(self):
        model = hosts.BYOL()
        by_hand = copy.deepcopy(model)
        wrapped = wrap(model, local_weight=0.5, positive_noise=0.0)
        views = batch()[0]
        torch.manual_seed(0)
        total = wrapped.training_step(batch(), 0)

        by_hand.update()
        preds = [by_hand(view) for view in views]
        targets = [by_hand.forward_momentum(view) for view in views[:2]]
        projections = [by_hand.projection_head(by_hand.backbone(view).flatten(1)) for view in views[2:]]
        cos = F.cosine_similarity
        gg = [-cos(preds[0], targets[1]).mean(), -cos(preds[1], targets[0]).mean()]
        lg = [-cos(p, t).mean() for p in preds[2:] for t in targets]
        f = wrapped.logo.affinity
        torch.testing.assert_close(wrapped.logo_terms.global_global, sum(gg) / 2)
        torch.testing.assert_close(wrapped.logo_terms.local_global, sum(lg) / 4)
        torch.testing.assert_close(wrapped.logo_terms.local_local, F.softplus(f(*projections)).mean())
        terms = wrapped.logo_terms
        torch.testing.assert_close(total, sum(gg + lg) / 6 + 0.5 * terms.local_local + terms.affinity)

    def test_doubled_loss_doubles_the_local_pairs(self):
        """benchmarks/imagenet's BYOL is 2 s + 2 s, four times the mean pair, plus a classifier's loss."""
        model = hosts.BenchmarkBYOL()
        host = loss_of(copy.deepcopy(model).training_step(globals_only(batch()), 0)).detach()
        wrapped = wrap(model, affinity=None)
        total = wrapped.training_step(batch(), 0)
        terms = wrapped.logo_terms
        pull = (2 * terms.global_global + 4 * terms.local_global) / 6
        torch.testing.assert_close(total, host - 4 * terms.global_global + 4 * pull)

    @pytest.mark.parametrize("symmetric", [False, True])
    def test_moco_negatives_are_the_bank_before_this_step(self, symmetric):
        model = hosts.MoCo(symmetric=symmetric)
        by_hand = copy.deepcopy(model)
        wrapped = wrap(model)
        wrapped.training_step(batch(), 0)

        by_hand.update()
        bank = by_hand.criterion.memory_bank.bank
        views = batch()[0]
        query = F.normalize(by_hand(views[0]), dim=1)
        queries = [F.normalize(by_hand(view), dim=1) for view in views[2:]]
        keys = [F.normalize(by_hand.forward_momentum(view), dim=1) for view in views[1::-1]]
        values = []
        for local in queries:
            for key in keys if symmetric else keys[:1]:
                logits = torch.cat([(local * key).sum(1, keepdim=True), local @ bank.T], 1) / 0.1
                values.append(-logits.log_softmax(1)[:, 0].mean())
        torch.testing.assert_close(wrapped.logo_terms.local_global, sum(values) / len(values))
        if not symmetric:
            logits = torch.cat([(query * keys[0]).sum(1, keepdim=True), query @ bank.T], 1) / 0.1
            torch.testing.assert_close(wrapped.logo_terms.global_global, -logits.log_softmax(1)[:, 0].mean())

    def test_memory_bank_of_unknown_width(self):
        model = hosts.TutorialMoCo()
        try:
            model.criterion = NTXentLoss(memory_bank_size=64)
        except ValueError as error:
            pytest.skip(f"lightly 1.6: {error}")
        wrapped = wrap(model)
        for _ in range(2):
            assert wrapped.training_step(batch(), 0).isfinite()

    def test_explicit_targets(self):
        """target= gives MoCo's local crops both keys, though the host compares with one."""
        wrapped = wrap(hosts.MoCo(), target="forward_momentum")
        seen = []
        extend = wrapped.logo.extend
        wrapped.logo.extend = lambda *args, **kwargs: seen.append(kwargs) or extend(*args, **kwargs)
        wrapped.training_step(batch(), 0)
        assert len(seen[0]["global_target"]) == 2
        assert not any(target.requires_grad for target in seen[0]["global_target"])

    @pytest.mark.parametrize("cls", [hosts.BYOL, hosts.MoCo, hosts.SimSiam])
    def test_more_local_crops_and_one_batch(self, cls):
        for options in ({}, {"concat_local_crops": True}):
            wrapped = wrap(cls(), **options)
            loss_of(wrapped.training_step(batch(locals_=4), 0)).backward()
            assert wrapped.backbone[0].weight.grad.isfinite().all()

    def test_one_batch_differs_by_batch_norm_only(self):
        model = hosts.BYOL()
        for fixed in (False, True):
            for layer in model.modules():
                if fixed and isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()
            first, second = (
                wrap(copy.deepcopy(model), affinity=None, concat_local_crops=concat).training_step(batch(), 0)
                for concat in (False, True)
            )
            assert torch.allclose(first, second, rtol=1e-5) == fixed


def test_presets():
    for model in (wrap(hosts.BYOL(), preset="paper"), wrap(hosts.BYOL, preset="paper")()):
        assert model.logo.extra_repr() == LoGoLoss.paper(affinity=None).extra_repr()
    other = wrap(hosts.BYOL(), preset="release", local_weight=0.5)
    assert other.logo.extra_repr() == LoGoLoss.release(affinity=None, local_weight=0.5).extra_repr()
    loss_of(other.training_step(batch(), 0)).backward()


class HalfCosine(NegativeCosineSimilarity):
    def forward(self, x0, x1):
        return super().forward(x0, x1) / 2


class TestCosine:
    """lightly's own class is known, and all pairs are taken at once; what only looks like it is called pair by pair."""

    @pytest.mark.parametrize(
        ("criterion", "factor"),
        [(NegativeCosineSimilarity(), 1.0), (NegativeCosineSimilarity(eps=1e-6), 1.0), (HalfCosine(), 0.5)],
    )
    def test_local_global(self, criterion, factor):
        model = hosts.BYOL()
        model.criterion = criterion
        model = wrap(model, affinity=None)
        model.training_step(batch(), 0)  # in the first step LoGo looks at more
        seen = []
        model.prediction_head.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
        targets = []
        model.projection_head_momentum.register_forward_hook(lambda _, args, out: targets.append(out.detach()))
        model.training_step(batch(), 0)
        local = torch.cat(seen[2:]).split(6)
        expected = torch.stack([-F.cosine_similarity(p, t).mean() for p in local for t in targets]).mean()
        torch.testing.assert_close(model.logo_terms.local_global, factor * expected)


class TestOverlap:
    """Repulsion weighed by crop overlap, with the boxes that the collate gives."""

    def test_boxes_reach_the_loss(self, tmp_path):
        collate = MultiCropCollate.cifar10(return_boxes=True)
        whole = collate(tiles(8))
        overlap = crop_overlap(whole[-1].boxes[2:])
        model = wrap(hosts.TutorialMoCo(), weigh_overlap=True)  # unpacks its batch: no boxes for it
        reference = wrap(hosts.TutorialMoCo())
        reference.load_state_dict(model.state_dict())
        seen = []
        extend = model.logo.extend
        model.logo.extend = lambda *args, **kwargs: seen.append(kwargs["local_overlap"]) or extend(*args, **kwargs)
        model.training_step(whole, 0)
        assert torch.equal(seen[0], overlap)
        assert model.logo_terms.local_local < reference_local_local(reference, whole)
        trainer(tmp_path, epochs=1).fit(wrap(hosts.BYOL(), weigh_overlap=True), loader(collate=collate))

    def test_plain_module_takes_boxes(self):
        views, _, boxes = MultiCropCollate.cifar10(return_boxes=True)(tiles(8))
        model = wrap(hosts.PlainSimSiam(), criterion=NegativeCosineSimilarity(), weigh_overlap=True)
        assert model(views, boxes).isfinite()
        with pytest.raises(ValueError, match="return_boxes=True"):
            model(views)

    def test_boxes_are_not_needed(self):
        whole = MultiCropCollate.cifar10(return_boxes=True)(tiles(8))
        assert wrap(hosts.TutorialMoCo()).training_step(whole, 0).isfinite()


def reference_local_local(model, whole):
    model.training_step(whole, 0)
    return model.logo_terms.local_local


def gradients_of(module):
    return [p.grad for p in module.parameters()]


PREDICTING = pytest.mark.parametrize("cls", [hosts.BYOL, hosts.SimSiam, hosts.BenchmarkBYOL, hosts.FeatureForwardBYOL])


class TestLocalPredictor:
    @PREDICTING
    def test_each_predictor_learns_from_its_own_crops(self, cls):
        host = cls()
        wrapped = wrap(copy.deepcopy(host), local_predictor=True, affinity=None, reduction="sum")
        alone = wrap(copy.deepcopy(host), local_predictor=True, affinity=None, local_global_weight=0)
        for model, whole in ((host, globals_only(batch())), (wrapped, batch()), (alone, batch())):
            step(model, whole)
        expected = gradients_of(host.prediction_head)
        # Eq. 9 adds the local pairs to the host's own loss: whatever differs came from local crops.
        for found, wanted in zip(gradients_of(wrapped.prediction_head), expected, strict=True):
            torch.testing.assert_close(found, wanted)
        assert all(gradient.abs().max() > 0 for gradient in gradients_of(wrapped.logo_local_predictor)[-2:])
        assert not any(gradient.any() for gradient in gradients_of(alone.logo_local_predictor))

    @PREDICTING
    def test_it_starts_as_the_hosts_and_is_another(self, cls):
        host = cls()
        shared, own = wrap(copy.deepcopy(host)), wrap(copy.deepcopy(host), local_predictor=True)
        own.logo.affinity.load_state_dict(shared.logo.affinity.state_dict())
        losses = []
        for model in (shared, own):
            torch.manual_seed(0)
            losses.append(loss_of(model.training_step(batch(), 0)))
        assert torch.equal(*losses)
        nn.init.normal_(own.logo_local_predictor.layers[-1].weight)
        own.training_step(batch(), 0)
        shared.training_step(batch(), 0)
        assert torch.equal(own.logo_terms.global_global, shared.logo_terms.global_global)
        assert not torch.allclose(own.logo_terms.local_global, shared.logo_terms.local_global)

    def test_trains_in_the_predictors_group_and_resumes(self, tmp_path):
        model = wrap(hosts.BenchmarkBYOL(), local_predictor=True)
        before = copy.deepcopy(model.logo_local_predictor.state_dict())
        first = trainer(tmp_path, epochs=1)
        first.fit(model, loader())
        twins = {id(p) for p in model.logo_local_predictor.parameters()}
        homes = [sum(id(p) in twins for p in group["params"]) for group in first.optimizers[0].param_groups]
        assert homes == [0, len(twins), 0]
        after = model.logo_local_predictor.state_dict()
        assert not any(torch.equal(before[name], after[name]) for name in before)
        first.save_checkpoint(tmp_path / "last.ckpt")
        resumed = wrap(hosts.BenchmarkBYOL(), local_predictor=True)
        trainer(tmp_path, epochs=1).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
        for name, value in resumed.logo_local_predictor.state_dict().items():
            assert torch.equal(value, after[name]), name

    def test_weights_and_biases_join_groups_of_their_own(self):
        class Split(hosts.BYOL):
            def configure_optimizers(self):
                head = list(self.prediction_head.parameters())
                return torch.optim.SGD([{"params": [p for p in head if p.ndim == ndim]} for ndim in (1, 2)], lr=0.1)

        model = wrap(Split(), local_predictor=True, affinity=None)
        groups = model.configure_optimizers().param_groups
        own = list(model.logo_local_predictor.parameters())
        for group, ndim in zip(groups, (1, 2), strict=True):
            expected = [p for p in [*model.prediction_head.parameters(), *own] if p.ndim == ndim]
            assert [id(p) for p in group["params"]] == [id(p) for p in expected]

    @pytest.mark.parametrize("method", ["byol", "simsiam"])
    def test_plain_loop(self, method):
        cls, make_criterion = hosts.PLAIN[method]
        model = wrap(cls(), criterion=make_criterion(), local_predictor=True).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        before = copy.deepcopy(model.logo_local_predictor.layers[-1].weight)
        model([view.double() for view in batch()[0]]).backward()
        optimizer.step()
        assert not torch.equal(model.logo_local_predictor.layers[-1].weight, before)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, copied):
        model = wrap(hosts.SimSiam(), local_predictor=True)
        other = copied(model)
        results = [step(m, batch()) for m in (model, other)]
        assert torch.equal(results[0][0], results[1][0])
        assert results[0][1].keys() == results[1][1].keys()
        assert other.logo_local_predictor is not model.logo_local_predictor

    @pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
    def test_compiled_predictor(self):
        plain = hosts.BYOL()
        compiled = copy.deepcopy(plain)
        compiled.prediction_head = torch.compile(compiled.prediction_head, backend="eager")
        models = [wrap(model, local_predictor=True, affinity=None) for model in (plain, compiled)]
        for _ in range(2):  # the second step runs what the first compiled
            for model in models:
                model.zero_grad()
                step(model, batch())
            for name in ("prediction_head", "logo_local_predictor"):
                for a, b in zip(*(gradients_of(getattr(model, name)) for model in models), strict=True):
                    torch.testing.assert_close(a, b)

    def test_a_failed_forward_gives_the_predictor_back(self):
        model = wrap(FixedSize(), local_predictor=True)
        with pytest.raises(RuntimeError, match="failed on local crops"):
            model.training_step(batch(), 0)
        assert "forward" not in model.prediction_head.__dict__

    def test_online_that_skips_the_predictor(self):
        model = hosts.BYOL()

        def skips(x):
            return model.projection_head(model.backbone(x).flatten(1))

        with pytest.raises(RuntimeError, match="runs the projector and predictor"):
            wrap(model, online=skips, local_predictor=True).training_step(batch(), 0)


class TestRouting:
    @STYLES
    def test_the_target_network_sees_no_local_crop(self, cls):
        model = wrap(cls())
        sizes = {"online": set(), "target": set()}
        model.backbone.register_forward_pre_hook(lambda _, args: sizes["online"].add(args[0].shape[-1]))
        if hasattr(model, "backbone_momentum"):
            model.backbone_momentum.register_forward_pre_hook(lambda _, args: sizes["target"].add(args[0].shape[-1]))
        model.training_step(batch(), 0)
        assert sizes["online"] == {32, 24}
        assert sizes["target"] <= {32}


class TestTrainer:
    @STYLES
    def test_trains_logs_and_resumes(self, cls, tmp_path):
        model = wrap(cls())
        before = copy.deepcopy(model.state_dict())
        first = trainer(tmp_path)
        first.fit(model, loader())
        for name in ("global_global", "local_global", "local_local", "affinity"):
            assert first.callback_metrics[f"logo/{name}"].isfinite()
        after = model.state_dict()
        for name in ("backbone.0.weight", "logo.affinity.mlp.0.weight", "logo.affinity.mlp.6.weight"):
            assert not torch.equal(before[name], after[name]), name
        first.save_checkpoint(tmp_path / "last.ckpt")
        resumed = wrap(cls())
        second = trainer(tmp_path, epochs=3)
        second.fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
        assert second.global_step == 6
        assert {len(group["params"]) for group in second.optimizers[0].param_groups} == {
            len(group["params"]) for group in first.optimizers[0].param_groups
        }

    @pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
    @pytest.mark.parametrize("weight", [{"local_weight": 1e-2}, {"gradient_ratio": 0.1}])
    def test_precision_and_accumulation(self, options, weight, tmp_path):
        model = wrap(hosts.BYOL(), **weight)
        run = trainer(tmp_path, epochs=1, **options)
        run.fit(model, loader())
        assert all(p.isfinite().all() for p in model.parameters())
        assert all(v.dtype == torch.float32 for k, v in run.callback_metrics.items() if k.startswith("logo/"))

    def test_parameter_groups_are_extended_not_added(self, tmp_path):
        model = wrap(hosts.BenchmarkBYOL())
        run = trainer(tmp_path, epochs=1)
        run.fit(model, loader())
        groups = run.optimizers[0].param_groups
        assert [group["name"] for group in groups] == ["byol", "undecayed", "classifier"]
        of_affinity = {id(p) for p in model.logo.affinity.parameters()}
        homes = [sum(id(p) in of_affinity for p in group["params"]) for group in groups]
        assert homes == [0, len(of_affinity), 0]

    def test_class_loads_from_checkpoint(self, tmp_path):
        wrapped_class = wrap(hosts.BYOL, local_weight=0.25)
        assert wrapped_class.__name__ == "BYOL"
        model = wrapped_class(out_dim=8)
        assert model.logo.affinity.dim == 8
        run = trainer(tmp_path, epochs=1)
        run.fit(model, loader())
        run.save_checkpoint(tmp_path / "last.ckpt")
        loaded = wrapped_class.load_from_checkpoint(tmp_path / "last.ckpt")
        assert loaded.hparams == {"out_dim": 8}
        assert loaded.logo.local_weight == 0.25
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name


@wrap
class Decorated(hosts.BYOL):
    """A class wrapped where it is defined, whose name now means the wrapped class."""


class TestCopies:
    @pytest.mark.parametrize(
        "make",
        [lambda: wrap(hosts.MoCo()), wrap(hosts.MoCo), Decorated],
        ids=["instance", "class", "decorator"],
    )
    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
    )
    def test_copies_train_on_their_own(self, make, copied):
        model = make()
        other = copied(model)
        assert type(other).__name__ == type(model).__name__
        loss, gradients, _ = step(other, batch())
        assert all(p.grad is None for p in model.parameters())
        expected, expected_gradients, _ = step(model, batch())
        assert torch.equal(loss, expected)
        assert gradients.keys() == expected_gradients.keys()

    def test_a_pickled_model_keeps_its_options(self):
        """As a process that is spawned has it: its class builds others with them."""
        model = pickle.loads(pickle.dumps(wrap(hosts.SimSiam(), affinity=Affinity(16, 8), criterion="criterion")))
        assert type(model)().logo.affinity.mlp[0].out_features == 8

    def test_a_backbone_frozen_in_the_first_step_moves_its_statistics_later(self):
        """It was taken for a target network, which local crops leave alone."""
        tracked = []
        for frozen in (False, True):
            model = wrap(hosts.SimSiam())
            model.backbone.requires_grad_(not frozen)
            step(model, batch())
            model.backbone.requires_grad_(True)
            before = int(model.backbone[1].num_batches_tracked)
            for _ in range(2):
                step(model, batch())
            tracked.append(int(model.backbone[1].num_batches_tracked) - before)
        assert tracked == [8, 8]

    def test_instances_of_a_class_share_nothing(self):
        wrapped_class = wrap(hosts.BYOL, affinity=Affinity(16, 8))
        first, second = wrapped_class(), wrapped_class()
        assert first.logo.affinity is not second.logo.affinity
        given = Affinity(16, 8)
        assert wrap(hosts.BYOL(), affinity=given).logo.affinity is given  # in an optimizer already, perhaps
        assert first.logo.affinity.mlp[0].out_features == 8

    def test_the_users_class_stays_as_it_was(self):
        wrap(hosts.BYOL())
        wrap(hosts.BYOL)
        assert not hasattr(hosts.BYOL(), "logo")


class TestPlainModules:
    @pytest.mark.parametrize("method", hosts.PLAIN)
    def test_loop(self, method):
        cls, make_criterion = hosts.PLAIN[method]
        model = wrap(cls(), criterion=make_criterion())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        before = copy.deepcopy(model.logo.affinity.state_dict())
        for views, _ in loader():
            optimizer.zero_grad()
            model(views).backward()
            optimizer.step()
        assert not torch.equal(before["mlp.0.weight"], model.logo.affinity.mlp[0].weight)
        assert all(term.isfinite() for term in model.logo_terms)
        assert not model.logo_terms.total.requires_grad

    def test_one_tensor_is_the_users_forward(self):
        model = hosts.PlainBYOL().eval()
        x = batch()[0][0]
        expected = model(x)
        assert torch.equal(wrap(model, criterion=NegativeCosineSimilarity())(x), expected)

    def test_a_whole_batch_is_refused(self):
        model = wrap(hosts.PlainSimSiam(), criterion=NegativeCosineSimilarity())
        with pytest.raises(TypeError, match=r"takes a list of views .*, got \[list, Tensor\].*batch\[0\]"):
            model(MultiCropCollate.cifar10()(tiles(4)))

    def test_unfinished_views_say_so(self):
        views, targets = MultiCropCollate.cifar10(defer="augment")(tiles(4))
        model = wrap(hosts.PlainSimSiam(), criterion=NegativeCosineSimilarity())
        lightning = wrap(hosts.SimSiam())
        for run in (lambda: model(views), lambda: lightning.training_step([views, targets], 0)):
            with pytest.raises(TypeError, match=r"these views are not finished.*batch\[0\]\.to\(device\)"):
                run()

    def test_warns_when_the_optimizer_was_built_too_early(self):
        model = hosts.PlainSimSiam()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model = wrap(model, criterion=NegativeCosineSimilarity())
        views = batch(n=2)[0]
        for _ in range(31):
            model(views).backward()
            optimizer.step()
        with pytest.warns(UserWarning, match=r"build the optimizer after wrap\(model\)"):
            model(views)

    @pytest.mark.parametrize("options", [{}, {"affinity": "cosine", "anneal_repulsion": False}])
    def test_is_quiet_when_it_learns_or_has_nothing_to_learn(self, options):
        model = wrap(hosts.PlainSimSiam(), criterion=NegativeCosineSimilarity(), **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        views = batch(n=2)[0]
        for _ in range(33):
            model(views).backward()
            optimizer.step()

    @pytest.mark.parametrize("name", ["BYOL", "MoCo", "SimSiam"])
    def test_lightly_models(self, name):
        """The ready-made classes of lightly 1.5."""
        models = pytest.importorskip("lightly.models")
        if not hasattr(models, name):
            pytest.skip("lightly 1.6 ships no model classes")
        from lightly.loss import SymNegCosineSimilarityLoss

        sizes = {"num_ftrs": 32, "out_dim": 16}
        model = getattr(models, name)(hosts.small_backbone(), **sizes)
        criterions = (
            [NTXentLoss(memory_bank_size=(64, 16))]
            if name == "MoCo"
            else [SymNegCosineSimilarityLoss(), NegativeCosineSimilarity()]
        )
        for criterion in criterions:
            host, other = copy.deepcopy(model), copy.deepcopy(model)
            outs = host(*batch()[0][:2])
            expected = criterion(*outs) if name == "MoCo" else SymNegCosineSimilarityLoss()(*outs)
            zero = wrap(other, criterion=copy.deepcopy(criterion), affinity=None, local_global_weight=0)
            if name != "MoCo":
                torch.testing.assert_close(zero(batch()[0]), expected)
            wrapped = wrap(copy.deepcopy(model), criterion=criterion)
            wrapped(batch()[0]).backward()
            assert all(term.isfinite() for term in wrapped.logo_terms)
            assert wrapped.logo.affinity.mlp[0].weight.grad.abs().max() > 0
            assert not any(p.grad is not None for n, p in wrapped.named_parameters() if n.startswith("momentum"))


class Bare(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()


class NoCriterion(hosts.SimSiam):
    def __init__(self):
        super().__init__()
        del self.criterion


class BothCarryGradient(hosts.SimSiam):
    def forward(self, x):
        z = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z, self.prediction_head(z)


class CriterionUnused(hosts.BYOL):
    def training_step(self, batch, batch_idx):
        return self(batch[0][0]).sum()


class LossFromElsewhere(hosts.BYOL):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return self(batch[0][0]).sum()


class Manual(hosts.BYOL):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class FixedSize(hosts.BYOL):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 32))
        self.copy_momentum()


class Named(hosts.BYOL):
    def __init__(self):
        super().__init__()
        self.logo = 3


class Renamed(pl.LightningModule):
    """SimSiam with names of its own: every option is needed."""

    def __init__(self):
        super().__init__()
        self.net, self.head, self.tail = hosts.small_backbone(), nn.Linear(32, 16), nn.Linear(16, 16)
        self.distance = nn.CosineEmbeddingLoss()
        self.measure = NegativeCosineSimilarity()
        self.other = NegativeCosineSimilarity()

    def embed(self, x):
        return self.tail(self.head(self.net(x).flatten(1)))

    def training_step(self, batch, batch_idx):
        x0, x1 = batch[0]
        return self.measure(self.embed(x0), self.embed(x1).detach())


class TestErrors:
    @pytest.mark.parametrize(
        ("model", "options", "error", "message"),
        [
            (Bare, {}, ValueError, r"Bare has no projection_head / .*projector='...'"),
            (NoCriterion, {}, ValueError, r"NoCriterion has no loss module named 'criterion'.*criterion="),
            (hosts.PlainBYOL, {}, ValueError, r"PlainBYOL has no loss module named 'criterion'.*criterion="),
            (Named, {}, ValueError, r"Named has an attribute 'logo' already"),
            (
                hosts.BYOL,
                {"lambda_weight": 1},
                TypeError,
                r"unknown option lambda_weight; did you mean local_weight\?",
            ),
            (hosts.BYOL, {"zzz": 1}, TypeError, r"unknown option zzz; none is near\. There are affinity, "),
            (hosts.BYOL, {"similarity": "cosine"}, TypeError, r"unknown option similarity"),
            (hosts.BYOL, {"local_weight": -1}, ValueError, r"local_weight must be a finite number >= 0, got -1"),
            (
                hosts.BYOL,
                {"local_global_weight": 0, "preset": "release"},
                ValueError,
                r"gradient_ratio=0\.015 .*leaves none",
            ),
            (hosts.BYOL, {"criterion": "loss"}, ValueError, r"criterion='loss' is neither a loss module nor"),
            (hosts.BYOL, {"affinity": 16}, ValueError, r"affinity must be a module .*got 16"),
            (hosts.BYOL, {"global_crops": 1}, ValueError, r"global_crops must be an integer >= 2, got 1"),
            (hosts.BYOL, {"preset": "papre"}, ValueError, r"preset must be one of \('paper', 'release'\), got 'papre'"),
            (hosts.MoCo, {"local_predictor": True}, ValueError, r"local_predictor=True .* MoCo has no prediction_head"),
            (hosts.BYOL, {"projector": "head"}, ValueError, r"BYOL has no head, .*projector='...'"),
        ],
    )
    def test_at_wrap(self, model, options, error, message):
        instance = model()
        with pytest.raises(error, match=message):
            wrap(instance, **options)
        assert type(instance) is model  # nothing half-wrapped
        with pytest.raises(error, match=message):
            wrap(model, **options)()

    def test_wrapped_twice(self):
        model = wrap(hosts.BYOL())
        for again in (model, type(model)):
            with pytest.raises(ValueError, match="BYOL is wrapped already"):
                wrap(again)

    @pytest.mark.parametrize(
        ("model", "changed", "error", "message"),
        [
            (hosts.BYOL, globals_only(batch()), ValueError, r"got 2 views, of which 2 are global.*MultiCropCollate"),
            (
                hosts.BYOL,
                [torch.randn(6, 3, 32, 32)],
                ValueError,
                r"list of views .*got list \[tensor \(6, 3, 32, 32\)\]",
            ),
            (hosts.BYOL, {"image": 1}, ValueError, r"list of views .*got a dict of \[.image.\].*image_key="),
            (hosts.BYOL, batch(n=1), RuntimeError, r"BYOL's own step failed .*more than 1 value.*drop_last=True"),
            (BothCarryGradient, batch(), RuntimeError, r"both carry gradient.*Detach the target.*target="),
            (
                CriterionUnused,
                batch(),
                RuntimeError,
                r"never called NegativeCosineSimilarity of CriterionUnused.*criterion=",
            ),
            (LossFromElsewhere, batch(), RuntimeError, r"does not depend on NegativeCosineSimilarity of.*criterion="),
            (Manual, batch(), RuntimeError, r"manual optimization"),
            (FixedSize, batch(), RuntimeError, r"failed on local crops \(6, 3, 24, 24\).*dynamic_img_size"),
        ],
    )
    def test_at_the_first_step(self, model, changed, error, message):
        wrapped = wrap(model())
        with pytest.raises(error, match=message):
            wrapped.training_step(changed, 0)

    def test_each_option_that_an_error_names_helps(self):
        with pytest.raises(ValueError, match=r"several losses \(measure, other\).*criterion="):
            wrap(Renamed())
        with pytest.raises(ValueError, match="projector="):
            wrap(Renamed(), criterion="measure")
        model = wrap(Renamed(), projector="head", criterion="measure")
        with pytest.raises(RuntimeError, match="online="):
            model.training_step(batch(), 0)
        model = wrap(Renamed(), projector="head", criterion="measure", online="embed")
        assert model.training_step(batch(), 0).isfinite()
        model = wrap(BothCarryGradient(), target=lambda x: torch.ones(len(x), 16))
        assert model.training_step(batch(), 0)["loss"].isfinite()

    @pytest.mark.parametrize(
        ("online", "message"),
        [
            (lambda model: lambda x: None, r"runs the projector.*online=.*projector="),
            (
                lambda model: lambda x: model.projection_head(model.backbone(x).flatten(1)).mean(),
                r"gave \(\) for crops",
            ),
            (lambda model: lambda x: (model(x), "p"), r"gave str for crops"),
        ],
    )
    def test_online_that_gives_no_prediction(self, online, message):
        model = hosts.BYOL()
        with pytest.raises(RuntimeError, match=message):
            wrap(model, online=online(model)).training_step(batch(), 0)

    def test_a_failed_step_leaves_no_hook_behind(self):
        model = wrap(CriterionUnused())
        with pytest.raises(RuntimeError):
            model.training_step(batch(), 0)
        assert not model.criterion._forward_hooks
        assert not model.projection_head._forward_hooks

    def test_steps_leave_nothing_in_the_context(self):
        """torch's `config.patch` makes a context variable at each use, which stays: 0.25 KiB a step."""
        import torch._functorch.config  # where torch.compile looks, so not in every process

        model = wrap(hosts.BYOL())
        sizes = []
        for i in range(3):
            model.training_step(batch(seed=i), i)
            sizes.append(len(contextvars.copy_context()))
        assert getattr(torch._functorch.config, "donated_buffer", True)  # torch 2.4 has none
        assert sizes[1] == sizes[2]


def test_wrap_is_the_adapters_wrap():
    assert wrap(hosts.BYOL(), global_crops=2).logo.affinity.dim == 16
