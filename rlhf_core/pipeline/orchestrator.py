"""`RLHFOrchestrator`: a pipeline from Python, whole from a recipe or stage by stage, and its models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_core.config.compression import LongPromptsConfig
from rlhf_core.infra.errors import ConfigError, ModelError, StorageError
from rlhf_core.infra.files import (
    fsync_directory,
    read_json,
    remove_tree,
    replace_file,
    replace_json,
    storage_errors,
    temporary_path,
)
from rlhf_core.infra.model_files import COMPRESSOR_HEAD, PROCESS_REWARD_HEAD, REWARD_HEAD, VALUE_HEAD, head_pair, locate
from rlhf_core.infra.python_wording import said_for_python
from rlhf_core.pipeline.pipeline_plan import PipelinePlan
from rlhf_core.pipeline.pipeline_record import PipelineRecord, refuse_inputs_inside
from rlhf_core.pipeline.pipeline_run import PipelineResult, PipelineRun, StageResult
from rlhf_core.pipeline.recipe import RecipeError, RecipeFile, read_recipe
from rlhf_core.pipeline.stage import COMPRESSOR, POLICY, REWARD
from rlhf_core.pipeline.stage_command import InProcesses, RunCommand
from rlhf_core.training.signals import StopSignal

if TYPE_CHECKING:
    from rlhf_core.generation.prompt_compression import CompressedPrompt, PromptCompression
    from rlhf_core.models.headed_model import HeadedModel
    from rlhf_core.models.policy_model import PolicyModel

_MODELS = "models.json"


class RLHFOrchestrator:
    """Runs a pipeline of stages: a recipe as a whole, or one stage after another.

        RLHFOrchestrator("recipe.yaml").run_full_pipeline()

        pipeline = RLHFOrchestrator({"model": "base", "output": "runs/mine"})
        pipeline.run_sft("demonstrations.jsonl", epochs=2)
        pipeline.run_reward_model_training("pairs.jsonl", name="judge")
        pipeline.run_policy_optimization("grpo", "prompts.jsonl", reward="judge")
        pipeline.save_models("models")

    A stage's reference is the policy that it begins with. That one is frozen: no stage writes into another's directory, and on a
    rollback it is what later stages go on with. Each stage is a process of its own, from which memory returns whole.

    Args:
        recipe: a YAML file, or values of the same shape; `stages` may be missing where stages are run one by one.
        changes: keys in place of the recipe's, such as `output`.
        resume: of stages that are run one by one: keep those that the directory holds finished, continue one that was stopped.
        overwrite: replace what the directory holds; with `resume` alone the stages that changed.
        run: runs commands of `rlhf`; each in a process of its own where None. `InThisProcess(rlhf_core.cli.main)` runs them here,
            where methods and rewards of a notebook are known.
        tell: called with a line for people at the begin and the end of each stage; None prints them.
        log: called with each line that a stage's process logs; None keeps them in the stages' log files alone.
        progress: show how the running stage goes where `log` is None: on a terminal in a line that is renewed, elsewhere by
            `tell` every half minute.
    """

    def __init__(
        self,
        recipe: str | Path | Mapping[str, Any],
        changes: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        run: RunCommand | None = None,
        tell: Callable[[str], None] | None = None,
        log: Callable[[str], None] | None = None,
        progress: bool = True,
    ) -> None:
        self._source, self._changes = recipe, dict(changes or {})
        self._resume, self._overwrite = resume, overwrite
        self._run, self._tell, self._log = run, tell or _print, log
        self._progress = progress and log is None
        self._entries: list[dict[str, Any]] = []
        """Stages that were run one by one."""
        self._execution: PipelineRun | None = None
        self._compressions: dict[tuple[str, str], tuple[PolicyModel, PromptCompression]] = {}

    # A recipe as a whole

    def plan(self) -> PipelinePlan:
        """Return the recipe's plan, after checking it.

        Raises:
            RecipeError: something is wrong with it; all mistakes are named.
        """
        plan = PipelinePlan(self._read())
        if errors := plan.check():
            raise RecipeError(errors, str(self._source) if not isinstance(self._source, Mapping) else "recipe")
        return plan

    @said_for_python()
    def run_full_pipeline(self, *, resume: bool = False, overwrite: bool = False) -> PipelineResult:
        """Check the recipe, run all its stages in order, and return how they ended.

        Args:
            resume: keep finished stages whose configuration, data and input model are the same; continue one that was stopped.
            overwrite: replace the pipeline in the directory; with `resume` only the stages that changed.

        Raises:
            RecipeError: the recipe is wrong; nothing was run.
            RLHFError: a stage failed, or made its policy worse, and the recipe says to stop then.
            Stopped: by SIGTERM or Ctrl-C; `resume` continues.
        """
        plan = self.plan()
        if overwrite and not resume:
            refuse_inputs_inside(plan.output, pipeline_inputs(plan))
        record = PipelineRecord.open(plan.output, resume=resume, overwrite=overwrite)
        try:
            record.begin(plan.recipe)
            with self._commands() as (run, stop):
                execution = self._execute(plan, record, run, stop, replace=overwrite)
                return execution.execute()
        finally:
            record.close()

    # Stage by stage

    @said_for_python()
    def run_stage(self, entry: Mapping[str, Any]) -> StageResult:
        """Run one more stage, given as a recipe has it: `{"method": "dpo", "data": "pairs.jsonl", "beta": 0.2}`.

        Raises:
            RecipeError: the stage is wrong.
            RLHFError: it failed, or made its policy worse, and `rollback` says to stop then.
        """
        entries = [*self._entries, dict(entry)]
        plan = PipelinePlan(self._read(entries))
        if errors := plan.check():
            raise RecipeError(errors, f"stage {len(entries)}")
        self._entries = entries
        stage = list(plan.stages.values())[-1]
        with self._commands() as (run, stop):
            if self._execution is None:
                record = PipelineRecord.open(plan.output, resume=self._resume, overwrite=self._overwrite)
                record.begin(plan.recipe)
                self._execution = self._execute(plan, record, run, stop, replace=self._overwrite and self._resume)
            execution = self._execution
            execution.continue_with(plan, run, lambda: stop.requested is not None)
            try:
                result = execution.one(stage)
            except BaseException as error:
                execution.fail(error)
                raise
        execution.settle()
        return result

    def run_sft(self, data: Any, *, name: str = "sft", **options: Any) -> StageResult:
        """Fine-tune the last policy on demonstrations: a path, or rows of the record type `sft`; options are those of `sft`."""
        return self.run_stage({"name": name, "method": "sft", "data": self._data(data, name), **options})

    def run_reward_model_training(self, data: Any, *, name: str = "reward_model", **options: Any) -> StageResult:
        """Train a reward model on pairs: a path, or rows of the record type `preference`; options are those of `reward_model`."""
        return self.run_stage({"name": name, "method": "reward_model", "data": self._data(data, name), **options})

    def run_process_reward_model_training(
        self, data: Any, *, name: str = "process_reward", **options: Any
    ) -> StageResult:
        """Train a reward model that judges each step, on rows with labels of steps; options are those of `process_reward`."""
        return self.run_stage({"name": name, "method": "process_reward", "data": self._data(data, name), **options})

    def run_policy_optimization(
        self,
        method: str,
        data: Any,
        *,
        name: str | None = None,
        reward: str | Sequence[str] | None = None,
        **options: Any,
    ) -> StageResult:
        """Train the last policy by any trainer of the registry.

        Args:
            method: its name: `dpo`, `grpo`, a third party's.
            data: a path, or rows of the record type that it consumes.
            name: of the stage; the method's where None.
            reward: the stages that trained its reward models; other rewards are its option `rewards`.
            options: the method's own.
        """
        name = name or method.replace(":", "-")
        given = {} if reward is None else {"reward": reward if isinstance(reward, str) else list(reward)}
        return self.run_stage({"name": name, "method": method, "data": self._data(data, name), **given, **options})

    # Long prompts

    def compress_prompts(
        self, prompts: Sequence[Any], *, compressor: str | Path | None = None, **options: Any
    ) -> list[CompressedPrompt]:
        """Return prompts as the last good policy reads them: those over a length compressed.

        The recipe's `compress` is taken; where it has none, the last stage that trained a compressor, else the sentences that
        matter most.

        Args:
            prompts: texts, chats, or rows with a `prompt`.
            compressor: a compressor's directory, or the name of the stage that trained it.
            options: of `CompressionConfig`, in place of the recipe's: `over=512, ratio=8`.

        Raises:
            ConfigError: an option is wrong. ModelError: the compressor can't be loaded, or isn't for this policy.
            DataError: a prompt can't be read.
        """
        from rlhf_core.generation.generate import compressed_prompts

        policy, compression = self._compression(compressor, options)
        return compressed_prompts(policy, compression, prompts)

    def compress_context_from_ids(
        self, ids: Sequence[int], *, compressor: str | Path | None = None, **options: Any
    ) -> CompressedPrompt:
        """Return a whole context, given as the policy's token ids, compressed, however short it is; see `compress_prompts`.

        With a compressor the result has `embeddings` (N, E); without one, the token ids of the sentences that matter most.
        """
        _, compression = self._compression(compressor, options)
        return compression.compress_ids([ids])[0]

    def _compression(
        self, compressor: str | Path | None, options: Mapping[str, Any]
    ) -> tuple[PolicyModel, PromptCompression]:
        """Return the last good policy, and how its prompts are compressed; both are loaded once while they stay the same."""
        from rlhf_core.generation.prompt_compression import PromptCompression
        from rlhf_core.models import PolicyModel

        models = self._models() if (self._output() / "pipeline.json").is_file() else {}
        path = models[POLICY][1] if models else self._read([{"kind": "merge"}]).recipe.model
        shared = self._read([{"kind": "merge"}]).recipe.compress
        values = {} if shared is None else shared.model_dump(mode="json", exclude_unset=True)
        trained = {name: where for name, (kind, where) in models.items() if kind == COMPRESSOR}
        if compressor is not None:
            values["compressor"] = str(compressor)
        elif shared is None and trained:
            values["compressor"] = list(trained)[-1]
        named = values.get("compressor")
        values |= {"compressor": trained.get(str(named), named), **options}
        config = LongPromptsConfig.parse(values, place="compress")
        if (key := (path, config.model_dump_json())) not in self._compressions:
            policy = PolicyModel.from_pretrained(path, frozen=True)
            self._compressions = {key: (policy, PromptCompression.load(config, policy))}
        return self._compressions[key]

    def close(self) -> None:
        """Release the directory after stages that were run one by one, and write how the pipeline ended."""
        if self._execution is not None:
            self._execution.finish()
            self._execution = None

    def __enter__(self) -> RLHFOrchestrator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Models

    def save_models(self, directory: str | Path, *, overwrite: bool = False) -> dict[str, Path]:
        """Copy the last good policy, every reward model and every compressor into a directory, and return name → path.

        The policy is `policy`, any other model has its stage's name; `models.json` says what each is.

        Args:
            overwrite: replace what an earlier call has saved there.

        Raises:
            StorageError: the directory holds anything else, can't be written, or the pipeline has no record yet.
            ModelError: the policy is still a hub name: no stage has made one.
        """
        target = Path(directory).expanduser()
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            saved = (target / _MODELS).is_file()
            if not saved:
                fix = "choose an empty or a new directory"
                raise StorageError("isn't an empty directory", place=str(target), fix=fix)
            if not overwrite:
                fix = "`overwrite=True` replaces them; or choose another directory"
                raise StorageError("holds models that were saved before", place=str(target), fix=fix)
        sources = {name: (kind, Path(path).expanduser()) for name, (kind, path) in self._models().items()}
        work = temporary_path(target)
        remove_tree(work)
        with storage_errors(target):
            work.mkdir(parents=True)
            for name, (_, path) in sources.items():
                if not path.is_dir():
                    raise ModelError(
                        "no stage has made this model", place=str(path), fix="run a stage that trains it first"
                    )
                shutil.copytree(path, work / name)
            replace_json(
                work / _MODELS, {name: {"kind": kind, "made_by": str(path)} for name, (kind, path) in sources.items()}
            )
            remove_tree(target)
            work.rename(target)
            fsync_directory(target.parent)
        return {name: target / name for name in sources}

    @said_for_python()
    def load_models(self, directory: str | Path | None = None) -> dict[str, PolicyModel | HeadedModel]:
        """Return the loaded models by name: those that `save_models` wrote, or without a directory this pipeline's own.

        Raises:
            StorageError: the directory has no `models.json`.
            ModelError: a model can't be loaded.
        """
        if directory is None:
            return {name: load_model(path) for name, (_, path) in self._models().items()}
        place = Path(directory).expanduser()
        if not (place / _MODELS).is_file():
            raise StorageError("holds no models that `save_models` wrote", place=str(place))
        return {name: load_model(place / name) for name in read_json(place / _MODELS)}

    def _models(self) -> dict[str, tuple[str, str]]:
        """Return name → (kind, path) of the last good policy, the reward models and compressors, from the pipeline's record."""
        output = self._output()
        if not (output / "pipeline.json").is_file():
            raise StorageError("holds no pipeline", place=str(output), fix="run it first")
        values = read_json(output / "pipeline.json")
        policy = str(values.get("policy") or values["model"])
        found = {"policy": (POLICY, str(output / policy) if policy.startswith("stages/") else policy)}
        for stage in values["stages"]:
            if stage.get("status") == "finished" and stage.get("makes") in (REWARD, COMPRESSOR):
                found[stage["name"]] = (stage["makes"], str(output / stage["output_model"]))
        return found

    # Parts

    def _read(self, entries: list[dict[str, Any]] | None = None) -> RecipeFile:
        changes = {**self._changes, **({} if entries is None else {"stages": entries})}
        return read_recipe(self._source, changes)

    def _output(self) -> Path:
        """Return the pipeline's directory, whether or not the recipe has stages yet.

        Raises:
            RecipeError: `output` is wrong.
        """
        read = self._read([{"kind": "merge"}])
        if "output" in read.wrong:
            raise RecipeError(list(read.errors), "recipe")
        return Path(read.recipe.output).expanduser().absolute()

    def _data(self, data: Any, name: str) -> Any:
        """Return data as a recipe has it; rows are written to a file in the pipeline's directory."""
        if isinstance(data, Path):
            return str(data)
        rows = isinstance(data, Iterable) and not isinstance(data, str | Mapping)
        if not rows or (isinstance(data, list) and all(isinstance(one, str | Path) or _weighted(one) for one in data)):
            return [str(one) if isinstance(one, Path) else one for one in data] if isinstance(data, list) else data
        output = self._output()
        file = output.with_name(f"{output.name}.data") / f"{name}.jsonl"
        try:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a row isn't JSON: {error}", place=f"data of the stage `{name}`") from None
        with storage_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, text.encode())
        return str(file)

    @contextmanager
    def _commands(self) -> Iterator[tuple[RunCommand, StopSignal]]:
        """Give what runs commands, while this process notes requests to stop."""
        with StopSignal(speak=False) as stop:
            yield self._run or InProcesses(stop, self._log), stop

    def _execute(
        self, plan: PipelinePlan, record: PipelineRecord, run: RunCommand, stop: StopSignal, *, replace: bool
    ) -> PipelineRun:
        return PipelineRun(
            plan, record, run, stopping=lambda: stop.requested is not None, tell=self._tell, replace=replace,
            progress=self._progress,
        )  # fmt: skip


