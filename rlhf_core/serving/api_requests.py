"""What clients send, checked: an option that isn't followed is refused by name, never accepted and ignored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, NoReturn, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, ValidationError

from rlhf_core.config.online import SamplingConfig
from rlhf_core.infra.errors import RLHFError, did_you_mean

MOST_CHOICES = 128
"""Largest `n`."""
MOST_TOP = 20
"""Largest `top_logprobs`, and largest `logprobs` of a text completion."""
MOST_PROMPTS = 2048
"""Most prompts in a request."""
MOST_STOPS = 32
"""Most stop strings in a request."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
}
"""Options of OpenAI's that aren't followed → the values that mean what is done anyway. Null does for every option."""

UNRELATED: Mapping[str, type] = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "prompt_cache_retention": str,
    "metadata": dict,
    "store": bool,
    "service_tier": str,
    "parallel_tool_calls": bool,
}
"""Options of OpenAI's that clients send by themselves and that can't change an answer (who asks, notes, what is kept, prices, how
tools are called where there are none) → what they are. They are taken."""


class RequestError(Exception):
    """A request that is refused.

    Args:
        param: the option that is the reason.
        status: of the HTTP answer.
        code: a word for programs.
    """

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str = "invalid_value"
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    def body(self) -> dict[str, Any]:
        """Return the answer's JSON value, in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def read_body(body: bytes) -> dict[str, Any]:
    """Return a request's JSON object.

    Raises:
        RequestError: it is none, or holds NaN, or nests too deeply.
    """

    def refused(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    try:
        found = json.loads(body, parse_constant=refused)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body isn't JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise RequestError("the body must be a JSON object", code="invalid_json")
    return found


def _whole(value: Any) -> Any:
    """Let a whole number in JSON's other writing, such as 1.0, be one."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[StrictInt, BeforeValidator(_whole)]
Number = StrictFloat | StrictInt


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: StrictBool = False


class GenerationRequest(BaseModel):
    """What chat and text completions have in common; names and meanings are OpenAI's, and those of `top_k` and `min_p` vLLM's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    default_max_tokens: ClassVar[int | None] = None
    """Most new tokens where a request doesn't say; None for all that the model has positions for."""

    model: str
    n: Whole = Field(1, ge=1, le=MOST_CHOICES)
    max_tokens: Whole | None = Field(None, ge=0)
    temperature: Number = Field(1.0, ge=0)
    top_p: Number = Field(1.0, gt=0, le=1)
    top_k: Whole = Field(0, ge=-1)
    min_p: Number = Field(0.0, ge=0, lt=1)
    seed: Whole | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] = Field(default_factory=list)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Return a request from its JSON object.

        Raises:
            RequestError: an option isn't known or followed, or a value is wrong.
        """
        given = {name: value for name, value in values.items() if value is not None}
        for name, value in values.items():
            if name in cls.model_fields:
                continue
            if name in UNRELATED:
                if value is not None and not isinstance(value, UNRELATED[name]):
                    raise RequestError(f"`{name}` is of a wrong type: got {type(value).__name__}", param=name)
            elif name in NEUTRAL:
                if value is not None and value not in NEUTRAL[name]:
                    raise RequestError(
                        f"`{name}` isn't supported: leave it out", param=name, code="unsupported_parameter"
                    )
            elif value is not None:
                hint = did_you_mean(name, cls.model_fields)
                raise RequestError(f"`{name}` isn't supported; {hint}", param=name, code="unsupported_parameter")
            given.pop(name, None)
        try:
            made = cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            wrong = ".".join(str(part) for part in first["loc"][:1])
            code = "missing_parameter" if first["type"] == "missing" else "invalid_value"
            raise RequestError(f"`{wrong}`: {first['msg']}", param=wrong or None, code=code) from None
        made.check()
        return made

    def check(self) -> None:
        """Refuse values that don't go together.

        Raises:
            RequestError: naming one of them.
        """
        if len(self.stops) > MOST_STOPS:
            raise RequestError(f"`stop`: at most {MOST_STOPS} texts", param="stop")
        if self.stream_options is not None and not self.stream:
            raise RequestError("`stream_options` has no meaning without `stream`", param="stream_options")
        self.sampling(1)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def top(self) -> int:
        """How many of the most likely tokens are wanted in the place of each token; `has_logprobs` tells whether any are."""
        raise NotImplementedError

    @property
    def has_logprobs(self) -> bool:
        raise NotImplementedError

    @property
    def most_tokens(self) -> int | None:
        """Most new tokens, as the request says; None where it doesn't."""
        return self.max_tokens

    def sampling(self, max_new_tokens: int) -> SamplingConfig:
        """Return how its tokens are drawn.

        Raises:
            RequestError: a value is out of its range.
        """
        try:
            values = {
                "max_new_tokens": max_new_tokens,
                "temperature": float(self.temperature),
                "top_p": float(self.top_p),
                "top_k": max(self.top_k, 0),
                "min_p": float(self.min_p),
                "stop": self.stops,
            }
            return SamplingConfig.parse(values, place="request")
        except RLHFError as error:
            raise RequestError(str(error)) from None
        except OverflowError:  # a whole number of hundreds of digits
            raise RequestError("`temperature`: is too large", param="temperature") from None


