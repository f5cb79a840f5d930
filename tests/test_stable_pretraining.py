"""The adapter of stable-pretraining, on its own forwards, classes, callbacks and Lightning's Trainer."""

import copy
import csv
import functools
import math
import re
import types
from pathlib import Path

import pytest

pytest.importorskip("stable_pretraining", reason="stable-pretraining is not installed: make test STABLE=1")

import lightning as pl
import methods_stable
import pages
import stable_hosts
import stable_pretraining as spt
import timm
import torch
import torchmetrics
from adapter_contract import CHECKS, check_device, check_two_ranks, same, seeded, step, views
from logo_plugin.adapters.lightning import LoGoMonitor
from methods_stable import CASES
from photos import tiles
from PIL import Image
from stable_pretraining import callbacks, forward, methods
from torch import nn
from torch.utils.data import DataLoader

import logo_plugin
from logo_plugin import MultiCropCollate
from logo_plugin.__main__ import main

# With the paper's affinity, whose parameters and random numbers the tests follow, where nothing else is said.
wrap = functools.partial(logo_plugin.wrap, affinity="learned")

# The hosts' own: they log outside a Trainer, and Lightning has advice for tiny runs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are trying to `self.log"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Views(torch.utils.data.Dataset):
    """`count` views of 24 noise images as `MultiViewTransform` gives them, or single ones for validation."""

    def __init__(self, count, named=False):
        self.count, self.named = count, named

    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        views = [
            {"image": torch.randn(3, side, side, generator=generator), "label": index % 4}
            for side in (32, 32, 24, 24)[: self.count]
        ]
        if self.count == 1:
            return views[0]
        names = ("global_0", "global_1", "local_0", "local_1")
        return dict(zip(names, views, strict=False)) if self.named else {"views": views}


def batch():
    label = torch.arange(6)
    return {"views": [{"image": view, "label": label} for view in views()], "batch_idx": 0}


def evaluators(model):
    accuracy = {"top1": torchmetrics.classification.MulticlassAccuracy(4)}
    probe = callbacks.OnlineProbe(
        model,
        name="probe",
        input="embedding",
        target="label",
        probe=nn.Linear(32, 4),
        loss=nn.CrossEntropyLoss(),
        metrics=accuracy,
        optimizer={"type": "SGD", "lr": 0.1},
    )
    knn = callbacks.OnlineKNN(
        name="knn",
        input="embedding",
        target="label",
        queue_length=48,
        metrics=copy.deepcopy(accuracy),
        input_dim=32,
        k=3,
        num_classes=4,
    )
    return [callbacks.TeacherStudentCallback(), probe, knn]


def trainer(added=(), **options):
    defaults = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=1, callbacks=list(added), **(defaults | quiet | options))


def fit(model, train, added=(), valid=False, ckpt_path=None, **options):
    run = trainer(added, **options)
    loaders = [train if isinstance(train, DataLoader) else DataLoader(train, batch_size=6)]
    run.fit(model, *loaders, *([DataLoader(Views(1), batch_size=6)] if valid else []), ckpt_path=ckpt_path)
    return run


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("logo")}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_contract(name, check):
    check(CASES[name])


def test_two_ranks(tmp_path):
    # With an empty support set nnclr leaves its predictor unused, which DDP refuses, with or without LoGo.
    buffers = check_two_ranks(CASES | {"nnclr": methods_stable.case("nnclr", filled=16)}, tmp_path)
    first, second = buffers["MoCov2"]
    assert torch.equal(first["queue.pointer"], second["queue.pointer"])


def test_on_a_device():
    check_device(CASES)


