"""What the engine promises whatever the method: names, shapes, types, order, threads and files; models that load."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_helpers import bytes_of, merge, read_weights, tiny_family, write_weights
from rlhf_plugins.mergers import gram
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_core import registry
from rlhf_core.merging import Chunk, MergeConfig, Merger, ModelMerger, execution
from rlhf_core.merging.layer_values import LayerValues, value_at
from rlhf_core.merging.workers import spread

METHODS = sorted(plugin.name for plugin in registry.find("merger") if plugin.distribution == "rlhf-core")
RANDOM = {"dare", "della"}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    return tiny_family(tmp_path_factory.mktemp("family"))


def _models(method: str, models: list[Path]) -> list[Path]:
    most = registry.get("merger", method).models[1]
    return models[:most]


def _merged(method: str, family: tuple[Path, list[Path]], output: Path, **settings: object) -> dict[str, torch.Tensor]:
    base, models = family
    if method == "greedy_soup":
        settings.setdefault("evaluate", lambda path: 1.0)
    merge(method, _models(method, models), output, base=base, **settings)
    return read_weights(output)


@pytest.mark.parametrize("method", METHODS)
def test_names_shapes_and_types_are_kept_and_the_model_generates(
    method: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    merged = _merged(method, family, tmp_path / "out")
    expected = read_weights(family[0])
    assert {name: (t.shape, t.dtype) for name, t in merged.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    assert all(bool(tensor.isfinite().all()) for tensor in merged.values())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("1+1", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] > ids["input_ids"].shape[1]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"README.md", "merge.yaml", "config.json"}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_models_threads_and_files_change_no_bit(
    method: str, family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "CHUNK", 1024)
    monkeypatch.setattr(execution, "THREADS_CHUNK", 4096)
    monkeypatch.setattr(gram, "SLICE", 1024)
    base, models = family
    models = _models(method, models)
    weights = [0.5, 0.3, 0.2][: len(models)]
    if method in ("uniform_soup", "model_stock", "sce", "greedy_soup"):
        weights = [1.0] * len(models)
    entries = [{"model": str(path), "weight": weight} for path, weight in zip(models, weights, strict=True)]
    settings = {"evaluate": lambda path: 1.0} if method == "greedy_soup" else {}
    merge(method, entries, tmp_path / "one", base=base, threads=1, **settings)
    merge(method, entries[::-1], tmp_path / "reversed", base=base, threads=3, **settings)
    expected = bytes_of(tmp_path / "one")
    assert bytes_of(tmp_path / "reversed") == expected
    cut = []
    for number, entry in enumerate(entries):
        path = write_weights(tmp_path / f"cut-{number}", read_weights(Path(entry["model"])), shards=3)
        cut.append({**entry, "model": str(path)})
    for forked in (True, False):
        monkeypatch.setattr(execution, "may_fork", lambda forked=forked: forked)
        merge(method, cut, tmp_path / f"sharded-{forked}", base=base, threads=2, **settings)
        assert bytes_of(tmp_path / f"sharded-{forked}") == expected


def test_a_callback_that_starts_a_thread_keeps_the_merge_from_forking(
    family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forked = []

    def noting(*args: Any, **options: Any) -> Any:
        forked.append(options["forked"])
        return spread(*args, **options)

    monkeypatch.setattr(execution, "spread", noting)
    done = threading.Event()
    threads: list[threading.Thread] = []

    def progress(now: int, total: int) -> None:
        if not threads:
            threads.append(threading.Thread(target=done.wait))
            threads[0].start()

    config = MergeConfig(
        method="linear", models=[{"model": str(family[1][0])}], output=str(tmp_path / "out"), threads=2
    )
    try:
        ModelMerger(config, progress=progress).merge()
    finally:
        done.set()
    assert forked == [False]


def test_every_merger_is_tried_here() -> None:
    assert len(METHODS) >= 13


def test_outputs_are_cut_into_files_that_transformers_reads(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _base, models = family
    merge("linear", models, tmp_path / "whole")
    merge("linear", models, tmp_path / "cut", shard_size=50_000)
    files = sorted(file.name for file in (tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    whole, cut = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_bf16_is_rounded_once(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(70_000, generator=generator).bfloat16() for _ in range(3)]
    paths = [write_weights(tmp_path / f"m{n}", {"a.weight": tensor}) for n, tensor in enumerate(tensors)]
    merge("linear", paths, tmp_path / "out")
    merged = read_weights(tmp_path / "out")["a.weight"]
    exact = (sum(tensor.double() for tensor in tensors) / 3).to(torch.bfloat16)
    assert merged.dtype == torch.bfloat16
    assert float((merged != exact).float().mean()) < 0.002


def test_dtype_changes_weights_and_configuration(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    merge("linear", family[1], tmp_path / "out", dtype="bfloat16")
    assert {tensor.dtype for tensor in read_weights(tmp_path / "out").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_mixed_types_come_out_as_the_wider(tmp_path: Path) -> None:
    a = write_weights(tmp_path / "a", {"w": torch.ones(4, dtype=torch.bfloat16)})
    b = write_weights(tmp_path / "b", {"w": torch.zeros(4, dtype=torch.float16)})
    merge("linear", [a, b], tmp_path / "out")
    assert read_weights(tmp_path / "out")["w"].dtype == torch.float32


def test_whole_numbers_are_copied_where_all_agree(tmp_path: Path) -> None:
    common = {"position_ids": torch.arange(7), "flag": torch.tensor([True, False])}
    a = write_weights(tmp_path / "a", {"w": torch.ones(4), **common})
    b = write_weights(tmp_path / "b", {"w": torch.zeros(4), **common})
    merge("linear", [a, b], tmp_path / "out")
    merged = read_weights(tmp_path / "out")
    assert torch.equal(merged["position_ids"], common["position_ids"]) and torch.equal(merged["flag"], common["flag"])
    assert merged["w"].tolist() == [0.5] * 4


def test_empty_and_scalar_tensors_merge(tmp_path: Path) -> None:
    a = write_weights(tmp_path / "a", {"empty": torch.empty(0, 3), "scalar": torch.tensor(1.0)})
    b = write_weights(tmp_path / "b", {"empty": torch.empty(0, 3), "scalar": torch.tensor(3.0)})
    for method in ("linear", "ties", "slerp", "breadcrumbs", "della"):
        merge(method, [a, b], tmp_path / method, base=a)
        merged = read_weights(tmp_path / method)
        assert merged["empty"].shape == (0, 3) and merged["scalar"].shape == ()
    assert float(read_weights(tmp_path / "linear")["scalar"]) == 2.0


def test_tied_heads_are_written_once(tmp_path: Path) -> None:
    _, models = tiny_family(tmp_path, 2)
    weights = read_weights(models[0])
    write_weights(models[0], {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    merge("linear", models, tmp_path / "out")
    assert "lm_head.weight" not in read_weights(tmp_path / "out")


def test_untied_heads_are_merged(tmp_path: Path) -> None:
    _, models = tiny_family(tmp_path, 2, tie_embeddings=False)
    merge("linear", models, tmp_path / "out")
    heads = [read_weights(path)["lm_head.weight"].double() for path in models]
    torch.testing.assert_close(
        read_weights(tmp_path / "out")["lm_head.weight"].double(), sum(heads) / 2, rtol=0, atol=1e-6
    )


def test_a_merger_by_whole_tensors_works_too(
    family: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Median(Merger):
        """Median of models."""

        api = 1
        chunk_shape = "tensor"

        def merge_chunk(self, chunk: Chunk, measured: Any) -> torch.Tensor:
            assert chunk.start == 0 and chunk.origin.shape == chunk.tensors[0].shape
            shapes[chunk.name] = chunk.tensors[0].shape
            return torch.stack(chunk.tensors).median(0).values

    shapes: dict[str, torch.Size] = {}
    monkeypatch.setattr(execution, "CHUNK", 64)
    registry.register("merger", "median", Median)
    merge("median", family[1], tmp_path / "out", base=family[0], threads=1)
    expected = [read_weights(path) for path in family[1]]
    for name, tensor in read_weights(tmp_path / "out").items():
        assert torch.equal(tensor, torch.stack([one[name] for one in expected]).median(0).values)
        assert shapes[name] == tensor.shape


def test_weights_vary_by_layer(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    _base, models = family
    entries = [{"model": str(models[0]), "weight": [1.0, 0.0]}, {"model": str(models[1]), "weight": [0.0, 1.0]}]
    merge("linear", entries, tmp_path / "out")
    merged, first, second = (read_weights(path) for path in (tmp_path / "out", models[0], models[1]))
    for name, tensor in merged.items():
        owner = first if ".layers.0." in name or "embed" in name else second
        assert torch.equal(tensor, owner[name]), name


def test_options_vary_by_layer_and_by_model(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    merge("task_arithmetic", models[:1], tmp_path / "out", base=base, scale={"filters": {"mlp": 1.0}, "default": 0.0})
    merged, origin, model = (read_weights(path) for path in (tmp_path / "out", base, models[0]))
    for name, tensor in merged.items():
        assert torch.allclose(tensor, model[name] if ".mlp." in name else origin[name], atol=1e-6), name
    own = [{"model": str(models[0]), "options": {"density": 1.0}}]
    merge("ties", own, tmp_path / "ties", base=base, density=0.1)
    for name, tensor in read_weights(tmp_path / "ties").items():
        assert torch.allclose(tensor, model[name], atol=1e-6), name


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [
        (0.3, "model.layers.1.mlp.up_proj.weight", 0.3),
        ([0.0, 1.0], "model.layers.0.mlp.up_proj.weight", 0.0),
        ([0.0, 1.0], "model.layers.1.mlp.up_proj.weight", 0.25),
        ([0.0, 1.0], "model.layers.4.mlp.up_proj.weight", 1.0),
        ([0.0, 1.0], "model.embed_tokens.weight", 0.0),
        ([0.0, 1.0], "model.norm.weight", 1.0),
        ([0.0, 1.0, 2.0, 3.0, 4.0], "transformer.h.3.attn.weight", 3.0),
        (
            LayerValues(filters={"attention": 0.1, "mlp": [0.0, 1.0]}, default=9.0),
            "model.layers.2.self_attn.q.weight",
            0.1,
        ),
        (LayerValues(filters={"attention": 0.1, "mlp": [0.0, 1.0]}, default=9.0), "model.layers.2.mlp.up.weight", 0.5),
        (LayerValues(filters={"attention": 0.1}, default=9.0), "model.layers.2.input_layernorm.weight", 9.0),
        (LayerValues(gradient=[0.0, 1.0], default=9.0), "lm_head.weight", 9.0),
        (LayerValues(filters={"norms": 2.0}, gradient=[0.0, 1.0]), "model.layers.4.input_layernorm.weight", 2.0),
    ],
)
def test_values_by_layer_at_a_tensor(value: object, name: str, expected: float) -> None:
    assert value_at(value, name, 5) == pytest.approx(expected)  # type: ignore[arg-type]


def test_greedy_soup_is_never_below_its_best_ingredient(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    target = read_weights(family[1][1])
    asked = []

    def evaluate(path: Path) -> float:
        asked.append(path)
        weights = read_weights(path)
        return -sum(float((weights[name] - target[name]).square().sum()) for name in target)

    result = merge("greedy_soup", family[1], tmp_path / "out", evaluate=evaluate)
    assert result.details["chosen"] == [str(family[1][1])]
    assert result.details["score"] == max(result.details["scores"].values()) == 0.0
    assert "method: uniform_soup" in (tmp_path / "out" / "merge.yaml").read_text()
    assert len(asked) == 5 and all(torch.equal(t, target[name]) for name, t in read_weights(tmp_path / "out").items())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    merge("greedy_soup", family[1], tmp_path / "all", evaluate=lambda path: 0.0)
    merge("uniform_soup", family[1], tmp_path / "uniform")
    assert bytes_of(tmp_path / "all") == bytes_of(tmp_path / "uniform")


def test_greedy_soup_chooses_alike_in_any_order(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    counts = {1: 1.0, 2: 0.5, 3: 0.0}  # any single is best, so which is taken first must not be the order's to say

    def evaluate(path: Path) -> float:
        close = [
            all(torch.equal(t, read_weights(model)[n]) for n, t in read_weights(path).items()) for model in family[1]
        ]
        return counts[1] if any(close) else counts[2]

    for name, models in (("one", family[1]), ("turned", family[1][::-1])):
        merge("greedy_soup", models, tmp_path / name, evaluate=evaluate)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "turned")


def test_greedy_soup_evaluates_what_it_writes(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    seen = []
    evaluate = lambda path: (seen.append({t.dtype for t in read_weights(path).values()}), 0.0)[1]  # noqa: E731
    merge("greedy_soup", family[1][:2], tmp_path / "out", evaluate=evaluate, dtype="bf16")
    assert seen == [{torch.bfloat16}] * 3


def test_the_seed_of_a_method_counts(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    from rlhf_core.merging.config import MergeConfig
    from rlhf_core.merging.merge import ModelMerger

    for name, settings in (("a", {}), ("b", {"options": {"seed": 7}}), ("c", {"seed": 7})):
        config = {"method": "dare", "base": str(base), "models": [str(models[0])], "output": str(tmp_path / name)}
        ModelMerger(MergeConfig.parse({**config, **settings})).merge()
    assert bytes_of(tmp_path / "b") == bytes_of(tmp_path / "c") != bytes_of(tmp_path / "a")


def test_the_card_gives_each_entry_its_own_weight(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    model, other = (str(path) for path in family[1][:2])
    entries = [
        {"model": model, "weight": 0.25},
        {"model": other, "weight": 0.5},
        {"model": model, "weight": [0.0, 1.0]},
    ]
    merge("linear", entries, tmp_path / "out")
    rows = [line.split("|") for line in (tmp_path / "out/README.md").read_text().splitlines() if "| model |" in line]
    found = [(row[1].strip(), row[3].strip()) for row in rows]
    assert found == [("model-0", "0.25"), ("model-1", "0.5"), ("model-0", "by layer")]
    score = {model: 1.0, other: 2.0}
    souped = [{"model": model, "weight": 1.0}, {"model": other, "weight": 1.0}]
    merge("greedy_soup", souped, tmp_path / "soup", evaluate=lambda path: score.get(str(path), 0.0))
    rows = [line.split("|") for line in (tmp_path / "soup/README.md").read_text().splitlines() if "| model |" in line]
    assert [(row[1].strip(), row[3].strip()) for row in rows] == [("model-1", "1")]
