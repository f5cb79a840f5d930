"""`export_backbone` and `python -m logo_plugin export`: the values of a run under timm's and torchvision's names."""

import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pages
import pytest
import pytorch_lightning as pl
import timm
import torch
import torchvision
from hosts import BYOL, Momentum, SimSiam
from hosts import wrap_learned as wrap
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimSiamProjectionHead
from photos import tiles
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from logo_plugin import LoGoLearner, MultiCropCollate
from logo_plugin.__main__ import main
from logo_plugin.export import export_backbone

ROOT = os.environ.get("SOLO_LEARN_ROOT")
PAGE = pages.ROOT / "docs" / "after-pretraining.md"
OTHER_HOSTS = ["The same with solo-learn", "The same with stable-pretraining"]


def headless(arch="resnet18"):
    net = torchvision.models.get_model(arch, weights=None)
    net.fc = nn.Identity()
    return net


def with_cifar_stem(padding):
    net = headless()
    net.conv1, net.maxpool = nn.Conv2d(3, 64, 3, padding=padding, bias=False), nn.Identity()
    return net


class ResNetBYOL(BYOL):
    """As lightly's examples hold a ResNet: its children in a row."""

    def __init__(self):
        super(Momentum, self).__init__()
        self.backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
        self.projection_head = BYOLProjectionHead(512, 32, 16)
        self.prediction_head = BYOLPredictionHead(16, 24, 16)
        self.copy_momentum()
        self.criterion = NegativeCosineSimilarity()


class Holder(SimSiam):
    """A wrapped model around any backbone, whose name may be another."""

    def __init__(self, backbone, width=512):
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimSiamProjectionHead(width, 24, 16)


@pytest.fixture
def image():
    return torch.stack([torch.from_numpy(np.array(tile)) for tile, _ in tiles(2)]).permute(0, 3, 1, 2) / 255


def output(model, images):
    return model.eval()(images).detach().flatten(1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A Lightning checkpoint of a few steps on real tiles, and the backbone that was trained."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = wrap(ResNetBYOL())
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=2, accelerator="cpu", enable_model_summary=False, **options)
    loader = DataLoader(tiles(16), batch_size=8, collate_fn=MultiCropCollate.cifar10())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader)
    trainer.save_checkpoint(folder / "byol.ckpt")
    return folder / "byol.ckpt", model


def test_command_line_to_a_fresh_process(run, image, tmp_path, capsys):
    """What it prints loads with strict=True where nothing of ours is imported, and computes the same of an image."""
    checkpoint, model = run
    torch.save(image, tmp_path / "image.pt")
    programs = []
    for library in ("timm", "torchvision"):
        file = tmp_path / f"{library}.pt"
        assert main(["export", str(checkpoint), str(file), "--to", library, "--arch", "resnet18"]) == 0
        said = capsys.readouterr().out
        assert "120 values, from backbone, by order and shape" in said
        for left in ("projection_head", "prediction_head", "projection_head_momentum", "logo"):
            assert f"left out: {left} (" in said
        assert "backbone_momentum would fit too: --backbone backbone_momentum" in said
        code = said.split("It loads with\n\n")[1]
        assert "logo" not in code.replace(str(tmp_path), "")
        programs.append(f"{code}image = torch.load('image.pt')\ntorch.save(model.eval()(image), '{library}.out')")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(programs)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for library in ("timm", "torchvision"):
        torch.testing.assert_close(torch.load(tmp_path / f"{library}.out"), output(model.backbone, image))


def test_momentum_encoder_on_request(run):
    _, model = run
    found = export_backbone(model, "torchvision", backbone="backbone_momentum")
    assert torch.equal(found.state_dict["conv1.weight"], model.backbone_momentum[0].weight)
    assert found.path == "backbone_momentum"


def test_nothing_is_lost_between_exported_and_left_out(run):
    _, model = run
    found = export_backbone(model)
    state = model.state_dict()
    assert len(found.state_dict) + len(found.left_out) == len(state)
    assert all(name in state for name in found.left_out)
    assert not any(name.startswith("backbone.") for name in found.left_out)


@pytest.mark.parametrize("method", ["byol", "simsiam", "moco"])
@pytest.mark.parametrize("to", ["timm", "torchvision"])
def test_learner(method, to, image):
    net = timm.create_model("resnet18", num_classes=0) if to == "timm" else headless()
    learner = LoGoLearner(net, method, image_size=(32, 32), hidden_dim=16, output_dim=8, affinity="learned")
    found = export_backbone(learner, to, "resnet18")
    assert (found.path, found.by) == ("backbone", "name")
    names = {}
    exec(found.code, names)
    names["model"].load_state_dict(found.state_dict, strict=True)
    torch.testing.assert_close(output(names["model"], image), output(net, image))


