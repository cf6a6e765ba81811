"""Exports load with plain transformers and peft, and give the logits of the model that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from rlhf_plugins.trainers.reward_model import RewardModelTrainer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core import export_model
from rlhf_core.infra.errors import ConfigError, ModelError, NumbersError, RLHFError, StorageError
from rlhf_core.infra.model_card import MARK, front_matter
from rlhf_core.models.reward_model import RewardModel
from rlhf_core.testing.tiny import save_tiny

IDS = torch.arange(7, 60)[None]
FOLDED = 1e-4
"""Most difference of float32 logits that folding an adapter makes, by rounding; those of these models are near 1."""


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def whole(path: Path) -> torch.Tensor:
    AutoTokenizer.from_pretrained(path)
    return logits(AutoModelForCausalLM.from_pretrained(path, dtype="auto"))


def adapted(path: Path) -> torch.Tensor:
    return logits(AutoPeftModelForCausalLM.from_pretrained(path))


def fault(*arguments, **options) -> RLHFError:
    with pytest.raises(RLHFError) as raised:
        export_model(*arguments, **options)
    return raised.value


def test_an_adapter_is_exported_as_one_and_folded(adapter_run: Path, base: Path, tmp_path: Path) -> None:
    expected = adapted(adapter_run / "model")
    assert (expected - whole(base)).abs().max() > 0.05
    result = export_model(adapter_run, tmp_path / "adapter")
    assert result.adapter and torch.equal(adapted(result.output), expected)
    result = export_model(adapter_run, tmp_path / "whole", merged=True)
    assert not result.adapter and (whole(result.output) - expected).abs().max() < FOLDED
    assert {path.name for path in result.output.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja",
    }  # fmt: skip


def test_a_checkpoint_is_exported_as_the_run_would_have_saved_it(adapter_run: Path, tmp_path: Path) -> None:
    last = export_model(adapter_run / "checkpoints" / "step-2", tmp_path / "last")
    assert torch.equal(adapted(last.output), adapted(adapter_run / "model"))
    first = export_model(adapter_run / "checkpoints" / "step-1", tmp_path / "first", merged=True)
    assert (whole(first.output) - adapted(adapter_run / "model")).abs().max() > FOLDED
    assert "the weights of step 1; the adapter folded into its base" in (first.output / "README.md").read_text()


@pytest.mark.parametrize("dtype, kind", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_dtype_is_that_of_the_written_weights_and_of_the_configuration(
    adapter_run: Path, base: Path, tmp_path: Path, dtype, kind: torch.dtype
) -> None:
    plain = export_model(base, tmp_path / "plain", dtype=dtype).output
    expected = {name: tensor.to(kind) for name, tensor in load_file(base / "model.safetensors").items()}
    found = load_file(plain / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    folded = export_model(adapter_run, tmp_path / "folded", merged=True, dtype=dtype).output
    full = load_file(export_model(adapter_run, tmp_path / "full", merged=True).output / "model.safetensors")
    assert all(torch.equal(one, full[name].to(kind)) for name, one in load_file(folded / "model.safetensors").items())
    for made in (plain, folded):
        assert AutoModelForCausalLM.from_pretrained(made, dtype="auto").dtype == kind
    small = load_file(export_model(adapter_run, tmp_path / "small", dtype=dtype).output / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in small.values()} == {kind}


def test_shards_are_converted_each_with_its_index(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", 0)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shutil.copy(source / "tokenizer.json", tmp_path / "sharded")
    made = export_model(tmp_path / "sharded", tmp_path / "out", dtype="bf16").output
    index = json.loads((made / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    parts = [load_file(file) for file in sorted(made.glob("*.safetensors"))]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for part in parts for tensor in part.values())
    assert AutoModelForCausalLM.from_pretrained(made, dtype="auto").dtype == torch.bfloat16


def test_a_value_that_fp16_cannot_hold_is_no_infinity(base: Path, tmp_path: Path) -> None:
    source = tmp_path / "large"
    shutil.copytree(base, source)
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1e6
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    error = fault(source, tmp_path / "out", dtype="fp16")
    assert isinstance(error, NumbersError) and "model.norm.weight" in str(error) and 'dtype="bf16"' in str(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "lora_alpha": 16},
        {"use_dora": True},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"alpha_pattern": {"q_proj": 32}, "rank_pattern": {"v_proj": 2}},
    ],
    ids=["rslora", "dora", "modules_to_save", "patterns"],
)
def test_adapters_of_every_kind_that_is_trained_fold_to_what_peft_computes(base: Path, tmp_path: Path, options) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    shutil.copy(base / "tokenizer.json", tmp_path / "adapter")
    made = export_model(tmp_path / "adapter", tmp_path / "out", merged=True).output
    assert (expected - whole(base)).abs().max() > 0.05
    assert (logits(AutoModelForCausalLM.from_pretrained(made)) - expected).abs().max() < FOLDED


@pytest.mark.parametrize(
    "options", [{"lora": {"rank": 2}}, {"ensemble": {"size": 2, "share_backbone": False}, "new_tokens": ["<+>"]}]
)
def test_a_checkpoint_of_a_reward_model_is_exported_with_its_heads(base: Path, tmp_path: Path, options: dict) -> None:
    pairs = "".join(
        json.dumps({"prompt": f"{n}<+>1=", "chosen": str(n + 1), "rejected": "no"}) + "\n" for n in range(4)
    )
    (tmp_path / "pairs.jsonl").write_text(pairs)
    values = {
        "batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "checkpoint": {"every": 1},
        "dataset": {"wrap": "chat"},
    }
    config = RewardModelTrainer.Config.parse(values | options)
    run = tmp_path / "run"
    RewardModelTrainer(config, model=str(base), data=str(tmp_path / "pairs.jsonl"), output=run).train()

    def files(directory: Path) -> dict[str, torch.Tensor]:
        found = {str(path.relative_to(directory)): load_file(path) for path in directory.rglob("*.safetensors")}
        return {f"{path}:{name}": tensor for path, file in found.items() for name, tensor in file.items()}

    last = files(export_model(run / "checkpoints/step-2", tmp_path / "last").output)
    expected = files(run / "model")
    assert last.keys() == expected.keys() and all(torch.equal(last[name], one) for name, one in expected.items())
    first = export_model(run / "checkpoints/step-1", tmp_path / "first").output
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in files(first).items())
    again, done = (RewardModel.from_pretrained(path).tokenizer for path in (first, run / "model"))
    assert again.init_kwargs["rlhf_core"] == done.init_kwargs["rlhf_core"] == {"wrap": "chat"}
    assert "the weights of step 1" in (first / "README.md").read_text()


def test_a_reward_model_keeps_its_head_in_float32(base: Path, tmp_path: Path) -> None:
    RewardModel.from_pretrained(base, new_head=True).save_pretrained(tmp_path / "reward")
    made = export_model(tmp_path / "reward", tmp_path / "out", dtype="bf16").output
    head = load_file(made / "reward_head.safetensors")
    assert all(torch.equal(head[k], v) for k, v in load_file(tmp_path / "reward" / "reward_head.safetensors").items())
    assert RewardModel.from_pretrained(made) is not None
    text = (made / "README.md").read_text()
    assert 'RewardModel.from_pretrained("path/to/this/folder")' in text
    assert front_matter(text)["library_name"] == "rlhf_core"


def test_the_card_says_what_the_export_did_and_the_users_own_is_kept(adapter_run: Path, tmp_path: Path) -> None:
    made = export_model(adapter_run, tmp_path / "whole", merged=True, dtype="bf16").output
    text = (made / "README.md").read_text()
    assert "Exported by rlhf_core: the adapter folded into its base; its weights converted to bf16." in text
    assert front_matter(text)["library_name"] == "transformers" and "lora" not in front_matter(text)["tags"]
    assert "AutoModelForCausalLM" in text and "AutoPeft" not in text and text.count("## Load it") == 1
    assert text.rstrip().endswith(MARK) and text.count(MARK) == 1
    (made / "README.md").write_text("# Mine\n")
    again = export_model(adapter_run, tmp_path / "whole", overwrite=True).output
    assert (again / "README.md").read_text() == "# Mine\n" and (again / "adapter_config.json").is_file()
    for number, merged in enumerate((False, True)):
        copy = export_model(again, tmp_path / f"copy-{number}", merged=merged).output
        assert (copy / "README.md").read_text() == "# Mine\n"


def test_the_form_that_peft_saves_is_nobodys_card(base: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    assert "[More Information Needed]" in (tmp_path / "adapter" / "README.md").read_text()
    for merged in (False, True):
        made = export_model(tmp_path / "adapter", tmp_path / "out", merged=merged, overwrite=True).output
        text = (made / "README.md").read_text()
        assert MARK in text and "More Information" not in text and front_matter(text)["license"] == "apache-2.0"


def test_an_adapter_gets_its_bases_name_on_the_hub(adapter_run: Path, base: Path, tmp_path: Path) -> None:
    made = export_model(adapter_run, tmp_path / "out", base="someone/tiny").output
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"
    header = front_matter((made / "README.md").read_text())
    assert (header["base_model"], header["base_model_relation"]) == ("someone/tiny", "adapter")
    assert "must be a name on the hub" in str(fault(adapter_run, tmp_path / "x", base="../tiny"))
    assert "without a base to name" in str(fault(base, tmp_path / "x", base="a/b"))
    assert not (tmp_path / "x").exists()


def test_outputs_that_would_lose_something_are_refused(adapter_run: Path, base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    export_model(base, output)
    error = fault(adapter_run, output)
    assert isinstance(error, StorageError) and "holds a model already" in str(error) and "overwrite=True" in str(error)
    (output / "notes").mkdir()
    assert "holds more than a model" in str(fault(adapter_run, output, overwrite=True))
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("x")
    assert "is not empty, and no model" in str(fault(base, full, overwrite=True))
    assert "is a file" in str(fault(base, full / "thesis.txt"))
    for place in (base, base / "out", base.parent):
        assert isinstance(fault(base, place, overwrite=True), ConfigError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "out"]


def test_careless_sources_are_named_with_what_to_name_instead(
    adapter_run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(adapter_run, run)
    assert f"`{run / 'checkpoints' / 'step-2'}` is the newest" in str(fault(run / "checkpoints"))
    assert "is a directory of runs" in str(fault(tmp_path))
    assert f"give the model's directory, {base}" in str(fault(base / "model.safetensors"))
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "stopped", "step": 1}))
    error = fault(run)
    assert (
        isinstance(error, ModelError) and "hasn't finished" in str(error) and "it was stopped at step 1" in str(error)
    )
    assert "step-2`" in str(error.fix) and "resume=True" in str(error.fix)
    (run / "run.json").write_text(json.dumps(record))
    shutil.rmtree(run / "model")
    assert "its `model/` is gone" in str(fault(run))
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    assert "name the model that the file was converted from" in str(fault(tmp_path / "model-q4.gguf"))
    assert "no such run or model" in str(fault(tmp_path / "nothing"))
    assert "hf download someone/model" in str(fault("someone/model"))
    stage = tmp_path / "pipeline" / "stages" / "01-sft"
    (stage / "model").mkdir(parents=True)
    (tmp_path / "pipeline" / "pipeline.json").write_text("{}")
    assert f"name a stage's run: `{stage}`" in str(fault(tmp_path / "pipeline"))


def test_the_command_exports_under_the_runs_name(
    rlhf, adapter_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = rlhf("export", adapter_run, "--merged")
    assert (code, err) == (0, "") and out.startswith("model: exports/first  ")
    code, out, _ = rlhf("export", adapter_run, "--json", "--output", "other")
    assert code == 0 and json.loads(out)["adapter"] is True
    code, _, err = rlhf("export", adapter_run, "extra")
    assert code == 2 and "unexpected argument; got `extra`" in err
    code, _, err = rlhf("export", adapter_run)
    assert code == 7 and "exports/first: holds a model already" in err


def test_merge_folds_one_adapter(rlhf, adapter_run: Path, base: Path, tmp_path: Path) -> None:
    expected = adapted(adapter_run / "model")
    for number, source in enumerate((adapter_run, adapter_run / "model", f"{base}+{adapter_run / 'model'}")):
        code, _, err = rlhf("merge", source, "--output", tmp_path / str(number))
        assert (code, err) == (0, "")
        assert (whole(tmp_path / str(number)) - expected).abs().max() < FOLDED
    assert "folded into its base" in (tmp_path / "0" / "README.md").read_text()
    assert front_matter((tmp_path / "0" / "README.md").read_text())["license"] == "apache-2.0"
    code, _, err = rlhf("merge", base, "--output", tmp_path / "x")
    assert code == 4 and "there is no adapter to fold" in err
    code, _, err = rlhf("merge", adapter_run / "checkpoints" / "step-1", "--output", tmp_path / "x")
    assert code == 4 and "rlhf export" in err
    code, _, err = rlhf("merge", adapter_run)
    assert code == 2 and "give `--output DIR`" in err


def test_a_directory_named_as_a_method_is_no_adapter(
    rlhf, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "linear").mkdir()
    assert rlhf("merge", "linear", "--model", base, "--output", "out")[0] == 0
