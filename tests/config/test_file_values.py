"""What a configuration file may leave to where it is used: variables, the user's home, and paths that start at the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_core.config.file_paths import find_beside
from rlhf_core.config.yaml_file import dump_yaml, load_yaml
from rlhf_core.data.open_source import check_paths
from rlhf_core.infra.errors import ConfigError, DataError, ModelError
from rlhf_core.infra.model_files import locate
from rlhf_core.infra.redact import redact
from rlhf_core.pipeline.recipe import read_recipe
from rlhf_core.training.job import load_job


def loaded(folder: Path, text: str) -> dict[str, Any]:
    (folder / "run.yaml").write_text(text)
    return load_yaml(folder / "run.yaml")[0]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "12")
    monkeypatch.setenv("DATA", "/rows")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("${STEPS}", 12),
        ('"${STEPS}"', "12"),
        ("${DATA}/a.jsonl", "/rows/a.jsonl"),
        ("[x, '${DATA}/${STEPS}']", ["x", "/rows/12"]),
        ("{path: '${DATA}'}", {"path": "/rows"}),
        ("${UNSET:-3e-4}", 3e-4),
        ("${EMPTY:-7}", 7),
        ("${EMPTY}", None),
        ("'${EMPTY}'", ""),
        ("${UNSET:-}", None),
        ("$${DATA}", "${DATA}"),
        ("${stages.sft.model}", "${stages.sft.model}"),  # a recipe's reference
        (r"'\$?\d+ $DATA ${'", r"\$?\d+ $DATA ${"),
        ("~/models/m", "/home/me/models/m"),
        ("~", None),
        ("'~ is a sign/x'", "~ is a sign/x"),
    ],
)
def test_variables_and_the_home_in_values(variables: None, tmp_path: Path, written: str, value: Any) -> None:
    assert loaded(tmp_path, f"key: {written}\n") == {"key": value}


def test_keys_and_comments_are_left_alone(variables: None, tmp_path: Path) -> None:
    assert loaded(tmp_path, "# ${UNSET}\n'${DATA}': 1\n") == {"${DATA}": 1}


def test_every_variable_that_is_not_set_is_named(variables: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, "data: ${UNSET}/a\nmodel: m\noutput: ${UNSET_TOO}\n")
    first, second = caught.value, caught.value.also[0]
    assert str(first).startswith(f"{tmp_path}/run.yaml:1: the environment variable `UNSET` isn't set; got `${{UNSET}}`")
    assert "${UNSET:-default}" in str(first) and "$${UNSET}" in str(first)
    assert f"{tmp_path}/run.yaml:3: the environment variable `UNSET_TOO`" in str(second)


def test_a_bare_variable_within_braces_is_explained(variables: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.yaml:1: not valid YAML.*put a value with `.*` in quotes"):
        loaded(tmp_path, "data: {path: ${DATA}}\n")


def test_values_that_are_written_are_read_as_they_were(variables: None, tmp_path: Path) -> None:
    values = {"pattern": "${DATA} $${DATA} \\${", "list": [{"a": "${UNSET}"}], "reference": "${stages.a.model}"}
    assert loaded(tmp_path, dump_yaml(values)) == values
    assert yaml.safe_load(dump_yaml({"a": "plain"})) == {"a": "plain"}


def test_the_record_has_no_secret_of_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wherever it stands; the file itself is recorded as it was written."""
    monkeypatch.setenv("MY_API_KEY", "open-sesame-42")
    text = "method: sft\nmodel: m\ndata: 'https://host/${MY_API_KEY}/rows'\n"
    (tmp_path / "run.yaml").write_text(text)
    job = load_job(tmp_path / "run.yaml")
    assert job.run.data == "https://host/open-sesame-42/rows"
    assert "sesame" not in job.to_yaml() and job.config_input == text
    assert redact({"url": ["x open-sesame-42"]}) == {"url": ["x [redacted]"]}


