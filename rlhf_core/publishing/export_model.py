"""Export a model: a plain Hugging Face directory, with its adapter folded in, in another dtype, or as GGUF too; and push one."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from rlhf_core.infra.errors import ConfigError, ModelError, StorageError
from rlhf_core.infra.files import (
    fsync_directory,
    read_json,
    remove_tree,
    replaced_path,
    storage_errors,
    temporary_path,
)
from rlhf_core.infra.hub_upload import HubTarget, check_target, name_base, push_folder
from rlhf_core.infra.model_card import CARD, is_own, write_card
from rlhf_core.infra.model_files import INDEX, check_files, is_adapter, is_hub_name
from rlhf_core.infra.python_wording import said_for_python
from rlhf_core.merging.config import MergeConfig
from rlhf_core.merging.merge import ModelMerger
from rlhf_core.merging.side_files import RECIPE
from rlhf_core.publishing import gguf as gguf_files
from rlhf_core.publishing.converted_files import copy_model
from rlhf_core.publishing.exported_card import exported_card
from rlhf_core.publishing.saved_model import SavedModel, find_saved_model

log = logging.getLogger(__name__)

Dtype = Literal["float32", "bf16", "fp16"]
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_EXPORTED = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md", ".gguf", ".py", ""}
"""Kinds of files in an export; a directory with others in it isn't replaced."""


@dataclass(frozen=True)
class ExportResult:
    """What an export made."""

    output: Path
    """The model's directory."""
    adapter: bool
    """Whether it is an adapter, which needs its base; else a whole model."""
    bytes: int
    seconds: float
    gguf: Path | None = None
    """The GGUF file in `output`, where one was asked for."""


