"""Quick imports: no collection meanwhile, all as before afterwards, and nothing of another program's kept."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from rlhf_core.cli.quick_imports import quick_imports

FRESH = """
import gc
from rlhf_core.cli.quick_imports import quick_imports
try:
    with quick_imports():
        import torch
        assert not gc.isenabled()
        raise KeyError
except KeyError:
    pass
assert gc.isenabled() and gc.get_freeze_count() > 100_000
class Late:
    def __init__(self): self.me = self
    def __del__(self): print("finalised")
late = Late()
del late
gc.collect()
"""


def test_imports_in_a_fresh_process_are_left_out_of_collections() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    assert done.stdout == "finalised\n"  # what comes later is collected as ever


def test_a_program_that_has_torch_is_left_alone() -> None:
    pytest.importorskip("torch")
    before = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == before
