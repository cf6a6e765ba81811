"""The report: one self-contained page of whatever a run or a pipeline left, hostile texts and damaged files included."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_pages import EVIL, TREE, Page, estimate, packed, save_tokenizer, write_pipeline, write_run

from rlhf_core.cli import main
from rlhf_core.evaluation.report import report_page, write_report
from rlhf_core.evaluation.report.chart_data import Chart, Histogram, LineChart, binned, edges_of, histogram
from rlhf_core.evaluation.report.curve_charts import loss_charts, reward_against_kl, signal_charts
from rlhf_core.evaluation.report.measured_values import measured
from rlhf_core.evaluation.report.page_charts import PageCharts
from rlhf_core.evaluation.report.run_evaluations import measurements
from rlhf_core.evaluation.report.run_files import read_run
from rlhf_core.evaluation.report.svg_charts import draw_chart
from rlhf_core.evaluation.report.token_shades import find_decoder, tokens_of
from rlhf_core.evaluation.report.tree_drawing import is_tree, tree_blocks
from rlhf_core.infra.errors import ConfigError

pytest.importorskip("matplotlib", reason="charts need matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "a<b>&c")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(report_page(run))


@pytest.fixture
def quick_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts are empty but for their titles: drawing them takes most of the time of a page."""

    def drawn(chart: Chart, prefix: str) -> str:
        return f'<svg class="chart" aria-label="{escape(chart.title)}"></svg>'

    monkeypatch.setattr("rlhf_core.evaluation.report.page_charts.draw_chart", drawn)


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without charts are made quickly, and everything else of them is the same."""
    monkeypatch.setattr(PageCharts, "create", classmethod(lambda cls: cls(possible=False)))


def test_a_page_is_self_contained_and_its_texts_are_escaped(page: Page) -> None:
    page.check_self_contained()
    # Each place where a hostile text is shown shows it as text.
    hostile = (f"at 12 {EVIL}", f"ask {EVIL}", f"message {EVIL}", f"say 0.0.0 {EVIL}", f"project: {EVIL}", "Run a<b>&c")
    assert [text for text in hostile if text not in " ".join(page.text.split())] == []
    assert f"metric {EVIL}" in page.titles


def test_sections_are_those_with_data(page: Page) -> None:
    assert page.headings[0] == "Run a<b>&c"
    tops = ["Overview", "Evaluation", "Loss and reward", "Reward against KL", "Stability", "Learning signal", "Time"]
    tops += [
        "Further metrics",
        "Samples",
        "Rollouts",
        "Data",
        "Models",
        "Events",
        "Configuration",
        "Versions and machine",
    ]
    assert [one for one in page.headings if one in tops] == tops
    assert "Held-out samples" not in page.headings and "Capability tests" not in page.headings
    assert {"Loss", "Reward", "Entropy", "Gap between engine and trainer", "Share of clipped tokens"} <= {*page.titles}
    assert {"Solve rate of groups", "Advantage of completions", "Length of completions"} <= {*page.titles}
    assert {"Time of the steps by phase", "Gradient norm before clipping", "Held-out reward"} <= {*page.titles}


def test_figures_of_a_run(page: Page) -> None:
    words = " ".join(page.text.split())
    assert (
        "12 of 12" in words and "1,200" in words and "24 s" in words and "2 min 05 s" in words and "1.00 GiB" in words
    )
    # 0.25 ± 1.96 · 0.05 and 0.5 ± 1.96 · 0.05.
    assert "0.25 [0.152, 0.348]" in words and "0.5 [0.402, 0.598]" in words and "+0.25" in words


@pytest.mark.usefixtures("quick_charts")
def test_an_sft_run_has_no_sections_of_rollouts(tmp_path: Path) -> None:
    path = tmp_path / "sft"
    path.mkdir()
    (path / "run.json").write_text('{"status": "running"}')
    (path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "grad_norm": 1.0, "tokens": 7, "seconds": 1.0}\n')
    found = Page(report_page(path))
    found.check_self_contained()
    for title in ("Learning signal", "Rollouts", "Samples", "Reward against KL", "Evaluation", "Configuration"):
        assert title not in found.headings
    assert found.titles == ["Loss", "Gradient norm before clipping"]


@pytest.mark.usefixtures("quick_charts")
def test_two_runs_beside_each_other(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "a/grpo"), write_run(tmp_path / "b/grpo", seed=1, rate=0.5, steps=8)
    made = write_report(first, second, output=tmp_path / "reports/new/both.html")  # whose folder is made
    found = Page(made.read_text(encoding="utf-8"))
    found.check_self_contained()
    words = " ".join(found.text.split())
    assert (
        "Run a/grpo and b/grpo" in found.headings and "a/grpo, step 12" in found.text and "b/grpo, step 8" in found.text
    )
    assert "learning_rate 0.001 0.5" in words and "seed 0 1" in words
    assert "max_steps 12 12" not in words  # equal options are no difference
    # 0.5 − 0.5 with the interval of two independent values, 1.96 · √2 · 0.05.
    assert "+0 [-0.139, +0.139]" in words and words.count("± is one standard error") == 1
    assert "Solve rate of groups: a/grpo" in found.titles and found.titles.count("Loss") == 1


@pytest.mark.usefixtures("without_charts")
@pytest.mark.parametrize(("files", "difference"), [("1", "+0.1"), ("2", "–")])
def test_kls_of_two_runs_have_a_difference_where_the_reference_is_the_same(
    tmp_path: Path, files: str, difference: str
) -> None:
    runs = []
    for name, weights, value in (("a", "1", 0.2), ("b", files, 0.3)):
        (path := tmp_path / name).mkdir()
        (path / "run.json").write_text('{"status": "done"}')
        models = {"policy": {"source": "m", "files": {"model.safetensors": weights}}}
        (path / "models.json").write_text(json.dumps(models))
        metrics = {"eval_kl": value, "eval_test_kl": value, "eval_accuracy": 0.5}
        (path / "events.jsonl").write_text(json.dumps({"event": "evaluated", "step": 3, "metrics": metrics}) + "\n")
        runs.append(path)
    words = " ".join(Page(report_page(*runs)).text.split())
    assert (
        f" kl 0.2 0.3 {difference}" in words
        and f"test_kl 0.2 0.3 {difference}" in words
        and "accuracy 0.5 0.5 +0" in words
    )


def test_curves_of_two_runs_have_a_colour_each(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, steps=steps), name) for name, steps in (("a", 12), ("b", 8))]
    chart = loss_charts(runs)[0]
    assert isinstance(chart, LineChart)
    assert [(line.label, line.colour, len(line.x)) for line in chart.lines] == [("a", 0, 12), ("b", 1, 8)]
    assert list(chart.lines[0].y) == [1 / step for step in range(1, 13)]


def test_reward_against_kl_is_in_the_order_of_steps(run: Path) -> None:
    (chart,) = reward_against_kl([read_run(run)])
    assert isinstance(chart, LineChart)
    assert list(chart.lines[0].x) == [step / 100 for step in range(1, 13)]
    assert list(chart.lines[0].y) == [step / 20 for step in range(1, 13)]
    assert (list(chart.lines[1].x), list(chart.lines[1].y)) == ([0.01], [0.05])


def test_solve_rates_and_advantages_against_the_rows(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    charts = {chart.title: chart for chart in signal_charts([read_run(run)])}
    rates = charts["Solve rate of groups"]
    assert isinstance(rates, Histogram)
    # Of six rollouts the first third are those of steps 0 and 2; right from half the sum of weights, 0.75.
    groups: dict[tuple[int, int], list[bool]] = {}
    for row in rows:
        if row["step"] <= 2:
            groups.setdefault((row["step"], row["place"]), []).append(row["reward"] >= 0.75)
    expected = [0.0] * 10
    for group in groups.values():
        expected[min(9, int(10 * sum(group) / len(group)))] += 1 / len(groups)
    assert rates.shares["first third"] == pytest.approx(expected)
    assert sum(rates.shares["last third"]) == pytest.approx(1)
    advantages = charts["Advantage of completions"]
    assert isinstance(advantages, Histogram)
    early = [row["advantage"] for row in rows if row["step"] <= 2]
    assert advantages.shares["first third"][0] == pytest.approx(sum(one < 0 for one in early) / len(early))


def test_a_long_curve_keeps_its_spikes() -> None:
    values = [0.0] * 1000
    values[503] = 9.0
    x, y, band = binned(range(1000), values, 100)
    assert len(x) == len(y) == 100 and band is not None
    assert y[50] == pytest.approx(0.9) and max(band[1]) == 9.0 and band[0] == [0.0] * 100
    assert x[0] == 4.5 and sum(y) == pytest.approx(9 / 10)
    assert binned([1, 2], [3.0, 4.0], 100) == ([1, 2], [3.0, 4.0], None)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_a_histogram_holds_every_value(values: list[float]) -> None:
    edges = edges_of(values)
    assert len(edges) == 2 or edges == sorted(edges)
    assert sum(histogram(values, edges)) == pytest.approx(1)


def test_histogram_by_hand() -> None:
    assert histogram([0.0, 0.1, 0.5, 1.0], [0.0, 0.5, 1.0]) == [0.5, 0.5]
    assert histogram([], [0, 1, 2]) == [0, 0]


def test_a_chart_is_text_in_the_pages_colours() -> None:
    from rlhf_core.evaluation.report.chart_data import Line

    lines = [Line("_a $x$ \x00 <b>", [1, 2], [1e-9, 2e-9]), Line("b" * 80, [1, 2], [3e-9, 4e-9], colour=1, style=1)]
    svg = draw_chart(LineChart("T $y$ <i>", lines, log=True), "p")
    assert "stroke: var(--c1)" in svg and "var(--ink)" in svg and "#0a0b" not in svg
    assert "_a $x$ \\x00 &lt;b&gt;</text>" in svg and "T $y$ &lt;i&gt;</text>" in svg and "mathdefault" not in svg
    assert "http" not in svg and "<style" not in svg and "metadata" not in svg
    assert draw_chart(LineChart("T", lines), "p") == draw_chart(LineChart("T", lines), "p")


def test_tokens_are_shaded_by_their_probability(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "model")
    decode = find_decoder(tmp_path / "nothing", tmp_path / "model")
    assert decode is not None
    ids = tokenizer.encode("4é").ids
    assert len(ids) == 3  # `é` is two bytes, each a token
    row = {"completion": "4é", "drawn_tokens": packed(ids, [0.95, 0.5, 0.5])}
    tokens = tokens_of(row, decode)
    assert [token.text for token in tokens] == ["4", "é"]
    assert [token.probability for token in tokens] == pytest.approx([0.95, 0.25], abs=1e-3)
    assert [token.shade for token in tokens] == [0, 7]
    sampled = {"completion": "4é", "completion_ids": ids, "logprobs": [-0.1, -0.1, -0.1]}
    assert len(tokens_of(sampled, decode)) == 2
    # What can't be decoded, or doesn't fit, is shown as text.
    for broken in ({"ids": "!", "logprobs": ""}, packed(ids, [0.5] * 2), {}, packed([10**8] * 2, [0.5] * 2)):
        assert [one.text for one in tokens_of({"completion": "4é", "drawn_tokens": broken}, decode)] == ["4é"]
    assert tokens_of(row, None)[0].probability is None


def test_a_damaged_tokenizer_leaves_texts_unshaded(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{broken")
    assert find_decoder(tmp_path) is None


@pytest.mark.usefixtures("without_charts")
def test_damaged_and_missing_files_are_noted(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    (path / "run.json").write_text("{not json")
    (path / "config.yaml").write_text("a: [")
    (path / "rewards.json").write_text("[1]")
    metrics = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    metrics[3], metrics[5] = "garbage\n", metrics[5].replace('"loss": ', '"loss": null, "was": ')
    (path / "metrics.jsonl").write_text("".join(metrics)[:-20])
    (path / "samples.jsonl").write_bytes(b"\xff\xfe\n" + (path / "samples.jsonl").read_bytes())
    (path / "rollouts.jsonl").write_text('{"step": 0}\n' + (path / "rollouts.jsonl").read_text())
    found = Page(report_page(path))
    found.check_self_contained()
    for note in (
        "run.json is damaged", "config.yaml is damaged", "rewards.json is damaged",
        "metrics.jsonl: damaged and left out: line 4.", "samples.jsonl: damaged and left out: line 1.",
        "rollouts.jsonl: damaged and left out: line 1.",
        "`loss` wasn't a finite number at 1 step",
    ):  # fmt: skip
        assert note in found.text, note
    run = read_run(path)
    assert run.steps == 11 and len(run.curves["loss"]) == 9 and len(run.curves["reward"]) == 10
    (path / "run.json").unlink()
    (path / "metrics.jsonl").unlink()
    (path / "run.json").write_text("{}")
    assert "metrics.jsonl is missing" in Page(report_page(path)).text


FILES = (
    "run.json",
    "config.yaml",
    "metrics.jsonl",
    "events.jsonl",
    "samples.jsonl",
    "rollouts.jsonl",
    "models.json",
    "data.json",
)


@pytest.mark.usefixtures("without_charts")
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.sampled_from(FILES), st.integers(0, 10**6), st.binary(max_size=6), st.booleans())
def test_no_damage_stops_the_report(
    tmp_path_factory: pytest.TempPathFactory, run: Path, name: str, place: int, bytes_: bytes, cut: bool
) -> None:
    copy = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(run, copy)
    content = (copy / name).read_bytes()
    place %= len(content)
    (copy / name).write_bytes(content[:place] + bytes_ + (b"" if cut else content[place + len(bytes_) :]))
    Page(report_page(copy)).check_self_contained()


ODD: list[Any] = [None, True, 3, "x", [1], {"a": [None]}, 1e308]


@pytest.mark.usefixtures("without_charts")
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.sampled_from(("run.json", "models.json", "data.json", "rewards.json")), st.sampled_from(ODD), st.integers(0, 20)
)
def test_values_of_other_kinds_do_not_stop_the_report(
    tmp_path_factory: pytest.TempPathFactory, run: Path, name: str, value: Any, place: int
) -> None:
    copy = tmp_path_factory.mktemp("odd") / "run"
    shutil.copytree(run, copy)
    values = json.loads((copy / name).read_text())
    key = list(values)[place % len(values)]
    values[key] = value
    (copy / name).write_text(json.dumps(values))
    Page(report_page(copy))


@pytest.mark.usefixtures("quick_charts")
def test_a_pipeline_by_its_stages(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path / "pipe")
    made = write_report(path)
    assert made == path / "report.html"
    found = Page(made.read_text(encoding="utf-8"))
    found.check_self_contained()
    words = " ".join(found.text.split())
    tops = [
        "Overview",
        "Stages",
        "Evaluations",
        "Capability tests",
        "Samplers compared",
        "Search trees",
        "Sampled rows",
        "Merge",
    ]
    assert [one for one in found.headings if one in tops] == tops
    assert "stage poison was rolled back: `sums` fell by 40 points" in words
    assert "6 of 7 finished" not in words and "5 of 7 finished" in words
    assert "grpo sums 0.5 [0.46, 0.54] 0.625 [0.585, 0.665] +0.125 kept" in words
    assert "poison sums 0.625 [0.585, 0.665] 0.225 [0.185, 0.265] -0.4 [-0.44, -0.36], p = 0.001 regression" in words
    assert "pass@1 0.25 [0.21, 0.29] 0.375 [0.335, 0.415]" in words
    assert "mcts 0.75 [0.652, 0.848] 90 +0.25 [+0.172, +0.328]" in words
    assert "p is that of a drop" in words and words.count("± is one standard error") == 1 and words.count("±") == 1
    assert "stages/00-grpo/model 0.7" in words and "base 0.3" in words
    assert "search: rows.jsonl, row 1" in found.titles and f"found {EVIL}" in found.text
    assert "Tokens by stage" in found.titles and "Stages" in found.titles
    assert "1,200" in words  # of the stage without recorded tokens, from its metrics
    assert found.titles.count("Loss") == 2 and "later" in words


@pytest.mark.usefixtures("without_charts")
def test_a_kl_to_other_references_is_not_set_against_another(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path / "arithmetic/pipeline")
    for number, reference in enumerate(("base", "stages/00-grpo/model")):
        file = path / f"stages/0{number + 2}-evaluate{number}/evaluation.json"
        found = json.loads(file.read_text()) | {"settings": {"models": {"reference": {"source": reference}}}}
        file.write_text(json.dumps(found | {"metrics": {"kl/token": estimate(0.5)}}))
    record = json.loads((path / "pipeline.json").read_text())
    record["stages"][3]["metrics"] = {
        "differences": {"length": estimate(-2.0)}, "notes": ["kl/token can't be compared: …"]
    }  # fmt: skip
    record["stages"][3]["inputs"] = {"options": {"compare": "${stages.evaluate0.evaluation}"}}
    (path / "pipeline.json").write_text(json.dumps(record))
    page = Page(report_page(path))
    words = " ".join(page.text.split())
    assert "another reference in each" in words and "evaluate0 to base; evaluate1 to stages/00-grpo/model." in words
    assert (
        "difference of evaluate1 − evaluate0 length -2 [-2.04, -1.96]" in words
        and "evaluate1: kl/token can't be compared: …" in words
    )
    # A name that says no more than what it is has the folder above before it.
    assert page.headings[0] == "Pipeline arithmetic/pipeline"


@pytest.mark.usefixtures("without_charts")
def test_a_pipeline_without_its_record_shows_its_stages(tmp_path: Path) -> None:
    path = write_pipeline(tmp_path / "pipe")
    (path / "pipeline.json").write_text('{"stages": [{"na')
    found = Page(report_page(path))
    assert "pipeline.json is damaged" in found.text and "00-grpo" in found.text and "Merge" in found.headings


@pytest.mark.usefixtures("without_charts")
def test_a_stage_outside_of_the_pipeline_is_not_read(tmp_path: Path) -> None:
    write_run(tmp_path / "secret")
    path = tmp_path / "pipe"
    path.mkdir()
    stages = [
        {"name": "out", "directory": "../secret"},
        3,
        {"name": "gone", "directory": "stages/gone", "status": "failed"},
    ]
    (path / "pipeline.json").write_text(json.dumps({"stages": stages}))
    found = Page(report_page(path))
    assert "is outside of the pipeline's directory" in found.text and "a stage is no mapping" in found.text
    assert "stages/gone is missing" in found.text and "at 12" not in found.text


@pytest.mark.usefixtures("without_charts")
def test_two_pipelines(tmp_path: Path) -> None:
    first, second = write_pipeline(tmp_path / "one"), write_pipeline(tmp_path / "two", seed=3)
    found = Page(report_page(first, second))
    words = " ".join(found.text.split())
    assert "one: grpo" in words and "two: grpo" in words and "seed 0 3" in words
    with pytest.raises(ConfigError, match="a run and a pipeline can't be compared"):
        report_page(first, first / "stages/00-grpo")


def test_trees_that_are_none() -> None:
    assert is_tree(TREE)
    steps = TREE["steps"]
    for broken in (
        None, {}, {"steps": [], "best": []}, {"steps": steps, "best": [9]}, {"steps": [*steps, steps[0]], "best": []},
        {"steps": [{**steps[0], "visits": "<b>"}], "best": []}, {"steps": [{**steps[0], "number": "<b>"}], "best": []},
        {"steps": [{**steps[0], "parent": 5}], "best": []},
    ):  # fmt: skip
        assert not is_tree(broken)
        assert "damaged" in tree_blocks(broken, "t", "p")[0].text  # type: ignore[union-attr]


def test_measured_values() -> None:
    assert measured(estimate(0.5)).low == pytest.approx(0.46)  # type: ignore[union-attr]
    assert str(measured({"value": 0.5, "error": 0.1})) == "0.5 [0.304, 0.696]"
    assert str(measured(3)) == "3"
    assert measured({"error": 1}) is None and measured("0.5") is None and measured(True) is None
    found = measurements({"eval_loss": 2.0, "eval_loss_se": 0.1, "x_se": 1.0})
    assert {*found} == {"loss", "x_se"} and found["loss"].high == pytest.approx(2.196)


def test_without_matplotlib_the_rest_is_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_svg", None)
    found = Page(report_page(run))
    assert not found.of("svg") and "they need matplotlib" in found.text and "Rollouts" in found.headings


@pytest.mark.usefixtures("without_charts")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path / "run")
    assert main(["report", str(path)]) == 0
    assert (path / "report.html").read_text().startswith("<!doctype html>") and "report.html" in capsys.readouterr().out
    other = write_run(tmp_path / "other", seed=1)
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(path), str(other), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == "report.html" and (tmp_path / "report.html").exists()
    for arguments, said in (
        ([str(tmp_path / "nothing")], "no such directory"),
        ([str(path / "run.json")], "is a file"),
        ([str(tmp_path)], "neither a run's nor a pipeline's"),
        ([str(path), "--output", str(tmp_path)], "is a directory, not a file"),
    ):
        assert main(["report", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_reading_and_drawing_import_no_torch() -> None:
    code = "import sys, rlhf_core.evaluation.report.write as w; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def browser() -> str | None:
    """Return the path of a Chromium, if there is one."""
    return next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium is installed")
def test_a_browser_shows_it_without_an_error(tmp_path: Path) -> None:
    made = write_report(write_run(tmp_path / "run"), output=tmp_path / "page.html")
    command = [str(browser()), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command.append(f"--user-data-dir={tmp_path / 'profile'}")
    shown = subprocess.run([*command, "--dump-dom", f"file://{made}"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "CONSOLE" not in shown.stderr
    # The script ran, though the policy forbids any other: the button for the colours is there.
    assert '<button type="button" id="theme">' in shown.stdout
