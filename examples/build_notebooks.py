"""Executes examples/notebooks/*.py, in jupytext's percent format, and writes them with their outputs as .ipynb.

python examples/build_notebooks.py                            # all, beside their sources
python examples/build_notebooks.py 01 04 --output build/notebooks
"""

import argparse
import os
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

SOURCES = Path(__file__).with_name("notebooks")
NEEDS_CLONE = "03_solo_learn"


def build(source, folder):
    notebook = jupytext.read(source)
    start = time.time()
    options = {"timeout": 1800, "record_timing": False, "coalesce_streams": True}
    client = NotebookClient(notebook, resources={"metadata": {"path": SOURCES}}, **options)
    client.execute()
    # What differs from run to run and from machine to machine would only fill diffs.
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    complaints = []
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = str(i), {}
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                complaints.append(f"{source.name}, cell {i} writes to stderr:\n{output.text}")
            output.pop("metadata", None)
            if output.output_type in ("display_data", "execute_result"):
                output.metadata = {}
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / f"{source.stem}.ipynb")
    print(f"{source.stem}: {time.time() - start:.0f} s", flush=True)
    if complaints:
        raise SystemExit("\n".join(complaints))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="how the names start, for example 01; default: all")
    parser.add_argument("--output", type=Path, default=SOURCES)
    options = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm, wherever it is imported, wants ipywidgets
    for source in sorted(SOURCES.glob("*.py")):
        if not source.stem.startswith(tuple(options.names) or ""):
            continue
        if source.stem == NEEDS_CLONE and not os.environ.get("SOLO_LEARN_ROOT"):
            print(f"{source.stem}: left as it is; SOLO_LEARN_ROOT=<a clone of solo-learn> executes it")
            continue
        build(source, options.output)


if __name__ == "__main__":
    main()
