"""Proximal policy optimisation: a policy and a value model, trained on the policy's own completions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlhf_core.plugin import (
    CLIPS,
    CORRECTIONS,
    LOSS_AGGREGATIONS,
    RATIOS,
    TRAINED,
    Batch,
    Evaluation,
    HiddenStates,
    Loader,
    Loss,
    PartTable,
    PolicyGradientConfig,
    PolicyModel,
    PolicyTerms,
    Reference,
    Role,
    RunContext,
    TrainedModelConfig,
    Trainer,
    TrainingStage,
    ValueModel,
    Window,
    adapted_kl_weight,
    clipped_tokens,
    explained_variance,
    generalized_advantages,
    logprob_gaps,
    online_metrics,
    token_rewards,
    value_loss,
    whitened,
)


class ValueModelConfig(TrainedModelConfig):
    """The value model: where it starts, and how it learns. A path alone stands for `{path: …}`."""

    path: str | None = Field(  # type: ignore[assignment]
        None,
        min_length=1,
        description="Path or hub name of what the value model starts from: a language model, a reward model, or a saved value"
        " model, which keeps its head; null starts from a copy of the run's `model`.",
    )
    head: Literal["new", "reward"] = Field(
        "new",
        description="The head that it starts with: `new`, with values of 0; `reward`, that of the reward model at `path`, whose"
        " scores are then the first values.",
    )
    share_backbone: bool = Field(
        False,
        description="Put the value head on the policy: one forward pass and one backbone for both, which takes half the memory;"
        " the values' gradient then changes the policy, too. Of the model at `path` only the head is used.",
    )

    @model_validator(mode="after")
    def _options_are_used(self) -> ValueModelConfig:
        if self.head == "reward" and self.path is None:
            raise ValueError("head reward needs `path`, a reward model's")
        if self.lora is not None and (self.share_backbone or self.path is None):
            raise ValueError(
                "the value model trains under the run's `lora` where its backbone is the policy's or a copy of it"
            )
        if self.precision is not None and (self.share_backbone or self.path is None):
            raise ValueError(
                "the value model has the run's `precision` where its backbone is the policy's or a copy of it"
            )
        return self


class PPOConfig(PolicyGradientConfig):
    """Options of proximal policy optimisation."""

    tables: ClassVar[Mapping[str, PartTable]] = {
        "ratio": RATIOS,
        "clip": CLIPS,
        "correction": CORRECTIONS,
        "aggregation": LOSS_AGGREGATIONS,
    }

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size; larger learns faster and may diverge.")
    group_size: int = Field(
        1, ge=1, description="Completions per prompt; larger learns more from each prompt and costs more."
    )
    rollout_epochs: int = Field(
        4,
        ge=1,
        description="Passes over each rollout; larger learns more from it, further from the policy that sampled it.",
    )
    value: ValueModelConfig = Field(
        default_factory=ValueModelConfig, description="The value model, which predicts what a response will bring."
    )
    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token; smaller counts late rewards less.")
    gae_lambda: float = Field(
        0.95,
        ge=0,
        le=1,
        description="1 takes whole returns; smaller trusts the value model more: less variance, more bias.",
    )
    ratio: str = RATIOS.field("token")
    ratio_options: dict[str, Any] = RATIOS.options_field()
    clip: str = CLIPS.field("ppo")
    clip_options: dict[str, Any] = CLIPS.options_field()
    correction: str = CORRECTIONS.field("none")
    correction_options: dict[str, Any] = CORRECTIONS.options_field()
    aggregation: str = LOSS_AGGREGATIONS.field("token")
    aggregation_options: dict[str, Any] = LOSS_AGGREGATIONS.options_field()
    value_clip: float | None = Field(
        0.2,
        gt=0,
        description="Most that a value moves in one rollout, in units of the reward; larger learns faster, null: any.",
    )
    value_weight: float = Field(
        0.5,
        gt=0,
        description="Weight of the values' loss; larger fits values more closely where the backbone is shared.",
    )
    whiten_rewards: bool = Field(
        False,
        description="Divide each rollout's rewards by their deviation; true makes `kl_weight` and `value_clip` relative.",
    )
    whiten_advantages: bool = Field(
        True,
        description="Give each rollout's advantages mean 0 and standard deviation 1; false takes them as they are.",
    )
    truncated: Literal["bootstrap", "score", "mask"] = Field(
        "bootstrap",
        description="What a response counts for that the token limit truncated: `bootstrap`, the value at its end, as it isn't"
        " over; `score`, its reward as it stands; `mask`, nothing: it isn't trained on.",
    )
    kl_weight: float = Field(
        0.05,
        ge=0,
        description="Penalty per nat and token on leaving the reference, subtracted from rewards; larger stays nearer to it, 0"
        " needs no reference.",
    )
    kl_target: float | None = Field(
        None,
        gt=0,
        description="KL to the reference per token, in nats, that `kl_weight` is adapted to; larger lets the policy go further,"
        " null keeps the weight fixed.",
    )
    kl_gain: float = Field(
        0.1, gt=0, lt=5, description="How fast `kl_weight` follows `kl_target`; larger adapts faster and may swing."
    )
    reference: Literal["auto", "copy", "adapter_off"] = Field(
        "auto", description="How the reference is kept: a frozen copy, or the base with a fresh adapter off."
    )

    @model_validator(mode="after")
    def _options_are_used(self) -> PPOConfig:
        if self.kl_target is not None and not self.kl_weight:
            raise ValueError("kl_target needs a `kl_weight` above 0 to start from")
        if self.kl_target is None and self.kl_gain != type(self).model_fields["kl_gain"].default:
            raise ValueError("kl_gain needs `kl_target`")
        if (
            self.lora is not None
            and self.lora.quantize != "none"
            and self.value.path is None
            and not self.value.share_backbone
        ):
            raise ValueError(
                "a value model can't be a copy of a quantised model: set `value.share_backbone` or `value.path`"
            )
        return self


class PPOTrainer(Trainer[PPOConfig]):
    """Proximal policy optimisation: rollouts, a value model's advantages, and clipped steps of both models.

    Schulman et al. 2017 (arXiv 1707.06347): the clipped objective, equation 7, and the values' loss of equation 9, without its
    bonus for entropy. The advantages are those of generalised advantage estimation, Schulman et al. 2016 (arXiv 1506.02438); the
    KL penalty inside the rewards is that of Ziegler et al. 2019 (arXiv 1909.08593).
    """

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY
    Config = PPOConfig
    roles: ClassVar = {"policy": TRAINED, "value": TRAINED, "reference": Role(trained=False, optional=True)}
    splits_groups = True
    kl_weight: float
    """The weight of the KL as it is now."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.kl_weight = self.config.kl_weight

    @cached_property
    def parts(self) -> dict[str, Callable[..., Any]]:
        """The parts by kind, with their options set."""
        return self.config.bound_parts()

    @property
    def value(self) -> ValueModel:
        return self.models["value"]  # type: ignore[return-value]

    def build(self, loader: Loader) -> Mapping[str, nn.Module | Reference]:
        policy = loader.main(PolicyModel)
        models: dict[str, nn.Module | Reference] = {"policy": policy, "value": self._value_model(loader, policy)}
        if self.config.kl_weight or self.config.kl_budget:
            models["reference"] = loader.reference(policy, self.config.reference)
        return models

    def _value_model(self, loader: Loader, policy: PolicyModel) -> ValueModel:
        """Return the value model: on the policy's backbone, on a copy of it, or from a path."""
        options, seed = self.config.value, self.config.seed
        if options.path is not None and not options.share_backbone:
            return loader.load("value", ValueModel, options, head=options.head, seed=seed)
        loader.learning_rate("value", options.learning_rate_factor)
        if not options.share_backbone:
            return ValueModel.adopt(copy.deepcopy(policy), seed=seed)
        if options.path is None:
            return ValueModel.on(policy, seed=seed)
        given = ValueModel.from_pretrained(
            options.path,
            new_head=options.head == "reward",
            head=options.head,
            trust_remote_code=options.trust_remote_code,
        )
        return ValueModel.on(policy, head=given.head)

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterator[Window]:
        """Complete each batch's prompts, attach advantages and returns, and divide the rollout into windows."""
        for batch in stream:
            yield from run.windows(self._rollout(batch, run))

    def _rollout(self, batch: Batch, run: RunContext) -> Batch:
        """Return completions with the columns that the update reads, each (R, T).

        Columns: `old_logps`, log π_old before top-p and top-k, nats, and `ref_logps`, the reference's; `old_values`; `returns`;
        `advantages`; `sample_weights`, what the objective is multiplied by.
        """
        config = self.config
        completions, scores = run.generate_and_score(batch, config.group_size, config.generation)
        rollout = Batch.from_completions(batch, completions)
        mask, truncated = rollout.loss_mask, rollout["truncated"]
        old_logps, values, end_values = self._predictions(rollout, run)
        tokens = {"old_logps": old_logps, "old_values": values}
        # The sum over what top-p and top-k leave out of the objective, too, is what the mass makes of it.
        correction = self.parts["correction"](old_logps, rollout.engine_logps, mask)
        tokens["sample_weights"] = rollout["kept_mass"] * correction
        penalties = torch.zeros_like(old_logps)
        if config.kl_weight or config.kl_budget:
            with run.phase("reference", tokens=rollout.num_tokens):
                ref_logps = self.reference.token_logps(rollout, temperature=config.generation.temperature)
            tokens["ref_logps"], log_ratios = ref_logps, torch.where(mask, old_logps - ref_logps, 0.0)
            penalties = self.kl_weight * log_ratios
            self._adapt_kl_weight(log_ratios, mask, run)
        # What the limit truncated isn't over: the value at its end stands for its reward. Added to its reward, it would make
        # values grow by a reward with each rollout.
        goes_on = truncated & (config.truncated == "bootstrap")
        rewards = token_rewards(self._rewards(scores.total.to(values), ~goes_on, rollout, run), penalties, mask)
        raw = generalized_advantages(
            rewards, values, mask, end_values * goes_on, gamma=config.gamma, lam=config.gae_lambda
        )
        if config.truncated == "mask":
            mask = mask & ~truncated[:, None]
            rollout = replace(rollout, loss_mask=mask)
        tokens["returns"] = torch.where(mask, raw + values, 0.0)
        tokens["advantages"] = self._advantages(raw, rollout, run)
        self._log(values, tokens["returns"], rollout, run)
        teaches = not bool(goes_on.all())  # else values alone are learned from
        return run.record_rollout(rollout.attach(per_token=tokens), tokens["advantages"], teaches=teaches)

    def _predictions(self, rollout: Batch, run: RunContext) -> tuple[Tensor, Tensor, Tensor]:
        """Return log π_old (R, T), values (R, T) and values at the end (R,), by the models as they are.

        The engine's log-probabilities stand for log π_old, without another forward pass, unless the trainer's are needed.
        """

        def predictions(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            states = self.policy.hidden_states(batch)
            return self._logps(batch, states), *self.value.values(batch, states=self._shared(states))

        with run.phase("value", tokens=rollout.num_tokens):
            if not self.config.trainer_computes_old_logps(self.policy.precision):
                values, end_values = run.forward(rollout, self.value.values, axis=("token", "response"))
                return rollout.engine_logps, values, end_values
            logps, values, end_values = run.forward(rollout, predictions, axis=("token", "token", "response"))
            return logps, values, end_values

    def _rewards(self, scores: Tensor, counted: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        """Return (R,) the responses' rewards, 0 where they aren't counted, whitened over those of the step that are."""
        rewards = torch.where(counted, scores, 0.0)
        if self.config.whiten_rewards:
            rows = rollout.response_places[counted.cpu()].tolist()
            rewards[counted] = run.over_step(partial(whitened, keep_mean=True), scores[counted], rows=rows)
        return rewards

    def _adapt_kl_weight(self, log_ratios: Tensor, mask: Tensor, run: RunContext) -> None:
        """Report the rollout's KL to the reference per token, and adapt the weight of its penalty for the next rollout."""
        config = self.config
        run.log("kl_rollout", log_ratios.sum(), mask.sum())
        run.log("kl_weight", self.kl_weight)
        if config.kl_target is None:
            return
        total, tokens = (sum(run.gather(float(sums))) for sums in (log_ratios.sum(), mask.sum()))
        if tokens:
            self.kl_weight = adapted_kl_weight(
                self.kl_weight, total / tokens, target=config.kl_target, gain=config.kl_gain
            )

    def _advantages(self, raw: Tensor, rollout: Batch, run: RunContext) -> Tensor:
        """Return (R, T) advantages, 0 outside the loss mask, whitened over the tokens of the step."""
        mask = rollout.loss_mask
        advantages = torch.where(mask, raw, 0.0)
        if self.config.whiten_advantages:
            rows = rollout.response_places.repeat_interleave(mask.sum(1).cpu()).tolist()  # of each token in the loss
            advantages[mask] = run.over_step(whitened, raw[mask], rows=rows)
        return advantages

    def _log(self, values: Tensor, returns: Tensor, rollout: Batch, run: RunContext) -> None:
        """Report how well values predicted the returns of the rollout."""
        mask = rollout.loss_mask
        run.log("returns", returns.sum(), mask.sum())
        run.log("value_error", ((returns - values) * mask).square().sum(), mask.sum())
        pair = [run.gather(column[mask]) for column in (values, returns)]
        run.log("explained_variance", float(explained_variance(*pair)))

    def _logps(self, batch: Batch, states: HiddenStates) -> Tensor:
        """Return (R, T) token log-probabilities at the temperature that completions are drawn with, nats."""
        return self.policy.token_logps(batch, temperature=self.config.generation.temperature, states=states)

    def _shared(self, states: HiddenStates) -> HiddenStates | None:
        """Return the policy's hidden states where the value model has the same backbone."""
        return states if self.config.value.share_backbone else None

    def aggregation(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens' weights (R, T) and the rows' amounts (R,)."""
        return self.parts["aggregation"](mask, limit=self.config.generation.max_new_tokens)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Both terms are averaged over the same amounts."""
        _, amounts = self.aggregation(batch.loss_mask)
        return dict.fromkeys(("policy", "value"), float(amounts.sum()))

    def loss(self, batch: Batch) -> Loss:
        """Return the policy's objective and the values' loss as sums over tokens, weighted by the aggregation."""
        config, mask, old_logps = self.config, batch.loss_mask, batch["old_logps"]
        states = self.policy.hidden_states(batch)
        logps, values = self._logps(batch, states), self.value.token_values(batch, states=self._shared(states))
        log_ratio = torch.where(mask, logps - old_logps, 0.0)
        terms = PolicyTerms(logps, old_logps, self.parts["ratio"](log_ratio, mask), batch["advantages"], mask)
        token_weights, _ = self.aggregation(mask)
        objective = torch.where(mask, batch["sample_weights"] * self.parts["clip"](terms), 0.0)
        errors = value_loss(values, batch["old_values"], batch["returns"], clip=config.value_clip)
        sums = {
            "policy": -(token_weights * objective).sum(),
            "value": config.value_weight * (token_weights * errors).sum(),
        }
        metrics = online_metrics(
            logps=logps,
            old_logps=old_logps,
            advantages=batch["advantages"],
            mask=mask,
            clipped=clipped_tokens(self.parts["clip"], terms),
            ref_logps=batch.per_token.get("ref_logps"),
            weight=log_ratio.detach().exp() * batch["kept_mass"],
        )
        return Loss(sums, metrics, responses=logprob_gaps(logps, batch.engine_logps, mask))

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        return run.evaluate_completions(batch)

    def state_dict(self) -> dict[str, Any]:
        return {"kl_weight": self.kl_weight}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kl_weight = state["kl_weight"]
