"""What the model said: completions of fixed and held-out prompts over the steps, and groups of rollouts, of one run or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, pvariance
from typing import Any

from rlhf_core.evaluation.report.blocks import Block, Completions, CompletionText, Paragraph, Token, figure
from rlhf_core.evaluation.report.run_files import RolloutFigures, RunHistory, is_number
from rlhf_core.evaluation.report.token_shades import Decode, find_decoder, tokens_of
from rlhf_core.training.row_log import last_message, length_and_end, prompt_text
from rlhf_core.training.sample_log import PromptSamples

MOST_PROMPTS, MOST_STEPS = 6, 3
"""Prompts that are shown of each kind, and steps of each prompt."""
MOST_GROUPS, MOST_COMPLETIONS = 2, 4
"""Groups that are shown of a rollout, and completions of each group."""
MOST_CHARACTERS = 2_000
"""Characters that are shown of a text."""
_NAMES = {"prompt": "Fixed prompt", "evaluation": "Held-out row {row}", "rollout": "Row {row}"}
Group = list[RolloutFigures]


def sample_blocks(runs: Sequence[RunHistory], kind: str) -> list[Block]:
    """Return the completions of a kind of prompts (`prompt`, `evaluation` or `rollout`) side by side over the steps.

    Of two runs the prompts are those of the first, with what the second says to the same ones behind.
    """
    first = [one for one in runs[0].prompts if one.kind == kind]
    chosen = first[:MOST_PROMPTS]
    others = [{_key(one): one for one in run.prompts if one.kind == kind} for run in runs[1:]]
    if not chosen and others:
        chosen = [*others[0].values()][:MOST_PROMPTS]
        runs, others, first = runs[1:], [], [*others[0].values()]
    decoders = [decoder_of(run) for run in runs]
    steps = MOST_STEPS if len(runs) == 1 else 2
    blocks: list[Block] = []
    for one in chosen:
        items = _over_steps(one, runs[0], decoders[0], steps, named=len(runs) > 1)
        for run, by_key, decode in zip(runs[1:], others, decoders[1:], strict=True):
            if (same := by_key.get(_key(one))) is not None:
                items += _over_steps(same, run, decode, steps, named=True)
        heading = _NAMES[kind].format(row=one.rows[0]["row"])
        blocks.append(Completions(heading, _clipped(prompt_text(one.rows[0]["prompt"])), items))
    if len(first) > len(chosen):
        blocks.append(Paragraph(f"{len(chosen)} of {len(first)} prompts are shown.", tone="muted"))
    return blocks


def rollout_blocks(runs: Sequence[RunHistory]) -> list[Block]:
    """Return some groups of the first, a middle and the last rollout: the most divided one, and that of the lowest reward.

    Of two runs the groups are those of the first, with the second's completions of the same row at the same step behind,
    where it kept them.
    """
    blocks: list[Block] = []
    having = [run for run in runs if run.rollouts]
    if not having:
        return []
    groups = [_groups(run) for run in having]
    decoders = [decoder_of(run) for run in having]
    steps = _spread(sorted({step for step, _ in groups[0]}), MOST_STEPS)
    for step in steps:
        of_step = [group for (at, _), group in groups[0].items() if at == step]
        for group in _telling(of_step):
            items = _completions(having[0], group, decoders[0], named=len(having) > 1)
            prompt = having[0].rollout_rows(group[:1])
            for run, by_place, decode in zip(having[1:], groups[1:], decoders[1:], strict=True):
                if (other := by_place.get((step, group[0].place))) is not None and other[0].row == group[0].row:
                    items += _completions(run, other, decode, named=True)
            if prompt:
                text = _clipped(last_message(prompt[0]["prompt"]))
                blocks.append(Completions(f"After step {step}, row {group[0].row}: {_summary(group)}", text, items))
    shown = (
        f"Rollouts after step {', '.join(map(str, steps))} are shown, of {len({step for step, _ in groups[0]})} kept."
    )
    return [*blocks, Paragraph(shown, tone="muted")] if blocks else []


def decoder_of(run: RunHistory) -> Decode | None:
    """Return the decoder of a run's tokenizer: of its exported model, or else of the model that it began with."""
    places = [run.path / "model"]
    for model in run.models.values():
        source = model.get("source") if isinstance(model, Mapping) else None
        if isinstance(source, str) and source:
            places.append(Path(source))
    return find_decoder(*places)


