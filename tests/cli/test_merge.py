"""`rlhf merge` as a user meets it: plans, results, faults in one line; distances as a table, JSON and a picture."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rlhf_plugins.mergers.linear import LinearMerger
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_core import registry
from rlhf_core.plugin import Chunk
from rlhf_core.testing.tiny import save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A base and two models near it."""
    root = tmp_path_factory.mktemp("models")
    for number, name in enumerate(("base", "one", "two")):
        path = save_tiny(root / name, 0)
        generator = torch.Generator().manual_seed(number)
        weights = load_file(path / "model.safetensors")
        moved = {
            key: value + 0.02 * number * torch.randn(value.shape, generator=generator) for key, value in weights.items()
        }
        save_file(moved, path / "model.safetensors", metadata={"format": "pt"})
    return [str(root / name) for name in ("base", "one", "two")]


@pytest.fixture
def flags(models: list[str]) -> list[str]:
    base, one, two = models
    return ["--base", base, "--model", f"{one}=0.7", "--model", f"{two}=0.3"]


def test_a_merge_says_what_it_made(rlhf, flags: list[str], tmp_path: Path) -> None:
    code, out, err = rlhf("merge", "ties", *flags, "--output", str(tmp_path / "out"), "--density", "0.3")
    assert (code, err) == (0, "")
    assert re.search(r"^merged: \d+ tensors, .* read, .* written, [\d.]+ s, .*/s$", out, re.MULTILINE)
    assert f"model: {tmp_path / 'out'}" in out and (tmp_path / "out/model.safetensors").is_file()
    code, out, _ = rlhf("merge", str(tmp_path / "out/merge.yaml"), "--output", str(tmp_path / "again"), "--json")
    result = json.loads(out)
    assert code == 0 and result["output"] == str(tmp_path / "again") and result["bytes_per_second"] > 0
    first, again = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert first.read_bytes() == again.read_bytes()


