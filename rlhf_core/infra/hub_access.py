"""Asks the hub once for a model or rows before anything is fetched: without a network its library tries for half a minute.

Importing this imports no huggingface_hub.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from rlhf_core.infra.errors import first_line

SECONDS = 5.0
"""How long the hub may take to answer; HF_HUB_ETAG_TIMEOUT sets another limit."""
Kind = Literal["model", "dataset"]


class NotOnHub(Exception):
    """The hub has nothing of a name, gives no access to it, or can't be reached."""


class HubUnreachable(NotOnHub):
    """The hub can't be reached, so that nothing is known of a name."""


def ask_hub(name: str, kind: Kind = "model") -> str | None:
    """Ask the hub, by one request, whether it can deliver what is called `name`. One that can't be reached isn't asked again.

    Returns:
        Why it can't be reached, so that only its cache can help; else None.

    Raises:
        NotOnHub: it has no such repository, or gives no access to it.
    """
    problem, reached = _answer(name, kind)
    if problem is not None and reached:
        raise NotOnHub(problem)
    return problem


@contextmanager
def offline(wanted: bool = True) -> Iterator[None]:
    """Switch the hub's libraries to their offline mode, in which they take what is in their caches at once."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if wanted:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def stay_offline() -> None:
    """Take models from the cache for the rest of this process: each of a dozen files would be tried for half a minute."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


_unreachable: dict[str, str] = {}
"""Address of a hub → why it can't be reached."""


@functools.cache
def _answer(name: str, kind: Kind) -> tuple[str | None, bool]:
    """Return what is wrong with a name, None for nothing, and whether the hub was reached. Each name is asked for once."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    if constants.is_offline_mode():
        return "the hub isn't asked, for its offline mode is on (`HF_HUB_OFFLINE`)", False
    if (why := _unreachable.get(constants.ENDPOINT)) is not None:
        return why, False
    try:
        seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or SECONDS)
        huggingface_hub.HfApi().repo_info(name, repo_type=kind, timeout=seconds)
    except RepositoryNotFoundError:
        return f"the hub has no such {kind}, or it is private and no token of yours gives access to it", True
    except HFValidationError as error:
        return first_line(error), True
    except HfHubHTTPError as error:
        return f"the hub answers: {first_line(error)}", True
    except Exception as error:  # what a network can raise depends on the library that speaks to it
        why = _unreachable[constants.ENDPOINT] = f"the hub can't be reached: {first_line(error)}"
        return why, False
    return None, True
