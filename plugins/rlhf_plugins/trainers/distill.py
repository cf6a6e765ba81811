"""Distillation: say at every token what a teacher would, on given responses or on the student's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlhf_core.plugin import (
    FROZEN,
    TRAINED,
    Batch,
    ConfigError,
    Evaluation,
    Loader,
    Loss,
    ModelConfig,
    NumbersError,
    OnlineConfig,
    PolicyModel,
    RewardConfig,
    RunContext,
    SamplingConfig,
    Trainer,
    TrainingStage,
    Window,
    exact_log_softmax,
    over_vocabulary,
    random_generator,
)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) from log-probabilities (..., V), in (...) nats."""
    return (p.exp() * (p - q)).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher ‖ student), from log-probabilities (..., V), in (...) nats.

    Hinton et al. 2015 (arXiv 1503.02531), section 2, less the teacher's entropy, which is constant. It is large where the student
    gives no probability to what the teacher would say.
    """
    return kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(student ‖ teacher), from log-probabilities (..., V), in (...) nats.

    Gu et al. 2024 (arXiv 2306.08543), equation 1, token by token. It is large where the student says what the teacher wouldn't.
    """
    return kl(student, teacher)


def jensen_shannon(student: Tensor, teacher: Tensor, *, beta: float) -> Tensor:
    """Return the generalised Jensen-Shannon divergence, from log-probabilities (..., V), in (...) nats.

    Agarwal et al. 2024 (arXiv 2306.13649), equation 1, with p the teacher and q the student:
    β KL(p ‖ m) + (1 − β) KL(q ‖ m), where m = β p + (1 − β) q.

    Deviation: it is 0 at β = 0 and β = 1. There, this function returns what it tends to when divided by β, KL(p ‖ q), and when
    divided by 1 − β, KL(q ‖ p).
    """
    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


INFINITE = 1e30
"""Nats from which on a divergence stands for an infinite one: a masked token's log-probability is the least float."""
Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]


class DistillationConfig(OnlineConfig):
    """Options of distillation."""

    needs_rewards = False

    teacher: ModelConfig = Field(description="The model to learn from, of the same tokenizer; only read.")
    divergence: Divergence = Field(
        "forward_kl",
        description="What is made small at each token: `forward_kl` covers all that the teacher would say, `reverse_kl` keeps to"
        " what it finds likely, `jensen_shannon` lies between them.",
    )
    beta: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the teacher in the mixture (jensen_shannon); larger is nearer to `reverse_kl`, which 1 is, as 0 is"
        " `forward_kl`.",
    )
    temperature: float = Field(
        1.0, gt=0, description="Divisor of both models' logits in the loss; larger makes unlikely tokens count more."
    )
    average: Literal["token", "response"] = Field(
        "token",
        description="What the loss is a mean over: all `token`s of a step, or each `response`'s mean, in which a token of a short"
        " response counts for more.",
    )
    on_policy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steps on the student's own completions in place of the data's responses; larger trains more"
        " where the student's own errors lead.",
    )
    prompts_only: bool = Field(
        False,
        description="Whether rows are prompts without responses, which suffice for `on_policy: 1`; false reads responses and"
        " compares held-out rows on theirs.",
    )
    group_size: int = Field(
        1, ge=1, description="Own completions per prompt; larger trains longer on each prompt and costs more."
    )
    generation: SamplingConfig = Field(
        default_factory=SamplingConfig, description="How the student's own completions are drawn."
    )
    rewards: list[RewardConfig] = Field(
        default_factory=list,
        description="Rewards of the student's own completions that are reported in training and evaluation, and not trained on:"
        " names, or `{name: …, weight: …, options: {…}}`.",
    )

    @model_validator(mode="after")
    def _options_are_used(self) -> DistillationConfig:
        """Refuse options that the others leave without effect."""
        if self.beta != 0.5 and self.divergence != "jensen_shannon":
            raise ValueError(f"beta has no meaning with divergence {self.divergence}; it belongs to jensen_shannon")
        if self.prompts_only and self.on_policy < 1:
            raise ValueError(
                f"prompts_only needs `on_policy: 1`: other steps train on responses; got {self.on_policy:g}"
            )
        if self.group_size != 1 and not self.on_policy:
            raise ValueError("group_size has no meaning without on_policy")
        if self.rollout_sampler is not None and not self.on_policy:
            raise ValueError("rollout_sampler has no meaning without on_policy: nothing would be drawn")
        return self


def compared(
    student: Tensor, teacher: Tensor, *, divergence: Callable[[Tensor, Tensor], Tensor], temperature: float
) -> Tensor:
    """Return (S, 2): the divergence of softmax(logits / temperature), nats, and whether both models have one token most likely.

    There is no factor of temperature² as in Hinton et al. 2015: there it balances a second term.

    Args:
        student: (S, V) logits.
        teacher: (S, W) logits. Models of one tokenizer may have tables padded to different widths; a row that only one of them
            has belongs to no token, and is left out.
    """
    width = min(student.shape[1], teacher.shape[1])
    # A token that a model masks has a log-probability of −inf, and 0 · inf would be no number.
    least = torch.finfo(student.dtype).min
    logps = [exact_log_softmax(logits[:, :width] / temperature).clamp(min=least) for logits in (student, teacher)]
    same = student[:, :width].argmax(-1) == teacher[:, :width].argmax(-1)
    return torch.stack([divergence(*logps), same.to(student.dtype)], dim=1)


