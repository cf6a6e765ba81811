"""The upload of a run's model to the hub at its end, checked before its beginning; a failure never fails the run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_core.contracts.trainer import Trainer
from rlhf_core.infra.errors import ConfigError, RLHFError, describe_error
from rlhf_core.infra.hub_upload import HubTarget, check_target, push_folder
from rlhf_core.training.distribution import Distribution

log = logging.getLogger(__name__)


class HubPush:
    """Uploads `model/` from the first process.

    Args:
        target: where to, checked.
        run: the run directory, for the command that pushes again.
        distribution: the run's processes.
    """

    def __init__(self, target: HubTarget, run: Path, distribution: Distribution) -> None:
        self.target, self._run, self._distribution = target, run, distribution

    @classmethod
    def checked(cls, trainer: Trainer[Any], distribution: Distribution) -> HubPush | None:
        """Return what `push_to_hub` asks for, with the name and the token checked; None where it asks for nothing.

        Raises:
            ConfigError: the run has no directory, the name can't be one, or the token is missing or may not write there.
            StorageError: the hub can't be reached.
        """
        wanted = trainer.config.push_to_hub
        if wanted is None:
            return None
        if trainer.output is None:
            raise ConfigError(
                "a run without a directory saves no model to push", place="push_to_hub", fix="set `output`"
            )
        target = HubTarget(wanted.repo, wanted.private, wanted.revision)
        full = distribution.on_main(lambda: check_target(target).repo)
        return cls(replace(target, repo=full), trainer.output, distribution)

    def push(self, model: Path | None, *, step: int) -> tuple[str | None, str | None]:
        """Upload the model; return the address, or else why that failed, which is logged.

        On processes other than the first, which have nothing left to do and don't wait for it, (None, None).
        """
        if model is None or not self._distribution.is_main:
            return None, None
        log.info("uploading %s to %s", model, self.target.repo)
        try:
            return push_folder(model, self.target, message=f"Model after {step} steps"), None
        except (Exception, KeyboardInterrupt) as error:
            why = str(error) if isinstance(error, RLHFError) else describe_error(error)
        log.warning("the model is saved, and wasn't pushed: %s; `%s` tries again", why, self.command())
        return None, why

    def command(self) -> str:
        """Return the command that pushes the model of the finished run."""
        flags = " --private" if self.target.private else ""
        flags += f" --revision {self.target.revision}" if self.target.revision is not None else ""
        return f"rlhf push {self._run} {self.target.repo}{flags}"
