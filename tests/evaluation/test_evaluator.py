"""`RLHFEvaluator`: its numbers from its own completions, batches and stops that change nothing, comparisons, bad input."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rlhf_plugins.samplers.generate import GenerateConfig, GenerateSampler
from transformers import AutoModel, AutoTokenizer

from rlhf_core import EvaluationConfig, EvaluationReport, RLHFEvaluator
from rlhf_core.config.answering_options import AnsweringModelConfig
from rlhf_core.config.evaluation import PairwiseJudgeConfig
from rlhf_core.evaluation.diversity import self_bleu
from rlhf_core.evaluation.estimate import mean_estimate, ratio_difference, wilson_interval
from rlhf_core.evaluation.evaluation_report import MetricByPrompt, compare, not_compared
from rlhf_core.evaluation.measures import PromptMeasures, estimates, vote_confidence, win_measures
from rlhf_core.evaluation.pairwise_judge import ComparedPair, PairwiseJudge
from rlhf_core.evaluation.text_embeddings import TextEmbedder
from rlhf_core.generation.answering_model import AnsweringModel
from rlhf_core.generation.watching import watching
from rlhf_core.infra.errors import ConfigError, DataError, PluginError, RLHFError, StorageError
from rlhf_core.rewards.answer_votes import answer_key
from rlhf_core.testing.tiny import save_tiny, tiny_policy
from rlhf_core.training.completion_metrics import pass_at_k

ROWS: list[dict[str, Any]] = [
    {"prompt": f"{n}+{n}=?", "answer": str(2 * n), "given": "x" * n} for n in (1, 2, 17, 9, 30)
]

PREFERENCES = [
    {"prompt": "a", "chosen": "longer", "rejected": "short"},
    {"prompt": "b", "chosen": "c", "rejected": "d"},
]


def even(completions: Sequence[str], **columns: Any) -> list[float]:
    assert len(columns["answer"]) == len(completions)
    return [float(len(text) % 2 == 0) for text in completions]


def characters(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def embed(texts: Sequence[str]) -> torch.Tensor:
    return torch.tensor([[float(len(text)), 1.0] for text in texts])


def evaluator(**changes: Any) -> RLHFEvaluator:
    given: dict[str, Any] = {
        "reference": tiny_policy(1), "baseline": tiny_policy(2), "rewards": [characters], "validators": even, "prompts": ROWS,
        "embedder": embed, "n": 4, "max_new_tokens": 8, "resamples": 100,
        "preferences": PREFERENCES,
    }  # fmt: skip
    return RLHFEvaluator(tiny_policy(0), **(given | changes))


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "completions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationReport, Path]:
    directory = tmp_path_factory.mktemp("whole")
    return evaluator().evaluate(directory), directory


def test_every_number_is_that_of_the_completions_written(whole: tuple[EvaluationReport, Path]) -> None:
    report, directory = whole
    rows = rows_of(directory)
    lengths = [[float(len(text)) for text in row["completions"]] for row in rows]
    right = [[length % 2 == 0 for length in of] for of in lengths]
    assert [row["rewards"]["characters"] for row in rows] == lengths
    others = [[float(len(text)) for text in row["baseline_completions"]] for row in rows]
    wins = [
        fmean((a > b) + (a == b) / 2 for a in own for b in other) for own, other in zip(lengths, others, strict=True)
    ]
    expected = {
        "reward/characters": fmean(map(fmean, lengths)),
        "accuracy/even": fmean(map(fmean, right)),
        "pass@2/even": fmean(pass_at_k(4, sum(of), 2) for of in right),
        "pass@4/even": fmean(float(any(of)) for of in right),
        "length": fmean(fmean(row["tokens"]) for row in rows),
        "truncated": fmean(fmean(reason == "length" for reason in row["stop_reasons"]) for row in rows),
        "self_bleu": fmean(self_bleu(row["completions"]) for row in rows),
        "win_rate/characters": fmean(wins),
        "reward_accuracy/characters": 0.75,  # a pair and a tie
    }
    assert {name: report[name].value for name in expected} == pytest.approx(expected)
    keys = [
        [answer_key(t, complete=r != "length") for t, r in zip(row["completions"], row["stop_reasons"], strict=True)]
        for row in rows
    ]
    points = [vote_confidence(of, marks) for of, marks in zip(keys, right, strict=True)]
    assert report["brier/even"].value == pytest.approx(fmean((sure - mark) ** 2 for sure, mark in points))
    assert {one.count for name, one in report.metrics.items() if name != "reward_accuracy/characters"} == {5}


def test_kl_is_a_mean_over_tokens_and_over_completions(whole: tuple[EvaluationReport, Path]) -> None:
    report, directory = whole
    tokens = [sum(row["tokens"]) for row in rows_of(directory)]
    sums = [one * 4 for one in report.by_prompt["kl/sequence"].values]
    assert report["kl/token"].value == pytest.approx(sum(sums) / sum(tokens))
    assert report["kl/sequence"].value == pytest.approx(sum(sums) / 20)
    assert report.by_prompt["kl/token"].weights == tokens and report.notes == []


def test_prompts_are_completed_once_as_the_plain_sampler_does(
    whole: tuple[EvaluationReport, Path],
) -> None:
    plain = GenerateSampler(GenerateConfig(max_new_tokens=8), policy=tiny_policy(0))
    drawn = plain.sample([{name: row[name] for name in row} for row in ROWS], 4, seed=0)
    assert [row["completions"] for row in rows_of(whole[1])] == [[one.text for one in group] for group in drawn]
    tokens: list[int] = []
    with watching(tokens.append):  # whatever is measured, no token is drawn beyond those of the completions
        evaluator(baseline=None).evaluate()
    assert sum(tokens) == sum(len(one.ids) for group in drawn for one in group)


@pytest.mark.parametrize("size", [1, 3])
def test_the_batch_size_changes_nothing(whole: tuple[EvaluationReport, Path], size: int) -> None:
    found = evaluator(batch_size=size).evaluate()
    for name, one in whole[0].metrics.items():
        assert found[name].value == pytest.approx(one.value, rel=1e-4, abs=1e-5), name


def test_a_stopped_evaluation_is_continued_to_the_same_result(
    whole: tuple[EvaluationReport, Path], tmp_path: Path
) -> None:
    def stop(done: int, tokens: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluator(batch_size=2).evaluate(tmp_path, progress=stop)
    assert len(rows_of(tmp_path)) == 4 and not (tmp_path / "evaluation.json").exists()
    with pytest.raises(StorageError, match=r"exists.*`resume=True` continues it"):
        evaluator(batch_size=2).evaluate(tmp_path)
    with pytest.raises(ConfigError, match=r"changed since.*max_new_tokens: 8 → 7"):
        evaluator(batch_size=2, max_new_tokens=7).evaluate(tmp_path, resume=True)
    seen: list[int] = []
    report = evaluator(batch_size=2, bins=5).evaluate(tmp_path, resume=True, progress=lambda done, _: seen.append(done))
    assert seen == [5]
    unbroken = tmp_path / "unbroken"
    again = evaluator(batch_size=2, bins=5).evaluate(unbroken)
    assert rows_of(tmp_path) == rows_of(unbroken) and report.metrics == again.metrics
    lines = (tmp_path / "completions.jsonl").read_text(encoding="utf-8").replace('"measures"', '"measured"')
    (tmp_path / "completions.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(StorageError, match="no measures"):
        evaluator(batch_size=2).evaluate(tmp_path, resume=True)


def test_a_report_comes_back_from_its_file(whole: tuple[EvaluationReport, Path], tmp_path: Path) -> None:
    report, directory = whole
    assert EvaluationReport.load(directory).as_json() == report.as_json()
    assert EvaluationReport.load(directory / "evaluation.json").metrics == report.metrics
    assert sum(one["count"] for one in report.reliability["even"]) == 5
    assert report.settings["options"]["n"] == 4 and report.settings["models"]["baseline"]["source"]
    with pytest.raises(DataError, match="there is no evaluation"):
        EvaluationReport.load(tmp_path)
    for broken, said in [
        ({"schema": 99}, "another schema"),
        ({"schema": 1, "metrics": {}}, "no `by_prompt`"),
        ([1], "isn't"),
    ]:
        (tmp_path / "evaluation.json").write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(DataError, match=said):
            EvaluationReport.load(tmp_path)


# Comparison


def report_of(
    values: Sequence[float | None], keys: str = "abcd", weights: Sequence[float] | None = None
) -> EvaluationReport:
    return EvaluationReport({}, {"m": MetricByPrompt(values, weights)}, [{"place": key, "key": key} for key in keys])


def test_a_comparison_by_hand() -> None:
    """Differences 1, 0, 1, 0 (d is missing after): of three prompts a mean of 2/3."""
    before, after = report_of([0, 1, 2, 5]), report_of([1, 1, 3, None])
    found, by_hand = compare(before, after)["m"], mean_estimate([1, 0, 1])
    assert (found.value, found.error, found.low) == pytest.approx((by_hand.value, by_hand.error, by_hand.low))
    assert compare(before, report_of([None, 3, 1, 1], keys="dcba"))["m"] == found
    with pytest.raises(ConfigError, match="1 only before, 1 only after"):
        compare(before, report_of([1, 1, 3, 0], keys="abce"))
    assert compare(before, EvaluationReport({}, {}, before.prompts)) == {}


def test_a_kl_to_another_reference_has_no_difference() -> None:
    def measured(reference: str, baseline: str = "b", files: dict[str, str] | None = None) -> EvaluationReport:
        models = {"reference": {"source": reference, "files": files}, "baseline": {"source": baseline}}
        by_prompt = {
            name: MetricByPrompt([1.0, 2.0]) for name in ("kl/token", "kl/sequence", "win_rate/judge", "length")
        }
        prompts = [{"place": key, "key": key} for key in "ab"]
        return EvaluationReport({}, by_prompt, prompts, settings={"models": models})

    before, after = measured("start"), measured("sft")
    assert {*compare(before, after)} == {"win_rate/judge", "length"}
    (said,) = not_compared(before, after)
    assert said == "kl/token, kl/sequence can't be compared: the reference is start before and sft after"
    assert {*compare(before, measured("start", "c"))} == {"kl/token", "kl/sequence", "length"}
    # A copy of the reference in another place is the same model; other weights in its place are another.
    assert not_compared(measured("start", files={"w": "1"}), measured("copy", files={"w": "1"})) == []
    assert len(not_compared(measured("start", files={"w": "1"}), measured("start", files={"w": "2"}))) == 1
    # Where one evaluation has no such metric there is nothing to say.
    assert not_compared(before, report_of([0, 1], "ab")) == []


ROWS_TWICE = st.lists(st.tuples(*[st.integers(-9, 9), st.integers(1, 5)] * 2), min_size=2, max_size=8)


@given(ROWS_TWICE)
def test_a_paired_error_is_that_of_the_jackknife_where_all_weigh_the_same(
    rows: list[tuple[int, int, int, int]],
) -> None:
    """With equal weights it is s/√P of the differences; scaling all weights of one measurement changes nothing."""
    before, after = [(float(s), 1.0) for s, _, _, _ in rows], [(float(s), 1.0) for _, _, s, _ in rows]
    plain = mean_estimate([b[0] - a[0] for a, b in zip(before, after, strict=True)])
    found = ratio_difference(before, after)
    assert (found.value, found.error) == pytest.approx((plain.value, plain.error))
    scaled = ratio_difference(
        [(float(s), float(n)) for s, n, _, _ in rows], [(s * 7.0, n * 7.0) for _, _, s, n in rows]
    )
    same = ratio_difference(
        [(float(s), float(n)) for s, n, _, _ in rows], [(float(s), float(n)) for _, _, s, n in rows]
    )
    assert (scaled.value, scaled.error) == pytest.approx((same.value, same.error))


def test_the_error_of_a_difference_of_ratios_is_right_in_simulation() -> None:
    """400 pairs of evaluations of 60 prompts with 1 to 9 tokens: the errors agree with the spread of the differences."""
    rng = random.Random(0)
    found = []
    for _ in range(400):
        before, after = [], []
        for _ in range(60):
            hard, tokens = rng.gauss(0, 1), [rng.randint(1, 9) for _ in range(2)]
            before.append((tokens[0] * (1 + hard), float(tokens[0])))
            after.append((tokens[1] * (1.5 + hard + rng.gauss(0, 0.5)), float(tokens[1])))
        found.append(ratio_difference(before, after))
    values = [one.value for one in found]
    spread = math.sqrt(fmean((value - fmean(values)) ** 2 for value in values))
    assert fmean(values) == pytest.approx(0.5, abs=3.5 * spread / 20)
    assert fmean(one.error or 0 for one in found) == pytest.approx(spread, rel=0.1)


def test_an_evaluation_against_itself_differs_by_nothing(whole: tuple[EvaluationReport, Path]) -> None:
    found = compare(whole[0], whole[0])
    assert found.keys() == whole[0].by_prompt.keys() and {(one.value, one.error) for one in found.values()} == {
        (0.0, 0.0)
    }


# Win rates


@pytest.mark.parametrize("ties", [0.0, 0.6])
def test_intervals_of_win_rates_cover(ties: float) -> None:
    """40 prompts of differing advantage, 4 completions each: the true rate is Φ(0.4 / √(2 + 1)); 400 evaluations.

    Where all scores of a prompt are the same with probability t, it is t/2 + (1 − t) Φ(…).
    """
    rng, held = random.Random(2), 0
    true = ties / 2 + (1 - ties) * 0.5 * (1 + math.erf(0.4 / math.sqrt(3) / math.sqrt(2)))
    for _ in range(400):
        rows = []
        for _ in range(40):
            ahead = rng.gauss(0.4, 1)
            own, others = [rng.gauss(ahead, 1) for _ in range(4)], [rng.gauss(0, 1) for _ in range(4)]
            if rng.random() < ties:
                own = others = [0.0] * 4
            measured = win_measures("r", own, others, [0.0] * 16)
            rows.append(PromptMeasures(measured.values))
        found = estimates(rows, bins=10, resamples=100, seed=0)[0]["win_rate/r"]
        held += found.low <= true <= found.high
    assert held / 400 == pytest.approx(0.95, abs=0.035)


def test_ties_make_a_win_rate_more_certain() -> None:
    """80 of 100 pairs are ties, 15 won: a variance of 0.55 · 0.45 − 0.2 in place of 0.55 · 0.45, so an interval of 0.44 times."""
    rows = [win_measures("r", [own], [0.0], [0.0]) for own in [0.0] * 80 + [1.0] * 15 + [-1.0] * 5]
    found = estimates(rows, bins=10, resamples=100, seed=0)[0]["win_rate/r"]
    assert found.value == pytest.approx(0.55)
    expected = wilson_interval(0.55, 100 * 0.2475 / 0.0475)
    assert (found.low, found.high) == pytest.approx(expected, abs=2e-3)
    alike = [win_measures("r", [0.0], [0.0], [0.0])] * 100
    found = estimates(alike, bins=10, resamples=100, seed=0)[0]["win_rate/r"]
    assert (found.low, found.high) == pytest.approx(wilson_interval(0.5, 100))


def test_given_responses_are_compared_with_and_lengths_that_are_all_equal_are_noted() -> None:
    found = evaluator(baseline=None, baseline_column="given", metrics=["win_rate"]).evaluate()
    assert 0 <= found["win_rate/characters"].value <= 1
    fixed = evaluator(
        baseline=None, baseline_column="given", prompts=ROWS[:1], metrics=["win_rate"], min_new_tokens=8, n=1
    )
    report = fixed.evaluate()
    assert "length_controlled_win_rate/even" not in report.metrics and "all equal" in report.notes[0]
    with pytest.raises(DataError, match=r"no text in `absent`"):
        evaluator(baseline=None, baseline_column="absent").evaluate()


class Answers:
    """A language model that gives the same answer to every question, or one by a function of the question."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.questions = answer, []

    def ask(self, questions: Sequence[str], *, at_once: int = 1) -> list[str]:
        self.questions += questions
        return [self.answer(one) if callable(self.answer) else self.answer for one in questions]

    def describe(self) -> dict[str, Any]:
        return {}