@pytest.mark.parametrize("name", CASES)
class TestEachMethod:
    def test_trains_as_the_host_with_weights_at_zero(self, name):
        """A real run with probe, k-NN and EMA ends with the host's parameters, and validates to the host's values."""
        runs = []
        for count, options in ((2, None), (4, {"affinity": None, "local_global_weight": 0})):
            model = seeded(stable_hosts.host, name=name)
            model = model if options is None else wrap(model, **options)
            torch.manual_seed(1)
            run = fit(model, Views(count), evaluators(model))
            runs.append((run, model))
        (host_run, host), (run, model) = runs
        same(parameters(model), parameters(host), name, rtol=1e-3, atol=1e-5)
        for key in ("fit/loss_step", "train/probe_loss_step"):
            torch.testing.assert_close(run.callback_metrics[key], host_run.callback_metrics[key], rtol=1e-3, atol=1e-4)

    def test_global_global_is_the_hosts_loss(self, name):
        """What LoGo calls global_global is what the host logs, also where its loss is written into the forward."""
        case = CASES[name]
        host, model = seeded(case.host), seeded(case.build)
        for i in range(2):
            expected, _ = step(case, host, views(i)[:2])
            step(case, model, views(i))
            torch.testing.assert_close(model.logo_terms.global_global, expected, rtol=1e-4, atol=1e-5)

    def test_local_crops_are_pulled_by_the_hosts_own_loss(self, name):
        """Where all crops are one picture, a local crop costs what a global one does, whichever it is compared with."""
        case = CASES[name]
        model = seeded(case.build, affinity=None)
        for i in range(3):
            step(case, model, [views(i)[0].clone() for _ in range(4)])
            terms = model.logo_terms
            torch.testing.assert_close(terms.local_global, terms.global_global, rtol=1e-3, atol=1e-5)

    def test_in_half_precision(self, name):
        """Where the loss is written into the forward, its gradient is recognised in bfloat16, too."""
        run = fit(
            wrap(stable_hosts.method(name) if name in stable_hosts.CLASSES else stable_hosts.module(name)),
            Views(4),
            precision="bf16-mixed",
        )
        assert all(value.isfinite() for value in run.callback_metrics.values())

    def test_real_images(self, name):
        """One line for the model, one for the data; the affinity learns, and k-NN is logged beside LoGo's terms."""
        dataset = spt.data.FromTorchDataset(tiles(24), names=["image", "label"])
        collate = MultiCropCollate.cifar10(local_size=24)
        model = wrap(stable_hosts.method(name) if name in stable_hosts.CLASSES else stable_hosts.module(name))
        before = [p.detach().clone() for p in model.logo.affinity.parameters()]
        run = fit(model, DataLoader(dataset, batch_size=12, collate_fn=collate), evaluators(model), valid=True)
        assert any(not torch.equal(p, q) for p, q in zip(model.logo.affinity.parameters(), before, strict=True))
        logged = run.callback_metrics
        assert {"logo/global_global", "logo/local_global", "logo/local_local", "logo/affinity"} <= logged.keys()
        assert "eval/knn_top1" in logged
        assert all(value.isfinite() for key, value in logged.items() if key.startswith(("logo", "fit")))


DECAYED = {"type": "SGD", "lr": 0.05, "weight_decay": 0.1}
HEADS = {"modules": "projector|predictor", "optimizer": DECAYED, "scheduler": "ConstantLR"}
BACKBONE = {"modules": "backbone", "optimizer": {"type": "SGD", "lr": 0.01}, "scheduler": "ConstantLR"}


