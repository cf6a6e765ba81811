"""Names of other trainers' options are answered with what they are called here, and what differs."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest
from rlhf_plugins.trainers.dpo import DPOConfig

from rlhf_core import registry
from rlhf_core.config.fields import option_at
from rlhf_core.config.known_names import KNOWN, as_flags
from rlhf_core.config.run_file import RunConfig
from rlhf_core.infra.errors import ConfigError, did_you_mean, nearest_names
from rlhf_core.training.job import load_job

BASE = ["--model", "m", "--data", "d"]

ANSWERS = {
    ("sft", "num_train_epochs: 3"): "unknown option `num_train_epochs` of sft; fix: write `epochs`",
    ("sft", "lr: 1e-4"): "fix: write `learning_rate`",
    ("sft", "bf16: true"): "fix: write `precision: bf16`; products are in 16 bits",
    ("sft", "load_in_4bit: true"): "fix: write `lora: {quantize: 4bit}`",
    ("sft", "per_device_train_batch_size: 4"): "fix: write `batch_size`: rows per optimiser step over all devices",
    (
        "sft",
        "gradient_accumulation_steps: 4",
    ): "fix: write `batch_size`, the rows per optimiser step over all devices, with it",
    ("sft", "save_steps: 100"): "fix: write `checkpoint.every`: a number of steps",
    ("sft", "deepspeed: ds.json"): "fix: write `distributed.strategy`: several processes train by DDP",
    ("sft", "lora_r: 8"): "fix: write `lora.rank`",
    ("sft", "lora_target_modules: [q_proj]"): "fix: write `lora.target_modules`",
    ("sft", "report_to: wandb"): "fix: write `logging.trackers`",
    ("sft", "sequence_len: 512"): "fix: write `max_length`",
    ("sft", "output_dir: out"): "fix: write `output`",
    ("sft", "dataset_name: rows.jsonl"): "fix: write `data`",
    ("sft", "use_liger_kernel: true"): "fix: there is none here: the vocabulary projection",
    (
        "sft",
        "num_generations: 4",
    ): "fix: leave it out: `group_size`, as it is called here, is an option of other methods",
    ("grpo", "num_generations: 4"): "fix: write `group_size`",
    ("grpo", "beta: 0.04"): "fix: write `kl_weight`",
    ("dpo", "max_completion_length: 64"): "fix: write `max_length`",
    ("grpo", "max_completion_length: 64"): "fix: write `generation.max_new_tokens`",
    ("sft", "adapter: lora"): "fix: in axolotl `lora` or `qlora`, which here is `lora: {rank: 16, alpha: 32}`",
    ("sft", "dataset: alpaca"): "fix: in LLaMA-Factory the names of the data, which here is `data`",
    ("sft", "lora: {r: 8}"): "unknown option `lora.r`; fix: write `lora.rank`",
}


@pytest.mark.parametrize(("method", "line"), ANSWERS)
def test_a_name_of_another_trainer_in_a_file(tmp_path: Path, method: str, line: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"method: {method}\nmodel: m\ndata: d\n{line}\n" + "rewards: length\n" * (method == "grpo"))
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    assert ANSWERS[method, line] in str(caught.value) and f"{file}:4" in str(caught.value)


@pytest.mark.parametrize(("method", "line"), [one for one in ANSWERS if "{" not in one[1]])
def test_a_name_of_another_trainer_as_a_flag(method: str, line: str) -> None:
    name, _, value = line.partition(": ")
    with pytest.raises(ConfigError) as caught:
        load_job(method, flags=[*BASE, f"--{name.replace('_', '-')}", value])
    said = ANSWERS[method, line].partition("; ")[2 if "; fix" in ANSWERS[method, line] else 0]
    assert f"fix: {as_flags(said.removeprefix('fix: '))}" in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "fix"),
    [("--lr", "`--learning_rate`"), ("--bf16", "`--precision bf16`;"), ("--load_in_4bit", "`--lora.quantize 4bit`;")],
)
def test_a_flag_is_answered_as_a_flag(flag: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"fix: write {fix}"):
        load_job("sft", flags=[*BASE, flag, "1"])


def test_every_mistaken_name_of_a_file_is_answered(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "method: sft\nmodel_name_or_path: m\ndata: d\nlr: 1\nnum_train_epochs: 2\n"
    )  # no `model`, but by that name
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    found = [str(one) for one in (caught.value, *caught.value.also)]
    assert [one.partition(": ")[0] for one in found] == [f"{file}:{line}" for line in (2, 4, 5)]
    assert "write `model`" in found[0]


def test_keys_that_are_given_by_other_names_as_flags_are_not_missing_as_well() -> None:
    with pytest.raises(ConfigError) as caught:
        load_job("sft", flags=["--model_name_or_path", "m", "--dataset_name", "d"])
    found = [str(one) for one in (caught.value, *caught.value.also)]
    assert len(found) == 2 and "write `--model`" in found[0] and "write `--data`" in found[1]
    with pytest.raises(ConfigError, match=r"`config` of sft; fix: .*`rlhf train FILE.yaml"):
        load_job("sft", flags=["--config", "run.yaml"])


def test_from_python() -> None:
    with pytest.raises(ConfigError, match=r"^DPOConfig: unknown option `lr`; fix: write `learning_rate`$"):
        DPOConfig(lr=1e-4)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="it is `output` here, and is given to the trainer"):
        DPOConfig(output_dir="x")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="give it to the trainer, beside its configuration"):
        DPOConfig(model="x")  # type: ignore[call-arg]


def test_from_python_every_mistake_is_said() -> None:
    """Below the first one, where Python prints an error's notes."""
    with pytest.raises(ConfigError) as caught:
        DPOConfig(lr=1e-4, num_train_epochs=2, batch_size=0)  # type: ignore[call-arg]
    shown = "".join(traceback.format_exception_only(caught.value)).splitlines()
    assert shown == [
        "rlhf_core.infra.errors.ConfigError: DPOConfig: `batch_size`: must be greater than or equal to 1; got 0",
        "DPOConfig: unknown option `lr`; fix: write `learning_rate`",
        "DPOConfig: unknown option `num_train_epochs`; fix: write `epochs`",
    ]


