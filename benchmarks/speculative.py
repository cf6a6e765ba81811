"""Speed of speculative decoding beside the engine without a draft and transformers' assisted generation, in one run.

    python benchmarks/speculative.py [--model DIR] [--draft-model DIR] [--precision bf16] [--work copy questions epochs]
        [--batches 1 4 16 64] [--rounds 5] [--tokens 96] [--threads 1] [--output FILE]

Three kinds of work. `copy` asks for a text to be repeated, greedily, and drafts by look-up in the prompt (`ngram`).
`questions` draws with temperature 1 where look-ups find little: a draft must not cost anything there. `epochs` draws eight
completions per question with other random numbers each round, as the epochs of GRPO do, and drafts from those of earlier
rounds (`suffix`). With `--draft-model` a model of the same tokenizer drafts in the first two as well. There end tokens end
nothing, so that each contender draws the same number of tokens; in `epochs` all contenders are ours, which draw the same
completions.

All contenders draw in one process, in turn, and the first round isn't counted: in it weights are packed and costs are
measured. `speed-up` is the median over rounds of the ratio to the engine without a draft in the same round. transformers
takes part at batch 1, where alone it can assist: by prompt look-up, or by the draft model. Contenders of ours should draw the
same tokens; `differing` counts the completions that don't, since in 16 bits rounding may exchange equally likely tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from confidence import KINDS as TASKS
from confidence import streams
from transformers import AutoModelForCausalLM

from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.generation.draft_model import ModelDrafter
from rlhf_core.generation.drafting import Drafts
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.generation.lookup_drafts import NgramDrafter, SuffixDrafter
from rlhf_core.models import PolicyModel

QUESTIONS = Path(__file__).resolve().parent / "questions.jsonl"
KINDS = ("copy", "questions", "epochs")
"""And `problems`, held-out ones of the embedded task, for `distilled_draft.py`."""
LOOK_UP = 10
"""Most tokens that transformers guesses at a time; its documentation's own example."""
NO_DRAFT = "no draft"
Contender = Callable[[int], list[list[int]]]
"""Number of the round → the tokens drawn, per completion."""


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    policy = load(options.model, options.precision)
    draft = None if options.draft_model is None else load(options.draft_model, options.precision)
    rows = []
    for kind in options.work:
        for batch in options.batches:
            if kind == "epochs" and batch % 8:
                continue
            rows += measure(policy, draft, kind, batch, options)
            if options.output is not None:
                options.output.write_text(json.dumps({"machine": machine(options), "rows": rows}, indent=1) + "\n")
    print("\n" + machine(options) + "\n\n" + table(rows))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--draft-model")
    parser.add_argument("--precision", default="bf16", choices=["float32", "bf16"])
    parser.add_argument("--work", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=1.0, help="of `questions` and `epochs`")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--prompts", type=Path, default=QUESTIONS, help="rows with a column `prompt`")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def load(path: str, precision: str) -> PolicyModel:
    return PolicyModel.from_pretrained(path, precision=precision, frozen=True)


