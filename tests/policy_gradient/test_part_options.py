"""A configuration whose options pick parts: its fields come from the tables, and what is wrong names the option."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

from rlhf_core.infra.errors import ConfigError
from rlhf_core.plugin import CLIPS, RATIOS, PartTable, PolicyGradientConfig, PolicyTerms


class TwoParts(PolicyGradientConfig):
    """Options of a method of a third party that takes a ratio and a clip."""

    tables: ClassVar[Mapping[str, PartTable]] = {"ratio": RATIOS, "clip": CLIPS}

    ratio: str = RATIOS.field("token")
    ratio_options: dict[str, Any] = RATIOS.options_field()
    clip: str = CLIPS.field("ppo")
    clip_options: dict[str, Any] = CLIPS.options_field()


def test_fields_describe_their_part() -> None:
    fields = TwoParts.model_fields
    assert fields["clip"].default == "ppo" and "`two_sided`" in (fields["clip"].description or "")
    assert (fields["clip_options"].description or "") == "Options of the clip; those left out are the part's defaults."


def test_parts_are_bound_with_their_options() -> None:
    """min(ρA, clip(ρ, 1 ± 0.1) A) at ρ = 2, A = 1 is 1.1."""
    config = TwoParts.parse({"clip_options": {"high": 0.1}})
    assert config.part("clip") == ("ppo", {"high": 0.1})
    assert config.choices() == {"ratio": "token", "clip": "ppo (low 0.2, high 0.1)"}
    one = torch.ones(1, 1)
    terms = PolicyTerms(
        logps=one.log() + torch.tensor(2.0).log(),
        old_logps=one.log(),
        log_ratio=torch.tensor([[2.0]]).log(),
        advantages=one,
        mask=one.bool(),
    )
    assert float(config.bound_parts()["clip"](terms)) == pytest.approx(1.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": "ppoo"}, "run.yaml:3: `clip`: unknown clip `ppoo`; fix: did you mean `ppo`?"),
        (
            {"clip_options": {"hihg": 1}},
            "run.yaml:4: clip `ppo` has no option `hihg`; got 1; fix: did you mean `high`?",
        ),
        ({"clip_options": {"high": "x"}}, "run.yaml:3: `clip_options.high`: option `high` of clip `ppo`: must be a"),
        ({"ratio_options": {"size": 1}}, "run.yaml:3: `ratio_options.size`: ratio `token` has no option `size`"),
        ({"generation": {"temperature": 0}}, "run.yaml:3: `generation.temperature`: completions of temperature 0"),
    ],
)
def test_what_is_wrong_names_the_option_and_its_place(options: dict[str, Any], message: str) -> None:
    places = {"": "run.yaml", **dict.fromkeys(options, "run.yaml:3"), "clip_options.hihg": "run.yaml:4"}
    with pytest.raises(ConfigError) as caught:
        TwoParts.parse(options, place=places)
    text = str(caught.value).replace("`clip_options.hihg`: ", "")
    assert text.startswith(message), str(caught.value)


def test_from_python_the_message_says_what_to_do_as_well() -> None:
    with pytest.raises(ConfigError, match=r"TwoParts: `clip`: unknown clip `ppoo`; fix: did you mean `ppo`"):
        TwoParts(clip="ppoo")


def test_a_kind_without_its_fields_is_refused_where_the_class_is_defined() -> None:
    with pytest.raises(
        TypeError, match=r"Half has `clip` in `tables` and no field `clip_options`: use the table's `options_field`"
    ):

        class Half(PolicyGradientConfig):
            tables: ClassVar[Mapping[str, PartTable]] = {"clip": CLIPS}

            clip: str = CLIPS.field("ppo")
