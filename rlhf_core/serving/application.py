"""The addresses under /v1, as an ASGI application: who may ask, what is asked, and how answers are sent."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_core.config.base import BaseConfig
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.generation.engine import prompt_key
from rlhf_core.infra.errors import RLHFError
from rlhf_core.infra.seeds import completion_seeds
from rlhf_core.serving.api_answers import AnswerFrame, TokenLogprobs, Usage, finish_reason
from rlhf_core.serving.api_requests import ChatRequest, GenerationRequest, RequestError, TextRequest, read_body
from rlhf_core.serving.generation_worker import (
    Event,
    Failure,
    GenerationWorker,
    Job,
    Piece,
    ScoredPrompt,
    Stopping,
    Wanted,
)
from rlhf_core.serving.prompt_reader import PromptReader, ReadPrompt
from rlhf_core.serving.sampler_worker import SamplerJob, SamplerWorker

if TYPE_CHECKING:
    from rlhf_core.models.policy_model import PolicyModel

log = logging.getLogger(__name__)

_DRAWN_AS = ("temperature", "top_p", "top_k", "min_p", "stop")
"""Options of a request that are options of drawing."""
MOST_BYTES = 8 * 2**20
"""Most bytes of a request's body."""
BODY_SECONDS = 60.0
"""Most seconds in which a body must have come."""


@dataclass(frozen=True)
class ServedModel:
    """What is served, and how much of it at once."""

    policy: PolicyModel
    name: str
    """The model's name, which every request gives."""
    token: str
    """Which every request bears."""
    hosts: Sequence[str]
    """Values of the header `Host` that are answered, without ports."""
    most_waiting: int
    """Most completions that are being drawn or wait for it, of all clients; further requests are refused with 429."""
    created: int = field(default_factory=lambda: int(time.time()))

    def as_json(self) -> dict[str, Any]:
        """Return its entry in /v1/models."""
        entry = {"id": self.name, "object": "model", "created": self.created, "owned_by": "rlhf"}
        return entry | ({"max_model_len": self.policy.max_positions} if self.policy.max_positions else {})


@dataclass
class _Asked:
    """A request whose prompts are read."""

    request: GenerationRequest
    prompts: Sequence[ReadPrompt]
    job: Job
    events: asyncio.Queue[Event]

    @property
    def owners(self) -> Sequence[ReadPrompt]:
        """The prompt of each choice: a prompt's choices follow each other."""
        return [prompt for prompt in self.prompts for _ in range(self.request.n)]


