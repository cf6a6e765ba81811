"""Data are checked before a model is loaded, and read once all the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlhf_core import registry
from rlhf_core.infra.errors import ConfigError, DataError, ModelError, RLHFError
from rlhf_core.testing.tiny import save_tiny

GOOD = {"prompt": "q", "response": "a"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", layers=1, hidden=16, max_positions=64)


def _trainer(model: Path, rows: list[dict[str, Any]], **options: Any) -> Any:
    data = model.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cls = registry.get("trainer", "sft")
    config = cls.Config(max_steps=1, batch_size=2, logging={"progress": False}, **options)
    return cls(config, model=str(model), data=str(data))


@pytest.mark.parametrize(
    ("rows", "options", "kind", "problem"),
    [
        ([GOOD, {"prompt": "q", "response": ""}], {}, DataError, "rows.jsonl:2: `response` is an empty response"),
        ([GOOD] * 2, {"dataset": {"columns": {"promt": "q"}}}, ConfigError, "no column `promt`"),
        ([GOOD] * 2, {"max_length": 65}, ConfigError, "longer than the model's positions"),
        ([GOOD] * 2, {}, ModelError, "model.safetensors"),
    ],
)
def test_a_mistake_in_the_data_is_told_before_the_weights_are_read(
    model: Path, rows: list[dict[str, Any]], options: dict[str, Any], kind: type[RLHFError], problem: str
) -> None:
    (model / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(kind) as error:
        _trainer(model, rows, **options).train()
    assert problem in str(error.value) or kind is ModelError


def test_the_rows_are_read_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = _trainer(model, [{"question": "q", "answer": "a"}] * 3)
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert caplog.text.count("rows read as") == 1
    assert caplog.text.count("plain text, and the model's chat template isn't applied") == 1
    assert caplog.text.count("max_length: 64") == 1 and trainer.config.max_length == 64


def test_that_rows_are_plain_text_is_said_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = _trainer(model, [GOOD] * 3)
    trainer.eval_data = [GOOD] * 2
    trainer.train()
    assert caplog.text.count("chat template isn't applied") == 1
    caplog.clear()
    mixed = _trainer(
        model, [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}] * 3
    )
    mixed.eval_data = [GOOD] * 2
    mixed.train()
    assert caplog.text.count("chat template isn't applied") == 1


def test_a_tokenizer_that_the_method_changes_reads_them_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = _trainer(model, [GOOD] * 3)
    build = trainer.build

    def with_other_end(loader: Any) -> Any:
        models = build(loader)
        loader.main_model.tokenizer.eos_token = "<|tool|>"
        return models

    lengths: list[list[int]] = []
    monkeypatch.setattr(trainer, "build", with_other_end)
    monkeypatch.setattr(trainer, "inspect", lambda data: lengths.append(data[0].responses[0]))
    trainer.train()
    assert lengths[0][-1] == trainer.models["policy"].tokenizer.convert_tokens_to_ids("<|tool|>")
