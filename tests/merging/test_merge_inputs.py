"""Inputs that aren't plain: adapters, vocabularies that differ, and all that may be wrong with a checkpoint."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import peft
import pytest
import torch
from merge_helpers import merge, read_weights, tiny_family, write_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core.infra.errors import ConfigError, ModelError, NumbersError, PluginError, StorageError
from rlhf_core.merging.open_model import open_model


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return tiny_family(tmp_path_factory.mktemp("inputs"), 2)


def _adapter(base: Path, path: Path, seed: int, **settings: object) -> Path:
    """Write an adapter whose every factor is random."""
    model = AutoModelForCausalLM.from_pretrained(base)
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
    ids=["plain", "rank-stabilised", "patterns", "saved-whole"],
)
def test_adapters_are_folded_as_peft_folds_them(
    settings: dict[str, object], family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base = family[0]
    adapter = _adapter(base, tmp_path / "adapter", 1, **settings)
    merge("linear", [adapter], tmp_path / "out")
    folded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    expected = folded.state_dict()
    merged = read_weights(tmp_path / "out")
    assert set(merged) <= set(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_adapters_and_whole_models_mix(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    adapter = _adapter(base, tmp_path / "adapter", 1)
    merge("task_arithmetic", [adapter, models[0]], tmp_path / "out", base=base)
    folded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    name = "model.layers.0.mlp.up_proj.weight"
    origin, other, merged = (read_weights(path)[name] for path in (base, models[0], tmp_path / "out"))
    torch.testing.assert_close(merged, folded.state_dict()[name] + other - origin, rtol=1e-5, atol=1e-5)


def _vocabulary(source: Path, path: Path, added: list[str], *, pad_to: int | None = None) -> Path:
    """Copy a model, with more tokens and rows for them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(added)
    with torch.random.fork_rng():
        torch.manual_seed(len(added))
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=pad_to)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


EMBEDDINGS = "model.embed_tokens.weight"


