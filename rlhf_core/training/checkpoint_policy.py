"""The policy of a run as it was at a checkpoint: the model that the run started from, with the checkpoint's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlhf_core.config.run_file import is_object
from rlhf_core.config.training import DatasetConfig, LoraConfig
from rlhf_core.config.yaml_file import load_yaml
from rlhf_core.data.text_options import save_text_options
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ModelError, RLHFError
from rlhf_core.models import PolicyModel
from rlhf_core.training.checkpoint import Checkpoint

POLICY = "policy."
"""What the names of the policy's tensors in a checkpoint begin with."""


def base_of(checkpoint: Checkpoint) -> str:
    """Return the model that the run of a checkpoint started from."""
    return str(run_options(checkpoint).get("model"))


def options_file(checkpoint: Checkpoint) -> Path:
    """Return the file with every option of a checkpoint's run."""
    return checkpoint.path.parent.parent / "config.yaml"


def run_options(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the options of a checkpoint's run.

    Raises:
        ModelError: its record of them is missing or damaged, or its model was an object in Python.
    """
    place = options_file(checkpoint)
    try:
        options = load_yaml(place)[0]
    except RLHFError as error:
        fix = "copy the whole run, with its config.yaml"
        raise ModelError(
            "the options of the checkpoint's run can't be read", place=str(place), got=error.problem, fix=fix
        ) from None
    if is_object(options.get("model")):
        raise ModelError(
            "the run was started in Python with its model as an object, and no file has the model that these weights belong to",
            place=str(checkpoint.path),
            got=options["model"],
            fix="name the run's `model/`, which is whole, or continue it in the program that made the object",
        )
    return options


def checkpoint_policy(
    checkpoint: Checkpoint, precision: str, device: DeviceManager, *, trust: bool = False
) -> PolicyModel:
    """Load the model that a run started from, with the weights that its policy had at a checkpoint.

    Args:
        checkpoint: the run's, verified.
        precision: of matrix products.
        device: where it is put.
        trust: run the code that comes with the model, as where the run itself did.

    Raises:
        ModelError: the model can't be loaded, the run trained no policy, or the checkpoint doesn't fit.
    """
    options, place = run_options(checkpoint), str(checkpoint.path)
    tensors = {
        name.removeprefix(POLICY): tensor
        for name, tensor in checkpoint.tensors("model").items()
        if name.startswith(POLICY)
    }
    if not tensors:
        raise ModelError(
            "the checkpoint holds no policy",
            place=place,
            fix="name the checkpoint of a run that trains a language model",
        )
    lora = options.get("lora")
    policy = PolicyModel.from_pretrained(
        str(options.get("model")),
        lora=LoraConfig.parse(lora, place=place) if isinstance(lora, dict) else None,
        adapter=options.get("adapter", "continue"),
        new_tokens=options.get("new_tokens") or [],
        save_precision=options.get("save_precision", "auto"),
        trust_remote_code=trust or bool(options.get("trust_remote_code")),
    )
    _copy(tensors, policy, place)
    dataset = options.get("dataset")
    if isinstance(dataset, dict):
        save_text_options(policy.tokenizer, DatasetConfig.parse(dataset, place=place))
    policy.is_as_loaded, policy.source = False, place
    policy.requires_grad_(False).eval()
    policy.to(device.device)
    return policy.set_options(precision=precision, save_precision=policy.save_precision, frozen_precision="auto")


@torch.no_grad()
def _copy(tensors: dict[str, torch.Tensor], policy: PolicyModel, place: str) -> None:
    """Copy a checkpoint's tensors into a policy. Raises ModelError where one doesn't fit."""
    own = {**dict(policy.named_parameters()), **dict(policy.named_buffers())}
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ModelError(
                f"tensor `{name}` of the checkpoint does not fit the model that the run started from",
                place=place,
                fix="restore that model as it was",
            )
        own[name].copy_(tensor)