# Paths


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `conf` beside the working directory, with rows and a model."""
    conf, here = tmp_path / "conf", tmp_path / "here"
    for folder in (conf / "rows", conf / "model", conf / "sft", here):
        folder.mkdir(parents=True)
    (conf / "model/config.json").write_text("{}")
    (conf / "rows/a.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    monkeypatch.chdir(here)
    return conf


def test_a_path_is_looked_for_here_and_then_beside_the_file(beside: Path) -> None:
    file = beside / "run.yaml"
    file.write_text("method: sft\nmodel: model\ndata: [rows/a.jsonl, {path: rows/*.jsonl, weight: 2}]\noutput: sft\n")
    run = load_job(file).run
    assert (run.model, run.output, run.method) == (f"{beside}/model", "sft", "sft")
    assert run.model_dump()["data"][0] == f"{beside}/rows/a.jsonl"
    assert run.model_dump()["data"][1]["path"] == f"{beside}/rows/*.jsonl"
    Path("rows").mkdir()
    Path("rows/a.jsonl").write_text("")
    assert load_job(file).run.model_dump()["data"][0] == "rows/a.jsonl"


def test_a_relative_file_gives_relative_paths(beside: Path) -> None:
    values = {"data": "rows/a.jsonl", "rewards": ["own.py:score"], "dataset": {"columns": {"prompt": "rows/a.jsonl"}}}
    (beside / "own.py").write_text("")
    found = find_beside(values, "../conf/run.yaml")
    assert found["data"] == "../conf/rows/a.jsonl" and found["rewards"] == ["../conf/own.py:score"]
    assert found["dataset"] == values["dataset"]


def test_names_on_the_hub_to_push_to_and_tokens_are_no_paths(beside: Path) -> None:
    (beside / "owner/name").mkdir(parents=True)
    values = {
        "push_to_hub": "owner/name", "new_tokens": ["owner/name"], "dataset": {"special_tokens": ["owner/name"]},
        "generation": {"stop": "owner/name"}, "freeze": ["owner/name"],
    }  # fmt: skip
    assert find_beside(values, beside / "run.yaml") == values
    assert (
        find_beside({"push_to_hub": {"repo": "owner/name"}}, beside / "run.yaml")["push_to_hub"]["repo"] == "owner/name"
    )
    # A model or data of that name are what is there, as in the working directory.
    assert find_beside({"model": "owner/name"}, beside / "run.yaml")["model"] == f"{beside}/owner/name"


def test_the_message_says_where_a_path_was_looked_for(beside: Path) -> None:
    file = beside / "run.yaml"
    file.write_text("method: sft\nmodel: models/tiny/\ndata: rows/b.jsonl\n")
    run = load_job(file).run
    here = Path.cwd()
    where = rf"in the working directory \({here}\), nor beside the configuration \({beside}\)"
    with pytest.raises(DataError, match=rf"no such file {where}; fix: {beside}/rows has a.jsonl"):
        check_paths(run.data)
    with pytest.raises(ModelError, match=rf"no such model directory or file {where}"):
        locate(run.model)
    with pytest.raises(DataError, match=r"^other.jsonl: no such file$"):
        check_paths("other.jsonl")


def test_what_a_run_recorded_starts_where_it_ran(beside: Path) -> None:
    (beside / "run.json").write_text("{}")
    assert find_beside({"model": "model"}, beside / "config.yaml") == {"model": "model"}


def test_stages_of_a_recipe_are_no_paths(beside: Path) -> None:
    (beside / "recipe.yaml").write_text(
        "model: model\noutput: out/x\nstages:\n"
        "  - {method: sft, data: rows/a.jsonl}\n  - {method: dpo, model: sft, data: x.jsonl}\n"
    )
    read = read_recipe(beside / "recipe.yaml")
    assert read.recipe.model == f"{beside}/model" and read.recipe.output == "out/x"
    assert read.stages[0].values["data"] == f"{beside}/rows/a.jsonl"
    assert read.stages[1].values["model"] == "sft"


@pytest.mark.parametrize("name", ["${DATA}/a.jsonl", "$DATA/a.jsonl"])
def test_a_variable_that_nothing_expanded(name: str) -> None:
    with pytest.raises(DataError, match="stands for itself here: the shell expands it outside of single quotes"):
        check_paths(name)
    with pytest.raises(ModelError, match="stands for itself here"):
        locate(name)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("PGPASSWORD", "hunter2secret", True),
        ("WANDB_KEY", "abcdef123456", True),
        ("DB_PASS", "open-sesame", True),
        ("STOP_TOKEN", "<|end|>", False),
        ("TOOL_TOKEN", "[TOOL]", False),
        ("COMPASS", "north-west", False),
        ("MONKEY", "a-capuchin", False),
    ],
)
def test_secrets_are_told_by_the_names_of_their_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, secret: bool
) -> None:
    monkeypatch.setattr("rlhf_core.infra.redact._REMEMBERED", set())
    monkeypatch.setenv(name, value)
    values = loaded(tmp_path, f"a: 'x ${{{name}}} y'\n")
    assert redact(values) == {"a": "x [redacted] y" if secret else f"x {value} y"}


def test_a_record_without_its_secrets_is_no_configuration(tmp_path: Path) -> None:
    """What stands in their place would be taken for the values; flags may give them again."""
    (tmp_path / "run.yaml").write_text("method: sft\nmodel: m\ndata: d\nnew_tokens: ['a', '[redacted]']\n")
    with pytest.raises(
        ConfigError, match=r"run.yaml:4: `new_tokens.1` is a secret, which records leave out; fix: give"
    ):
        load_job(tmp_path / "run.yaml")
    assert load_job(tmp_path / "run.yaml", flags=["--new_tokens", "[<x>]"]).options.new_tokens == ["<x>"]
