"""Trainers to test the contract with: a correct online method, and methods that each have one common fault."""

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
    """Options of the correct online method."""

    clip: float = Field(
        0.2, gt=0, description="How far a token's ratio may be from 1; larger trusts old rollouts more."
    )
    kl_weight: float = Field(0.0, ge=0, description="Weight of the KL to the start; larger stays nearer to it.")
    learn_from_cut: bool = Field(True, description="Whether truncated completions are in the loss.")


class Online(Trainer[OnlineOptions]):
    """Clipped policy gradient on groups of completions, with several epochs over each rollout."""

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
    """The same, averaged over the maximal length of completions, as in Dr. GRPO."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY

    def weights(self, batch: Batch) -> Mapping[str, float]:
        weight = float(batch.num_responses * self.config.generation.max_new_tokens)
        return dict.fromkeys(super().weights(batch), weight)


class OnlineOverTheStep(Online):
    """The same, with advantages that are standardised over the whole step."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        rows = [rollout.rows[owner] for owner in rollout.owner.tolist()]
        return run.over_step(lambda whole: (whole - whole.mean()) / (whole.std() + 1e-6), rewards, rows=rows)


class Means(SFTTrainer):
    """Returns the mean over a micro-batch instead of the sum."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": super().loss(batch).terms["nll"] / batch.num_loss_tokens})


class LooksAtPadding(SFTTrainer):
    """Computes a response's length by comparing its ids with the padding id."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        lengths = (batch.response_ids != self.policy.tokenizer.pad_token_id).sum(dim=1)
        return Loss({"nll": -(self.policy.response_logps(batch) / lengths).sum()})


class ForgetsItsState(SFTTrainer):
    """Weighs later windows less, by a count that it doesn't save."""

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
    """Detaches its loss."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": super().loss(batch).terms["nll"].detach()})


class OtherHeader(SFTTrainer):
    """Its record type in the source differs from the one at run time."""

    api = 1
    record = "unpaired"


OtherHeader.record = "sft"


class BareConfig(SFTConfig):
    """An option without a description."""

    strength: float = 1.0


class BareOption(SFTTrainer):
    """Has an option without a description."""

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
    """Its configuration changes when it is written and read."""

    api = 1
    record = "sft"
    Config = LossyConfig


class OpenConfig(SFTConfig, extra="allow"):
    """Accepts any key, so that a misspelled one isn't refused."""


class OpenOptions(SFTTrainer):
    """Its configuration accepts unknown options."""

    api = 1
    record = "sft"
    Config = OpenConfig


class StageAsText(SFTTrainer):
    """Gives its stage as text."""

    api = 1
    record = "sft"
    stage = "warmup"  # type: ignore[assignment]


class OtherTerms(SFTTrainer):
    """Weighs a term that `loss` doesn't return."""

    api = 1
    record = "sft"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"loss": batch.num_loss_tokens}


class WeighsByModel(SFTTrainer):
    """Computes its weights from the model's parameters."""

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
    """Leaves the policy in evaluation mode."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        self.policy.eval()
        return super().loss(batch)


class Seeds(SFTTrainer):
    """Seeds the global random generator in `loss`."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        torch.manual_seed(0)
        return super().loss(batch)


class SeedsExperience(SFTTrainer):
    """Seeds the global random generator in `experience`."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            torch.manual_seed(0)
            yield batch


class MovesTheFrozen(SFTTrainer):
    """Moves a frozen model towards the policy."""

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
    """Uses the current policy as the reference."""

    api = 1
    record = "preference"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            self.reference = Reference.create(self.policy)
            yield batch.attach(per_response={"ref_logps": self.reference.response_logps(batch)})

    def loss(self, batch: Batch) -> Loss:
        # Without metrics: an accuracy among ties would depend on rounding.
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
    """Sums over all positions that the model computed, padding and prompts included."""

    api = 1
    record = "preference"

    def loss(self, batch: Batch) -> Loss:
        hidden = self.policy.hidden_states(batch).values
        return Loss({"preference": super().loss(batch).terms["preference"] + 1e-3 * hidden.square().sum()})


class WantsSortedRows(SFTTrainer):
    """Assumes that the last row is the longest, as it is where rows are grouped by length."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        lengths = batch.prompt_tokens()
        fits = (lengths <= lengths[-1])[batch.owner]
        return Loss({"nll": -(self.policy.response_logps(batch) * fits).sum()})


class CountsPlaces(SFTTrainer):
    """Weighs a response by its position in the micro-batch."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        places: Tensor = 1.0 + torch.arange(batch.num_responses, device=batch.device)
        return Loss({"nll": -(self.policy.response_logps(batch) * places).sum()})


class ClimbsUp(SFTTrainer):
    """Has a gradient of the wrong sign."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        nll = super().loss(batch).terms["nll"]
        return Loss({"nll": 2 * nll.detach() - nll})


