"""What wrap() finds out in the first step, what it refuses, and when it stays out of the way."""

import copy
import inspect
import pickle
import warnings

import hosts
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from hosts import wrap_learned as wrap
from lightly.loss import DINOLoss, MMCRLoss, NegativeCosineSimilarity, NTXentLoss, SwaVLoss, TiCoLoss, VICRegLoss
from lightning_fabric import Fabric
from photos import tiles
from torch import nn
from torch.nn.parallel import DataParallel
from torch.utils.data import DataLoader

from logo_plugin import MultiCropCollate

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def batch(sides=(32, 32, 24, 24), n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(n, 3, side, side, generator=generator) for side in sides], torch.arange(n) % 4]


def loss_of(out):
    return out["loss"] if isinstance(out, dict) else out


def trained(model, whole, **options):
    """Loss and gradients by name of one step of a wrapped copy."""
    model = wrap(copy.deepcopy(model), **options)
    loss = loss_of(model.training_step(whole, 0))
    loss.backward()
    return model, loss.detach()


class TestSymmetricCriteria:
    @pytest.mark.parametrize("name", ["simclr", "barlow twins", "dcl", "benchmark vicreg"])
    def test_local_crops_meet_both_projections_detached(self, name):
        """total = host + scale * 4 / 6 * (lg - gg), lg the mean over pairs of criterion(z_local, sg z_global)."""
        host = hosts.LIGHTNING[name]()
        model, total = trained(host, batch(), affinity=None)
        views = batch()[0]
        host_loss = host.training_step(batch((32, 32)), 0).detach()
        scale = 2 if name == "benchmark vicreg" else 1

        def project(view):
            return host.projection_head(host.backbone(view).flatten(1))

        together = scale == 2  # its step forwards both views as one batch
        targets = project(torch.cat(views[:2])).chunk(2) if together else [project(view) for view in views[:2]]
        pulls = [host.criterion(project(view), z.detach()) for view in views[2:] for z in targets]
        pull = torch.stack(pulls).mean()
        torch.testing.assert_close(model.logo_terms.local_global, pull.detach())
        expected = host_loss + scale * 4 / 6 * (pull.detach() - host_loss / scale)
        torch.testing.assert_close(total, expected)

    def test_the_plain_loop_is_the_lightning_step(self):
        """Both styles of SimCLR give one loss and the same gradients."""
        lightning = hosts.SimCLR()
        plain = hosts.PlainSimCLR()
        plain.load_state_dict(lightning.state_dict())
        plain = wrap(plain, criterion=NTXentLoss(), affinity=None)
        plain(batch()[0]).backward()
        model, loss = trained(lightning, batch(), affinity=None)
        torch.testing.assert_close(plain.logo_terms.total, loss)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)


class TestState:
    def test_tico_covariance_moves_once_a_step(self):
        """LoGo's calls leave the criterion's state to the host's, step after step."""
        host = hosts.TiCo()
        model = wrap(copy.deepcopy(host))
        for i in range(3):
            whole = batch(seed=i)
            calls = []
            model.criterion.register_forward_hook(lambda *args, calls=calls: calls.append(args))
            model.training_step(whole, 0)
            host.training_step([whole[0][:2], whole[1]], 0)
            torch.testing.assert_close(model.criterion.C, host.criterion.C)
            assert len(calls) > 1, "LoGo never used the criterion"

    def test_what_cannot_be_put_back_is_refused(self):
        class Counting(NegativeCosineSimilarity):
            def forward(self, x0, x1):
                self.history = getattr(self, "history", {})
                self.history[len(self.history)] = x0
                self.register_buffer(f"seen{len(self.history)}", x0.detach())
                return super().forward(x0, x1)

        model = hosts.BYOL()
        model.criterion = Counting()
        with pytest.raises(RuntimeError, match=r"Counting of BYOL keeps a state .*cannot put back"):
            wrap(model).training_step(batch(), 0)

    def test_nnclr_targets_are_the_neighbours_found(self):
        model = wrap(hosts.NNCLR())
        found = []
        model.memory_bank.register_forward_hook(lambda module, args, out: found.append(out))
        seen = []
        extend = model.logo.extend
        model.logo.extend = lambda *args, **kwargs: seen.append(kwargs) or extend(*args, **kwargs)
        model.training_step(batch(), 0)
        assert all(torch.equal(a, b) for a, b in zip(seen[0]["global_target"], found, strict=True))


