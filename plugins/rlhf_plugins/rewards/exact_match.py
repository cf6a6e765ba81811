"""Whether a completion's answer is the reference answer, word for word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from pydantic import Field

from rlhf_core.plugin import AnswerReward, AnswerRewardConfig, FinalAnswer

_DELIMITERS = re.compile(r"\\[()\[\]]")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)
_AROUND = " \t\n.,;:!?\"'`*_“”‘’«»$"


class ExactMatchConfig(AnswerRewardConfig):
    """Options of the reward for exact answers."""

    ignore_case: bool = Field(True, description="Whether capitals and small letters are the same.")
    ignore_punctuation: bool = Field(
        True,
        description="Whether punctuation, quotes, emphasis and brackets around the whole answer are ignored, so that `(B).` is"
        " `B`. Within it (`3.5`, `it's`) they always count.",
    )
    ignore_articles: bool = Field(False, description="Whether `a`, `an` and `the` are ignored, as in SQuAD.")


class ExactMatchReward(AnswerReward):
    """Scores 1 if the completion's final answer is the reference answer, word for word, else 0.

    The answer and the reference are compared with Unicode's compatible characters and runs of blanks made one, as in SQuAD's
    exact match (Rajpurkar et al. 2016, arXiv 1606.05250), which also ignores articles and removes all punctuation: there
    `3.5` is `35`.
    """

    api = 1
    Config = ExactMatchConfig
    config: ExactMatchConfig

    def read(self, references: Sequence[str]) -> list[str | None]:
        """Return the references as they are compared; None where nothing is left."""
        return [self._compared(reference) or None for reference in references]

    def compare(self, answers: Sequence[tuple[FinalAnswer, Sequence[str]]]) -> list[bool | None]:
        texts = [self._compared(answer.text) for answer, _ in answers]
        return [text in references if text else None for text, (_, references) in zip(texts, answers, strict=True)]

    def _compared(self, text: str) -> str:
        """Return a text as it is compared."""
        text = unicodedata.normalize("NFKC", _DELIMITERS.sub(" ", _WRAPPED.sub(r"\1", text)))
        text = text.casefold() if self.config.ignore_case else text
        text = _ARTICLES.sub(" ", text) if self.config.ignore_articles else text
        if self.config.ignore_punctuation:
            text = text.strip(_AROUND)
            if text[:1] + text[-1:] in ("()", "[]", "{}"):
                text = text[1:-1].strip(_AROUND)
        return " ".join(text.split())
