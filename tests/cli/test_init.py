"""`rlhf init` writes a file that validates as it stands, apart from its paths, with a schema that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from rlhf_core import registry
from rlhf_core.training.job import load_job

TRAINERS = sorted(registry.trainers)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("method", TRAINERS)
def test_the_file_is_a_valid_configuration(rlhf, method: str) -> None:
    """With defaults that are the method's, so that nothing changes by their being written."""
    code, out, err = rlhf("init", method)
    assert (code, err) == (0, "") and out.startswith(f"wrote {method}.yaml, and {method}.schema.json")
    job = load_job(Path(f"{method}.yaml"))
    given = yaml.safe_load(Path(f"{method}.yaml").read_text())
    assert given["method"] == method and job.run.output == f"runs/{method}"
    written = {name: value for name, value in given.items() if name in type(job.options).model_fields}
    defaults = type(job.options).model_construct()
    for name in written.keys() - {"rewards", "teacher", "generation"}:
        assert getattr(job.options, name) == getattr(defaults, name), name


@pytest.mark.parametrize("method", TRAINERS)
def test_the_file_fits_the_schema_that_it_names(rlhf, method: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    rlhf("init", method)
    text = Path(f"{method}.yaml").read_text()
    schema = json.loads(Path(text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(text), schema)
    every = "\n".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith(("# ", "#")) is False)
    assert yaml.safe_load(every) == yaml.safe_load(text)


def test_what_is_commented_out_is_valid_too(rlhf) -> None:
    rlhf("init", "sft")
    lines = Path("sft.yaml").read_text().splitlines()
    options = {"eval_data", "max_steps", "lora", "dataset", "checkpoint", "logging", "early_stopping", "eval_steps"}
    switched = [line[2:] if line.startswith("# ") and line[2:].partition(":")[0] in options else line for line in lines]
    assert sum(a != b for a, b in zip(lines, switched, strict=True)) == len(options)
    Path("all.yaml").write_text("\n".join(switched))
    job = load_job(Path("all.yaml"))
    assert job.options.lora is not None and job.run.eval_data == "path/to/heldout.jsonl"


def test_nothing_is_overwritten(rlhf) -> None:
    assert rlhf("init", "dpo", "conf/mine.yaml")[0] == 0
    assert {path.name for path in Path("conf").iterdir()} == {"mine.yaml", "mine.schema.json"}
    assert Path("conf/mine.yaml").read_text().startswith("# yaml-language-server: $schema=mine.schema.json\n")
    Path("conf/mine.yaml").write_text("method: dpo\n")
    code, _, err = rlhf("init", "dpo", "conf/mine.yaml")
    assert code == 7 and "conf/mine.yaml: the file exists" in err
    assert Path("conf/mine.yaml").read_text() == "method: dpo\n"


def test_mistakes_are_named(rlhf) -> None:
    code, _, err = rlhf("init", "dpoo")
    assert code == 2 and "did you mean `dpo`" in err
    assert "ends in .yaml" in rlhf("init", "dpo", "notes.txt")[2]


def test_validate_names_the_paths_alone(rlhf) -> None:
    rlhf("init", "sft")
    code, _, err = rlhf("validate", "sft.yaml")
    lines = err.splitlines()
    assert code != 0 and len(lines) == 2
    assert (
        "path/to/model: no such model directory or file" in lines[0] and "path/to/rows.jsonl: no such file" in lines[1]
    )
