"""Upload a model's directory to the Hugging Face hub, or to another address by `HF_ENDPOINT`.

The token is huggingface_hub's: the environment's `HF_TOKEN`, or what `hf auth login` saved. It is in no option and no record.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_core.infra.errors import ConfigError, RLHFError, StorageError, first_line
from rlhf_core.infra.model_card import (
    CARD,
    HERE,
    MARK,
    front_matter,
    hub_name,
    is_users,
    public_text,
    render,
    with_loading,
)
from rlhf_core.infra.model_files import adapter_base, is_adapter, is_hub_name

log = logging.getLogger(__name__)

_STALE = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json", "*_head.json", "pytorch_model*.bin"]
"""Files of an earlier upload that the new one replaces: weights of two models in one repository would be mixed up."""
_LATER = "nothing here is lost: `rlhf push` uploads it later"


@dataclass(frozen=True)
class HubTarget:
    """Where a model is uploaded to."""

    repo: str
    """`owner/name`, or `name` for one of the token's own user."""
    private: bool = False
    """Whether a repository that doesn't exist yet is made private, and one that is public refused."""
    revision: str | None = None
    """The branch, made where need be; None for the main one."""


def check_target(target: HubTarget) -> HubTarget:
    """Check the name, the token, and that the token may write there, before anything long is done; return the full name.

    Raises:
        ConfigError: the name can't be one, there is no token, it may only read, or not write for this owner.
        StorageError: the hub can't be reached.
    """
    with _hub_errors(target.repo):
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(target.repo)
        api = _api()
        who = api.whoami()
        user = str(who["name"])
        owner, _, name = target.repo.rpartition("/")
        owners = [user, *(str(one.get("name")) for one in who.get("orgs") or [])]
        if owner and owner not in owners:
            raise ConfigError(
                "the token's user can't write for this owner",
                place=target.repo,
                got=f"user `{user}`"
                + (f", member of {', '.join(owners[1:])}" if owners[1:] else ", in no organisation"),
                fix=f"push to `{user}/{name}`, or use a token of a member of `{owner}`",
            )
        if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
            raise ConfigError(
                "the token may only read",
                place=target.repo,
                fix="make one that may write, at https://huggingface.co/settings/tokens, and set HF_TOKEN to it",
            )
        full = HubTarget(f"{owner or user}/{name}", target.private, target.revision)
        if full.private:
            _refuse_public(api, full.repo)
        return full


def push_folder(directory: Path, target: HubTarget, *, message: str, base: str | None = None) -> str:
    """Upload a model's directory with its card, as one commit; return the address.

    A `README.md` in the repository that isn't one of our cards is the user's own, and stays as it is. Weights of an earlier
    upload that this one doesn't replace by name are removed in the same commit.

    Args:
        directory: the model; it is left as it is.
        target: where to, as `check_target` returned it.
        message: of the commit.
        base: the base's name on the hub, for an adapter whose base has a local name.

    Raises:
        ConfigError: the token may not write there.
        StorageError: the hub can't be reached, or refused the upload.
    """
    with _hub_errors(target.repo), tempfile.TemporaryDirectory(prefix="rlhf-push-") as place:
        api, staged = _api(), Path(place) / "model"
        api.create_repo(target.repo, private=target.private or None, exist_ok=True)
        if target.private:
            _refuse_public(api, target.repo)
        if target.revision is not None:
            api.create_branch(target.repo, branch=target.revision, exist_ok=True)
        _stage(directory, staged, target.repo, base)
        if _has_own_card(api, target, Path(place)):
            log.info("%s has a README.md of its own on the hub, which is kept", target.repo)
            (staged / CARD).unlink(missing_ok=True)
        commit = api.upload_folder(
            repo_id=target.repo,
            folder_path=staged,
            commit_message=message,
            revision=target.revision,
            delete_patterns=_STALE,
        )
        address = f"{api.endpoint}/{target.repo}"
        log.debug("uploaded as %s", commit.oid)
        return address if target.revision is None else f"{address}/tree/{target.revision}"


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="rlhf_core")