class DistillationTrainer(Trainer[DistillationConfig]):
    """Distillation: say at every token what a larger teacher would, on the data's responses or the student's own."""

    api = 1
    record = "sft"
    stage = TrainingStage.SFT
    Config = DistillationConfig
    roles: ClassVar = {"policy": TRAINED, "teacher": FROZEN}
    splits_groups = True

    @classmethod
    def record_type(cls, config: DistillationConfig) -> str:
        """Return the record type of prompts alone with `prompts_only`, else of prompts with responses."""
        return "prompt" if config.prompts_only else cls.record

    @property
    def teacher(self) -> PolicyModel:
        return self.models["teacher"]  # type: ignore[return-value]

    @property
    def _divergence(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The function from both models' log-probabilities (..., V) to the divergence, (...)."""
        if self.config.divergence == "jensen_shannon":
            return partial(jensen_shannon, beta=self.config.beta)
        return forward_kl if self.config.divergence == "forward_kl" else reverse_kl

    def build(self, loader: Loader) -> Mapping[str, nn.Module]:
        """Return the student and its teacher; refuse options of generation that nothing would use."""
        config = self.config
        rewarded = bool(config.rewards or self.rewards)
        if rewarded and not config.on_policy and self.eval_data is None:
            raise ConfigError(
                "rewards are reported of the student's own completions, and there would be none",
                place="rewards",
                fix="set `on_policy` or `eval_data`, or leave them out",
            )
        if config.eval_sampler is not None and not rewarded:
            raise ConfigError(
                "without rewards no held-out completions are drawn",
                place="eval_sampler",
                fix="set `rewards`, or leave it out",
            )
        if config.generation != SamplingConfig() and not config.on_policy and not rewarded:
            raise ConfigError(
                "nothing is generated without `on_policy` or `rewards`", place="generation", fix="leave it out"
            )
        return {"policy": loader.main(), "teacher": loader.load("teacher", PolicyModel, config.teacher)}

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterator[Window]:
        """Put the student's own completions in place of the data's responses in a share of the steps, the same on every process.

        Agarwal et al. 2024, algorithm 1. Held-out rows are taken as they are.
        """
        for batch in stream:
            if run.evaluating:
                yield Window(batch)
                continue
            own = random_generator(self.config.seed, run.step).random() < self.config.on_policy
            if own:
                batch = run.record_rollout(self._completed(batch, run, self.config.group_size))
            run.log("on_policy", own * batch.num_responses, batch.num_responses)
            yield from run.windows(batch)

    def _completed(self, batch: Batch, run: RunContext, n: int) -> Batch:
        """Return n completions of the student for each prompt as a batch; in training they are scored where there are rewards."""
        sampling = self.config.generation
        if len(run.rewards) and not run.evaluating:
            completions, _ = run.generate_and_score(batch, n, sampling)
        else:
            completions = run.generate(batch, n, sampling)
        return Batch.from_completions(batch, completions)

    def weights(self, batch: Batch) -> Mapping[str, float]:
        """The divergence is averaged over tokens in the loss, or over responses that have some."""
        if self.config.average == "response":
            return {"divergence": float(batch.loss_mask.any(dim=1).sum())}
        return {"divergence": batch.num_loss_tokens}

    def loss(self, batch: Batch) -> Loss:
        """Return the sum of the divergence over tokens, or of each response's mean."""
        divergence, same = self._per_token(batch).unbind(-1)  # (R, T) each
        if bool((ruled_out := (divergence > INFINITE).any(dim=1)).any()):
            rows = sorted({batch.rows[prompt] for prompt in batch.owner[ruled_out].tolist()})
            raise NumbersError(
                "the divergence is infinite: one model gives no probability to a token that the other would say",
                place=f"rows {rows[:8]}", got=self.config.divergence,
                fix="`divergence: jensen_shannon` is finite there; or let neither model mask tokens",
            )  # fmt: skip
        lengths = batch.loss_mask.sum(dim=1)  # (R,)
        of_responses = divergence.sum(dim=1)
        averaged = of_responses / lengths.clamp(min=1) if self.config.average == "response" else of_responses

        def per_prompt(values: Tensor) -> Tensor:
            return values.new_zeros(batch.num_prompts).index_add(0, batch.owner, values)

        tokens = per_prompt(lengths.to(divergence.dtype))
        metrics = {"divergence": per_prompt(of_responses.detach()), "same_token": per_prompt(same.detach().sum(dim=1))}
        return Loss({"divergence": averaged.sum()}, {name: (values, tokens) for name, values in metrics.items()})

    def _per_token(self, batch: Batch) -> Tensor:
        """Return (R, T, 2): what `compared` finds at each token in the loss, 0 at others."""
        states = self.policy.hidden_states(batch, drop_last=True)
        with torch.no_grad():
            theirs = self.teacher.hidden_states(batch, drop_last=True)
        function = partial(compared, divergence=self._divergence, temperature=self.config.temperature)
        found = over_vocabulary(
            function, (self.policy.logits, states.predicting()), (self.teacher.logits, theirs.predicting())
        )
        return states.to_tokens(found)

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        """Return the divergence on the responses of held-out rows, and with rewards how good the student's completions are.

        On rows that are prompts alone, it is the divergence on a completion of the student for each.
        """
        compared_on = self._completed(batch, run, 1) if self.config.prompts_only else batch
        found = run.held_out_loss(compared_on)
        if not len(run.rewards):
            return found
        return Evaluation(found.terms, {**found.metrics, **run.evaluate_completions(batch).metrics})
