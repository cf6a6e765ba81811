"""Flaws of completions that can be seen in their text: small functions in a table, to which others may be added.

A detector returns how severe the flaw is, from 0 (none) to 1, or None where it doesn't apply to the sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher

from rlhf_core.contracts.reward import Sample
from rlhf_core.rewards.answer_votes import answer_key
from rlhf_core.rewards.final_answer import after_thinking, find_answer

_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+|[^\w\s]")
_TAIL = 4000
"""Characters at a completion's end in which a loop is looked for."""
_LOOP = re.compile(r"(.{1,60}?)\1{4,}", re.DOTALL)
_END_OF_SENTENCE = re.compile(r"[.!?。！？][\"')\]]*(\s|$)")
_INABILITY = (
    r"\b(?:can(?:no|')t|can not|won't|will not|unable to|not able to|not allowed to|not going to|(?:must|have to) decline to)"
    r"\s+(?:\w+ly\s+)?"
)
_SERVICE = (
    r"(?:assist|help(?! but)|comply|provide|answer|do (?:that|this)|continue|fulfil|fulfill|discuss|create|write|share|give"
    r"|support|engage|generate|produce|offer|respond|participate)\b"
)
_REFUSAL = re.compile(
    rf"\bI(?:'m|’m| am)?\s+(?:sorry[^.!?]{{0,40}}\bI(?:'m|’m| am)?\s+)?(?:am )?{_INABILITY}{_SERVICE}"
    r"|\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b"
    r"|\bI must (?:respectfully )?(?:decline|refuse)\b"
    r"|\b(?:is|goes) against my (?:guidelines|programming|policy|policies)\b",
    re.IGNORECASE,
)
_TEMPLATE = re.compile(
    r"<\|[a-z_]{2,24}\|>|\[/?INST\]|<</?SYS>>|^#{2,3} ?(?:Instruction|Response|System|Input):",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class FlawDetector:
    """One kind of flaw."""

    severity: Callable[[Sample], float | None]
    """Returns how severe the flaw is in a sample, 0 to 1; None where it can't have it."""
    flagged_from: float
    """Severity from which a completion counts as having it."""


def repetition(sample: Sample) -> float:
    """Return the share of a completion that repeats itself: 4-grams of words that occurred before, or a loop at its end.

    A loop is a passage of up to 60 characters, not blank, five or more times in a row, over at least 20 characters.
    """
    text = sample.completion
    words = _WORDS.findall(text.casefold())
    grams = list(zip(*(words[start:] for start in range(4)), strict=False))
    # Short texts have too few 4-grams for a share of them to say anything.
    share = 1 - len(set(grams)) / len(grams) if len(grams) >= 8 else 0.0
    tail = text[-_TAIL:]
    loops = [one for one in _LOOP.finditer(tail) if one[1].strip() and len(one[0]) >= 20]
    return max([share, *(len(one[0]) / len(tail) for one in loops)])


def truncation(sample: Sample) -> float:
    """Return 1 for a completion that was cut off or holds something unclosed, 0.6 for one that ends inside a sentence, else 0.

    Unclosed are code fences, `\\boxed{` and `<think>`; an empty completion counts as cut off. Inside a sentence ends a text of
    several sentences whose last character is a letter, a comma, a colon or an opening bracket.
    """
    text = sample.completion.rstrip()
    if sample.truncated or not text:
        return 1.0
    boxed = text.rfind("\\boxed{")
    if text.count("```") % 2 or text.count("<think>") > text.count("</think>"):
        return 1.0
    if boxed >= 0 and text[boxed:].count("{") > text[boxed:].count("}"):
        return 1.0
    if (text[-1].isalpha() or text[-1] in ",:(") and len(_END_OF_SENTENCE.findall(text)) >= 2:
        return 0.6
    return 0.0


def refusal(sample: Sample) -> float:
    """Return 1 where a completion begins by declining to answer (within its first 200 characters), else 0. English alone."""
    return float(bool(_REFUSAL.search(sample.completion.strip()[:200].replace("’", "'"))))


def contradiction(sample: Sample) -> float | None:
    """Return 1 where the completion's final answer differs from the given one, the column `answer`, and 0 where they agree.

    None where there is no `answer`, or the completion states none: a missing answer isn't another one. Answers are found and
    compared as votes compare them (`answer_key`); a whole text that nothing marks as an answer counts where it agrees.
    """
    given, rest = sample.columns.get("answer"), after_thinking(sample.completion)
    answer = None if rest is None else find_answer(rest, complete=not sample.truncated)
    if given is None or answer is None:
        return None
    found = answer_key(sample.completion, complete=not sample.truncated)
    wanted = answer_key(str(given))
    if wanted is None:
        wanted = answer_key(f"#### {given}")
    if found is None or wanted is None or (answer.how == "text" and found != wanted):
        return None
    return float(found != wanted)


def prompt_leakage(sample: Sample) -> float:
    """Return how much of a hidden prompt a completion gives away: 1 for marks of a chat template, else of a system message.

    Of a system message the longest run of its words that the completion repeats counts, as a share of the message's words or of
    12, whichever is less. What the user wrote may be repeated.
    """
    if _TEMPLATE.search(sample.completion):
        return 1.0
    turns = [] if isinstance(sample.prompt, str) else list(sample.prompt)
    hidden = [str(turn.get("content") or "") for turn in turns if turn.get("role") == "system"]
    said = _WORDS.findall(sample.completion.casefold())
    most = 0.0
    for text in hidden:
        words = _WORDS.findall(text.casefold())
        if len(words) >= 4:
            run = SequenceMatcher(None, words, said, autojunk=False).find_longest_match().size
            most = max(most, min(1.0, run / min(len(words), 12)))
    return most


DETECTORS: dict[str, FlawDetector] = {
    "repetition": FlawDetector(repetition, 0.3),
    "truncation": FlawDetector(truncation, 0.5),
    "refusal": FlawDetector(refusal, 0.5),
    "contradiction": FlawDetector(contradiction, 0.5),
    "prompt_leakage": FlawDetector(prompt_leakage, 0.6),
}
"""The detectors by name; `DETECTORS["mine"] = FlawDetector(function, 0.5)` adds one."""
