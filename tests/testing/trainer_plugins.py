"""Trainers to try the contract on: a sound online one, and broken ones, each with one fault that people make."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from rlhf_plugins.trainers.dpo import DPOTrainer
from rlhf_plugins.trainers.sft import SFTConfig, SFTTrainer
from torch import Tensor, nn

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import TrainingStage
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.trainer import FROZEN, TRAINED, Evaluation, Loss, Trainer, Window
from rlhf_core.models import PolicyModel, Reference
from rlhf_core.training.context import RunContext
from rlhf_core.training.loader import Loader


class OnlineOptions(OnlineConfig):
    """Options of the sound online method."""

    clip: float = Field(
        0.2, gt=0, description="How far a token's ratio may be from 1; larger trusts old rollouts more."
    )
    kl_weight: float = Field(0.0, ge=0, description="Weight of the KL to the start; larger stays nearer to it.")
    learn_from_cut: bool = Field(True, description="Whether completions that the limit cut off are in the loss.")


class Online(Trainer[OnlineOptions]):
    """Clipped policy gradient on groups of its own completions, several passes a rollout."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY
    Config = OnlineOptions
    roles: ClassVar = {"policy": TRAINED, "reference": FROZEN}
    splits_groups = True

    def windows_per_batch(self) -> int:
        return self.config.rollout_epochs * self.config.minibatches

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            rollout = self.rollout(batch, run)
            for epoch in range(self.config.rollout_epochs):
                parts = run.minibatches(rollout, self.config.minibatches)
                for number, part in enumerate(parts):
                    yield Window(part, last=(epoch, number) == (self.config.rollout_epochs - 1, len(parts) - 1))

    def draw(self, batch: Batch, run: RunContext) -> list[list[Completion]]:
        return run.engine.generate(batch, self.config.group_size, self.config.generation)

    def rollout(self, batch: Batch, run: RunContext) -> Batch:
        completions = self.draw(batch, run)
        rollout = Batch.from_completions(batch, completions)
        rewards = run.score(batch, completions).total
        if not self.config.learn_from_cut:
            rollout = replace(rollout, loss_mask=rollout.loss_mask & ~rollout["truncated"][:, None])
        return rollout.attach(
            per_response={"advantage": self.advantages(rewards, rollout, run)},
            per_token={"ref_logps": self.reference.token_logps(rollout, temperature=self.temperature)},
        )

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        groups = rewards.view(rollout.num_prompts, self.config.group_size)
        return (groups - groups.mean(dim=1, keepdim=True)).flatten()

    @property
    def temperature(self) -> float:
        return self.config.generation.temperature

    def weights(self, batch: Batch) -> Mapping[str, float]:
        weights: dict[str, float] = {"gain": batch.num_loss_tokens}
        return weights | ({"kl": batch.num_loss_tokens} if self.config.kl_weight else {})

    def logps(self, batch: Batch) -> Tensor:
        return self.policy.token_logps(batch, temperature=self.temperature)

    def ratio(self, logps: Tensor, batch: Batch) -> Tensor:
        return ((logps - batch["sampled_logps"]) * batch.loss_mask).exp()

    def kl(self, logps: Tensor, batch: Batch) -> Tensor:
        return (logps - batch["ref_logps"]).square() / 2

    def loss(self, batch: Batch) -> Loss:
        logps, mask, advantage = self.logps(batch), batch.loss_mask, batch["advantage"][:, None]
        ratio, clip = self.ratio(logps, batch), self.config.clip
        mass = batch["kept_mass"]
        gain = mass * torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
        terms = {"gain": -(gain * mask).sum()}
        if self.config.kl_weight:
            terms["kl"] = self.config.kl_weight * (self.kl(logps, batch) * mask).sum()
        return Loss(terms, {"ratio": ((ratio.detach() * mask).sum(), mask.sum())})

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        completions = self.draw(batch, run)
        rewards = run.score(batch, completions).total.view(batch.num_prompts, -1)
        return Evaluation(metrics={"score": (rewards.sum(dim=1), torch.full((batch.num_prompts,), rewards.shape[1]))})


