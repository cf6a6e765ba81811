"""Configurations: frozen, strict, described; and the YAML that fills them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError
from rlhf_plugins.trainers.dpo import DPOConfig
from rlhf_plugins.trainers.sft import SFTConfig

from rlhf_core.config.base import BaseConfig
from rlhf_core.config.presets import PRESETS, get_7b_model_config, get_70b_model_config, get_preset
from rlhf_core.config.run_file import RunConfig
from rlhf_core.config.training import LoraConfig, TrainerConfig
from rlhf_core.config.yaml_file import load_yaml, nest, overlay, parse_scalar
from rlhf_core.infra.errors import ConfigError

CONFIGS = [TrainerConfig, SFTConfig, DPOConfig, RunConfig]


def fault(values: dict[str, Any], cls: type[BaseConfig] = DPOConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        cls.parse(values)
    assert caught.value.exit_code == 2
    return caught.value.line()


@pytest.fixture
def yaml(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert caught.value.exit_code == 2
    return caught.value.line()


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"lerning_rate": 1}, "unknown option `lerning_rate`; fix: did you mean `learning_rate`?"),
    "unknown key in a group": ({"lora": {"rnk": 8}}, "unknown option `lora.rnk`; fix: did you mean `rank`?"),
    "nothing near": ({"lora": {"zzz": 8}}, "unknown option `lora.zzz`; fix: use one of: alpha, dropout, exclude_modules,"),
    "negative rate": ({"learning_rate": -1e-5}, "`learning_rate`: must be greater than 0; got -1e-05"),
    "NaN rate": ({"learning_rate": float("nan")}, "`learning_rate`: must be a finite number; got nan"),
    "infinite rate": ({"learning_rate": float("inf")}, "`learning_rate`: must be a finite number; got inf"),
    "zero steps": ({"max_steps": 0}, "`max_steps`: must be greater than or equal to 1; got 0"),
    "zero rows": ({"batch_size": 0}, "`batch_size`: must be greater than or equal to 1; got 0"),
    "half a step": ({"max_steps": 1.5}, "`max_steps`: must be a whole number"),
    "no as text": ({"lr_schedule": False}, "`lr_schedule`: must be 'cosine', 'linear' or 'constant'; got False; fix:"),
    "yes as a number": ({"max_steps": True}, "`max_steps`: must be a number; got True; fix: YAML reads yes, no, on and off"),
    "true as a number": ({"batch_size": True}, "`batch_size`: must be a number; got True"),
    "no as a number": ({"seed": False}, "`seed`: must be a number; got False"),
    "on as a rate": ({"optimizer": {"beta1": True}}, "`optimizer.beta1`: must be a number; got True"),
    "a group that is none": ({"lora": 8}, "`lora`: expected a group of options (rank, alpha, dropout, target_"),
    "one checkpoint": ({"checkpoint": {"keep": 1}}, "`checkpoint.keep`: must be greater than or equal to 2; got 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_wrong_value_is_one_line(case: str) -> None:
    values, expected = FAULTS[case]
    line = fault(values)
    assert line.startswith(f"error[config] config: {expected}"), line
    assert "\n" not in line


class Inner(BaseConfig):
    count: int = 1


class Outer(BaseConfig):
    listed: list[Inner] | None = None
    filled: list[int] = Field([1], min_length=1)
    named: dict[str, list[float] | Inner] = Field(default_factory=dict)
    text: str | list[Inner] = ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"listed": [{}, {"cuont": 1}]}, "unknown option `listed.1.cuont`; fix: did you mean `count`?"),
        ({"filled": []}, "`filled`: must not be empty; got []"),
        ({"listed": [3]}, "`listed.0`: expected a group of options (count); got 3"),
        ({"named": {"a": ["x"]}}, "`named.a.0`: must be a number; got 'x'"),
        ({"named": {"a": {"count": "x"}}}, "`named.a"),
        ({"text": [{"count": "x"}]}, "`text`: must be text"),
    ],
)
def test_keys_inside_lists_and_mappings_are_named(values: dict[str, Any], message: str) -> None:
    """Without the names of types that pydantic puts between them where a value may be of several."""
    found = fault(values, Outer)
    assert message in found and "Inner" not in found and "list[" not in found


def test_text_in_place_of_a_number_is_read_as_one() -> None:
    assert DPOConfig.parse({"learning_rate": "1e-5"}).learning_rate == 1e-5


def test_a_configuration_cannot_be_changed() -> None:
    config = DPOConfig.parse({"lora": {}})
    assert config.lora is not None
    for owner, name in ((config, "beta"), (config.lora, "rank")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(owner, name, 3)
    changed = config.updated(beta=0.3)
    assert (changed.beta, config.beta, changed.lora) == (0.3, DPOConfig().beta, config.lora)
    with pytest.raises(ConfigError, match="greater than 0"):
        config.updated(beta=-1)


def test_python_refuses_unknown_keys_too() -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        DPOConfig(bta=0.1)  # type: ignore[call-arg]


def test_groups_are_switched_by_a_flag() -> None:
    assert TrainerConfig.parse({"lora": True}).lora == LoraConfig()
    assert TrainerConfig.parse({"lora": False, "early_stopping": False}).lora is None


def groups(cls: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield cls
    for field in cls.model_fields.values():
        for member in (field.annotation, *get_args(field.annotation)):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from groups(member)


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_option_is_described_and_every_group_is_strict(cls: type[BaseModel]) -> None:
    for group in groups(cls):
        assert group.model_config["extra"] == "forbid" and group.model_config["frozen"], group
        for name, field in group.model_fields.items():
            assert field.description and field.description.endswith("."), f"{group.__name__}.{name}"


@pytest.mark.parametrize("cls", CONFIGS)
def test_the_schema_says_what_is_accepted(cls: type[BaseModel]) -> None:
    schema = cls.model_json_schema()
    assert schema["additionalProperties"] is False and schema["properties"].keys() == cls.model_fields.keys()
    for field in schema["properties"].values():
        # A group whose own description says the same bears it in its definition.
        assert "description" in field or schema["$defs"][field["$ref"].rsplit("/", 1)[1]]["description"]


def test_a_configuration_survives_json() -> None:
    config = DPOConfig.parse(get_7b_model_config(beta=0.2))
    assert DPOConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize("preset", [get_7b_model_config, get_70b_model_config])
def test_presets_are_options_of_every_method(preset: Callable[..., dict[str, Any]]) -> None:
    config = DPOConfig(**preset(beta=0.3, batch_size=6))
    assert (config.beta, config.batch_size, config.precision) == (0.3, 6, "bf16")
    assert config.lora is not None and SFTConfig(**preset()).lora == config.lora


def test_the_larger_preset_quantises_its_base() -> None:
    seven, seventy = DPOConfig(**get_7b_model_config()), DPOConfig(**get_70b_model_config())
    assert seven.lora is not None and seventy.lora is not None
    assert (seven.lora.quantize, seventy.lora.quantize) == ("none", "4bit")


def test_a_preset_has_a_learning_rate_for_its_adapters() -> None:
    """Ten times the method's own, which is for every weight; one that was given stays, and without adapters there is none."""
    assert DPOConfig(**get_7b_model_config(DPOConfig)).learning_rate == pytest.approx(10 * DPOConfig().learning_rate)
    assert SFTConfig(**get_70b_model_config(SFTConfig)).learning_rate == pytest.approx(10 * SFTConfig().learning_rate)
    assert get_7b_model_config(DPOConfig, learning_rate=3e-6)["learning_rate"] == 3e-6
    for options in (get_7b_model_config(DPOConfig, lora=None), get_7b_model_config()):
        assert "learning_rate" not in options


