"""The code blocks of the README and of the pages in docs."""

import re
import shlex
from pathlib import Path
from typing import Any

from logo_plugin.__main__ import main

ROOT = Path(__file__).parents[1]


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Of every block its section's heading, its language, and its text."""
    found, section = [], ""
    for heading, language, text in re.findall(r"^## ([^\n]*)$|^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S):
        section = heading or section
        if language:
            found.append((section, language, text))
    return found


def commands(text: str) -> list[list[str]]:
    """The lines `python -m logo_plugin ...` of a block, as arguments of `main`."""
    words = [shlex.split(line) for line in text.splitlines()]
    assert all(line[:3] == ["python", "-m", "logo_plugin"] for line in words)
    return [line[3:] for line in words]


def run(page: Path, sections: list[str], names: dict[str, Any], only: str = "bash python") -> None:
    """Runs the blocks of these sections, in this order and in one namespace."""
    for section in sections:
        own = [(language, text) for heading, language, text in blocks(page) if heading == section and language in only]
        assert own, f"{page.name} has no section {section} with blocks of {only}"
        for language, text in own:
            if language == "python":
                exec(compile(text, f"{page.name}: {section}", "exec"), names)
            else:
                assert all(main(command) == 0 for command in commands(text))