def test_what_a_name_is_said_to_be_here_exists() -> None:
    """In some method, by itself or as a key of a file; and no name is listed twice for the same thing."""
    configs = [registry.get("trainer", name).Config for name in registry.trainers]  # type: ignore[attr-defined]
    for rows in KNOWN.values():
        for known in rows:
            for ours in known.ours.split():
                assert ours in RunConfig.KEYS or any(option_at(config, ours) for config in configs), ours
            texts = [known.trl, known.axolotl, known.llama_factory, known.elsewhere]
            assert all(len(text.split()) == len({*text.split()}) for text in texts), known
            assert known.names(), known


def test_equally_near_names_are_all_offered() -> None:
    with pytest.raises(ConfigError, match="unknown option `bata` of dpo; fix: did you mean `--data` or `--beta`"):
        load_job("dpo", flags=[*BASE, "--bata", "1"])
    with pytest.raises(ConfigError, match=r"fix: did you mean `--dataset\.columns\.prompt`"):
        load_job("dpo", flags=[*BASE, "--dataset.colums.prompt", "q"])
    with pytest.raises(ConfigError, match=r"fix: did you mean `--dataset\.columns`"):
        load_job("dpo", flags=[*BASE, "--dataset.colums", "q"])
    with pytest.raises(ConfigError, match=r"fix: did you mean `--data`\?$"):
        load_job("sft", flags=[*BASE, "--dat", "1"])


@pytest.mark.parametrize("typed", ["gpro", "grop", "rgpo", "grp", "grpoo", "GRPO "])
def test_swapped_letters_are_one_slip(typed: str) -> None:
    assert nearest_names(typed, ["orpo", "ppo", "dpo", "grpo", "cpo"]) == ["grpo"]
    assert did_you_mean("gpo", ["orpo", "grpo", "dpo"]).startswith("did you mean `grpo` or `dpo`?")


def test_a_file_of_another_trainer_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "theirs.yaml"
    file.write_text("base_model: m\ndatasets: []\nsequence_len: 5\nmicro_batch_size: 2\nlearning_rate: 1e-4\n")
    with pytest.raises(ConfigError, match="looks like a file of axolotl, and has no `method`; fix: `rlhf init METHOD`"):
        load_job(file)
    file.write_text("model_name_or_path: m\nstage: sft\nfinetuning_type: lora\ndataset: d\ncutoff_len: 5\n")
    with pytest.raises(ConfigError, match="looks like a file of LLaMA-Factory"):
        load_job(file)
    file.write_text("model: m\ndata: d\nbatch_size: 3\n")
    with pytest.raises(ConfigError, match="`method` is missing; fix: set it to one of"):
        load_job(file)


def test_a_mistyped_file_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("method: sft\n")
    with pytest.raises(ConfigError, match=f"no such file; fix: did you mean {tmp_path}/train.yaml"):
        load_job(tmp_path / "trian.yml")
    with pytest.raises(ConfigError, match="no such file; fix: there is no directory"):
        load_job(tmp_path / "none/train.yaml")
