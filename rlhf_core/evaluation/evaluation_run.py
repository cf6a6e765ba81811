"""The work of an evaluation: prompts are completed a batch at a time, and each batch is measured in all ways that were chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_core.config.evaluation import EvaluationConfig, EvaluationMetric
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.data.completion_rows import read_completion_rows
from rlhf_core.data.prompt_rows import PromptRow
from rlhf_core.evaluation import measures
from rlhf_core.evaluation.divergence import kl_by_token
from rlhf_core.evaluation.diversity import mean_cosine_distance
from rlhf_core.evaluation.estimate import Estimate, share_estimate
from rlhf_core.evaluation.measures import Measure, PromptMeasures
from rlhf_core.evaluation.pairwise_judge import ComparedPair, PairwiseJudge
from rlhf_core.evaluation.score_file import score_rows_by_name
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.sampled_rows import input_columns, sample_rows, sampler_row, samples_of_row
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.rewards import RewardLike, Rewards, open_rewards
from rlhf_core.rewards.answer_votes import answer_key
from rlhf_core.training.pairs import pair_accuracy


@dataclass(frozen=True)
class MeasuredWith:
    """The models and rewards of an evaluation."""

    policy: PolicyModel
    reference: PolicyModel | None
    baseline: PolicyModel | None
    baseline_column: str | None
    rewards: Sequence[RewardLike]
    validators: Sequence[RewardLike]
    judge: PairwiseJudge | None
    embedder: Callable[[Sequence[str]], Tensor] | None
    preferences: Any
    """Rows of pairs, as `read_completion_rows` takes them; None for none."""


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt with its completions and those of the baseline."""

    number: int
    row: PromptRow
    own: Sequence[Completion]
    others: Sequence[Completion]


