"""The execution of a plan: stage after stage, each policy guarded; finished stages are kept, a stopped one is continued."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_core.evaluation.report import write_report
from rlhf_core.improvement.capability_tests import CapabilityRegression
from rlhf_core.infra.errors import ConfigError, Interrupted, RLHFError, Stopped, StorageError
from rlhf_core.infra.files import remove_tree
from rlhf_core.pipeline.capability_guard import CapabilityGuard, summary
from rlhf_core.pipeline.pipeline_plan import PipelinePlan
from rlhf_core.pipeline.pipeline_record import PipelineRecord, StageStatus, now
from rlhf_core.pipeline.stage import Stage, StageWork
from rlhf_core.pipeline.stage_command import InProcesses, RunCommand
from rlhf_core.pipeline.stage_fingerprint import content_of, differences, fingerprint, made_from
from rlhf_core.pipeline.stage_references import MODEL, resolved
from rlhf_core.pipeline.stage_watch import StageWatch

log = logging.getLogger(__name__)

_BETWEEN_REPORTS = 60.0
"""Seconds between two reports at least, and before the first: a shorter pipeline would spend a large share of its time on it."""
KEPT = ("finished", "rolled_back")
"""Statuses of stages that aren't run again while what they are made from is the same."""


@dataclass(frozen=True)
class StageResult:
    """How one stage ended."""

    name: str
    status: StageStatus
    directory: Path
    model: Path | None = None
    """The policy or other model to go on with: of a stage that was rolled back, the one that it began with."""
    metrics: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    """Why it was rolled back, failed or left out."""


@dataclass(frozen=True)
class PipelineResult:
    """How a pipeline ended."""

    output: Path
    policy: str
    """Path or hub name of the last good policy."""
    stages: tuple[StageResult, ...]
    error: RLHFError | None = None
    """The first failure or regression after which the pipeline went on; None where every stage stands."""

    @property
    def exit_code(self) -> int:
        """0 where every stage stands, else that of `error`."""
        return 0 if self.error is None else self.error.exit_code


