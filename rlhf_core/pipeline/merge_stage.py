"""A stage that merges models, run as `rlhf merge FILE` runs it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_core.config.yaml_file import dump_yaml
from rlhf_core.infra.errors import ConfigError, RLHFError
from rlhf_core.infra.files import read_json, replace_file
from rlhf_core.merging.job import load_merge_job
from rlhf_core.merging.output import unfinished
from rlhf_core.pipeline.recipe import every_error
from rlhf_core.pipeline.stage import POLICY, REWARD, Find, Product, Stage, StageWork, check_model
from rlhf_core.pipeline.stage_references import MODEL, references, resolved
from rlhf_core.registry.method_or_file import GivenValues, find_method

_MODELS, _BASE, _EVALUATE = "models", "base", "evaluate"


class MergeStage(Stage):
    """A stage that merges models. Its keys are those of a merge's file, and `evaluate`: what `rlhf merge --evaluate` takes."""

    model_keys = (_MODELS, _BASE)
    takes_policy = False

    def _find_method(self) -> None:
        try:
            self.plugin, _ = find_method({"method": self.entry.method}, self.entry.places, "merger")
        except RLHFError as error:
            self.errors.append(error)
        self.makes = {MODEL: Product(POLICY, MODEL)}

    def _completed(self) -> dict[str, Any]:
        # What it makes is what it is made of: a merge of reward models is one.
        makers = [
            (self.earlier[one.stage].makes or {}).get(one.product)
            for one in references(self.values.get(_MODELS))
            if one.stage in self.earlier
        ]
        if any(product is not None and product.kind == REWARD for product in makers):
            self.makes = {MODEL: Product(REWARD, MODEL)}
        return {"seed": self.recipe.recipe.seed % 2**32, **self.values}

    def input_models(self) -> list[str]:
        models = self.values.get(_MODELS)
        found = (
            [one.get(MODEL) if isinstance(one, Mapping) else one for one in models] if isinstance(models, list) else []
        )
        return [one for one in [*found, self.values.get(_BASE)] if isinstance(one, str)]

    def check(self, find: Find) -> list[RLHFError]:
        if self.plugin is None:
            return []
        errors: list[RLHFError] = []
        if "output" in self.values:
            fix = "leave it out: a stage writes into the pipeline's directory"
            errors.append(ConfigError("a stage has no `output`", place=self.entry.place("output"), fix=fix))
        try:
            load_merge_job(GivenValues(self._file(find, Path()), self.entry.places))
        except RLHFError as error:
            errors += every_error(error)
        for source in self.input_models():
            if not list(references(source)):
                errors += check_model(source, self.entry.place(_MODELS), self.earlier)
        return errors

    def run(self, work: StageWork) -> dict[str, Any]:
        target = work.directory / MODEL
        work.directory.mkdir(parents=True, exist_ok=True)
        replace_file(work.file, dump_yaml(self._file(work.find, target)).encode())
        report = work.directory / "merge.json"
        if not report.exists():
            # A model without a report: the pipeline was killed between the two. Merging again gives the same model.
            whole = (target / "config.json").exists()
            begun = (unfinished(target) / "merge.state").exists()
            more = ["--overwrite"] if whole else ["--resume"] if begun else []
            if function := self.values.get(_EVALUATE):
                more += ["--evaluate", str(function)]
            found = work.run(["merge", str(work.file), "--json", *more], log=work.file.with_suffix(".log"))
            replace_file(report, found.encode())
        return dict(read_json(report))

    def gain(self, metrics: Mapping[str, Any]) -> str:
        tensors, written, seconds = (metrics.get(key) for key in ("tensors", "bytes_written", "seconds"))
        if tensors is None or written is None or seconds is None:
            return ""
        return f"{tensors:,} tensors, {written / 1e6:,.0f} MB written in {seconds:.1f} s"

    def _file(self, find: Find, output: Path) -> dict[str, Any]:
        """Return the merge's configuration file, as values."""
        values = {key: value for key, value in resolved(self.values, find).items() if key not in ("output", _EVALUATE)}
        return {"method": self.entry.method, **values, "output": str(output)}
