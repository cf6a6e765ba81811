"""What the command line's tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf_core.cli import main


@pytest.fixture
def rlhf(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command in this process and returns its exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run