def judged_by(answer: Any, **options: Any) -> PairwiseJudge:
    judge = PairwiseJudge(PairwiseJudgeConfig(model="m", **options))
    judge.model = Answers(answer)  # type: ignore[assignment]
    return judge


def longer_answer(question: str) -> str:
    first, second = (question.split(f"[Answer {name}]\n")[1].split(f"\n[End of answer {name}]")[0] for name in "AB")
    return (
        "It is\n**Verdict: " + ("A" if len(first) > len(second) else "B" if len(first) < len(second) else "tie") + "**"
    )


PAIRS = [
    ComparedPair("Why?", own, other, {}, "row 1") for own, other in [("long", "s"), ("s", "long"), ("same", "four")]
]


def test_a_judge_that_looks_at_answers_agrees_in_both_orders() -> None:
    judge = judged_by(longer_answer)
    assert judge.compare(PAIRS) == ([1.0, 0.0, 0.5], [True, True, True])
    assert "Why?" in judge.model.questions[0] and len(judge.model.questions) == 6


def test_answers_from_an_address_keep_their_order() -> None:
    """Requests go out several at once, and the first to come back is the last that was asked."""

    class Server:
        def ask(self, chat: list[dict[str, str]], **options: Any) -> str:
            assert chat[0] == {"role": "system", "content": "Be brief."} and options == {
                "temperature": 0.0,
                "max_tokens": 9,
            }
            number = int(chat[1]["content"])
            time.sleep(0.01 * (3 - number))
            return str(number * number)

    config = AnsweringModelConfig(model="m", base_url="http://127.0.0.1:1/v1", system="Be brief.", max_tokens=9)
    model = AnsweringModel(config)
    model.__dict__["server"] = Server()
    assert model.ask(["0", "1", "2", "3"], at_once=4) == model.ask(["0", "1", "2", "3"]) == ["0", "1", "4", "9"]
    assert model.ask([]) == [] and model.describe() == {}