class TestOptimizers:
    def homes(self, model, optim, probe=False):
        """How often each of the affinity's parameters is in each optimizer's groups, and with which weight decay."""
        model.optim = optim
        found = []

        class Look(pl.Callback):
            def on_train_start(self, trainer, pl_module):
                own = {id(p) for p in pl_module.logo.parameters()}
                for i, optimizer in enumerate(trainer.optimizers):
                    for group in optimizer.param_groups:
                        inside = [id(p) for p in group["params"] if id(p) in own]
                        assert len(inside) == len(set(inside))
                        if inside:
                            found.append((i, group.get("weight_decay"), len(inside) == len(own)))

        added = evaluators(model)[1:] if probe else []
        fit(model, Views(4), [*added, Look()], max_steps=1)
        return found

    @pytest.mark.parametrize("probe", [False, True])
    def test_one_optimizer_has_it(self, probe):
        optim = {"optimizer": DECAYED, "scheduler": "ConstantLR"}
        assert self.homes(wrap(stable_hosts.module("byol")), optim, probe) == [(0, 0.1, True)]

    def test_without_weight_decay_where_a_group_has_none(self):
        optim = {"optimizer": {**DECAYED, "exclude_bias_norm": True}, "scheduler": "ConstantLR"}
        assert self.homes(wrap(stable_hosts.module("byol")), optim) == [(0, 0.0, True)]

    def test_joins_the_projectors_optimizer_not_the_probes(self):
        optim = {"backbone": BACKBONE, "heads": HEADS}
        assert self.homes(wrap(stable_hosts.module("byol")), optim, probe=True) == [(1, 0.1, True)]

    def test_stays_where_a_regex_puts_it(self):
        logo = {"modules": "logo", "optimizer": {"type": "Adam", "lr": 0.001}, "scheduler": "ConstantLR"}
        optim = {"backbone": BACKBONE, "heads": HEADS, "logo": logo}
        assert self.homes(wrap(stable_hosts.module("byol")), optim) == [(2, 0, True)]

    def test_regexes_that_split_it(self):
        """A layer of the affinity that another optimizer has goes to the first one's."""
        parts = {f"logo.affinity.{n}": {**BACKBONE, "modules": f"logo.affinity.*{n}"} for n in (0, 3)}
        found = self.homes(wrap(stable_hosts.module("byol")), {"backbone": BACKBONE, "heads": HEADS, **parts})
        assert [whole for _, _, whole in found] == [True]

    def test_no_optimizer_for_the_projector(self):
        model = wrap(stable_hosts.module("byol"))
        with pytest.raises(ValueError, match=r"no optimizer of Module has its projector.*widen the regex 'modules'"):
            self.homes(model, {"backbone": BACKBONE})

    @pytest.mark.parametrize("name", ["simclr", "SimSiam"])
    def test_the_default_has_nothing_to_join(self, name):
        """The cosine is repelled, ever less: the Trainer says how far it is, also where the model steps itself."""
        model, host_alone = logo_plugin.wrap(stable_hosts.host(name)), stable_hosts.host(name)
        run = fit(model, Views(4))
        steps = run.max_steps if run.max_steps > 0 else run.max_epochs * run.num_training_batches
        torch.testing.assert_close(model.logo._strength, torch.tensor((1 - math.cos(math.pi / steps)) / 2))
        params = [p for group in run.optimizers[0].param_groups for p in group["params"]]
        assert len(params) == len([*host_alone.parameters()])
        z = model.logo_local_proj
        torch.testing.assert_close(model.logo_terms.local_local, nn.functional.cosine_similarity(*z).mean())

    @pytest.mark.parametrize("name", CASES)
    def test_the_default_is_stronger_beside_a_queue_of_negatives(self, name):
        assert logo_plugin.wrap(stable_hosts.host(name)).logo.gradient_ratio == (0.3 if name == "MoCov2" else 0.1)
        assert logo_plugin.wrap(stable_hosts.host(name), gradient_ratio=0.2).logo.gradient_ratio == 0.2

    def test_a_local_predictor_joins_the_predictor(self):
        model = wrap(stable_hosts.module("byol"), local_predictor=True)
        weight = model.logo_local_predictor[0].weight.detach().clone()
        heads = {**HEADS, "modules": "projector"}
        predictor = {**HEADS, "modules": "predictor"}
        model.optim = {"backbone": BACKBONE, "heads": heads, "predictor": predictor}
        run = fit(model, Views(4), max_steps=2)
        held = [{id(p) for g in o.param_groups for p in g["params"]} for o in run.optimizers]
        assert [{id(p) for p in model.logo_local_predictor.parameters()} <= ids for ids in held] == [False, False, True]
        assert not torch.equal(model.logo_local_predictor[0].weight, weight)


