"""Tokens per second of clients that ask a served model at the same time, beside one call of the engine for all of them.

    python benchmarks/serving.py --clients 8 --tokens 128

Both draw the same completions. What a server adds is HTTP, JSON and a thread beside the one that draws; what is the same is one
pass of the model per step for all rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai

from rlhf_core import PolicyModel
from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.serving.server import PolicyServer, ServerOptions
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that a call takes, and the processor's: the clients' own are among both."""
    began, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model's directory; by default a random Llama of 30 million parameters")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens of each completion, at most")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.model:
        policy = PolicyModel.from_pretrained(given.model, frozen=True)
    else:
        model = tiny_model(vocab_size=16_384, layers=8, hidden=512, heads=8, kv_heads=4)
        policy = PolicyModel(model.requires_grad_(False), tiny_tokenizer())
    prompts = [f"Question {number}: what is {number} + {number}?" for number in range(given.clients)]
    sampling = SamplingConfig(max_new_tokens=given.tokens)

    def together() -> int:
        made = Engine(policy, seed=0).generate(prompt_batch(policy, prompts), 1, sampling)
        return sum(len(group[0].ids) for group in made)

    with PolicyServer(policy, ServerOptions(port=0, name="model")) as server, ThreadPoolExecutor(given.clients) as pool:
        client = openai.OpenAI(base_url=server.url, api_key=server.token, max_retries=0)

        def ask(prompt: str, stream: bool) -> int:
            options = {"model": "model", "prompt": prompt, "max_tokens": given.tokens, "seed": 0}
            if not stream:
                return int(client.completions.create(**options).usage.completion_tokens)
            chunks = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
            return max(chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None)

        def asked(stream: bool) -> int:
            return sum(pool.map(lambda prompt: ask(prompt, stream), prompts))

        ways: dict[str, Callable[[], int]] = {
            "one call": together,
            "clients": lambda: asked(False),
            "clients, streams": lambda: asked(True),
        }
        counts = {name: way() for name, way in ways.items()}
        assert len(set(counts.values())) == 1, f"not the same completions: {counts}"
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(given.repeats):  # in turn, so that a noisy machine is noisy for all
            for name, way in ways.items():
                found[name].append(seconds(way))
    for at, unit in enumerate(("second", "second of processor time")):
        middles = {name: counts[name] / statistics.median(each[at] for each in found[name]) for name in ways}
        for name, middle in middles.items():
            print(f"{name}: {middle:,.0f} tokens per {unit}, {middle / middles['one call']:.2f} of one call")


if __name__ == "__main__":
    main()
