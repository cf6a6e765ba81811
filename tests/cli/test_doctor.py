"""`rlhf doctor` finds what is wrong with an installation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rlhf_core import registry
from rlhf_core.cli import main
from rlhf_core.cli.doctor import find_problems

PYPROJECT = """
[project]
name = "acme"
[project.entry-points."rlhf_core.trainers"]
kept = "acme:Kept"
moved = "acme.new:Moved"
added = "acme:Added"
"""


def test_a_healthy_installation_has_no_problems(capsys) -> None:
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("torch build", "device", "threads", "rlhf_plugins.trainers.dpo:DPOTrainer", "no problems"):
        assert text in out


@pytest.mark.slow
def test_no_name_is_broken_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    for columns, target in ((80, False), (200, True)):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert "context_compressor" in out and ("rlhf_plugins.trainers.dpo:DPOTrainer" in out) == target
        assert [line for line in out.splitlines() if line.startswith(" ")] == []  # no row goes on in another line


def test_an_editable_installation_whose_entry_points_are_stale(install, tmp_path: Path) -> None:
    entries = {"kept": "acme:Kept", "moved": "acme:Moved", "gone": "acme:Gone"}
    root = install("acme", {"acme.py": ""}, trainers=entries)
    source = tmp_path / "a source"
    source.mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    info = next(root.glob("*.dist-info"))
    origin = {"url": source.as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(origin))
    (problem,) = [line for line in find_problems() if line.startswith("acme")]
    assert problem == (
        f"acme: `added`, `gone`, `moved` of rlhf_core.trainers differ between {source}/pyproject.toml and what is installed;"
        f" fix: pip install -e {source}"
    )
    (info / "direct_url.json").write_text(json.dumps({**origin, "dir_info": {}}))
    assert not [line for line in find_problems() if line.startswith("acme")]  # installed whole, not editable


def test_every_plugin_is_loaded_and_its_fault_told(install, monkeypatch, capsys) -> None:
    monkeypatch.setenv(registry.DISABLE_VARIABLE, "typing-slip")
    source = 'raise RuntimeError("no licence")\nclass Mine:\n    api = 1\n    record = "sft"\n'
    install("acme", {"acme.py": source}, trainers={"mine": "acme:Mine"})
    root = install("odd", {}, trainers={})
    next(root.glob("*.dist-info/entry_points.txt")).write_text("[rlhf_core.trainers]\nno equals sign\n")
    assert main(["doctor", "--json"]) == 5
    report = json.loads(capsys.readouterr().out)
    status = {plugin["name"]: plugin["status"] for plugin in report["plugins"]}
    assert status == {"dpo": "ok", "sft": "ok", "mine": "broken"} | {
        n: s for n, s in status.items() if n not in ("dpo", "mine")
    }
    text = "\n".join(report["problems"])
    assert "`acme:mine` is broken: importing it raised RuntimeError: no licence" in text
    assert f"{registry.DISABLE_VARIABLE} names `typing-slip`, which matches no plugin" in text
    assert f"the metadata at {next(root.glob('*.dist-info'))} can't be read" in text
