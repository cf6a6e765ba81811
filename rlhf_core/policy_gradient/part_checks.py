"""The check of what a part returns: its type, shape, dtype and device, and for parts of third parties that it is finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_core.infra.errors import PluginError, RLHFError, describe_error
from rlhf_core.infra.time_limit import where_raised

_MEND = "mend the part; `--debug` shows the whole traceback"


@dataclass(frozen=True)
class CheckedPart:
    """A part with its options set, whose result is checked at each call. It takes what the part takes, by position.

    Floats of another precision are converted to the precision of what the part was given.
    """

    function: Callable[..., Any]
    kind: str
    name: str
    own: bool
    """Whether it is one of the core's, whose numbers and exceptions are left as they are."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Return what the part returns.

        Raises:
            PluginError: it returned what such a part must not; or a third party's part raised, or returned what isn't finite for
                finite arguments. An `RLHFError` that it raises, and memory that ran out, stay what they are.
        """
        if self.own:
            found = self.function(*given, **named)
        else:
            try:
                found = self.function(*given, **named)
            except (RLHFError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                where = where_raised(error.__traceback__)
                got = describe_error(error, lines=2) + (f" at {where}" if where else "")
                raise PluginError("the part raised an error", place=self._place, got=got, fix=_MEND) from error
        if self.kind == "aggregation":
            return self._amounts(found, given[0])
        if self.kind == "shaping":
            return self._terms(found, given)
        if self.kind == "clip":
            terms = given[0]
            wanted = "must return one objective per token"
            return self._tensor(found, wanted, terms.mask, terms.logps.dtype, given, counted=terms.mask)
        wanted = "must return one number per " + ("completion" if self.kind == "advantage" else "token")
        return self._tensor(found, wanted, given[0], given[0].dtype, given)

    @property
    def _place(self) -> str:
        return f"{self.kind} `{self.name}`"

    def _amounts(self, found: Any, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return an aggregation's weights (R, T) and amounts (R,)."""
        if not isinstance(found, tuple | list) or len(found) != 2:
            problem = "must return two tensors, weights of tokens (R, T) and amounts of rows (R,)"
            raise PluginError(problem, place=self._place, got=_described(found), fix=_MEND)
        weights, amounts = found
        wanted = "must return as weights one number per token"
        weights = self._tensor(weights, wanted, mask, torch.float32, ())
        return weights, self._tensor(
            amounts, "must return as amounts one number per row", mask[:, 0], torch.float32, ()
        )

    def _terms(self, found: Any, given: tuple[Any, ...]) -> Any:
        """Return a shaping's terms: any number of rewards, for as many completions as it was given."""
        terms = given[0]
        if not isinstance(found, type(terms)):
            raise PluginError(
                f"must return `{type(terms).__name__}`", place=self._place, got=_described(found), fix=_MEND
            )
        count, scores = len(terms.groups), found.scores
        if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] != count:
            problem = f"must return `scores` with one row per reward and one column per completion, (K, {count})"
            raise PluginError(problem, place=self._place, got=_described(scores), fix=_MEND)
        self._tensor(scores, "must return `scores` (K, N)", scores, scores.dtype, given)
        self._tensor(
            found.weights, "must return one of `weights` per reward", scores[:, :0].sum(1), scores.dtype, given
        )
        for field in ("groups", "lengths"):
            entries = getattr(found, field)
            if not isinstance(entries, Tensor) or entries.shape != (count,):
                problem = f"must return `{field}` with one entry per completion, ({count},)"
                raise PluginError(problem, place=self._place, got=_described(entries), fix=_MEND)
        return found

    def _tensor(
        self,
        found: Any,
        wanted: str,
        like: Tensor,
        dtype: torch.dtype,
        given: tuple[Any, ...],
        *,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Return a tensor that a part returned, in a dtype.

        Args:
            wanted: what the part must return, for the message.
            like: has the shape and the device that it must have.
            given: the part's arguments, which are to blame where they aren't finite themselves.
            counted: bool, entries that must be finite; None is all.
        """
        right = isinstance(found, Tensor) and found.shape == like.shape and found.is_floating_point()
        if not right or found.device != like.device:
            shape = f"{wanted}, a tensor of floats {_shape(like)} on {like.device}"
            raise PluginError(shape, place=self._place, got=_described(found), fix=_MEND)
        if not self.own:
            finite = found.isfinite() if counted is None else found.isfinite() | ~counted
            if not bool(finite.all()) and all(bool(one.isfinite().all()) for one in _tensors(given)):
                count = int((~finite).sum())
                got = f"{found[~finite][0].item()} in {count} of {finite.numel()} entries"
                raise PluginError(f"{wanted}, each of them finite", place=self._place, got=got, fix=_MEND)
        return found if found.dtype == dtype else found.to(dtype)


def _tensors(given: tuple[Any, ...]) -> Iterator[Tensor]:
    """Yield the tensors among a part's arguments, and those in the fields of its terms."""
    for one in given:
        if isinstance(one, Tensor):
            yield one
        elif is_dataclass(one):
            yield from _tensors(tuple(getattr(one, field.name) for field in fields(one)))


def _described(found: Any) -> str:
    """Return what a part returned as a message names it: `a tensor of float32 (16, 1) on cpu`, `list of 16`."""
    if isinstance(found, Tensor):
        return f"a tensor of {str(found.dtype).removeprefix('torch.')} {_shape(found)} on {found.device}"
    return f"{type(found).__name__} of {len(found)}" if isinstance(found, list | tuple) else type(found).__name__


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
