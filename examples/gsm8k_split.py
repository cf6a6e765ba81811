"""Split GSM8K rows into training and held-out files by question, and write their prompts as chat messages.

    python examples/gsm8k_split.py --source ../shared/data/gsm8k [--output data/gsm8k]

Reads `sft.jsonl` (prompt, response), `preferences.jsonl` (prompt, chosen, rejected) and, where they are there, `unpaired.jsonl`
(prompt, response, label) and `prompts.jsonl` (prompt, answer) from the source folder, and writes NAME.train.jsonl and
NAME.heldout.jsonl for each. A question decides alone on which side all of its rows are, however many it has, so no question
is on both sides. Before each question of `prompts` stand another and its solution, which show the form of an answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_core.cli import exit_code
from rlhf_core.infra.errors import ConfigError, DataError
from rlhf_core.infra.files import storage_errors

HELD_OUT = {"sft": 0.03, "preferences": 0.2, "unpaired": 0.2, "prompts": 0.01}
"""Share of the questions held out, by file: losses are averaged over many tokens, pairs are few, and prompts have to be answered
at each evaluation."""
OPTIONAL = ("unpaired", "prompts")
DEMONSTRATIONS = {
    "prompts": (
        ("user", "Tom has 3 boxes with 4 pens in each of them. He gives 5 pens away. How many pens are left?"),
        ("assistant", "Tom has 3 * 4 = 12 pens.\nAfter that he has 12 - 5 = 7 pens.\n#### 7"),
    )
}
"""Turns that stand before each question of a file."""
Row = dict[str, Any]


def held_out(question: str, share: float) -> bool:
    """Tell from the question alone whether it is held out."""
    digest = hashlib.sha256(question.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSONL file whose prompts are questions as text."""
    try:
        # Not `splitlines`: JSON may hold line separators of Unicode inside its strings.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise DataError("no such file", place=str(path), fix="pass the folder of the rows as --source") from None
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"not valid JSON: {error.msg}", place=f"{path}:{number}:{error.colno}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise DataError("expected an object whose `prompt` is text", place=f"{path}:{number}", got=line[:60])
        yield row


def split(source: Path, output: Path, name: str, share: float) -> dict[str, int]:
    """Write NAME.train.jsonl and NAME.heldout.jsonl; return how many rows and questions each side has."""
    if not 0 < share < 1:
        raise ConfigError("a share must be between 0 and 1", place=f"--{name}-share", got=share)
    sides: dict[str, list[Row]] = {"train": [], "heldout": []}
    for row in read(source / f"{name}.jsonl"):
        sides["heldout" if held_out(row["prompt"], share) else "train"].append(row)
    counts: dict[str, int] = {}
    for side, rows in sides.items():
        if not rows:
            raise DataError(
                f"no row fell on the side `{side}`", place=str(source / f"{name}.jsonl"), got=f"share {share}"
            )
        with (output / f"{name}.{side}.jsonl").open("w", encoding="utf-8") as file:
            for row in rows:
                turns = (*DEMONSTRATIONS.get(name, ()), ("user", row["prompt"]))
                chat = {**row, "prompt": [{"role": role, "content": text} for role, text in turns]}
                file.write(json.dumps(chat, ensure_ascii=False) + "\n")
        counts |= {f"{side} rows": len(rows), f"{side} questions": len({row["prompt"].strip() for row in rows})}
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        help="folder with sft.jsonl, preferences.jsonl, unpaired.jsonl, prompts.jsonl",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("data/gsm8k"), help="folder to write (default: %(default)s)"
    )
    for name, share in HELD_OUT.items():
        parser.add_argument(f"--{name}-share", type=float, default=share, help="share held out (default: %(default)s)")
    options = parser.parse_args()
    with storage_errors(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    for name in HELD_OUT:
        if name in OPTIONAL and not (options.source / f"{name}.jsonl").exists():
            continue
        counts = split(options.source, options.output, name, getattr(options, f"{name}_share"))
        print(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    sys.exit(exit_code(main))
