"""A small finished run whose model is an adapter, a hub on this machine, and commands in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_stand_in import TOKEN, Hub, serving
from small_runs import train

from rlhf_core.cli import main
from rlhf_core.testing.tiny import save_tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, with a card that states its licence."""
    path = save_tiny(tmp_path_factory.mktemp("base") / "tiny", 0)
    (path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: someone/parent\n---\n# Tiny\n")
    return path


@pytest.fixture(scope="session")
def adapter_run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of SFT with an adapter and a checkpoint. Tests leave it as it is."""
    path = tmp_path_factory.mktemp("runs") / "first"
    train(base, path, lora={"rank": 4}, checkpoint={"every": 1})
    return path


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command in this process and returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(one) for one in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process uploads to, with a token that may write. The way of Xet, which needs the real one, is closed."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.address)
        yield served
