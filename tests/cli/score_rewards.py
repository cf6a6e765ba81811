"""Rewards for the tests of `rlhf score`, which names them."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor


def exact(completions: list[str], answer: list[str], bonus: float = 1.0) -> list[float]:
    return [bonus if text == right else 0.0 for text, right in zip(completions, answer, strict=True)]


async def brevity(completion: str) -> float:
    return -float(len(completion))


def interrupts(completion: str) -> float:
    if completion == "20":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    return 1.0


def continues(completion: str) -> float:
    return 2.0


def hangs(completion: str) -> float:
    pool = ThreadPoolExecutor(1)  # whose thread Python's exit would wait for
    return pool.submit(time.sleep, 1000).result() if completion == "bad" else 1.0
