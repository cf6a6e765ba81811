"""Distillation from a larger model, as a third party would write it: all it imports of the project is one module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rlhf_core.plugin import (
    FROZEN,
    TRAINED,
    Batch,
    Loader,
    Loss,
    ModelConfig,
    PolicyModel,
    RunContext,
    SamplingConfig,
    Trainer,
    TrainerConfig,
    TrainingStage,
    over_vocabulary,
    random_generator,
)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) from log-probabilities (…, V), (…) nats."""
    return (p.exp() * (p - q)).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return KL(teacher ‖ student): Hinton et al. 2015 (arXiv 1503.02531), section 2, less the teacher's entropy, a constant."""
    return kl(teacher, student)


def reverse_kl(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return KL(student ‖ teacher): Gu et al. 2024 (arXiv 2306.08543), equation 1, token by token. It prefers modes to means."""
    return kl(student, teacher)


def jensen_shannon(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q, p the teacher: Agarwal et al. 2024 (arXiv 2306.13649),
    equation 1. Divided by β it becomes KL(p ‖ q) as β goes to 0, and divided by 1 − β KL(q ‖ p) as β goes to 1."""
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon"]

DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
"""Divergences of two distributions, from log-probabilities (…, V) of student and teacher and β, (…) nats."""


def compared(student: Tensor, teacher: Tensor, *, divergence: Divergence, beta: float, temperature: float) -> Tensor:
    """Return (S, 2): the divergence of softmax(logits / temperature), and whether both have the same token most likely.

    No factor of temperature² as in Hinton et al., where it balances a second term: there is none here.

    Args:
        student: (S, V) logits.
        teacher: (S, W) logits. Tables are padded to different widths for models of one tokenizer; tokens that one of the two
            has no row for aren't the tokenizer's, and are left out.
    """
    width = min(student.shape[1], teacher.shape[1])
    student, teacher = student[:, :width], teacher[:, :width]
    # A token that a model leaves out has a log-probability of −inf, of which 0 times is no number.
    low = torch.finfo(student.dtype).min
    logps = [torch.log_softmax(logits / temperature, dim=-1).clamp(min=low) for logits in (student, teacher)]
    same = student.argmax(-1) == teacher.argmax(-1)
    return torch.stack([DIVERGENCES[divergence](*logps, beta), same.float()], dim=1)


class DistillationConfig(TrainerConfig):
    """Options of distillation."""

    teacher: ModelConfig = Field(description="The model to learn from, of the same tokenizer; only read.")
    divergence: Divergence = Field(
        "forward_kl",
        description="What is made small at each token: `forward_kl` covers all that the teacher would say, `reverse_kl` keeps to"
        " what it finds likely, `jensen_shannon` lies between them.",
    )
    beta: float = Field(
        0.5, gt=0, lt=1, description="Weight of the teacher (jensen_shannon); larger is nearer to `reverse_kl`."
    )
    temperature: float = Field(
        1.0, gt=0, description="Divisor of both models' logits; larger makes unlikely tokens count more."
    )
    on_policy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the steps on the student's own completions; larger trains where it will be.",
    )
    generation: SamplingConfig = Field(
        default_factory=SamplingConfig, description="How the student's own completions are drawn."
    )

    @model_validator(mode="after")
    def _options_are_used(self) -> DistillationConfig:
        if self.beta != 0.5 and self.divergence != "jensen_shannon":
            raise ValueError(f"beta has no meaning with divergence {self.divergence}; it belongs to jensen_shannon")
        if self.generation != SamplingConfig() and not self.on_policy:
            raise ValueError("generation has no meaning without on_policy")
        return self


class DistillationTrainer(Trainer[DistillationConfig]):
    """Distillation: say at every token what a teacher would, on the data's responses or the student's own."""

    api = 1
    record = "sft"
    stage = TrainingStage.SFT
    Config = DistillationConfig
    roles: ClassVar = {"policy": TRAINED, "teacher": FROZEN}
    splits_groups = True

    @property
    def teacher(self) -> PolicyModel:
        return self.models["teacher"]  # type: ignore[return-value]

    def build(self, loader: Loader) -> Mapping[str, nn.Module]:
        return {"policy": loader.main(), "teacher": loader.load("teacher", PolicyModel, self.config.teacher)}

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Batch]:
        """Take the student's own completions in place of the data's in a share of the steps, the same on every process."""
        for batch in stream:
            drawn = random_generator(self.config.seed, run.step).random()
            own = drawn < self.config.on_policy and not run.evaluating
            if own:
                batch = Batch.from_completions(batch, run.engine.generate(batch, 1, self.config.generation))
            run.log("on_policy", own * batch.num_prompts, batch.num_prompts)
            yield batch

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"divergence": batch.num_loss_tokens}

    def loss(self, batch: Batch) -> Loss:
        config = self.config
        states = self.policy.hidden_states(batch, drop_last=True)
        with torch.no_grad():
            theirs = self.teacher.hidden_states(batch, drop_last=True)
        function = partial(compared, divergence=config.divergence, beta=config.beta, temperature=config.temperature)
        found = over_vocabulary(
            function, (self.policy.logits, states.predicting()), (self.teacher.logits, theirs.predicting())
        )  # (S, 2)
        divergence, same = found.sum(0)
        return Loss({"divergence": divergence}, {"same_token": (same.detach(), batch.num_loss_tokens)})
