"""Trainers to try the contract on: a sound online one, and broken ones, each with one fault that people make."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from rlhf_plugins.trainers.dpo import DPOTrainer
from rlhf_plugins.trainers.sft import SFTConfig, SFTTrainer
from torch import Tensor, nn

from rlhf_core.batch import Batch
from rlhf_core.config import TrainerConfig, TrainingStage
from rlhf_core.interfaces import FROZEN, TRAINED, Loss, Trainer, Window
from rlhf_core.models import PolicyModel, Reference
from rlhf_core.testing.tiny import SPECIAL_TOKENS, VOCAB_SIZE
from rlhf_core.training.context import RunContext
from rlhf_core.training.loader import Loader


class Online(Trainer[TrainerConfig]):
    """Policy gradient on responses of its own, two windows a rollout."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY
    Config = TrainerConfig

    def windows_per_batch(self) -> int:
        return 2

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for prompts in stream:
            number = 2 * prompts.num_prompts
            lengths = torch.randint(1, 7, (number,))
            rollout = Batch(
                prompt_ids=prompts.prompt_ids,
                prompt_lengths=prompts.prompt_lengths,
                response_ids=torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (number, int(lengths.max()))),
                response_lengths=lengths,
                owner=torch.arange(prompts.num_prompts).repeat_interleave(2),
                loss_mask=torch.arange(int(lengths.max())) < lengths[:, None],
                rows=prompts.rows,
            )
            rewards = (rollout.response_ids[:, 0] % 2).float()
            window = rollout.attach(per_response={"advantage": rewards - rewards.mean() + 0.1})
            yield Window(window, last=False)
            yield Window(window)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"gain": batch.num_responses}

    def loss(self, batch: Batch) -> Loss:
        return Loss({"gain": -(batch["advantage"] * self.policy.response_logps(batch)).sum()})


class Means(SFTTrainer):
    """Returns the mean of a micro-batch for its sum."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": super().loss(batch).terms["nll"] / batch.num_loss_tokens})


class LooksAtPadding(SFTTrainer):
    """Takes a response's length from its ids, by comparing them with the padding id."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        lengths = (batch.response_ids != self.policy.tokenizer.pad_token_id).sum(dim=1)
        return Loss({"nll": -(self.policy.response_logps(batch) / lengths).sum()})


class ForgetsItsState(SFTTrainer):
    """Weighs later windows less, and doesn't save how many there were."""

    api = 1
    record = "sft"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.windows = 0

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            self.windows += 1
            scale = 1.0 / (1 + self.windows)
            yield batch.attach(per_response={"scale": torch.full((batch.num_responses,), scale)})

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": -(self.policy.response_logps(batch) * batch["scale"]).sum()})


class TrainsNothing(SFTTrainer):
    """Cuts the graph."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": super().loss(batch).terms["nll"].detach()})


class OtherHeader(SFTTrainer):
    """Its source says one thing, and what runs is another."""

    api = 1
    record = "unpaired"


OtherHeader.record = "sft"


class BareConfig(SFTConfig):
    """An option without a description."""

    strength: float = 1.0


class BareOption(SFTTrainer):
    """Describes not every option."""

    api = 1
    record = "sft"
    Config = BareConfig


class LossyConfig(SFTConfig):
    """An option that changes each time it is read."""

    strength: float = Field(1.0, description="Larger is stronger.")

    @field_validator("strength")
    @classmethod
    def _double(cls, value: float) -> float:
        return 2 * value


class LossyOption(SFTTrainer):
    """Its configuration reads back as another."""

    api = 1
    record = "sft"
    Config = LossyConfig


class OpenConfig(SFTConfig, extra="allow"):
    """Takes any key, so that a misspelt one is never seen."""


class OpenOptions(SFTTrainer):
    """Its configuration accepts unknown options."""

    api = 1
    record = "sft"
    Config = OpenConfig


class StageAsText(SFTTrainer):
    """Names its stage by a text."""

    api = 1
    record = "sft"
    stage = "warmup"  # type: ignore[assignment]


class OtherTerms(SFTTrainer):
    """Weighs a term that the loss doesn't name."""

    api = 1
    record = "sft"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"loss": batch.num_loss_tokens}


