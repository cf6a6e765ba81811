"""Model cards: `README.md` beside a model's weights, with YAML front matter as the Hugging Face hub reads it.

A card of ours ends with `MARK`. A `README.md` without it is the user's own, and is never replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.files import replace_file
from rlhf_core.infra.model_files import HEADS, adapter_base, is_adapter, is_hub_name
from rlhf_core.infra.redact import redact_text

CARD = "README.md"
MARK = "<!-- Written by rlhf_core, which replaces this file; without this line it is yours, and is kept. -->"
HERE = "path/to/this/folder"
"""How a card's examples name the model; an upload puts the model's name on the hub in its place."""

_UNFILLED, _FORM = "[More Information Needed]", 20
"""What stands in the form that peft and transformers save, and how often at least where nobody filled it in; it has some 40."""
_FRONT = re.compile(r"\A\ufeff?---\r?\n(?P<yaml>.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_LOADING = re.compile(rf"^## Load it$.*?(?=^## |^{re.escape(MARK)}$|\Z)", re.MULTILINE | re.DOTALL)
_ABSOLUTE = re.compile(
    r"(?<![\w:/.~*<-])(?:~|file://)?/(?:(?:(?!\+[/~])[^\s/'\"`,;|)\]}])+/)+|(?<![\w])[A-Za-z]:\\(?:[^\s\\'\"`]+\\)+"
)
"""The folders of an absolute path, up to its last name."""
_MODELS = {
    "reward_head": ("RewardModel", "text-classification"),
    "process_reward_head": ("ProcessRewardModel", "token-classification"),
    "value_head": ("ValueModel", None),
    "compressor_head": ("ContextCompressor", None),
}
"""The class that loads a model with a head, and its task by the hub's name."""


def public_text(text: str) -> str:
    """Return a text as others may read it: without secrets, and of absolute paths the last name alone."""
    if text.startswith(("/", "~/")) and "\n" not in text and Path(text).expanduser().exists():
        text = Path(text).name  # which may have blanks in it
    return _ABSOLUTE.sub("", redact_text(text))


def public_values(value: Any) -> Any:
    """Return JSON values with every text in them as `public_text` gives it."""
    if isinstance(value, Mapping):
        return {str(key): public_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [public_values(item) for item in value]
    return public_text(value) if isinstance(value, str) else value


def cell(value: object) -> str:
    """Return a value as a cell of a Markdown table."""
    return " ".join(public_text(str(value)).replace("|", "\\|").split())


def front_matter(text: str) -> dict[str, Any]:
    """Return the metadata at the head of a card; {} where it has none, or none that can be read."""
    found = _FRONT.match(text)
    try:
        values = yaml.safe_load(found["yaml"]) if found else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def render(header: Mapping[str, Any], lines: Sequence[str]) -> str:
    """Return a card of ours: its metadata, without the empty values, its lines, and the mark."""
    kept = {key: value for key, value in header.items() if value not in (None, [], "")}
    front = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120)
    return "---\n" + front + "---\n\n" + "\n".join(lines).rstrip() + f"\n\n{MARK}\n"


def is_own(directory: Path) -> bool:
    """Tell whether a directory holds a `README.md` of the user's own: one that we didn't write, or that they took over.

    The form that peft and transformers save, with nothing filled in, is nobody's.
    """
    path = directory / CARD
    return path.is_file() and is_users(path.read_text(encoding="utf-8", errors="replace"))


def is_users(text: str) -> bool:
    """Tell whether a card is somebody's own: neither ours, nor empty, nor the form of peft and transformers as it comes."""
    return bool(text.strip()) and MARK not in text and text.count(_UNFILLED) < _FORM


def write_card(directory: Path, text: str) -> None:
    """Write a card into a directory, in place of any `README.md` that libraries wrote there."""
    replace_file(directory / CARD, text.encode())


# Where a model comes from


@dataclass(frozen=True)
class Licence:
    """A model's licence, as the front matter of its card states it."""

    values: Mapping[str, Any]
    """`license`, and `license_name` and `license_link` where they are given; {} where the licence isn't known."""
    reason: str
    """Where it is stated, or why it isn't known."""

    @property
    def sentence(self) -> str:
        """One sentence for a card."""
        if not self.values:
            return f"The licence of the base model is unknown: {self.reason}. Look it up before you publish this model."
        name = self.values.get("license_name") or self.values["license"]
        link = self.values.get("license_link")
        return f"The base model's licence is {public_text(str(name))}{f' ({link})' if link else ''}, by {self.reason}."