class TestBatches:
    @pytest.mark.parametrize("data", [Views(4), Views(4, named=True)], ids=["list", "named"])
    def test_forms_agree(self, data):
        """The host itself takes named views in validation only: it counts batch_idx as a view."""
        model = wrap(seeded(stable_hosts.module, name="simclr"), affinity=None)
        run = fit(model, data)
        expected = fit(wrap(seeded(stable_hosts.module, name="simclr"), affinity=None), Views(4))
        for key in ("logo/local_global", "fit/loss_step"):
            assert run.callback_metrics[key] == expected.callback_metrics[key]

    def test_names_below_views(self):
        model, (a, b, *local) = wrap(seeded(stable_hosts.module, name="simclr"), affinity=None), batch()["views"]
        expected = model(batch(), stage="fit")["loss"]
        named = {"local_1": local[0], "global_1": a, "local_2": local[1], "global_2": b}
        assert model({"views": named, "batch_idx": 0}, stage="fit")["loss"] == expected

    def test_a_forward_finds_its_views_by_name(self):
        def by_name(self, batch, stage):
            views = [batch[name] for name in ("global_0", "global_1")]
            return forward.simclr(self, {"views": views}, stage)

        model = wrap(stable_hosts.module("simclr"), affinity=None)
        model.forward = types.MethodType(by_name, model)
        fit(model, Views(4, named=True), max_steps=1)
        assert model.logo_terms.local_global.isfinite()

    @pytest.mark.parametrize("defer", ["normalize", "augment"])
    def test_views_finished_on_the_device(self, defer):
        dataset = spt.data.FromTorchDataset(tiles(12), names=["image", "label"])
        collate = MultiCropCollate.cifar10(local_size=24, defer=defer, return_boxes=True)
        model = wrap(stable_hosts.module("byol"), weigh_overlap=True)
        run = fit(model, DataLoader(dataset, batch_size=6, collate_fn=collate), evaluators(model))
        assert run.callback_metrics["logo/affinity"].isfinite()

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"image": torch.zeros(6, 3, 32, 32)}, "got a dict of .*MultiCropCollate"),
            ({"views": [torch.zeros(6), "label"]}, "MultiCropCollate"),
            ({}, "MultiCropCollate"),
            ([torch.zeros(6, 3, 32, 32)], "got a list"),
            ({"views": batch()["views"][:2]}, "no local crops"),
            ({f"global_{i}": view for i, view in enumerate(batch()["views"])}, "4 global views.*global_crops=4"),
        ],
    )
    def test_wrong_ones(self, wrong, message):
        model = wrap(stable_hosts.module("byol"))
        with pytest.raises(ValueError, match=message):
            model(wrong, stage="fit")

    def test_dict_samples(self):
        """Views share the other columns; a batch that torch's own collate would make of one view has the same."""
        samples = [{"image": image, "label": label, "name": f"{i}"} for i, (image, label) in enumerate(tiles(3))]
        torch.manual_seed(0)
        made = MultiCropCollate.cifar10(return_boxes=True)(samples)
        torch.manual_seed(0)
        expected, labels, boxes = MultiCropCollate.cifar10(return_boxes=True)(tiles(3))
        assert made.keys() == {"views", "boxes"}
        assert len(made["views"]) == 4
        for view, image in zip(made["views"], expected, strict=True):
            assert torch.equal(view["image"], image)
            assert torch.equal(view["label"], labels)
            assert view["name"] == ["0", "1", "2"]
        assert torch.equal(made["boxes"].boxes, boxes.boxes)