class WeighsByModel(SFTTrainer):
    """Takes its weights from the model."""

    api = 1
    record = "sft"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": batch.num_loss_tokens * float(next(self.policy.parameters()).detach().abs().mean())}


class NotFinite(SFTTrainer):
    """Takes the logarithm of zero."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": super().loss(batch).terms["nll"] + torch.zeros(()).log()})


class LeavesEvaluation(SFTTrainer):
    """Switches to evaluation mode and not back."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        self.policy.eval()
        return super().loss(batch)


class Seeds(SFTTrainer):
    """Seeds the global generator in its loss."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        torch.manual_seed(0)
        return super().loss(batch)


class SeedsExperience(SFTTrainer):
    """Seeds the global generator while it makes experience."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            torch.manual_seed(0)
            yield batch


class MovesTheFrozen(SFTTrainer):
    """Lets a model that it calls frozen follow the policy."""

    api = 1
    record = "sft"

    roles: ClassVar = {"policy": TRAINED, "teacher": FROZEN}

    def build(self, loader: Loader) -> dict[str, nn.Module]:
        policy: PolicyModel = loader.main()
        return {"policy": policy, "teacher": copy.deepcopy(policy)}

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            for old, new in zip(self.models["teacher"].parameters(), self.policy.parameters(), strict=True):
                old.lerp_(new, 0.1)
            yield batch


class MovesTheReference(DPOTrainer):
    """Takes the policy of the moment for the reference."""

    api = 1
    record = "preference"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            self.reference = Reference.create(self.policy)
            yield batch.attach(per_response={"ref_logps": self.reference.response_logps(batch)})

    def loss(self, batch: Batch) -> Loss:
        # Without metrics: an accuracy among ties would hang on rounding.
        return Loss(super().loss(batch).terms)


class DropsRows(SFTTrainer):
    """Leaves out the last row of every window."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            yield batch.select(range(batch.num_prompts - 1))


class ReportsMeans(SFTTrainer):
    """Reports a metric as the mean of a micro-batch."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        terms = super().loss(batch).terms
        return Loss(terms, {"nll_mean": (terms["nll"].detach() / batch.num_loss_tokens, 1)})


class ReadsTheLayout(DPOTrainer):
    """Sums over all positions that the model computed, whatever stands there."""

    api = 1
    record = "preference"

    def loss(self, batch: Batch) -> Loss:
        hidden = self.policy.hidden_states(batch).values
        return Loss({"preference": super().loss(batch).terms["preference"] + 1e-3 * hidden.square().sum()})


class WantsSortedRows(SFTTrainer):
    """Takes the last row for the longest, as it is where rows are grouped by length."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        lengths = batch.prompt_tokens()
        fits = (lengths <= lengths[-1])[batch.owner]
        return Loss({"nll": -(self.policy.response_logps(batch) * fits).sum()})


class CountsPlaces(SFTTrainer):
    """Weighs a row by its place in the micro-batch."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        places: Tensor = 1.0 + torch.arange(batch.num_responses, device=batch.device)
        return Loss({"nll": -(self.policy.response_logps(batch) * places).sum()})


class ClimbsUp(SFTTrainer):
    """Has the sign of its gradient wrong."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        nll = super().loss(batch).terms["nll"]
        return Loss({"nll": 2 * nll.detach() - nll})


class ForgetsEmptyShares(SFTTrainer):
    """Attaches nothing where a process has no rows."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            if batch.num_prompts:
                yield batch.attach(per_prompt={"first": torch.ones(batch.num_prompts)})
            else:
                yield batch


class GathersWithinRows(SFTTrainer):
    """Gathers once a row, so that processes with unequal shares wait for each other for ever."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            means = [sum(run.gather(row)) for row in batch.rows]
            yield batch.attach(per_prompt={"mean": torch.tensor(means, dtype=torch.float32)})


class OwnMean(SFTTrainer):
    """Weighs responses by a mean over its own process's rows alone."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            lengths = batch.response_lengths.float()
            yield batch.attach(per_response={"scale": lengths / lengths.mean()})

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": -(self.policy.response_logps(batch) * batch["scale"]).sum()})
