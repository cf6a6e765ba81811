"""What is asked of a decoding loop, and what it returns: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rlhf_core.config.online import SamplingConfig
    from rlhf_core.generation.drafting import DraftCounts
    from rlhf_core.generation.drawn_rows import DrawnCompletion
    from rlhf_core.generation.paged_cache import CachedSequence
    from rlhf_core.generation.stop_strings import StopStrings


UNFINISHED = "unfinished"
"""In place of a reason: more tokens will be drawn."""


@dataclass(frozen=True)
class Request:
    """One completion to be drawn."""

    number: int
    """Tells it from the other requests of the call."""
    ids: Sequence[int]
    """The prompt's token ids, at least one. Requests with the same prompt share what is computed for it."""
    seed: int
    """Its random numbers are a function of this and of a token's place among those drawn."""
    limit: int
    """Most new tokens."""
    ends: tuple[int, ...]
    """The ids that end it, which are its last token then."""
    stops: StopStrings | None = None
    """Looks for stop strings in its text."""
    rule: Callable[[Sequence[int]], bool] | None = None
    """Called with the ids drawn so far after each token; True ends the completion."""
    base: CachedSequence | None = None
    """Where the keys and values of the prompt, but for its last token, are kept already. It stays as it is."""
    skipped: int = 0
    """Random numbers of its seed before its first token's: so many tokens were drawn behind the same prompt before."""
    earlier_confidence: Sequence[float] = ()
    """The confidence of each of these tokens, where it is known."""
    min_confidence: float | None = None
    """In place of the sampling options' own, where they have one."""
    keep: bool = False
    """Whether `Finished.sequence` is wanted."""
    sampling: SamplingConfig | None = None
    """Whose temperature, top-k, top-p and min-p its tokens are drawn with, in place of the run's; all else is the run's."""
    top: int = 0
    """So many of the most likely tokens are wanted in the place of each token drawn."""
    partly: bool = False
    """Whether it is wanted after each of its tokens, too, with `UNFINISHED` as its reason."""


class Finished(NamedTuple):
    """One completion that has ended."""

    number: int
    drawn: DrawnCompletion
    reason: str
    """As `Completion.stop_reason`."""
    text: str | None
    """The completion's text before the stop string that ended it; None where none did."""
    sequence: CachedSequence | None
    """Keys and values of prompt and completion, but for the last token, where the request wanted them."""
    drafted: DraftCounts | None = None
    """What guesses did for it; None without a draft."""
