"""The tables of docs/methods.md, from real runs of those hosts that are here; all else on the page is left as it is.

python tests/methods_table.py --write docs/methods.md
"""

import argparse
import importlib
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"
COMMAND = "python tests/methods_table.py --write docs/methods.md"
# Each module has rows() -> [(host, method, verdict, remark)]; its NOTES, if any, are a line of text for a host. The
# remark is how the method is chosen, or the error that refuses it.
SOURCES = {
    "methods_lightly": lambda: "LIGHTLY_ROOT" in os.environ,
    "methods_solo": lambda: "SOLO_LEARN_ROOT" in os.environ,
    "methods_stable": lambda: importlib.util.find_spec("stable_pretraining") is not None,
}


def here() -> list[str]:
    """The modules whose host is here."""
    return [name for name, host_is_here in SOURCES.items() if host_is_here() and importlib.util.find_spec(name)]


def fresh(name: str) -> dict[str, str]:
    """The sections of the page that a module's runs give, by host."""
    module = importlib.import_module(name)
    rows = list(module.rows())
    hosts = dict.fromkeys(host for host, *_ in rows)
    notes = getattr(module, "NOTES", {})
    return {host: section([row[1:] for row in rows if row[0] == host], notes.get(host, "")) for host in hosts}


def section(rows: Iterable[tuple[str, str, str]], note: str) -> str:
    order = sorted(rows, key=lambda row: (row[1] == "refused", row[1] != "works"))
    lines = [f"| {method} | {verdict} | {escaped(first_sentence(remark))} |" for method, verdict, remark in order]
    table = "\n".join(["| method | with LoGo | how, or why not |", "|---|---|---|", *lines])
    return f"{note}\n\n{table}" if note else table


def first_sentence(text: str) -> str:
    return re.match(r".*?(?:\.(?=\s)|$)", " ".join(text.split()))[0]


def escaped(text: str) -> str:
    return re.sub(r"([|*<>\[\]`])", r"\\\1", text)


def sections(page: str) -> dict[str, str]:
    """The sections of a page, by host."""
    _, *parts = re.split(r"^## (.+)$", page, flags=re.M)
    return {host: text.strip() for host, text in zip(parts[::2], parts[1::2], strict=True)}


def page(before: str, found: dict[str, str]) -> str:
    """The page with these sections in the place of its own."""
    introduction = re.split(r"^## ", before, flags=re.M)[0]
    merged = {**sections(before), **found}
    return introduction + "\n".join(f"## {host}\n\n{text}\n" for host, text in merged.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write the page; without, it is printed")
    path = parser.parse_args().write
    text = page(PAGE.read_text(), {host: rows for name in here() for host, rows in fresh(name).items()})
    print(text) if path is None else path.write_text(text)
