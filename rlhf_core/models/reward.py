"""Reward models: a backbone with heads that score a response at its last token, alone or as an ensemble."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rlhf_core.batch import Batch
from rlhf_core.config import LoraConfig, TrainerConfig
from rlhf_core.errors import ConfigError, ModelError
from rlhf_core.infra.model_files import PROCESS_REWARD_HEAD, REWARD_HEAD
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.adapters import AdapterUse, trained_module
from rlhf_core.models.attention import Kernel
from rlhf_core.models.heads import (
    NO_HEAD,
    LinearHead,
    TwoLayerHead,
    describe_head,
    fill_head,
    head_directory,
    warn_of_other_head,
    write_head,
)
from rlhf_core.models.layout import Layout
from rlhf_core.models.loading import architecture, load_model
from rlhf_core.models.precision import Precision, frozen_dtype
from rlhf_core.models.sequence import LayoutName, SequenceModel, model_hashes

HEAD = REWARD_HEAD
MOST_MEMBERS = 64
_HEADS: dict[str, Callable[[int], nn.Module]] = {
    "two_layer": TwoLayerHead,
    "linear": LinearHead,
    "linear_bias": functools.partial(LinearHead, bias=True),
}


class RewardModel(nn.Module):
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
        """Load what `save_pretrained` wrote, or a decoder of the hub with a classification head of one label.

        Args:
            members: how many there must be; None takes what the checkpoint has, or one.
            share_backbone: whether the members stand on one backbone; None takes what the checkpoint has, or one backbone.
            new_head: give a checkpoint without a head new ones, for training; without it, that is an error.
            seed: of new heads, member by member.
            frozen: whether the model is only read: none of its weights can be trained, and all are held as frozen ones are.

        The other options are those of `PolicyModel.from_pretrained`.

        Raises:
            ModelError: the head is missing, or its width isn't the backbone's.
            ConfigError: another number of members is asked for than the checkpoint has.
        """
        refuse_quantised(lora)
        hold = frozen_dtype(precision, frozen_precision)
        where = head_directory(source, HEAD)
        settings: dict[str, Any] = {"lora": lora, "trust_remote_code": trust_remote_code}
        settings |= {"adapter": adapter, "hold": hold, "frozen": frozen}
        if where is not None:
            model = cls._saved(where, source, settings)
        elif architecture(source, trust_remote_code=trust_remote_code).endswith("ForSequenceClassification"):
            model = cls._classifier(str(source), settings)
        elif new_head:
            model = cls._new(source, members or 1, share_backbone is not False, seed, settings)
        else:
            fix = "train one: `rlhf train reward_model`"
            raise ModelError(NO_HEAD, place=str(source), got=f"no {HEAD}.json", fix=fix)
        model.check_members(members, share_backbone)
        if device is not None:
            model.to(device)
        if frozen:
            model.requires_grad_(False).eval()
        for backbone in model._backbones:
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
    def on(cls, backbone: SequenceModel, *, members: int = 1, share_backbone: bool = True, seed: int = 0) -> Self:
        """Put new heads, each with a seed of its own, on a backbone or on copies of it."""
        backbones = [backbone, *(copy.deepcopy(backbone) for _ in range(0 if share_backbone else members - 1))]
        seeds = [stream_seed(seed, "reward head", member) for member in range(members)]
        return cls(backbones, [TwoLayerHead(backbone.width, seed=of_member) for of_member in seeds])

    @classmethod
    def _saved(cls, where: Path, source: str | Path, settings: dict[str, Any]) -> Self:
        first = cls._load_backbone(source, settings)
        keys = {"head": str, "members": int, "shared": bool}
        about = describe_head(where, HEAD, width=first.width, keys=keys)
        if about["head"] not in _HEADS or not 1 <= about["members"] <= MOST_MEMBERS:
            got = f"head {about['head']}, {about['members']} members"
            raise ModelError("is no head that is known here", place=str(where / f"{HEAD}.json"), got=got)
        folders = [where / f"member-{member}" for member in range(1, 1 if about["shared"] else about["members"])]
        backbones = [first, *(cls._load_backbone(folder, settings) for folder in folders)]
        heads = [_HEADS[about["head"]](about["width"]) for _ in range(about["members"])]
        # Files written before there was this note don't have it.
        model = cls(backbones, heads, centred=about.get("centred") is True)
        fill_head(where, HEAD, model.heads)
        return model

    @classmethod
    def _new(cls, source: str | Path, members: int, share_backbone: bool, seed: int, settings: dict[str, Any]) -> Self:
        warn_of_other_head(source, PROCESS_REWARD_HEAD)
        backbone = SequenceModel.of(load_model(source, headless=True, **settings), source).without_head()
        return cls.on(backbone, members=members, share_backbone=share_backbone, seed=seed)

    @staticmethod
    def _load_backbone(where: str | Path, settings: dict[str, Any]) -> SequenceModel:
        return SequenceModel.of(load_model(where, kind="backbone", **settings), where)

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

    @property
    def tokenizer(self) -> Any:
        return self._backbones[0].tokenizer

    @property
    def device(self) -> torch.device:
        return self._backbones[0].device

    @property
    def max_positions(self) -> int | None:
        return self._backbones[0].max_positions

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

    def configure(self, config: TrainerConfig) -> Self:
        """Apply a trainer's options to every backbone, in place; return the model."""
        refuse_quantised(config.lora)
        for backbone in self._backbones:
            backbone.configure(config)
        return self

    def scores(self, batch: Batch) -> Tensor:
        """Return (R, K) float32: what each member thinks of each response, read at its last token."""
        columns: list[Tensor] = []
        hidden: Tensor | None = None
        for member, head in enumerate(self.heads):
            if hidden is None or len(self.backbones) > 1:
                hidden = last_hidden(*self._backbones[member].hidden_states(batch), batch)
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
            "head": _head_name(self.heads[0]),
            "width": self._backbones[0].width,
            "members": self.members,
            "shared": len(self.backbones) == 1,
            "centred": self.centred,
        }
        write_head(directory, HEAD, self.heads, about)

    def describe(self) -> dict[str, Any]:
        """Return what this model is, for a run's record."""
        return self._backbones[0].describe() | {
            "files": model_hashes(self, self._backbones),
            "parameters": sum(p.numel() for p in self.parameters()),
            "trainable": sum(p.numel() for p in self.parameters() if p.requires_grad),
            "members": self.members,
            "shared_backbone": len(self.backbones) == 1,
        }


def last_hidden(hidden: Tensor, layout: Layout, batch: Batch) -> Tensor:
    """Return (R, D): the hidden state at each response's last token, or at its prompt's end where it is empty."""
    assert layout.at is not None
    if not batch.response_ids.shape[1]:
        return hidden[layout.prompt_end]
    last = (batch.response_lengths - 1).clamp(min=0)[:, None]
    at = layout.at.gather(1, last).squeeze(1)
    return hidden[torch.where(batch.response_lengths > 0, at, layout.prompt_end)]


def refuse_quantised(lora: LoraConfig | None) -> None:
    """Refuse a quantised base: what is exported has the adapter merged in, and would be rounded to 4 or 8 bits again."""
    if lora is not None and lora.quantize != "none":
        raise ConfigError(
            "reward models aren't trained on a quantised base",
            place="lora.quantize",
            got=lora.quantize,
            fix="set `lora.quantize: none`",
        )


def _head_name(head: nn.Module) -> str:
    if not isinstance(head, LinearHead):
        return "two_layer"
    return "linear" if head.outer.bias is None else "linear_bias"