def test_a_preset_that_was_changed_is_the_callers_alone() -> None:
    mine = get_preset("7b")
    mine["lora"]["rank"] = 99
    mine["checkpoint"]["every"] = 1
    assert PRESETS["7b"]["lora"]["rank"] == 16 and PRESETS["70b"]["checkpoint"]["every"] == 200


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset `8b`; fix: .*70b, 7b") as caught:
        get_preset("8b")
    assert caught.value.exit_code == 2


def test_a_file_gives_values_and_their_lines(yaml: Callable) -> None:
    path = yaml("# mine\nbeta: 0.1\nlora:\n  rank: 8\n")
    assert load_yaml(path) == (
        {"beta": 0.1, "lora": {"rank": 8}},
        {"": str(path), "beta": f"{path}:2", "lora": f"{path}:3", "lora.rank": f"{path}:4"},
    )


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", "1.0e-5", "+1e-5", "0.00001"])
def test_numbers_in_any_spelling(yaml: Callable, text: str) -> None:
    assert load_yaml(yaml(f"rate: {text}\n"))[0] == {"rate": 1e-5}
    assert parse_scalar(text) == 1e-5


@pytest.mark.parametrize("text", ["e5", "1e", "1e-5x", "v1e5", "'1e-5'"])
def test_what_only_looks_like_a_number_stays_text(yaml: Callable, text: str) -> None:
    assert isinstance(load_yaml(yaml(f"rate: {text}\n"))[0]["rate"], str)