class _Plain(Sampler):
    """Draws completions and chooses nothing."""

    api = 1
    Config = EvaluationConfig
    config: EvaluationConfig

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return n completions for each prompt, in the order in which they were drawn."""
        return self.engine(seed).generate(prompt_batch(self.policy, prompts), n, self.config)


class EvaluationRun:
    """One evaluation: the opened rewards, the samplers, and what is measured of a batch of answered prompts."""

    def __init__(
        self,
        given: MeasuredWith,
        prompts: Sequence[PromptRow],
        config: EvaluationConfig,
        chosen: Sequence[EvaluationMetric],
        together: int,
    ) -> None:
        self.given, self.prompts, self.config, self.chosen, self.together = given, prompts, config, chosen, together
        scored = bool({"reward", "reward_accuracy", "win_rate"} & {*chosen})
        verified = bool({"accuracy", "calibration", "win_rate"} & {*chosen})
        self.rewards = open_rewards(given.rewards if scored else [])
        self.validators = open_rewards(given.validators if verified else [], place="validators")
        if both := set(self.rewards.names) & set(self.validators.names):
            raise ConfigError(
                f"`{min(both)}` is a reward and a validator", place="validators",
                fix="leave it out of the rewards: a validator's mean is the accuracy",
            )  # fmt: skip

    def answered(self, start: int) -> Iterator[list[AnsweredPrompt]]:
        """Yield the prompts from `start` on with their completions, a batch at a time."""
        config, rows, together = self.config, self.prompts, self.together
        own = self._drawn(self.given.policy, config.seed, start)
        others = self._others(start)
        batch: list[AnsweredPrompt] = []
        for (number, drawn), theirs in zip(own, others, strict=True):
            batch.append(AnsweredPrompt(number, rows[number], drawn, theirs))
            if (number + 1) % together == 0 or number + 1 == len(rows):
                yield batch
                batch = []

    def _drawn(self, policy: PolicyModel, seed: int, start: int) -> Iterator[tuple[int, Sequence[Completion]]]:
        sampler, n = _Plain(self.config, policy=policy), self.config.completions
        return sample_rows(sampler, self.prompts, n=n, seed=seed, together=self.together, start=start)

    def _others(self, start: int) -> Iterator[Sequence[Completion]]:
        """Yield the baseline's completions of each prompt from `start` on; none where nothing is compared."""
        given = self.given
        if "win_rate" not in self.chosen:
            yield from ([] for _ in self.prompts[start:])
        elif given.baseline is not None:
            # Other random numbers than the policy's: the completions compared are independent.
            seed = stream_seed(self.config.seed, "baseline")
            yield from (completions for _, completions in self._drawn(given.baseline, seed, start))
        else:
            for row in self.prompts[start:]:
                yield [Completion(_given_response(row, str(given.baseline_column)), (), (), "end")]

    def measure(self, answered: Sequence[AnsweredPrompt]) -> list[tuple[dict[str, Any], PromptMeasures]]:
        """Return for each prompt its row for the output, and its measures."""
        chosen, found = {*self.chosen}, [PromptMeasures() for _ in answered]

        def add(more: Sequence[PromptMeasures]) -> None:
            found[:] = [one | other for one, other in zip(found, more, strict=True)]

        scores, marks = (_scores(rewards, answered, "own") for rewards in (self.rewards, self.validators))
        if "length" in chosen:
            add([measures.length_measures(one.own) for one in answered])
        if "reward" in chosen:
            for name in self.rewards.names:
                add([measures.reward_measures(name, each[name]) for each in scores])
        if {"accuracy", "calibration"} & chosen:
            for name in self.validators.names:
                add([self._verified(name, one, each[name]) for one, each in zip(answered, marks, strict=True)])
        if "diversity" in chosen:
            add(
                [measures.diversity_measures([each.text for each in one.own], self.config.distinct) for one in answered]
            )
        if "embedding_distance" in chosen:
            add(self._distances(answered))
        if "kl" in chosen:
            add(self._kl(answered))
        rows = [_row(one, own | mark) for one, own, mark in zip(answered, scores, marks, strict=True)]
        if "win_rate" in chosen:
            theirs = self._scored_others(answered)
            for name in (*self.rewards.names, *self.validators.names):
                groups = zip(answered, rows, theirs, strict=True)
                add([_wins(name, one, row["rewards"][name], other[name]) for one, row, other in groups])
            if self.given.judge is not None:
                add(self._judged(self.given.judge, answered))
            for row, one, other in zip(rows, answered, theirs, strict=True):
                row |= {"baseline_completions": [each.text for each in one.others], "baseline_rewards": other}
        return [(row | {"measures": own.as_json()}, own) for row, own in zip(rows, found, strict=True)]

    def _scored_others(self, answered: Sequence[AnsweredPrompt]) -> list[dict[str, list[float]]]:
        """Return for each prompt the scores of the baseline's completions, by reward and validator."""
        scores, marks = (_scores(rewards, answered, "others") for rewards in (self.rewards, self.validators))
        return [own | mark for own, mark in zip(scores, marks, strict=True)]

    def _verified(self, name: str, one: AnsweredPrompt, scores: Sequence[float]) -> PromptMeasures:
        """Return the accuracy and calibration of a prompt's completions by a validator."""
        config, found = self.config, PromptMeasures()
        right = [score >= config.right_from for score in scores]
        keys = [answer_key(each.text, complete=not each.truncated) for each in one.own]
        if "accuracy" in self.chosen:
            found |= measures.verified_measures(name, right, keys, config.ks)
        if "calibration" in self.chosen:
            if config.confidence == "vote_share":
                points = [measures.vote_confidence(keys, right)]
            else:
                points = [
                    (_probability(each, config.confidence), float(mark))
                    for each, mark in zip(one.own, right, strict=True)
                ]
            found |= measures.calibration_measures(name, points)
        return found

    def _distances(self, answered: Sequence[AnsweredPrompt]) -> list[PromptMeasures]:
        """Return the mean distance of the embeddings of each prompt's completions."""
        assert self.given.embedder is not None
        n = self.config.completions
        embedded = self.given.embedder([each.text for one in answered for each in one.own])
        return [
            PromptMeasures({"embedding_distance": Measure(mean_cosine_distance(vectors))})
            for vectors in embedded.split(n)
        ]

    def _kl(self, answered: Sequence[AnsweredPrompt]) -> list[PromptMeasures]:
        """Return the KL to the reference along each prompt's completions."""
        given, n = self.given, self.config.completions
        assert given.reference is not None
        prompts = prompt_batch(given.policy, [sampler_row(one.row) for one in answered])
        batch = Batch.from_completions(prompts, [one.own for one in answered])
        totals = kl_by_token(given.policy, given.reference, batch, estimator=self.config.kl).double().sum(1)
        tokens = batch.loss_mask.sum(1)
        return [
            measures.kl_measures(total.tolist(), count.tolist())
            for total, count in zip(totals.cpu().split(n), tokens.cpu().split(n), strict=True)
        ]

    def _judged(self, judge: PairwiseJudge, answered: Sequence[AnsweredPrompt]) -> list[PromptMeasures]:
        """Return what the judge prefers of pairs of completions: the first with the baseline's first, and so on."""
        counts = [min(judge.config.pairs, len(one.own), len(one.others)) for one in answered]
        pairs = [
            ComparedPair(one.row.prompt, own.text, other.text, input_columns(one.row), one.row.place)
            for one, count in zip(answered, counts, strict=True)
            for own, other in zip(one.own[:count], one.others[:count], strict=True)
        ]
        preferred, agreed = judge.compare(pairs)
        found, start = [], 0
        for count in counts:
            part = slice(start, start + count)
            longer = [float(len(pair.own) - len(pair.other)) for pair in pairs[part]]
            own = measures.judged_measures("judge", preferred[part], longer, trials=count)
            if judge.config.swap:
                own.values["consistent/judge"] = Measure(sum(agreed[part]) / count, trials=count)
            found.append(own)
            start += count
        return found

    def reward_accuracies(self) -> dict[str, Estimate]:
        """Return for each reward the share of preference rows whose chosen response has the higher score, ties counting half."""
        if "reward_accuracy" not in self.chosen:
            return {}
        right: dict[str, list[float]] = {name: [] for name in self.rewards.names}
        batches = score_rows_by_name(self.rewards, read_completion_rows(self.given.preferences))
        for row, scores in (entry for batch in batches for entry in batch):
            if row.shape != "pair":
                fix = "give rows with `prompt`, `chosen` and `rejected`"
                raise DataError("isn't a pair, on which rewards could be checked", place=row.place, fix=fix)
            for name, (chosen, rejected) in scores.items():
                right[name].append(float(pair_accuracy(torch.tensor(chosen - rejected, dtype=torch.float64))))
        if not all(right.values()):
            raise DataError("holds no rows", place="preferences", fix="give at least one pair")
        return {f"reward_accuracy/{name}": share_estimate(each) for name, each in right.items()}