class ForgetsEmptyShares(SFTTrainer):
    """Attaches no column where a process has no rows."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            if batch.num_prompts:
                yield batch.attach(per_prompt={"first": torch.ones(batch.num_prompts)})
            else:
                yield batch


class GathersWithinRows(SFTTrainer):
    """Gathers once per row, so that processes with unequal numbers of rows wait for ever."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            means = [sum(run.gather(row)) for row in batch.rows]
            yield batch.attach(per_prompt={"mean": torch.tensor(means, dtype=torch.float32)})


class OwnMean(SFTTrainer):
    """Weighs responses by a mean over the rows of its process instead of the step."""

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
    """Counts tokens of prompts, which aren't in the loss."""

    api = 1
    record = "sft"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": batch.num_tokens}


class TokensOfResponses(SFTTrainer):
    """Counts all tokens of responses, in the loss mask or not."""

    api = 1
    record = "sft"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": float(batch.response_lengths.sum())}


class OnePerMicroBatch(SFTTrainer):
    """Returns a constant weight per micro-batch instead of what it holds."""

    api = 1
    record = "sft"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": 1.0}


class ResponsesOfPairs(DPOTrainer):
    """Averages a loss of pairs over responses."""

    api = 1
    record = "preference"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"preference": batch.num_responses}


class PromptsOfGroups(Online):
    """Averages a sum over completions by the number of prompts."""

    api = 1
    record = "prompt"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"gain": float(batch.num_prompts)}


# Gradients


class ReadsTheStartWithGradient(DPOTrainer):
    """Keeps a copy of the policy outside of its roles, and computes with it in `loss`."""

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
    """Attaches log-probabilities with their graph."""

    api = 1
    record = "sft"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            with torch.enable_grad():
                logps = self.policy.response_logps(batch)
            yield batch.attach(per_response={"logps": logps})


class KeepsTheGraph(SFTTrainer):
    """Keeps the norm of the weights from `experience`, with its graph."""

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
    """Adds a KL term without gradients."""

    api = 1
    record = "prompt"

    def kl(self, logps: Tensor, batch: Batch) -> Tensor:
        return super().kl(logps.detach(), batch)


class FlatKLAlone(FlatKL):
    """Adds a KL term without gradients, and fails at weight 0."""

    api = 1
    record = "prompt"

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"gain": batch.num_loss_tokens / bool(self.config.kl_weight), "kl": batch.num_loss_tokens}


class RatioOfOne(Online):
    """Divides by the current policy instead of the one that drew the completions."""

    api = 1
    record = "prompt"

    def ratio(self, logps: Tensor, batch: Batch) -> Tensor:
        return ((logps - logps.detach()) * batch.loss_mask).exp()


# Tokens


class ScoresWhatItSees(SFTTrainer):
    """Reads a token's log-probability at its own position, after the model has seen it."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        states = self.policy.hidden_states(batch)
        logps = self.policy.logits(states.at(batch.loss_mask)).log_softmax(dim=-1)
        return Loss({"nll": -logps.gather(1, batch.response_ids[batch.loss_mask][:, None]).sum()})


class LosesTheEnd(SFTTrainer):
    """Leaves the end token out of the loss, as if it were padding."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        words = batch.loss_mask & (batch.response_ids != self.policy.tokenizer.eos_token_id)
        return Loss({"nll": -(self.policy.token_logps(batch) * words).sum()})


class LosesTheFirst(SFTTrainer):
    """Shifts log-probabilities that are already aligned with their tokens."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": -self.policy.token_logps(batch)[:, 1:].sum()})


class MasksTheEnd(Online):
    """Leaves the end token out of the loss mask."""

    api = 1
    record = "prompt"

    def rollout(self, batch: Batch, run: RunContext) -> Batch:
        rollout = super().rollout(batch, run)
        last = torch.arange(rollout.response_ids.shape[1]) == rollout.response_lengths[:, None] - 1
        return replace(rollout, loss_mask=rollout.loss_mask & ~last)


class CutsTheEnd(Online):
    """Removes the end tokens of completions."""

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
    """Samples at a temperature and computes the loss at temperature 1."""

    api = 1
    record = "prompt"

    @property
    def temperature(self) -> float:
        return 1.0


class RatioToTheRaw(Online):
    """Divides by the log-probabilities at temperature 1 instead of those of sampling."""

    api = 1
    record = "prompt"

    def ratio(self, logps: Tensor, batch: Batch) -> Tensor:
        return ((logps - batch["raw_logps"]) * batch.loss_mask).exp()


# Owners


class SwapsTheReference(DPOTrainer):
    """Exchanges the reference's log-probabilities of chosen and rejected."""

    api = 1
    record = "preference"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            logps = self.reference.response_logps(batch).view(-1, 2).flip(1).flatten()
            yield batch.attach(per_response={"ref_logps": logps})


# The sign


class Unlearns(SFTTrainer):
    """Makes responses less likely, by which its loss falls too."""

    api = 1
    record = "sft"

    def loss(self, batch: Batch) -> Loss:
        return Loss({"nll": -super().loss(batch).terms["nll"]})


