"""A shorter start and end for commands that need torch, whose import makes half a million objects."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without looking for garbage, of which imports make none; nor is it looked for when the process ends.

    Measured on two cores: importing torch 0.80 s instead of 0.95, ending the process 0.13 s instead of 0.52.
    """
    atexit.register(gc.freeze)  # what is frozen isn't gone through by the interpreter's last collection
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