class OnlineOverAConstant(Online):
    """The same over the longest completion that there may be, as Dr. GRPO has it."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY

    def weights(self, batch: Batch) -> Mapping[str, float]:
        weight = float(batch.num_responses * self.config.generation.max_new_tokens)
        return dict.fromkeys(super().weights(batch), weight)


class OnlineOverTheStep(Online):
    """The same with a baseline and a deviation of the whole step."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        rows = [rollout.rows[owner] for owner in rollout.owner.tolist()]
        return run.over_step(lambda whole: (whole - whole.mean()) / (whole.std() + 1e-6), rewards, rows=rows)


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


# Denominators


class DoubleTokens(SFTTrainer):
    """Counts each token twice."""

    api = 1
    record = "sft"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": 2.0 * batch.num_loss_tokens}


class PromptTokens(SFTTrainer):
    """Counts prompts' tokens, which aren't in the loss."""

    api = 1
    record = "sft"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": batch.num_tokens}


class TokensOfResponses(SFTTrainer):
    """Counts the responses' tokens, in the loss mask or not."""

    api = 1
    record = "sft"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": float(batch.response_lengths.sum())}


class OnePerMicroBatch(SFTTrainer):
    """Gives what a micro-batch should count for in place of what it holds."""

    api = 1
    record = "sft"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": 1.0}


class ResponsesOfPairs(DPOTrainer):
    """Averages a loss on pairs over responses."""

    api = 1
    record = "preference"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"preference": batch.num_responses}


class PromptsOfGroups(Online):
    """Averages a sum over completions over prompts."""

    api = 1
    record = "prompt"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"gain": float(batch.num_prompts)}


# Gradients


class ReadsTheStartWithGradient(DPOTrainer):
    """Keeps a copy of the policy by itself, and reads it in the loss."""

    api = 1
    record = "preference"

    def build(self, loader: Loader) -> Mapping[str, nn.Module | Reference]:
        models = super().build(loader)
        self.start = copy.deepcopy(models["policy"])
        return models

    def loss(self, batch: Batch) -> Loss:
        start = self.start.response_logps(batch)  # type: ignore[operator]
        return super().loss(replace(batch, per_response={**batch.per_response, "ref_logps": start}))


class AttachesTheGraph(SFTTrainer):
    """Attaches log-probabilities that still hang on the policy."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            with torch.enable_grad():
                logps = self.policy.response_logps(batch)
            yield batch.attach(per_response={"logps": logps})


class KeepsTheGraph(SFTTrainer):
    """Keeps the size of the weights at the rollout, with its graph."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            with torch.enable_grad():
                self.size = torch.stack([p.square().sum() for p in self.policy.parameters()]).sum()
            yield batch

    def loss(self, batch: Batch) -> Loss:
        nll = super().loss(batch).terms["nll"]
        return Loss({"nll": nll + 1e-3 * batch.num_loss_tokens * self.size})


class FlatKL(Online):
    """Adds a KL that has no gradient."""

    api = 1
    record = "prompt"

    def kl(self, logps: Tensor, batch: Batch) -> Tensor:
        return super().kl(logps.detach(), batch)


class FlatKLAlone(FlatKL):
    """Adds a KL that has no gradient, and fails without it."""

    api = 1
    record = "prompt"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"gain": batch.num_loss_tokens / bool(self.config.kl_weight), "kl": batch.num_loss_tokens}


class RatioOfOne(Online):
    """Takes the policy of now for the one that drew the completions."""

    api = 1
    record = "prompt"

    def ratio(self, logps: Tensor, batch: Batch) -> Tensor:
        return ((logps - logps.detach()) * batch.loss_mask).exp()


# Tokens


class ScoresWhatItSees(SFTTrainer):
    """Reads a token's log-probability where the token has been seen."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        states = self.policy.hidden_states(batch)
        logps = self.policy.logits(states.at(batch.loss_mask)).log_softmax(dim=-1)
        return Loss({"nll": -logps.gather(1, batch.response_ids[batch.loss_mask][:, None]).sum()})


class LosesTheEnd(SFTTrainer):
    """Takes the end token for padding."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        words = batch.loss_mask & (batch.response_ids != self.policy.tokenizer.eos_token_id)
        return Loss({"nll": -(self.policy.token_logps(batch) * words).sum()})


