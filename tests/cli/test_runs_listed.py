"""`rlhf runs`, `rlhf plot` and `rlhf diff` on directories written by hand."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rlhf_core.cli import main
from rlhf_core.cli.terminal_plot import plot_lines
from rlhf_core.config.training import LoraConfig
from rlhf_core.config.yaml_file import dump_yaml
from rlhf_core.evaluation.report import chart_files
from rlhf_core.evaluation.report.chart_data import Line, LineChart
from rlhf_core.evaluation.report.svg_charts import draw_lines
from rlhf_core.evaluation.run_list import age, list_runs
from rlhf_core.infra.files import lock_directory
from rlhf_core.training.run_directory import RunDirectory

OPTIONS: dict[str, Any] = {
    "method": "sft",
    "model": "models/small",
    "data": "rows.jsonl",
    "max_steps": 40,
    "learning_rate": 1e-3,
}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(path: Path, status: str = "done", *, options: Mapping[str, Any] | None = None, **record: Any) -> Path:
    """Write a run of 40 steps whose held-out loss was least at step 20."""
    path.mkdir(parents=True)
    described = {"rlhf_core": "0.1.0", "id": path.name, "started": "2026-01-01T00:00:00Z", "status": status, "step": 40}
    described |= {
        "versions": {"torch": "2.13.0"},
        "plugin": {"name": "sft", "distribution": "rlhf-core", "version": "0.1.0"},
    }
    (path / "run.json").write_text(json.dumps({**described, **record}))
    (path / "config.yaml").write_text(dump_yaml({**OPTIONS, **(options or {}), "output": str(path)}))
    jsonl(path / "metrics.jsonl", [{"step": step, "loss": 4 / step, "learning_rate": 1e-3} for step in range(1, 41)])
    losses = {0: 0.1, 10: 2.0, 20: 1.0, 40: 1.5}
    evaluated = [
        {"event": "evaluated", "step": step, "metrics": {"eval_loss": loss, "eval_loss_se": 0.1}}
        for step, loss in losses.items()
    ]
    jsonl(path / "events.jsonl", evaluated)
    data = {"data": {"files": [{"name": "rows.jsonl", "sha256": record.get("hash", "a" * 64)}], "rows": 10, "kept": 10}}
    (path / "data.json").write_text(json.dumps(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "done")
    write_run(tmp_path / "killed", "running")
    write_run(tmp_path / "deep" / "01-sft", "failed", message="data.jsonl:3: empty response")
    (tmp_path / "done" / "checkpoints" / "step-40").mkdir(parents=True)
    (tmp_path / "done" / "checkpoints" / "step-40" / "run.json").write_text("{}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    return tmp_path


# rlhf runs


def test_a_run_that_was_killed_is_told_from_one_that_runs(folder: Path) -> None:
    found = {run.name: run for run in list_runs(folder)}
    assert {name: run.status for name, run in found.items()} == {
        "done": "done", "killed": "killed", "deep/01-sft": "failed", "damaged": "damaged",
    }  # fmt: skip
    lock = lock_directory(folder / "killed", "run.lock")
    assert lock is not None
    assert {run.name: run.status for run in list_runs(folder)}["killed"] == "running"
    os.close(lock)
    assert {run.name: run.status for run in list_runs(folder)}["killed"] == "killed"


def test_a_first_try_that_never_began_says_so(rlhf, tmp_path: Path) -> None:
    run = RunDirectory.open(tmp_path / "try", resume=False, overwrite=False)
    run.end("failed", 3, step=0, message="rows.jsonl:1: no column `chosen`")
    run.close()
    write_run(tmp_path / "second", "failed", message="loss isn't finite")
    code, out, _ = rlhf("runs", str(tmp_path))
    rows = {line.split()[0]: line for line in out.splitlines()[1:3]}
    assert code == 0 and " failed at start " in rows["try"] and " failed  " in rows["second"]


def test_the_figures_of_a_run(folder: Path) -> None:
    (run,) = list_runs(folder / "done")
    assert (run.name, run.method, run.model, run.step, run.total_steps) == ("done", "sft", "small", 40, 40)
    assert (run.metric, run.last, run.best, run.best_step) == ("eval_loss", 1.5, 1.0, 20)
    (run,) = list_runs(folder / "done", "learning_rate")
    assert (run.last, run.best) == (1e-3, None)
    write_run(folder / "watched", options={"keep_best": {"metric": "eval_loss", "mode": "max"}})
    (run,) = list_runs(folder / "watched")
    assert (run.best, run.best_step) == (2.0, 10)
    assert [age(since, 1e6) for since in (1e6 - 5, 1e6 - 125, 1e6 - 7300, 1e6 - 2e5, None)] == [
        "5 s",
        "2 min",
        "2 h",
        "2 d",
        "",
    ]


def test_the_table_fits_80_columns_and_breaks_no_name(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(folder / "a-name-of-some-length", options={"max_steps": 100000, "keep_best": {"metric": "eval_accuracy"}})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["runs", str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns
        assert ("model" in lines[0].split()) == (columns == 120)
        text = "\n".join(lines)
        assert "a-name-of-some-length" in text and "eval_accuracy" in text and "40/100000" in text
        assert "deep/01-sft: data.jsonl:3: empty response" in text and "damaged: run.json is damaged" in text


def test_runs_as_json_and_what_is_no_folder(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["runs", str(folder), "--json"]) == 0
    names = {run["name"]: run for run in json.loads(capsys.readouterr().out)}
    assert names["done"]["best_step"] == 20 and names["deep/01-sft"]["message"] == "data.jsonl:3: empty response"
    assert main(["runs", str(folder / "no")]) == 2
    assert "no such directory" in capsys.readouterr().err
    (folder / "empty").mkdir()
    monkeypatch.chdir(folder / "empty")
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "no runs below .\n"


def test_a_run_that_failed_at_its_start_says_what_it_was(tmp_path: Path) -> None:
    asked = {"plugin": {"name": "dpo", "distribution": "rlhf-core", "version": "0.1.0"}, "model": "models/small"}
    run = RunDirectory.open(tmp_path / "run", resume=False, overwrite=False, asked=asked)
    run.end("failed", 3, step=0, message="rows.jsonl:1: no column `chosen`")
    run.close()
    (found,) = list_runs(tmp_path)
    assert (found.status, found.method, found.model) == ("failed", "dpo", "small")


@pytest.mark.parametrize(
    ("model", "name"),
    [("runs/sft/model", "sft/model"), ("model", "model"), ("owner/small", "small"), ("a/b.gguf", "b.gguf")],
)
def test_a_model_of_a_run_is_named_with_the_run(tmp_path: Path, model: str, name: str) -> None:
    write_run(tmp_path / "run", options={"model": model})
    assert [found.model for found in list_runs(tmp_path)] == [name]


# rlhf plot


def test_a_curve_by_hand() -> None:
    chart = LineChart("loss", [Line("", [0, 10], [0.0, 4.0])])
    assert plot_lines(chart, width=25, height=5, colours=False) == [
        "loss",
        "4 |                   ***",
        "  |              *****",
        "2 |        ******",
        "  |   *****",
        "0 |***",
        "  +----------------------",
        "   0       step        10",
    ]


def test_curves_have_colours_and_marks_where_a_terminal_shows_them() -> None:
    lines = [
        Line("a", [1, 2, 3], [1.0, 10.0, 100.0], colour=0),
        Line("b", [1, 3], [5.0, 5.0], colour=1, style=1, marks=True),
    ]
    text = plot_lines(LineChart("two", lines, log=True), width=60, height=10, colours=True)
    plain = [re.sub(r"\x1b\[\d+m", "", line) for line in text]
    assert (
        max(map(len, plain)) <= 60
        and "\x1b[36m" in text[1]
        and "\x1b[33m" in text[1]
        and text[0] == "two (logarithmic)"
    )
    assert [line.split()[0] for line in plain if "┤" in line] == ["100", "10", "1"]
    assert any("\u2801" <= character <= "\u28ff" for line in plain for character in line)
    alone = plot_lines(LineChart("one", [Line("", [7], [3.0])]), width=40, height=6, colours=False)
    assert sum(line.count("*") for line in alone) == 1


def test_without_colours_each_curve_has_a_letter() -> None:
    curves = [(0, 0), (0, 1), (1, 0), (1, 1)]  # two metrics of two runs: a colour for each run, a style for each metric
    lines = [Line(f"{at}", [0, 9], [float(at)] * 2, *styled) for at, styled in enumerate(curves)]
    text = plot_lines(LineChart("four", lines), width=40, height=7, colours=False)
    assert text[1] == "* 0   x 1   o 2   + 3"
    assert [{*line} - {*" |0123"} for line in text[2:9:2]] == [{"+"}, {"o"}, {"x"}, {"*"}]


def test_two_runs_on_common_axes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    other = write_run(folder / "other")
    assert (
        main(["plot", str(folder / "done"), str(other), "--metric", "loss,eval_loss", "--metric", "learning_rate"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loss, eval_loss" and max(map(len, lines)) <= 80 and "learning_rate" in lines
    for label in ("done: loss", "done: eval_loss", "other: loss", "other: eval_loss"):
        assert any(label in line for line in lines[1:4])
    assert main(["plot", str(folder / "done"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["done"]["eval_loss"] == {"steps": [0, 10, 20, 40], "values": [0.1, 2.0, 1.0, 1.5]}
    assert values["done"]["loss"]["values"][0] == 4.0


def test_pictures(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for name, starts in (("new/ab.png", b"\x89PNG"), ("ab.svg", b"<?xml")):
        assert main(["plot", str(folder / "done"), str(folder / "killed"), "--output", str(folder / name)]) == 0
        assert capsys.readouterr().out == f"{folder / name}\n" and (folder / name).read_bytes().startswith(starts)
    text = ElementTree.tostring(ElementTree.parse(folder / "ab.svg").getroot(), encoding="unicode")
    assert "#0072b2" in text and "#d55e00" in text and "#0a0b" not in text
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    draw_lines(axes, LineChart("loss", [Line("loss", range(1, 5), [1.0, 2.0, 3.0, 4.0])]), ["black"])
    assert all(tick == int(tick) for tick in axes.get_xticks())  # there is no step 2.5
    monkeypatch.setattr(chart_files, "can_draw", lambda: False)
    assert main(["plot", str(folder / "done"), "--output", "x.png"]) == 2
    assert "pictures need matplotlib; got not installed; fix: pip install 'rlhf-core[plot]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--metric", "los"], "--metric: no metric of that name; got los; fix: did you mean `loss`?"),
        (["--metric", ","], "--metric: no metric is named"),
        (
            ["--output", "curves.pdf"],
            "--output: is named neither as PNG nor as SVG; got curves.pdf; fix: name it curves.png",
        ),
    ],
)
def test_what_cannot_be_drawn(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(["plot", str(folder / "done"), *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_a_step_has_no_curves(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(folder / "new", "running")
    (run / "metrics.jsonl").unlink()
    (run / "events.jsonl").unlink()
    assert main(["plot", str(run)]) == 2
    assert "no step has been made yet" in capsys.readouterr().err
    assert main(["plot", str(folder / "deep")]) == 7
    assert "is not a run's directory; fix:" in capsys.readouterr().err


# rlhf diff


def test_how_two_runs_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed = [{"step": 10, "options": {"learning_rate": {"before": 1e-3, "now": 1e-4}}}]
    other = write_run(
        folder / "other", options={"learning_rate": 1e-4, "beta": 0.1}, hash="b" * 64, changes=changed,
        versions={"torch": "2.14.0"},
    )  # fmt: skip
    assert main(["diff", str(folder / "done"), str(other), "--json"]) == 0
    found = {(one["part"], one["name"]): (one["first"], one["second"]) for one in json.loads(capsys.readouterr().out)}
    assert found == {
        ("options", "learning_rate"): (1e-3, 1e-4),
        ("options", "beta"): (None, 0.1),
        ("data", "data: SHA-256"): ("a" * 12, "b" * 12),
        ("versions", "torch"): ("2.13.0", "2.14.0"),
        ("resumes", "learning_rate after step 10"): (None, "0.001 → 0.0001"),
    }
    assert main(["diff", str(folder / "done"), str(other)]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate  0.001  0.0001" in shown and "beta           –      0.1" in shown
    for number, lora in enumerate(({"rank": 8}, {})):
        adapter = {**LoraConfig().model_dump(mode="json"), **lora}
        write_run(folder / f"lora{number}", options={"lora": adapter})
        assert main(["diff", str(folder / "done"), str(folder / f"lora{number}"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0] == {
            "part": "options",
            "name": "lora",
            "first": None,
            "second": lora,
        }
        assert main(["diff", str(folder / "done"), str(folder / f"lora{number}")]) == 0
        assert f"lora  –     {['rank: 8', 'with its defaults'][number]}\n" in capsys.readouterr().out
    assert main(["diff", str(folder / "lora0"), str(folder / "lora1"), "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)] == ["lora.rank"]
    assert main(["diff", str(folder / "done"), str(folder / "killed")]) == 0
    assert capsys.readouterr().out.startswith("no differences")
    assert main(["diff", str(folder / "done"), str(folder / "deep")]) == 2
    assert "is not a run's directory" in capsys.readouterr().err
