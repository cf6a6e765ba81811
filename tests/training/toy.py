"""A method and a model small enough to train in a moment, with everything that makes a resume hard: dropout, random draws
while experience is made, state of its own, two loss terms with different denominators, and responses of skewed lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_core.config.training import TrainerConfig, TrainingStage
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Loss, Trainer, Window
from rlhf_core.infra.safetensors_file import write_tensors
from rlhf_core.testing.tiny import VOCAB_SIZE, tiny_tokenizer
from rlhf_core.training.context import RunContext
from rlhf_core.training.loader import Loader

ROWS = [
    {"prompt": "p" * (1 + i % 5), "response": chr(97 + i % 7) * (40 if i % 6 == 0 else 1 + i % 4)} for i in range(40)
]


def digits(completions: Sequence[str], **columns: Any) -> list[float]:
    """Score a completion by the share of its characters that are digits: completions of a random model differ by it."""
    return [sum(one.isdigit() for one in text) / max(len(text), 1) for text in completions]


class ToyPolicy(nn.Module):
    """Predicts each response token from the one before it."""

    max_positions = 128

    def __init__(self, dropout: float = 0.1, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.embedding = nn.Embedding(VOCAB_SIZE, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB_SIZE, bias=False)
        self.head.weight = self.embedding.weight  # Tied, as in most small models.
        with torch.no_grad():
            self.embedding.weight.copy_(torch.randn(self.embedding.weight.shape, generator=generator))
        self.register_buffer("seen", torch.zeros(1))
        self.tokenizer = tiny_tokenizer()

    @classmethod
    def adopt(cls, model: ToyPolicy) -> ToyPolicy:
        return model

    def configure(self, config: TrainerConfig) -> ToyPolicy:
        return self

    def describe(self) -> dict[str, Any]:
        return {"source": "toy"}

    def save_pretrained(self, directory: str | Path) -> None:
        state = {name: tensor for name, tensor in self.state_dict().items() if name != "head.weight"}
        write_tensors(Path(directory) / "model.safetensors", state)

    def token_logps(self, batch: Batch) -> Tensor:
        """Return (R, T) log-probabilities of the response tokens."""
        last = batch.prompt_ids.gather(1, batch.prompt_lengths[:, None] - 1)[batch.owner]
        before = torch.cat([last, batch.response_ids[:, :-1]], dim=1)
        logits = self.head(self.norm(self.dropout(self.embedding(before)))).float()
        return logits.log_softmax(-1).gather(2, batch.response_ids[..., None]).squeeze(2)


class ToyConfig(TrainerConfig):
    """The toy has no options of its own."""


class ToyTrainer(Trainer[ToyConfig]):
    """Likelihood, averaged over tokens, plus a penalty, averaged over sequences."""

    api = 1
    record = "sft"
    stage = TrainingStage.SFT
    Config = ToyConfig

    evaluating = False
    """Whether what is experienced are held-out rows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.windows = 0

    def build(self, loader: Loader) -> Mapping[str, nn.Module]:
        return {"policy": loader.main(ToyPolicy)}

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        for batch in stream:
            self.evaluating = run.evaluating
            self.windows += 1
            noise = torch.rand(batch.num_responses) + float(np.random.rand()) + self.windows / 100
            yield batch.attach(per_response={"noise": noise})

    def weights(self, batch: Batch) -> Mapping[str, float]:
        return {"nll": batch.num_loss_tokens, "penalty": batch.num_responses}

    def loss(self, batch: Batch) -> Loss:
        logps = self.policy.token_logps(batch) * batch.loss_mask
        if self.policy.training:
            self.policy.seen += batch.num_responses
        summed = logps.sum(1) * batch["noise"]
        metrics = {"mean_logp": (logps.sum(), batch.num_loss_tokens)}
        return Loss({"nll": -logps.sum(), "penalty": (summed / 50).square().sum()}, metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self.windows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.windows = state["windows"]


def toy(
    output: Path | str | None = None,
    *,
    kind: type[ToyTrainer] = ToyTrainer,
    dropout: float = 0.1,
    rows: Any = None,
    eval_rows: Any = None,
    **options: Any,
) -> ToyTrainer:
    """Return a toy trainer; options are those of its configuration."""
    defaults: dict[str, Any] = {"learning_rate": 0.02, "batch_size": 8, "max_steps": 6, "max_length": 64}
    defaults |= {"dropout": "keep"}
    config = ToyConfig.parse({**defaults, **options})
    data = ROWS if rows is None else rows
    return kind(config, model=ToyPolicy(dropout), data=data, eval_data=eval_rows, output=output)
