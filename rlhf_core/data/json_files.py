"""Files of rows in JSON: one object per line, or one array of objects."""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, cast

from rlhf_core.data.columns import CONVERSATIONS, KNOWN
from rlhf_core.data.messages import pair_keys, role_key
from rlhf_core.data.one_json_object import (
    OVER_LINES,
    ObjectOverLines,
    belongs,
    object_instead_of_rows,
    object_over_lines,
    read_over_lines,
)
from rlhf_core.data.row_source import Cursor, Row, TextFile
from rlhf_core.infra.errors import DataError
from rlhf_core.infra.files import DuplicateKey, unique_keys

logger = logging.getLogger(__name__)

_SPACE = re.compile(r"[ \t\r\n]*")
_OBJECT = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*["}]')
"""How a line with one JSON object begins."""
_LONGEST, _MOST_LINES = 1 << 20, 10_000
"""Characters and lines that an object over several lines may have to be recognised."""
_HUGE = re.compile(r"\d{4301,}")


class JsonLines(TextFile):
    """A file with one JSON object per line. Blank lines are skipped."""

    def rows(self, start: Cursor) -> Iterator[Row]:
        row, line, offset = start.row, start.line, start.offset
        lines, ahead = self.lines(offset), deque[tuple[bytes, bool]]()
        while (one := ahead.popleft() if ahead else next(lines, None)) is not None:
            raw, ended = one
            line, begin, offset = line + 1, offset, offset + len(raw) + ended
            place = f"{self.name}:{line}"
            try:
                text = self.decode(raw, place, begin).removesuffix("\r")
                if not text.strip():
                    continue
                values = self._parse(text, place, ended=ended, first=begin == 0)
            except DataError as error:
                found = self._over_lines(raw, line, ahead, lines)
                broken = found is not None and found.error.problem != OVER_LINES
                if begin == 0 and not broken and (not _OBJECT.match(raw) or error.problem == OVER_LINES):
                    raise  # the whole file is something else, and each of its lines would be a mistake
                if found is None:
                    self.refuse(error)
                    continue
                self.refuse(found.error)
                for raw, ended in (ahead.popleft() for _ in range(found.lines - 1)):
                    line, offset = line + 1, offset + len(raw) + ended
                continue
            yield Row(row, place, values, Cursor(start.source, row + 1, line, offset))
            row += 1

    def _over_lines(
        self, raw: bytes, line: int, ahead: deque[tuple[bytes, bool]], lines: Iterator[tuple[bytes, bool]]
    ) -> ObjectOverLines | None:
        """Return the object over several lines that begins with a line which can't be read, if one does.

        Args:
            raw: that line; `line` is its number.
            ahead: lines after it that were read already; completed in place.
            lines: those after them.
        """
        texts = [raw.decode("utf-8", "replace").rstrip("\r")]
        if not texts[0].lstrip().startswith("{"):
            return None
        size = len(raw)
        while size < _LONGEST and len(texts) < _MOST_LINES:
            if len(ahead) < len(texts):
                if (one := next(lines, None)) is None:
                    break
                ahead.append(one)
            following = ahead[len(texts) - 1][0].decode("utf-8", "replace").rstrip("\r")
            if not belongs(following, texts[-1]):
                break
            texts.append(following)
            size += len(following)
        return read_over_lines(texts, self.name, line) if len(texts) > 1 else None

    def _parse(self, text: str, place: str, *, ended: bool, first: bool) -> dict[str, Any]:
        """Return the object on a line. `ended` tells whether a newline follows, `first` whether it is the file's first line."""
        try:
            values = _checked(lambda: _DECODER.decode(text), place, lambda: f"{place}:{_huge_at(text, 0) + 1}")
        except json.JSONDecodeError as error:
            raise self._malformed(text, error, place, ended=ended, first=first) from None
        if isinstance(values, dict):
            return values
        if isinstance(values, list) and first:
            raise self._array(place)
        raise DataError(
            "expected one JSON object per line", place=place, got="null" if values is None else type(values).__name__
        )

    def _malformed(self, text: str, error: json.JSONDecodeError, place: str, *, ended: bool, first: bool) -> DataError:
        if first and text.lstrip().startswith("["):
            return self._array(place)
        if first and text.lstrip().startswith("{") and (found := self._first_object()) is not None:
            return object_over_lines(found, self.path)
        place = f"{place}:{error.colno}"
        if not ended and (not text.rstrip().endswith("}") or error.pos >= len(text.rstrip())):
            return DataError("the last line is incomplete", place=place, got=error.msg, fix="write the file again")
        hint = "write each object on one line" if text.strip() in ("{", "[") else "repair or delete the line"
        if text.rstrip().endswith("},"):
            hint = "remove the comma behind each object, or write all of them as an array in a file .json"
        if text.lstrip().startswith("{'"):
            hint = "the line was written by Python's str(): write rows by `json.dumps`"
        if first and "," in text and "{" not in text:
            hint = "name the file .csv if it is CSV, else write one JSON object per line"
        return DataError("not valid JSON", place=place, got=error.msg, fix=hint)

    def _first_object(self) -> dict[str, Any] | None:
        """Return the object over several lines that the file begins with; None where there is none, or a very large one."""
        with self.opened() as read:
            head = read(1 << 20).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
        try:
            values, end = json.JSONDecoder().raw_decode(head, begin := _after_space(head, 0))
        except (ValueError, RecursionError):
            return None
        return values if isinstance(values, dict) and "\n" in head[begin:end] else None

    def _array(self, place: str) -> DataError:
        return DataError(
            "holds a JSON array, expected one JSON object per line",
            place=place,
            fix="name the file .json, or write one row per line",
        )


class JsonArray(TextFile):
    """A file with one JSON array of objects, which may be under a key of one object (`{"data": […]}`).

    The file's text is held in memory; its objects are decoded one at a time.
    """

    begin: int | None = None
    """Characters before the array, where it is under a key; None where it is the whole file."""
    wrong: DataError | None = None
    """What the file is instead."""

    def holds_array(self) -> bool:
        """Return whether the file is read here, not as JSON lines: it begins with an array, or is an object that isn't a row."""
        with self.opened() as read:
            if read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                return True
        if self._has_lines():
            return False
        try:
            values, found = _wrapped(self._text())
        except (DataError, ValueError, RecursionError):  # Reading the rows raises a better error.
            return False
        if found is None:
            self.wrong = object_instead_of_rows(values, self.path)
            return self.wrong is not None
        key, self.begin = found
        logger.info("%s: the rows are the list under the key `%s`", self.name, key)
        return True

    def _has_lines(self) -> bool:
        """Return whether the first line is a JSON object and another line follows."""
        lines = (line for line, _ in self.lines(0) if line.strip())
        first, second = next(lines, b""), next(lines, None)
        try:
            return second is not None and isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            return False

    def _text(self) -> str:
        with self.opened() as read:
            return self.decode(b"".join(iter(lambda: read(1 << 20), b"")), self.name, 0)

    def rows(self, start: Cursor) -> Iterator[Row]:
        if self.wrong is not None:
            raise self.wrong
        text = self._text()
        at = start.offset or (_after_space(text, 0) if self.begin is None else self.begin) + 1
        row, number, line, counted = start.row, start.line, 1, 0
        while True:
            at = _after_space(text, at)
            if text[at : at + 1] == "]":
                break
            if number:
                if text[at : at + 1] != ",":
                    raise self._malformed(text, at, "Expecting ',' delimiter")
                at = _after_space(text, at + 1)
            line, counted = line + text.count("\n", counted, at), at
            values, at = self._next(text, at, f"{self.name}:{line}")
            number += 1
            if not isinstance(values, dict):
                self.refuse(
                    DataError("expected an array of objects", place=f"{self.name}:{line}", got=type(values).__name__)
                )
                continue
            yield Row(row, f"{self.name}:{line}", values, Cursor(start.source, row + 1, number, at))
            row += 1
        if self.begin is None and (end := _after_space(text, at + 1)) != len(text):
            raise self._malformed(text, end, "Extra data")

    def _next(self, text: str, at: int, place: str) -> tuple[Any, int]:
        """Return the item of the array at offset `at`, and the offset after it."""
        try:
            return cast(
                tuple[Any, int],
                _checked(lambda: _DECODER.raw_decode(text, at), place, lambda: self._place(_huge_at(text, at), text)),
            )
        except json.JSONDecodeError as error:
            raise self._malformed(text, error.pos, error.msg) from None

    def _malformed(self, text: str, at: int, problem: str) -> DataError:
        place = self._place(at, text)
        if at >= len(text.rstrip()) or problem.startswith("Unterminated"):
            return DataError("the array is incomplete", place=place, got=problem, fix="write the file again")
        return DataError("not valid JSON", place=place, got=problem, fix="repair the file")

    def _place(self, at: int, text: str) -> str:
        line, column = 1 + text.count("\n", 0, at), at - text.rfind("\n", 0, at)
        return f"{self.name}:{line}:{column}"


def _wrapped(text: str) -> tuple[dict[str, Any], tuple[str, int] | None]:
    """Return a JSON object, the key of the one array of rows in it, and the offset in characters at which that array begins.

    The last two are None where the object is a row itself: it has several such arrays, other lists, or names that columns of
    rows have.

    Raises:
        ValueError: the text isn't one JSON object.
    """
    decode, at, ends = json.JSONDecoder().raw_decode, _after_space(text, 0), {}
    values: dict[str, Any] = {}
    while text[at : at + 1] in ("{", ","):
        key, at = decode(text, _after_space(text, at + 1))
        if not isinstance(key, str) or text[(at := _after_space(text, at)) : at + 1] != ":":
            raise ValueError(text[:20])
        begin = _after_space(text, at + 1)
        values[key], at = decode(text, begin)
        ends[key], at = begin, _after_space(text, at)
    if text[at : at + 1] != "}" or _after_space(text, at + 1) != len(text):
        raise ValueError(text[:20])
    lists = [key for key, value in values.items() if _are_rows(key, value)]
    others = [key for key in values if key not in lists]
    if len(lists) != 1 or any(key.casefold() in KNOWN or isinstance(values[key], list) for key in others):
        return values, None
    return values, (lists[0], ends[lists[0]])


def _are_rows(key: str, value: Any) -> bool:
    """Return whether a value is a list of rows: of mappings which aren't the turns of one conversation."""
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        return False
    if role_key(value[0]) is not None:
        return False
    name = key.casefold()
    return pair_keys(value[0]) is None or name == "data" or name not in CONVERSATIONS


def _after_space(text: str, at: int) -> int:
    """Return the offset of the first character at or after `at` that isn't white space."""
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _checked(parse: Callable[[], Any], place: str, place_of_integer: Callable[[], str]) -> Any:
    """Return what `parse` does; what isn't a fault of syntax becomes a `DataError`."""
    try:
        return parse()
    except DuplicateKey as error:
        raise DataError(
            f"key {_quoted(error.key)} appears twice in one object", place=place, fix="keep one of them"
        ) from None
    except _NotFinite as error:
        raise DataError("a number isn't finite", place=place, got=str(error), fix="remove or repair the row") from None
    except json.JSONDecodeError:
        raise
    except ValueError:
        raise DataError(
            "an integer has more than 4,300 digits",
            place=place_of_integer(),
            fix="write it as text, or leave it out",
        ) from None
    except RecursionError:
        raise DataError("nested too deeply", place=place) from None


def _huge_at(text: str, start: int) -> int:
    """Return the offset of the first integer of more than 4,300 digits, which Python refuses to convert."""
    match = _HUGE.search(text, start)
    return match.start() if match else start


def _quoted(text: str) -> str:
    return f"`{text}`" if text.isprintable() else ascii(text)


class _NotFinite(Exception):
    pass


def _no_constant(text: str) -> float:
    raise _NotFinite(text)


_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=_no_constant)
