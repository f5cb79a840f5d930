"""The solo-learn adapter's configs: overlays, options, crops and the run's name."""

import json
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from photos import tiles
from solo_clone import CONF, HIDDEN_PROJECTION, MARKS, METHODS, ROOT, batch, build, compose, config, import_solo
from test_properties import examples, numbers, result_or_our_error
from torch.utils.data import default_collate

from logo_plugin import LoGoLoss, crop_overlap, wrap
from logo_plugin.presets import PRESETS

pytestmark = MARKS


@pytest.mark.parametrize(
    ("logo", "message"),
    [
        ({"local_wieght": 0.1}, r"method_kwargs\.logo\.local_wieght; did you mean method_kwargs\.logo\.local_weight"),
        ({"lambda": 0.1}, r"logo\.lambda; did you mean method_kwargs\.logo\.local_weight\?"),
        ({"lamda": 0.1}, r"logo\.lamda; did you mean method_kwargs\.logo\.local_weight\?"),
        ({"lr": 0.1}, r"unknown option method_kwargs\.logo\.lr; none is near\. There are affinity, "),
        ({"affinity": "none"}, "affinity must be cosine, learned or false, got 'none'"),
        ({"affinity": True}, r"method_kwargs\.logo\.affinity must be cosine, learned or false, got True"),
        ({"anneal_repulsion": 1}, r"method_kwargs\.logo: anneal_repulsion must be True or False, got 1"),
        (
            {"affinity": False, "anneal_repulsion": True},
            r"anneal_repulsion=true: without effect beside .*affinity=false",
        ),
        ({"local_weight": 0.0, "anneal_repulsion": True}, r"anneal_repulsion=true: without effect beside .*_weight=0"),
        (
            {"affinity": "cosine", "affinity_norm": "layer", "repulsion": "logit"},
            r"affinity_norm=layer, method_kwargs\.logo\.repulsion=logit: without effect beside .*affinity=cosine",
        ),
        ({"affinity": "cosine", "local_global_weight": 0.0}, r"gradient_ratio=0\.1 .*local_global_weight=0 leaves"),
        ({"preset": "papre"}, r"method_kwargs\.logo: preset must be one of \('paper', 'release'\), got 'papre'"),
        ({"local_predictor": 1}, r"local_predictor must be true or false, got 1"),
        ({"fast_crops": "device"}, r'fast_crops must be true, false or "augment", got \'device\''),
        ({"average_targets": "yes"}, r"average_targets must be True or False, got 'yes'"),
        ({"local_weight": -1.0}, r"method_kwargs\.logo: local_weight must be a finite number >= 0"),
        ({"local_weight": 0.1, "gradient_ratio": 0.1}, "not both"),
        ({"reduction": "mean"}, "reduction must be one of"),
        (
            {"local_placement": "centre", "fast_crops": True},
            r"logo\.local_placement must be one of \('anywhere', 'inside', 'apart'\), got 'centre'",
        ),
        ({"affinity_hidden_dim": 0}, r"logo\.affinity_hidden_dim must be a positive integer, got 0"),
        ({"affinity_hidden_dim": True}, r"logo\.affinity_hidden_dim must be a positive integer, got True"),
        ({"affinity_norm": "group"}, r"logo\.affinity_norm must be \"batch\" or \"layer\", got 'group'"),
        (
            {"affinity": False, "local_weight": 0.1, "repulsion": "logit"},
            r"logo\.local_weight=0\.1, method_kwargs\.logo\.repulsion=logit: without effect beside .*affinity=false",
        ),
        ({"affinity": False, "affinity_norm": "layer"}, r"affinity_norm=layer: without effect beside .*affinity=false"),
        ({"local_weight": 0.0, "repulsion": "logit"}, r"repulsion=logit: without effect beside .*local_weight=0\."),
        ({"local_global_weight": 0.0, "local_predictor": True}, r"local_predictor=true: without effect beside"),
        ({"local_global_weight": 0.0, "gradient_ratio": 0.1}, r"gradient_ratio=0\.1 .*local_global_weight=0 leaves"),
        ({"local_global_weight": 0.0, "preset": "release"}, r"gradient_ratio=0\.015 .*local_global_weight=0 leaves"),
    ],
)
def test_bad_options(logo, message):
    with pytest.raises(ValueError, match=message):
        build("logo_byol", logo)


@pytest.mark.parametrize(
    ("logo", "message"),
    [
        (3, "must be a mapping"),
        ({"affinity_hidden_dim": 64}, r"affinity_hidden_dim=64: without effect beside .*affinity=cosine"),
        ({"preset": "paper", "affinity": "cosine"}, r"positive_noise=0\.0, repulsion='logit': without effect beside"),
        ({"local_global_weight": 0.0}, r"gradient_ratio=0\.1 .*local_global_weight=0 leaves none.*fixed local_weight"),
    ],
)
def test_bad_options_beside_the_default(logo, message):
    with pytest.raises(ValueError, match=message):
        checked(usual_config(logo))


