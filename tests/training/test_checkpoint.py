"""Checkpoints: whole or not at all, verified before they are believed, pruned only afterwards."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.infra.errors import ModelError, StorageError
from rlhf_core.infra.files import read_json, to_json
from rlhf_core.training.checkpoint import CheckpointManager
from rlhf_core.training.optimizer import load_optimizer_state, optimizer_state

TENSORS = {
    "model": {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3, dtype=torch.int64), "empty": torch.zeros(0, 2)},
    "optimizer": {"exp_avg/a": torch.ones(2, 3, dtype=torch.bfloat16), "step/a": torch.tensor(4.0)},
}
FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")


def saved(directory: Path, *steps: int, keep: int = 2) -> CheckpointManager:
    manager = CheckpointManager(directory, keep)
    for step in steps:
        manager.save(step, TENSORS, {"step": step, "text": "ü"})
    return manager


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 3).load_latest()
    assert checkpoint is not None and checkpoint.step == 3 and checkpoint.state == {"step": 3, "text": "ü"}
    for group, tensors in TENSORS.items():
        found = checkpoint.tensors(group)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    saved(tmp_path, 1)
    loaded = load_file(tmp_path / "step-1" / "model.safetensors")
    assert torch.equal(loaded["a"], TENSORS["model"]["a"])
    assert sorted(path.name for path in (tmp_path / "step-1").iterdir()) == sorted(FILES)


def test_none_saved_is_none(tmp_path: Path) -> None:
    assert CheckpointManager(tmp_path / "none").load_latest() is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert saved(tmp_path, 1, 2, 10, 9, keep=3).steps() == [2, 9, 10]
    with pytest.raises(ValueError, match="at least 2"):
        CheckpointManager(tmp_path, keep=1)


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1)
    (tmp_path / ".tmp-step-2").mkdir()
    (tmp_path / ".tmp-step-2" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".old-step-0").mkdir()
    assert manager.load_latest().step == 1  # type: ignore[union-attr]
    manager.save(2, TENSORS, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_an_interrupted_removal_is_finished_on_load(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1, 2, 3, keep=3)
    (tmp_path / ".old-step-0").mkdir()
    assert CheckpointManager(tmp_path, keep=2).load_latest().step == 3  # type: ignore[union-attr]
    assert manager.steps() == [2, 3] and not (tmp_path / ".old-step-0").exists()


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1, 2)
    manager.save(2, TENSORS, {"again": True})
    assert manager.steps() == [1, 2]
    assert manager.load_latest().state == {"again": True}  # type: ignore[union-attr]


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip first", "flip middle", "flip last", "truncate", "empty", "delete", "longer"])
def test_a_damaged_file_falls_back_loudly(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    manager = saved(tmp_path, 1, 2)
    path = tmp_path / "step-2" / name
    bits = path.stat().st_size * 8
    if damage.startswith("flip"):
        flip(path, {"first": 0, "middle": bits // 2, "last": bits - 1}[damage.split()[1]])
    elif damage == "truncate":
        os.truncate(path, bits // 8 - 1)
    elif damage == "empty":
        os.truncate(path, 0)
    elif damage == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        checkpoint = manager.load_latest()
    assert checkpoint is not None and checkpoint.step == 1
    assert [item.step for item in manager.damaged] == [2]
    assert "step-2 is damaged" in caplog.text and "step-2.damaged" in caplog.text
    if not name.startswith("manifest") or damage == "delete":
        assert name in caplog.text
    assert manager.steps() == [1] and (tmp_path / "step-2.damaged").is_dir()


def test_no_bit_of_the_manifest_can_flip(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1)
    path = tmp_path / "step-1" / "manifest.json"
    original = path.read_bytes()
    refused = 0
    for bit in range(0, len(original) * 8, 7):
        flip(path, bit)
        try:
            manager.verified(1)
        except ModelError:
            refused += 1
        path.write_bytes(original)
    assert refused == len(range(0, len(original) * 8, 7))


def test_none_whole_is_an_error_with_every_reason(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1, 2)
    (tmp_path / "step-1" / "state.json").unlink()
    flip(tmp_path / "step-2" / "model.safetensors", 800)
    with pytest.raises(ModelError) as caught:
        manager.load_latest()
    assert caught.value.exit_code == 4
    assert "step 2: model.safetensors has another SHA-256" in str(caught.value)
    assert "step 1: state.json is missing" in str(caught.value)
    # And again: nothing whole is left, and it does not pass for a run without checkpoints.
    with pytest.raises(ModelError, match="no checkpoint is whole"):
        manager.load_latest()


def test_a_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1)
    path = tmp_path / "step-1" / "manifest.json"
    manifest = read_json(path)
    manifest["files"]["../../escape.json"] = manifest["files"]["state.json"]
    path.write_bytes(to_json(manifest))
    with pytest.raises(ModelError, match=r"malformed at '\.\./\.\./escape\.json'"):
        manager.load_latest()


def test_a_manifest_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    manager = saved(tmp_path, 1)
    (tmp_path / "step-1" / "manifest.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(ModelError, match="longer than"):
        manager.load_latest()


def test_too_little_space_is_reported_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = saved(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 90, 10))
    with pytest.raises(StorageError, match=r"cannot write: \d+ bytes are needed; got 10 bytes free") as caught:
        manager.save(2, TENSORS, {})
    assert caught.value.exit_code == 7 and str(tmp_path) in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


_LIMITED = """
import resource, signal, sys, torch
from rlhf_core.infra.errors import StorageError
from rlhf_core.infra.files import read_json, to_json
from rlhf_core.training.checkpoint import CheckpointManager
manager = CheckpointManager(sys.argv[1])
manager.save(1, {"model": {"a": torch.zeros(10)}}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
try:
    manager.save(2, {"model": {"a": torch.zeros(3000)}}, {})
except StorageError as error:
    print(error.exit_code, error)
print(manager.load_latest().step, manager.steps())
"""


def test_a_file_size_limit_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert found.startswith("7 ") and str(tmp_path / "step-2") in found and "bytes are needed" in found
    assert "File too large" in found and found.endswith("1 [1]\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = saved(tmp_path, 1)
    real = os.open

    def full(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        return real("/dev/full" if str(path).endswith("optimizer.safetensors") else path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        manager.save(2, TENSORS, {})
    assert caught.value.exit_code == 7 and "bytes are needed" in str(caught.value)
    assert manager.steps() == [1] and not (tmp_path / ".tmp-step-2").exists()


def test_the_limit_is_what_python_ignores() -> None:
    """The limit's signal is ignored by Python, so that the write fails with an error instead of ending the process."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN and hasattr(resource, "RLIMIT_FSIZE")


def test_the_optimizers_state_is_keyed_by_name() -> None:
    model = torch.nn.Linear(3, 2)

    def optimizer() -> torch.optim.AdamW:
        return torch.optim.AdamW([{"params": [model.bias]}, {"params": [model.weight]}], lr=0.1)

    named, first = dict(model.named_parameters()), optimizer()
    model(torch.ones(1, 3)).sum().backward()
    first.step()
    tensors, values = optimizer_state(first, named)
    assert set(tensors) == {f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in named}
    second = optimizer()
    load_optimizer_state(second, named, {name: t.clone() for name, t in tensors.items()}, values, place="here")
    for name, parameter in named.items():
        for key, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][key], value), (name, key)
    with pytest.raises(ModelError, match="isn't trained; got other"):
        load_optimizer_state(second, named, {"exp_avg/other": torch.ones(1)}, {}, place="here")
