"""Find the final answer of a completion: after its thinking; in `\\boxed{…}`, `<answer>…</answer>`, `#### …` or a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Thinking = Literal["auto", "required", "ignore"]
"""What a thinking block means for the answer; see `after_thinking`."""


@dataclass(frozen=True)
class FinalAnswer:
    """The text of a final answer, and how it was found."""

    text: str
    how: Literal["boxed", "tag", "hashes", "stated", "text"]
    """`hashes`: `#### 42`; `stated`: `the answer is 42`; `text`: nothing marks an answer, so it is the whole text."""

    @property
    def marked(self) -> bool:
        """Whether the completion marks this as its answer, so that nothing else of it can be meant."""
        return self.how in ("boxed", "tag", "hashes")


def after_thinking(text: str, thinking: Thinking = "auto") -> str | None:
    """Return what follows the last end of thinking (`</think>` and its like); None where thinking hasn't ended.

    Args:
        thinking: `auto` returns a text without any thinking as it is, `required` returns None for it, since many chat templates
            open the block in the prompt; `ignore` returns every text as it is.
    """
    if thinking == "ignore":
        return text
    ends = [text.rfind(end) + len(end) for _, end in _THINKING if end in text]
    if not ends and thinking == "required":
        return None
    rest = text[max(ends, default=0) :]
    return None if any(begin in rest for begin, _ in _THINKING) else rest


_THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)


def find_answer(text: str, *, complete: bool = True) -> FinalAnswer | None:
    """Return the answer that a text gives last; None where it gives none.

    The last of `\\boxed{…}`, `<answer>…</answer>` and `#### …` counts; without any, what follows the last `answer is` or
    `Answer:`; without this, the whole text. From the last two, numbers and formulae that are denied (`not 5`) are left out.
    Boxes that only commas, `and` or `or` separate are one answer of several parts, so a model gains nothing by a box for each
    guess.

    Args:
        complete: whether the text ended by itself. One that was cut off gives only an answer that is marked and closed, since
            its last words may be part of a number or of a sentence.
    """
    marks = [*_boxed(text), *_tagged(text), *_hashes(text, complete)]
    if marks:
        _, found = max(marks, key=lambda mark: mark[0])
        return found if found.text else None
    if not complete or not text.strip():
        return None
    stated = _stated(text)
    answer = FinalAnswer(text, "text") if stated is None else FinalAnswer(stated, "stated")
    rest = _DENIED.sub("", answer.text).strip()
    return FinalAnswer(rest, answer.how) if rest else None


_BRACES = re.compile(
    r"\\(?:boxed|fbox)(?:\s*(?P<box>\{)|\s?(?P<bare>-?\d[\d.,]*\d|-?\d|(?<=\s)[A-Z]\b))|\\.|[{}]", re.DOTALL
)
_BETWEEN = re.compile(r"(?:[\s$,;&*]|\\[,;:!\\()\[\]]|\\q?quad|and|or|\\text\s?\{[\s,]*(?:and|or)?\s*\})*")


def _boxed(text: str) -> Iterator[tuple[int, FinalAnswer]]:
    """Yield the last boxed answer, where there is one, with the position of its end. Takes time linear in the text."""
    if "\\boxed" not in text and "\\fbox" not in text:
        return
    opened: list[
        tuple[int, int, bool]
    ] = []  # of each brace that is open: begin of its command, of its content, whether boxed
    boxes: list[tuple[int, int, str]] = []  # begin and end of each outermost box, and its content
    for match in _BRACES.finditer(text):
        if match["bare"]:  # `\boxed 42`
            boxes.append((match.start(), match.end(), match["bare"]))
        elif match["box"] or match.group() == "{":
            opened.append((match.start(), match.end(), bool(match["box"])))
        elif match.group() == "}" and opened:
            begin, content, boxed = opened.pop()
            if boxed:
                while boxes and boxes[-1][0] > begin:
                    boxes.pop()  # a box inside this one
                boxes.append((begin, match.end(), text[content : match.start()]))
    if not boxes:
        return
    contents = [boxes[-1][2]]
    for earlier, later in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = text[earlier[1] : later[0]]
        if len(between) > 40 or not _BETWEEN.fullmatch(between):
            break
        contents.insert(0, earlier[2])
    parts = dict.fromkeys(" ".join(_innermost(content).split()) for content in contents)
    yield boxes[-1][1], FinalAnswer(", ".join(parts), "boxed")


def _innermost(content: str) -> str:
    """Return the content of the boxes around a box's whole content removed: `5` of `\\boxed{5}`."""
    match = re.fullmatch(r"(?:\s*\\(?:boxed|fbox)\s*\{)+([^{}]*)[}\s]+", content)
    return match.group(1) if match else content