@pytest.mark.parametrize(
    ("text", "value"), [("010", 10), ("1_000", 1000), ("0x1f", 31), ("-3", -3), ("1:30", "1:30"), (".5", 0.5)]
)
def test_numbers_mean_what_people_mean(yaml: Callable, text: str, value: object) -> None:
    assert load_yaml(yaml(f"a: {text}\n"))[0] == {"a": value}
    assert parse_scalar(text) == value


FILES: dict[str, tuple[str | bytes, str]] = {
    "key twice": ("a: 1\nb: 2\na: 3\n", ":3: duplicate key `a` (lines 1 and 3); fix: remove one of them"),
    "key twice in a group": ("g:\n  a: 1\n  a: 1\n", ":3: duplicate key `a` (lines 2 and 3)"),
    "key twice on a line": ("g: {a: 1, a: 2}\n", ":1: duplicate key `a` (lines 1 and 1)"),
    "key twice in a list": ("g: [{a: 1, a: 2}]\n", ":1: duplicate key `a`"),
    "tag": ("a: !!python/name:os.system\n", ":1: not valid YAML: could not determine a constructor for the tag"),
    "own tag": ("a: !include other.yaml\n", ":1: not valid YAML: could not determine a constructor for the tag '!include'"),
    "alias": ("a: &x 1\nb: *x\n", ":2: YAML aliases are not accepted; got *x; fix: write the value out"),
    "bomb": ("a: &a [z]\nb: &b [*a,*a]\nc: [*b,*b]\n", ":2: YAML aliases are not accepted; got *a"),
    "merged key": ("a: &a {b: 1}\nc:\n  <<: *a\n", ":3: YAML aliases are not accepted"),
    "two documents": ("a: 1\n---\nb: 2\n", ":2: not valid YAML: but found another document"),
    "no mapping": ("[1, 2]\n", ": expected a mapping of options to values; got [1, 2]; fix: write `name: value`"),
    "empty": ("", ": expected a mapping of options to values; got None"),
    "tab": ("a:\n\tb: 1\n", ":2: not valid YAML: found character '\\t' that cannot start any token; fix: indent with blanks"),
    "not UTF-8": (b"a: \xff\n", ": is not UTF-8; got a bad byte at offset 3"),
    "control character": ("a: \x01\n", ": not valid YAML: unacceptable character"),
    "a list as a key": ("? [a]\n: 1\n", ":1: not valid YAML: found unhashable key"),
    "no such date": ("a: 2024-02-31\n", ": not valid YAML: day is out of range"),
    "nested too deeply": ("a: " + "[" * 9000, ": not valid YAML: nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_wrong_file_is_one_line_with_its_place(yaml: Callable, case: str) -> None:
    content, expected = FILES[case]
    path = yaml(content)
    line = refused(path)
    assert line.startswith(f"error[config] {path}{expected}") and "\n" not in line, line


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert refused(tmp_path / "gone.yaml") == f"error[config] {tmp_path / 'gone.yaml'}: no such file"
    assert refused(tmp_path) == f"error[config] {tmp_path}: is a directory, not a file; fix: name a YAML file"
    (tmp_path / "config.yaml").write_text("")
    assert refused(tmp_path).endswith(f"not a file; fix: name the file in it, {tmp_path / 'config.yaml'}")


def test_a_byte_order_mark_is_fine(yaml: Callable) -> None:
    assert load_yaml(yaml(b"\xef\xbb\xbfa: 1\r\n"))[0] == {"a": 1}


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("true", True), ("null", None), ("[a, 1]", ["a", 1]), ("{rank: 8}", {"rank": 8}), ("a: *b", "a: *b"),
     ("[", "["), ("2024-02-31", "2024-02-31"), ("# no comment", "# no comment"), ("", None)],
)  # fmt: skip
def test_a_flag_is_read_as_yaml_or_is_text(text: str, value: object) -> None:
    assert parse_scalar(text) == value


keys = st.sampled_from(["a", "b", "c"])
trees = st.dictionaries(
    keys, st.recursive(st.integers() | st.none(), lambda inner: st.dictionaries(keys, inner, min_size=1), max_leaves=6)
)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


@given(trees)
def test_dotted_keys_and_groups_are_the_same(tree: dict[str, Any]) -> None:
    assert nest(flat(tree)) == tree


@given(trees, trees)
def test_what_is_laid_over_wins_and_the_rest_stays(base: dict[str, Any], over: dict[str, Any]) -> None:
    merged = overlay(base, over)
    below, above, found = flat(base), flat(over), flat(merged)
    assert all(found[key] == value for key, value in above.items())
    untouched = [
        key for key in below if not any(f"{key}.".startswith(f"{k}.") or f"{k}.".startswith(f"{key}.") for k in above)
    ]
    assert all(found[key] == below[key] for key in untouched)
    assert overlay(merged, over) == merged
