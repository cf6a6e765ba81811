"""What a page of the report consists of, as plain data: sections, and in them facts, tables, charts, texts and samples.

Everything is text that the page escapes. Only `Picture.svg` is markup, which `svg_charts` and `tree_drawing` make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

Tone = Literal["", "good", "bad", "muted"]
"""How a text is coloured: an improvement, a fault, or what is of less weight."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table, or the value of a fact."""

    text: str
    tone: Tone = ""


def cell(value: str | Cell) -> Cell:
    """Return a text as a cell."""
    return value if isinstance(value, Cell) else Cell(value)


@dataclass(frozen=True)
class Facts:
    """Names with values, such as the figures at the top of a run."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, Cell]]


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: frozenset[int] = frozenset()
    """Columns whose cells are numbers, set flush right."""
    caption: str = ""
    stacked: bool = False
    """Whether a narrow screen shows the cells of a row below each other: of tables with a column of sentences."""


@dataclass(frozen=True)
class Picture:
    """A chart or another drawing as SVG."""

    kind: ClassVar[str] = "picture"
    title: str
    svg: str
    """Markup, written into the page as it is."""
    caption: str = ""
    wide: bool = False
    """Whether it needs the page's whole width."""


@dataclass(frozen=True)
class Pictures:
    """Drawings beside each other, as many as fit."""

    kind: ClassVar[str] = "pictures"
    items: Sequence[Picture]


@dataclass(frozen=True)
class Paragraph:
    """A sentence or two; with a tone, a note."""

    kind: ClassVar[str] = "paragraph"
    text: str
    tone: Tone = ""


@dataclass(frozen=True)
class Source:
    """A text with its line breaks, such as a configuration."""

    kind: ClassVar[str] = "source"
    text: str


@dataclass(frozen=True)
class Token:
    """A token's text, and the probability with which it was drawn; None where that isn't known."""

    text: str
    probability: float | None

    @property
    def shade(self) -> int:
        """From 0 for a certain token to 9 for one that was hardly to be expected."""
        return 0 if self.probability is None else min(9, int(10 * (1 - self.probability)))

    @property
    def percent(self) -> str:
        """The probability as text."""
        if self.probability is None:
            return ""
        return f"{100 * self.probability:.3g} %"


@dataclass(frozen=True)
class CompletionText:
    """A completion, with what is known of it."""

    heading: str
    figures: Sequence[str]
    """Such as `reward 0.5`, `23 tokens, ended`."""
    tokens: Sequence[Token]
    """A single one without a probability where tokens aren't known."""
    left_out: int = 0
    """Characters at its end that aren't shown."""


@dataclass(frozen=True)
class Completions:
    """A prompt, and completions of it side by side."""

    kind: ClassVar[str] = "completions"
    heading: str
    prompt: str
    items: Sequence[CompletionText]


Block = Facts | Table | Pictures | Picture | Paragraph | Source | Completions


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    blocks: Sequence[Block] = ()
    about: str = ""
    """What it shows and how to read it, in a sentence or two."""
    parts: Sequence[Section] = ()
    folded: bool = False
    """Whether the reader opens it first."""
    note: str = ""
    """A few words beside the heading, such as a status."""
    tone: Tone = ""
    number: int = field(default=0, compare=False)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.blocks and all(part.empty for part in self.parts)


def present(*sections: Section | None) -> list[Section]:
    """Return the sections that have something to show."""
    return [one for one in sections if one is not None and not one.empty]


def figure(value: float | int | None, digits: int = 4) -> str:
    """Return a number as text with some significant digits; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Return a length of time as text: `3.2 s`, `4 min 05 s`, `2 h 13 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
