"""lm-eval's client of such an address finds what the engine finds inside this process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.generation.engine import Engine
from rlhf_core.models import PolicyModel
from rlhf_core.serving.server import PolicyServer, ServerOptions
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="the extra `lm-eval` isn't installed")
pytest.importorskip("tenacity", reason="the extra `lm-eval[api]` isn't installed")
pytest.importorskip("starlette", reason="the extra `serve` isn't installed")
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from rlhf_core.evaluation.lm_eval_model import EngineLM


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_likelihoods_and_texts_are_the_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PolicyModel(tiny_model().requires_grad_(False), tiny_tokenizer())
    policy.tokenizer.save_pretrained(tmp_path)
    inside = EngineLM(Engine(policy))
    pairs = instances("loglikelihood", [("a question:", " one"), ("a question:", " two"), ("another", " answer")])
    until = {"until": ["x", "\n"], "max_gen_toks": 12, "do_sample": False}
    texts = instances("generate_until", [("one", until), ("a longer one", until)])
    with PolicyServer(policy, ServerOptions(port=0, name="tiny")) as server:
        monkeypatch.setenv("OPENAI_API_KEY", server.token)
        options: dict[str, Any] = {"tokenizer": str(tmp_path), "add_bos_token": True, "batch_size": 2, "max_retries": 1}
        client = LocalCompletionsAPI(model="tiny", base_url=f"{server.url}/completions", **options)
        found = client.loglikelihood(pairs, disable_tqdm=True)
        written = client.generate_until(texts, disable_tqdm=True)
    wanted = inside.loglikelihood(pairs, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    # A text holds every token drawn but the last; lm-eval's own backends leave out special ones.
    plain = [re.sub(r"<\|\w+\|>", "", text) for text in written]
    assert plain == inside.generate_until(texts, True)
