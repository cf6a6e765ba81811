"""Every causal language model of the installed transformers, from disk to disk: scored, trained, given an adapter, merged."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import kinds, make_tiny, most_parameters, own_logps
from batches import random_batch, relative

from rlhf_core import registry
from rlhf_core.infra.errors import ModelError
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.merge import ModelMerger
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_tokenizer

LARGE = 10_000_000
"""Parameters that are no tiny model any more."""

CANNOT = {
    "blt": "its patcher, a model of its own, has no small form",
    "cpmant": "not causal: a prompt sees all of itself",
    "gemma3n": "needs the package timm",
    "got_ocr2": "its picture tower has no small form; its text model is Qwen2",
    "fuyu": "its picture tower has no small form; its text model is Persimmon",
    "moss_transcribe_diarize": "its audio tower has no small form",
    "prophetnet": "predicts several tokens ahead from several streams of hidden states",
    "xlnet": "not causal: every token sees every other",
    "emu3": "transformers can't load what its text model saves",
    "mllama": "transformers can't load what its text model saves",
    "xlstm": "trains on multiples of its chunk size only",
}
"""Those that can't be trained here, or can't be made tiny, and why."""
NO_ADAPTER = {
    "inkling2_loop_text": "peft loses the names of its convolutions' weights on loading, and says so",
    "inkling2_text": "peft loses the names of its convolutions' weights on loading, and says so",
    "laguna": "peft loses the names of its shared experts on loading, and says so",
}
"""Those whose adapters peft can't bring back."""
NO_MERGE = ("hrm_text", "lara_mini", "sarvam_moe")
"""Those whose adapters a merge refuses, as their files hold matrices in one tensor that the model holds apart."""
SLOW = {"kimi_linear"}
"""Half a minute a forward pass on a CPU, in pure PyTorch."""

SFT = [{"prompt": "What is 2 + 3?", "response": "It is 5."}, {"prompt": "And 4?", "response": "Four, I think."}]
PAIRS = [{"prompt": "What is 2 + 3?", "chosen": "It is 5.", "rejected": "7"}] * 2


def saved(kind: str, path: Path) -> Path:
    try:
        parameters = most_parameters(kind)
    except Exception as error:
        pytest.skip(f"can't be made tiny by rules: {type(error).__name__}: {error}")
    if parameters > LARGE:
        pytest.skip(f"has {parameters / 1e6:.0f} million parameters at its smallest here")
    make_tiny(kind).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def train(method: str, model: Path, data: list[dict[str, Any]], output: Path, **options: Any) -> dict[str, float]:
    trainer = registry.get("trainer", method)
    settings = {"max_steps": 1, "batch_size": 2, "max_length": 64, "logging": {"progress": False}, **options}
    run = trainer(trainer.Config.parse(settings), model=str(model), data=data, output=output)
    return run.train().metrics


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_from_disk_to_disk(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    if kind in CANNOT:
        pytest.skip(CANNOT[kind])
    if kind in SLOW:
        pytest.skip("half a minute a forward pass on a CPU")
    caplog.set_level(logging.CRITICAL)
    base = saved(kind, tmp_path / "base")
    batch = random_batch(3, 2)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = own_logps(plain, batch)
    policy = PolicyModel.from_pretrained(base)
    for layout in ("auto", "padded"):
        policy.shared_forward.layout = layout  # type: ignore[assignment]
        assert relative(policy.eval().token_logps(batch).detach(), expected) < 1e-5, layout

    assert math.isfinite(train("sft", base, SFT, tmp_path / "sft")["loss"])
    trained = PolicyModel.from_pretrained(tmp_path / "sft/model").eval().token_logps(batch)
    assert relative(trained.detach(), expected) > 0

    if kind in NO_ADAPTER:
        return
    first = train("dpo", base, PAIRS, tmp_path / "dpo", lora={"rank": 2}, learning_rate=1e-2)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)

    adapter = tmp_path / "dpo/model"
    with_adapter = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    )
    by_peft = own_logps(with_adapter, batch)
    assert relative(by_peft, expected) > 1e-6, "the adapter changes nothing"
    loaded = PolicyModel.from_pretrained(adapter).eval().token_logps(batch)
    assert relative(loaded.detach(), by_peft) < 1e-5

    config = MergeConfig.parse(
        {"method": "linear", "models": [{"model": str(adapter)}], "output": str(tmp_path / "merged")}
    )
    if kind in NO_MERGE:
        with pytest.raises(ModelError, match="and others in one tensor"):
            ModelMerger(config).merge()
        return
    ModelMerger(config).merge()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(own_logps(merged, batch), by_peft) < 1e-5


@pytest.mark.slow
def test_most_of_them_are_tried() -> None:
    """The rules that make models tiny fit what is installed."""
    tried = 0
    for kind in kinds():
        try:
            tried += kind not in CANNOT and most_parameters(kind) <= LARGE
        except Exception:
            continue
    assert tried > 0.85 * len(kinds())
