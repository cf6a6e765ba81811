"""Fixtures of the data tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from data_helpers import bpe_tokenizer, lines, metaspace_tokenizer
from transformers import PreTrainedTokenizerFast

from rlhf_core.testing.tiny import tiny_tokenizer


@pytest.fixture(scope="session")
def tiny() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return bpe_tokenizer()


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    return metaspace_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes rows (or raw bytes) to a file and returns its path."""

    def write(content: Sequence[Any] | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else lines(content))
        return path

    return write
