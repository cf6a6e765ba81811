"""Digests of what a stage is made from."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_core.pipeline.run_metrics import read_rows
from rlhf_core.pipeline.stage_fingerprint import content_of, contents


def test_the_content_of_a_pattern_is_that_of_its_files(tmp_path: Path) -> None:
    pattern = tmp_path / "rows-*.jsonl"
    assert content_of(pattern) is None
    (tmp_path / "rows-a.jsonl").write_text("1")
    one = content_of(pattern)
    assert one is not None and content_of(pattern) == one
    assert contents({"data": [{"path": str(pattern), "weight": 2}]}) == {str(pattern): one}
    (tmp_path / "rows-a.jsonl").write_text("2")
    changed = content_of(pattern)
    (tmp_path / "rows-b.jsonl").write_text("1")
    assert len({one, changed, content_of(pattern)}) == 3


def test_rows_are_read_whatever_ends_of_lines_their_texts_hold(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u2029c\x85d\x0b"}, {"text": ""}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_rows(file) == rows and read_rows(tmp_path / "none.jsonl") == []
