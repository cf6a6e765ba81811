"""A LoRA or DoRA adapter on its base as an input model: each tensor of the base, with what the adapter changes in it.

The result equals the model that PEFT computes with the adapter on its base, not folded: where the base ties its output head to
its embeddings and the adapter changes one of the two, the result has both.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.model_files import adapter_weights, json_object
from rlhf_core.merging.adapted_tensor import AdaptedTensor, Update, scale_of
from rlhf_core.merging.expert_layout import WRONG_BASE, AdaptedArchitecture, StoredPart
from rlhf_core.merging.input_model import InputModel, with_changes
from rlhf_core.merging.score_heads import head_tensors, heads_beside
from rlhf_core.merging.tensor_names import has_token_rows, is_embedding, is_head, score_head_of
from rlhf_core.merging.tensor_reader import TensorReader, WeightFile

log = logging.getLogger(__name__)

_NOT_FOLDED = {
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
"""Initialisations of an adapter that leave the base's own weights as they are."""
_TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Architectures whose linear layers are stored as (inputs, outputs)."""
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
"""Kinds of an adapter's tensors by their names; the first that fits is the kind."""
_FOLD = "fold it with peft's `merge_and_unload` and save the model"


@dataclass
class _Pair:
    """The two factors of a low-rank update, by their names in the adapter's file."""

    module: str
    embedding: bool = False
    a: str = ""
    b: str = ""


@dataclass
class _Change:
    """What an adapter changes in one tensor of its base; strings are names in the adapter's file."""

    base: str | None = None
    """Replaces the base's tensor, as where tokens were added before training."""
    own: str | None = None
    """Replaces the base's tensor, and was trained."""
    pair: _Pair | None = None
    part: StoredPart | None = None
    """Which part of the parameter that the pair changes this tensor is, where files hold parameters in another form."""
    magnitude: str | None = None
    rows: str | None = None

    @property
    def whole(self) -> str | None:
        return self.own or self.base

    @property
    def trained(self) -> bool:
        return self.own is not None or self.pair is not None or self.rows is not None


def adapted_model(name: str, path: Path, base: InputModel) -> InputModel:
    """Return an adapter on its base, which may be an adapter on its own base.

    Args:
        name: the adapter's.
        path: its directory.
        base: the model that it was trained on, or another one.

    Raises:
        ModelError: it is of a kind that isn't folded, is pickled, or doesn't fit its base.
    """
    settings = json_object(path / "adapter_config.json", name)
    _require_folded_kind(name, settings)
    file = WeightFile(adapter_weights(path, name), name)
    adapter = _Adapter(name, path, base, settings, file.tensors)
    tensors, heads = adapter.result(), heads_beside(name, path)
    if heads:
        tensors = {key: tensor for key, tensor in tensors.items() if score_head_of(key) is None} | head_tensors(heads)
    return InputModel(
        name,
        path,
        tensors,
        adapter.config(),
        [file, *heads.values(), *base.files],
        [path, *base.directories],
        dict.fromkeys(heads, path) or base.heads,
        base,
    )


def _require_folded_kind(name: str, settings: Mapping[str, Any]) -> None:
    odd = next((what for key, what in _NOT_FOLDED.items() if settings.get(key)), None)
    if settings.get("peft_type") != "LORA":
        odd = str(settings.get("peft_type"))
    start = settings.get("init_lora_weights", True)
    if odd is None and start not in _KEEPS_BASE:
        odd = f"init_lora_weights: {start}, which changes the base"
    if odd is None:
        return
    fix: str | None = _FOLD
    if settings.get("lora_bias"):
        fix = f"where the base's layers have biases to add them to, {_FOLD}; else it stays an adapter"
    elif any(settings.get(key) for key in ("alora_invocation_tokens", "arrow_config")):
        fix = None  # peft doesn't fold these either
    raise ModelError("only LoRA and DoRA adapters are folded while merging", place=name, got=odd, fix=fix)


