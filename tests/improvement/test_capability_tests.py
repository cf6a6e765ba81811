"""Capability suites run on policies: scores by hand, round trips, regressions and what triggers a rollback, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.config.capability_suites import CapabilitySuite, CapabilityTestsConfig
from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.improvement.capability_tests import (
    CapabilityRegression,
    CapabilityResult,
    CapabilityTester,
    SuiteResult,
)
from rlhf_core.infra.errors import ConfigError, DataError, PluginError, StorageError
from rlhf_core.testing.tiny import save_tiny, tiny_policy

ROWS: list[dict[str, Any]] = [{"prompt": f"{n}+{n}=?", "answer": str(2 * n)} for n in range(1, 9)]


def even_length(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    return [float(len(text) % 2 == 0) for text in completions]


def share_of_digits(completions: Sequence[str]) -> list[float]:
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]


class LengthOf(RewardFn):
    api = 1

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [float(len(one.completion)) for one in samples]


def suite(name: str = "even", **options: Any) -> CapabilitySuite:
    values = {"prompts": ROWS, "validator": even_length, "generation": {"max_new_tokens": 5}} | options
    return CapabilitySuite.model_validate({"name": name, **values})


def result(tester: CapabilityTester, *scores: Sequence[float]) -> CapabilityResult:
    """Return a result with these scores, made from the tester's suites."""
    known = tester.run(tiny_policy())
    changed = [replace(one, scores=list(own)) for one, own in zip(known.suites.values(), scores, strict=True)]
    return CapabilityResult({one.name: one for one in changed})


def test_scores_are_those_of_the_policys_completions() -> None:
    policy = tiny_policy()
    seen: list[SuiteResult] = []
    found = CapabilityTester([suite(), suite("length", task="form", validator=LengthOf())]).run(
        policy, finished=seen.append
    )
    texts = [group[0].text for group in policy.generate(ROWS, max_new_tokens=5, temperature=0)]
    even = [float(len(text) % 2 == 0) for text in texts]
    assert found.suites["even"].scores == even and list(found.suites.values()) == seen
    assert found.suites["length"].scores == [float(len(text)) for text in texts]
    assert found.suites["even"].estimate.value == sum(even) / 8 and found.suites["even"].estimate.count == 8
    assert {*found.tasks} == {"general", "form"}


def test_tasks_pool_the_prompts_of_their_suites() -> None:
    tester = CapabilityTester([suite("a"), suite("b"), suite("c", task="other")])
    found = result(tester, [1] * 8, [0] * 8, [1, 0] * 4)
    assert found.tasks["general"].value == 0.5 and found.tasks["general"].count == 16
    assert found.tasks["other"].count == 8


def test_several_completions_count_by_their_mean_and_repeat_by_seed() -> None:
    policy = tiny_policy()
    tester = CapabilityTester([suite(n=4, generation={"max_new_tokens": 5, "temperature": 1.0})])
    first, again, other = tester.run(policy, seed=1), tester.run(policy, seed=1), tester.run(policy, seed=2)
    assert first == again and first.suites["even"].scores != other.suites["even"].scores
    assert all((4 * score).is_integer() for score in first.suites["even"].scores)
    assert any(0 < score < 1 for score in first.suites["even"].scores)


def test_a_pass_score_makes_grades_right_or_wrong() -> None:
    policy = tiny_policy()
    graded = CapabilityTester([suite(validator=LengthOf())]).run(policy).suites["even"].scores
    most = max(graded)
    passed = CapabilityTester([suite(validator=LengthOf(), pass_score=most)]).run(policy).suites["even"].scores
    assert passed == [float(score == most) for score in graded] and 0 < sum(passed) < 8


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    found = CapabilityTester([suite(), suite("digits", validator=share_of_digits)]).run(tiny_policy(), seed=3)
    found.save(tmp_path / "baseline.json")
    assert CapabilityResult.load(tmp_path / "baseline.json") == found
    kept = json.loads((tmp_path / "baseline.json").read_text())
    assert kept["suites"][0]["estimate"]["count"] == 8


def test_a_significant_drop_beyond_the_threshold_is_a_regression() -> None:
    tester = CapabilityTester([suite("a"), suite("b")])
    before = result(tester, [1] * 8, [1] * 8)
    after = result(tester, [0] * 7 + [1], [0, 0] + [1] * 6)
    (found,) = tester.compare(before, after)
    assert (found.suite, found.test, found.p_value, found.adjusted_p_value) == ("a", "mcnemar", 2**-7, 2**-6)
    assert found.points == pytest.approx(-87.5) and found.difference.count == 8
    assert found.losses == [f"suite `a`[{n}]" for n in range(7)] and found.gains == []
    with pytest.raises(CapabilityRegression, match=r"a: 1\.000 → 0\.125") as caught:
        tester.check(before, after)
    assert caught.value.regressions == [found] and caught.value.exit_code == 8
    assert json.loads(json.dumps(found.as_json()))["regressed"] is True


