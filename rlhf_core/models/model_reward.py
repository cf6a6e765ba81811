"""Rewards given by models: samples are encoded as in the model's training, scored in batches, and their scores are cached."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from pydantic import Field

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.training import ModelConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.data.collate import collate
from rlhf_core.data.encoder import NO_ROOM, EncodedRow, Encoder
from rlhf_core.data.row_source import Cursor, Row
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import DataError
from rlhf_core.infra.model_files import file_hashes
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.headed_model import HeadedModel, wrong_kind
from rlhf_core.models.precision import DTYPES

log = logging.getLogger(__name__)

ScoreT = TypeVar("ScoreT")
ModelT = TypeVar("ModelT", bound=HeadedModel)


class ScoringModelConfig(ModelConfig):
    """The model that scores. A path alone stands for `{path: …}`."""

    precision: Literal["float32", "bf16", "fp16"] = Field(
        "float32",
        description="Precision of its matrix products and weights; 16 bits are faster and take half the memory.",
    )


class ScoringConfig(BaseConfig):
    """Options of how a model scores samples."""

    max_length: int = Field(
        2048, ge=2, description="Most tokens in a prompt with its completion; larger truncates fewer at their ends."
    )
    batch_tokens: int = Field(
        8192, ge=1, description="Most tokens in one forward pass; larger is faster and takes more memory."
    )
    cache_size: int = Field(
        10_000, ge=0, description="Scores that are kept for repeated texts; larger takes more memory."
    )


class ModelRewardConfig(ScoringConfig):
    """Options that every reward given by a model has."""

    model: ScoringModelConfig = Field(description="Path or hub name of the model that scores.")


class ModelReward(RewardFn, Generic[ModelT]):
    """The base class of rewards given by a model, loaded from `config.model` on first use, or in memory: `MyReward.of(model)`."""

    Config = ModelRewardConfig
    config: ModelRewardConfig
    kind: ClassVar[type[HeadedModel]]
    """The class that the model must have."""

    @classmethod
    def of(cls, model: ModelT, **options: Any) -> Self:
        """Return the reward given by a model in memory, which is used as it is.

        Args:
            options: values of the configuration, without `model`.

        Raises:
            ModelError: the model is of another class than `kind`.
        """
        if not isinstance(model, cls.kind):
            raise wrong_kind(model, wanted=cls.kind, allowed=f"a {cls.kind.__name__}")
        precision = next(name for name, dtype in DTYPES.items() if dtype == model.precision)
        model_options = {"path": model.source or "in memory", "precision": precision}
        reward = cls(cls.Config.parse({**options, "model": model_options}))
        reward.check(model)
        reward.__dict__["model"] = model
        return reward

    @cached_property
    def model(self) -> ModelT:
        """The model that scores."""
        model_config = self.config.model
        loaded: Any = self.kind.from_pretrained(  # type: ignore[attr-defined]
            model_config.path,
            device=DeviceManager().device,
            precision=model_config.precision,
            trust_remote_code=model_config.trust_remote_code,
            frozen=True,
        )
        self.check(loaded)
        return loaded

    def check(self, model: ModelT) -> None:
        """Raise `ConfigError` where the options don't suit the model. By default all do."""

    def prepare(self) -> None:
        _ = self.model

    def describe(self) -> dict[str, Any]:
        """Return the hashes of the model's files, or of its weights, for a run's record."""
        loaded = "model" in self.__dict__
        files = None if loaded else file_hashes(self.config.model.path)
        return {"files": self.model.describe()["files"] if files is None else files}


