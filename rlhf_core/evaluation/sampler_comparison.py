"""Several samplers on the same prompts: how often each is right, and how many tokens its models were run on for that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.data.prompt_rows import PromptRow, read_prompts
from rlhf_core.evaluation.image_files import check_image
from rlhf_core.generation.kept_backend import forget_kept
from rlhf_core.generation.sampled_rows import sample_rows, samples_of_row
from rlhf_core.generation.sampler_models import policies_of
from rlhf_core.generation.watching import counting_forwarded
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.files import storage_errors
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.infra.statistics import standard_error
from rlhf_core.rewards import Rewards, open_rewards


@dataclass(frozen=True)
class SamplerScore:
    """What a comparison found for one sampler. Axis: P, the prompts."""

    name: str
    by_prompt: Sequence[float]
    """(P,) mean over the repeats of what the check gave to the first completion."""
    tokens_per_prompt: float
    """Tokens that models were run on, for one prompt on average: by engines, and by rewards where the sampler counts them."""
    forwarded: Mapping[str, int]
    """Role → tokens in all, as the sampler counted them."""
    seconds: float
    difference: tuple[float, float | None] | None = None
    """How much more accurate it is than the first sampler, and the standard error of that, by prompt; None for the first."""

    @property
    def accuracy(self) -> float:
        return fmean(self.by_prompt)

    @property
    def error(self) -> float | None:
        """Standard error of `accuracy` over prompts; None for a single one."""
        return standard_error(self.by_prompt)

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        found = {"sampler": self.name, "prompts": len(self.by_prompt), "accuracy": self.accuracy, "error": self.error}
        spent = {"tokens_per_prompt": self.tokens_per_prompt, "forwarded": dict(self.forwarded)}
        more, error = self.difference or (None, None)
        return found | spent | {"difference": more, "difference_error": error, "seconds": round(self.seconds, 3)}


def compare_samplers(
    samplers: Mapping[str, Sampler],
    prompts: Any,
    *,
    check: Any = "numeric_answer",
    repeats: int = 1,
    seed: int = 0,
    together: int = 64,
    found: Callable[[SamplerScore], None] | None = None,
    answered: Callable[[int, int], None] | None = None,
) -> list[SamplerScore]:
    """Answer the same prompts with each sampler, and check the first completion of each answer.

    Each sampler begins with no prompt kept from an earlier one, so that the tokens of all are counted alike.

    Args:
        samplers: name → sampler; the others are compared with the first.
        prompts: as `read_prompts` takes them; their columns, such as `answer`, reach the check.
        check: any reward: its mean is reported as the accuracy, so it should give 1 for right and 0 for wrong.
        repeats: how often each prompt is answered, with other seeds; prompts, not answers, are the unit of standard errors.
        together: prompts that a sampler gets at once, which may share a budget.
        found: called with each sampler's result as soon as it is there.
        answered: called after each answer, with how many there are by now of samplers × prompts × repeats, and the number of
            tokens of the last one.

    Raises:
        ConfigError: no samplers, no prompts, or fewer than one repeat.
        DataError, PluginError: a prompt can't be answered, or a completion can't be checked.
    """
    rows = prompts if _are_rows(prompts) else list(read_prompts(prompts))
    for name, count in (
        ("samplers", len(samplers)),
        ("prompts", len(rows)),
        ("repeats", repeats),
        ("together", together),
    ):
        if count < 1:
            raise ConfigError("must be at least 1", place=f"compare_samplers({name}=…)", got=str(count))
    rewards = check if isinstance(check, Rewards) else open_rewards(check, place="check")
    comparison = _Comparison(rows, rewards, repeats, seed, together, answered)
    results: list[SamplerScore] = []
    for name, sampler in samplers.items():
        one = comparison.measure(name, sampler, results[0] if results else None)
        results.append(one)
        if found is not None:
            found(one)
    return results


def _are_rows(prompts: Any) -> bool:
    return isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(one, PromptRow) for one in prompts)


@dataclass
class _Comparison:
    """What the samplers of a comparison have in common."""

    rows: Sequence[PromptRow]
    check: Rewards
    repeats: int
    seed: int
    together: int
    answered: Callable[[int, int], None] | None
    done: int = 0
    """Answers so far, of all samplers."""

    def measure(self, name: str, sampler: Sampler, first: SamplerScore | None) -> SamplerScore:
        """Answer all prompts with one sampler, `repeats` times, and return what was found, compared with the first sampler."""
        for model in policies_of(sampler).values():
            forget_kept(model)
        before, counted, seconds = dict(sampler.forwarded), 0, 0.0

        def count(tokens: int) -> None:
            nonlocal counted
            counted += tokens

        scores: list[list[float]] = []
        for repeat in range(self.repeats):
            began = time.monotonic()
            with counting_forwarded(count):
                answers = self._answers(sampler, repeat)
            seconds += time.monotonic() - began
            scores.append(_checked(self.check, self.rows, answers))
        by_prompt = [fmean(each) for each in zip(*scores, strict=True)]
        forwarded = {role: tokens - before.get(role, 0) for role, tokens in sampler.forwarded.items()}
        # Engines report all tokens of policies; those of a reward's model are known where the sampler counts them.
        kinds = sampler.roles_for(sampler.config)
        counted += sum(tokens for role, tokens in forwarded.items() if kinds.get(role) == "reward")
        difference = None
        if first is not None:
            more = [own - other for own, other in zip(by_prompt, first.by_prompt, strict=True)]
            difference = (fmean(more), standard_error(more))
        tokens_per_prompt = counted / (len(self.rows) * self.repeats)
        return SamplerScore(name, by_prompt, tokens_per_prompt, forwarded, seconds, difference)

    def _answers(self, sampler: Sampler, repeat: int) -> list[Completion]:
        """Return a sampler's first completion for each prompt."""
        seed = self.seed if repeat == 0 else stream_seed(self.seed, "comparison", repeat)
        answers = []
        for _, (answer, *_others) in sample_rows(sampler, self.rows, n=1, seed=seed, together=self.together):
            answers.append(answer)
            self.done += 1
            if self.answered is not None:
                self.answered(self.done, len(answer.ids))
        return answers


