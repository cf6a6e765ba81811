"""Distances between models, compared with numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from merge_helpers import tiny_family, write_weights

from rlhf_core.evaluation.weight_diff import Distance, diff, distance, draw, part_of
from rlhf_core.infra.errors import ConfigError, ModelError, StorageError
from rlhf_core.merging import CHUNK

A = {
    "model.embed_tokens.weight": torch.tensor([[3.0, 4.0]]),
    "model.layers.0.self_attn.q_proj.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    "model.layers.0.mlp.up_proj.weight": torch.tensor([[2.0, 0.0]]),
    "model.layers.10.mlp.up_proj.weight": torch.tensor([[0.0, 0.0]]),
    "model.layers.2.input_layernorm.weight": torch.tensor([1.0, 1.0]),
    "lm_head.weight": torch.tensor([[1.0, 1.0]]),
}
B = {
    **A,
    "model.layers.0.self_attn.q_proj.weight": torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
    "model.layers.0.mlp.up_proj.weight": torch.tensor([[2.0, 1.0]]),
    "model.layers.10.mlp.up_proj.weight": torch.tensor([[0.0, 2.0]]),
}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_weights(tmp_path / "a", A), write_weights(tmp_path / "b", B)


def test_numbers_by_hand() -> None:
    found = distance(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0]))
    assert (found.relative, found.cosine, found.largest, found.count) == (4 / 3, 0.6, 4.0, 2)
    nothing = distance(torch.zeros(2), torch.zeros(2))
    assert (nothing.relative, nothing.cosine) == (0.0, 1.0)
    grown = distance(torch.zeros(2), torch.ones(2))
    assert (grown.relative, grown.cosine, grown.as_dict()["relative"]) == (math.inf, 0.0, None)
    assert distance(torch.ones(2), -torch.ones(2)).cosine == pytest.approx(-1)
    assert Distance() + found == found


def test_tensors_layers_and_parts(pair: tuple[Path, Path]) -> None:
    found = diff(*pair)
    assert found.tensors["model.layers.0.self_attn.q_proj.weight"].relative == pytest.approx(math.sqrt(2))
    layers = found.by_layer()
    assert list(layers) == ["embeddings", "0", "2", "10", "head"]
    assert set(layers["0"]) == {"attention", "mlp", "all"}
    # (4 + 1) over (2 + 4) entries' squares.
    assert layers["0"]["all"].relative == pytest.approx(math.sqrt(5 / 6))
    assert layers["0"]["all"].largest == 1.0 and layers["embeddings"]["all"].relative == 0
    assert list(found.by_part()) == ["attention", "mlp", "norms", "embeddings", "head"]
    assert found.by_part()["mlp"].relative == pytest.approx(math.sqrt(5 / 4))
    assert found.total.squared_difference == 9
    assert found.as_dict()["layers"]["10"]["mlp"]["relative"] is None


def test_a_tensor_of_several_chunks_is_compared_whole(tmp_path: Path) -> None:
    """A float64 reference, to the rounding of sums in another order."""
    torch.manual_seed(0)
    a, b = torch.randn(3, CHUNK), torch.randn(3, CHUNK)
    found = diff(*(write_weights(tmp_path / name, {"x": one}) for name, one in (("a", a), ("b", b)))).total
    a, b = a.double(), b.double()
    assert found.count == 3 * CHUNK and found.largest == float((b - a).abs().max())
    assert found.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-12)
    assert found.cosine == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), rel=1e-10)


def test_progress_ends_at_the_bytes_of_all_tensors(tmp_path: Path) -> None:
    base, (model,) = tiny_family(tmp_path, 1)
    seen: list[tuple[int, int]] = []
    found = diff(base, model, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) == len(found.tensors) and seen[-1] == (4 * found.total.count, 4 * found.total.count)


def test_what_only_one_model_has_is_reported_and_left_out(tmp_path: Path) -> None:
    a = write_weights(tmp_path / "a", {"x": torch.ones(2), "y": torch.ones(2), "z": torch.ones(2)})
    b = write_weights(tmp_path / "b", {"x": torch.ones(2), "y": torch.ones(3), "w": torch.ones(2)})
    found = diff(a, b)
    assert (found.only, dict(found.reshaped)) == ((["z"], ["w"]), {"y": ((2,), (3,))})
    assert list(found.tensors) == ["x"]
    with pytest.raises(ModelError, match="has no tensor in common"):
        diff(a, write_weights(tmp_path / "c", {"y": torch.ones(4)}))


def test_a_nan_is_reported_with_its_tensor(tmp_path: Path) -> None:
    a, b = (
        write_weights(tmp_path / name, {"x": torch.tensor([1.0, value])})
        for name, value in (("a", 1.0), ("b", math.nan))
    )
    with pytest.raises(ModelError, match="tensor `x` holds values that are not finite"):
        diff(a, b)


def test_parts_by_name() -> None:
    names = {
        "model.layers.0.self_attn.q_norm.weight": "norms",
        "model.layers.0.self_attn.q_proj.weight": "attention",
        "transformer.h.0.mlp.c_fc.weight": "mlp",
        "transformer.wte.weight": "embeddings",
        "lm_head.weight": "head",
        "score.bias": "other",
    }
    assert {name: part_of(name) for name in names} == names


def test_the_picture(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = diff(*pair)
    draw(found, tmp_path / "d.png")
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="matplotlib can't write this image format"):
        draw(found, tmp_path / "d.txt")
    with pytest.raises(StorageError):
        draw(found, tmp_path / "gone" / "d.png")


def test_without_matplotlib_it_says_what_to_install(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-core\[plot\]'"):
        draw(diff(*pair), tmp_path / "d.png")
