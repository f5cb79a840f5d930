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
    "precision": {
        "byol, bfloat16",
        "byol, float16",
        "plain simsiam, gradient ratio, float16",
        "plain simsiam, cosine, float16",
    },
    "step_time_small": {"setting", "byol"},
    "step_time_large": {"setting", "byol"},
    "objective": {"operators"},
    "memory": {"2 + 0", "2 + 6, kept", "2 + 6, recomputed"},
    "channels_last": {"byol", "benchmark moco", "plain simsiam"},
    "sync_batchnorm": {"ddp", "fsdp"},
    "transfer": {"defer=None", "defer=augment"},
    "crops": {"defer=augment", "kornia", "torchvision v2"},
    "compile": {"plain simsiam, multi-crop", "plain simsiam, LoGo", "plain simsiam, cosine, LoGo"},
}
METHOD = {"seconds", "multi-crop / 2 crops", "LoGo / multi-crop", "own_seconds", "kernels"}


def test_every_section_runs_on_the_cpu(tmp_path):
    pytest.importorskip("lightly")
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--minutes", "30"]
    done = subprocess.run([*command, "--json", str(tmp_path / "gpu.json")], capture_output=True, text=True)
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
    float32, uint8 = (found["transfer"][f"defer={defer}"]["bytes_per_image"] for defer in (None, "augment"))
    assert float32 == 4 * uint8 == 4 * 3 * 2 * (224**2 + 96**2)


PROGRAM = """
import sys

sys.path.insert(0, sys.argv[1])
import gpu

def breaking(error):
    def section(run):
        yield "first", 1
        while error is None:
            pass
        raise error
    return section

def after(run):
    yield "second", float("nan")

gpu.sections = lambda tiny: {
    "without lightly": (breaking(ModuleNotFoundError("no module", name="lightly.loss")), 9),
    "without ours": (breaking(ModuleNotFoundError("no module", name="logo_plugin.missing")), 9),
    "unlucky": (breaking(RuntimeError("out of luck")), 9),
    "endless": (breaking(None), 0.5),
    "after": (after, 9),
}
sys.argv = ["gpu.py", "--device", "cpu", "--json", sys.argv[2]]
gpu.main()
"""


def test_a_section_that_breaks_loses_nothing(tmp_path):
    """What it had, and the sections after it, are in the file; only failures fail the command."""
    command = [sys.executable, "-c", PROGRAM, str(SCRIPT.parent), str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    statuses = {name: section["status"] for name, section in found.items()}
    assert statuses == {
        "without lightly": "skipped",
        "without ours": "failed",
        "unlucky": "failed",
        "endless": "late",
        "after": "ok",
    }
    assert found["without lightly"]["reason"] == "lightly.loss is not installed"
    assert "out of luck" in found["unlucky"]["error"]
    assert found["after"]["second"] == "nan"
    assert [found[name]["first"] for name in list(found)[:-1]] == [1] * 4
    assert done.returncode == 1, done.stderr
