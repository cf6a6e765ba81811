"""How completions are drawn: the options' ranges, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_core.config.online import SamplingConfig
from rlhf_core.infra.errors import ConfigError

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an empty stop string": ({"stop": ["a", ""]}, "`stop`: an empty text is in every completion: leave it out"),
    "half a character": ({"stop": "\ufffd"}, "`stop`: U+FFFD stands for bytes that aren't text"),
    "a number for a text": ({"stop": [3]}, "`stop.0`: must be text; got 3"),
    "a negative id": ({"stop_ids": [5, -1]}, "`stop_ids`: token ids are whole numbers, 0 or larger"),
    "true for an id": ({"stop_ids": [True]}, "`stop_ids`: token ids are whole numbers, 0 or larger"),
    "a text for an id": ({"stop_ids": "</s>"}, "`stop_ids.0`: must be a whole number; got '</s>'"),
    "all below the most likely": ({"min_p": 1}, "`min_p`: must be less than 1; got 1"),
    "a negative share": ({"min_p": -0.1}, "`min_p`: must be greater than or equal to 0; got -0.1"),
    "no number": ({"min_p": float("nan")}, "`min_p`: must be a finite number; got nan"),
    "a penalty of 0": ({"repetition_penalty": 0}, "`repetition_penalty`: must be greater than 0; got 0"),
    "an infinite penalty": (
        {"repetition_penalty": float("inf")},
        "`repetition_penalty`: must be a finite number; got inf",
    ),
    "less than no tokens": ({"min_new_tokens": -1}, "`min_new_tokens`: must be greater than or equal to 0; got -1"),
    "the least above the most": (
        {"min_new_tokens": 9, "max_new_tokens": 8},
        "`min_new_tokens` (9) is above `max_new_tokens` (8): lower the first or raise the second",
    ),
    "a negative confidence": ({"min_confidence": -1}, "`min_confidence`: must be greater than or equal to 0; got -1"),
    "an infinite confidence": ({"min_confidence": float("inf")}, "`min_confidence`: must be a finite number; got inf"),
    "an empty window": ({"min_confidence": 1, "confidence_window": 0}, "`confidence_window`: must be greater than or"),
    "no most likely token": ({"min_confidence": 1, "confidence_top": 0}, "`confidence_top`: must be greater than or"),
    "a window for nothing": ({"confidence_window": 8}, "confidence_window has no meaning without `min_confidence`"),
    "most likely tokens for nothing": ({"confidence_top": 5}, "confidence_top has no meaning without `min_confidence`"),
    "a window longer than completions": (
        {"min_confidence": 1, "max_new_tokens": 31},
        "no completion of at most 31 tokens (`max_new_tokens`) has the 32 of `confidence_window`",
    ),
    "a negative temperature": ({"temperature": -1}, "`temperature`: must be greater than or equal to 0; got -1"),
    "a near name": ({"min-p": 0.1}, "unknown option `min-p`; fix: did you mean `min_p`?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        SamplingConfig.parse(values)
    assert caught.value.exit_code == 2 and message in caught.value.line()


def test_one_stop_is_a_list_of_one() -> None:
    config = SamplingConfig.parse({"stop": "\n\n", "stop_ids": 7})
    assert (config.stop, config.stop_ids) == (["\n\n"], [7])
    assert config.updated(temperature=0.5).stop == ["\n\n"]
    assert (SamplingConfig().stop, SamplingConfig().stop_ids) == ([], [])