def test_classifier_of_the_backbone_is_left_out_by_name(tmp_path, capsys):
    """The README's loop has backbone and projector in one: fc is its projector."""
    torch.save(torchvision.models.resnet18(num_classes=16).state_dict(), tmp_path / "encoder.pt")
    assert main(["export", str(tmp_path / "encoder.pt"), str(tmp_path / "b.pt"), "--arch", "resnet18"]) == 0
    said = capsys.readouterr().out
    assert "left out: fc.weight\n  left out: fc.bias\n" in said
    assert "from the whole source, by name" in said


@pytest.mark.parametrize("to", ["timm", "torchvision"])
def test_a_classifier_left_out_of_a_model_that_is_run(to):
    """The README's module has backbone and projector in one."""
    found = export_backbone(Holder(torchvision.models.resnet18(num_classes=16)), to, "resnet18")
    assert {"backbone.fc.weight", "backbone.fc.bias"} <= set(found.left_out)


@pytest.mark.parametrize(
    ("to", "arch", "options"),
    [("timm", "vit_tiny_patch16_224", {"img_size": 64}), ("torchvision", "vit_b_16", {"image_size": 32})],
)
def test_a_vit_that_is_run_at_its_own_size(to, arch, options):
    if to == "timm":
        net = timm.create_model(arch, num_classes=0, **options)
    else:
        net = torchvision.models.get_model(arch, **options)
    assert export_backbone(net, to, arch, **options).by == "name"


@pytest.mark.parametrize("make", [lambda x: (x, x), lambda x: x[:, :, :9].sum("no dimension")])
def test_a_backbone_that_cannot_be_compared(make):
    class Odd(torchvision.models.ResNet):
        def forward(self, x):
            return make(super().forward(x))

    net = Odd(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2])
    with pytest.raises(ValueError, match=r"does not take or give what that does.*Export its state_dict\(\)"):
        export_backbone(net, "torchvision", "resnet18")


@pytest.mark.parametrize(
    ("arch", "options", "head"),
    [
        ("mobilenet_v3_small", {}, "classifier.3"),
        ("convnext_tiny", {}, "classifier.2"),
        ("vit_b_16", {"image_size": 32}, "heads.head"),
    ],
)
def test_heads_of_torchvision(arch, options, head):
    net = torchvision.models.get_model(arch, weights=None, **options)
    parent, _, name = head.rpartition(".")
    setattr(net.get_submodule(parent), name, nn.Identity())
    found = export_backbone(net.state_dict(), "torchvision", arch, **options)
    assert found.head == head
    names = {}
    exec(found.code, names)
    names["model"].load_state_dict(found.state_dict, strict=True)


def test_the_whole_classifier_where_a_backbone_has_none_of_it():
    """mobilenet's classifier has two layers; children()[:-1] has neither."""
    net = nn.Sequential(*list(torchvision.models.mobilenet_v3_small().children())[:-1])
    found = export_backbone(net, "torchvision", "mobilenet_v3_small")
    assert (found.head, found.by) == ("classifier", "order and shape")


def test_vit_of_another_size(image):
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=48, depth=1)
    found = export_backbone({"backbone." + k: v for k, v in net.state_dict().items()}, "timm", "vit_tiny_patch16_224",
                            img_size=48, depth=1)  # fmt: skip
    names = {}
    exec(found.code, names)
    names["model"].load_state_dict(found.state_dict, strict=True)
    torch.testing.assert_close(output(names["model"], image), output(net, image))


@pytest.mark.parametrize("padding", [1, 2])
def test_stem_for_small_images(padding, image):
    net = with_cifar_stem(padding)
    model = wrap(Holder(net))
    with pytest.raises(ValueError, match=r"1 difference: conv1.weight is \(64, 3, 3, 3\).*--cifar-stem 1"):
        export_backbone(model, "timm", "resnet18")
    found = export_backbone(model, "timm", "resnet18", cifar_stem=padding)
    names = {}
    exec(found.code, names)
    names["model"].load_state_dict(found.state_dict, strict=True)
    torch.testing.assert_close(output(names["model"], image), output(net, image))
    with pytest.raises(ValueError, match="computes something else of an image"):
        export_backbone(model, "timm", "resnet18", cifar_stem=3 - padding)


def test_values_that_fit_in_a_network_that_computes_something_else():
    children = list(torchvision.models.resnet18().children())[:-1]
    model = wrap(Holder(nn.Sequential(*[c for c in children if not isinstance(c, nn.MaxPool2d)])))
    with pytest.raises(ValueError, match=r"backbone has the values of timm's resnet18 but computes something else"):
        export_backbone(model, "timm", "resnet18")