@dataclass(frozen=True)
class Work:
    """What every contender draws."""

    kind: str
    batch: int
    """Completions in all."""
    encoded: Batch
    n: int
    """Completions per prompt."""
    sampling: SamplingConfig

    @classmethod
    def of(cls, policy: PolicyModel, kind: str, batch: int, options: argparse.Namespace) -> Work:
        """Return so much work of one kind."""
        n = 8 if kind == "epochs" else 1
        prompts = problems(batch) if kind == "problems" else chats_of(kind, batch // n, options.prompts)
        sampling = SamplingConfig(
            max_new_tokens=options.tokens,
            min_new_tokens=0 if kind in ("epochs", "problems") else options.tokens,
            temperature=0 if kind == "copy" else options.temperature,
        )
        return cls(kind, batch, prompt_batch(policy, prompts), n, sampling)


@dataclass
class Measured:
    """What a contender needed, round by round, and drew."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    differing: int = 0
    """Completions that the engine without a draft drew otherwise."""


def chats_of(kind: str, count: int, path: Path) -> list[Any]:
    """Return so many chats of one kind of work."""
    questions = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [questions[at % len(questions)] for at in range(count)]
    if kind == "copy":
        texts = [f"Repeat this text word for word, and nothing else:\n\n{text} {text}" for text in texts]
    # Each prompt is another one, so that none is read for several.
    return [[{"role": "user", "content": f"{at // len(questions)} {text}"}] for at, text in enumerate(texts)]


def problems(count: int) -> list[str]:
    """Return so many held-out problems of the embedded task, of all kinds in turn."""
    rows = zip(*streams("prompt", -(-count // len(TASKS)), "test", 8), strict=True)
    return list(islice((row["prompt"] for each in rows for row in each), count))


def measure(
    policy: PolicyModel, draft: PolicyModel | None, kind: str, batch: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row per contender: seconds, speed-up, and what the drafts did."""
    work = Work.of(policy, kind, batch, options)
    drafts = drafts_for(work, policy, draft)
    contenders = {name: engine_with(own, policy, work) for name, own in drafts.items()}
    peers = peers_for(work, policy, options) if batch == 1 and not options.no_peer else {}
    found = in_turn(contenders | peers, options.rounds)
    plain = found[NO_DRAFT]
    rows = []
    for name, own in found.items():
        used = drafts.get(name)
        rows.append(
            {
                "work": kind,
                "batch": batch,
                "contender": name,
                "seconds": own.seconds,
                "tokens_per_second": statistics.mean(plain.tokens) / statistics.median(own.seconds),
                "speed_up": statistics.median(a / b for a, b in zip(plain.seconds, own.seconds, strict=True)),
                "differing": own.differing if name in drafts else 0,
                **({} if used is None else used.counts.report()),
            }
        )
        print(table([rows[-1]]).splitlines()[-1], flush=True)
    return rows


def drafts_for(work: Work, policy: PolicyModel, draft: PolicyModel | None) -> dict[str, Drafts | None]:
    """Return the drafts of the contenders of ours, the first of which has none."""
    if work.kind == "epochs":
        return {NO_DRAFT: None, "suffix": Drafts(SuffixDrafter())}
    found: dict[str, Drafts | None] = {NO_DRAFT: None, "ngram": Drafts(NgramDrafter())}
    return found if draft is None else found | {"model": Drafts(ModelDrafter(draft, policy))}


def engine_with(drafts: Drafts | None, policy: PolicyModel, work: Work) -> Contender:
    """Return the engine with a draft."""

    def run(number: int) -> list[list[int]]:
        drawn = Engine(policy, seed=number, drafts=drafts).generate(work.encoded, work.n, work.sampling)
        return [list(one.ids) for group in drawn for one in group]

    return run


def peers_for(work: Work, policy: PolicyModel, options: argparse.Namespace) -> dict[str, Contender]:
    """Return transformers by look-up in the prompt and, where there is a draft model, by that."""

    def peer(**assistance: Any) -> Contender:
        return assisted(options.model, policy, work.encoded, work.sampling, **assistance)

    found = {"transformers, look-up": peer(prompt_lookup_num_tokens=LOOK_UP)}
    if options.draft_model is not None:
        assistant = AutoModelForCausalLM.from_pretrained(options.draft_model, dtype=policy.precision)
        found["transformers, model"] = peer(assistant_model=assistant)
    return found


def in_turn(contenders: Mapping[str, Contender], rounds: int) -> dict[str, Measured]:
    """Let all contenders draw in each round, and once before the first, and compare what they draw with the first one's."""
    found = {name: Measured() for name in contenders}
    for number in range(rounds + 1):
        expected: list[list[int]] = []
        for name, run in contenders.items():
            begin = time.perf_counter()
            drawn = run(number)
            seconds = time.perf_counter() - begin
            expected = expected or drawn
            own = found[name]
            own.differing += sum(ids != other for ids, other in zip(drawn, expected, strict=True))
            if number:
                own.seconds.append(seconds)
                own.tokens.append(sum(map(len, drawn)))
    return found


def assisted(path: str, policy: PolicyModel, encoded: Any, sampling: SamplingConfig, **options: Any) -> Contender:
    """Return transformers' assisted generation for one prompt, in the policy's precision."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=policy.precision).eval()
    ids = encoded.prompt_ids[:, : int(encoded.prompt_lengths[0])]
    greedy = sampling.temperature == 0
    drawing = {} if greedy else {"temperature": sampling.temperature, "top_k": 0}

    def run(number: int) -> list[list[int]]:
        torch.manual_seed(number)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=not greedy,
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            pad_token_id=policy.tokenizer.pad_token_id or 0,
            **drawing,
            **options,
        )
        return [found[0, ids.shape[1] :].tolist()]

    return run


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| work | batch | draft | tokens/s | speed-up | accepted | tokens per pass |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        accepted, per_pass = row.get("acceptance_rate"), row.get("tokens_per_pass")
        lines.append(
            f"| {row['work']} | {row['batch']} | {row['contender']} | {row['tokens_per_second']:.1f} | {row['speed_up']:.2f} | "
            f"{'' if accepted is None else f'{accepted:.2f}'} | {'' if per_pass is None else f'{per_pass:.2f}'} |"
        )
    return "\n".join(lines)


def machine(options: argparse.Namespace) -> str:
    return (
        f"{options.model}, {options.precision}, {options.threads} thread(s), torch {torch.__version__}, {platform.processor()};"
        f" medians of {options.rounds} rounds in turn, {options.tokens} tokens per completion"
    )


if __name__ == "__main__":
    main()
