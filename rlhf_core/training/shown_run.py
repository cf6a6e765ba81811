"""A run from Python, which is shown while it trains: what `rlhf train` does for the command line."""

from __future__ import annotations

import logging
import os
from typing import Any

from rlhf_core.contracts.result import TrainResult
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.python_wording import said_for_python
from rlhf_core.registry.plugin_logs import shown_logs
from rlhf_core.training.run import run
from rlhf_core.training.run_summary import summary_lines

log = logging.getLogger(__name__)


def run_and_show(trainer: Trainer[Any], *, quiet: bool = False, **options: Any) -> TrainResult:
    """Train to the end and return the result; show the log on stderr meanwhile, and a summary at the end.

    Args:
        quiet: show nothing but warnings.
        options: as `run` takes them.
    """
    rank = int(os.environ.get("RANK", "0"))
    with said_for_python(), shown_logs(logging.WARNING if quiet else logging.INFO, rank=rank):
        result = run(trainer, quiet=quiet, **options)
        if rank == 0 and not quiet:
            for line in summary_lines(result):
                log.info("%s", line)
    return result
