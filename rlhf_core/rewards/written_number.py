"""Read numbers as people and models write them: `1,234.5`, `2 1/2`, `\\frac{3}{4}`, `$5`, `50\\%`, `16 eggs`."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

_MOST_CHARACTERS = 200
"""A longer text is no number: reading stays fast, whatever a model writes."""
_MOST_DIGITS = 100
_LARGEST_EXPONENT = 400


@dataclass(frozen=True)
class WrittenNumber:
    """A number that was read from text, exactly as it was written."""

    value: Fraction
    percent: bool = False
    """Whether a percent sign follows; `value` is the number before it."""
    rounded: bool = False
    """Whether it was written with a decimal point or a power of ten, so that it may have been rounded."""


def read_number(text: str, *, decimal_comma: bool = False) -> WrittenNumber | None:
    """Return the number that the whole text is; None where it is none, is several, or must be computed (`2^{10}`, `3x`).

    A currency sign, a unit (`16 eggs`, `5\\text{ cm}^2`), a variable (`x = 5`) and delimiters of mathematics may surround it.

    Args:
        decimal_comma: whether `1.234,5` is what `1,234.5` is otherwise.
    """
    if len(text) > _MOST_CHARACTERS:
        return None
    plain = _BEFORE.sub("", _plain(text, decimal_comma).lstrip(" ,;:\n").rstrip(" .,;:\n"))
    plain = re.sub(r"(?<=[\w. ])\s?\([A-Za-z -]{2,60}\)$", "", plain)  # `72 (clips)`
    if plain[:1] + plain[-1:] in ("()", "{}"):
        plain = plain[1:-1].strip()
    match = _SPELLING.match(plain)
    return _number(match) if match is not None and _is_unit(plain[match.end() :]) else None


def only_number(text: str, *, decimal_comma: bool = False) -> WrittenNumber | None:
    """Return the number that a text is, or the only one among its words (`no more than 42 apples`); None for a formula."""
    number = read_number(text, decimal_comma=decimal_comma)
    if number is not None or len(text) > _MOST_CHARACTERS or _FORMULA.search(_plain(text, decimal_comma)):
        return number
    found = {(number.value, number.percent): number for number in numbers_in(text, decimal_comma=decimal_comma)}
    return next(iter(found.values())) if len(found) == 1 else None


def numbers_in(text: str, *, decimal_comma: bool = False) -> list[WrittenNumber]:
    """Return the numbers in a text, in order, without those in a name (`H2O`), of a power (`2^10`) or of a letter (`3x`)."""
    plain = _plain(text, decimal_comma)
    found = []
    for match in _SPELLING.finditer(plain):
        before, after = plain[: match.start()][-1:], plain[match.end() :][:40]
        if not (before.isalnum() or before in tuple("_^\\")) and not _continues(after):
            bullet = match.group()[1:2].isspace()  # of a list: `- 5 apples`
            found.append(_number(match, signed=not bullet))
    return [number for number in found if number is not None]


def _number(match: re.Match[str], *, signed: bool = True) -> WrittenNumber | None:
    """Return the number of a match of `_SPELLING`; None where it is too large or divided by zero."""
    parts = {name: part for name, part in match.groupdict().items() if part is not None}
    if sum(character.isdigit() for character in match.group()) > _MOST_DIGITS:
        return None
    if "over" in parts:
        over, under = _fraction(parts["over"]), _fraction(parts["under"])
        if not under:
            return None
        value = _fraction(parts.get("whole", "0")) + over / under
    else:
        value = _fraction(parts["number"])
    exponent = int(re.sub(r"\s", "", parts.get("e") or parts.get("power") or "0"))
    if abs(exponent) > _LARGEST_EXPONENT:
        return None
    value *= Fraction(10) ** exponent * _SCALES.get(parts.get("scale", "").casefold(), 1)
    if signed and parts.get("sign") == "-":
        value = -value
    return WrittenNumber(value, "percent" in parts, exponent != 0 or "." in match.group().rstrip(". "))


def _fraction(digits: str) -> Fraction:
    return Fraction(re.sub(r"[,' _]", "", digits).rstrip("."))


def _plain(text: str, decimal_comma: bool) -> str:
    """Return a text with LaTeX's and Unicode's spellings of numbers replaced by ASCII's, without currency signs."""
    if not text.isascii():
        text = "".join(map(_ascii, text))
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text.translate(_COMMA_AS_POINT) if decimal_comma else text


