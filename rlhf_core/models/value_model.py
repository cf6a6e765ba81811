"""Value models: what a response is expected to score, token by token, on a backbone of their own or on the policy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self, Unpack

from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.model_files import VALUE_HEAD
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.headed_model import HeadedModel, load_backbone, wrong_kind
from rlhf_core.models.heads import (
    SCALAR_HEADS,
    TwoLayerHead,
    describe_head,
    fill_head,
    head_directory,
    head_kind,
    no_head,
    warn_of_other_heads,
    write_head,
)
from rlhf_core.models.hidden_states import HiddenStates
from rlhf_core.models.load_options import LoadOptions, loading, settle
from rlhf_core.models.reward_model import RewardModel
from rlhf_core.models.sequence_model import SequenceModel

HEAD = VALUE_HEAD
NewHead = Literal["new", "reward"]


class ValueModel(HeadedModel):
    """Expects a response's return from the prompt and the response so far. Axes: R responses, T response tokens.

    A new head's last layer is 0, and so is every value at the start, as in the value heads of Ziegler et al. 2019
    (arXiv 1909.08593): advantages then begin as returns, and on a shared backbone the first step's gradient of values, which know
    nothing yet, moves the head alone.

    Args:
        backbone: what the head stands on; a policy for one that is shared with it.
        head: (S, D) to (S, 1).
    """

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
        """Load what `save_pretrained` wrote, or begin with the backbone of a policy or of a reward model.

        Args:
            new_head: give a checkpoint without a value head one, for training; without it, that is an error.
            head: what that one is: `new`, with values of 0, or the `reward` model's, whose score at the last token is then the
                value after it, the usual start of a critic.
            seed: of a new head.

        Raises:
            ModelError: the head is missing, or its width isn't the backbone's.
            ConfigError: a reward model of several members has no one head to begin with.
        """
        settings = loading(options, quantised=False)
        where = head_directory(source, HEAD)
        if where is None and not new_head:
            fix = "train one, or set `new_head=True` to begin with a new one"
            raise ModelError(no_head(HEAD), place=str(source), got=f"no {HEAD}.json", fix=fix)
        if where is None and head == "reward":
            return cls._of_reward(RewardModel.from_pretrained(source, **options), str(source))
        backbone = load_backbone(source, settings, saved=where is not None)
        if where is not None:
            about = describe_head(where, HEAD, width=backbone.width, keys={"head": str})
            if about["head"] not in SCALAR_HEADS:
                place = str(where / f"{HEAD}.json")
                raise ModelError("is no head that is known here", place=place, got=f"head {about['head']}")
            model = cls(backbone, SCALAR_HEADS[about["head"]](backbone.width))
            fill_head(where, HEAD, model.head)
        else:
            warn_of_other_heads(source, HEAD)
            model = cls.on(backbone, seed=seed)
        settle(model, [backbone], options)
        return model

    @classmethod
    def adopt(cls, model: object, *, head: NewHead = "new", seed: int = 0) -> Self:
        """Return a value model as it is, or make one of a model in memory, whose backbone it trains as its own.

        One that a policy is to share, each training it for its own, is `on(policy)`.

        Args:
            model: a value model, a policy, or a reward model.
            head: of a reward model: a `new` head, or its own (`reward`), shared too.
            seed: of a new head.

        Raises:
            ModelError: it is of another kind.
            ConfigError: a reward model of several members has no one head to begin with.
        """
        if isinstance(model, cls):
            return model
        if isinstance(model, RewardModel):
            if head == "reward":
                return cls._of_reward(model, model._backbones[0].source)
            return cls.on(model._backbones[0], seed=seed)
        if not isinstance(model, SequenceModel) or head == "reward":
            allowed = "a RewardModel" if head == "reward" else "a PolicyModel, a RewardModel or a ValueModel"
            raise wrong_kind(model, wanted=cls, allowed=allowed)
        return cls.on(model.without_head(), seed=seed)

    @classmethod
    def on(cls, backbone: SequenceModel, *, seed: int = 0) -> Self:
        """Put a new head on a backbone. A policy stays whole: both train its layers, and its hidden states serve both.

        states = policy.hidden_states(batch)
        policy.token_logps(batch, states=states), value.token_values(batch, states=states)
        """
        head = TwoLayerHead(backbone.width, seed=stream_seed(seed, "value head"), zero=True)
        return cls(backbone, head.to(backbone.device))

    @classmethod
    def _of_reward(cls, model: RewardModel, place: str) -> Self:
        if model.members > 1:
            raise ConfigError(
                "a value model begins with one head, and the reward model's members have one each",
                place=place,
                got=f"{model.members} members",
                fix='leave `head="reward"` out, or use a reward model of one member',
            )
        return cls(model._backbones[0], model.heads[0])

    @property
    def _backbones(self) -> list[SequenceModel]:
        return [self.backbone]

    def values(
        self, batch: Batch, *, where: Tensor | None = None, states: HiddenStates | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return `token_values` and `end_values` of one forward pass."""
        states = self._states(batch, states)
        return self.token_values(batch, where=where, states=states), self.end_values(batch, states=states)

    def token_values(self, batch: Batch, *, where: Tensor | None = None, states: HiddenStates | None = None) -> Tensor:
        """Return (R, T) float32: the value of the state before each response token; 0 outside the mask.

        The state before token t is the prompt with the tokens before t: the one that the policy chose t in.

        Args:
            where: (R, T) bool, the tokens; None takes the loss mask.
            states: the hidden states of the batch on the same backbone, where they are known: nothing is forwarded again.
        """
        states = self._states(batch, states, drop_last=True)
        return states.to_tokens(self.head(states.predicting(where))[:, 0], where)

    def end_values(self, batch: Batch, *, states: HiddenStates | None = None) -> Tensor:
        """Return (R,) float32: the value of the state after each response's last token, or after its prompt where it is empty.

        That is what a response that was cut off could still bring; one that ended brings nothing more.
        """
        return self.head(self._states(batch, states).last())[:, 0]

    def forward(self, batch: Batch) -> Tensor:
        return self.token_values(batch)

    def _states(self, batch: Batch, states: HiddenStates | None, *, drop_last: bool = False) -> HiddenStates:
        if states is None:
            return self.backbone.hidden_states(batch, drop_last=drop_last)
        states.check(batch)
        return states

    def save_pretrained(self, directory: str | Path) -> None:
        """Write backbone, tokenizer and head, a policy's output layer left out; the model is left as it is.

        An adapter is merged into what is written. That of a quantised base, which would be rounded again, is written alone and
        names its base.
        """
        quantised = bool(getattr(self.backbone.network, "is_quantized", False))
        self.backbone.without_head(freeze=False).save_pretrained(directory, merged=not quantised)
        write_head(Path(directory), HEAD, self.head, {"width": self.backbone.width, "head": head_kind(self.head)})

    def _about(self) -> dict[str, Any]:
        return {"head": head_kind(self.head)}