@pytest.mark.parametrize(
    ("method", "logo", "affinity", "ratio", "anneal"),
    [
        *(
            (method, None, "cosine", 0.1, True)
            for method in METHODS
            if method not in ("mocov2plus", *HIDDEN_PROJECTION)
        ),
        ("mocov2plus", None, "cosine", 0.3, True),
        ("mocov2plus", {"gradient_ratio": 0.1}, "cosine", 0.1, True),
        ("mocov2plus", {"local_weight": 0.5}, "cosine", None, True),
        ("mocov2plus", {"preset": "release"}, "learned", 0.015, False),
        ("mocov2plus", {"affinity": "learned"}, "learned", None, False),
        ("mocov2plus", {"affinity": False}, False, None, False),
        *((method, None, False, None, False) for method in HIDDEN_PROJECTION),
        *((method, {"local_weight": 0.5}, "cosine", None, True) for method in ("byol", *HIDDEN_PROJECTION)),
        *((method, {"preset": "paper"}, "learned", None, False) for method in ("byol", *HIDDEN_PROJECTION)),
        ("byol", {"preset": "release"}, "learned", 0.015, False),
        ("byol", {"preset": "release", "affinity": "cosine"}, "cosine", 0.015, False),
        ("byol", {"affinity": None, "gradient_ratio": 0.3}, "cosine", 0.3, True),
        ("byol", {"anneal_repulsion": False}, "cosine", 0.1, False),
        ("byol", {"affinity": "learned"}, "learned", None, False),
        ("byol", {"affinity": "learned", "anneal_repulsion": True}, "learned", None, True),
        ("byol", {"affinity": False}, False, None, False),
    ],
)
def test_defaults(method, logo, affinity, ratio, anneal):
    cfg = checked(usual_config(logo, method))
    found, name = dict(cfg.method_kwargs.logo), cfg.name
    assert [found[key] for key in ("affinity", "gradient_ratio", "anneal_repulsion")] == [affinity, ratio, anneal]
    again = checked(cfg)  # what a model does with the config that parse_cfg gave
    assert (dict(again.method_kwargs.logo), again.name) == (found, name)


def test_null_is_the_default():
    _, adapter = import_solo()
    assert checked(usual_config(dict.fromkeys(adapter.OPTIONS), "byol")) == checked(usual_config({}, "byol"))


@pytest.mark.parametrize("logo", [{"gradient_ratio": 0.1}, {"preset": "release"}, {"affinity": "cosine"}])
@pytest.mark.parametrize("method", HIDDEN_PROJECTION)
def test_ratio_where_it_cannot_be_taken(method, logo):
    """The config check says so, before a model is built; the preset's own ratio is no better."""
    message = r"logo\.gradient_ratio=0\.\d+ .*Set a fixed method_kwargs\.logo\.local_weight instead"
    with pytest.raises(ValueError, match=message):
        checked(usual_config(logo, method))
    if "preset" in logo:  # the rest of the preset can be had
        for changed in ({"local_weight": 1e-4}, {"affinity": False}):
            build(f"logo_{method}", logo | changed)


WORDS = ["logistic", "difference", "softplus", "logit", "pairs", "sum", "batch", "layer", "paper", "release", "cosine"]


@examples(0.1)
@given(st.data())
def test_any_options(data):
    """Accepted and named, or refused by an error of ours."""
    import_solo()
    from logo_plugin.adapters.solo.options import OPTIONS

    names, values = st.sampled_from([*OPTIONS, "lamda"]), st.one_of(numbers, st.sampled_from(WORDS))
    logo = data.draw(st.dictionaries(names, values, max_size=4))
    cfg = result_or_our_error(lambda: checked(usual_config(logo)))
    assert cfg is None or cfg.name.startswith("run-")


def test_ratio_where_another_output_hides_the_projection():
    """Outputs named by the user are judged by the first forward."""
    methods, _ = import_solo()
    for proj, logo, named in (
        ("p", {"gradient_ratio": 0.1}, None),
        ("z", {"affinity": "learned", "gradient_ratio": 0.1}, ""),
        ("z", None, " (which method_kwargs.logo.affinity=cosine has unless told)"),
    ):
        cls = wrap(type("Mine", (methods.NNSiam,), {}), proj=proj)
        cfg = cls.add_and_assert_specific_cfg(usual_config(logo, "nnsiam"))
        if named is None:
            cls(cfg)
        else:
            with pytest.raises(ValueError, match=re.escape(f"gradient_ratio=0.1{named} compares gradients at the")):
                cls(cfg)


