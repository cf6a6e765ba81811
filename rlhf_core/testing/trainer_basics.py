"""Checks of what a trainer declares, yields and returns, and of which models are trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from unittest import SkipTest

import torch
from torch import Tensor

from rlhf_core.config.training import TrainingStage
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.records import RECORDS
from rlhf_core.contracts.trainer import Role, Trainer
from rlhf_core.infra.seeds import seed_everything
from rlhf_core.testing.contract import after, require
from rlhf_core.testing.trainer_setup import GRADIENT, TERMS, TrainerSetup
from rlhf_core.testing.workbench import reseeds
from rlhf_core.training.roles import reference_of, set_training_mode, trained_roles


class BasicChecks(TrainerSetup):
    """Declarations, windows, terms and weights, gradients."""

    # Declarations and windows

    def test_record_and_roles_are_known(self) -> None:
        """The record type is one of the core's, the stage a `TrainingStage`, each role a `Role`, and one of them is trained."""
        cls = self.subject()
        require(
            cls.record in RECORDS,
            f"`record` is {cls.record!r}, no known record type; known: {', '.join(sorted(RECORDS))}",
        )
        stage = getattr(cls, "stage", None)
        require(isinstance(stage, TrainingStage), f"`stage` is {stage!r}, not a TrainingStage")
        wrong = [f"`{name}` is {role!r}" for name, role in cls.roles.items() if not isinstance(role, Role)]
        require(not wrong, f"`roles` must map names to a Role, such as TRAINED or FROZEN: {', '.join(wrong)}")
        require(any(role.trained for role in cls.roles.values()), "no role in `roles` is trained: no model would learn")

    def test_experience_keeps_the_rows(self) -> None:
        """The windows of `experience` hold the data's rows, none lost or repeated, with finite columns without gradients."""
        bench = self.bench()
        given: list[int] = []

        def note(batch: Batch) -> Batch:
            given.extend(batch.rows)
            return batch

        bench.batches = map(note, bench.batches)
        made: list[int] = []
        for window in islice(bench.windows(), 4 * len(self.rows())):
            made += window.batch.rows
            _check_window(window.batch)
        require(bool(made), "`experience` yields no window")
        if self.offline:
            lost, extra = Counter(given) - Counter(made), Counter(made) - Counter(given)
            require(not lost, f"rows of the data that no window of `experience` holds: {sorted(lost)[:16]}")
            require(not extra, f"windows hold rows that the data didn't have: {sorted(extra)[:16]}")
        else:
            strange = sorted(set(made) - set(given))
            require(not strange, f"windows hold rows that the data didn't have: {strange[:16]}")

    # Loss and weights

    def test_every_term_has_a_weight(self) -> None:
        """`loss` and `weights` name the same terms, and each term is one number."""
        bench = self.bench()
        (micro,) = bench.split_window(bench.window())
        weights, loss = bench.trainer.weights(micro), bench.trainer.loss(micro)
        require(bool(loss.terms), "`loss` returns no term")
        require(
            set(weights) == set(loss.terms),
            f"`loss` returns the terms {sorted(loss.terms)}, `weights` weighs {sorted(weights)}",
        )
        for name, term in loss.terms.items():
            require(
                isinstance(term, Tensor) and term.numel() == 1,
                f"term `{name}` of `loss` is {_shown(term)}, and must be one number, the sum over a micro-batch",
            )

    @after(TERMS)
    def test_weights_depend_on_the_batch_alone(self) -> None:
        """The weights of a batch are finite and not negative, and don't change as models, modes or random states do."""
        bench = self.bench()
        trainer = bench.trainer
        window = bench.window()
        before = {name: float(weight) for name, weight in trainer.weights(window).items()}
        for name, weight in before.items():
            require(
                math.isfinite(weight) and weight >= 0,
                f"the weight of term `{name}` is {weight}, and must be finite and not negative",
            )
        trainer.loss(window.to(bench.devices.device))
        next(bench.windows(), None)
        bench.perturb()
        set_training_mode(trainer, False)
        seed_everything(1, "weights")
        now = {name: float(weight) for name, weight in trainer.weights(window).items()}
        require(
            now == before,
            f"`weights` returns {before} for a batch, and {now} for the same batch after an update; compute it from the batch"
            " alone",
        )

    @after(TERMS)
    def test_loss_is_finite(self) -> None:
        """Every term and metric of the first window's loss is finite."""
        bench = self.bench(moved=False)
        (micro,) = bench.split_window(bench.window())
        loss = bench.trainer.loss(micro)
        numbers = {f"term `{name}`": float(term.detach()) for name, term in loss.terms.items()}
        for name, pair in loss.metrics.items():
            for part, value in zip(("sum", "count"), pair, strict=True):
                numbers[f"the {part} of metric `{name}`"] = float(torch.as_tensor(value).detach().sum())
        wrong = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        require(not wrong, "; ".join(wrong))

    @after(TERMS)
    def test_loss_leaves_no_trace(self) -> None:
        """`loss` changes no mode, weight or gradient; neither `loss` nor `experience` seeds a global random generator."""
        bench = self.bench()
        trainer = bench.trainer
        (micro,) = bench.split_window(bench.window())
        before, modes = _snapshot(trainer.models), _modes(trainer)
        seeded = reseeds(lambda: trainer.loss(micro))
        require(seeded is None, f"`loss` seeds the global random generator of `{seeded}`")
        changed = [name for name, mode in _modes(trainer).items() if mode != modes.get(name)]
        require(not changed, f"`loss` changes the mode (training, requires_grad) of {', '.join(changed[:4])}")
        changed = _changed(before, trainer.models)
        require(not changed, f"`loss` changes the weights {', '.join(changed[:4])}")
        graded = [name for name, p in trainer.models.named_parameters() if p.grad is not None]
        require(
            not graded, f"`loss` runs a backward pass, which is the loop's task: gradients at {', '.join(graded[:4])}"
        )
        require(torch.is_grad_enabled(), "`loss` leaves gradients disabled (`torch.set_grad_enabled(False)`)")
        fresh = self.bench()
        seeded = reseeds(fresh.window)
        require(seeded is None, f"`experience` seeds the global random generator of `{seeded}`")

    # Gradients

    @after("test_loss_is_finite")
    def test_trained_models_get_a_gradient(self) -> None:
        """The model of each trained role gets a gradient that isn't zero."""
        bench = self.bench()
        trainer = bench.trainer
        gradient = bench.step(bench.window()).gradient
        for role in trained_roles(trainer):
            own = [value for name, value in gradient.items() if name.startswith(f"{role}.")]
            require(
                any(bool(value.any()) for value in own),
                f"the model of the trained role `{role}` gets no gradient from `loss`",
            )

    @after(GRADIENT)
    def test_frozen_models_do_not_change(self) -> None:
        """Models that aren't trained get no gradient and keep their weights; the reference doesn't follow the policy."""
        bench = self.bench()
        trainer = bench.trainer
        parameters = trainer.models.named_parameters()
        still: dict[str, Tensor] = {name: p for name, p in parameters if name not in bench.parameters}
        for role in sorted(trainer.models.keys() - set(trained_roles(trainer))):
            still |= {f"{role}.{name}": buffer for name, buffer in trainer.models[role].named_buffers()}
        reference = reference_of(trainer)
        if not still and reference is None:
            raise SkipTest("the method has no frozen model")
        before = {name: tensor.detach().clone() for name, tensor in still.items()}
        windows = bench.windows()
        window = next(windows).batch
        logps = reference.response_logps(window) if reference is not None else None
        if logps is not None:
            _require_owners(window, logps)
        bench.train_step(window)
        next(windows, None)
        moved = [name for name, tensor in still.items() if not torch.equal(tensor, before[name])]
        require(not moved, f"weights of frozen models change: {', '.join(moved[:4])}")
        graded = [name for name, tensor in still.items() if tensor.grad is not None or tensor.requires_grad]
        require(not graded, f"weights of frozen models get a gradient: {', '.join(graded[:4])}")
        if reference is not None and logps is not None:
            require(not logps.requires_grad, "the reference's log-probabilities carry a gradient")
            now = trainer.reference.response_logps(window)
            require(torch.equal(now, logps), "the reference's log-probabilities change as the policy learns")