class LosesTheFirst(SFTTrainer):
    """Shifts what was shifted already."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": -self.policy.token_logps(batch)[:, 1:].sum()})


class MasksTheEnd(Online):
    """Leaves the end token out of the mask."""

    api = 1
    record = "prompt"

    def rollout(self, batch: Batch, run: RunContext) -> Batch:
        rollout = super().rollout(batch, run)
        last = torch.arange(rollout.response_ids.shape[1]) == rollout.response_lengths[:, None] - 1
        return replace(rollout, loss_mask=rollout.loss_mask & ~last)


class CutsTheEnd(Online):
    """Makes its batch of completions without their end tokens."""

    api = 1
    record = "prompt"

    def draw(self, batch: Batch, run: RunContext) -> list[list[Completion]]:
        return [[self.cut(one) for one in group] for group in super().draw(batch, run)]

    def cut(self, one: Completion) -> Completion:
        if one.stop_reason != "end":
            return one
        kept = {name: getattr(one, name)[:-1] for name in ("ids", "logprobs", "raw_logprobs", "kept_mass")}
        return replace(one, **kept)


class ScoresAtOne(Online):
    """Draws at a temperature and scores without it."""

    api = 1
    record = "prompt"

    @property
    def temperature(self) -> float:
        return 1.0


class RatioToTheRaw(Online):
    """Takes the log-probabilities without temperature for those of the draw."""

    api = 1
    record = "prompt"

    def ratio(self, logps: Tensor, batch: Batch) -> Tensor:
        return ((logps - batch["raw_logps"]) * batch.loss_mask).exp()


# Owners


class SwapsTheReference(DPOTrainer):
    """Holds each response of a pair against the reference of the other one."""

    api = 1
    record = "preference"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            logps = self.reference.response_logps(batch).view(-1, 2).flip(1).flatten()
            yield batch.attach(per_response={"ref_logps": logps})


# The sign


class Unlearns(SFTTrainer):
    """Makes responses less likely, so that its loss falls all the same."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": -super().loss(batch).terms["nll"]})


class PrefersTheRejected(DPOTrainer):
    """Takes a pair the wrong way round."""

    api = 1
    record = "preference"

    def loss(self, batch: Batch) -> Loss:
        return super().loss(batch.take([number ^ 1 for number in range(batch.num_responses)]))


class LowersRewards(Online):
    """Has the sign of its gain wrong."""

    api = 1
    record = "prompt"

    def loss(self, batch: Batch) -> Loss:
        loss = super().loss(batch)
        return Loss({**loss.terms, "gain": -loss.terms["gain"]}, loss.metrics)


# Rewards and owners


class NoAdvantage(Online):
    """Raises every completion alike."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        return torch.ones_like(rewards)


class RewardsByPlace(Online):
    """Takes the rewards as if each prompt's first completions came first."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        groups = rewards.view(self.config.group_size, rollout.num_prompts).t()
        return (groups - groups.mean(dim=1, keepdim=True)).flatten()


class BaselineOfOthers(Online):
    """Takes the mean over the wrong axis."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        groups = rewards.view(rollout.num_prompts, self.config.group_size)
        return (groups - groups.mean(dim=0, keepdim=True)).flatten()


class RewardsOfTheNext(Online):
    """Gives each completion its neighbour's reward."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        return super().advantages(rewards.roll(1), rollout, run)


# Draws


class ConstantSeeds(Online):
    """Has the same seeds for each row."""

    api = 1
    record = "prompt"

    def draw(self, batch: Batch, run: RunContext) -> list[list[Completion]]:
        seeds = [list(range(self.config.group_size))] * batch.num_prompts
        return run.engine.generate(batch, self.config.group_size, self.config.generation, seeds=seeds)


class OneSeedOfAGroup(Online):
    """Has one seed for all completions of a row."""

    api = 1
    record = "prompt"

    def draw(self, batch: Batch, run: RunContext) -> list[list[Completion]]:
        seeds = [[row + 1000 * run.step] * self.config.group_size for row in batch.rows]
        return run.engine.generate(batch, self.config.group_size, self.config.generation, seeds=seeds)


class SeedsWithoutStep(Online):
    """Has the same seeds in each step."""

    api = 1
    record = "prompt"

    def draw(self, batch: Batch, run: RunContext) -> list[list[Completion]]:
        size = self.config.group_size
        seeds = [[size * row + number for number in range(size)] for row in batch.rows]
        return run.engine.generate(batch, size, self.config.generation, seeds=seeds)


