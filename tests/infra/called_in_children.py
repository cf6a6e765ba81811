"""Functions that tests call in child processes."""

from __future__ import annotations

import ctypes
import os
import re
import time
from typing import Any


def double(value: Any) -> Any:
    return value * 2


def misbehave(how: str) -> Any:
    if how == "sleep":
        time.sleep(100)
    elif how == "loop":
        while True:
            pass
    elif how == "hold the interpreter's lock":
        return bool(re.fullmatch("(a+)+b", "a" * 60))
    elif how == "take all memory":
        return len(bytearray(1 << 40))
    elif how == "exit":
        os._exit(3)
    elif how == "crash":
        ctypes.string_at(0)
    elif how == "raise":
        raise KeyError("answer")
    elif how == "return no JSON":
        return {1}
    elif how == "print":
        print("{}\n" * 3)
    return how


_ready: list[bool] = []


def set_up() -> None:
    _ready.append(True)


def fail_to_set_up() -> None:
    raise ValueError("no library")


def was_set_up() -> bool:
    return bool(_ready)


def process_id() -> int:
    return os.getpid()
