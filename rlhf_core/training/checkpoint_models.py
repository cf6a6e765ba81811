"""The model that a run exports, of any kind, as it was at a checkpoint: built by the run's own method."""

from __future__ import annotations

from torch import nn

from rlhf_core.data.text_options import save_text_options
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.seeds import seed_everything
from rlhf_core.models.sequence_model import SequenceModel
from rlhf_core.training.checkpoint import Checkpoint
from rlhf_core.training.checkpoint_policy import POLICY, checkpoint_policy, options_file, run_options
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.export import primary_role
from rlhf_core.training.job import load_job
from rlhf_core.training.loader import Loader
from rlhf_core.training.micro_batches import MicroBatches
from rlhf_core.training.setup import build_models

_AS_IT_IS = {"precision": "float32", "attention": "auto", "compile": False}
"""Options under which weights are only read, on any device."""


def checkpoint_model(checkpoint: Checkpoint) -> nn.Module:
    """Load what a run would export as `model/`, its policy or else the first model that it trains, as it was at a checkpoint.

    Raises:
        ConfigError: the options of the run aren't those of its method any more.
        ModelError: a model that the run started from can't be loaded, or the checkpoint doesn't fit it.
    """
    tensors = checkpoint.tensors("model")
    if any(name.startswith(POLICY) for name in tensors):
        return checkpoint_policy(checkpoint, "float32", DeviceManager("cpu"))
    run_options(checkpoint)  # says what is wrong with a record that no method can read
    trainer, devices = load_job(options_file(checkpoint), _AS_IT_IS).trainer(), DeviceManager("cpu")
    seed_everything(trainer.config.seed, "model")
    micro_batches = MicroBatches(trainer.config, divide=trainer.splits_groups)
    build_models(trainer, Loader(trainer, devices, micro_batches), devices)
    Distribution(devices.device).load_state(trainer.models, tensors, place=str(checkpoint.path))
    model = trainer.models[primary_role(trainer)]
    for module in model.modules():
        if isinstance(module, SequenceModel):
            save_text_options(module.tokenizer, trainer.config.dataset)
    return model.requires_grad_(False).eval()
