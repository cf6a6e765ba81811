"""A hook of mkdocs: files of the repository that pages link to, such as `../rlhf_core/cli/train.py`, become part of the site.

In a checkout these links lead to the files themselves. The site has only what stands in docs/, so each linked file is added to it
as text. A link to a file that isn't there is left as it is, and fails the strict build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(?:#[^)\s]*)?\)")
"""A link out of docs/, from a page that stands directly in it."""


def on_files(files: Any, config: Any) -> Any:
    """Add every file that a page links to, as `source/PATH.txt`: browsers show text and download other types."""
    from mkdocs.structure.files import File

    pages = [file.content_string for file in files.documentation_pages()]
    for path in sorted({found for page in pages for found in OUTSIDE.findall(page) if (ROOT / found).is_file()}):
        files.append(File.generated(config, f"source/{path}.txt", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point a page's links out of docs/ to the files that were added."""
    return OUTSIDE.sub(lambda link: f"](source/{link[1]}.txt)" if (ROOT / link[1]).is_file() else link[0], markdown)
