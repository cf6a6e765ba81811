"""Reward models that are merged keep their heads, merged by the same method; heads that don't fit each other are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from batches import random_batch
from merge_helpers import merge
from safetensors.torch import load_file, save_file

from rlhf_core import registry
from rlhf_core.evaluation.weight_diff import diff
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.merging import Chunk, Merger
from rlhf_core.models import ProcessRewardModel, RewardModel, ValueModel
from rlhf_core.testing.tiny import save_tiny

HEAD = "reward_head.safetensors"


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("causal") / "tiny")


@pytest.fixture(scope="module")
def rewards(causal: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three reward models near each other."""
    root = tmp_path_factory.mktemp("rewards")
    for number in range(3):
        model = RewardModel.from_pretrained(causal, new_head=True, seed=number)
        _move(model, number)
        model.save_pretrained(root / str(number))
    return [root / str(number) for number in range(3)]


def _move(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def _scores(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return RewardModel.from_pretrained(path).eval().scores(random_batch(3, 2))


def test_weights_one_and_zero_give_the_first_models_scores(rewards: list[Path], tmp_path: Path) -> None:
    entries = [{"model": str(rewards[0]), "weight": 1.0}, {"model": str(rewards[1]), "weight": 0.0}]
    merge("linear", entries, tmp_path / "out")
    assert torch.equal(_scores(tmp_path / "out"), _scores(rewards[0]))
    assert not torch.equal(_scores(rewards[1]), _scores(rewards[0]))
    assert (tmp_path / "out/reward_head.json").read_bytes() == (rewards[0] / "reward_head.json").read_bytes()
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_an_average_averages_the_head(rewards: list[Path], tmp_path: Path) -> None:
    merge("uniform_soup", rewards[:2], tmp_path / "out", shard_size=50_000, dtype="bf16")
    merged, first, second = (load_file(path / HEAD) for path in (tmp_path / "out", *rewards[:2]))
    assert merged.keys() == first.keys()
    for key, value in merged.items():
        assert value.dtype == torch.float32  # as heads always are, whatever the weights' type
        torch.testing.assert_close(value, (first[key] + second[key]) / 2)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert not any("reward_head" in name for pair in index["weight_map"].items() for name in pair)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert _scores(tmp_path / "out").isfinite().all()


@pytest.mark.parametrize("method", ["ties", "dare", "task_arithmetic", "slerp", "layer_wise"])
def test_differences_of_heads_are_taken_from_the_bases(method: str, rewards: list[Path], tmp_path: Path) -> None:
    """One model with all of its difference is the model."""
    settings = {"density": 1.0} if method in ("ties", "dare") else {"t": 1.0} if method == "layer_wise" else {}
    merge(method, [rewards[1]], tmp_path / "out", base=rewards[0], **settings)
    expected = load_file(rewards[1] / HEAD)
    for key, value in load_file(tmp_path / "out" / HEAD).items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)


def test_values_by_layer_take_the_head_for_the_end(rewards: list[Path], tmp_path: Path) -> None:
    merge("layer_wise", [rewards[1]], tmp_path / "out", base=rewards[0], t=[0.0, 1.0])
    expected = load_file(rewards[1] / HEAD)
    for key, value in load_file(tmp_path / "out" / HEAD).items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=1e-5)
    for name in ("head", "reward_head"):
        only = {"filters": {name: 0.0}, "default": 1.0}
        merge("layer_wise", [rewards[1]], tmp_path / name, base=rewards[0], t=only)
        torch.testing.assert_close(load_file(tmp_path / name / HEAD), load_file(rewards[0] / HEAD), atol=0, rtol=0)


def test_a_merge_is_centred_where_all_are_that_are_merged(causal: Path, tmp_path: Path) -> None:
    for name, centred in (("loose", False), ("one", True), ("two", True)):
        model = RewardModel.from_pretrained(causal, new_head=True, members=2)
        model.centred = centred
        model.save_pretrained(tmp_path / name)
    for names, expected in ((("one", "two"), True), (("one", "loose"), False), (("loose", "one"), False)):
        merge("linear", [tmp_path / name for name in names], tmp_path / "-".join(names))
        assert RewardModel.from_pretrained(tmp_path / "-".join(names)).centred is expected


def test_a_models_own_options_hold_for_its_head(rewards: list[Path], tmp_path: Path) -> None:
    entries = [{"model": str(rewards[1]), "options": {"density": 1.0}}]
    merge("ties", entries, tmp_path / "out", base=rewards[0], density=0.1, trim_scope="tensor")
    torch.testing.assert_close(load_file(tmp_path / "out" / HEAD), load_file(rewards[1] / HEAD))


def test_heads_count_where_entries_are_ranked_over_the_whole_model(rewards: list[Path], tmp_path: Path) -> None:
    for name, models in (("one", rewards[1:]), ("turned", rewards[:0:-1])):
        merge("ties", models, tmp_path / name, base=rewards[0], density=0.3, trim_scope="global")
    assert (tmp_path / "one" / HEAD).read_bytes() == (tmp_path / "turned" / HEAD).read_bytes()


