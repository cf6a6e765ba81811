"""What each section of the report shows and how to read it, in a sentence or two under its title."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_core.evaluation.report.blocks import Block, Section

_SHADES = (
    "The darker a token's ground, the less likely it was where it was drawn; a pointer that rests on it shows its"
    " probability."
)
ABOUT = {
    "Evaluation": "Held-out rows. Of one run the rows are the same each time, so the difference of two values is more certain"
    " than their intervals suggest.",
    "Loss and reward": "What training minimises and what it is rewarded with, over the optimiser's steps.",
    "Reward against KL": "What reward was gained for which distance from the reference. A curve that moves right without rising"
    " pays distance for nothing.",
    "Stability": "Early signs of a run that gets out of hand: a growing gap between the engine that samples and the trainer that"
    " learns, a collapsing entropy, many clipped tokens, spikes of the gradient.",
    "Learning signal": "What the rollouts could teach: a group whose rewards are all equal teaches nothing, and so does a prompt"
    " that is always or never solved.",
    "Time": "Where the time of the steps went. Phases of one step don't overlap, so they add up.",
    "Samples": "The same prompts over the steps, drawn with the same random numbers, so texts differ as the weights do. "
    + _SHADES,
    "Held-out samples": "Completions of held-out rows with their rewards.",
    "Rollouts": "What the policy was trained on: the most divided group and that of the lowest reward, the best completions"
    " first. " + _SHADES,
    "Stages": "When each stage ran, how it ended, and the tokens that it was trained on.",
    "Evaluations": "What each stage that evaluates measured.",
    "Capability tests": "The suites before and after each stage. A significant drop beyond the threshold rolls the stage back. p"
    " is that of a drop: how likely so low a value would be had nothing changed. Of a suite that improved it is near 1.",
    "Samplers compared": "Accuracy against the tokens that models were run on.",
    "Search trees": "How the search went: which steps it tried, and the path that it chose.",
}
"""Title of a section → the text."""
UNCERTAINTY = "Throughout, ± is one standard error; brackets, and the bars of charts, are 95 % intervals."
"""Said once, in the first section of a page with measured values."""


def titled(title: str, blocks: Sequence[Block], *, folded: bool = False) -> Section:
    """Return a section with the text that belongs to its title."""
    return Section(title, blocks, ABOUT.get(title, ""), folded=folded)