_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)


def _tagged(text: str) -> Iterator[tuple[int, FinalAnswer]]:
    """Yield the content of the last `<answer>…</answer>`, or the box in it, with the position of its end."""
    begin = last = None
    for tag in _ANSWER_TAG.finditer(text):
        if not tag[1]:
            begin = tag.end()
        elif begin is not None:
            last = (begin, tag)
    if last is not None:
        content = text[last[0] : last[1].start()]
        boxed = next((answer.text for _, answer in _boxed(content)), None)
        yield last[1].end(), FinalAnswer(content.strip() if boxed is None else boxed, "tag")


_HASHES = re.compile(r"^#{4}(?:[ \t]|(?=[-$\d]))([^\n]*)(\n|\Z)", re.MULTILINE)
_AMOUNT = re.compile(r"\\?\$?\s?-?\s?\\?\$?[\d.,/ ]*\d\s?(?:\\?%|[a-z]+(?: [a-z]+)?)?\.?")


def _hashes(text: str, complete: bool) -> Iterator[tuple[int, FinalAnswer]]:
    """Yield the answer of the last line `#### …`, as in GSM8K, with the position of its end.

    Markdown spells a heading in the same way, so the line must be the text's last or hold an amount alone.
    """
    end = len(text.rstrip())
    last = None
    for match in _HASHES.finditer(text):
        line = match[1].strip()
        amount = len(line) <= 100 and _AMOUNT.fullmatch(line)
        if line and (complete or match[2]) and (amount or match.end() >= end):
            last = match
    if last is not None:
        yield last.end(1), FinalAnswer(last[1].strip(), "hashes")


_DENIED = re.compile(
    r"""
    ,?\s{0,3} (?: \b(?:not|cannot|can\snot|neither|nor|rather\sthan|instead\sof) | (?<=[a-z])n['’]t )
    (?: \s (?:be|equal|equal\sto|simply|just|exactly) ){0,2} \s{1,3}
    (?: \$[^$\n]{1,200}\$ | \\\([^\n]{1,200}?\\\) | [-−]?\\[dt]?frac\s?\{[^{}]{1,99}\}\s?\{[^{}]{1,99}\}
      | [-−+]?\\?[$€£]?[-−]?\d[\d.,/]{0,99} (?<![.,]) \\?%? )
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""A number or formula of which a text says that it isn't the answer."""
_STATED = re.compile(
    rf"\banswers?\b[^.\n:=]{{0,60}}?(?:\b(?:is|are)\b(?!(?x:{_DENIED.pattern}))|:|=)(?:\s?:)?"
    r"|\bfinal answer[*_ ]{0,9}\n|^[ \t]{0,9}A:|答案(?:是|为|：|:)",
    re.IGNORECASE | re.MULTILINE,
)
_DISPLAYED = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\Z|\*\*)|。|\n")


def _stated(text: str) -> str | None:
    """Return what follows the last `the answer is`, `Answer:` or `A:`, up to the end of its sentence or line."""
    last = None
    for match in _STATED.finditer(text):
        last = match
    if last is None:
        return None
    rest = text[last.end() :].lstrip(" \t\n*:")
    if displayed := _DISPLAYED.match(rest):
        return (displayed[1] or displayed[2]).strip() or None
    end = _SENTENCE_END.search(rest)
    return (rest[: end.start()] if end else rest).strip(" \t*") or None
