"""`python -m rlhf_core.testing FOLDER`: write a tiny model and rows of the embedded arithmetic task, to try things on.

Writes `FOLDER/model`, a random Hugging Face model of a few megabytes, and `FOLDER/{train,test}/RECORD.jsonl` for each of the
five record types.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rlhf_core.infra.log import hide_library_bars
from rlhf_core.testing.arithmetic_task import ArithmeticTask, write_jsonl
from rlhf_core.testing.tiny import save_tiny


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rlhf_core.testing",
        description="Write a tiny model and rows of the embedded arithmetic task, to try things on.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--rows", type=int, default=256, help="training rows of each record type; a quarter as many test rows"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    hide_library_bars()
    save_tiny(options.folder / "model")
    write_jsonl(options.folder, ArithmeticTask(), train=options.rows, test=max(1, options.rows // 4), seed=options.seed)
    print(f"wrote {options.folder}/model and {options.folder}/{{train,test}}/*.jsonl")


if __name__ == "__main__":
    main()