def test_too_few_crops():
    _, adapter = import_solo()
    for small, logo in ((0, {"affinity": False}), (1, {})):
        with pytest.raises(ValueError, match=r"got 2 and (0 .* solo-learn's parse_cfg adds them|1 .*In your list)"):
            adapter.LoGoBYOL(config("logo_byol", logo, small=small))
    with pytest.raises(ValueError, match="expected 2 global and 2 local crops, got 3"):
        build("logo_byol").training_step(batch(crops=3), 0)


def usual_config(logo=None, method="byol", **changes):
    """The config of a CIFAR run with the crops that LoGo ships for it; `changes` are those of its local pipeline."""
    from omegaconf import OmegaConf

    cfg = config(f"logo_{method}", logo)
    cfg.data.dataset = "cifar10"
    cfg.augmentations = OmegaConf.load(CONF / "augmentations" / "logo_cifar.yaml")
    for key, value in changes.items():
        OmegaConf.update(cfg.augmentations[2], key.replace("__", "."), value)
    cfg.data.num_small_crops = cfg.augmentations[2].num_crops
    return cfg


def plain(config):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=True)


def checked(cfg):
    methods, _ = import_solo()
    return methods.METHODS[cfg.method].add_and_assert_specific_cfg(cfg)


@pytest.mark.parametrize(
    ("logo", "name"),
    [
        (None, "run-logo-affcosine-ratio0.1"),
        ({"local_weight": 1e-4}, "run-logo-lambda0.0001-affcosine"),
        ({"affinity": "learned", "local_weight": 0.5, "repulsion": "logit"}, "run-logo-lambda0.5-afflearned-logit"),
        ({"gradient_ratio": 0.015}, "run-logo-affcosine-ratio0.015"),
        ({"anneal_repulsion": False}, "run-logo-affcosine-ratio0.1-noanneal"),
        ({"affinity": "learned"}, "run-logo-lambda0.0001-afflearned"),
        ({"affinity": "learned", "anneal_repulsion": True}, "run-logo-lambda0.0001-afflearned-anneal"),
        ({"affinity": False, "reduction": "sum"}, "run-logo-noaff-sum"),
        ({"affinity": "cosine"}, "run-logo-affcosine-ratio0.1"),
        ({"affinity": "cosine", "local_weight": 0.5}, "run-logo-lambda0.5-affcosine"),
        ({"affinity": "cosine", "preset": "release"}, "run-logo-affcosine-release"),
        (
            {"affinity": "learned", "affinity_hidden_dim": 64, "affinity_norm": "layer"},
            "run-logo-lambda0.0001-afflearned-hid64-layer",
        ),
        ({"preset": "paper"}, "run-logo-lambda0.0001-paper"),
        ({"preset": "paper", "reduction": "pairs"}, "run-logo-lambda0.0001-paper-pairs"),
        ({"preset": "paper", "gradient_ratio": 0.1}, "run-logo-paper-ratio0.1"),
        ({"preset": "release"}, "run-logo-release"),
        ({"preset": "release", "local_weight": 0.5}, "run-logo-lambda0.5-release"),
        ({"local_predictor": True, "average_targets": True}, "run-logo-affcosine-lpred-ratio0.1-avg"),
        ({"local_running_stats": False, "checkpoint_local_crops": True}, "run-logo-affcosine-nolstats-ratio0.1"),
        (
            {"affinity": "learned", "local_global_weight": 0.25, "positive_noise": 0.0},
            "run-logo-lambda0.0001-afflearned-lg0.25-noise0",
        ),
        ({"fast_crops": True, "weigh_overlap": True}, "run-logo-affcosine-fast-iou-ratio0.1"),
        ({"fast_crops": True, "local_placement": "inside"}, "run-logo-affcosine-fast-inside-ratio0.1"),
        ({"fast_crops": True, "local_placement": "anywhere"}, "run-logo-affcosine-fast-ratio0.1"),
        ({"affinity": "learned", "affinity_loss": "difference"}, "run-logo-lambda0.0001-afflearned-difference"),
        ({"monitor": True}, "run-logo-affcosine-ratio0.1"),  # it changes nothing that resuming would mix up
    ],
)
def test_options_are_in_the_name(logo, name):
    cfg = checked(usual_config(logo))
    assert cfg.name == name
    assert checked(cfg).name == name  # a config read back from args.json


