"""Process reward models: a score at the end of each step, and one for the outcome."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rlhf_core.batch import Batch
from rlhf_core.config import LoraConfig, TrainerConfig
from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.infra.model_files import PROCESS_REWARD_HEAD, REWARD_HEAD
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.adapters import AdapterUse
from rlhf_core.models.attention import Kernel
from rlhf_core.models.heads import (
    NO_HEAD,
    TwoLayerHead,
    describe_head,
    fill_head,
    head_directory,
    warn_of_other_head,
    write_head,
)
from rlhf_core.models.loading import load_model
from rlhf_core.models.precision import Precision, frozen_dtype
from rlhf_core.models.reward import last_hidden, refuse_quantised
from rlhf_core.models.sequence import LayoutName, SequenceModel, model_hashes
from rlhf_core.models.steps import step_ends

HEAD = PROCESS_REWARD_HEAD
Aggregation = Literal["min", "product", "mean", "last"]


class ProcessRewardModel(nn.Module):
    """Scores the steps of responses and their outcome. Axes: R responses, T response tokens.

    Args:
        backbone: what the head stands on.
        head: (S, D) to (S, 2): the log-odds that all is right up to a step, and the outcome's score.
        separator: text that ends a step.
    """

    def __init__(self, backbone: SequenceModel, head: nn.Module, *, separator: str = "\n") -> None:
        super().__init__()
        if not separator:
            raise ConfigError("a step must end with some text", place="separator", got=repr(separator))
        self.backbone, self.head, self.separator = backbone, head, separator

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        new_head: bool = False,
        separator: str | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        lora: LoraConfig | None = None,
        adapter: AdapterUse = "continue",
        precision: str = "float32",
        frozen_precision: Precision = "auto",
        frozen: bool = False,
        attention: Kernel = "auto",
        save_precision: Precision = "auto",
        gradient_checkpointing: bool = False,
        compile: bool = False,
        layout: LayoutName = "auto",
        share_prompts: bool = True,
    ) -> Self:
        """Load what `save_pretrained` wrote.

        Args:
            new_head: give a checkpoint without a head a new one, for training; without it, that is an error.
            separator: text that ends a step; None takes what the checkpoint was trained with, or a line's end.
            seed: of a new head.
            frozen: whether the model is only read: none of its weights can be trained, and all are held as frozen ones are.

        The other options are those of `PolicyModel.from_pretrained`.

        Raises:
            ModelError: the head is missing, or its width isn't the backbone's.
            ConfigError: another separator is asked for than the checkpoint was trained with.
        """
        refuse_quantised(lora)
        hold = frozen_dtype(precision, frozen_precision)
        where = head_directory(source, HEAD)
        if where is None and not new_head:
            fix = "train one: `rlhf train process_reward`"
            raise ModelError(NO_HEAD, place=str(source), got=f"no {HEAD}.json", fix=fix)
        loaded = load_model(
            source,
            kind="causal" if where is None else "backbone",
            headless=True,
            lora=lora,
            trust_remote_code=trust_remote_code,
            adapter=adapter,
            hold=hold,
            frozen=frozen,
        )
        backbone = SequenceModel.of(loaded, source).without_head()
        if where is not None:
            about = describe_head(where, HEAD, width=backbone.width, keys={"separator": str})
            head = TwoLayerHead(backbone.width, outputs=2)
            fill_head(where, HEAD, head)
            model = cls(backbone, head, separator=about["separator"])
            model.check_separator(separator)
        else:
            warn_of_other_head(source, REWARD_HEAD)
            model = cls.on(backbone, separator="\n" if separator is None else separator, seed=seed)
        if device is not None:
            model.to(device)
        if frozen:
            model.requires_grad_(False).eval()
        backbone.set_options(
            attention=attention,
            precision=precision,
            lora=lora,
            frozen_precision=frozen_precision,
            save_precision=save_precision,
            gradient_checkpointing=gradient_checkpointing,
            compile=compile,
            layout=layout,
            share_prompts=share_prompts,
        )
        return model

    @classmethod
    def on(cls, backbone: SequenceModel, *, separator: str = "\n", seed: int = 0) -> Self:
        """Put a new head on a backbone."""
        head = TwoLayerHead(backbone.width, outputs=2, seed=stream_seed(seed, "process reward head"))
        return cls(backbone, head, separator=separator)

    @property
    def tokenizer(self) -> Any:
        return self.backbone.tokenizer

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    @property
    def max_positions(self) -> int | None:
        return self.backbone.max_positions

    def check_separator(self, separator: str | None) -> None:
        """Refuse another separator than the model was trained with; None asks for nothing."""
        if separator is not None and separator != self.separator:
            raise ConfigError(
                "the model was trained with another separator",
                place="separator",
                got=f"{separator!r} for {self.separator!r}",
                fix="leave `separator` out, or start from a model without a head",
            )

    def configure(self, config: TrainerConfig) -> Self:
        """Apply a trainer's options to the backbone, in place; return the model."""
        refuse_quantised(config.lora)
        self.backbone.configure(config)
        return self

    def step_ends(self, batch: Batch) -> Tensor:
        """Return (R, T) bool: where each step ends."""
        return step_ends(batch, self.tokenizer, self.separator)

    def scores(self, batch: Batch, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score steps and outcome.

        Args:
            batch: prompts with responses.
            ends: `step_ends(batch)`, where it is known already.

        Returns:
            (R, T) float32 log-odds that all is right up to each step, at the steps' ends and 0 elsewhere; and (R,) the score of
            the outcome, read at the last token.
        """
        ends = self.step_ends(batch) if ends is None else ends
        hidden, layout = self.backbone.hidden_states(batch)
        assert layout.at is not None
        steps = self.head(hidden[layout.at[ends]])[:, 0]
        outcome = self.head(last_hidden(hidden, layout, batch))[:, 1]
        table = torch.zeros(ends.shape, dtype=torch.float32, device=ends.device)
        return table.masked_scatter(ends, steps), outcome

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.scores(batch)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write backbone, tokenizer and head; an adapter is merged into what is written. The model is left as it is."""
        self.backbone.save_pretrained(directory, merged=True)
        write_head(Path(directory), HEAD, self.head, {"width": self.backbone.width, "separator": self.separator})

    def describe(self) -> dict[str, Any]:
        """Return what this model is, for a run's record."""
        return self.backbone.describe() | {
            "files": model_hashes(self, [self.backbone]),
            "parameters": sum(p.numel() for p in self.parameters()),
            "trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
            "separator": self.separator,
        }


def _product(steps: Tensor, ends: Tensor) -> Tensor:
    return (logsigmoid(steps) * ends).sum(dim=1)


def _min(steps: Tensor, ends: Tensor) -> Tensor:
    return steps.masked_fill(~ends, torch.inf).amin(dim=1)


def _mean(steps: Tensor, ends: Tensor) -> Tensor:
    return (steps * ends).sum(dim=1) / ends.sum(dim=1)


def _last(steps: Tensor, ends: Tensor) -> Tensor:
    columns = torch.arange(ends.shape[1], device=ends.device)
    return steps.gather(1, (columns * ends).amax(dim=1, keepdim=True)).squeeze(1)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "min": _min,
    "product": _product,
    "mean": _mean,
    "last": _last,
}
"""(R, T) log-odds and the steps' ends to (R,): the worst step, the log-probability that all steps are right if they are
independent (Lightman et al. 2023, arXiv 2305.20050, section 2), the mean, or the last step."""
