"""A completion's final answer: the last one that it marks, after its thinking, and only a complete one of a truncated text."""

from __future__ import annotations

import time

import pytest

from rlhf_core.rewards.final_answer import after_thinking, find_answer

CASES = {
    r"so \boxed{5}": ("5", "boxed"),
    r"\boxed{\frac{1}{2}} is it": (r"\frac{1}{2}", "boxed"),
    r"\boxed {7} and \fbox{8}": ("7, 8", "boxed"),
    r"\boxed{1} is wrong, so \boxed{2}": ("2", "boxed"),
    r"$\boxed{1}$ and $\boxed{2}$": ("1, 2", "boxed"),
    "\\boxed{5}\n\n\\boxed{5}": ("5", "boxed"),
    r"\boxed{\boxed{5}}": ("5", "boxed"),
    r"\boxed{\{1, 2\}}": (r"\{1, 2\}", "boxed"),
    r"{ \boxed{5} and then \boxed{6": ("5", "boxed"),
    r"\boxed{3} though the answer is 4": ("3", "boxed"),
    "x\n#### 72": ("72", "hashes"),
    "#### 72\n\nQuestion: and so on": ("72", "hashes"),
    "\\boxed{3}\n#### $1,080.50\nmore": ("$1,080.50", "hashes"),
    "#### Step 1\nfoo\n\\boxed{3}": ("3", "boxed"),
    "#### Conclusion\nThe answer is 5.": ("5", "stated"),
    "<answer> 42 </answer> bye": ("42", "tag"),
    r"<answer>It is \boxed{42}</answer>": ("42", "tag"),
    "The answer is $3.50. Then more": ("$3.50", "stated"),
    "The answer is 4. No: the answer is 5": ("5", "stated"),
    "**Answer:** 42": ("42", "stated"),
    "**Final Answer**\n\n42": ("42", "stated"),
    "Answer:\n42\n": ("42", "stated"),
    "The final answer is\n$$\n\\frac{1}{2}\n$$": (r"\frac{1}{2}", "stated"),
    "Q: 1+1?\nA: 2": ("2", "stated"),
    "答案是 42。": ("42", "stated"),
    "x = 5": ("x = 5", "text"),
    r"\boxed{5": (r"\boxed{5", "text"),
    "The answer is 7, not 5.": ("7", "stated"),
    "The answer is not 5. It is 7.": ("The answer is. It is 7.", "text"),
    "The answer is 7. The answer is not $5$.": ("7", "stated"),
    "The answer is not 5, but the answer is 7": ("7", "stated"),
    "The answer is not an integer: 5/2": ("not an integer: 5/2", "stated"),
    "The answer is not enough information": ("not enough information", "stated"),
    "The answer isn't \\(x+1\\)": ("The answer is", "text"),
    "So it cannot be 5% rather than 1,000.": ("So it.", "text"),
}


@pytest.mark.parametrize("text", CASES)
def test_final_answers(text: str) -> None:
    answer = find_answer(text)
    assert answer is not None and (answer.text, answer.how) == CASES[text]


@pytest.mark.parametrize("text", ["", "  \n", r"so \boxed{}", "<answer> </answer>", "Answer: not 5"])
def test_no_answer(text: str) -> None:
    assert find_answer(text) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}. Let me che", "5"),
        ("<answer>5</answer> and", "5"),
        ("#### 72\n\nQuest", "72"),
        ("x\n#### 7", None),
        ("The answer is 7", None),
        (r"so \boxed{7", None),
        ("We get 3 and 4", None),
    ],
)
def test_a_truncated_text_gives_only_a_closed_answer(text: str, found: str | None) -> None:
    answer = find_answer(text, complete=False)
    assert (answer.text if answer else None) == found


@pytest.mark.parametrize(
    ("text", "auto", "required"),
    [
        ("<think>a</think>b", "b", "b"),
        ("a</think>b", "b", "b"),
        ("<think>a", None, None),
        ("b", "b", None),
        ("<think>1</think>2<think>3", None, None),
        ("<think>1</think>2</think>3", "3", "3"),
        ("[THINK]1[/THINK]2", "2", "2"),
    ],
)
def test_thinking(text: str, auto: str | None, required: str | None) -> None:
    assert (after_thinking(text), after_thinking(text, "required")) == (auto, required)
    assert after_thinking(text, "ignore") == text


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 10_000,
        "\\boxed{1}" * 10_000,
        "\\boxed{" * 10_000 + "}" * 10_000,
        "answer " * 10_000,
        "answer is " * 10_000,
        "answer is not " * 10_000,
        "not" + " " * 50_000,
        "not $" * 20_000,
        "not 5" + "," * 50_000,
        "#### 1\n" * 10_000,
        "#### " + " " * 50_000,
        "#### " + "1 " * 20_000 + "x",
        "<answer>" * 10_000,
        "{" * 50_000,
        "</think>" * 10_000 + "<think>" * 10_000,
    ],
    ids=lambda text: text[:9],
)
def test_searching_takes_linear_time(text: str) -> None:
    begin = time.process_time()
    find_answer(text)
    after_thinking(text)
    assert time.process_time() - begin < 3
