"""Checks of a loss: which models its gradient reaches, which tokens it counts, and what its terms are averaged over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.trainer import Trainer
from rlhf_core.models import PolicyModel
from rlhf_core.testing.contract import after, require
from rlhf_core.testing.trainer_online import responses_of
from rlhf_core.testing.trainer_setup import GRADIENT, TERMS, TrainerSetup
from rlhf_core.testing.workbench import Workbench
from rlhf_core.training.roles import trained_roles

FACTORS = tuple(range(2, 17))
"""Factors, and their inverses, by which a first loss may not differ from the negative log-likelihood."""


class LossChecks(TrainerSetup):
    """Faults of a loss that are the same for any layout of the rows, so that comparing layouts doesn't show them."""

    @after(GRADIENT)
    def test_gradient_comes_through_the_loss_alone(self) -> None:
        """The loss's gradient doesn't reach models that aren't trained, or what `experience` and `build` computed."""
        bench, window = self.window()
        (micro,) = bench.split_window(window)
        before = _sequence_number()
        loss = bench.trainer.loss(micro)
        trained = {id(parameter) for parameter in bench.parameters.values()}
        names = {id(p): name for name, p in bench.trainer.models.named_parameters()}
        for name, term in loss.terms.items():
            for node in _graph(term):
                leaf = getattr(node, "variable", None)
                if leaf is not None:
                    other = names.get(id(leaf), f"a tensor of shape {tuple(leaf.shape)}")
                    require(
                        id(leaf) in trained,
                        f"the gradient of term `{name}` reaches {other}, which no role trains: compute with frozen models in"
                        " `experience`, or under `torch.no_grad()`",
                    )
                elif node._sequence_nr() < before:
                    raise AssertionError(
                        f"the gradient of term `{name}` runs through a tensor that was computed before `loss`, in `experience`"
                        f" or `build` (autograd node {node.name()}): `.detach()` it there"
                    )

    @after(TERMS)
    def test_weights_count_what_is_summed(self) -> None:
        """Weights of single rows add up to the window's, and each is the number of entries that its term sums, not a multiple."""
        bench, window = self.window()
        trainer, rows = bench.trainer, [window.select([prompt]) for prompt in range(window.num_prompts)]
        whole = {name: float(weight) for name, weight in trainer.weights(window).items()}
        of_rows = [{name: float(weight) for name, weight in trainer.weights(row).items()} for row in rows]
        for name, weight in whole.items():
            total = sum(weights[name] for weights in of_rows)
            require(
                math.isclose(total, weight, rel_tol=1e-6, abs_tol=1e-9),
                f"the weight of term `{name}` is {weight:g} for a window, and {total:g} for its rows one by one, added up: the"
                " core adds weights up over micro-batches, so return what this batch holds (tokens, responses or prompts), not"
                " a number for the whole step",
            )
        if self.constant_weights:
            return
        terms = [bench.trainer.loss(row.to(bench.devices.device)).terms for row in rows]
        self._require_masked(bench, rows)
        for name in whole:
            weights = [row[name] for row in of_rows]
            entries = [_entries(found[name], row) for found, row in zip(terms, rows, strict=True)]
            self._check_factor(name, weights, entries, rows)
            prompts = [float(row.prompt_lengths.sum()) for row in rows]
            loss_tokens = [float(row.num_loss_tokens) for row in rows]
            for what, other in (("of prompts", prompts), ("of prompts and responses", _added(prompts, loss_tokens))):
                require(
                    not (len(set(other)) > 2 and weights == other and other != loss_tokens),
                    f"the weight of term `{name}` is the number of tokens {what}, but prompts' tokens aren't in the loss: return"
                    " `batch.num_loss_tokens`",
                )

    def _require_masked(self, bench: Workbench, rows: list[Batch]) -> None:
        """Fail where a weight counts response tokens outside of the loss mask (tested by masking the first of each response)."""
        lengths = [float(row.response_lengths.sum()) for row in rows]
        masks = [row.loss_mask & (row.loss_mask.cumsum(dim=1) > 1) for row in rows]
        counted = [bench.trainer.weights(replace(row, loss_mask=mask)) for row, mask in zip(rows, masks, strict=True)]
        for name in counted[0]:
            require(
                len(set(lengths)) < 3 or [float(weights[name]) for weights in counted] != lengths,
                f"the weight of term `{name}` is the number of tokens of the responses, in the loss mask or not: tokens of a"
                " tool's output or of another turn aren't in the loss; return `batch.num_loss_tokens`",
            )

    def _check_factor(
        self, name: str, weights: Sequence[float], entries: Sequence[_Entries], rows: list[Batch]
    ) -> None:
        """Fail where a term's weight is the same multiple, other than 1, of the entries that it sums in each row.

        Args:
            name: the term.
            weights, entries, rows: for each row, the term's weight, the entries that it sums, and the row as a batch.
        """
        known = [(w, e.number, e.what) for w, e in zip(weights, entries, strict=True) if e.number and w]
        factors = {round(weight / number, 6) for weight, number, _ in known}
        if len(known) < 3 or len(factors) != 1 or (factor := factors.pop()) == 1:
            return
        what = known[0][2]
        if what == "token in the loss" and len({number for _, number, _ in known}) == 1:
            return  # all responses have one length: tokens and responses can't be distinguished
        if self.offline and what == "response" and {row.num_responses * factor for row in rows} == {1.0}:
            return  # terms of both responses of a pair, averaged over pairs
        raise AssertionError(
            f"term `{name}` sums {sum(n for _, n, _ in known):g} entries, one per {what}, but its weight is"
            f" {sum(w for w, _, _ in known):g}, {factor:g} times that; return the number of summed entries as the weight; put a"
            " factor into the term itself, or set `constant_weights = True` on the contract if the constant is intended"
        )

    @after(GRADIENT)
    def test_repeated_rows_change_nothing(self) -> None:
        """Repeating every row of a window gives the same loss, gradient and metrics, as they are averages."""
        if self.constant_weights:
            raise SkipTest(
                "`constant_weights` is set: the method averages over a constant, so its loss isn't an average over rows"
            )
        bench, window = self.window()
        expected = bench.step(window)
        found = bench.step(Batch.cat([window, window]))
        self.same(found, expected, "with every row repeated (a sum doubles where an average stays)")
        self.same_metrics(found, expected, "with every row repeated")
        if bench.trainer.splits_groups:
            twice = window.take([response for response in range(window.num_responses) for _ in range(2)])
            self.same(
                bench.step(twice),
                expected,
                "with every response repeated (do the weights count prompts instead of responses?)",
            )

    @after(TERMS)
    def test_first_loss_is_the_known_one(self) -> None:
        """The loss before the first step is `first_loss`; SFT's isn't a multiple of the negative log-likelihood."""
        imitates = self.record_type == "sft" and self.first_loss is None
        if self.first_loss is None and not imitates:
            raise SkipTest("set `first_loss` to the loss before the first step, where it is known, such as ln 2")
        bench = self.bench(moved=False, script=self.script)
        window = bench.window()
        found = bench.step(window).loss
        if imitates or self.first_loss == "nll":
            expected = _nll(bench, window)
        else:
            assert isinstance(self.first_loss, int | float)
            expected = float(self.first_loss)
        if not imitates:
            require(
                math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-6),
                f"the loss before the first step is {found:.6g}, and should be {expected:.6g} (`first_loss`); it is"
                f" {found / expected if expected else math.inf:.4g} times as large",
            )
            return
        for factor in (*FACTORS, *(1 / factor for factor in FACTORS)):
            require(
                not math.isclose(found, factor * expected, rel_tol=1e-5),
                f"the loss before the first step is {factor:.4g} times the negative log-likelihood per token in the loss: a"
                " weight is wrong by that factor (if it is meant, set `first_loss`)",
            )

    # Tokens

    @after(GRADIENT)
    def test_no_token_is_lost(self) -> None:
        """Removing the first, middle or last token of a response from the loss mask changes the loss."""
        bench, window = self.window()
        _require_policy(bench.trainer)
        seen: dict[str, set[bool]] = {"first": set(), "middle": set(), "last": set()}
        for row in _some_rows(window):
            whole = _values(bench, row)
            for response in range(min(row.num_responses, 4)):
                at = row.loss_mask[response].nonzero().flatten().tolist()
                if len(at) < 3:
                    continue
                changed = {}
                for place, column in zip(seen, (at[0], at[len(at) // 2], at[-1]), strict=True):
                    mask = row.loss_mask.clone()
                    mask[response, column] = False
                    changed[place] = _values(bench, replace(row, loss_mask=mask)) != whole
                # A response that isn't in the loss at all, such as one with an advantage of 0, shows nothing.
                if any(changed.values()):
                    for place, value in changed.items():
                        seen[place].add(value)
        if not any(seen.values()):
            raise AssertionError(
                "the loss ignores `batch.loss_mask`: removing tokens from the mask doesn't change it; sum over the tokens in"
                " `batch.loss_mask`"
            )
        self._require_ends(window)
        for place, values in seen.items():
            why = "; a response's end token belongs to it" if place == "last" else ""
            require(
                True in values,
                f"the {place} token of a response isn't in the loss: the loss stays the same as it leaves the loss mask{why}",
            )

    def _require_ends(self, window: Batch) -> None:
        """Fail where no window has a response's last token in its loss mask, though the data or the completions do."""
        given = next(iter(self.bench().batches))
        if self.offline and not _last_in_mask(given):
            return
        require(
            _last_in_mask(window),
            "the last token of a response, its end token, isn't in the loss: no window has it in the loss mask, so the policy"
            " never learns to end a response",
        )
        if self.offline or not self.repeatable:
            return
        end = _require_policy(self.bench().trainer).tokenizer.eos_token_id
        drawn = any(one.stop_reason == "end" for group in self.script.drawn.values() for one in group)
        require(
            not drawn or any(response[-1:] == (end,) for _, response in responses_of(window)),
            "completions lose their end token: some end with it, but none of the window's responses does; pass completions to"
            " `Batch.from_completions` as they were drawn",
        )

    @after(GRADIENT)
    def test_no_token_is_seen_before_it_is_scored(self) -> None:
        """The loss doesn't depend on what the model computes at a response's last token, which predicts none."""
        bench, window = self.window()
        trainer = bench.trainer
        policy = _require_policy(trainer)
        others = [trainer.models[role] for role in trained_roles(trainer) if role != "policy"]
        shared = {id(p) for p in policy.parameters()}
        if any(id(parameter) in shared for model in others for parameter in model.parameters()):
            raise SkipTest("another trained model shares the policy's weights, so it may rightly read the last token")
        (micro,) = bench.split_window(window)
        used = {*micro.response_ids.flatten().tolist(), *micro.prompt_ids.flatten().tolist()}
        mark = next(token for token in range(len(policy.tokenizer) - 1, -1, -1) if token not in used)
        lengths = micro.response_lengths
        rows = torch.arange(micro.num_responses, device=micro.device)[lengths > 0]
        ids = micro.response_ids.clone()
        ids[rows, lengths[rows] - 1] = mark
        read: list[tuple[Tensor, Tensor]] = []

        def keep(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            inner = output.detach().requires_grad_()
            read.append((inputs[0], inner))
            return inner

        handle = policy.network.get_input_embeddings().register_forward_hook(keep)
        try:
            loss = trainer.loss(replace(micro, response_ids=ids))
        finally:
            handle.remove()
        torch.stack([term.reshape(()) for term in loss.terms.values()]).sum().backward()
        for given, inner in read:
            if inner.grad is not None and given.shape == inner.shape[:2]:
                leak = bool(inner.grad[given == mark].any())
                require(
                    not leak,
                    "the loss depends on what the policy computes at a response's last token, which predicts no token in the"
                    " loss: the log-probability of token t is read at position t - 1, before the model has seen it"
                    " (`HiddenStates.predicting()`, not `at()`)",
                )


class _Entries:
    """How many entries a term sums for one row, 0 where that isn't known, and what each stands for: token, response or prompt."""

    def __init__(self, number: float = 0, what: str = "") -> None:
        self.number, self.what = number, what


def _entries(term: Tensor, row: Batch) -> _Entries:
    """Return which entries a term sums for a row, from the shapes that the sums in its autograd graph have."""
    shapes = set(_summed(term.grad_fn))
    if len(shapes) != 1 or (shape := shapes.pop()) is None:
        return _Entries()
    if shape == tuple(row.response_ids.shape):
        return _Entries(row.num_loss_tokens, "token in the loss")
    if shape == (row.num_responses,):
        return _Entries(row.num_responses, "response" if row.num_responses > 1 else "prompt")
    return _Entries(1, "prompt") if shape == (row.num_prompts,) else _Entries()


def _summed(node: Any) -> Iterator[tuple[int, ...] | None]:
    """Yield the input shape of each `sum` that an autograd node combines linearly; None for anything else that it combines."""
    name = node.name() if node is not None else ""
    inner = [below for below, _ in node.next_functions if below is not None] if node is not None else []
    if name.startswith("SumBackward"):
        yield tuple(int(size) for size in node._saved_self_sym_sizes)
    elif name.startswith(("NegBackward", "MulBackward", "DivBackward", "ViewBackward", "ReshapeBackward")):
        yield from _summed(inner[0]) if len(inner) == 1 else (None,)
    elif name.startswith(("AddBackward", "SubBackward")):
        for below in inner:
            yield from _summed(below)
    else:
        yield None


def _graph(term: Tensor) -> Iterator[Any]:
    """Yield the nodes of a term's autograd graph."""
    seen: set[Any] = set()
    todo = [term.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo += [below for below, _ in node.next_functions]


def _sequence_number() -> int:
    """Return an autograd sequence number above those of all nodes made so far and not above those of later nodes."""
    node = torch.zeros(1, requires_grad=True).neg().grad_fn
    assert node is not None
    return int(node._sequence_nr())


def _require_policy(trainer: Trainer) -> PolicyModel:
    """Return the trained policy; skip the check for a method without one."""
    policy = dict(trainer.models.items()).get("policy")
    if not isinstance(policy, PolicyModel) or "policy" not in trained_roles(trainer):
        raise SkipTest("the method trains no policy, so its tokens aren't known to be in the loss")
    return policy


def _last_in_mask(batch: Batch) -> bool:
    """Tell whether any response's last token is in the loss mask."""
    last = (batch.response_lengths - 1).clamp(min=0)[:, None]
    return bool(batch.loss_mask.gather(1, last.to(batch.loss_mask.device)).any())


def _some_rows(window: Batch) -> list[Batch]:
    """Return the first four prompts of a window, each with its responses as a batch."""
    return [window.select([prompt]) for prompt in range(min(window.num_prompts, 4))]


@torch.no_grad()
def _values(bench: Workbench, row: Batch) -> list[float]:
    """Return the loss terms of a row, without gradients."""
    return [float(term) for term in bench.trainer.loss(row.to(bench.devices.device)).terms.values()]


@torch.no_grad()
def _nll(bench: Workbench, window: Batch) -> float:
    """Return a window's negative log-likelihood per token in the loss, nats."""
    policy = _require_policy(bench.trainer)
    batch = window.to(bench.devices.device)
    return -float(policy.token_logps(batch).double().sum()) / batch.num_loss_tokens


def _added(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]
