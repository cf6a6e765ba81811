"""Process reward models: a score at the end of each step of a response, and one for the outcome."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, Unpack

from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.model_files import PROCESS_REWARD_HEAD
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.head_files import HeadFiles
from rlhf_core.models.headed_model import HeadedModel, load_backbone, wrong_kind
from rlhf_core.models.heads import TwoLayerHead
from rlhf_core.models.load_options import LoadOptions, apply_load_options, reading_options
from rlhf_core.models.reasoning_steps import step_ends
from rlhf_core.models.sequence_model import SequenceModel


class ProcessRewardModel(HeadedModel):
    """Scores the steps of responses and their outcome.

    Axes: R responses, T response tokens, S hidden states, D their width.

    Args:
        backbone: the model whose hidden states the head scores.
        head: maps (S, D) to (S, 2): the log-odds that all steps up to this one are right, and the outcome's score.
        separator: text that ends a step.
    """

    head_name = PROCESS_REWARD_HEAD

    def __init__(self, backbone: SequenceModel, head: nn.Module, *, separator: str = "\n") -> None:
        super().__init__()
        if not separator:
            raise ConfigError("the text that ends a step is empty", place="separator", got=repr(separator))
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
        """Load a process reward model that `save_pretrained` wrote, or start one from a language model.

        Args:
            new_head: whether a checkpoint without a head gets a new one, for training; else that is an error.
            separator: text that ends a step; None takes what the checkpoint was trained with, or a line's end.
            seed: of a new head.

        Raises:
            ModelError: the head is missing, or its width isn't the backbone's.
            ConfigError: the checkpoint was trained with another separator.
        """
        reading = reading_options(options, may_be_quantised=False)
        files = cls.find_head(source, new_head=new_head, fix="train one: `rlhf train process_reward`")
        backbone = load_backbone(source, reading, has_head_files=files is not None)
        if files is not None:
            description = files.describe(width=backbone.width, keys={"separator": str})
            head = TwoLayerHead(backbone.width, outputs=2)
            files.load_into(head)
            model = cls(backbone, head, separator=description["separator"])
            model.check_separator(separator)
        else:
            model = cls.on(backbone, separator="\n" if separator is None else separator, seed=seed)
        apply_load_options(model, [backbone], options)
        return model

    @classmethod
    def adopt(cls, model: object, *, separator: str | None = None, seed: int = 0) -> Self:
        """Return a process reward model in memory as it is, or put a new head on a policy's backbone, which both then share.

        Args:
            model: a process reward model, or a policy.
            separator: text that ends a step; None takes the model's, or a line's end.
            seed: of a new head.

        Raises:
            ModelError: the object is neither.
            ConfigError: the model was trained with another separator.
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
    def backbone_list(self) -> list[SequenceModel]:
        return [self.backbone]

    def head_facts(self) -> dict[str, Any]:
        return {"separator": self.separator}

    def check_separator(self, separator: str | None) -> None:
        """Check a wanted separator against the one that the model was trained with; None accepts any.

        Raises:
            ConfigError: the two differ.
        """
        if separator is not None and separator != self.separator:
            raise ConfigError(
                "the model was trained with another separator",
                place="separator",
                got=f"{separator!r} for {self.separator!r}",
                fix="leave `separator` out, or start from a model without a head",
            )

    def step_ends(self, batch: Batch) -> Tensor:
        """Return (R, T) bool: the token at which each step ends."""
        return step_ends(batch, self.tokenizer, self.separator)

    def scores(self, batch: Batch, ends: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score the steps and the outcome of each response.

        Args:
            ends: (R, T) bool, `step_ends(batch)` where it was computed before.

        Returns:
            (R, T) float32 log-odds that all steps up to each one are right, at the steps' ends and 0 elsewhere; and (R,) the
            score of the outcome, read at the last token.
        """
        ends = self.step_ends(batch) if ends is None else ends
        states = self.backbone.hidden_states(batch)
        steps = self.head(states.at(ends))[:, 0]
        return states.to_tokens(steps, ends), self.head(states.last())[:, 1]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.scores(batch)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write backbone, tokenizer and head, an adapter merged into the weights; the model in memory is left as it is."""
        self.backbone.save_pretrained(directory, merged=True)
        description = {"width": self.backbone.width, **self.head_facts()}
        HeadFiles(Path(directory), self.head_name).write(self.head, description)
