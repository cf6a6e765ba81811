"""A server for one policy: in this thread until a signal ends it, or beside the program that made it.

with PolicyServer(policy, ServerOptions(port=0)) as server:
    client = openai.OpenAI(base_url=server.url, api_key=server.token)
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rlhf_core.generation.engine import Engine
from rlhf_core.infra.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from rlhf_core.contracts.sampler import Sampler
    from rlhf_core.models.policy_model import PolicyModel

LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
"""Values of the header `Host` that mean this computer."""
LEAST_TOKEN = 16
"""Fewest characters of a token: it must not be guessed."""


@dataclass(frozen=True)
class ServerOptions:
    """How a policy is served.

    Raises:
        ConfigError: an option is out of its range, or an address that others reach has no names that it is asked by.
    """

    name: str | None = None
    """The model's name in requests; None takes the last part of its path."""
    host: str = "127.0.0.1"
    """The address that is listened on."""
    port: int = 8000
    """0 takes any that is free."""
    token: str | None = None
    """Which every request bears; None makes one."""
    allowed_hosts: Sequence[str] = ()
    """Further values of the header `Host` that are answered: the names by which others reach this computer."""
    most_waiting: int = 256
    """Most completions that are being drawn or wait for it; larger lets more clients wait instead of trying again."""
    grace: float = 30.0
    """Seconds that requests have to end after a signal; larger waits longer for them."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ConfigError("must be from 0 to 65535", place="port", got=str(self.port))
        if self.most_waiting < 1:
            raise ConfigError("must be at least 1", place="most_waiting", got=str(self.most_waiting))
        if not 0 <= self.grace < float("inf"):
            raise ConfigError("must be a finite number, at least 0", place="grace", got=str(self.grace))
        if self.token is not None and (len(self.token) < LEAST_TOKEN or not self.token.isascii() or " " in self.token):
            problem = f"the token must have at least {LEAST_TOKEN} ASCII characters, and no blanks"
            raise ConfigError(
                problem, place="token", got=f"{len(self.token)} characters", fix="leave it out to have one made"
            )
        if any("*" in name for name in self.allowed_hosts):
            raise ConfigError("a name must be given in full", place="allowed_hosts", got="a `*`")
        if not _is_local(self.host) and not self.allowed_hosts:
            raise ConfigError(
                "others can reach this address, so the names that it is asked by must be known", place="host", got=self.host,
                fix="name them with `--allowed-host NAME`, or keep to 127.0.0.1",
            )  # fmt: skip


def require_serving() -> None:
    """Raise `ConfigError`, with the extra to install, where the packages that a server needs aren't installed."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"{package} isn't installed", place="serve", fix="pip install 'rlhf-core[serve]'")


class PolicyServer:
    """Serves a policy with the weights that it has: they must not change while requests are answered.

    As a context it serves in threads of its own; `run` serves in this one until a signal ends it.

    Args:
        engine: draws the completions; None makes one. Nobody else may use it meanwhile.
        sampler: answers in its place, one request after the other and whole; nobody else may use its models meanwhile.

    Raises:
        ConfigError: the packages aren't installed (the extra `serve`), or the engine's backend takes no requests while others
            are drawn.
        StorageError: the address can't be listened on.
    """

    def __init__(
        self,
        policy: PolicyModel,
        options: ServerOptions | None = None,
        *,
        engine: Engine | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        require_serving()
        from rlhf_core.serving.application import Application, ServedModel
        from rlhf_core.serving.generation_worker import GenerationWorker
        from rlhf_core.serving.sampler_worker import SamplerWorker

        options = options or ServerOptions()
        worker: GenerationWorker | SamplerWorker
        if sampler is not None:
            worker = SamplerWorker(sampler)
        else:
            engine = Engine(policy) if engine is None else engine
            engine.backend.require("joining", "fork", purpose="serving")
            worker = GenerationWorker(engine)
        self.name = options.name or Path(str(policy.source)).name or "policy"
        self.token = options.token or secrets.token_urlsafe(32)
        self._options = replace(options, token=None)
        self._socket = _listening(options.host, options.port)
        self._worker = worker
        hosts = [*LOCAL, *options.allowed_hosts, *([options.host] if _is_local(options.host) else [])]
        model = ServedModel(policy, self.name, self.token, hosts, options.most_waiting)
        self._application = Application(model, self._worker, sampler)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address that clients take as their base URL: `http://127.0.0.1:8000/v1`."""
        host, port = self._socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def run(self) -> None:
        """Serve until SIGTERM or Ctrl-C: no new requests are taken then, those that run have `grace` seconds to end; a second
        Ctrl-C ends at once. For the main thread."""
        self._worker.start()
        try:
            self._server = _server(self._application.asgi, self._options)
            self._server.run(sockets=[self._socket])
        finally:
            self._worker.stop()
            self._socket.close()

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self.run, name="server", daemon=True)
        self._thread.start()
        until = time.monotonic() + 30
        while not getattr(getattr(self, "_server", None), "started", False):
            if not self._thread.is_alive() or time.monotonic() > until:
                raise StorageError("the server didn't start", place=self.url, fix="see its log")
            time.sleep(0.01)
        return self

    def __exit__(self, *raised: object) -> None:
        self._server.should_exit = True
        assert self._thread is not None
        self._thread.join()


def _is_local(host: str) -> bool:
    """Tell whether only this computer reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        StorageError: the address isn't this computer's, or is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        problem = f"can't listen on the address: {error.strerror or error}"
        raise StorageError(problem, place=f"{host}:{port}", fix="choose another `--port`, or 0 for any") from error


def _server(application: Any, options: ServerOptions) -> Any:
    """Return uvicorn's server, which ends by a signal with this program going on."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    config = uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(round(options.grace), 0),
    )
    return Server(config)