@pytest.mark.parametrize(
    ("changes", "suffix"),
    [
        ({}, ""),
        ({"num_crops": 4}, "-l4x16s0.05-0.4"),
        ({"crop_size": 24}, "-l2x24s0.05-0.4"),
        ({"crop_size": [24, 16]}, "-l2x24x16s0.05-0.4"),
        ({"rrc__crop_max_scale": 0.3}, "-l2x16s0.05-0.3"),
        ({"rrc__enabled": False}, "-l2x16"),
        ({"grayscale__prob": 0.5}, ""),  # as little as in solo-learn's own runs
    ],
)
def test_local_crops_are_in_the_name(changes, suffix):
    assert checked(usual_config(**changes)).name == f"run-logo-affcosine-ratio0.1{suffix}"


def test_global_crops_are_in_the_name():
    cfg = usual_config()
    for crop in cfg.augmentations[:2]:
        crop.rrc.crop_min_scale = 0.2
    assert checked(cfg).name == "run-logo-affcosine-ratio0.1-g2x32s0.2-1"
    cfg = usual_config()
    cfg.data.dataset = "imagenet100"  # with CIFAR's crops
    assert checked(cfg).name == "run-logo-affcosine-ratio0.1-g2x32s0.4-1-l2x16s0.05-0.4"


def test_long_names():
    """A hash stands for what no file name can hold; the settings themselves are in args.json."""
    logo = {"local_weight": 0.123456, "local_global_weight": 0.123456, "local_predictor": True, "fast_crops": True}
    found = []
    for scale in (0.31, 0.32):
        cfg = usual_config(logo, rrc__crop_max_scale=scale)
        cfg.name = "é" * 60
        assert re.fullmatch("é{60}-logo-[0-9a-f]{12}", checked(cfg).name)
        assert checked(cfg).name == cfg.name
        found.append(cfg.name)
    assert found[0] != found[1]
    cfg.name = "é" * 105
    with pytest.raises(ValueError, match=r"name has 210 bytes.*Choose name= with at most 202"):
        checked(cfg)


def test_name_of_another_method():
    """byol.yaml with +logo=simsiam would train SimSiam under the name byol-..."""
    message = r"method=logo_simsiam in a run named byol-imagenet100: .*--config-name=simsiam.yaml.*choose \+logo=byol"
    with pytest.raises(ValueError, match=message):
        checked(compose("imagenet-100", "byol", "+logo=simsiam"))
    with pytest.raises(ValueError, match=r"--config-name=barlow.yaml \+logo=barlow_twins.*choose \+logo=simclr"):
        checked(compose("cifar", "simclr", "+logo=barlow_twins", "augmentations=logo_cifar"))
    with pytest.raises(ValueError, match=r"are ressl's.*LoGo cannot carry ressl: it has one direction only"):
        checked(compose("cifar", "ressl", "+logo=byol", "augmentations=logo_cifar"))
    cfg = checked(compose("imagenet-100", "byol", "+logo=simsiam", "name=mine"))
    assert cfg.name == "mine-logo-affcosine-ratio0.1"
    for name in ("byol", "byol2", "byols", "my-simsiam"):
        cfg = usual_config()
        cfg.name = name
        assert checked(cfg).name.startswith(f"{name}-logo")


@pytest.mark.parametrize(
    ("logo", "changes", "resumed"),
    [
        ({"local_weight": 0.1}, {}, True),
        ({"local_weight": 0.2}, {}, False),
        ({"local_weight": 0.1}, {"num_crops": 4}, False),
        ({"local_weight": 0.1}, {"crop_size": 24}, False),
    ],
)
def test_auto_resumer_keeps_a_sweep_apart(tmp_path, logo, changes, resumed):
    import_solo()
    from omegaconf import OmegaConf
    from solo.utils.auto_resumer import AutoResumer

    folder = tmp_path / "version"
    folder.mkdir()
    first = checked(usual_config({"local_weight": 0.1}))
    (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(first)))
    (folder / "run.ckpt").touch()
    found = AutoResumer(tmp_path).find_checkpoint(checked(usual_config(logo, **changes)))[0]
    assert found == (folder / "run.ckpt" if resumed else None)


@pytest.mark.parametrize(
    ("override", "counts"),
    [("augmentations.2.crop_size=32", "4 and 0"), ("augmentations.0.num_crops=2", "3 and 2")],
)
def test_wrong_crops_are_named_before_solo_learn_asserts(override, counts):
    """parse_cfg would go on, and main_pretrain.py fail with a blank AssertionError."""
    with pytest.raises(ValueError, match=rf"got {counts} \(augmentations: .*augmentations\.2\.crop_size=\[32,32\]"):
        compose("cifar", "byol", "+logo=byol", "augmentations=logo_cifar", override)
    cfg = compose("cifar", "byol", "augmentations=logo_cifar", override)  # stock is left alone
    assert cfg.data.num_large_crops == int(counts[0])