# Processes


class WhitensAlone(Online):
    """Scales advantages by the deviation of its own process's."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        advantages = super().advantages(rewards, rollout, run)
        return advantages / (advantages.square().mean().sqrt() + 1e-6)


class GathersPerRow(Online):
    """Gathers once for each prompt."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        for row in rollout.rows:
            run.gather(row)
        return super().advantages(rewards, rollout, run)


class LogsMeans(Online):
    """Reports a mean, for which another process's counts as much."""

    api = 1
    record = "prompt"

    def rollout(self, batch: Batch, run: RunContext) -> Batch:
        rollout = super().rollout(batch, run)
        if rollout.num_responses:
            run.log("length", float(rollout.response_lengths.float().mean()))
        return rollout


# Options


class IgnoresClip(Online):
    """Has a number of its own where an option should stand."""

    api = 1
    record = "prompt"

    def loss(self, batch: Batch) -> Loss:
        logps, mask, advantage = self.logps(batch), batch.loss_mask, batch["advantage"][:, None]
        ratio = self.ratio(logps, batch)
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        terms = {"gain": -(gain * mask).sum()}
        if self.config.kl_weight:
            terms["kl"] = self.config.kl_weight * (self.kl(logps, batch) * mask).sum()
        return Loss(terms)


class IgnoresTopK(Online):
    """Hands on only some of the options of generation."""

    api = 1
    record = "prompt"

    def draw(self, batch: Batch, run: RunContext) -> list[list[Completion]]:
        sampling = self.config.generation.model_copy(update={"top_k": 0})
        return run.engine.generate(batch, self.config.group_size, sampling)


class SmoothedConfig(SFTConfig):
    """An option that nothing reads."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of other tokens; larger smooths more.")


class IgnoresSmoothing(SFTTrainer):
    """Has an option that nothing reads."""

    api = 1
    record = "sft"
    Config = SmoothedConfig


# Windows, evaluations, runs


class CountsBatches(Online):
    """Says one window a batch, however many passes there are."""

    api = 1
    record = "prompt"

    def windows_per_batch(self) -> int:
        return 1


class EndsEachWindow(Online):
    """Calls every window its rollout's last."""

    api = 1
    record = "prompt"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for window in super().experience(stream, run):
            yield window.batch if isinstance(window, Window) else window


class HeldOutTwice(SFTTrainer):
    """Makes two passes over each batch, held-out ones too."""

    api = 1
    record = "sft"

    def windows_per_batch(self) -> int:
        return 2

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            yield Window(batch, last=False)
            yield Window(batch)


class RemembersHeldOutRows(SFTTrainer):
    """Remembers what it has seen, held-out rows too."""

    api = 1
    record = "sft"
    seen = 0

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            self.seen += sum(run.gather(batch.num_prompts))
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class EvaluatesItsEpochs(Online):
    """Leaves evaluation to the loss on its windows, of which there are as many as passes."""

    api = 1
    record = "prompt"
    evaluate = Trainer.evaluate  # type: ignore[assignment]


class EvaluatesMeans(Online):
    """Gives an evaluation's mean for its sum."""

    api = 1
    record = "prompt"

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        rewards = run.score(batch, self.draw(batch, run)).total
        return Evaluation(metrics={"score": (rewards.mean(), 1.0)})


class RemembersOne(SFTTrainer):
    """Looks back on three windows, and saves the last of them."""

    api = 1
    record = "sft"
    seen: tuple[float, ...] = ()

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            lengths = run.gather(batch.response_lengths)
            self.seen = (*self.seen, float(lengths.float().mean()))[-3:]
            scale = sum(self.seen) / len(self.seen) / 20
            yield batch.attach(per_response={"scale": torch.full((batch.num_responses,), scale)})

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": -(self.policy.response_logps(batch) * batch["scale"]).sum()})

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen[-1:])}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = tuple(state["seen"])


class EveryFourth(SFTTrainer):
    """Learns less from every fourth window, by a count that it doesn't save."""

    api = 1
    record = "sft"
    count = 0

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            self.count += 1
            scale = 0.5 if self.count % 4 == 0 else 1.0
            yield batch.attach(per_response={"scale": torch.full((batch.num_responses,), scale)})

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": -(self.policy.response_logps(batch) * batch["scale"]).sum()})
