"""LoRA adapters as checkpoints: each tensor of the base with what the adapter does to it, as it is read.

What a merge makes of an adapter is the model that PEFT computes with the adapter on its base, not folded: where the base ties its
output head to its embeddings and the adapter changes one of the two, the result has a head of its own.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.infra.errors import ModelError
from rlhf_core.merging.checkpoint import Checkpoint, FileSource, Renamed, WeightFile, is_vocabulary, read_adapter_config
from rlhf_core.merging.experts import Parameter, Piece, Structure
from rlhf_core.merging.lora import DoraSource, LoraSource, RowsSource, scale_of
from rlhf_core.merging.streams import Source
from rlhf_core.merging.weights import is_embedding, is_head

log = logging.getLogger(__name__)

_ODD = {
    "lora_bias": "LoRA with biases",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "layers that the adapter replicates",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
_KEEPS_BASE = (True, False, None, "gaussian", "orthogonal", "eva")
"""Starts of an adapter that leave the base's own weights as they are."""
_TURNED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Architectures whose layers are stored as (inputs, outputs)."""
_PREFIX = "base_model.model."
_KINDS = {
    "pair": re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?"),
    "magnitude": re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.weight)?"),
    "rows": re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta"),
    # The base's own weights, saved with the adapter, as where tokens were added to the base before training.
    "base": re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.(?:base_layer|original_module)\.(?P<last>[^.]+)"),
    "own": re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<last>[^.]+)"),
    "plain": re.compile(r"(?P<module>.+)\.(?P<last>[^.]+)"),
}
"""What an adapter's tensors are, by their names; the first that fits counts."""
_FOLD = "fold it with peft's `merge_and_unload` and save the model"


@dataclass
class _Pair:
    """The halves of a low-rank update, by their names in the adapter's file."""

    module: str
    embedding: bool = False
    a: str = ""
    b: str = ""


@dataclass
class _Change:
    """What an adapter does to one tensor of its base."""

    base: str | None = None
    """The adapter's tensor that stands for the base's own, by its name in the file."""
    own: str | None = None
    """The adapter's tensor that was trained in its place."""
    pair: _Pair | None = None
    parameter: Parameter | None = None
    """Which parameter the pair changes, and `piece` which part of it this tensor is, where files hold it otherwise."""
    piece: Piece | None = None
    magnitude: str | None = None
    rows: str | None = None

    @property
    def trained(self) -> bool:
        return self.own is not None or self.pair is not None or self.rows is not None


