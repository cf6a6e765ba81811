"""Rewards that compare answers: hand-made cases, references of every form, thinking, truncation, hostile answers in threads."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rlhf_plugins.rewards.exact_match import ExactMatchReward
from rlhf_plugins.rewards.math_verify import MathVerifyReward
from rlhf_plugins.rewards.numeric_answer import NumericAnswerReward

from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.rewards import open_rewards
from rlhf_core.testing import RewardContract

pytest.importorskip("math_verify")
GSM8K = Path(__file__).resolve().parents[2].parent / "shared/data/gsm8k"


class TestExactMatch(RewardContract):
    method = "exact_match"
    changes: ClassVar = {"wrong_score": -1.0, "column": "other"}

    def samples(self) -> list[Sample]:
        given = super().samples()
        return [Sample(**{**vars(one), "columns": {**one.columns, "other": "none of these"}}) for one in given]


class TestNumericAnswer(RewardContract):
    method = "numeric_answer"
    changes: ClassVar = {"wrong_score": -1.0, "tolerance": 1000.0, "accept": "boxed", "no_answer_score": -1.0}

    def samples(self) -> list[Sample]:
        return [*super().samples(), Sample("?", "I don't know", columns={"answer": 1})]


class TestMathVerify(RewardContract):
    method = "math_verify"
    changes: ClassVar = {"wrong_score": -1.0, "accept": "boxed"}


@cache
def reward(kind: type[RewardFn], **options: Any) -> RewardFn:
    made = kind(kind.Config.parse(options))
    made.prepare()
    return made


def score(kind: type[RewardFn], completion: str, reference: Any, stop_reason: str = "end", **options: Any) -> float:
    (found,) = reward(kind, **options).score(
        [Sample("?", completion, columns={"answer": reference}, stop_reason=stop_reason)]
    )
    return found


# Reference, completion, score by numeric_answer (None: the reference is no number), score by math_verify.
MATHEMATICS = [
    # fractions, mixed numbers, decimals
    ("1/2", r"\boxed{\frac{1}{2}}", 1, 1),
    ("1/2", r"\boxed{\dfrac12}", 1, 1),
    (r"\frac{3}{4}", r"\boxed{0.75}", 1, 1),
    (r"\frac{2}{4}", r"\boxed{\frac{1}{2}}", 1, 1),
    ("1/2", r"\boxed{2/1}", 0, 0),
    ("2 1/2", r"\boxed{2\frac{1}{2}}", 1, 1),
    ("2 1/2", r"\boxed{2.5}", 1, 1),
    ("2 1/2", r"\boxed{\frac{3}{2}}", 0, 0),
    (r"-\frac{3}{4}", r"\boxed{\frac{-3}{4}}", 1, 1),
    ("½", r"\boxed{0.5}", 1, 1),
    ("1/3", r"\boxed{0.3333333}", 1, 1),
    ("1/3", r"\boxed{0.33}", 0, 0),
    ("3.50", r"\boxed{3.5}", 1, 1),
    (".5", r"\boxed{0.5}", 1, 1),
    ("10", r"\boxed{10.0}", 1, 1),
    ("10", r"\boxed{10.1}", 0, 0),
    # signs
    ("-5", r"\boxed{-5}", 1, 1),
    ("-5", r"\boxed{−5}", 1, 1),
    ("-5", r"\boxed{5}", 0, 0),
    ("5", r"\boxed{+5}", 1, 1),
    # percent
    ("50%", r"\boxed{50\%}", 1, 1),
    ("50", r"\boxed{50\%}", 1, 1),
    ("50%", r"\boxed{0.5}", 1, 1),
    (r"50\%", r"\boxed{50}", 1, 1),
    ("50%", r"\boxed{5}", 0, 0),
    ("20", "That is 20 percent.", 1, 1),
    # separators, scientific notation, large numbers
    ("1234", r"\boxed{1,234}", 1, 1),
    ("1,234", r"\boxed{1{,}234}", 1, 1),
    ("1,234,567", r"\boxed{1\,234\,567}", 1, 1),
    ("1500", r"\boxed{1.5 \times 10^{3}}", 1, 1),
    ("1.5e3", r"\boxed{1500}", 1, 1),
    ("0.0015", r"\boxed{1.5\cdot10^{-3}}", 1, 1),
    ("1000000", r"\boxed{1000001}", 0, 0),
    ("123456789123456789", r"\boxed{123456789123456788}", 0, 0),
    # currency, units, words around
    ("5", r"\boxed{\$5}", 1, 1),
    ("$5", r"\boxed{5}", 1, 1),
    (r"\$1,080.50", r"\boxed{1080.5}", 1, 1),
    ("5", r"\boxed{5\text{ cm}}", 1, 1),
    ("5", r"\boxed{5\,\mathrm{cm}^2}", 1, 1),
    ("5 dollars", r"\boxed{5}", 1, 1),
    ("16", r"\boxed{16 eggs}", 1, 1),
    ("90", r"\boxed{90^\circ}", 1, 1),
    ("5", r"\boxed{x = 5}", 1, 1),
    # how the answer is given
    ("#### 72", r"\boxed{72}", 1, 1),
    ("She sold 48+24 = <<48+24=72>>72 clips.\n#### 72", "So 72 in all.\n#### 72", 1, 1),
    (r"Hence the answer is \boxed{72}.", "The answer is 72.", 1, 1),
    ("72", "The answer is $72$.", 1, 1),
    ("72", "**Answer:** 72 clips", 1, 1),
    ("72", "<answer>72</answer>", 1, 1),
    ("72", "First 48, then 24; together 72.", 1, 1),
    ("72", "48 + 24 = 72", 1, 1),
    ("72", "A: 72", 1, 1),
    ("72", r"\boxed{72.}", 1, 1),
    ("42", r"\boxed42", 1, 1),
    ("42", "####42", 1, 1),
    ("42", "<ANSWER>42</ANSWER>", 1, 1),
    ("42", "The answer is 42 dollars, or 4200 cents.", 1, 1),
    ("42", "The answer is 6 * 7 = 42.", 1, 1),
    ("7", "The answer is seven (7).", 1, 1),
    ("10", "The answer is $2^{10}$.", 0, 0),
    # which of several counts
    ("2", r"\boxed{1} is wrong. So \boxed{2}.", 1, 1),
    ("1", r"\boxed{1} is right. No, \boxed{2}.", 0, 0),
    ("2", r"\boxed{2}, that is, \boxed{2}.", 1, 1),
    ("2", r"\boxed{1} or \boxed{2}", 0, 0),
    ("2", r"\boxed{1 \text{ or } 2}", 0, 0),
    ("2", r"\boxed{2} and now the answer is 3", 1, 1),
    ("2", r"1, 2, 3", 0, 0),
    ("7", "The answer is not 5 but 7.", 1, 1),
    ("7", "3 + 4 = 7. The answer isn't 5.", 1, 1),
    # no answer
    ("2", "", 0, 0),
    ("5", "The answer is not 5.", 0, 0),
    ("5", r"The answer is not $5$.", 0, 0),
    ("5", "So it cannot be 5.", 0, 0),
    (r"\frac{1}{2}", r"The answer isn't \(\frac{1}{2}\).", 0, 0),
    ("2", "I don't know.", 0, 0),
    ("2", r"\boxed{}", 0, 0),
    ("2", r"\boxed{\text{two}}", 0, 0),
    ("2", r"\boxed{2x}", 0, 0),
    # in other words
    ("42", r"\boxed{approximately 42}", 1, 1),
    ("72", r"\boxed{72 (clips)}", 1, 1),
    ("18", r"\boxed{\$18.00/hour}", 1, 1),
    ("2", r"\boxed{2 \text{ real solutions}}", 1, 1),
    ("5", r"\boxed{5~\text{m}}", 1, 1),
    ("5", r"\boxed{5 x}", 0, 0),
    ("1/3", r"\boxed{0.\overline{3}}", 1, 1),
    (r"0.1\overline{6}", r"\boxed{\frac{1}{6}}", 1, 1),
    ("1", r"\boxed{0.999999}", 0, 0),
    ("5/3", r"\boxed{\frac{5}{3} \approx 1.67}", 0, 1),
    # roots, powers, expressions, symbols
    (r"2\sqrt{2}", r"\boxed{\sqrt{8}}", None, 1),
    ("1024", r"\boxed{2^{10}}", 0, 1),
    (r"\pi", r"\boxed{π}", None, 1),
    (r"\frac{\pi}{2}", r"\boxed{\pi/2}", None, 1),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", None, 1),
    ("x^2+2x+1", r"\boxed{(x-1)^2}", None, 0),
    ("1+i", r"\boxed{i+1}", None, 1),
    ("x^2+1", "The final answer is x^2 + 1.", None, 1),
    ("x^2+1", "Hence the answer is $1+x^2$.", None, 1),
    # sets, tuples, intervals, matrices, several answers
    (r"\{1,2\}", r"\boxed{\{2, 1\}}", None, 1),
    ("1, 2", r"\boxed{2, 1}", None, 1),
    ("1, 2", r"$\boxed{2}$ and $\boxed{1}$", None, 1),
    ("1, 2", r"\boxed{1}", None, 0),
    ("1, 2", r"\boxed{x=1 \text{ or } x=2}", None, 1),
    ("(1,2)", r"\boxed{(1, 2)}", None, 1),
    ("(1,2)", r"\boxed{(2, 1)}", None, 0),
    ("[1,2)", r"\boxed{[1,2)}", None, 1),
    ("[1,2)", r"\boxed{(1,2]}", None, 0),
    (r"(-\infty,3]", r"\boxed{(-∞, 3]}", None, 1),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", None, 1),
    ("x<3", r"\boxed{x < 3}", None, 1),
    (r"(1, \infty)", r"\boxed{x > 1}", None, 1),
    ("1, -1", r"\boxed{\pm 1}", None, 1),
    (r"\emptyset", r"\boxed{\varnothing}", None, 1),
    (r"\left(\frac{1}{2}, 3\right)", r"\boxed{(0.5, 3)}", None, 1),
    # words and letters
    (r"\text{Evelyn}", r"\boxed{Evelyn}", None, 1),
    (r"\text{listen}", r"\boxed{\text{silent}}", None, 0),
    ("B", r"\boxed{\text{(B)}}", None, 1),
    ("B", r"\boxed{C}", None, 0),
    (r"\text{12:30 PM}", r"\boxed{12:30 PM}", None, 1),
]


@pytest.mark.parametrize(("reference", "completion", "numeric", "_"), MATHEMATICS)
def test_numeric_answers(reference: str, completion: str, numeric: int | None, _: int) -> None:
    if numeric is None:
        with pytest.raises(DataError, match="the reference answer can't be read"):
            score(NumericAnswerReward, completion, reference)
    else:
        assert score(NumericAnswerReward, completion, reference) == numeric


@pytest.mark.parametrize(("reference", "completion", "_", "right"), MATHEMATICS)
def test_mathematical_answers(reference: str, completion: str, _: int | None, right: int) -> None:
    assert score(MathVerifyReward, completion, reference) == right


@pytest.mark.parametrize(
    ("reference", "completion", "options", "right"),
    [
        ("Paris", "The answer is Paris.", {}, 1),
        ("Paris", "paris", {}, 1),
        ("Paris", "paris", {"ignore_case": False}, 0),
        ("Paris", "Paris, France", {}, 0),
        ("Paris", r"\boxed{\text{Paris}}", {}, 1),
        ("B", "The correct answer is (B).", {}, 1),
        ("B", "Answer: **B**", {}, 1),
        ("42", r"Answer: \(42\)", {}, 1),
        ("B", "Answer: (B)", {"ignore_punctuation": False}, 0),
        ("3.5", "35", {}, 0),
        ("it's  late", "<answer>it's\nlate</answer>", {}, 1),
        ("the Beatles", "Beatles", {}, 0),
        ("the Beatles", "Beatles", {"ignore_articles": True}, 1),
        ("café", "cafe\N{COMBINING ACUTE ACCENT}", {}, 1),
        ("yes", "no", {}, 0),
        ("yes", "", {}, 0),
        ("yes", "...", {"no_answer_score": -0.5}, -0.5),
        (True, "true", {}, 1),
        (72, "#### 72", {}, 1),
        (["NYC", "New York"], "The answer is New York", {}, 1),
        (["NYC", "New York"], "Boston", {}, 0),
    ],
)
def test_exact_answers(reference: Any, completion: str, options: dict[str, Any], right: float) -> None:
    assert score(ExactMatchReward, completion, reference, **options) == right


@pytest.mark.parametrize("kind", [NumericAnswerReward, MathVerifyReward])
@pytest.mark.parametrize("reference", [72, 72.0, "72", "x\n#### 72", ["71", "72"], [71, 72.0], r"\boxed{72}"])
def test_references_of_every_form(kind: type[RewardFn], reference: Any) -> None:
    assert [score(kind, rf"\boxed{{{answer}}}", reference) for answer in (72, 73)] == [1, 0]


@pytest.mark.parametrize(
    ("options", "reference", "completion", "right"),
    [
        ({"tolerance": 0.01}, "3.14159", r"\boxed{3.14}", 1),
        ({"relative_tolerance": 0.01}, "1000", r"\boxed{1009}", 1),
        ({"relative_tolerance": 0.01}, "1000", r"\boxed{1011}", 0),
        ({"tolerance": 0.0}, "1/3", r"\boxed{0.3333333}", 0),
        ({"percent": "hundredth"}, "50", r"\boxed{50\%}", 0),
        ({"percent": "hundredth"}, "0.5", r"\boxed{50\%}", 1),
        ({"decimal_comma": True}, "1.234,5", r"\boxed{1234,5}", 1),
        ({"wrong_score": -1.0}, "5", r"\boxed{6}", -1),
        ({"wrong_score": -1.0}, "5", "none", -1),
        ({"wrong_score": -1.0, "no_answer_score": 0.0}, "5", "none", 0),
        ({"accept": "boxed"}, "5", r"\boxed{5}", 1),
        ({"accept": "boxed"}, "5", "#### 5", 0),
        ({"accept": "marked"}, "5", "#### 5", 1),
        ({"accept": "marked"}, "5", "The answer is 5", 0),
    ],
)
def test_options(options: dict[str, Any], reference: str, completion: str, right: float) -> None:
    assert score(NumericAnswerReward, completion, reference, **options) == right


@pytest.mark.parametrize(
    ("completion", "options", "right"),
    [
        (r"<think>\boxed{6}</think>The answer is 5.", {}, 1),
        (r"<think>\boxed{5}</think>I give up.", {}, 0),
        (r"<think>It is \boxed{5}", {}, 0),
        (r"It is \boxed{5}</think>\boxed{5}", {}, 1),
        (r"\boxed{5}", {"thinking": "required"}, 0),
        (r"</think>\boxed{5}", {"thinking": "required"}, 1),
        (r"<think>It is \boxed{5}", {"thinking": "ignore"}, 1),
    ],
)
def test_an_answer_is_given_after_thinking(completion: str, options: dict[str, Any], right: int) -> None:
    assert score(NumericAnswerReward, completion, "5", **options) == right


@pytest.mark.parametrize(
    ("completion", "truncated", "right"),
    [
        (r"so \boxed{5}. Let me che", "marked", 1),
        ("so the answer is 5", "marked", 0),
        ("#### 5", "marked", 0),
        (r"so \boxed{5}. Let me che", "never", 0),
        ("so the answer is 5", "always", 1),
    ],
)
def test_truncated_completions(completion: str, truncated: str, right: int) -> None:
    assert score(NumericAnswerReward, completion, "5", "length", truncated=truncated) == right


def test_a_stop_string_may_close_the_answer() -> None:
    assert score(NumericAnswerReward, "3 + 2 <answer>5", "5", "stop", accept="marked") == 1
    assert score(NumericAnswerReward, "3 + 2 <answer>5", "5", "end", accept="marked") == 0


@pytest.mark.parametrize("kind", [ExactMatchReward, NumericAnswerReward, MathVerifyReward])
@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"anwser": "5"},
            "row 7: the row has no column `answer`; fix: set the reward's option `column` .*did you mean `anwser`",
        ),
        ({}, "row 7: the row has no column `answer`"),
        (
            {"answer": None},
            "row 7, column `answer`: a reference answer must be a text, a number, or a list of these; got None",
        ),
        ({"answer": " "}, "row 7, column `answer`: a reference answer must be"),
        ({"answer": []}, "row 7, column `answer`: a reference answer must be"),
        ({"answer": {"text": "5"}}, "row 7, column `answer`: a reference answer must be"),
        ({"answer": float("nan")}, "row 7, column `answer`: a reference answer must be"),
        ({"answer": ["5", None]}, "row 7, column `answer`: a reference answer must be"),
    ],
)
def test_a_bad_reference_is_an_error_that_names_row_and_column(
    kind: type[RewardFn], columns: dict[str, Any], said: str
) -> None:
    rewards = open_rewards([reward(kind)])
    samples = [Sample("?", "5", columns={"answer": "5"}), Sample("?", "", columns=columns)]
    with pytest.raises(DataError, match=said):
        rewards.score(samples, rows=[3, 7])


@pytest.mark.parametrize(
    ("kind", "bad"), [(NumericAnswerReward, "five"), (ExactMatchReward, "..."), (MathVerifyReward, "±")]
)
def test_an_unreadable_reference_is_an_error(kind: type[RewardFn], bad: str) -> None:
    with pytest.raises(
        DataError, match=r"row 4, column `answer`: the reference answer can't be read; got '.*'; fix: correct the row"
    ):
        open_rewards([reward(kind)]).score([Sample("?", "5", columns={"answer": bad})], rows=[4])


def test_a_path_leads_into_nested_columns() -> None:
    made = reward(NumericAnswerReward, column="reward_model.ground_truth")
    sample = Sample("?", "5", columns={"reward_model": {"style": "rule", "ground_truth": "5"}})
    assert made.score([sample]) == [1]
    assert made.score([Sample("?", "5", columns={"reward_model.ground_truth": "5"})]) == [1]
    with pytest.raises(DataError, match=r"no column `reward_model\.ground_truth`"):
        made.score([Sample("?", "5", columns={"reward_model": {"truth": "5"}})])


HOSTILE = {
    "a power tower": "9^{9^{9}}",
    "a larger one": "9^{9^{9^{9}}}",
    "in Python": "9**9**9",
    "a large factorial": "100000000!",
    "a long expansion": "(x+y+z)^{500}",
    "nested fractions": r"\frac{1}{" * 300 + "1" + "}" * 300,
    "nested braces": "{" * 400 + "}" * 400,
    "many digits": "9" * 900,
    "a long text": "x+" * 100_000 + "x",
}


@pytest.mark.slow
@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_hostile_answers_end_in_time_in_a_thread(answer: str) -> None:
    kinds: tuple[type[RewardFn], ...] = (MathVerifyReward, NumericAnswerReward, ExactMatchReward)
    samples = [Sample("?", rf"\boxed{{{text}}}", columns={"answer": "1"}) for text in ("1", answer, "1")]
    found: list[list[float]] = []
    thread = threading.Thread(target=lambda: found.extend(reward(kind).score(samples) for kind in kinds), daemon=True)
    begin = time.monotonic()
    thread.start()
    thread.join(60)
    assert found == [[1, 0, 1]] * 3
    assert time.monotonic() - begin < 20  # 5 seconds are allowed, and 2 until the child is ended and replaced


def test_a_bomb_ends_at_the_limit_and_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    made = MathVerifyReward(MathVerifyReward.Config.parse({"seconds": 0.5, "no_answer_score": -1.0}))
    samples = [
        Sample("?", rf"\boxed{{{text}}}", columns={"answer": "x+1"}) for text in ("9^{9^{9}}", "1+x", "9^{9^{9^9}}")
    ]
    with caplog.at_level(logging.WARNING):
        assert made.score(samples) == [-1, 1, -1]
    (record,) = caplog.records
    assert "can't be compared (time, limit 0.5 s) and counts as unreadable" in record.getMessage()


def test_a_reference_that_the_library_cannot_read_may_be_compared_as_text() -> None:
    made = reward(MathVerifyReward, unreadable_reference="text")
    samples = [Sample("?", rf"\boxed{{{text}}}", columns={"answer": "± or ∓"}) for text in ("± or ∓", "5")]
    assert made.score(samples) == [1, 0]


def test_without_the_library_the_fix_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ConfigError, match=r"math-verify isn't installed; fix: pip install 'rlhf-core\[math\]'"):
        MathVerifyReward().prepare()


def rows(name: str) -> Iterator[dict[str, Any]]:
    path = GSM8K / name
    if not path.is_file():
        pytest.skip("the data of GSM8K isn't there")
    yield from map(json.loads, path.read_text(encoding="utf-8").rstrip("\n").split("\n"))


@pytest.mark.parametrize("kind", [NumericAnswerReward, MathVerifyReward, ExactMatchReward])
def test_gsm8k_solutions_are_right(kind: type[RewardFn]) -> None:
    answers = [row["answer"] for row in rows("prompts.jsonl")][:1000]
    solutions = [row["response"] for row in rows("sft.jsonl")][:1000]
    made, samples = reward(kind), [
        Sample("?", text, columns={"answer": answer}) for text, answer in zip(solutions, answers, strict=True)
    ]  # fmt: skip
    begin = time.monotonic()
    scores = made.score(samples)
    assert time.monotonic() - begin < 10  # measured: well below a second
    assert sum(scores) >= (1000 if kind is not ExactMatchReward else 990)  # some references lack the solution's commas


def test_gsm8k_pairs_are_told_apart() -> None:
    """Model-written solutions labelled right and wrong: the rewards agree with the labels, given the right one as reference."""
    pairs = list(rows("preferences.jsonl"))[:500]
    samples = [
        Sample("?", pair[side], columns={"answer": "#### " + pair["chosen"].rpartition("A:")[2].strip()})
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    scores = reward(NumericAnswerReward).score(samples)
    assert scores == [1.0, 0.0] * 500