def _checked(check: Rewards, rows: Sequence[PromptRow], answers: Sequence[Completion]) -> list[float]:
    """Return what the check gives to one completion per row."""
    pairs = enumerate(zip(rows, answers, strict=True))
    samples = [sample for number, (row, one) in pairs for sample in samples_of_row(row, [one], number)]
    scores: list[float] = check.score(samples, [row.place for row in rows]).total.tolist()
    return scores


def plot_comparison(results: Sequence[SamplerScore], path: Path) -> None:
    """Draw accuracy against tokens forwarded per prompt, with standard errors, as an image file; its ending says which kind.

    Samplers of the same name up to the first blank, such as one with several budgets, are joined by a line.

    Raises:
        ConfigError: matplotlib isn't installed, or draws no files of that kind.
        StorageError: the file can't be written.
    """
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for method in dict.fromkeys(_method(one) for one in results):
        own = sorted((one for one in results if _method(one) == method), key=lambda one: one.tokens_per_prompt)
        at = [one.tokens_per_prompt for one in own]
        errors = [one.error or 0.0 for one in own]
        axes.errorbar(at, [one.accuracy for one in own], yerr=errors, marker="o", capsize=3, label=method)
        for one in own:
            label = one.name if len(one.name) <= 40 else one.name[:39] + "…"
            place = (one.tokens_per_prompt, one.accuracy)
            axes.annotate(label, place, xytext=(5, 5), textcoords="offset points", fontsize="x-small")
    if all(one.tokens_per_prompt > 0 for one in results):
        axes.set_xscale("log")
    axes.set_xlabel("tokens forwarded per prompt")
    axes.set_ylabel("accuracy (± standard error)")
    axes.legend()
    with storage_errors(path):
        figure.savefig(path, dpi=150)


def check_plot(path: Path) -> None:
    """Raise `ConfigError` where an image can't be drawn there, before anything is computed for it."""
    check_image(path, "--plot")
    if not path.absolute().parent.is_dir():
        raise ConfigError("the directory of the image doesn't exist", place="--plot", got=str(path), fix="make it")


def _method(one: SamplerScore) -> str:
    return one.name.partition(" ")[0]
