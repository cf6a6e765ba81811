"""The site: it builds strictly, so that no link or anchor leads nowhere, holds every page, and asks nothing of another host."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material")),
    reason="the extra `docs` isn't installed",
)


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=root,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages == {path.stem for path in site.glob("*.html")} - {"404"}
    menu = (site / "index.html").read_text(encoding="utf-8")
    assert {name for name in pages if f'href="{name}.html' not in menu} == set()
    assert (site / "source/plugins/rlhf_plugins/trainers/dpo.py.txt").read_text() == (
        ROOT / "plugins/rlhf_plugins/trainers/dpo.py"
    ).read_text()


def test_pages_load_nothing_from_another_host(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?(?:src|href)=[\"']?(https?:[^\"'> ]+)", text)
        assert loaded == [], path.name


def test_what_leads_nowhere_fails(tmp_path: Path) -> None:
    """Pages with a title alone, under the project's own settings: of nothing else is warned."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for page in (tmp_path / "docs").glob("*.md"):
        page.write_text(f"# {page.stem}\n", encoding="utf-8")
    links = "[an anchor](data.md#nowhere)\n[a file](../rlhf_core/nowhere.py)\n"
    (tmp_path / "docs/index.md").write_text(f"# Start\n\n{links}", encoding="utf-8")
    failed = build(tmp_path, tmp_path / "site")
    assert failed.returncode != 0
    warned = [line for line in failed.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warned) == 2, failed.stderr
    assert any("'../rlhf_core/nowhere.py'" in line for line in warned)
    assert any("anchor '#nowhere'" in line for line in warned)
