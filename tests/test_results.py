"""What the documentation says about results is what the committed runs give."""

import re
import shutil
import subprocess
import sys

import pytest
from pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r"([+-]?\d+\.\d ± \d+\.\d)")


@pytest.mark.parametrize(
    ("page", "runs"),
    [
        (
            "results.md",
            [
                *("imagenette_60", "imagenette_11", "accuracy_small", "collages_11", "collages_60", "imagenette_200"),
                "imagenette_11_fp32",
            ],
        ),
        ("results_cifar.md", ["accuracy_small"]),
    ],
)
def test_tables_are_those_of_the_runs(page, runs, tmp_path):
    copied = shutil.copy(ROOT / "docs" / page, tmp_path)
    script = ROOT / "benchmarks" / "accuracy_report.py"
    files = [str(RESULTS / f"{name}.json") for name in runs]
    subprocess.run([sys.executable, str(script), *files, "--into", copied], check=True, capture_output=True)
    assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text()


def test_figures_of_the_text_are_in_a_table():
    page = (ROOT / "docs" / "results.md").read_text()
    tables = {figure for line in page.splitlines() if line.startswith("|") for figure in FIGURE.findall(line)}
    verdict = page.split("## The main comparison")[0]
    readme = (ROOT / "README.md").read_text()
    text = [line for line in (verdict + readme).splitlines() if not line.startswith("|")]
    found = [figure.removeprefix("+") for line in text for figure in FIGURE.findall(line)]
    assert len(found) > 20
    assert [figure for figure in found if figure not in tables] == []
