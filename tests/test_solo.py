"""The solo-learn adapter against a real clone: set SOLO_LEARN_ROOT to run these."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapter_contract import CHECKS, AdapterCase, check_two_ranks, weights_at_zero
from photos import tiles

from logo_plugin import Affinity, LoGoLoss, LoGoMonitor, diagnose, wrap
from logo_plugin.losses import PRESETS

ROOT = os.environ.get("SOLO_LEARN_ROOT")
pytestmark = [
    pytest.mark.skipif(not ROOT, reason="set SOLO_LEARN_ROOT to a clone of solo-learn"),
    # solo-learn leaves args.json open, and calls logging.warn.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore:The 'warn' function:DeprecationWarning"),
]
METHODS = ["byol", "simsiam", "mocov2plus", "mocov3", "nnbyol", "nnsiam"]
QUEUES = ("mocov2plus", "nnbyol", "nnsiam")


def import_solo():
    """solo-learn warns a lot with current libraries."""
    if ROOT not in sys.path:
        sys.path.insert(0, ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import logo_plugin.adapters.solo
        import solo.methods
    return solo.methods, logo_plugin.adapters.solo


def config(method: str, logo: dict[str, Any] | None = None, small: int = 2, **backbone: Any):
    from omegaconf import OmegaConf

    return OmegaConf.create(
        {
            "method": method,
            "name": "run",
            "backbone": {"name": "resnet18", **backbone},
            "data": {"dataset": "custom", "num_classes": 10, "num_large_crops": 2, "num_small_crops": small},
            "augmentations": [{"crop_size": 32}, {"crop_size": [32, 32]}],
            "max_epochs": 1,
            "momentum": {"base_tau": 0.9, "final_tau": 1.0},
            "optimizer": {"name": "sgd", "batch_size": 4, "lr": 0.1, "classifier_lr": 0.1, "weight_decay": 1e-4},
            "scheduler": {"name": "none"},
            "method_kwargs": {
                "proj_hidden_dim": 16,
                "proj_output_dim": 8,
                "pred_hidden_dim": 16,
                "queue_size": 24,
                "temperature": 0.3,
            }
            | ({} if logo is None else {"logo": logo}),
        }
    )


def build(method: str, logo: dict[str, Any] | None = None, *, seed: int = 0, **options: Any):
    methods, _ = import_solo()
    torch.manual_seed(seed)
    stock = not method.startswith("logo_")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = methods.METHODS[method](config(method, logo, small=0 if stock else 2, **options))
    model.log_dict = model.log = lambda *args, **kwargs: None
    return model


def batch(n: int = 4, crops: int = 4, size: int = 32):
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(n, 3, size, size, generator=generator) for _ in range(crops)]
    return [torch.arange(n), views, torch.arange(n) % 10]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def build_logo(method: str, affinity: Any = "auto", **options: Any):
    return build(f"logo_{method}", options | {"affinity": affinity is not None})


def loss(model, views):
    return model.training_step([torch.arange(6), views, torch.arange(6)], 0)


def optimizer(model):
    return model.configure_optimizers()


CONTRACT = {
    method: AdapterCase(
        host=partial(build, method),
        build=partial(build_logo, method),
        loss=loss,
        optimizer=optimizer,
        shares_batch=method == "mocov3",
    )
    for method in METHODS
}


@pytest.mark.parametrize("method", METHODS)
def test_weights_at_zero(method):
    weights_at_zero(CONTRACT[method])


@pytest.mark.parametrize("check", CHECKS[1:])
@pytest.mark.parametrize("method", ["byol", "simsiam", "mocov2plus"])
def test_contract(method, check):
    check(CONTRACT[method])


def test_contract_on_two_ranks(tmp_path):
    own_predictor = replace(CONTRACT["mocov3"], build=partial(build_logo, "mocov3", local_predictor=True))
    check_two_ranks({"mocov2plus": CONTRACT["mocov2plus"], "mocov3": own_predictor}, tmp_path)


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
    key = {"mocov2plus": "z", "mocov3": "q"}.get(method, "p")
    preds = [out[key] for out in online]
    keys = [out["k" if method == "mocov3" else "z"].detach() for out in momentum]
    if method.startswith("nn"):
        keys = [queue[(k @ queue.T).argmax(1)] for k in keys]

    def similarity(pred, j):
        cosine = F.cosine_similarity(pred, keys[j], dim=-1).mean()
        if method in ("byol", "nnbyol"):
            return 2 - 2 * cosine
        if method in ("simsiam", "nnsiam"):
            return -cosine
        if method == "mocov3":
            logits = F.normalize(pred, dim=1) @ F.normalize(keys[j], dim=1).T / 0.3
            return 2 * 0.3 * F.cross_entropy(logits, torch.arange(2))
        logits = torch.cat([(pred * keys[j]).sum(1, keepdim=True), pred @ queue[j]], 1) / 0.3
        return F.cross_entropy(logits, torch.zeros(2, dtype=torch.long))

    scale = 1.0 if method in ("simsiam", "nnsiam", "mocov2plus") else 2.0
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


def test_target_network_never_sees_local_crops():
    model = build("logo_byol")
    seen = []
    model.momentum_backbone.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    data = batch()
    model.training_step(data, 0)
    assert len(seen) == 2
    assert all(torch.equal(x, view) for x, view in zip(seen, data[1], strict=False))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "mocov2plus"])
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


def test_affinity_group_is_absent_without_affinity():
    names = [group["name"] for group in build("logo_byol", {"affinity": False}).learnable_params]
    assert names == ["backbone", "classifier", "projector", "predictor"]


@pytest.mark.parametrize(
    ("logo", "message"),
    [
        ({"local_wieght": 0.1}, r"method_kwargs\.logo\.local_wieght; did you mean method_kwargs\.logo\.local_weight"),
        ({"lambda": 0.1}, "did you mean method_kwargs.logo"),
        ({"affinity": "none"}, "true or false, got 'none'"),
        ({"affinity": None}, "true or false, got None"),
        ({"preset": "papre"}, r"method_kwargs\.logo: preset must be one of \('paper', 'release'\), got 'papre'"),
        ({"local_predictor": 1}, r"local_predictor must be true or false, got 1"),
        ({"average_targets": "yes"}, r"average_targets must be True or False, got 'yes'"),
        ({"local_weight": -1.0}, r"method_kwargs\.logo: local_weight must be a finite number >= 0"),
        ({"local_weight": 0.1, "gradient_ratio": 0.1}, "not both"),
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"affinity_hidden_dim": 0}, "hidden_dim must be a positive integer"),
        ({"affinity_norm": "group"}, 'norm must be "batch" or "layer", got'),
        (3, "must be a mapping"),
    ],
)
def test_bad_options(logo, message):
    with pytest.raises(ValueError, match=message):
        build("logo_byol", logo)


def test_too_few_crops():
    _, adapter = import_solo()
    for small, logo in ((0, {"affinity": False}), (1, {})):
        with pytest.raises(ValueError, match="augmentations=logo_imagenet"):
            adapter.LoGoBYOL(config("logo_byol", logo, small=small))
    with pytest.raises(ValueError, match="expected 2 global and 2 local crops, got 3"):
        build("logo_byol").training_step(batch(crops=3), 0)


@pytest.mark.parametrize(
    ("logo", "name"),
    [
        (None, "run-logo-lambda0.0001"),
        ({"local_weight": 1e-4}, "run-logo-lambda0.0001"),
        ({"local_weight": 0.5, "repulsion": "logit"}, "run-logo-lambda0.5-repulsionlogit"),
        ({"gradient_ratio": 0.015}, "run-logo-gradient_ratio0.015"),
        ({"affinity": False, "reduction": "sum"}, "run-logo-affinityFalse-reductionsum"),
        ({"preset": "paper"}, "run-logo-lambda0.0001-presetpaper"),
        ({"preset": "paper", "reduction": "pairs"}, "run-logo-lambda0.0001-presetpaper-reductionpairs"),
        ({"preset": "paper", "gradient_ratio": 0.1}, "run-logo-presetpaper-gradient_ratio0.1"),
        ({"preset": "release"}, "run-logo-presetrelease"),
        ({"preset": "release", "local_weight": 0.5}, "run-logo-lambda0.5-presetrelease"),
        (
            {"local_predictor": True, "average_targets": True},
            "run-logo-lambda0.0001-local_predictorTrue-average_targetsTrue",
        ),
        ({"monitor": True}, "run-logo-lambda0.0001"),  # it changes nothing that resuming would mix up
    ],
)
def test_options_are_in_the_name(logo, name):
    _, adapter = import_solo()
    cfg = adapter.LoGoBYOL.add_and_assert_specific_cfg(config("logo_byol", logo))
    assert cfg.name == name
    assert adapter.LoGoBYOL.add_and_assert_specific_cfg(cfg).name == name  # a config read back from args.json


def test_auto_resumer_keeps_a_sweep_apart(tmp_path):
    _, adapter = import_solo()
    from omegaconf import OmegaConf
    from solo.utils.auto_resumer import AutoResumer

    folder = tmp_path / "version"
    folder.mkdir()
    first = adapter.LoGoBYOL.add_and_assert_specific_cfg(config("logo_byol", {"local_weight": 0.1}))
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(first)))
    (folder / "run.ckpt").touch()
    for weight, found in ((0.1, folder / "run.ckpt"), (0.2, None)):
        cfg = adapter.LoGoBYOL.add_and_assert_specific_cfg(config("logo_byol", {"local_weight": weight}))
        assert AutoResumer(tmp_path).find_checkpoint(cfg)[0] == found


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


@pytest.mark.parametrize("method", ["byol", "mocov2plus", "mocov3"])
def test_bfloat16_and_channels_last(method):
    model = build(f"logo_{method}", {"gradient_ratio": 0.1}).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_step(batch(), 0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())


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


def compose(config_dir: str, name: str, *overrides: str):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    import_solo()
    with initialize_config_dir(f"{ROOT}/scripts/pretrain/{config_dir}", version_base="1.2"):
        cfg = compose(name, [*overrides, "data.train_path=.", "data.val_path=null", "data.format=image_folder"])
    OmegaConf.set_struct(cfg, False)
    from solo.args.pretrain import parse_cfg

    return parse_cfg(cfg)


@pytest.mark.parametrize("method", METHODS)
def test_overlay(method):
    methods, adapter = import_solo()
    folder = "cifar" if method == "nnsiam" else "imagenet-100"
    if not Path(ROOT, "scripts/pretrain", folder, f"{method}.yaml").is_file():
        folder = "cifar"
    cfg = compose(folder, method, f"+logo={method}", "method_kwargs.logo.local_weight=0.5")
    assert cfg.method == f"logo_{method}"
    assert [crop.crop_size for crop in cfg.augmentations] == [224, 224, 96]
    assert (cfg.data.num_large_crops, cfg.data.num_small_crops) == (2, 2)
    assert set(cfg.method_kwargs.logo) == set(adapter.OPTIONS)
    cfg = methods.METHODS[cfg.method].add_and_assert_specific_cfg(cfg)
    assert dict(cfg.method_kwargs.logo) == adapter.OPTIONS | {"local_weight": 0.5}  # the overlay gives the defaults


def test_preset_in_one_word():
    """What the overlay leaves at null is the preset's, and args.json says what that was."""
    _, adapter = import_solo()
    overrides = ["method_kwargs.logo.preset=paper", "method_kwargs.logo.positive_noise=0.1"]
    cfg = adapter.LoGoBYOL.add_and_assert_specific_cfg(compose("imagenet-100", "byol", "+logo=byol", *overrides))
    assert dict(cfg.method_kwargs.logo) == adapter.OPTIONS | PRESETS["paper"] | {
        "preset": "paper",
        "positive_noise": 0.1,
    }