def _check_window(window: Batch) -> None:
    """Fail unless a window's row numbers, owners, loss mask and columns are consistent and free of gradients."""
    prompts, responses = window.num_prompts, window.num_responses
    require(len(window.rows) == prompts, f"a window of {prompts} prompts has {len(window.rows)} row numbers in `rows`")
    owners = window.owner.tolist()
    require(len(owners) == responses, f"a window of {responses} responses has {len(owners)} entries in `owner`")
    require(
        all(0 <= owner < prompts for owner in owners),
        f"`owner` of a window holds a number that is no prompt of its {prompts}",
    )
    columns = torch.arange(window.response_ids.shape[1], device=window.device)
    outside = window.loss_mask & (columns >= window.response_lengths[:, None])
    require(not bool(outside.any()), "the loss mask of a window is set beyond a response's length")
    for name, column in {**window.per_prompt, **window.per_response, **window.per_token}.items():
        require(not column.requires_grad, f"column `{name}` of a window requires gradients; detach it")
        finite = not column.is_floating_point() or bool(column.isfinite().all())
        require(finite, f"column `{name}` of a window holds values that aren't finite")


def _require_owners(window: Batch, logps: Tensor) -> None:
    """Fail where a column holds the reference's log-probabilities in another order than the responses'.

    Args:
        window: its columns per response and, summed over tokens, per token are compared.
        logps: (R,) the reference's log-probabilities of the window's responses, summed over their tokens in the loss, nats.
    """
    sums = {name: (column * window.loss_mask).sum(dim=1) for name, column in window.per_token.items()}
    for name, column in {**window.per_response, **sums}.items():
        values, known = column.double().cpu(), logps.double().cpu()
        if column.is_floating_point() and column.shape == logps.shape and not torch.allclose(values, known, atol=1e-3):
            same = torch.allclose(values.sort().values, known.sort().values, atol=1e-3)
            require(
                not same,
                f"column `{name}` holds the reference's log-probabilities of other responses than the ones it is attached to",
            )


def _snapshot(models: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in models.named_parameters()}


def _changed(before: Mapping[str, Tensor], models: torch.nn.Module) -> list[str]:
    return [name for name, parameter in models.named_parameters() if not torch.equal(before[name], parameter)]


def _modes(trainer: Trainer) -> dict[str, bool]:
    """Return the training mode of every module and `requires_grad` of every parameter, by name."""
    modes = {f"{name} (mode)": module.training for name, module in trainer.models.named_modules()}
    return modes | {name: parameter.requires_grad for name, parameter in trainer.models.named_parameters()}


def _shown(term: object) -> str:
    """Return how a message describes a loss term: a tensor by its shape."""
    return f"of shape {tuple(term.shape)}" if isinstance(term, Tensor) else repr(term)
