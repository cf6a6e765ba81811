"""Describe what a run runs on: package versions, torch's build, threads, machine, and the git state of the current directory."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from typing import Any

import torch

_PACKAGES = (
    "rlhf-core",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "numpy",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that a run's numbers depend on, by name."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_environment() -> dict[str, Any]:
    """Return versions, torch's build, threads, machine and git state as JSON values, for a run's record."""
    build = torch.__config__.show()
    return {
        "versions": versions(),
        "torch_build": {
            "sha256": hashlib.sha256(build.encode()).hexdigest(),
            "debug": torch.version.debug,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "git": torch.version.git_version,
        },
        "threads": {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()},
        "machine": {"system": platform.system(), "release": platform.release(), "processor": platform.machine()},
        "executable": sys.executable,
        "git": git_state(),
    }


def git_state() -> dict[str, Any] | None:
    """Return `commit` and `changed` (uncommitted changes; None: unknown) of the current directory's git repository, or None."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    """Return the output of a git command in the current directory; None where it fails."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
