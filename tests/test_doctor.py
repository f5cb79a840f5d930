"""`python -m logo_plugin` where things are missing, broken or somebody else's."""

import re
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import logo_plugin
from logo_plugin.__main__ import main
from logo_plugin.doctor import HOSTS


def run(*arguments, cwd, path=(), **environment):
    """In a process that sees the packages of these folders first, and the doctor of this checkout."""
    environment = {"PATH": "", "HOME": str(cwd), "PYTHONPATH": ":".join(map(str, path)), **environment}
    command = [sys.executable, "-m", "logo_plugin", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def broken(folder, name, line):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(line)
    return folder


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"logo_plugin {logo_plugin.__version__}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
            "ModuleNotFoundError: No module named 't",
        ),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart"),
    ],
)
def test_it_runs_without_a_torch_that_works(tmp_path, line, message):
    path = [broken(tmp_path / "first", "torch", line)]
    done = run(cwd=tmp_path, path=path)
    assert done.returncode == 1, done.stderr
    assert "core: does not work" in done.stdout
    assert f"cannot be imported ({message}" in done.stdout
    assert "pip install --upgrade torch torchvision" in done.stdout
    assert run("--version", cwd=tmp_path, path=path).returncode == 0
    code = "import logo_plugin; from logo_plugin import LoGoLoss"
    used = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(path[0])}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "ImportError: logo_plugin cannot import what it needs" in used.stderr
    assert "python -m logo_plugin says what to do" in used.stderr


def test_numpy_that_torch_cannot_use(monkeypatch, capsys):
    def refuse(_):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr("torch.from_numpy", refuse)
    assert main([]) == 1
    out = capsys.readouterr().out
    assert re.search(r"torch .* cannot use numpy .* \(Numpy is not available\): pip install \"numpy<2\"", out)


@pytest.mark.parametrize(("root", "what"), [("nowhere", "is no folder"), (".", "has no folder 'solo'")])
def test_a_wrong_solo_learn_root_is_named(tmp_path, root, what):
    root = tmp_path / root
    done = run("solo", cwd=tmp_path, SOLO_LEARN_ROOT=str(root))
    assert done.returncode == 1
    assert f"SOLO_LEARN_ROOT={root} {what}: set it to the root of a clone of solo-learn" in done.stdout


def test_a_clone_is_found_in_the_working_folder(tmp_path):
    """Also by the console script, whose path is without it."""
    (tmp_path / "solo").mkdir()
    (tmp_path / "solo" / "__init__.py").touch()
    script = Path(sys.executable).with_name("logo-plugin")
    environment = {"PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert re.search(rf"solo-learn +unknown version +{tmp_path}\n", done.stdout)


def test_on_the_path_only(monkeypatch, capsys):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert main(["timm"]) == 1
    said = capsys.readouterr().out
    assert ": ok" not in said
    assert (
        "timm: does not work\n  - logo_plugin is not installed, only on the path: pip install . in its folder" in said
    )


def test_commands_and_hosts(capsys):
    assert main(["doctor", "timm"]) == main(["timm"]) == 0
    said = capsys.readouterr().out
    assert said[: len(said) // 2] == said[len(said) // 2 :]
    with pytest.raises(SystemExit):
        main(["exprot", "byol.ckpt"])
    assert "unknown host or command byol.ckpt, exprot" in capsys.readouterr().err


def test_every_host_with_an_extra_is_known(capsys):
    assert set(HOSTS) < set(metadata.metadata("logo-plugin").get_all("Provides-Extra"))
    missing = find_spec("stable_pretraining") is None
    assert main(["stable"]) == missing
    assert ('pip install "stable-pretraining>=' in capsys.readouterr().out) == missing


def test_both_lightnings_and_numpy_are_shown(capsys):
    main([])
    out = capsys.readouterr().out
    for name in ("pytorch-lightning", "lightning", "numpy"):
        assert re.search(rf"^{name} +(\d+\.\d+|not installed)", out, re.MULTILINE)


def test_the_package_of_the_same_name_on_pypi_is_told_apart(tmp_path):
    """Its metadata, as pip leaves it: no requirement, files of other names."""
    info = tmp_path / "site" / "logo_plugin-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: logo_plugin\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("logo_plugin/__init__.py,,\nlogo_plugin/service.py,,\n")
    done = run(cwd=tmp_path, path=[tmp_path / "site"])
    assert done.returncode == 1
    assert "another package of that name, from PyPI: pip uninstall logo-plugin" in done.stdout


def test_ours_is_not_taken_for_the_stranger(tmp_path):
    done = run(cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "another package" not in done.stdout
    assert str(Path(logo_plugin.__file__).parent) in done.stdout
