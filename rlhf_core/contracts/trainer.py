"""The contract of a method that trains.

A method states sums and what they are averaged over; the core owns data, devices, processes, denominators, the loop and
checkpoints. Importing this module imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, Unpack

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import ReferenceConfig, TrainerConfig, TrainingStage
from rlhf_core.contracts.callbacks import Callbacks, check_callbacks
from rlhf_core.infra.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_core.contracts.batch import Batch
    from rlhf_core.contracts.result import TrainResult
    from rlhf_core.data.encoded_data import EncodedData
    from rlhf_core.models.policy_model import PolicyModel
    from rlhf_core.models.reference import Reference
    from rlhf_core.training.context import RunContext
    from rlhf_core.training.loader import Loader

ConfigT = TypeVar("ConfigT", bound=TrainerConfig)
_ARGUMENTS = ("config", "model", "data", "eval_data", "output", "rewards", "tokenizer")
"""What a trainer is given besides callbacks."""


Pair = tuple["Tensor | float", "Tensor | float"]
"""(sum, count): a metric is their quotient over the whole step. Each is a number, or a tensor with one entry per prompt, (P,)."""


@dataclass(frozen=True)
class Role:
    """How a method uses one of its models."""

    trained: bool
    """Trained models get gradients, are checkpointed and exported; frozen ones are only read."""
    optional: bool = False
    """Whether `build` may leave it out, where the configuration needs no such model."""


TRAINED = Role(trained=True)
"""A role that `build` always returns and that is trained."""
FROZEN = Role(trained=False)
"""A role that `build` always returns and that is only read."""


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
    `responses` are pairs with one entry per response, (R,), which an online method's `rollouts.jsonl` shows for each completion;
    `logprob_gaps` makes the one that the core knows.
    """

    terms: Mapping[str, Tensor]
    metrics: Mapping[str, Pair] = field(default_factory=dict)
    responses: Mapping[str, Pair] = field(default_factory=dict)


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
    """The record type of its rows: a name in `rlhf_core.contracts.records.RECORDS`."""
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
    """The policy as it was passed in; set where `build` returns one."""
    callbacks: Callbacks
    """The functions that it was given, by name."""
    run_inputs: Mapping[str, Any] | None = None
    """Where the run comes from, set by the command line for the run directory: `config_input` (the file's text, or None)
    and `command` (as one shell line), both with secrets redacted, and `plugin` (its `Plugin.as_dict()`). None from Python."""

    def __init__(
        self,
        config: ConfigT | None = None,
        *,
        model: str | Path | PolicyModel | Any = None,
        data: Any = None,
        eval_data: Any = None,
        output: str | Path | None = None,
        rewards: Sequence[Any] | None = None,
        tokenizer: Any = None,
        **callbacks: Unpack[Callbacks],
    ) -> None:
        """Take what to train and on what; nothing is loaded or read before `train`.

        Args:
            config: options of the method; its defaults where None.
            model: a path or hub name; a loaded model, such as a `PolicyModel`; or a transformers model with its `tokenizer` (or
                the pair of them), which is trained in place: its own modules have the trained weights afterwards.
            data: rows of the record type `record`: a path, several paths, a hub name, a `datasets` object, or a list of rows.
            eval_data: rows held out, scored during training.
            output: the run directory. None keeps nothing on disk, so such a run can't be resumed.
            rewards: of a method that learns from rewards, in place of `config.rewards`: functions, `RewardFn` objects, names, or
                `RewardConfig`; a pair `(reward, weight)` gives one a weight.
            tokenizer: of a transformers model; every other `model` brings its own.
            callbacks: functions that are called at events of the run, by name: `on_step`, `on_evaluate` … (`Callbacks`).

        A leading `~` in a path is the home directory.

        Raises:
            ConfigError: no model or no data, a transformers model without a tokenizer, or a callback that can't be called.
        """
        # Names of other trainers' arguments first: who writes `train_dataset` has given data.
        check_callbacks(callbacks, type(self).__name__, _ARGUMENTS)
        for name, given in (("model", model), ("data", data)):
            if given is None:
                raise ConfigError(f"`{name}` is missing", place=type(self).__name__, fix=f"pass `{name}=…`")
        self.callbacks = callbacks
        self.config = config if config is not None else self.Config()  # type: ignore[assignment]
        self.model, self.data, self.eval_data = _with_tokenizer(model, tokenizer), data, eval_data
        self.output = Path(output).expanduser() if output is not None else None
        self.rewards = rewards

    @property
    def policy(self) -> PolicyModel:
        return self.models["policy"]  # type: ignore[return-value]

    @classmethod
    def record_type(cls, config: ConfigT) -> str:
        """Return the record type of a run's rows. The default is `record`; override it where options choose another."""
        return cls.record

    def inspect(self, data: EncodedData) -> None:
        """Check data against the built models, before anything is computed; raise `DataError` where the method can't use them.

        Called with the training data, and then with the held-out data where there are any. The default checks nothing.
        Where `data.streaming` is true, the rows aren't known yet.
        """

    def build(self, loader: Loader) -> Mapping[str, nn.Module | Reference]:
        """Return the models by role: all of `roles`, but for optional ones that the configuration makes unnecessary.

        `loader.main` gives the model that the run trains (its `model`), `loader.load` any other by path with its own options. A
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
        schedule runs over the batches of data. The core checks it. The default is 1, and of an online method the windows that
        `RunContext.windows` makes of a rollout.
        """
        config = self.config
        return config.rollout_epochs * config.minibatches if isinstance(config, OnlineConfig) else 1

    def experience(self, stream: Iterator[Batch], run: RunContext) -> Iterable[Window | Batch]:
        """Take batches from the data as needed; yield windows, each the work of one optimiser step. No gradients here.

        Here live reference log-probabilities, rollouts, rewards and advantages, attached as columns (`Batch.attach`), and
        every estimate over a whole window. The default yields each batch as it is; a plain batch means `Window(batch)`.

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
        """Return what each term of `loss` is averaged over in this micro-batch: how many tokens, sequences, or prompts it sums,
        or a constant where the sum is to be divided by the same number whatever the batch holds (such as a fixed length).

        Computed from the batch alone: the loop adds these up over the step before the first backward.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> Loss:
        """Return the loss terms of one micro-batch as sums, with gradients, and its metrics."""

    def evaluate(self, batch: Batch, run: RunContext) -> Evaluation:
        """Return the sums of one batch of held-out rows, without gradients.

        The default passes the batch through `experience` and `loss`. An online method, whose loss on its own completions doesn't
        measure their quality, overrides it: it generates, scores, and returns rewards as metrics with one entry per prompt.
        """
        return run.held_out_loss(batch)

    def summary(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Return figures of a whole held-out set that aren't averages (such as an area under a curve), from metrics per prompt.

        Args:
            values: for each such metric, sum / count of every held-out row, (rows,) float64 in the data's order.

        The default returns none. Names appear as `eval_NAME`.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return the method's own state that a checkpoint must hold, as JSON values. The default has none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state:
            raise NotImplementedError(f"{type(self).__name__} saves state but does not load it")

    def train(
        self, *, resume: bool = False, overwrite: bool = False, allow_change: Sequence[str] = (), quiet: bool = False
    ) -> TrainResult:
        """Run the loop to its end and return the result; never overridden.

        What the run does is shown on stderr: a line per step, a table per evaluation, a bar where there is a terminal, and a
        summary. A program that has set up logging itself (`rlhf_core.setup_logging`, or a level of INFO for the root logger)
        gets these as log records instead.

        Args:
            resume: continue the run in `output`, which more `max_steps` or `epochs` make longer.
            overwrite: replace the run in `output`.
            allow_change: options that a resumed run may change besides, by dotted names, such as `learning_rate`.
            quiet: show nothing but warnings.
        """
        from rlhf_core.training.shown_run import run_and_show

        return run_and_show(self, resume=resume, overwrite=overwrite, allow_change=allow_change, quiet=quiet)


def _with_tokenizer(model: Any, tokenizer: Any) -> Any:
    """Return a trainer's model: a path, a model, or the pair of a transformers model and its tokenizer.

    Raises:
        ConfigError: a tokenizer is missing, or there is one too many.
    """
    if isinstance(model, tuple | list):
        if len(model) != 2 or tokenizer is not None:
            problem = (
                "is the pair of a transformers model and its tokenizer, or one of them with the other as `tokenizer`"
            )
            raise ConfigError(problem, place="model", got=f"{len(model)} items")
        model, tokenizer = model
    foreign = hasattr(model, "get_input_embeddings")  # as all models of transformers and peft have, and none of ours
    if foreign and tokenizer is None:
        fix = "give its `tokenizer`, too: `AutoTokenizer.from_pretrained(...)`"
        raise ConfigError("a transformers model has no tokenizer with it", place="model", fix=fix)
    if tokenizer is not None and not foreign:
        fix = "leave it out: a path, a hub name and our own models bring theirs"
        raise ConfigError("is only for a transformers model", place="tokenizer", got=type(model).__name__, fix=fix)
    return (model, tokenizer) if foreign else model
