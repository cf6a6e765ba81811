"""A stage that samples: one sampler's completions as rows, or several samplers compared on the same prompts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config.sampling_run import POLICY as POLICY_ROLE
from rlhf_core.config.yaml_file import dump_yaml, flatten
from rlhf_core.generation.sampling_job import load_sampling_job
from rlhf_core.infra.errors import ConfigError, RLHFError, shortened
from rlhf_core.infra.files import read_json, replace_file, replace_json
from rlhf_core.pipeline.recipe import every_error
from rlhf_core.pipeline.stage import (
    COMPRESS,
    COMPRESSOR_NEED,
    DATA,
    POLICY,
    Find,
    Need,
    Product,
    Stage,
    StageWork,
    check_model,
    check_prompts,
    reward_needs,
)
from rlhf_core.pipeline.stage_references import MODEL, ROWS, references, resolved, spelled_out
from rlhf_core.registry.method_or_file import GivenValues, find_method

SAMPLERS = "samplers"
_FILE = "rows.jsonl"
_COMPARISON = {"check": "numeric_answer", "repeats": 1}
"""Keys of a comparison alone, with their defaults."""
_NAME = "name"


class SampleStage(Stage):
    """A stage that samples.

    With `method` it has the keys of `rlhf sample`'s file and writes the rows; with `samplers`, a list of such groups, it compares
    them as `rlhf compare-samplers` does, by `check`, each answering `repeats` times.
    """

    def _find_method(self) -> None:
        self.compares = SAMPLERS in self.values
        self.makes = {} if self.compares else {ROWS: Product(DATA, _FILE)}
        if self.compares and self.entry.method is not None:
            fix = "leave out one of them"
            self.errors.append(
                ConfigError("has both `method` and `samplers`", place=self.entry.place(SAMPLERS), fix=fix)
            )
        given: Any = self.values.get(SAMPLERS) if self.compares else [{"method": self.entry.method}]
        self.known = isinstance(given, list) and all(isinstance(one, Mapping) for one in given) and bool(given)
        if not self.known:
            problem = "`samplers` must be a list of groups, each with `method` and its options"
            self.errors.append(ConfigError(problem, place=self.entry.place(SAMPLERS), got=shortened(given)))
            given = []
        self.roles: set[str] = set()
        self._kinds: dict[str, str] = {}
        """Role → kind of its model."""
        for number, one in enumerate(given):
            at = f"{SAMPLERS}.{number}." if self.compares else ""
            places = {"": self.entry.place(at[:-1]), "method": self.entry.place(f"{at}method")}
            try:
                plugin, method = find_method(one, places, "sampler")
            except RLHFError as error:
                self.errors.append(error)
                self.known = False
                continue
            self.plugin = None if self.compares else plugin
            self.roles |= {*method.roles} - {POLICY_ROLE}
            self._kinds |= method.roles
        self.model_keys = (MODEL, COMPRESS, *sorted(self.roles))  # type: ignore[misc]

    def _completed(self) -> dict[str, Any]:
        values = {"seed": self.recipe.recipe.seed, **self._as_lists(self.with_compression(self.values))}
        if self.compares and isinstance(values.get(SAMPLERS), list):
            names = self.recipe.names
            values[SAMPLERS] = [
                self._as_lists(
                    {key: spelled_out(value, names) if key in self.roles else value for key, value in one.items()}
                )
                if isinstance(one, Mapping)
                else one
                for one in values[SAMPLERS]
            ]
        return values

    def _as_lists(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values in which a role's reward or model alone is a list of one, and a stage's model a reward by it."""
        found = dict(values)
        for role, kind in self._kinds.items():
            if kind == "policy" or found.get(role) is None:
                continue
            given = found[role] if isinstance(found[role], list) else [found[role]]
            found[role] = [self.reward_by_stage(one) for one in given] if kind == "reward" else given
        return found

    def _needs(self) -> Sequence[Need]:
        samplers = self.values.get(SAMPLERS)
        groups = {"": self.values} | {
            f"{SAMPLERS}.{at}.": one for at, one in enumerate(samplers if isinstance(samplers, list) else [])
        }
        rewards = [
            need
            for at, group in groups.items()
            for role in sorted(self.roles)
            for need in reward_needs(f"{at}{role}", group.get(role) if isinstance(group, Mapping) else None)
        ]
        return [Need(MODEL, (POLICY,), "a policy, which completes prompts"), COMPRESSOR_NEED, *rewards]

    def check(self, find: Find) -> list[RLHFError]:
        if not self.known or not isinstance(self.values.get(SAMPLERS, []), list):
            return []
        errors = self.compression_errors()
        errors += [
            ConfigError(
                "the samplers that are compared read prompts alike", place=self.entry.place(f"{SAMPLERS}.{number}.{COMPRESS}"),
                fix="set `compress` for the whole stage",
            )
            for number, one in enumerate(self.values.get(SAMPLERS, []))
            if isinstance(one, Mapping) and COMPRESS in one
        ]  # fmt: skip
        if "output" in self.values:
            fix = "leave it out: a stage writes into the pipeline's directory"
            errors.append(ConfigError("a stage has no `output`", place=self.entry.place("output"), fix=fix))
        for values, places in self._jobs(find):
            try:
                job = load_sampling_job(GivenValues(values, places))
                job.rewards()
            except RLHFError as error:
                errors += [one for one in every_error(error) if str(one) not in map(str, errors)]
        errors += check_prompts(self.values, self.entry.place("prompts"))
        model = self.values.get(MODEL)
        source = model.get("path") if isinstance(model, Mapping) else model
        if MODEL in self.entry.values and not list(references(source)):
            errors += check_model(source, self.entry.place(MODEL), self.earlier)
        return errors

    def run(self, work: StageWork) -> dict[str, Any]:
        work.directory.mkdir(parents=True, exist_ok=True)
        log = work.file.with_suffix(".log")
        if self.compares:
            return self._compare(work, log)
        output = work.directory / _FILE
        ((values, _),) = self._jobs(work.find)
        replace_file(work.file, dump_yaml({**values, "output": str(output)}).encode())
        more = ["--resume"] if output.exists() and output.stat().st_size else []
        found = work.run(["sample", str(work.file), "--json", *more], log=log)
        return dict(json.loads(found.splitlines()[-1]))

    def gain(self, metrics: Mapping[str, Any]) -> str:
        if not self.compares:
            return f"{metrics.get('rows', 0)} rows"
        return ", ".join(
            f"{one['name']} {one['accuracy']:.3f}" + ("" if one["error"] is None else f" ± {one['error']:.3f}")
            for one in metrics["samplers"]
        )

    def _compare(self, work: StageWork, log: Path) -> dict[str, Any]:
        """Compare the samplers and write `comparison.json`, in which each has its name in the recipe."""
        result = work.directory / "comparison.json"
        if result.exists():  # it was compared just before the pipeline was killed
            return dict(read_json(result))
        shared = {key: value for key, value in resolved(self.values, work.find).items() if key != SAMPLERS}
        own = resolved(self.values[SAMPLERS], work.find)
        texts = [
            shlex.join([one["method"], *_flags({k: v for k, v in one.items() if k not in ("method", _NAME)})])
            for one in own
        ]
        replace_file(work.file, dump_yaml({**shared, SAMPLERS: own}).encode())
        flags = _flags({**_COMPARISON, **shared})
        found = json.loads(work.run(["compare-samplers", *texts, *flags, "--json"], log=log))
        for one, sampler, text in zip(found["samplers"], own, texts, strict=True):
            one |= {"name": sampler.get(_NAME) or sampler["method"], "command": text}
        replace_json(result, found)
        return dict(found)

    def _jobs(self, find: Find) -> list[tuple[dict[str, Any], dict[str, str]]]:
        """Return the file of each sampler as values, and the place of each key."""
        shared = {key: value for key, value in resolved(self.values, find).items() if key not in (SAMPLERS, "output")}
        if not self.compares:
            return [({"method": self.entry.method, **shared}, dict(self.entry.places))]
        shared = {key: value for key, value in shared.items() if key not in _COMPARISON}
        jobs = []
        for number, one in enumerate(resolved(self.values[SAMPLERS], find)):
            at = f"{SAMPLERS}.{number}."
            own = {key.removeprefix(at): place for key, place in self.entry.places.items() if key.startswith(at)}
            places = {**self.entry.places, **own, "": self.entry.place(at[:-1])}
            jobs.append(({**shared, **{key: value for key, value in one.items() if key != _NAME}}, places))
        return jobs


def _flags(values: Mapping[str, Any]) -> list[str]:
    """Return options as flags of the command line; a list of groups is one flag, as YAML on one line."""
    flags: list[str] = []
    for key, value in flatten(values).items():
        texts = value if isinstance(value, list) and all(isinstance(one, str) for one in value) else [value]
        flags += [f"--{key.replace('_', '-')}={one if isinstance(one, str) else json.dumps(one)}" for one in texts]
    return flags