def _wins(name: str, one: AnsweredPrompt, own: Sequence[float], others: Sequence[float]) -> PromptMeasures:
    longer = measures.length_differences([each.text for each in one.own], [each.text for each in one.others])
    return measures.win_measures(name, own, others, longer)


def _scores(rewards: Rewards, answered: Sequence[AnsweredPrompt], side: str) -> list[dict[str, list[float]]]:
    """Return for each prompt, by reward, the scores of its completions (`own`) or the baseline's (`others`)."""
    if not len(rewards):
        return [{} for _ in answered]
    groups = [samples_of_row(one.row, getattr(one, side), one.number) for one in answered]
    places = [one.row.place for one, group in zip(answered, groups, strict=True) for _ in group]
    by_name = rewards.score([sample for group in groups for sample in group], places).by_name
    found, start = [], 0
    for group in groups:
        found.append({name: scores[start : start + len(group)] for name, scores in by_name.items()})
        start += len(group)
    return found


def _row(one: AnsweredPrompt, scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return a prompt's row for the output."""
    return {
        **input_columns(one.row),
        "completions": [each.text for each in one.own],
        "stop_reasons": [each.stop_reason for each in one.own],
        "tokens": [len(each.ids) for each in one.own],
        "rewards": {name: list(values) for name, values in scores.items()},
    }


def _probability(completion: Completion, kind: str) -> float:
    """Return the probability of a completion under the model, or the geometric mean of its tokens' probabilities."""
    logps = torch.tensor(completion.raw_logprobs, dtype=torch.float64)
    if not len(logps):
        return 1.0
    return min(1.0, float((logps.sum() if kind == "sequence_probability" else logps.mean()).exp()))


def _given_response(row: PromptRow, column: str) -> str:
    """Return the response in a row's column. Raises DataError where there is none."""
    value = row.columns.get(column)
    if not isinstance(value, str):
        got = f"columns {', '.join(map(str, row.columns))}" if value is None else type(value).__name__
        raise DataError(f"has no text in `{column}` to compare with", place=row.place, got=got)
    return value
