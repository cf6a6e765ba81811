"""The file that sampled rows are written to: what it depends on, and whether the rows in it are those of the prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config.yaml_file import flatten
from rlhf_core.data.row_output import RowOutput, RowOutputKind
from rlhf_core.infra.errors import StorageError, shortened
from rlhf_core.infra.files import read_json


def changed_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two records: options, models and prompts."""
    if not {"options", "models", "prompts"} <= before.keys():
        raise ValueError("no record of sampling")
    old, new = (
        flatten({name: record.get(name) for name in ("options", "models", "rewards", "prompts")})
        for record in (before, now)
    )
    return [
        f"{name.removeprefix('options.')}: {shortened(old.get(name))} → {shortened(new.get(name))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


SAMPLES = RowOutputKind(".run.json", "what its rows were sampled from", "options, models or prompts", changed_inputs)


def open_sample_file(
    path: Path,
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    resume: bool,
    overwrite: bool,
    kind: RowOutputKind = SAMPLES,
) -> RowOutput:
    """Lock a file of sampled rows and make it ready to be appended to; see `RowOutput`.

    Args:
        record: what determines the rows: options, models, prompts.
        rows: the input's columns of each row that will be written, in order: those in the file must have them.
        kind: what the file holds beside them, and how its record is compared.

    Raises:
        ConfigError, StorageError: as `RowOutput`.
        StorageError: a line isn't a row of these prompts, or there are more rows than prompts.
    """
    file = RowOutput(path, kind, dict(record) | {"rows": len(rows)}, resume=resume, overwrite=overwrite)
    try:
        fix = "restore the file as it was written, or `--overwrite` replaces it"
        for number, (place, found) in enumerate(file.rows()):
            if number == len(rows):
                raise StorageError("the file has more rows than there are prompts", place=place, fix=fix)
            wanted = json.loads(json.dumps(rows[number]))
            if found is None or any(name not in found or found[name] != value for name, value in wanted.items()):
                raise StorageError("isn't the row that these prompts have there", place=place, fix=fix)
    except BaseException:
        file.close()
        raise
    return file


def recorded_batch_size(path: Path) -> int | None:
    """Return how many prompts the sampler got at once in the run that began a file; None where there is no such record."""
    try:
        size = read_json(SAMPLES.record_path(path))["options"]["batch_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) and size > 0 else None
