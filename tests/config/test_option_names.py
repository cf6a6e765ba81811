"""Options of a configuration by their dotted names: what a flag may set, and what counts as one option."""

from __future__ import annotations

from types import NoneType

import pytest
from pydantic import Field

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.fields import option_at, single_options
from rlhf_core.config.training import TrainerConfig
from rlhf_core.infra.errors import ConfigError


class Inner(BaseConfig):
    top_k: int = 1


class Other(BaseConfig):
    rank: int = 1


class Options(BaseConfig):
    plain: float = 0.5
    always: Inner = Field(default_factory=Inner)
    maybe: Inner | None = None
    left_out: Other | None = None
    by_name: dict[str, int | str] = Field(default_factory=dict)
    listed: list[Inner] = Field(default_factory=list)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("plain", ("plain", (float,))),
        ("always.top-k", ("always.top_k", (int,))),
        ("maybe", ("maybe", (Inner, NoneType))),
        ("maybe.top_k", ("maybe.top_k", (int,))),
        ("by-name.a-b", ("by_name.a-b", (int, str))),  # the key of a mapping stays as typed
        ("by_name.a.b", None),
        ("listed.top_k", None),
        ("plain.x", None),
        ("nothing", None),
    ],
)
def test_an_option_is_found_by_its_flag(name: str, found: tuple[str, tuple[type, ...]] | None) -> None:
    assert option_at(Options, name) == found


def test_a_group_that_may_be_off_is_one_option() -> None:
    names = list(single_options(Options, without=(Other,)))
    assert names == ["plain", "always.top_k", "maybe", "by_name", "listed"]


@pytest.mark.parametrize(("given", "ours"), [("bfloat16", "bf16"), ("torch.float16", "fp16"), ("FP32", "float32")])
def test_formats_of_numbers_have_their_names_here(given: str, ours: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean `{ours}`"):
        TrainerConfig.parse({"precision": given}, place="file")
