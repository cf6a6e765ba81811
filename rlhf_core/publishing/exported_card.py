"""The card of an exported model: the one it had, with what the export changed."""

from __future__ import annotations

from pathlib import Path

from rlhf_core.infra.hub_upload import with_base
from rlhf_core.infra.model_card import (
    CARD,
    MARK,
    front_matter,
    hub_name,
    library_values,
    licence_of,
    loading_lines,
    render,
    root_of,
    shown_name,
    with_loading,
)
from rlhf_core.infra.model_files import is_adapter


def exported_card(source: Path, made: Path, *, notes: list[str], base: str | None = None) -> str:
    """Return the card of an exported model, from the one of ours that it had, else a new one.

    Args:
        source: the model's directory.
        made: where the export is.
        notes: sentences on what the export did.
        base: the base's name on the hub.
    """
    path = source / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    said = "Exported by rlhf_core" + (f": {'; '.join(notes)}." if notes else ", as it was saved.")
    if MARK not in text:
        text = _plain_card(source, made)
    header = front_matter(text) | library_values(made)
    header["tags"] = [tag for tag in header.get("tags") or [] if tag != "lora" or is_adapter(str(made))]
    if header.get("base_model"):
        header["base_model_relation"] = "adapter" if is_adapter(str(made)) else "finetune"
    body = text.partition("\n---\n")[2].replace(MARK, "").strip("\n")
    title, _, rest = with_loading(body, made).partition("\n")
    return with_base(render(header, [title, "", said, "", *rest.strip("\n").split("\n")]), base)


def _plain_card(source: Path, made: Path) -> str:
    """Return a short card for a model that had none."""
    root, licence = root_of(str(source)), licence_of(str(source))
    named = hub_name(root)
    header = {"base_model": named, **licence.values, **library_values(made), "tags": ["rlhf_core"]}
    lines = [f"# {shown_name(str(source))}", "", *loading_lines(made), "", "## Licence", "", licence.sentence]
    return render(header, lines)
