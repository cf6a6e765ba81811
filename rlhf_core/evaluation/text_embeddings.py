"""Embeddings of texts by any model of transformers: the mean of its last hidden states."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ModelError, describe_error
from rlhf_core.infra.model_files import check_files, file_hashes, locate, require_on_hub

log = logging.getLogger(__name__)


class TextEmbedder:
    """Embeds texts as the mean over tokens of a model's last hidden states (Reimers and Gurevych 2019, arXiv 1908.10084).

    Encoders for sentences are made for this; a causal model's states do, too, less well.

    Args:
        source: a directory or hub name; weights are read from safetensors, and its own code isn't run.
        batch_tokens: most tokens, padding included, in one forward pass; larger is faster and takes more memory.

    Raises:
        ModelError: the model can't be loaded.
    """

    def __init__(self, source: str, *, batch_tokens: int = 8192) -> None:
        from transformers import AutoModel, AutoTokenizer

        where, _ = locate(source)
        if not Path(where).is_dir():
            require_on_hub(where)
        check_files(where)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(
                where, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:
            raise ModelError("can't be loaded to embed texts", place=source, got=describe_error(error)) from error
        self.source, self.batch_tokens = source, batch_tokens
        self.device = DeviceManager().device
        self.model = model.eval().requires_grad_(requires_grad=False).to(self.device)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.longest: int = min(positions or 512, self.tokenizer.model_max_length, 2048)
        """Tokens of a text that are read; what is beyond is left out, with one warning."""
        self._warned = False

    def describe(self) -> dict[str, Any]:
        """Return what embeddings depend on, as JSON values."""
        return {"source": self.source, "files": file_hashes(self.source) or {}}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return (N, D) float32 embeddings on the CPU; a text without tokens has 0."""
        whole = [self.tokenizer(text, verbose=False)["input_ids"] for text in texts]
        if not self._warned and (longer := sum(len(one) > self.longest for one in whole)):
            self._warned = True
            log.warning("%d of %d texts are embedded by their first %d tokens alone", longer, len(texts), self.longest)
        ids = [self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"] for text in texts]
        order = sorted((number for number, one in enumerate(ids) if one), key=lambda number: len(ids[number]))
        found: dict[int, Tensor] = {}
        while order:
            longest = len(ids[order[-1]])
            cut = order[-max(1, self.batch_tokens // longest) :]
            del order[-len(cut) :]
            rows = torch.zeros(len(cut), longest, dtype=torch.long)
            mask = torch.zeros(len(cut), longest, dtype=torch.long)
            for row, number in enumerate(cut):
                rows[row, : len(ids[number])] = torch.tensor(ids[number])
                mask[row, : len(ids[number])] = 1
            states = self.model(input_ids=rows.to(self.device), attention_mask=mask.to(self.device)).last_hidden_state
            share = mask.to(states)[..., None]
            means = (states * share).sum(1) / share.sum(1)
            found |= dict(zip(cut, means.float().cpu(), strict=True))
        width = int(self.model.config.get_text_config().hidden_size)
        return torch.stack([found.get(number, torch.zeros(width)) for number in range(len(texts))])
