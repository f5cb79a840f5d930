"""The committed notebooks are their sources, executed, and fit to be read anywhere."""

import json
import re
from pathlib import Path

import jupytext
import pytest

SOURCES = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.py"))


def cells(notebook):
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def test_there_are_notebooks():
    assert [source.stem[:2] for source in SOURCES] == ["01", "02", "03", "04", "05"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_outputs_are_those_of_the_source(source):
    path = source.with_suffix(".ipynb")
    notebook = json.loads(path.read_text())
    assert cells(notebook) == cells(jupytext.read(source)), "run: make notebooks"
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert path.stat().st_size < 700_000
    for output in (output for cell in code for output in cell["outputs"]):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        data = output.get("data", {})
        text = "".join(output.get("text", [])) + "".join(data.get("text/plain", []))
        assert not re.search(r"(^|[\s'\"=(])/\w+/\w|[A-Z]:\\|Warning", text), text
