"""Directories of runs and pipelines written by hand for the report's tests, and its pages as a browser would read them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

EVIL = "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>"
VOID = {"meta", "br", "img", "input", "hr", "link"}


class Page(HTMLParser):
    """The texts, headings and attributes of a page; refuses tags that don't match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.source = "", text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.text += "" if tag in ("span", "i") else " "
        if tag not in VOID:
            self._open.append(tag)
        if tag in {"h1", "h2", "h3", "h4"}:
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts.append(data)
        elif "style" not in self._open:
            self.text += data
        if self._open and any(tag in self._open for tag in ("h1", "h2", "h3", "h4")):
            self.headings[-1] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """Return the attributes of each tag of a name."""
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def titles(self) -> list[str]:
        """The titles of the charts."""
        return [str(one["aria-label"]) for one in self.of("svg")]

    def check_self_contained(self) -> None:
        """Check that nothing would be fetched, run or sent: the page's own script alone runs."""
        for tag, attributes in self.tags:
            assert tag not in {"img", "link", "iframe", "object", "embed", "base", "form", "image", "foreignobject"}
            for name, value in attributes.items():
                assert not name.startswith("on") and name not in {"src", "srcset", "action", "xmlns"}, (tag, name)
                if name == "href" or "url(" in (value or ""):
                    assert re.fullmatch(r"#[\w.-]+|url\(#[\w.-]+\)", value or ""), (tag, name, value)
        assert len(self.of("script")) == 1 and "alert" not in "".join(self.scripts)
        style = re.search(r"<style>(.*?)</style>", self.source, re.DOTALL)
        assert style and "url(" not in style[1] and "@import" not in style[1]
        ids = [str(attributes["id"]) for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        policy = next(one["content"] for one in self.of("meta") if one.get("http-equiv") == "Content-Security-Policy")
        assert policy and policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def packed(ids: Sequence[int], probabilities: Sequence[float]) -> dict[str, str]:
    logprobs = np.log(np.asarray(probabilities))
    return {
        "ids": base64.b64encode(np.asarray(ids, dtype="<i4").tobytes()).decode(),
        "logprobs": base64.b64encode(logprobs.astype("<f2").tobytes()).decode(),
    }


def write_run(path: Path, *, steps: int = 12, seed: int = 0, rate: float = 1e-3, **record: Any) -> Path:
    """Write the directory of an online run whose texts and names are hostile."""
    path.mkdir(parents=True)
    random = np.random.default_rng(seed)
    own = {
        "rlhf_core": "0", "id": "a", "started": "2026-01-01T10:00:00Z", "ended": "2026-01-01T10:02:05Z", "status": "done",
        "plugin": {"name": "grpo", "distribution": "rlhf-core", "version": "0"}, "versions": {"torch": f"2.{seed}"},
        "device": {"name": "cpu"}, "peak_memory_bytes": 2**30,
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(own | record))
    (path / "config.yaml").write_text(
        f"method: grpo\nmodel: m\nlearning_rate: {rate}\nmax_steps: 12\nseed: {seed}\nlogging:\n  project: {json.dumps(EVIL)}\n"
    )
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 1 / step, "learning_rate": rate, "grad_norm": 1.0, "tokens": 100, "seconds": 2.0}
        row |= {"reward": step / 20, "kl": step / 100, "entropy": 1.0, "logprob_gap": 1e-6, "logprob_gap_max": 2e-6}
        row |= {"clipped": 0.1, "groups_without_variance": 0.5, "length_right": 20.0, "length_wrong": 30.0}
        row |= {"tokens_per_second": 50.0, "seconds/rollout": 1.25, "seconds/update": 0.75, f"metric {EVIL}": 1.0}
        rows.append(row)
    jsonl(path / "metrics.jsonl", rows)
    evaluated = [
        {"time": "t", "event": "evaluated", "step": step, "metrics": {"eval_reward": value, "eval_reward_se": 0.05}}
        for step, value in ((0, 0.25), (steps, 0.5))
    ]
    jsonl(path / "events.jsonl", [*evaluated, {"time": "t", "event": "run_resumed", "step": 3, "message": EVIL}])
    said = [
        {"step": step, "kind": "prompt", "row": 0, "sample": 0, "prompt": f"ask {EVIL}", "completion": f"at {step} {EVIL}",
         "stop_reason": "end", "tokens": 5}
        for step in (0, 6, steps)
    ]  # fmt: skip
    jsonl(path / "samples.jsonl", said)
    kept = []
    for step in range(0, steps, 2):
        for place in range(3):
            for sample in range(4):
                reward = float(random.random() < (place + 1) / 4)
                kept.append(
                    {"step": step, "row": place, "place": place, "sample": sample, "prompt": EVIL,
                     "completion": f"say {step}.{place}.{sample} {EVIL}", "stop_reason": "end", "tokens": 9, "reward": reward,
                     "rewards": {"exact": reward, "form": 0.5}, "advantage": reward - 0.5, "logprob_gap": 1e-6}
                )  # fmt: skip
    jsonl(path / "rollouts.jsonl", kept)
    (path / "data.json").write_text(
        json.dumps({"data": {"name": EVIL, "rows": 9, "kept": 8, "dropped": {"too long": 1}}})
    )
    (path / "models.json").write_text(
        json.dumps({"policy": {"source": "m", "architecture": "Llama", "parameters": 12345}})
    )
    (path / "rewards.json").write_text(json.dumps({"exact": {"weight": 1.0}, "form": {"weight": 0.5}}))
    return path


