"""Compressed prompts in a pipeline: by a stage's compressor, by extraction, and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_core.infra.errors import ConfigError
from rlhf_core.models import ContextCompressor
from rlhf_core.pipeline.recipe import RecipeError

COMPRESSOR = {
    "name": "gist", "method": "context_compressor", "data": "sft.jsonl", "keep_end": 2, "chunk": 8, "ratios": [2],
    "summary": "memory",
}  # fmt: skip
MEASURED = {
    "kind": "evaluate",
    "prompts": "reasoning.jsonl",
    "validator": "numeric_answer",
    "n": 2,
    "limit": 3,
    "max_new_tokens": 4,
}
SOFT = {"over": 4, "ratio": 2, "keep_end": 2, "compressor": "gist"}


@pytest.mark.slow
def test_stages_behind_it_read_prompts_through_a_stage_s_compressor(pipeline: Any, recorded: Any, folder: Path) -> None:
    stages = [
        {"name": "before", **MEASURED}, COMPRESSOR, {"name": "after", **MEASURED},
        {"kind": "sample", "name": "drawn", "method": "generate", "prompts": "prompt.jsonl", "limit": 3, "max_new_tokens": 4},
        {"name": "whole", **MEASURED, "compress": None},
    ]  # fmt: skip
    made = pipeline(*stages, compress=SOFT)
    result = made.run_full_pipeline()
    assert result.exit_code == 0 and result.policy == "model"  # a compressor is no policy
    settings = {
        name: json.loads((folder / f"out/stages/{number:02}-{name}/completions.run.json").read_text())
        for number, name in ((1, "before"), (3, "after"), (5, "whole"))
    }
    assert "compression" not in settings["before"] and "compression" not in settings["whole"]
    described = settings["after"]["compression"]
    assert described["options"]["ratio"] == 2 and described["compressor"]["slots"] == 4
    row = json.loads((folder / "out/stages/04-drawn/rows.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == json.loads((folder / "prompt.jsonl").read_text().splitlines()[0])["prompt"]
    (prompt,) = made.compress_prompts(["12345678"])
    assert prompt.compressed and prompt.embeddings is not None and len(prompt.ids) == 4 + 2
    context = made.compress_context_from_ids([9] * 6)
    assert context.embeddings is not None and tuple(context.embeddings.shape) == (3, 64)
    models = made.load_models()
    assert isinstance(models["gist"], ContextCompressor)
    made.save_models(folder / "saved")
    assert json.loads((folder / "saved/models.json").read_text())["gist"]["kind"] == "compressor"


def test_prompts_from_python_without_a_compressor(pipeline: Any) -> None:
    made = pipeline(compress={"over": 16, "ratio": 1.8, "keep_end": 19})
    text = "The river rises in the hills. The town has a market on Fridays. When is the market?"
    long, short = made.compress_prompts([text, "Hi?"])
    assert long.prompt == "The town has a market on Fridays. When is the market?" and long.embeddings is None
    assert not short.compressed and short.prompt == "Hi?"
    (less,) = made.compress_prompts([text], over=1000)
    assert less.prompt == text
    ids = list(range(40, 60))
    assert len(made.compress_context_from_ids(ids, ratio=4).ids) <= 5
    with pytest.raises(ConfigError, match="ratio"):
        made.compress_prompts([text], ratio=0.5)


def test_a_stage_s_options_lie_over_the_recipe_s(pipeline: Any) -> None:
    plan = pipeline(COMPRESSOR, {**MEASURED, "compress": {"ratio": 3}}, compress=SOFT).plan()
    assert plan.stages["evaluate"].values["compress"] == {**SOFT, "ratio": 3, "compressor": "${stages.gist.model}"}


def test_what_is_wrong_is_found_before_anything_runs(pipeline: Any) -> None:
    sft = {"method": "sft", "data": "sft.jsonl"}
    with pytest.raises(RecipeError, match="must be a context compressor"):
        pipeline(sft, {**MEASURED, "compress": {"compressor": "sft"}}).plan()
    with pytest.raises(RecipeError, match="ratio"):
        pipeline(sft, MEASURED, compress={"ratio": 1}).plan()
    with pytest.raises(RecipeError, match="did you mean `gist`"):
        pipeline(COMPRESSOR, {**MEASURED, "compress": {"compressor": "gits"}}).plan()
    with pytest.raises(RecipeError, match="is no compressor"):
        pipeline({**MEASURED, "compress": "./model"}).plan()
    with pytest.raises(RecipeError, match="no compressor for so small a ratio"):
        pipeline(COMPRESSOR, {**MEASURED, "compress": {"compressor": "gist", "ratio": 1.5}}).plan()
    with pytest.raises(RecipeError, match="must be a policy"):
        pipeline(COMPRESSOR, {**COMPRESSOR, "name": "more", "model": "gist"}).plan()
    compared = {
        "kind": "sample",
        "prompts": "prompt.jsonl",
        "samplers": [{"method": "generate", "compress": {"over": 9}}],
    }
    with pytest.raises(RecipeError, match="read prompts alike"):
        pipeline(compared).plan()
    with pytest.raises(RecipeError, match="comes later"):
        pipeline({**MEASURED, "compress": {"compressor": "gist"}}, COMPRESSOR).plan()