class ChatRequest(GenerationRequest):
    """`/v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: StrictBool = False
    top_logprobs: Whole = Field(0, ge=0, le=MOST_TOP)

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0:
            raise RequestError("`max_tokens` must be at least 1", param="max_tokens")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise RequestError("`max_tokens` and `max_completion_tokens` differ: give one", param="max_tokens")
        if self.top_logprobs and not self.logprobs:
            raise RequestError("`top_logprobs` has no meaning without `logprobs`", param="top_logprobs")
        self.turns()

    @property
    def top(self) -> int:
        return self.top_logprobs

    @property
    def has_logprobs(self) -> bool:
        return self.logprobs

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def turns(self) -> list[dict[str, str]]:
        """Return its messages, whose parts of text are joined.

        Raises:
            RequestError: a message has no role or text, or has what isn't followed, such as calls of tools or an image.
        """
        return [_turn(message, f"messages[{number}]") for number, message in enumerate(self.messages)]


def _turn(message: Mapping[str, Any], place: str) -> dict[str, str]:
    """Return a message with its role and text alone; see `ChatRequest.turns`."""
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, []):
            raise RequestError(f"`{place}.{name}` isn't supported", param="messages", code="unsupported_parameter")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RequestError(f"`{place}.role` must be a text", param="messages")
    if isinstance(content, list):
        content = "".join(_part(part, f"{place}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise RequestError(f"`{place}.content` must be a text, or a list of parts of text", param="messages")
    return {"role": role, "content": content}


def _part(part: Any, place: str) -> str:
    """Return the text of a part of a message."""
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(f"`{place}` must be text; got {kind!r}", param="messages", code="unsupported_parameter")


class TextRequest(GenerationRequest):
    """`/v1/completions`."""

    default_max_tokens: ClassVar[int | None] = 16

    prompt: str | list[str] | list[Whole] | list[list[Whole]]
    echo: StrictBool = False
    logprobs: Whole | None = Field(None, ge=0, le=MOST_TOP)

    def check(self) -> None:
        super().check()
        if not self.prompts():
            raise RequestError("`prompt` is empty", param="prompt")
        if len(self.prompts()) > MOST_PROMPTS:
            raise RequestError(f"`prompt`: at most {MOST_PROMPTS:,} prompts", param="prompt")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("`max_tokens` is 0, and nothing is echoed", param="max_tokens")
        if self.max_tokens == 0 and self.stream:
            raise RequestError("`max_tokens` is 0: nothing is drawn that could be streamed", param="stream")

    @property
    def top(self) -> int:
        return self.logprobs or 0

    @property
    def has_logprobs(self) -> bool:
        return self.logprobs is not None

    def prompts(self) -> Sequence[str | Sequence[int]]:
        """Return its prompts: texts, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        given: Any = self.prompt
        return [given] if given and isinstance(given[0], int) else given
