"""Samplers compared on the same prompts: accuracy and tokens by hand, and the command with its table and plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rlhf_plugins.samplers.best_of_n import BestOfNConfig, BestOfNSampler
from rlhf_plugins.samplers.generate import GenerateConfig, GenerateSampler

from rlhf_core.cli import main
from rlhf_core.evaluation.sampler_comparison import SamplerScore, compare_samplers
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.statistics import standard_error
from rlhf_core.testing.tiny import save_tiny, tiny_policy

ROWS: list[dict[str, Any]] = [{"prompt": f"{n}+{n}=?", "answer": str(2 * n)} for n in (1, 2, 17, 9)]


def even_length(completions: Sequence[str], **columns: Any) -> list[float]:
    assert len(columns["answer"]) == len(completions)
    return [float(len(text) % 2 == 0) for text in completions]


def test_accuracy_and_tokens_are_those_of_the_samplers_alone() -> None:
    policy = tiny_policy().requires_grad_(requires_grad=False)
    plain = GenerateSampler(GenerateConfig(max_new_tokens=5), policy=policy)
    vote = BestOfNSampler(BestOfNConfig(max_new_tokens=5, candidates=3, choose="majority"), policy=policy)
    seen: list[SamplerScore] = []
    answers: list[tuple[int, int]] = []
    first, second = compare_samplers(
        {"generate": plain, "vote": vote},
        ROWS,
        check=even_length,
        seed=4,
        together=4,
        found=seen.append,
        answered=lambda *answer: answers.append(answer),
    )
    assert seen == [first, second] and first.difference is None
    drawn = plain.sample(ROWS, seed=4)
    rights = [float(len(group[0].text) % 2 == 0) for group in drawn]
    assert [done for done, _ in answers] == [*range(1, 9)]
    assert [tokens for _, tokens in answers[:4]] == [len(group[0].ids) for group in drawn]
    assert first.by_prompt == rights and first.accuracy == sum(rights) / 4
    prompts = int(prompt_batch(policy, ROWS).prompt_lengths.sum()) - 4
    assert first.tokens_per_prompt == (prompts + sum(len(group[0].ids) for group in drawn)) / 4
    # The second sampler reads the prompts itself, though the first has read them.
    told = sum(group[0].details["tokens_forwarded"] for group in vote.sample(ROWS, seed=4))
    assert second.tokens_per_prompt == told / 4
    assert second.difference is not None
    assert second.difference[0] == pytest.approx(second.accuracy - first.accuracy)


def test_prompts_are_the_unit_of_errors() -> None:
    assert standard_error([1.0, 0.0, 1.0, 1.0]) == pytest.approx(math.sqrt(0.25 / 4))
    assert standard_error([1.0]) is None
    sampler = GenerateSampler(GenerateConfig(max_new_tokens=5), policy=tiny_policy())
    (found,) = compare_samplers({"generate": sampler}, ROWS, check=even_length, repeats=4)
    assert len(found.by_prompt) == 4 and all((4 * value).is_integer() for value in found.by_prompt)
    assert found.error == standard_error(found.by_prompt)
    assert any(0 < value < 1 for value in found.by_prompt)  # repeats draw others


@pytest.mark.parametrize(("options", "place"), [({"repeats": 0}, "repeats"), ({"together": 0}, "together")])
def test_counts_below_one_are_refused(options: dict[str, Any], place: str) -> None:
    sampler = GenerateSampler(policy=tiny_policy())
    with pytest.raises(ConfigError, match=place):
        compare_samplers({"generate": sampler}, ROWS, check=even_length, **options)
    with pytest.raises(ConfigError, match="samplers"):
        compare_samplers({}, ROWS, check=even_length)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("compared")
    model = save_tiny(folder / "model", layers=1, max_positions=64)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return ["--model", str(model), "--prompts", str(folder / "rows.jsonl"), "--max-new-tokens", "4"]


TWO = ["generate --temperature 0", "best_of_n --choose majority --candidates 3"]


def test_the_command_prints_a_table_and_draws_a_plot(
    shared: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "compared.svg"
    assert main(["compare-samplers", *TWO, *shared, "--repeats", "2", "--plot", str(plot)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4 prompts, 2 answers each, checked by numeric_answer")
    assert all(text in line for text, line in zip(TWO, lines[2:4], strict=True)) and "±" in lines[3]
    assert plot.read_text().lstrip().startswith("<?xml") and f"plot: {plot}" in lines
    assert main(["compare-samplers", *TWO, *shared, "--json"]) == 0
    greedy, vote = json.loads(capsys.readouterr().out)["samplers"]
    assert greedy["difference"] is None and vote["difference"] == vote["accuracy"] - greedy["accuracy"]
    assert vote["tokens_per_prompt"] > greedy["tokens_per_prompt"] > 0


def test_progress_is_logged_where_there_is_no_terminal(
    shared: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlhf_core.infra.progress.LOG_EVERY", 0.0)
    assert main(["compare-samplers", *TWO, *shared, "--repeats", "2"]) == 0
    printed = capsys.readouterr()
    assert "sampling: 15 of 16 rows" in printed.err and "sampling:" not in printed.out


@pytest.mark.parametrize(
    ("samplers", "more", "message"),
    [
        ([], [], "no samplers are named"),
        (["generate", "generate"], [], "named twice"),
        (["generate", "best_of_m"], [], "best_of_n"),
        (["generate 'x"], [], "can't be read"),
        (["generate --seed 3", "generate"], [], "must have the same `seed`"),
        (["generate --n 3"], [], "`n` has no meaning"),
        (["generate"], ["--check", "numeric_anser"], "numeric_answer"),
        (["generate"], ["--plot", "x.xyz"], "image format"),
        (["generate"], ["--plot", "no/such/x.svg"], "directory of the image"),
        (["best_of_n"], [], "`reward` is missing"),
    ],
)
def test_what_cannot_be_compared(
    shared: list[str], samplers: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare-samplers", *samplers, *shared, *more]) == 2
    assert message in capsys.readouterr().err
