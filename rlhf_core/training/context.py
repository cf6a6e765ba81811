"""The run context: all that a method may ask of the core while it makes experience or evaluates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_core.config.online import OnlineConfig, SamplingConfig, right_threshold
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import Sample
from rlhf_core.contracts.trainer import Evaluation, Trainer, Window
from rlhf_core.generation.engine import Engine
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import PluginError
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models.batch_values import Axis, Values, batch_values
from rlhf_core.models.policy_model import PolicyModel
from rlhf_core.rewards import Rewards, Scores, samples_of, samples_of_prompt
from rlhf_core.training.completion_metrics import completion_metrics
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.logger import REWARD_SECONDS
from rlhf_core.training.micro_batches import MicroBatches
from rlhf_core.training.online_metrics import rollout_metrics
from rlhf_core.training.phases import Phases
from rlhf_core.training.reduction import Tally
from rlhf_core.training.replay import SavedRollouts
from rlhf_core.training.rollout_record import RolloutRecord
from rlhf_core.training.run_samplers import RunSampler, SamplerKey


@dataclass
class RunContext:
    """What a method may ask of its run, without processes, devices or bounds on memory.

    Among several processes each calls the same methods, equally often: `gather`, `over_step` and `minibatches` exchange values.
    """

    trainer: Trainer[Any]
    distribution: Distribution
    devices: DeviceManager
    micro_batches: MicroBatches
    rewards: Rewards
    clock: Callable[[], int] = lambda: 0
    """Returns the optimiser steps made so far."""
    notify: Callable[..., None] = lambda event, **values: None
    """Calls the hooks of an event."""
    keep: Callable[..., None] = lambda samples, scores, **values: None
    """Writes some of the scored samples into the run's `samples.jsonl`."""
    evaluating: bool = False
    """Whether the rows are held out: they are scored, not trained on."""
    first_rollout: Callable[[RunContext, Batch, Sequence[Sequence[Completion]]], None] | None = None
    """Called with this context, prompts and completions after each generation in training: measures the engine's gap."""
    samplers: Mapping[SamplerKey, RunSampler] = field(default_factory=dict)
    """What draws rollouts, and completions in `evaluate_completions`, in place of the engine alone."""
    replay: SavedRollouts | None = None
    """Rollouts of another run, taken in training instead of drawing them."""
    phases: Phases = field(default_factory=Phases)
    """Times what the method does."""
    rollout: RolloutRecord = field(default_factory=RolloutRecord)
    """What was generated since the last rollout was trained on."""
    held: bool = field(default=False, init=False)
    """Whether a method has said, since it took its last batch, that it holds some of it for a later window."""
    _tally: Tally = field(default_factory=Tally, init=False)
    _engine: Engine | None = field(default=None, init=False)
    _engine_step: int | None = field(default=None, init=False)
    """The step that the engine's random draws are for."""
    _sampled: tuple[int, int] = field(default=(0, 0), init=False)
    """The step of the last draw by a sampler, and how many draws by samplers there were in it."""

    @property
    def step(self) -> int:
        """How many optimiser steps have been made."""
        return self.clock()

    @property
    def engine(self) -> Engine:
        """The generation engine on the policy as it is now: the same modules and weights that train.

        A completion is a function of the weights, the run's seed, the step and the row, so a resumed run draws the same as one
        that was never stopped, and so does any number of processes.
        """
        policy = dict(self.trainer.models.items()).get("policy")
        if not isinstance(policy, PolicyModel):
            raise PluginError("there is no policy to generate with", place=f"{type(self.trainer).__name__}.experience")
        if self._engine is None:
            self._engine = Engine(policy, seed=self.trainer.config.seed)
        if self._engine_step != self.step:
            # Every evaluation uses the same random numbers, so that two of them can be compared.
            stream = ("evaluation",) if self.evaluating else ("rollout", self.step)
            self._engine.begin(*stream, policy_version=self.step)
            self._engine_step = self.step
        return self._engine

    def forward(
        self, batch: Batch, function: Callable[[Batch], Values], axis: Axis | tuple[Axis, ...] = "response"
    ) -> Values:
        """Return a function's values for a batch, computed without gradients in micro-batches that fit in memory.

        Args:
            batch: P prompts with R responses of at most T tokens.
            function: returns for a micro-batch a tensor with one value per prompt, response or token, or a tuple of such tensors;
                it must accept a batch without rows.
            axis: `prompt`, `response` or `token`, what there is one value for. Where tensors of a tuple have different axes, a
                tuple of them: `("token", "response")`.

        Returns:
            (P, ...), (R, ...) or (R, T, ...), on the batch's device.
        """
        whole = "prompt" in (axis if isinstance(axis, tuple) else (axis,))
        cut = self.micro_batches.cut_between_prompts if whole else self.micro_batches.cut
        return batch_values(batch, function, axis=axis, cut=cut, device=self.devices.device)

    def gather(self, value: Any) -> Any:
        """Return the values of all processes: tensors concatenated, lists joined, numbers as a list; in order of process.

        Every process must call it equally often: once per window, not once per row.
        """
        if isinstance(value, Tensor):
            whole = torch.cat(self.distribution.gather_tensor(value if value.ndim else value[None]))
            return whole.to(value.device)
        parts = self.distribution.gather(value)
        return [entry for part in parts for entry in part] if isinstance(value, list) else parts

    def over_step(self, function: Callable[..., Tensor], *values: Tensor, rows: Sequence[int]) -> Tensor:
        """Return this process's rows of a function of the whole step's rows, such as ranks or whitened scores.

        Args:
            function: called with `values`, each concatenated over the processes in the order of `rows`; returns a tensor with one
                entry per row.
            values: (n, ...) each, one entry for each of `rows`.
            rows: the row number of each entry; their order makes the result the same for any number of processes.

        Raises:
            PluginError: the function returned another number of entries than there are rows in the step; on every process.
        """
        numbers = torch.tensor(list(rows), dtype=torch.long)
        shares = [len(part) for part in self.distribution.gather_tensor(numbers)]
        order = self.gather(numbers).argsort(stable=True)
        found = function(*(self.gather(value)[order.to(value.device)] for value in values))
        if not isinstance(found, Tensor) or not found.ndim or len(found) != len(order):
            raise PluginError(
                f"the function of `over_step` must return a tensor with one entry per row, {len(order)} of them",
                place=f"{type(self.trainer).__name__}.experience",
                got=f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__,
            )
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        first = sum(shares[: self.distribution.rank])
        return found[back.to(found.device)][first : first + len(numbers)]

    def minibatches(self, batch: Batch, count: int) -> list[Batch]:
        """Return the batch's prompts divided at random into minibatches, each for one optimiser step.

        Over all processes together a minibatch has the same prompts for any number of processes; on one of them it may be empty.
        The division is a function of the run's seed and the step, so each pass over a rollout divides it in another way.

        Args:
            count: how many minibatches; where the step has fewer prompts, some are empty on every process.
        """
        generator = torch.Generator().manual_seed(stream_seed(self.trainer.config.seed, "minibatches", self.step))

        def minibatch_of(numbers: Tensor) -> Tensor:
            drawn = torch.randperm(len(numbers), generator=generator)
            return torch.arange(len(numbers))[drawn.argsort()] * count // max(len(numbers), 1)

        rows = batch.places or batch.rows
        chosen = self.over_step(minibatch_of, torch.tensor(rows, dtype=torch.long), rows=rows)
        return [batch.select((chosen == number).nonzero().flatten()) for number in range(count)]

    def windows(self, rollout: Batch) -> Iterator[Window]:
        """Yield the windows of a rollout: one for each of its `minibatches`, in each of its `rollout_epochs`.

        They are as many as `Trainer.windows_per_batch` says by default.

        Raises:
            PluginError: the method's configuration isn't an `OnlineConfig`.
        """
        config = self.trainer.config
        if not isinstance(config, OnlineConfig):
            raise PluginError(
                "only a rollout of an online method has several windows",
                place=f"{type(self.trainer).__name__}.experience",
                fix="let its configuration extend `OnlineConfig`, or yield batches",
            )
        last = config.rollout_epochs * config.minibatches
        for epoch in range(config.rollout_epochs):
            for number, part in enumerate(
                self.minibatches(rollout, config.minibatches), 1 + epoch * config.minibatches
            ):
                yield Window(part, last=number == last)

    def score(self, batch: Batch, completions: Sequence[Sequence[Completion]]) -> Scores:
        """Return the scores that the configured rewards give completions: P lists, in the order of the batch's prompts.

        In training, each reward's mean is reported as `reward/NAME` and that of the weighted sum as `reward`, the time that each
        took as `reward_seconds/NAME`, and how long the run waited for all as `reward_seconds`; in an evaluation the method
        returns `Scores.per_prompt` as metrics, which have standard errors. The event `rollouts_scored` is emitted.

        Raises:
            PluginError: a reward raises, takes too long, or returns another number of scores, None, or what isn't finite.
        """
        samples = samples_of(batch, completions)
        rows = [row for row, drawn in zip(batch.rows, completions, strict=True) for _ in drawn]
        with self.phase("reward"):
            scores = self.rewards.score(samples, rows=rows)
        return self._scored(batch, samples, completions, scores)

    def generate(self, batch: Batch, n: int, sampling: SamplingConfig | None = None) -> list[list[Completion]]:
        """Return n completions for each prompt, of a rollout without rewards: of `engine.generate`, or a `rollout_sampler`.

        In training it reports what `generate_and_score` does, apart from rewards.
        """
        completions = self._drawn(batch, n, sampling, self._sampler("rollout_sampler"))
        if not self.evaluating:
            samples = samples_of(batch, completions)
            self.rollout.add(batch, samples, completions, None)
            self._log_rollout(samples, completions, None)
        return completions

    def generate_and_score(
        self, batch: Batch, n: int, sampling: SamplingConfig | None = None
    ) -> tuple[list[list[Completion]], Scores]:
        """Return n completions for each prompt with their scores: of `engine.generate`, or in training of a
        `rollout_sampler`, then of `score`.

        Rewards that wait (async ones, those in a thread or a process) score a prompt's completions as soon as all n have ended,
        while others are still drawn.

        Raises:
            PluginError: as `score`, or a sampler doesn't return what it must.
        """
        return self._generated_and_scored(batch, n, sampling, self._sampler("rollout_sampler"))

    def _generated_and_scored(
        self, batch: Batch, n: int, sampling: SamplingConfig | None, sampler: RunSampler | None
    ) -> tuple[list[list[Completion]], Scores]:
        """Return n completions for each prompt with their scores; a sampler draws them where there is one."""
        if self.replay is not None and self.replay.scored and not self.evaluating:
            completions = self._drawn(batch, n, sampling, sampler)
            scores = self.replay.scores(self.step, batch, n, self.rewards.names)
            return completions, self._scored(batch, samples_of(batch, completions), completions, scores)
        ended: dict[int, dict[int, Completion]] = {}
        with self.rewards.scoring() as session:

            def finished(prompt: int, k: int, completion: Completion) -> None:
                group = ended.setdefault(prompt, {})
                group[k] = completion
                if len(group) == n:
                    samples = samples_of_prompt(batch, prompt, [group[number] for number in range(n)])
                    session.add(samples, [batch.rows[prompt]] * n, at=range(prompt * n, prompt * n + n))
                    del ended[prompt]

            completions = self._drawn(batch, n, sampling, sampler, finished)
            with self.phase("reward"):
                scores = session.result()
        samples = [session.samples[at] for at in range(len(session.samples))]
        return completions, self._scored(batch, samples, completions, scores)

    def _drawn(
        self,
        batch: Batch,
        n: int,
        sampling: SamplingConfig | None,
        sampler: RunSampler | None,
        finished: Callable[[int, int, Completion], None] | None = None,
    ) -> list[list[Completion]]:
        """Return what a sampler or the engine draws; its time and tokens are those of the phase `rollout`.

        Args:
            finished: as for `engine.generate`; what isn't drawn by the engine itself is finished all at once.
        """
        with self.phase("rollout"):
            replay = None if self.evaluating else self.replay
            if replay is None and sampler is None:
                completions = self.engine.generate(batch, n, sampling, finished=finished)
            else:
                if replay is not None:
                    completions = replay.completions(self.step, batch, n)
                else:
                    assert sampler is not None
                    completions = self._sampled_by(sampler, batch, n, sampling)
                if finished is not None:
                    for prompt, group in enumerate(completions):
                        for k, one in enumerate(group):
                            finished(prompt, k, one)
            self.phases.add_tokens("rollout", sum(len(one.ids) for group in completions for one in group))
        if self.first_rollout is not None and not self.evaluating:
            self.first_rollout(self, batch, completions)
        return completions

    def _sampler(self, key: SamplerKey) -> RunSampler | None:
        """Return the sampler of a key; none draws rollouts in an evaluation, whose loss is about the policy itself."""
        return None if self.evaluating and key == "rollout_sampler" else self.samplers.get(key)

    def _sampled_by(
        self, sampler: RunSampler, batch: Batch, n: int, sampling: SamplingConfig | None
    ) -> list[list[Completion]]:
        """Return what a sampler draws, with a seed that is a function of the run's seed, the step and the draw's number in it.

        The tokens that models were run on are reported by role as `forwarded/ROLE`, per prompt.
        """
        config, step = self.trainer.config, self.step
        number = self._sampled[1] if self._sampled[0] == step else 0
        self._sampled = (step, number + 1)
        # Every evaluation uses the same random numbers, so that two of them can be compared.
        stream = ("evaluation sampler",) if self.evaluating else ("rollout sampler", step)
        seed = stream_seed(config.seed, *stream, number)
        completions, forwarded = sampler.draw(batch, n, sampling or SamplingConfig(), seed=seed, policy_version=step)
        for role, tokens in forwarded.items():
            self.log(f"forwarded/{role}", tokens, batch.num_prompts)
        return completions

    def _scored(
        self, batch: Batch, samples: Sequence[Sample], completions: Sequence[Sequence[Completion]], scores: Scores
    ) -> Scores:
        """Report scores to metrics, `samples.jsonl` and hooks, and return them."""
        rows = [row for row, drawn in zip(batch.rows, completions, strict=True) for _ in drawn]
        if not self.evaluating:
            for name, values in scores.with_parts.items():
                self.log(f"reward/{name}", sum(values), len(values))
            for name in scores.by_name:
                self.log(f"{REWARD_SECONDS}/{name}", scores.seconds.get(name, 0.0))
            self.log(REWARD_SECONDS, scores.waited)
            self.rollout.add(batch, samples, completions, scores)
            self._log_rollout(samples, completions, scores)
        self.keep(samples, scores, rows=rows, step=self.step, evaluating=self.evaluating)
        self.emit(
            "rollouts_scored",
            step=self.step,
            samples=samples,
            rewards=scores.total.tolist(),
            evaluating=self.evaluating,
        )
        return scores

    def _log_rollout(
        self, samples: Sequence[Sample], completions: Sequence[Sequence[Completion]], scores: Scores | None
    ) -> None:
        """Report a rollout's lengths, entropy and rewards."""
        rewards = None if scores is None else scores.total.tolist()
        flat = [one for group in completions for one in group]
        for name, pair in rollout_metrics(samples, flat, rewards, right_from=self._right_from).items():
            self.log(name, *pair)

    @property
    def _right_from(self) -> float:
        """The least reward of a right completion."""
        config = self.trainer.config
        asked = config.right_from if isinstance(config, OnlineConfig) else None
        return right_threshold(asked, self.rewards.weights)

    def phase(self, name: str, *, tokens: int = 0) -> contextlib.AbstractContextManager[None]:
        """Return a context whose time is reported as `seconds/NAME`, and with tokens as `tokens_per_second/NAME`.

        The phases `rollout` and `reward` are those of `generate_and_score`, `update` is the loop's. One inside another doesn't
        count among the outer one's time.

        Args:
            name: such as `reference`.
            tokens: how many tokens are forwarded.
        """
        return self.phases.phase(name, tokens)

    def hold(self) -> None:
        """Note that some of the last batch is held for a later window, so that it isn't one of `max_idle_batches`.

        Every process calls it, or none.
        """
        self.held = True

    def record_rollout(self, rollout: Batch, advantages: Tensor | None = None, *, teaches: bool | None = None) -> Batch:
        """Record the advantages of a rollout's responses for `rollouts.jsonl`; return it with a column that the core needs.

        Called once per rollout, before it is divided into windows; what `generate_and_score` returned and isn't in it was not
        trained on.

        Args:
            rollout: prompts with the completions that this context's `generate` or `generate_and_score` returned for them, in
                their order.
            advantages: (R,), or (R, T), of which the mean over tokens in the loss is recorded; null for completions that have
                none in it.
            teaches: whether the rewards of this process's share give any completion something to learn from. None: whether all of
                each prompt are equal decides (with a value model, all of the rollout); without one also where this is false.
        """
        if self.evaluating:
            return rollout
        if teaches is not None:
            self.rollout.teaches = teaches or bool(self.rollout.teaches)
        if advantages is not None:
            mask = rollout.loss_mask.to(advantages.device)
            means = (advantages * mask).sum(1) / mask.sum(1) if advantages.ndim == 2 else advantages
            advantages = torch.where(mask.any(dim=1), means, float("nan"))
        return self.rollout.number(rollout, advantages)

    def log(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Report total / count in the next step's row of metrics; both are summed over the processes and the calls until then."""
        self._tally.add({name: (total, count)})

    def emit(self, event: str, **values: Any) -> None:
        """Call the hooks of an event; `rlhf_core.registry.hooks.Events` lists them."""
        self.notify(event, run=self.trainer, **values)

    def held_out_loss(self, batch: Batch) -> Evaluation:
        """Return the loss terms and metrics of held-out rows as sums, by `experience`, `weights` and `loss` as in training."""
        from rlhf_core.training.held_out import held_out_loss

        return held_out_loss(self.trainer, batch, self)

    def evaluate_completions(self, batch: Batch, sampling: SamplingConfig | None = None) -> Evaluation:
        """Return how good the policy's completions of held-out prompts are: what `Trainer.evaluate` of an online method returns.

        It draws `eval_samples` completions of each prompt and scores them. Metrics, all with standard errors: `avg@n`, the share
        of right completions; `pass@k`, the probability that one of k is right (k = 2, 4, 8 … and n); `reward`, `reward/NAME`,
        `length`, `truncated`.

        Args:
            sampling: how completions are drawn; None takes `generation` at the temperature `eval_temperature`.

        An `eval_sampler` draws them where one is configured.
        """
        config = self.trainer.config
        n = 1
        if isinstance(config, OnlineConfig):
            n, sampling = config.eval_samples, sampling or config.evaluated_sampling
        completions, scores = self._generated_and_scored(batch, n, sampling, self._sampler("eval_sampler"))
        return Evaluation(metrics=completion_metrics(completions, scores, right_from=self._right_from))

    def for_evaluation(self) -> RunContext:
        """Return a copy of this context for an evaluation."""
        return replace(self, evaluating=True, phases=Phases(), rollout=RolloutRecord())

    def pending(self) -> dict[str, tuple[float, float]]:
        """Return (sum, count) by name of what was logged since the last step, on this process."""
        return self._tally.totals()

    def logged(self) -> dict[str, tuple[float, float]]:
        """Return (sum, count) by name of what was logged since the last call, on this process, and clear it."""
        totals = self._tally.totals()
        self._tally.clear()
        return totals
