"""Rewards from a file and from flags: values keep their types, and a wrong one is found before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import Field

from rlhf_core import registry
from rlhf_core.cli import main
from rlhf_core.config.base import BaseConfig
from rlhf_core.config.flags import convert, lex
from rlhf_core.config.online import OnlineConfig, RewardConfig
from rlhf_core.config.training import ModelConfig, TrainingStage
from rlhf_core.contracts.reward import RewardFn, Sample
from rlhf_core.contracts.trainer import Loss, Trainer
from rlhf_core.infra.errors import ConfigError
from rlhf_core.training.job import load_job


class WindowConfig(BaseConfig):
    threshold: float = Field(0.5, description="Larger lets less through.")
    mode: str = Field("", description="Either.")


class Window(RewardFn):
    """Never made here: what is wrong is found without it."""

    api = 1
    Config = WindowConfig

    def __init__(self, config: Any = None) -> None:
        raise AssertionError("a reward was made")

    def score(self, samples: Sequence[Sample]) -> list[float]:
        raise AssertionError


class Online(Trainer[Any]):
    """Learns from rewards; never trained here."""

    api = 1
    record = "prompt"
    stage = TrainingStage.POLICY
    Config = OnlineConfig

    def weights(self, batch: Any) -> Mapping[str, float]:
        raise AssertionError

    def loss(self, batch: Any) -> Loss:
        raise AssertionError


def count(completions: Any, least: int = 0) -> list[float]:
    raise AssertionError


@pytest.fixture(autouse=True)
def plugins() -> None:
    registry.register("reward", "window", Window)
    registry.register("trainer", "online", Online)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(rewards: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(f"method: online\nmodel: m\ndata: d\noutput: {tmp_path}/out\n{rewards}")
        return path

    return write


def rewards(*flags: str, target: str | Path = "online") -> list[RewardConfig]:
    given = ["--model", "m", "--data", "d", "--output", "o"] if target == "online" else []
    return load_job(target, flags=[*given, *flags]).options.rewards  # type: ignore[attr-defined]


def test_flags_name_rewards_alone_repeated_or_with_options() -> None:
    assert rewards("--rewards", "window") == [RewardConfig(name="window")]
    found = rewards(
        "--rewards", "window", "--rewards", "{name: window, weight: 0.5, options: {threshold: 0.7, mode: '1'}}",
        "--rewards", f"{__name__}:count",
    )  # fmt: skip
    assert [one.name for one in found] == ["window", "window", f"{__name__}:count"]
    assert found[1].weight == 0.5 and found[1].options == {"threshold": 0.7, "mode": "1"}
    assert rewards("--rewards={name: window, options: {threshold: 1e-5}}")[0].options == {"threshold": 1e-5}
    assert [one.name for one in rewards("--rewards", "[window, local:window]")] == ["window", "local:window"]


def test_a_name_that_looks_like_a_number_stays_a_name() -> None:
    registry.register("reward", "2024", Window)
    assert rewards("--rewards", "2024")[0].name == "2024"


def test_a_file_names_rewards_alone_or_with_options(file: Any) -> None:
    one = rewards(target=file("rewards: window\n"))
    several = rewards(target=file("rewards:\n  - window\n  - {name: window, weight: 2, options: {threshold: 1}}\n"))
    group = rewards(target=file("rewards: {name: window, time_limit: null}\n"))
    assert [len(found) for found in (one, several, group)] == [1, 2, 1]
    assert several[1].options == {"threshold": 1} and group[0].time_limit is None


FAULTS: dict[str, tuple[str, int]] = {
    "rewards: windw\n": ("run.yaml:5: unknown reward `windw`; fix: did you mean `window`?", 2),
    "rewards:\n- window\n- windw\n": ("run.yaml:7: unknown reward `windw`", 2),
    "rewards:\n- {name: window,\n   options: {treshold: 1}}\n": (
        "run.yaml:7: unknown option `rewards.0.options.treshold`; fix: did you mean `threshold`?",
        2,
    ),
    "rewards:\n- name: window\n  options:\n    threshold: high\n": (
        "run.yaml:8: `rewards.0.options.threshold`: must be a number; got 'high'",
        2,
    ),
    f"rewards:\n- name: {__name__}:count\n  options: {{least: much}}\n": ("run.yaml:7: argument `least` of `count`: must be", 2),
    f"rewards:\n- {__name__}:cont\n": ("run.yaml:6: unknown reward", 2),
    "rewards:\n- name: window\n  weight: heavy\n": ("run.yaml:7: `rewards.0.weight`: must be a number; got 'heavy'", 2),
    "rewards: []\n": ("run.yaml:5: no rewards are given; fix: set `rewards`, a list of names (", 2),
    "": ("run.yaml: no rewards are given", 2),
    "rewards:\n- broken:f\n": ("run.yaml:6: importing `broken` raised an error; got ZeroDivisionError: division by zero", 5),
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS)
@pytest.mark.parametrize("command", [["validate"], ["train", "--dry-run"], ["train"]], ids=" ".join)
def test_a_wrong_reward_is_one_line_before_anything_is_loaded(
    file: Any, capsys: Any, text: str, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, code = FAULTS[text]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken.py").write_text("1 / 0\n")
    assert main([command[0], str(file(text)), *command[1:]]) == code
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1, line
    assert not (tmp_path / "out").exists()


def test_a_wrong_key_hides_no_other_mistake(file: Any, capsys: Any) -> None:
    text = (
        "rewards:\n- name: window\n  weigth: 2\n- {name: windw, weight: x}\n- {name: window, options: {treshold: 1}}\n"
    )
    assert main(["validate", str(file(text))]) == 2
    lines = capsys.readouterr().err.splitlines()
    said = (
        "unknown option `rewards.0.weigth`",
        "`rewards.1.weight`: must be",
        "unknown reward `windw`",
        "options.treshold`",
    )
    assert len(lines) == 4 and all(one in line for one, line in zip(said, lines, strict=True)), lines


def test_a_flag_in_place_of_a_files_list_is_named_as_the_place(file: Any) -> None:
    path = file("rewards:\n- {name: window,\n   options: {threshold: 1}}\n")
    with pytest.raises(ConfigError, match=r"^--rewards: `rewards\.0\.options\.threshold`: must be a number"):
        load_job(path, flags=["--rewards", "{name: window, options: {threshold: much}}"])


def test_a_flag_replaces_a_files_rewards_whole(file: Any) -> None:
    path = file("rewards: {name: window, weight: 2, options: {threshold: 1}}\n")
    assert rewards("--rewards", "{name: local:window}", target=path) == [RewardConfig(name="local:window")]
    assert load_job(path, {"rewards": "window"}).options.rewards == [RewardConfig(name="window")]  # type: ignore[attr-defined]


def test_right_rewards_pass(file: Any, capsys: Any) -> None:
    path = str(file(f"rewards:\n- window\n- name: {__name__}:count\n  options: {{least: 2}}\n"))
    assert main(["validate", path]) == 0 and "ok:" in capsys.readouterr().out


def test_a_method_that_needs_no_rewards_does_without() -> None:
    class TeacherConfig(OnlineConfig):
        needs_rewards = False

    registry.register("trainer", "taught", type("Taught", (Online,), {"Config": TeacherConfig, "__doc__": "Learns."}))
    given = ["--model", "m", "--data", "d", "--output", "o"]
    assert load_job("taught", flags=given).options.rewards == []  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="--rewards: unknown reward `no`"):
        load_job("taught", flags=[*given, "--rewards", "no"])


class TaughtConfig(OnlineConfig):
    needs_rewards = False
    teacher: ModelConfig = Field(description="Who teaches.")


def test_a_path_alone_stands_for_its_model_beside_its_other_options(file: Any) -> None:
    registry.register("trainer", "online", type("Taught", (Online,), {"Config": TaughtConfig, "__doc__": "Learns."}))
    given = ["--model", "m", "--data", "d", "--output", "o"]
    alone = load_job("online", flags=[*given, "--teacher", "2024"]).options.teacher  # type: ignore[attr-defined]
    assert alone == ModelConfig(path="2024")
    wanted = ModelConfig(path="t", precision="bf16")
    for flags in (["--teacher", "t", "--teacher.precision", "bf16"], ["--teacher.precision", "bf16", "--teacher", "t"]):
        assert load_job("online", flags=[*given, *flags]).options.teacher == wanted  # type: ignore[attr-defined]
    for text in ("teacher: t\n", "teacher: {path: t, precision: fp16}\n"):
        found = load_job(file(text), flags=["--teacher.precision", "bf16"]).options.teacher  # type: ignore[attr-defined]
        assert found == wanted


class MappedConfig(BaseConfig):
    options: dict[str, Any] = Field(default_factory=dict, description="Anything.")
    weights: dict[str, float] = Field(default_factory=dict, description="Numbers.")
    columns: dict[str, str] = Field(default_factory=dict, description="Text.")
    lists: dict[str, list[str]] = Field(default_factory=dict, description="Lists.")


def test_an_entry_of_a_mapping_has_the_type_of_its_values() -> None:
    flags = (
        "--options.threshold 0.5 --options.strict true --options.name exact --options.none null --options.ids [1,2]"
        " --weights.a 1e-3 --columns.prompt 2024 --columns.answer yes --lists.a 1 --lists.a 2"
    )
    values, places = convert(lex(flags.split()), MappedConfig, owner="mapped")
    assert values == {
        "options.threshold": 0.5, "options.strict": True, "options.name": "exact", "options.none": None, "options.ids": [1, 2],
        "weights.a": 1e-3, "columns.prompt": "2024", "columns.answer": "yes", "lists.a": ["1", "2"],
    }  # fmt: skip
    assert places["options.threshold"] == "--options.threshold"