class AdapterCheckpoint(Checkpoint):
    """An adapter on its base, which may be an adapter on its own."""

    def __init__(self, name: str, path: Path, base: Checkpoint) -> None:
        self.base, self.settings = base, read_adapter_config(path, name)
        self._check_settings(name)
        weights = path / "adapter_model.safetensors"
        if not weights.is_file():
            pickles = ", ".join(sorted(file.name for file in path.glob("*.bin")))
            raise ModelError(
                "the adapter has no adapter_model.safetensors; pickled weights can run code and are not loaded",
                place=name,
                got=pickles or "no weights",
                fix="save it again with `save_pretrained`, where you trust it",
            )
        file = WeightFile(weights, name)
        super().__init__(name, path, dict.fromkeys(file.entries, file))
        self.heads = self.heads or base.heads
        self._own = self.tensors
        self._changes: dict[str, _Change] = {}
        self._structure = Structure(base.name, base.config, path, name)
        self._last = lru_cache(maxsize=2)(self._read_pair)
        """The factors that were read last: those of a layer's experts lie in one tensor."""
        self._take_all()
        self.tensors = dict(base.tensors)
        self._settle_head()
        for target, change in self._changes.items():
            self._require(target, change)
        self._require_one_vocabulary()

    @property
    def places(self) -> list[Path]:
        return [self.path, *self.base.places]

    @property
    def root(self) -> Checkpoint:
        return self.base.root

    @property
    def files(self) -> list[Path]:
        return list(dict.fromkeys([*super().files, *self.base.files]))

    @cached_property
    def config(self) -> dict[str, Any]:
        changed: dict[str, Any] = {"tie_word_embeddings": False} if self._untied else {}
        table = self.base.table
        if table is not None and (rows := self.tensors[table].shape[0]) != self.base.tensors[table].shape[0]:
            changed["vocab_size"] = rows
        config, inner = dict(self.base.config), self.base.config.get("text_config")
        if isinstance(inner, dict):
            config["text_config"] = inner | changed
            changed = {key: value for key, value in changed.items() if key in config or key == "tie_word_embeddings"}
        return config | changed

    def close(self) -> None:
        super().close()
        self.base.close()

    def _source(self, name: str) -> Source:
        change = self._changes.get(name, _Change())
        whole = change.own or change.base
        plain: Source
        if whole is not None:
            plain = FileSource(self._files[whole], self._own[whole], name, self)
        else:
            plain = Renamed(self.base.source(self._read_under(name)), self)
        if change.rows is not None:
            plain = RowsSource(plain, self._rows(change.rows), self._whole(change.rows), self)
        if change.pair is None:
            return plain
        left, right = self._factors(change, plain.shape)
        if change.magnitude is not None:
            return DoraSource(plain, left, right, self._whole(change.magnitude), self)
        return LoraSource(plain, left, right, self)

    def _read_under(self, name: str) -> str:
        """Return the base's name of a tensor; a head that was tied is read as the embeddings."""
        return str(self.base.table) if self._untied and name == self._untied else name

    def _check_settings(self, name: str) -> None:
        given = self.settings
        odd = next((what for key, what in _ODD.items() if given.get(key)), None)
        if given.get("peft_type") != "LORA":
            odd = str(given.get("peft_type"))
        start = given.get("init_lora_weights", True)
        if odd is None and start not in _KEEPS_BASE:
            odd = f"init_lora_weights: {start}, which changes the base"
        if odd is not None:
            fix: str | None = _FOLD
            if given.get("lora_bias"):
                fix = f"where the base's layers have biases to add them to, {_FOLD}; else it stays an adapter"
            elif any(given.get(key) for key in ("alora_invocation_tokens", "arrow_config")):
                fix = None  # peft doesn't fold these either
            raise ModelError("only LoRA and DoRA adapters are folded while merging", place=name, got=odd, fix=fix)

    # What the adapter's tensors belong to

    def _take_all(self) -> None:
        pairs: dict[str, _Pair] = {}
        for key in self._own:
            inner = key.removeprefix(_PREFIX)
            kind, found = next((kind, hit) for kind, form in _KINDS.items() if (hit := form.fullmatch(inner)))
            module = found["module"]
            if kind == "pair":
                pair = pairs.setdefault(module, _Pair(module, bool(found["embedding"])))
                setattr(pair, found["side"].lower(), key)
            elif "lora_" in inner and kind != "magnitude":
                raise ModelError(f"the adapter has a tensor that isn't understood: `{key}`", place=self.name)
            elif kind in ("magnitude", "rows"):
                setattr(self._change(f"{module}.weight", key), kind, key)
            else:
                own = kind == "own" or (kind == "plain" and self._saved_whole(module))
                setattr(self._change(f"{module}.{found['last']}", key), "own" if own else "base", key)
        for pair in pairs.values():
            self._take_pair(pair)

    def _take_pair(self, pair: _Pair) -> None:
        key = pair.a or pair.b
        if not pair.a or not pair.b:
            raise ModelError(f"the adapter has one half of the update of `{pair.module}` only", place=self.name)
        target = self._find(f"{pair.module}.weight")
        if target is not None and not self.settings.get("target_parameters") and self._lies_there(pair, target):
            self._changes.setdefault(target, _Change()).pair = pair
            return
        if not self.base.config.get("model_type"):  # nothing says what a model of it looks like
            self._change(f"{pair.module}.weight", key).pair = pair
            return
        parameter = self._structure.parameter(pair.module)
        for piece in parameter.pieces:
            change = self._change(piece.name, key)
            change.pair, change.parameter, change.piece = pair, parameter, piece

    def _lies_there(self, pair: _Pair, target: str) -> bool:
        """Tell whether a tensor of that name is the module's own, by its shape: files may hold several modules in one."""
        if not self.base.config.get("model_type") or target not in self.base.tensors:
            return True
        update = (self._own[pair.b].shape[0], self._own[pair.a].shape[1])
        return sorted(update) == sorted(self.base.tensors[target].shape) or is_embedding(target)

    def _saved_whole(self, module: str) -> bool:
        """Tell whether a module is one of `modules_to_save`, as PEFT finds them: by the end of its name."""
        named = self.settings.get("modules_to_save") or []
        return any(module == one or module.endswith(f".{one}") for one in named)

    def _change(self, wanted: str, key: str) -> _Change:
        target = self._find(wanted)
        if target is None:
            raise ModelError(
                f"the adapter doesn't fit its base, which has no tensor `{wanted}`",
                place=self.name,
                got=f"`{key}` for base {self.base.name}",
                fix="set `base_model_name_or_path` in adapter_config.json to the model that it was trained on",
            )
        return self._changes.setdefault(target, _Change())

    def _find(self, wanted: str) -> str | None:
        """Return the base's tensor of a name; the model's prefix may stand in one of the two names only."""
        prefixes = {name.split(".", 1)[0] + "." for name in self.base.tensors if "." in name}
        for name in (wanted, *(prefix + wanted for prefix in sorted(prefixes)), wanted.partition(".")[2]):
            if name in self.base.tensors:
                return name
        # A head that is tied is no tensor of the base, and still a module that may be trained.
        return wanted if is_head(wanted) and self.base.tied else None

    # Tied embeddings

    def _settle_head(self) -> None:
        """Where the base ties its head to its embeddings, see whether they are still one with the adapter on it."""
        self._untied: str | None = None
        table = self.base.table
        head = next((name for name in self._changes if is_head(name)), None)
        if table is None or not self.base.tied or not (head or table in self._changes):
            return
        of_table = self._changes.get(table, _Change())
        of_head = self._changes.get(head, _Change()) if head is not None else _Change()
        shared = of_table.base or of_head.base
        of_table.base = of_head.base = shared
        # PEFT ties rows that were trained in the embeddings to the head, unless the head has others of its own.
        one_of_rows = of_table.rows is not None and of_head.rows is None and not of_head.trained
        same = of_table.trained and (self.settings.get("ensure_weight_tying") or self._same_rows(of_table, of_head))
        if not (of_table.trained or of_head.trained) or one_of_rows or same:
            self._changes.pop(head or "", None)
            self._changes[table] = of_table
            return
        self._untied = head or self.base.head_name()
        self._changes[self._untied] = of_head
        if of_table.base or of_table.trained:
            self._changes[table] = of_table
        self.tensors[self._untied] = self.base.tensors[table]

    def _same_rows(self, of_table: _Change, of_head: _Change) -> bool:
        return (
            of_table.rows is not None
            and of_head.rows is not None
            and self._rows(of_table.rows) == self._rows(of_head.rows)
        )

    def _rows(self, key: str) -> list[int]:
        """Return the numbers of the tokens that were trained in a module."""
        module = key.removeprefix(_PREFIX).partition(".token_adapter.")[0]
        given = self.settings.get("trainable_token_indices") or []
        if isinstance(given, dict):
            named = (rows for name, rows in given.items() if module == name or module.endswith(f".{name}"))
            given = next(named, None) or next(iter(given.values()))
        return [int(row) for row in given]

    # Shapes

    def _require(self, target: str, change: _Change) -> None:
        """Raise where a change doesn't fit the base's tensor; what stands for a tensor may have more rows, for more tokens."""
        expected = self.base.tensors[self._read_under(target)].shape
        whole = change.own or change.base
        if whole is not None:
            found = self._own[whole].shape
            vocabulary = is_embedding(target) and found[1:] == expected[1:]
            if found != expected and not vocabulary:
                self._misfit(target, found, expected)
            self.tensors[target] = self._own[whole]
            expected = found
        if change.pair is not None and (found := self._shape_of_update(change, expected)) != expected:
            if change.parameter is not None and change.piece is not None and change.parameter.shape[-2:] == found[-2:]:
                raise ModelError(
                    f"the base's files hold `{change.pair.module}` and others in one tensor, `{target}`",
                    place=self.name,
                    got=f"an update of shape {list(found)} for {list(expected)}",
                    fix=_FOLD,
                )
            self._misfit(target, found, expected)
        if change.rows is not None and max(self._rows(change.rows), default=0) >= expected[0]:
            self._misfit(target, (1 + max(self._rows(change.rows)), *expected[1:]), expected)
        turned = change.pair is not None and change.parameter is None and self._turned(change.pair, expected)
        if change.magnitude is not None and (turned or self._own[change.magnitude].shape != expected[:1]):
            raise ModelError(
                f"DoRA of `{target}` is not folded while merging: only that of linear layers is",
                place=self.name,
                got=f"magnitudes of shape {list(self._own[change.magnitude].shape)}",
                fix=_FOLD,
            )

    def _require_one_vocabulary(self) -> None:
        """Raise where new tokens have rows in the embeddings or in the head only."""
        tables = [name for name in (self.base.table, *self.tensors) if name is not None and is_vocabulary(name, self)]
        grown = next((name for name in tables if self.tensors[name].shape[0] != self._rows_before(name)), None)
        if grown is None:
            return
        rows = self.tensors[grown].shape[0]
        if (other := next((name for name in tables if self.tensors[name].shape[0] != rows), None)) is not None:
            raise ModelError(
                f"the adapter has rows of new tokens in `{grown}`, and none in `{other}`",
                place=self.name,
                got=f"{rows} rows, and {self.tensors[other].shape[0]}",
                fix="add the tokens to the base and save it as a model, or train with both in `modules_to_save`",
            )
        log.info("%s brings a vocabulary of its own: %d rows, its base %d", self.name, rows, self._rows_before(grown))

    def _rows_before(self, name: str) -> int:
        return int(self.base.tensors[self._read_under(name)].shape[0])

    def _misfit(self, target: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found[1:] == expected[1:] and is_embedding(target):
            raise ModelError(
                f"the adapter was trained with other tokens than its base has: tensor `{target}`",
                place=self.name,
                got=f"{found[0]} rows, the base {expected[0]}",
                fix="save the adapter with `save_embedding_layers=True`, so that the rows of its tokens come with it",
            )
        raise ModelError(
            f"the adapter doesn't fit its base in tensor `{target}`",
            place=self.name,
            got=f"shape {list(found)}, the base {list(expected)}",
            fix="set `base_model_name_or_path` in adapter_config.json to the model that it was trained on",
        )

    def _shape_of_update(self, change: _Change, expected: tuple[int, ...]) -> tuple[int, ...]:
        assert change.pair is not None
        a, b = (self._own[key].shape for key in (change.pair.a, change.pair.b))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ModelError(
                f"the halves of the update of `{change.pair.module}` don't fit",
                place=self.name,
                got=f"{list(a)}, {list(b)}",
            )
        if change.parameter is not None and change.piece is not None:
            empty = (torch.empty(shape, device="meta") for shape in (a, b))
            left, right = change.piece.cut(*change.parameter.factors(*empty))
            shape = (left.shape[0], left.shape[1], right.shape[2])
            return shape if len(expected) == 3 else shape[1:]
        return (a[1], b[0]) if self._turned(change.pair, expected) else (b[0], a[1])

    def _turned(self, pair: _Pair, expected: tuple[int, ...]) -> bool:
        """Tell whether a weight is stored as (inputs, outputs), as embeddings and GPT-2's layers are."""
        shape = (self._own[pair.b].shape[0], self._own[pair.a].shape[1])
        if pair.embedding or shape != expected:
            return pair.embedding or shape[::-1] == expected
        return shape[0] == shape[1] and not is_head(f"{pair.module}.weight") and self._turns_layers

    @cached_property
    def _turns_layers(self) -> bool:
        """Whether its layers are stored turned. Its settings say so, unless it is on a head too, which isn't and comes last."""
        if self.settings.get("fan_in_fan_out") or not any(is_head(target) for target in self._changes):
            return bool(self.settings.get("fan_in_fan_out"))
        for target, change in self._changes.items():
            if change.pair is not None and not change.pair.embedding and not is_head(target):
                shape = (self._own[change.pair.b].shape[0], self._own[change.pair.a].shape[1])
                if shape[0] != shape[1]:
                    return shape != self.base.tensors[target].shape
        return self.base.config.get("model_type") in _TURNED

    # Values

    def _factors(self, change: _Change, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return (experts, rows, r) and (experts, r, columns), whose product is the update, scaled."""
        pair = change.pair
        assert pair is not None
        a, b = self._last(pair.a, pair.b)
        if change.parameter is not None and change.piece is not None:
            left, right = change.piece.cut(*change.parameter.factors(a, b))
            return left.contiguous(), right.contiguous()
        b = b * self._scale(pair.module, a.shape[0])
        if self._turned(pair, shape):
            a, b = b.T.contiguous(), a.T.contiguous()
        return b[None], a[None]

    def _scale(self, module: str, rank: int) -> float:
        alpha = _by_pattern(self.settings.get("alpha_pattern"), module, self.settings.get("lora_alpha", rank))
        return scale_of(float(alpha), rank, stabilised=bool(self.settings.get("use_rslora")))

    def _read_pair(self, a: str, b: str) -> tuple[Tensor, Tensor]:
        return self._whole(a), self._whole(b)

    def _whole(self, key: str) -> Tensor:
        entry = self._own[key]
        values = torch.empty(entry.count)
        FileSource(self._files[key], entry, key, self).read(0, entry.count, values)
        return values.view(entry.shape)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value whose pattern ends a module's name, as peft looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
