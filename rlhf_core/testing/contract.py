"""What every kind's contract shares: what is tested, expected failures, and of methods the checks of header and configuration.

A contract is a class whose methods `test_…` each prove one promise. pytest collects its subclasses, and `rlhf check` runs them
without pytest. A check that has nothing to look at is skipped and says why; it never passes unseen.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, get_args
from unittest import SkipTest

from pydantic import BaseModel

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig
from rlhf_core.infra.errors import ConfigError, RLHFError, did_you_mean
from rlhf_core.registry.class_header import SourceError, read_class_header

Test = Callable[[Any], None]


class Contract:
    """What every contract is: checks of one plugin, some of which may be expected to fail."""

    kind: ClassVar[str]
    method: ClassVar[str | None] = None
    """Name of the plugin, as `rlhf list` shows it. In its place a class can be given, under the name of its kind."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options of the method, by name, that the checks run with."""
    expected_failures: ClassVar[Mapping[str, str]] = {}
    """Test → why it fails. Such a test must fail: one that passes is reported as an error."""

    _outcomes: ClassVar[dict[str, Exception | None]]
    """How the tests that others build on ended."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._outcomes = {}
        if unknown := sorted(set(cls.expected_failures) - set(cls.checks())):
            raise ConfigError(
                f"no test is called `{unknown[0]}`",
                place=f"{cls.__name__}.expected_failures",
                fix=did_you_mean(unknown[0], cls.checks()),
            )
        for name in cls.checks():
            cls._mark(name)

    @classmethod
    def checks(cls) -> list[str]:
        """Return the names of the checks, those of the base first, in the order in which they stand."""
        classes = [one for one in reversed(cls.__mro__) if one is not object]
        return list(dict.fromkeys(name for one in classes for name in vars(one) if name.startswith("test_")))

    @classmethod
    def subject(cls) -> Any:
        """Return the class under test.

        Raises:
            ConfigError: neither a name nor a class is given.
        """
        given = getattr(cls, cls.kind, None)
        if given is not None:
            return given
        if cls.method is None:
            raise ConfigError(
                f"nothing to test: give `method`, a {cls.kind}'s name, or `{cls.kind}`, a class", place=cls.__name__
            )
        return registry.get(cls.kind, cls.method)

    @classmethod
    def _mark(cls, name: str) -> None:
        """Give a class's own copy of a test the mark that tells pytest of an expected failure."""
        test = getattr(cls, name)
        plain = getattr(test, "_unmarked", test)
        if name not in cls.expected_failures:
            if plain is not test:
                setattr(cls, name, plain)
            return
        try:
            import pytest
        except ImportError:  # then only `run_contract` runs this class, which reads `expected_failures` itself
            return

        @functools.wraps(plain)
        def marked(self: Contract) -> None:
            plain(self)

        marked._unmarked = plain  # type: ignore[attr-defined]
        setattr(cls, name, pytest.mark.xfail(strict=True, reason=cls.expected_failures[name])(marked))


