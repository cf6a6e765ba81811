"""The sections of a report as one HTML page that needs nothing else: no network, no fonts, no other files."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from rlhf_core.evaluation.report.blocks import Section
from rlhf_core.infra.version import __version__

_FILES = Path(__file__).parent / "page"


def html_page(title: str, sections: Sequence[Section]) -> str:
    """Return the page. All texts are escaped; a policy in its head forbids any request, and any script but the page's own.

    Args:
        title: of the page, as text.
        sections: in their order; those at the top are listed at its beginning.
    """
    style, script = ((_FILES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _template().render(
        title=title,
        sections=sections,
        style=style,
        script=script,
        script_hash=f"sha256-{digest}",
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=__version__,
    )


@cache
def _template() -> Template:
    environment = Environment(loader=FileSystemLoader(_FILES), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template("page.html.j2")
