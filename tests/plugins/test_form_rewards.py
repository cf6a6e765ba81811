"""Rewards for form: regular expressions, tags, length and repetition, against cases computed by hand."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace
from typing import Any, ClassVar

import pytest
from rlhf_plugins.rewards.format import FormatReward
from rlhf_plugins.rewards.length import LengthReward
from rlhf_plugins.rewards.regex import RegexReward
from rlhf_plugins.rewards.repetition import RepetitionReward

from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.rewards import open_rewards
from rlhf_core.testing import RewardContract


class TestRegex(RewardContract):
    method = "regex"
    options: ClassVar = {"pattern": r".*#### \d+"}
    changes: ClassVar = {"where": "start", "dot_all": False, "pattern": r".*\d{3}", "thinking": "required"}

    def samples(self) -> list[Sample]:
        return [*super().samples(), Sample("?", "#### 12 and more")]


class TestFormat(RewardContract):
    method = "format"
    changes: ClassVar = {
        "tags": ["answer"],
        "opened": True,
        "text_outside": True,
        "empty": True,
        "boxed": True,
        "partial": True,
    }

    def samples(self) -> list[Sample]:
        texts = [
            "<think>a</think><answer>b</answer>",
            "a</think><answer>b</answer>",
            "Hm. <think>a</think><answer>b</answer>",
            "<think></think><answer>b</answer>",
            "<answer>b</answer>",
        ]
        return [*super().samples(), *(Sample("?", text) for text in texts)]


class TestLength(RewardContract):
    method = "length"
    options: ClassVar = {"target": 20, "max_length": 40, "buffer": 20}
    changes: ClassVar = {"target": 30, "max_length": 25, "buffer": 40}


class TestRepetition(RewardContract):
    method = "repetition"
    options: ClassVar = {"n": 1}
    changes: ClassVar = {"n": 2, "unit": "tokens", "allowed": 0.3}


def score(kind: type[RewardFn], *completions: str | Sample, **options: Any) -> list[float]:
    samples = [one if isinstance(one, Sample) else Sample("?", one) for one in completions]
    return kind(kind.Config.parse(options)).score(samples)


@pytest.mark.parametrize(
    ("options", "completion", "right"),
    [
        ({"pattern": r"\d+"}, "42", 1),
        ({"pattern": r"\d+"}, " 42\n", 1),
        ({"pattern": r"\d+"}, "42 apples", 0),
        ({"pattern": r"\d+"}, "the 42", 0),
        ({"pattern": r"\d+", "where": "start"}, "42 apples", 1),
        ({"pattern": r"\d+", "where": "start"}, "the 42", 0),
        ({"pattern": r"\d+", "where": "end"}, "the 42", 1),
        ({"pattern": r"\d+", "where": "end"}, "42 apples", 0),
        ({"pattern": r"yes|no", "where": "end"}, "yes, sir", 0),
        ({"pattern": r"yes|no", "where": "end"}, "I say yes", 1),
        ({"pattern": r"(?i)yes", "where": "end"}, "I say YES", 1),
        ({"pattern": r"a|ab", "where": "end"}, "xab", 1),
        ({"pattern": r"\d+", "where": "search"}, "the 42 apples", 1),
        ({"pattern": r"yes"}, "YES", 0),
        ({"pattern": r"yes", "ignore_case": True}, "YES", 1),
        ({"pattern": r"a.*z"}, "a\nz", 1),
        ({"pattern": r"a.*z", "dot_all": False}, "a\nz", 0),
        ({"pattern": r"(?m)^b$", "where": "search"}, "a\nb\nc", 1),
        ({"pattern": r"b"}, "<think>a</think>\nb", 0),
        ({"pattern": r"b", "thinking": "auto"}, "<think>a</think>\nb", 1),
        ({"pattern": r"b", "thinking": "auto"}, "<think>b", 0),
        ({"pattern": r""}, "", 1),
    ],
)
def test_matches(options: dict[str, Any], completion: str, right: int) -> None:
    assert score(RegexReward, completion, **options) == [right]


def test_each_row_may_have_its_pattern() -> None:
    samples = [Sample("?", "42", columns={"form": form}) for form in (r"\d+", r"\d", "4.")]
    assert score(RegexReward, *samples, column="form") == [1, 0, 1]
    for columns, said in (
        ({"from": "x"}, "no column `form`.*did you mean `from`"),
        ({"form": "("}, "regular expression"),
    ):
        with pytest.raises(DataError, match=f"row 5.*{said}"):
            open_rewards([RegexReward(RegexReward.Config.parse({"column": "form"}))]).score(
                [replace(samples[0], columns=columns)], rows=[5]
            )


def test_a_match_without_end_is_ended_in_a_thread(caplog: pytest.LogCaptureFixture) -> None:
    found: list[float] = []
    thread = threading.Thread(
        target=lambda: found.extend(score(RegexReward, "a" * 60, "aab", pattern="(a+)+b", seconds=0.3)), daemon=True
    )
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING):
        thread.start()
        thread.join(30)
    assert found == [0, 1] and time.monotonic() - begin < 20
    (record,) = caplog.records
    assert "a match failed (time after 0.3 s) and counts as none" in record.getMessage()


FORM = "<think>\nbecause\n</think>\n\n<answer>\n42\n</answer>\n"


@pytest.mark.parametrize(
    ("options", "completion", "right"),
    [
        ({}, FORM, 1),
        ({}, FORM.replace("\n", ""), 1),
        ({}, "", 0),
        ({}, "Sure! " + FORM, 0),
        ({}, FORM + "Bye.", 0),
        ({}, FORM.replace("<answer>", "So <answer>"), 0),
        ({}, FORM.replace("because", ""), 0),
        ({}, FORM.replace("because", "<think>because"), 0),
        ({}, FORM + FORM, 0),
        ({}, "<answer>42</answer><think>because</think>", 0),
        ({}, "<think>because<answer>42</answer></think>", 0),
        ({}, FORM.replace("</answer>", ""), 0),
        ({}, FORM.replace("think>", "THINK>"), 0),
        ({"text_outside": True}, "Sure! " + FORM + "Bye.", 1),
        ({"empty": True}, FORM.replace("because", ""), 1),
        ({"opened": True}, FORM.replace("<think>", ""), 1),
        ({"opened": True}, FORM, 0),
        ({"tags": ["think"], "text_outside": True}, "<think>because</think>42", 1),
        ({"tags": ["think"], "text_outside": True, "boxed": True}, r"<think>\boxed{1}</think>\boxed{42}", 1),
        ({"tags": ["think"], "text_outside": True, "boxed": True}, r"<think>because</think>\boxed{4} \boxed{2}", 0),
        ({"tags": ["think"], "text_outside": True, "boxed": True}, r"<think>\boxed{1}</think>42", 0),
        ({"tags": [], "boxed": True}, r"so \boxed{42}.", 1),
        ({"tags": [], "boxed": True}, r"so \boxed{42", 0),
        ({"tags": [], "boxed": True}, r"so \boxed{}", 0),
        # Six conditions: two openings, two closings, order with contents, nothing outside.
        ({"partial": True}, FORM, 1),
        ({"partial": True}, "", 0),
        ({"partial": True}, "<think>because</think> 42", 2 / 6),
        ({"partial": True}, FORM + "Bye.", 5 / 6),
        ({"partial": True}, FORM.replace("because", ""), 4 / 6),
        ({"partial": True}, "<think>" * 100, 0),
    ],
)
def test_forms(options: dict[str, Any], completion: str, right: float) -> None:
    assert score(FormatReward, completion, **options) == [pytest.approx(right)]


def test_a_stop_string_may_be_the_last_tag() -> None:
    text = FORM.partition("</answer>")[0]
    stopped, ended = (Sample("?", text, stop_reason=reason) for reason in ("stop", "end"))
    assert score(FormatReward, stopped, ended) == [1, 0]
    assert score(FormatReward, Sample("?", FORM, stop_reason="stop")) == [1]


@pytest.mark.parametrize(
    ("options", "length", "expected"),
    [
        ({"target": 10}, 10, 0),
        ({"target": 10}, 5, -0.5),
        ({"target": 10}, 12, -0.2),
        ({"target": 10}, 0, -1),
        ({"target": 10}, 35, -1),
        # DAPO's equation 13 with L_max 100 and L_cache 20.
        ({"max_length": 100, "buffer": 20}, 80, 0),
        ({"max_length": 100, "buffer": 20}, 81, -0.05),
        ({"max_length": 100, "buffer": 20}, 90, -0.5),
        ({"max_length": 100, "buffer": 20}, 100, -1),
        ({"max_length": 100, "buffer": 20}, 101, -1),
        ({"max_length": 100}, 100, 0),
        ({"max_length": 100}, 101, -1),
        ({"target": 10, "max_length": 11}, 12, -1.2),
    ],
)
def test_lengths(options: dict[str, Any], length: int, expected: float) -> None:
    tokens = Sample("?", "some text", completion_ids=[7] * length)
    if length == 0:
        tokens = replace(tokens, completion="")
    assert score(LengthReward, tokens, **options) == [pytest.approx(expected)]
    assert score(LengthReward, "x" * length, unit="characters", **options) == [pytest.approx(expected)]


def test_length_counts_what_the_policy_wrote(caplog: pytest.LogCaptureFixture) -> None:
    with_tool = Sample("?", "a b c d", completion_ids=[1, 2, 3, 4], mask=[True, False, False, True])
    assert score(LengthReward, with_tool, target=4) == [-0.5]
    with caplog.at_level(logging.WARNING):
        assert score(LengthReward, "two words.", "two words.", target=3) == [0, 0]
    (record,) = caplog.records
    assert "texts without token ids are measured in words and punctuation marks" in record.getMessage()


@pytest.mark.parametrize(
    ("options", "completion", "expected"),
    [
        ({"n": 2}, "a b c d", 0),
        ({"n": 2}, "a b a b", -1 / 3),  # ab ba ab: one of three repeats
        ({"n": 2}, "a A a a", -2 / 3),
        ({"n": 1}, "a a a a", -3 / 4),
        ({"n": 4}, "a b c", 0),
        ({"n": 4}, "", 0),
        ({"n": 1}, "!!!!", -3 / 4),
        ({"n": 1}, "好好学习", -1 / 4),
        ({"n": 1, "allowed": 0.5}, "a a a a", -0.5),
        ({"n": 1, "allowed": 0.5}, "a a b", 0),
    ],
)
def test_repetition(options: dict[str, Any], completion: str, expected: float) -> None:
    assert score(RepetitionReward, completion, **options) == [pytest.approx(expected)]


def test_repetition_of_tokens() -> None:
    samples = [
        Sample("?", "a b c d", completion_ids=[1, 2, 1, 2]),
        Sample("?", "a b c d", completion_ids=[1, 2, 1, 2], mask=[True, True, False, False]),
    ]
    assert score(RepetitionReward, *samples, n=2, unit="tokens") == [pytest.approx(-1 / 3), 0]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("regex", {}, "set either `pattern` or `column`"),
        ("regex", {"pattern": "a", "column": "b"}, "set either `pattern` or `column`"),
        ("regex", {"pattern": "("}, "`pattern` is no regular expression: missing \\)"),
        ("regex", {"patern": "a"}, "did you mean `pattern`"),
        ("format", {"tags": ["<think>"]}, "a tag is a name without brackets"),
        ("format", {"tags": ["a", "a"]}, "each tag may be named once"),
        ("format", {"tags": []}, "set `tags` or `boxed`"),
        ("format", {"tags": [], "boxed": True, "opened": True}, "`opened` needs a tag"),
        ("length", {}, "set `target`, `max_length`, or both"),
        ("length", {"target": 0}, "greater than or equal to 1"),
        ("length", {"target": 5, "buffer": 2}, "`buffer` lies before `max_length`"),
        ("length", {"max_length": 5, "buffer": 6}, "`buffer` \\(6\\) is larger than `max_length` \\(5\\)"),
        ("repetition", {"n": 0}, "greater than or equal to 1"),
        ("repetition", {"allowed": 1}, "less than 1"),
        ("exact_match", {"accept": "box"}, "'anywhere', 'marked' or 'boxed'"),
        ("numeric_answer", {"tolerance": -1}, "greater than or equal to 0"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_rewards([{"name": name, "options": options}])
