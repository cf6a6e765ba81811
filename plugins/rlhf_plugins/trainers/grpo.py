"""GRPO and its family: policy gradient on groups of completions, without a critic.

A variant is a row of the table in grpo_variants.py, which picks an advantage, ratio, clip, correction, aggregation and KL
estimate from the core's tables of parts; each can be overridden by an option.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from rlhf_core.plugin import (
    ADVANTAGES,
    CLIPS,
    CORRECTIONS,
    KL_ESTIMATORS,
    LOSS_AGGREGATIONS,
    RATIOS,
    SHAPINGS,
    TRAINED,
    Batch,
    ConfigError,
    Evaluation,
    Loader,
    Loss,
    PartTable,
    PolicyGradientConfig,
    PolicyModel,
    PolicyTerms,
    RewardTerms,
    Role,
    RunContext,
    Scores,
    Trainer,
    TrainingStage,
    Window,
    clipped_tokens,
    logprob_gaps,
    online_metrics,
    refusing,
    require_part,
)
from rlhf_plugins.trainers.grpo_variants import VARIANTS, EqualGroups, KLPlace, Variant, VariantName


class GRPOConfig(PolicyGradientConfig):
    """Options of GRPO and its family."""

    tables: ClassVar[Mapping[str, PartTable]] = {
        "advantage": ADVANTAGES,
        "ratio": RATIOS,
        "clip": CLIPS,
        "correction": CORRECTIONS,
        "aggregation": LOSS_AGGREGATIONS,
        "kl": KL_ESTIMATORS,
    }

    learning_rate: float = Field(1e-6, gt=0, description="Peak step size; larger learns faster and may diverge.")
    variant: VariantName = Field(
        "grpo", description="The paper whose parts are used: `rlhf show grpo --variant NAME` prints them."
    )
    advantage: str | None = ADVANTAGES.field(None, null="the variant's")
    advantage_options: dict[str, Any] = ADVANTAGES.options_field(null="the variant's")
    ratio: str | None = RATIOS.field(None, null="the variant's")
    ratio_options: dict[str, Any] = RATIOS.options_field(null="the variant's")
    clip: str | None = CLIPS.field(None, null="the variant's")
    clip_options: dict[str, Any] = CLIPS.options_field(null="the variant's")
    correction: str | None = CORRECTIONS.field(None, null="the variant's")
    correction_options: dict[str, Any] = CORRECTIONS.options_field(null="the variant's")
    aggregation: str | None = LOSS_AGGREGATIONS.field(None, null="the variant's")
    aggregation_options: dict[str, Any] = LOSS_AGGREGATIONS.options_field(null="the variant's")
    kl: str | None = KL_ESTIMATORS.field(None, null="the variant's")
    kl_options: dict[str, Any] = KL_ESTIMATORS.options_field(null="the variant's")
    kl_weight: float | None = Field(
        None,
        ge=0,
        description="Weight of the KL to the reference; larger stays nearer to it, 0 needs no reference. Null: the variant's.",
    )
    kl_in: KLPlace | None = Field(
        None,
        description="Where the KL counts: in the `loss`, in the `reward` of a completion, or in each token's `return`, from the"
        " token to the end. Null: the variant's.",
    )
    kl_importance: bool = Field(
        False,
        description="Weight a KL in the loss by the ratio per token, so that its gradient is that of KL(π ‖ π_ref)"
        " off-policy, too; false is as in the papers.",
    )
    shaping: list[str] | None = Field(
        None, description="Changes of rewards before the advantage, in this order; `[]` is none. Null: the variant's."
    )
    shaping_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Options of shapings by name, such as `overlong: {buffer: 0.1}`."
    )
    equal_groups: EqualGroups | None = Field(
        None,
        description="What becomes of groups with equal rewards: `keep`; `skip` leaves them out of the loss and what it is"
        " averaged over; `resample` takes more prompts until `batch_size` groups have rewards that differ, and learns from all"
        " that do: fewer than twice as many. Null: the variant's.",
    )
    mask_truncated: bool = Field(
        False,
        description="Leave completions that the token limit truncated out of the loss and what it is averaged over; false"
        " learns from them, too.",
    )
    reference: Literal["auto", "copy", "adapter_off"] = Field(
        "auto", description="How the reference is kept: a frozen `copy`, or the base with a fresh adapter off."
    )

    @field_validator("shaping", mode="before")
    @classmethod
    def _one_shaping_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _shapings_exist(self) -> GRPOConfig:
        """Refuse shapings that don't exist, and options of those that aren't used."""
        for name in self.shapings:
            options = self.shaping_options.get(name, {})
            require_part(SHAPINGS, name, options, at=("shaping",), options_at=("shaping_options", name))
        if unused := sorted(self.shaping_options.keys() - set(self.shapings)):
            problem = f"there are options of the shaping `{unused[0]}`, which isn't used"
            fix = f"add it to `shaping` ({', '.join(self.shapings) or 'none now'}), or leave them out"
            with refusing(("shaping_options", unused[0]), self.shaping_options[unused[0]]):
                raise ConfigError(problem, fix=fix)
        return self

    @model_validator(mode="after")
    def _groups_suit_their_parts(self) -> GRPOConfig:
        """Refuse groups that are too small, and shapings whose rewards the advantage refuses, tried with full completions."""
        size, row = self.group_size, self.row
        if size == 1 and row.equal_groups != "keep":
            problem = f"rewards in a group of one are equal, so `equal_groups: {row.equal_groups}` leaves no group"
            self._refuse("group_size", problem, "raise it, or set `equal_groups: keep`")
        limit, groups = self.generation.max_new_tokens, torch.zeros(size, dtype=torch.long)
        scores = (torch.arange(size) % 2).float()[None]  # they differ: equal ones are beyond some advantages
        terms = RewardTerms(scores, torch.ones(1), groups, torch.full((size,), limit), limit)
        advantage = ADVANTAGES.bind(*self.part("advantage"))
        with refusing(("group_size",), size):
            advantage(terms.total, groups)
        for name in self.shapings:
            with refusing(("shaping",), name):
                terms = SHAPINGS.bind(name, self.shaping_options.get(name, {}))(terms)
                advantage(terms.total, groups)
        return self

    @model_validator(mode="after")
    def _every_option_counts(self) -> GRPOConfig:
        """Refuse options that nothing would read."""
        row, given = self.row, self.model_fields_set
        of_kl = [
            name for name in ("kl", "kl_options", "kl_in", "kl_importance") if name in given and getattr(self, name)
        ]
        if of_kl and not row.kl_weight:
            self._refuse(of_kl[0], "the KL has no weight, so it isn't used", "set `kl_weight`")
        if self.kl_importance and row.kl_in != "loss":
            self._refuse(
                "kl_importance", f"it weights a KL in the loss, and this one is in the {row.kl_in}", "leave it out"
            )
        if row.kl_weight and (row.kl_in, row.kl) == ("loss", "k1") and not self.kl_importance:
            problem = "in the loss, k1 has a gradient that is 0 on average: it would add noise alone"
            self._refuse("kl" if self.kl else "kl_in", problem, "set `kl_importance: true`, or take `kl: k3`")
        if self.reference != "auto" and not self.reads_reference:
            self._refuse("reference", "nothing reads a reference: the KL has neither weight nor budget", "leave it out")
        if self.minibatches > self.batch_size:
            problem = f"there are more minibatches than prompts in a step ({self.batch_size})"
            self._refuse("minibatches", problem, "lower it, or raise `batch_size`")
        return self

    def _refuse(self, name: str, problem: str, fix: str) -> None:
        with refusing((name,), getattr(self, name)):
            raise ConfigError(problem, fix=fix)

    def trainer_computes_old_logps(self, precision: torch.dtype) -> bool:
        """Also where the KL counts in the reward: what 16 bits round would be a KL of two equal policies."""
        in_reward = bool(self.row.kl_weight) and self.row.kl_in != "loss"
        return super().trainer_computes_old_logps(precision) or (in_reward and precision != torch.float32)

    @property
    def row(self) -> Variant:
        """The variant's parts, with those of the options in their place."""
        given = {name: getattr(self, name) for name in (*self.tables, "kl_weight", "kl_in", "equal_groups")}
        shaping = None if self.shaping is None else tuple(self.shaping)
        chosen = {name: value for name, value in {**given, "shaping": shaping}.items() if value is not None}
        return replace(VARIANTS[self.variant], **chosen)

    @property
    def reads_reference(self) -> bool:
        """Whether log-probabilities of the reference are needed: where the KL has a weight or a budget."""
        return bool(self.row.kl_weight or self.kl_budget)

    @property
    def shapings(self) -> tuple[str, ...]:
        return self.row.shaping

    def part(self, kind: str) -> tuple[str, dict[str, Any]]:
        """Return a part's name and options: the variant's where the part is the variant's own, overridden by those given."""
        own, name = VARIANTS[self.variant], getattr(self.row, kind)
        inherited = own.options.get(kind, {}) if name == getattr(own, kind) else {}
        return name, {**inherited, **getattr(self, f"{kind}_options")}

    def choices(self) -> dict[str, str]:
        row = self.row
        shapings = [SHAPINGS.shown(name, self.shaping_options.get(name, {})) for name in row.shaping]
        rest = {"kl_weight": f"{row.kl_weight:g}", "kl_in": row.kl_in, "equal_groups": row.equal_groups}
        shown = {"variant": f"{self.variant}: {row.paper}", **super().choices(), **rest}
        return {**shown, "shaping": ", ".join(shapings) or "none"}


