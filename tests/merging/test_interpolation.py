"""`layer_wise_interpolation`: the model between two others, as far along as each layer says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merge_helpers import bytes_of, merge, read_weights, tiny_family

import rlhf_core
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.merging import layer_wise_interpolation


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, (model,) = tiny_family(tmp_path_factory.mktemp("family"), 1)
    return base, model


@pytest.mark.parametrize(
    ("t", "shares"),
    [
        (0.25, {"embed": 0.25, "layers.0": 0.25, "layers.1": 0.25, "norm": 0.25}),
        (1, {"embed": 1.0, "layers.0": 1.0, "layers.1": 1.0, "norm": 1.0}),
        ([0.0, 1.0], {"embed": 0.0, "layers.0": 0.0, "layers.1": 1.0, "norm": 1.0}),
        ((0.2, 0.5, 0.4), {"embed": 0.2, "layers.0": 0.2, "layers.1": 0.4, "norm": 0.4}),
        ({"layers": [0.5, 2.0], "default": 0}, {"embed": 0.0, "layers.0": 0.5, "layers.1": 2.0, "norm": 0.0}),
    ],
)
def test_each_layer_is_as_far_along_as_it_says(
    family: tuple[Path, Path], tmp_path: Path, t: Any, shares: dict[str, float]
) -> None:
    result = layer_wise_interpolation(*family, t, output=tmp_path / "out")
    base, model = (read_weights(path) for path in family)
    merged = read_weights(tmp_path / "out")
    assert result.output == tmp_path / "out" and merged.keys() == base.keys()
    for name, tensor in merged.items():
        share = next(shares[part] for part in ("layers.0", "layers.1", "embed", "norm") if part in name)
        torch.testing.assert_close(tensor, base[name] + share * (model[name] - base[name]), rtol=1e-5, atol=1e-6)


def test_it_is_the_same_as_the_method(family: tuple[Path, Path], tmp_path: Path) -> None:
    base, model = family
    rlhf_core.layer_wise_interpolation(str(base), str(model), [0.1, 0.8], output=str(tmp_path / "one"), dtype="bf16")
    merge("layer_wise", [model], tmp_path / "two", base=base, t=[0.1, 0.8], dtype="bf16")
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    with pytest.raises(StorageError, match="holds a model already"):
        layer_wise_interpolation(base, model, output=tmp_path / "one")
    layer_wise_interpolation(base, model, output=tmp_path / "one", overwrite=True)
    assert bytes_of(tmp_path / "one") != bytes_of(tmp_path / "two")


def test_what_is_wrong_is_named(family: tuple[Path, Path], tmp_path: Path) -> None:
    for t, settings, message in (
        ({"layers": [0.5]}, {}, "`t.layers` has 1 values, the model 2 layers"),
        ([], {}, "`t`: a list over the layers needs at least one value"),
        (0.5, {"dtpye": "bf16"}, "unknown option `dtpye`; fix: did you mean `dtype`?"),
    ):
        with pytest.raises(ConfigError) as raised:
            layer_wise_interpolation(*family, t, output=tmp_path / "out", **settings)  # type: ignore[arg-type]
        assert message in str(raised.value)