def test_a_judge_that_looks_at_positions_prefers_nothing() -> None:
    assert judged_by("Verdict: A").compare(PAIRS) == ([0.5] * 3, [False] * 3)
    assert judged_by("Verdict: B, no: verdict: a", swap=False).compare(PAIRS) == ([1.0] * 3, [True] * 3)


def test_what_a_judge_may_not_say() -> None:
    with pytest.raises(PluginError, match=r"row 1: the judge's answer holds no verdict; got.*both are fine"):
        judged_by("both are fine").compare(PAIRS)
    assert judged_by("both are fine", unreadable="tie").compare(PAIRS[:1]) == ([0.5], [True])
    with pytest.raises(DataError, match=r"can't be filled in; got UndefinedError: 'topic'"):
        judged_by("Verdict: A", prompt="{{ topic }}").compare(PAIRS)
    with pytest.raises(ConfigError, match="no Jinja template"):
        judged_by("", prompt="{{ first")


def test_a_judge_compares_pairs_of_completions(tmp_path: Path) -> None:
    found = evaluator(judge=judged_by(longer_answer, pairs=2), metrics=["win_rate"]).evaluate(tmp_path)
    pairs = [
        pair
        for row in rows_of(tmp_path)
        for pair in list(zip(row["completions"], row["baseline_completions"], strict=True))[:2]
    ]
    expected = fmean((len(own) > len(other)) + (len(own) == len(other)) / 2 for own, other in pairs)
    assert found["win_rate/judge"].value == pytest.approx(expected) and found["consistent/judge"].value == 1


