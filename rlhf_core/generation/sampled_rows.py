"""Completions for many prompts, row by row, and the columns of the rows that are written.

A row's completions depend on its prompt, the seed, and how often the same prompt came before it: not on where a run was stopped,
nor on how many prompts the sampler got at once, unless these share a budget.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_core.config.sampling_run import SamplingRunConfig
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import Sample
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.data.prompt_rows import PromptRow
from rlhf_core.data.row_values import as_json
from rlhf_core.generation.encoded_prompts import CONTEXT
from rlhf_core.generation.engine import prompt_keys
from rlhf_core.generation.generate import encode_prompts
from rlhf_core.generation.sampler_models import policies_of
from rlhf_core.infra.errors import DataError, PluginError
from rlhf_core.infra.seeds import stream_seed

_ENCODED_TOGETHER = 512
"""Prompts that are encoded together to be checked."""
_PLURAL = {"completion": "completions", "stop_reason": "stop_reasons", "score": "scores"}
"""Names of columns with one value per completion, where they differ."""


def input_columns(row: PromptRow) -> dict[str, Any]:
    """Return the columns that a prompt's row had, as JSON values; of a prompt alone the column `prompt`."""
    return {str(name): as_json(value) for name, value in row.columns.items()} or {"prompt": as_json(row.prompt)}


def sampler_row(row: PromptRow) -> dict[str, Any]:
    """Return a prompt as a sampler takes it: with its tools, and with the other columns of its row, which reach the rewards."""
    asked: dict[str, Any] = {"prompt": row.prompt} | ({} if row.tools is None else {"tools": row.tools})
    # What has become part of the prompt must not be read again.
    return {name: value for name, value in input_columns(row).items() if name not in (*CONTEXT, "tools")} | asked


def occurrences(sampler: Sampler, rows: Sequence[PromptRow]) -> list[int]:
    """Return how often each row's prompt came before it, and check every prompt against the policies that will read it.

    Raises:
        DataError: a prompt leaves no room for a completion among a policy's positions; its row is named.
        ModelError: a tokenizer lacks what the prompts need, such as a chat template.
    """
    keys: list[Any] = [json.dumps([row.prompt, row.tools], sort_keys=True) for row in rows]
    for number, policy in enumerate(policies_of(sampler).values()):
        found: list[int] = []
        for start in range(0, len(rows), _ENCODED_TOGETHER):
            some = rows[start : start + _ENCODED_TOGETHER]
            asked = [row.as_row(start + i) for i, row in enumerate(some)]
            found += prompt_keys(encode_prompts(policy, asked, compressed=False))
        keys = found if number == 0 else keys
    met: Counter[Any] = Counter()
    earlier = []
    for key in keys:
        earlier.append(met[key])
        met[key] += 1
    return earlier


def sample_rows(
    sampler: Sampler, rows: Sequence[PromptRow], *, n: int, seed: int, together: int, start: int = 0
) -> Iterator[tuple[int, list[Completion]]]:
    """Yield (row number, its n completions) for each row from `start` on, in order.

    The sampler always gets the same rows together, those before `start` that share a call too, so that even the rounding of a
    row's logits is that of a run that never stopped.

    Args:
        together: rows that the sampler gets at once, apart from repeated prompts, which take further calls.

    Raises:
        DataError: as `occurrences`.
        PluginError: the sampler returns another number of completions than was asked for, or a score that isn't finite.
    """
    earlier = occurrences(sampler, rows)
    for first in range(start - start % together, len(rows), together):
        numbers = range(first, min(first + together, len(rows)))
        found: dict[int, list[Completion]] = {}
        for count in sorted({earlier[number] for number in numbers}):
            some = [number for number in numbers if earlier[number] == count]
            if all(number < start for number in some):
                continue
            own = seed if count == 0 else stream_seed(seed, "repeated prompt", count)
            drawn = sampler.sample([sampler_row(rows[number]) for number in some], n, seed=own)
            check_drawn(sampler, drawn, n, [rows[number].place for number in some])
            found |= dict(zip(some, drawn, strict=True))
        for number in numbers:
            if number >= start:
                yield number, found[number]


