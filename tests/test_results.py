"""What the documentation says about results is what the committed runs give."""

import re
import shutil
import subprocess
import sys

import pytest
from pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r"([+-]?\d+\.\d ± \d+\.\d)")


STUDY = [
    *("imagenette_60", "imagenette_11", "accuracy_small", "collages_11", "collages_60", "imagenette_200"),
    *("imagenette_11_fp32", "cifar10_16px_6_fp32"),
]


@pytest.mark.parametrize(
    ("pages", "runs"), [(["results.md", "results_tables.md"], STUDY), (["results_cifar.md"], ["accuracy_small"])]
)
def test_tables_are_those_of_the_runs(pages, runs, tmp_path):
    copied = [shutil.copy(ROOT / "docs" / page, tmp_path) for page in pages]
    script = ROOT / "benchmarks" / "accuracy_report.py"
    files = [str(RESULTS / f"{name}.json") for name in runs]
    subprocess.run([sys.executable, str(script), *files, "--into", *copied], check=True, capture_output=True)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text()


def test_figures_of_the_text_are_in_a_table():
    page, tables = ((ROOT / "docs" / name).read_text() for name in ("results.md", "results_tables.md"))
    rows = [line for line in (page + tables).splitlines() if line.startswith("|")]
    in_tables = {figure for line in rows for figure in FIGURE.findall(line)}
    verdict = page.split("## The main comparison")[0]
    prose = [line for line in verdict.splitlines() if not line.startswith("|")]
    text = prose + (ROOT / "README.md").read_text().splitlines()
    found = [figure.removeprefix("+") for line in text for figure in FIGURE.findall(line)]
    assert len(found) > 20
    assert [figure for figure in found if figure not in in_tables] == []