class TestOutsideTraining:
    @pytest.mark.parametrize("name", CASES)
    def test_validation_is_the_hosts(self, name):
        host, model = seeded(stable_hosts.host, name=name).eval(), wrap(seeded(stable_hosts.host, name=name)).eval()
        single = {"image": views()[0], "label": torch.arange(6)}
        with torch.no_grad():
            expected, out = (m(dict(single), stage="validate") for m in (host, model))
        assert out.keys() == expected.keys()
        assert torch.equal(out["embedding"], expected["embedding"])

    def test_a_class_without_forward_validates(self):
        model = wrap(seeded(stable_hosts.method, name="MoCov2")).eval()
        out = model({"image": views()[0], "label": torch.arange(6)}, stage="validate")
        assert torch.equal(out["embedding"], model.backbone.forward_teacher(views()[0]))
        assert torch.equal(out["label"], torch.arange(6))

    def test_the_teacher_moves_by_the_average_alone(self):
        model = wrap(stable_hosts.module("byol"))
        before = [p.clone() for p in model.projector.teacher.parameters()]
        fit(model, Views(4), [callbacks.TeacherStudentCallback()], max_steps=1)
        for old, new, student in zip(
            before, model.projector.teacher.parameters(), model.projector.student.parameters(), strict=True
        ):
            torch.testing.assert_close(new, 0.9 * old + 0.1 * student)

    def test_the_order_of_probe_and_wrap_does_not_matter(self):
        found = []
        for late in (False, True):
            model = seeded(stable_hosts.glued, name="BYOL")
            if not late:
                wrap(model)
            torch.manual_seed(2)
            added = evaluators(model)
            torch.manual_seed(3)
            if late:
                wrap(model, affinity=None)
            else:
                model.logo.affinity = None
            torch.manual_seed(4)
            fit(model, Views(4), added)
            found.append(parameters(model))
        same(*found, "parameter", rtol=0, atol=0)


@pytest.mark.parametrize("named", [False, True])
def test_the_monitor(named, tmp_path):
    logger = pl.pytorch.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    model = wrap(stable_hosts.module("byol"))
    fit(model, Views(4, named=named), [LoGoMonitor(every_n_steps=1)], logger=logger)
    assert (Path(logger.log_dir) / "logo_crops" / "epoch_0000.png").exists()
    assert "logo/embedding_std" in (Path(logger.log_dir) / "metrics.csv").read_text()


