"""Drafts without a model: what followed the same tokens before, in the text itself or in earlier completions of its prompt."""

from __future__ import annotations

from array import array
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from weakref import WeakValueDictionary

from rlhf_core.config.sampling_options import SamplingConfig
from rlhf_core.generation.drafting import NONE, Drafter, DraftRow, Guesses

LONGEST_MATCH = 12
"""Most tokens that are compared before a place."""
MOST_PLACES = 16
"""The latest so many places with the same last tokens are compared."""
LEAST_SHARE = 0.1
"""No guess is made that fewer of the places speak for: it would hardly ever be verified."""
MOST_COMPLETIONS = 64
"""The latest so many completions of a prompt are searched: those of a policy that has changed since say less."""
MOST_REMEMBERED = 2**22
"""Most tokens of earlier completions that are kept, 4 bytes each; those of prompts met longest ago go first."""


class TokenIndex:
    """Texts in which places are found by the tokens before them."""

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        self._texts: list[list[int]] = []
        self._places: defaultdict[int | tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        """A token, or two → where what followed them lies: text, place in it."""
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
            at = text, len(own)
            if own:
                self._places[own[-1]].append(at)
            if len(own) > 1:
                self._places[own[-2], own[-1]].append(at)
            own.append(token)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._texts)

    def find(self, ids: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
        """Return the places behind the longest match of the last tokens of `ids`, and how many tokens match.

        Places are found by the last two tokens before them; where none has both, by the last one.
        """
        places, longest = list[tuple[int, int]](), 0
        if not ids:
            return places, longest
        known, candidates = 2, self._places.get((ids[-2], ids[-1])) if len(ids) > 1 else None
        if candidates is None:
            known, candidates = 1, self._places.get(ids[-1], [])
        for text, at in reversed(candidates[-MOST_PLACES:]):
            own = self._texts[text]
            length = known
            while length < min(LONGEST_MATCH, at, len(ids)) and own[at - 1 - length] == ids[-1 - length]:
                length += 1
            if length > longest:
                places, longest = [], length
            if length == longest:
                places.append((text, at))
        return places, longest

    def behind(self, places: Iterable[tuple[int, int]], token: int) -> list[tuple[int, int]]:
        """Return the places behind a token, where it stands at the given ones and something follows it."""
        texts = self._texts
        return [(text, at + 1) for text, at in places if texts[text][at] == token and at + 1 < len(texts[text])]

    def guess(self, places: list[tuple[int, int]], matched: int, most: int) -> Guesses:
        """Return what followed at each place the most frequent token of all, while enough of the places speak for it.

        A guess's kind is how many tokens match before it, and how many places speak for it and against it, each up to a few.

        Args:
            matched: how many tokens match before the places.
        """
        guesses, share = Guesses([], []), 1.0
        while places and len(guesses.ids) < most:
            if len(places) == 1:
                text, at = places[0]
                ids = self._texts[text][at : at + most - len(guesses.ids)]
                first = matched + len(guesses.ids)
                guesses.ids.extend(ids)
                guesses.kinds.extend((min(first + depth, LONGEST_MATCH), 1, 0) for depth in range(len(ids)))
                break
            counts: dict[int, int] = {}
            for text, at in places:
                token = self._texts[text][at]
                counts[token] = counts.get(token, 0) + 1
            token, count = max(counts.items(), key=lambda one: one[1])
            share *= count / len(places)
            if share < LEAST_SHARE:
                break
            kind = min(matched + len(guesses.ids), LONGEST_MATCH), min(count, 4), min(len(places) - count, 4)
            guesses.ids.append(token)
            guesses.kinds.append(kind)
            places = self.behind(places, token)
        return guesses


class LookUp:
    """Looks a growing text up in an index; what it matched is followed from one look to the next, not searched again.

    Args:
        index: where it is looked up. Texts may be added to it.
    """

    def __init__(self, index: TokenIndex) -> None:
        self.index = index
        self._places: list[tuple[int, int]] = []
        self._matched = self._length = 0
        self._texts = 0
        """Texts of the index that were searched."""

    def guess(self, ids: Sequence[int], most: int) -> Guesses:
        """Return guesses for what follows `ids`, which continue those of the last call."""
        if self._texts != len(self.index) or not self._followed(ids):
            self._texts = len(self.index)
            self._places, self._matched = self.index.find(ids)
        self._length = len(ids)
        return self.index.guess(self._places, self._matched, most)

    def _followed(self, ids: Sequence[int]) -> bool:
        for at in range(self._length, len(ids)):
            self._places = self.index.behind(self._places, ids[at])
            self._matched += 1
            if not self._places:
                return False
        return bool(self._places)


class _OwnText:
    """A row's own text as an index.

    Args:
        earlier: earlier completions of its prompt.
    """

    def __init__(self, earlier: TokenIndex | None = None) -> None:
        self.index = TokenIndex()
        self.index.new_text()
        self.earlier = None if earlier is None else LookUp(earlier)
        self._own = LookUp(self.index)

    def guess(self, ids: Sequence[int], most: int) -> Guesses:
        """Take in the tokens that are new, and return guesses for what follows."""
        self.index.extend(0, ids[self.index.length(0) :])
        return self._own.guess(ids, most)


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
            index = self._indices[key] = TokenIndex(self._kept.get(key, [])[-MOST_COMPLETIONS:])
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