@pytest.mark.parametrize("method", ["all4one", "deepclusterv2", "dino", "mae", "ressl", "supcon", "swav", "wmse"])
def test_refused_overlays(method):
    with pytest.raises(TypeError, match=rf"(?i)LoGo cannot carry {method}: it"):
        compose("cifar", method, f"+logo={method}")


@pytest.mark.parametrize("method", METHODS)
def test_overlay(method):
    methods, adapter = import_solo()
    name = {"barlow_twins": "barlow"}.get(method, method)
    folder = "imagenet-100"
    if not Path(ROOT, "scripts/pretrain", folder, f"{name}.yaml").is_file():
        folder = "cifar"
    cfg = compose(folder, name, f"+logo={method}", "method_kwargs.logo.local_weight=0.5")
    assert cfg.method == f"logo_{method}"
    assert (cfg.data.num_large_crops, cfg.data.num_small_crops) == (2, 2)
    assert set(cfg.method_kwargs.logo) == set(adapter.OPTIONS)
    cfg = methods.METHODS[cfg.method].add_and_assert_specific_cfg(cfg)
    resolved = {"affinity": "cosine", "anneal_repulsion": True, "local_weight": 0.5}
    assert dict(cfg.method_kwargs.logo) == adapter.OPTIONS | resolved  # the overlay gives the defaults


def method_of(path):
    return {"barlow": "barlow_twins"}.get(path.stem, path.stem.removesuffix("_vit"))


PATHS = sorted(path for path in Path(ROOT or "", "scripts/pretrain").glob("*/*.yaml") if method_of(path) in METHODS)


def test_there_are_configs():
    assert len(PATHS) > 20


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_local_crops_join_any_config_of_the_clone(path):
    """The method's name alone will do: the config's own crops keep all but the least scale, local ones are alike."""
    folder = path.parent.name
    stock, found = compose(folder, path.stem), checked(compose(folder, path.stem, f"method=logo_{method_of(path)}"))
    if folder.endswith("multicrop"):
        assert found.augmentations == stock.augmentations
        return
    *large, local = plain(found.augmentations)
    assert (found.data.num_large_crops, found.data.num_small_crops) == (2, 2)
    expected = plain(stock.augmentations)
    for crop in expected:
        assert crop["rrc"].pop("crop_min_scale") < 0.4
    for crop in large:
        assert crop["rrc"].pop("crop_min_scale") == 0.4
    assert large == expected
    size = {32: 16, 224: 96}[large[0]["crop_size"]]
    assert (local.pop("crop_size"), local.pop("num_crops")) == (size, 2)
    assert local.pop("rrc") == {"enabled": True, "crop_min_scale": 0.05, "crop_max_scale": 0.4}
    shares = {
        name: [crop[name]["prob"] for crop in large for _ in range(crop["num_crops"])]
        for name in ("gaussian_blur", "solarization")
    }
    assert local.pop("gaussian_blur")["prob"] == pytest.approx(sum(shares["gaussian_blur"]) / 2)
    assert local.pop("solarization")["prob"] == min(shares["solarization"])
    assert local == {name: large[0][name] for name in local}  # colours, mean and std
    ratio = r"0\.3" if method_of(path) == "mocov2plus" else r"0\.1"
    assert re.fullmatch(rf"{stock.name}-logo-(affcosine-ratio{ratio}|noaff)", found.name)


@pytest.mark.parametrize(
    ("override", "size"),
    [
        ("crop_size=96", 48),
        ("crop_size=64", 32),
        ("crop_size=160", 64),
        ("crop_size=[128,128]", 48),
        ("crop_size=28", 16),
        ("crop_size=[32,32]", 16),
        ("crop_size=16", [16, 16]),
        ("crop_size=[96,96] method_kwargs.logo.local_size=[96,96]", 96),
        ("crop_size=96 method_kwargs.logo.local_size=96", [96, 96]),
        ("crop_size=[64,48] method_kwargs.logo.local_size=[32,24]", [32, 24]),
    ],
)
def test_size_of_the_local_crops(override, size):
    cfg = compose("imagenet-100", "mocov2plus", "+logo=mocov2plus", *f"augmentations.0.{override}".split())
    assert plain(cfg.augmentations)[1]["crop_size"] == size
    assert (cfg.data.num_large_crops, cfg.data.num_small_crops) == (2, 2)


