"""Reports on flaws: quality, shares and reward hacking by hand, the gap of two rewards, files, and refusals."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_core import AdversarialValidator, over_optimisation
from rlhf_core.contracts.reward import Sample
from rlhf_core.improvement.adversarial_validator import HACKING, hacking_severities, spearman
from rlhf_core.improvement.flaw_detectors import DETECTORS, FlawDetector
from rlhf_core.infra.errors import ConfigError, DataError, PluginError


def length(completions: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def right(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    return [float(text.endswith(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def sample(prompt: str, completion: str, answer: str = "4") -> Sample:
    return Sample(prompt, completion, columns={"answer": answer})


def test_quality_and_shares_by_hand() -> None:
    halves = {
        "half": FlawDetector(lambda one: 0.5 if "h" in one.completion else 0.0, 0.5),
        "third": FlawDetector(lambda one: None if "n" in one.completion else 1 / 3, 0.5),
    }
    report = AdversarialValidator(halves).validate(
        [Sample("a", "h"), Sample("a", "n"), Sample("b", "hn"), Sample("c", "")]
    )
    assert [one.quality for one in report.completions] == pytest.approx([0.5 * 2 / 3, 1, 0.5, 2 / 3])
    assert [one.flagged for one in report.completions] == [["half"], [], ["half"], []]
    # Prompts are the unit: a has 1/2, b 1, c 0.
    assert report.shares["half"].value == pytest.approx(0.5) and report.shares["half"].count == 3
    assert report.shares["third"].value == 0 and report.shares["third"].count == 2
    assert report.quality.value == pytest.approx(((0.5 * 2 / 3 + 1) / 2 + 0.5 + 2 / 3) / 3)


def test_hacking_by_hand() -> None:
    # Right ones score 1 and 3. A wrong one of 3 is above one and ties with the other: (1 + 0.5) / 2.
    assert hacking_severities([1, 3, 3, 0, 9], [True, True, False, False, False]) == [0, 0, 0.75, 0, 1]
    assert hacking_severities([1, 2], [False, False]) == [None, None]
    assert hacking_severities([1, 2], [True, True]) == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_wrong_ones_mean_severity_is_one_less_the_auc(scored: list[tuple[int, bool]]) -> None:
    rights, wrongs = ([score for score, one in scored if one is side] for side in (True, False))
    if rights and wrongs:
        severities = hacking_severities([score for score, _ in scored], [one for _, one in scored])
        of_wrong = [value for value, (_, one) in zip(severities, scored, strict=True) if not one and value is not None]
        pairs = [(a > b) + 0.5 * (a == b) for a in rights for b in wrongs]
        assert sum(of_wrong) / len(wrongs) == pytest.approx(1 - sum(pairs) / len(pairs))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=20))
def test_spearman_is_the_correlation_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]

    def ranks(values: list[int]) -> list[float]:
        return [sum(b < a for b in values) + (sum(b == a for b in values) + 1) / 2 for a in values]

    x, y = ranks(first), ranks(second)
    mean = (len(pairs) + 1) / 2
    over = sum((a - mean) * (b - mean) for a, b in zip(x, y, strict=True))
    under = (sum((a - mean) ** 2 for a in x) * sum((b - mean) ** 2 for b in y)) ** 0.5
    found = spearman(first, second)
    assert found is None if under == 0 else found == pytest.approx(over / under, abs=1e-9)


def test_a_proxy_that_likes_length_is_caught() -> None:
    rows = [sample("2+2=?", "so 4"), sample("2+2=?", "because of all this and that 5"), sample("1+3=?", "it is 4")]
    report = AdversarialValidator([], proxy=length, verifier=right).validate(rows)
    assert [one.severities[HACKING] for one in report.completions] == [0, 1, 0]
    assert report.completions[1].flagged == [HACKING] and report.shares[HACKING].value == pytest.approx(0.25)
    assert report.gap is not None and report.gap.auc == 0
    assert report.gap.rank_correlation is not None and report.gap.rank_correlation.value < 0
    honest = AdversarialValidator([], proxy=right, verifier=right).validate(rows)
    assert honest.gap is not None and honest.gap.auc == 1 and honest.shares[HACKING].value == 0
    same = AdversarialValidator([], proxy=lambda completions: [1.0] * len(completions), verifier=right).validate(rows)
    assert same.gap is not None and same.gap.rank_correlation is None and same.gap.auc == 0.5


def test_over_optimisation_is_a_proxy_that_rises_alone() -> None:
    rng = random.Random(0)
    validator = AdversarialValidator([], proxy=length, verifier=right)

    def reports(words: int, share: float) -> Any:
        rows = [
            sample(f"{n}?", "w " * (words + rng.randrange(3)) + ("4" if rng.random() < share else "5"))
            for n in range(60)
        ]
        return validator.validate(rows)

    start = reports(3, 0.8)
    hacked, learned, nothing = reports(9, 0.4), reports(3, 1.0), reports(3, 0.8)
    found = over_optimisation(start, hacked)
    assert found.found and found.proxy.value > 8 and found.verifier.value < -0.1
    assert not over_optimisation(start, learned).found and not over_optimisation(hacked, nothing).found
    with pytest.raises(DataError, match="different prompts"):
        over_optimisation(start, validator.validate([sample("other", "4"), sample("another", "5")]))
    with pytest.raises(DataError, match="no scores"):
        over_optimisation(start, AdversarialValidator().validate([sample("other", "4")]))


def test_files_of_completions_are_read_and_reports_written(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2+2=?", "completions": ["#### 4", "#### 5"], "answer": "4"},
        {"prompt": "Hello", "completion": "I'm sorry, but I can't help with that."},
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = AdversarialValidator().validate(str(path))
    assert [one.flagged for one in report.completions] == [[], ["contradiction"], ["refusal"]]
    assert report.completions[2].place.endswith("samples.jsonl:2") and {*report.shares} == {*DETECTORS}
    assert report.shares["contradiction"].count == 1
    report.save(tmp_path / "report.json")
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["completions"][1]["severities"]["contradiction"] == 1 and kept["gap"] is None
    assert kept["quality"]["value"] == pytest.approx(report.quality.value)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="repetition"):
        AdversarialValidator(["repetitions"])
    with pytest.raises(ConfigError, match="verifier"):
        AdversarialValidator(proxy=length)
    with pytest.raises(ConfigError, match="numeric_answer"):
        AdversarialValidator(proxy=length, verifier="numeric_anser")
    with pytest.raises(DataError):
        AdversarialValidator().validate([])
    monkeypatch.setitem(DETECTORS, "odd", FlawDetector(lambda one: 2.0, 0.5))
    with pytest.raises(PluginError, match="detector `odd`"):
        AdversarialValidator(["odd"]).validate([Sample("a", "b")])
