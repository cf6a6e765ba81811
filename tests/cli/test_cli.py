"""The command line as a user meets it: results on stdout, one line on stderr for a fault, the exit code of its kind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_core import registry
from rlhf_core.cli import main

KEYS = ["kind", "name", "qualified", "distribution", "version", "summary", "record", "stage", "api", "status", "reason"]


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlhf_core", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_the_list_as_json_has_exactly_these_keys(rlhf) -> None:
    code, out, err = rlhf("list", "--json")
    plugins = json.loads(out)
    assert (code, err) == (0, "")
    assert all(list(plugin) == KEYS for plugin in plugins)
    assert {"rlhf-core:sft", "rlhf-core:dpo"} <= {plugin["qualified"] for plugin in plugins}
    assert json.loads(rlhf("list", "trainers", "--json")[1]) == [p for p in plugins if p["kind"] == "trainer"]


def test_the_list_for_people_says_what_is_wrong(rlhf, install) -> None:
    install("acme-broken", {"acme_broken.py": "raise ImportError('no GPU')"}, trainers={"theirs": "acme_broken:Gone"})
    code, out, _ = rlhf("list")
    line = next(line for line in out.splitlines() if "theirs" in line)
    assert code == 0 and "broken" in line and "`Gone` isn't defined in `acme_broken`" in line
    assert "\x1b" not in out  # no colours without a terminal


def test_typer_and_the_short_way_print_the_same_list(rlhf) -> None:
    from rlhf_core.cli.app import run

    short = rlhf("list", "trainers", "--json")[1]
    assert run(["list", "trainers", "--json"]) == 0
    assert rlhf("list", "--json", "trainers")[1].endswith(short)


def test_check_loads_each_and_shows_what_that_reveals(rlhf, install) -> None:
    source = 'raise RuntimeError("no licence")\nclass Mine:\n    """Mine."""\n    api = 1\n    record = "sft"\n'
    install("acme", {"acme.py": source}, trainers={"mine": "acme:Mine"})
    status = {p["name"]: p["status"] for p in json.loads(rlhf("list", "--json")[1])}
    assert status["mine"] == "ok"
    checked = {p["name"]: p for p in json.loads(rlhf("list", "--json", "--check")[1])}
    assert checked["mine"]["status"] == "broken" and "no licence" in checked["mine"]["reason"]
    assert checked["sft"]["status"] == "ok"


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["list", "--json"],
        ["--help"],
        ["show", "dpo"],
        ["--version"],
        ["train", "--help"],
        ["train", "grpo", "--help"],
        ["sample", "--help"],
        ["compare-samplers", "--help"],
        ["chat", "--help"],
        ["train", "dpoo", "--model", "m"],
        ["train", "gone.yaml"],
    ],
)
def test_what_lists_and_shows_or_names_a_mistyped_method_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from rlhf_core.cli import main; main(sys.argv[1:]);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'trl') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("arguments", [["list", "--json"], ["show", "dpo"]], ids=lambda arguments: arguments[0])
def test_listing_and_showing_import_less_than_typer_and_rich_do(arguments: list[str]) -> None:
    """Nearly all of their time goes into imports: they take about twice that of `import typer, rich` at most."""
    code = (
        "import sys; before = set(sys.modules); exec(sys.argv.pop(1));"
        "print(*sorted(set(sys.modules) - before), file=sys.stderr)"
    )

    def imported(what: str, *arguments: str) -> set[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, what, *arguments], capture_output=True, text=True, check=True
        )
        return set(done.stderr.split())

    ours = imported("from rlhf_core.cli import main; main(sys.argv[1:])", *arguments)
    assert "rlhf_core.registry" in ours and not ours & {"typer", "rich", "click", "pydantic", "yaml"}
    assert len(ours) <= len(imported("import typer, rich"))


def test_show_tells_all_that_the_source_says(rlhf) -> None:
    code, out, _ = rlhf("show", "DPO")
    assert code == 0
    for text in (
        "rlhf-core:dpo",
        "preference (prompt, chosen, rejected)",
        "stage      preference",
        "dpo.py:",
        "beta",
        "larger keeps the policy",
    ):
        assert text in out
    shown = json.loads(rlhf("show", "trainer:rlhf-core:dpo", "--json")[1])
    assert "beta" in {option["name"] for option in shown["options"]}


def test_show_all_lists_every_option_with_its_groups(rlhf) -> None:
    code, out, _ = rlhf("show", "trainer:reward_model", "--all")
    shown = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert code == 0 and {"learning_rate", "ensemble.size", "lora.rank", "dataset.streaming"} <= shown
    assert "rlhf show trainer:reward_model --all" in rlhf("show", "trainer:reward_model")[1]


def test_typer_and_the_short_way_show_the_same(rlhf) -> None:
    from rlhf_core.cli.app import run

    short = rlhf("show", "dpo", "--json")[1]
    assert run(["show", "dpo", "--json"]) == 0
    assert rlhf("show", "--json", "dpo")[1] == short * 2


def test_a_check_takes_a_time_limit(rlhf, install, monkeypatch) -> None:
    source = "import time\ntime.sleep(30)\nclass Mine:\n    api = 1\n"
    install("acme", {"acme.py": source}, rewards={"slow": "acme:Mine"})
    monkeypatch.setenv(registry.ALLOW_VARIABLE, "acme")
    code, out, _ = rlhf("list", "rewards", "--check", "--timeout", "1.5", "--json")
    slow = next(plugin for plugin in json.loads(out) if plugin["name"] == "slow")
    assert (code, slow["status"], slow["reason"]) == (0, "broken", "importing it takes longer than 1.5 s")
    assert rlhf("list", "--check", "--timeout", "0")[0] == 2


def test_show_tells_why_a_plugin_is_broken(rlhf, install) -> None:
    install("acme", {}, trainers={"mine": "acme_gone:Mine"})
    code, out, _ = rlhf("show", "mine")
    assert code == 0 and "package `acme_gone` isn't installed" in out


def test_schema_describes_every_option(rlhf) -> None:
    schema = json.loads(rlhf("schema", "dpo")[1])
    assert {"beta", "learning_rate", "lora"} <= set(schema["properties"])
    assert schema["additionalProperties"] is False


def test_validate_says_yes_or_why_not(rlhf, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: dpo\nmodel: m\ndata: d\nbeta: 0.2\n")
    code, out, err = rlhf("validate", str(path))
    assert (code, err) == (0, "") and out.startswith(f"ok: {path} is a valid configuration of rlhf-core:dpo\n")
    assert "data: d isn't a local path: its rows weren't read" in out
    path.write_text("method: dpo\nmodel: m\nbta: 0.2\n")
    code, out, err = rlhf("validate", str(path))
    assert (code, out) == (2, "") and err.startswith(f"error[config] {path}:3: unknown option `bta` of dpo")
    assert "`data` is missing" in err


def test_a_dry_run_prints_a_configuration_that_runs_the_same(rlhf, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    output = tmp_path / "out"
    arguments = [
        "train",
        "dpo",
        "--model",
        "m",
        "--data",
        str(data),
        "--output",
        str(output),
        "--beta",
        "0.2",
        "--dry-run",
    ]
    code, out, err = rlhf(*arguments)
    assert (code, err) == (0, "") and not output.exists()
    assert f"# data: file {data}, 48 bytes (record type `preference`)" in out
    assert f"# output: {output} (new)" in out and "beta: 0.2" in out
    path = tmp_path / "again.yaml"
    path.write_text(out)
    assert rlhf("train", str(path), "--dry-run")[1] == out
    output.mkdir()
    (output / "x").touch()
    code, out, err = rlhf(*arguments)
    assert (code, out) == (7, "") and err.startswith(
        f"error[io] {output}: is not empty and not a run's directory, so it is neither continued nor removed; got x; fix:"
    )


def test_a_dry_run_says_what_rows_are_read_as(rlhf, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    arguments = ("train", "sft", "--model", "m", "--data", str(path), "--dry-run")
    path.write_text('{"talk": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}\n')
    code, out, _ = rlhf(*arguments)
    assert code == 0
    assert "bytes (record type `sft`)" in out and "# rows are read as ShareGPT conversations: column `talk`" in out
    path.write_text('{"prompt": "a"}\n')
    code, _, err = rlhf(*arguments)
    assert code == 3 and f"error[data] {path}:1: no column `response`" in err


FAULTS = {
    ("lst",): (2, "error[config] rlhf: no such command 'lst'"),
    ("list", "trainr"): (2, "error[config] registry: unknown kind of plugin `trainr`; fix: did you mean `trainer`?"),
    ("list", "--jsn"): (2, "error[config] rlhf list: no such option: --jsn"),
    ("show",): (2, "error[config] rlhf show: missing argument 'NAME'; fix: see `rlhf show --help`"),
    ("show", "dpoo"): (2, "error[config] registry: unknown plugin `dpoo`; fix: did you mean `dpo`?"),
    ("train",): (2, "error[config] rlhf train: missing argument"),
    ("train", "dpoo"): (2, "error[config] command line: unknown trainer `dpoo`; fix: did you mean `dpo`?"),
    ("train", "--beta", "1", "dpo"): (2, "error[config] command line: the first argument must be a method or a file; got"),
    ("train", "dpo"): (2, "error[config] command line: `model` is missing; fix: give `--model`, or `model:` in the file"),
    ("train", "dpo", "--model", "m", "--data", "d", "--bta", "1"): (2, "error[config] --bta: unknown option `bta` of dpo"),
    ("train", "dpo", "--model", "m", "--data", "d", "--resume"): (2, "error[config] --resume: no run to continue is named"),
    ("train", "dpo", "--model", "m", "--data", "d", "--output", "o", "--resume", "--overwrite"): (2, "error[config] --resume"),
    ("train", "dpo", "--model", "m", "--data", "gone.jsonl", "--dry-run"): (3, "error[data] gone.jsonl: no such file"),
    ("train", "gone.yaml"): (2, "error[config] gone.yaml: no such file"),
    ("new", "trainer", "json"): (2, "error[config] NAME: an installed module has this name, and would be hidden; got `json`"),
    ("new", "trainer", "Acme_X"): (2, "error[config] NAME: a package's name has lower-case letters"),
    ("new", "hok", "acme-x"): (2, "error[config] registry: unknown kind of plugin `hok`; fix: did you mean `hook`?"),
    ("check", "reward:reward_model"): (2, "error[config] command line: `model` is missing; fix: set `model`"),
    ("check", "ties", "--densty", "1"): (2, "error[config] --densty: unknown option `densty` of rlhf-core:ties"),
    ("check", "sftt"): (2, "error[config] registry: unknown plugin `sftt`; fix: did you mean `sft`?"),
}  # fmt: skip


@pytest.mark.parametrize("arguments", FAULTS, ids=" ".join)
def test_a_users_error_is_a_line_with_its_exit_code(rlhf, arguments: tuple[str, ...]) -> None:
    code, out, err = rlhf(*arguments)
    expected, line = FAULTS[arguments]
    assert (code, out) == (expected, "") and err.startswith(line), err
    assert all(one.startswith("error[") for one in err.splitlines()), err


def test_a_plugin_that_cannot_load_is_exit_code_5(rlhf, install) -> None:
    source = 'raise RuntimeError("no\\nlicence")\nclass Mine:\n    api = 1\n    record = "sft"\n'
    install("acme", {"acme.py": source}, trainers={"mine": "acme:Mine"})
    code, out, err = rlhf("schema", "mine")
    assert (code, out) == (5, "") and err.count("\n") == 1
    assert (
        "error[plugin] trainer `mine` of acme 1.0 (acme:Mine): broken: importing it raised RuntimeError: no licence"
        in err
    )
    with pytest.raises(Exception, match="no licence") as raised:
        main(["schema", "mine", "--debug"])
    assert isinstance(raised.value.__cause__, RuntimeError)  # whose traceback `--debug` shows


def test_no_plugins_leaves_only_the_cores_own(rlhf, install, monkeypatch) -> None:
    monkeypatch.setenv(registry.ALLOW_VARIABLE, "")  # so that it is put back after the test
    install("acme", {"acme.py": ""}, trainers={"dpo": "acme:Gone", "mine": "acme:Gone"})
    code, out, _ = rlhf("--no-plugins", "list", "--json")
    status = {(p["distribution"], p["name"]): p["status"] for p in json.loads(out)}
    assert code == 0
    assert (status["acme", "dpo"], status["acme", "mine"], status["rlhf-core", "dpo"]) == ("disabled", "disabled", "ok")


def test_what_we_did_not_foresee_is_one_line_and_exit_code_1(rlhf, monkeypatch) -> None:
    def surprise(kind: str | None = None) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr(registry, "find", surprise)
    code, _, err = rlhf("list")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("error[internal] ValueError: two lines; fix: run it again with `--debug`")
    with pytest.raises(ValueError):
        main(["--debug", "list"])


def test_interrupts_and_full_disks_have_their_codes(rlhf, monkeypatch) -> None:
    def interrupted(kind: str | None = None) -> None:
        raise KeyboardInterrupt

    def full(kind: str | None = None) -> None:
        raise OSError(28, "No space left on device", "/runs/x")

    monkeypatch.setattr(registry, "find", interrupted)
    assert rlhf("list") == (130, "", "error[interrupted] stopped by Ctrl-C\n")
    monkeypatch.setattr(registry, "find", full)
    assert rlhf("list") == (7, "", "error[io] /runs/x: No space left on device\n")


@pytest.mark.parametrize("verb", [["list"], ["show", "dpo"]])
def test_a_reader_that_goes_away_is_no_traceback(verb: list[str]) -> None:
    pipe = subprocess.Popen([sys.executable, "-m", "rlhf_core", *verb], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert pipe.stdout is not None and pipe.stderr is not None
    pipe.stdout.close()
    assert (pipe.stderr.read(), pipe.wait()) == (b"", 1)


def test_help_comes_without_arguments() -> None:
    done = process()
    assert done.returncode == 0 and "Usage: rlhf" in done.stdout and done.stderr == ""


def test_the_version_is_printed() -> None:
    from rlhf_core import __version__

    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"rlhf-core {__version__}\n", "")


def on_a_terminal(*command: str, columns: int = 70, **environment: str) -> str:
    """Return what a command writes to a terminal of so many columns."""
    master, slave = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, *command],
        stdout=slave,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm", **environment},
    )
    os.close(slave)
    written = b""
    with contextlib.suppress(OSError):  # the end of the terminal
        while part := os.read(master, 65536):
            written += part
    os.close(master)
    assert done.wait() == 0
    return written.decode().replace("\r\n", "\n")


def test_the_table_is_wrapped_to_a_terminal() -> None:
    for columns, heading in ((70, "trainers"), (200, "kind")):
        written = on_a_terminal("-m", "rlhf_core", "list", columns=columns)
        text = re.sub(r"\x1b\[[0-9;]*m", "", written)
        assert f"\x1b[1m{heading}" in written and "preference" in text
        assert re.search(r"\bcontext_compressor\b", text)  # no name is broken
        assert max(len(line) for line in text.splitlines()) <= columns
    assert "\x1b" not in on_a_terminal("-m", "rlhf_core", "list", NO_COLOR="1")


def test_a_table_keeps_all_of_its_words_in_every_script_and_width() -> None:
    code = (
        "from rlhf_core.cli.printing import print_table;"
        "print_table(('name', 'text'), [('评分' * 9, 'words ' * 12 + 'x' * 50), ('e\u0301', '日本語')], styles=['red', ''])"
    )
    text = re.sub(r"\x1b\[[0-9;]*m", "", on_a_terminal("-c", code, columns=40))
    for characters, count in (("评", 9), ("words", 12), ("x", 50 + text.count("text")), ("日本語", 1)):
        assert text.count(characters) == count
    assert max(len(line) + sum(ord(one) > 0x2E80 for one in line) for line in text.splitlines()) <= 40


def test_the_shell_completes_verbs_and_methods() -> None:
    def complete(words: str) -> str:
        return process(_RLHF_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=words).stdout

    assert "validate" in complete("rlhf va")
    assert "dpo" in complete("rlhf train d") and "sft" in complete("rlhf show ")
    assert "trainer" in complete("rlhf list tr")
