"""What a server is asked for is checked before it listens."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.serving.server import PolicyServer, ServerOptions
from rlhf_core.testing.tiny import tiny_policy

pytest.importorskip("starlette", reason="the extra `serve` isn't installed")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"port": 70_000}, "0 to 65535"),
        ({"most_waiting": 0}, "at least 1"),
        ({"grace": -1.0}, "at least 0"),
        ({"token": "short"}, "at least 16"),
        ({"token": "with blanks " * 3}, "no blanks"),
        ({"host": "0.0.0.0"}, "--allowed-host"),
        ({"host": "0.0.0.0", "allowed_hosts": ["*"]}, "in full"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ServerOptions(**options)


def test_an_address_that_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(StorageError, match="can't listen"):
        PolicyServer(tiny_policy(), ServerOptions(port=taken.getsockname()[1]))


def test_a_token_is_made_and_not_shown() -> None:
    servers = [PolicyServer(tiny_policy(), ServerOptions(port=0)) for _ in range(2)]
    assert len({server.token for server in servers}) == 2 and all(len(server.token) > 40 for server in servers)
    assert servers[0].url.startswith("http://127.0.0.1:") and servers[0].token not in repr(servers[0]._options)
    for server in servers:
        server._socket.close()