def _refuse_public(api: Any, repo: str) -> None:
    """Raise where a repository exists and everyone can read it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with suppress(RepositoryNotFoundError):
        if not api.repo_info(repo).private:
            raise ConfigError(
                "the repository is public, and a private one was asked for",
                place=repo,
                fix="make it private in its settings on the hub, or push to a new name",
            )


def _has_own_card(api: Any, target: HubTarget, place: Path) -> bool:
    """Tell whether the repository has a `README.md` that we didn't write."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        found = api.hf_hub_download(target.repo, CARD, revision=target.revision, local_dir=place / "there")
    except (EntryNotFoundError, RevisionNotFoundError):  # also of a repository without a commit
        return False
    return is_users(Path(found).read_text(encoding="utf-8", errors="replace"))


def _stage(directory: Path, staged: Path, repo: str, base: str | None) -> None:
    """Lay out what is uploaded: links to the model's files, the card with the model's new name, an adapter with its base's."""
    staged.mkdir()
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                (staged / name).symlink_to(file.resolve())
            except OSError:  # a file system, or a Windows user, without links
                shutil.copyfile(file, staged / name)
    for recipe in staged.glob("*.y*ml"):  # a merge's, whose paths are those of this machine
        _replace(recipe, public_text(recipe.read_text(encoding="utf-8")))
    if is_adapter(str(directory)):
        name_base(staged, base)
        if base is None and not is_hub_name(local := adapter_base(str(directory))):
            log.warning(
                "the adapter names a base that only this machine has, `%s`: others can't load it; `--base OWNER/NAME` names it"
                " on the hub",
                Path(local).name,
            )
    if (card := directory / CARD).is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        if MARK in text:
            _replace(staged / CARD, with_base(with_loading(text, staged), base).replace(HERE, repo))


def name_base(directory: Path, base: str | None) -> None:
    """Write the name of an adapter's base on the hub into its configuration; None leaves a name, and of a path its last part."""
    path = directory / "adapter_config.json"
    values = json.loads(path.read_bytes())
    named = str(values.get("base_model_name_or_path") or "")
    known = hub_name(named) if named else None
    values["base_model_name_or_path"] = base or (named if known == named else public_text(named))
    _replace(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def with_base(text: str, base: str | None) -> str:
    """Return a card of ours that names its base model on the hub; None leaves it as it is."""
    if base is None:
        return text
    header = front_matter(text)
    body = text.partition("\n---\n")[2].replace(MARK, "").strip("\n")
    relation = header.get("base_model_relation") or ("adapter" if header.get("library_name") == "peft" else "finetune")
    first = {"base_model": base, "base_model_relation": relation}
    return render(first | {key: value for key, value in header.items() if key not in first}, body.split("\n"))


def _replace(path: Path, text: str) -> None:
    """Write a file in place of a link to the model's own."""
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Raise what huggingface_hub raises inside as an error of ours about a repository."""
    try:
        yield
    except RLHFError:
        raise
    except Exception as raised:
        raise _hub_error(raised, repo) from raised


def _hub_error(error: Exception, repo: str) -> RLHFError:
    """Return the error for one of huggingface_hub's, by its class or the status that the hub answered with."""
    from huggingface_hub import errors

    while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # from a thread that uploaded
        error = error.__cause__
    if isinstance(error, errors.HFValidationError):
        fix = "write `owner/name`: letters, digits, `-`, `_` and `.`, at most 96"
        return ConfigError("isn't a name that the hub allows", place=repo, got=first_line(error), fix=fix)
    if isinstance(error, errors.LocalTokenNotFoundError):
        fix = "`hf auth login`, or set HF_TOKEN to a token that may write"
        return ConfigError("there is no token for the hub", place=repo, fix=fix)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return ConfigError("the hub is switched off", place=repo, got="HF_HUB_OFFLINE is set", fix="unset it")
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = public_text(str(getattr(error, "server_message", None) or first_line(error)))[:200]
    if status == 401:
        fix = "`hf auth login` with a new token, or mend HF_TOKEN, which counts before it"
        return ConfigError("the hub doesn't know the token", place=repo, fix=fix)
    if status == 403:
        fix = f"a token that may write to `{repo}`, at https://huggingface.co/settings/tokens; {_LATER}"
        return ConfigError("the token may not write there", place=repo, got=said, fix=fix)
    if status is not None:
        return StorageError(f"the hub refused the upload with status {status}", place=repo, got=said, fix=_LATER)
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return StorageError("the hub refused the upload", place=repo, got=first_line(error), fix=_LATER)
    fix = f"check the network, and HF_ENDPOINT where it is set; {_LATER}"
    return StorageError("the hub can't be reached", place=repo, got=first_line(error), fix=fix)
