"""Process reward models: a score at the end of each step, and one for the outcome."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.model_files import PROCESS_REWARD_HEAD
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.headed_model import HeadedModel, load_backbone, wrong_kind
from rlhf_core.models.heads import (
    TwoLayerHead,
    describe_head,
    fill_head,
    head_directory,
    no_head,
    warn_of_other_heads,
    write_head,
)
from rlhf_core.models.load_options import LoadOptions, loading, settle
from rlhf_core.models.reasoning_steps import step_ends
from rlhf_core.models.sequence_model import SequenceModel

HEAD = PROCESS_REWARD_HEAD
Aggregation = Literal["min", "product", "mean", "last"]


class ProcessRewardModel(HeadedModel):
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
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load what `save_pretrained` wrote.

        Args:
            new_head: give a checkpoint without a head a new one, for training; without it, that is an error.
            separator: text that ends a step; None takes what the checkpoint was trained with, or a line's end.
            seed: of a new head.

        Raises:
            ModelError: the head is missing, or its width isn't the backbone's.
            ConfigError: another separator is asked for than the checkpoint was trained with.
        """
        settings = loading(options, quantised=False)
        where = head_directory(source, HEAD)
        if where is None and not new_head:
            fix = "train one: `rlhf train process_reward`"
            raise ModelError(no_head(HEAD), place=str(source), got=f"no {HEAD}.json", fix=fix)
        backbone = load_backbone(source, settings, saved=where is not None)
        if where is not None:
            about = describe_head(where, HEAD, width=backbone.width, keys={"separator": str})
            head = TwoLayerHead(backbone.width, outputs=2)
            fill_head(where, HEAD, head)
            model = cls(backbone, head, separator=about["separator"])
            model.check_separator(separator)
        else:
            warn_of_other_heads(source, HEAD)
            model = cls.on(backbone, separator="\n" if separator is None else separator, seed=seed)
        settle(model, [backbone], options)
        return model

    @classmethod
    def adopt(cls, model: object, *, separator: str | None = None, seed: int = 0) -> Self:
        """Return a process reward model as it is, or a new head on the backbone of a model in memory, which is shared with it.

        Args:
            model: a process reward model, or a policy.
            separator: text that ends a step; None takes what there is, or a line's end.
            seed: of a new head.

        Raises:
            ModelError: it is of another kind.
            ConfigError: it was trained with another separator.
        """
        if isinstance(model, cls):
            model.check_separator(separator)
            return model
        if not isinstance(model, SequenceModel):
            raise wrong_kind(model, wanted=cls, allowed="a PolicyModel or a ProcessRewardModel")
        return cls.on(model.without_head(), separator="\n" if separator is None else separator, seed=seed)

    @classmethod
    def on(cls, backbone: SequenceModel, *, separator: str = "\n", seed: int = 0) -> Self:
        """Put a new head on a backbone."""
        head = TwoLayerHead(backbone.width, outputs=2, seed=stream_seed(seed, "process reward head"))
        return cls(backbone, head.to(backbone.device), separator=separator)

    @property
    def _backbones(self) -> list[SequenceModel]:
        return [self.backbone]

    def check_separator(self, separator: str | None) -> None:
        """Refuse another separator than the model was trained with; None asks for nothing."""
        if separator is not None and separator != self.separator:
            raise ConfigError(
                "the model was trained with another separator",
                place="separator",
                got=f"{separator!r} for {self.separator!r}",
                fix="leave `separator` out, or start from a model without a head",
            )

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
        states = self.backbone.hidden_states(batch)
        steps = self.head(states.at(ends))[:, 0]
        return states.to_tokens(steps, ends), self.head(states.last())[:, 1]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.scores(batch)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write backbone, tokenizer and head; an adapter is merged into what is written. The model is left as it is."""
        self.backbone.save_pretrained(directory, merged=True)
        write_head(Path(directory), HEAD, self.head, {"width": self.backbone.width, "separator": self.separator})

    def _about(self) -> dict[str, Any]:
        return {"separator": self.separator}


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
