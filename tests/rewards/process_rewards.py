"""Rewards for the tests of child processes, which import them by name."""

from __future__ import annotations

import ctypes
import os
import time

LEAKED: list[bytearray] = []


def brevity(completion: str) -> float:
    print("a reward may print")
    return -float(len(completion))


def pairs(completions: list[str], answer: list[str]) -> list[float]:
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def exits(completion: str) -> float:
    if completion == "bad":
        os._exit(0)
    return 1.0


def segfaults(completion: str) -> float:
    if completion == "bad":
        ctypes.string_at(0)
    return 1.0


def hangs(completion: str) -> float:
    if completion == "bad":
        import re

        re.match("(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock
    return 1.0


def raises(completion: str) -> float:
    if completion == "bad":
        raise ValueError("no good")
    return 1.0


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise KeyError("text")


def unreadable(completion: str) -> float:
    if completion == "bad":
        raise UnreadableError
    return 1.0


def strange(completion: str) -> object:
    return {"good": 1.0, "bad": 1j}[completion]


def leaks(completion: str) -> float:
    LEAKED.append(bytearray(os.urandom(1) * 2**22))
    return float(os.getpid())


def slow(completion: str) -> float:
    time.sleep(0.3)
    return float(os.getpid())
