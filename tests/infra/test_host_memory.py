"""Memory that may still be taken: a container's limit counts, in both versions of control groups."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from rlhf_core.infra import host_memory
from rlhf_core.infra.host_memory import available_bytes


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", _Free)
    return tmp_path


class _Free:
    available = 10_000


def test_without_a_group_all_that_the_system_has_counts(groups: Path) -> None:
    assert available_bytes() == 10_000


def test_a_limit_leaves_what_isnt_used_and_what_can_be_dropped(groups: Path) -> None:
    (groups / "memory.max").write_text("5000\n")
    (groups / "memory.current").write_text("4500\n")
    assert available_bytes() == 500
    (groups / "memory.stat").write_text("anon 3000\ninactive_file 1000\n")
    assert available_bytes() == 1500


def test_no_limit_and_one_beyond_the_system(groups: Path) -> None:
    (groups / "memory.max").write_text("max\n")
    (groups / "memory.current").write_text("4500\n")
    assert available_bytes() == 10_000
    (groups / "memory.max").write_text("9000000\n")
    assert available_bytes() == 10_000


def test_version_1(groups: Path) -> None:
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("2000")
    (groups / "memory" / "memory.usage_in_bytes").write_text("2500")
    assert available_bytes() == 0