@said_for_python()
def export_model(
    source: str | Path,
    output: str | Path | None = None,
    *,
    merged: bool = False,
    dtype: Dtype | None = None,
    gguf: str | None = None,
    converter: str | Path | None = None,
    base: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Write a trained model as a directory that transformers, or peft for an adapter, loads; the source is left as it is.

    Args:
        source: a run's directory, a checkpoint in it, an adapter, or a model's directory.
        output: a new directory; None is `exports/NAME` in the current one.
        merged: fold an adapter into its base, exactly: float32 inside, the base's dtype outside. Memory is that of a few tensors.
        dtype: of the written weights, but for heads beside them; None keeps the model's.
        gguf: a type of weights (`f16`, `q8_0` …): llama.cpp's converter writes a GGUF file into `output`, too. Folds an adapter.
        converter: llama.cpp's `convert_hf_to_gguf.py`; None looks where `RLHF_GGUF_CONVERTER` says and on the PATH.
        base: the name on the hub of an adapter's base, in place of the path that it was trained on.
        overwrite: replace an export in `output`.
        progress: called with bytes that are folded, and their total.

    Raises:
        ModelError: there is no such model, or an adapter that can't be folded.
        ConfigError: options that don't go together; or `gguf` without a converter, after `output` was written.
        StorageError: `output` is taken, or can't be written.
    """
    began = time.perf_counter()
    kind = gguf_files.check_type(gguf) if gguf is not None else None
    found = find_saved_model(source)
    script = gguf_files.find_converter(converter) if kind is not None else None
    target = Path(output).expanduser() if output is not None else Path("exports") / found.title
    _require_writable(target, found, overwrite=overwrite)
    _export(found, target, merged=merged, for_gguf=kind is not None, dtype=dtype, base=base, progress=progress)
    made = None if kind is None else _to_gguf(target, kind, script)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return ExportResult(target, is_adapter(str(target)), size, time.perf_counter() - began, made)


@said_for_python()
def push_to_hub(
    source: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    base: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a finished run's model, or a model's directory, with its card to the hub; return its address there.

    Args:
        source: a run's directory, an adapter, or a model's directory.
        repo: `owner/name`, made where need be; `name` alone is one of the token's user.
        private: make it private; one that exists and is public is refused.
        revision: a branch, made where need be.
        base: the name on the hub of an adapter's base, in place of the path that it was trained on.
        message: of the commit.

    Raises:
        ModelError: there is no such model, or the run hasn't finished.
        ConfigError: the name can't be one, or the token is missing or may not write there.
        StorageError: the hub can't be reached, or refused the upload.
    """
    found = find_saved_model(source)
    if found.directory is None:
        fix = f"`rlhf export {found.name}`, then push what it wrote"
        raise ModelError("a checkpoint is no model that can be loaded yet", place=found.name, fix=fix)
    _check_base(found.directory, base)
    check_files(str(found.directory))
    target = check_target(HubTarget(repo, private, revision))
    return push_folder(found.directory, target, message=message or f"Upload {found.title}", base=base)


def _require_writable(target: Path, found: SavedModel, *, overwrite: bool) -> None:
    """Raise where an export can't be written: something is there that isn't to be replaced, or the model itself."""
    place, here = str(target), target.resolve()
    inside = found.directory.resolve() if found.directory is not None else None
    if inside is not None and (here == inside or here in inside.parents or inside in here.parents):
        raise ConfigError(
            "the export would replace the model, or lie in it",
            place=place,
            fix="choose another `--output`",
        )
    if target.exists() and not target.is_dir():
        raise StorageError("is a file, not a directory", place=place, fix="choose another `--output`")
    content = list(target.iterdir()) if target.is_dir() else []
    if not content:
        return
    names = {path.name for path in content}
    if not names & {"config.json", "adapter_config.json"}:
        raise StorageError("is not empty, and no model", place=place, fix="choose an empty or a new `--output`")
    if not overwrite:
        raise StorageError(
            "holds a model already", place=place, fix="`--overwrite` replaces it; or choose another `--output`"
        )
    foreign = [
        one.name for one in content
        if (one.is_dir() and not one.name.startswith("member-")) or (one.is_file() and one.suffix not in _EXPORTED)
    ]  # fmt: skip
    if foreign:
        got = ", ".join(sorted(foreign)[:5])
        raise StorageError(
            "holds more than a model, and isn't replaced", place=place, got=got, fix="choose another `--output`"
        )


def _export(
    found: SavedModel,
    target: Path,
    *,
    merged: bool,
    for_gguf: bool,
    dtype: Dtype | None,
    base: str | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write a model and its card beside `target`, then put it there; `for_gguf` folds an adapter, since GGUF has whole models."""
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    work, plain = temporary_path(target), target.with_name(f".{target.name}.saved.tmp")
    with _temporary(work, plain), storage_errors(target):
        directory = found.directory if found.directory is not None else _save_checkpoint(found, plain)
        if merged and not is_adapter(str(directory)):
            log.info("%s is a whole model: there is no adapter to fold", found.name)
        notes = _write(directory, work, merged=merged or for_gguf, dtype=dtype, progress=progress)
        if found.checkpoint is not None:
            notes.insert(0, f"the weights of step {found.checkpoint.path.name.removeprefix('step-')}")
        _write_card(directory, work, target, notes=notes, base=base)
        _publish(work, target)


@contextlib.contextmanager
def _temporary(*directories: Path) -> Iterator[None]:
    """Remove directories afterwards, and before, where a killed export left them."""
    for directory in directories:
        remove_tree(directory)
    try:
        yield
    finally:
        for directory in directories:
            remove_tree(directory)


def _save_checkpoint(found: SavedModel, target: Path) -> Path:
    """Save the model of a checkpoint as the run would have saved it at its end; this takes the model's memory."""
    # Only here is a model built, and transformers' models imported, which takes seconds.
    from rlhf_core.training.checkpoint_models import checkpoint_model

    assert found.checkpoint is not None
    checkpoint_model(found.checkpoint).save_pretrained(target)  # type: ignore[operator]
    return target


def _write(
    source: Path, work: Path, *, merged: bool, dtype: Dtype | None, progress: Callable[[int, int], None] | None
) -> list[str]:
    """Write the model's files; return what was done to them, in words."""
    adapter = is_adapter(str(source))
    said = [] if dtype is None else [f"its weights converted to {dtype}"]
    if adapter and merged:
        config = MergeConfig.parse(
            {"method": "passthrough", "models": [str(source)], "output": str(work), "dtype": dtype}
        )
        ModelMerger(config, progress=progress).merge(overwrite=True)
        for name in (RECIPE, CARD):
            (work / name).unlink(missing_ok=True)
        return ["the adapter folded into its base", *said]
    if dtype is not None and not adapter:
        _refuse_quantised(source)
    check_files(str(source))
    copy_model(source, work, dtype=DTYPES[dtype] if dtype is not None else None)
    return said


def _to_gguf(target: Path, kind: str, converter: Path | None) -> Path:
    """Convert an exported model to a GGUF file beside it; return the file.

    Raises:
        ConfigError: there is no converter.
    """
    file = target / f"{target.resolve().name}-{kind}.gguf"
    if converter is None:
        raise gguf_files.not_installed(target, file, kind)
    return gguf_files.convert(converter, target, file, kind)


def _refuse_quantised(source: Path) -> None:
    if read_json(source / "config.json").get("quantization_config"):
        raise ModelError(
            "quantised weights aren't converted to another dtype",
            place=str(source),
            got=(source / INDEX).name if (source / INDEX).is_file() else None,
            fix="leave out `--dtype`, or load the model, dequantise it and save it",
        )


def _write_card(source: Path, work: Path, target: Path, *, notes: list[str], base: str | None) -> None:
    """Write the card and the base's name; a `README.md` of the user's own, in the source or the earlier export, is kept."""
    _check_base(source, base)
    if base is not None and is_adapter(str(work)):
        name_base(work, base)
    kept = next((place for place in (target, source) if is_own(place)), None)
    if kept is not None:
        (work / CARD).write_bytes((kept / CARD).read_bytes())
    else:
        write_card(work, exported_card(source, work, notes=notes, base=base))


def _check_base(source: Path, base: str | None) -> None:
    """Raise where a base is named for a model that has none, or by a path."""
    if base is None:
        return
    if not is_adapter(str(source)):
        raise ConfigError(
            "is a whole model, without a base to name", place=str(source), got=f"--base {base}", fix="leave it out"
        )
    if not is_hub_name(base) or Path(base).exists():
        raise ConfigError("must be a name on the hub", place="--base", got=base, fix="write `owner/name`")


def _publish(work: Path, target: Path) -> None:
    """Rename the finished directory to its place, so that a kill leaves the earlier one or the new one."""
    old = replaced_path(target)
    remove_tree(old)
    if target.exists():
        target.rename(old)
    work.rename(target)
    fsync_directory(target.parent)
    remove_tree(old)
