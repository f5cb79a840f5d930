"""What `import logo_plugin` may cost, and what it gives."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from torch import nn

import logo_plugin
from logo_plugin import wrap
from logo_plugin.__main__ import main


def printed(code):
    """By a Python of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_core_imports_no_host_library():
    code = (
        "import sys, logo_plugin, logo_plugin.adapters.lightly\n"
        "hosts = {'lightly', 'lightning', 'pytorch_lightning', 'solo', 'timm', 'hydra', 'omegaconf', 'kornia'}\n"
        "print(sorted(hosts & {name.split('.')[0] for name in sys.modules}))"
    )
    assert printed(code) == "[]"


def test_the_command_is_the_module():
    (script,) = metadata.entry_points(group="console_scripts", name="logo-plugin")
    assert script.load() is main


def test_metadata_of_one_address():
    about = metadata.metadata("logo-plugin")
    assert about["Author"]
    addresses = [line.split(", ")[1] for line in about.get_all("Project-URL") if not line.startswith("Paper")]
    assert len(addresses) == 3
    assert all(address.startswith(about["Home-page"]) for address in addresses)


def test_public_names():
    assert "LoGoMonitor" in logo_plugin.__all__
    for name in logo_plugin.__all__:
        assert getattr(logo_plugin, name).__doc__


def test_all_public_names_can_be_had_without_lightning():
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "from logo_plugin import *; import logo_plugin\n"
        "print('LoGoMonitor' in logo_plugin.__all__, wrap.__name__)"
    )
    assert printed(code) == "False wrap"


@pytest.mark.parametrize("x", [3, "BYOL", dict, nn.functional.relu])
def test_wrap_takes_modules_only(x):
    with pytest.raises(TypeError, match=r"wrap\(\) expects a torch.nn.Module"):
        wrap(x)


@pytest.mark.parametrize(
    ("name", "sizes"), [("small", [64, 64, 32]), ("imagenet", [224, 224, 96]), ("stl10", [96, 96, 48])]
)
def test_overlays_of_photographs_differ_in_size_only(name, sizes):
    """logo_imagenet and logo_stl10 leave mean and std to solo-learn, which knows the data sets."""
    folder = Path(logo_plugin.__file__).parent / "conf" / "augmentations"
    custom, other = (OmegaConf.to_container(OmegaConf.load(folder / f"logo_{it}.yaml")) for it in ("custom", name))
    crops = logo_plugin.MultiCropCollate()
    assert [(tuple(crop.pop("mean")), tuple(crop.pop("std"))) for crop in custom] == [(crops.mean, crops.std)] * 3
    if name == "small":
        assert [(tuple(crop.pop("mean")), tuple(crop.pop("std"))) for crop in other] == [(crops.mean, crops.std)] * 3
    assert [crop.pop("crop_size") for crop in other] == sizes
    assert other == [{key: value for key, value in crop.items() if key != "crop_size"} for crop in custom]


def test_one_version_of_ruff():
    files = (Path(__file__).parents[1] / name for name in ("setup.cfg", ".pre-commit-config.yaml"))
    pins = [pin for file in files for pin in re.findall(r"ruff==([\d.]+)", file.read_text())]
    assert len(pins) == 3
    assert len(set(pins)) == 1
