"""benchmarks/gpu.py, which nobody can try on a GPU every day, runs to its end on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
EXPECTED = {
    "environment": {"versions", "device", "copy_bytes_per_s", "bf16_matmul_flops"},
    "contract": {"byol", "benchmark moco", "plain simsiam"},
    "precision": {"byol, bfloat16", "byol, float16", "plain simsiam, gradient ratio, float16"},
    "step_time_small": {"setting", "byol", "moco", "simsiam"},
    "step_time_large": {"setting", "byol", "moco", "simsiam"},
    "objective": {"operators"},
    "memory": {"2 + 0", "2 + 6, kept", "2 + 6, recomputed"},
    "channels_last": {"byol", "benchmark moco", "plain simsiam"},
    "sync_batchnorm": {"ddp", "fsdp"},
    "transfer": {"defer=None", "defer=augment"},
    "crops": {"defer=augment", "kornia", "torchvision v2"},
    "compile": {"plain simsiam, multi-crop", "plain simsiam, LoGo"},
}
METHOD = {"seconds", "multi-crop / 2 crops", "LoGo / multi-crop", "own_seconds", "kernels"}


def run(*arguments):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_every_section_runs_on_the_cpu(tmp_path):
    pytest.importorskip("lightly")
    done = run("--minutes", 30, "--json", tmp_path / "gpu.json")
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert found.keys() == EXPECTED.keys()
    for name, section in found.items():
        assert section["status"] == "ok" or (section["status"] == "skipped" and section["reason"]), (name, section)
        if section["status"] == "ok":
            assert section.keys() >= EXPECTED[name], name
    assert done.returncode == 0, done.stderr
    assert found["step_time_small"]["byol"].keys() >= METHOD
    recomputed, kept = (found["memory"][f"2 + 6, {kind}"]["kept_bytes"] for kind in ("recomputed", "kept"))
    assert recomputed < kept
    assert (
        found["transfer"]["defer=None"]["bytes_per_image"] == 4 * found["transfer"]["defer=augment"]["bytes_per_image"]
    )


@pytest.mark.parametrize(
    ("broken", "status"),
    [
        ("raise ModuleNotFoundError('no lightly', name='lightly.loss')", "skipped"),
        ("raise ModuleNotFoundError('no logo', name='logo_plugin.missing')", "failed"),
        ("raise RuntimeError('out of luck')", "failed"),
        ("while True: pass", "late"),
    ],
)
def test_a_section_that_breaks_loses_nothing(tmp_path, broken, status):
    """What it had, and the sections after it, are in the file."""
    program = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu

def broken(run):
    yield "first", 1
    {broken}

def after(run):
    yield "second", float("nan")

gpu.sections = lambda tiny: {{"broken": (broken, 0.5), "after": (after, 5)}}
sys.argv = ["gpu.py", "--device", "cpu", "--json", {str(tmp_path / "gpu.json")!r}]
gpu.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert found["broken"]["first"] == 1
    assert found["broken"]["status"] == status, found
    assert found["after"] | {"wall_seconds": 0} == {"status": "ok", "second": "nan", "wall_seconds": 0}
    assert done.returncode == (status == "failed"), done.stderr


def test_what_it_refuses():
    assert "no section stepp" in run("--only", "stepp").stderr
