"""What is wrong with a checkpoint that transformers can't load, or loads in part, in our words."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_core.infra.errors import ModelError, describe_error, first_line
from rlhf_core.infra.model_files import no_such_model

log = logging.getLogger(__name__)

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
"""The number of a layer in the name of its weight."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
"""Files of which every tokenizer has one."""


def load_error(source: str, error: Exception) -> ModelError:
    """Return the error of a model that transformers couldn't load, by the reason that its exception gives."""
    if "trust_remote_code" in str(error):
        return ModelError(
            "the model needs code that its repository ships",
            place=source,
            fix="set `trust_remote_code: true` where you trust that code",
        )
    if not Path(source).exists():
        return no_such_model(source, error)
    if "ignore_mismatched_sizes" in str(error):
        return _other_shapes(source, error)
    if unknown := re.match(r"Unrecognized configuration class <class '[\w.]*?(\w+)Config'>", str(error)):
        # Its text lists every class that there is.
        return ModelError(
            "the model is no causal language model, or none that transformers has",
            place=source,
            got=f"a model of the family {unknown[1]}",
            fix="name a decoder, such as Llama or Qwen; encoders and encoder-decoders aren't trained here",
        )
    return ModelError("the model can't be loaded", place=source, got=describe_error(error, lines=2))


def tokenizer_error(places: Sequence[str], error: Exception) -> ModelError | None:
    """Return the error of a model in a directory whose tokenizer is missing or broken; None where the fault is another.

    Args:
        places: directories and hub names in which it was looked for, the base's last.
        error: what transformers raised of the last one.
    """
    if not Path(places[-1]).is_dir():
        return None
    held = [place for place in places if any((Path(place) / name).is_file() for name in _TOKENIZERS)]
    if held and not isinstance(error, json.JSONDecodeError):
        return None
    return ModelError(
        "its tokenizer can't be read" if held else "has no tokenizer",
        place=(held or places)[-1],
        got=first_line(error) if held else f"none of {', '.join(_TOKENIZERS)}",
        fix="copy the tokenizer's files, tokenizer.json and tokenizer_config.json, from the model that it was made from",
    )


def _other_shapes(source: str, error: Exception) -> ModelError:
    """Return the error for weights of other shapes than the configuration describes, with the first of them."""
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    got: str | None = None
    with suppress(Exception), torch.device("meta"):  # what can't be compared isn't
        wanted = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).state_dict()
        for file in sorted(Path(source).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    shape = list(tensors.get_slice(name).get_shape())
                    if got is None and name in wanted and list(wanted[name].shape) != shape:
                        got = f"`{name}` is {shape}, and config.json makes it {list(wanted[name].shape)}"
    return ModelError(
        "the weights have other shapes than config.json describes",
        place=source,
        got=got or first_line(error),
        fix="restore config.json as it was saved with these weights",
    )


def warn_of_layers(base: str, config: Any, unexpected: Iterable[str]) -> None:
    """Warn of whole layers of a checkpoint that its configuration doesn't count, and that are left out.

    Args:
        base: the directory or hub name that was loaded.
        unexpected: names of the tensors that the model has no place for.
    """
    count = getattr(config, "num_hidden_layers", None)
    found = {int(layer[1]) for name in unexpected if (layer := _LAYER.search(name)) is not None}
    if isinstance(count, int) and (more := sorted(number for number in found if number >= count)):
        log.warning(
            "%s: the checkpoint's layers from number %d on (%d in all) are left out:"
            " `num_hidden_layers` in its config.json is %d",
            base, more[0], len(more), count,
        )  # fmt: skip


def other_architecture(model: nn.Module) -> str | None:
    """Return the class that a checkpoint names as its own where that has another output layer than a language model, or none."""
    names = getattr(getattr(model, "config", None), "architectures", None) or [""]
    other = names[0].endswith(("Model", "Classification", "ForQuestionAnswering")) and not names[0].endswith(
        "LMHeadModel"
    )
    return str(names[0]) if other else None
