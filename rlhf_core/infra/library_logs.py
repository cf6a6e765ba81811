"""What libraries log and warn of, which is for their developers: it goes to our log at the level DEBUG, not to the console."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

LIBRARIES = (
    "accelerate", "bitsandbytes", "datasets", "filelock", "fsspec", "httpx", "huggingface_hub", "peft", "safetensors",
    "tensorboard", "tokenizers", "torch", "torchao", "transformers", "urllib3",
)  # fmt: skip
"""Packages whose warnings and log records aren't shown; errors that they log are."""
_OURS = ("rlhf_core", "rlhf_plugins")
_VERBOSITY = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Environment variables that libraries read when they are imported."""

log = logging.getLogger("rlhf_core.libraries")


def keep_libraries_quiet() -> None:
    """Set, before any of them is imported, what libraries show on stderr: errors alone, unless the environment says otherwise."""
    for name, value in _VERBOSITY.items():
        os.environ.setdefault(name, value)


def log_libraries_at_debug() -> Callable[[], None]:
    """Send what libraries log below ERROR, and the warnings that they or our own calls of them raise, to our log at DEBUG.

    A warning that a user's own code raises is shown as ever.

    Returns:
        A function that undoes it.
    """
    keep_libraries_quiet()
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger.propagate, list(logger.handlers)) for logger in loggers]
    for logger in loggers:
        for handler in list(logger.handlers):
            if type(handler) is logging.StreamHandler:  # not one of its subclasses, such as a file's
                logger.removeHandler(handler)
        if not any(isinstance(handler, _AtDebug) for handler in logger.handlers):
            logger.addHandler(_AtDebug())
        logger.propagate = False
    shown_before = warnings.showwarning
    if not getattr(shown_before, "of_libraries", False):
        warnings.showwarning = _showing(shown_before)

    def undo() -> None:
        for logger, (propagates, handlers) in zip(loggers, before, strict=True):
            logger.propagate, logger.handlers[:] = propagates, handlers
        warnings.showwarning = shown_before

    return undo


class _AtDebug(logging.Handler):
    """Logs a library's record as one of ours: at DEBUG, or as an error where it is one."""

    def emit(self, record: logging.LogRecord) -> None:
        log.log(
            logging.ERROR if record.levelno >= logging.ERROR else logging.DEBUG,
            "%s: %s",
            record.name,
            record.getMessage(),
        )


def _showing(show: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for `warnings.showwarning` that logs the warnings of libraries, and shows the others by `show`."""

    def show_or_log(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        parts = PurePath(filename).parts
        if file is None and any(package in parts for package in (*LIBRARIES, *_OURS)):
            log.debug("%s:%d: %s: %s", filename, lineno, category.__name__, message)
        else:
            show(message, category, filename, lineno, file, line)

    show_or_log.of_libraries = True  # type: ignore[attr-defined]
    return show_or_log
