"""What libraries log and warn of is in our log at DEBUG, and not on the console."""

from __future__ import annotations

import logging
import os
import warnings

import pytest

from rlhf_core.infra.library_logs import LIBRARIES, keep_libraries_quiet, log_libraries_at_debug
from rlhf_core.infra.log import LOGGER


@pytest.fixture(autouse=True)
def logging_as_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: a command that another module's fixture ran has set up logging, and left it so."""
    for name in (LOGGER, *LIBRARIES):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)


def test_records_and_warnings_of_libraries_are_logged_at_debug(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    library = logging.getLogger("huggingface_hub")
    for name in (library.name, f"{library.name}.utils"):
        caplog.set_level(logging.DEBUG, name)  # once imported, the library has a level of its own
    own = logging.StreamHandler()
    before = library.propagate, list(library.handlers), warnings.showwarning
    library.addHandler(own)
    with caplog.at_level(logging.DEBUG, "rlhf_core"), warnings.catch_warnings():
        warnings.simplefilter("always")
        shown: list[str] = []
        warnings.showwarning = lambda message, *rest: shown.append(str(message))
        undo = log_libraries_at_debug()
        library.getChild("utils").warning("Retrying in %ds", 1)
        library.error("gone")
        warnings.warn_explicit("old", FutureWarning, "/site-packages/torch/nn/modules.py", 3)
        warnings.warn_explicit("called so", UserWarning, "/src/rlhf_core/models/loading.py", 3)
        warnings.warn_explicit("of a reward", UserWarning, "/home/me/reward.py", 3)
        undo()
        assert own in library.handlers and library.handlers[:-1] == before[1]
    library.removeHandler(own)
    assert (library.propagate, list(library.handlers), warnings.showwarning) == before
    assert shown == ["of a reward"] and capsys.readouterr().err == ""
    assert [(record.levelname, record.getMessage().rpartition("/")[2]) for record in caplog.records] == [
        ("DEBUG", "huggingface_hub.utils: Retrying in 1s"),
        ("ERROR", "huggingface_hub: gone"),
        ("DEBUG", "modules.py:3: FutureWarning: old"),
        ("DEBUG", "loading.py:3: UserWarning: called so"),
    ]


def test_what_the_environment_asks_for_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    keep_libraries_quiet()
    assert (os.environ["TRANSFORMERS_VERBOSITY"], os.environ["HF_HUB_VERBOSITY"]) == ("info", "error")