@pytest.mark.parametrize(
    ("online", "other"),
    [
        ("backbone.student", "backbone.teacher"),  # stable-pretraining's TeacherStudentWrapper
        ("student_backbone", "teacher_backbone"),
        ("module.backbone._orig_mod", "module.backbone_ema"),  # DDP around torch.compile
        ("module.encoder_q", "module.encoder_k"),  # MoCo's own code
        ("schema.monkey_backbone", "schema.momentum_backbone"),  # "ema" and "key" as parts of words
    ],
)
def test_the_online_network_is_taken(online, other):
    first, second = headless(), headless()
    state = {f"{path}.{key}": value for path, net in ((other, second), (online, first)) for key, value in
             net.state_dict().items()}  # fmt: skip
    found = export_backbone({"state_dict": state}, "torchvision")
    assert (found.path, found.others) == (online, [other])
    assert torch.equal(found.state_dict["conv1.weight"], first.conv1.weight)


def test_an_ordinary_stem_where_another_was_said():
    with pytest.raises(ValueError, match="That is the ordinary stem: go without --cifar-stem"):
        export_backbone(Holder(headless()), cifar_stem=1)


def dead(net):
    net.conv1.weight.data.fill_(float("nan"))
    return net


def two():
    parts = nn.ModuleDict({"left": headless(), "right": headless()})
    return parts.state_dict()


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (lambda: Holder(headless("resnet34")), {}, r"layer1.2.conv1.weight is too much.*timm's resnet34 fits: --arch"),
        (lambda: Holder(headless()), {"arch": "resnet50"}, r"Nearest is 'backbone' \(120 values\).*resnet18 fits"),
        (lambda: Holder(headless()), {"arch": "resnet8"}, "timm has no network 'resnet8'; near it are resnet"),
        (lambda: Holder(headless()), {"to": "keras"}, r"to must be one of \('timm', 'torchvision'\), got 'keras'"),
        (lambda: Holder(headless()), {"backbone": "body"}, "no module 'body' in the source; it has backbone,"),
        (lambda: Holder(headless()), {"arch": "vit_tiny_patch16_224", "cifar_stem": 1}, "cifar_stem is for ResNets"),
        (lambda: Holder(headless()), {"num_classes": 5}, "num_classes=5: a backbone goes without classifier"),
        (lambda: Holder(headless()), {"to": "torchvision", "weights": "DEFAULT"}, "weights='DEFAULT': a backbone goes"),
        (lambda: Holder(headless()), {"colour": 3}, r"timm can't build resnet18, colour=3 \(.*colour"),
        (two, {}, "several modules fit timm's resnet18: left, right. Say which with --backbone left"),
        (lambda: {"epoch": 3}, {}, "found no state dict, only epoch"),
        (lambda: dead(headless()), {}, "gives nan or inf of an image: it was not trained well"),
        (lambda: [1], {}, "expected a module, a state dict or a checkpoint that holds one, got list"),
        (
            lambda: timm.create_model("resnet18", in_chans=4).state_dict(),
            {},
            r"conv1.weight is \(64, 4, 7, 7\), not \(64, 3, 7, 7\). For images of 4 channels: --option in_chans=4",
        ),
    ],
)
def test_errors_name_the_cure(source, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_backbone(source(), **arguments)


def test_files_that_are_none(tmp_path, capsys):
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    (tmp_path / "letter.ckpt").write_text("hello world")  # torch.load: KeyError: 101
    torch.save({"state_dict": headless().state_dict(), "device": MultiCropCollate()}, tmp_path / "objects.ckpt")
    out = str(tmp_path / "b.pt")
    for name, message in (
        ("missing.ckpt", "there is no checkpoint"),
        ("text.ckpt", "is no checkpoint that torch.load can read"),
        ("letter.ckpt", "is no checkpoint that torch.load can read"),
        ("objects.ckpt", "run code when they are read. If the file is yours, read it with --trust"),
    ):
        assert main(["export", str(tmp_path / name), out, "--arch", "resnet18"]) == 1
        assert message in capsys.readouterr().err
    assert main(["export", str(tmp_path / "objects.ckpt"), out, "--arch", "resnet18", "--trust"]) == 0
    torch.save({"model_state_dict": headless().state_dict()}, tmp_path / "tutorial.pt")
    assert main(["export", str(tmp_path / "tutorial.pt"), out, "--arch", "resnet18"]) == 0
    with pytest.raises(SystemExit):
        main(["export", out, str(tmp_path), "--arch", "resnet18"])
    assert f"{tmp_path} is a folder; give the name of a file in it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", out, str(tmp_path / "no" / "b.pt"), "--arch", "resnet18"])
    assert f"no folder {tmp_path / 'no'} to write b.pt to" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", out, out, "--arch", "resnet18"])
    assert "would replace the checkpoint" in capsys.readouterr().err


