"""`max_length` that isn't set is what the model allows, and is said, written and held to."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from toy import ToyPolicy, toy

from rlhf_core import registry
from rlhf_core.config.training import TrainerConfig
from rlhf_core.config.yaml_file import load_yaml
from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


def trained(output: Path | None, positions: int, **options: Any) -> Any:
    cls = registry.get("trainer", "sft")
    config = cls.Config(max_steps=1, batch_size=2, logging={"progress": False}, **options)
    policy = PolicyModel(tiny_model(max_positions=positions), tiny_tokenizer())
    rows = [{"prompt": "q", "response": "a" * 2000}, {"prompt": "q", "response": "b"}]
    return cls(config, model=policy, data=rows, output=output)


@pytest.mark.parametrize(("positions", "length"), [(512, 512), (1024, 1024), (2048, 1024)])
def test_the_model_gives_it(tmp_path: Path, positions: int, length: int, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trained(tmp_path, positions)
    with caplog.at_level(logging.INFO):
        result = trainer.train()
    assert result.tokens == length + 4  # The long row is cut; the short one is a beginning, q, b and an end.
    assert f"max_length: {length}, " in caplog.text and trainer.config.max_length == length
    assert load_yaml(tmp_path / "config.yaml")[0]["max_length"] == length
    assert "max_length" not in load_yaml(tmp_path / "config.input.yaml")[0]
    assert trained(tmp_path, positions).train(resume=True).step == 1
    with pytest.raises(ConfigError, match=rf"max_length: {length} → 300"):
        trained(tmp_path, positions, max_length=300).train(resume=True)


def test_one_that_was_set_is_not_left_out_on_resume(tmp_path: Path) -> None:
    trained(tmp_path, 512, max_length=300).train()
    with pytest.raises(ConfigError, match="max_length: 300 → 512"):
        trained(tmp_path, 512).train(resume=True)


def test_a_model_that_does_not_say_takes_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ToyPolicy, "max_positions", None)
    trainer = toy(max_length=None, max_steps=1)
    trainer.train()
    assert trainer.config.max_length == 1024


def test_one_that_was_set_and_is_too_long_is_still_refused() -> None:
    with pytest.raises(ConfigError, match=r"longer than the model's positions; got 600 for a model of 512"):
        trained(None, 512, max_length=600).train()


def test_without_a_model_null_is_a_number_too() -> None:
    assert TrainerConfig().length_limit == 1024 and TrainerConfig(max_length=7).length_limit == 7
    assert json.loads(TrainerConfig().model_dump_json())["max_length"] is None


@pytest.mark.parametrize("method", ["kto", "process_reward", "dpo"])
def test_methods_take_the_number(method: str) -> None:
    cls = registry.get("trainer", method)
    rows: list[dict[str, Any]] = [{"prompt": f"q{i}", "chosen": "a" * 900, "rejected": "b\n\nc"} for i in range(4)]
    if method == "kto":
        rows = [
            {"prompt": f"q{i}", "response": "a" * (i + 1), "label": "undesirable" if i % 2 else "desirable"}
            for i in range(4)
        ]
    policy = PolicyModel(tiny_model(max_positions=128), tiny_tokenizer())
    config = cls.Config(max_steps=1, batch_size=4, logging={"progress": False})
    trainer = cls(config, model=policy, data=rows)
    assert trainer.train().step == 1 and trainer.config.max_length == 128
