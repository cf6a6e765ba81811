"""The contract of a merger: one checkpoint made of several, tensor by tensor. Importing this imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf_core.config.base import BaseConfig

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.merging.merge import ModelMerger
    from rlhf_core.merging.streams import Chunk, TensorStream


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
