"""Value models: the return expected from each token of a response on, on their own backbone or the policy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self, Unpack

from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.model_files import VALUE_HEAD
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.head_files import HeadFiles
from rlhf_core.models.headed_model import HeadedModel, load_backbone, wrong_kind
from rlhf_core.models.heads import TwoLayerHead, scalar_head_name
from rlhf_core.models.hidden_states import HiddenStates
from rlhf_core.models.load_options import LoadOptions, apply_load_options, reading_options
from rlhf_core.models.reward_model import RewardModel
from rlhf_core.models.sequence_model import SequenceModel

NewHead = Literal["new", "reward"]


class ValueModel(HeadedModel):
    """Estimates a response's return from the prompt and the response so far.

    Axes: R responses, T response tokens, S hidden states, D their width.

    A new head's last layer is 0, so every value is 0 at the start, as in Ziegler et al. 2019 (arXiv 1909.08593): advantages
    then begin as returns, and on a shared backbone the first gradient of values moves the head alone.

    Args:
        backbone: the model whose hidden states the head scores; a policy, for a backbone that is shared with it.
        head: maps (S, D) to (S, 1).
    """

    head_name = VALUE_HEAD

    def __init__(self, backbone: SequenceModel, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        new_head: bool = False,
        head: NewHead = "new",
        seed: int = 0,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load a value model that `save_pretrained` wrote, or start one from a policy's or a reward model's backbone.

        Args:
            new_head: whether a checkpoint without a value head gets one, for training; else that is an error.
            head: the head that it gets: `new`, with values of 0, or the `reward` model's, whose score at the last token is then
                the value after it, the usual start of a critic.
            seed: of a new head.

        Raises:
            ModelError: the head is missing, or its width isn't the backbone's.
            ConfigError: `reward` for a reward model of several members, which has no single head to start from.
        """
        reading = reading_options(options, may_be_quantised=False)
        fix = "train one, or set `new_head=True` to start with a new one"
        files = cls.find_head(source, new_head=new_head, fix=fix, warn=head == "new")
        if files is None and head == "reward":
            return cls._of_reward(RewardModel.from_pretrained(source, **options), str(source))
        backbone = load_backbone(source, reading, has_head_files=files is not None)
        if files is not None:
            description = files.describe(width=backbone.width, keys={"head": str})
            model = cls(backbone, files.new_scalar_head(description))
            files.load_into(model.head)
        else:
            model = cls.on(backbone, seed=seed)
        apply_load_options(model, [backbone], options)
        return model

    @classmethod
    def adopt(cls, model: object, *, head: NewHead = "new", seed: int = 0) -> Self:
        """Return a value model in memory as it is, or make one that trains the backbone of another model in memory.

        For a backbone that a policy trains as well, use `on(policy)`.

        Args:
            model: a value model, a policy, or a reward model.
            head: for a reward model: a `new` head, or its own head (`reward`), which both then share.
            seed: of a new head.

        Raises:
            ModelError: the object is none of these.
            ConfigError: `reward` for a reward model of several members, which has no single head to start from.
        """
        if isinstance(model, cls):
            return model
        if isinstance(model, RewardModel):
            backbone = model.backbone_list[0]
            return cls._of_reward(model, backbone.source) if head == "reward" else cls.on(backbone, seed=seed)
        if not isinstance(model, SequenceModel) or head == "reward":
            allowed = "a RewardModel" if head == "reward" else "a PolicyModel, a RewardModel or a ValueModel"
            raise wrong_kind(model, wanted=cls, allowed=allowed)
        return cls.on(model.without_head(), seed=seed)

    @classmethod
    def on(cls, backbone: SequenceModel, *, head: nn.Module | None = None, seed: int = 0) -> Self:
        """Put a head on a backbone, or on a policy, which stays whole: both then train the same layers.

        One forward pass serves both:

            states = policy.hidden_states(batch)
            policy.token_logps(batch, states=states), value.token_values(batch, states=states)

        Args:
            head: that of another value model; None for a new one.
            seed: of a new head.

        Raises:
            ModelError: the head is for hidden states of another width.
        """
        width = backbone.width
        if head is None:
            head = TwoLayerHead(width, seed=stream_seed(seed, "value head"), zero=True)
        elif getattr(head, "width", width) != width:
            raise ModelError(
                "the value head doesn't fit the backbone",
                place=backbone.source or "model",
                got=f"a head of width {head.width} for a backbone of {width}",
                fix="use a head that was trained on this backbone, or a new one",
            )
        return cls(backbone, head.to(backbone.device))

    @classmethod
    def _of_reward(cls, model: RewardModel, place: str) -> Self:
        """Return a value model with the backbone and head of a reward model of one member; `place` is for the error."""
        if model.members > 1:
            raise ConfigError(
                "a value model starts with one head, and each of the reward model's members has its own",
                place=place,
                got=f"{model.members} members",
                fix='leave `head="reward"` out, or use a reward model of one member',
            )
        return cls(model.backbone_list[0], model.heads[0])

    @property
    def backbone_list(self) -> list[SequenceModel]:
        return [self.backbone]

    def head_facts(self) -> dict[str, Any]:
        return {"head": scalar_head_name(self.head)}

    def values(
        self, batch: Batch, *, where: Tensor | None = None, states: HiddenStates | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return `token_values` (R, T) and `end_values` (R,) from one forward pass."""
        states = self._states(batch, states)
        return self.token_values(batch, where=where, states=states), self.end_values(batch, states=states)

    def token_values(self, batch: Batch, *, where: Tensor | None = None, states: HiddenStates | None = None) -> Tensor:
        """Return (R, T) float32: the value of the state before each response token; 0 outside the mask.

        The state before token t is the prompt with the tokens before t: the one in which the policy chose t.

        Args:
            where: (R, T) bool, the tokens; None takes the loss mask.
            states: the batch's hidden states from the same backbone, where they were computed before.
        """
        states = self._states(batch, states, drop_last=True)
        return states.to_tokens(self.head(states.predicting(where))[:, 0], where)

    def end_values(self, batch: Batch, *, states: HiddenStates | None = None) -> Tensor:
        """Return (R,) float32: the value of the state after each response's last token, or after the prompt of an empty one.

        That is the return still expected of a response cut off by a length limit; one that ended has none left.
        """
        return self.head(self._states(batch, states).last())[:, 0]

    def forward(self, batch: Batch) -> Tensor:
        return self.token_values(batch)

    def _states(self, batch: Batch, states: HiddenStates | None, *, drop_last: bool = False) -> HiddenStates:
        """Return the batch's hidden states: those given, after a check, else from a forward pass."""
        if states is None:
            return self.backbone.hidden_states(batch, drop_last=drop_last)
        states.check(batch)
        return states

    def save_pretrained(self, directory: str | Path) -> None:
        """Write backbone, tokenizer and head, without a policy's output layer; the model in memory is left as it is.

        An adapter is merged into what is written; an adapter on a quantised base, which merging would round again, is written
        alone and names its base.
        """
        quantised = bool(getattr(self.backbone.network, "is_quantized", False))
        self.backbone.without_head(freeze=False).save_pretrained(directory, merged=not quantised)
        description = {"width": self.backbone.width, **self.head_facts()}
        HeadFiles(Path(directory), self.head_name).write(self.head, description)
