"""The hub is asked once, with a short limit, and what is wrong is one line of ours."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from rlhf_core.data.open_source import open_source
from rlhf_core.infra import hub_access
from rlhf_core.infra.errors import DataError, ModelError
from rlhf_core.infra.hub_access import NotOnHub, ask_hub, offline
from rlhf_core.infra.model_files import hub_files
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import save_tiny


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No answers of before, no network, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_access, "_unreachable", {})
    hub_access._answer.cache_clear()
    yield
    hub_access._answer.cache_clear()


class StandIn(BaseHTTPRequestHandler):
    """A hub with one model, `acme/there`, that counts requests."""

    asked: list[str]

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        there = self.path.startswith("/api/models/acme/there")
        body = json.dumps({"id": "acme/there", "siblings": []} if there else {"error": "Repository not found"}).encode()
        self.send_response(200 if there else 404)
        if not there:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[StandIn]]:
    server = HTTPServer(("127.0.0.1", 0), StandIn)
    StandIn.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield StandIn
    server.shutdown()
    server.server_close()


def test_each_name_is_asked_for_once(stand_in: type[StandIn]) -> None:
    assert ask_hub("acme/there") is None and ask_hub("acme/there") is None
    assert stand_in.asked.count("/api/models/acme/there") == 1
    with pytest.raises(NotOnHub, match="the hub has no such model, or it is private"):
        ask_hub("acme/not-there")
    with pytest.raises(NotOnHub, match="no such dataset"):
        ask_hub("acme/not-there", "dataset")


def test_a_model_that_the_hub_lacks_is_one_line(stand_in: type[StandIn]) -> None:
    with pytest.raises(
        ModelError, match=r"^acme/none: is no local directory, and no model .*; got the hub has no such model"
    ):
        PolicyModel.from_pretrained("acme/none")


def test_without_a_network_nothing_is_tried_twice(caplog: pytest.LogCaptureFixture) -> None:
    """Half a minute of its library's attempts, with a line each, are left out."""
    with pytest.raises(
        ModelError, match=r"^acme/none: is no local directory, .*; got the hub can't be reached: .*refused"
    ):
        PolicyModel.from_pretrained("acme/none")
    with pytest.raises(DataError, match=r"^acme/rows: not a file, and .*; got the hub can't be reached"):
        open_source("acme/rows:main")
    assert not caplog.records


def test_a_mistyped_path_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny("runs/model")
    (tmp_path / "rows/train").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"fix: did you mean runs/model\?$"):
        PolicyModel.from_pretrained("runs/modle")
    with pytest.raises(DataError, match=r"fix: did you mean rows/train\?$"):
        open_source("rows/trian")


def test_a_copy_in_the_cache_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = tmp_path / "cache/models--acme--kept/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text("0" * 40)
    found = hub_files("acme/kept", ("config.json", "adapter_config.json"))
    assert found[0] is not None and found[0].samefile(snapshot / "config.json") and found[1] is None
    (line,) = caplog.messages
    assert line.startswith("acme/kept: the hub can't be reached") and "the copy in its cache is taken" in line


def test_the_offline_mode_ends() -> None:
    with offline():
        assert constants.is_offline_mode() and datasets.config.HF_HUB_OFFLINE
    with offline(False):
        assert not constants.is_offline_mode()