def root_of(source: str) -> str:
    """Return the model under an adapter, or under adapters on each other; of any other model its own place."""
    seen: set[str] = set()
    while source not in seen and Path(source).expanduser().is_dir() and is_adapter(str(Path(source).expanduser())):
        seen.add(source)
        try:
            source = adapter_base(str(Path(source).expanduser()))
        except ModelError:
            break
    return source


def shown_name(source: str) -> str:
    """Return a model's name as others may read it: a hub name, or the last part of a path, with the run's of `RUN/model`."""
    path = Path(source).expanduser()
    if not path.exists():
        return cell(source)
    name = path.resolve().name if path.name in ("", ".", "..") else path.name
    return cell(f"{path.resolve().parent.name}/{name}" if name == "model" else name)


def hub_name(source: str) -> str | None:
    """Return the name on the hub that a model or its card states; None for one that only this machine has.

    Of a local directory with a card of ours that is what its own model was made from: the nearest ancestor on the hub.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return source if is_hub_name(source) else None
    text = _card_text(source)
    if text is None or MARK not in text:
        return None
    named = front_matter(text).get("base_model")
    named = named[0] if isinstance(named, list) and len(named) == 1 else named
    return named if isinstance(named, str) and is_hub_name(named) else None


def licence_of(source: str) -> Licence:
    """Return a model's licence by its card, which is looked for in its directory, or in the hub's local cache."""
    root = root_of(source)
    what = f"`{shown_name(root)}`"
    text = _card_text(root)
    if text is None:
        return Licence({}, f"{what} has no card on this machine")
    keys = ("license", "license_name", "license_link")
    values = {key: value for key, value in front_matter(text).items() if key in keys and value}
    if not values.get("license"):
        return Licence({}, f"the card of {what} states none")
    return Licence(values, f"the card of {what}")


def _card_text(source: str) -> str | None:
    path = Path(source).expanduser()
    if path.is_dir():
        card = path / CARD
    elif not path.exists() and is_hub_name(source):
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, CARD)
        card = Path(cached) if isinstance(cached, str) else path
    else:
        return None
    return card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None


# What is in a model's directory


def head_in(directory: Path) -> str | None:
    """Return the head beside a model's weights, by its name; None for a language model."""
    return next((head for head in HEADS if (directory / f"{head}.json").is_file()), None)


def library_values(directory: Path) -> dict[str, Any]:
    """Return the metadata on the kind of model in a directory: `library_name` and `pipeline_tag`."""
    if (head := head_in(directory)) is not None:
        return {"library_name": "rlhf_core", "pipeline_tag": _MODELS[head][1]}
    return {
        "library_name": "peft" if is_adapter(str(directory)) else "transformers",
        "pipeline_tag": "text-generation",
    }


def loading_lines(directory: Path) -> list[str]:
    """Return the section of a card that shows how the model in a directory is loaded."""
    if (head := head_in(directory)) is not None:
        name = _MODELS[head][0]
        code = [f"from rlhf_core import {name}", "", f'model = {name}.from_pretrained("{HERE}")']
        note = "The weights beside the head are a plain Hugging Face model; the head is what `rlhf_core` adds."
    elif is_adapter(str(directory)):
        code = [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            "",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{HERE}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")',
        ]
        base = _named_base(directory)
        note = f"An adapter: the model that it changes, `{shown_name(base)}`, is loaded with it."
        if hub_name(base) != base:
            note += f' That is a local name; elsewhere use `PeftModel.from_pretrained(base_model, "{HERE}")`.'
    else:
        code = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{HERE}", dtype="auto")',
            f'tokenizer = AutoTokenizer.from_pretrained("{HERE}")',
        ]
        note = f"Or talk with it: `rlhf chat {HERE}`."
    return ["## Load it", "", "```python", *code, "```", "", note]


def with_loading(text: str, directory: Path) -> str:
    """Return a card of ours with the section on loading that fits a directory; one that has no such section is left as it is."""
    section = "\n".join(loading_lines(directory)) + "\n\n"
    return _LOADING.sub(lambda _: section, text, count=1)


def _named_base(adapter: Path) -> str:
    """Return the base that an adapter's configuration names, as it stands there."""
    try:
        named = json.loads((adapter / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        named = None
    return str(named or "its base")
