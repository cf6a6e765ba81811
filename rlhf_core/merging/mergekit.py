"""mergekit's files, read unchanged, in terms of our methods.

What a file says and we can't do is an error; what concerns only how mergekit computes has no effect here, and that is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config_errors import place_of
from rlhf_core.errors import ConfigError, did_you_mean, shortened
from rlhf_core.merging.mergekit_methods import METHODS, outliers
from rlhf_core.merging.mergekit_values import Setting, conditions, constant, mapped
from rlhf_core.merging.mergekit_values import value as value_of
from rlhf_core.merging.whole_slices import from_slices

log = logging.getLogger(__name__)

KEY = "merge_method"
"""The key by which one of mergekit's files is known."""
_DTYPES = {"float32": "float32", "bfloat16": "bf16", "float16": "fp16"}
_KEYS = (
    KEY, "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template",
)  # fmt: skip


def translate(
    values: Mapping[str, Any], places: Mapping[str, str], *, strict: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the keys of one of mergekit's files as ours, with their places.

    Args:
        strict: refuse a method that ours does otherwise, instead of logging how.

    Raises:
        ConfigError: it says what we can't do.
    """
    return _File(values, places, strict).translated()


class _File:
    def __init__(self, values: Mapping[str, Any], places: Mapping[str, str], strict: bool) -> None:
        self.values, self.places, self.strict = values, places, strict
        for key in values:
            if key not in _KEYS:
                raise self.fault(f"unknown key `{key}` of a mergekit file", key, fix=did_you_mean(str(key), _KEYS))
        self.name = values[KEY]
        if self.name not in METHODS:
            raise self.fault(
                f"mergekit's method `{self.name}` has no equal here", KEY, fix=did_you_mean(str(self.name), METHODS)
            )
        self.peer = METHODS[self.name]
        self.out: dict[str, Any] = {"method": self.peer.ours}
        self.put: dict[str, str] = {"": places[""], "method": self.place(KEY)}

    def place(self, key: str) -> str:
        return place_of(key, self.places)

    def fault(self, problem: str, key: str, *, got: object = None, fix: str | None = None) -> ConfigError:
        return ConfigError(problem, place=self.place(key), got=got, fix=fix)

    def translated(self) -> tuple[dict[str, Any], dict[str, str]]:
        peer, name = self.peer, self.name
        if peer.differs is not None:
            if self.strict:
                raise self.fault(f"mergekit's definition of {name} can't be had", KEY, got=peer.differs)
            log.warning("%s is merged by our `%s`: mergekit differs in that %s", name, peer.ours, peer.differs)
        if self.values.get("chat_template") is not None:
            raise self.fault("`chat_template` is not supported", "chat_template", fix="set it in the merged tokenizer")
        entries, shared = self.inputs()
        base = self.values.get("base_model")
        if base is not None:
            base = self.model(base, "base_model")
        self.check(entries, shared)
        if peer.based:
            entries = [
                entry for entry in entries if entry.model != base
            ]  # its own parameters have no effect in mergekit
            self.out["base"] = base
            self.put["base"] = self.place("base_model")
        elif base is not None:
            entries = self.with_base(entries, base)
        if peer.ours == "slerp" and (base is None or len(entries) != 1):
            raise self.fault("slerp takes two models, one of them the `base_model`", "models" if base else KEY)
        self.out["models"] = [self.entry(number, one, shared) for number, one in enumerate(entries)]
        self.options(shared)
        self.output(base if base is not None else entries[0].model)
        return {key: value for key, value in self.out.items() if value is not None}, self.put

    def inputs(self) -> tuple[list[Setting], list[Setting]]:
        """Return the models with their parameters, and the parameters of all, those that win first."""
        shared = [Setting("", self.values.get("parameters") or {}, "parameters")]
        if ("models" in self.values) == ("slices" in self.values):
            raise self.fault("give either `models` or `slices`", "models" if "models" in self.values else "")
        if "slices" in self.values:
            models, more = from_slices(self.values["slices"], shared[0].values, self.places, self.model)
            return models, more + shared
        given = self.values["models"]
        if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given) or not given:
            raise self.fault("`models` is no list of models with parameters", "models", got=shortened(given))
        entries = []
        for number, one in enumerate(given):
            key = f"models.{number}"
            for extra in set(one) - {"model", "parameters"}:
                raise self.fault(f"unknown key `{extra}` of a model", f"{key}.{extra}", fix="model, parameters")
            entries.append(
                Setting(self.model(one.get("model"), f"{key}.model"), one.get("parameters") or {}, f"{key}.parameters")
            )
        return entries, shared

    def model(self, name: Any, key: str) -> str:
        if not isinstance(name, str) or not name:
            raise self.fault("a model is named by a path or a hub name", key, got=shortened(name))
        if "@" in name and not Path(name).expanduser().exists():
            raise self.fault(
                "revisions of hub models are not supported", key, got=name, fix="fetch it, and name the path"
            )
        return name

    def check(self, entries: Sequence[Setting], shared: Sequence[Setting]) -> None:
        """Look at every parameter's name, and at those that may have one value only."""
        peer = self.peer
        known = {*peer.per_model, *peer.shared, *peer.only}
        for setting in [*shared, *entries]:
            for name, value in setting.values.items():
                key = f"{setting.key}.{name}"
                own = setting.model != ""
                if name in peer.idle or name == "int8_mask":
                    log.info("%s: `%s` has no effect here: it concerns how mergekit computes", self.place(key), name)
                elif own and name in known and name not in peer.per_model:
                    raise self.fault(f"`{name}` is one for all models", key, fix="set it in the file's `parameters`")
                elif name not in known:
                    raise self.fault(f"unknown parameter `{name}` of {self.name}", key, fix=did_you_mean(name, known))
                elif name in peer.only and constant(value) != peer.only[name]:
                    raise self.fault(
                        f"only `{name}: {str(peer.only[name]).lower()}` can be done for {self.name}", key, got=value
                    )

    def with_base(self, entries: list[Setting], base: str) -> list[Setting]:
        """Put the base model first: it is merged as the others are, and gives configuration and tokenizer."""
        if self.name == "multislerp":
            raise self.fault("multislerp of task vectors has no equal here", "base_model", fix="leave `base_model` out")
        own = [entry for entry in entries if entry.model == base]
        return [*(own or [Setting(base, {}, "base_model")]), *(entry for entry in entries if entry.model != base)]

    def entry(self, number: int, setting: Setting, shared: Sequence[Setting]) -> dict[str, Any]:
        entry: dict[str, Any] = {"model": setting.model}
        self.put[f"models.{number}"] = self.place(setting.key)
        for name, ours in self.peer.per_model.items():
            entry[ours] = self.value(name, [setting, *shared])
            self.put[f"models.{number}.{ours}"] = self.where(name, [setting, *shared])
        if self.peer.ours == "slerp":
            entry["weight"] = self.value("t", shared)
            self.put["models.0.weight"] = self.where("t", shared)
        if "gamma" in entry:
            entry["gamma"] = outliers(entry["gamma"], entry["density"], self.where("gamma", [setting, *shared]))
        if (
            "epsilon" in entry
        ):  # half the width of the probabilities there, the whole here; nothing is dropped at density 1
            entry["epsilon"] = 0.0 if entry["density"] == 1 else mapped(entry["epsilon"], lambda half: 2 * half)
        return entry

    def options(self, shared: Sequence[Setting]) -> None:
        """Set what holds for all models; an option in which they all agree is one for all."""
        for name, ours in self.peer.shared.items():
            if ours == "weight":
                continue
            found = self.value(name, shared)
            if isinstance(self.peer.defaults[name], bool):
                if not isinstance(constant(found), bool):
                    raise self.fault(
                        f"`{name}` is true or false, for all tensors alike", f"parameters.{name}", got=found
                    )
                found = constant(found)
            self.out[ours], self.put[ours] = found, self.where(name, shared)
        for ours in set(self.peer.per_model.values()) - {"weight"}:
            each = [entry[ours] for entry in self.out["models"]]
            if all(one == each[0] for one in each):
                self.out[ours], self.put[ours] = each[0], self.put[f"models.0.{ours}"]
                for entry in self.out["models"]:
                    del entry[ours]
        self.out |= self.peer.options

    def value(self, name: str, settings: Sequence[Setting]) -> Any:
        found = conditions(name, settings, self.place)
        if name in self.peer.defaults:
            found.append((None, self.peer.defaults[name]))
        return value_of(found, lambda: self.fault(f"{self.name} needs `{name}` for every tensor", settings[0].key))

    def where(self, name: str, settings: Sequence[Setting]) -> str:
        setting = next((one for one in settings if name in one.values), None)
        return self.place(f"{setting.key}.{name}" if setting else settings[0].key)

    def output(self, main: str) -> None:
        """Set type and tokenizer of the result."""
        given = {key: self.values[key] for key in ("dtype", "out_dtype") if self.values.get(key) is not None}
        kinds = {key: str(kind).removeprefix("torch.") for key, kind in given.items()}
        for key, kind in kinds.items():
            if kind not in _DTYPES:
                raise self.fault(f"unknown `{key}`", key, got=kind, fix=did_you_mean(kind, _DTYPES))
        if kinds.get("out_dtype") == "float32" and kinds.get("dtype", "float32") != "float32":
            raise self.fault("`dtype` narrower than `out_dtype` is not supported", "dtype", fix="leave `dtype` out")
        if kinds:
            key = "out_dtype" if "out_dtype" in kinds else "dtype"
            self.out["dtype"], self.put["dtype"] = _DTYPES[kinds[key]], self.place(key)
        self.out["tokenizer"] = self.tokenizer(main)
        self.put["tokenizer"] = self.place("tokenizer" if "tokenizer" in self.values else "tokenizer_source")

    def tokenizer(self, main: str) -> str | None:
        source, key = self.values.get("tokenizer_source"), "tokenizer_source"
        given = self.values.get("tokenizer")
        if given is not None:
            if source is not None:
                raise self.fault("give `tokenizer` or `tokenizer_source`, not both", "tokenizer")
            if not isinstance(given, Mapping):
                raise self.fault("`tokenizer` is a group", "tokenizer", got=given, fix="tokenizer: {source: union}")
            for name, value in given.items():
                if name != "source" and value:
                    raise self.fault(f"`tokenizer.{name}` is not supported", f"tokenizer.{name}", got=shortened(value))
            source, key = given.get("source", "union"), "tokenizer"
        if source == "base" and self.out.get("base") is None:
            return main
        return None if source is None else self.model(source, key)
