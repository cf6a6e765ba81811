"""The trainer of context compressors: its losses through transformers' `inputs_embeds`, who is trained by them, and the kit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import torch
from rlhf_plugins.trainers.context_compressor import ContextCompressorConfig, ContextCompressorTrainer
from torch import Tensor
from trainers_helpers import assert_refused, built, small_policy

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.models import PolicyModel
from rlhf_core.models.context_compressor import ContextCompressor
from rlhf_core.testing import TrainerContract
from rlhf_core.testing.tiny import save_tiny

OPTIONS: dict[str, Any] = {"keep_start": 1, "keep_end": 2, "chunk": 4, "ratios": [2, 4]}
PROMPTS = [[9, 40, 77, 12, 30, 31, 50, 51], [9, 20, 21, 22, 60, 61], [9, 70]]
RESPONSES = [[80, 81, 82], [83], [84, 85]]
RATIOS = [2.0, 4.0, 2.0]


class TestContextCompressor(TrainerContract):
    method = "context_compressor"
    options: ClassVar = {"keep_end": 2, "chunk": 8, "ratios": [2, 4]}


def batch() -> Batch:
    def table(rows: list[list[int]]) -> Tensor:
        return torch.tensor([row + [0] * (8 - len(row)) for row in rows])[:, : max(map(len, rows))]

    lengths = torch.tensor([len(one) for one in RESPONSES])
    return Batch(
        table(PROMPTS), torch.tensor([len(one) for one in PROMPTS]), table(RESPONSES), lengths, torch.arange(3),
        torch.arange(3) < lengths[:, None], rows=(0, 1, 2), per_prompt={"ratio": torch.tensor(RATIOS)},
    )  # fmt: skip


def by_hand(trainer: ContextCompressorTrainer, reader: Any) -> tuple[Tensor, Tensor]:
    """Return the sums of both losses, row by row, through `inputs_embeds`."""
    compressor, embed = trainer.compressor, reader.get_input_embeddings()
    totals = [torch.zeros(()), torch.zeros(())]
    for prompt, response, ratio in zip(PROMPTS, RESPONSES, RATIOS, strict=True):
        context, start, end = prompt[1:-2], prompt[: min(1, len(prompt))], prompt[max(1, len(prompt) - 2) :]
        (soft,) = compressor([context], [ratio])
        cases = [(torch.cat([embed(torch.tensor(start)), soft, embed(torch.tensor(end))]), response)]
        if context:
            cases.append((torch.cat([soft, compressor.head.marker]), context))
        for number, (rows, target) in enumerate(cases):
            given = torch.cat([rows, embed(torch.tensor(target))])[None]
            logps = reader(inputs_embeds=given).logits[0].log_softmax(-1)[len(rows) - 1 : -1]
            totals[number] = totals[number] - logps[torch.arange(len(target)), torch.tensor(target)].sum()
    return totals[0], totals[1]


def test_losses_and_gradients_are_those_of_a_loop_over_rows() -> None:
    trainer = built(ContextCompressorTrainer, **OPTIONS, reconstruction_weight=0.5)
    with torch.no_grad():
        for parameter in trainer.models["reader"].parameters():  # it is no longer what the compressor began with
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    loss = trainer.loss(batch())
    nll, repeated = by_hand(trainer, trainer.models["reader"].network)
    torch.testing.assert_close(loss.terms["nll"], nll, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(loss.terms["reconstruction"], 0.5 * repeated, atol=1e-4, rtol=1e-5)
    trained = [p for p in trainer.compressor.parameters() if p.requires_grad]
    ours = torch.autograd.grad(sum(loss.terms.values()), trained, allow_unused=True)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(nll + 0.5 * repeated, trained, allow_unused=True)
    for one, other in zip(ours, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert trainer.weights(batch()) == {"nll": 6.0, "reconstruction": 8.0}


def test_metrics_are_by_ratio() -> None:
    trainer = built(ContextCompressorTrainer, **OPTIONS)
    loss = trainer.loss(batch())
    sums = {name: (float(total.sum()), float(count.sum())) for name, (total, count) in loss.metrics.items()}  # type: ignore[union-attr]
    assert {name: count for name, (_, count) in sums.items()} == {"nll/at_2": 5, "nll/at_4": 1, "repeated/nll": 8}
    assert sums["nll/at_2"][0] + sums["nll/at_4"][0] == pytest.approx(float(loss.terms["nll"].detach()), rel=1e-5)


def test_with_an_adapter_the_reader_is_the_base() -> None:
    plain = built(ContextCompressorTrainer, **OPTIONS)
    adapted = built(ContextCompressorTrainer, **OPTIONS, lora={"rank": 2})
    assert "reader" not in adapted.models
    for name in ("nll", "reconstruction"):
        torch.testing.assert_close(
            adapted.loss(batch()).terms[name], plain.loss(batch()).terms[name], atol=1e-4, rtol=1e-5
        )
    with torch.no_grad():
        for name, parameter in adapted.compressor.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    nll, repeated = by_hand(adapted, copy.deepcopy(small_policy().network))
    found = adapted.loss(batch()).terms
    torch.testing.assert_close(found["nll"], nll, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found["reconstruction"], repeated, atol=1e-4, rtol=1e-5)


def test_recomputed_layers_have_the_adapter_as_it_was() -> None:
    """With gradient checkpointing the backward pass runs when the reader's adapter is on again."""
    found = []
    for checkpointing in (False, True):
        trainer = built(ContextCompressorTrainer, **OPTIONS, lora={"rank": 2}, gradient_checkpointing=checkpointing)
        trainer.compressor.train()
        with torch.no_grad():
            for name, parameter in trainer.compressor.named_parameters():
                if "lora_" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(0))
        trained = [p for p in trainer.compressor.parameters() if p.requires_grad]
        total = sum(trainer.loss(batch()).terms.values())
        found.append(torch.autograd.grad(total, trained, allow_unused=True))  # type: ignore[arg-type]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_compressor_needs_its_reader_to_be_trained_further(tmp_path: Path) -> None:
    first = ContextCompressor.on(PolicyModel.from_pretrained(save_tiny(tmp_path / "start")), chunk=8, ratios=(2, 4))
    first.save_pretrained(tmp_path / "compressor")
    with pytest.raises(ConfigError, match="set `reader` to the model that it was trained for"):
        built(ContextCompressorTrainer, model=str(tmp_path / "compressor"), **OPTIONS)


