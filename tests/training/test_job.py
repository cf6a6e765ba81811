"""Jobs: a method or a file with flags, made into checked configurations; every fault names its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig
from rlhf_core.config.flags import convert, lex
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.training.job import TrainingJob, load_job

HERE = "--model m --data d.jsonl --output o"


def job(flags: str, target: str | Path = "dpo") -> TrainingJob:
    return load_job(target, flags=f"{HERE} {flags}".split())


def fault(flags: str, target: str | Path = "dpo") -> str:
    with pytest.raises(ConfigError) as raised:
        job(flags, target)
    assert raised.value.exit_code == 2
    return raised.value.line()


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_every_option_is_a_flag_in_any_spelling() -> None:
    flags = (
        "--beta 0.2 --learning-rate 1e-7 --max_steps=20 --lora.rank 8 --lora.target-modules q_proj --lora.target-modules v_proj"
        " --gradient_checkpointing --dataset.streaming true --dataset.columns.prompt question --max_grad_norm null"
        " --logging.project 2024 --logging.trackers [wandb,tensorboard]"
    )
    options = job(flags).options.model_dump()
    assert (options["beta"], options["learning_rate"], options["max_steps"]) == (0.2, 1e-7, 20)
    assert options["lora"]["rank"] == 8 and options["lora"]["target_modules"] == ["q_proj", "v_proj"]
    assert options["gradient_checkpointing"] is True and options["dataset"]["streaming"] is True
    assert options["dataset"]["columns"] == {"prompt": "question"} and options["max_grad_norm"] is None
    assert options["logging"]["project"] == "2024" and options["logging"]["trackers"] == ["wandb", "tensorboard"]


def test_run_keys_are_flags_and_lists_repeat() -> None:
    flags = "--model 7 --data a --data b --eval_data c --eval-data d --output yes"
    run = load_job("sft", flags=flags.split()).run
    assert (run.model, run.data, run.eval_data, run.output) == ("7", ["a", "b"], ["c", "d"], "yes")


def test_defaults_give_way_to_the_preset_that_to_the_file_and_that_to_flags(file) -> None:
    path = file("method: dpo\nmodel: m\ndata: d\npreset: 7b\nbatch_size: 32\nlora: {alpha: 8}\nmax_length: 99\n")
    settled = load_job(path, flags=["--max_length", "100", "--lora.dropout", "0.1"])
    options = settled.options
    assert (options.warmup_ratio, options.precision) == (0.03, "bf16")  # a default, the preset
    assert (options.batch_size, options.max_length) == (32, 100)
    lora = options.lora
    assert (lora.rank, lora.alpha, lora.dropout, lora.target_modules) == (16, 8.0, 0.1, "all-linear")
    assert settled.places["batch_size"] == f"{path}:5" and settled.places["max_length"] == "--max_length"
    assert settled.places["precision"] == "preset `7b`"


def test_overrides_from_python_are_typed_values(file) -> None:
    path = file("method: dpo\nmodel: m\ndata: d\n")
    settled = load_job(path, {"beta": 0.3, "lora.rank": 4, "model": "other"})
    assert (settled.options.beta, settled.options.lora.rank, settled.run.model) == (0.3, 4, "other")


def test_a_preset_has_a_rate_for_its_adapters_unless_one_is_given_or_none_are_trained() -> None:
    settled = job("--preset 7b")
    assert settled.options.learning_rate == pytest.approx(1e-5)  # ten times DPO's
    assert settled.places["learning_rate"] == "preset `7b`"
    assert job("--preset 7b --learning_rate 2e-6").options.learning_rate == 2e-6
    assert job("--preset 7b --lora null").options.learning_rate == pytest.approx(1e-6)


def test_switching_a_group_on_keeps_what_fills_it(file) -> None:
    for flags in ("--lora --lora.rank 8", "--lora.rank 8 --lora"):
        assert job(flags).options.lora.rank == 8
    assert job("--lora").options.lora.rank == 16 and job("--lora false").options.lora is None
    assert job("--preset 70b --lora").options.lora.rank == 32

    path = file("method: dpo\nmodel: m\ndata: d\nlora: false\n")
    assert load_job(path, flags=["--lora.rank", "4"]).options.lora.rank == 4
    assert fault("--lora false --lora.rank 8") == (
        "error[config] --lora.rank: `lora.rank` is set but `lora` is off; fix: remove one of the two"
    )


FLAG_FAULTS = {
    "--bta 1": "--bta: unknown option `bta` of dpo; fix: did you mean `--beta`?",
    "--modle x": "--modle: unknown option `modle`; fix: did you mean `--model`?",
    "--lora.rnk 8": "--lora.rnk: unknown option `lora.rnk` of dpo; fix: did you mean `--lora.rank`?",
    "--rank 8": "--rank: unknown option `rank` of dpo; fix: did you mean `--lora.rank`?",
    "--beta": "--beta: needs a value; fix: write `--beta VALUE`",
    "--beta 1 --beta 2": "--beta: given 2 times, but it takes one value; got `1` and `2`",
    "--beta 1 2": "command line: unexpected argument; got `2`",
    "--data a b": "command line: unexpected argument; got `b`; fix: quote a value with blanks; give a list as `--data A",
    "-beta 1": "command line: unexpected argument; got `-beta`; fix: options are written `--name value`",
    "--beta -1": "--beta: must be greater than 0; got -1",
    "--learning_rate -1e-5": "--learning_rate: must be greater than 0; got -1e-05",
    "--learning-rate nan": "--learning-rate: must be a finite number; got 'nan'",
    "--max_steps 0": "--max_steps: must be greater than or equal to 1; got 0",
    "--loss_type sigmod": "--loss_type: must be 'sigmoid', 'robust',",
    "--lora maybe": "--lora: expected a group of options (rank, alpha,",
    "--lora.target_modules 3 --lora.rank x": "--lora.rank: must be a whole number",
    "--preset 9b": "--preset: unknown preset `9b`; fix: use one of: 70b, 7b",
    "--method dpoo": "--method: unknown trainer `dpoo`; fix: did you mean `dpo`?",
}  # fmt: skip


@pytest.mark.parametrize("flags", FLAG_FAULTS)
def test_a_wrong_flag_is_one_line_that_names_it(flags: str) -> None:
    line = fault(flags)
    assert line.startswith(f"error[config] {FLAG_FAULTS[flags]}") and "\n" not in line


FILE_FAULTS = {
    "method: dpo\nmodel: m\ndata: d\nbta: 1\n": ":4: unknown option `bta` of dpo; fix: did you mean `beta`?",
    "method: dpo\nmodle: m\ndata: d\n": ":2: unknown option `modle` of dpo; fix: did you mean `model`?",
    "method: dpoo\nmodel: m\ndata: d\n": ":1: unknown trainer `dpoo`; fix: did you mean `dpo`?",
    "model: m\ndata: d\n": ": `method` is missing; fix: set it to one of: context_compressor, cpo, distill, dpo,",
    "method: no\nmodel: m\ndata: d\n": ":1: `method` is not a name; got False",
    "method: dpo\ndata: d\n": ": `model` is missing; fix: give `--model`, or `model:` in the file",
    "method: dpo\nmodel: m\ndata: 5\n": ":3: `data`: must be a path or hub name, or a list of such; got 5",
    "method: dpo\nmodel: m\ndata: d\nlora:\n  rank: 0\n": ":5: `lora.rank`: must be greater than or equal to 1; got 0",
    "method: dpo\nmodel: m\ndata: d\nbeta: 1\nbeta: 2\n": ":5: duplicate key `beta` (lines 4 and 5)",
    "method: dpo\nmodel: m\ndata: d\nbeta: yes please\n": ":4: `beta`: must be a number",
    "- dpo\n": ": expected a mapping of options to values; got ['dpo']",
    "method: [\n": ":2: not valid YAML",
    "method: &a dpo\nmodel: *a\n": ":2: YAML aliases are not accepted; got *a",
}  # fmt: skip


@pytest.mark.parametrize("text", FILE_FAULTS)
def test_a_wrong_file_is_one_line_that_names_file_and_line(file, text: str) -> None:
    path = file(text)
    with pytest.raises(ConfigError) as raised:
        load_job(path)
    assert raised.value.line().startswith(f"error[config] {path}{FILE_FAULTS[text]}")


def test_numbers_without_a_dot_are_numbers(file) -> None:
    assert load_job(file("method: dpo\nmodel: m\ndata: d\nlearning_rate: 1e-5\n")).options.learning_rate == 1e-5


def test_a_missing_file_is_told_apart_from_an_unknown_method(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"nothing\.yaml: no such file"):
        load_job("nothing.yaml")
    Path("run.yaml").write_text("method: dpo\n")
    with pytest.raises(ConfigError, match=r"unknown trainer `run`; fix: write `run\.yaml` for the file"):
        load_job("run")


def test_a_file_of_rows_is_no_configuration_and_no_argument(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(ConfigError, match=r"rows\.jsonl: is a file of rows, not a configuration; fix: `rlhf data "):
        load_job(str(rows))
    with pytest.raises(ConfigError, match=r"unexpected argument; .*, as `--data .*rows\.jsonl`$"):
        load_job("sft", flags=[str(rows)])
    with pytest.raises(
        ConfigError, match=r"several files are a list; .*`\[\{path: a, share: 0\.7\}, \{path: b, share: 0\.3\}\]`"
    ):
        load_job("sft", {"model": "m", "data": {"a": 0.7, "b": 0.3}})


def test_a_broken_method_keeps_its_own_error(install) -> None:
    install("acme", {"acme.py": "class Mine(:"}, trainers={"mine": "acme:Mine"})
    with pytest.raises(PluginError, match=r"trainer `mine` of acme 1\.0"):
        job("", "mine")


def test_the_resolved_file_describes_the_same_job(tmp_path: Path) -> None:
    first = job("--preset 7b --beta 0.2 --lora.rank 8 --dataset.columns.prompt question --learning_rate 1e-7")
    path = tmp_path / "resolved.yaml"
    path.write_text(first.to_yaml())
    again = load_job(path)
    assert again.options == first.options and again.run == first.run


class SecretConfig(BaseConfig):
    api_key: str = "none"


def test_secrets_are_redacted_in_all_that_is_handed_on(file) -> None:
    path = file("method: dpo\nmodel: https://me:hunter2@host/model\ndata: d\noutput: o\n")
    settled = load_job(path)
    trainer = settled.trainer(command="rlhf train dpo --hub_token hf_abcdefghijklmnopqrstuvwx")
    inputs = trainer.run_inputs
    assert inputs is not None and inputs["plugin"]["qualified"] == "rlhf-core:dpo"
    for text in (settled.to_yaml(), inputs["config_input"], inputs["command"]):
        assert "hunter2" not in text and "hf_abc" not in text and "[redacted]" in text
    assert "micro_batch_tokens" in settled.to_yaml()  # no secret
    assert settled.run.model == "https://me:hunter2@host/model"  # what is used stays whole


def test_the_trainer_gets_what_the_job_says() -> None:
    trainer = job("--beta 0.2 --eval_data e.jsonl").trainer()
    assert type(trainer) is registry.get("trainer", "dpo")
    assert (trainer.model, trainer.data, trainer.eval_data, str(trainer.output)) == ("m", "d.jsonl", "e.jsonl", "o")
    assert trainer.config.beta == 0.2
    given = "method: dpo\nmodel: m\ndata: d.jsonl\neval_data: e.jsonl\noutput: o\nbeta: 0.2\n"
    assert trainer.run_inputs["config_input"] == f"# from the command line\n{given}"


def test_a_run_without_a_directory_gets_one_of_its_own(monkeypatch) -> None:
    assert load_job("dpo", flags=["--model", "m", "--data", "d"]).run.output.startswith("runs/dpo-20")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="need the same run directory, and none is set; fix: give `--output DIR`"):
        load_job("dpo", flags=["--model", "m", "--data", "d"])


def test_flags_are_cut_by_their_dashes() -> None:
    cut = [(flag.key, flag.text) for flag in lex(["--a-b", "-1e-5", "--c", "--d=", "--e=x=y", "--f", "a b"])]
    assert cut == [("a_b", "-1e-5"), ("c", None), ("d", ""), ("e", "x=y"), ("f", "a b")]
    values, places = convert(lex(["--api-key", "0123"]), SecretConfig, owner="secret")
    assert values == {"api_key": "0123"} and places == {"api_key": "--api-key"}
