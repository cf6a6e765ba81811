"""The base of the conformance tests of every kind of plugin, and the checks of header and configuration that methods share.

A contract is a class whose methods `test_…` are its checks: each verifies one promise of a plugin. pytest collects subclasses of
a contract, and `rlhf check` runs them without pytest. A check that doesn't apply to a plugin is skipped with its reason.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar
from unittest import SkipTest

from rlhf_core import registry
from rlhf_core.config.base import BaseConfig
from rlhf_core.config.fields import every_option
from rlhf_core.infra.errors import ConfigError, did_you_mean
from rlhf_core.registry.class_header import SourceError, read_class_header

Test = Callable[[Any], None]


class Contract:
    """The checks of one plugin, of any kind. A check may be expected to fail."""

    kind: ClassVar[str]
    method: ClassVar[str | None] = None
    """Name of the plugin, as `rlhf list` shows it. A class can be given instead, in an attribute with the name of its kind."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options of the method, by name, that the checks run with."""
    expected_failures: ClassVar[Mapping[str, str]] = {}
    """Name of a check → why it fails. Such a check must fail: one that passes is reported as a failure."""

    _outcomes: ClassVar[dict[str, Exception | None]]
    """The results of checks that others depend on (see `after`), by name: the error, or None for a check that passed."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._outcomes = {}
        if unknown := sorted(set(cls.expected_failures) - set(cls.checks())):
            raise ConfigError(
                f"there is no check `{unknown[0]}`",
                place=f"{cls.__name__}.expected_failures",
                fix=did_you_mean(unknown[0], cls.checks()),
            )
        for name in cls.checks():
            cls._mark(name)

    @classmethod
    def checks(cls) -> list[str]:
        """Return the names of the checks: those of the base class first, each class's in the order of its source."""
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
                f"no {cls.kind} to test",
                place=cls.__name__,
                fix=f"set `method` to the name of a {cls.kind}, or `{cls.kind}` to a class",
            )
        return registry.get(cls.kind, cls.method)

    @classmethod
    def _mark(cls, name: str) -> None:
        """Mark a check for pytest as an expected failure, where it is one; remove an inherited mark where it isn't."""
        test = getattr(cls, name)
        plain = getattr(test, "_unmarked", test)
        if name not in cls.expected_failures:
            if plain is not test:
                setattr(cls, name, plain)
            return
        try:
            import pytest
        except ImportError:  # then only `run_contract` runs the checks, and that reads `expected_failures` itself
            return

        @functools.wraps(plain)
        def marked(self: Contract) -> None:
            plain(self)

        marked._unmarked = plain  # type: ignore[attr-defined]
        setattr(cls, name, pytest.mark.xfail(strict=True, reason=cls.expected_failures[name])(marked))


class MethodContract(Contract):
    """Base of the contracts of trainers, rewards, samplers and mergers: checks of the class's header and configuration."""

    def config(self) -> Any:
        """Return the plugin's configuration with `options`."""
        return self.subject().Config.parse(self.options, place=f"{type(self).__name__}.options")

    # Header and configuration

    def test_header_agrees_with_the_class(self) -> None:
        """The header that the registry reads from the source, without importing it, agrees with the class at run time."""
        cls = self.subject()
        target = f"{cls.__module__}:{cls.__qualname__}"
        if getattr(type(self), self.kind, None) is None and self.method is not None:
            target = registry.lookup(self.method, kind=self.kind).target
        if "<locals>" in target or cls.__module__ == "__main__":
            raise SkipTest(
                f"`{target}` isn't defined at the top level of an installed module, so the registry can't read its header"
            )
        try:
            header = read_class_header(target)
        except SourceError as error:
            raise AssertionError(f"the registry can't read the class's header: {error}") from None
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
        bare = [row.name for row in every_option(self.subject().Config) if not row.meaning.strip()]
        require(not bare, f"options without a description: {', '.join(bare)}; give each `Field(…, description=…)`")

    def test_configuration_survives_a_round_trip(self) -> None:
        """A configuration written as JSON reads back as itself."""
        config = self.config()
        text = config.model_dump_json()
        again = type(config).parse(json.loads(text))
        changed = [name for name in type(config).model_fields if getattr(again, name) != getattr(config, name)]
        require(
            not changed,
            f"options that change when the configuration is written as JSON and read again: {', '.join(changed)}"
            f" (JSON: {text[:200]})",
        )

    def test_schema_describes_the_configuration(self) -> None:
        """The JSON schema is complete: every option by its name, unknown ones refused, references resolved, defaults valid."""
        kind = self.subject().Config
        schema = json.loads(json.dumps(kind.model_json_schema()))
        _check_objects(schema, schema)
        require(
            schema.get("properties", {}).keys() == kind.model_fields.keys(),
            f"the JSON schema has the options {sorted(schema.get('properties', {}))}, the configuration"
            f" {sorted(kind.model_fields)}",
        )
        # Options that `options` doesn't set must have the schema's defaults. The ones it sets may be needed to make a valid
        # configuration at all, such as one of two that exclude each other.
        defaults = {name: about["default"] for name, about in schema["properties"].items() if "default" in about}
        options = {name: value for name, value in self.options.items() if name in kind.model_fields}
        require(
            kind.parse({**defaults, **options}) == kind.parse(options),
            "the defaults in the JSON schema differ from the configuration's",
        )


def after(*names: str) -> Callable[[Test], Test]:
    """Skip a check where one of the named checks, on which it depends, fails, so that one fault is reported once."""

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
    """Fail the check with this message unless the condition holds."""
    __tracebackhide__ = True  # pytest shows the check's line, not this one
    if not condition:
        raise AssertionError(message)


def is_number(value: object) -> bool:
    """Tell whether a value is a finite float or int; bools, tensors and numpy numbers aren't."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _outcome(contract: Contract, name: str) -> Exception | None:
    """Return the error of another check of the same contract, None where it passes; each is run once."""
    outcomes = type(contract)._outcomes
    if name not in outcomes:
        try:
            getattr(type(contract)(), name)()
            outcomes[name] = None
        except Exception as error:
            outcomes[name] = error
    return outcomes[name]


def _check_objects(node: Any, root: Mapping[str, Any]) -> None:
    """Fail unless a JSON schema's references resolve and each object with named options refuses unknown ones.

    Args:
        node: a part of the schema.
        root: the whole schema, into which references point.
    """
    if isinstance(node, dict):
        if isinstance(reference := node.get("$ref"), str):
            place: Any = root
            for part in reference.removeprefix("#/").split("/"):
                require(
                    isinstance(place, dict) and part in place,
                    f"the JSON schema's reference {reference} doesn't resolve",
                )
                place = place[part]
        if isinstance(node.get("properties"), dict) and node.get("type") == "object":
            require(
                node.get("additionalProperties") is False,
                f"`{node.get('title')}` accepts unknown options, so a misspelled one would be ignored; inherit"
                f" {BaseConfig.__name__}, and don't set `extra`",
            )
    children: Iterable[Any] = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        _check_objects(child, root)
