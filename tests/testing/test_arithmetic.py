import itertools
import json
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_core.config.training import TrainerConfig
from rlhf_core.contracts.records import RECORDS
from rlhf_core.data import open_dataset
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.testing.arithmetic_task import (
    FAMILIES,
    ArithmeticTask,
    answer,
    solve,
    split_of,
    split_steps,
    step_labels,
    verify,
    write_jsonl,
    wrong_solution,
)
from rlhf_core.testing.tiny import tiny_tokenizer

tasks = st.builds(
    ArithmeticTask,
    family=st.sampled_from(sorted(FAMILIES)),
    terms=st.integers(2, 5),
    digits=st.integers(1, 4),
    wrong=st.floats(0, 1),
    chat=st.booleans(),
)
seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=60, deadline=None)


def _value(prompt) -> int:
    """An independent evaluation: Python's own grammar of expressions."""
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    return eval(text.strip().removesuffix("=?"), {"__builtins__": {}})


def test_a_solution_by_hand() -> None:
    assert solve("3*7+25-8=?\n") == ["3*7=21", "21+25=46", "46-8=38", "#### 38"]
    assert solve([{"role": "user", "content": "17+25-8=?"}]) == ["17+25=42", "42-8=34", "#### 34"]


def test_a_slip_is_carried_on_and_labelled_from_where_it_stands() -> None:
    lines = solve("3*7+25-8=?\n", slip_at=1, slip=10)
    assert lines == ["3*7=21", "21+25=56", "56-8=48", "#### 48"]
    assert step_labels("3*7+25-8=?\n", "\n".join(lines)) == [True, False, False, False]
    assert not verify("3*7+25-8=?\n", "\n".join(lines))


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("17+25=42\n42-8=34\n#### 34", True),
        ("17+25=42\n42-8=34\n#### 34\n", True),
        ("17+25=41\n41-8=34\n#### 34", True),  # The verifier judges the answer, the labels judge the way.
        ("#### 34", True),
        ("17+25=42\n42-8=34\n#### 340", False),
        ("17+25=42\n42-8=34", False),
        ("#### 34\n34", False),
        ("", False),
    ],
)
def test_the_verifier_reads_the_last_line(completion: str, right: bool) -> None:
    assert verify("17+25-8=?\n", completion) is right


def test_labels_of_odd_completions() -> None:
    prompt = "17+25-8=?\n"
    assert step_labels(prompt, "") == [False]
    assert step_labels(prompt, "17+25=42") == [True]
    assert step_labels(prompt, "17+25=42\n42-8=34\n#### 34\n#### 34") == [True, True, True, False]
    assert step_labels(prompt, "17+25=41\n42-8=34\n#### 34") == [False, False, False]


@quick
@given(tasks, seeds)
def test_answers_equal_pythons_own_arithmetic(task: ArithmeticTask, seed: int) -> None:
    for prompt in itertools.islice(task.problems(seed=seed), 20):
        lines = solve(prompt)
        assert int(answer(prompt)) == _value(prompt) >= 0
        for line in lines[:-1]:
            left, _, result = line.partition("=")
            assert _value(left) == int(result) >= 0


@quick
@given(tasks, seeds)
def test_wrong_solutions_have_one_wrong_step_and_carry_it_on(task: ArithmeticTask, seed: int) -> None:
    for prompt in itertools.islice(task.problems(seed=seed), 20):
        lines = wrong_solution(prompt, Random(seed))
        broken = [line for line in lines[:-1] if _value(line.partition("=")[0]) != int(line.partition("=")[2])]
        assert len(broken) == 1 and len(lines) == len(solve(prompt))
        assert all(int(line.partition("=")[2]) >= 0 for line in lines[:-1])
        assert lines[-1] == "#### " + lines[-2].partition("=")[2]
        assert step_labels(prompt, "\n".join(lines)).index(False) == lines.index(broken[0])


@quick
@given(tasks, seeds, st.sampled_from(["train", "test"]))
def test_rows_keep_their_contract_and_labels_agree_with_the_verifier(task: ArithmeticTask, seed: int, split) -> None:
    for name, contract in RECORDS.items():
        rows = list(task.rows(name, 8, split=split, seed=seed))
        assert len(rows) == 8
        for row in rows:
            assert set(contract.required) <= set(row)
            assert row == json.loads(json.dumps(row))
            assert isinstance(row["prompt"], list) is task.chat
            many = name == "preference"
            steps, labels = row.get("steps", []), row.get("labels", [])
            answers = zip(contract.responses, steps if many else [steps], labels if many else [labels], strict=False)
            for column, lines, flags in answers:
                assert split_steps(row[column]) == lines
                assert step_labels(row["prompt"], row[column]) == flags
                assert verify(row["prompt"], row[column]) is flags[-1] is all(flags)
            if name == "preference":
                assert verify(row["prompt"], row["chosen"]) and not verify(row["prompt"], row["rejected"])
            if name == "unpaired":
                assert (row["label"] == "desirable") is verify(row["prompt"], row["response"])
            if "answer" in row:
                assert verify(row["prompt"], f"#### {row['answer']}")