def test_vocabularies_that_differ_are_refused(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    longer = _vocabulary(family[1][0], tmp_path / "longer", ["<tool>", "<user>"])
    with pytest.raises(ModelError, match="vocabulary") as caught:
        merge("linear", [family[1][1], longer], tmp_path / "out")
    assert "263" in str(caught.value) and "265" in str(caught.value) and "`tokenizer`" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tokens_with_other_numbers_are_refused(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    a = _vocabulary(family[1][0], tmp_path / "a", ["<one>", "<two>"])
    b = _vocabulary(family[1][1], tmp_path / "b", ["<two>", "<one>"])
    with pytest.raises(ModelError, match="<one>"):
        merge("linear", [a, b], tmp_path / "out")


def test_the_union_of_vocabularies_lines_rows_up_by_text(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _base, models = family
    a = _vocabulary(models[0], tmp_path / "a", ["<one>", "<two>"])
    b = _vocabulary(models[1], tmp_path / "b", ["<two>", "<three>"], pad_to=8)
    merge("linear", [a, b], tmp_path / "out", tokenizer="union")
    merge("linear", [b, a], tmp_path / "turned", tokenizer="union")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    merged, rows_a, rows_b = (read_weights(path)[EMBEDDINGS] for path in (tmp_path / "out", a, b))
    assert torch.equal(merged, read_weights(tmp_path / "turned")[EMBEDDINGS])
    number = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<one>", "<two>", "<three>", "a")}
    assert len(set(number.values())) == 4 and None not in number.values()
    ids = {name: AutoTokenizer.from_pretrained(path) for name, path in (("a", a), ("b", b))}

    def row(where: str, token: str) -> torch.Tensor:
        return (rows_a if where == "a" else rows_b)[ids[where].convert_tokens_to_ids(token)]

    torch.testing.assert_close(merged[number["<one>"]], row("a", "<one>"))
    torch.testing.assert_close(merged[number["<three>"]], row("b", "<three>"))
    torch.testing.assert_close(merged[number["<two>"]], (row("a", "<two>") + row("b", "<two>")) / 2)
    torch.testing.assert_close(merged[number["a"]], (row("a", "a") + row("b", "a")) / 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(merged) >= 272  # the padded rows of b are there
    assert tokenizer("<three>a<one>").input_ids[-3:] == [number["<three>"], number["a"], number["<one>"]]


def test_the_base_tokenizer_keeps_the_base_rows(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    longer = _vocabulary(models[0], tmp_path / "longer", ["<one>"])
    merge("task_arithmetic", [longer, models[1]], tmp_path / "out", base=base, tokenizer="base")
    merge("task_arithmetic", models, tmp_path / "plain", base=base)
    merged, plain = (read_weights(tmp_path / name)[EMBEDDINGS] for name in ("out", "plain"))
    torch.testing.assert_close(merged, plain)


def test_a_token_that_only_the_base_has_stays(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    longer = _vocabulary(base, tmp_path / "longer", ["<one>"])
    merge("ties", models, tmp_path / "out", base=longer, tokenizer="base", density=1.0)
    merged, origin = (read_weights(path)[EMBEDDINGS] for path in (tmp_path / "out", longer))
    assert torch.equal(merged[263], origin[263]) and not torch.equal(merged[100], origin[100])


def test_a_tokenizer_by_path_orders_the_rows(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    other = _vocabulary(base, tmp_path / "other", ["<one>"])
    merge("linear", models, tmp_path / "out", tokenizer=str(other))
    merge("linear", models, tmp_path / "plain")
    merged, plain = (read_weights(tmp_path / name)[EMBEDDINGS] for name in ("out", "plain"))
    assert len(merged) == 264 and torch.equal(merged[:263], plain) and bool((merged[263] == 0).all())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 264


def test_padded_rows_are_never_dropped(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    padded = _vocabulary(models[0], tmp_path / "padded", ["<one>"], pad_to=64)
    rows = len(read_weights(padded)[EMBEDDINGS])
    assert rows == 320
    for name, wanted in (("base", "base"), ("path", str(models[1])), ("union", "union")):
        merge("task_arithmetic", [padded, models[1]], tmp_path / name, base=base, tokenizer=wanted)
        assert len(read_weights(tmp_path / name)[EMBEDDINGS]) == rows


def test_special_tokens_keep_their_meaning(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """A tokenizer that numbers tokens otherwise brings its numbers into the configuration."""
    _base, models = family
    shutil.copytree(models[0], tmp_path / "turned")
    described = json.loads((tmp_path / "turned" / "tokenizer.json").read_text())
    turn = {2: 9, 9: 2}  # <|end|> and a letter
    described["model"]["vocab"] = {text: turn.get(row, row) for text, row in described["model"]["vocab"].items()}
    for token in described["added_tokens"]:
        token["id"] = turn.get(token["id"], token["id"])
    (tmp_path / "turned" / "tokenizer.json").write_text(json.dumps(described))
    merge("linear", models, tmp_path / "out", tokenizer=str(tmp_path / "turned"))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == 9
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<|end|>") == 9
    merged, plain = (read_weights(path)[EMBEDDINGS] for path in (tmp_path / "out", models[0]))
    assert torch.allclose(merged[9], (plain[2] + read_weights(models[1])[EMBEDDINGS][2]) / 2)


def test_the_union_of_an_adapter_has_a_tokenizer(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    adapter = _adapter(base, tmp_path / "adapter", 1)
    (tmp_path / "adapter" / "tokenizer.json").unlink(missing_ok=True)
    longer = _vocabulary(models[0], tmp_path / "longer", ["<one>"])
    merge("linear", [adapter, longer], tmp_path / "out", tokenizer="union")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 264
    merge("linear", models, tmp_path / "file", tokenizer=str(longer / "tokenizer.json"))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "file")) == 264


def test_vocabularies_that_cut_text_otherwise_have_no_union(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _base, models = family
    shutil.copytree(models[0], tmp_path / "other")
    described = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    described["model"]["vocab"]["th"] = described["model"]["vocab"].pop("t")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match="splits text into other pieces"):
        merge("linear", [models[1], tmp_path / "other"], tmp_path / "out", tokenizer="union")


def test_a_tokenizer_without_embeddings_is_refused(tmp_path: Path) -> None:
    a = write_weights(tmp_path / "a", {"x.weight": torch.ones(2, 2)})
    with pytest.raises(ConfigError, match="row for each token"):
        merge("linear", [a, a], tmp_path / "out", tokenizer="union")


def test_the_tokenizer_is_that_of_the_first_model_that_has_one(
    family: tuple[Path, list[Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, models = family
    bare = shutil.copytree(models[0], tmp_path / "bare")
    for file in [*bare.glob("tokenizer*"), *bare.glob("*.jinja")]:
        file.unlink()
    merge("linear", [bare, models[1]], tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (models[1] / "tokenizer.json").read_bytes()
    merge("task_arithmetic", [bare], tmp_path / "based", base=base)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "based")) == len(AutoTokenizer.from_pretrained(base))
    assert not caplog.records
    merge("linear", [bare, bare], tmp_path / "none")
    assert "no input has a tokenizer" in caplog.text and not (tmp_path / "none/tokenizer.json").exists()


# What may be wrong


def _pair(tmp_path: Path, **second: torch.Tensor) -> list[Path]:
    first = {"x.weight": torch.ones(2, 3), "y.weight": torch.ones(4)}
    return [write_weights(tmp_path / "a", first), write_weights(tmp_path / "b", {**first, **second})]


def test_another_shape_names_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`x.weight` has another shape.*\[3, 2\].*\[2, 3\]"):
        merge("linear", _pair(tmp_path, **{"x.weight": torch.ones(3, 2)}), tmp_path / "out")


def test_another_name_names_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`z.weight` is in .*b and not in .*a"):
        merge("linear", _pair(tmp_path, **{"z.weight": torch.ones(1)}), tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_values_that_are_not_finite_name_the_tensor(tmp_path: Path, bad: float, method: str) -> None:
    values = torch.ones(200, 1000)
    values[123, 7] = bad
    a = write_weights(tmp_path / "a", {"x.weight": torch.ones(200, 1000)})
    b = write_weights(tmp_path / "b", {"x.weight": values})
    with pytest.raises(ModelError, match=r"`x.weight` holds values that are not finite.*123,007") as caught:
        merge(method, [a, b], tmp_path / "out", base=a)
    assert str(b) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_values_that_outgrow_the_output_are_a_fault(tmp_path: Path) -> None:
    a = write_weights(tmp_path / "a", {"x": torch.full((9,), 3e38)})
    with pytest.raises(NumbersError, match=r"`x`.*float32 can't hold"):
        merge("linear", [a, a], tmp_path / "out", normalize=False)
    b = write_weights(tmp_path / "b", {"x": torch.full((9,), 1e5)})
    with pytest.raises(NumbersError, match=r"`x`.*float16 can't hold.*100000"):
        merge("linear", [b], tmp_path / "out", dtype="fp16")
    merge("linear", [a], tmp_path / "out")  # a sum over a chunk that overflows is no fault by itself
    assert not any(path.name == "out" for path in tmp_path.iterdir() if not (path / "config.json").is_file())


def test_whole_numbers_that_differ_are_refused(tmp_path: Path) -> None:
    a = write_weights(tmp_path / "a", {"ids": torch.arange(4)})
    b = write_weights(tmp_path / "b", {"ids": torch.arange(4) + 1})
    with pytest.raises(ModelError, match=r"`ids` holds whole numbers that differ.*fix: "):
        merge("linear", [a, b], tmp_path / "out")


def test_kinds_that_do_not_mix_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"`y.weight`.*don't mix"):
        merge("linear", _pair(tmp_path, **{"y.weight": torch.ones(4, dtype=torch.int64)}), tmp_path / "out")


def test_float64_needs_a_word(tmp_path: Path) -> None:
    a = write_weights(tmp_path / "a", {"x": torch.ones(4, dtype=torch.float64)})
    with pytest.raises(ModelError, match=r"float64.*`dtype`"):
        merge("linear", [a, a], tmp_path / "out")
    merge("linear", [a, a], tmp_path / "out", dtype="float32")


def test_a_missing_shard_is_named(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    path = write_weights(tmp_path / "cut", read_weights(family[0]), shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00003.safetensors is missing"):
        merge("linear", [family[0], path], tmp_path / "out")


def test_shards_without_their_index_are_told(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    path = write_weights(tmp_path / "cut", read_weights(family[0]), shards=2)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(
        ModelError, match=r"no model.safetensors.index.json.*fix: copy model.safetensors.index.json too"
    ):
        merge("linear", [path], tmp_path / "out")


def test_an_index_that_lies_is_refused(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    path = write_weights(tmp_path / "cut", read_weights(family[0]), shards=2)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"], index["weight_map"]["extra"] = (
        "model-00001-of-00002.safetensors",
        index["weight_map"].pop("model.norm.weight"),
    )
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"shard|index"):
        open_model(path)


def test_a_shard_outside_the_directory_is_refused(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    path = write_weights(tmp_path / "cut", read_weights(family[0]), shards=2)
    text = (path / "model.safetensors.index.json").read_text()
    shutil.copy(path / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    (path / "model.safetensors.index.json").write_text(
        text.replace("model-00001-of-00002.safetensors", "../outside.safetensors")
    )
    with pytest.raises(ModelError, match=r"\.\./outside"):
        open_model(path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "a" / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="pickled"):
        merge("linear", [tmp_path / "a"], tmp_path / "out")


def _header(path: Path, header: dict[str, object], data: bytes = b"\0" * 8) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", ""])
def test_tensors_named_like_paths_are_refused(name: str, tmp_path: Path) -> None:
    path = _header(tmp_path / "a", {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})
    with pytest.raises(ModelError, match=r"like a path.*fix: "):
        open_model(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "which don't fit its shape"),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "cut off"),
        ({"x": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}, "F8_E4M3"),
        ({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "a malformed entry of tensor"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "a malformed entry of tensor"),
        ({"x": 3}, "a malformed entry of tensor"),
    ],
)
def test_headers_that_lie_are_refused(header: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        open_model(_header(tmp_path / "a", header))


def test_a_header_of_impossible_length_is_refused(tmp_path: Path) -> None:
    path = _header(tmp_path / "a", {})
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(ModelError, match="no valid header"):
        open_model(path)


def test_an_adapter_for_another_base_names_the_tensor(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, _ = tiny_family(tmp_path / "wide", 0, hidden=32)
    adapter = _adapter(base, tmp_path / "adapter", 1)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(family[0])}))
    with pytest.raises(ModelError, match="doesn't fit its base in tensor"):
        open_model(adapter)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"init_lora_weights": "pissa"}, "pissa, which changes the base")],
)
def test_adapters_of_other_kinds_are_refused(
    settings: dict[str, object], message: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    adapter = _adapter(family[0], tmp_path / "adapter", 1, **settings)
    with pytest.raises(ModelError, match=message):
        open_model(adapter)


def test_an_adapter_is_known_beside_a_configuration(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    adapter = _adapter(family[0], tmp_path / "adapter", 1)
    shutil.copy(family[0] / "config.json", adapter)
    assert set(open_model(adapter).tensors) == set(open_model(family[0]).tensors)


def test_an_adapter_whose_base_is_gone_is_named(tmp_path: Path) -> None:
    base, _ = tiny_family(tmp_path, 0)
    adapter = _adapter(base, tmp_path / "adapter", 1)
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=f"{adapter}: the base that this adapter names isn't there") as caught:
        merge("linear", [adapter], tmp_path / "out")
    assert caught.value.got == f"{base}: no such model directory or file" and f"`BASE+{adapter}`" in str(
        caught.value.fix
    )
    merge("linear", [f"{tmp_path / 'moved'}+{adapter}"], tmp_path / "out")


def test_an_adapter_that_names_itself_is_refused(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    adapter = _adapter(family[0], tmp_path / "adapter", 1)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(adapter)}))
    with pytest.raises(ModelError, match="name each other as their base"):
        open_model(adapter)


def test_an_adapter_of_another_base_is_told(
    family: tuple[Path, list[Path]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = _adapter(family[0], tmp_path / "adapter", 1)
    merge("task_arithmetic", [adapter], tmp_path / "right", base=family[0])
    assert not caplog.records
    merge("task_arithmetic", [adapter], tmp_path / "out", base=family[1][0])
    assert "is an adapter of" in caplog.text


def test_a_stored_head_counts_more_than_a_configuration_that_ties_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers, which then ties nothing."""
    _, models = tiny_family(tmp_path, 2)
    weights = read_weights(models[0])
    write_weights(models[0], {**weights, "lm_head.weight": weights[EMBEDDINGS] + 1})
    other = read_weights(models[1])[EMBEDDINGS]
    merge("linear", models, tmp_path / "out")
    assert "stores a head that differs from the embeddings" in caplog.text
    merged = read_weights(tmp_path / "out")
    assert torch.allclose(merged["lm_head.weight"], (weights[EMBEDDINGS] + 1 + other) / 2, atol=1e-6)
    assert torch.allclose(merged[EMBEDDINGS], (weights[EMBEDDINGS] + other) / 2, atol=1e-6)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_told(text: str, family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    path = write_weights(tmp_path / "cut", read_weights(family[0]), shards=2)
    (path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index.json can't be read"):
        open_model(path)


def test_the_single_file_counts_before_a_stale_index(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    path = write_weights(tmp_path / "both", read_weights(family[0]), shards=2)
    shutil.copy(family[1][0] / "model.safetensors", path)
    merge("linear", [path], tmp_path / "out")
    assert torch.equal(read_weights(tmp_path / "out")[EMBEDDINGS], read_weights(family[1][0])[EMBEDDINGS])


def test_a_full_disk_is_known_before_anything_is_written(
    family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(StorageError, match="bytes are needed"):
        merge("linear", family[1], tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ties", {}, "differences from a base"),
        ("slerp", {"models": 3}, "slerp merges"),
        ("linear", {"weights": [1.0, -1.0]}, "sum to zero"),
        ("linear", {"weights": [2.0, -1.0]}, "mixed signs"),
        ("ties", {"base": True, "weights": [2.0, -1.0]}, "mixed signs"),
        ("ties", {"base": True, "density": 0.0}, "density"),
        ("ties", {"base": True, "density": 1.5}, "density"),
        ("dare", {"base": True, "density": -0.1}, "density"),
        ("ties", {"base": True, "density": [0.5, 1.5]}, "density"),
        ("linear", {"weights": [1.0, [0.0, float("nan")]]}, "weight"),
        ("tis", {}, "ties"),
        ("linear", {"densty": 1.0}, "densty"),
        ("greedy_soup", {}, "no evaluation is given"),
        ("greedy_soup", {"weights": [0.9, 0.1]}, "doesn't take weights: all models count equally"),
        ("uniform_soup", {"weights": [0.0, 0.0]}, "doesn't take weights: all models count equally"),
        ("linear", {"weights": [-1.0, -1.0]}, "all negative"),
        ("sce", {"base": True, "weights": [2.0, -1.0]}, "where the method has `normalize`"),
        ("sce", {"base": True, "models": 1}, "sce merges at least 2"),
        ("ties", {"base": True, "scale": {"filters": {"self_atn": 0.1}, "default": 1.0}}, "self_attn"),
    ],
)
def test_options_that_can_not_do_are_known_before_anything_is_written(
    method: str, settings: dict[str, object], message: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, models = family
    count = int(settings.pop("models", 2))  # type: ignore[call-overload]
    weights = settings.pop("weights", [1.0] * count)
    entries = [{"model": str((models * 2)[n]), "weight": weights[n]} for n in range(count)]  # type: ignore[index]
    with pytest.raises(ConfigError, match=message):
        merge(method, entries, tmp_path / "out", base=base if settings.pop("base", False) else None, **settings)
    assert not any(tmp_path.iterdir())


def test_the_output_is_never_an_input(family: tuple[Path, list[Path]]) -> None:
    before = read_weights(family[0])
    with pytest.raises(ConfigError, match="one of the inputs"):
        merge("task_arithmetic", family[1], family[0], base=family[0], overwrite=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_weights(family[0]).items())


def test_inputs_below_the_output_are_never_removed(tmp_path: Path) -> None:
    _, models = tiny_family(tmp_path / "project", 2)
    (tmp_path / "project" / "config.json").write_text("{}")
    with pytest.raises((ConfigError, StorageError), match=r"one of the inputs|more than a model"):
        merge("linear", models, tmp_path / "project", overwrite=True)
    assert all(path.is_dir() for path in models)
    adapter = _adapter(models[0], tmp_path / "adapter", 1)
    with pytest.raises(ConfigError, match="one of the inputs"):
        merge("linear", [adapter], models[0], overwrite=True)
    (models[1] / "checkpoints").mkdir()
    with pytest.raises(StorageError, match="holds more than a model"):
        merge("linear", models[:1], models[1], overwrite=True)


def test_outputs_through_links_and_dots(
    family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    merge("linear", family[1], tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").is_file()
    (tmp_path / "dangling").symlink_to(tmp_path / "later")
    merge("linear", family[1], tmp_path / "dangling")
    assert (tmp_path / "later" / "config.json").is_file()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge("linear", family[1], Path())
    assert (tmp_path / "here" / "config.json").is_file()


def test_an_evaluation_that_fails_is_named(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    for evaluate in (lambda path: 1 / 0, lambda path: None, lambda path: float("nan")):
        with pytest.raises(PluginError, match="the evaluation"):
            merge("greedy_soup", family[1], tmp_path / "out", evaluate=evaluate)
    with pytest.raises(ConfigError, match="linear doesn't evaluate models"):
        merge("linear", family[1], tmp_path / "out", evaluate=lambda path: 1.0)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("key", "value"), [("model_type", "mistral"), ("num_attention_heads", 8)])
def test_another_architecture_of_the_same_shapes_is_refused(
    key: str, value: object, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    shutil.copytree(family[1][0], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ModelError, match=f"its `{key}` differs"):
        merge("linear", [family[1][1], tmp_path / "other"], tmp_path / "out")


def test_global_trimming_takes_one_density(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    settings = {"base": base, "trim_scope": "global"}
    with pytest.raises(ConfigError, match="`density` must be one number"):
        merge("ties", models, tmp_path / "out", density=[0.2, 0.4], **settings)
    assert not any(tmp_path.iterdir())
    merge("ties", models, tmp_path / "scaled", density=0.3, scale=[1.0, 1.0], **settings)
    merge("ties", models, tmp_path / "plain", density=0.3, **settings)
    scaled, plain = (read_weights(tmp_path / name) for name in ("scaled", "plain"))
    assert all(torch.equal(scaled[name], tensor) for name, tensor in plain.items())


def test_an_output_that_is_taken_is_left_alone(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(StorageError, match="no model"):
            merge("linear", family[1], tmp_path / "notes", overwrite=overwrite)
    merge("linear", family[1], tmp_path / "out")
    with pytest.raises(StorageError, match="--overwrite"):
        merge("linear", family[1], tmp_path / "out")
    merge("linear", family[1][:1], tmp_path / "out", overwrite=True)
    assert torch.equal(read_weights(tmp_path / "out")[EMBEDDINGS], read_weights(family[1][0])[EMBEDDINGS])
    with pytest.raises(StorageError, match="is a file"):
        merge("linear", family[1], tmp_path / "notes" / "thesis.tex")
