"""mergekit's files, read unchanged and translated into rlhf_core's configuration of a merge.

What rlhf_core doesn't support is an error; what only controls how mergekit runs is ignored, which is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_core.config.base import place_of
from rlhf_core.infra.errors import ConfigError, did_you_mean, shortened
from rlhf_core.interop.mergekit_file import MergekitFile, MergekitModel, read_models
from rlhf_core.interop.mergekit_methods import METHODS, OUR_NAMES, PARAMETERS, SHARED, capped_gamma
from rlhf_core.interop.mergekit_parameters import REQUIRED, ParameterScope, constant, in_runs, mapped, per_layer_value

log = logging.getLogger(__name__)

KEY = "merge_method"
"""The key by which one of mergekit's files is known."""
_DTYPES = {"float32": "float32", "bfloat16": "bf16", "float16": "fp16"}
_NO_EFFECT = {
    "name": "`--output` names the result",
    **dict.fromkeys(PARAMETERS, "mergekit reads parameters only under `parameters`"),
    **dict.fromkeys(
        (
            "allow_crimes", "trust_remote_code", "lora_merge_cache", "transformers_cache", "cuda", "low_cpu_memory",
            "lazy_unpickle", "lazy_loader", "clone_tensors", "copy_tokenizer", "write_model_card", "safe_serialization", "quiet",
            "read_to_gpu", "multi_gpu", "async_write", "write_threads", "num_threads", "verbosity",
        ),
        "it is an option of mergekit's command",
    ),
}  # fmt: skip
"""Keys that files have at their top and that change nothing, with the reason."""


