"""The reference: the policy as it was passed in, kept to be compared with while the policy learns.

Three ways to keep it, one objective: a frozen copy (of what is trained: under an adapter, of the adapter alone); the base with
the adapter off, where the adapter is fresh; or
log-probabilities computed once before the first step, which need no second model in memory. Those are sums over a response, at
one temperature.
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

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.infra.files import storage_errors, temporary_path
from rlhf_core.infra.safetensors_file import read_tensors, write_tensors
from rlhf_core.models.batch_values import batch_values
from rlhf_core.models.dropout import evaluating
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.models.precision import narrowed_copy

log = logging.getLogger(__name__)

ReferenceMode = Literal["auto", "copy", "adapter_off", "precompute"]


class Reference:
    """Log-probabilities under the policy as it was passed in. Make it before the first optimiser step, and before a resume."""

    def __init__(
        self,
        policy: PolicyModel,
        mode: Literal["copy", "adapter_off", "precompute"],
        cut: Callable[[Batch], Sequence[Batch]] | None = None,
        *,
        hold: torch.dtype = torch.float32,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.mode = mode
        self._cut = cut or (lambda batch: [batch])
        self._policy = policy
        self._model = policy
        self._known: dict[bytes, float] | None = None
        self._temperature = 1.0
        self._kept: list[tuple[nn.Parameter, Tensor]] = []
        if mode == "copy" and policy.has_adapter:
            # The base doesn't change: what is trained is enough, and is put in its place while the reference is read.
            self._kept = [(p, p.detach().clone()) for p in policy.parameters() if p.requires_grad]
        elif mode == "copy":
            self._model = narrowed_copy(policy, hold, products=products)

    @classmethod
    def create(
        cls,
        policy: PolicyModel,
        mode: ReferenceMode = "auto",
        *,
        cut: Callable[[Batch], Sequence[Batch]] | None = None,
        hold: torch.dtype = torch.float32,
        products: torch.dtype = torch.float32,
    ) -> Reference:
        """Keep the policy as it is now; `auto` switches a fresh adapter off and copies anything else.

        `hold` is the type in which a frozen copy is held, for matrix products of the precision `products`. `cut` cuts a batch
        into the micro-batches that memory allows; without it a batch is forwarded at once.

        Raises:
            ConfigError: `adapter_off` without a fresh adapter, which would compare with another model than the one passed in.
        """
        if mode == "auto":
            mode = "adapter_off" if policy.fresh_adapter else "copy"
        if mode == "adapter_off" and not policy.fresh_adapter:
            raise ConfigError(
                "with the adapter off the model isn't the one that was passed in",
                place="reference",
                got="a policy without a fresh adapter",
                fix="set `lora`, or `reference: copy`",
            )
        return cls(policy, mode, cut, hold=hold, products=products)

    @torch.no_grad()
    def token_logps(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Return (R, T) log-probabilities of the response tokens inside the loss mask under the reference, nats; 0 elsewhere.

        The distribution is softmax(logits / temperature). The batch is forwarded in micro-batches; the result is on its device.

        Raises:
            ConfigError: only sums over responses were computed at the start.
        """
        if self.mode == "precompute":
            raise ConfigError(
                "log-probabilities that are computed once are sums over responses, and each token's are needed",
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
            ConfigError: they were computed at the start with another temperature.
        """
        if self.mode == "precompute":
            return self._look_up(batch, temperature)
        return self._score(batch, "response", temperature)

    def _score(self, batch: Batch, axis: Literal["token", "response"], temperature: float) -> Tensor:
        model = self._model
        function = model.token_logps if axis == "token" else model.response_logps
        function = functools.partial(function, temperature=temperature)
        off = model.adapter_off() if self.mode == "adapter_off" else self._as_kept()
        with evaluating(model), off:
            return batch_values(batch, function, axis=axis, cut=self._cut, device=model.device)

    @contextlib.contextmanager
    def _as_kept(self) -> Iterator[None]:
        """Have the policy's trained parameters hold what they held at the start; nothing is copied, and no gradient touched."""
        now = [parameter.data for parameter, _ in self._kept]
        try:
            for parameter, start in self._kept:
                parameter.data = start
            yield
        finally:
            for (parameter, _), value in zip(self._kept, now, strict=True):
                parameter.data = value

    @torch.no_grad()
    def precompute(self, batches: Iterable[Batch], path: Path | None = None, *, temperature: float = 1.0) -> None:
        """Score every response once, before the policy changes; keep the result at `path`, or read it from there.

        Responses are recognised by their token ids, so any order, epoch or split of the data finds them.

        Args:
            temperature: of the distribution softmax(logits / temperature).

        Raises:
            ConfigError: what is at `path` was computed with another temperature.
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
        if self._known is None:
            raise RuntimeError("`precompute` must run before the reference is read")
        if temperature != self._temperature:
            fix = "set `reference: auto`, which keeps a model to compute them"
            raise _other_temperature("reference", temperature, self._temperature, fix)
        try:
            values = [self._known[digest] for digest in _digests(batch)]
        except KeyError:
            raise ModelError(
                "a response has no precomputed reference log-probability",
                place="reference: precompute",
                got=f"rows {list(batch.rows)[:8]}",
                fix="the data changed since the run began: start a new run, or use `reference: copy`",
            ) from None
        return torch.tensor(values, dtype=torch.float32, device=batch.device)


def _other_temperature(place: str, wanted: float, known: float, fix: str) -> ConfigError:
    return ConfigError(
        "the reference's log-probabilities were computed with another temperature",
        place=place,
        got=f"{wanted:g} is wanted, {known:g} was computed",
        fix=fix,
    )


def _digests(batch: Batch) -> list[bytes]:
    """Return 16 bytes for each response, from the ids of its prompt and itself and its loss mask."""
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
    """Read what `_write` wrote, with the temperature. Raises ValueError where a bit of it has changed: it would change what is
    learned."""
    tensors = read_tensors(path)
    if tensors.keys() != {"digests", "logps", "temperature", "sha256"}:
        raise ValueError(f"it holds {', '.join(sorted(tensors)) or 'nothing'}")
    if not torch.equal(tensors.pop("sha256"), _checksum(tensors)):
        raise ValueError("it has another SHA-256 than when it was written")
    known = dict(zip((row.numpy().tobytes() for row in tensors["digests"]), tensors["logps"].tolist(), strict=True))
    return known, float(tensors["temperature"])


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return (32,) bytes: the SHA-256 of the tensors' values, in the order of their names."""
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(tensors[name].numpy().tobytes())
    return torch.frombuffer(bytearray(state.digest()), dtype=torch.uint8)