@pytest.mark.parametrize(
    ("group", "sizes"), [("cifar", [32, 32, [32, 32]]), ("stl10", [96, 96, [96, 96]]), ("custom", [224, 224, 64])]
)
def test_augmentation_groups(group, sizes):
    from solo.data.pretrain_dataloader import build_transform_pipeline

    extra = ["augmentations.2.crop_size=64"] if group == "custom" else []
    cfg = compose("cifar", "byol", "method=logo_byol", f"augmentations=logo_{group}", *extra)
    assert [crop.crop_size for crop in cfg.augmentations] == sizes
    assert (cfg.data.num_large_crops, cfg.data.num_small_crops) == (2, 2)
    from sklearn.datasets import load_sample_image
    from torchvision.transforms.functional import to_pil_image

    image = to_pil_image(load_sample_image("china.jpg"))
    for crop in cfg.augmentations:
        size = crop.crop_size if isinstance(crop.crop_size, int) else crop.crop_size[0]
        assert build_transform_pipeline("custom", crop)(image).shape == (3, size, size)


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
    (first,) = tmp_path.glob("ck/logo_simsiam/*/*-logo-lambda0.0001-*ep=0.ckpt")
    run(*pretrain, "max_epochs=2", f"+resume_from_checkpoint='{first}'")
    (second,) = tmp_path.glob("ck/logo_simsiam/*/*ep=1.ckpt")
    fast = [*pretrain, "+method_kwargs.logo.fast_crops=true", "+method_kwargs.logo.weigh_overlap=true"]
    run(*fast, "max_epochs=1", "data.num_workers=1")
    assert list(tmp_path.glob("ck/logo_simsiam/*/*-fast_cropsTrue-weigh_overlapTrue-*ep=0.ckpt"))
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


