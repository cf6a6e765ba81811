"""Find and check a model's files before anything is loaded: directories, adapters, GGUF files, hub names.

Importing this module imports neither transformers nor peft.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_core.infra.errors import ModelError, first_line, nearest
from rlhf_core.infra.files import read_json, sha256_of, storage_errors
from rlhf_core.infra.found_paths import looked_in, places_of, unexpanded
from rlhf_core.infra.hub_access import HubUnreachable, NotOnHub, ask_hub, stay_offline
from rlhf_core.infra.near_runs import near_run

log = logging.getLogger(__name__)

REWARD_HEAD, PROCESS_REWARD_HEAD, VALUE_HEAD, COMPRESSOR_HEAD = HEADS = (
    "reward_head",
    "process_reward_head",
    "value_head",
    "compressor_head",
)
"""Names of heads that are saved beside a model's weights, each as `NAME.json` and `NAME.safetensors`."""
HEAD_FORMAT = 1
"""Version of what `NAME.json` says of a head."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


def kind_of(head: str) -> str:
    """Return what a model with a head of this name is called: `reward_head` → "reward model"."""
    return head.removesuffix("_head").replace("_", " ") + " model"


def reward_at(directory: str | Path) -> str:
    """Return the name of the reward by the model in a directory: `process_reward` or `value_model` by its head, else
    `reward_model`.

    Raises:
        ModelError: a head isn't whole.
    """
    step_wise = {PROCESS_REWARD_HEAD: "process_reward", VALUE_HEAD: "value_model"}
    found = (name for head, name in step_wise.items() if head_pair(directory, head, str(directory)) is not None)
    return next(found, "reward_model")


def head_words(head: str) -> str:
    """Return a head's name as a user reads it: `reward_head` → "reward head"."""
    return head.replace("_", " ")


def file_hashes(source: str) -> dict[str, str] | None:
    """Return file name → SHA-256 of all files that a model is read from, an adapter's base included; None if it isn't local."""
    path = Path(source).expanduser()
    hashes = _own_hashes(path)
    if hashes is None or not path.is_dir():
        return hashes
    base, adapters = adapter_chain(str(path))
    # An adapter may stand on another adapter, whose files count, too.
    under = [*adapters[-2::-1], base] if adapters else []
    for depth, place in enumerate(under, 1):
        hashes |= {"base/" * depth + name: value for name, value in (_own_hashes(Path(place)) or {}).items()}
    return hashes


def _own_hashes(path: Path) -> dict[str, str] | None:
    """Return file name → SHA-256 of a model's own files, without its base; None where it isn't local."""
    if path.is_file():
        return {path.name: sha256_of(path).sha256}
    if not path.is_dir():
        return None
    parts = [path, *(part for part in path.glob("member-*") if part.is_dir())]
    wanted = sorted(
        p for part in parts for p in part.iterdir() if p.suffix in (".safetensors", ".json", ".jinja", ".model")
    )
    return {str(file.relative_to(path)): sha256_of(file).sha256 for file in wanted}


def locate(source: str) -> tuple[str, dict[str, Any]]:
    """Return a model's directory or hub name, and the options that transformers needs to load it (`gguf_file`).

    Raises:
        ModelError: there is no such directory or file, or it holds no model.
    """
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not _is_model(path):
            raise _no_model_in(path, source)
        return str(path), {}
    if path.is_file():
        fix = f"give the model's directory, {path.parent}" if _is_model(path.parent) else None
        fix = fix or "give a model's directory, or a `.gguf` file"
        raise ModelError("is a file, and no model", place=source, fix=fix)
    if {*source} & {*"*?["}:
        matched = [str(one) for one in _matching(path) if _is_model(one)]
        got = f"a pattern that matches {', '.join(matched[:4]) or 'no model'}"
        fix = f"name one of them: {matched[0]}" if matched else None
        raise ModelError("a model is one directory", place=source, got=got, fix=fix)
    if not is_hub_name(source):
        problem = f"no such model directory or file{looked_in(source)}"
        raise ModelError(problem, place=source, fix=unexpanded(source) or _near_of(source))
    return source, {}


def _is_model(path: Path) -> bool:
    """Tell whether a directory holds a model or an adapter, whole or not."""
    return any((path / name).is_file() for name in ("config.json", "adapter_config.json"))


def _matching(path: Path) -> list[Path]:
    """Return the directories that a pattern matches."""
    try:
        found = Path(path.anchor or ".").glob(str(path.relative_to(path.anchor) if path.anchor else path))
        return sorted(one for one in found if one.is_dir())
    except (OSError, ValueError, NotImplementedError):  # no pattern
        return []