class MethodContract(Contract):
    """The base of the contracts of methods. Inherit one of them, and name what it is to test."""

    def config(self) -> Any:
        """Return the method's configuration with `options`."""
        return self.subject().Config.parse(self.options, place=f"{type(self).__name__}.options")

    # What a plugin says of itself

    def test_header_is_the_class(self) -> None:
        """What the registry reads from the source, without importing it, is what the class is."""
        cls = self.subject()
        target = f"{cls.__module__}:{cls.__qualname__}"
        if getattr(type(self), self.kind, None) is None and self.method is not None:
            target = registry.lookup(self.method, kind=self.kind).target
        if "<locals>" in target or cls.__module__ == "__main__":
            raise SkipTest(f"`{target}` isn't defined at the top of an installed module: it has no header to read")
        try:
            header = read_class_header(target)
        except SourceError as error:
            raise AssertionError(f"the header can't be read: {error}") from None
        summary = inspect.cleandoc(cls.__doc__ or "").strip().split("\n")[0]
        require(bool(summary), f"{cls.__name__} has no docstring; its first line is the summary in `rlhf list`")
        stated = {"summary": header.summary, "api": header.api}
        found = {"summary": summary, "api": getattr(cls, "api", None)}
        if self.kind == "trainer":
            stated |= {"record": header.record, "stage": header.stage}
            found |= {"record": getattr(cls, "record", None), "stage": getattr(cls, "stage", None)}
        for name, value in found.items():
            require(
                stated[name] == value,
                f"`{name}` is {stated[name]!r} in the source {header.path}:{header.line} and {value!r} at run time;"
                " write it as a literal in the class body",
            )

    def test_every_option_is_described(self) -> None:
        """Each field of the configuration, those of its groups too, has a description."""
        bare = [name for name, description in _described(self.subject().Config) if not (description or "").strip()]
        require(not bare, f"no description: {', '.join(bare)}")

    def test_configuration_survives_a_round_trip(self) -> None:
        """A configuration written as JSON reads back as itself."""
        config = self.config()
        text = config.model_dump_json()
        again = type(config).parse(json.loads(text))
        changed = [name for name in type(config).model_fields if getattr(again, name) != getattr(config, name)]
        require(not changed, f"changed by writing and reading: {', '.join(changed)} (written as {text[:200]})")

    def test_schema_describes_the_configuration(self) -> None:
        """The JSON schema is whole: every option by its name, unknown ones refused, references resolved, defaults valid."""
        kind = self.subject().Config
        schema = json.loads(json.dumps(kind.model_json_schema()))
        _check_objects(schema, schema)
        require(
            schema.get("properties", {}).keys() == kind.model_fields.keys(),
            f"the schema names {sorted(schema.get('properties', {}))}, the configuration {sorted(kind.model_fields)}",
        )
        # What `options` leave out must be at the schema's defaults what it is in the configuration; some are needed, such as one
        # of two that exclude each other.
        defaults = {name: about["default"] for name, about in schema["properties"].items() if "default" in about}
        options = {name: value for name, value in self.options.items() if name in kind.model_fields}
        require(
            kind.parse({**defaults, **options}) == kind.parse(options),
            "the schema's defaults are not the configuration's",
        )


def after(*names: str) -> Callable[[Test], Test]:
    """Skip a test where one that it builds on fails, so that one fault is reported once."""

    def decorate(test: Test) -> Test:
        @functools.wraps(test)
        def guarded(self: Contract) -> None:
            for name in names:
                if (error := _outcome(self, name)) is not None:
                    first = str(error).partition("\n")[0]
                    raise SkipTest(first if isinstance(error, SkipTest) else f"{name} fails: {first}")
            test(self)

        return guarded

    return decorate


def require(condition: bool, message: str) -> None:
    """Fail the test with this message unless the condition holds."""
    __tracebackhide__ = True  # pytest shows the check's line, not this one
    if not condition:
        raise AssertionError(message)


def is_number(value: object) -> bool:
    """Tell whether a value is a finite float (or int) and nothing that only looks like one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _outcome(contract: Contract, name: str) -> Exception | None:
    outcomes = type(contract)._outcomes
    if name not in outcomes:
        try:
            getattr(type(contract)(), name)()
            outcomes[name] = None
        except Exception as error:
            outcomes[name] = error
    return outcomes[name]


def _described(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    for name, field in config.model_fields.items():
        yield f"{prefix}{name}", field.description
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _described(part, f"{prefix}{name}.")


def _check_objects(node: Any, root: Mapping[str, Any]) -> None:
    """Check that references resolve and that every object of named options refuses others."""
    if isinstance(node, dict):
        if isinstance(reference := node.get("$ref"), str):
            place: Any = root
            for part in reference.removeprefix("#/").split("/"):
                require(isinstance(place, dict) and part in place, f"the schema's reference {reference} leads nowhere")
                place = place[part]
        if isinstance(node.get("properties"), dict) and node.get("type") == "object":
            require(
                node.get("additionalProperties") is False,
                f"`{node.get('title')}` accepts options that it doesn't know; inherit {BaseConfig.__name__}, and leave"
                " `extra` as it is",
            )
    children: Iterable[Any] = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        _check_objects(child, root)


def describe_error(error: BaseException) -> str:
    """Return one line on why a check failed."""
    if isinstance(error, AssertionError):
        text = str(error) or "assertion failed"
    elif isinstance(error, RLHFError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}"
    return " ".join(text.split())