def test_another_reader_and_a_compressor_that_goes_on(tmp_path: Path) -> None:
    save_tiny(tmp_path / "reader", 5)
    first = ContextCompressor.on(PolicyModel.from_pretrained(save_tiny(tmp_path / "start")), chunk=8, ratios=(2, 4))
    first.save_pretrained(tmp_path / "compressor")
    trainer = built(
        ContextCompressorTrainer, model=str(tmp_path / "compressor"), reader=str(tmp_path / "reader"), **OPTIONS
    )
    assert trainer.compressor.chunk == 4 and trainer.compressor.head.slots == 4
    nll, _ = by_hand(trainer, PolicyModel.from_pretrained(tmp_path / "reader").network)
    torch.testing.assert_close(trainer.loss(batch()).terms["nll"], nll, atol=1e-4, rtol=1e-5)
    with pytest.raises(ConfigError, match="trained adapter"):
        adapted = small_policy().set_options(lora=ContextCompressorConfig.parse({"lora": {"rank": 2}}).lora)
        adapted.fresh_adapter = False
        built(ContextCompressorTrainer, model=adapted, **OPTIONS)


def recall(seed: int, count: int) -> list[dict[str, str]]:
    """Rows whose response is the letter that the context repeats."""
    draw = Random(seed)
    letters = [draw.choice("abcdefgh") for _ in range(count)]
    return [{"prompt": letter * 8 + "?", "response": letter} for letter in letters]


def test_it_learns_to_tell_a_frozen_reader_what_the_context_said(tmp_path: Path) -> None:
    policy = small_policy()
    before = copy.deepcopy(policy.state_dict())
    options: dict[str, Any] = {
        "keep_end": 1, "keep_start": 1, "chunk": 8, "ratios": [4], "learning_rate": 1e-2, "max_steps": 60, "batch_size": 16,
        "max_length": 32, "reconstruction_weight": 0.1, "dataset": {"wrap": "none"}, "optimizer": {"weight_decay": 0.0},
    }  # fmt: skip
    trainer = ContextCompressorTrainer(
        ContextCompressorConfig.parse(options | {"eval_steps": 60}),
        model=policy, data=recall(0, 960), eval_data=recall(1, 32), output=tmp_path / "run",
    )  # fmt: skip
    trainer.train()
    events = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    start, end = (event["metrics"] for event in events if event["event"] == "evaluated")
    assert end["eval_nll/at_4"] < start["eval_nll/at_4"] / 2
    reader = trainer.models["reader"].network.state_dict()
    assert all(torch.equal(reader[name], value) for name, value in before.items() if name in reader)
    loaded = ContextCompressor.from_pretrained(tmp_path / "run" / "model")
    rows = loaded.compress([policy.tokenizer("a" * 8, add_special_tokens=False).input_ids])
    torch.testing.assert_close(
        rows, trainer.compressor.compress([policy.tokenizer("a" * 8, add_special_tokens=False).input_ids])
    )


def test_what_is_refused(tmp_path: Path) -> None:
    assert_refused(ContextCompressorConfig, {"ratios": [1]}, "compresses nothing")
    assert_refused(ContextCompressorConfig, {"keep_end": 0}, "keep_end")
    config = ContextCompressorConfig.parse({"max_steps": 1, "dataset": {"wrap": "none"}})
    trainer = ContextCompressorTrainer(config, model=small_policy(), data=recall(0, 4), output=tmp_path / "run")
    with pytest.raises(DataError, match="no prompt has a context"):
        trainer.train()
