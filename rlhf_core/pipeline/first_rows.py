"""The check of a file's first rows against the record type that a method consumes, before anything runs."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from rlhf_core.config.training import DatasetConfig
from rlhf_core.contracts.records import RECORDS
from rlhf_core.data.open_source import check_paths, matching_files, open_source
from rlhf_core.data.row_checker import RowChecker
from rlhf_core.data.row_source import Row
from rlhf_core.infra.errors import DataError, RLHFError

FIRST_ROWS = 20
"""Rows of each file that are checked."""
_TELLING = tuple(name for name in RECORDS if name != "prompt")
"""Record types by which rows are known: any row with a prompt is one of `prompt`."""


def check_first_rows(
    path: str, record: str, options: DatasetConfig, split: str, *, consumer: str, place: str
) -> list[RLHFError]:
    """Return what is wrong with a file, folder or pattern: that it isn't there, or that one of its first rows doesn't fit.

    A hub name isn't opened.

    Args:
        record: the record type that its rows must have.
        consumer: the method that consumes them, for messages.
        place: where the path was set, for messages.
    """
    try:
        check_paths(path)
        if not Path(path).expanduser().exists() and not matching_files(path):
            return []
        checker = RowChecker(record, options.columns, format=options.format, ignored=options.ignore_columns)
        first: Row | None = None
        for row in islice(open_source(path, split=split).rows(), FIRST_ROWS):
            first = first or row
            try:
                checker.check(row)
            except DataError as error:
                return [_explained(error, first, record, options, consumer, place)]
        if first is None:
            return [DataError("holds no rows", place=f"{place}: {path}")]
    except RLHFError as error:
        at = error.place if error.place and error.place.startswith(path) else path
        return [type(error)(error.problem, place=f"{place}: {at}", got=error.got, fix=error.fix)]
    return []


def _explained(error: DataError, row: Row, record: str, options: DatasetConfig, consumer: str, place: str) -> DataError:
    """Return the error of a row that doesn't fit; of rows of another type, one that says which is consumed and which they are.

    Args:
        row: the first of the file.
    """
    where = f"{place}: {error.place or row.place}"
    other = next((name for name in _TELLING if name != record and _fits(row, name, options)), None)
    if other is None or _fits(row, record, options):
        return DataError(error.problem, place=where, got=error.got, fix=error.fix)
    return DataError(
        f"{consumer} consumes rows of the record type `{record}` ({', '.join(RECORDS[record].required)})",
        place=where,
        got=f"rows of the record type `{other}` ({', '.join(map(str, row.values))})",
        fix=error.fix,
    )


def _fits(row: Row, record: str, options: DatasetConfig) -> bool:
    """Tell whether a row is one of a record type."""
    names = {*RECORDS[record].required, *RECORDS[record].optional}
    columns = {name: own for name, own in options.columns.items() if name in names}
    try:
        RowChecker(record, columns, format=options.format).check(row)
    except RLHFError:
        return False
    return True
