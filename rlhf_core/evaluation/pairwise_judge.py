"""A language model that says which of two completions is better, asked in both orders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf_core.config.evaluation import PairwiseJudgeConfig
from rlhf_core.generation.answering_model import AnsweringModel, prompt_text
from rlhf_core.infra.errors import ConfigError, DataError, PluginError, shortened

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
_VERDICT = re.compile(r"Verdict:\s*\**\s*(A|B|tie)\b", re.IGNORECASE)
_PREFERENCE = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class ComparedPair:
    """Two completions of a prompt."""

    prompt: Any
    """Text or chat messages."""
    own: str
    other: str
    columns: Mapping[str, Any]
    """The row's other columns, for the judge's template."""
    place: str
    """The row, for messages."""


class PairwiseJudge:
    """Compares completions by asking a language model (Zheng et al. 2023, arXiv 2306.05685, section 3.1).

    Judges prefer a position, most often the first. With `swap` each pair is judged in both orders, and the preference is the mean
    of both: 1 or 0 where they agree, 0.5 where they contradict each other (the paper counts that as a tie, too).

    Raises:
        ConfigError: the template isn't one of Jinja.
    """

    def __init__(self, config: PairwiseJudgeConfig) -> None:
        self.config, self.model = config, AnsweringModel(config)
        try:
            self._template = _ENVIRONMENT.from_string(config.prompt)
        except jinja2.TemplateSyntaxError as error:
            got = f"line {error.lineno}: {error.message}"
            raise ConfigError("is no Jinja template", place="judge.prompt", got=got) from None

    def prepare(self) -> None:
        """Load the model, or check its address; see `AnsweringModel.prepare`."""
        self.model.prepare()

    def describe(self) -> dict[str, Any]:
        """Return what its judgements depend on, as JSON values."""
        return {"options": self.config.model_dump(mode="json"), **self.model.describe()}

    def compare(self, pairs: Sequence[ComparedPair]) -> tuple[list[float], list[bool]]:
        """Return for each pair the preference for its own completion, in [0, 1], and whether both orders agree on it.

        Raises:
            DataError: the template can't be filled in for a row.
            PluginError: an answer holds no verdict and isn't to count as a tie, or the server doesn't answer.
        """
        orders = 2 if self.config.swap else 1
        questions = [self._question(pair, swapped=bool(order)) for pair in pairs for order in range(orders)]
        answers = iter(self.model.ask(questions, at_once=self.config.at_once))
        found, agreed = [], []
        for pair in pairs:
            verdicts = [abs(order - self._preference(next(answers), pair)) for order in range(orders)]
            found.append(sum(verdicts) / orders)
            agreed.append(len(set(verdicts)) == 1)
        return found, agreed

    def _question(self, pair: ComparedPair, *, swapped: bool) -> str:
        first, second = (pair.other, pair.own) if swapped else (pair.own, pair.other)
        values = {**pair.columns, "prompt": prompt_text(pair.prompt), "first": first, "second": second}
        try:
            return self._template.render(values)
        except Exception as error:  # a template is a program: it may lack a column, or divide by zero
            fix = f"the row has: {', '.join(sorted(map(str, values)))}"
            problem = "the template `judge.prompt` can't be filled in"
            raise DataError(problem, place=pair.place, got=f"{type(error).__name__}: {error}", fix=fix) from error

    def _preference(self, answer: str, pair: ComparedPair) -> float:
        """Return 1 where the first of the two was preferred, 0 for the second, 0.5 for a tie; the last verdict counts."""
        verdicts = _VERDICT.findall(answer)
        if verdicts:
            return _PREFERENCE[verdicts[-1].lower()]
        if self.config.unreadable == "tie":
            return 0.5
        raise PluginError(
            "the judge's answer holds no verdict",
            place=f"judge, {pair.place}",
            got=shortened(answer[-60:]),
            fix="see `judge.prompt` and `judge.max_tokens`, or set `judge.unreadable: tie`",
        )
