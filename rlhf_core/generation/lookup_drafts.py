"""Drafts without a model: what followed the same tokens before, in the text itself or in earlier completions of its prompt."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from rlhf_core.config.sampling_options import SamplingConfig
from rlhf_core.generation.drafting import NONE, Drafter, DraftRow, Guesses

PAIR = 2
"""Places are found by the last two tokens before them; where none has both, by the last one."""
LONGEST_MATCH = 12
"""Most tokens that are compared before a place."""
MOST_PLACES = 16
"""The latest so many places with the same last tokens are compared."""
MOST_REMEMBERED = 2**22
"""Most tokens of earlier completions that are kept, 4 bytes each; those of prompts met longest ago go first."""


class TokenIndex:
    """Texts in which places are found by the tokens before them."""

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        self._texts: list[list[int]] = []
        self._places: defaultdict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)
        """One or two tokens → where what followed them lies: text, place in it."""
        for text in texts:
            self.extend(self.new_text(), text)

    def new_text(self) -> int:
        """Begin an empty text, and return its number."""
        self._texts.append([])
        return len(self._texts) - 1

    def length(self, text: int) -> int:
        """Return how many tokens a text has."""
        return len(self._texts[text])

    def extend(self, text: int, ids: Sequence[int]) -> None:
        """Add tokens to the end of a text."""
        own = self._texts[text]
        for token in ids:
            for known in range(1, min(PAIR, len(own)) + 1):
                self._places[tuple(own[-known:])].append((text, len(own)))
            own.append(token)

    def guess(self, ids: Sequence[int], most: int) -> Guesses:
        """Return what followed the longest match of the last tokens of `ids`: at each place the most frequent token of all.

        A guess's kind is how many tokens match before it, and how many places speak for it and against it, each up to a few.
        """
        if most < 1:
            return NONE
        known = next((k for k in range(min(PAIR, len(ids)), 0, -1) if tuple(ids[-k:]) in self._places), 0)
        if not known:
            return NONE
        places, longest = list[tuple[int, int]](), 0
        for text, at in reversed(self._places[tuple(ids[-known:])][-MOST_PLACES:]):
            own = self._texts[text]
            length = known
            while length < min(LONGEST_MATCH, at, len(ids)) and own[at - 1 - length] == ids[-1 - length]:
                length += 1
            if length > longest:
                places, longest = [], length
            if length == longest:
                places.append((text, at))
        guesses = Guesses([], [])
        while places and len(guesses.ids) < most:
            token, count = Counter(self._texts[text][at] for text, at in places).most_common(1)[0]
            kind = min(longest + len(guesses.ids), LONGEST_MATCH), min(count, 4), min(len(places) - count, 4)
            guesses.ids.append(token)
            guesses.kinds.append(kind)
            places = [
                (text, at + 1)
                for text, at in places
                if self._texts[text][at] == token and at + 1 < len(self._texts[text])
            ]
        return guesses


@dataclass
class _OwnText:
    """A row's own text as an index."""

    index: TokenIndex = field(default_factory=TokenIndex)
    earlier: TokenIndex | None = None
    """Earlier completions of its prompt."""

    def __post_init__(self) -> None:
        self.index.new_text()

    def guess(self, ids: Sequence[int], most: int) -> Guesses:
        """Take in the tokens that are new, and return guesses for what follows."""
        self.index.extend(0, ids[self.index.length(0) :])
        return self.index.guess(ids, most)


class NgramDrafter(Drafter):
    """Guesses that what followed the last tokens earlier in the prompt, or in the completion, follows again: prompt look-up."""

    costs_time = draws = False

    def begin(self, prompt: Sequence[int]) -> _OwnText:
        return _OwnText()

    def propose(self, rows: Sequence[DraftRow], most: int, sampling: SamplingConfig) -> list[Guesses]:
        return [row.state.guess(row.ids, min(most, row.room)) for row in rows]


class SuffixDrafter(Drafter):
    """Guesses what earlier completions of the same prompt went on with after the longest match of the last tokens.

    It remembers completions between calls, such as those of a training run's earlier epochs, and finds in them what a suffix tree
    would (Oliaro et al. 2024, arXiv 2411.04975). Where they hold no match, it looks in the text itself.

    Args:
        most_remembered: most tokens of completions that are kept.
    """

    costs_time = draws = False

    def __init__(self, *, most_remembered: int = MOST_REMEMBERED) -> None:
        self.most_remembered = most_remembered
        self._kept: OrderedDict[tuple[int, ...], list[array[int]]] = OrderedDict()
        """Prompt → its completions, each behind the prompt's last tokens; the prompt met longest ago comes first."""
        self._size = 0
        self._indices: WeakValueDictionary[tuple[int, ...], TokenIndex] = WeakValueDictionary()
        """Those of prompts that are being completed."""

    def begin(self, prompt: Sequence[int]) -> _OwnText:
        key = tuple(prompt)
        index = self._indices.get(key)
        if index is None:
            index = self._indices[key] = TokenIndex(self._kept.get(key, ()))
        if key in self._kept:
            self._kept.move_to_end(key)
        return _OwnText(earlier=index)

    def propose(self, rows: Sequence[DraftRow], most: int, sampling: SamplingConfig) -> list[Guesses]:
        found = []
        for row in rows:
            count = min(most, row.room)
            own: _OwnText = row.state
            earlier = own.earlier.guess(row.ids, count) if own.earlier is not None else NONE
            found.append(earlier if earlier.ids else own.guess(row.ids, count))
        return found

    def learn(self, prompt: Sequence[int], ids: Sequence[int]) -> None:
        key = tuple(prompt)
        text = array("i", (*prompt[-LONGEST_MATCH:], *ids))
        self._kept.setdefault(key, []).append(text)
        self._kept.move_to_end(key)
        self._size += len(text)
        while self._size > self.most_remembered:
            _, texts = self._kept.popitem(last=False)
            self._size -= sum(map(len, texts))
        if (index := self._indices.get(key)) is not None:
            index.extend(index.new_text(), text)