TREE = {
    "steps": [
        {"number": 0, "parent": None, "text": "", "tokens": 0, "score": None, "stop_reason": None, "visits": 4},
        {"number": 1, "parent": 0, "text": f"one {EVIL}", "tokens": 3, "score": 0.5, "stop_reason": None, "visits": 3},
        {"number": 2, "parent": 0, "text": "two", "tokens": 3, "score": 0.25, "stop_reason": "end", "visits": 1},
        {"number": 3, "parent": 1, "text": "three", "tokens": 2, "score": 0.75, "stop_reason": "end", "visits": 2},
    ],
    "best": [1, 3],
}


def estimate(value: float, error: float = 0.02) -> dict[str, Any]:
    return {"value": value, "error": error, "count": 100, "low": value - 2 * error, "high": value + 2 * error}


def suites(**values: float) -> dict[str, Any]:
    """Return a result of capability tests."""
    return {
        "format": 1,
        "suites": [{"name": name, "task": "t", "estimate": estimate(one)} for name, one in values.items()],
    }


def write_pipeline(path: Path, *, seed: int = 0) -> Path:
    """Write a pipeline's directory: an SFT-like run, one that was rolled back, evaluations, sampled rows and a merge."""
    stages = []

    def stage(name: str, kind: str, **values: Any) -> Path:
        number = len(stages)
        directory = f"stages/{number:02d}-{name}"
        clock = {"started": f"2026-01-01T10:0{number}:00Z", "ended": f"2026-01-01T10:0{number}:50Z", "seconds": 50.0}
        stages.append({"name": name, "kind": kind, "status": "finished", "directory": directory, **clock, **values})
        return path / directory

    kept = {"before": suites(sums=0.5), "after": suites(sums=0.625), "regressions": []}
    good = {"method": "grpo", "tokens": 1200, "output_model": "stages/00-grpo/model", "capabilities": kept}
    write_run(stage("grpo", "policy", **good), seed=seed)
    change = {"suite": "sums", "difference": estimate(-0.4), "adjusted_p_value": 0.001, "regressed": True}
    lost = {"before": {"sums": estimate(0.625)}, "after": {"sums": estimate(0.225)}, "changes": [change]}
    lost |= {"regressions": ["sums: 0.625 → 0.225"]}
    bad = {"status": "rolled_back", "reason": "`sums` fell by 40 points", "capabilities": lost}
    write_run(stage("poison", "policy", method="grpo", **bad), rate=10.0)
    for number, value in enumerate((0.25, 0.375)):
        own = stage(f"evaluate{number}", "evaluate")
        own.mkdir(parents=True)
        (own / "evaluation.json").write_text(
            json.dumps({"metrics": {"pass@1": estimate(value), "length": estimate(30)}})
        )
    sampled = stage("search", "sample", method="mcts")
    sampled.mkdir(parents=True)
    rows = [
        {
            "prompt": EVIL,
            "completion": f"found {EVIL}",
            "stop_reason": "end",
            "tokens": 4,
            "score": 0.5,
            "details": {"tree": TREE},
        }
    ]
    jsonl(sampled / "rows.jsonl", rows)
    first = {"sampler": "generate", "accuracy": 0.5, "error": 0.05, "tokens_per_prompt": 20.0, "difference": None}
    second = {"sampler": "mcts", "accuracy": 0.75, "error": 0.05, "tokens_per_prompt": 90.0}
    compared = [first, second | {"difference": 0.25, "difference_error": 0.04}]
    (sampled / "comparison.json").write_text(json.dumps({"samplers": compared}))
    merged = stage("merge", "merge", method="ties")
    merged.mkdir(parents=True)
    (merged / "merge.yaml").write_text(
        "method: ties\nmodels:\n- path: stages/00-grpo/model\n  weight: 0.7\n- path: base\n  weight: 0.3\n"
    )
    stages.append({"name": "later", "kind": "evaluate", "status": "waiting", "directory": "stages/06-later"})
    record = {"status": "finished", "exit_code": 0, "seed": seed, "policy": "stages/00-grpo/model", "stages": stages}
    record |= {"versions": {"rlhf-core": "0"}}
    (path / "pipeline.json").write_text(json.dumps(record))
    (path / "recipe.yaml").write_text(f"seed: {seed}\nmodel: m\n")
    jsonl(path / "history.jsonl", [{"time": "t", "event": "stage_started", "stage": "grpo", "note": EVIL}])
    return path


def save_tokenizer(path: Path) -> Tokenizer:
    """Write a tokenizer whose tokens are bytes, and return it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    path.mkdir(parents=True)
    made.save(str(path / "tokenizer.json"))
    return made
