"""Files, tensors, random streams, secrets, devices."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf_core import registry
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.environment import describe_environment
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.infra.files import read_json, remove_tree, replace_file, sha256_of, storage_errors, write_file
from rlhf_core.infra.redact import redact, redact_text
from rlhf_core.infra.safetensors_file import read_tensors, write_tensors
from rlhf_core.infra.seeds import RandomState, seed_everything, stream_seed
from rlhf_core.registry.plugin_logs import plugin_packages, setup_logging


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="5 bytes are needed; got No space left on device") as caught:
        replace_file(path, b"newer")
    assert caught.value.exit_code == 7 and str(path) in str(caught.value) and path.read_bytes() == b"old"


def test_what_is_written_is_hashed(tmp_path: Path) -> None:
    record = write_file(tmp_path / "file", [b"abc", memoryview(b"def"), b""])
    assert record == sha256_of(tmp_path / "file") and record.bytes == 6


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_refusal_names_the_path(number: int) -> None:
    with pytest.raises(StorageError, match=r"/there: cannot read or write.*choose a directory that you may write"):
        with storage_errors("/there"):
            raise OSError(number, os.strerror(number))


def test_json_is_bounded_and_keys_stand_once(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match="the key 'a' occurs twice"):
        read_json(path)
    with pytest.raises(ValueError, match="longer than 4 bytes"):
        read_json(path, limit=4)


def test_removal_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    remove_tree(tmp_path / "link")
    remove_tree(tmp_path / "never was")
    assert (tmp_path / "kept" / "file").exists() and not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_survive_the_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    values = {
        "b": torch.arange(6).view(2, 3).t().to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "none": torch.ones(0).to(dtype),
    }
    record = write_tensors(tmp_path / "t.safetensors", values)
    assert record == sha256_of(tmp_path / "t.safetensors")
    found = read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(found[name], value) and found[name].dtype == dtype for name, value in values.items())
    assert found.keys() == values.keys()


def with_header(header: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no valid header"),
        (with_header(b"{}", 1 << 40), "no valid header"),
        (
            with_header(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{}}') + b"x",
            "the key 'a' occurs twice",
        ),
        (with_header(b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}') + b"x", "t.safetensors"),
        (with_header(b"nonsense"), "Expecting value"),
    ],
)
def test_a_malformed_tensor_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path / "t.safetensors")


def draws() -> list[float]:
    return [
        random.random(),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(1)),
        float(torch.randn(1)),
    ]


def test_random_states_come_back_through_json() -> None:
    seed_everything(3, "somewhere")
    np.random.randn()  # Leaves a second normal draw waiting in the state.
    state = json.loads(json.dumps(RandomState.capture().to_json()))
    expected = draws()
    assert draws() != expected
    RandomState.from_json(state).restore()
    assert draws() == expected


def test_streams_are_functions_of_their_names() -> None:
    seeds = {stream_seed(seed, name, *index) for seed in (0, 1) for name in ("a", "b") for index in ((), (0,), (1,))}
    assert len(seeds) == 12 and all(0 <= seed < 2**63 for seed in seeds)
    assert stream_seed(5, "model", 2) == stream_seed(5, "model", 2)
    seed_everything(0, "x")
    first = draws()
    seed_everything(0, "x")
    assert draws() == first


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("rlhf train --wandb.api_key=abc123 --beta 0.1", "rlhf train --wandb.api_key=[redacted] --beta 0.1"),
        ("rlhf train --token 'a b' x", "rlhf train --token [redacted] x"),
        ("hub_token: plain\nmax_length: 5", "hub_token: [redacted]\nmax_length: 5"),
        ("data: https://me:pass@host/x", "data: https://[redacted]@host/x"),
        ("get https://host/x?a=1&api-key=abc&b=2 now", "get https://host/x?a=1&api-key=[redacted]&b=2 now"),
        ("note hf_abcdefghijklmnopqrst here", "note [redacted] here"),
        ("--batching.micro_batch_tokens 512 --max_length 9", "--batching.micro_batch_tokens 512 --max_length 9"),
        ("token:\n  next: 1", "token:\n  next: 1"),
    ],
)
def test_secrets_are_redacted_in_text(text: str, hidden: str) -> None:
    assert redact_text(text) == hidden


def test_secrets_are_redacted_in_values() -> None:
    values = {"api_key": "x", "batching": {"micro_batch_tokens": 5}, "list": ["hf_abcdefghijklmnopqrst"], "token": None}
    assert redact(values) == {
        "api_key": "[redacted]", "batching": {"micro_batch_tokens": 5}, "list": ["[redacted]"], "token": None
    }  # fmt: skip


@pytest.fixture
def loggers() -> Iterator[list[logging.Logger]]:
    """The loggers of the core, of the methods that ship, of a third party's, and of one that is no plugin; put back after."""
    names = ("rlhf_core", "rlhf_plugins", "acme_methods", "somebody_else")
    found = [logging.getLogger(name) for name in names]
    before = [(logger.level, logger.propagate, list(logger.handlers)) for logger in found]
    yield found
    for logger, (level, propagate, handlers) in zip(found, before, strict=True):
        logger.setLevel(level)
        logger.propagate, logger.handlers[:] = propagate, handlers


def test_plugins_log_as_the_core_does(
    install: Callable[..., Path], loggers: list[logging.Logger], capsys: pytest.CaptureFixture[str]
) -> None:
    source = 'raise RuntimeError("imported")\nclass Mine:\n    api = 1\n    record = "sft"\n'
    install("acme", {"acme_methods/mine.py": source}, trainers={"mine": "acme_methods.mine:Mine"})
    core, shipped, acme, other = loggers
    own = logging.NullHandler()
    acme.addHandler(own)
    other_before = other.level, other.propagate, list(other.handlers)
    for _ in range(2):  # a second call leaves no second handler
        assert setup_logging() is core
    for logger in (core, shipped.getChild("trainers.kto"), acme.getChild("mine")):
        logger.info("said by %s", logger.name)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == [
        f"said by {name}" for name in ("rlhf_core", "rlhf_plugins.trainers.kto", "acme_methods.mine")
    ]
    assert own in acme.handlers and (other.level, other.propagate, other.handlers) == other_before
    setup_logging(rank=1)
    acme.info("not said")
    shipped.warning("a doubt")
    shipped.warning("a doubt of every process", extra={"same_everywhere": True})
    assert capsys.readouterr().err.split(" ", 1)[1] == "WARNING a doubt\n"


def test_the_methods_that_ship_log_even_where_their_metadata_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])  # so that no distribution is found
    assert registry.find() == [] and plugin_packages() == ["rlhf_plugins"]


def test_the_device_says_what_it_is() -> None:
    devices = DeviceManager("cpu")
    assert devices.device == torch.device("cpu") and devices.supports("bf16") and not devices.supports("fp8")
    about = devices.describe()
    assert about["kind"] == "cpu" and about["memory_bytes"] > 2**20
    assert devices.peak_memory() > 2**20
    with devices.autocast("bf16"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with devices.autocast("float32"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA device") as caught:
        DeviceManager("cuda")
    assert caught.value.exit_code == 2


def test_the_cpu_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert DeviceManager().kind == "cpu"


def test_the_environment_is_plain_values() -> None:
    about = json.loads(json.dumps(describe_environment()))
    assert torch.__version__.startswith(about["versions"]["torch"]) and about["threads"]["intra_op"] >= 1
    assert len(about["torch_build"]["sha256"]) == 64
