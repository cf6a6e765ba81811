"""The version of the package, and that of the contracts."""

__version__ = "0.1.0"

API = 1
"""The version of `rlhf_core.contracts`. A plugin states the one that it was written for as a literal: `api = 1`."""
