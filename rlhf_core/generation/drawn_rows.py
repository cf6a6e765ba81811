"""The rows of a decoding loop: what is drawn for each, with which random numbers, and what ends it, while rows join and leave.

Axes: R rows, in the order of the logits; C slots, one per row, kept while it is here; T tokens of a completion; S ids that the
repetition penalty is for; E ids that end some row; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_core.config.online import SamplingConfig
from rlhf_core.generation.sampling import (
    Barred,
    Drawn,
    draw_tokens,
    exact_dtype,
    token_confidence,
    top_tokens,
    workspace,
)
from rlhf_core.generation.stop_strings import StopStrings
from rlhf_core.models.soft_tokens import SOFT

BLOCK = 256
"""Random numbers that are made at once per row."""


class DrawnCompletion(NamedTuple):
    """The tokens drawn for one row, each with the values of `Drawn`."""

    ids: list[int]
    logprobs: list[float]
    raw_logprobs: list[float]
    kept_mass: list[float]
    stop_reason: str | None = None
    """`end`, `stop`, `confidence` or `length`; None while the row isn't ended."""
    text: str | None = None
    """The text before the stop string that ended the row; None where none did."""
    confidence: Sequence[float] = ()
    """See `Completion.confidence`."""
    top: Sequence[Sequence[tuple[int, float]]] = ()
    """For each token the most likely ones in its place under softmax(logits), most likely first, with their log-probabilities in
    nats; as many as `NewRow.top` asks for."""


@dataclass(frozen=True)
class NewRow:
    """A completion whose tokens are to be drawn."""

    seed: int
    """A token's random number is a function of the seed and of the token's position in the completion alone."""
    limit: int
    """Most tokens of the completion, at least 1 more than those of `before`."""
    ends: Sequence[int] = ()
    """Ids that end it with the reason `end`. The sampling options' stop ids end it too, with `stop`."""
    stops: StopStrings | None = None
    """What looks for stop strings in its text; None without stop strings."""
    prompt_ids: Sequence[int] = ()
    """For the repetition penalty, where there is one; then not empty."""
    before: DrawnCompletion | None = None
    """What was drawn for it before it left a loop unfinished; None for a new completion."""
    skipped: int = 0
    """Random numbers of its seed that are passed over: those of earlier tokens of a sequence that it continues."""
    earlier_confidence: Sequence[float] = ()
    """The confidence of earlier tokens of a sequence that it continues, in whose window its first tokens are."""
    min_confidence: float | None = None
    """In place of the sampling options' own, where they have one."""
    sampling: SamplingConfig | None = None
    """Whose temperature, top-k, top-p and min-p its tokens are drawn with; None takes those of the rows' common options."""
    top: int = 0
    """So many of the most likely tokens are kept in the place of each token."""


@dataclass
class _Row:
    """What the host knows of a row."""

    new: NewRow
    slot: int
    """Its line in the tables of tokens, random numbers and ids seen."""
    ends: tuple[int, ...]
    """Ids that end it, stop ids included."""
    generator: np.random.Generator
    position: int
    """Of the token that the next step draws; on a GPU the row may have ended before the host knows."""
    known: int
    """Tokens that the host has seen."""
    num_seen: int
    """Ids that the repetition penalty is for, when it joined."""
    ids: list[int]
    """The tokens that the host has seen, where there are stop strings."""
    fresh: list[int] = field(default_factory=list)
    """Those of the completion that it saw the last time."""
    blocks: int = 0
    """Blocks of random numbers that were made."""
    stop_reason: str | None = None
    text: str | None = None
    """See `DrawnCompletion`."""

    def next_block(self) -> np.ndarray:
        """Return (BLOCK,) the random numbers of the block that the position is in, float64."""
        while True:
            block = self.generator.random(BLOCK)
            self.blocks += 1
            if self.position < self.blocks * BLOCK:
                return block

    def see(self, tokens: Sequence[int], *, over: bool, unsure: bool, least: int) -> None:
        """Take note of the tokens drawn since the host last saw the row.

        Args:
            over: whether the last of them ended the row, by an id, the limit or its confidence.
            unsure: whether its confidence was too small there.
            least: stop strings don't count in the first so many tokens.
        """
        end = over and tokens[-1] in self.ends
        self.fresh = []
        for number, token in enumerate(tokens):
            self.known += 1
            self.fresh.append(token)
            if self.new.stops is None or (end and number == len(tokens) - 1):
                continue  # the text of an end token is no part of the completion's
            self.ids.append(token)
            self.text = self.new.stops.text_before(self.ids, least=least)
            if self.text is not None:
                self.stop_reason = "stop"
                return
        if over:
            self.stop_reason = "end" if tokens[-1] in self.new.ends else "stop"
            if not end:
                self.stop_reason = "confidence" if unsure else "length"


