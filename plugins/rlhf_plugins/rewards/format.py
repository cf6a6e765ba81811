"""Whether a completion has the form that is asked for: tags in order, each once, and a boxed answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field, field_validator, model_validator

from rlhf_core.plugin import BaseConfig, RewardFn, Sample, after_thinking, find_answer, with_stop


class FormatConfig(BaseConfig):
    """Options of the reward for form."""

    tags: list[str] = Field(
        default_factory=lambda: ["think", "answer"],
        description="Tags that must occur in this order, each opened and closed once: `think` is `<think>…</think>`.",
    )
    opened: bool = Field(
        False, description="Whether the prompt's chat template opens the first tag, so that completions only close it."
    )
    text_outside: bool = Field(False, description="Whether text may stand before, between and after the tags.")
    empty: bool = Field(False, description="Whether a tag may hold nothing but whitespace.")
    boxed: bool = Field(
        False, description="Whether a `\\boxed{…}` must be there, once, after the thinking; several are refused."
    )
    partial: bool = Field(
        False, description="Whether the score is the share of conditions that are met, instead of 0 unless all are."
    )

    @field_validator("tags")
    @classmethod
    def _are_names(cls, tags: list[str]) -> list[str]:
        for tag in tags:
            if not re.fullmatch(r"[\w:|.-]+", tag):
                raise ValueError(f"a tag is a name without brackets, such as `think`, not `{tag}`")
        if len(set(tags)) < len(tags):
            raise ValueError("each tag may be named once")
        return tags

    @model_validator(mode="after")
    def _asks_for_something(self) -> FormatConfig:
        if not self.tags and not self.boxed:
            raise ValueError("set `tags` or `boxed`: without them every completion has the form")
        if self.opened and not self.tags:
            raise ValueError("`opened` needs a tag")
        return self


class FormatReward(RewardFn):
    """Scores 1 if the completion has the form that is asked for, else 0.

    By default that of DeepSeek-R1-Zero (Guo et al. 2025, arXiv 2501.12948): `<think>…</think>`, then `<answer>…</answer>`,
    and nothing else. Each tag must be opened and closed exactly once, in order, with text in it. With `partial`, the share of
    these conditions that are met: each opening, each closing, order with contents, nothing outside, and the box. A completion
    that ended at a stop string, which its text lacks, counts as having closed its last tag.
    """

    api = 1
    Config = FormatConfig
    config: FormatConfig

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return each completion's score, between 0 and 1."""
        scores = []
        for sample in samples:
            last = f"</{self.config.tags[-1]}>" if self.config.tags else ""
            met = conditions(with_stop(sample, last) if last else sample.completion, self.config)
            scores.append(sum(met) / len(met) if self.config.partial else float(all(met)))
        return scores


def conditions(text: str, config: FormatConfig) -> list[bool]:
    """Return for each condition whether a text meets it."""
    met = []
    if config.opened:
        text = f"<{config.tags[0]}>{text}" if f"<{config.tags[0]}>" not in text else f"<{config.tags[0]}>" * 2
    for tag in config.tags:
        met += [text.count(f"<{tag}>") == 1, text.count(f"</{tag}>") == 1]
    inside, outside, rest = [], [], text
    if config.tags and all(met):
        for tag in config.tags:
            before, _, rest = rest.partition(f"<{tag}>")
            content, closed, rest = rest.partition(f"</{tag}>")
            inside.append(bool(closed) and (config.empty or bool(content.strip())))
            outside.append(before)
        outside.append(rest)
    if config.tags:
        met.append(bool(inside) and all(inside))
        if not config.text_outside:
            met.append(met[-1] and not any(piece.strip() for piece in outside))
    if config.boxed:
        met.append(_boxed_once(after_thinking(text)))
    return met


def _boxed_once(text: str | None) -> bool:
    """Tell whether a text has one box, which is closed and holds something."""
    if text is None or text.count("\\boxed") != 1:
        return False
    answer = find_answer(text[text.index("\\boxed") :])
    return answer is not None and answer.how == "boxed"
