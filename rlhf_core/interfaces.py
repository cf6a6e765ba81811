"""The four contracts that a plugin fulfils: Trainer, RewardFn, Sampler, Merger.

A method states sums and what they are averaged over; the core owns data, devices, ranks, denominators, the loop and
checkpoints. Importing this module imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from rlhf_core import API as API
from rlhf_core.config import BaseConfig, ReferenceConfig, TrainerConfig, TrainingStage

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.batch import Batch
    from rlhf_core.data.base import EncodedData
    from rlhf_core.merging.merge import ModelMerger
    from rlhf_core.merging.streams import Chunk, TensorStream
    from rlhf_core.models.policy import PolicyModel
    from rlhf_core.models.reference import Reference
    from rlhf_core.training.context import RunContext
    from rlhf_core.training.loader import Loader
    from rlhf_core.training.result import TrainResult

ConfigT = TypeVar("ConfigT", bound=TrainerConfig)


Pair = tuple["Tensor | float", "Tensor | float"]
"""A sum and what it is counted over; either may be a number or a tensor of one entry per prompt, (P,)."""


@dataclass(frozen=True)
class Role:
    """How a method uses one of its models."""

    trained: bool
    """Trained models get gradients, are checkpointed and exported; frozen ones are only read."""
    optional: bool = False
    """Whether a configuration may make it unnecessary, so that `build` leaves it out."""


TRAINED = Role(trained=True)
"""A role that is trained, and always there."""
FROZEN = Role(trained=False)
"""A role that is only read, and always there."""


@dataclass(frozen=True)
class Window:
    """The work of one optimiser step."""

    batch: Batch
    last: bool = True
    """False for every window but the last one of a rollout: checkpoints and evaluations wait for that one."""


@dataclass(frozen=True)
class Loss:
    """What one micro-batch adds to a step: sums, never means.

    `terms` are scalar sums with gradient, by name, each averaged by the core over the weight that `Trainer.weights` gives
    for that name, taken over the whole optimiser step (micro-batches × ranks); the step's loss is the sum of the averages.
    `metrics` are pairs (sum, count), reported as the quotient over the whole step. A sum may be given one entry per prompt, (P,),
    and its count too; evaluation then adds the quotient's standard error as `eval_NAME_se`, for which rows of the same prompt
    are one observation.
    """

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, Pair] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What one batch of held-out rows adds to an evaluation: sums, never means; the core adds them up over the whole set."""

    terms: Mapping[str, Pair] = field(default_factory=dict)
    """Loss terms as pairs (sum, weight); `eval_loss` is the sum of their quotients over the set."""
    metrics: Mapping[str, Pair] = field(default_factory=dict)
    """Pairs (sum, count), reported as `eval_NAME`, with a standard error where they have one entry per prompt."""