def samples_of_row(row: PromptRow, completions: Sequence[Completion], number: int) -> list[Sample]:
    """Return the samples that rewards score for a prompt's completions; `number` is their group."""
    return [
        Sample(
            prompt=row.prompt,
            completion=one.text,
            completion_ids=one.ids,
            columns=input_columns(row),
            group=number,
            stop_reason=one.stop_reason,
            mask=one.mask,
        )
        for one in completions
    ]


def check_drawn(sampler: Sampler, drawn: Sequence[Sequence[Completion]], n: int, places: Sequence[str]) -> None:
    """Raise `PluginError` unless a sampler returned n completions, with finite scores, for each of the prompts at `places`."""
    name = type(sampler).__name__
    if len(drawn) != len(places):
        raise PluginError(
            "the sampler returned another number of lists than there are prompts",
            place=f"{name}.sample",
            got=f"{len(drawn)} for {len(places)} prompts",
        )
    for place, completions in zip(places, drawn, strict=True):
        if len(completions) != n:
            raise PluginError(
                f"the sampler must return {n} completions per prompt",
                place=f"{name}.sample, {place}",
                got=f"{len(completions)}",
            )
        wrong = [one.score for one in completions if one.score is not None and not math.isfinite(one.score)]
        if wrong:
            raise PluginError("a score isn't finite", place=f"{name}.sample, {place}", got=wrong[0])


def output_row(row: PromptRow, completions: Sequence[Completion], run: SamplingRunConfig) -> dict[str, Any]:
    """Return a row of the output: the input's columns, then those of its completions, which `completion_columns` names.

    With n = 1 a column holds the value of the one completion, else a list with one value per completion.
    """
    columns: dict[str, list[Any]] = {
        "completion": [one.text for one in completions],
        "stop_reason": [one.stop_reason for one in completions],
        "tokens": [len(one.ids) for one in completions],
    }
    if all(one.score is not None for one in completions):
        columns["score"] = [one.score for one in completions]
    if any(one.details for one in completions):
        columns["details"] = [as_json(dict(one.details)) for one in completions]
    if run.ids:
        columns["completion_ids"] = [list(one.ids) for one in completions]
    if run.logprobs:
        columns["logprobs"] = [list(one.logprobs) for one in completions]
        columns["raw_logprobs"] = [list(one.raw_logprobs) for one in completions]
    several = {_PLURAL.get(name, name): values for name, values in columns.items()}
    added = several if run.n > 1 else {name: values[0] for name, values in columns.items()}
    refuse_taken(row, {*added})
    return {**input_columns(row), **added}


def completion_columns(run: SamplingRunConfig) -> list[str]:
    """Return the names of the columns that `output_row` adds to every row; a sampler may give `score` and `details`, too."""
    names = ["completion", "stop_reason", "tokens"]
    names += ["completion_ids"] * run.ids + ["logprobs", "raw_logprobs"] * run.logprobs
    return [_PLURAL.get(name, name) for name in names] if run.n > 1 else names


def check_columns(rows: Sequence[PromptRow], run: SamplingRunConfig) -> None:
    """Refuse rows that have a column of a completion already.

    Raises:
        DataError: names the row and its column.
    """
    for row in rows:
        refuse_taken(row, {*completion_columns(run)})


def refuse_taken(row: PromptRow, added: set[str]) -> None:
    """Raise `DataError` where a row has one of the columns that its completions add."""
    if taken := sorted(added & {*map(str, row.columns)}):
        raise DataError(
            f"the row has a column `{taken[0]}` already, which a completion would replace",
            place=row.place,
            fix="rename the column, or sample other rows",
        )