class TestCheckpoints:
    def test_a_resumed_run_ends_as_a_whole_one(self, tmp_path):
        def build():
            model = wrap(seeded(stable_hosts.module, name="byol"), local_weight=0.5, positive_noise=0.0)
            model.optim = {"optimizer": {"type": "SGD", "lr": 0.05, "momentum": 0.9}, "scheduler": "ConstantLR"}
            return model, [callbacks.TeacherStudentCallback()]

        ends = []
        for parts in ((2,), (1, 2)):
            path = None
            for epochs in parts:
                model, added = build()

                class Seed(pl.Callback):  # the affinity's negatives are drawn
                    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                        torch.manual_seed(trainer.global_step)

                run = fit(model, Views(4), [*added, Seed()], ckpt_path=path, max_epochs=epochs)
                path = tmp_path / f"{epochs}.ckpt"
                run.save_checkpoint(path)
            ends.append(dict(model.named_parameters()))
        same(ends[1], ends[0], "parameter", rtol=0, atol=0)

    def test_a_class_loads_its_own(self, tmp_path):
        wrapped = wrap(methods.BYOL)
        parts = {"encoder_name": stable_hosts.backbone(), **stable_hosts.CLASSES["BYOL"]}
        model = wrapped(**parts)
        model.optim = stable_hosts.OPTIM
        run = fit(model, Views(4), max_steps=1)
        run.save_checkpoint(tmp_path / "byol.ckpt")
        again = wrapped.load_from_checkpoint(tmp_path / "byol.ckpt", **parts)
        same(again.state_dict(), model.state_dict(), "state", rtol=0, atol=0)
        assert isinstance(again, methods.BYOL)

    @pytest.mark.parametrize("kind", ["byol", "SimSiam"])
    def test_exported_to_timm(self, kind, tmp_path, capsys):
        """A checkpoint of real tiles holds teacher, heads and LoGo; what comes out is the student's backbone."""
        from stable_pretraining.backbone import from_torchvision

        own = from_torchvision("resnet18") if kind == "byol" else timm.create_model("resnet18", num_classes=0)
        if kind == "byol":
            model = stable_hosts.module("byol", backbone=stable_hosts.teacher_student(own))
            model.projector = stable_hosts.teacher_student(stable_hosts.head(512, 24, 16))
        else:
            model = methods.SimSiam(encoder_name=own, **stable_hosts.CLASSES["SimSiam"])
            model.optim = stable_hosts.OPTIM
        model = wrap(model)
        collate = MultiCropCollate(global_size=40, local_size=24)
        samples = [{"image": image, "label": label} for image, label in tiles(12)]
        added = [callbacks.TeacherStudentCallback()] if kind == "byol" else []
        run = fit(model, DataLoader(samples, batch_size=6, collate_fn=collate), added)
        run.save_checkpoint(tmp_path / "run.ckpt")

        assert main(["export", str(tmp_path / "run.ckpt"), str(tmp_path / "b.pt"), "--arch", "resnet18"]) == 0
        said = capsys.readouterr().out
        student = model.backbone.student if kind == "byol" else model.backbone
        assert f"from backbone{'.student' if kind == 'byol' else ''}" in said
        for left in ("projector", "logo"):
            assert f"left out: {left}" in said
        net = timm.create_model("resnet18", num_classes=0)
        net.load_state_dict(torch.load(tmp_path / "b.pt"), strict=True)
        images = torch.rand(2, 3, 64, 64)
        torch.testing.assert_close(net.eval()(images), student.eval()(images))
        if kind == "byol":
            assert not torch.equal(model.backbone.teacher.conv1.weight, net.conv1.weight)

    @pytest.mark.filterwarnings("ignore")  # Lightning's, of few workers and few batches
    def test_pages_from_pretraining_to_fine_tuning(self, tmp_path, monkeypatch, capsys):
        """Each block that the pages have for this host, and what they share: LoGo on tiles, export, k-NN, probe."""
        from stable_pretraining.backbone import from_torchvision

        monkeypatch.chdir(tmp_path)
        host, after = (pages.ROOT / "docs" / f"{name}.md" for name in ("stable-pretraining", "after-pretraining"))
        torch.manual_seed(0)
        parts = {"backbone": from_torchvision("resnet18", low_resolution=True), "projector": stable_hosts.head(512, 16)}
        samples = [{"image": image, "label": label} for image, label in tiles(4, 32)]
        loader = DataLoader(samples, batch_size=4, collate_fn=MultiCropCollate(global_size=16, local_size=12))
        fit(wrap(stable_hosts.module("simclr", **parts)), loader).save_checkpoint("low_resolution.ckpt")

        given = {"images": tiles(16), "backbone": from_torchvision("resnet18")}
        given |= {"projector": stable_hosts.head(512, 24, 16), "predictor": stable_hosts.head(16, 24, 16)}
        pages.run(host, ["One line"], given)
        trained = given["module"].backbone

        own, shared = "The same with stable-pretraining", "k-NN and linear probe, with scikit-learn"
        names = {"model": given["module"], "train": tiles(40, 64), "held_out": tiles(56, 64)[40:]}
        pages.run(after, [own], names, "bash")
        pages.run(after, ["Export the backbone", "Features", shared, own, "Fine-tuning, with timm"], names, "python")

        student = torch.load("backbone.pt")
        assert torch.equal(student["conv1.weight"], trained.student.conv1.weight)
        assert torch.equal(torch.load("teacher.pt")["conv1.weight"], trained.teacher.conv1.weight)
        assert not torch.equal(student["conv1.weight"], trained.teacher.conv1.weight)
        assert torch.equal(torch.load("small.pt")["conv1.weight"], parts["backbone"].conv1.weight)
        assert names["lacking"].missing_keys == ["fc.weight", "fc.bias"]
        knn, probe = re.search(r"tensor\((\S+)\) tensor\((\S+)\)", capsys.readouterr().out).groups()
        assert float(knn) > 0.25  # of four photographs
        assert float(probe) > 0.25

    def test_a_copy_trains_apart(self):
        model = wrap(stable_hosts.module("byol"))
        twin = copy.deepcopy(model)
        before = parameters(model)
        fit(twin, Views(4), max_steps=1)
        same(parameters(model), before, "parameter", rtol=0, atol=0)
        assert twin.logo_terms is not None
        assert model.logo_terms is None