class TestRunningStatistics:
    @pytest.mark.parametrize("options", [{}, {"checkpoint_local_crops": True}, {"concat_local_crops": True}])
    @pytest.mark.parametrize("cls", [hosts.BYOL, hosts.SimCLR, hosts.MoCo])
    def test_local_crops_kept_out(self, cls, options):
        """Then a step leaves every buffer of the model as the host's own step would; else local crops move them."""
        host = cls()
        weights = {"affinity": None, "local_global_weight": 0}
        for kept_out in (True, False):
            expected = copy.deepcopy(host)
            expected.training_step([batch()[0][:2], batch()[1]], 0).backward()
            model, _ = trained(host, batch(), local_running_stats=not kept_out, **weights, **options)
            found = {name: value for name, value in model.named_buffers() if value.is_floating_point() or kept_out}
            same = [torch.equal(value, expected.get_buffer(name)) for name, value in found.items()]
            assert all(same) is kept_out


class TestSource:
    def test_predictions_normalised_by_the_step(self):
        """MSE of unit vectors is 2 - 2 cos, over D; local predictions are normalised as the step does it."""
        model, _ = trained(hosts.NormalizedBYOL(), batch(), positive_noise=0.0)
        cosine, _ = trained(hosts.BYOL(), batch(), positive_noise=0.0)
        cosine.load_state_dict(model.state_dict())
        cosine.training_step(batch(), 0)
        model.training_step(batch(), 0)
        for term in ("global_global", "local_global"):
            expected = (2 + 2 * getattr(cosine.logo_terms, term)) / 16
            torch.testing.assert_close(getattr(model.logo_terms, term), expected, rtol=1e-3, atol=1e-4)

    def test_a_criterion_of_something_else_is_refused(self):
        class Halved(hosts.BYOL):
            def training_step(self, batch, batch_idx):
                (x0, x1), p = batch[0], self.prediction_head
                z = self.projection_head(self.backbone(x0).flatten(1))
                return self.criterion(p(z) + z, self.forward_momentum(x1))

        with pytest.raises(
            RuntimeError, match=r"something else than the output of the projection_head or pred.*online="
        ):
            wrap(Halved()).training_step(batch(), 0)

    def test_unused_predictor(self):
        """A head that the loss does not use is none of LoGo's."""

        class Unused(hosts.SimCLR):
            def __init__(self):
                super().__init__()
                self.prediction_head = nn.Linear(16, 4)

        torch.manual_seed(0)
        with_head, without = Unused(), hosts.SimCLR()
        without.load_state_dict({k: v for k, v in with_head.state_dict().items() if "prediction" not in k})
        losses = [trained(model, batch(), affinity=None)[1] for model in (with_head, without)]
        assert torch.equal(*losses)

    def test_projection_and_prediction_with_gradient_both(self):
        class Undetached(hosts.SimSiam):
            def forward(self, x):
                z = self.projection_head(self.backbone(x).flatten(1))
                return z, self.prediction_head(z)

        with pytest.raises(RuntimeError, match=r"both carry gradient and do not play the same part.*target="):
            wrap(Undetached()).training_step(batch(), 0)

    def test_an_asymmetric_criterion_with_gradient_on_both_sides(self):
        class Asymmetric(nn.Module):
            def forward(self, x, y):
                return F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean")

        model = hosts.SimCLR(Asymmetric)
        with pytest.raises(RuntimeError, match=r"Asymmetric of SimCLR.*both carry gradient"):
            wrap(model).training_step(batch(), 0)