def test_crops_of_a_picture(tmp_path, capsys):
    tile, _ = tiles(1, size=120)[0]
    tile.save(tmp_path / "photo.png")
    command = ["crops", str(tmp_path / "photo.png"), "--output", str(tmp_path / "crops.png")]
    assert main([*command, "--option", "global_size=64", "--option", "local_size=32"]) == 0
    first = Image.open(tmp_path / "crops.png").convert("RGB")
    colors = {color for _, color in first.getcolors(first.width * first.height)}
    assert {(31, 119, 180), (255, 127, 14)} <= colors  # boxes of both kinds
    assert main([*command, "--option", "global_sise=64"]) == 1
    assert "did you mean" in capsys.readouterr().err.lower()
    assert main([*command, "--rows", "0"]) == 1
    assert "rows must be a positive integer, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, "--option", "local_crops"])
    assert "--option: must be NAME=VALUE, got local_crops" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # Lightning's, of few workers and few batches
def test_blocks_of_the_page_run_in_order(run, tmp_path, monkeypatch, capfd):
    """docs/after-pretraining.md from a checkpoint to a fine-tuned network, on tiles of photographs.

    What it has for solo-learn runs below, for stable-pretraining in test_stable_pretraining.py.
    """
    checkpoint, model = run
    monkeypatch.chdir(tmp_path)
    (tmp_path / "byol.ckpt").symlink_to(checkpoint)
    small = with_cifar_stem(padding=1)
    torch.save(wrap(Holder(small)).state_dict(), "cifar.ckpt")
    torch.save(timm.create_model("vit_tiny_patch16_224", img_size=96).state_dict(), "vit.ckpt")
    names = {"model": model, "train": tiles(40, 64), "held_out": tiles(56, 64)[40:]}
    sections = dict.fromkeys(section for section, *_ in pages.blocks(PAGE))
    pages.run(PAGE, [section for section in sections if section not in OTHER_HOSTS], names)
    assert torch.equal(torch.load("momentum.pt")["conv1.weight"], model.backbone_momentum[0].weight)
    assert torch.equal(torch.load("cifar.pt")["conv1.weight"], small.conv1.weight)
    assert torch.load("vit.pt")["pos_embed"].shape[1] == 1 + 6 * 6
    assert names["lacking"].missing_keys == ["fc.weight", "fc.bias"]
    assert names["lacking"].unexpected_keys == []
    assert names["linear"].model is names["backbone"]
    assert torch.isfinite(names["loss"])
    out = capfd.readouterr().out
    assert re.search(r"k-NN 0\.\d+, linear probe [01]\.\d+", out)
    assert "val_top1" in out


@pytest.mark.skipif(not ROOT, reason="set SOLO_LEARN_ROOT to a clone of solo-learn")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dataset", ["custom", "cifar10"])
def test_checkpoint_of_solo_learn(dataset, tmp_path, image, capsys, monkeypatch):
    """The page's command lines, on a checkpoint in the folder where solo-learn keeps it."""
    import lightning.pytorch
    from omegaconf import OmegaConf

    monkeypatch.syspath_prepend(ROOT)
    import logo_plugin.adapters.solo  # noqa: F401
    from solo.methods import METHODS

    heads = {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 16}
    model = METHODS["logo_byol"](
        OmegaConf.create(
            {
                "method": "logo_byol",
                "name": "run",
                "backbone": {"name": "resnet18"},
                "data": {"dataset": dataset, "num_classes": 10, "num_large_crops": 2, "num_small_crops": 2},
                "augmentations": [{"crop_size": 32}, {"crop_size": [32, 32]}],
                "max_epochs": 1,
                "momentum": {"base_tau": 0.9, "final_tau": 1.0},
                "optimizer": {"name": "sgd", "batch_size": 4, "lr": 0.1, "classifier_lr": 0.1, "weight_decay": 1e-4},
                "scheduler": {"name": "none"},
                "method_kwargs": heads,
            }
        )
    )
    trainer = lightning.pytorch.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    monkeypatch.chdir(tmp_path)
    (block,) = (text for section, _, text in pages.blocks(PAGE) if section == "The same with solo-learn")
    plain, with_stem = pages.commands(block)
    trainer.save_checkpoint(plain[1])
    assert main(with_stem if dataset == "cifar10" else plain) == 0
    said = capsys.readouterr().out
    assert "from backbone, by name" in said
    assert "momentum_backbone would fit too" in said
    names = {}
    exec(said.split("It loads with\n\n")[1], names)
    torch.testing.assert_close(output(names["model"], image), output(model.backbone, image))