class PipelineRun:
    """One execution of a plan in this process, which has locked its directory.

    Args:
        plan: checked.
        record: of the directory, opened.
        run: runs commands of `rlhf`.
        stopping: tells whether this process was asked to stop.
        tell: called with a line for people at the begin and end of each stage.
        replace: whether a finished stage that changed may be replaced.
        progress: whether people see how the running stage goes, too.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        record: PipelineRecord,
        run: RunCommand,
        *,
        stopping: Callable[[], bool],
        tell: Callable[[str], None],
        replace: bool,
        progress: bool = False,
    ) -> None:
        self._watch = StageWatch(self._note_seconds, tell, shows=progress)
        self.plan, self.record, self._run = plan, record, self._watched(run)
        plan.settle(record.directories())
        self._stopping, self._print, self._replace = stopping, tell, replace
        recipe = plan.recipe.recipe
        self.policy: str = recipe.model
        """The last good policy."""
        self.error: RLHFError | None = None
        self.results: list[StageResult] = []
        self._made: dict[tuple[str, str], str] = {}
        """(stage, product) → path, of what may be taken."""
        self._reported = time.monotonic()
        """When the report was written last, or the pipeline began."""
        self._guard: CapabilityGuard | None = None
        if recipe.capabilities is not None:
            self._guard = CapabilityGuard(recipe.capabilities, plan.output / "capabilities", self._run, recipe.seed)

    def execute(self) -> PipelineResult:
        """Run all stages and return the result; however it ends, write that into the record."""
        self.record.arrange(list(self.plan.stages))
        try:
            for stage in self.plan.stages.values():
                self.one(stage)
                self._report()
        except BaseException as error:
            self.fail(error)
            raise
        return self.finish()

    def finish(self) -> PipelineResult:
        """Write that all stages ended, and release the directory."""
        if self.error is None:
            self.record.end("done", 0, None, self._relative(self.policy))
        else:
            self.record.end("failed", self.error.exit_code, str(self.error), self._relative(self.policy))
        self._report()
        self.record.close()
        return PipelineResult(self.plan.output, self.policy, tuple(self.results), self.error)

    def continue_with(self, plan: PipelinePlan, run: RunCommand, stopping: Callable[[], bool]) -> None:
        """Go on with a plan that has one more stage."""
        self.plan, self._run, self._stopping = plan, self._watched(run), stopping
        plan.settle(self.record.directories())
        if self._guard is not None:
            self._guard.run = self._run
        self.record.arrange(list(plan.stages), more=True)
        self.record.write_recipe(plan.recipe)

    def _watched(self, run: RunCommand) -> RunCommand:
        """Return what runs commands; those that run in processes of their own are watched."""
        if isinstance(run, InProcesses):
            run.watch = self._watch
        return run

    def _note_seconds(self, name: str, seconds: float) -> None:
        """Write how long the running stage has taken, for a resume after a kill."""
        self.record.update_stage(name, seconds=seconds)

    def _tell(self, text: str) -> None:
        """Print a line for people."""
        self._watch.hide()
        self._print(text)

    def settle(self) -> None:
        """Note the last good policy between stages that are run one by one."""
        self.record.update(policy=self._relative(self.policy))

    def fail(self, error: BaseException) -> None:
        """Write that the pipeline ended by an error."""
        stopped = isinstance(error, Stopped | KeyboardInterrupt | Interrupted)
        code = error.exit_code if isinstance(error, RLHFError) else 130 if stopped else 1
        self.record.end(
            "stopped" if stopped else "failed", code, str(error) or type(error).__name__, self._relative(self.policy)
        )
        if not stopped:
            self._report()

    def _report(self) -> None:
        """Write `report.html` once a minute has passed since the last one; a fault in it is a warning."""
        if time.monotonic() - self._reported < _BETWEEN_REPORTS:
            return
        try:
            write_report(self.plan.output)
        except Exception as error:
            log.warning("the report couldn't be written: %s", error)
        self._reported = time.monotonic()

    def one(self, stage: Stage) -> StageResult:
        """Run one stage, continue it, or take what it made before.

        Raises:
            RLHFError: it failed or regressed, and the recipe says to stop then.
            Stopped: this process was asked to stop.
        """
        if self._stopping():
            raise Stopped("stopped between two stages", place=str(self.plan.output), fix="continue with `--resume`")
        missing = [str(one) for one in stage.references if (one.stage, one.product) not in self._made]
        if missing:
            return self._leave_out(stage, missing)
        inputs = made_from(stage, self._find)
        known = self.record.stage(stage.entry.name)
        continued = self._ready(stage, known, inputs)
        kept = continued and known.get("status") in KEPT and self._judged_alike(stage, known)
        result = self._kept(stage, known) if kept else None
        if result is None:
            result = self._do(stage, inputs, continued=continued)
        self._adopt(stage, result)
        return result

    # Before a stage

    def _ready(self, stage: Stage, known: dict[str, Any], inputs: dict[str, Any]) -> bool:
        """Return whether what is in the stage's directory is to be gone on with; else remove it.

        Raises:
            ConfigError: the stage's configuration or inputs changed since, and its results may not be replaced.
            StorageError: what it made was changed by someone else.
        """
        directory, name = self.plan.directory(stage), stage.entry.name
        if known.get("fingerprint") == fingerprint(inputs):
            if self._intact(stage, known):
                return True
        elif known.get("fingerprint") is not None and directory.exists():
            changed = differences(known.get("inputs", {}), inputs) or ["what it is made from"]
            worth = known.get("status") in ("finished", "running", "stopped")
            if worth and not self._replace:
                later = ", ".join(f"`{one}`" for one in self.plan.dependents(name))
                also = f", and {later}, which follow from it," if later else ""
                raise ConfigError(
                    f"the stage `{name}` changed since it was run",
                    place=str(directory),
                    got="; ".join(changed[:5]),
                    fix=f"`--resume --overwrite` runs it{also} again and replaces its results; or undo the change",
                )
            self._tell(f"{self._head(stage)} changed, and runs again: {'; '.join(changed[:3])}")
            self.record.event("stage_changed", stage=name, changed=changed)
        for leftover in (directory, *(directory.with_name(directory.name + end) for end in (".yaml", ".log"))):
            remove_tree(leftover)
        return False

    def _intact(self, stage: Stage, known: dict[str, Any]) -> bool:
        """Return whether what a stage has made is as it made it; a stage that isn't finished has made nothing yet.

        Raises:
            StorageError: it isn't, and may not be replaced.
        """
        made = known.get("products", {}) if known.get("status") == "finished" else {}
        for product, digest in made.items():
            path = Path(self.plan.find(stage.entry.name, product))
            if content_of(path) == digest:
                continue
            problem = f"isn't what the stage `{stage.entry.name}` made: its content changed"
            if not self._replace:
                fix = "restore it, or run the stage again with `--resume --overwrite`"
                raise StorageError(problem, place=str(path), fix=fix)
            self._tell(f"{self._head(stage)} runs again: {self._relative(str(path))} {problem}")
            self.record.event("stage_changed", stage=stage.entry.name, changed=[f"{product}: {problem}"])
            return False
        return True

    def _judged_alike(self, stage: Stage, known: dict[str, Any]) -> bool:
        """Return whether a stage's policy was tested as the recipe says now; else it is tested again, not made again."""
        return not stage.makes_policy or known.get("guarded_by") == self._rules

    def _kept(self, stage: Stage, known: dict[str, Any]) -> StageResult | None:
        """Return the result of a stage that an earlier process has run; None where it failed, and is tried again."""
        rolled_back = known["status"] == "rolled_back"
        if rolled_back and known.get("exit_code") != CapabilityRegression.exit_code:
            return None
        how = "rolled back" if rolled_back else "finished"
        self._tell(f"{self._head(stage)} {how} before{': ' if known.get('gain') else ''}{known.get('gain') or ''}")
        self.record.event("stage_kept", stage=stage.entry.name, status=known["status"])
        if rolled_back:
            error = CapabilityRegression(str(known.get("reason")).partition("] ")[2])
            self._note(error, self.plan.recipe.recipe.rollback.on_regression == "stop")
        model = known.get("output_model")
        return StageResult(
            stage.entry.name, known["status"], self.plan.directory(stage),
            Path(self._absolute(model)) if model else None, known.get("metrics", {}), known.get("reason"),
        )  # fmt: skip

    def _leave_out(self, stage: Stage, missing: list[str]) -> StageResult:
        """Record that a stage can't run, because an earlier one failed."""
        reason = f"needs {', '.join(missing)}, which isn't there: the stage failed or was left out"
        self.record.update_stage(stage.entry.name, status="skipped", reason=reason, **self._facts(stage))
        self.record.event("stage_skipped", stage=stage.entry.name, reason=reason)
        self._tell(f"{self._head(stage)} left out: {reason}")
        result = StageResult(stage.entry.name, "skipped", self.plan.directory(stage), reason=reason)
        self.results.append(result)
        return result

    # A stage

    def _do(self, stage: Stage, inputs: dict[str, Any], *, continued: bool) -> StageResult:
        """Run a stage, or continue it, with the tests of its policy before and after."""
        name, directory = stage.entry.name, self.plan.directory(stage)
        base = self._base(stage)
        known = self.record.stage(name)
        spent = float(known.get("seconds") or 0) if continued else 0.0
        self.record.update_stage(
            name, status="running", fingerprint=fingerprint(inputs), inputs=inputs, reason=None, exit_code=None,
            seconds=round(spent, 3),
            started=known.get("started") if continued and known.get("started") else now(), ended=None,
            input_model=self._relative(base), guarded_by=self._rules, capabilities=None, **self._facts(stage),
        )  # fmt: skip
        self.record.event(
            "stage_resumed" if continued else "stage_started", stage=name, input_model=self._relative(base)
        )
        self._tell(f"{self._head(stage)} {'continued' if continued else 'begun'}, from {self._relative(base)}")
        directory.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic() - spent
        self._watch.stage_begun(name, self._number(stage), spent)
        work = StageWork(directory, directory.with_name(directory.name + ".yaml"), self._find, self._run)
        metrics: dict[str, Any] = {}
        try:
            before = self._guard.test(base) if self._guard is not None and stage.makes_policy else None
            metrics = stage.run(work)
            if before is not None:
                self._compare(stage, before)
        except BaseException as error:
            return self._failed(stage, error, base, metrics, time.monotonic() - began)
        finally:
            self._watch.stage_ended()
        return self._finished(stage, metrics, time.monotonic() - began)

    def _compare(self, stage: Stage, before: Any) -> None:
        """Test a stage's policy, and raise `CapabilityRegression` where it is worse than the one from before."""
        assert self._guard is not None
        after = self._guard.test(self.plan.find(stage.entry.name, MODEL))
        changes = self._guard.changes(before, after)
        regressions = [str(one) for one in changes if one.regressed]
        tested = {"before": summary(before), "after": summary(after), "changes": [one.as_json() for one in changes]}
        self.record.update_stage(stage.entry.name, capabilities={**tested, "regressions": regressions})
        self.record.event("capabilities_tested", stage=stage.entry.name, changes=[str(one) for one in changes])
        for change in changes:
            self._tell(f"{self._head(stage)} capability {change}")
        if regressions:
            raise CapabilityRegression(
                f"the policy got worse: {'; '.join(regressions)}", place=f"stage `{stage.entry.name}`"
            )

    def _finished(self, stage: Stage, metrics: dict[str, Any], seconds: float) -> StageResult:
        """Record a stage that ended well."""
        name, directory = stage.entry.name, self.plan.directory(stage)
        products = {product: content_of(Path(self.plan.find(name, product))) for product in stage.makes or {}}
        lost = [product for product, digest in products.items() if digest is None]
        if lost:  # an optional role that wasn't trained
            products = {product: digest for product, digest in products.items() if digest is not None}
        model = self.plan.find(name, MODEL) if MODEL in products else None
        text = stage.gain(metrics)
        self.record.update_stage(
            name, status="finished", ended=now(), seconds=round(seconds, 3), metrics=metrics, tokens=metrics.get("tokens"),
            products=products, output_model=model and self._relative(model), gain=text,
        )  # fmt: skip
        self.record.event("stage_finished", stage=name, seconds=round(seconds, 3), gain=text)
        self._tell(f"{self._head(stage)} finished in {_span(seconds)}{': ' if text else ''}{text}")
        return StageResult(name, "finished", directory, Path(model) if model is not None else None, metrics)

    def _failed(
        self, stage: Stage, error: BaseException, base: str, metrics: dict[str, Any], seconds: float
    ) -> StageResult:
        """Record a stage that ended by an error: of a policy's stage, what follows begins with the policy from before.

        Raises:
            BaseException: the error, where it is a request to stop or a bug, or the recipe says to stop then.
        """
        name, common = stage.entry.name, {"seconds": round(seconds, 3), "metrics": metrics, "ended": now()}
        if not isinstance(error, RLHFError) or isinstance(error, Stopped | Interrupted):
            ended: StageStatus = "stopped" if isinstance(error, RLHFError | KeyboardInterrupt) else "failed"
            reason = str(error) or type(error).__name__
            self.record.update_stage(name, status=ended, reason=reason, **common)
            self.record.event(f"stage_{ended}", stage=name, reason=reason)
            self._tell(f"{self._head(stage)} {ended}: {reason}")
            raise error
        regressed = isinstance(error, CapabilityRegression)
        status: StageStatus = "rolled_back" if stage.makes_policy else "failed"
        back = self._relative(base) if stage.makes_policy else None
        reason = f"error[{error.code}] {error}"
        self.record.update_stage(
            name, status=status, reason=reason, exit_code=error.exit_code, output_model=back, gain="", **common
        )
        self.record.event(f"stage_{status}", stage=name, reason=reason, exit_code=error.exit_code, policy=back)
        what = f"rolled back to {back}" if stage.makes_policy else "failed"
        self._tell(f"{self._head(stage)} {what}: {reason}")
        rollback = self.plan.recipe.recipe.rollback
        self._note(error, (rollback.on_regression if regressed else rollback.on_error) == "stop")
        return StageResult(
            name, status, self.plan.directory(stage), Path(base) if stage.makes_policy else None, metrics, reason
        )

    def _note(self, error: RLHFError, stop: bool) -> None:
        """Keep the first error for the exit code; raise it where the pipeline shall stop."""
        self.error = self.error or error
        if stop:
            raise error

    def _adopt(self, stage: Stage, result: StageResult) -> None:
        """Make what a stage has made known to later stages."""
        name = stage.entry.name
        if result.status == "finished":
            for product in self.record.stage(name).get("products", {}):
                self._made[name, product] = self.plan.find(name, product)
        elif result.status == "rolled_back" and result.model is not None:
            self._made[name, MODEL] = str(result.model)
        if stage.makes_policy and result.status == "finished":
            self.policy = self._made[name, MODEL]
        self.results.append(result)

    # Names and places

    @property
    def _rules(self) -> str | None:
        """What policies are tested by; None where they aren't."""
        return None if self._guard is None else self._guard.rules

    def _find(self, stage: str, product: str) -> str:
        return self._made[stage, product]

    def _base(self, stage: Stage) -> str:
        """Return the policy that a stage is compared with: the one that it begins with, of a merge the last good one."""
        if not stage.takes_policy or not stage.input_models():
            return self.policy
        return str(resolved(stage.input_models()[0], self._find))

    def _facts(self, stage: Stage) -> dict[str, Any]:
        return {
            "kind": stage.entry.kind,
            "method": stage.plugin.qualified if stage.plugin is not None else None,
            "directory": self._relative(str(self.plan.directory(stage))),
            "makes": (stage.makes or {})[MODEL].kind if MODEL in (stage.makes or {}) else None,
        }

    def _number(self, stage: Stage) -> str:
        return f"[{stage.entry.number}/{len(self.plan.stages)}] {stage.entry.name}"

    def _head(self, stage: Stage) -> str:
        return f"{self._number(stage)} ({stage.label})"

    def _relative(self, path: str) -> str:
        """Return a path within the pipeline's directory relative to it, any other as it is."""
        inside = Path(path).is_absolute() and Path(path).is_relative_to(self.plan.output)
        return str(Path(path).relative_to(self.plan.output)) if inside else path

    def _absolute(self, path: str) -> str:
        return str(self.plan.output / path) if path.startswith("stages/") else path


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