def _no_model_in(path: Path, source: str) -> ModelError:
    """Return the error for a directory without a model, which says what it holds instead, and what may have been meant."""
    if not any(path.iterdir()):
        return ModelError("is an empty directory, and no model", place=source)
    if path.parent.name == "checkpoints" and (path / "manifest.json").is_file():
        fix = f"give the model that the run exported, {path.parent.parent / 'model'}"
        if not _is_model(path.parent.parent / "model"):
            fix = "continue the run, whose model is exported at its end: `rlhf train … --resume`"
        problem = "is a checkpoint of a run, which holds the state of its training, and no model"
        return ModelError(problem, place=source, fix=fix)
    ggufs = sorted(p.name for p in path.glob("*.gguf"))
    inside = sorted(one.name for one in path.iterdir() if one.is_dir() and _is_model(one))
    hint = f"name the file: {path / ggufs[0]}" if ggufs else None
    if (path / "run.json").is_file():
        hint = f"it is a run directory; give the model in it, {path / 'model'}"
    elif inside and hint is None:
        # As transformers' own trainer leaves it: a folder of `checkpoint-500`, `checkpoint-1000`.
        more = f" (of {len(inside)} models in it)" if len(inside) > 1 else ""
        hint = f"did you mean {path / max(inside, key=_number)}{more}?"
    return ModelError("isn't a model: it has no config.json", place=source, fix=hint)


def _number(name: str) -> tuple[int, str]:
    """Return the number at a name's end, by which checkpoints are in their order, and the name."""
    found = re.search(r"(\d+)$", name)
    return (int(found[1]) if found else -1, name)


def _near_of(source: str) -> str | None:
    """Return a hint for a path that doesn't exist: the nearest name, wherever it was looked for."""
    hints = [near_model_or_run(Path(one).expanduser()) for one in places_of(source)]
    return next((hint for hint in hints if hint is not None and hint.startswith("did you mean")), hints[0])


def is_hub_name(source: str) -> bool:
    """Tell whether a text can be a model's name on the hub, by its form alone."""
    written_as_path = Path(source).is_absolute() or source.startswith((".", "~"))
    return not written_as_path and _HUB_NAME.fullmatch(source) is not None


def near_path(path: Path) -> str | None:
    """Return a hint for a path that doesn't exist: the nearest name in its directory, or that there is no such directory."""
    if not path.parent.is_dir():
        if (near := near_path(path.parent)) is not None and near.startswith("did you mean"):
            return near
        return f"the directory {path.parent} doesn't exist either"
    names = sorted(p.name for p in path.parent.iterdir())
    # `models/SmolLM2` is most likely what `models/SmolLM2-135M-Instruct` was cut down to, however long the rest is.
    near = nearest(path.name, names) or next((name for name in names if name.startswith(f"{path.name}-")), None)
    return f"did you mean {path.parent / near}?" if near else None


def near_model_or_run(path: Path) -> str | None:
    """Return a hint for a model or a run that doesn't exist: the nearest name, else the runs there, else as `near_path`."""
    near = near_path(path)
    return (
        near
        if near is not None and near.startswith("did you mean")
        else near_run(path if path.parent.is_dir() else path.parent) or near
    )


def no_such_model(source: str, error: Exception) -> ModelError:
    """Return the error for a name that is neither a local directory nor a model that the hub can deliver."""
    near = near_model_or_run(Path(source)) or ""
    named = near.startswith("did you mean") or (near.startswith("name one of") and len(Path(source).parts) > 1)
    return ModelError(
        f"is no local directory{looked_in(source)}, and no model that could be fetched from the hub",
        place=source,
        got=first_line(error),
        fix=near if named else "check the path, or for a hub name the spelling and the network",
    )


def require_on_hub(name: str) -> None:
    """Make sure that the hub, or its cache, can deliver a model; see `ask_hub`.

    Raises:
        ModelError: it can't.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        unreachable = ask_hub(name)
        known = [try_to_load_from_cache(name, file) for file in ("config.json", "adapter_config.json")]
    except (NotOnHub, ValueError) as error:  # a name that no repository can have is a ValueError
        raise no_such_model(name, error) from error
    if unreachable is None:
        return
    if not any(isinstance(file, str) for file in known):
        cause = HubUnreachable(unreachable)
        raise no_such_model(name, cause) from cause
    log.warning("%s: %s; the copy in its cache is taken", name, unreachable)
    stay_offline()


def hub_files(source: str, files: Sequence[str]) -> list[Path | None]:
    """Return where files of a hub repository stand in the local cache, fetched where need be; None for those it hasn't.

    Raises:
        ModelError: the hub can't be reached, and the cache has nothing of that name: further attempts would only take time.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if not is_hub_name(source):  # a path where nothing is: loading the model itself says so
        return [None] * len(files)
    require_on_hub(source)
    found: list[Path | None] = []
    for file in files:
        try:
            found.append(Path(hf_hub_download(source, file)))
        except (LocalEntryNotFoundError, EntryNotFoundError):
            found.append(None)
        except (OSError, ValueError):  # no such repository, or no access to it: loading the model itself says which
            return [None] * len(files)
    return found


