"""What a run says at its end, as lines."""

from __future__ import annotations

from rlhf_core.contracts.result import TrainResult
from rlhf_core.training.metric_text import evaluation_table


def summary_lines(result: TrainResult) -> list[str]:
    """Return how a run ended, in a few lines.

    The last evaluation isn't among them, which was shown when it was made; that of an earlier step is, where its model is the
    run's.
    """
    lines = []
    if result.stopped_early:
        lines.append(f"stopped early: {result.stopped_because}")
    steps = f"{result.step} step{'s' * (result.step != 1)}"
    lines.append(f"{result.status}: {steps}, {result.tokens:,} tokens, {result.seconds:.1f} s")
    earlier = result.model_step not in (None, result.step)
    if earlier and result.eval_metrics:
        lines += evaluation_table(result.eval_metrics, result.model_step or 0).splitlines()
    if result.best_value is not None:
        lines.append(f"best: `{result.best_metric}` {result.best_value:.6g} at step {result.best_step}")
    if result.model_dir is not None:
        lines.append(f"model: {result.model_dir}{f' (of step {result.model_step}, the best)' if earlier else ''}")
    if result.output is not None:
        lines.append(f"run: {result.output}")
    if result.pushed is not None:
        lines.append(f"pushed: {result.pushed}")
    return lines