class Trainer(ABC, Generic[ConfigT]):
    """A method that trains. Subclass it, set the class attributes, write `weights` and `loss`; the loop is the core's.

    `DPOTrainer(DPOConfig(...), model="path or PolicyModel", data="pairs.jsonl", output="runs/dpo").train()`
    """

    api: ClassVar[int]
    record: ClassVar[str]
    """The record type of its rows: a name in `rlhf_core.records.RECORDS`."""
    stage: ClassVar[TrainingStage]
    """Where in a pipeline it belongs; shown by `rlhf show` and kept in the run's record."""
    Config: ClassVar[type[TrainerConfig]]
    roles: ClassVar[Mapping[str, Role]] = {"policy": TRAINED}
    """Its models by name. `reference` is the policy as it was passed in; every other one is what `build` makes of it."""
    splits_groups: ClassVar[bool] = False
    """Whether a micro-batch may hold some of a prompt's responses only. `micro_batch_size` then counts responses, so that a large
    group trains on a small device; a prompt comes in several micro-batches, so its weights and metrics must count responses
    or tokens."""

    config: ConfigT
    models: nn.ModuleDict
    """Its models by role, once `build` has run. One optimiser serves the trained ones."""
    reference: Reference
    """The policy as it was passed in; there when `build` returns it."""
    run_inputs: Mapping[str, Any] | None = None
    """Where the run comes from, set by the command line for the run directory: `config_input` (the file's text, or None)
    and `command` (as one shell line), both with secrets redacted, and `plugin` (its `Plugin.as_dict()`). None from Python."""

    def __init__(
        self,
        config: ConfigT | None = None,
        *,
        model: str | Path | PolicyModel,
        data: Any,
        eval_data: Any = None,
        output: str | Path | None = None,
        rewards: Sequence[Any] | None = None,
    ) -> None:
        """Take what to train and on what; nothing is loaded or read before `train`.

        Args:
            config: options of the method; its defaults where None.
            model: a path, a hub name, or a loaded model.
            data: rows of the record type `record`: a path, several paths, a hub name, a `datasets` object, or a list of rows.
            eval_data: rows held out, scored during training.
            output: the run directory. None keeps nothing on disk, so such a run can't be resumed.
            rewards: of a method that learns from rewards, in place of `config.rewards`: functions, `RewardFn` objects, names, or
                `RewardConfig`; a pair `(reward, weight)` gives one a weight.

        A leading `~` in a path is the home directory.
        """
        self.config = config if config is not None else self.Config()  # type: ignore[assignment]
        self.model, self.data, self.eval_data = model, data, eval_data
        self.output = Path(output).expanduser() if output is not None else None
        self.rewards = rewards

    @property
    def policy(self) -> PolicyModel:
        return self.models["policy"]  # type: ignore[return-value]

    def inspect(self, data: EncodedData) -> None:
        """Look at data once models are built, before anything is computed; raise `DataError` where they can't do.

        Called with the training data, and then with the held-out data where there are any. The default has nothing to say.
        Rows that are streamed aren't known yet: `data.streaming`.
        """

    def build(self, loader: Loader) -> Mapping[str, nn.Module | Reference]:
        """Return the models by role: all of `roles`, but for optional ones that the configuration makes unnecessary.

        `loader.main` gives what the run was given as `model`, `loader.load` any other model by path with its own options. A
        trained model has a `save_pretrained(directory)`, by which it is exported. The default has a policy and, where it is
        among the roles, its reference.
        """
        policy: PolicyModel = loader.main()
        models: dict[str, nn.Module | Reference] = {"policy": policy}
        if "reference" in self.roles:
            mode = self.config.reference if isinstance(self.config, ReferenceConfig) else "auto"
            models["reference"] = loader.reference(policy, mode)
        return models

    def windows_per_batch(self) -> int | None:
        """Return how many windows `experience` makes of each batch; None where the data decide, as in dynamic sampling.

        With `epochs` it says how many steps there are, over which the learning rate's schedule runs; where it is None, the
        schedule runs over the batches of data. The core checks it.
        """
        return 1

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        """Take batches from the data as needed; yield windows, each the work of one optimiser step. No gradients here.

        Here live reference log-probabilities, rollouts, rewards and advantages, attached as columns (`Batch.attach`), and
        every estimate over a whole window. The default yields each batch as it is; a batch stands for `Window(batch)`.

        A method that makes several windows of one rollout yields all but the rollout's last as `Window(batch, last=False)`, so
        that no resume begins in the middle of a rollout, and says how many in `windows_per_batch`. The generator starts again
        on a resume and for each held-out batch: what must outlive it belongs on the trainer, in `state_dict`, never in its
        local variables.

        Where the last step of a run has fewer rows than there are processes, the batch of some is empty (P = R = 0): they yield
        an empty window with the same columns, and gather as often as the others.
        """
        yield from stream

    @abstractmethod
    def weights(self, batch: Batch) -> Mapping[str, float]:
        """Return what each term of `loss` is averaged over in this micro-batch (tokens, sequences, a constant).

        Computed from the batch alone: the loop adds these up over the step before the first backward.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> Loss:
        """Return the sums of one micro-batch, with gradients."""

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        """Return the sums of one batch of held-out rows, without gradients.

        The default makes experience of it and takes the loss. A method whose loss on its own completions says nothing of their
        quality overrides it: it generates, scores, and returns the rewards as metrics with one entry per prompt.
        """
        return run.held_out_loss(batch)

    def summary(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return figures of a whole held-out set that are no averages, from the metrics given one entry per prompt.

        Args:
            values: for each such metric, sum / count of every held-out row, (rows,) float64 in the data's order.

        The default has none. Names appear as `eval_NAME`.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what the method itself must remember over a resume, as JSON values. The default remembers nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if state:
            raise NotImplementedError(f"{type(self).__name__} saves state but does not load it")

    def train(self, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
        """Run the loop to its end and return the result; `resume` continues the run in `output`. Never overridden."""
        from rlhf_core.training.loop import run

        return run(self, resume=resume, overwrite=overwrite)


@dataclass(frozen=True)
class Sample:
    """One completion to be scored."""

    prompt: Any
    """Text or chat messages, as in the data."""
    completion: str
    prompt_ids: Sequence[int] = ()
    completion_ids: Sequence[int] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)
    """The record's other columns, such as a reference answer."""
    group: int = 0
    """Completions of the same prompt, drawn together, have the same number."""
    stop_reason: str = "end"
    """Why it ended; see `Completion.stop_reason`."""
    mask: Sequence[bool] | None = None
    """For each completion token, whether the policy wrote it; None where it wrote them all."""


