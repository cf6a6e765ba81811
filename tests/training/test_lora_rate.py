"""A run that trains adapters at a rate for every weight warns once, with both rates; no other run does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rlhf_plugins.trainers.dpo import DPOConfig
from rlhf_plugins.trainers.sft import SFTConfig, SFTTrainer

from rlhf_core.config.training import LoraConfig, TrainerConfig
from rlhf_core.models import PolicyModel
from rlhf_core.testing.interrupted_runs import StoppedEarly, interruptible
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer
from rlhf_core.training.optimizer import warn_of_rate_for_every_weight

ROWS = [{"prompt": f"{number}", "response": "ab"} for number in range(4)]
ADAPTER = "policy.network.layers.0.q_proj.lora_A.default.weight"


def sft(output: Path | None, kind: Any = SFTTrainer, **options: Any) -> Any:
    config = SFTConfig.parse({"batch_size": 2, "logging": {"progress": False}, **options})
    model = PolicyModel(tiny_model(hidden=32, heads=2, kv_heads=1), tiny_tokenizer())
    return kind(config, model=model, data=ROWS, output=output)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if "LoRA adapters" in record.getMessage()]
    caplog.clear()
    return [text for text in found if text.startswith("learning_rate")]


def test_a_run_warns_once_and_not_when_it_is_resumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"lora": {"rank": 2}, "max_steps": 2, "checkpoint": {"every": 1}}
    run = sft(tmp_path / "run", interruptible(SFTTrainer), **options)
    run.stop_after = 1
    with pytest.raises(StoppedEarly):
        run.train()
    (line,) = warnings(caplog)
    assert "1e-05 fits training every weight" in line and line.endswith("is usual: 0.0001")
    sft(tmp_path / "run", interruptible(SFTTrainer), **options).train(resume=True)
    assert not warnings(caplog)


@pytest.mark.parametrize("options", [{}, {"lora": {"rank": 2}, "learning_rate": 1e-4}])
def test_other_runs_do_not(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    sft(None, max_steps=1, **options).train()
    assert not warnings(caplog)


class ForAdapters(TrainerConfig):
    """A method whose default rate is one for adapters."""

    learning_rate: float = 2e-4
    lora: LoraConfig | None = LoraConfig()


@pytest.mark.parametrize(
    ("config", "factors", "names", "rates"),
    [
        (DPOConfig(), {}, [ADAPTER], ("1e-06", "1e-05")),
        (DPOConfig(learning_rate=3.2e-6), {}, [ADAPTER], None),
        (DPOConfig(learning_rate=3.1e-6), {}, [ADAPTER], ("3.1e-06", "1e-05")),
        (DPOConfig(), {}, ["policy.network.layers.0.q_proj.weight"], None),
        (DPOConfig(), {"value": 10.0}, [ADAPTER.replace("policy", "value")], None),
        (DPOConfig(learning_rate=1e-5), {"value": 0.1}, [ADAPTER, ADAPTER.replace("policy", "value")], ("1e-06", "1e-05")),
        (ForAdapters(), {}, [ADAPTER], None),
        (ForAdapters(learning_rate=1e-6), {}, [ADAPTER], None),
    ],
)  # fmt: skip
def test_which_rates_are_small(
    config: TrainerConfig,
    factors: dict[str, float],
    names: list[str],
    rates: tuple[str, str] | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Below √10 times the method's default, which is one for every weight; each role at its own rate."""
    warn_of_rate_for_every_weight(names, config, factors)
    found = warnings(caplog)
    assert len(found) == (rates is not None)
    for line, (rate, usual) in zip(found, [rates] if rates else [], strict=True):
        assert f"{rate} fits" in line and line.endswith(usual)
