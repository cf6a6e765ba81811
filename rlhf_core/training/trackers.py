"""Trackers (TensorBoard, Weights & Biases …) that mirror a run's metrics, through accelerate; `metrics.jsonl` is the source."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config.yaml_file import flatten
from rlhf_core.infra.errors import ConfigError
from rlhf_core.training.tracked_samples import LOG_SAMPLES

log = logging.getLogger(__name__)


def check_trackers(names: Sequence[str], output: Path | None) -> None:
    """Refuse a tracker whose package isn't installed, or that needs a run directory where there is none.

    Raises:
        ConfigError: names the extra to install, or the option to set.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracker `{name}` isn't installed", place="logging.trackers", fix=f"pip install 'rlhf-core[{name}]'"
            )
        if name == "tensorboard" and output is None:
            raise ConfigError("tensorboard needs a run directory", place="logging.trackers", fix="set `output`")


class Trackers:
    """The trackers of one run, started on the first process only.

    Args:
        names: those to start; none where it is empty.
        output: the run directory.
        options: the options of the run by name, shown beside its metrics.
    """

    def __init__(self, names: Sequence[str], *, project: str, output: Path | None, options: Mapping[str, Any]) -> None:
        check_trackers(names, output)
        self._accelerator: Any = None
        if not names:
            return
        from accelerate import Accelerator

        directory = str(output / "trackers") if output is not None else None
        self._accelerator = Accelerator(log_with=list(names), project_dir=directory)
        run_name = output.name if output is not None else None
        self._accelerator.init_trackers(
            project,
            # Trackers take scalar values.
            config={k: v if isinstance(v, int | float | str) else str(v) for k, v in flatten(options).items()},
            init_kwargs={name: {"name": run_name} for name in names if name != "tensorboard"},
        )

    @property
    def running(self) -> bool:
        """Whether there is a tracker that hasn't failed."""
        return self._accelerator is not None

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Mirror a row's numbers; where a tracker fails, the user is warned, and the run continues without trackers."""
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float)}
        self._call(lambda: self._accelerator.log(numbers, step=step))

    def log_samples(self, kind: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Show completions: as text in TensorBoard, as the table `samples/KIND` elsewhere; a tracker's failure is a warning.

        Args:
            kind: of the rows, in `sample_log.KINDS`.
            rows: as in `samples.jsonl`.
        """
        if rows and self._accelerator is not None:
            for tracker in self._accelerator.trackers:
                self._call(functools.partial(LOG_SAMPLES[tracker.name], tracker, f"samples/{kind}", rows, step))

    def _call(self, mirror: Callable[[], Any]) -> None:
        """Call what mirrors something, unless a tracker has failed before."""
        if self._accelerator is None:
            return
        try:
            mirror()
        except Exception as error:
            log.warning(
                "a tracker failed, and the rest of this run isn't tracked (metrics.jsonl and samples.jsonl still are written):"
                " %s: %s",
                type(error).__name__,
                error,
            )
            self._accelerator = None

    def close(self) -> None:
        """Finish the trackers; where one fails, the user is warned."""
        if self._accelerator is not None:
            try:
                for tracker in self._accelerator.trackers:
                    tracker.finish()
            except Exception as error:
                log.warning("a tracker did not finish: %s: %s", type(error).__name__, error)
            self._accelerator = None
