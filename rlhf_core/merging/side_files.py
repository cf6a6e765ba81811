"""The files beside a merged model's weights: configuration, tokenizer, recipe and model card."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config.yaml_file import dump_yaml
from rlhf_core.infra.files import read_json, replace_file, replace_json, sha256_of, to_json
from rlhf_core.infra.model_card import (
    hub_name,
    library_values,
    licence_of,
    loading_lines,
    public_text,
    render,
    root_of,
    shown_name,
    write_card,
)
from rlhf_core.infra.model_files import INDEX
from rlhf_core.infra.redact import redact_text
from rlhf_core.infra.version import __version__
from rlhf_core.merging import chat_template
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.input_model import InputModel, with_changes
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
    """Write what belongs beside the weights.

    Args:
        path: the model's directory.
        plan: the merge's.
        config: what makes the same model again, for the recipe.
        chosen: numbers of the models that were merged, with their weights.
        details: what the method reports.
    """
    if len({tensor.file for tensor in plan.own}) > 1:
        replace_json(path / INDEX, plan.index())
    main = plan.base if plan.base is not None else plan.models[0]
    _write_config(path, plan, main)
    _copy(_OTHER_FILES, main.directories, path)
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
    write_card(path, _card(path, plan, config, chosen, details, recipe))


def recipe_of(config: MergeConfig) -> str:
    """Return a merge as the text of a file that `rlhf merge` takes."""
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"options", "output"})
    values = {"method": config.method, **values, **config.model_dump(mode="json")["options"]}
    return redact_text(dump_yaml(values))


def warn_without_tokenizer(plan: Plan) -> None:
    """Warn where the result will have no tokenizer, since no input has one."""
    if not _tokenizer_directories(plan):
        log.warning("no input has a tokenizer, so the result has none; copy its files beside the result's weights")


def _tokenizer_directories(plan: Plan) -> Sequence[Path]:
    """Return where the result's tokenizer is taken from: as vocabularies were aligned, else the first input that has one."""
    if plan.vocabularies.origin is not None:
        return [plan.vocabularies.origin.parent]
    having = (one.directories for one in plan.inputs if any(one.find_file(name) for name in _TOKENS))
    return next(having, [])


def _write_tokenizer(path: Path, plan: Plan) -> None:
    _copy(_TOKENIZER_FILES, _tokenizer_directories(plan), path)
    if plan.vocabularies.origin is not None:
        shutil.copyfile(plan.vocabularies.origin, path / TOKENIZER)
    if plan.vocabularies.tokenizer is not None:
        replace_file(path / TOKENIZER, to_json(plan.vocabularies.tokenizer))


def _write_config(path: Path, plan: Plan, main: InputModel) -> None:
    """Write the main input's configuration, and that of its generation, with the result's type, rows and token numbers."""
    if not main.config:
        return
    written, changed = dict(main.config), dict[str, Any]()
    kinds = {tensor.dtype for tensor in plan.own if tensor.merged}
    for key in ("dtype", "torch_dtype"):
        if key in written and len(kinds) == 1:
            written[key] = str(next(iter(kinds))).removeprefix("torch.")
    if any(is_head(tensor.name) for tensor in plan.own) and any(one.configured_tied for one in plan.inputs):
        # Whichever input the configuration is from, the result has an output head that isn't its embeddings.
        changed["tie_word_embeddings"] = False
    if plan.vocabularies.rows is not None:
        changed["vocab_size"] = plan.vocabularies.rows
    written = with_changes(written, changed)
    if isinstance(inner := written.get("text_config"), dict):
        written["text_config"] = _renumbered(inner, plan, main)
    replace_json(path / "config.json", _renumbered(written, plan, main))
    if (generation := main.find_file(_GENERATION)) is not None:
        replace_json(path / _GENERATION, _renumbered(read_json(generation), plan, main))


def _renumbered(values: dict[str, Any], plan: Plan, main: InputModel) -> dict[str, Any]:
    """Return a configuration with the numbers that tokens have in the result."""
    numbers = {key: value for key, value in values.items() if key.endswith("_token_id")}
    return values | {key: plan.vocabularies.renumbered(main, value) for key, value in numbers.items()}


def _copy(names: Sequence[str], places: Sequence[Path], path: Path) -> None:
    """Copy files to a directory, each from the first place that has it."""
    for name in names:
        found = next((place / name for place in places if (place / name).is_file()), None)
        if found is not None:
            shutil.copyfile(found, path / name)


def _card(
    path: Path,
    plan: Plan,
    config: MergeConfig,
    chosen: Sequence[tuple[int, Value]],
    details: dict[str, Any],
    recipe: str,
) -> str:
    """Return the model card: what was merged, how, and the inputs' fingerprints."""
    entries = [(plan.base, "base", "")] if plan.base is not None else []
    entries += [(plan.models[number], "model", _listed(weight)) for number, weight in chosen]
    rows = [(shown_name(one.name), kind, weight, f"`{one.fingerprint.hex()}`") for one, kind, weight in entries]
    inputs = [one for one, _, _ in entries]
    licences = {one.name: licence_of(one.name) for one in inputs}
    folded = config.method == "passthrough" and len(inputs) == 1 and inputs[0].base is not None
    title = f"{shown_name(inputs[0].name)}, folded into its base" if folded else f"Merge by {config.method}"
    lines = [
        f"# {title}",
        "",
        f"Made by rlhf_core {__version__}. `rlhf merge {RECIPE} --output DIR`, from the directory where that was done,",
        "makes it again, bit for bit on the same machine.",
        "",
        *loading_lines(path),
        "",
        "## Merged",
        "",
        *_table(("input", "as", "weight", "fingerprint"), rows),
        "",
        "A fingerprint hashes every tensor's name and shape and 32 short runs of its values, whatever its shards.",
        "",
        *([f"{name}: {value}" for name, value in details.items()] + [""] if details else []),
        "```yaml",
        public_text(recipe).rstrip(),
        "```",
        "",
        "## Licence",
        "",
        *dict.fromkeys(one.sentence for one in licences.values()),
        *(["", *_hashes(inputs)] if config.hash_inputs else []),
    ]
    return render(_header(path, inputs, [one.values for one in licences.values()], config.method, folded=folded), lines)


def _header(
    path: Path, inputs: Sequence[InputModel], licences: Sequence[Mapping[str, Any]], method: str, *, folded: bool
) -> dict[str, Any]:
    """Return the values in front of the card, which the hub reads; a licence where all inputs have the same."""
    named = list(dict.fromkeys(name for one in inputs if (name := hub_name(root_of(one.name))) is not None))
    return {
        "base_model": named,  # the hub takes names on the hub alone
        "base_model_relation": ("finetune" if folded else "merge") if named else None,
        **(licences[0] if all(one == licences[0] for one in licences) else {}),
        **library_values(path),
        "tags": ["merge", "rlhf_core", method],
    }


def _hashes(inputs: Sequence[InputModel]) -> list[str]:
    """Return a table of the SHA-256 of each file of weights."""
    files = [(one, file.path) for one in inputs for file in one.files]
    rows = [(f"{shown_name(one.name)}: {path.name}", f"`{sha256_of(path).sha256}`") for one, path in files]
    return _table(("input file", "SHA-256"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(header)} |", "|---" * len(header) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def _listed(weight: Value) -> str:
    return f"{weight:g}" if isinstance(weight, int | float) else "by layer"
