"""Where a completion's text meets a stop string, looked for as its tokens are drawn.

A stop string may span several tokens, lie within one, or begin in the middle of one, and a token may hold a part of a character.
So what is searched is decoded text, but of the last few tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

MARGIN = 16
"""Tokens that are decoded in front of those that a stop string can span: for tokens without text."""
PARTIAL = "\ufffd"
"""What tokenizers decode bytes to that aren't whole characters."""


class StopStrings:
    """Tells whether the last token of a completion completed a stop string.

    A completion that is looked at after each of its tokens ends with the first one after which its text holds a stop string.
    The work per token doesn't grow with the completion: most tokens can't complete a stop string, which a look-up of the
    characters that they end in tells; after the others, as many tokens as a stop string may span are decoded.

    Args:
        stop: the stop strings, not empty.
        text_of: decodes a completion's ids.
    """

    def __init__(self, stop: Sequence[str], text_of: Callable[[Sequence[int]], str]) -> None:
        self.stop = tuple(stop)
        self._text_of = text_of
        self._last = {text[-1] for text in stop}
        self._longest = max((len(text.encode()) for text in stop), default=0)
        self._contents: dict[int, tuple[bool, bool]] = {}

    def text_before(self, ids: Sequence[int], *, least: int = 0) -> str | None:
        """Return a completion's text before the stop string that its last token completed; None where it completed none.

        Where the token completed several stop strings, the text ends before the one that begins first.

        Args:
            ids: the tokens of the completion so far.
            least: stop strings that the first so many tokens complete don't count.
        """
        if len(ids) <= least or not self._content(ids[-1])[0]:
            return None
        if not any(text in window for window in self._windows(ids) for text in self.stop):
            return None
        whole = self._text_of(ids)
        ignored = len(self._text_of(ids[:least]).rstrip(PARTIAL)) if least else 0
        found = [whole.find(text, max(0, ignored - len(text) + 1)) for text in self.stop]
        begin = min((place for place in found if place >= 0), default=None)
        return None if begin is None else whole[:begin]

    def _windows(self, ids: Sequence[int]) -> Iterator[str]:
        """Yield the text of the last tokens: from their first one, and from earlier ones where that begins within a character.

        A stop string of k bytes spans at most k tokens, those without text not counted.
        """
        first = max(0, len(ids) - self._longest - MARGIN)
        # Of a run of single bytes that begins within a character, some tokenizers decode none.
        for begin in range(first, max(-1, first - 4), -1):
            yield self._text_of(ids[begin:])
            if begin == 0 or not self._content(ids[begin])[1]:
                return

    def _content(self, token: int) -> tuple[bool, bool]:
        """Return whether a token may complete a stop string, and whether it holds a part of a character."""
        if token not in self._contents:
            # The second of the two shows what the token adds to a text, such as a blank that is dropped where a text begins.
            text = self._text_of([token, token])
            partial = PARTIAL in text
            self._contents[token] = partial or not text or not self._last.isdisjoint(text), partial
        return self._contents[token]


def settled_text(text: str, stop: Sequence[str]) -> str:
    """Return the beginning of an unfinished text that further tokens won't change."""
    text = text.rstrip(PARTIAL)
    begun = (len(text) - k for end in stop for k in range(1, len(end)) if text.endswith(end[:k]))
    return text[: min(begun, default=len(text))]
