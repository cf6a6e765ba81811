"""Reward models: a backbone with heads that score a response at its last token, alone or as an ensemble."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.model_files import REWARD_HEAD
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.adapters import trained_module
from rlhf_core.models.headed_model import HeadedModel, load_backbone, wrong_kind
from rlhf_core.models.heads import (
    SCALAR_HEADS,
    LinearHead,
    TwoLayerHead,
    describe_head,
    fill_head,
    head_directory,
    head_kind,
    no_head,
    warn_of_other_heads,
    write_head,
)
from rlhf_core.models.load_options import LoadOptions, loading, settle
from rlhf_core.models.loading import architecture, load_model
from rlhf_core.models.sequence_model import SequenceModel

HEAD = REWARD_HEAD
MOST_MEMBERS = 64


class RewardModel(HeadedModel):
    """K members that score each response; one backbone for all of them, or one each. Axes: R responses, D hidden width.

    Args:
        backbones: one that all heads stand on, or one a head.
        heads: a head a member, (S, D) to (S, 1).
        centred: whether the members were trained to score a pair around 0. Elsewhere each one's scores are known up to a
            constant of its own, so members' scores of one response can't be compared.
    """

    def __init__(
        self, backbones: Sequence[SequenceModel], heads: Sequence[nn.Module], *, centred: bool = False
    ) -> None:
        super().__init__()
        if len(backbones) not in (1, len(heads)):
            raise ValueError(f"{len(heads)} heads can't stand on {len(backbones)} backbones")
        self.backbones, self.heads, self.centred = nn.ModuleList(backbones), nn.ModuleList(heads), centred

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        members: int | None = None,
        share_backbone: bool | None = None,
        new_head: bool = False,
        seed: int = 0,
        **options: Unpack[LoadOptions],
    ) -> Self:
        """Load what `save_pretrained` wrote, or a decoder of the hub with a classification head of one label.

        Args:
            members: how many there must be; None takes what the checkpoint has, or one.
            share_backbone: whether the members stand on one backbone; None takes what the checkpoint has, or one backbone.
            new_head: give a checkpoint without a head new ones, for training; without it, that is an error.
            seed: of new heads, member by member.

        Raises:
            ModelError: the head is missing, or its width isn't the backbone's.
            ConfigError: another number of members is asked for than the checkpoint has.
        """
        settings = loading(options, quantised=False)
        where = head_directory(source, HEAD)
        if where is not None:
            model = cls._saved(where, source, settings)
        elif is_classifier(source, options):
            model = cls._classifier(str(source), settings)
        elif new_head:
            model = cls._new(source, members or 1, share_backbone is not False, seed, settings)
        else:
            fix = "train one: `rlhf train reward_model`"
            raise ModelError(no_head(HEAD), place=str(source), got=f"no {HEAD}.json", fix=fix)
        model.check_members(members, share_backbone)
        settle(model, model._backbones, options)
        return model

    @classmethod
    def adopt(
        cls, model: object, *, members: int | None = None, share_backbone: bool | None = None, seed: int = 0
    ) -> Self:
        """Return a reward model as it is, or new heads on the backbone of a model in memory, which is shared with it.

        Args:
            model: a reward model, or a policy.
            members: how many there must be; None takes what there are, or one.
            share_backbone: whether the members stand on one backbone; None takes what there is, or one backbone.
            seed: of new heads.

        Raises:
            ModelError: it is of another kind.
            ConfigError: it has another number of members, or stands on backbones in another way.
        """
        if isinstance(model, cls):
            model.check_members(members, share_backbone)
            return model
        if not isinstance(model, SequenceModel):
            raise wrong_kind(model, wanted=cls, allowed="a PolicyModel or a RewardModel")
        shared = share_backbone is not False
        return cls.on(model.without_head(), members=members or 1, share_backbone=shared, seed=seed)

    @classmethod
    def on(cls, backbone: SequenceModel, *, members: int = 1, share_backbone: bool = True, seed: int = 0) -> Self:
        """Put new heads, each with a seed of its own, on a backbone or on copies of it."""
        backbones = [backbone, *(copy.deepcopy(backbone) for _ in range(0 if share_backbone else members - 1))]
        seeds = [stream_seed(seed, "reward head", member) for member in range(members)]
        heads = [TwoLayerHead(backbone.width, seed=of_member) for of_member in seeds]
        return cls(backbones, [head.to(backbone.device) for head in heads])

    @classmethod
    def _saved(cls, where: Path, source: str | Path, settings: dict[str, Any]) -> Self:
        first = load_backbone(source, settings, saved=True)
        keys = {"head": str, "members": int, "shared": bool}
        about = describe_head(where, HEAD, width=first.width, keys=keys)
        if about["head"] not in SCALAR_HEADS or not 1 <= about["members"] <= MOST_MEMBERS:
            got = f"head {about['head']}, {about['members']} members"
            raise ModelError("is no head that is known here", place=str(where / f"{HEAD}.json"), got=got)
        folders = [where / f"member-{member}" for member in range(1, 1 if about["shared"] else about["members"])]
        backbones = [first, *(load_backbone(folder, settings, saved=True) for folder in folders)]
        heads = [SCALAR_HEADS[about["head"]](about["width"]) for _ in range(about["members"])]
        # Files written before there was this note don't have it.
        model = cls(backbones, heads, centred=about.get("centred") is True)
        fill_head(where, HEAD, model.heads)
        return model

    @classmethod
    def _new(cls, source: str | Path, members: int, share_backbone: bool, seed: int, settings: dict[str, Any]) -> Self:
        warn_of_other_heads(source, HEAD)
        backbone = load_backbone(source, settings, saved=False)
        return cls.on(backbone, members=members, share_backbone=share_backbone, seed=seed)

    @classmethod
    def _classifier(cls, source: str, settings: dict[str, Any]) -> Self:
        whole = SequenceModel.of(load_model(source, kind="classifier", **settings), source)
        head = trained_module(getattr(whole.network, "score", None))
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            got = f"{head.out_features} labels" if isinstance(head, nn.Linear) else f"{type(whole.network).__name__}"
            raise ModelError(
                "only a decoder with one label is a reward model here",
                place=source,
                got=got,
                fix="use a checkpoint with `num_labels: 1` whose head is its last layer, `score`",
            )
        return cls([whole.without_head()], [LinearHead.like(head)])

    @property
    def _backbones(self) -> list[SequenceModel]:
        return list(self.backbones)  # type: ignore[arg-type]

    @property
    def members(self) -> int:
        return len(self.heads)

    def check_members(self, members: int | None, share_backbone: bool | None) -> None:
        """Refuse another number of members than there are, or backbones shared in another way; None asks for nothing."""
        if members is not None and members != self.members:
            raise ConfigError(
                f"{members} members were asked for",
                place="ensemble.size",
                got=f"a model of {self.members}",
                fix=f"set `ensemble.size` to {self.members}, or start from a model without heads",
            )
        shared = len(self.backbones) == 1
        if share_backbone is not None and self.members > 1 and share_backbone != shared:
            raise ConfigError(
                "the model's members stand on " + ("one backbone" if shared else "a backbone each"),
                place="ensemble.share_backbone",
                got=str(share_backbone).lower(),
                fix="leave it out, or start from a model without heads",
            )

    def scores(self, batch: Batch) -> Tensor:
        """Return (R, K) float32: what each member thinks of each response, read at its last token."""
        columns: list[Tensor] = []
        hidden: Tensor | None = None
        for member, head in enumerate(self.heads):
            if hidden is None or len(self.backbones) > 1:
                hidden = self._backbones[member].hidden_states(batch).last()
            columns.append(head(hidden))
        return torch.cat(columns, dim=1)

    def score(self, batch: Batch) -> Tensor:
        """Return (R,) float32, the members' mean."""
        return self.scores(batch).mean(dim=1)

    def forward(self, batch: Batch) -> Tensor:
        return self.scores(batch)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write backbone, tokenizer and heads; adapters are merged into what is written. The model is left as it is."""
        directory = Path(directory)
        for member, backbone in enumerate(self._backbones):
            backbone.save_pretrained(directory if member == 0 else directory / f"member-{member}", merged=True)
        about = {
            "head": head_kind(self.heads[0]),
            "width": self._backbones[0].width,
            "members": self.members,
            "shared": len(self.backbones) == 1,
            "centred": self.centred,
        }
        write_head(directory, HEAD, self.heads, about)

    def _about(self) -> dict[str, Any]:
        return {"members": self.members, "shared_backbone": len(self.backbones) == 1}


def is_classifier(source: str | Path, options: LoadOptions) -> bool:
    """Tell whether a checkpoint says that it is a decoder with a classification head, as reward models of the hub are."""
    found = architecture(source, trust_remote_code=options.get("trust_remote_code", False))
    return found.endswith("ForSequenceClassification")