def load_model(path: str | Path) -> PolicyModel | HeadedModel:
    """Return a model of whatever kind its directory holds, by its head: a reward model, a compressor …; without one a policy."""
    from rlhf_core.models import ContextCompressor, PolicyModel, ProcessRewardModel, RewardModel, ValueModel

    kinds: dict[str, Any] = {
        PROCESS_REWARD_HEAD: ProcessRewardModel,
        REWARD_HEAD: RewardModel,
        VALUE_HEAD: ValueModel,
        COMPRESSOR_HEAD: ContextCompressor,
    }
    where, _ = locate(str(path))
    for head, kind in kinds.items():
        if Path(where).is_dir() and head_pair(where, head, str(path)) is not None:
            return kind.from_pretrained(path)
    return PolicyModel.from_pretrained(path)


def pipeline_inputs(plan: PipelinePlan) -> dict[str, str]:
    """Return path → place of what a pipeline reads."""
    from rlhf_core.pipeline.stage_fingerprint import named_paths

    found = {plan.recipe.recipe.model: "model"}
    for stage in plan.stages.values():
        found |= {path: stage.entry.place() for path in named_paths(stage.values)}
    return found


def _weighted(item: Any) -> bool:
    return isinstance(item, Mapping) and "path" in item and {*item} <= {"path", "weight"}


def _print(text: str) -> None:
    print(text, flush=True)
