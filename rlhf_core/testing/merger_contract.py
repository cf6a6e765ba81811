"""What every merger promises, as tests to inherit.

class TestBlend(MergerContract):
    method = "acme-blend"  # a registered name, or `merger = BlendMerger`
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_core.contracts.merger import Merger
from rlhf_core.infra.errors import ConfigError
from rlhf_core.infra.files import replace_json
from rlhf_core.merging import CHUNK, MergeInput, merge_tensor
from rlhf_core.merging.one_tensor import merged_tensors, options_of
from rlhf_core.merging.streams import TensorStream
from rlhf_core.merging.tensor_reader import MemoryTensor
from rlhf_core.testing.contract import MethodContract, after, require
from rlhf_core.testing.option_values import other_values

NAME = "model.layers.0.mlp.up_proj.weight"
SHAPE = "test_shape_is_kept_in_float32"
OPTIONS = "test_options_of_a_model_are_its_own"
BITS = "test_the_same_inputs_give_the_same_bits"
_PIECES = (4, 64, CHUNK)
"""Elements of chunks: of a tensor of 384 elements these make many, a few and one."""


class MergerContract(MethodContract):
    """The conformance tests of a merger.

    A base is always given. A merger that refuses weights that differ, in `check_weights`, is tested with equal ones.
    """

    kind = "merger"
    merger: ClassVar[type[Merger] | None] = None
    """The class under test, in place of `method`."""
    models: ClassVar[int] = 3
    """Models that are merged, as far as the merger takes so many."""
    shape: ClassVar[tuple[int, ...]] = (24, 16)
    tolerance: ClassVar[float] = 1e-5
    """Largest difference, as a share of the largest value, that rounding may make in float32."""

    def own_options(self, folder: Path) -> Mapping[str, Sequence[Any]]:
        """Return for options in the merger's `per_model` a value for each model, not all alike.

        Numbers, booleans and choices are found without it; for others, such as files, which may be written to `folder`, it says
        what to test with.
        """
        return {}

    # What is merged

    def instance(self, *, neutral: bool = False, sort: bool = True, **options: Any) -> Merger:
        """Return a new merger with `options` over those of the contract.

        Args:
            neutral: with the merger's `neutral` options, too.
            sort: False leaves the models in the order given, where the merger is `commutative`, too.
            options: of the merger.
        """
        subject, config = self._found
        if not sort:
            subject = type(subject.__name__, (subject,), {"commutative": False})
        changes = {**(subject.neutral if neutral else {}), **options}
        return subject(config.updated(**changes) if changes else config)

    @functools.cached_property
    def _found(self) -> tuple[type[Merger], Any]:
        # Looked up once a test: each search for plugins takes a while.
        return self.subject(), self.config()

    def count(self) -> int:
        """Return how many models are merged: `models`, or the nearest number that the merger takes."""
        fewest, most = self._found[0].models
        return max(fewest, self.models if most is None else min(self.models, most))

    def tensors(self, *, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return a base, then one tensor a model: the base with differences of a tenth of its size."""
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(self.shape if shape is None else shape, generator=generator)
        moved = [base + 0.1 * torch.randn(base.shape, generator=generator) for _ in range(self.count())]
        return [tensor.to(dtype) for tensor in (base, *moved)]

    def weights(self) -> list[float]:
        """Return weights that sum to one: unequal ones where the merger takes them."""
        count = self.count()
        unequal = [2 * (number + 1) / (count * (count + 1)) for number in range(count)]
        try:
            self.instance().check_weights(unequal)
        except ConfigError:
            return [1 / count] * count
        return unequal

    def merged(
        self,
        order: Sequence[int] | None = None,
        *,
        merger: Merger | None = None,
        tensors: Sequence[Tensor] | None = None,
        weights: Sequence[float] | None = None,
        options: Sequence[Mapping[str, Any]] | None = None,
        inputs: Sequence[MergeInput] = (),
        name: str = NAME,
        chunk: int = CHUNK,
        based: bool = True,
    ) -> Tensor:
        """Return what is made of a base and models.

        Args:
            order: the models' numbers in the order in which they are given, all that is theirs with them.
            merger: a new one where None.
            tensors: the base's and the models'; those of `tensors` where None.
            weights: the models'; those of `weights` where None.
            options: each model's own.
            inputs: what is known of each model.
            name: the tensor's name.
            chunk: elements of a chunk, about.
            based: whether there is a base.
        """
        base, *models = self.tensors() if tensors is None else tensors
        numbers = range(self.count()) if order is None else order
        theirs, own = weights or self.weights(), options or [{}] * self.count()
        return merge_tensor(
            merger or self.instance(),
            [models[number] for number in numbers],
            [theirs[number] for number in numbers],
            base=base if based else None,
            options=[own[number] for number in numbers],
            inputs=inputs,
            name=name,
            chunk=chunk,
        )

    def same(self, found: Tensor, expected: Tensor, what: str) -> None:
        """Fail unless two tensors are equal within `tolerance`."""
        require(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
        require(bool(found.isfinite().all()), f"{what}: values that aren't finite")
        error = _apart(found, expected)
        require(
            error <= self.tolerance,
            f"{what}: off by {error:.1e} of the largest value ({self.tolerance:.0e} is allowed)",
        )

    def _orders(self) -> list[list[int]]:
        """Return other orders of the models."""
        numbers = list(range(self.count()))
        return [[*numbers[shift:], *numbers[:shift]] for shift in range(1, self.count())]

    # Values

    def test_shape_is_kept_in_float32(self) -> None:
        """Tensors of any shape and dtype merge into float32 of that shape, with finite values."""
        for shape in (self.shape, (7,), (2, 3, 4), (1,), ()):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                merged = self.merged(tensors=self.tensors(shape=shape, dtype=dtype))
                what = f"from {dtype} {shape}".replace("torch.", "")
                require(tuple(merged.shape) == shape, f"{what}: shape {tuple(merged.shape)}")
                require(bool(merged.isfinite().all()), f"{what}: values that aren't finite")

    @after(SHAPE)
    def test_the_base_is_needed_as_declared(self) -> None:
        """A merger that doesn't say `needs_base` merges without one."""
        if self._found[0].needs_base:
            return
        try:
            merged = self.merged(based=False)
        except Exception as error:
            raise AssertionError(f"without a base it fails, and doesn't declare `needs_base`: {error}") from error
        require(bool(merged.isfinite().all()), "without a base it gives values that aren't finite")

    @after(SHAPE)
    def test_copies_of_one_model_give_that_model(self) -> None:
        """Models that are all one merge into it: the base, another, or zeros, as new biases are. `neutral` counts."""
        base, model, *_ = self.tensors()
        zeros = torch.zeros_like(base)
        for start, one, what in (
            (base, base, "the base's copies"),
            (base, model, "a model's copies"),
            (zeros, zeros, "zeros, the base's copies"),
            (base, zeros, "zeros"),
        ):
            copies = [one.clone() for _ in range(self.count())]
            self.same(self.merged(tensors=[start, *copies], merger=self.instance(neutral=True)), one, what)

    @after(SHAPE)
    def test_weights_one_and_zero_select(self) -> None:
        """A model of weight one among models of weight zero comes out as it is. `neutral` counts."""
        _, *tensors = self.tensors()
        for chosen, tensor in enumerate(tensors):
            weights = [float(number == chosen) for number in range(self.count())]
            try:
                self.instance().check_weights(weights)
            except ConfigError as error:
                raise SkipTest(f"the merger takes no such weights: {error}") from None
            found = self.merged(weights=weights, merger=self.instance(neutral=True))
            self.same(found, tensor, f"weights {weights}")

    # What a merger may look at

    @after(SHAPE, BITS)
    def test_order_of_models_changes_nothing(self) -> None:
        """A merger that is `commutative` gives the same for models in any order; the same bits where they are put into theirs."""
        if not self._found[0].commutative:
            raise SkipTest("the order of models may mean something to it: it isn't `commutative`")
        expected, unsorted = self.merged(), self.merged(merger=self.instance(sort=False))
        for order in self._orders():
            self.same(self.merged(order, merger=self.instance(sort=False)), unsorted, "in another order")
            require(self.merged(order).equal(expected), "in another order: other bits, though models come as they did")

    @after(SHAPE)
    def test_options_of_a_model_are_its_own(self) -> None:
        """Options in `per_model` count, and for the model that has them, wherever it stands."""
        names = self._found[0].per_model
        plain = self.merged(merger=self.instance(sort=False))
        ordered = any(
            _apart(self.merged(order, merger=self.instance(sort=False)), plain) > self.tolerance
            for order in self._orders()
        )
        with tempfile.TemporaryDirectory() as folder:
            given = self.own_options(Path(folder))
            known = [name for name in names if name in given or [*_other_values(self._found[1], name)]]
            for name in known:
                own = self._own(name, given)
                shared = self.merged(options=[own[0]] * self.count())
                self.same(
                    shared, self.merged(merger=self.instance(**own[0])), f"`{name}` of every model, not of the method"
                )
                if ordered:  # models in another order mean something else
                    continue
                for sort in (True, False):
                    self._follows(own, name, sort)
        if unknown := [name for name in names if name not in known]:
            raise SkipTest(f"say in `own_options` what to test `{', '.join(unknown)}` with; the others are right")

    @after(SHAPE, OPTIONS)
    def test_every_option_counts(self) -> None:
        """Each option of the configuration changes what is merged, alone or where another one is changed."""
        subject, config = self._found
        with tempfile.TemporaryDirectory() as folder:
            given = self.own_options(Path(folder))
            values = {
                name: [*_other_values(config, name), *given.get(name, ())] for name in subject.Config.model_fields
            }
            around: list[dict[str, Any]] = [{}]
            around += [{name: value} for name, several in values.items() for value in several]
            idle = [name for name, several in values.items() if several and not self._counts(name, several, around)]
        if subject.merge is not Merger.merge and idle:
            raise SkipTest(f"`{', '.join(idle)}` may count in `merge`, which isn't tried here")
        require(not idle, f"`{', '.join(idle)}` changes nothing, whatever its value")
        if unknown := [name for name, several in values.items() if not several]:
            raise SkipTest(f"say in `own_options` what to test `{', '.join(unknown)}` with; the others count")

    def _counts(self, name: str, values: Sequence[Any], around: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether an option has a value that changes what is merged, in one of some surroundings."""
        for other in around:
            if name in other or (plain := self._model(other)) is None:
                continue
            for value in values:
                found = self._model({**other, name: value})
                if found is not None and not all(one.equal(was) for one, was in zip(found, plain, strict=True)):
                    return True
        return False

    def _model(self, options: Mapping[str, Any]) -> list[Tensor] | None:
        """Return a model of two tensors of several sizes, merged with options; None where they don't go together.

        The weights' sum is not one where the merger takes such: dividing by it then makes a difference.
        """
        try:
            merger = self.instance(**options)
            weights = self.weights()
            with suppress(ConfigError):
                merger.check_weights(heavier := [1.5 * weight for weight in weights])
                weights = heavier
            inputs = [
                MergeInput(f"model {number}", weight=weight, options=options_of(merger, {}), index=number)
                for number, weight in enumerate(weights)
            ]
            streams = []
            for number, size in enumerate((1.0, 3.0)):
                base, *models = (MemoryTensor(size * tensor) for tensor in self.tensors())
                name = f"model.layers.{number}.mlp.up_proj.weight"
                seed = int(getattr(merger.config, "seed", 0))
                streams.append(TensorStream(name, base, models, inputs, merger=merger, seed=seed))
            return merged_tensors(merger, streams)
        except ConfigError:
            return None

    def _follows(self, own: Sequence[Mapping[str, Any]], name: str, sort: bool) -> None:
        """Check that models in another order bring their options with them."""
        expected = self.merged(options=own, merger=self.instance(sort=sort))
        for order in self._orders():
            found = self.merged(order, options=own, merger=self.instance(sort=sort))
            self.same(found, expected, f"in another order, with `{name}` of a model")

    def _own(self, name: str, given: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """Return options of models, one of them such that it changes what is merged."""
        rest = [{other: given[other][number] for other in given if other != name} for number in range(self.count())]
        if name in given:
            trials = [[{**own, name: value} for own, value in zip(rest, given[name], strict=True)]]
        else:
            trials = [[{**rest[0], name: value}, *rest[1:]] for value in _other_values(self._found[1], name)]
        without = self.merged(options=rest)
        for own in trials:
            if not self.merged(options=own).equal(without):
                return own
        tried = ", ".join(str(own[0][name]) for own in trials)
        raise AssertionError(f"`{name}` of a model changes nothing (tried {tried})")

    @after(SHAPE)
    def test_chunks_of_any_size_give_the_same_tensor(self) -> None:
        """How a tensor is cut into chunks changes nothing: what needs the whole is measured, or a chunk is a whole tensor."""
        *cut, whole = (self.merged(chunk=size) for size in _PIECES)
        for size, found in zip(_PIECES, cut, strict=False):
            self.same(found, whole, f"in chunks of about {size} elements")

    @after(SHAPE, BITS)
    def test_tensors_do_not_depend_on_one_another(self) -> None:
        """A tensor comes out the same, bit for bit, whatever was merged before it by the same merger."""
        merger, other = self.instance(), [3 * tensor.flip(0) for tensor in self.tensors()]
        self.merged(merger=merger, tensors=other, name="model.layers.1.mlp.up_proj.weight")
        require(self.merged(merger=merger).equal(self.merged()), "merged after another, a tensor comes out otherwise")

    @after(SHAPE)
    def test_inputs_are_left_alone(self) -> None:
        """Merging changes nothing of its inputs: neither tensors nor options nor what lies in the models' directories."""
        with tempfile.TemporaryDirectory() as folder:
            base, *tensors = self.tensors()
            inputs = [_written(Path(folder), number, tensor) for number, tensor in enumerate(tensors)]
            given = self.own_options(Path(folder))
            options = [{name: values[number] for name, values in given.items()} for number in range(self.count())]
            merger = self.instance()
            before = [tensor.clone() for tensor in (base, *tensors)], copy.deepcopy(options), _files(Path(folder))
            config = merger.config.model_copy(deep=True)
            for own in (options, None):
                self.merged(merger=merger, tensors=[base, *tensors], options=own, inputs=inputs)
            olds = zip(before[0], (base, *tensors), strict=True)
            changed = [
                f"tensor {number} (the base is 0)" for number, (old, new) in enumerate(olds) if not old.equal(new)
            ]
            changed += ["a model's options"] * (options != before[1]) + ["its own options"] * (merger.config != config)
            now = _files(Path(folder))
            changed += [
                str(path.relative_to(folder)) for path in {**before[2], **now} if before[2].get(path) != now.get(path)
            ]
            require(not changed, f"merging changes {', '.join(changed)}")

    @after(SHAPE)
    def test_the_same_inputs_give_the_same_bits(self) -> None:
        """Merging again gives the same tensor, whatever else drew random numbers."""
        first = self.merged()
        torch.rand(1)
        require(self.merged().equal(first), "another tensor")


def _apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value; of one where all are zero."""
    return float((found - expected.float()).abs().max()) / (float(expected.float().abs().max()) or 1.0)


def _other_values(config: Any, name: str) -> Iterator[Any]:
    """Yield values of an option that the configuration accepts, other than its own."""
    for value in other_values(type(config).model_fields[name].annotation, getattr(config, name)):
        with suppress(ConfigError):
            config.updated(**{name: value})
            yield value


def _written(folder: Path, number: int, tensor: Tensor) -> MergeInput:
    """Return a model with a directory in which its tensor lies."""
    path = folder / f"model-{number}"
    path.mkdir()
    save_file({NAME: tensor}, path / "model.safetensors", metadata={"format": "pt"})
    replace_json(path / "config.json", {"model_type": "llama"})
    return MergeInput(str(path), path, index=number)


def _files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
