"""`rlhf serve`: a process that answers until a signal ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.cli import main
from rlhf_core.testing.tiny import save_tiny

openai = pytest.importorskip("openai", reason="the package openai isn't installed")
pytest.importorskip("starlette", reason="the extra `serve` isn't installed")

TOKEN = "the-token-of-the-tests"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small"
    save_tiny(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_end(model: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "rlhf_core", "serve", str(model), "--port", "0", "--json"]
    environment = {**os.environ, "RLHF_SERVE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        said = json.loads(process.stdout.readline())
        assert said["model"] == "small" and said["token"] == TOKEN
        client = openai.OpenAI(base_url=said["url"], api_key=TOKEN, max_retries=0)
        options: dict[str, Any] = {"model": "small", "prompt": "a", "max_tokens": 40, "seed": 1}
        options["logprobs"] = 0  # a chunk per token
        wanted = client.completions.create(**options)
        stream = client.completions.create(**options, stream=True)
        found = [next(iter(stream))]
        reading = threading.Thread(target=lambda: found.extend(stream))
        reading.start()
        process.send_signal(number)
        reading.join()
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert "".join(chunk.choices[0].text for chunk in found) == wanted.choices[0].text


def test_what_cannot_be_served_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RLHF_SERVE_TOKEN", raising=False)
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "token").write_text(TOKEN)
    for arguments, code, problem in [
        (["--token-file", str(tmp_path / "absent")], 2, "can't be read"),
        (["--token-file", str(tmp_path / "empty")], 2, "is empty"),
        (["--host", "0.0.0.0"], 2, "--allowed-host"),
        (["--port", "99999"], 2, "65535"),
        (["--precision", "int3"], 2, "int3"),
    ]:
        assert main(["serve", str(model), *arguments]) == code
        assert problem in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "nothing")]) == 4
    monkeypatch.setenv("RLHF_SERVE_TOKEN", "short")
    assert main(["serve", str(model)]) == 2
    assert "at least 16" in capsys.readouterr().err
    assert main(["serve", str(model), "--token-file", str(tmp_path / "token")]) == 2
    assert "give one of them" in capsys.readouterr().err