class SampleScores(Generic[ScoreT]):
    """Scores samples (prompts with completions) by a model, in batches, with a cache.

    A completion's sampled token ids are scored as they are where the model's tokenizer decodes them to the completion's text;
    encoded again, the text may have other ids, which were never sampled. Where the reward model's tokenizer differs from the
    policy's, the text is encoded as in training, as prompts always are. A completion that hit a length limit is scored as if it
    ended there, since the model knows only complete responses. Samples of one prompt share its computation.

    Args:
        score: returns the model's scores for a batch, one entry per response.
        model: a `RewardModel`, `ProcessRewardModel` or `ValueModel`, whose tokenizer, device, precision and positions are used.
        config: prompts with completions longer than `max_length` tokens are truncated at their ends, with one warning.
    """

    def __init__(self, score: Callable[[Batch], Sequence[ScoreT]], model: HeadedModel, config: ScoringConfig) -> None:
        self.score, self.model, self.config = score, model, config
        self.max_length: int = min(config.max_length, model.max_positions or config.max_length)
        self.responses = Encoder(model.tokenizer, "sft", max_length=self.max_length)
        self.prompts = Encoder(model.tokenizer, "prompt", max_length=self.max_length)
        self.end: int = model.tokenizer.eos_token_id
        self.cache: OrderedDict[str, ScoreT] = OrderedDict()
        self._warned = False
        self._by_text = False
        """Whether it was reported that completions are scored by their text."""

    def __call__(self, samples: Sequence[Sample]) -> list[ScoreT]:
        """Return one score per sample, in order.

        Raises:
            DataError: a prompt leaves no room for a completion.
        """
        own = [self.own_ids(sample) for sample in samples]
        self._report_other_tokenizer(samples, own)
        keys = [
            json.dumps([sample.prompt, sample.completion, sample.columns.get("tools"), ids])
            for sample, ids in zip(samples, own, strict=True)
        ]
        known = {key: self.cache[key] for key in keys if key in self.cache}
        new = {key: (sample, ids) for key, sample, ids in zip(keys, samples, own, strict=True) if key not in known}
        for part, scores in self._score_new(new):
            known |= zip(part, scores, strict=True)
        for key in keys:
            self.cache[key] = known[key]
            self.cache.move_to_end(key)
        while len(self.cache) > self.config.cache_size:
            self.cache.popitem(last=False)
        return [known[key] for key in keys]

    def own_ids(self, sample: Sample) -> list[int] | None:
        """Return a completion's ids, without an end token or stop id, where the tokenizer decodes them to its text; else None."""
        ids = list(sample.completion_ids)
        ends = [ids[:-1], ids] if sample.stop_reason in ("end", "stop") else [ids]
        for tokens in ends if ids and min(ids) >= 0 and max(ids) < len(self.model.tokenizer) else ():
            if sample.completion in self._texts(tokens):
                return tokens
        return None

    def _report_other_tokenizer(self, samples: Sequence[Sample], own: Sequence[list[int] | None]) -> None:
        """Warn once where sampled ids mean another text to the model's tokenizer than the completion's."""
        if self._by_text:
            return
        for sample, ids in zip(samples, own, strict=True):
            if ids is None and sample.completion_ids and sample.completion.strip() and not self._reads(sample):
                self._by_text = True
                log.warning(
                    "%s has another tokenizer than the policy: it scores completions by their text (reported once)",
                    self.model.source or "the model that scores",
                )
                return

    def _reads(self, sample: Sample) -> bool:
        """Return whether the sampled ids decode to the completion, up to a stop string behind it."""
        ids = list(sample.completion_ids)
        if min(ids) < 0 or max(ids) >= len(self.model.tokenizer):
            return False
        texts = [*self._texts(ids), self.model.tokenizer.decode(ids, skip_special_tokens=True)]
        return any(text.strip().startswith(sample.completion.strip()) for text in texts)

    def _texts(self, ids: list[int]) -> Iterator[str]:
        """Yield the texts that the ids may decode to: as the continuation of a text, and alone."""
        decode = self.model.tokenizer.decode
        yield self.prompts.text_spans.text_of(ids)
        yield decode(ids, clean_up_tokenization_spaces=False)
        yield decode(ids)

    def _score_new(
        self, samples: dict[str, tuple[Sample, list[int] | None]]
    ) -> Iterator[tuple[list[str], Sequence[ScoreT]]]:
        """Score samples that aren't in the cache; yield, per forward pass, the keys of its samples and their scores.

        Args:
            samples: cache key → a sample and its completion's own ids (`own_ids`).
        """
        if not samples:
            return
        rows = self._rows(list(samples.values()))
        keys = list(samples)
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(rows):
            by_prompt.setdefault(tuple(row.prompt_ids), []).append(number)
        with_responses = [
            EncodedRow(
                numbers[0],
                rows[numbers[0]].prompt_ids,
                [rows[number].responses[0] for number in numbers],
                [rows[number].masks[0] for number in numbers],
            )
            for numbers in by_prompt.values()
        ]
        order = {row.index: numbers for row, numbers in zip(with_responses, by_prompt.values(), strict=True)}
        model = self.model
        narrow = torch.autocast(model.device.type, dtype=model.precision, enabled=model.precision != torch.float32)
        with torch.no_grad(), evaluating(model), narrow:
            for micro in collate(with_responses).split(max_tokens=self.config.batch_tokens):
                numbers = [number for row in micro.rows for number in order[row]]
                yield [keys[number] for number in numbers], self.score(micro.to(self.model.device))

    def _rows(self, samples: Sequence[tuple[Sample, list[int] | None]]) -> list[EncodedRow]:
        """Return samples encoded as in training; a completion without text is its end token alone.

        Raises:
            DataError: a prompt leaves no room for a completion.
        """
        rows = []
        cut = 0
        for number, (sample, own) in enumerate(samples):
            if own is None and not sample.completion.strip():
                own = []
            values = {"prompt": sample.prompt, "response": sample.completion, "tools": sample.columns.get("tools")}
            row = Row(number, f"sample {number}", values, Cursor())
            (outcome,) = (self.responses if own is None else self.prompts).encode([row])
            if outcome.row is None:
                raise self._no_room(number, outcome.refused)
            if own is None:
                cut += outcome.truncated
                rows.append(outcome.row)
                continue
            response = [*own, self.end_of(sample)]
            if (room := self.max_length - len(outcome.row.prompt_ids)) < 1:
                raise self._no_room(number, NO_ROOM)
            cut += len(response) > room
            rows.append(EncodedRow(number, outcome.row.prompt_ids, [response[:room]], [[True] * len(response[:room])]))
        if cut and not self._warned:
            self._warned = True
            log.warning(
                "%d of %d samples are longer than %d tokens and are scored without their ends (reported once): %s",
                cut, len(samples), self.max_length, self._more_room(),
            )  # fmt: skip
        return rows

    def prompt_ids(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Return the ids of the samples' prompts, encoded as in training.

        Raises:
            DataError: a prompt leaves no room for a completion.
        """
        rows = [
            Row(number, f"sample {number}", {"prompt": one.prompt, "tools": one.columns.get("tools")}, Cursor())
            for number, one in enumerate(samples)
        ]
        found = []
        for number, outcome in enumerate(self.prompts.encode(rows)):
            if outcome.row is None:
                raise self._no_room(number, outcome.refused)
            found.append(list(outcome.row.prompt_ids))
        return found

    def end_of(self, sample: Sample) -> int:
        """Return the id of the token that ended responses in the model's training: of a turn in a chat, else of a text."""
        chat = not isinstance(sample.prompt, str) or self.prompts.wrap == "chat"
        stops = self.prompts.template.stops if chat else ()
        return stops[0] if stops else self.end

    def _no_room(self, number: int, reason: str | None) -> DataError:
        """Return the error of a sample that the encoder refused."""
        return DataError(f"the sample can't be scored: {reason}", place=f"sample {number}", fix=self._more_room())

    def _more_room(self) -> str:
        """Return what a user can do about samples that are too long."""
        if self.max_length < self.config.max_length:
            return f"use shorter prompts or completions: the model has {self.max_length} positions"
        return "raise `max_length`"
