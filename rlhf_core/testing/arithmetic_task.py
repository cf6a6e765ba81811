"""An embedded task that a tiny model can learn: arithmetic in written steps, with labels for each step and a verifier.

A problem is one line; its solution writes one step a line, first the products, then the sums from left to right:

    3*7+25-8=?
    3*7=21
    21+25=46
    46-8=38
    #### 38

One seeded generator yields rows of all five record types. Row i of every type is about the same problem, problems may
repeat (as in real data), and whether a problem belongs to `train` or `test` depends on the problem alone, so no test
problem is ever in any training row, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from rlhf_core.contracts.records import Prompt
from rlhf_core.infra.errors import ConfigError, DataError, did_you_mean

Split = Literal["train", "test"]
Row = dict[str, Any]

_PROBLEM = re.compile(r"(\d+(?:\*\d+)?(?:[+-]\d+(?:\*\d+)?)*)=\?")
_TERM = re.compile(r"([+-]?)(\d+)(?:\*(\d+))?")
_ANSWER = re.compile(r"#### (-?\d+)")
_TEST_SHARE = 10
"""One problem in ten is a test problem."""


def solve(prompt: Prompt, *, slip_at: int | None = None, slip: int = 0) -> list[str]:
    """Return the written steps of a problem's solution, one string per step, the answer's line last.

    Args:
        prompt: the problem, as text or chat messages.
        slip_at: the step, from 0, whose result is wrong by `slip`; later steps continue from the wrong value without another
            error. None makes no error.
        slip: what is added to that step's result.

    Raises:
        DataError: the prompt is no problem of this task.
    """
    lines: list[str] = []

    def step(left: int, operation: str, right: int) -> int:
        value = {"*": left * right, "+": left + right, "-": left - right}[operation]
        value += slip if len(lines) == slip_at else 0
        lines.append(f"{left}{operation}{right}={value}")
        return value

    terms = [
        (sign, step(int(left), "*", int(right)) if right else int(left))
        for sign, left, right in _TERM.findall(_expression(prompt))
    ]
    total = terms[0][1]
    for sign, value in terms[1:]:
        total = step(total, sign, value)
    return [*lines, f"#### {total}"]


def answer(prompt: Prompt) -> str:
    """Return the right answer to a problem, as text."""
    return solve(prompt)[-1].removeprefix("#### ")


def split_steps(completion: str) -> list[str]:
    """Return a completion's steps: its lines, without the blank ones at its end."""
    return completion.rstrip().split("\n")


def verify(prompt: Prompt, completion: str) -> bool:
    """Tell whether a completion ends in the right answer, however it got there."""
    final = _ANSWER.fullmatch(split_steps(completion)[-1])
    return final is not None and final[1] == answer(prompt)


def step_labels(prompt: Prompt, completion: str) -> list[bool]:
    """Return for each step of a completion whether it is right so far: True before the first wrong step, then False."""
    expected = itertools.chain(solve(prompt), itertools.repeat(None))
    right = (step == want for step, want in zip(split_steps(completion), expected, strict=False))
    return list(itertools.accumulate(right, lambda before, now: before and now))


def wrong_solution(prompt: Prompt, rng: Random) -> list[str]:
    """Return a solution with one error: a random step's result is off by a power of ten, and later steps continue from it."""
    right = solve(prompt)
    slip_at = rng.randrange(len(right) - 1)
    digits = len(right[slip_at].partition("=")[2])
    slips = [sign * 10**place for place in range(digits) for sign in (1, -1)]
    rng.shuffle(slips)
    # No number may fall below zero, which would show the error at a glance; of +1 and -1 at least one never makes one negative.
    tries = (solve(prompt, slip_at=slip_at, slip=slip) for slip in slips)
    return next(lines for lines in tries if not any("=-" in line for line in lines))


