"""Context compressors: teach memory tokens to hold what a frozen language model needs of a long context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal, TypedDict

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from rlhf_core.plugin import (
    TRAINED,
    Batch,
    ConfigError,
    ContextCompressor,
    DataError,
    EncodedData,
    EncodedRow,
    Loader,
    Loss,
    ModelConfig,
    PolicyModel,
    Role,
    RunContext,
    Trainer,
    TrainerConfig,
    TrainingStage,
    check_reader,
    collate,
    context_span,
    evaluating,
    random_generator,
    with_soft_tokens,
)


class Sizes(TypedDict):
    """How a compressor is made, as its constructors take it."""

    chunk: int
    ratios: list[float]
    summary: Literal["memory", "pooled"]


class ContextCompressorConfig(TrainerConfig):
    """Options of context compressors."""

    learning_rate: float = Field(1e-4, gt=0, description="Peak step size; larger learns faster and may diverge.")
    ratios: list[float] = Field(
        default_factory=lambda: [2.0, 4.0, 8.0],
        min_length=1,
        description="Tokens of context per soft token, one drawn for each row; more of them train one compressor for several.",
    )
    summary: Literal["memory", "pooled"] = Field(
        "memory",
        description="What soft tokens are made of: `memory`, the hidden states of memory tokens behind the context, or `pooled`,"
        " the means of neighbouring tokens' hidden states.",
    )
    chunk: int = Field(
        512, ge=2, description="Most tokens of context that are compressed together; larger sees more and costs more."
    )
    keep_start: int = Field(
        0, ge=0, description="Tokens at the start of a prompt that aren't context, such as a system message."
    )
    keep_end: int = Field(
        64, ge=1, description="Tokens at the end of a prompt that aren't context: the question; larger compresses less."
    )
    reconstruction_weight: float = Field(
        1.0,
        ge=0,
        description="Weight of repeating the context from its soft tokens; larger keeps more that no response asks for.",
    )
    reader: ModelConfig | None = Field(
        None, description="The frozen model that reads soft tokens; null takes the run's model as it was passed in."
    )

    @field_validator("ratios")
    @classmethod
    def _each_compresses(cls, ratios: list[float]) -> list[float]:
        for ratio in ratios:
            if not ratio > 1:
                raise ValueError(f"a ratio of {ratio:g} compresses nothing: it must be above 1")
        return ratios


class ContextCompressorTrainer(Trainer[ContextCompressorConfig]):
    """Context compressor: a frozen model answers from soft tokens, and repeats the context from them.

    Ge et al. 2023 (arXiv 2307.06945): the sum of the autoencoding loss (section 2.2) and of the loss on responses (section 2.3),
    both through a reader that isn't trained. Deviation: both count from the first step on, and each row has a ratio of its own.
    `summary: pooled` makes soft tokens of means of hidden states instead, as Feldman and Artzi 2025 (arXiv 2510.20797) do.
    """

    api = 1
    record = "sft"
    stage = TrainingStage.COMPRESSION
    Config = ContextCompressorConfig
    roles: ClassVar = {"compressor": TRAINED, "reader": Role(trained=False, optional=True)}

    def build(self, loader: Loader) -> Mapping[str, nn.Module]:
        """Return the compressor and its reader; with a new adapter the compressor's own backbone, adapter off, is the reader."""
        config = self.config
        sizes: Sizes = {"chunk": config.chunk, "ratios": config.ratios, "summary": config.summary}
        if config.reader is not None:
            compressor = loader.main(ContextCompressor, **sizes, seed=config.seed)
            reader = loader.load("reader", PolicyModel, config.reader)
            check_reader(compressor, reader)
            compressor.kept = (config.keep_start, config.keep_end)
            self._reader_of: PolicyModel | None = None
            return {"compressor": compressor, "reader": reader}
        if isinstance(self.model, str | Path) and ContextCompressor.is_saved_in(self.model):
            raise ConfigError(
                "the model is a compressor, which can't read its own soft tokens", place="reader", got="null",
                fix="set `reader` to the model that it was trained for",
            )  # fmt: skip
        policy: PolicyModel = loader.main()
        if policy.has_adapter and not policy.fresh_adapter:
            raise ConfigError(
                "the run's model has a trained adapter, so it can't be read without it",
                place="reader",
                fix="set `reader` to the model that is to read soft tokens",
            )
        compressor = ContextCompressor.on(policy, **sizes, seed=config.seed)
        compressor.kept = (config.keep_start, config.keep_end)
        self._reader_of = policy if policy.fresh_adapter else None
        if policy.fresh_adapter:
            return {"compressor": compressor}
        return {"compressor": compressor, "reader": loader.reference(policy, "copy").model}

    @property
    def compressor(self) -> ContextCompressor:
        return self.models["compressor"]  # type: ignore[return-value]

    def _reader(self) -> tuple[PolicyModel, AbstractContextManager[None]]:
        """Return the model that reads soft tokens, and the context in which it is the frozen one."""
        if self._reader_of is not None:
            return self._reader_of, self._reader_of.adapter_off()
        return self.models["reader"], contextlib.nullcontext()  # type: ignore[return-value]

    def inspect(self, data: EncodedData) -> None:
        """Refuse data in which no prompt is longer than what is kept of it."""
        config = self.config
        if data.streaming:
            return
        outcomes = (outcome.row for outcome, _ in data.walk(0, seed=0, shuffle=False, position=[]))
        longest = max((len(row.prompt_ids) for row in outcomes if row is not None), default=0)
        if longest <= config.keep_start + config.keep_end:
            raise DataError(
                "no prompt has a context to compress", place="keep_end",
                got=f"{longest} tokens in the longest prompt, of which {config.keep_start + config.keep_end} are kept",
                fix="set `keep_end` to the length of the questions, or give rows with longer prompts",
            )  # fmt: skip

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Batch]:
        """Attach each prompt's ratio, (P,): drawn in training, and in an evaluation by its row, the same in each."""
        ratios = sorted(self.config.ratios)
        for batch in stream:
            drawn = [
                row % len(ratios)
                if run.evaluating
                else int(random_generator(self.config.seed, run.step, row).integers(len(ratios)))
                for row in batch.rows
            ]
            chosen = torch.tensor([ratios[index] for index in drawn], dtype=torch.float32)
            yield batch.attach(per_prompt={"ratio": chosen.to(batch.device)})

    def _spans(self, batch: Batch) -> list[slice]:
        config = self.config
        return [context_span(length, config.keep_start, config.keep_end) for length in batch.prompt_lengths.tolist()]

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Both losses are averaged over tokens: those of responses, and those of contexts."""
        found = {"nll": float(batch.num_loss_tokens)}
        if self.config.reconstruction_weight:
            found["reconstruction"] = float(sum(span.stop - span.start for span in self._spans(batch)))
        return found

    def loss(self, batch: Batch) -> Loss:
        """Return the negative log-likelihoods of responses and contexts, given soft tokens, summed over tokens."""
        spans = self._spans(batch)
        prompts = [ids[:n] for ids, n in zip(batch.prompt_ids.tolist(), batch.prompt_lengths.tolist(), strict=True)]
        contexts = [ids[span] for ids, span in zip(prompts, spans, strict=True)]
        soft = self.compressor(contexts, batch["ratio"].tolist())
        reader, frozen = self._reader()
        rows = torch.cat([*soft, self.compressor.head.marker])
        # In evaluation mode it drops nothing out, and no layer is recomputed in the backward pass, when its adapter is on again.
        with frozen, evaluating(reader), with_soft_tokens(reader.network, rows) as first:
            ids, at = [], first
            for one in soft:
                ids.append(list(range(at, at + len(one))))
                at += len(one)
            read = [p[: s.start] + i + p[s.stop :] for p, s, i in zip(prompts, spans, ids, strict=True)]
            answering = _with_prompts(batch, read)
            parts = [answering]
            if repeats := [n for n, context in enumerate(contexts) if context and self.config.reconstruction_weight]:
                # The marker is the last soft token.
                parts.append(_repeating([(ids[n] + [at], contexts[n]) for n in repeats], batch.device))
            logps = reader.token_logps(Batch.cat(parts) if len(parts) > 1 else answering)
        width = batch.response_ids.shape[1]
        nll = -(logps[: batch.num_responses, :width] * batch.loss_mask)
        repeated = -logps[batch.num_responses :].sum(dim=1)  # (len(repeats),)
        terms = {"nll": nll.sum()}
        if self.config.reconstruction_weight:
            terms["reconstruction"] = self.config.reconstruction_weight * repeated.sum()
        return Loss(terms, self._metrics(batch, nll.detach(), repeated.detach(), repeats, contexts))

    def _metrics(
        self, batch: Batch, nll: Tensor, repeated: Tensor, repeats: Sequence[int], contexts: Sequence[Sequence[int]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the loss per token of responses at each ratio, and of contexts, as (sum, count) per prompt."""
        per_prompt = torch.zeros(batch.num_prompts, device=nll.device)
        sums = per_prompt.index_add(0, batch.owner, nll.sum(dim=1))
        counts = per_prompt.index_add(0, batch.owner, batch.loss_mask.sum(dim=1).float())
        found = {}
        for ratio in sorted(self.config.ratios):
            with_it = batch["ratio"] == ratio
            found[f"nll/at_{ratio:g}"] = (sums * with_it, counts * with_it)
        if self.config.reconstruction_weight:
            lengths = torch.tensor([float(len(ids)) for ids in contexts], device=nll.device)
            where = torch.tensor(list(repeats), dtype=torch.long, device=nll.device)
            found["repeated/nll"] = (per_prompt.index_add(0, where, repeated), lengths)
        return found


def _with_prompts(batch: Batch, prompts: Sequence[Sequence[int]]) -> Batch:
    """Return a batch's responses behind other prompts, without its columns."""
    made = collate([EncodedRow(row, list(ids)) for row, ids in zip(batch.rows, prompts, strict=True)]).to(batch.device)
    return replace(
        made,
        response_ids=batch.response_ids,
        response_lengths=batch.response_lengths,
        owner=batch.owner,
        loss_mask=batch.loss_mask,
    )


def _repeating(pairs: Sequence[tuple[list[int], list[int]]], device: torch.device) -> Batch:
    """Return a batch of prompts with one response each, all of whose tokens are in the loss."""
    rows = [EncodedRow(n, prompt, [ids], [[True] * len(ids)]) for n, (prompt, ids) in enumerate(pairs)]
    return collate(rows).to(device)