class RewardFn(ABC):
    """A reward: one finite float a sample, in order."""

    api: ClassVar[int]
    Config: ClassVar[type[BaseConfig]] = BaseConfig

    def __init__(self, config: BaseConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    def prepare(self) -> None:  # noqa: B027
        """Load what scoring needs, such as a model. Called once before the first samples, without a time limit."""

    def describe(self) -> dict[str, Any]:
        """Return what scores depend on besides the options and the class's source, as JSON values, for a run's record.

        A reward by a model gives its model's `files`, name → SHA-256; a run is resumed only where all of it is as it was. A run
        asks before `prepare`.
        """
        return {}

    @abstractmethod
    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Return one finite float a sample. None, NaN or a wrong count stop the run with this reward's name."""

    def score_steps(self, samples: Sequence[Sample]) -> list[list[float]] | None:
        """Return one finite float for each reasoning step of each sample, or None where the reward is not step-wise."""
        return None


@dataclass(frozen=True)
class Completion:
    """What was generated for a prompt: it can't lie about where it came from. Axis: T, its tokens."""

    text: str
    ids: Sequence[int]
    logprobs: Sequence[float]
    """(T,) log-probability of each token under the distribution that drew it (temperature and truncation included), nats."""
    stop_reason: str
    """`end` after the end token, which is the last of `ids`; `length` where the limit cut it off."""
    raw_logprobs: Sequence[float] = ()
    """(T,) log-probability of each token under the model's own distribution (temperature 1, nothing truncated), nats."""
    kept_mass: Sequence[float] = ()
    """(T,) share of the tempered distribution that truncation (top-p, top-k) kept where each token was drawn, at most 1."""
    mask: Sequence[bool] | None = None
    """(T,) whether the policy wrote each token (a tool's output isn't its own); None where it wrote them all."""
    score: float | None = None
    policy_version: int = 0
    """Optimiser steps that the policy had made when it wrote this."""


class Sampler(ABC):
    """A way to answer prompts: for each exactly n completions, best first. It stands on `Engine`, which draws.

    `BestOfNSampler.load(BestOfNConfig(draws=8), policy="runs/sft", reward="runs/rm").sample(["17+25=?"], n=2)`
    """

    api: ClassVar[int]
    Config: ClassVar[type[BaseConfig]] = BaseConfig
    roles: ClassVar[Mapping[str, str]] = {"policy": "policy"}
    """The models that it needs, by role, and of which kind each is: `policy`, a `PolicyModel`; or `reward`, whatever is accepted
    as one reward or several."""

    models: Mapping[str, Any]
    """Its models by role: a `PolicyModel`, or `Rewards`."""

    def __init__(self, config: BaseConfig | None = None, **models: Any) -> None:
        """Take a configuration, its defaults where None, and each model that `roles` names.

        A reward is a name, a function, a `RewardFn`, a `RewardConfig` or its mapping, or the path of a reward model.

        Raises:
            ConfigError: a role is missing, unknown, or given something else than it needs.
        """
        from rlhf_core.models.sampling import models_by_role

        self.config = config if config is not None else self.Config()
        self.models = models_by_role(type(self), models)

    @classmethod
    def load(cls, config: BaseConfig | None = None, **sources: Any) -> Self:
        """Return the sampler with its policies loaded from paths, hub names or `ModelConfig`s; loaded ones are taken as they are.

        Raises:
            ConfigError: as for the constructor.
            ModelError: a model can't be loaded.
        """
        from rlhf_core.models.sampling import load_models

        return cls(config, **load_models(cls, sources))

    @property
    def policy(self) -> PolicyModel:
        return self.models["policy"]

    @abstractmethod
    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        """Return exactly n completions for each prompt, best first; their scores are all set, or all None.

        Args:
            prompts: texts, lists of chat messages, or rows: mappings with a `prompt` and other columns (an `answer`), which reach
                the reward. `prompt_batch` encodes them as in training.
            seed: makes the completions repeatable; None draws others each time. With one, a prompt's completions don't depend on
                which others are answered with it.
        """


class Merger(ABC):
    """A way to make one checkpoint of several; the core reads them past it, tensor by tensor, and writes the result.

    `merge_chunk` merges a piece of one tensor; `measure` looks at the whole tensor first where that is needed, and `survey` at
    all of them. `chunk.tensors` are in the order in which the user gave the models (but see `commutative`), and `chunk.inputs`
    tell of each model its name, path, weight and options. A method that must evaluate what it makes overrides `merge`.
    """

    api: ClassVar[int]
    Config: ClassVar[type[BaseConfig]] = BaseConfig
    needs_base: ClassVar[bool] = False
    """Whether it works on differences from a base model, which must then be given."""
    ignores_base: ClassVar[bool] = False
    """Whether a base that is given only lends its configuration and tokenizer; it is then not read."""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """The fewest and the most models that it merges, the base not counted; None sets no bound."""
    commutative: ClassVar[bool] = False
    """Whether the order of the models means nothing to it. They then come in an order of their own, by their values, so that any
    order that they are given in makes the same bits; what belongs to a model stays with it in `chunk.inputs`."""
    by_row: ClassVar[bool] = False
    """Whether chunks are whole rows, (rows, columns); else they are (N,)."""
    whole_tensors: ClassVar[bool] = False
    """Whether it needs whole tensors: a chunk is then one tensor, in its own shape. By default at most four merge at once."""
    per_model: ClassVar[tuple[str, ...]] = ()
    """Options of `Config` that a model may have a value of its own for, of any type. `chunk.inputs[i].options` and
    `stream.option(name)` hold what counts for each model. A file is a field of type `Path`: a merge that is continued then
    notices where it was changed."""
    replay: ClassVar[str | None] = None
    """For a method that chooses among the models: the one that makes the same of the chosen ones without choosing."""
    neutral: ClassVar[Mapping[str, Any]] = {}
    """Options with which copies of a model merge into that model, as the conformance kit tests, where other values of them leave
    entries out or scale differences."""

    def __init__(self, config: BaseConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    def check_weights(self, weights: Sequence[float]) -> None:  # noqa: B027
        """Raise `ConfigError` where weights can't do, before anything is read; called for each tensor's weights."""

    def survey(self, streams: Iterable[TensorStream]) -> Any:
        """Look at all tensors before the first is merged; what is returned is `surveyed` of every stream.

        Streams are made new each time that `streams` is iterated. The default looks at none, and then nothing is read.
        """
        return None

    def measure(self, stream: TensorStream) -> Any:
        """Return what merging needs to know of the whole tensor, from one or more readings; the default nothing."""
        return None

    @abstractmethod
    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        """Return the merged elements of a chunk, float32, in the chunk's shape; it may be one of the chunk's own tensors.

        Tensors are merged side by side, in forked processes or in threads, so nothing may be kept in `self`: threads share it,
        processes don't. A method starts no processes of its own.

        Args:
            chunk: a piece of one tensor of each model, and of the base where there is one.
            measured: what `measure` returned for the tensor.
        """

    def merge(self, merge: ModelMerger) -> None:
        """Make the merged checkpoint in the directory of `merge`. The default merges every tensor once."""
        merge.write(self)


INTERFACES: dict[str, type] = {"trainer": Trainer, "reward": RewardFn, "sampler": Sampler, "merger": Merger}
"""The contract of each kind of plugin, by the name that the registry uses."""
