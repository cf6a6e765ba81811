"""The forward pass over a batch that computes each prompt once, in the fastest arrangement that a network allows.

Which arrangement that is, is measured once (see `probe`): responses packed into one row behind their shared prompts, a padded row
per response, or one forward pass per response. The hidden states are the same in each, up to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError, describe_error
from rlhf_core.models.attention import Kernel, OptimizedAttention
from rlhf_core.models.backbone import accepted, hidden_of
from rlhf_core.models.hidden_states import HiddenStates
from rlhf_core.models.layout import AttentionOverCache, Layout, joined, of_responses, packed_layout, padded_layout
from rlhf_core.models.precision import within_products
from rlhf_core.models.probe import FAILURES, NotReproduced, ProbeResult, differs_together, probe_network
from rlhf_core.models.rope import LengthClasses

log = logging.getLogger(__name__)

LayoutName = Literal["auto", "packed", "padded"]


class SharedForward:
    """Forwards batches through a network's backbone, with the attention and layout that were measured to be right for it.

    Args:
        network: a transformers model, adapters inside it. It is given the attention that its arrangement needs.
        kernel: the option `attention`.
        dtype: of matrix products.
        layout: `packed` refuses a network that can't be packed, `padded` never packs, `auto` takes what is fastest.
        share_prompts: whether a packed prompt is computed once for all its responses, or once per response.
        compiled: whether the network's blocks are compiled. Rows are then padded: each list of segments would compile them again.
        source: where the network came from, for messages.

    Raises:
        ConfigError: `flash` attention can't be used, or packed rows are combined with eager attention or compilation.
    """

    def __init__(
        self,
        network: Any,
        kernel: Kernel = "auto",
        *,
        dtype: torch.dtype = torch.float32,
        layout: LayoutName = "auto",
        share_prompts: bool = True,
        compiled: bool = False,
        source: str,
    ) -> None:
        self.network, self.dtype, self.source = network, dtype, source
        self.attention = _attention_for(network, kernel, dtype)
        if layout == "packed" and (compiled or self.attention.kernel == "eager"):
            raise ConfigError(
                "packed rows need an attention that can be replaced, and no compilation",
                place="batching.layout",
                got="compile: true" if compiled else f"attention: eager ({self.attention.reason})",
                fix="set `batching.layout: padded`",
            )
        self.layout: LayoutName = "padded" if compiled else layout
        self.share_prompts, self.compiled = share_prompts, compiled
        self._probed: ProbeResult | None = None
        self._attention_name: str | None = None
        """What transformers calls the attention that the network was given."""
        self._lengths = LengthClasses(network)
        self._longest_compared = 0
        """Tokens of the longest sequence that was forwarded together with others and alone, for comparison."""

    @property
    def probed(self) -> ProbeResult:
        """What was measured about the network, once: how it may be forwarded, and what comes out.

        Raises:
            ModelError: the network's hidden states can't be reproduced, or not in the layout of the options.
        """
        if self._probed is None:
            self._probed = self._probe()
            self._set_measured_attention()
        return self._probed

    @property
    def depends_on_length(self) -> bool:
        """Whether some positions are encoded in a way that depends on the longest sequence of a forward pass."""
        return bool(self._lengths)

    # Forwarding

    def hidden_states(self, batch: Batch, *, drop_last: bool = False) -> HiddenStates:
        """Return the last hidden states of a batch of at least one response.

        Args:
            drop_last: leave out each response's last token where the layout allows: its state predicts nothing.
        """
        groups = self._groups(batch)
        if batch.longest > self._longest_compared and self._compare_longest(batch, groups):
            groups = self._groups(batch)
        if len(groups) == 1:
            return HiddenStates(*self._forward_together(batch, drop_last=drop_last), batch)
        passes = [self._forward_together(of_responses(batch, group), drop_last=drop_last) for group in groups]
        hidden, layouts = zip(*passes, strict=True)
        return HiddenStates(torch.cat(hidden), joined(layouts, groups), batch)

    def _groups(self, batch: Batch) -> list[Tensor]:
        """Return which responses share a forward pass, as indices: all, unless their neighbours change what is computed."""
        if self.probed.arrangement == "alone":
            return list(torch.arange(batch.num_responses, device=batch.device)[:, None])
        if not self._lengths:
            return [torch.arange(batch.num_responses, device=batch.device)]
        return self._lengths.groups(batch.prompt_lengths[batch.owner] + batch.response_lengths)

    def _forward_together(self, batch: Batch, *, drop_last: bool) -> tuple[Tensor, Layout]:
        """Return the hidden states (N, D) of one forward pass over a batch, and which of them belong to each response."""
        if self._lengths:
            self._lengths.reset()
            drop_last = False  # the last token counts in the length that decides
        if self._packs(batch):
            layout = packed_layout(batch, share_prompts=self.share_prompts, drop_last=drop_last)
        else:
            layout = padded_layout(batch)
        return self._forward(self.probed.backbone, layout), layout

    def _packs(self, batch: Batch) -> bool:
        """Tell whether a batch is packed: segments know no sliding window and no count of places along the row."""
        probed = self.probed
        if probed.arrangement != "packed" or self.layout == "padded":
            return False
        if probed.longest_row is not None and batch.longest * batch.num_responses >= probed.longest_row:
            return False
        return probed.window is None or batch.longest <= probed.window

    def forward_over_cache(self, ids: Tensor, positions: Tensor, attention: AttentionOverCache) -> Tensor:
        """Return the hidden states (N, D) of tokens that attend to what was kept of earlier tokens.

        Only for a network whose rows are packed, at lengths that no layer treats differently.

        Args:
            ids: (N,) long. positions: (N,) long, each token's place in its own sequence.
            attention: which tokens see which.
        """
        never = ids[:0]
        layout = Layout(ids[None], positions[None], None, attention, None, before=never, prompt_end=never)
        return self._forward(self.probed.backbone, layout)

    def _forward(self, backbone: nn.Module, layout: Layout) -> Tensor:
        """Return the hidden states (N, D) that a backbone gives for a layout, flattened over rows."""
        inputs: dict[str, Any] = {"use_cache": False}
        if self._probed is not None and self.network.config._attn_implementation != self._attention_name:
            # Another model that shares the network has set another attention, which may not know segments.
            self._set_measured_attention()
        if layout.segments is not None:
            # A mask of four dimensions is taken as it is, so none is built over the row; segments say which tokens see which.
            inputs["attention_mask"] = layout.input_ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
            inputs |= {"position_ids": layout.position_ids, "segments": layout.segments}
        else:
            if layout.attention_mask is not None:
                inputs["attention_mask"] = layout.attention_mask
            inputs = accepted(backbone.forward, **inputs)
        with within_products(self.network):
            return hidden_of(backbone(input_ids=layout.input_ids, **inputs)).flatten(0, 1)

    # Measuring

    def _probe(self) -> ProbeResult:
        """Measure the network and log what was found; see `probed` for what is refused."""
        self._lengths = LengthClasses(self.network)
        try:
            probed = probe_network(
                self.network,
                self._forward,
                set_attention=self._set_attention,
                packs=self.attention.kernel != "eager",
                autocast_dtype=self._flash_dtype,
            )
        except NotReproduced as error:
            raise ModelError(
                "the forward passes of this framework don't reproduce the model's hidden states, so the model isn't supported",
                place=self.source,
                got=f"{type(self.network).__name__}: {error}",
                fix="report the model's config.json as an issue",
            ) from None
        except FAILURES as error:
            raise ModelError(
                "the model's forward pass fails on token ids alone",
                place=self.source,
                got=f"{type(self.network).__name__}: {describe_error(error, lines=2)}",
                fix="use a causal language model over text",
            ) from error
        reason = probed.obstacles.get("packed")
        if reason is not None and self.layout == "packed":
            raise ModelError(
                "this model can't keep packed sequences apart",
                place="batching.layout",
                got=reason,
                fix="set `batching.layout: padded`",
            )
        if reason is not None:
            self.attention = OptimizedAttention("sdpa", "packed rows don't give this model's own hidden states")
        self._report(probed)
        return probed

    @property
    def _flash_dtype(self) -> torch.dtype | None:
        """The dtype that measurements must run in where attention over segments has no kernel in float32."""
        return self.dtype if self.attention.kernel == "flash" else None

    def _compare_longest(self, batch: Batch, groups: list[Tensor]) -> bool:
        """Compare a batch's longest sequence, forwarded with others, with itself alone; if they differ, use `alone` from now on.

        Some models change what they compute from a length on. Only a sequence longer than any before is compared, so this
        happens a few times per run.

        Returns:
            Whether they differ.
        """
        self._longest_compared = batch.longest
        if self.probed.arrangement == "alone" or self.compiled or batch.device.type == "meta":
            return False
        lengths = (batch.prompt_lengths[batch.owner] + batch.response_lengths).tolist()
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        group = next(group for group in groups if longest in group).tolist()
        # The longest, the next shorter one, which is padded and long, and the shortest.
        shorter = max(
            (one for one in group if lengths[one] < lengths[longest]), key=lengths.__getitem__, default=longest
        )
        chosen = sorted({longest, shorter, min(group, key=lengths.__getitem__)})
        few = of_responses(batch, torch.tensor(chosen, device=batch.device))
        together = functools.partial(self._forward_together, drop_last=False)
        differs = differs_together(self.network, self.probed.backbone, together, few, self._flash_dtype)
        self._set_measured_attention()
        if not differs:
            return False
        reason = f"sequences of {self._longest_compared} tokens differ"
        obstacles = {**self.probed.obstacles, self.probed.arrangement: reason}
        self._probed = dataclasses.replace(self.probed, arrangement="alone", obstacles=obstacles)
        self._set_measured_attention()
        self._report(self._probed)
        return True

    def _set_attention(self, segments: bool) -> None:
        """Give the network attention that knows segments, or its plain one."""
        plain = "eager" if self.attention.kernel == "eager" else "sdpa"
        with contextlib.suppress(ValueError, ImportError):  # a model without replaceable attention keeps its own
            self.network.set_attn_implementation(self.attention.implementation if segments else plain)

    def _set_measured_attention(self) -> None:
        """Give the network the attention that its arrangement needs, and remember what transformers calls it."""
        self._set_attention(self.probed.arrangement == "packed")
        self._attention_name = self.network.config._attn_implementation

    def _report(self, probed: ProbeResult) -> None:
        """Log the attention kernel, and warn where sequences can't be packed."""
        # On a CPU there is nothing to choose.
        level = (
            logging.DEBUG
            if next(self.network.parameters()).device.type == "cpu" and self.attention.kernel == "sdpa"
            else logging.INFO
        )
        log.log(level, "attention: %s (%s)", self.attention.kernel, self.attention.reason)
        slower = {"padded": "rows are padded", "alone": "each sequence has its own forward pass, which is slow"}
        if probed.obstacles and self.layout != "padded":
            reasons = "; ".join(f"{name}: {reason}" for name, reason in probed.obstacles.items())
            log.warning("%s, since faster layouts don't suit this model (%s)", slower[probed.arrangement], reasons)
        if self._lengths:
            log.info("positions depend on length: sequences are forwarded with those of the same frequencies")


def _attention_for(network: Any, wanted: Kernel, dtype: torch.dtype) -> OptimizedAttention:
    """Choose the attention kernel for a network on its device; a network without SDPA has `eager`.

    Raises:
        ConfigError: `wanted` is `flash`, which the device, dtype or network can't run.
    """
    choice = OptimizedAttention.select(wanted, device=next(network.parameters()).device, dtype=dtype)
    if choice.kernel == "flash" and not getattr(network, "_supports_flash_attn", False):
        if wanted == "flash":
            raise ConfigError(
                "flash attention can't be used",
                place="attention",
                got=f"{type(network).__name__} has no attention through flash-attn",
                fix="use `attention: auto`",
            )
        choice = OptimizedAttention("sdpa", "the model has no attention through flash-attn")
    if choice.kernel != "eager" and not getattr(network, "_supports_sdpa", False):
        # transformers wouldn't notice under our name, and what SDPA leaves out (sinks, soft caps) would be lost.
        choice = OptimizedAttention("eager", "the model has no attention through SDPA")
    return choice
