"""The Hydra plugin: found, free of cost elsewhere, and never in the way of solo-learn's own methods."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")

APP = """
import sys, warnings
{imports}
import hydra
from hydra.core.plugins import Plugins
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.2", config_path=None)
def main(cfg):
    plugins = [plugin.__name__ for plugin in Plugins.instance().discover()]
    print("plugin", "LoGoSearchPathPlugin" in plugins)
    print("imported", sorted({{"torch", "logo_plugin", "lightning"}} & set(sys.modules)))
    print("path", [source.path for source in HydraConfig.get().runtime.config_sources])
    print("method", cfg.get("method"))
    if "solo.methods" in sys.modules:
        assert cfg.method in sys.modules["solo.methods"].METHODS  # as main_pretrain.py

main()
"""


def run_app(folder: Path, imports: str = "", *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "app.py").write_text(APP.format(imports=imports))
    command = [sys.executable, "app.py", "hydra.run.dir=.", "hydra.output_subdir=null", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_other_apps_pay_nothing(tmp_path):
    done = run_app(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plugin True" in done.stdout
    assert "imported []" in done.stdout
    assert "logo" not in done.stdout.split("path", 1)[1]
    assert done.stderr == ""


@pytest.mark.parametrize("error", ["", "raise RuntimeError('broken')"])
def test_failed_registration_keeps_stock_methods(tmp_path, error):
    """A solo-learn without what LoGo needs (here: nearly nothing) still runs its own methods."""
    methods = tmp_path / "solo" / "methods"
    methods.mkdir(parents=True)
    (tmp_path / "solo" / "__init__.py").touch()
    (methods / "__init__.py").write_text("METHODS = {'byol': object}\n")
    (tmp_path / "solo" / "losses.py").write_text(error)
    done = run_app(tmp_path, "import solo.methods", "+method=byol")
    assert done.returncode == 0, done.stderr
    assert "method byol" in done.stdout
    assert "LoGo is not available" in done.stderr
    assert "python -m logo_plugin solo" in done.stderr
    # ... but never trains without LoGo when asked for it: +logo=byol still chooses method=logo_byol, which it has not.
    asked = run_app(tmp_path, "import solo.methods", "+logo=byol")
    assert asked.returncode != 0
    assert "method logo_byol" in asked.stdout
    assert "LoGo is not available" in asked.stderr


def test_doctor_says_what_is_missing(tmp_path):
    def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "logo_plugin", *arguments]
        environment = {"PATH": "", "HOME": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "core: ok" in done.stdout
    assert "solo: not ready (only if you want it)" in done.stdout
    done = doctor("solo")
    assert done.returncode == 1
    assert "git clone https://github.com/vturrisi/solo-learn" in done.stdout
    (tmp_path / "solo").mkdir()
    (tmp_path / "solo" / "__init__.py").touch()
    done = doctor("solo")
    assert done.returncode == 1
    assert "solo: does not work" in done.stdout
    assert doctor("sole").returncode == 2
