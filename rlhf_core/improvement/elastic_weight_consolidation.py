"""Elastic weight consolidation for users: the Fisher information of an earlier task, and what a run needs to hold on to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_core.config.fisher_options import FisherConfig
from rlhf_core.config.training import DEFAULT_MAX_LENGTH
from rlhf_core.data.collate import collate
from rlhf_core.data.record_datasets import SFTDataset
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.seeds import random_generator
from rlhf_core.models.diagonal_fisher import (
    DiagonalFisher,
    diagonal_fisher,
    elastic_penalty,
    named_weights,
    refuse_filled,
)
from rlhf_core.models.policy_model import PolicyModel


@dataclass(frozen=True)
class ElasticWeightConsolidation:
    """What an earlier task needs of a policy's weights (Kirkpatrick et al. 2017, arXiv 1612.00796), in a directory.

        ewc = ElasticWeightConsolidation.estimate("models/sums", "sums.jsonl", "fisher/sums")
        DPOTrainer(DPOConfig(ewc=ewc.options(weight=100.0)), model="models/sums", data="pairs.jsonl").train()

    Any method's run then adds λ/2 Σ F (θ - θ*)² to its loss.
    """

    path: Path
    information: DiagonalFisher

    @classmethod
    def estimate(
        cls, model: PolicyModel | str | Path, rows: Any, output: str | Path, **options: Any
    ) -> ElasticWeightConsolidation:
        """Compute the diagonal Fisher information of a policy on rows of the earlier task, and write it to a directory.

        Args:
            model: the policy that the earlier task trained: a model, or a path, from which an adapter is folded in.
            rows: rows of the record type `sft` of that task, as a trainer takes them.
            output: a new directory.
            options: those of `FisherConfig`: `labels`, `samples`, `limit`, `seed`, `max_length`, `dataset`.

        Raises:
            ConfigError: an option is wrong, or the output holds something already.
            DataError: rows can't be read.
            ModelError, NumbersError: as `diagonal_fisher`.
        """
        config, path = (
            FisherConfig.parse(options, place="ElasticWeightConsolidation.estimate"),
            Path(output).expanduser(),
        )
        refuse_filled(path)
        policy = model if isinstance(model, PolicyModel) else _loaded(model)
        length = config.max_length or min(policy.max_positions or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
        data = SFTDataset(rows, policy.tokenizer, max_length=length, options=config.dataset)
        order = random_generator(config.seed).permutation(len(data)).tolist()[: config.limit]
        information = diagonal_fisher(
            policy,
            (collate([data[number]]) for number in order),
            labels=config.labels,
            samples=config.samples,
            seed=config.seed,
        )
        return cls(information.save(path), information)

    @classmethod
    def load(cls, path: str | Path) -> ElasticWeightConsolidation:
        """Return what `estimate` wrote.

        Raises:
            ConfigError: the directory has no Fisher information.
            ModelError: a file is damaged.
        """
        return cls(Path(path).expanduser(), DiagonalFisher.load(path))

    def options(self, weight: float) -> dict[str, Any]:
        """Return the option group `ewc` of a trainer's configuration, with λ = `weight`."""
        return {"fisher": [str(self.path)], "weight": weight}

    @torch.no_grad()
    def penalty(self, policy: PolicyModel) -> float:
        """Return ½ Σ F (θ - θ*)² of a policy: how far it is from the earlier task, by what that task needs.

        Raises:
            ConfigError: the policy has another architecture.
            ModelError: it has an adapter.
        """
        weights, known = named_weights(policy), self.information
        shapes = {name: weight.shape for name, weight in weights.items()}
        if shapes != {name: values.shape for name, values in known.fisher.items()}:
            raise ConfigError(
                "the Fisher information is that of another model", place=str(self.path), got=policy.source
            )
        parts = (
            elastic_penalty(weight.detach().to("cpu", torch.float32), known.fisher[name], known.weights[name])
            for name, weight in weights.items()
        )
        return float(torch.stack([part.double() for part in parts]).sum())


def _loaded(source: str | Path) -> PolicyModel:
    return PolicyModel.from_pretrained(source, adapter="fold", device=DeviceManager().device)
