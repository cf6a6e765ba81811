"""The conformance tests of mergers: a class to inherit.

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
_CHUNK_SIZES = (4, 64, CHUNK)
"""Elements per chunk: they divide a tensor of 384 elements into many chunks, a few, and one."""


class MergerContract(MethodContract):
    """The conformance tests of a merger, on small tensors in memory.

    A base is given, but for the check that merges without one. Weights are unequal where the merger's `check_weights` accepts
    that.
    """

    kind = "merger"
    merger: ClassVar[type[Merger] | None] = None
    """The class under test, in place of `method`."""
    models: ClassVar[int] = 3
    """Number of models that are merged, within what the merger's `models` allows."""
    shape: ClassVar[tuple[int, ...]] = (24, 16)
    tolerance: ClassVar[float] = 1e-5
    """Largest difference that rounding in float32 may make, as a share of the largest value."""

    def own_options(self, folder: Path) -> Mapping[str, Sequence[Any]]:
        """Return values to test options in the merger's `per_model` with: for each option one value per model, not all equal.

        Numbers, booleans and choices are found without it. Override it for other types, such as files.

        Args:
            folder: a directory for files that the values name.
        """
        return {}

    # Fixtures

    def instance(self, *, neutral: bool = False, sort: bool = True, **options: Any) -> Merger:
        """Return a new merger.

        Args:
            neutral: whether it has the options of its `neutral`.
            sort: False declares it not `commutative`, so that models come in the order in which they are given.
            options: override those of the contract and of `neutral`.
        """
        subject, config = self._found
        if not sort:
            subject = type(subject.__name__, (subject,), {"commutative": False})
        changes = {**(subject.neutral if neutral else {}), **options}
        return subject(config.updated(**changes) if changes else config)

    @functools.cached_property
    def _found(self) -> tuple[type[Merger], Any]:
        """The merger's class and its configuration, looked up once per check, since searching plugins takes a while."""
        return self.subject(), self.config()

    def count(self) -> int:
        """Return how many models are merged: `models`, or the nearest number that the merger allows."""
        fewest, most = self._found[0].models
        return max(fewest, self.models if most is None else min(self.models, most))

    def tensors(self, *, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Return the base's tensor, then each model's: the base plus random differences of a tenth of its size."""
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(self.shape if shape is None else shape, generator=generator)
        moved = [base + 0.1 * torch.randn(base.shape, generator=generator) for _ in range(self.count())]
        return [tensor.to(dtype) for tensor in (base, *moved)]

    def weights(self) -> list[float]:
        """Return the models' weights, of sum one: unequal ones where the merger accepts them."""
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
        """Return one tensor, merged.

        Args:
            order: the models' numbers in the order in which they are given, with their weights and options; as they are where
                None.
            merger: a new one where None.
            tensors: the base's tensor, then the models'; those of the method `tensors` where None.
            weights: the models' weights; those of the method `weights` where None.
            options: each model's own options.
            inputs: each model's name, path and so on.
            name: the tensor's name.
            chunk: elements per chunk, approximately.
            based: whether a base is given.
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
        require(
            found.shape == expected.shape,
            f"{what}: the merged tensor has the shape {tuple(found.shape)} instead of {tuple(expected.shape)}",
        )
        require(bool(found.isfinite().all()), f"{what}: the merged tensor has values that aren't finite")
        error = _apart(found, expected)
        require(
            error <= self.tolerance,
            f"{what}: the merged tensor is off by {error:.1e} of its largest value ({self.tolerance:.0e} is allowed)",
        )

    def _orders(self) -> list[list[int]]:
        """Return the other orders in which to give the models: every rotation of their indices but the identity."""
        numbers = list(range(self.count()))
        return [[*numbers[shift:], *numbers[:shift]] for shift in range(1, self.count())]

    # Values

    def test_shape_is_kept_in_float32(self) -> None:
        """Tensors of several shapes and dtypes are merged into float32 tensors of their shape, with finite values."""
        for shape in (self.shape, (7,), (2, 3, 4), (1,), ()):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                merged = self.merged(tensors=self.tensors(shape=shape, dtype=dtype))
                what = f"from {dtype} {shape}".replace("torch.", "")
                require(
                    tuple(merged.shape) == shape, f"{what} tensors: the merged one has the shape {tuple(merged.shape)}"
                )
                require(bool(merged.isfinite().all()), f"{what} tensors: the merged one has values that aren't finite")

    @after(SHAPE)
    def test_the_base_is_needed_as_declared(self) -> None:
        """A merger that doesn't declare `needs_base` merges models without a base."""
        if self._found[0].needs_base:
            return
        try:
            merged = self.merged(based=False)
        except Exception as error:
            raise AssertionError(
                f"the merger fails without a base, and doesn't declare `needs_base = True`: {error}"
            ) from error
        require(bool(merged.isfinite().all()), "without a base, the merged tensor has values that aren't finite")

    @after(SHAPE)
    def test_copies_of_one_model_give_that_model(self) -> None:
        """Copies of one model merge into that model (the base, another, or zeros), with the options of `neutral`."""
        base, model, *_ = self.tensors()
        zeros = torch.zeros_like(base)
        for start, one, what in (
            (base, base, "copies of the base"),
            (base, model, "copies of a model"),
            (zeros, zeros, "copies of a base of zeros"),
            (base, zeros, "copies of a model of zeros"),
        ):
            copies = [one.clone() for _ in range(self.count())]
            self.same(self.merged(tensors=[start, *copies], merger=self.instance(neutral=True)), one, what)

    @after(SHAPE)
    def test_weights_one_and_zero_select(self) -> None:
        """A model of weight 1 among models of weight 0 is the result, with the options of `neutral`."""
        _, *tensors = self.tensors()
        for chosen, tensor in enumerate(tensors):
            weights = [float(number == chosen) for number in range(self.count())]
            try:
                self.instance().check_weights(weights)
            except ConfigError as error:
                raise SkipTest(f"the merger refuses weights of 0 and 1: {error}") from None
            found = self.merged(weights=weights, merger=self.instance(neutral=True))
            self.same(found, tensor, f"with the weights {weights}")

    # What a merger may depend on

    @after(SHAPE, BITS)
    def test_order_of_models_changes_nothing(self) -> None:
        """A `commutative` merger gives the same for models in any order, and the same bits as the core sorts them."""
        if not self._found[0].commutative:
            raise SkipTest("the merger isn't `commutative`, so the order of models may matter")
        expected, unsorted = self.merged(), self.merged(merger=self.instance(sort=False))
        for order in self._orders():
            self.same(
                self.merged(order, merger=self.instance(sort=False)), unsorted, "with the models in another order"
            )
            require(
                self.merged(order).equal(expected),
                "with the models in another order, the merged tensor has different bits, though the core sorts the models",
            )

    @after(SHAPE)
    def test_options_of_a_model_are_its_own(self) -> None:
        """An option in `per_model` has an effect, and for the model that it is given for, whatever the order of the models."""
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
                    shared,
                    self.merged(merger=self.instance(**own[0])),
                    f"`{name}` given for every model instead of for all at once",
                )
                if ordered:  # the order of models matters to this merger
                    continue
                for sort in (True, False):
                    self._check_follows_model(own, name, sort)
        if unknown := [name for name in names if name not in known]:
            raise SkipTest(
                f"return values of `{', '.join(unknown)}` from `own_options` to test them; the other options pass"
            )

    @after(SHAPE, OPTIONS)
    def test_every_option_does_something(self) -> None:
        """Each option of the configuration changes the merged tensors, alone or beside a change of another option."""
        subject, config = self._found
        with tempfile.TemporaryDirectory() as folder:
            given = self.own_options(Path(folder))
            values = {
                name: [*_other_values(config, name), *given.get(name, ())] for name in subject.Config.model_fields
            }
            around: list[dict[str, Any]] = [{}]
            around += [{name: value} for name, several in values.items() for value in several]
            idle = [name for name, several in values.items() if several and not self._has_effect(name, several, around)]
        if subject.merge is not Merger.merge and idle:
            raise SkipTest(f"`{', '.join(idle)}` may have an effect in `merge`, which this check doesn't call")
        require(not idle, f"options without any effect: {', '.join(idle)}; use or remove each")
        if unknown := [name for name, several in values.items() if not several]:
            raise SkipTest(
                f"return values of `{', '.join(unknown)}` from `own_options` to test them; the other options have an effect"
            )

    def _has_effect(self, name: str, values: Sequence[Any], around: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether one of an option's values changes the merged tensors, beside one of several changes of other options."""
        for other in around:
            if name in other or (plain := self._model(other)) is None:
                continue
            for value in values:
                found = self._model({**other, name: value})
                if found is not None and not all(one.equal(was) for one, was in zip(found, plain, strict=True)):
                    return True
        return False

    def _model(self, options: Mapping[str, Any]) -> list[Tensor] | None:
        """Return a merged model of two tensors; None where the merger refuses the options.

        The weights don't sum to one where the merger accepts that, so that options about dividing by the sum have an effect.
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

    def _check_follows_model(self, own: Sequence[Mapping[str, Any]], name: str, sort: bool) -> None:
        """Fail unless an option that is given for one model keeps its effect on that model as the order of models changes."""
        expected = self.merged(options=own, merger=self.instance(sort=sort))
        for order in self._orders():
            found = self.merged(order, options=own, merger=self.instance(sort=sort))
            self.same(found, expected, f"with the models in another order and `{name}` given for a model")

    def _own(self, name: str, given: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """Return each model's own options, among them a value of the named one that changes the merged tensor."""
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
        raise AssertionError(f"`{name}` given for one model has no effect (tried {tried})")

    @after(SHAPE)
    def test_chunks_of_any_size_give_the_same_tensor(self) -> None:
        """A tensor merged in chunks of any size equals the tensor merged whole; a merger that needs all values uses `measure`."""
        *cut, whole = (self.merged(chunk=size) for size in _CHUNK_SIZES)
        for size, found in zip(_CHUNK_SIZES, cut, strict=False):
            self.same(found, whole, f"in chunks of about {size} elements")

    @after(SHAPE, BITS)
    def test_tensors_do_not_depend_on_one_another(self) -> None:
        """A merged tensor has the same bits whatever the same merger merged before it."""
        merger, other = self.instance(), [3 * tensor.flip(0) for tensor in self.tensors()]
        self.merged(merger=merger, tensors=other, name="model.layers.1.mlp.up_proj.weight")
        require(
            self.merged(merger=merger).equal(self.merged()),
            "a tensor has different bits when the merger has merged another tensor before: keep nothing in `self`",
        )

    @after(SHAPE)
    def test_inputs_do_not_change(self) -> None:
        """Merging changes none of its inputs: no tensors, no options, no files in the models' directories."""
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
            changed += ["a model's options"] * (options != before[1]) + ["the merger's configuration"] * (
                merger.config != config
            )
            now = _files(Path(folder))
            changed += [
                str(path.relative_to(folder)) for path in {**before[2], **now} if before[2].get(path) != now.get(path)
            ]
            require(not changed, f"merging changes its inputs: {', '.join(changed)}")

    @after(SHAPE)
    def test_the_same_inputs_give_the_same_bits(self) -> None:
        """Merging again gives the same bits, whatever the state of the global random generators."""
        first = self.merged()
        torch.rand(1)
        require(
            self.merged().equal(first), "merging the same inputs again gives different bits: draw from `chunk.random`"
        )


def _apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest expected value, or itself where all of these are zero."""
    return float((found - expected.float()).abs().max()) / (float(expected.float().abs().max()) or 1.0)


def _other_values(config: Any, name: str) -> Iterator[Any]:
    """Yield values of an option that the configuration accepts, other than its own."""
    for value in other_values(type(config).model_fields[name].annotation, getattr(config, name)):
        with suppress(ConfigError):
            config.updated(**{name: value})
            yield value


def _written(folder: Path, number: int, tensor: Tensor) -> MergeInput:
    """Write a model directory that holds a tensor, and return it as an input of a merge."""
    path = folder / f"model-{number}"
    path.mkdir()
    save_file({NAME: tensor}, path / "model.safetensors", metadata={"format": "pt"})
    replace_json(path / "config.json", {"model_type": "llama"})
    return MergeInput(str(path), path, index=number)


def _files(folder: Path) -> dict[Path, bytes]:
    """Return the contents of every file below a directory."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
