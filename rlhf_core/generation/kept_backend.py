"""What a policy keeps between engines: prompts that were read are found again by the next engine made for it.

Engines are made and left all the time: for a call of `PolicyModel.generate`, for each batch of a sampler, for each question to a
judge. One that has the default options takes over the backend that the last one left, with its prompts. It belongs to one engine
at a time, so that two threads, or two streams that are still open, never share a cache.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from rlhf_core.generation.memory import MOST_ROWS
from rlhf_core.generation.native_backend import NativeBackend

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel

_left: weakref.WeakKeyDictionary[PolicyModel, NativeBackend] = weakref.WeakKeyDictionary()
"""Policy → the backend that an engine left. Backends refer to their policies weakly, else no policy would ever be freed."""


def take_backend(owner: object, policy: PolicyModel) -> NativeBackend:
    """Return the backend that an earlier engine left for the policy, else a new one.

    Args:
        owner: has it alone until nothing refers to the owner any more; then the next one may take it. It must keep the policy
            alive.
    """
    backend = _left.pop(policy, None)
    if backend is None:
        itself: Any = weakref.proxy(policy)
        backend = NativeBackend(itself, memory=None, most_rows=MOST_ROWS)
    weakref.finalize(owner, _leave, weakref.ref(policy), backend).atexit = False
    return backend


def _leave(policy_ref: weakref.ref[PolicyModel], backend: NativeBackend) -> None:
    policy = policy_ref()
    if policy is not None:
        backend.rest()
        _left[policy] = backend


def forget_kept(policy: PolicyModel) -> None:
    """Drop what the last engine of a policy left, so that the next one reads every prompt itself."""
    _left.pop(policy, None)
