"""What the registry's tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def audited() -> Iterator[Callable[[str], list[tuple[Any, ...]]]]:
    """Return a function that returns a list to which each later audit event of a name adds its arguments.

    Python raises such events where it opens files or starts processes, so tests see what code does, not how.
    """
    lists: dict[str, list[tuple[Any, ...]]] = {}

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in lists:
            lists[event].append(arguments)

    sys.addaudithook(hook)  # which can't be removed, but notes nothing after the test
    yield lambda event: lists.setdefault(event, [])
    lists.clear()