@pytest.mark.parametrize("record", sorted(RECORDS))
@pytest.mark.parametrize("chat", [False, True])
def test_every_row_is_kept_whole_by_the_data_layer(record: str, chat: bool) -> None:
    rows = list(ArithmeticTask("mixed", chat=chat).rows(record, 50))
    dataset = open_dataset(rows, record, tiny_tokenizer(), config=TrainerConfig(max_length=128))
    report = dataset.report.as_dict()
    assert len(dataset) == report["kept"] == 50 and not report["dropped"] and not report["notes"]


@quick
@given(tasks, seeds, seeds)
def test_splits_are_disjoint_by_problem_for_any_two_seeds(task: ArithmeticTask, one: int, two: int) -> None:
    train = [row["prompt"] for row in task.rows("sft", 30, split="train", seed=one)]
    test = [row["prompt"] for row in task.rows("preference", 30, split="test", seed=two)]
    assert {split_of(prompt) for prompt in train} == {"train"}
    assert {split_of(prompt) for prompt in test} == {"test"}
    assert not {str(prompt) for prompt in train} & {str(prompt) for prompt in test}


def test_chat_and_text_forms_of_a_problem_share_their_split() -> None:
    text, chat = ArithmeticTask(), ArithmeticTask(chat=True)
    pairs = zip(text.rows("reasoning", 50), chat.rows("reasoning", 50), strict=True)
    assert all(one["prompt"].strip() == two["prompt"][0]["content"] for one, two in pairs)


@quick
@given(tasks, seeds, st.sampled_from(sorted(RECORDS)))
def test_rows_depend_on_the_seed_alone(task: ArithmeticTask, seed: int, record: str) -> None:
    first = list(task.rows(record, 20, seed=seed))
    assert first == list(task.rows(record, 20, seed=seed))
    assert first[:5] == list(task.rows(record, 5, seed=seed))
    prompts = [row["prompt"] for row in first]
    assert prompts == [row["prompt"] for row in task.rows("sft", 20, seed=seed)]
    if task.digits > 1:
        assert prompts != [row["prompt"] for row in task.rows(record, 20, seed=seed + 1)]


def test_another_process_draws_the_same_rows() -> None:
    code = (
        "import json; from rlhf_core.testing.arithmetic_task import ArithmeticTask;"
        "print(json.dumps(list(ArithmeticTask('mixed').rows('preference', 5, seed=3))))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(shown) == list(ArithmeticTask("mixed").rows("preference", 5, seed=3))


def test_the_share_of_wrong_demonstrations_is_the_one_asked_for() -> None:
    def right(share: float) -> float:
        rows = list(ArithmeticTask(wrong=share).rows("sft", 2000))
        return sum(row["labels"][-1] for row in rows) / len(rows)

    assert right(0.0) == 1.0 and right(1.0) == 0.0
    assert abs(right(0.3) - 0.7) < 0.04  # Four standard errors.


def test_about_one_problem_in_ten_is_held_out() -> None:
    drawn = itertools.chain(*(itertools.islice(ArithmeticTask().problems(split=s), 1) for s in ("train", "test")))
    assert [split_of(prompt) for prompt in drawn] == ["train", "test"]
    share = sum(split_of(f"{a}+{b}=?") == "test" for a in range(1, 60) for b in range(1, 60)) / 59**2
    assert 0.08 < share < 0.12


def test_write_jsonl(tmp_path) -> None:
    folder = write_jsonl(tmp_path / "data", ArithmeticTask(), train=7, test=3, seed=1)
    for split, count in (("train", 7), ("test", 3)):
        assert sorted(path.stem for path in (folder / split).iterdir()) == sorted(RECORDS)
        lines = (folder / split / "sft.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == list(ArithmeticTask().rows("sft", count, split=split, seed=1))


def test_faults_are_named() -> None:
    with pytest.raises(ConfigError, match="unknown family `sum`") as family:
        ArithmeticTask("sum")
    assert "did you mean `sums`" in str(family.value) and family.value.exit_code == 2
    with pytest.raises(ConfigError, match=r"at least 2 terms.*terms=1"):
        ArithmeticTask(terms=1)
    with pytest.raises(ConfigError, match="unknown record type `prefs`"):
        next(ArithmeticTask().rows("prefs", 1))
    with pytest.raises(DataError, match="the prompt isn't an arithmetic problem; got 'what is 2'") as prompt:
        solve("what is 2")
    assert prompt.value.exit_code == 3