def translate(
    values: Mapping[str, Any], places: Mapping[str, str], *, strict: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what one of mergekit's files says as keys of `MergeConfig` and options of its method, with the place of each.

    Args:
        values: the file's values.
        places: `file:line` of each dotted key.
        strict: refuse a method that mergekit defines differently, instead of warning how it differs.

    Raises:
        ConfigError: the file has what mergekit doesn't know, or what rlhf_core doesn't support.
        ModelError: the number of a model's layers can't be read.
    """
    return _Translation(values, places, strict).translated()


class _Translation:
    """Translates one file into `out`, values by key of `MergeConfig` or option, and `out_places`, the place of each."""

    def __init__(self, values: Mapping[str, Any], places: Mapping[str, str], strict: bool) -> None:
        self.places = places
        for key in values:
            if key in _NO_EFFECT:
                log.warning("%s: `%s` has no effect: %s", self.place(key), key, _NO_EFFECT[key])
        self.file = MergekitFile.parse(
            {key: value for key, value in values.items() if key not in _NO_EFFECT}, place=places
        )
        self.name = self.file.merge_method
        if self.name not in METHODS:
            fix = did_you_mean(self.name, METHODS)
            raise self.fault(f"mergekit's method `{self.name}` isn't supported", KEY, fix=fix)
        self.method = METHODS[self.name]
        if (differs := self.method.differs) is not None:
            if strict:
                raise self.fault(f"mergekit's definition of {self.name} isn't available", KEY, got=differs)
            log.warning(
                "mergekit's %s is merged with rlhf_core's `%s`, which differs: %s",
                self.name,
                self.method.method,
                differs,
            )
        models = read_models(self.file, places, needs_base=self.method.needs_base)
        self.models, self.base, self.counts, self.shared, self.scopes = models
        self.out: dict[str, Any] = {}
        self.out_places = {"": places[""]}
        self.set("method", self.method.method, KEY)

    def translated(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the keys and options that the file sets, and the place of each."""
        self.check_parameters()
        if self.method.needs_base:
            self.set("base", self.base, "base_model")
        elif self.file.base_model is not None:
            self.merge_base(self.file.base_model)
        if self.name == "slerp" and (self.base is None or len(self.models) != 1):
            place = self.models[0].key.rpartition(".")[0] if self.base else KEY
            raise self.fault("slerp takes two models, one of them the `base_model`", place)
        if self.name == "nuslerp" and len(self.models) != 2:
            raise self.fault("nuslerp is supported for two models, without a `base_model`", KEY)
        self.out["models"] = [self.entry(number, model) for number, model in enumerate(self.models)]
        self.set_options()
        self.set_output()
        return {key: value for key, value in self.out.items() if value is not None}, self.out_places

    def place(self, key: str) -> str:
        return place_of(key, self.places)

    def fault(self, problem: str, key: str, *, got: object = None, fix: str | None = None) -> ConfigError:
        return ConfigError(problem, place=self.place(key), got=got, fix=fix)

    def set(self, name: str, value: Any, key: str) -> None:
        """Set a key of `MergeConfig` or an option, from a dotted key of the file."""
        self.out[name], self.out_places[name] = value, self.place(key)

    def check_parameters(self) -> None:
        """Raise ConfigError for parameters that mergekit doesn't know or rlhf_core doesn't support; log those without effect."""
        method, known = self.method, {*self.method.parameters, *self.method.only}
        for scope, name, value in [(each, *item) for each in self.scopes for item in each.values.items()]:
            key = f"{scope.key}.{name}"
            if name in method.unused or name == "int8_mask":
                log.info("%s: `%s` is ignored: it only controls how mergekit runs", self.place(key), name)
            elif scope.of_model and name in known and (name in SHARED or name in method.only):
                raise self.fault(f"`{name}` can't differ between models", key, fix="set it in the file's `parameters`")
            elif name not in PARAMETERS:
                fix = did_you_mean(name, known or PARAMETERS)
                raise self.fault(f"unknown parameter `{name}` of {self.name}", key, fix=fix)
            elif name not in known:
                embeddings = f"embeddings are merged by {self.name}, as all other tensors are"
                why = embeddings if name == "embed_slerp" else f"it is no parameter of {self.name}"
                log.warning("%s: `%s` has no effect: %s", self.place(key), name, why)
            elif name in method.only and constant(value) != method.only[name] and not self.divides(name):
                only = f"{self.name} is supported only with `{name}: {str(method.only[name]).lower()}`"
                raise self.fault(only, key, got=value)

    def divides(self, name: str) -> bool:
        """Tell whether a parameter asks task_arithmetic to divide by the weights, which only this translation does."""
        return self.name == "task_arithmetic" and name == "normalize"

    def merge_base(self, base: str) -> None:
        """Put the base model first among the models: it is merged as they are, and gives configuration and tokenizer."""
        if self.name in ("multislerp", "nuslerp"):
            fix = "leave `base_model` out"
            raise self.fault(f"{self.name} of task vectors isn't supported", "base_model", fix=fix)
        if self.name == "passthrough" or len(self.counts) > 1:
            why = "configuration and tokenizer are those of the first model"
            log.warning("%s: `base_model` has no effect: %s", self.place("base_model"), why)
            return
        own = [one for one in self.models if one.model == base]
        others = [one for one in self.models if one.model != base]
        self.models = [*(own or [MergekitModel(base, self.shared, "base_model")]), *others]

    def entry(self, number: int, model: MergekitModel) -> dict[str, Any]:
        """Return one entry of `models`: the model, its weight and its own options."""
        each = [self.values_at(scopes) for scopes in model.scopes]
        self.out_places[f"models.{number}"] = self.place(model.key)
        for name in each[0]:
            self.out_places[f"models.{number}.{OUR_NAMES[name]}"] = self.place_of_parameter(name, model.scopes[0])
        values = {OUR_NAMES[name]: in_runs([one[name] for one in each], self.counts) for name in each[0]}
        return {"model": model.model, **values}

    def values_at(self, scopes: Sequence[ParameterScope]) -> dict[str, Any]:
        """Return a model's parameters in one slice, by mergekit's names, in rlhf_core's units; slerp's `t` among them."""
        names = [name for name in self.method.parameters if name not in SHARED or name == "t"]
        values = {name: self.value(name, scopes) for name in names}
        if "gamma" in values:
            values["gamma"] = capped_gamma(values["gamma"], values["density"], self.place_of_parameter("gamma", scopes))
        if "epsilon" in values:
            # mergekit's epsilon is half the width of the probabilities, rlhf_core's the whole; at density 1 nothing is dropped.
            values["epsilon"] = 0.0 if values["density"] == 1 else mapped(values["epsilon"], lambda half: 2 * half)
        return values

    def value(self, name: str, scopes: Sequence[ParameterScope]) -> Any:
        """Return a parameter as a number or per-layer value. Raises ConfigError where it is required and some tensor has none."""
        value = per_layer_value(name, scopes, self.method.parameters[name], self.place)
        if value is REQUIRED:
            raise self.fault(f"{self.name} needs `{name}` for every tensor", scopes[0].key)
        return value

    def place_of_parameter(self, name: str, scopes: Sequence[ParameterScope]) -> str:
        """Return the place in the file where a parameter is set, else that of the narrowest scope that could set it."""
        scope = next((one for one in scopes if name in one.values), None)
        return self.place(f"{scope.key}.{name}" if scope else scopes[0].key)

    def set_options(self) -> None:
        """Set the options for all models, those too for which every model has the same value."""
        models = self.out["models"]
        for name in [name for name in self.method.parameters if name in SHARED and name != "t"]:
            given = in_runs([self.value(name, shared) for shared in self.shared], self.counts)
            if isinstance(self.method.parameters[name], bool):
                given, place = constant(given), self.place_of_parameter(name, self.shared[0])
                if not isinstance(given, bool):
                    problem = f"`{name}` must be true or false, the same for all tensors"
                    raise ConfigError(problem, place=place, got=given)
            self.out[OUR_NAMES[name]], self.out_places[OUR_NAMES[name]] = (
                given,
                self.place_of_parameter(name, self.shared[0]),
            )
        for option in [key for key in models[0] if key not in ("model", "weight")]:
            if all(entry[option] == models[0][option] for entry in models):
                self.out[option], self.out_places[option] = models[0][option], self.out_places[f"models.0.{option}"]
                for entry in models:
                    del entry[option]
        if any(constant(scope.values["normalize"]) for scope in self.scopes if "normalize" in scope.values):
            self.divide_weights()
        self.out |= self.method.options

    def divide_weights(self) -> None:
        """Divide the weights by their sum where the file asks for it and the method doesn't do so itself."""
        if not self.divides("normalize"):
            return
        weights = [entry["weight"] for entry in self.out["models"]]
        if not all(isinstance(weight, int | float) for weight in weights) or sum(weights) == 0:
            raise ConfigError(
                f"weights that differ between layers, or sum to 0, can't be normalised for {self.name}",
                place=self.place_of_parameter("normalize", self.shared[0]),
                fix="give weights that sum to 1 at every layer, and `normalize: false`",
            )
        for entry, weight in zip(self.out["models"], weights, strict=True):
            entry["weight"] = weight / sum(weights)

    def set_output(self) -> None:
        """Set dtype, tokenizer, chat template and seed of the result."""
        file = self.file
        self.set("chat_template", file.chat_template, "chat_template")
        self.set("seed", file.random_seed, "random_seed")
        if file.out_dtype == "float32" and file.dtype not in (None, "float32"):
            fix = "leave `dtype` out"
            raise self.fault("`dtype` narrower than `out_dtype` is not supported", "dtype", fix=fix)
        if (dtype := file.out_dtype or file.dtype) is not None:
            self.set("dtype", _DTYPES[dtype], "out_dtype" if file.out_dtype else "dtype")
        source, key = file.tokenizer_source, "tokenizer_source"
        if file.tokenizer is not None:
            if source is not None:
                raise self.fault("give `tokenizer` or `tokenizer_source`, not both", "tokenizer")
            if file.tokenizer.tokens:
                got = shortened(file.tokenizer.tokens)
                raise self.fault("`tokenizer.tokens` is not supported", "tokenizer.tokens", got=got)
            source, key = file.tokenizer.source, "tokenizer"
            self.set("pad_to_multiple_of", file.tokenizer.pad_to_multiple_of, "tokenizer.pad_to_multiple_of")
        if source == "base" and not isinstance(self.out.get("base"), str):  # `base` means one whole model here
            main = file.base_model or self.models[0].model
            source = main if isinstance(main, str) else next(run["model"] for run in main if run["model"])
        self.set("tokenizer", source, key)
