"""What holds for tiny random models holds for SmolLM2: tokens and log-probabilities of generation are transformers' own.

`make smollm2` fetches the model; `RLHF_SMOLLM2` names another directory that has it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from generation_gap import gap_of_transformers

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.logprob_gap import logprob_gap
from rlhf_core.generation.native import measure_native
from rlhf_core.models.policy_model import PolicyModel

pytestmark = pytest.mark.slow

STORY = (
    "The ferry left the harbour at six, and the keeper of the lighthouse counted its lamps until the fog took them. "
)
LONG = STORY * 13  # above the 256 tokens of a chunk, and several blocks of the cache
QUESTIONS = [
    "Explain photosynthesis to a child.",
    "Name five rivers of Europe and how long they are.",
    "What is 17 * 23?",
]
PROMPTS = [
    *([{"role": "user", "content": question}] for question in QUESTIONS),
    [{"role": "user", "content": LONG + "What did the keeper count?"}],
    [{"role": "user", "content": LONG + "Write the next page of this story."}],
    [{"role": "system", "content": "Answer in rhymes."}, {"role": "user", "content": "Who was Ada Lovelace?"}],
    "Once upon a time",
    "def quicksort(values):\n",
]
"""Chats and texts; two chats have more than 300 tokens and begin alike."""


@pytest.fixture(scope="module")
def directory() -> Path:
    """The model's directory, or a skipped test."""
    found = Path(os.environ.get("RLHF_SMOLLM2") or Path(__file__).parents[2] / "models" / "SmolLM2-135M-Instruct")
    if not (found / "config.json").is_file():
        pytest.skip(f"no SmolLM2 in {found} (run `make smollm2`, or set RLHF_SMOLLM2 to its directory)")
    return found


def test_128_greedy_tokens_are_those_of_generate(directory: Path) -> None:
    policy = PolicyModel.from_pretrained(str(directory), precision="float32", frozen=True)
    assert policy.measured(measure_native).obstacle is None
    batch = prompt_batch(policy, PROMPTS)
    assert (batch.prompt_lengths > 300).sum() == 2
    count = 128
    drawn = Engine(policy).generate(batch, 1, SamplingConfig(max_new_tokens=count, min_new_tokens=count, temperature=0))
    for prompt, (completion,) in enumerate(drawn):
        ids = batch.prompt_ids[prompt, : int(batch.prompt_lengths[prompt])][None]
        made = policy.causal_lm.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count,
            min_new_tokens=count, pad_token_id=0,
        )  # fmt: skip
        assert list(completion.ids) == made[0, ids.shape[1] :].tolist(), PROMPTS[prompt]
        with torch.no_grad():
            logits = policy.causal_lm(input_ids=made).logits[0, ids.shape[1] - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, made[0, ids.shape[1] :, None])[:, 0]
        assert (torch.tensor(completion.raw_logprobs) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_log_probabilities_are_as_near_to_training_as_those_of_generate_to_their_own_model(
    directory: Path, precision: str
) -> None:
    policy = PolicyModel.from_pretrained(str(directory), precision=precision)
    batch = prompt_batch(policy, PROMPTS)
    count = 64
    drawn = Engine(policy).generate(batch, 4, SamplingConfig(max_new_tokens=count, min_new_tokens=count))
    ours = logprob_gap(policy, batch, drawn)
    theirs = gap_of_transformers(policy.causal_lm.to(policy.precision), batch, count, n=4)
    print(f"{precision}: generation against training {ours}, transformers against itself {theirs}")
    if precision == "float32":
        assert ours.max < 1e-4
    else:
        assert ours.mean < 1.5 * theirs.mean
