"""How many parameters a run trains, counted on a model without weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_core.config.training import TrainerConfig
from rlhf_core.models.frozen_layers import freeze_networks
from rlhf_core.models.loading import ModelOutline
from rlhf_core.models.lora import apply_lora


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the model that is trained, a tied one once; a head that the method puts on it isn't among them."""

    trained: int
    all: int

    def __str__(self) -> str:
        share = 100 * self.trained / self.all if self.all else 0.0
        return f"{self.trained:,} of {self.all:,} are trained ({share:.3g} %)"


def count_parameters(outline: ModelOutline, options: TrainerConfig) -> ParameterCounts | None:
    """Return the counts of a causal language model under the options; None where transformers can't make one without weights.

    Raises:
        ConfigError: an option of `lora`, or `freeze`, names nothing in the model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(outline.config, trust_remote_code=options.trust_remote_code)
        model.tie_weights()
    except Exception:  # The model's own code raises errors of any kind; loading it says what is wrong.
        return None
    if options.lora is not None:
        with torch.device("meta"):
            model = apply_lora(model, options.lora)
    elif options.freeze:
        freeze_networks([model], options.freeze)
    every = {id(one): one for one in model.parameters()}.values()
    return ParameterCounts(sum(one.numel() for one in every if one.requires_grad), sum(one.numel() for one in every))
