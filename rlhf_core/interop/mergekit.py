"""mergekit's files, read unchanged, in terms of our methods.

What a file says and we can't do is an error; what concerns only how mergekit computes has no effect here, and that is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config.base import place_of
from rlhf_core.infra.errors import ConfigError, did_you_mean, shortened
from rlhf_core.interop.mergekit_methods import METHODS, PARAMETERS, outliers
from rlhf_core.interop.mergekit_parameters import Setting, conditions, constant, in_runs, mapped
from rlhf_core.interop.mergekit_parameters import value as value_of
from rlhf_core.interop.slices import Column, Slices, read_slices

log = logging.getLogger(__name__)

KEY = "merge_method"
"""The key by which one of mergekit's files is known."""
_DTYPES = {"float32": "float32", "bfloat16": "bf16", "float16": "fp16"}
_KEYS = (
    KEY, "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source",
    "chat_template", "random_seed",
)  # fmt: skip
_IDLE = {
    "name": "the result is called what `--output` says",
    **dict.fromkeys(
        (
            "allow_crimes", "trust_remote_code", "lora_merge_cache", "transformers_cache", "cuda", "low_cpu_memory",
            "lazy_unpickle", "lazy_loader", "clone_tensors", "copy_tokenizer", "write_model_card", "safe_serialization", "quiet",
            "read_to_gpu", "multi_gpu", "async_write", "write_threads", "num_threads", "verbosity",
        ),
        "it is an option of mergekit's command",
    ),
}  # fmt: skip
"""Keys that are found in files and change nothing, with the reason."""


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
            if key in _IDLE or key in PARAMETERS:
                why = _IDLE.get(key, "a parameter counts under `parameters` alone, in mergekit as here")
                log.warning("%s: `%s` has no effect: %s", self.place(key), key, why)
            elif key not in _KEYS:
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
        base = self.values.get("base_model")
        if base is not None:
            base = self.model(base, "base_model")
        self.check(found := self.inputs(base))
        columns = found.columns
        if peer.based:
            # Its own parameters have no effect in mergekit.
            columns = [column for column in columns if column.model != found.base]
            self.out["base"] = found.base
            self.put["base"] = self.place("base_model")
        elif base is not None:
            columns = self.with_base(found, base)
        if name == "slerp" and (found.base is None or len(columns) != 1):
            place = f"{self.at}models" if found.base else KEY
            raise self.fault("slerp takes two models, one of them the `base_model`", place)
        if name == "nuslerp" and (base is not None or len(columns) != 2):
            raise self.fault("nuslerp takes two models here, and no `base_model`", "base_model" if base else KEY)
        self.out["models"] = [self.entry(number, one, found) for number, one in enumerate(columns)]
        self.options(found)
        self.output(base if base is not None else columns[0].model)
        return {key: value for key, value in self.out.items() if value is not None}, self.put

    def inputs(self, base: str | None) -> Slices:
        """Return the models with their parameters, in each slice; whole models are one slice."""
        given, self.at = self.values, ""
        shared = [Setting("", given.get("parameters") or {}, "parameters")]
        if given.get("modules") is not None:
            given, more = self.module(given)
            shared = [more, *shared]
        if (given.get("models") is None) == (given.get("slices") is None):
            raise self.fault(
                "give either `models` or `slices`", f"{self.at}models" if "models" in given else self.at[:-1]
            )
        if given.get("slices") is not None:
            based, at = self.peer.based, f"{self.at}slices"
            return read_slices(given["slices"], shared, base, self.places, self.model, based=based, at=at)
        models = given["models"]
        if not isinstance(models, list) or not all(isinstance(one, Mapping) for one in models) or not models:
            raise self.fault("`models` is no list of models with parameters", f"{self.at}models", got=shortened(models))
        columns = []
        for number, one in enumerate(models):
            key = f"{self.at}models.{number}"
            for extra in set(one) - {"model", "parameters"}:
                raise self.fault(f"unknown key `{extra}` of a model", f"{key}.{extra}", fix="model, parameters")
            own = Setting(
                self.model(one.get("model"), f"{key}.model"), one.get("parameters") or {}, f"{key}.parameters"
            )
            columns.append(Column(own.model, [[own, *shared]], own.key))
        return Slices(columns, [shared], base, [1])

    def module(self, given: Mapping[str, Any]) -> tuple[Mapping[str, Any], Setting]:
        """Return what stands in the file's only module, and its parameters."""
        modules = given["modules"]
        one = next(iter(modules.values())) if isinstance(modules, Mapping) and len(modules) == 1 else None
        if not isinstance(one, Mapping) or given.get("models") or given.get("slices"):
            raise self.fault("only a file of one module, with its `models` or `slices`, can be done", "modules")
        self.at = f"modules.{next(iter(modules))}."
        for extra in set(one) - {"models", "slices", "parameters"}:
            raise self.fault(
                f"unknown key `{extra}` of a module", f"{self.at}{extra}", fix="models, slices, parameters"
            )
        return one, Setting("", one.get("parameters") or {}, f"{self.at}parameters")

    def model(self, name: Any, key: str) -> str:
        if not isinstance(name, str) or not name:
            raise self.fault("a model is named by a path or a hub name", key, got=shortened(name))
        if "@" in name and not Path(name).expanduser().exists():
            raise self.fault(
                "revisions of hub models are not supported", key, got=name, fix="fetch it, and name the path"
            )
        return name

    def check(self, found: Slices) -> None:
        """Look at every parameter's name, and at those that may have one value only."""
        peer = self.peer
        known = {*peer.per_model, *peer.shared, *peer.only}
        seen = set()
        for setting in [
            one for part in (*found.shared, *(s for c in found.columns for s in c.settings)) for one in part
        ]:
            for name, value in setting.values.items():
                key = f"{setting.key}.{name}"
                if key in seen:
                    continue
                seen.add(key)
                own = setting.model != ""
                if name in peer.idle or name == "int8_mask":
                    log.info("%s: `%s` has no effect here: it concerns how mergekit computes", self.place(key), name)
                elif own and name in known and name not in peer.per_model:
                    raise self.fault(f"`{name}` is one for all models", key, fix="set it in the file's `parameters`")
                elif name not in PARAMETERS:
                    raise self.fault(
                        f"unknown parameter `{name}` of {self.name}", key, fix=did_you_mean(name, known or PARAMETERS)
                    )
                elif name not in known:
                    log.warning("%s: `%s` has no effect: %s", self.place(key), name, self.why_idle(name))
                elif name in peer.only and constant(value) != peer.only[name] and not self.normalizes(name):
                    raise self.fault(
                        f"only `{name}: {str(peer.only[name]).lower()}` can be done for {self.name}", key, got=value
                    )

    def why_idle(self, name: str) -> str:
        if name == "embed_slerp":
            return f"embeddings are merged by {self.name}, as all other tensors are"
        return f"it is no parameter of {self.name}"

    def normalizes(self, name: str) -> bool:
        """Tell whether a parameter divides by the weights in a method of ours that never does: they are divided here."""
        return self.name == "task_arithmetic" and name == "normalize"

    def with_base(self, found: Slices, base: str) -> list[Column]:
        """Put the base model first: it is merged as the others are, and gives configuration and tokenizer."""
        if self.name in ("multislerp", "nuslerp"):
            raise self.fault(
                f"{self.name} of task vectors has no equal here", "base_model", fix="leave `base_model` out"
            )
        if self.name == "passthrough" or len(found.counts) > 1:
            log.warning(
                "%s: `base_model` has no effect: configuration and tokenizer are those of the first model",
                self.place("base_model"),
            )
            return found.columns
        own = [column for column in found.columns if column.model == base]
        return [
            *(own or [Column(base, found.shared, "base_model")]),
            *(column for column in found.columns if column.model != base),
        ]

    def entry(self, number: int, column: Column, found: Slices) -> dict[str, Any]:
        each = [self.values_at(settings) for settings in column.settings]
        if self.name == "slerp":
            for values, shared in zip(each, found.shared, strict=True):
                values["weight"] = self.value("t", shared)
            self.put["models.0.weight"] = self.where("t", found.shared[0])
        self.put[f"models.{number}"] = self.place(column.key)
        for name, ours in self.peer.per_model.items():
            self.put[f"models.{number}.{ours}"] = self.where(name, column.settings[0])
        return {
            "model": column.model,
            **{ours: in_runs([values[ours] for values in each], found.counts) for ours in each[0]},
        }

    def values_at(self, settings: Sequence[Setting]) -> dict[str, Any]:
        """Return a model's values in one slice, by our names."""
        values = {ours: self.value(name, settings) for name, ours in self.peer.per_model.items()}
        if "gamma" in values:
            values["gamma"] = outliers(values["gamma"], values["density"], self.where("gamma", settings))
        if "epsilon" in values:
            # Half the width of the probabilities there, the whole here; nothing is dropped at density 1.
            values["epsilon"] = 0.0 if values["density"] == 1 else mapped(values["epsilon"], lambda half: 2 * half)
        return values

    def options(self, found: Slices) -> None:
        """Set what holds for all models; an option in which they all agree is one for all."""
        for name, ours in self.peer.shared.items():
            if ours == "weight":
                continue
            given = in_runs([self.value(name, shared) for shared in found.shared], found.counts)
            if isinstance(self.peer.defaults[name], bool):
                if not isinstance(constant(given), bool):
                    raise self.fault(
                        f"`{name}` is true or false, for all tensors alike", f"{self.at}parameters.{name}", got=given
                    )
                given = constant(given)
            self.out[ours], self.put[ours] = given, self.where(name, found.shared[0])
        for ours in set(self.peer.per_model.values()) - {"weight"}:
            each = [entry[ours] for entry in self.out["models"]]
            if all(one == each[0] for one in each):
                self.out[ours], self.put[ours] = each[0], self.put[f"models.0.{ours}"]
                for entry in self.out["models"]:
                    del entry[ours]
        if self.name == "task_arithmetic":
            self.normalize(found.shared)
        self.out |= self.peer.options

    def normalize(self, shared: Sequence[Sequence[Setting]]) -> None:
        """Divide weights by their sum where `normalize` says so, which our method leaves to whoever sets them."""
        wanted = [constant(one.values["normalize"]) for part in shared for one in part if "normalize" in one.values]
        if not any(wanted):
            return
        weights = [entry["weight"] for entry in self.out["models"]]
        if not all(isinstance(weight, int | float) for weight in weights) or sum(weights) == 0:
            place = self.where("normalize", shared[0])
            raise ConfigError(
                "weights that vary by layer, or sum to zero, can't be normalised for task_arithmetic",
                place=place,
                fix="give weights that sum to 1 at every layer, and `normalize: false`",
            )
        for entry, weight in zip(self.out["models"], weights, strict=True):
            entry["weight"] = weight / sum(weights)

    def value(self, name: str, settings: Sequence[Setting]) -> Any:
        found = conditions(name, settings, self.place)
        if name in self.peer.defaults:
            found.append((None, self.peer.defaults[name]))
        return value_of(found, lambda: self.fault(f"{self.name} needs `{name}` for every tensor", settings[0].key))

    def where(self, name: str, settings: Sequence[Setting]) -> str:
        setting = next((one for one in settings if name in one.values), None)
        return self.place(f"{setting.key}.{name}" if setting else settings[0].key)

    def output(self, main: Any) -> None:
        """Set type, tokenizer, template and seed of the result."""
        for key, ours in (("chat_template", "chat_template"), ("random_seed", "seed")):
            self.out[ours], self.put[ours] = self.values.get(key), self.place(key)
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

    def tokenizer(self, main: Any) -> str | None:
        source, key = self.values.get("tokenizer_source"), "tokenizer_source"
        given = self.values.get("tokenizer")
        if given is not None:
            if source is not None:
                raise self.fault("give `tokenizer` or `tokenizer_source`, not both", "tokenizer")
            if not isinstance(given, Mapping):
                raise self.fault("`tokenizer` is a group", "tokenizer", got=given, fix="tokenizer: {source: union}")
            for name, value in given.items():
                if name == "pad_to_multiple_of":
                    self.out[name], self.put[name] = value, self.place(f"tokenizer.{name}")
                elif name != "source" and value:
                    raise self.fault(f"`tokenizer.{name}` is not supported", f"tokenizer.{name}", got=shortened(value))
            source, key = given.get("source", "union"), "tokenizer"
        if source == "base" and not isinstance(self.out.get("base"), str):
            return main if isinstance(main, str) else next(run["model"] for run in main if run["model"])
        return None if source is None else self.model(source, key)
