"""What the documents show is run: every command and configuration in them, in order, and every link is followed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from forked_commands import serving, write_command
from rlhf_plugins.trainers.sft import SFTTrainer

from rlhf_core import CapabilityTestsConfig, TrainResult
from rlhf_core.config.evaluation import EvaluationRunConfig
from rlhf_core.config.improvement_round import ImprovementConfig
from rlhf_core.registry.hooks import Hooks, hookimpl
from rlhf_core.rewards import check_given
from rlhf_core.testing import TrainerContract

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    return FENCE.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["online-methods", "samplers", "rewards"])
def test_plugins_import_what_plugins_may(page: str) -> None:
    plugins = [text for language, text in blocks(f"docs/{page}.md") if language == "python" and "    api = 1" in text]
    assert plugins
    for text in plugins:
        imported = set(re.findall(r"^from (rlhf_\S+) import|^import (rlhf_\S+)", text, re.MULTILINE))
        assert imported == {("rlhf_core.plugin", "")}, text.split("\n")[0]


def test_the_kit_knows_what_a_test_may_say() -> None:
    ((_, listing),) = blocks("docs/testing.md")
    said = re.findall(r"^    (\w+) = ", listing, re.MULTILINE)
    assert len(said) > 5 and [name for name in said if name not in dir(TrainerContract)] == []
    checks = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/testing.md").read_text(encoding="utf-8")))
    assert checks and checks <= set(TrainerContract.checks())


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An environment that packages can be installed into, and that sees what is installed here."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=True)
    site = next((root / "lib").glob("python*/site-packages"))
    # Path files are read in site directories alone: adding one makes the editable installation's own visible too.
    here = sysconfig.get_path("purelib")
    (site / "parent.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    binaries = root / "bin"
    pip = binaries / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{binaries}/python" -m pip "$@"\n')
    pip.chmod(0o755)
    commands = root / "commands"
    commands.mkdir()
    for tool, module in {"rlhf": "rlhf_core", "pytest": "pytest", "python": None}.items():
        write_command(commands / tool, module, binaries / "python", root / "server")
    path = {"PATH": f"{commands}:{binaries}:{os.environ['PATH']}", "VIRTUAL_ENV": str(root), "OMP_NUM_THREADS": "1"}
    variables = {**os.environ, **path, "HF_HUB_OFFLINE": "1"}  # no page needs a network
    with serving(binaries / "python", root / "server", variables):
        yield variables


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_write_a_plugin(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = {}
    for language, text in blocks("docs/write-a-plugin.md"):
        if language == "bash":
            printed[text.split("\n")[0]] = run(text, tmp_path, environment)
        else:
            shown = {"toml": "pyproject.toml", "python": "src/acme_margin/trainer.py"}[language]
            assert text.strip() in (tmp_path / "acme-margin" / shown).read_text()
    assert "acme-margin" in "".join(printed.values())
    assert (tmp_path / "runs/margin/model/model.safetensors").is_file()
    assert list((tmp_path / "acme-margin/dist").glob("*.whl"))


@pytest.mark.slow
def test_merging(tmp_path: Path, environment: dict[str, str]) -> None:
    """Each file is written under the name in its first line, then the commands run as they stand."""
    for language, text in blocks("docs/merging.md"):
        if language == "bash":
            run(text, tmp_path, environment)
        else:
            (tmp_path / text.split("\n")[0].removeprefix("# ")).write_text(text)
    merged = sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert merged == ["blend", "by-layer", "fisher", "from-file", "soup", "stack", "theirs", "ties", "upper"]
    assert "layers" in yaml.safe_load((tmp_path / "distances.json").read_text())


@pytest.mark.slow
def test_rewards(tmp_path: Path, environment: dict[str, str]) -> None:
    """Listings run as they stand, under the name in their first line, and the rewards of the example file are all there."""
    printed, files = "", []
    listings = {}
    for language, text in blocks("docs/rewards.md"):
        if language == "python":
            first = text.split("\n")[0]
            listings[text] = first.removeprefix("# ") if first.endswith(".py") else "score.py"
            # Before any runs: commands name rewards that are defined further down.
            (tmp_path / listings[text]).write_text(text)
    for language, text in blocks("docs/rewards.md"):
        if language == "bash":
            run(text, tmp_path, environment)
        elif language == "yaml":
            files.append(text)
        else:
            printed += run(f"python {listings[text]}", tmp_path, environment)
    assert "[1.0, 0.0] tensor([ 0.9000, -0.8000])" in printed
    assert "[-1, -8]" in printed.replace(".0", "")
    opened = "import yaml; from rlhf_core.rewards import open_rewards as o; print(o(yaml.safe_load(open('run.yaml'))['rewards']))"
    for file in files:
        (tmp_path / "run.yaml").write_text(file)
        printed += run(f'python -c "{opened}"', tmp_path, environment)
    assert "exact × 1, brevity × 1" in printed and "Rewards(exact × 1)" in printed


def run_page(page: str, folder: Path, environment: dict[str, str]) -> str:
    """Write each listing under the name in its first line, run each command as it stands; return what they print."""
    printed = ""
    for language, text in blocks(page):
        if language == "bash":
            printed += run(text, folder, environment)
        elif (language == "yaml" and re.match(r"# \S+\.yaml\n", text)) or (
            language == "python" and text.startswith("# ")
        ):
            (folder / text.split("\n")[0].removeprefix("# ")).write_text(text)
    return printed


@pytest.mark.slow
def test_online_methods(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = run_page("docs/online-methods.md", tmp_path, environment)
    assert "prompts solved" in printed and "shared" in printed and " passed" in printed
    assert (tmp_path / "runs/apart/model_value/value_head.json").is_file()


@pytest.mark.slow
def test_reinforcement_learning(tmp_path: Path, environment: dict[str, str]) -> None:
    run_page("docs/reinforcement-learning.md", tmp_path, environment)
    assert (tmp_path / "runs/ppo/model_value/value_head.json").is_file()


@pytest.mark.slow
def test_samplers(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = run_page("docs/samplers.md", tmp_path, environment)
    assert " passed" in printed and "sampler acme-best" in printed


@pytest.mark.slow
def test_inference_time_compute(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = run_page("docs/inference-time-compute.md", tmp_path, environment)
    assert "sampled: 2 rows" in printed and "tokens_forwarded" in printed
    rows = [json.loads(line) for line in (tmp_path / "majority.jsonl").read_text().splitlines()]
    assert all(row["details"]["candidates"] <= 16 for row in rows)
    rows = [json.loads(line) for line in (tmp_path / "confidence.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all(row["details"]["candidates"] <= 12 for row in rows)
    assert sum(row["details"]["stopped"] for row in rows) > 0
    for name, key, most in (("adaptive", "candidates", 6 * 16), ("verified", None, 48 * 16)):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        (unspent,) = {row["details"]["unspent"] for row in rows}
        assert 0 <= unspent < most and (key is None or sum(row["details"][key] for row in rows) == most - unspent)
    (searched,) = (json.loads(line) for line in (tmp_path / "beam.jsonl").read_text().splitlines())
    assert searched["score"] == searched["details"]["step_scores"][-1]
    (searched,) = (json.loads(line) for line in (tmp_path / "mcts.jsonl").read_text().splitlines())
    assert searched["details"]["tree"]["steps"][0]["visits"] == 16 and "<svg" in searched["details"]["tree_svg"]


@pytest.mark.slow
def test_evaluation(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = run_page("docs/evaluation.md", tmp_path, environment)
    assert "majority@4/numeric_answer" in printed and "length_controlled_win_rate/repetition" in printed
    assert "difference" in printed and " | " in printed.splitlines()[-2]
    (options,) = (text for language, text in blocks("docs/evaluation.md") if language == "yaml")
    EvaluationRunConfig.parse(yaml.safe_load(options))


@pytest.mark.slow
def test_pipeline(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = run_page("docs/pipeline.md", tmp_path, environment)
    assert "ok: recipe.yaml is a valid recipe of 6 stages" in printed and printed.count("finished before") == 20
    assert printed.count("['judge', 'policy']") == 2 and "against before" in printed
    listings = (yaml.safe_load(text) for language, text in blocks("docs/pipeline.md") if language == "yaml")
    recipe, improve, flaws = listings
    assert recipe == yaml.safe_load((ROOT / "examples/recipes/arithmetic.yaml").read_text(encoding="utf-8"))
    stage = {key: value for key, value in improve[0].items() if key != "kind"}
    ImprovementConfig.parse({"model": "m", **stage, **flaws})


@pytest.mark.slow
def test_self_improvement(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = run_page("docs/self-improvement.md", tmp_path, environment)
    assert "sums: " in printed and "points, p of a drop = " in printed and "penalty at λ = 1: " in printed
    assert json.loads((tmp_path / "flaws.json").read_text())["gap"]["auc"] == 0
    for line in (tmp_path / "refined.jsonl").read_text().splitlines():
        assert json.loads(line)["details"]["stopped"] in ("no_gain", "critic", "rounds", "no_room")
    suites, rewards = (text for language, text in blocks("docs/self-improvement.md") if language == "yaml")
    CapabilityTestsConfig.parse(yaml.safe_load(suites))
    check_given(yaml.safe_load(rewards)["rewards"])


@pytest.mark.slow
def test_serving(tmp_path: Path, environment: dict[str, str]) -> None:
    pytest.importorskip("starlette", reason="the extra `serve` isn't installed")
    pytest.importorskip("openai", reason="the package openai isn't installed")
    ((_, commands), (_, program), (_, by_sampler)) = blocks("docs/serving.md")
    printed = run(f"set -m\n{commands}", tmp_path, environment)
    assert '"max_model_len":' in printed and '"token_logprobs":' in printed
    assert '"index":1' in run(f"set -m\n{by_sampler}", tmp_path, environment).replace(" ", "")
    (tmp_path / "serve.py").write_text(program)
    assert run("python serve.py", tmp_path, environment).startswith("[")


@pytest.mark.slow
def test_lm_eval(tmp_path: Path, environment: dict[str, str]) -> None:
    """The task's file and the program are written under the names in their first lines."""
    pytest.importorskip("lm_eval", reason="the extra `lm-eval` isn't installed")
    for language, text in blocks("docs/lm-eval.md"):
        if language == "bash":
            assert "sums/exact_match,last_number" in run(text, tmp_path, environment)
            continue
        path = tmp_path / text.split("\n")[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    printed = run("python run_sums.py", tmp_path, environment)
    assert "sums/exact_match,last_number: " in printed and "(n = 8)" in printed
    kept = json.loads((tmp_path / "sums.json").read_text())
    again = json.loads((tmp_path / "evaluated/lm_eval.json").read_text())
    assert again["tasks"] == kept["tasks"]
    assert len(kept["tasks"]["sums"]["by_row"]["exact_match,last_number"]) == 8


@pytest.mark.slow
def test_generation(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = run_page("docs/generation.md", tmp_path, environment)
    assert "sampled: 64 rows" in printed and "1/1  17+25=?" in printed and "all 64 rows of samples.jsonl" in printed
    assert (tmp_path / "samples.run.json").is_file() and len(
        (tmp_path / "samples.jsonl").read_text().splitlines()
    ) == 64


@pytest.mark.slow
def test_samples(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = run_page("docs/samples.md", tmp_path, environment)
    assert "1. fixed prompt" in printed and "step 6 " in printed and "step 4 " in printed
    assert "step 1, row" in printed and "More: --worst" in printed
    drawn, again = (
        (tmp_path / "runs" / name / "model" / "model.safetensors").read_bytes() for name in ("drawn", "drawn-again")
    )
    assert drawn == again
    (settings,) = (text for language, text in blocks("docs/samples.md") if language == "yaml")
    SFTTrainer.Config.parse(yaml.safe_load(settings))


@pytest.mark.slow
def test_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    printed = run_page("docs/runs.md", tmp_path, environment)
    assert (
        "loss, eval_loss" in printed and "ab.png" in printed and re.search(r"^beta +0\.1 +0\.3$", printed, re.MULTILINE)
    )
    record = json.loads((tmp_path / "runs/longer/run.json").read_text())
    assert (record["status"], record["step"], len(record["changes"])) == ("done", 9, 3)
    (settings,) = (text for language, text in blocks("docs/runs.md") if language == "yaml")
    SFTTrainer.Config.parse(yaml.safe_load(settings))


@pytest.mark.slow
def test_report(tmp_path: Path, environment: dict[str, str]) -> None:
    run_page("docs/report.md", tmp_path, environment)
    one, both = tmp_path / "runs/first/report.html", tmp_path / "both.html"
    assert "Learning signal" in one.read_text() and "first, step 4" in both.read_text()


@pytest.mark.slow
def test_python(tmp_path: Path, environment: dict[str, str]) -> None:
    """The page's table has the fields of a result, and its script trains."""
    page = (ROOT / "docs/python.md").read_text()
    listed = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `", page, re.MULTILINE)))
    assert set(listed) - {"model"} <= {field.name for field in fields(TrainResult)} and "eval_metrics" in listed
    assert "1+1=" in run_page("docs/python.md", tmp_path, environment)


@pytest.mark.slow
def test_publishing(tmp_path: Path, environment: dict[str, str]) -> None:
    run_page("docs/publishing.md", tmp_path, environment)
    for name in (
        "exports/first/model.safetensors",
        "exports/early/adapter_config.json",
        "merged/first/model.safetensors",
    ):
        assert (tmp_path / name).is_file()
    (options,) = (text for language, text in blocks("docs/publishing.md") if language == "yaml")
    assert SFTTrainer.Config.parse(yaml.safe_load(options)).push_to_hub.repo == "me/first"


@pytest.mark.slow
def test_hooks(tmp_path: Path, environment: dict[str, str]) -> None:
    """The listing beside the commands is the package's own, and the warning is one that a run gives."""
    printed = run_page("docs/hooks.md", tmp_path, environment)
    assert "step,eval_loss" in printed and "acme-table" in printed
    package, listings = tmp_path / "acme-table", blocks("docs/hooks.md")
    (method,) = (text for language, text in listings if language == "python" and not text.startswith("# "))
    assert method in (package / "src/acme_table/hook.py").read_text()
    (entry,) = (text for language, text in listings if language == "toml")
    assert entry in (package / "pyproject.toml").read_text()


def test_the_warning_of_a_hook_is_the_one_that_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    class Denied:
        @hookimpl
        def evaluated(self) -> None:
            raise PermissionError(13, "Permission denied", "runs/a/evaluations.csv")

    hooks = Hooks()
    hooks.add(Denied(), "acme-table:acme-table")
    hooks.emit("evaluated", run=None, step=1, metrics={})
    (shown,) = (text for language, text in blocks("docs/hooks.md") if language == "text")
    assert [record.message for record in caplog.records] == [shown.rstrip("\n")]


@pytest.mark.slow
def test_models(tmp_path: Path, environment: dict[str, str]) -> None:
    """The listings are one program."""
    listings = blocks("docs/models.md")
    for language, text in listings:
        if language == "bash":
            run(text, tmp_path, environment)
    (tmp_path / "models.py").write_text("".join(text for language, text in listings if language == "python"))
    run("python models.py", tmp_path, environment)


SET_UP = ("make ", "source ", "pip install", "python examples/", "rlhf train examples/")
"""Commands that set the repository itself up, or need weights and data that aren't in it: they have tests of their own."""


@pytest.mark.slow
def test_readme(tmp_path: Path, environment: dict[str, str]) -> None:
    """What a newcomer would type, as it stands and in its order."""
    for language, text in blocks("README.md"):
        if language == "yaml":
            assert yaml.safe_load(text)["method"] == "dpo"
            (tmp_path / "run.yaml").write_text(text)
    ran = 0
    for language, text in blocks("README.md"):
        if language == "json":
            assert {"prompt", "chosen", "rejected"} <= yaml.safe_load(text).keys()
        elif language == "python":
            (tmp_path / "third.py").write_text(text)
            run("python third.py", tmp_path, environment)
        elif language == "bash":
            commands = [line for line in text.splitlines() if not line.startswith(SET_UP)]
            run("\n".join(commands), tmp_path, environment)
            ran += len(commands)
    assert ran >= 11
    assert (tmp_path / "merged/both/model.safetensors").is_file()
    for name in ("first", "second", "third"):
        assert (tmp_path / "runs" / name / "metrics.jsonl").is_file()
        assert (tmp_path / "runs" / name / "model").is_dir()
    rows = (tmp_path / "runs/second/metrics.jsonl").read_text().splitlines()
    assert yaml.safe_load(rows[-1])["loss"] < 0.69
