"""The layout explains itself: a name means one thing, plugins stand where third parties stand, and words are the glossary's."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sysconfig
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for folder in ("rlhf_core", "plugins/rlhf_plugins")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if "templates" not in path.parts and path.stem not in ("__init__", "__main__")
]
SAME_IDEA = {
    "job.py",
    "merge.py",
    "weight_diff.py",
    "reward_model.py",
    "process_reward.py",
    "value_model.py",
    "context_compressor.py",
    "generate.py",
}
"""What a command asks for, and what the command does with it; a trainer, the model it makes, and that model's reward; plain
generation as a policy's method and as a sampler."""


def test_a_file_name_means_one_thing() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in SOURCES:
        places[path.name].append(str(path.relative_to(ROOT)))
    assert {name: of for name, of in places.items() if len(of) > 1 and name not in SAME_IDEA} == {}


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: of for name, of in places.items() if len(of) > 1} == {}


def long_functions(source: str) -> list[tuple[str, int, int]]:
    """Return the functions that are too long: name, lines in all, lines of code behind the signature and the docstring.

    A function has at most 60 lines. Where documented arguments alone make it longer, its code has at most 20.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            end = node.end_lineno or node.lineno
            lines, code = end - node.lineno + 1, end - body[0].lineno + 1 if body else 0
            if lines > 60 and code > 20:
                found.append((node.name, lines, code))
    return found


def test_functions_are_short() -> None:
    found = {str(path.relative_to(ROOT)): long_functions(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: functions for path, functions in found.items() if functions} == {}


def test_long_functions_are_found_by_their_code() -> None:
    docstring = '    """Return.\n' + "    word\n" * 60 + '    """\n'
    short, long = "    pass\n" * 20, "    pass\n" * 21
    assert long_functions("def documented():\n" + docstring + short) == []
    assert long_functions("def documented():\n" + docstring + long) == [("documented", 84, 21)]
    assert long_functions("class One:\n    async def plain(self):\n" + "        pass\n" * 60) == [("plain", 61, 60)]
    assert long_functions("def plain():\n" + "    pass\n" * 59) == []


def avoided() -> list[str]:
    """Return the words that the glossary's last column says the project doesn't use."""
    rows = re.findall(r"^\|.*\|([^|]*)\|$", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [
        word.strip() for row in rows for word in row.split(",") if word.strip(" -") and word.strip() != "instead of"
    ]


def test_words_are_the_glossarys() -> None:
    words = avoided()
    assert len(words) > 8
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
    pages = [ROOT / "README.md", *(page for page in (ROOT / "docs").glob("*.md") if page.stem != "glossary")]
    found = []
    for path in [*SOURCES, *pages, *(ROOT / "examples").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for match in pattern.finditer(text):
            found.append(f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match.group()}")
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("imported", ["rlhf_core.infra.files", "rlhf_core.models", "rlhf_core"])
def test_a_plugin_that_imports_more_than_a_third_party_may_fails_lint(tmp_path: Path, imported: str) -> None:
    lint = Path(sysconfig.get_path("scripts")) / "lint-imports"
    if not lint.exists():
        pytest.skip("import-linter isn't installed")
    for folder in ("rlhf_core", "plugins/rlhf_plugins"):
        shutil.copytree(ROOT / folder, tmp_path / Path(folder).name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [str(lint), "--no-cache"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}
    clean = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert clean.returncode == 0, clean.stdout
    planted = tmp_path / "rlhf_plugins/trainers/sft.py"
    planted.write_text(planted.read_text(encoding="utf-8") + f"\nimport {imported}\n", encoding="utf-8")
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 1
    assert f"rlhf_plugins.trainers.sft -> {imported}" in found.stdout
