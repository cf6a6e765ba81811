"""What stands beside the weights of a merged model: configuration, tokenizer, the recipe, and a model card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_core import __version__
from rlhf_core.infra.files import replace_file, replace_json, sha256_of, to_json
from rlhf_core.infra.redact import redact_text
from rlhf_core.merging.checkpoint import INDEX, Checkpoint
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.plan import Plan
from rlhf_core.merging.vocabulary import TOKENIZER

RECIPE = "merge.yaml"
_TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_OTHER_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
_DTYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def fill(path: Path, plan: Plan, config: MergeConfig, chosen: Sequence[int], details: dict[str, Any]) -> None:
    """Write all that stands beside the weights; `chosen` are the numbers of the models that were merged."""
    if len(plan.files) > 1:
        replace_json(path / INDEX, plan.index())
    main = plan.base if plan.base is not None else plan.models[0]
    _write_config(path, plan, main, config)
    _copy(main, _OTHER_FILES, path)
    origin = plan.vocabularies.origin
    if origin is not None:
        _copy_from([origin], _TOKENIZER_FILES, path)
    else:
        _copy(main, _TOKENIZER_FILES, path)
    if plan.vocabularies.tokenizer is not None:
        replace_file(path / TOKENIZER, to_json(plan.vocabularies.tokenizer))
    recipe = recipe_of(config)
    replace_file(path / RECIPE, recipe.encode())
    replace_file(path / "README.md", _card(plan, config, chosen, details, recipe).encode())


def recipe_of(config: MergeConfig) -> str:
    """Return a merge as the text of a file that `rlhf merge` takes."""
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"options", "output"})
    values = {"method": config.method, **values, **config.options}
    return redact_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100))


def _write_config(path: Path, plan: Plan, main: Checkpoint, config: MergeConfig) -> None:
    if not main.config:
        return
    written = dict(main.config)
    kinds = {item.dtype for item in plan.items if item.merged}
    if len(kinds) == 1:
        for key in ("dtype", "torch_dtype"):
            if key in written:
                written[key] = str(kinds.pop() if len(kinds) == 1 else written[key]).removeprefix("torch.")
                break
    rows = plan.vocabularies.rows
    if rows is not None:
        inner = written.get("text_config")
        if isinstance(inner, dict) and "vocab_size" in inner:
            written["text_config"] = {**inner, "vocab_size": rows}
        if "vocab_size" in written or not isinstance(inner, dict):
            written["vocab_size"] = rows
    replace_json(path / "config.json", written)


def _copy(one: Checkpoint, names: Sequence[str], path: Path) -> None:
    base = getattr(one, "base", None)
    _copy_from([one.path, *([base.path] if base is not None else [])], names, path)


def _copy_from(places: Sequence[Path], names: Sequence[str], path: Path) -> None:
    for name in names:
        found = next((place / name for place in places if (place / name).is_file()), None)
        if found is not None:
            shutil.copyfile(found, path / name)


def _card(plan: Plan, config: MergeConfig, chosen: Sequence[int], details: dict[str, Any], recipe: str) -> str:
    """Return the model card: what was merged, how, and by what its inputs are known again."""
    inputs = [*([plan.base] if plan.base is not None else []), *(plan.models[number] for number in chosen)]
    header = {
        "library_name": "transformers",
        "tags": ["merge", "rlhf_core", config.method],
        "base_model": list(dict.fromkeys(one.name for one in inputs)),
    }
    rows = []
    for one in inputs:
        weight = "" if one is plan.base else _weight(config, plan, one)
        rows.append(f"| {one.name} | {'base' if one is plan.base else 'model'} | {weight} | `{one.digest.hex()}` |")
    lines = [
        "---",
        redact_text(yaml.safe_dump(header, sort_keys=False, allow_unicode=True)).rstrip(),
        "---",
        "",
        f"# Merge by {config.method}",
        "",
        f"Made by rlhf_core {__version__}. `rlhf merge {RECIPE} --output DIR` makes it again, bit for bit on the same machine.",
        "",
        "| input | as | weight | fingerprint |",
        "|---|---|---|---|",
        *rows,
        "",
        "A fingerprint hashes every tensor's name and shape and its first, middle and last kilobyte; it doesn't depend on how",
        "the files are cut.",
        "",
        *([f"{name}: {value}" for name, value in details.items()] + [""] if details else []),
        "```yaml",
        recipe.rstrip(),
        "```",
    ]
    if config.hash_inputs:
        lines += ["", "| input file | SHA-256 |", "|---|---|"]
        lines += [f"| {one.name}: {file.name} | `{sha256_of(file).sha256}` |" for one in inputs for file in one.files]
    return "\n".join(lines) + "\n"


def _weight(config: MergeConfig, plan: Plan, one: Checkpoint) -> str:
    weight = config.models[[id(model) for model in plan.models].index(id(one))].weight
    return f"{weight:g}" if isinstance(weight, int | float) else "by layer"