def test_process_reward_models_keep_their_head(causal: Path, tmp_path: Path) -> None:
    paths = []
    for number, separator in enumerate(("\n", "\n", "##")):
        model = ProcessRewardModel.from_pretrained(causal, new_head=True, seed=number, separator=separator)
        model.save_pretrained(tmp_path / str(number))
        paths.append(tmp_path / str(number))
    merge("linear", paths[:2], tmp_path / "out")
    merged, first, second = (load_file(p / "process_reward_head.safetensors") for p in (tmp_path / "out", *paths[:2]))
    for key, value in merged.items():
        torch.testing.assert_close(value, (first[key] + second[key]) / 2)
    assert ProcessRewardModel.from_pretrained(tmp_path / "out").separator == "\n"
    with pytest.raises(ModelError, match=r"is of another kind.*got `separator` '##', and '\\n'"):
        merge("linear", paths[1:], tmp_path / "apart")


def test_what_has_no_head_is_refused(causal: Path, rewards: list[Path], tmp_path: Path) -> None:
    for models, base, method in (
        ([rewards[0], causal], None, "linear"),
        ([causal, rewards[0]], None, "linear"),
        (rewards[:2], causal, "ties"),
        ([causal], rewards[0], "ties"),
    ):
        with pytest.raises(ModelError, match=r"of the same head only; got .*no head") as caught:
            merge(method, models, tmp_path / "out", base=base)
        assert str(causal) in str(caught.value) and str(rewards[0]) in str(caught.value)
        assert not any(tmp_path.iterdir())


