"""Reward models: one score per response, read at its last token, from one head or an ensemble of them."""

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
from rlhf_core.models.head_files import HeadFiles, missing_head, warn_of_heads
from rlhf_core.models.headed_model import HeadedModel, load_backbone, wrong_kind
from rlhf_core.models.heads import LinearHead, TwoLayerHead, scalar_head_name
from rlhf_core.models.load_options import LoadOptions, apply_load_options, reading_options
from rlhf_core.models.loading import architecture, load_model
from rlhf_core.models.saved_adapters import trained_module
from rlhf_core.models.sequence_model import SequenceModel

MOST_MEMBERS = 64


class RewardModel(HeadedModel):
    """An ensemble of K members (often one) that score each response, on one backbone for all or one per member.

    Axes: R responses, K members, S hidden states, D their width.

    Args:
        backbones: one that all heads use, or one per head.
        heads: one per member; each maps (S, D) to (S, 1).
        centred: whether training pulled the scores of each pair towards a mean of 0. Otherwise a member's scores are defined up
            to a constant, so the scores of different members can't be compared.
    """

    head_name = REWARD_HEAD

    def __init__(
        self, backbones: Sequence[SequenceModel], heads: Sequence[nn.Module], *, centred: bool = False
    ) -> None:
        super().__init__()
        if len(backbones) not in (1, len(heads)):
            raise ValueError(f"{len(heads)} heads can't use {len(backbones)} backbones")
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
        """Load a reward model that `save_pretrained` wrote, or a hub decoder with a classification head of one label.

        Args:
            members: how many members there must be; None takes the checkpoint's number, or one.
            share_backbone: whether the members use one backbone; None takes what the checkpoint has, or one backbone.
            new_head: whether a checkpoint without a head gets new ones, for training; else that is an error.
            seed: of new heads, from which each member's is derived.

        Raises:
            ModelError: the head is missing, or its width isn't the backbone's.
            ConfigError: the checkpoint has another number of members.
        """
        reading = reading_options(options, may_be_quantised=False)
        files = HeadFiles.find(source, cls.head_name)
        if files is not None:
            model = cls._saved(files, source, reading)
        elif is_classifier(source, options):
            model = cls._of_classifier(str(source), reading)
        elif not new_head:
            raise missing_head(cls.head_name, source, "train one: `rlhf train reward_model`")
        else:
            warn_of_heads(source, own=cls.head_name)
            backbone = load_backbone(source, reading, has_head_files=False)
            model = cls.on(backbone, members=members or 1, share_backbone=share_backbone is not False, seed=seed)
        model.check_members(members, share_backbone)
        apply_load_options(model, model.backbone_list, options)
        return model

    @classmethod
    def adopt(
        cls, model: object, *, members: int | None = None, share_backbone: bool | None = None, seed: int = 0
    ) -> Self:
        """Return a reward model in memory as it is, or put new heads on a policy's backbone, which both then share.

        Args:
            model: a reward model, or a policy.
            members: how many members there must be; None takes the model's number, or one.
            share_backbone: whether the members use one backbone; None takes what the model has, or one backbone.
            seed: of new heads.

        Raises:
            ModelError: the object is neither.
            ConfigError: the model has another number of members, or shares backbones in another way.
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
        """Put new heads, each with its own seed, on a backbone, or on it and copies of it."""
        backbones = [backbone, *(copy.deepcopy(backbone) for _ in range(0 if share_backbone else members - 1))]
        seeds = [stream_seed(seed, "reward head", member) for member in range(members)]
        heads = [TwoLayerHead(backbone.width, seed=of_member) for of_member in seeds]
        return cls(backbones, [head.to(backbone.device) for head in heads])

    @classmethod
    def _saved(cls, files: HeadFiles, source: str | Path, reading: dict[str, Any]) -> Self:
        """Load a reward model from its head files; further backbones are in `member-1`, `member-2` … beside them."""
        first = load_backbone(source, reading, has_head_files=True)
        about = files.describe(width=first.width, keys={"head": str, "members": int, "shared": bool})
        if not 1 <= about["members"] <= MOST_MEMBERS:
            raise files.unsupported(f"{about['members']} members", f"a model has 1 to {MOST_MEMBERS} members")
        folders = [files.directory / f"member-{i}" for i in range(1, 1 if about["shared"] else about["members"])]
        backbones = [first, *(load_backbone(folder, reading, has_head_files=True) for folder in folders)]
        heads = [files.new_scalar_head(about) for _ in range(about["members"])]
        # Files written before this note existed don't have it.
        model = cls(backbones, heads, centred=about.get("centred") is True)
        files.load_into(model.heads)
        return model

    @classmethod
    def _of_classifier(cls, source: str, reading: dict[str, Any]) -> Self:
        """Load a transformers sequence classifier of one label as a reward model of one member.

        Raises:
            ModelError: the classifier has several labels, or a head of another shape.
        """
        whole = SequenceModel.of(load_model(source, kind="classifier", **reading), source)
        head = trained_module(getattr(whole.network, "score", None))
        if not isinstance(head, nn.Linear) or head.out_features != 1:
            got = f"{head.out_features} labels" if isinstance(head, nn.Linear) else f"{type(whole.network).__name__}"
            raise ModelError(
                "a sequence classifier must be a decoder with one label to be used as a reward model",
                place=source,
                got=got,
                fix="use a checkpoint with `num_labels: 1` whose head is its last layer, `score`",
            )
        return cls([whole.without_head()], [LinearHead.like(head)])

    @property
    def backbone_list(self) -> list[SequenceModel]:
        return list(self.backbones)  # type: ignore[arg-type]

    def head_facts(self) -> dict[str, Any]:
        return {"members": self.members, "shared_backbone": len(self.backbones) == 1}

    @property
    def members(self) -> int:
        """K, the number of heads."""
        return len(self.heads)

    def check_members(self, members: int | None, share_backbone: bool | None) -> None:
        """Check the number of members, and whether they share a backbone, against what the options ask for; None accepts any.

        Raises:
            ConfigError: the model's differ.
        """
        if members is not None and members != self.members:
            raise ConfigError(
                f"`ensemble.size` is {members}, but the model has {self.members} members",
                place="ensemble.size",
                fix=f"set `ensemble.size` to {self.members}, or start from a model without heads",
            )
        shared = len(self.backbones) == 1
        if share_backbone is not None and self.members > 1 and share_backbone != shared:
            raise ConfigError(
                "the model's ensemble members have " + ("one backbone" if shared else "a backbone each"),
                place="ensemble.share_backbone",
                got=str(share_backbone).lower(),
                fix="leave it out, or start from a model without heads",
            )

    def scores(self, batch: Batch) -> Tensor:
        """Return (R, K) float32: each member's score of each response, read at its last token."""
        columns: list[Tensor] = []
        hidden: Tensor | None = None
        for member, head in enumerate(self.heads):
            if hidden is None or len(self.backbones) > 1:
                hidden = self.backbone_list[member].hidden_states(batch).last()
            columns.append(head(hidden))
        return torch.cat(columns, dim=1)

    def score(self, batch: Batch) -> Tensor:
        """Return (R,) float32: the mean of the members' scores of each response."""
        return self.scores(batch).mean(dim=1)

    def forward(self, batch: Batch) -> Tensor:
        return self.scores(batch)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write backbones, tokenizer and heads, adapters merged into the weights; the model in memory is left as it is."""
        directory = Path(directory)
        for member, backbone in enumerate(self.backbone_list):
            backbone.save_pretrained(directory if member == 0 else directory / f"member-{member}", merged=True)
        description = {
            "head": scalar_head_name(self.heads[0]),
            "width": self.backbone_list[0].width,
            "members": self.members,
            "shared": len(self.backbones) == 1,
            "centred": self.centred,
        }
        HeadFiles(directory, self.head_name).write(self.heads, description)


def is_classifier(source: str | Path, options: LoadOptions) -> bool:
    """Tell whether a checkpoint's configuration names a classification head, as those of the hub's reward models do."""
    found = architecture(source, trust_remote_code=options.get("trust_remote_code", False))
    return found.endswith("ForSequenceClassification")