def test_every_loss_option_is_a_config_option():
    _, adapter = import_solo()
    import inspect

    keywords = set(inspect.signature(LoGoLoss).parameters) - {"similarity"}
    own = {
        "affinity_hidden_dim",
        "affinity_norm",
        "fast_crops",
        "weigh_overlap",
        "local_predictor",
        "monitor",
        "preset",
    }
    assert keywords | own == set(adapter.OPTIONS)


def crop_config(**changes):
    from omegaconf import OmegaConf

    conf = Path(sys.modules["logo_plugin"].__file__).parent / "conf" / "augmentations" / "logo_cifar.yaml"
    return OmegaConf.merge(OmegaConf.load(conf)[0], changes)


def stock_pipeline(crops):
    import_solo()
    from solo.data.pretrain_dataloader import FullTransformPipeline, NCropAugmentation, build_transform_pipeline

    return FullTransformPipeline(
        [NCropAugmentation(build_transform_pipeline("cifar10", c), c.num_crops) for c in crops]
    )


def test_fast_crops_follow_the_config():
    """Without any chance left in it, a fast crop is solo-learn's crop to a rounding of 8 bits."""
    _, adapter = import_solo()
    still = {
        "rrc": {"crop_min_scale": 1.0, "crop_max_scale": 1.0},
        "color_jitter": {"prob": 0.0},
        "grayscale": {"prob": 0.0},
        "gaussian_blur": {"prob": 0.0},
        "solarization": {"prob": 1.0},
        "horizontal_flip": {"prob": 1.0},
        "num_crops": 2,
    }
    crops = [crop_config(**still), crop_config(**(still | {"crop_size": [24, 24], "solarization": {"prob": 0.0}}))]
    (image, _), *_ = tiles(1)
    stock = stock_pipeline(crops)
    fast = adapter.FastCrops(crops, stock, return_boxes=True)
    *views, boxes = pickle.loads(pickle.dumps(fast))(image)
    expected = stock(image)
    assert [v.shape for v in views] == [v.shape for v in expected]
    # At scale 1 any ratio but 1 overflows the square image, so both fall back to the whole of it.
    for view, other in zip(views, expected, strict=True):
        torch.testing.assert_close(view, other, rtol=0, atol=2.01 / 255 / 0.24)
    assert boxes.tolist() == [[0, 0, 48, 48]] * 4
    assert len(adapter.FastCrops(crops, stock)(image)) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rrc": {"enabled": False}}, r"cannot do augmentations\.0\.rrc\.enabled=false"),
        ({"equalization": {"prob": 0.1}}, r"augmentations\.0\.equalization\.prob"),
        ({"crop_size": [32, 24]}, r"augmentations\.0\.crop_size that is not square"),
    ],
)
def test_fast_crops_refuse_what_they_cannot_do(changes, message):
    _, adapter = import_solo()
    crops = [crop_config(**changes)]
    with pytest.raises(ValueError, match=message):
        adapter.FastCrops(crops, stock_pipeline(crops))


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
        views = list(stock[1])
        if boxes is not None:
            views.append(torch.cat([together, together, *boxes]).expand(4, 4, 4))
        model.training_step([stock[0], views, targets], 0)
        found.append(logged["train_local_local"])
    assert found[1] == 0
    torch.testing.assert_close(found[2], found[0])


def test_overlap_needs_boxes():
    with pytest.raises(ValueError, match=r"weigh_overlap needs the crops' boxes: set method_kwargs\.logo\.fast_crops"):
        build("logo_byol", {"weigh_overlap": True})