def test_heads_that_do_not_fit_each_other_are_refused(causal: Path, rewards: list[Path], tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(causal, new_head=True, members=2, share_backbone=True)
    model.save_pretrained(tmp_path / "two")
    with pytest.raises(ModelError, match=r"another kind than that of .*; got `members` 2, and 1"):
        merge("linear", [rewards[0], tmp_path / "two"], tmp_path / "out")
    merge("linear", [tmp_path / "two", tmp_path / "two"], tmp_path / "shared")
    assert torch.equal(_scores(tmp_path / "shared"), _scores(tmp_path / "two"))
    ProcessRewardModel.from_pretrained(causal, new_head=True).save_pretrained(tmp_path / "process")
    with pytest.raises(ModelError, match="got process_reward_head, and reward_head in"):
        merge("linear", [rewards[0], tmp_path / "process"], tmp_path / "out")
    shutil.copytree(rewards[1], tmp_path / "old")
    about = json.loads((tmp_path / "old/reward_head.json").read_text())
    (tmp_path / "old/reward_head.json").write_text(json.dumps({k: v for k, v in about.items() if v is not False}))
    merge("linear", [rewards[0], tmp_path / "old"], tmp_path / "mixed")  # a note that it lacks is false
    for lost in ("reward_head.json", HEAD):
        shutil.copytree(rewards[1], tmp_path / lost)
        (tmp_path / lost / lost).unlink()
        with pytest.raises(ModelError, match=f"{lost}: the reward head is not whole.*, and no {lost}; fix: copy"):
            merge("linear", [rewards[0], tmp_path / lost], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_is_checked_as_any_tensor_is(rewards: list[Path], tmp_path: Path) -> None:
    for name in ("format", "shape", "lacking"):
        shutil.copytree(rewards[1], tmp_path / name)
    about = json.loads((tmp_path / "format/reward_head.json").read_text())
    (tmp_path / "format/reward_head.json").write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(ModelError, match="`format` must be 1; got 2"):
        merge("linear", [rewards[0], tmp_path / "format"], tmp_path / "out")
    tensors = load_file(rewards[1] / HEAD)
    first = min(tensors)
    save_file({**tensors, first: torch.zeros(3)}, tmp_path / "shape" / HEAD)
    with pytest.raises(ModelError, match=rf"tensor `reward_head\.{first}` has another shape; got \[3\], and"):
        merge("linear", [rewards[0], tmp_path / "shape"], tmp_path / "out")
    save_file({key: tensor for key, tensor in tensors.items() if key != first}, tmp_path / "lacking" / HEAD)
    with pytest.raises(ModelError, match=rf"tensor `reward_head\.{first}` is in .* and not in .*lacking"):
        merge("linear", [rewards[0], tmp_path / "lacking"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_ensemble_with_backbones_of_its_own_is_refused(causal: Path, tmp_path: Path) -> None:
    model = RewardModel.from_pretrained(causal, new_head=True, members=2, share_backbone=False)
    model.save_pretrained(tmp_path / "ensemble")
    with pytest.raises(ModelError, match=r"ensemble: the members .* different backbones.*got member-1"):
        merge("linear", [tmp_path / "ensemble", tmp_path / "ensemble"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_that_only_lends_its_configuration_needs_no_head(rewards: list[Path], tmp_path: Path) -> None:
    shutil.copytree(rewards[2], tmp_path / "base")
    for file in (tmp_path / "base").glob("reward_head.*"):
        file.unlink()
    merge("linear", rewards[:2], tmp_path / "out", base=tmp_path / "base")
    merge("linear", rewards[:2], tmp_path / "plain")
    assert (tmp_path / "out" / HEAD).read_bytes() == (tmp_path / "plain" / HEAD).read_bytes()


def test_a_head_that_no_filter_fits_is_known_before_anything_is_written(rewards: list[Path], tmp_path: Path) -> None:
    value = {"filters": {"model": 0.5, "layers": 0.5, "embeddings": 0.5, "norms": 0.5}}
    entries = [{"model": str(rewards[0]), "weight": value}, {"model": str(rewards[1])}]
    with pytest.raises(ConfigError, match="fits tensor `reward_head"):
        merge("linear", entries, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_models_that_differ_in_their_heads_alone_have_fingerprints_of_their_own(causal: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        RewardModel.from_pretrained(causal, new_head=True, seed=seed).save_pretrained(tmp_path / str(seed))
    merge("linear", [tmp_path / "0", tmp_path / "1"], tmp_path / "out", hash_inputs=True)
    card = (tmp_path / "out/README.md").read_text()
    assert len({line.split("|")[4] for line in card.splitlines() if line.endswith("` |") and "model |" in line}) == 2
    assert card.count(f": {HEAD} |") == 2


def test_heads_of_other_starts_are_told(causal: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = RewardModel.from_pretrained(causal, new_head=True)
    model.save_pretrained(tmp_path / "one")
    _move(model, 1)
    model.save_pretrained(tmp_path / "near")
    RewardModel.from_pretrained(causal, new_head=True, seed=1).save_pretrained(tmp_path / "far")
    merge("linear", [tmp_path / "one", tmp_path / "near"], tmp_path / "sound")
    assert "began from other weights" not in caplog.text
    merge("linear", [tmp_path / "one", tmp_path / "far"], tmp_path / "mixed")
    assert f"the reward heads of {tmp_path / 'one'} and {tmp_path / 'far'} have a cosine of" in caplog.text


def test_distances_count_heads(causal: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        RewardModel.from_pretrained(causal, new_head=True, seed=seed).save_pretrained(tmp_path / str(seed))
    found = diff(tmp_path / "0", tmp_path / "1")
    apart = {name for name, one in found.tensors.items() if one.squared_difference > 0}
    assert apart == {"reward_head.0.inner.weight", "reward_head.0.outer.weight"}
    assert found.by_part()["head"].count > 0 and "other" not in found.by_part()


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_merge_killed_in_the_head_goes_on_to_the_same_bytes(
    done: int, rewards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge("linear", rewards[:2], tmp_path / "whole")
    method = registry.get("merger", "linear")
    merge_chunk, left = method.merge_chunk, done

    def stop(self: Merger, chunk: Chunk, measured: Any) -> torch.Tensor:
        nonlocal left
        if chunk.name.startswith("reward_head."):
            if not left:
                raise KeyboardInterrupt
            left -= 1
        return merge_chunk(self, chunk, measured)

    with monkeypatch.context() as patch:
        patch.setattr(method, "merge_chunk", stop)
        with pytest.raises(KeyboardInterrupt):
            merge("linear", rewards[:2], tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    merge("linear", rewards[:2], tmp_path / "out", resume=True)
    for name in (HEAD, "model.safetensors", "reward_head.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_value_models_are_merged_with_their_heads_and_with_no_other_kind(
    causal: Path, rewards: list[Path], tmp_path: Path
) -> None:
    for number in (0, 1):
        model = ValueModel.from_pretrained(causal, new_head=True)
        _move(model, number)
        model.save_pretrained(tmp_path / str(number))
    merge("linear", [tmp_path / "0", tmp_path / "1"], tmp_path / "out")
    merged, *own = (load_file(tmp_path / name / "value_head.safetensors") for name in ("out", "0", "1"))
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, (own[0][key] + own[1][key]) / 2)
    with torch.no_grad():
        found = ValueModel.from_pretrained(tmp_path / "out").token_values(random_batch(2, 2))
    assert bool(found.isfinite().all()) and bool(found.any())
    for other, said in ((rewards[0], "got reward_head, and value_head in"), (causal, "got no head, and value_head in")):
        with pytest.raises(ModelError, match=f"of the same head only; {said}"):
            merge("linear", [tmp_path / "0", other], tmp_path / "apart")
    (tmp_path / "1/value_head.json").unlink()
    with pytest.raises(ModelError, match="the value head is not whole"):
        merge("linear", [tmp_path / "0", tmp_path / "1"], tmp_path / "apart")