class _Adapter:
    """An adapter's tensors, each assigned to the tensor of the base that it changes.

    Args:
        name: the adapter's.
        path: its directory.
        base: the model that it changes.
        settings: its adapter_config.json.
        own: its tensors by their names in its file.
    """

    def __init__(
        self, name: str, path: Path, base: InputModel, settings: Mapping[str, Any], own: Mapping[str, TensorReader]
    ) -> None:
        self.name, self.base, self.settings, self.own = name, base, settings, own
        self._changes: dict[str, _Change] = {}
        self._architecture = AdaptedArchitecture(base.name, base.config, path, name)
        self._read_pair = lru_cache(maxsize=2)(lambda a, b: (self._values(a), self._values(b)))
        """The factors that were read last: one pair holds those of all of a layer's experts."""
        self._thread = threading.local()
        self._untied: str | None = None
        """The name of the result's output head, where the base ties its own to the embeddings and the result doesn't."""
        self._assign()
        self._settle_tied_head()

    def result(self) -> dict[str, TensorReader]:
        """Return the tensors of the base with the changes in them, having checked that each change fits."""
        tensors = dict(self.base.tensors)
        for target, change in self._changes.items():
            plain = self._plain(target, change)
            self._require_fit(target, change, plain.shape)
            if change.pair is not None or change.rows is not None:
                tensors[target] = AdaptedTensor(plain, partial(self._update, change, plain.shape), self.name)
            else:
                tensors[target] = plain
        self._require_one_vocabulary(tensors)
        return tensors

    def config(self) -> dict[str, Any]:
        """Return the base's configuration, as it is for the result."""
        changed: dict[str, Any] = {"tie_word_embeddings": False} if self._untied else {}
        table = self.base.embeddings
        whole = self._changes[table].whole if table in self._changes else None
        if whole is not None and self.own[whole].shape[0] != self.base.tensors[str(table)].shape[0]:
            changed["vocab_size"] = self.own[whole].shape[0]
        return with_changes(self.base.config, changed)

    def _plain(self, target: str, change: _Change) -> TensorReader:
        """Return the tensor that an update is added to: one of the adapter's that replaces the base's, else the base's."""
        if change.whole is not None:
            return self.own[change.whole]
        return self.base.tensors[self._base_name(target)]

    def _base_name(self, target: str) -> str:
        """Return the base's name of a tensor; a head that was tied is read as the embeddings."""
        return str(self.base.embeddings) if self._untied and target == self._untied else target

    # Which tensors of the base the adapter's belong to

    def _assign(self) -> None:
        pairs: dict[str, _Pair] = {}
        for key in self.own:
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
                own = kind == "own" or (kind == "plain" and self._is_saved_whole(module))
                setattr(self._change(f"{module}.{found['last']}", key), "own" if own else "base", key)
        for pair in pairs.values():
            self._assign_pair(pair)

    def _assign_pair(self, pair: _Pair) -> None:
        key = pair.a or pair.b
        if not pair.a or not pair.b:
            raise ModelError(f"the adapter has one half of the update of `{pair.module}` only", place=self.name)
        target = self._find(f"{pair.module}.weight")
        if target is not None and not self.settings.get("target_parameters") and self._is_weight_of(pair, target):
            self._changes.setdefault(target, _Change()).pair = pair
            return
        if not self.base.config.get("model_type"):  # nothing says what a model of it looks like
            self._change(f"{pair.module}.weight", key).pair = pair
            return
        for part in self._architecture.stored_parts(pair.module):
            change = self._change(part.name, key)
            change.pair, change.part = pair, part

    def _is_weight_of(self, pair: _Pair, target: str) -> bool:
        """Tell by its shape whether a tensor of that name is the module's own: files may hold several modules in one tensor."""
        if not self.base.config.get("model_type") or target not in self.base.tensors:
            return True
        return sorted(self._outputs_inputs(pair)) == sorted(self.base.tensors[target].shape) or is_embedding(target)

    def _is_saved_whole(self, module: str) -> bool:
        """Tell whether a module is one of `modules_to_save`, as PEFT finds them: by the end of its name."""
        return any(_ends(module, one) for one in self.settings.get("modules_to_save") or [])

    def _change(self, wanted: str, key: str) -> _Change:
        target = self._find(wanted)
        if target is None:
            raise ModelError(
                f"the adapter doesn't fit its base, which has no tensor `{wanted}`",
                place=self.name,
                got=f"`{key}` for base {self.base.name}",
                fix=WRONG_BASE,
            )
        return self._changes.setdefault(target, _Change())

    def _find(self, wanted: str) -> str | None:
        """Return the name of a tensor in the base, which may have or lack the model's prefix; None where there is none."""
        prefixes = {name.split(".", 1)[0] + "." for name in self.base.tensors if "." in name}
        for name in (wanted, *(prefix + wanted for prefix in sorted(prefixes)), wanted.partition(".")[2]):
            if name in self.base.tensors:
                return name
        # A tied head is no tensor of the base, and still a module that may be trained.
        return wanted if is_head(wanted) and self.base.tied else None

    # Tied embeddings

    def _settle_tied_head(self) -> None:
        """Where the base ties its output head to its embeddings, decide whether they are still equal with the adapter on it."""
        table = self.base.embeddings
        head = next((name for name in self._changes if is_head(name)), None)
        if table is None or not self.base.tied or not (head or table in self._changes):
            return
        of_table = self._changes.get(table, _Change())
        of_head = self._changes.get(head, _Change()) if head is not None else _Change()
        of_table.base = of_head.base = of_table.base or of_head.base
        # PEFT ties rows that were trained in the embeddings to the head, unless rows of the head were trained too.
        one_of_rows = of_table.rows is not None and of_head.rows is None and not of_head.trained
        same_rows = of_table.rows is not None and of_head.rows is not None
        same_rows = same_rows and self._rows(str(of_table.rows)) == self._rows(str(of_head.rows))
        same = of_table.trained and (self.settings.get("ensure_weight_tying") or same_rows)
        if not (of_table.trained or of_head.trained) or one_of_rows or same:
            self._changes.pop(head or "", None)
            self._changes[table] = of_table
            return
        self._untied = head or self.base.untied_head()
        self._changes[self._untied] = of_head
        if of_table.base or of_table.trained:
            self._changes[table] = of_table

    def _rows(self, key: str) -> list[int]:
        """Return the numbers of the tokens whose rows were trained in a module."""
        module = key.removeprefix(_PREFIX).partition(".token_adapter.")[0]
        given = self.settings.get("trainable_token_indices") or []
        if isinstance(given, dict):
            named = (rows for name, rows in given.items() if _ends(module, name))
            given = next(named, None) or next(iter(given.values()))
        return [int(row) for row in given]

    # Shapes

    def _require_fit(self, target: str, change: _Change, shape: tuple[int, ...]) -> None:
        """Raise where a change doesn't fit a tensor of the base; one in its place may have more rows, for more tokens."""
        base = self.base.tensors[self._base_name(target)].shape
        if shape != base and not (is_embedding(target) and shape[1:] == base[1:]):
            self._raise_misfit(target, shape, base)
        if change.pair is not None and (found := self._update_shape(change, shape)) != shape:
            if change.part is not None and change.part.parameter_shape[-2:] == found[-2:]:
                raise ModelError(
                    f"the base's files hold `{change.pair.module}` and others in one tensor, `{target}`",
                    place=self.name,
                    got=f"an update of shape {list(found)} for {list(shape)}",
                    fix=_FOLD,
                )
            self._raise_misfit(target, found, shape)
        if change.rows is not None and (last := max(self._rows(change.rows), default=0)) >= shape[0]:
            self._raise_misfit(target, (1 + last, *shape[1:]), shape)
        transposed = change.pair is not None and change.part is None and self._is_transposed(change.pair, shape)
        if change.magnitude is not None and (transposed or self.own[change.magnitude].shape != shape[:1]):
            raise ModelError(
                f"DoRA of `{target}` is not folded while merging: only that of linear layers is",
                place=self.name,
                got=f"magnitudes of shape {list(self.own[change.magnitude].shape)}",
                fix=_FOLD,
            )

    def _require_one_vocabulary(self, tensors: Mapping[str, TensorReader]) -> None:
        """Raise where new tokens have rows in the embeddings or in the head only."""
        rows = {name: tensor.shape[0] for name, tensor in tensors.items() if has_token_rows(name, tensor)}
        before = {name: self.base.tensors[self._base_name(name)].shape[0] for name in rows}
        grown = next((name for name in sorted(rows, key=is_head) if rows[name] != before[name]), None)
        if grown is None:
            return
        if (other := next((name for name in rows if rows[name] != rows[grown]), None)) is not None:
            raise ModelError(
                f"the adapter has rows of new tokens in `{grown}`, and none in `{other}`",
                place=self.name,
                got=f"{rows[grown]} rows, and {rows[other]}",
                fix="add the tokens to the base and save it as a model, or train with both in `modules_to_save`",
            )
        log.info("%s has another vocabulary than its base: %d rows, the base %d", self.name, rows[grown], before[grown])

    def _raise_misfit(self, target: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
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
            fix=WRONG_BASE,
        )

    def _update_shape(self, change: _Change, expected: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a pair's product, as the tensor is stored."""
        assert change.pair is not None
        a, b = self.own[change.pair.a].shape, self.own[change.pair.b].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ModelError(
                f"the halves of the update of `{change.pair.module}` don't fit",
                place=self.name,
                got=f"{list(a)}, {list(b)}",
            )
        if change.part is not None:
            left, right = change.part.factors(*(torch.empty(shape, device="meta") for shape in (a, b)))
            shape = (left.shape[0], left.shape[1], right.shape[2])
            return shape if len(expected) == 3 else shape[1:]
        return (a[1], b[0]) if self._is_transposed(change.pair, expected) else (b[0], a[1])

    def _outputs_inputs(self, pair: _Pair) -> tuple[int, int]:
        return self.own[pair.b].shape[0], self.own[pair.a].shape[1]

    def _is_transposed(self, pair: _Pair, expected: tuple[int, ...]) -> bool:
        """Tell whether a weight is stored as (inputs, outputs), as embeddings and GPT-2's layers are."""
        shape = self._outputs_inputs(pair)
        if pair.embedding or shape != expected:
            return pair.embedding or shape[::-1] == expected
        return shape[0] == shape[1] and not is_head(f"{pair.module}.weight") and self._transposes_layers

    @cached_property
    def _transposes_layers(self) -> bool:
        """Whether its square layers are stored transposed.

        `fan_in_fan_out` says so, unless the adapter changes the head too, which isn't transposed, and comes last.
        """
        if self.settings.get("fan_in_fan_out") or not any(is_head(target) for target in self._changes):
            return bool(self.settings.get("fan_in_fan_out"))
        for target, change in self._changes.items():
            if change.pair is not None and not change.pair.embedding and not is_head(target):
                shape = self._outputs_inputs(change.pair)
                if shape[0] != shape[1]:
                    return shape != self.base.tensors[target].shape
        return self.base.config.get("model_type") in _TRANSPOSED

    # Values

    def _update(self, change: _Change, shape: tuple[int, ...]) -> Update:
        """Return the values of a change to a tensor of a shape; each thread caches those that it used last."""
        held: tuple[_Change, Update] | None = getattr(self._thread, "held", None)
        if held is None or held[0] is not change:
            left, right = self._factors(change, shape) if change.pair is not None else (None, None)
            held = self._thread.held = (
                change,
                Update(
                    self._rows(change.rows) if change.rows is not None else (),
                    self._values(change.rows) if change.rows is not None else None,
                    left,
                    right,
                    self._values(change.magnitude) if change.magnitude is not None else None,
                ),
            )
        return held[1]

    def _factors(self, change: _Change, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return (experts, rows, r) and (experts, r, columns), whose product is the update, scaled."""
        pair = change.pair
        assert pair is not None
        a, b = self._read_pair(pair.a, pair.b)
        if change.part is not None:
            left, right = change.part.factors(a, b)
            return left.contiguous(), right.contiguous()
        rank, alphas = a.shape[0], self.settings.get("alpha_pattern") or {}
        given = (
            alpha for pattern, alpha in alphas.items() if re.match(rf"(.*\.)?({pattern})$", pair.module)
        )  # as in peft
        alpha = float(next(given, self.settings.get("lora_alpha", rank)))
        b = b * scale_of(alpha, rank, stabilised=bool(self.settings.get("use_rslora")))
        if self._is_transposed(pair, shape):
            a, b = b.T.contiguous(), a.T.contiguous()
        return b[None], a[None]

    def _values(self, key: str) -> Tensor:
        values = torch.empty(self.own[key].count)
        self.own[key].read(0, len(values), values)
        return values.view(self.own[key].shape)


def _ends(module: str, name: str) -> bool:
    """Tell whether a module's name is, or ends in, a name."""
    return module == name or module.endswith(f".{name}")
