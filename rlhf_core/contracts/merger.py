"""The contract of a merger: it merges several models into one, tensor by tensor. Importing this imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_core.config.base import BaseConfig

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_core.merging.merge import ModelMerger
    from rlhf_core.merging.streams import Chunk, TensorStream


class Merger(ABC):
    """A way to make one model of several. The core streams the input models' tensors through it and writes the result.

    `merge_chunk` merges a chunk of one tensor; `measure` reads the whole tensor first where that is needed, and `survey` all
    tensors. `chunk.tensors` are in the order in which the user gave the models (but see `commutative`), and `chunk.inputs`
    hold each model's name, path, weight and options. A method that must evaluate what it makes overrides `merge`.
    """

    api: ClassVar[int]
    Config: ClassVar[type[BaseConfig]] = BaseConfig
    needs_base: ClassVar[bool] = False
    """Whether it works on differences from a base model, which must then be given."""
    ignores_base: ClassVar[bool] = False
    """Whether a base model's weights are never read; it then gives only its configuration and tokenizer."""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """The fewest and the most models that it merges, the base not counted; None sets no bound."""
    commutative: ClassVar[bool] = False
    """Whether the result is the same for any order of the models. They are then sorted by their values, so that any order
    makes the same bits; `chunk.inputs` are sorted with them."""
    chunk_shape: ClassVar[Literal["flat", "rows", "tensor"]] = "flat"
    """Shape of a chunk: `flat` is a run of elements, (N,), `rows` whole rows, (rows, columns), `tensor` the whole tensor in its
    own shape, of which by default at most four merge at once."""
    per_model: ClassVar[tuple[str, ...]] = ()
    """Options of `Config`, of any type, that may differ between models. `chunk.inputs[i].options` and `stream.option(name)` hold
    each model's value. Declare a file as a field of type `Path`: a resumed merge is then refused where the file has changed."""
    replay: ClassVar[str | None] = None
    """For a method that selects among the models: the name of the method that merges the selected ones to the same result."""
    neutral: ClassVar[Mapping[str, Any]] = {}
    """Options under which copies of a model merge into that model, as the conformance kit tests; other values of them may leave
    entries out or scale differences."""

    def __init__(self, config: BaseConfig | None = None) -> None:
        self.config = config if config is not None else self.Config()

    def check_weights(self, weights: Sequence[float]) -> None:  # noqa: B027
        """Raise `ConfigError` where the method can't use these weights of a tensor. Called before anything is read."""

    def survey(self, streams: Iterable[TensorStream]) -> Any:
        """Read all tensors before the first is merged; every stream then has what is returned as `stream.surveyed`.

        `streams` may be iterated several times. The default reads nothing.
        """
        return None

    def measure(self, stream: TensorStream) -> Any:
        """Return what `merge_chunk` needs of the whole tensor, such as a threshold, from one or more passes; None by default."""
        return None

    @abstractmethod
    def merge_chunk(self, chunk: Chunk, measured: Any) -> Tensor:
        """Return the merged elements of a chunk, float32, in the chunk's shape; it may be one of the chunk's own tensors.

        Several tensors are merged at once, in forked processes or in threads, so nothing may be stored in `self`: threads share
        it, processes don't. A method must not start processes.

        Args:
            chunk: neighbouring elements of one tensor of each model, and of the base model where there is one.
            measured: what `measure` returned for the tensor.
        """

    def merge(self, merge: ModelMerger) -> None:
        """Write the merged model to the directory of `merge`. The default merges every tensor once."""
        merge.write(self)