def _ascii(character: str) -> str:
    """Return a character, in ASCII where it spells part of a number."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return f" {unicodedata.normalize('NFKC', character).replace('⁄', '/')} "
    if unicodedata.category(character) == "Sc":
        return "$"
    return _CHARACTERS.get(character, character)


_CHARACTERS = {
    **dict.fromkeys("\N{MINUS SIGN}–—﹣－‒", "-"), **dict.fromkeys("⁄∕", "/"), **dict.fromkeys("×✕", "*"),
    **dict.fromkeys("％﹪", "%"),
    **dict.fromkeys("\u00a0\u2009\u202f\u2007\u3000", " "), **dict.fromkeys("，٬", ","), **dict.fromkeys("．٫", "."),
    "＝": "=", "≈": "=", "’": "'", "°": " units ", "²": "^2", "³": "^3",
}  # fmt: skip
_COMMA_AS_POINT = {ord(","): ".", ord("."): ","}


def _of_text(match: re.Match[str]) -> str:
    """Return what `\\text{…}` holds, as `units` unless it is words that belong to the number."""
    words = match.group(1).split()
    single = (
        words and all(word.strip(".").isalpha() for word in words) and not _OTHER_WORDS & {*map(str.casefold, words)}
    )
    return " units " if single else f" {match.group(1)} "


def _repeating(match: re.Match[str]) -> str:
    """Return a repeating decimal such as `0.1\\overline{6}` as a fraction."""
    whole, once, again = match.groups()
    nines = (10 ** len(again) - 1) * 10 ** len(once)
    return f" {int(whole + once + again) - int(whole + once or '0')}/{nines} "


_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_OTHER_WORDS = {
    *(
        "and",
        "or",
        "to",
        "over",
        "times",
        "plus",
        "minus",
        "of",
        "out",
        "pi",
        "sqrt",
        "sin",
        "cos",
        "tan",
        "log",
        "ln",
        "exp",
    ),
    *("mod", "factorial", "dozen", "choose", "is", "are", "percent", "per", *_SCALES),
}
"""Words after a number that aren't its unit."""
_ATTACHED_UNITS = {
    *("cm", "mm", "km", "m", "kg", "g", "mg", "ml", "l", "ft", "in", "lb", "lbs", "oz", "mph", "kph", "cents"),
    *("h", "hr", "hrs", "min", "mins", "sec", "s"),
}
"""Units that may follow a number without a blank."""

_REPLACED: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\(?:left|right|displaystyle|boldsymbol|mathbf|quad|qquad)(?![a-zA-Z])|\\[,!;:> ()\[\]]|\*\*|~"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])"), " units "),
    (re.compile(r"(?<=[-+])\s?(?:\\?\$)\s?(?=[\d.])"), ""),
    (re.compile(r"(?:\b(?:US|CA|AU?|HK))?\\?\$|\b(?:USD|EUR|GBP|Rs\.?)\s?(?=\d)"), " "),
    (re.compile(r"(\d{0,20})\.(\d{0,20})\\(?:overline|bar|dot)\s?\{?(\d{1,20})\}?"), _repeating),
    (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\approx(?![a-zA-Z])"), "="),
    (re.compile(r"\\[dtc]?frac\s*\{\s*([-+\d.,]{1,40})\s*\}\s*\{\s*([-+\d.,]{1,40})\s*\}"), r" \1/\2 "),
    (re.compile(r"\\[dtc]?frac\s*\{?(\d)\}?\s*\{?(\d)\}?"), r" \1/\2 "),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mbox|operatorname)\s*\{([^{}\\]{0,80})\}"), _of_text),
]  # fmt: skip
"""What is replaced before a number is read. A dollar sign is a currency, or delimits mathematics."""

_BEFORE = re.compile(
    r"^(?:[A-Za-z](?:_\{?\w{1,9}\}?)?\s*=\s*|(?:approximately|approx\.?|about|around|roughly|exactly|nearly)\s+)",
    re.IGNORECASE,
)
"""What may stand before a number: a variable, or how exact it is."""
_FORMULA = re.compile(r"[\\^_+*=(){}\[\]<>≤≥≠±√∈|:]|(?<![\w'])[b-fi-jn-rt-zB-FG-HM-MO-RT-UX-Z](?![\w'.])")
"""Signs of mathematics, and letters alone that are no units."""
_DIGITS = (
    r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?![\d,])(?:\.\d+)?|\d{1,3}(?:[ _']\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
_SPELLING = re.compile(
    rf"""
    (?: (?<![\w)\]}}%]) (?P<sign>[-+]) \s? (?=[\d.]) )?
    (?:
      (?: (?P<whole>\d{{1,20}}) (?:\s+|\s+and\s+) )? (?P<over>[-+]?{_DIGITS}) \s?/\s? (?P<under>[-+]?{_DIGITS}) (?!\s?/\s?\d)
      | (?P<number>{_DIGITS}) (?: [eE] (?P<e>[-+]?\d{{1,6}}) (?![\w.])
                               | \s?\*\s? 10 \s?\^\s? \{{? \s? (?P<power>[-+]?\s?\d{{1,6}}) \s? \}}? )?
    )
    (?: \.(?!\d) )?
    (?: \s{{1,3}} (?P<scale>{"|".join(_SCALES)}) \b )?
    (?: \s{{0,3}} (?P<percent>%|percent\b|per\ cent\b) )?
    """,
    re.VERBOSE | re.IGNORECASE,
)


def _is_unit(text: str) -> bool:
    """Tell whether what follows a number is nothing, or up to four words of a unit: ` km/h`, ` square feet`, ` cm^2`."""
    text = re.sub(r"^\s*/\s*(?=[A-Za-z]{2})", " ", text)  # `18/hour`
    words = re.split(r"[\s/*]+", re.sub(r"\^\s?\{?-?\d\}?", "", text).strip(" .,;:!\n"))
    if words == [""]:
        return not text.strip().startswith(("^", "/", "*", "!"))
    attached = not text[:1].isspace()
    return len(words) <= 4 and all(
        word.rstrip(".").isalpha()
        and word.casefold() not in _OTHER_WORDS - {"per"}
        and (len(word) > 1 or (word in _ATTACHED_UNITS and (attached or number > 0)))
        and (number > 0 or not attached or word.casefold() in _ATTACHED_UNITS)
        for number, word in enumerate(words)
    )


def _continues(after: str) -> bool:
    """Tell whether the text after a number makes it part of something else: a letter, a power, a subscript."""
    if after[:1] in tuple("^_\\") or (after[:1] == "." and after[1:2].isdigit()):
        return True
    word = re.match(r"[^\W_]*", after)
    return bool(word and word.group() and word.group().casefold() not in _ATTACHED_UNITS)