def test_a_dry_run_prints_the_plan_and_a_file_that_does_the_same(rlhf, flags: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ("merge", "ties", *flags, "--output", str(output), "--density", "0.3", "--dry-run")
    code, out, err = rlhf(*arguments)
    assert (code, err) == (0, "") and not any(tmp_path.iterdir())
    for text in (
        "# rlhf-core:ties",
        f"# base: {flags[1]} (20 tensors, ",
        "# tensors: 20 merged, 0 copied as they are, 0 left out as tied",
        f"# output: {output} (new)",
        "#   model.safetensors (",
        " free",
        "# memory: about ",
    ):
        assert text in out, text
    settings = yaml.safe_load(out)
    assert settings["density"] == 0.3 and settings["models"][0]["weight"] == 0.7 and settings["trim_scope"] == "tensor"
    path = tmp_path / "again.yaml"
    path.write_text(out)
    # The disk's free bytes are another program's business too.
    again = rlhf("merge", str(path), "--dry-run")[1]
    assert re.sub("[^ ]+ .B free", "", again) == re.sub("[^ ]+ .B free", "", out)
    plan = json.loads(rlhf(*arguments, "--json")[1])
    assert (
        plan["merged"] == 20
        and plan["config"] == settings
        and plan["bytes"] == sum(one["bytes"] for one in plan["files"])
    )
    assert [one["as"] for one in plan["inputs"]] == ["base", "model", "model"]
    output.mkdir()
    (output / "config.json").write_text("{}")
    assert "(not empty: needs --overwrite)" in rlhf(*arguments)[1]
    assert "(replaced)" in rlhf(*arguments, "--overwrite")[1]


def test_an_output_is_replaced_only_with_overwrite(rlhf, flags: list[str], tmp_path: Path) -> None:
    arguments = ("merge", "linear", *flags, "--output", str(tmp_path / "out"))
    assert rlhf(*arguments)[0] == 0
    code, _, err = rlhf(*arguments)
    assert code == 7 and err.startswith(
        f"error[io] {tmp_path / 'out'}: holds a model already; fix: `--overwrite`, in Python `overwrite=True`, replaces it"
    )
    assert rlhf(*arguments, "--overwrite")[0] == 0
    code, _, err = rlhf(*arguments, "--overwrite", "--resume")
    assert code == 2 and "a merge is either continued or started over" in err


def test_a_file_of_mergekit_is_read_as_it_is(rlhf, models: list[str], tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    base, one, _ = models
    path.write_text(
        f"merge_method: slerp\nbase_model: {base}\nmodels: [{{model: {base}}}, {{model: {one}}}]\n"
        "parameters: {t: [0.1, 0.9]}\ndtype: bfloat16\n"
    )
    assert rlhf("merge", str(path), "--output", str(tmp_path / "out"))[0] == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    path.write_text(
        f"merge_method: dare_linear\nbase_model: {base}\nmodels: [{{model: {one}, parameters: {{weight: 1, density: 0.5}}}}]\n"
    )
    code, _, err = rlhf("merge", str(path), "--output", str(tmp_path / "dare"))
    assert code == 0 and "which differs: mergekit drops other entries" in err
    assert rlhf("merge", str(path), "--compat", "mergekit", "--output", str(tmp_path / "strict"))[0] == 2


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_an_input_is_not_written_over(rlhf, models: list[str], dry: list[str]) -> None:
    one = Path(models[1])
    before = {file.name: file.read_bytes() for file in one.iterdir()}
    code, _, err = rlhf("merge", "linear", "--model", models[1], "--output", models[1], "--overwrite", *dry)
    assert code == 2 and f"{one}: one of the inputs is in the output directory; got {one}/model.safetensors" in err
    assert {file.name: file.read_bytes() for file in one.iterdir()} == before


class Stopping(LinearMerger):
    """The weighted mean, during which the user presses Ctrl-C where `stop` is set."""

    stop = False

    def merge_chunk(self, chunk: Chunk, measured: None) -> Tensor:
        if self.stop and "layers.1" in chunk.name:
            raise KeyboardInterrupt
        return super().merge_chunk(chunk, measured)


def test_ctrl_c_says_how_to_continue(rlhf, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.register("merger", "stopping", Stopping)
    arguments = ("merge", "stopping", *flags, "--threads", "1", "--output", str(tmp_path / "out"))
    monkeypatch.setattr(Stopping, "stop", True)
    code, _, err = rlhf(*arguments)
    assert code == 130
    assert err == "error[interrupted] stopped by Ctrl-C; the same command with `--resume` continues the merge\n"
    assert "unfinished merge is there: continued" in rlhf(*arguments, "--dry-run", "--resume")[1]
    monkeypatch.setattr(Stopping, "stop", False)
    assert rlhf(*arguments, "--resume")[0] == 0
    monkeypatch.setattr(Stopping, "stop", True)
    code, _, err = rlhf(*arguments, "--overwrite")
    advice = "stopped by Ctrl-C; the same command with `--resume` in place of `--overwrite` continues the merge"
    assert code == 130 and advice in err
    monkeypatch.setattr(Stopping, "stop", False)
    assert rlhf(*arguments, "--resume")[0] == 0
    assert rlhf(*arguments[:-1], str(tmp_path / "plain"))[0] == 0
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    code, _, err = rlhf(*arguments[:-1], str(tmp_path / "none"), "--resume")
    assert code == 2 and "there is no unfinished merge" in err


SCORES = """
from pathlib import Path

def by_name(model):
    return {"one": 1.0, "two": 2.0}.get(Path(model).name, 0.5)

def nothing(model):
    return None

def broken(model):
    raise RuntimeError("no data")
"""


def test_greedy_soup_takes_a_function_that_scores(rlhf, models: list[str], tmp_path: Path) -> None:
    file = tmp_path / "scores.py"
    file.write_text(SCORES)
    chosen = ["--model", models[1], "--model", models[2], "--output", str(tmp_path / "out")]
    code, out, err = rlhf("merge", "greedy_soup", *chosen, "--evaluate", f"{file}:by_name")
    assert (code, err) == (0, "") and f"chosen: [{models[2]!r}]" in out and "score: 2.0" in out
    best = load_file(Path(models[2]) / "model.safetensors")
    assert all(value.equal(best[key]) for key, value in load_file(tmp_path / "out/model.safetensors").items())
    arguments = ("merge", "greedy_soup", *chosen, "--overwrite", "--evaluate")
    for name, code, message in (
        (f"{file}:by_nam", 2, f"evaluate: `{file}` has no `by_nam`; fix: did you mean `by_name`?"),
        (f"{file}", 2, "evaluate: isn't the name of an object in a module or file"),
        (f"{tmp_path}/gone.py:f", 2, f"evaluate: no such file; got {tmp_path}/gone.py"),
        (f"{file}:nothing", 5, f"{file}:nothing: the evaluation must return a number; got None"),
        (f"{file}:broken", 5, "raised; got RuntimeError: no data"),
    ):
        found, _, err = rlhf(*arguments, name)
        assert found == code and message in err and err.count("\n") == 1, err
    file.write_text("import nowhere_at_all\n")
    assert rlhf(*arguments, f"{file}:f")[0] == 5
    assert "linear doesn't evaluate models" in rlhf("merge", "linear", *chosen, "--evaluate", f"{file}:f")[2]
    assert "no evaluation is given" in rlhf("merge", "greedy_soup", *chosen, "--overwrite")[2]


def test_distances_as_a_table_and_as_json(rlhf, models: list[str], tmp_path: Path) -> None:
    code, out, err = rlhf("merge", "--diff", models[0], models[1])
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].split()[:3] == ["layer", "attention", "mlp"]
    assert [line.split()[0] for line in lines[2:7]] == ["embeddings", "0", "1", "norms", "all"]
    assert "farthest apart:" in out and "\x1b" not in out
    found = json.loads(rlhf("merge", "--diff", models[0], models[1], "--json")[1])
    base, one = (load_file(Path(model) / "model.safetensors") for model in models[:2])
    name = "model.layers.1.mlp.up_proj.weight"
    expected = (one[name] - base[name]).norm() / base[name].norm()
    assert found["tensors"][name]["relative"] == pytest.approx(float(expected), rel=1e-5)
    assert set(found["layers"]["0"]) == {"attention", "mlp", "norms", "all"}
    assert "all values are equal" in rlhf("merge", "--diff", models[0], models[0])[1]


def test_distances_as_a_picture(rlhf, models: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "d.png"
    code, out, err = rlhf("merge", "--diff", models[0], models[1], "--picture", str(path))
    assert (code, err) == (0, "") and f"picture: {path}" in out
    assert path.read_bytes().startswith(b"\x89PNG")


FAULTS = {
    ("merge",): (2, "error[config] command line: the first argument must be a method or a file; fix: `rlhf merge METHOD"),
    ("merge", "--base", "b"): (2, "error[config] command line: the first argument must be a method or a file; got `--base`"),
    ("merge", "tis", "--model", "a"): (2, "error[config] command line: unknown merger `tis`; fix: did you mean `ties`?"),
    ("merge", "gone.yaml"): (2, "error[config] gone.yaml: no such file"),
    ("merge", "ties", "--model", "a", "--densty", "1"): (2, "error[config] --densty: unknown option `densty` of ties"),
    ("merge", "ties", "--model", "a", "--output", "o"): (2, "error[config] base: ties works on differences from a base model"),
    ("merge", "linear", "--model", "./gone", "--output", "o"): (4, "error[model] ./gone: no such model directory or file"),
    ("merge", "linear", "--model", ".=nan"): (2, "error[config] --model: the weight of . is not a finite number; got `nan`"),
    ("merge", "ties", "--model", "a", "--density", "[]"): (2, "error[config] --density: a list over the layers needs"),
    ("merge", "ties", "--model", "a", "--lambda", "1"): (2, "error[config] --lambda: unknown option `lambda` of ties"),
    ("merge", "linear", "--model", "./gone"): (2, "error[config] output: no output directory is set; fix: give `--output DIR`"),
    ("merge", "slerp", "--model", "a", "--model", "b", "--model", "c", "--output", "o"):
        (2, "error[config] models: slerp merges 1 to 2 models"),
    ("merge", "--diff", "a"): (2, "error[config] rlhf: option '--diff' requires 2 arguments"),
    ("merge", "--diff", "./a", "./b"): (4, "error[model] ./a: no such model directory or file"),
    ("merge", "--diff", "a", "b", "c"): (2, "error[config] --diff: unexpected argument; got `c`"),
    ("merge", "--diff", "a", "b", "--densty", "1"): (2, "error[config] --diff: unexpected argument; got `--densty`"),
    ("merge", "--picture", "d.png"): (2, "error[config] --picture: there is nothing to draw without `--diff`"),
}  # fmt: skip


@pytest.mark.parametrize("arguments", FAULTS, ids=" ".join)
def test_a_users_error_is_one_line_with_its_exit_code(rlhf, arguments: tuple[str, ...]) -> None:
    code, out, err = rlhf(*arguments)
    expected, line = FAULTS[arguments]
    assert (code, out) == (expected, "") and err.startswith(line) and err.count("\n") == 1, err


def test_help_and_completion_load_nothing_heavy() -> None:
    code = (
        "import sys; from rlhf_core.cli import main; main(['merge', '--help']);"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]" and "--diff" in done.stdout and "mergekit" in done.stdout
    environment = {**os.environ, "_RLHF_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "rlhf merge t"}
    done = subprocess.run([sys.executable, "-m", "rlhf_core"], env=environment, capture_output=True, text=True)
    assert "ties" in done.stdout and "task_arithmetic" in done.stdout and "dpo" not in done.stdout


def test_validate_points_to_the_dry_run(rlhf, models: list[str], tmp_path: Path) -> None:
    path = tmp_path / "merge.yaml"
    for text in (f"method: ties\nmodels: [{models[1]}]\n", f"merge_method: ties\nmodels: [{{model: {models[1]}}}]\n"):
        path.write_text(text)
        code, out, err = rlhf("validate", str(path))
        assert (code, out) == (2, "")
        assert (
            err == f"error[config] {path}: configures a merge, not a training run; fix: `rlhf merge {path} --dry-run`\n"
        )
    path.write_text("method: tis\n")
    assert "unknown trainer `tis`" in rlhf("validate", str(path))[2]


def test_a_terminal_shows_bytes_as_they_are_written(flags: list[str], tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "rlhf_core", "merge", "linear", *flags, "--output", str(tmp_path / "out")]
    done = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=slave, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    )
    assert done.wait() == 0
    os.close(slave)
    text = os.read(master, 1 << 16).decode()
    assert "merging" in text and re.search(r"[kM]?B", text)