def test_local_crops_by_options():
    own = ("local_crops=6", "local_size=64", "local_scale=[0.08,0.25]")
    cfg = checked(compose("imagenet-100", "byol", "+logo=byol", *(f"method_kwargs.logo.{option}" for option in own)))
    first, second, local = plain(cfg.augmentations)
    assert (first["rrc"]["crop_min_scale"], second["rrc"]["crop_min_scale"]) == (0.25, 0.25)
    assert (local["num_crops"], local["crop_size"]) == (6, 64)
    assert local["rrc"] == {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 0.25}
    assert cfg.name == "byol-imagenet100-logo-affcosine-ratio0.1-g2x224s0.25-1-l6x64s0.08-0.25"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["local_crops=0"], r"local_crops must be a positive integer, got 0"),
        (["local_crops=1"], r"at least 2 local crops, got 2 and 1 "),
        (["local_size=[96,96,96]"], r"local_size must be one number or two, height and width, got \[96, 96, 96\]"),
        (["local_size=big"], r"local_size must be a positive integer, got 'big'"),
        (["local_scale=0.3"], r"local_scale must be the least and the greatest part .*got 0\.3"),
        (["local_scale=[0.4,0.05]"], r"local_scale must be the least"),
        (["local_scale=[0.1,x]"], r"local_scale must be the least"),
    ],
)
def test_options_of_local_crops(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose("imagenet-100", "byol", "+logo=byol", *(f"method_kwargs.logo.{option}" for option in overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["augmentations=logo_imagenet", "method_kwargs.logo.local_crops=4"],
            r"local_crops=4: for an augmentations without local crops.*as in augmentations\.2\.num_crops=4",
        ),
        (["augmentations.0.rrc.crop_max_scale=0.3"], r"local_scale reaches 0\.4, and .* of at most 0\.3 of the image"),
        (
            ["augmentations.0.crop_size=[64,48]", "augmentations.1.crop_size=[64,48]"],
            r"crops of 64 x 48 px: choose another method_kwargs\.logo\.local_size",
        ),
        (
            [f"augmentations.{i}.crop_size=[64,48]" for i in (0, 1)] + ["method_kwargs.logo.local_size=[64,48]"],
            r"crops of 64 x 48 px: choose another method_kwargs\.logo\.local_size",
        ),
        (["augmentations.1.num_crops=2"], r"got 3 and 0 "),
        (["augmentations.1.crop_size=192"], r"got 1 and 1 "),
    ],
)
def test_configs_that_local_crops_cannot_join(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose("imagenet-100", "byol", "+logo=byol", *overrides)


def test_what_local_crops_leave_alone():
    """Global crops that begin higher, or take the whole image, a scale that reaches as far, and a fork's pipelines."""
    overrides = ("augmentations.0.rrc.crop_min_scale=0.5", "augmentations.1.color_jitter.hue=0.3")
    first, second, local = plain(compose("imagenet-100", "byol", "method=logo_byol", *overrides).augmentations)
    assert [crop["rrc"]["crop_min_scale"] for crop in (first, second)] == [0.5, 0.4]
    assert [crop["color_jitter"]["hue"] for crop in (first, second, local)] == [0.1, 0.3, 0.1]
    fork = compose("imagenet-100", "byol")
    for pipeline in fork.augmentations:
        del pipeline["gaussian_blur"], pipeline["solarization"]
    fork.method = "logo_byol"
    from solo.args.pretrain import parse_cfg

    fork = plain(parse_cfg(fork).augmentations)
    assert [len(crop) for crop in fork] == [len(local) - 2] * 3
    overrides = ("augmentations.0.rrc.enabled=false", "+method_kwargs.logo.local_scale=[0.08,1]")
    first, second, local = plain(compose("imagenet-100", "byol", "method=logo_byol", *overrides).augmentations)
    assert first["rrc"] == {"enabled": False, "crop_min_scale": 0.08, "crop_max_scale": 1.0}
    assert second["rrc"] == {"enabled": True, "crop_min_scale": 0.4, "crop_max_scale": 1.0}
    assert local["rrc"] == {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 1}


def test_it_says_what_it_adds(capfd):
    compose("imagenet-100", "byol", "method=logo_byol")
    said = "adds local crops to your augmentations: 2 of 96 px, 0.05 to 0.4 of the image; global crops begin at 0.4"
    assert said in capfd.readouterr().err
    compose("imagenet-100-multicrop", "byol", "method=logo_byol")
    compose("imagenet-100", "byol")
    assert "LoGo" not in capfd.readouterr().err


def test_a_run_of_other_colours_is_not_resumed(tmp_path):
    """The name knows nothing of colours; stock runs are found as ever."""
    from omegaconf import OmegaConf
    from solo.utils.auto_resumer import AutoResumer

    other = "augmentations.0.color_jitter.brightness=0.1"
    for method, found in (("method=logo_simclr", False), ("method=simclr", True)):
        folder = tmp_path / method
        folder.mkdir()
        cfg = checked(compose("imagenet-100", "simclr", method))
        (folder / "args.json").write_text(json.dumps(OmegaConf.to_container(cfg)))
        (folder / "run.ckpt").touch()
        for overrides, expected in (((method,), True), ((method, other), found)):
            again = checked(compose("imagenet-100", "simclr", *overrides))
            assert again.name == cfg.name
            assert (AutoResumer(folder).find_checkpoint(again)[0] is not None) == expected


def test_an_unknown_method():
    with pytest.raises(ValueError, match=r"method=logo_byoll is none of .*, which are logo_barlow_twins, logo_byol, "):
        compose("imagenet-100", "byol", "method=logo_byoll")


def test_a_method_of_the_users(monkeypatch):
    """Under any name."""
    methods, _ = import_solo()
    monkeypatch.setitem(methods.METHODS, "mine", wrap(type("Mine", (methods.BYOL,), {})))
    overrides = ("method=mine", "name=mine", "+method_kwargs.logo.local_weight=0.01")
    cfg = checked(compose("cifar", "byol", *overrides))
    assert cfg.data.num_small_crops == 2
    assert cfg.name == "mine-logo-lambda0.01-affcosine"


def test_preset_in_one_word():
    """What the overlay leaves at null is the preset's, and args.json says what that was."""
    _, adapter = import_solo()
    overrides = ["method_kwargs.logo.preset=paper", "method_kwargs.logo.positive_noise=0.1"]
    cfg = adapter.LoGoBYOL.add_and_assert_specific_cfg(compose("imagenet-100", "byol", "+logo=byol", *overrides))
    assert dict(cfg.method_kwargs.logo) == adapter.OPTIONS | PRESETS["paper"] | {
        "preset": "paper",
        "affinity": "learned",
        "positive_noise": 0.1,
    }


@pytest.mark.parametrize(
    ("group", "sizes"), [("cifar", [32, 32, 16]), ("stl10", [96, 96, 48]), ("custom", [224, 224, 64])]
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


def test_every_loss_option_is_a_config_option():
    _, adapter = import_solo()
    import inspect

    keywords = set(inspect.signature(LoGoLoss).parameters) - {"similarity"}
    own = {
        "affinity_hidden_dim",
        "affinity_norm",
        "fast_crops",
        "weigh_overlap",
        "local_placement",
        "local_predictor",
        "checkpoint_local_crops",
        "local_running_stats",
        "monitor",
        "preset",
        "local_crops",
        "local_size",
        "local_scale",
    }
    assert keywords | own == set(adapter.OPTIONS)


def crop_config(**changes):
    from omegaconf import OmegaConf

    conf = Path(sys.modules["logo_plugin"].__file__).parent / "conf" / "augmentations" / "logo_cifar.yaml"
    return OmegaConf.merge(OmegaConf.load(conf)[0], changes)


def stock_pipeline(crops, dataset="cifar10"):
    import_solo()
    from solo.data.pretrain_dataloader import FullTransformPipeline, NCropAugmentation, build_transform_pipeline

    return FullTransformPipeline([NCropAugmentation(build_transform_pipeline(dataset, c), c.num_crops) for c in crops])


@pytest.mark.parametrize(("dataset", "statistics"), [("cifar10", {}), ("custom", {"mean": 0.5, "std": [0.25]})])
def test_fast_crops_follow_the_config(dataset, statistics):
    """Without any chance left in it, a fast crop is solo-learn's to a rounding of 8 bits, wherever it is finished."""
    _, adapter = import_solo()
    still = {
        "rrc": {"crop_min_scale": 1.0, "crop_max_scale": 1.0},
        "color_jitter": {"prob": 0.0},
        "grayscale": {"prob": 0.0},
        "gaussian_blur": {"prob": 0.0},
        "solarization": {"prob": 1.0},
        "horizontal_flip": {"prob": 1.0},
        "num_crops": 2,
        **statistics,
    }
    crops = [crop_config(**still), crop_config(**(still | {"crop_size": [24, 24], "solarization": {"prob": 0.0}}))]
    samples = [(7 + n, image, target) for n, (image, target) in enumerate(tiles(3))]
    stock = stock_pipeline(crops, dataset)
    expected = default_collate([(index, stock(image), target) for index, image, target in samples])
    for defer in ("normalize", "augment"):
        fast = adapter.FastCrops(crops, stock, defer=defer, return_boxes=True)
        indexes, views, targets, boxes = pickle.loads(pickle.dumps(fast))(samples)
        views = views.to("cpu")
        assert torch.equal(indexes, expected[0])
        assert torch.equal(targets, expected[2])
        assert [v.shape for v in views] == [v.shape for v in expected[1]]
        # At scale 1 any ratio but 1 overflows the square image, so both fall back to the whole of it.
        for view, other in zip(views, expected[1], strict=True):
            torch.testing.assert_close(view, other, rtol=0, atol=2.01 / 255 / 0.24)
        assert boxes.tolist() == [[[0, 0, 48, 48]] * 4] * 3
        assert len(adapter.FastCrops(crops, stock, defer=defer)(samples)) == 3


def test_fast_crops_read_solo_learns_folder(tmp_path):
    """Through solo-learn's own dataset and loader; a damaged file is named."""
    import_solo()
    from logo_plugin.adapters.solo.fast_crops import install
    from solo.data.pretrain_dataloader import prepare_dataloader, prepare_datasets

    crops = [crop_config(num_crops=2), crop_config(crop_size=24, num_crops=1)]
    (tmp_path / "a").mkdir()
    for i, (image, _) in enumerate(tiles(4)):
        image.save(tmp_path / "a" / f"{i}.jpg")
    dataset = prepare_datasets("custom", stock_pipeline(crops), tmp_path, "image_folder")
    loader = prepare_dataloader(dataset, batch_size=4, num_workers=0)
    loader.pin_memory = False
    for options in ({"return_boxes": True}, {}):  # the second fit's own
        install(loader, crops, **options)
    ((indexes, views, targets),) = loader
    assert sorted(indexes.tolist()) == [0, 1, 2, 3]
    assert targets.tolist() == [0] * 4
    assert [tuple(view.shape) for view in views.to("cpu")] == [(4, 3, 32, 32)] * 2 + [(4, 3, 24, 24)]
    (tmp_path / "a" / "2.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image 2 of the dataset \(.*2\.jpg\): cannot decode"):
        list(loader)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rrc": {"enabled": False}},
            r"cannot do augmentations\.0\.rrc\.enabled=false\. Set method_kwargs\.logo\.fast_crops=false",
        ),
        ({"equalization": {"prob": 0.1}}, r"augmentations\.0\.equalization\.prob"),
        ({"crop_size": [32, 24]}, r"augmentations\.0\.crop_size that is not square"),
        ({}, r"augmentations\.1\.mean and std that are not augmentations\.0's\. Set"),
    ],
)
def test_fast_crops_refuse_what_they_cannot_do(changes, message):
    _, adapter = import_solo()
    crops = [crop_config(**changes), crop_config(mean=[0.5] * 3)]
    with pytest.raises(ValueError, match=message):
        adapter.FastCrops(crops, stock_pipeline(crops, "custom"))


