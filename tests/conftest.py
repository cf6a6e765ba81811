"""Fixtures for every test."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

# Read when `datasets` is imported, here and in every process that a test starts: no test sees what another run cached.
_CACHE = tempfile.TemporaryDirectory(prefix="rlhf-tests-")
os.environ["HF_DATASETS_CACHE"] = _CACHE.name

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from rlhf_core import registry  # noqa: E402
from rlhf_core.infra.library_logs import LIBRARIES  # noqa: E402
from rlhf_core.infra.log import LOGGER, SHIPPED, console  # noqa: E402

# No test fails because the machine is slow.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

SLOW_CHECKS = {"test_every_option_does_something", "test_resume_of_a_stream_is_exact"}
"""Of the contracts' checks those that take longest, a seventh of all tests' time; each method's tests have them."""


@pytest.hookimpl(tryfirst=True)  # before markers select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if getattr(item, "originalname", None) in SLOW_CHECKS and getattr(item, "cls", None) is not None:
            item.add_marker(pytest.mark.slow)


Install = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def no_waiting_for_disks() -> Iterator[None]:
    """Have `os.fsync` return at once: a run calls it some forty times, and only a loss of power would show whether it did.

    Tests that kill processes at every write start these as a user does, and they do call it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


_State = list[tuple[logging.Logger, int, bool, list[logging.Handler]]]


def _state_of(*names: str) -> _State:
    found = map(logging.getLogger, names)
    return [(logger, logger.level, logger.propagate, list(logger.handlers)) for logger in found]


def _restore(state: _State) -> None:
    for logger, level, propagate, handlers in state:
        # Not by assignment: a logger remembers which levels are on.
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers


_AT_FIRST = _state_of(LOGGER, SHIPPED)
"""As they are before the first test. Not as they are before each: fixtures of a whole module have set up logging by then, and
pytest itself hands its handlers to loggers that don't propagate."""
_ROOT_LEVEL = logging.root.level


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """Undo what a test (of the command line, say) changed of the loggers of the core, of plugins that ship, and of libraries."""
    libraries = _state_of(*LIBRARIES)  # which set up their own when they are imported
    _restore(_AT_FIRST)
    logging.root.setLevel(_ROOT_LEVEL)
    console.cache_clear()  # it keeps the width that COLUMNS gave it
    yield
    _restore([*_AT_FIRST, *libraries])
    logging.root.setLevel(_ROOT_LEVEL)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that puts a distribution on `sys.path` as an installer would: its files and its metadata.

    `install("acme", {"acme.py": "…"}, trainers={"mine": "acme:Mine"})`; everything is taken back after the test.
    """
    before = set(sys.modules)
    roots: list[Path] = []

    def put(distribution: str, files: Mapping[str, str], *, version: str = "1.0", **groups: Mapping[str, str]) -> Path:
        root = tmp_path / f"site-{len(roots)}"
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        info = root / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        table = "".join(
            f"[rlhf_core.{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
            for group, entries in groups.items()
        )
        (info / "entry_points.txt").write_text(table)
        monkeypatch.syspath_prepend(str(root))
        roots.append(root)
        return root

    yield put
    inside = tuple(str(root) for root in roots)
    for name in [name for name in set(sys.modules) - before if _place(sys.modules[name]).startswith(inside)]:
        del sys.modules[name]


def _place(module: ModuleType) -> str:
    """Where a module, or a namespace package, was imported from."""
    return getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "")


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees another's registrations, remembered failures or policy."""
    monkeypatch.delenv(registry.DISABLE_VARIABLE, raising=False)
    monkeypatch.delenv(registry.ALLOW_VARIABLE, raising=False)
    yield
    registry.forget()
