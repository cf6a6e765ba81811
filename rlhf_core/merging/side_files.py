"""What stands beside the weights of a merged model: configuration, tokenizer, the recipe, and a model card."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config.yaml_file import dump_yaml
from rlhf_core.infra.files import read_json, replace_file, replace_json, sha256_of, to_json
from rlhf_core.infra.model_files import INDEX
from rlhf_core.infra.redact import redact_text
from rlhf_core.infra.version import __version__
from rlhf_core.merging import chat_template
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.input_model import InputModel
from rlhf_core.merging.layer_values import Value
from rlhf_core.merging.plan import Plan
from rlhf_core.merging.tensor_names import is_head
from rlhf_core.merging.vocabulary import TOKENIZER

log = logging.getLogger(__name__)

RECIPE = "merge.yaml"
_TOKENIZER_FILES = (
    TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_TOKENS = (TOKENIZER, "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
"""Files one of which every tokenizer has."""
_OTHER_FILES = ("preprocessor_config.json", "processor_config.json")
_GENERATION = "generation_config.json"


def write_side_files(
    path: Path, plan: Plan, config: MergeConfig, chosen: Sequence[tuple[int, Value]], details: dict[str, Any]
) -> None:
    """Write all that stands beside the weights; `chosen` are the numbers of the models that were merged, with their weights."""
    if len({item.file for item in plan.own}) > 1:
        replace_json(path / INDEX, plan.index())
    main = plan.base if plan.base is not None else plan.models[0]
    _write_config(path, plan, main)
    _copy(main, _OTHER_FILES, path)
    for head, description in plan.heads.items():
        replace_json(path / f"{head}.json", description)
    _write_tokenizer(path, plan)
    if config.chat_template is not None:
        text = chat_template.chosen(config.chat_template, plan.inputs)
        if text is None:
            log.warning("no model has a chat template, so the result has none")
        else:
            chat_template.write(path, text)
    recipe = recipe_of(config)
    replace_file(path / RECIPE, recipe.encode())
    replace_file(path / "README.md", _card(plan, config, chosen, details, recipe).encode())


def recipe_of(config: MergeConfig) -> str:
    """Return a merge as the text of a file that `rlhf merge` takes."""
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"options", "output"})
    values = {"method": config.method, **values, **config.model_dump(mode="json")["options"]}
    return redact_text(dump_yaml(values))


def warn_without_tokenizer(plan: Plan) -> None:
    """Warn where the result will have no tokenizer, since no input has one."""
    if plan.vocabularies.origin is None and _with_tokenizer(plan) is None:
        log.warning("no input has a tokenizer, so the result has none; copy its files beside the result's weights")


def _with_tokenizer(plan: Plan) -> InputModel | None:
    """Return the base, or else the first model, that has a tokenizer; their vocabularies don't differ where none was chosen."""
    inputs = plan.inputs
    return next(
        (one for one in inputs if any((place / name).is_file() for place in one.directories for name in _TOKENS)), None
    )


def _write_tokenizer(path: Path, plan: Plan) -> None:
    vocabularies = plan.vocabularies
    if vocabularies.origin is None:
        if (source := _with_tokenizer(plan)) is not None:
            _copy(source, _TOKENIZER_FILES, path)
        return
    shutil.copyfile(vocabularies.origin, path / TOKENIZER)
    _copy_from([vocabularies.origin.parent], [name for name in _TOKENIZER_FILES if name != TOKENIZER], path)
    if vocabularies.tokenizer is not None:
        replace_file(path / TOKENIZER, to_json(vocabularies.tokenizer))


def _write_config(path: Path, plan: Plan, main: InputModel) -> None:
    """Write the main input's configuration, and what its generation needs, with the result's type, rows and token numbers."""
    written = dict(main.config)
    if not written:
        return
    kinds = {item.dtype for item in plan.own if item.merged}
    for key in ("dtype", "torch_dtype"):
        if key in written and len(kinds) == 1:
            written[key] = str(next(iter(kinds))).removeprefix("torch.")
    inputs = plan.inputs
    if any(is_head(item.name) for item in plan.own) and any(one.configured_tied for one in inputs):
        # Whichever of them the configuration is from, what is written has a head of its own.
        written["tie_word_embeddings"] = False
        if isinstance(inner := written.get("text_config"), dict):
            written["text_config"] = inner | {"tie_word_embeddings": False}
    rows = plan.vocabularies.rows
    if rows is not None:
        inner = written.get("text_config")
        if isinstance(inner, dict):
            written["text_config"] = _renumbered({**inner, "vocab_size": rows}, plan, main)
        if "vocab_size" in written or not isinstance(inner, dict):
            written["vocab_size"] = rows
    replace_json(path / "config.json", _renumbered(written, plan, main))
    generation = next((place / _GENERATION for place in main.directories if (place / _GENERATION).is_file()), None)
    if generation is not None:
        replace_json(path / _GENERATION, _renumbered(read_json(generation), plan, main))


def _renumbered(values: dict[str, Any], plan: Plan, main: InputModel) -> dict[str, Any]:
    """Return settings with the numbers that tokens have in the result."""
    numbers = {key: value for key, value in values.items() if key.endswith("_token_id")}
    return values | {key: plan.vocabularies.renumbered(main, value) for key, value in numbers.items()}


def _copy(one: InputModel, names: Sequence[str], path: Path) -> None:
    _copy_from(one.directories, names, path)


def _copy_from(places: Sequence[Path], names: Sequence[str], path: Path) -> None:
    for name in names:
        found = next((place / name for place in places if (place / name).is_file()), None)
        if found is not None:
            shutil.copyfile(found, path / name)


def _card(
    plan: Plan, config: MergeConfig, chosen: Sequence[tuple[int, Value]], details: dict[str, Any], recipe: str
) -> str:
    """Return the model card: what was merged, how, and by what its inputs are known again."""
    entries = [(plan.base, "base", "")] if plan.base is not None else []
    entries += [(plan.models[number], "model", _listed(weight)) for number, weight in chosen]
    inputs = [one for one, _, _ in entries]
    header = {
        "library_name": "transformers",
        "tags": ["merge", "rlhf_core", config.method],
    }
    # The hub takes names on the hub alone.
    if named := list(dict.fromkeys(one.name for one in inputs if not Path(one.name).expanduser().exists())):
        header["base_model"] = named
    rows = [f"| {one.name} | {kind} | {weight} | `{one.fingerprint.hex()}` |" for one, kind, weight in entries]
    lines = [
        "---",
        redact_text(dump_yaml(header)).rstrip(),
        "---",
        "",
        f"# Merge by {config.method}",
        "",
        f"Made by rlhf_core {__version__}. `rlhf merge {RECIPE} --output DIR`, from the directory where that was done,",
        "makes it again, bit for bit on the same machine.",
        "",
        "| input | as | weight | fingerprint |",
        "|---|---|---|---|",
        *rows,
        "",
        "A fingerprint hashes every tensor's name and shape and 32 short runs of its values; it doesn't depend on how the files",
        "are cut.",
        "",
        *([f"{name}: {value}" for name, value in details.items()] + [""] if details else []),
        "```yaml",
        recipe.rstrip(),
        "```",
    ]
    if config.hash_inputs:
        lines += ["", "| input file | SHA-256 |", "|---|---|"]
        lines += [
            f"| {one.name}: {file.path.name} | `{sha256_of(file.path).sha256}` |"
            for one in inputs
            for file in one.files
        ]
    return "\n".join(lines) + "\n"


def _listed(weight: Value) -> str:
    return f"{weight:g}" if isinstance(weight, int | float) else "by layer"
