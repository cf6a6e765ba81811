"""docs/data.md shows rows of every shape: each is read, and becomes what stands below it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from data_helpers import in_words

from rlhf_core.config.run_file import DataFile, RunConfig
from rlhf_core.contracts.records import RECORDS
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.open_source import data_entries, entry_names, open_source
from rlhf_core.data.row_shapes import Format
from rlhf_core.testing.tiny import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLE = re.compile(r"^```json (\w+)( messages)?\n(.*?)^```\n\n```(?:text|json)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
MIXTURES = re.findall(r"^```yaml (\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def becomes(record: str, rows: list[dict], *, as_messages: bool) -> str:
    """Return what is said of rows and what they are in words, or their messages as JSON."""
    encoder = Encoder(tiny_tokenizer(), record, max_length=1024)
    lines, said = [], set()
    for row in open_source(rows).rows():
        example = encoder.checker.check(row)
        if example.read_as is not None and example.read_as not in said:
            said.add(example.read_as)
            lines.append(f"rows read as {example.read_as}")
        if as_messages:
            parts = {"prompt": example.prompt, "response": example.responses[0], "tools": example.tools}
            lines = [f'"{name}": {json.dumps(part)}' for name, part in parts.items()]
            continue
        encoded = encoder.encode([row])[0].row
        assert encoded is not None
        label = [f" ({'' if good else 'un'}desirable)" for good in encoded.per_response.get("desirable", [])] or [
            "",
            "",
        ]
        lines += [
            text.replace("\n", "\\n") + end
            for text, end in zip(in_words(encoder.tokenizer, encoded), label, strict=False)
        ]
    return "{\n " + ",\n ".join(lines) + "\n}" if as_messages else "\n".join(lines)


@pytest.mark.parametrize(("record", "messages", "rows", "expected"), EXAMPLES)
def test_an_example_becomes_what_the_page_says(record: str, messages: str, rows: str, expected: str) -> None:
    assert becomes(
        record, [json.loads(row) for row in rows.splitlines()], as_messages=bool(messages)
    ) == expected.rstrip("\n")


@pytest.mark.parametrize(("key", "text"), MIXTURES)
def test_an_example_of_entries_is_valid(key: str, text: str) -> None:
    given = {"method": "sft", "model": "m", "data": "d", **yaml.safe_load(text)}
    run = RunConfig.parse(given)
    entries = data_entries(getattr(run, key))
    assert entries and len(entry_names(entries)) == len(entries) > 1
    for entry in entries:  # what its comment says is its name
        said = re.search(rf"{re.escape(entry.path)}.*# eval_(\w+)_loss", text)
        assert said is None or said[1] in entry_names(entries)


def test_the_page_explains_every_key_of_an_entry() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("| key of an entry |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == sorted(DataFile.model_fields)


def test_the_page_shows_every_record_type_and_format() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {record for record, *_ in EXAMPLES} == set(RECORDS)
    assert text.count("```json ") == len(EXAMPLES) > 15
    assert all(f"`{name}`" in text for name in get_args(Format) if name != "auto")
