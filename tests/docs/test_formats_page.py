"""docs/formats.md: each line's answer rests on a test that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"^\| (.+) \| (yes|no) \| `(tests/[\w/]+\.py)::(test_\w+)` \|$", re.MULTILINE)
TEXT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
LINES = LINE.findall(TEXT)


@pytest.mark.parametrize(("what", "works", "file", "name"), LINES)
def test_a_line_names_a_test_that_exists(what: str, works: str, file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (what, works)


def test_every_line_has_an_answer_and_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| what", "|---"))]
    assert len(rows) == len(LINES) > 40
    assert len({name for *_, name in LINES}) == len(LINES)