class Application:
    """Answers requests with what a worker draws. `asgi` is the application.

    Args:
        worker: started, and stopped, by whoever made it.
        sampler: which the worker answers by, whole answers alone; None for the policy's own draws.
    """

    def __init__(
        self, model: ServedModel, worker: GenerationWorker | SamplerWorker, sampler: Sampler | None = None
    ) -> None:
        self._model, self._worker, self._sampler = model, worker, sampler
        self._reader = PromptReader(model.policy)
        self._waiting = 0
        routes = [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._named_model, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._text, methods=["POST"]),
        ]
        middleware = [
            Middleware(TrustedHostMiddleware, allowed_hosts=list(model.hosts), www_redirect=False),
            Middleware(_TokenCheck, token=model.token),
        ]
        self.asgi = Starlette(routes=routes, middleware=middleware, exception_handlers=_HANDLERS)

    # Addresses

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model.as_json()]})

    async def _named_model(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._model.as_json())

    async def _chat(self, request: Request) -> Response:
        asked = ChatRequest.read(await _values(request))
        self._check_name(asked.model)
        return self._answer(asked, [self._read(lambda: self._reader.chat(asked.turns()), "messages")])

    async def _text(self, request: Request) -> Response:
        asked = TextRequest.read(await _values(request))
        self._check_name(asked.model)
        prompts = [self._read(partial(self._read_text, given), "prompt") for given in asked.prompts()]
        return self._answer(asked, prompts)

    # Requests

    def _read_text(self, given: str | Sequence[int]) -> ReadPrompt:
        return self._reader.text(given) if isinstance(given, str) else self._reader.ids(given)

    def _check_name(self, name: str) -> None:
        if name != self._model.name:
            message = f"the model `{name}` isn't served here; `{self._model.name}` is"
            raise RequestError(message, param="model", status=404, code="model_not_found")

    def _read(self, read: Callable[[], ReadPrompt], param: str) -> ReadPrompt:
        try:
            return read()
        except RLHFError as error:
            raise RequestError(str(error), param=param) from None

    def _answer(self, request: GenerationRequest, prompts: Sequence[ReadPrompt]) -> Response:
        """Return what answers a request: it hands the worker a job when it is sent."""
        sampled = None if self._sampler is None else self._for_sampler(request, prompts, self._sampler)
        job, events = self._job(request, prompts, sampled)
        if job.size > self._model.most_waiting:
            message = (
                f"the request asks for {job.size} completions; at most {self._model.most_waiting} are taken at once"
            )
            raise RequestError(message, param="n")
        if self._waiting + job.size > self._model.most_waiting:
            message = f"{self._waiting} completions are being drawn or wait: try again later"
            raise RequestError(message, status=429, code="rate_limit_exceeded")
        asked = _Asked(request, prompts, job, events)
        answer = AnswerFrame(self._model.name, isinstance(request, ChatRequest))
        return _JobResponse(self, asked, answer)

    def _for_sampler(
        self, request: GenerationRequest, prompts: Sequence[ReadPrompt], sampler: Sampler
    ) -> tuple[Sequence[Any], BaseConfig]:
        """Return the prompts as the sampler takes them, and its options with what the request says.

        Raises:
            RequestError: the request asks for what whole, chosen completions can't give, or for an option that the sampler lacks.
        """
        given: Sequence[Any] = (
            [request.turns()] if isinstance(request, ChatRequest) else cast(TextRequest, request).prompts()
        )
        echoes = isinstance(request, TextRequest) and request.echo
        name = type(sampler).__name__
        for param, wrong, why in (
            ("stream", request.stream, "it gives whole answers alone: leave out `stream`"),
            ("logprobs", request.has_logprobs, "its answers have none: leave out `logprobs`"),
            ("echo", echoes, "leave out `echo`"),
            ("prompt", not all(isinstance(one, str | list) and _is_text(one) for one in given), "give prompts as text"),
        ):
            if wrong:
                message = f"`{param}` isn't supported by the sampler {name}: {why}"
                raise RequestError(message, param=param, code="unsupported_parameter")
        changes: dict[str, Any] = {
            key: getattr(request, key) for key in _DRAWN_AS if key in request.model_fields_set and key != "stop"
        }
        changes |= {"stop": request.stops} if request.stops else {}
        fields = type(sampler.config).model_fields
        if request.most_tokens is not None:
            changes["max_new_tokens"] = min(self._room(request, prompt) for prompt in prompts)
        elif "max_new_tokens" in fields and (positions := self._model.policy.max_positions):
            longest = max(len(prompt.ids) for prompt in prompts)
            changes["max_new_tokens"] = max(1, min(getattr(sampler.config, "max_new_tokens"), positions - longest))  # noqa: B009
        if unknown := next((key for key in changes if key not in fields), None):
            param = "max_tokens" if unknown == "max_new_tokens" else unknown
            message = f"`{param}` isn't an option of the sampler {name}: leave it out"
            raise RequestError(message, param=param, code="unsupported_parameter")
        try:
            return given, sampler.config.updated(**changes)
        except RLHFError as error:
            raise RequestError(str(error)) from None

    def _job(
        self,
        request: GenerationRequest,
        prompts: Sequence[ReadPrompt],
        sampled: tuple[Sequence[Any], BaseConfig] | None,
    ) -> tuple[Job, asyncio.Queue[Event]]:
        """Return what the worker is asked for, and where it delivers it."""
        seed = secrets.randbits(63) if request.seed is None else request.seed
        # Those of `PolicyModel.generate(prompts, n, seed=seed)`.
        seeds = completion_seeds(seed, "generate", rows=[prompt_key(each.ids) for each in prompts], n=request.n)
        echoed = isinstance(request, TextRequest) and request.echo and request.has_logprobs
        wanted = []
        if request.most_tokens != 0:
            wanted = [
                Wanted(
                    each.ids, own, request.sampling(self._room(request, each)), each.chat, request.stream, request.top
                )
                for each, own_seeds in zip(prompts, seeds, strict=True)
                for own in own_seeds
            ]
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is closed, and nobody waits any more
                log.debug("an answer came after the server's end")

        if sampled is not None:
            given, options = sampled
            own_seed = None if request.seed is None else request.seed % 2**63
            return SamplerJob(wanted, deliver, prompts=given, n=request.n, seed=own_seed, options=options), events
        return Job(wanted, deliver, [(each.ids, request.top) for each in prompts] if echoed else []), events

    def _room(self, request: GenerationRequest, prompt: ReadPrompt) -> int:
        """Return most new tokens of a prompt's completions.

        Raises:
            RequestError: the prompt, or what is asked for behind it, is longer than the model's positions.
        """
        positions, length = self._model.policy.max_positions or 2**31, len(prompt.ids)
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        if length >= positions:
            message = (
                f"the prompt has {length} tokens: the model's {positions} positions leave no room for a completion"
            )
            raise RequestError(message, param=param, code="context_length_exceeded")
        most = request.default_max_tokens if request.most_tokens is None else request.most_tokens
        if most is None or (request.most_tokens is None and length + most > positions):
            return positions - length if positions < 2**31 else 1024
        if length + most > positions:
            message = f"the prompt has {length} tokens, and {most} new ones are asked for: the model has {positions} positions"
            raise RequestError(message, param="max_tokens", code="context_length_exceeded")
        return most

    # Jobs

    def begin(self, job: Job) -> None:
        """Hand a job to the worker."""
        self._waiting += job.size
        self._worker.submit(job)

    def end(self, job: Job) -> None:
        """Let a job go, done or not."""
        self._waiting -= job.size
        self._worker.cancel(job)

    def logprobs(self, asked: _Asked, found: TokenLogprobs, offset: int) -> dict[str, Any] | None:
        """Return the JSON value of log-probabilities; None where none are wanted."""
        request = asked.request
        if not request.has_logprobs:
            return None
        if isinstance(request, ChatRequest):
            return found.for_chat(self._reader.token, request.top)
        return found.for_text(self._reader.token, request.top, offset)


