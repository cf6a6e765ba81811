"""A merge from its inputs to the finished directory: planned, executed, published."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError, ModelError, NumbersError, PluginError
from rlhf_core.infra.files import storage_errors
from rlhf_core.infra.forked_calls import usable_processors
from rlhf_core.merging import chat_template
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.execution import MergeExecution
from rlhf_core.merging.input_model import InputModel
from rlhf_core.merging.merge_input import MergeInput
from rlhf_core.merging.method import MergeMethod
from rlhf_core.merging.model_score import Evaluate, ModelScore
from rlhf_core.merging.open_model import open_model
from rlhf_core.merging.output import Output, require_free
from rlhf_core.merging.plan import Plan, require_count
from rlhf_core.merging.side_files import warn_without_tokenizer, write_side_files
from rlhf_core.merging.streams import THREADS_CHUNK

log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, None: None}

_WHOLE = 4
"""Most tensors at once, by default, of a method whose chunks are whole tensors."""

Progress = Callable[[int, int], None]
"""Called with the bytes of output that are done and their total."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge made."""

    output: Path
    tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    details: dict[str, Any] = field(default_factory=dict)
    """What the method reports, such as the models that a greedy soup took."""


class ModelMerger:
    """Merge several models into one.

    `ModelMerger(MergeConfig(method="ties", base="base", models=["a", "b"], output="merged")).merge()`

    Args:
        config: what to merge and how.
        evaluate: for a method that evaluates what it makes: a function from a directory to a score, larger being better;
            or its name, `FILE.py:FUNCTION`.
        progress: called with bytes of output that are done, and their total.
        method: the configuration's method, where it was built already.
    """

    def __init__(
        self,
        config: MergeConfig,
        *,
        evaluate: Evaluate | str | None = None,
        progress: Progress | None = None,
        method: MergeMethod | None = None,
    ) -> None:
        self.config, self.progress = config, progress
        self.method = method if method is not None else MergeMethod(config)
        if evaluate is not None and not self.method.evaluates:
            fix = "leave it out, or use greedy_soup"
            raise ConfigError(f"{config.method} doesn't evaluate models", place="evaluate", fix=fix)
        self._score = None if evaluate is None else ModelScore(evaluate)
        kind: Any = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.device = DeviceManager(kind).device
        self._whole = self.method.merger.chunk_shape == "tensor"
        self.threads = config.threads or (min(usable_processors(), _WHOLE) if self._whole else usable_processors())
        self.details: dict[str, Any] = {}
        self._resume = self._overwrite = False

    def plan(self) -> Plan:
        """Open the inputs, check that they fit together, and lay the output out; nothing is written."""
        config, merger = self.config, self.method.merger
        if merger.needs_base and config.base is None:
            raise ConfigError(
                f"{config.method} works on differences from a base model, and none is given",
                place="base",
                fix="give `--base`, in a file `base` (mergekit's: `base_model`)",
            )
        require_count(config.models, merger.models, config.method)
        if config.chat_template is not None:
            chat_template.check(config.chat_template)
        plan = Plan.make(
            open_model(config.base) if config.base is not None else None,
            [open_model(entry.model) for entry in config.models],
            base_merged=not merger.ignores_base,
            dtype=_DTYPES[config.dtype],
            shard_size=config.shard_size,
            tokenizer=config.tokenizer,
            multiple=config.pad_to_multiple_of,
        )
        self.method.check(plan)
        warn_without_tokenizer(plan)
        self._refuse_inputs_below_output(plan)
        return plan

    def memory_needed(self, plan: Plan) -> int:
        """Estimate the memory that a merge takes beyond the interpreter's, bytes."""
        return plan.memory(self.threads, None if self._whole else THREADS_CHUNK)

    def merge(self, *, resume: bool = False, overwrite: bool = False) -> MergeResult:
        """Merge and return what was made.

        Args:
            resume: continue a merge into the same output that was killed.
            overwrite: replace a model in the output.

        Raises:
            ConfigError, ModelError, StorageError: the options, inputs or output are invalid.
        """
        if self.config.output is None:
            raise ConfigError("no output directory is set", place="output", fix="give `--output DIR`")
        started = time.perf_counter()
        self._target = Path(self.config.output).expanduser().resolve()
        require_free(self._target, resume=resume, overwrite=overwrite)
        self._resume, self._overwrite = resume, overwrite
        self._plan = plan = self.plan()
        try:
            self.method.merger.merge(self)
        finally:
            plan.close()
        seconds = time.perf_counter() - started
        return MergeResult(self._target, len(plan.tensors), plan.read_bytes, plan.nbytes, seconds, self.details)

    def _refuse_inputs_below_output(self, plan: Plan) -> None:
        """Raise where an input, or a file that an option names, is in the output directory."""
        if self.config.output is None:
            return
        target = Path(self.config.output).expanduser().resolve()
        for path in [*(file.path for one in plan.inputs for file in one.files), *self.method.files]:
            if target in path.resolve().parents:
                raise ConfigError(
                    "one of the inputs is in the output directory",
                    place=str(target),
                    got=str(path),
                    fix="choose another output",
                )

    # For methods that override `Merger.merge`

    @property
    def inputs(self) -> list[MergeInput]:
        """The models, the base not counted, in the order in which they were given.

        Raises:
            ConfigError: a weight or an option of a model varies by layer: `inputs_at` has its values.
        """
        self.method.require_one_value()
        return self.inputs_at(self._plan.tensors[0].name)

    def inputs_at(self, tensor: str, merger: Merger | None = None) -> list[MergeInput]:
        """Return the models in the order in which they were given, with their weights and options at a tensor.

        Args:
            tensor: its name.
            merger: the method whose options they are; the configuration's where None.
        """
        return self.method.inputs_at(merger or self.method.merger, self._plan, tensor)

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors that are merged."""
        return [tensor.name for tensor in self._plan.tensors if tensor.merged]

    def write(self, merger: Merger, models: Sequence[int] | None = None) -> Path:
        """Merge every tensor and put the whole in the output directory.

        Args:
            merger: the method.
            models: numbers of the models to merge; all where None.
        """
        return self._write(merger, models, self._target, resume=self._resume, overwrite=self._overwrite)

    def evaluate(self, merger: Merger, models: Sequence[int]) -> float:
        """Return the evaluation of some models merged, or of one model as it is; larger is better.

        Raises:
            ConfigError: no evaluation is given.
        """
        if self._score is None:
            raise ConfigError(
                "no evaluation is given", place="evaluate", fix="give a function that scores a model's directory"
            )
        alone = self._plan.models[models[0]]
        if len(models) == 1 and alone.path is not None and self._is_as_written(alone):
            return self._score(alone.path)
        with storage_errors(self._target.parent):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{self._target.name}.trial-", dir=self._target.parent) as place:
                trial = Path(place) / "model"
                self._write(merger, models, trial, resume=False, overwrite=False)
                return self._score(trial)

    def _replayed(self, merger: Merger, chosen: Sequence[int]) -> MergeConfig:
        """Return the configuration that makes the same result without choosing among the models."""
        if merger.replay is None:
            return self.config
        models = [self.config.models[number] for number in chosen]
        return self.config.updated(method=merger.replay, models=[entry.model_dump() for entry in models], options={})

    def _is_as_written(self, one: InputModel) -> bool:
        """Tell whether a model merged alone would be the model in its directory."""
        plan = self._plan
        kinds = all(tensor.dtype == one.tensors[tensor.name].dtype for tensor in plan.own)
        return one.base is None and plan.vocabularies.rows is None and kinds

    def _write(
        self, merger: Merger, models: Sequence[int] | None, target: Path, *, resume: bool, overwrite: bool
    ) -> Path:
        plan, method = self._plan, self.method
        chosen = list(range(len(plan.models))) if models is None else list(models)
        if models is not None or merger is not method.merger:
            method.check_weights(plan, merger, chosen)
        fingerprint = plan.fingerprint(method.fingerprint_values(merger), chosen, self.device.type)
        output = Output(target, plan, fingerprint, resume=resume, overwrite=overwrite)
        try:
            MergeExecution(
                plan,
                output,
                merger,
                merger_at=lambda name: method.merger_at(merger, name, plan.depth),
                inputs_at=lambda name: method.inputs_at(merger, plan, name),
                chosen=chosen,
                seed=self.config.seed,
                device=self.device,
                threads=self.threads,
                progress=self.progress,
            ).run()
            config = self._replayed(merger, chosen)
            merged = [(number, self.config.models[number].weight) for number in chosen]
            return output.publish(lambda path: write_side_files(path, plan, config, merged, self.details))
        except (ConfigError, ModelError, NumbersError, PluginError):
            output.discard()  # a resumed merge would meet the same error again
            raise
        finally:
            output.close()
