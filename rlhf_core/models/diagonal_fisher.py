"""The diagonal Fisher information of a policy's weights: how much each weight matters for what the policy says on some rows.

Axes: S response positions in the loss of one row, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError, NumbersError
from rlhf_core.infra.files import read_json, replace_json, sha256_of, storage_errors
from rlhf_core.infra.safetensors_file import read_tensors, write_tensors
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.policy_model import PolicyModel

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the files of a `DiagonalFisher`."""
MANIFEST, FISHER, WEIGHTS = "fisher.json", "fisher.safetensors", "weights.safetensors"

Labels = Literal["sampled", "data"]
"""Where the tokens come from whose log-probabilities are differentiated."""


@dataclass(frozen=True)
class DiagonalFisher:
    """The diagonal Fisher information of a model's weights, with the weights at which it was computed."""

    fisher: Mapping[str, Tensor]
    """Weight's name in the transformers model → F_i, float32 on the CPU: mean over rows of a squared derivative, nats²."""
    weights: Mapping[str, Tensor]
    """The same names → θ*, float32 on the CPU."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """How it was computed: `labels`, `rows`, `samples`, `tokens`, `seed`, `model`."""

    def save(self, directory: str | Path) -> Path:
        """Write `fisher.safetensors`, `weights.safetensors` and last `fisher.json`, which has their hashes; return the directory.

        Raises:
            ConfigError: the directory holds something already.
            StorageError: it can't be written.
        """
        path = Path(directory).expanduser()
        refuse_filled(path)
        tensors = {FISHER: self.fisher, WEIGHTS: self.weights}
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            hashes = {name: write_tensors(path / name, group).sha256 for name, group in tensors.items()}
        replace_json(path / MANIFEST, {"format": FORMAT, **self.about, "files": hashes})
        return path

    @classmethod
    def load(cls, directory: str | Path) -> DiagonalFisher:
        """Return what `save` wrote.

        Raises:
            ConfigError: the directory holds no such files.
            ModelError: a file is damaged.
        """
        path, about = Path(directory).expanduser(), read_manifest(directory)
        found = {}
        for name in (FISHER, WEIGHTS):
            try:
                if sha256_of(path / name).sha256 != about["files"].get(name):
                    raise ValueError("its contents don't have the SHA-256 that was written with them")
                found[name] = read_tensors(path / name)
            except (OSError, ValueError) as error:
                fix = "compute the Fisher information again"
                raise ModelError(f"a file is damaged: {error}", place=str(path / name), fix=fix) from None
        return cls(
            found[FISHER], found[WEIGHTS], {name: about[name] for name in about if name not in ("format", "files")}
        )


def refuse_filled(path: Path) -> None:
    """Raise ConfigError where a directory that is to be written holds something already."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError("the output holds something already", place=str(path), fix="name a new directory")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Return the description of a `DiagonalFisher` on disk; no tensor is read.

    Raises:
        ConfigError: there is none, or it is of another format.
    """
    path = Path(directory).expanduser() / MANIFEST
    try:
        about = read_json(path)
        known = about["format"] == FORMAT and isinstance(about["files"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ConfigError(
            "the directory has no Fisher information",
            place=str(directory),
            got=f"no valid {MANIFEST}",
            fix="compute it: `rlhf fisher MODEL --data ROWS --output DIRECTORY`",
        )
    return about


def named_weights(policy: PolicyModel) -> dict[str, nn.Parameter]:
    """Return the weights of a policy by their names in the transformers model; a tied one once.

    Raises:
        ModelError: the policy has an adapter, or a quantised weight.
    """
    if policy.has_adapter:
        raise ModelError(
            "the Fisher information of a model with an adapter isn't that of its weights",
            place=policy.source,
            fix="give its path, from which it is loaded with the adapter folded in",
        )
    weights = dict(policy.network.named_parameters())
    if odd := next((name for name, weight in weights.items() if not weight.is_floating_point()), None):
        raise ModelError("the Fisher information of a quantised weight isn't defined", place=policy.source, got=odd)
    return weights


def diagonal_fisher(
    policy: PolicyModel, rows: Iterable[Batch], *, labels: Labels = "sampled", samples: int = 1, seed: int = 0
) -> DiagonalFisher:
    """Return the diagonal Fisher information of a policy at its present weights.

    With p(· | x) the policy's distribution of the next token behind a context x, and the S contexts of a row's response tokens:

        F_i = E_row [ Σ_s E_{y ~ p(· | x_s)} (∂ log p(y | x_s) / ∂θ_i)² ]

    `sampled` draws y from the policy (the true Fisher information: Kunstner et al. 2019, arXiv 1905.12558; Martens 2020, arXiv
    1412.1193). As the derivatives of independent draws have mean 0, E (Σ_s g_s)² = Σ_s E g_s², so one backward pass per row gives
    an unbiased estimate. `data` takes the row's own tokens (the empirical Fisher information), which makes the square that of the
    whole response's derivative, (Σ_s ∂ log p(y_s | x_s) / ∂θ_i)²; it is no curvature where the policy doesn't fit the rows.

    Args:
        rows: batches of one response each.
        samples: draws per row, each with a pass of its own; more of them have less noise.
        seed: of the draws, which depend on it and on the row's position alone.

    Raises:
        ModelError: as `named_weights`.
        NumbersError: a derivative isn't finite, or all are 0.
    """
    weights = named_weights(policy)
    totals = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    trained = [weight.requires_grad for weight in weights.values()]
    count = tokens = 0
    try:
        for weight in weights.values():
            weight.requires_grad_()
        with evaluating(policy.network):
            for number, row in enumerate(rows):
                for sample in range(samples if labels == "sampled" else 1):
                    own = stream_seed(seed, "fisher", number, sample) if labels == "sampled" else None
                    _add_squares(totals, policy, weights, row.to(policy.device), own)
                count, tokens = count + 1, tokens + row.num_loss_tokens
    finally:
        for weight, was in zip(weights.values(), trained, strict=True):
            weight.requires_grad_(was)
    draws = count * (samples if labels == "sampled" else 1)
    fisher = {name: (total / max(1, draws)).cpu() for name, total in totals.items()}
    _refuse_useless(fisher, policy)
    anchors = {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in weights.items()}
    about = {"labels": labels, "rows": count, "samples": samples if labels == "sampled" else 1, "tokens": tokens}
    return DiagonalFisher(fisher, anchors, {**about, "seed": seed, "model": policy.source})


def _add_squares(
    totals: Mapping[str, Tensor], policy: PolicyModel, weights: Mapping[str, Tensor], row: Batch, seed: int | None
) -> None:
    """Add one row's squared derivatives: of its own tokens' log-probability, or with a seed of tokens drawn from the policy."""
    if row.num_responses != 1:
        raise ValueError(f"a row must have one response, got {row.num_responses}")
    if not row.num_loss_tokens:
        return
    with torch.enable_grad():
        if seed is None:
            logp = policy.response_logps(row).sum()
        else:
            hidden = policy.hidden_states(row, drop_last=True).predicting()  # (S, D)
            logp = policy.target_logps(hidden, _drawn(policy, hidden.detach(), seed)).sum()
    found = torch.autograd.grad(logp, list(weights.values()), allow_unused=True)
    for total, derivative in zip(totals.values(), found, strict=True):
        if derivative is not None:
            total.add_(derivative.float().square())


@torch.no_grad()
def _drawn(policy: PolicyModel, hidden: Tensor, seed: int) -> Tensor:
    """Return (S,) token ids, one drawn from the policy's distribution behind each hidden state (S, D)."""
    generator = torch.Generator().manual_seed(seed)
    # The inverse of the distribution function, at numbers drawn on the CPU, so that every device draws the same.
    cumulative = policy.logits(hidden).double().softmax(dim=-1).cumsum(dim=-1)  # (S, V)
    at = torch.rand(len(hidden), 1, generator=generator, dtype=torch.float64).to(hidden.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp(max=cumulative.shape[1] - 1)


def _refuse_useless(fisher: Mapping[str, Tensor], policy: PolicyModel) -> None:
    for name, values in fisher.items():
        if not bool(values.isfinite().all()):
            raise NumbersError("the Fisher information isn't finite", place=f"{policy.source}, weight `{name}`")
    if not any(bool(values.any()) for values in fisher.values()):
        raise NumbersError(
            "the Fisher information is 0 everywhere", place=policy.source, fix="give it rows with responses"
        )


def elastic_penalty(weights: Tensor, fisher: Tensor, anchor: Tensor) -> Tensor:
    """Return ½ Σ_i F_i (θ_i - θ*_i)², a scalar with gradient F_i (θ_i - θ*_i): Kirkpatrick et al. 2017, equation 3, for λ = 1.

    Args:
        weights, fisher, anchor: θ, F and θ*, of the same shape.
    """
    return 0.5 * (fisher * (weights - anchor).square()).sum()