# Embeddings


def test_embeddings_are_means_of_last_hidden_states(tmp_path: Path) -> None:
    path = str(save_tiny(tmp_path))
    texts = ["a", "", "a much longer text", "bb"]
    found = TextEmbedder(path, batch_tokens=12)(texts)
    model, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    for text, vector in zip(texts, found, strict=True):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert torch.allclose(vector, states.mean(0), atol=1e-5)
    with pytest.raises(RLHFError, match="no such model"):
        TextEmbedder(str(tmp_path / "none"))


# Options and what is missing


def test_only_what_there_is_something_to_measure_with_is_measured() -> None:
    bare = RLHFEvaluator(tiny_policy(0), prompts=ROWS, n=1, max_new_tokens=4)
    assert bare.metrics() == ["length"] and [*bare.evaluate().metrics] == ["length", "truncated"]
    bare.add_validator(even)
    bare.add_prompts(["one more"], limit=None)
    assert bare.metrics() == ["length", "accuracy"] and len(bare.prompts) == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": ["kl"], "reference": None}, "`kl` can't be measured: there is no reference"),
        ({"metrics": ["win_rate"], "baseline": None}, "there is no baseline"),
        ({"metrics": ["win_rate"], "rewards": [], "validators": []}, "no reward, validator or judge"),
        ({"metrics": ["diversity"], "n": 1}, "`n` is 1"),
        ({"metrics": ["calibration"], "n": 1}, "`n` is 1"),
        ({"metrics": ["speed"]}, "metrics.*must be"),
        ({"rewards": even}, "`even` is a reward and a validator"),
        ({"n": 3, "temperature": 0}, "all completions of a prompt are the same"),
        ({"k": [5]}, "pass@5 needs as many"),
        ({"k": [0]}, "at least 1"),
        ({"kl": "k1", "top_p": 0.9}, "right only for tokens that the policy's own distribution drew"),
        ({"baseline_column": "given"}, "either with a baseline or with a column"),
        ({"config": EvaluationConfig()}, "beside a configuration"),
        ({"validators": ["exact_mach"]}, "exact_match"),
        ({"prompts": [{"prompt": "a", "measures": 1}]}, "column `measures` already"),
        ({"prompts": None}, "no prompts"),
        ({"preferences": [{"prompt": "a", "completion": "b"}]}, "isn't a pair"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RLHFError, match=said):
        evaluator(**changes).evaluate()


def test_a_kl_along_changed_draws_says_so_and_greedy_draws_once() -> None:
    found = evaluator(metrics=["kl", "length"], n=None, temperature=0).evaluate()
    assert "changed one" in found.notes[0] and found["kl/token"].value > 0
    assert EvaluationConfig(temperature=0).completions == 1 and EvaluationConfig().completions == 4


def test_probabilities_are_those_of_the_model() -> None:
    """Confidence by tokens: the calibration points are probabilities of the drawn tokens, one per completion."""
    sequence = evaluator(metrics=["calibration"], confidence="sequence_probability").evaluate()
    token = evaluator(metrics=["calibration"], confidence="token_probability").evaluate()
    assert sum(one["count"] for one in token.reliability["even"]) == 20
    assert token.reliability["even"][-1]["high"] >= sequence.reliability["even"][-1]["high"]
    assert sequence["brier/even"].value <= 1


@given(st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=6))
def test_votes_have_a_share(keys: list[str | None]) -> None:
    sure, right = vote_confidence(keys, [key == "a" for key in keys])
    most = max((keys.count(key) for key in "ab"), default=0)
    assert sure == pytest.approx(most / len(keys)) and right in (0, 1)