def test_fast_crops_lie_where_they_should():
    """Anywhere: each pipeline's own draw. Else as of one transform with all the crops, in the pipelines' order."""
    _, adapter = import_solo()
    crops = [crop_config(num_crops=1), crop_config(num_crops=1), crop_config(num_crops=6, crop_size=[32, 32])]
    crops[2].rrc.update(crop_min_scale=0.05, crop_max_scale=0.4)
    (image, _), *_ = tiles(1)
    stock = stock_pipeline(crops)

    def made(**options):
        torch.manual_seed(3)
        fast = adapter.FastCrops(crops, stock, return_boxes=True, **options)
        _, views, _, boxes = fast([(0, image, 0)])
        return fast, views.to("cpu"), boxes[0]

    usual, views, boxes = made()
    torch.manual_seed(3)
    drawn = [recipe for pipeline in usual.pipelines for recipe in pipeline.draw(*image.size)]
    assert boxes.tolist() == [list(recipe.box) for recipe in drawn]
    for placement in ("inside", "apart"):
        _, moved, of = made(local_placement=placement)
        assert torch.equal(of[:2], boxes[:2])
        assert [torch.equal(a, b) for a, b in zip(moved[:2], views[:2], strict=True)] == [True, True]
        assert not torch.equal(of[2:], boxes[2:])
        if placement == "inside":
            around = of[:2].repeat(3, 1)
            assert (of[2:, :2] >= around[:, :2]).all()
            assert (of[2:, 2:] <= around[:, 2:]).all()
        else:
            overlaps = [crop_overlap(b[2:, None]).sum() for b in (boxes, of)]
            assert overlaps[1] < overlaps[0]


def test_placement_needs_fast_crops():
    with pytest.raises(ValueError, match=r"local_placement=apart needs logo_plugin's own crops: set .*fast_crops=true"):
        build("logo_byol", {"local_placement": "apart"})


def test_overlap_needs_boxes():
    with pytest.raises(ValueError, match=r"weigh_overlap needs the crops' boxes: set method_kwargs\.logo\.fast_crops"):
        build("logo_byol", {"weigh_overlap": True})


@pytest.mark.parametrize(
    "overrides",
    [
        ["+method_kwargs.logo.local_weight=0.01"],
        ["+logo=first_try"],
        ["+logo=byol", "method=byol"],
    ],
)
def test_options_that_the_method_would_ignore(overrides):
    with pytest.raises(ValueError, match=r"method=byol knows nothing of .*without LoGo\. Set method=logo_byol"):
        compose("imagenet-100", "byol", *overrides)