def completion_text(heading: str, row: Mapping[str, Any], decode: Decode | None) -> CompletionText:
    """Return a row's completion with its figures, its tokens shaded where the row keeps them, at most `MOST_CHARACTERS` long."""
    tokens = tokens_of(row, decode)
    shown: list[Token] = []
    room = MOST_CHARACTERS
    for token in tokens:
        if room <= 0:
            break
        shown.append(Token(token.text[:room], token.probability))
        room -= len(token.text)
    left_out = sum(len(token.text) for token in tokens) - sum(len(token.text) for token in shown)
    return CompletionText(heading, _figures(row), shown, left_out)


def _figures(row: Mapping[str, Any]) -> list[str]:
    """Return reward with its parts, advantage and gap, length and end, each as text."""
    found = []
    if is_number(row.get("reward")):
        found.append(f"reward {figure(row['reward'], 3)}")
        parts = row.get("rewards")
        if isinstance(parts, Mapping) and (len(parts) > 1 or any(value != row["reward"] for value in parts.values())):
            found += [f"{name} {figure(value, 3)}" for name, value in parts.items() if is_number(value)]
    if is_number(row.get("score")):
        found.append(f"score {figure(row['score'], 3)}")
    if is_number(row.get("advantage")):
        found.append(f"advantage {row['advantage']:+.3g}")
    if is_number(row.get("logprob_gap")):
        found.append(f"gap {row['logprob_gap']:.1e}")
    if ended := length_and_end(row):
        found.append(ended)
    return found


def _key(samples: PromptSamples) -> str:
    return repr(samples.rows[0]["prompt"])


def _clipped(text: str) -> str:
    return (
        text
        if len(text) <= MOST_CHARACTERS
        else f"{text[:MOST_CHARACTERS]} … [{len(text) - MOST_CHARACTERS:,} characters more]"
    )


def _over_steps(
    samples: PromptSamples, run: RunHistory, decode: Decode | None, most: int, *, named: bool
) -> list[CompletionText]:
    """Return a prompt's first completion at the first, the last and some steps between."""
    name = f"{run.name}, " if named else ""
    return [
        completion_text(f"{name}step {step:,}", samples.of(step)[0], decode) for step in _spread(samples.steps, most)
    ]


def _spread(values: Sequence[int], most: int) -> list[int]:
    """Return the first, the last, and evenly spaced values between them."""
    if len(values) <= most:
        return list(values)
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]


def _groups(run: RunHistory) -> dict[tuple[int, int], Group]:
    """Return the completions that a run kept by step and place."""
    groups: dict[tuple[int, int], Group] = {}
    for one in run.rollouts:
        groups.setdefault((one.step, one.place), []).append(one)
    return groups


def _rewards(group: Group) -> list[float]:
    return [one.reward for one in group if one.reward is not None]


def _telling(groups: Sequence[Group]) -> list[Group]:
    """Return the group whose rewards differ most, and that of the lowest mean reward."""
    scored = [group for group in groups if _rewards(group)] or list(groups)
    divided = max(scored, key=lambda group: pvariance(_rewards(group) or [0.0]))
    lowest = min(scored, key=lambda group: fmean(_rewards(group) or [0.0]))
    return [divided] if divided is lowest else [divided, lowest][:MOST_GROUPS]


def _summary(group: Group) -> str:
    rewards = _rewards(group)
    count = f"{len(group)} completion{'s' * (len(group) != 1)}"
    return f"{count}, mean reward {figure(fmean(rewards), 3)}" if rewards else count


def _completions(run: RunHistory, group: Group, decode: Decode | None, *, named: bool) -> list[CompletionText]:
    """Return the best and the worst completions of a group, the best first."""
    order = sorted(group, key=lambda one: -(one.reward if one.reward is not None else float("-inf")))
    if len(order) > MOST_COMPLETIONS:
        order = [*order[: MOST_COMPLETIONS // 2], *order[-(MOST_COMPLETIONS // 2) :]]
    name = f"{run.name}, " if named else ""
    return [completion_text(f"{name}no. {row['sample']}", row, decode) for row in run.rollout_rows(order)]