class TestGlobalCrops:
    def test_fastsiam_with_four(self):
        host = hosts.FastSiam()
        whole = batch((32, 32, 32, 32, 24, 24))
        _, loss = trained(host, whole, global_crops=4, affinity=None, local_global_weight=0)
        expected = host.training_step([whole[0][:4], whole[1]], 0)
        torch.testing.assert_close(loss, expected.detach())
        assert wrap(hosts.FastSiam(), global_crops=4).training_step(whole, 0).isfinite()

    @pytest.mark.parametrize("sides", [(40, 40, 40, 40), (32, 32, 32, 32, 24, 24), (24, 24, 32, 32)])
    def test_local_crops_that_are_not_smaller_are_asked_about(self, sides):
        """A forgotten transform or global_crops=4, or local crops first."""
        whole, found = batch(sides), ", ".join(map(str, sides))
        with pytest.warns(UserWarning, match=rf"views of {found} pixels: LoGo takes the first 2.*global_crops=2"):
            wrap(hosts.FastSiam()).training_step(whole, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrap(hosts.FastSiam(), global_crops=2).training_step(whole, 0)
            wrap(hosts.FastSiam()).training_step(batch((32, 32, 32, 32)), 0)  # CIFAR's


class TestOutsideTraining:
    @pytest.mark.parametrize("cls", [hosts.BYOL, hosts.MoCo, hosts.SimCLR])
    @pytest.mark.parametrize("views", [2, 4])
    def test_a_validation_step_that_calls_training_step(self, cls, views, tmp_path):
        class Validated(cls):
            def validation_step(self, batch, batch_idx):
                self.log("val_loss", self.training_step(batch, batch_idx))

        model = wrap(Validated())
        run = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        data = DataLoader(tiles(16), batch_size=8, collate_fn=MultiCropCollate.cifar10())
        validation = DataLoader(tiles(16), batch_size=8, collate_fn=MultiCropCollate.cifar10(local_crops=views - 2))
        run.fit(model, data, validation)
        assert run.callback_metrics["val_loss"].isfinite()

    @pytest.mark.filterwarnings("ignore:.*is in eval mode, so its loss is without LoGo's terms")
    def test_it_is_the_hosts_own_loss(self):
        host = hosts.SimCLR()
        model = wrap(copy.deepcopy(host))
        for context, mode in ((torch.no_grad(), True), (torch.enable_grad(), False)):
            with context:
                found = model.train(mode).training_step(batch(), 0)
                expected = host.train(mode).training_step(batch((32, 32)), 0)
            assert torch.equal(found, expected)
        assert model.logo_terms is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (DINOLoss, r"SimCLR trains with DINOLoss, which has a multi-crop of its own"),
            (SwaVLoss, r"SimCLR trains with SwaVLoss, which has a multi-crop of its own"),
            (MMCRLoss, r"SimCLR trains with MMCRLoss, which takes lists of views"),
        ],
    )
    def test_by_the_loss(self, loss, message):
        for model, options in ((hosts.SimCLR(loss), {}), (hosts.PlainSimCLR(), {"criterion": loss()})):
            with pytest.raises(ValueError, match=message.replace("SimCLR", type(model).__name__)):
                wrap(model, **options)
            assert not hasattr(model, "logo")

    def test_by_the_calls(self):
        class Lists(nn.Module):
            def forward(self, views):
                return sum(view.sum() for view in views)

        class Listing(hosts.SimCLR):
            def training_step(self, batch, batch_idx):
                return self.criterion([self(view) for view in batch[0]])

        class Labelled(hosts.SimCLR):
            def training_step(self, batch, batch_idx):
                return self.criterion(self(batch[0][0]), batch[1])

        class Many(hosts.SimCLR):
            def training_step(self, batch, batch_idx):
                return self.criterion(*(self(view) for view in batch[0]), self(batch[0][0]))

        class Unreduced(hosts.SimCLR):
            def training_step(self, batch, batch_idx):
                return self.criterion(*(self(view) for view in batch[0])).mean()

        for cls, loss, message in (
            (Listing, Lists, r"Lists of Listing takes lists of views.*no option"),
            (
                Labelled,
                nn.CrossEntropyLoss,
                r"CrossEntropyLoss of Labelled was called with \(6, 16\) float32, \(6,\) int64",
            ),
            (Many, nn.TripletMarginLoss, r"TripletMarginLoss of Many was called with \(6, 16\) float32, \(6, 16\)"),
            (Unreduced, lambda: nn.MSELoss(reduction="none"), r"MSELoss of Unreduced returned shape \(6, 16\)"),
        ):
            model = wrap(cls(loss))
            before = copy.deepcopy(dict(model.named_parameters()))
            with pytest.raises(RuntimeError, match=message):
                model.training_step(batch(), 0)
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_a_step_that_needs_other_views(self):
        class Six(hosts.SimCLR):
            def training_step(self, batch, batch_idx):
                return self.criterion(self(batch[0][4]), self(batch[0][5]))

        with pytest.raises(RuntimeError, match=r"Six's own step failed on its 2 global crops.*IndexError.*LoGoLoss"):
            wrap(Six()).training_step(batch(), 0)

    @pytest.mark.parametrize(
        ("model", "criterion", "options", "has"),
        [
            (hosts.PlainNNCLR, NTXentLoss, {}, "NTXentLoss and a predictor"),
            (hosts.PlainTiCo, TiCoLoss, {}, "TiCoLoss and targets from forward_momentum"),
            (hosts.PlainBYOL, nn.CrossEntropyLoss, {}, "CrossEntropyLoss and a predictor and targets"),
            (hosts.PlainBYOL, NTXentLoss, {}, "NTXentLoss and a predictor and targets"),
            (hosts.PlainSimSiam, VICRegLoss, {}, "VICRegLoss and a predictor"),
            (hosts.PlainSimCLR, NegativeCosineSimilarity, {}, "NegativeCosineSimilarity"),
            (hosts.PlainSimSiam, NegativeCosineSimilarity, {"global_crops": 4}, "and 4 global crops"),
        ],
    )
    def test_plain_loops_that_nobody_can_guess(self, model, criterion, options, has):
        instance = model()
        with pytest.raises(ValueError, match=rf"cannot tell what your loop computes.*{has}.*step=step"):
            wrap(instance, criterion=criterion(), **options)
        assert type(instance) is model
        assert not hasattr(instance, "logo")
        assert wrap(instance, criterion=criterion(), step=hosts.own_step, **options).logo is not None

    def test_the_wrong_order(self):
        model = hosts.PlainSimCLR()
        for made, name in (
            (torch.compile(model), "torch.compile"),
            (DataParallel(model), "DataParallel"),
            (Fabric(accelerator="cpu", devices=1).setup(model), "fabric.setup"),
        ):
            with pytest.raises(TypeError, match=rf"wrap the model first.*{name}\(wrap\(model\)\)"):
                wrap(made, criterion=NTXentLoss())

    def test_containers(self):
        with pytest.raises(ValueError, match="Sequential runs all that it holds"):
            wrap(nn.Sequential(hosts.PlainSimCLR()), criterion=NTXentLoss())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weigh_overlap": "no"}, "weigh_overlap must be True or False, got 'no'"),
            ({"concat_local_crops": 1}, "concat_local_crops must be True or False, got 1"),
            ({"local_predictor": None}, "local_predictor must be True or False, got None"),
            ({"projector": nn.Identity()}, "projector must be the name of an attribute, got Identity"),
            ({"online": 3}, "online must be a method's name or a function of images, got 3"),
            ({"online": "forward_studnet"}, "online='forward_studnet' is not a method of BYOL"),
            ({"target": "forward_teacher"}, "target='forward_teacher' is not a method of BYOL"),
            ({"step": "training_step"}, r"step must be a function \(model, global views\) -> loss"),
            ({"step": hosts.own_step}, "step= is for plain PyTorch loops, and BYOL brings its own step"),
            ({"global_crops": True}, "global_crops must be an integer >= 2, got True"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            wrap(hosts.BYOL(), **options)

    @pytest.mark.parametrize(
        ("option", "name", "wanted"),
        [("online", "criterion", "predictions"), ("target", "projection_head", "targets")],
    )
    def test_named_method_that_takes_no_images(self, option, name, wanted):
        message = rf"{option}='{name}' failed on crops .*Error: .*\. Name a method from images to {wanted}\."
        with pytest.raises(RuntimeError, match=message):
            wrap(hosts.BYOL(), **{option: name}).training_step(batch(), 0)


def test_fabric():
    """`fabric.setup(wrap(model), optimizer)` trains as the plain loop does; `fabric.backward` is `loss.backward`."""
    losses = []
    for fabric in (None, Fabric(accelerator="cpu", devices=1)):
        torch.manual_seed(0)
        criterion = NegativeCosineSimilarity()
        model = wrap(hosts.PlainBYOL(), criterion=criterion, gradient_ratio=0.1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run, optimizer = fabric.setup(model, optimizer) if fabric else (model, optimizer)
        for i in range(3):
            torch.manual_seed(i)
            loss = run(batch(seed=i)[0])
            fabric.backward(loss) if fabric else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == losses[3:]
    assert len(set(losses)) == 3


class TestCompile:
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("name", ["byol", "moco", "simclr"])
    def test_compiled_is_eager(self, name):
        """torch.compile(wrap(model)) gives eager's losses and gradients, with the nets in graphs."""
        cls, make_criterion = hosts.PLAIN[name]
        graphs, results = [], []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        for compiled in (False, True):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = cls()
            model.criterion = make_criterion()
            model = wrap(model, criterion=model.criterion, gradient_ratio=0.5)
            run = torch.compile(model, backend=backend) if compiled else model
            made = []
            for i in range(4):
                torch.manual_seed(i)
                model.zero_grad()
                run(batch(seed=i)[0]).backward()
                made.append(len(graphs))
            results.append((model.logo_terms, [p.grad for p in model.parameters() if p.grad is not None]))
        assert made[-1] == made[-2], f"graphs after each step: {made}"
        called = [  # functions; or modules, by a name (torch 2.4)
            graph.get_submodule(node.target) if node.op == "call_module" else node.target
            for graph in graphs
            for node in graph.graph.nodes
        ]
        assert any("conv" in str(each).lower() for each in called)
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)

    @pytest.mark.filterwarnings("ignore")
    def test_lightning_trains_a_compiled_model(self, tmp_path):
        model = torch.compile(wrap(hosts.BenchmarkBYOL(), gradient_ratio=0.5), backend="aot_eager")
        run = pl.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        run.fit(model, DataLoader(tiles(16), batch_size=8, collate_fn=MultiCropCollate.cifar10()))
        assert run.callback_metrics["logo/local_local"].isfinite()


class TestClasses:
    def test_a_local_subclass_of_a_wrapped_class_is_copied_as_itself(self):
        class Mine(wrap(hosts.BYOL)):
            mark = 3

        model = Mine()
        other = copy.deepcopy(model)
        assert type(other) is Mine
        assert other.mark == 3
        torch.manual_seed(0)
        expected = model.training_step(batch(), 0)
        torch.manual_seed(0)
        assert torch.equal(other.training_step(batch(), 0), expected)
        with pytest.raises((AttributeError, pickle.PicklingError), match="Mine"):
            pickle.dumps(model)

    def test_every_option_is_in_the_signature(self):
        """help() and editors show them; LoGoLoss' options are all there."""
        from logo_plugin import LoGoLoss, wrap

        names = inspect.signature(wrap).parameters.keys()
        assert inspect.signature(LoGoLoss).parameters.keys() - {"similarity"} <= names
        for name in names - {"x", "others"}:
            assert f"    {name}: " in inspect.getdoc(wrap), name


@pytest.mark.parametrize("host", [hosts.BYOL, hosts.MoCo])
def test_an_affinity_that_repels_nothing_changes_no_gradient(host):
    """It learns beside the model: with a strength of 0 a step is plain multi-crop's, to the last bit."""
    model = host()
    plain, beside = (trained(model, batch(), **o)[0] for o in ({"affinity": None}, {"local_weight": 0.0}))
    assert all(p.grad.abs().sum() > 0 for name, p in beside.logo.affinity.named_parameters() if "weight" in name)
    others = {name: p.grad for name, p in beside.named_parameters() if not name.startswith("logo.") and p.requires_grad}
    for name, p in plain.named_parameters():
        assert not p.requires_grad or torch.equal(p.grad, others[name]), name


class TestCosine:
    """affinity="cosine": nothing is added to the model that a checkpoint or an optimizer could hold."""

    def test_repels_and_adds_nothing(self):
        host = hosts.BYOL()
        options = {"affinity": None}, {"affinity": "cosine", "anneal_repulsion": False}
        plain, cosine = (trained(host, batch(), **each)[0] for each in options)
        assert cosine.state_dict().keys() == host.state_dict().keys()
        cosine.load_state_dict(host.state_dict())
        ours, hosts_own = ([len(g["params"]) for g in m.configure_optimizers().param_groups] for m in (cosine, host))
        assert ours == hosts_own
        assert cosine.logo_terms.local_global == plain.logo_terms.local_global
        assert cosine.logo_terms.affinity == 0
        z = cosine.logo_local_proj
        torch.testing.assert_close(cosine.logo_terms.local_local, F.cosine_similarity(*z, dim=1).mean())
        grads = [model.backbone[0].weight.grad for model in (plain, cosine)]
        assert not torch.allclose(*grads, rtol=1e-3)


class TestCheckpoints:
    def test_says_that_logo_was_added_removed_or_set_otherwise(self):
        states = {
            "stock": hosts.BYOL().state_dict(),
            "logo": wrap(hosts.BYOL()).state_dict(),
            "none": wrap(hosts.BYOL(), affinity=None).state_dict(),
            "own predictor": wrap(hosts.BYOL(), local_predictor=True).state_dict(),
        }
        model, bare = wrap(hosts.BYOL()), wrap(hosts.BYOL(), affinity=None)
        for target, saved, what in (
            (model, "stock", "without LoGo's parameters"),
            (model, "none", "without LoGo's parameters"),
            (bare, "logo", "with LoGo's parameters, which this model lacks"),
            (model, "own predictor", "with other options of LoGo"),
        ):
            with pytest.raises(RuntimeError, match=f"saved {what}.*strict=False"):
                target.load_state_dict(states[saved])
            target.load_state_dict(states[saved], strict=False)
        bare.load_state_dict(states["stock"])

    @pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6), reason="torch names no parameters of groups yet"
    )
    def test_named_parameters_of_optimizer_groups(self):
        class NamedGroups(hosts.BYOL):
            def configure_optimizers(self):
                return torch.optim.SGD(self.backbone.named_parameters(), lr=0.1)

        (group,) = wrap(NamedGroups()).configure_optimizers().param_groups
        assert len(group["params"]) == len(group["param_names"])
        assert group["param_names"][-1] == "logo.affinity.mlp.6.bias"

        class AllNamed(hosts.BYOL):
            def configure_optimizers(self):
                own = [(n, p) for n, p in self.named_parameters() if not n.startswith("logo")]
                return torch.optim.SGD(own, lr=0.1)

        model = wrap(AllNamed(), local_predictor=True)
        (group,) = model.configure_optimizers().param_groups
        expected = {name: id(p) for name, p in model.named_parameters()}
        assert dict(zip(group["param_names"], map(id, group["params"]), strict=True)) == expected

    def test_detached_loss(self):
        class Detached(hosts.BYOL):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx).detach()

        with pytest.raises(RuntimeError, match=r"the step's loss carries no gradient, .* return it undetached"):
            wrap(Detached()).training_step(batch(), 0)

    def test_one_batch_of_local_crops_of_two_sizes(self):
        with pytest.raises(ValueError, match="concat_local_crops=True needs local crops of one shape"):
            wrap(hosts.BYOL(), concat_local_crops=True).training_step(batch((32, 32, 24, 16)), 0)
