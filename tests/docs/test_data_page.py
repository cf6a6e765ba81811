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
from rlhf_core.config.training import TrainerConfig
from rlhf_core.contracts.records import RECORDS
from rlhf_core.data.encoder import EncodedRow, Encoder
from rlhf_core.data.named_templates import LAYOUTS
from rlhf_core.data.open_source import data_entries, entry_names, open_source
from rlhf_core.data.row_shapes import Format
from rlhf_core.data.row_source import Row
from rlhf_core.data.step_labels import RIGHT, WRONG, read_step_labels
from rlhf_core.testing.tiny import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLE = re.compile(
    r"^```json (\w+)( messages)?( \{[^\n]*\})?\n(.*?)^```\n\n```(?:text|json)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
EXAMPLES = EXAMPLE.findall(PAGE.read_text(encoding="utf-8"))
MIXTURES = re.findall(
    r"^```yaml (data|eval_data)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def becomes(record: str, rows: list[dict], options: dict, *, as_messages: bool) -> str:
    """Return what is said of rows and what they are in words, or their messages as JSON."""
    encoder = Encoder(tiny_tokenizer(), record, **{"max_length": 1024, **options})
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
        outcome = encoder.encode([row])[0]
        if outcome.row is None:
            lines.append(f"dropped: {outcome.refused}")
            continue
        texts = in_words(encoder.tokenizer, outcome.row)
        lines += [text.replace("\n", "\\n") + label_of(outcome.row, number, row) for number, text in enumerate(texts)]
    return "{\n " + ",\n ".join(lines) + "\n}" if as_messages else "\n".join(lines)


def label_of(encoded: EncodedRow, response: int, row: Row) -> str:
    """Return what a row says of one of its responses, behind it."""
    if desirable := encoded.per_response.get("desirable"):
        return f" ({'' if desirable[response] else 'un'}desirable)"
    text = str(row.values.get(("chosen", "rejected")[response], ""))
    labels = read_step_labels(
        encoded.record, response, text.count("\n") + 1, truncated=False, separator="\n", place=lambda: row.place
    )
    words = {RIGHT: "right", WRONG: "wrong"}
    return "" if labels is None else f" (steps: {', '.join(words[label] for label in labels)})"


@pytest.mark.parametrize(("record", "messages", "options", "rows", "expected"), EXAMPLES)
def test_an_example_becomes_what_the_page_says(
    record: str, messages: str, options: str, rows: str, expected: str
) -> None:
    given = [json.loads(row) for row in rows.splitlines()]
    found = becomes(record, given, yaml.safe_load(options or "{}"), as_messages=bool(messages))
    assert found == expected.rstrip("\n")


def test_the_page_shows_every_template_by_name() -> None:
    """What the table says of each: the question and its answer, where the system message goes, whether it has tools."""
    table = PAGE.read_text(encoding="utf-8").partition("| name | a question")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.*)` \| ([\w ]+) \| (yes|no) \| ([\w ]+) \|$", table, re.MULTILINE)
    assert [name for name, *_ in rows] == list(LAYOUTS)
    for name, shown, system, tools, needs in rows:
        layout = LAYOUTS[name]
        question, answer = layout.user.format("Q"), layout.assistant.removeprefix(layout.answer).format("A")
        text = f"{question}{layout.answer}«{answer.rstrip()}»".replace("\0", "</s>").replace("\n", "⏎")
        begin, _, end = shown.replace("\\|", "|").partition("…")
        assert text.startswith(begin) and text.endswith(end)
        assert system == (
            "in the question" if layout.system is None else "before it" if layout.system == "{}\n\n" else "own turn"
        )
        assert (tools == "yes") == (layout.tools is not None)
        assert needs == ("its control tokens" if layout.tokens else "an end token")


@pytest.mark.parametrize(
    "text", re.findall(r"^```yaml options\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
)
def test_an_example_of_options_is_valid(text: str) -> None:
    assert TrainerConfig.parse(yaml.safe_load(text)).batching.layout == "packed"


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
