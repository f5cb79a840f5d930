"""solo-learn's data around LoGo: the overlay for a first try, its own multi-crop configs, h5 files, DALI."""

import copy
import io
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from photos import tiles
from PIL import Image
from solo_clone import MARKS, ROOT, batch, build, compose, config, gradients, import_solo
from torch.utils.data import DataLoader

pytestmark = MARKS


@pytest.fixture
def folder(tmp_path):
    """Images as torchvision's ImageFolder wants them."""
    for i, (image, label) in enumerate(tiles(16, 64)):
        (tmp_path / "train" / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "train" / str(label) / f"{i}.png")
    return tmp_path / "train"


def clean():
    command = ["git", "-C", ROOT, "status", "--porcelain"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""


@pytest.mark.parametrize("method", ["byol", "simsiam", "mocov2plus", "simclr"])
def test_first_try(method):
    """Small and on a CPU over any method's config and overlay; the command line has the last word."""
    methods, _ = import_solo()
    both = f"+logo=[{method},first_try]"
    cfg = compose("imagenet-100", method, both, "data.dataset=custom", "method_kwargs.proj_output_dim=32")
    cfg = methods.METHODS[cfg.method].add_and_assert_specific_cfg(cfg)
    assert cfg.method == f"logo_{method}"
    assert [crop.crop_size for crop in cfg.augmentations] == [64, 64, 32]
    assert (cfg.accelerator, len(cfg.devices), cfg.strategy, cfg.precision) == ("cpu", 1, "auto", 32)
    assert not any((cfg.sync_batchnorm, cfg.auto_resume.enabled, cfg.wandb.enabled))
    assert (cfg.method_kwargs.proj_hidden_dim, cfg.method_kwargs.proj_output_dim) == (256, 32)
    other = compose("cifar", method, both, "augmentations=logo_cifar", "limit_train_batches=1.0")
    assert [crop.crop_size for crop in other.augmentations] == [32, 32, 16]
    assert other.limit_train_batches == 1.0


def test_first_try_runs(folder, tmp_path):
    """The command of docs/solo-learn.md, whole."""
    command = [
        *("-W", "ignore", f"{ROOT}/main_pretrain.py", "--config-path", f"{ROOT}/scripts/pretrain/custom"),
        *("--config-name", "byol.yaml", "+logo=[byol,first_try]", f"data.train_path={folder}"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (saved,) = tmp_path.glob("trained_models/logo_byol/*/byol-custom-dataset-logo-affcosine-ratio0.1-g2x64*.ckpt")
    assert torch.load(saved, weights_only=False)["global_step"] == 1
    assert clean()


@pytest.mark.parametrize("local", [2, 6])
def test_own_multi_crop_of_byol(local):
    """solo-learn's sum over 2 + 2 L pairs is 1 + L times LoGo's mean without the affinity: gradients say so."""
    methods, _ = import_solo()
    torch.manual_seed(0)
    stock = methods.METHODS["byol"](config("byol", small=local))
    stock.log_dict = lambda *args, **kwargs: None
    ours = build("logo_byol", {"affinity": False})
    ours.load_state_dict(stock.state_dict())
    ours.num_local_crops = local
    views = batch(crops=2 + local)
    for model in (stock, ours):
        model.training_step(copy.deepcopy(views), 0).backward()
    expected = gradients(stock)
    for name, gradient in gradients(ours).items():
        if "classifier" not in name:
            near = 1e-5 * max(1.0, float(expected[name].abs().max()))
            torch.testing.assert_close((1 + local) * gradient, expected[name], rtol=1e-3, atol=near)


@pytest.mark.parametrize("method", ["byol", "simclr"])
def test_crops_of_the_own_multi_crop(method):
    """LoGo on the very crops of solo-learn's multi-crop config."""
    cfg = compose("imagenet-100-multicrop", method, f"+logo={method}")
    assert cfg.augmentations == compose("imagenet-100-multicrop", method).augmentations
    assert cfg.method == f"logo_{method}"
    assert (cfg.data.num_large_crops, cfg.data.num_small_crops) == (2, 6)
    assert {(crop.rrc.crop_min_scale, crop.rrc.crop_max_scale) for crop in cfg.augmentations} == {(0.08, 1.0)}


def test_local_crops_listed_first_are_refused():
    with pytest.raises(
        ValueError, match=r"lists crop_size 64, 32, 64, and solo-learn takes the first ones for the glo"
    ):
        compose(
            "cifar", "byol", "+logo=[byol,first_try]", "augmentations.1.crop_size=32", "augmentations.2.crop_size=64"
        )


H5 = ("+logo=byol", "data.dataset=imagenet100")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.format=h5", "data.dataset=custom"), r"data.format=h5: solo-learn reads imagenet, imagenet100 in this"),
        (
            ("data.format=dali", "data.dataset=stl10"),
            r"data.format=dali: .*and data.dataset is stl10\. Set data.",
        ),
        (("data.format=dali", "method_kwargs.logo.fast_crops=true"), r"Set method_kwargs\.logo\.fast_crops=false, or"),
        (
            ("data.format=dali", "method_kwargs.logo.local_size=[224,224]"),
            r"and augmentations\.2\.crop_size is \[224, 2",
        ),
    ],
)
def test_formats_that_do_not_go_together(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose("imagenet-100", "byol", *H5, *overrides)


def test_h5_without_h5py(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match=r"data\.format=h5 needs h5py, which is missing: pip"):
        compose("imagenet-100", "byol", *H5, "data.format=h5")


@pytest.mark.parametrize("fails", [False, True])
def test_fast_crops_end_with_the_fit(fails, folder, monkeypatch):
    """The next model on the same loader, solo-learn's own too, gets what its own options say.

    After an error, when Lightning tears nothing down, the next of LoGo's does.
    """
    methods, _ = import_solo()
    from lightning.pytorch import Trainer
    from solo.data import pretrain_dataloader as data

    overrides = ("data.dataset=custom", "method_kwargs.logo.fast_crops=true", "max_epochs=1", "+data.num_classes=4")
    cfg = compose("custom", "byol", "+logo=[byol,first_try]", *overrides)
    pipelines = [
        data.NCropAugmentation(data.build_transform_pipeline("custom", crop), crop.num_crops)
        for crop in cfg.augmentations
    ]
    dataset = data.prepare_datasets("custom", data.FullTransformPipeline(pipelines), folder, "image_folder")
    loader = DataLoader(dataset, batch_size=4, drop_last=True)
    before = loader.collate_fn, dataset.transform, dataset.loader
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = methods.METHODS[cfg.method](cfg)
        if fails:
            monkeypatch.setattr(model, "training_step", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                Trainer(max_steps=1, accelerator="cpu", **quiet).fit(model, loader)
            assert loader.collate_fn != before[0]
            cfg.method_kwargs.logo.fast_crops = False
            model = methods.METHODS[cfg.method](cfg)
        Trainer(max_steps=1, accelerator="cpu", **quiet).fit(model, loader)
    assert (loader.collate_fn, dataset.transform, dataset.loader) == before
    assert [view.shape[2] for view in next(iter(loader))[1]] == [64, 64, 32, 32]


def test_the_monitor_shows_fast_crops_in_their_colours(folder, tmp_path):
    """Normalised by statistics far from ImageNet's, crops without augmentation are drawn as the files' own pixels."""
    methods, _ = import_solo()
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger
    from solo.data import pretrain_dataloader as data

    options = ("method_kwargs.logo.fast_crops=true", "method_kwargs.logo.monitor=true")
    overrides = ("data.dataset=custom", *options, "max_epochs=1", "+data.num_classes=4")
    cfg = compose("custom", "byol", "+logo=[byol,first_try]", *overrides)
    pipelines = []
    for crop in cfg.augmentations:
        crop.rrc.crop_min_scale = crop.rrc.crop_max_scale = 1.0
        crop.horizontal_flip.prob = crop.grayscale.prob = crop.color_jitter.prob = 0.0
        crop.gaussian_blur.prob = crop.solarization.prob = 0.0
        crop.mean, crop.std = [0.1, 0.5, 0.9], [0.1, 0.2, 0.3]
        pipelines.append(data.NCropAugmentation(data.build_transform_pipeline("custom", crop), crop.num_crops))
    dataset = data.prepare_datasets("custom", data.FullTransformPipeline(pipelines), folder, "image_folder")
    quiet = {name: False for name in ("enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = methods.METHODS[cfg.method](cfg)
        trainer = Trainer(max_epochs=1, limit_train_batches=1, accelerator="cpu", logger=CSVLogger(tmp_path), **quiet)
        trainer.fit(model, DataLoader(dataset, batch_size=4))
    (drawn,) = tmp_path.rglob("logo_crops/epoch_0000.png")
    first = Image.open(dataset.samples[0][0])
    shown = Image.open(drawn).crop((2, 16, 66, 80))  # below the headings
    assert np.abs(np.asarray(shown, int) - np.asarray(first, int)).max() <= 1


@pytest.mark.parametrize("fast", [False, True])
def test_h5_file(fast, tmp_path, monkeypatch):
    """solo-learn's own reader, in workers, then a step; with fast_crops its transform is replaced as a folder's is."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: it is in the extra [solo]")
    import_solo()
    from logo_plugin.adapters.solo.fast_crops import install
    from solo.data.pretrain_dataloader import (
        FullTransformPipeline,
        NCropAugmentation,
        build_transform_pipeline,
        prepare_datasets,
    )

    monkeypatch.setenv("HOME", str(tmp_path))  # where it lists the file's images
    with h5py.File(tmp_path / "train.h5", "w") as file:
        for i, (image, label) in enumerate(tiles(8)):
            encoded = io.BytesIO()
            image.save(encoded, "PNG")
            pixels = np.frombuffer(encoded.getvalue(), "uint8")
            file.require_group(f"class{label}").create_dataset(f"{i}.png", data=pixels)
    overlay = compose("imagenet-100", "byol", "+logo=[byol,first_try]", *H5[1:], "data.format=h5").augmentations
    pipelines = [NCropAugmentation(build_transform_pipeline("imagenet100", c), c.num_crops) for c in overlay]
    transform = FullTransformPipeline(pipelines)
    dataset = prepare_datasets("imagenet100", transform, str(tmp_path / "train.h5"), "h5")
    assert len(dataset) == 8
    loader = DataLoader(dataset, batch_size=4, num_workers=1)
    if fast:
        install(loader, overlay)
    (indexes, views, targets), _ = loader
    views = views.to("cpu") if fast else views
    assert [tuple(view.shape) for view in views] == [(4, 3, 64, 64)] * 2 + [(4, 3, 32, 32)] * 2
    assert build("logo_byol").training_step([indexes, views, targets], 0).isfinite()


@pytest.mark.filterwarnings("ignore")  # Lightning's and solo-learn's
def test_dali(folder):
    """A Trainer's steps on what solo-learn's DALI pipeline makes, on the CPU.

    Its data module asks DALI for a CUDA device even with dali.device=cpu, so the pipeline is built here, without one.
    """
    why = "400 MB that solo-learn only uses with a GPU: pip install nvidia-dali-cuda120"
    pytest.importorskip("nvidia.dali", reason=f"DALI is not installed, {why}")
    import lightning.pytorch

    methods, _ = import_solo()
    from solo.data import dali_dataloader
    from solo.data.pretrain_dataloader import FullTransformPipeline, NCropAugmentation

    overrides = ("data.dataset=custom", "data.format=dali", "augmentations.2.num_crops=3")
    cfg = compose("custom", "byol", "+logo=[byol,first_try]", "method_kwargs.logo.affinity=learned", *overrides)
    pipelines = [
        NCropAugmentation(
            dali_dataloader.build_transform_pipeline_dali("custom", crop, dali_device="cpu"), crop.num_crops
        )
        for crop in cfg.augmentations
    ]
    transforms = FullTransformPipeline(pipelines)
    builder = dali_dataloader.PretrainPipelineBuilder(folder, 4, "cpu", transforms, num_threads=1)
    pipeline = builder.pipeline(batch_size=4, num_threads=1, device_id=None, seed=1)
    pipeline.build()
    kinds = ("large", cfg.data.num_large_crops), ("small", cfg.data.num_small_crops)
    loader = dali_dataloader.PretrainWrapper(
        model_batch_size=4,
        model_rank=0,
        model_device=torch.device("cpu"),
        dataset_size=pipeline.epoch_size("Reader"),
        pipelines=pipeline,
        output_map=[f"{kind}{i}" for kind, count in kinds for i in range(count)] + ["label"],
        reader_name="Reader",
        last_batch_policy=dali_dataloader.LastBatchPolicy.DROP,
        auto_reset=True,
    )
    _, views, _ = next(loader)
    assert [tuple(view.shape) for view in views] == [(4, 3, 64, 64)] * 2 + [(4, 3, 32, 32)] * 3
    cfg.data.num_classes = 4
    model = methods.METHODS[cfg.method](cfg)
    before = copy.deepcopy(model.state_dict())
    trainer = lightning.pytorch.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    assert {"train_local_global", "train_affinity"} <= trainer.callback_metrics.keys()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {"backbone.conv1.weight", "predictor.0.weight", "logo.affinity.mlp.0.weight"} <= moved