class TestRefusals:
    @pytest.mark.parametrize("name", sorted(set(methods.__all__) - set(stable_hosts.CLASSES)))
    def test_classes(self, name):
        with pytest.raises(ValueError, match=rf"^{name} (has|learns|compares|computes) .*(LoGo has|LoGo cannot)"):
            wrap(getattr(methods, name))

    @pytest.mark.parametrize("name", methods_stable.refused_forwards())
    def test_forwards(self, name):
        with pytest.raises(ValueError, match=r"trains with .*LoGo (has|cannot)|has no loss of two views.*cannot"):
            wrap(methods_stable.refused_forwards()[name]())

    def test_two_losses(self):
        model = stable_hosts.module("simclr", vicreg_loss=spt.losses.VICRegLoss())
        with pytest.raises(ValueError, match=r"several losses.*criterion="):
            wrap(model)
        assert type(model) is spt.Module
        model = wrap(model, criterion="simclr_loss", affinity=None)
        assert model(batch(), stage="fit")["loss"].isfinite()

    def test_a_class_with_another_loss(self):
        class Sharper(methods.SimSiam):
            def forward(self, view1, view2=None):
                out = super().forward(view1, view2)
                out.loss = out.loss + out.prediction.pow(2).mean()
                return out

        model = wrap(stable_hosts.method("SimSiam", cls=Sharper))
        with pytest.raises(RuntimeError, match="the loss of Sharper is not the one that LoGo knows"):
            model(batch(), stage="fit")

    def test_a_class_with_another_temperature(self):
        class Sharper(methods.MoCov3):
            def forward(self, view1, view2=None):
                self.temperature = 0.2
                out = super().forward(view1, view2)
                self.temperature = 0.3
                return out

        model = wrap(stable_hosts.method("MoCov3", cls=Sharper))
        with pytest.raises(RuntimeError, match="the loss of Sharper is not the one that LoGo knows"):
            model(batch(), stage="fit")

    def test_a_scaled_loss_scales_logos(self):
        """`0.25 * loss` is learned from the gradient, and LoGo's terms follow it."""

        class Quarter(methods.SimSiam):
            def forward(self, view1, view2=None):
                out = super().forward(view1, view2)
                out.loss = 0.25 * out.loss
                return out

        losses = [
            wrap(seeded(stable_hosts.method, name="SimSiam", cls=cls), affinity=None)(batch(), stage="fit")["loss"]
            for cls in (methods.SimSiam, Quarter)
        ]
        torch.testing.assert_close(losses[1], 0.25 * losses[0])

    def test_two_views_without_a_batch(self):
        model = wrap(stable_hosts.method("BYOL"))
        for call in (lambda a, b: model(a, b), lambda a, b: model(view1=a, view2=b)):
            with pytest.raises(ValueError, match=r"needs local crops.*model\(batch, stage='fit'\)"):
                call(*views()[:2])

    def test_a_training_step_that_goes_past_logo(self):
        class Past(spt.Module):
            def training_step(self, batch, batch_idx):
                state = self.forward({"views": batch["views"][:2]}, "fit")
                self.manual_backward(state["loss"])
                self.optimizers().step()

        parts = {"backbone": stable_hosts.backbone(), "projector": stable_hosts.head(32, 24, 16)}
        model = wrap(Past(forward=forward.simclr, optim=stable_hosts.OPTIM, **parts, **stable_hosts.FORWARDS["simclr"]))
        before = parameters(model)
        with pytest.raises(RuntimeError, match=r"did not call self\(batch, stage=...\)"):
            fit(model, Views(4))
        same(parameters(model), before, "parameter", rtol=0, atol=0)

    def test_local_predictor_without_predictor(self):
        with pytest.raises(ValueError, match="local_predictor=True copies the predictor"):
            wrap(stable_hosts.module("simclr"), local_predictor=True)

    def test_a_backbone_of_one_size(self):
        backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 32))
        with pytest.raises(RuntimeError, match=r"failed on local crops .*local_size=global_size"):
            wrap(stable_hosts.module("simclr", backbone=backbone))(batch(), stage="fit")