class GRPOTrainer(Trainer[GRPOConfig]):
    """Policy gradient on groups of completions: GRPO, and by `variant` Dr. GRPO, DAPO, GSPO, RLOO, REINFORCE++ and others."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY
    Config = GRPOConfig
    roles: ClassVar = {"policy": TRAINED, "reference": Role(trained=False, optional=True)}
    splits_groups = True

    def build(self, loader: Loader) -> Mapping[str, Any]:
        policy: PolicyModel = loader.main()
        if not self.config.reads_reference:
            return {"policy": policy}
        return {"policy": policy, "reference": loader.reference(policy, self.config.reference)}

    @cached_property
    def parts(self) -> dict[str, Callable[..., Any]]:
        """The parts by kind, with their options set."""
        return self.config.bound_parts()

    def windows_per_batch(self) -> int | None:
        return None if self.config.row.equal_groups == "resample" else super().windows_per_batch()

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterator[Window]:
        """Roll out each batch, or so many that `batch_size` groups have rewards that differ, and learn from it in epochs."""
        equal, held, groups = self.config.row.equal_groups, list[Batch](), 0
        for batch in stream:
            rollout = self.rollout(batch, run)
            if equal == "resample":
                rollout = rollout.select(rollout["differs"].nonzero()[:, 0])
                # Every process takes another batch, or none does: a step has the same groups for any number of them.
                found = sum(run.gather(rollout.num_prompts))
                groups += found
                if found:
                    run.hold()
            held.append(rollout)
            if equal != "resample" or groups >= self.config.batch_size:
                yield from self.windows(Batch.cat(held), run)
                held, groups = [], 0
        if groups:
            yield from self.windows(Batch.cat(held), run)

    def rollout(self, batch: Batch, run: RunContext) -> Batch:
        """Return completions of the prompts with their shaped rewards, and the log-probabilities that ratios are taken to."""
        config, row = self.config, self.config.row
        completions, scores = run.generate_and_score(batch, config.group_size, config.generation)
        rollout = Batch.from_completions(batch, completions)
        mask, rewards = rollout.loss_mask, self.shaped(rollout, scores, run)
        differs = self._differ(rollout, scores.total.to(rollout.device))
        if "group_normalised" in config.shapings:  # which tells completions apart whose sums of rewards are equal
            differs = differs | self._differ(rollout, rewards)
        engine_logps = rollout.engine_logps
        tokens = {"old_logps": engine_logps, "weight": rollout["kept_mass"]}
        if config.trainer_computes_old_logps(self.policy.precision):
            with run.phase("old_logps", tokens=rollout.num_tokens):
                tokens["old_logps"] = run.forward(rollout, self.token_logps, axis="token")
        if row.correction != "none":
            tokens["weight"] = tokens["weight"] * self.parts["correction"](tokens["old_logps"], engine_logps, mask)
        if config.reads_reference:
            with run.phase("reference", tokens=rollout.num_tokens):
                tokens["ref_logps"] = self.reference.token_logps(rollout, temperature=config.generation.temperature)
        return rollout.attach(per_prompt={"differs": differs}, per_response={"rewards": rewards}, per_token=tokens)

    def _differ(self, rollout: Batch, rewards: Tensor) -> Tensor:
        """Return (P,) whether the rewards (R,) of a prompt's completions differ."""
        grouped = rewards.view(rollout.num_prompts, self.config.group_size)
        return (grouped != grouped[:, :1]).any(dim=1)

    def shaped(self, rollout: Batch, scores: Scores, run: RunContext) -> Tensor:
        """Return (R,) the completions' rewards after the shapings."""
        if not self.config.shapings:
            return scores.total.to(rollout.device)
        names = run.rewards.names
        terms = RewardTerms(
            scores=torch.tensor([scores.by_name[name] for name in names]).view(len(names), rollout.num_responses),
            weights=torch.tensor(run.rewards.weights),
            groups=rollout.owner.cpu(),
            lengths=rollout.response_lengths.cpu(),
            limit=self.config.generation.max_new_tokens,
        )
        for name in self.config.shapings:
            terms = SHAPINGS.bind(name, self.config.shaping_options.get(name, {}))(terms)
        run.log("reward_shaped", terms.total.sum(), rollout.num_responses)
        return terms.total.to(rollout.device)

    def windows(self, rollout: Batch, run: RunContext) -> Iterator[Window]:
        """Attach advantages, over all of the step's groups, and divide the rollout into windows."""
        config = self.config
        advantages = self.advantages(rollout, run)
        mask = rollout.loss_mask
        if config.mask_truncated:  # they have counted in the group's mean
            mask = mask & ~rollout["truncated"][:, None]
        if config.row.equal_groups == "skip":
            mask = mask & rollout["differs"][rollout.owner, None]
        rollout = replace(rollout.attach(per_token={"advantages": advantages}), loss_mask=mask)
        rollout = run.record_rollout(rollout, advantages, teaches=self._teaches(rollout, run))
        # What isn't in the loss needs no forward pass.
        yield from run.windows(rollout.take(mask.any(dim=1).nonzero()[:, 0]))

    def _teaches(self, rollout: Batch, run: RunContext) -> bool:
        """Return whether the rewards give any completion an advantage; a KL in the reward always does, if only by rounding."""
        rewards, numbers = rollout["rewards"], rollout.response_places
        found = run.over_step(self.parts["advantage"], rewards, numbers, rows=numbers.tolist())
        return bool((found.abs() > 1e-6 * rewards.abs().clamp(max=1)).any())

    def advantages(self, rollout: Batch, run: RunContext) -> Tensor:
        """Return (R, T) advantages, over the whole step; 0 outside the mask.

        With the KL in the return, each token has a return of its own, the reward minus the KL from the token to the end, and
        the advantage is computed of the returns of all tokens.
        """
        config, mask, rewards = self.config, rollout.loss_mask, rollout["rewards"]
        numbers = rollout.response_places  # (R,)
        if not config.row.kl_weight or config.row.kl_in == "loss":
            found = run.over_step(self.parts["advantage"], rewards, numbers, rows=numbers.tolist())
            return found[:, None] * mask
        kl = config.row.kl_weight * self.parts["kl"](rollout["old_logps"], rollout["ref_logps"]) * mask
        if config.row.kl_in == "reward":
            found = run.over_step(self.parts["advantage"], rewards - kl.sum(dim=1), numbers, rows=numbers.tolist())
            return found[:, None] * mask
        returns = rewards[:, None] - kl.flip(1).cumsum(1).flip(1)
        of_token = numbers[:, None].expand(mask.shape)[mask.cpu()]
        found = run.over_step(self.parts["advantage"], returns[mask], of_token, rows=of_token.tolist())
        return torch.zeros_like(returns).masked_scatter(mask, found.to(returns))

    def token_logps(self, batch: Batch) -> Tensor:
        """Return (R, T) log-probabilities at the temperature that completions are drawn with, nats."""
        return self.policy.token_logps(batch, temperature=self.config.generation.temperature)

    def aggregation(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens' weights (R, T) and the rows' amounts (R,)."""
        return self.parts["aggregation"](mask, limit=self.config.generation.max_new_tokens)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The policy's objective and the KL are averaged over the same amounts."""
        amount = float(self.aggregation(batch.loss_mask)[1].sum())
        row = self.config.row
        return {"policy": amount, "kl": amount} if row.kl_weight and row.kl_in == "loss" else {"policy": amount}

    def loss(self, batch: Batch) -> Loss:
        """Return the objective and the KL as sums over tokens, weighted by the aggregation, the kept mass and the
        correction."""
        row, mask = self.config.row, batch.loss_mask
        logps, old_logps = self.token_logps(batch), batch["old_logps"]
        log_ratio = torch.where(mask, logps - old_logps, 0.0)
        terms = PolicyTerms(
            logps=logps,
            old_logps=old_logps,
            log_ratio=self.parts["ratio"](log_ratio, mask),
            advantages=batch["advantages"],
            mask=mask,
        )
        token_weights, _ = self.aggregation(mask)
        objective = batch["weight"] * self.parts["clip"](terms)
        sums = {"policy": -(token_weights * torch.where(mask, objective, 0.0)).sum()}
        ref_logps = batch["ref_logps"] if self.config.reads_reference else None
        if ref_logps is not None and row.kl_weight and row.kl_in == "loss":
            kl = self.parts["kl"](logps, ref_logps, log_ratio if self.config.kl_importance else None)
            sums["kl"] = row.kl_weight * (token_weights * torch.where(mask, batch["kept_mass"] * kl, 0.0)).sum()
        metrics = online_metrics(
            logps=logps,
            old_logps=old_logps,
            advantages=terms.advantages,
            mask=mask,
            clipped=clipped_tokens(self.parts["clip"], terms),
            ref_logps=ref_logps,
            weight=log_ratio.detach().exp() * batch["kept_mass"],
        )
        return Loss(sums, metrics, responses=logprob_gaps(logps, batch.engine_logps, mask))

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        """Complete held-out prompts and score that: the loss on its own completions says nothing of how good they are."""
        return run.evaluate_completions(batch)
