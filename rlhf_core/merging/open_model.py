"""Open an input model of a merge: a directory, a model on the hub, an adapter on its base, or layers of several models.

Only headers, configurations and an adapter's names are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.model_files import (
    HEADS,
    INDEX,
    SINGLE,
    adapter_chain,
    check_files,
    is_adapter,
    json_object,
    locate,
    lost_base,
    no_such_model,
    require_on_hub,
    split_adapter,
)
from rlhf_core.merging.adapter_model import adapted_model
from rlhf_core.merging.config import LayerRun
from rlhf_core.merging.input_model import InputModel
from rlhf_core.merging.layer_stack import stacked_model
from rlhf_core.merging.score_heads import head_tensors, heads_beside
from rlhf_core.merging.tensor_reader import WeightFile

_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
"""What is fetched of a model on the hub."""


def open_model(source: str | Path | Sequence[LayerRun]) -> InputModel:
    """Open an input model.

    Args:
        source: a directory, an adapter's directory, a name on the hub; `BASE+ADAPTER`, an adapter on another base than its
            configuration names; or runs of layers, each of such a model.

    Raises:
        ModelError: there is no such model, a shard is missing or damaged, or the weights are pickles or GGUF.
    """
    if not isinstance(source, str | Path):
        names = dict.fromkeys(run.model for run in source if run.model is not None)
        return stacked_model(source, {name: open_model(name) for name in names})
    name = str(source)
    if (pair := split_adapter(name)) is not None:
        base, adapter = pair
        return adapted_model(name, _directory(adapter), open_model(base))
    path = _directory(name)
    if not is_adapter(str(path)):
        return _stored_model(name, path)
    base, adapters = adapter_chain(str(path), local=_local)
    model = _base_of(name, base)
    for inner in adapters[:-1]:
        model = adapted_model(inner, Path(inner), model)
    return adapted_model(name, path, model)


def _stored_model(name: str, path: Path) -> InputModel:
    """Open the shards of a model directory, and the heads beside them."""
    files = _weight_files(name, path)
    heads = heads_beside(name, path)
    tensors = {key: tensor for file in files for key, tensor in file.tensors.items()} | head_tensors(heads)
    config = json_object(path / "config.json", name) if (path / "config.json").is_file() else {}
    return InputModel(name, path, tensors, config, [*files, *heads.values()], [path], dict.fromkeys(heads, path))


def _base_of(adapter: str, base: str) -> InputModel:
    """Open the base that an adapter names, which may have been moved since."""
    try:
        return open_model(base)
    except ModelError as error:
        if Path(base).expanduser().exists():
            raise
        raise lost_base(adapter, base, error, fix=f"give its present directory: `BASE+{adapter}`") from error


def _weight_files(name: str, path: Path) -> list[WeightFile]:
    """Open a model's shards, which hold what their index says, or its single file."""
    shards = check_files(str(path))
    if shards is None:
        others = sorted(file for file in path.glob("*.safetensors") if file.stem not in HEADS)
        single = [path / SINGLE] if (path / SINGLE).is_file() else others
        if len(single) != 1:
            found = ", ".join(file.name for file in single) or "none"
            raise ModelError(
                f"has no {SINGLE} and no {INDEX}",
                place=name,
                got=f"safetensors files: {found}",
                fix=f"copy {INDEX} too, which lists the tensors of each shard" if single else "copy the weights too",
            )
        return [WeightFile(single[0], name)]
    files = [WeightFile(path / shard, name) for shard in sorted(shards)]
    for file in files:
        shard, listed = file.path.name, shards[file.path.name]
        if lacking := sorted(listed - set(file.tensors)):
            raise ModelError(f"shard {shard} lacks tensor `{lacking[0]}`", place=name, fix="copy the file again")
        if more := sorted(set(file.tensors) - listed):
            raise ModelError(
                f"tensor `{more[0]}` is in {shard}, and the index doesn't list it there",
                place=name,
                fix=f"mend {INDEX}",
            )
    return files


def _directory(name: str) -> Path:
    """Return a model's directory; that of a model on the hub is in the cache, where its files are fetched to."""
    where, options = locate(name)
    if "gguf_file" in options:
        raise ModelError(
            "GGUF weights are not merged: they are quantised",
            place=name,
            fix="load it with transformers and save it with `save_pretrained`",
        )
    if Path(where).is_dir():
        return Path(where)
    require_on_hub(where)
    # Imported this late, for it takes a tenth of a second, which a merge of local models needn't spend.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(where, allow_patterns=_PATTERNS))
    except Exception as error:
        raise no_such_model(where, error) from error


def _local(where: str) -> str:
    """Return the directory of an adapter that may be one on the hub; the name as it is where there is none."""
    try:
        return str(_directory(where))
    except ModelError:
        return where