def test_small_improved_and_insignificant_changes_are_none() -> None:
    tester = CapabilityTester([suite()])
    before = result(tester, [1] * 8)
    assert tester.compare(before, before) == [] and tester.compare(result(tester, [0] * 8), before) == []
    (change,) = tester.check(before, result(tester, [0] * 4 + [1] * 4))  # p = 1/16
    assert change.p_value == 2**-4 and change.points == -50
    lenient = CapabilityTester([suite()], threshold=100.0)
    assert lenient.compare(before, result(lenient, [0] * 7 + [1])) == []
    assert len(lenient.compare(before, result(lenient, [0] * 8))) == 1  # the threshold itself counts
    assert len(CapabilityTester([suite()], alpha=0.07).compare(before, result(tester, [0] * 4 + [1] * 4))) == 1


def test_more_suites_need_clearer_drops() -> None:
    one, five = CapabilityTester([suite()]), CapabilityTester([suite(name) for name in "abcde"])
    fell = [0.0] * 5 + [1.0] * 3  # p = 1/32
    assert len(one.compare(result(one, [1] * 8), result(one, fell))) == 1
    same = [[1.0] * 8] * 4
    assert five.compare(result(five, [1] * 8, *same), result(five, fell, *same)) == []


def test_graded_scores_are_compared_by_sign_flips() -> None:
    tester = CapabilityTester([suite()])
    (change,) = tester.compare(result(tester, [0.5] * 8), result(tester, [0.3] * 8))
    assert change.test == "sign_flip" and change.p_value == 2**-8 and change.points == pytest.approx(-20)


def test_results_of_other_suites_are_refused() -> None:
    tester = CapabilityTester([suite()])
    before = tester.run(tiny_policy())
    others = {
        "prompts": CapabilityTester([suite(prompts=ROWS[:-1])]),
        "generation": CapabilityTester([suite(generation={"max_new_tokens": 6})]),
        "pass_score": CapabilityTester([suite(pass_score=1.0)]),
        "share_of_digits": CapabilityTester([suite(validator=share_of_digits)]),
    }
    for changed, other in others.items():
        with pytest.raises(DataError, match=changed):
            tester.compare(before, other.run(tiny_policy()))
    with pytest.raises(DataError, match="lacks the suite"):
        tester.compare(before, CapabilityTester([suite("other")]).run(tiny_policy()))


def test_too_few_prompts_for_any_drop_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"4 prompts.*at least 5") as caught:
        CapabilityTester([suite(prompts=ROWS[:4])]).prepare()
    assert caught.value.place == "suite `even`"
    CapabilityTester([suite(prompts=ROWS[:5])]).prepare()
    with pytest.raises(ConfigError, match="at least 6"):
        CapabilityTester([suite(prompts=ROWS[:5]), suite("b")]).prepare()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suites": [{"name": "a", "prompts": ["x"], "validator": "numeric_answr"}]}, "numeric_answer"),
        ({"suites": [{"name": "a", "prompts": ["x"], "validator": {"name": "regex", "weight": 2}}]}, "weight"),
        ({"suites": [{"name": "a", "prompts": ["x"], "validator": {"nme": "regex"}}]}, "unknown option"),
        ({"suites": [{"name": "a", "prompts": ["x"], "validator": 3}]}, "validator"),
        ({"suites": [{"name": "a", "prompts": [], "validator": "regex"}]}, "prompts"),
        ({"suites": [{"name": "a", "prompts": ["x"], "validator": "regex", "n": 2}]}, "temperature"),
        ({"suites": [suite(), suite()]}, "two suites are named `even`"),
        ({"suites": []}, "suites"),
        ({"suites": [suite()], "alpha": 1.5}, "alpha"),
        ({"suites": [suite()], "alpha": 0.0001}, "resamples"),
        ({"suites": [suite()], "treshold": 1}, "threshold"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, PluginError), match=message):
        CapabilityTester(**options)


def test_a_file_of_suites_is_read_and_its_faults_have_lines(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    text = f"""threshold: 5
suites:
  - name: sums
    task: reasoning
    prompts: {tmp_path}/rows.jsonl
    validator: numeric_answer
    generation: {{max_new_tokens: 4}}
"""
    path = tmp_path / "suites.yaml"
    path.write_text(text)
    tester = CapabilityTester.load(path)
    assert tester.config.threshold == 5 and tester.config.suites[0].generation.temperature == 0
    save_tiny(tmp_path / "model", layers=1)
    found = tester.run(tmp_path / "model")
    assert found.suites["sums"].places[2] == f"{tmp_path}/rows.jsonl:3" and found.suites["sums"].task == "reasoning"
    path.write_text(text.replace("prompts:", "promts:"))
    with pytest.raises(ConfigError, match="prompts") as caught:
        CapabilityTester.load(path)
    assert caught.value.place == f"{path}:5"


def test_a_configuration_is_written_and_read() -> None:
    config = CapabilityTestsConfig.model_validate({"suites": [suite(validator="numeric_answer").model_dump()]})
    assert CapabilityTestsConfig.model_validate_json(config.model_dump_json()) == config
    assert "even_length" in suite().model_dump(mode="json")["validator"]
    assert "validator" in json.dumps(CapabilityTestsConfig.model_json_schema())


def test_damaged_results_are_named(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    for text, message in (("{", "not JSON"), ("{}", "KeyError"), ('{"format": 9}', "another format")):
        path.write_text(text)
        with pytest.raises(DataError, match=message) as caught:
            CapabilityResult.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(StorageError):
        CapabilityResult.load(tmp_path / "none.json")
