"""A run's sampler that drafts by itself does so unless `generation` names a draft."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_core.config.online import SamplerConfig, SamplingConfig
from rlhf_core.registry import load, lookup
from rlhf_core.training.run_samplers import ChosenSampler, SamplerKey


@pytest.mark.parametrize("key", ["rollout_sampler", "eval_sampler"])
@pytest.mark.parametrize(("draft", "used"), [(None, "model"), ("suffix", "suffix")])
def test_the_own_default_of_a_sampler_holds_without_a_draft(key: SamplerKey, draft: Any, used: str) -> None:
    plugin = lookup("speculative", "sampler")
    chosen = ChosenSampler(key, plugin, load(plugin), SamplerConfig(name="speculative"), "config")
    sampling = SamplingConfig(draft=draft, temperature=0.5)
    options: Any = chosen.options(sampling)
    assert (options.draft, options.temperature) == (used, 0.5)
    assert set(chosen.roles(sampling)) == ({"policy", "draft_model"} if used == "model" else {"policy"})
