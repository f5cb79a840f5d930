"""docs/troubleshooting.md quotes errors that the package raises, word by word."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^### `(.+)`$", PAGE, re.M)


def messages():
    """Every string of the code, with ... where an f-string has a value."""
    for file in [*ROOT.glob("src/logo_plugin/**/*.py"), *ROOT.glob("adapters/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


CODE = "\n".join(messages())


@pytest.mark.parametrize("quoted", QUOTED)
def test_every_heading_is_a_message_of_the_code(quoted):
    assert quoted in CODE


def test_headings_are_in_order_and_once():
    assert len(QUOTED) >= 20
    assert len(QUOTED) == len(set(QUOTED))