class _State(NamedTuple):
    """What the device knows of each row, in the order of the logits."""

    slots: Tensor
    """(R,) long: each row's line in the tables of tokens, random numbers and ids seen."""
    length: Tensor
    """(R,) long: tokens of the completion."""
    limit: Tensor
    """(R,) long: most tokens of it."""
    num_seen: Tensor
    """(R,) long: ids that the repetition penalty is for."""
    over: Tensor
    """(R,) bool: whether it has its last token."""
    unsure: Tensor
    """(R,) bool: whether it has it because of its confidence."""
    may_end: Tensor
    """(R, E) bool: whether each of the ids that end some row ends this one."""


class DrawnRows:
    """Draws the next token of each row of a decoding loop, keeps what was drawn, and tells which rows have ended.

    What a row draws is a function of its own logits and seed: not of the rows beside it, nor of when it joined.

    All that a step needs is on the device, and `draw` doesn't wait for it. `ended` does, as the host then sees the tokens: a
    loop may draw several times before it asks. What is drawn behind a row's last token in the meantime doesn't count.
    """

    def __init__(self, sampling: SamplingConfig, *, device: torch.device) -> None:
        self.sampling, self.device = sampling, device
        self._rows: list[_Row] = []
        self._free: list[int] = []
        self._tokens = self._zeros(0, 0, dtype=torch.long)  # (C, T)
        self._values = self._zeros(0, 0, 3)  # (C, T, 3): logprobs, raw logprobs, kept mass
        # (C, W - 1 + T): each token's confidence, behind those of the W - 1 tokens before the first, NaN where there are none
        self._confidence = self._zeros(0, 0)
        self._least = self._zeros(0, dtype=exact_dtype(device))  # (C,): below it a row ends
        self._uniform = self._zeros(0, BLOCK, dtype=exact_dtype(device))  # (C, BLOCK)
        self._seen = self._zeros(0, 0, dtype=torch.long)  # (C, S)
        # (C, T, K): the most likely tokens in each one's place, and their log-probabilities
        self._top_ids, self._top_logps = self._zeros(0, 0, 0, dtype=torch.long), self._zeros(0, 0, 0)
        self._vocabulary = 0
        self._groups: list[tuple[SamplingConfig, list[int]]] | None = None
        self._ends: list[int] = []
        self._end_ids = self._zeros(0, dtype=torch.long)  # (E,)
        numbers, flags = self._zeros(0, dtype=torch.long), self._zeros(0, dtype=torch.bool)
        self._state = _State(numbers, numbers, numbers, numbers, flags, flags, flags[:, None][:, :0])
        self._unpolled = 0
        self._work: Tensor | None = None
        self._most_rows = 0

    def __len__(self) -> int:
        return len(self._rows)

    # Rows join and leave

    def join(self, new: Sequence[NewRow]) -> None:
        """Add rows behind those that are here, in the order of the logits."""
        if not new:
            return
        rows = [self._admitted(row) for row in new]
        for token in (token for row in rows for token in row.ends):
            if token not in self._ends:
                self._ends.append(token)
        self._end_ids = torch.tensor(self._ends, dtype=torch.long, device=self.device)
        may_end = torch.tensor([[token in row.ends for token in self._ends] for row in rows], dtype=torch.bool)
        numbers = torch.tensor([[row.slot, row.known, row.new.limit, row.num_seen] for row in rows]).to(self.device)
        before = self._state
        earlier = torch.nn.functional.pad(before.may_end, (0, len(self._ends) - before.may_end.shape[1]))
        over = self._zeros(len(rows), dtype=torch.bool)
        added = (*numbers.unbind(dim=1), over, over, may_end.view(len(rows), -1).to(self.device))
        self._state = _State(*map(torch.cat, zip((*before[:-1], earlier), added, strict=True)))
        self._rows += rows
        self._groups = None

    def keep(self, indices: Sequence[int]) -> None:
        """Keep the rows of these indices, in this order; the others leave."""
        staying = [self._rows[index] for index in indices]
        slots = {row.slot for row in staying}
        self._free += [row.slot for row in self._rows if row.slot not in slots]
        self._rows, self._groups = staying, None
        chosen = torch.tensor(list(indices), dtype=torch.long, device=self.device)
        self._state = _State(*(values.index_select(0, chosen) for values in self._state))

    def _admitted(self, new: NewRow) -> _Row:
        """Return a row with a slot, in whose lines is what was drawn for it before."""
        before = new.before or DrawnCompletion([], [], [], [])
        count = len(before.ids)
        if not self._free:
            size = len(self._tokens)
            self._tokens = _reserved(self._tokens, size + 1)
            self._free = list(range(len(self._tokens) - 1, size - 1, -1))
        slot = self._free.pop()
        # One place more than the limit: for tokens behind a row's last one.
        slots = len(self._tokens)
        self._tokens = _reserved(self._tokens, slots, new.limit + 1)
        self._values = _reserved(self._values, slots, new.limit + 1)
        self._uniform = _reserved(self._uniform, slots)
        self._tokens[slot, :count] = torch.tensor(before.ids, dtype=torch.long)
        self._values[slot, :count] = torch.tensor(before[1:4], dtype=torch.float32).T
        least = self.sampling.min_confidence
        if least is not None:
            self._least = _reserved(self._least, slots)
            self._least[slot] = least if new.min_confidence is None else new.min_confidence
            known = [*[torch.nan] * self._lead, *new.earlier_confidence, *before.confidence]
            self._confidence = _reserved(self._confidence, slots, self._lead + new.limit + 1)
            self._confidence[slot, : self._lead + count] = torch.tensor(known[len(new.earlier_confidence) :])
        if new.top:
            for name in ("_top_ids", "_top_logps"):
                setattr(self, name, _reserved(getattr(self, name), slots, new.limit + 1, new.top))
            for place, top in enumerate(before.top):
                self._top_ids[slot, place, : len(top)] = torch.tensor([token for token, _ in top])
                self._top_logps[slot, place, : len(top)] = torch.tensor([logprob for _, logprob in top])
        seen: list[int] = []
        if self.sampling.repetition_penalty != 1:
            # A soft token is none of the vocabulary, so none that could be repeated.
            seen = [token for token in dict.fromkeys([*new.prompt_ids, *before.ids]) if token < SOFT]
            before_width = self._seen.shape[1]
            self._seen = _reserved(self._seen, slots, len(seen) + new.limit - count + 1)
            # The rest of a line repeats an id, which changes nothing.
            self._seen[:, before_width:] = self._seen[:, :1]
            self._seen[slot] = seen[0]
            self._seen[slot, : len(seen)] = torch.tensor(seen)
        ends = (*new.ends, *self.sampling.stop_ids)
        ids = list(before.ids) if new.stops is not None else []
        generator = np.random.Generator(np.random.Philox(key=new.seed).advance(new.skipped // 4))
        generator.random(new.skipped % 4)  # Philox makes four numbers at once
        return _Row(new, slot, ends, generator, count, count, len(seen), ids)

    # A step

    def draw(self, logits: Tensor) -> Tensor:
        """Draw one token per row from the logits (R, V) of any floating dtype; return them (R,), long."""
        sampling, state = self.sampling, self._state
        uniform = state.length  # not used at temperature 0
        if self._random:
            self._refill()
            uniform = self._uniform[state.slots, state.length % BLOCK]
        penalty = sampling.repetition_penalty != 1
        seen = self._seen.index_select(0, state.slots) if penalty else None
        drawn = self._drawn(logits, uniform, seen, self._barred())
        self._keep_top(logits, state.slots, state.length)
        self._tokens[state.slots, state.length] = drawn.tokens
        self._values[state.slots, state.length] = torch.stack(drawn[1:], dim=1)
        alive = ~state.over
        length, num_seen = state.length + alive, state.num_seen
        if penalty:
            self._seen[state.slots, num_seen] = drawn.tokens
            num_seen = num_seen + alive
        over, unsure = state.over | (length >= state.limit), state.unsure
        if sampling.min_confidence is not None:
            unsure = unsure | (alive & self._is_unsure(logits, state.slots, state.length))
            over = over | unsure
        if self._ends:
            over = over | ((drawn.tokens[:, None] == self._end_ids) & state.may_end).any(dim=1)
        self._state = state._replace(length=length, num_seen=num_seen, over=over, unsure=unsure)
        for row in self._rows:
            row.position += 1
        self._unpolled += 1
        return drawn.tokens

    def _drawn(
        self, logits: Tensor, uniform: Tensor, seen: Tensor | None, barred: Barred | None, row: Tensor | None = None
    ) -> Drawn:
        """Draw one token from each of the logits (N, V), with the options of its row.

        Args:
            row: (N,) long, whose logits each are; None where there is one line per row, in order.
        """
        groups, work = self._by_options(), self._workspace(logits)
        if len(groups) == 1:
            return draw_tokens(logits, uniform, groups[0][0], seen=seen, barred=barred, work=work)
        parts, places = [], []
        for sampling, rows in groups:
            own = torch.tensor(rows, device=self.device)
            where = own if row is None else torch.isin(row, own).nonzero()[:, 0]
            places.append(where)
            parts.append(
                draw_tokens(
                    logits[where],
                    uniform[where],
                    sampling,
                    seen=None if seen is None else seen[where],
                    barred=None if barred is None else Barred(barred.ids, barred.rows[where]),
                    work=work,
                )
            )
        order = torch.cat(places).argsort()
        return Drawn(*(torch.cat(values)[order] for values in zip(*parts, strict=True)))

    def _by_options(self) -> list[tuple[SamplingConfig, list[int]]]:
        """Return the options that rows are drawn with, and the indices of the rows of each; at least one entry."""
        if self._groups is None:
            found: dict[tuple[float, ...], tuple[SamplingConfig, list[int]]] = {}
            for index, row in enumerate(self._rows):
                own = row.new.sampling or self.sampling
                key = (own.temperature, own.top_k, own.top_p, own.min_p)
                if key not in found:
                    changes = {"temperature": key[0], "top_k": key[1], "top_p": key[2], "min_p": key[3]}
                    found[key] = (self.sampling.model_copy(update=changes), [])
                found[key][1].append(index)
            self._groups = list(found.values()) or [(self.sampling, [])]
        return self._groups

    @property
    def _random(self) -> bool:
        """Whether some row's tokens are drawn with random numbers."""
        return any(sampling.temperature > 0 for sampling, _ in self._by_options())

    def _keep_top(self, logits: Tensor, slots: Tensor, position: Tensor, row: Tensor | None = None) -> None:
        """Keep the most likely tokens of logits (N, V) for the rows that want them; N lines as in `_drawn`."""
        wanting = [index for index, each in enumerate(self._rows) if each.new.top]
        if not wanting:
            return
        own = torch.tensor(wanting, device=self.device)
        where = own if row is None else torch.isin(row, own).nonzero()[:, 0]
        most = max(self._rows[index].new.top for index in wanting)
        top = top_tokens(logits[where].float().log_softmax(dim=-1), most)
        self._vocabulary, size = logits.shape[1], top.ids.shape[1]
        self._top_ids[slots[where], position[where], :size] = top.ids
        self._top_logps[slots[where], position[where], :size] = top.logprobs

    @property
    def _lead(self) -> int:
        """Tokens before a completion's first one that are in the same window."""
        return self.sampling.confidence_window - 1

    def _is_unsure(self, logits: Tensor, slots: Tensor, position: Tensor) -> Tensor:
        """Keep the confidence of the tokens drawn from logits (N, V) for slots (N,) at positions (N,); tell which end their rows.

        They do where the mean over the window that ends with them is below the least. It is summed again for each token: rounding
        of a running sum would depend on tokens that have left the window.
        """
        window = self.sampling.confidence_window
        self._confidence[slots, position + self._lead] = token_confidence(logits, self.sampling.confidence_top)
        columns = position[:, None] + torch.arange(window, device=self.device)
        group = self._confidence[slots[:, None], columns].mean(dim=1, dtype=exact_dtype(self.device))
        return (group < self._least[slots]) & (position + 1 > self.sampling.min_new_tokens)  # NaN isn't below

    def draw_behind(self, logits: Tensor, guesses: Sequence[Sequence[int]]) -> None:
        """Draw one token per row, and a further one behind each guessed token as long as the token drawn is the one guessed.

        The tokens are those that as many calls of `draw` would draw. A guess is accepted with the probability that it has, and
        what is drawn instead follows the rest of the distribution: the acceptance rule of speculative sampling (Leviathan et al.
        2023, arXiv 2211.17192, algorithm 1) for a draft that is certain of its token, with the row's own random numbers.

        Args:
            logits: (N, V), for each row in order one behind its last token, and one behind each of its guesses.
            guesses: for each row the tokens that may follow, at most `room_for_guesses`.
        """
        sampling, state = self.sampling, self._state
        counts = [1 + len(ids) for ids in guesses]
        row = torch.arange(len(guesses), device=self.device).repeat_interleave(torch.tensor(counts, device=self.device))
        depth = torch.tensor([at for count in counts for at in range(count)], device=self.device)
        slots, position = state.slots[row], state.length[row] + depth
        uniform = position  # not used at temperature 0
        if self._random:
            self._refill()
            uniform = self._uniform[slots, position % BLOCK]
        may_end = state.may_end[row]
        barred = self._barred()
        if barred is not None:
            barred = Barred(self._end_ids, may_end & (position < sampling.min_new_tokens)[:, None])
        seen = self._seen_behind(row, guesses) if sampling.repetition_penalty != 1 else None
        drawn = self._drawn(logits, uniform, seen, barred, row)
        self._keep_top(logits, slots, position, row)
        ended = (drawn.tokens[:, None] == self._end_ids).logical_and(may_end).any(dim=1) | (
            position + 1 >= state.limit[row]
        )
        unsure = torch.zeros_like(ended)
        if sampling.min_confidence is not None:
            unsure = self._is_unsure(logits, slots, position)
            ended = ended | unsure
        wanted = torch.tensor([token for ids in guesses for token in (*ids, -1)], device=self.device)
        valid = _unbroken((drawn.tokens == wanted) & ~ended, depth)
        at, chosen = (slots[valid], position[valid]), valid.nonzero()[:, 0]
        self._tokens[at] = drawn.tokens[chosen]
        self._values[at] = torch.stack(drawn[1:], dim=1)[chosen]
        made = torch.zeros_like(state.length).index_add_(0, row, valid.long())
        over, doubtful = (
            torch.zeros_like(state.over).index_put_((row[valid],), flags[valid], accumulate=True)
            for flags in (ended, unsure)
        )
        num_seen = state.num_seen
        if sampling.repetition_penalty != 1:
            self._seen[slots[valid], (num_seen[row] + depth)[valid]] = drawn.tokens[chosen]
            num_seen = num_seen + made
        self._state = state._replace(
            length=state.length + made, num_seen=num_seen, over=state.over | over, unsure=state.unsure | doubtful
        )
        advanced = made.tolist()
        for one, count in zip(self._rows, advanced, strict=True):
            one.position += count
        self._unpolled += max(advanced)

    def room_for_guesses(self, index: int) -> int:
        """Return how many tokens may be guessed for a row: the random numbers of their places are made."""
        return BLOCK - 1 - self._rows[index].position % BLOCK

    def uniform_of(self, index: int, count: int) -> np.ndarray:
        """Return (count,) the random numbers of a row's next places, float64; count is at most `room_for_guesses`."""
        self._refill()
        row = self._rows[index]
        begin = row.position % BLOCK
        return self._uniform[row.slot, begin : begin + count].double().cpu().numpy()

    def _seen_behind(self, row: Tensor, guesses: Sequence[Sequence[int]]) -> Tensor:
        """Return (N, S) the ids that the repetition penalty is for behind each row's last token, and behind its guesses."""
        seen = self._seen.index_select(0, self._state.slots)
        most = max(map(len, guesses))
        table = torch.tensor([[*ids[:k], *[-1] * (most - k)] for ids in guesses for k in range(len(ids) + 1)])
        table = table.view(len(row), most).to(self.device)
        # What fills up a line repeats an id, which changes nothing.
        seen = seen[row]
        return torch.cat([seen, torch.where(table < 0, seen[:, :1], table)], dim=1)

    def _workspace(self, logits: Tensor) -> Tensor | None:
        """Return the memory in which the logits (R, V) of each step are worked on; None on a GPU, where it costs nothing."""
        if logits.device.type != "cpu":
            return None
        if self._work is None or len(logits) > self._most_rows:
            self._work, self._most_rows = workspace(logits), len(logits)
        return self._work

    def _refill(self) -> None:
        """Make the next block of random numbers for the rows that have none left."""
        rows = [row for row in self._rows if row.position >= row.blocks * BLOCK]
        if rows:
            blocks = np.stack([row.next_block() for row in rows])
            slots = torch.tensor([row.slot for row in rows], device=self.device)
            self._uniform[slots] = torch.from_numpy(blocks).to(self._uniform.dtype).to(self.device)

    def _barred(self) -> Barred | None:
        """Return the ids that may not be drawn while a row has fewer tokens than it must have; None where all have enough."""
        least = self.sampling.min_new_tokens
        if not self._ends or all(row.position >= least for row in self._rows):
            return None
        return Barred(self._end_ids, self._state.may_end & (self._state.length < least)[:, None])

    # What the host sees

    def ended(self) -> list[tuple[int, str]]:
        """Return the rows that have got their last token since the last call, by index, with the reason.

        It waits for the device once. Call it before an unfinished row is taken out, too: a stop string may have ended the row.
        """
        steps = self._unpolled
        if not self._rows or not steps:
            return []
        state, self._unpolled = self._state, 0
        columns = (state.length[:, None] - steps + torch.arange(steps, device=self.device)).clamp(min=0)
        window = self._tokens[state.slots[:, None], columns]
        facts = torch.stack([state.length, state.over, state.unsure], dim=1)
        on_host = torch.cat([facts, window], dim=1).tolist()
        found: list[tuple[int, str]] = []
        for index, (row, (length, over, unsure, *tokens)) in enumerate(zip(self._rows, on_host, strict=True)):
            if row.stop_reason is None:
                new = tokens[len(tokens) - (length - row.known) :]
                row.see(new, over=bool(over), unsure=bool(unsure), least=self.sampling.min_new_tokens)
                if row.stop_reason is not None:
                    found.append((index, row.stop_reason))
            else:
                row.fresh = []
        if any(self._rows[index].text is not None for index, _ in found):
            self._end([index for index, _ in found])
        return found

    def fresh(self, index: int) -> list[int]:
        """Return the tokens of a row that the last call of `ended` found to be new."""
        return self._rows[index].fresh

    def _end(self, indices: list[int]) -> None:
        """Let the device know the lengths of rows that have ended by what the host saw in their texts."""
        chosen = torch.tensor(indices, device=self.device)
        known = torch.tensor([self._rows[index].known for index in indices], device=self.device)
        length = self._state.length.index_copy(0, chosen, known)
        self._state = self._state._replace(length=length, over=self._state.over.index_fill(0, chosen, True))

    def completion(self, index: int) -> DrawnCompletion:
        """Return what was drawn for a row, up to its last token."""
        row = self._rows[index]
        length = row.known if row.stop_reason is not None else int(self._state.length[index])
        logprobs, raw_logprobs, kept_mass = self._values[row.slot, :length].T.tolist()
        ids = self._tokens[row.slot, :length].tolist()
        confidence: Sequence[float] = ()
        if self.sampling.min_confidence is not None:
            confidence = self._confidence[row.slot, self._lead : self._lead + length].tolist()
        top: Sequence[Sequence[tuple[int, float]]] = ()
        if row.new.top:
            size = min(row.new.top, self._vocabulary)
            likeliest, logps = (table[row.slot, :length, :size].tolist() for table in (self._top_ids, self._top_logps))
            top = [list(zip(*each, strict=True)) for each in zip(likeliest, logps, strict=True)]
        return DrawnCompletion(ids, logprobs, raw_logprobs, kept_mass, row.stop_reason, row.text, confidence, top)

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)


def _unbroken(goes_on: Tensor, depth: Tensor) -> Tensor:
    """Return (N,) bool: whether the row goes on (N,) at each place before, from the row's first one on.

    Args:
        depth: (N,) how many places of the row come before.
    """
    fails = F.pad((~goes_on).long().cumsum(0), (1, 0))
    first = torch.arange(len(depth), device=depth.device) - depth
    return fails[:-1] == fails[first]


def _reserved(table: Tensor, *sizes: int) -> Tensor:
    """Return the table itself, or a larger copy where one of its first dimensions is below its size: at least twice as large."""
    shape = list(table.shape)
    for dim, size in enumerate(sizes):
        if size > shape[dim]:
            shape[dim] = max(size, 2 * shape[dim])
    if shape == list(table.shape):
        return table
    larger = table.new_zeros(shape)
    larger[tuple(map(slice, table.shape))] = table
    return larger
