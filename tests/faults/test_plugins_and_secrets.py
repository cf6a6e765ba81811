"""Plugins that nobody selected, and secrets that nobody should find in a run's files."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import rlhf_core


def test_a_broken_plugin_that_was_not_selected_is_a_warning(train: Callable, install: Callable, tmp_path: Path) -> None:
    install("acme-broken", {"acme_broken.py": "class Mine(:\n"}, trainers={"mine": "acme_broken:Mine"})
    install("acme-gone", {"acme_gone.py": "raise RuntimeError('no licence')\n"}, hooks={"gone": "acme_gone:listen"})
    ended = train()
    assert ended.code == 0
    assert re.search(
        r"WARNING trainer `acme-broken:mine` is broken, and left out: .*acme_broken\.py:1: invalid syntax", ended.err
    )
    assert "WARNING hook `acme-gone:gone` is left out, and the run continues without it: " in ended.err
    assert "RuntimeError: no licence" in ended.err


def test_only_the_selected_plugin_is_imported(train: Callable, install: Callable, tmp_path: Path) -> None:
    source = 'class Mine:\n    """Mine."""\n    api = 1\n    record = "sft"\n'
    install("acme", {"acme_other.py": source}, trainers={"mine": "acme_other:Mine"})
    assert train().code == 0
    assert "acme_other" not in sys.modules


def test_a_selected_plugin_that_raises_is_exit_code_5(train: Callable, install: Callable) -> None:
    source = 'raise RuntimeError("no licence")\nclass Mine:\n    api = 1\n    record = "sft"\n'
    install("acme", {"acme_raises.py": source}, trainers={"mine": "acme_raises:Mine"})
    ended = train(method="mine")
    assert (ended.code, ended.error) == (
        5, "error[plugin] trainer `mine` of acme 1.0 (acme_raises:Mine): broken: importing it raised RuntimeError: no licence;"
        " fix: repair, update or uninstall acme",
    )  # fmt: skip


def test_two_of_one_name_are_exit_code_5_and_both_are_named(train: Callable, install: Callable) -> None:
    source = (
        "from rlhf_plugins import DPOTrainer\n"
        'class Mine(DPOTrainer):\n    """Mine."""\n    api = 1\n    record = "preference"\n'
    )
    install("acme", {"acme_dpo.py": source}, trainers={"dpo": "acme_dpo:Mine"})
    ended = train(method="dpo")
    assert ended.code == 5
    assert ended.error.startswith("error[plugin] ") and "the name is offered 2 times" in ended.error
    assert "`acme:dpo`" in ended.error and "`rlhf-core:dpo`" in ended.error
    pairs = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 4
    assert train(method="rlhf-core:dpo", data=pairs).code == 0


def test_secrets_are_redacted_in_all_files_of_a_run(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    monkeypatch.setattr(sys, "argv", ["rlhf", "train", "sft", "--logging.project", secret])
    assert train("--logging.project", secret).code == 0
    run = tmp_path / "run"
    for name in ("config.yaml", "config.input.yaml", "command.txt"):
        assert "[redacted]" in (run / name).read_text()
    for path in run.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_nothing_unpickles_or_runs_what_it_reads() -> None:
    """Formats that run code have no place: tensors are safetensors, the rest is JSON or safe YAML."""
    forbidden = re.compile(
        r"torch\.load\(|import pickle|pickle\.|yaml\.(unsafe_|full_)?load\(|UnsafeLoader|shell=True|os\.system\(|(?<![.\w])eval\("
    )
    # Over a pipe from a process to its own child, which nobody else can write to; what comes back is JSON. JSON won't do for what
    # is sent: a reward may be an object of Python, and a row's columns hold dates, bytes and decimals if read from Parquet.
    core = Path(rlhf_core.__file__).parent
    own_pipes = (core / "rewards" / "reward_process.py", core / "infra" / "forked_calls.py")
    roots = [core, Path(importlib.import_module("rlhf_plugins").__path__[0])]
    found = [
        f"{path}: {line.strip()}"
        for root in roots
        for path in root.rglob("*.py")
        for line in path.read_text().splitlines()
        if forbidden.search(line) and not (path in own_pipes and "pickle" in line)
    ]
    assert found == []


def test_the_libraries_are_at_least_those_without_known_holes() -> None:
    required = [line.replace(" ", "") for line in importlib.metadata.requires("rlhf-core") or ()]
    for name, floor in (("torch", (2, 10)), ("transformers", (5, 3))):
        stated = next(found for line in required if (found := re.match(rf"{name}[^;]*?>=(\d+)\.(\d+)", line)))
        assert tuple(map(int, stated.groups())) >= floor


def test_a_methods_warnings_look_like_the_cores(train: Callable) -> None:
    labels = ["desirable"] * 8 + ["undesirable"] * 2
    ended = train(method="kto", data=[{"prompt": "q", "response": f"a{i}", "label": x} for i, x in enumerate(labels)])
    assert ended.code == 0
    assert re.search(
        r"^[\d:]{8} WARNING the weighted desirable rows are 4 times the weighted undesirable ones",
        ended.err,
        re.MULTILINE,
    )
