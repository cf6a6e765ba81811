"""A tiny model and a command line in this process, for faults as a user meets them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlhf_core.cli import main
from rlhf_core.testing.tiny import save_tiny

OPTIONS = ("--batch_size", "2", "--max_length", "64", "--max_steps", "2", "--learning_rate", "1e-3")
ROWS = [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(12)]


class Ended(NamedTuple):
    """How a command ended. `error` is the last line of stderr: the fault."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        return self.err.splitlines()[-1] if self.err else ""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("faults") / "model", layers=1, hidden=16, max_positions=128)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows (or raw text or bytes) to `rows.jsonl` and returns its path."""

    def put(content: Sequence[Any] | str | bytes, name: str = "rows.jsonl") -> Path:
        if not isinstance(content, str | bytes):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put


@pytest.fixture
def train(
    model: Path, write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Ended]:
    """Return a function that runs `rlhf train` in this process; the keywords stand for what a good run has."""

    def run(
        *flags: str,
        method: str = "sft",
        model: str | Path = model,
        data: Any = ROWS,
        output: Path = tmp_path / "run",
        options: Sequence[str] = OPTIONS,
    ) -> Ended:
        data = data if isinstance(data, Path) else write(data)
        capsys.readouterr()
        arguments = ["train", method, "--model", str(model), "--data", str(data), "--output", str(output)]
        return Ended(main([*arguments, *options, *flags]), *capsys.readouterr())

    return run