def with_forward(forward):
    """A module of a forward of one's own, SimCLR of the views that it is given."""
    parts = {"backbone": stable_hosts.backbone(), "projector": stable_hosts.head(32, 24, 16)}
    return spt.Module(forward=forward, optim=stable_hosts.OPTIM, **stable_hosts.FORWARDS["simclr"], **parts)


def test_callbacks_read_what_a_forward_writes_into_the_batch():
    def writing(self, batch, stage):
        if "views" not in batch:
            batch["embedding"] = self.backbone(batch["image"])
            return batch
        features = [self.backbone(view["image"]) for view in batch["views"]]
        batch["embedding"] = torch.cat(features).detach()
        batch["label"] = torch.cat([view["label"] for view in batch["views"]])
        return {"loss": self.simclr_loss(*map(self.projector, features))}

    model = logo_plugin.wrap(with_forward(writing))
    *_, knn = evaluators(model)
    assert fit(model, Views(4), added=[knn], valid=True).callback_metrics["eval/knn_top1"] >= 0


def test_eval_mode_is_said():
    def first_two(self, batch, stage):
        projections = [self.projector(self.backbone(view["image"])) for view in batch["views"][:2]]
        return {"loss": self.simclr_loss(*projections)}

    model = logo_plugin.wrap(with_forward(first_two)).eval()
    with pytest.warns(UserWarning, match="is in eval mode, so its loss is without LoGo's terms"):
        fit(model, Views(4))


class Named(Views):
    """Views by name, as tensors, local ones first, among other columns."""

    def __getitem__(self, index):
        views = super().__getitem__(index)["views"]
        names = ("local_0", "local_1", "global_0", "global_1")
        named = {name: view["image"] for name, view in zip(names, views[2:] + views[:2], strict=True)}
        return {"label": index % 4, **named, "words": "of a text"}


def test_the_monitor_draws_named_views_in_their_order(tmp_path):
    found = []
    for data in (Views(4), Named(4)):
        logger = pl.pytorch.loggers.CSVLogger(tmp_path)
        model = logo_plugin.wrap(seeded(functools.partial(stable_hosts.module, "byol")))
        fit(model, data, added=[LoGoMonitor(images=2)], logger=logger, log_every_n_steps=1)
        found.append(Image.open(Path(logger.log_dir) / "logo_crops" / "epoch_0000.png").tobytes())
    assert found[0] == found[1]


def test_the_monitor_logs_at_the_hosts_steps(tmp_path):
    """Where an optimizer steps at every second batch, too."""
    logger = pl.pytorch.loggers.CSVLogger(tmp_path)
    model = logo_plugin.wrap(stable_hosts.module("byol", optim={**stable_hosts.OPTIM, "frequency": 2}))
    fit(model, Views(4), added=[LoGoMonitor()], logger=logger, log_every_n_steps=1, max_epochs=2)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    steps = [{row["step"] for row in rows if row.get(name)} for name in ("logo/embedding_std", "logo/local_local")]
    assert steps[0] == {"1", "3", "5", "7"}
    assert steps[0] <= steps[1]