def split_of(prompt: Prompt) -> Split:
    """Return the split that a problem belongs to, a function of the problem alone."""
    digest = hashlib.sha256(_expression(prompt).encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % _TEST_SHARE == 0 else "train"


@dataclass(frozen=True)
class ArithmeticTask:
    """A family of arithmetic problems at one difficulty, and the rows of data made from them."""

    family: str = "sums"
    """`sums` (17+25-8), `products` (3*7+4*8), or `mixed` (3*7+25-8), which needs the skills of both."""
    terms: int = 3
    """Terms of a problem, at least 2; more terms make more steps."""
    digits: int = 2
    """Largest number of digits of a number in a problem; the second factor of a product always has one."""
    wrong: float = 0.5
    """Share of the demonstrations (`sft`) and single responses (`unpaired`) with an error in some step."""
    chat: bool = False
    """Whether prompts are chat messages instead of text."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(
                f"unknown family `{self.family}`", place="family", fix=did_you_mean(self.family, FAMILIES)
            )
        if self.terms < 2 or self.digits < 1 or not 0 <= self.wrong <= 1:
            raise ConfigError(
                "expected at least 2 terms, at least 1 digit, and a share of wrong rows from 0 to 1",
                place="arithmetic",
                got=f"terms={self.terms}, digits={self.digits}, wrong={self.wrong}",
            )

    def problems(self, *, split: Split = "train", seed: int = 0) -> Iterator[Prompt]:
        """Yield prompts of one split, endlessly."""
        # Seeding with a text gives the same stream on every machine and in every process.
        rng = Random(f"problems {self.family} {self.terms} {self.digits} {split} {seed}")
        while True:
            expression = FAMILIES[self.family](rng, self.terms, 10**self.digits - 1)
            if split_of(f"{expression}=?") == split:
                yield [{"role": "user", "content": f"{expression}=?"}] if self.chat else f"{expression}=?\n"

    def rows(self, record: str, count: int, *, split: Split = "train", seed: int = 0) -> Iterator[Row]:
        """Yield rows of a record type, such as `preference`.

        A row with a response has its `steps` and their `labels`, as `split_steps` and `step_labels` define them; a preference
        row has two lists of each, for `chosen` and for `rejected`.

        Raises:
            ConfigError: there is no such record type.
        """
        if record not in _RECORDS:
            raise ConfigError(f"unknown record type `{record}`", place="record", fix=did_you_mean(record, _RECORDS))
        rng = Random(f"rows {record} {split} {seed}")
        for prompt in itertools.islice(self.problems(split=split, seed=seed), count):
            yield {"prompt": prompt, **_RECORDS[record](prompt, rng, self.wrong)}


def write_jsonl(folder: str | Path, task: ArithmeticTask, *, train: int, test: int, seed: int = 0) -> Path:
    """Write `train/RECORD.jsonl` and `test/RECORD.jsonl` for every record type; return the folder.

    Args:
        train, test: number of rows in each file.
    """
    folder = Path(folder)
    splits: dict[Split, int] = {"train": train, "test": test}
    for split, count in splits.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for record in _RECORDS:
            with (folder / split / f"{record}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in task.rows(record, count, split=split, seed=seed))
    return folder


def _sft(prompt: Prompt, rng: Random, wrong: float) -> Row:
    """Return a response with its steps and labels, with an error with probability `wrong`."""
    steps = wrong_solution(prompt, rng) if rng.random() < wrong else solve(prompt)
    response = "\n".join(steps)
    return {"response": response, "steps": steps, "labels": step_labels(prompt, response)}


def _preference(prompt: Prompt, rng: Random, wrong: float) -> Row:
    """Return a right solution as the chosen response and one with an error as the rejected, with steps and labels of both."""
    steps = [solve(prompt), wrong_solution(prompt, rng)]
    chosen, rejected = ("\n".join(lines) for lines in steps)
    labels = [step_labels(prompt, chosen), step_labels(prompt, rejected)]
    return {"chosen": chosen, "rejected": rejected, "steps": steps, "labels": labels}


def _unpaired(prompt: Prompt, rng: Random, wrong: float) -> Row:
    """Return a response as in `_sft`, labelled desirable where all of its steps are right."""
    row = _sft(prompt, rng, wrong)
    return {**row, "label": "desirable" if row["labels"][-1] else "undesirable"}


def _prompt(prompt: Prompt, rng: Random, wrong: float) -> Row:
    return {"answer": answer(prompt)}


def _reasoning(prompt: Prompt, rng: Random, wrong: float) -> Row:
    return {"answer": answer(prompt), "verifiable": True}


_RECORDS: dict[str, Callable[[Prompt, Random, float], Row]] = {  # the columns of each record type, but for the prompt
    "sft": _sft,
    "preference": _preference,
    "unpaired": _unpaired,
    "prompt": _prompt,
    "reasoning": _reasoning,
}


def _expression(prompt: Prompt) -> str:
    """Return the expression of a problem, such as `17+25-8`, from its text or its last chat message."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    match = _PROBLEM.fullmatch(text.strip())
    if match is None:
        raise DataError(
            "the prompt isn't an arithmetic problem",
            place="prompt",
            got=repr(text),
            fix="write one such as `17+25-8=?`",
        )
    return match[1]


_Term = tuple[str, int]
"""A term as text, such as `3*7`, and its value."""


def _number(rng: Random, largest: int) -> _Term:
    """Draw a number from 1 to `largest`."""
    value = rng.randint(1, largest)
    return str(value), value


def _product(rng: Random, largest: int) -> _Term:
    """Draw a product of a number up to `largest` and a digit from 2 to 9."""
    left, right = rng.randint(1, largest), rng.randint(2, 9)
    return f"{left}*{right}", left * right


def _chain(rng: Random, terms: list[_Term]) -> str:
    """Join terms by random signs, plus where a minus would make the running total negative."""
    expression, total = terms[0]
    for text, value in terms[1:]:
        minus = value <= total and rng.random() < 0.5
        expression += ("-" if minus else "+") + text
        total += -value if minus else value
    return expression


def _sums(rng: Random, terms: int, largest: int) -> str:
    return _chain(rng, [_number(rng, largest) for _ in range(terms)])


def _products(rng: Random, terms: int, largest: int) -> str:
    return _chain(rng, [_product(rng, largest) for _ in range(terms)])


def _mixed(rng: Random, terms: int, largest: int) -> str:
    """Return an expression of numbers and products in random order, as many products as numbers or one fewer."""
    parts = [(_product if index % 2 else _number)(rng, largest) for index in range(terms)]
    rng.shuffle(parts)
    return _chain(rng, parts)


FAMILIES: dict[str, Callable[[Random, int, int], str]] = {"sums": _sums, "products": _products, "mixed": _mixed}
"""How each family draws an expression, from (random stream, terms, largest number)."""
