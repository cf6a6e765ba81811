"""A client of an OpenAI-compatible address: one answer to a chat per call, tried again while the server is busy."""

from __future__ import annotations

import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from rlhf_core.infra.errors import ConfigError, PluginError, shortened
from rlhf_core.infra.redact import REDACTED, redact_part_of, redact_text, secret_parameter

log = logging.getLogger(__name__)

_BUSY = {408, 409, 425, 429}
"""Statuses below 500 after which the same request may succeed."""
LONGEST_WAIT = 60.0
"""Most seconds between two tries."""
_MOST_BYTES = 2**24
"""The longest answer that is read, in bytes."""


class ChatAPI:
    """Asks a model at an OpenAI-compatible address. May be used from several threads.

    It posts to `BASE_URL/chat/completions`; parameters of BASE_URL stay behind the path.

    Args:
        base_url: such as `http://127.0.0.1:8000/v1`, or `https://host/openai/deployments/NAME?api-version=…`.
        model: the model's name there.
        key_variable: environment variable that holds the key; None sends none. The key appears in no message.
        timeout: seconds that one request may take, the whole answer included.
        retries: how often a request is repeated that was refused by a busy server, failed, or got no answer in time.
        first_wait: seconds before the second try; each further wait is twice as long, with up to a quarter more at random.

    Raises:
        ConfigError: the address isn't one of http, or holds a secret; or the variable isn't set.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        first_wait: float = 1.0,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            fix = "write it as `https://host/v1`"
            raise ConfigError("isn't an address of http", place="base_url", got=redact_text(base_url), fix=fix)
        if parts.username or parts.password:
            fix = "give the key by an environment variable"
            raise ConfigError("an address may not hold a password", place="base_url", fix=fix)
        if (parameter := secret_parameter(base_url)) is not None:
            problem, fix = f"an address may not hold a secret: `{parameter}`", "give the key by `key_variable`"
            raise ConfigError(problem, place="base_url", fix=fix)
        path = parts.path.rstrip("/") + "/chat/completions"
        self.address, self.model = urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")), model
        self.timeout, self.retries, self.first_wait = timeout, retries, first_wait
        self._key = None if key_variable is None else os.environ.get(key_variable, "").strip()
        if self._key == "":
            fix = f"`export {key_variable}=…`, or leave the option out for a server that needs no key"
            raise ConfigError(f"the environment variable {key_variable} isn't set", place="key_variable", fix=fix)
        if self._key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            log.warning("the key of %s is sent without encryption: the address isn't one of https", self._server)

    @property
    def _server(self) -> str:
        return urlsplit(self.address).netloc

    def ask(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Return the model's answer to a chat.

        Args:
            options: further fields of the request, such as `temperature` and `max_tokens`.

        Raises:
            PluginError: the server refuses the request, or there was no usable answer in any try.
        """
        body = json.dumps({"model": self.model, "messages": list(messages), **options}).encode()
        for tries in range(1, self.retries + 2):
            try:
                return self._once(body)
            except _TryAgain as error:
                if tries > self.retries:
                    raise PluginError(
                        f"no answer from the server in {tries} {'try' if tries == 1 else 'tries'}",
                        place=self._server,
                        got=error.text,
                        fix="see whether it is up; lower `concurrency`, or raise `timeout` or `retries`",
                    ) from error
                wait = min(self.first_wait * 2 ** (tries - 1) * random.uniform(1, 1.25), LONGEST_WAIT)
                wait = max(wait, min(error.wait, LONGEST_WAIT))
                log.debug("%s: %s; next try in %.1f s", self._server, error.text, wait)
                time.sleep(wait)
        raise AssertionError  # the last try returned or raised

    def _once(self, body: bytes) -> str:
        """Return the answer to one request.

        Raises:
            _TryAgain: the same request may succeed later.
            PluginError: it won't.
        """
        request = urllib.request.Request(self.address, body, {"Content-Type": "application/json"}, method="POST")
        if self._key:  # a redirection to another server doesn't get it
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        end = time.monotonic() + self.timeout
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = _read_until(end, answer)
        except urllib.error.HTTPError as error:
            with error:
                said = self._safe(_read(end, error))
            text_of = f"status {error.code}" + (f": {said}" if said else "")
            if error.code in _BUSY or error.code >= 500:
                raise _TryAgain(text_of, _seconds(error.headers.get("Retry-After"))) from error
            fix = {401: "check the key", 403: "check the key's rights", 404: "check `base_url` and `model`"}.get(
                error.code
            )
            raise PluginError("the server refused the request", place=self._server, got=text_of, fix=fix) from error
        except TimeoutError as error:
            raise _TryAgain(f"no whole answer within {self.timeout:g} seconds") from error
        except (urllib.error.URLError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise _TryAgain(f"no connection within {self.timeout:g} seconds") from error
            raise _TryAgain(self._safe(f"{type(error).__name__}: {reason}")) from error
        return self._content(text)

    def _content(self, text: bytes) -> str:
        """Return the text of an answer's message."""
        try:
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise _TryAgain(f"no chat completion: {self._safe(text.decode(errors='replace'))}") from error
        if not isinstance(content, str):
            raise _TryAgain(f"a message without text: {shortened(content)}")
        return content

    def _safe(self, text: str) -> str:
        """Return what a server said, shortened and without secrets: some repeat the key, or a part of it."""
        if self._key:
            text = redact_part_of(self._key, text.replace(self._key, REDACTED))
        text = " ".join(redact_text(text).split())
        return text if len(text) <= 200 else f"{text[:200]}…"


class _TryAgain(Exception):
    """A request failed that may succeed later, after at least `wait` seconds."""

    def __init__(self, text: str, wait: float = 0.0) -> None:
        super().__init__(text)
        self.text, self.wait = text, wait


def _read_until(end: float, answer: HTTPResponse | urllib.error.HTTPError, most: int = _MOST_BYTES) -> bytes:
    """Return an answer's body, at least its first `most` bytes; the socket's timeout bounds only the time between two bytes.

    Raises:
        TimeoutError: it isn't whole at `end`, in seconds of `time.monotonic`.
    """
    body = bytearray()
    while len(body) < most and (part := answer.read1(2**16)):
        if time.monotonic() >= end:
            raise TimeoutError
        body += part
    return bytes(body)


def _read(end: float, error: urllib.error.HTTPError) -> str:
    """Return the beginning of what a server says with an error; nothing where it isn't there at `end`."""
    try:
        return _read_until(end, error, 2000).decode(errors="replace")
    except (OSError, HTTPException):
        return ""


def _seconds(retry_after: str | None) -> float:
    """Return a Retry-After header as seconds: it holds these, or a date; 0 where there is none."""
    try:
        return max(float(retry_after or 0), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(str(retry_after)).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0