def _is_text(prompt: Any) -> bool:
    """Tell whether a prompt is text or a chat, no token ids."""
    return isinstance(prompt, str) or all(isinstance(part, dict) for part in prompt)


class _JobResponse(Response):
    """Sends what becomes of a job, whole or as a stream; a client that leaves ends the job."""

    def __init__(self, application: Application, asked: _Asked, answer: AnswerFrame) -> None:
        super().__init__()
        self._application, self._asked, self._answer = application, asked, answer
        self._usage = Usage(sum(len(prompt.ids) for prompt in asked.prompts))
        self._early: deque[Piece] = deque()
        """What was delivered before it could be sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._application.begin(self._asked.job)
        try:
            sending = self._send_stream(send) if self._asked.request.stream else self._send_whole(scope, receive, send)
            await _unless_disconnected(sending, receive)
        finally:
            self._application.end(self._asked.job)

    # Whole answers

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response: Response = JSONResponse(self._answer.whole(await self._choices(), self._usage))
        except RequestError as error:
            response = _refusal(error)
        await response(scope, receive, send)

    async def _choices(self) -> list[dict[str, Any]]:
        """Return all choices, once they are there."""
        asked, request = self._asked, self._asked.request
        pieces: dict[int, Piece] = {}
        scored: dict[int, ScoredPrompt] = {}
        while len(pieces) < len(asked.job.wanted) or len(scored) < len(asked.job.scored):
            event = await self._next()
            if isinstance(event, Piece):
                pieces[event.place] = event
            else:
                scored[event.place] = event
        choices = []
        for index, prompt in enumerate(asked.owners):
            text, reason, found = "", "length", TokenLogprobs()
            if index in pieces:
                completion = pieces[index].grown.completion
                text, reason = completion.text, finish_reason(completion)
                found = TokenLogprobs.of_drawn(pieces[index].grown)
                self._usage.drawn += len(completion.ids)
            offset = 0
            if isinstance(request, TextRequest) and request.echo:
                text = prompt.text + text
                if scored:
                    found = TokenLogprobs.of_prompt(prompt.ids, scored[index // request.n].tokens).followed_by(found)
            choices.append(self._answer.choice(index, text, reason, self._application.logprobs(asked, found, offset)))
        return choices

    async def _next(self) -> Piece | ScoredPrompt:
        """Return what the worker delivered next.

        Raises:
            RequestError: the job failed.
        """
        if self._early:
            return self._early.popleft()
        event = await self._asked.events.get()
        if isinstance(event, Failure):
            raise _failed(event.error)
        return event

    # Streams

    async def _send_stream(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            async for chunk in self._chunks():
                await send({"type": "http.response.body", "body": _event(chunk), "more_body": True})
        except RequestError as error:  # the status has been sent
            await send({"type": "http.response.body", "body": _event(error.body()), "more_body": True})
        else:
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a stream, in the order in which tokens are drawn."""
        asked, answer = self._asked, self._answer
        sent = [0] * len(asked.job.wanted)
        """Characters of each choice's text that were sent."""
        known = [0] * len(asked.job.wanted)
        """Its tokens that were sent."""
        offsets = [0] * len(asked.job.wanted)
        ended = 0
        if answer.chat:
            yield answer.chunk([answer.opening(index) for index in range(len(sent))])
        elif isinstance(asked.request, TextRequest) and asked.request.echo:
            async for index, choice in self._echoes():
                offsets[index] = len(asked.owners[index].text)
                yield answer.chunk([choice])
        while ended < len(sent):
            event = await self._next()
            assert isinstance(event, Piece)  # prompts are scored before
            index, grown = event.place, event.grown
            text = grown.completion.text
            new, found = text[sent[index] :], TokenLogprobs.of_drawn(grown, known[index])
            logprobs = self._application.logprobs(asked, found, offsets[index] + sent[index])
            known[index] = len(grown.completion.ids)
            ended += grown.ended
            self._usage.drawn += len(found.ids)
            sent[index] = max(sent[index], len(text))
            if new or grown.ended or asked.request.has_logprobs:
                reason = finish_reason(grown.completion) if grown.ended else None
                yield answer.chunk([answer.choice(index, new, reason, logprobs, streamed=True)])
        options = asked.request.stream_options
        if options is not None and options.include_usage:
            yield answer.chunk([], self._usage)

    async def _echoes(self) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Yield each choice's prompt, with the log-probabilities of its tokens where they are wanted."""
        asked = self._asked
        scored: dict[int, ScoredPrompt] = {}
        early: list[Piece] = []
        while len(scored) < len(asked.job.scored):
            event = await self._next()
            if isinstance(event, ScoredPrompt):
                scored[event.place] = event
            else:
                early.append(event)
        self._early.extend(early)
        for index, prompt in enumerate(asked.owners):
            found = TokenLogprobs()
            if scored:
                found = TokenLogprobs.of_prompt(prompt.ids, scored[index // asked.request.n].tokens)
            logprobs = self._application.logprobs(asked, found, 0)
            yield index, self._answer.choice(index, prompt.text, None, logprobs, streamed=True)


class _TokenCheck:
    """Refuses whoever doesn't bear the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._knows(dict(scope["headers"]).get(b"authorization", b"")):
            error = RequestError(
                "a request needs the header `Authorization: Bearer TOKEN`", status=401, code="invalid_api_key"
            )
            return await _refusal(error)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _knows(self, header: bytes) -> bool:
        scheme, _, given = header.partition(b" ")
        # In constant time, so that how long it takes says nothing about how much of it is right.
        return hmac.compare_digest(given.strip(), self._token) and scheme.lower() == b"bearer"


async def _values(request: Request) -> dict[str, Any]:
    """Return the JSON object of a body that isn't too large and comes in time."""
    too_large = RequestError(f"the body is larger than {MOST_BYTES:,} bytes", status=413, code="request_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MOST_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise too_large
    except TimeoutError:
        raise RequestError("the body didn't come in time", status=408, code="timeout") from None
    return read_body(bytes(body))


async def _unless_disconnected(sending: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Wait for an answer to be sent, and give it up where the client leaves before."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = {asyncio.create_task(sending), asyncio.create_task(left())}
    done: set[asyncio.Task[None]] = set()
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks - done:
            task.cancel()
        await asyncio.gather(*tasks - done, return_exceptions=True)
    for task in done:
        task.result()


def _failed(error: Exception) -> RequestError:
    """Return what a client gets where a job failed."""
    if isinstance(error, Stopping):
        return RequestError("the server is stopping", status=503, code="stopping")
    if isinstance(error, RLHFError):
        return RequestError(str(error), status=500, code=error.code)
    return RequestError("the server failed; its log says why", status=500, code="internal_error")


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _refusal(error: RequestError) -> JSONResponse:
    headers = {}
    if error.status == 401:
        headers = {"www-authenticate": "Bearer"}
    elif error.status == 429:
        headers = {"retry-after": "1"}
    return JSONResponse(error.body(), error.status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _refusal(error)


async def _no_such_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _refusal(RequestError(message, status=error.status_code, code="unknown_url"))


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


_HANDLERS: dict[Any, Any] = {
    RequestError: _refused,
    HTTPException: _no_such_address,
    ClientDisconnect: _gone,
}