class PrefersTheRejected(DPOTrainer):
    """Exchanges chosen and rejected."""

    api = 1
    record = "preference"

    def loss(self, batch: Batch) -> Loss:
        return super().loss(batch.take([number ^ 1 for number in range(batch.num_responses)]))


class LowersRewards(Online):
    """Lowers rewards instead of raising them."""

    api = 1
    record = "prompt"

    def loss(self, batch: Batch) -> Loss:
        loss = super().loss(batch)
        return Loss({**loss.terms, "gain": -loss.terms["gain"]}, loss.metrics)


# Rewards and owners


class NoAdvantage(Online):
    """Gives every completion the same advantage."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        return torch.ones_like(rewards)


class RewardsByPlace(Online):
    """Reads rewards as if they were ordered by number in the group, not by prompt."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        groups = rewards.view(self.config.group_size, rollout.num_prompts).t()
        return (groups - groups.mean(dim=1, keepdim=True)).flatten()


class BaselineOfOthers(Online):
    """Averages rewards over prompts instead of over the group."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        groups = rewards.view(rollout.num_prompts, self.config.group_size)
        return (groups - groups.mean(dim=0, keepdim=True)).flatten()


class RewardsOfTheNext(Online):
    """Gives each completion the reward of the one before it."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        return super().advantages(rewards.roll(1), rollout, run)


# Draws


class ConstantSeeds(Online):
    """Uses the same seeds for every row."""

    api = 1
    record = "prompt"

    def draw(self, batch: Batch, run: RunContext) -> list[list[Completion]]:
        seeds = [list(range(self.config.group_size))] * batch.num_prompts
        return run.engine.generate(batch, self.config.group_size, self.config.generation, seeds=seeds)


class OneSeedOfAGroup(Online):
    """Uses one seed for all completions of a row."""

    api = 1
    record = "prompt"

    def draw(self, batch: Batch, run: RunContext) -> list[list[Completion]]:
        seeds = [[row + 1000 * run.step] * self.config.group_size for row in batch.rows]
        return run.engine.generate(batch, self.config.group_size, self.config.generation, seeds=seeds)


class SeedsWithoutStep(Online):
    """Uses the same seeds in every step."""

    api = 1
    record = "prompt"

    def draw(self, batch: Batch, run: RunContext) -> list[list[Completion]]:
        size = self.config.group_size
        seeds = [[size * row + number for number in range(size)] for row in batch.rows]
        return run.engine.generate(batch, size, self.config.generation, seeds=seeds)


# Processes


class WhitensAlone(Online):
    """Scales advantages by their deviation over its process instead of the step."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        advantages = super().advantages(rewards, rollout, run)
        return advantages / (advantages.square().mean().sqrt() + 1e-6)


class GathersPerRow(Online):
    """Gathers once per prompt."""

    api = 1
    record = "prompt"

    def advantages(self, rewards: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        for row in rollout.rows:
            run.gather(row)
        return super().advantages(rewards, rollout, run)


class LogsMeans(Online):
    """Reports a mean, so that processes count equally whatever their numbers of rows."""

    api = 1
    record = "prompt"

    def rollout(self, batch: Batch, run: RunContext) -> Batch:
        rollout = super().rollout(batch, run)
        if rollout.num_responses:
            run.log("length", float(rollout.response_lengths.float().mean()))
        return rollout


# Options


class IgnoresClip(Online):
    """Uses a constant instead of its option `clip`."""

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
    """Ignores the option `generation.top_k`."""

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
    """Declares one window per batch, whatever the number of epochs."""

    api = 1
    record = "prompt"

    def windows_per_batch(self) -> int:
        return 1


class EndsEachWindow(Online):
    """Marks every window as the last of its rollout."""

    api = 1
    record = "prompt"

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for window in super().experience(stream, run):
            yield window.batch if isinstance(window, Window) else window


class HeldOutTwice(SFTTrainer):
    """Yields each batch twice, held-out ones too."""

    api = 1
    record = "sft"

    def windows_per_batch(self) -> int:
        return 2

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            yield Window(batch, last=False)
            yield Window(batch)


class RemembersHeldOutRows(SFTTrainer):
    """Counts the rows it has seen, held-out ones too."""

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
    """Evaluates by the loss of its windows, of which several hold the same rows."""

    api = 1
    record = "prompt"
    evaluate = Trainer.evaluate  # type: ignore[assignment]


class EvaluatesMeans(Online):
    """Returns the mean of an evaluation instead of sum and count."""

    api = 1
    record = "prompt"

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        rewards = run.score(batch, self.draw(batch, run)).total
        return Evaluation(metrics={"score": (rewards.mean(), 1.0)})


class RemembersOne(SFTTrainer):
    """Depends on the last three windows, and saves only the last one."""

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
    """Weighs every fourth window less, by a count that it doesn't save."""

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
