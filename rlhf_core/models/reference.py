"""The reference: log-probabilities under the policy as it was passed in, for comparison while the policy is trained.

Three ways to keep it give the same numbers: a frozen copy (of a policy with an adapter, a copy of what is trained alone); the
base with the adapter off, where the adapter is fresh; or log-probabilities computed once before the first step, which need no
second model in memory, and are sums over responses at one temperature.

Axes: R responses, T response tokens.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from rlhf_core.config.training import ReferenceMode
from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.files import storage_errors, temporary_path
from rlhf_core.infra.safetensors_file import read_tensors, write_tensors
from rlhf_core.models.batch_values import batch_values
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.models.precision import narrowed_copy

log = logging.getLogger(__name__)


class Reference:
    """Log-probabilities under the policy as it was passed in. Create it before the first optimiser step, and before a resume."""

    mode: Literal["copy", "adapter_off", "precompute"]
    """How the policy is kept."""
    model: PolicyModel
    """The model that computes the log-probabilities: a frozen copy, or the policy itself, with its first parameters or without
    its adapter."""

    def __init__(
        self,
        policy: PolicyModel,
        mode: Literal["copy", "adapter_off", "precompute"],
        cut: Callable[[Batch], Sequence[Batch]] | None = None,
        *,
        frozen_dtype: torch.dtype = torch.float32,
        product_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.mode = mode
        self._cut = cut or (lambda batch: [batch])
        self.model = policy
        self._known: dict[bytes, float] | None = None
        self._temperature = 1.0
        self._first_values: list[tuple[nn.Parameter, Tensor]] = []
        """The policy's trained parameters with copies of their first values, where these are all that is copied."""
        if mode == "copy" and policy.has_adapter:
            # The base doesn't change: the trained parameters are enough, and replace those of the policy while it is read.
            self._first_values = [(p, p.detach().clone()) for p in policy.parameters() if p.requires_grad]
        elif mode == "copy":
            self.model = narrowed_copy(policy, frozen_dtype, product_dtype=product_dtype)

    @classmethod
    def create(
        cls,
        policy: PolicyModel,
        mode: ReferenceMode = "auto",
        *,
        cut: Callable[[Batch], Sequence[Batch]] | None = None,
        frozen_dtype: torch.dtype = torch.float32,
        product_dtype: torch.dtype = torch.float32,
    ) -> Reference:
        """Keep the policy as it is now.

        Args:
            mode: `auto` takes `adapter_off` for a policy with a fresh adapter, and `copy` for any other.
            cut: cuts a batch into the micro-batches that memory allows; None forwards a batch at once.
            frozen_dtype: dtype in which a frozen copy is held.
            product_dtype: dtype of its matrix products.

        Raises:
            ConfigError: `adapter_off` without a fresh adapter, which would compare with another model than the one passed in.
        """
        if mode == "auto":
            mode = "adapter_off" if policy.fresh_adapter else "copy"
        if mode == "adapter_off" and not policy.fresh_adapter:
            raise ConfigError(
                "with its adapter off, the policy isn't the model that was passed in",
                place="reference",
                got="a policy without a fresh adapter",
                fix="set `lora`, or `reference: copy`",
            )
        return cls(policy, mode, cut, frozen_dtype=frozen_dtype, product_dtype=product_dtype)

    @torch.no_grad()
    def token_logps(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Return (R, T) log-probabilities of the response tokens inside the loss mask under the reference, nats; 0 elsewhere.

        The distribution is softmax(logits / temperature). The batch is forwarded in micro-batches; the result is on its device.

        Raises:
            ConfigError: in the mode `precompute`, which holds sums over responses only.
        """
        if self.mode == "precompute":
            raise ConfigError(
                "precomputed log-probabilities are sums over responses, and this method needs one per token",
                place="reference",
                got="precompute",
                fix="set `reference: auto`, which keeps a model to compute them",
            )
        return self._score(batch, "token", temperature)

    @torch.no_grad()
    def response_logps(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Return (R,) log-probabilities of the responses under the reference, summed over their loss mask, nats.

        The distribution is softmax(logits / temperature). The batch is forwarded in micro-batches; the result is on its device.

        Raises:
            ConfigError: the log-probabilities were precomputed with another temperature.
            ModelError: a response wasn't among those that were precomputed.
        """
        if self.mode == "precompute":
            return self._look_up(batch, temperature)
        return self._score(batch, "response", temperature)

    @property
    def copied(self) -> int:
        """How many values of the policy are held a second time."""
        if self.mode != "copy":
            return 0
        if self._first_values:
            return sum(value.numel() for _, value in self._first_values)
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _score(self, batch: Batch, axis: Literal["token", "response"], temperature: float) -> Tensor:
        """Compute log-probabilities, nats: (R, T) per token, or (R,) summed per response."""
        model = self.model
        function = model.token_logps if axis == "token" else model.response_logps
        function = functools.partial(function, temperature=temperature)
        off = model.adapter_off() if self.mode == "adapter_off" else self._initial_values()
        with evaluating(model), off:
            return batch_values(batch, function, axis=axis, cut=self._cut, device=model.device)

    @contextlib.contextmanager
    def _initial_values(self) -> Iterator[None]:
        """Swap the policy's trained parameters for their initial values inside the context; gradients are kept."""
        now = [parameter.data for parameter, _ in self._first_values]
        try:
            for parameter, start in self._first_values:
                parameter.data = start
            yield
        finally:
            for (parameter, _), value in zip(self._first_values, now, strict=True):
                parameter.data = value

    @torch.no_grad()
    def precompute(self, batches: Iterable[Batch], path: Path | None = None, *, temperature: float = 1.0) -> None:
        """Score every response once, before the policy changes; write the result to `path`, or read it where that file exists.

        Responses are recognised by their token ids, so any order, epoch or split of the data finds them.

        Args:
            batches: this process's share of the data; processes exchange what they computed.
            path: a safetensors file; None keeps the result in memory alone.
            temperature: of the distribution softmax(logits / temperature).

        Raises:
            ConfigError: the values in the file were computed with another temperature.
        """
        self._temperature = temperature
        if path is not None and path.is_file():
            try:
                self._known, found = _read(path)
            except (OSError, ValueError) as error:
                # The policy is still as it was passed in, so the same values can be computed again.
                log.warning("%s is damaged (%s): the reference's log-probabilities are computed again", path, error)
            else:
                if found != temperature:
                    fix = f"set the temperature to {found:g}, or start a new run"
                    raise _other_temperature(str(path), temperature, found, fix)
                log.info("reference log-probabilities read from %s", path)
                return
        known: dict[bytes, float] = {}
        for batch in batches:
            values = self._score(batch, "response", temperature).tolist()
            known.update(zip(_digests(batch), values, strict=True))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shares: list[dict[bytes, float]] = [{}] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(shares, known)
            known = {digest: value for share in shares for digest, value in share.items()}
        self._known = known
        if path is not None and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
            _write(path, known, temperature)

    def _look_up(self, batch: Batch, temperature: float) -> Tensor:
        """Return (R,) the precomputed log-probabilities of a batch's responses, on its device."""
        if self._known is None:
            raise RuntimeError("`Reference.precompute` must be called before log-probabilities are looked up")
        if temperature != self._temperature:
            fix = "set `reference: auto`, which keeps a model to compute them"
            raise _other_temperature("reference", temperature, self._temperature, fix)
        try:
            values = [self._known[digest] for digest in _digests(batch)]
        except KeyError:
            raise ModelError(
                "a response isn't among those whose reference log-probabilities were precomputed",
                place="reference: precompute",
                got=f"rows {list(batch.rows)[:8]}",
                fix="the data changed since the run began: start a new run, or use `reference: copy`",
            ) from None
        return torch.tensor(values, dtype=torch.float32, device=batch.device)


def _other_temperature(place: str, wanted: float, known: float, fix: str) -> ConfigError:
    """Return the error of log-probabilities precomputed with the temperature `known` where `wanted` is needed."""
    return ConfigError(
        "the reference's log-probabilities were computed with another temperature",
        place=place,
        got=f"computed with {known:g}, needed with {wanted:g}",
        fix=fix,
    )


def _digests(batch: Batch) -> list[bytes]:
    """Return 16 bytes per response that identify it: a hash of its prompt's ids, its own ids and its loss mask."""
    prompts, responses, masks = batch.prompt_ids.cpu(), batch.response_ids.cpu(), batch.loss_mask.cpu()
    out = []
    for response, (owner, length) in enumerate(zip(batch.owner.tolist(), batch.response_lengths.tolist(), strict=True)):
        state = hashlib.blake2b(digest_size=16)
        prompt_length = int(batch.prompt_lengths[owner])
        state.update(prompt_length.to_bytes(8, "little"))
        state.update(prompts[owner, :prompt_length].numpy().tobytes())
        state.update(responses[response, :length].numpy().tobytes())
        state.update(masks[response, :length].numpy().tobytes())
        out.append(state.digest())
    return out


def _write(path: Path, known: dict[bytes, float], temperature: float) -> None:
    """Write digest → log-probability, nats, with the temperature and a checksum; the file appears whole or not at all."""
    tensors = {
        "digests": torch.frombuffer(bytearray(b"".join(known)), dtype=torch.uint8).view(-1, 16),
        "logps": torch.tensor(list(known.values()), dtype=torch.float32),
        "temperature": torch.tensor(temperature, dtype=torch.float64),
    }
    partial = temporary_path(path)
    with storage_errors(path, sum(tensor.nbytes for tensor in tensors.values())):
        write_tensors(partial, tensors | {"sha256": _checksum(tensors)})
        partial.replace(path)


def _read(path: Path) -> tuple[dict[bytes, float], float]:
    """Read digest → log-probability, nats, and the temperature.

    Raises:
        ValueError: the file is incomplete or a bit of it has changed.
    """
    tensors = read_tensors(path)
    if tensors.keys() != {"digests", "logps", "temperature", "sha256"}:
        raise ValueError(f"its tensors are {', '.join(sorted(tensors)) or 'none'}")
    if not torch.equal(tensors.pop("sha256"), _checksum(tensors)):
        raise ValueError("its contents don't have the SHA-256 that was written with them")
    known = dict(zip((row.numpy().tobytes() for row in tensors["digests"]), tensors["logps"].tolist(), strict=True))
    return known, float(tensors["temperature"])


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return (32,) bytes: the SHA-256 of the tensors' values, in the order of their names."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(tensors[name].numpy().tobytes())
    return torch.frombuffer(bytearray(state.digest()), dtype=torch.uint8)