def is_adapter(where: str) -> bool:
    """Tell whether a directory holds an adapter and no model weights; some trainers save the base's config.json with it."""
    weights = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return (Path(where) / "adapter_config.json").is_file() and not any(
        (Path(where) / name).is_file() for name in weights
    )


def adapter_weights(directory: Path, place: str) -> Path:
    """Return the safetensors file of an adapter's directory.

    Raises:
        ModelError: there is none; pickled weights are never loaded.
    """
    if (file := directory / ADAPTER_WEIGHTS).is_file():
        return file
    pickles = ", ".join(sorted(path.name for path in directory.glob("*.bin")))
    raise ModelError(
        f"the adapter has no {ADAPTER_WEIGHTS}; pickled weights can run code and are not loaded",
        place=place,
        got=pickles or "no weights",
        fix="save it again with `save_pretrained`, where you trust it",
    )


def split_adapter(name: str) -> tuple[str, str] | None:
    """Return the base and the adapter of a model that is named `BASE+ADAPTER`; None for any other name.

    A path that exists is taken as it stands, whatever signs are in it. The base may itself be such a pair.
    """
    base, _, adapter = name.rpartition("+")
    return (base, adapter) if base and adapter and not Path(name).expanduser().exists() else None


def adapter_base(adapter: str) -> str:
    """Return the base model that an adapter names. A relative path counts from the current directory, as in peft, else from the
    adapter's own.

    Raises:
        ModelError: adapter_config.json isn't JSON, or names no base.
    """
    try:
        base = json.loads((Path(adapter) / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ModelError("not a JSON object", place=f"{adapter}/adapter_config.json", got=first_line(error)) from None
    if not base:
        raise ModelError("the adapter doesn't name its base model", place=f"{adapter}/adapter_config.json")
    base = str(base)
    if not Path(base).expanduser().exists() and (beside := Path(adapter) / base).exists():
        return str(beside.resolve())
    return base


def lost_base(adapter: str, base: str, error: ModelError, *, fix: str) -> ModelError:
    """Return the error of an adapter whose base can't be found, by the error that looking for it raised."""
    got = f"{base}: {error.got or error.problem}"
    return ModelError("the base that this adapter names isn't there", place=adapter, got=got, fix=fix)


def adapter_chain(where: str, local: Callable[[str], str] = str) -> tuple[str, list[str]]:
    """Return the base model under an adapter, and the adapters on it, the innermost first; [] for a plain model.

    Args:
        where: a directory or a hub name.
        local: returns the directory to which an adapter of a hub name was fetched, and any other name as it is.

    Raises:
        ModelError: the adapters name each other as their base.
    """
    adapters: list[str] = []
    seen: set[Path] = set()
    while is_adapter(where := local(where)):
        if (here := Path(where).expanduser().resolve()) in seen:
            raise ModelError(
                "adapters name each other as their base, so there is no model under them",
                place=f"{adapters[0]}/adapter_config.json",
                got=" → ".join([*adapters, where]),
                fix="set `base_model_name_or_path` to the model that the first of them was trained on",
            )
        seen.add(here)
        adapters.append(where)
        where = adapter_base(where)
        if Path(where).expanduser().exists():
            where = str(Path(where).expanduser())
    return where, adapters[::-1]


def check_whole(where: str) -> None:
    """Check that the files of a local model or adapter are whole: none is cut off, or a pointer that git left in place of it.

    Raises:
        ModelError: one isn't.
    """
    path = Path(where)
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        if file.suffix not in (".safetensors", ".json", ".model") or not file.is_file():
            continue
        with file.open("rb") as handle:
            start = handle.read(8)
            if start == b"version ":  # the whole of it: `version https://git-lfs.github.com/spec/v1`
                raise ModelError(
                    f"{file.name} is a pointer of Git LFS, not the file itself",
                    place=where,
                    got=f"{file.stat().st_size} bytes",
                    fix="`git lfs install && git lfs pull` in that repository, or `hf download`",
                )
            if file.suffix == ".safetensors" and (lost := _cut_off(start, handle, file.stat().st_size)):
                raise ModelError(f"{file.name} is {lost}", place=where, fix="copy or download the file again")


def _cut_off(start: bytes, handle: BinaryIO, size: int) -> str | None:
    """Return in words what is wrong with a safetensors file's length; None where it is what the header says.

    Args:
        start: the first 8 bytes, which give the header's length; `handle` is behind them.
    """
    length = int.from_bytes(start, "little")
    if size == 0:
        return "empty"
    if len(start) < 8 or length > size - 8:
        # What is no safetensors file at all has a length that no header has.
        return f"cut off within its header, or no safetensors file: it has no valid header in {size:,} bytes"
    try:
        header = json.loads(handle.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None  # a file of the right length with a header that lies: reading it says how
    return f"cut off: {size:,} of {needed:,} bytes" if size < needed else None


def check_files(where: str) -> dict[str, set[str]] | None:
    """Check a local directory's weights before they are read: every shard is there and whole, and they aren't pickles alone.

    Returns:
        Of a model in several shards the names of the tensors that its index puts in each; None for all others.
    """
    path = Path(where)
    check_whole(where)
    index = path / INDEX
    if (
        index.is_file() and not (path / SINGLE).is_file()
    ):  # where both are there, the single file counts, as in transformers
        shards: dict[str, set[str]] = {}
        try:
            for tensor, shard in json.loads(index.read_text())["weight_map"].items():
                shards.setdefault(shard, set()).add(tensor)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{INDEX} can't be read", place=where, got=first_line(error), fix="copy the file again"
            ) from None
        if lost := [shard for shard in sorted(shards) if "/" in shard or not (path / shard).is_file()]:
            raise ModelError(
                f"shard {lost[0]} is missing", place=where, got=f"an index of {len(shards)} shards", fix="copy the file"
            )
        return shards
    if path.is_dir() and not any(path.glob("*.safetensors")) and any(path.glob("*.bin")):
        raise ModelError(
            "has only pickled weights, which can run code when they are loaded",
            place=where,
            got=", ".join(sorted(p.name for p in path.glob("*.bin"))),
            fix="convert it to safetensors with `save_pretrained`, where you trust it",
        )
    if (path / "config.json").is_file() and not any(path.glob("*.safetensors")) and not any(path.glob("*.gguf")):
        problem = "has a config.json, and no weights"
        raise ModelError(
            problem, place=where, fix="copy its files `*.safetensors`, too, or name the model's own directory"
        )
    return None


def json_object(path: Path, place: str) -> dict[str, Any]:
    """Return the object in a JSON file of a model, such as its config.json.

    Raises:
        ModelError: it isn't JSON, or no object.
        StorageError: it can't be opened.
    """
    with storage_errors(path):
        try:
            found = read_json(path)
        except ValueError as error:
            raise ModelError(f"{path.name} can't be read", place=place, got=error, fix="copy the file again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path.name} is no JSON object", place=place, fix="save the model again")
    return found


def head_pair(source: str | Path, head: str, place: str) -> tuple[Path, Path] | None:
    """Return `HEAD.json` and `HEAD.safetensors` of a model, fetched where it is on the hub; None for a model without that head.

    Args:
        source: a directory, or a name on the hub.
        place: the model's name in messages.

    Raises:
        ModelError: only one of the two is there. The model must not be taken for one without a head, and given a new one.
    """
    names = (f"{head}.json", f"{head}.safetensors")
    where = Path(source).expanduser()
    if where.exists():
        description, tensors = ((where / name) if (where / name).is_file() else None for name in names)
    else:
        description, tensors = hub_files(str(source), names)
    if description is not None and tensors is not None:
        return description, tensors
    if description is None and tensors is None:
        return None
    lost, there = names if description is None else names[::-1]
    raise ModelError(
        f"the {head_words(head)} is not whole, so its scores would be random",
        place=place,
        got=f"{there}, and no {lost}",
        fix="copy the whole checkpoint again",
    )


def head_description(directory: Path, head: str) -> dict[str, Any]:
    """Return what `HEAD.json` beside a model's weights says of a head.

    Raises:
        ModelError: it is damaged, or of another format.
    """
    path = directory / f"{head}.json"
    found = json_object(path, str(directory))
    if type(number := found.get("format")) is not int:
        raise ModelError("lacks `format`", place=str(path), fix="save the model again")
    if number != HEAD_FORMAT:
        raise ModelError(f"`format` must be {HEAD_FORMAT}", place=str(path), got=number)
    return found
