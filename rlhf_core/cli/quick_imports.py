"""Make the start and end of commands faster that import torch, whose import creates half a million objects."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Switch the garbage collector off during imports, and exempt the objects that exist afterwards from later collections.

    Measured on two cores: importing torch takes 0.80 s instead of 0.95, and ending the process, which collects garbage once
    more, 0.13 s instead of 0.52.
    """
    if "torch" in sys.modules or not gc.isenabled():  # part of another program, whose objects must stay collectable
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def no_bars_in_logs() -> None:
    """Keep libraries from drawing progress bars where stderr is no terminal; called before any of them is imported."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
