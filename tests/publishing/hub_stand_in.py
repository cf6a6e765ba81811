"""A stand-in for the Hugging Face hub: the HTTP interface that huggingface_hub calls to upload a model, served on this machine.

Large files take the way of Git LFS, which the hub serves to clients without Xet.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "me", "hf_" + "x" * 34
LARGE = 10_000
"""Bytes from which a file is stored by Git LFS, as weights are on the hub."""


@dataclass
class Repo:
    """A repository: its branches, each with its files."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    messages: list[str] = field(default_factory=list)


@dataclass
class Hub:
    """What the stand-in holds, and which faults a test asks of it."""

    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    role: str = "write"
    faults: dict[str, int] = field(default_factory=dict)
    """A part of a path → the status that requests with it are answered with."""
    large: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo].branches[branch]


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve a hub on a free port inside the context."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    do_PUT = do_POST

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.calls.append(f"{self.command} {path}")
        status = next((code for part, code in self.hub.faults.items() if part in path), None)
        if status is not None:
            return self._send({"error": f"told to answer {status}"}, status)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
            return self._send({"error": "Invalid credentials"}, 401)
        for method, pattern, answer in _ROUTES:
            if method == self.command.replace("HEAD", "GET") and (found := re.fullmatch(pattern, path)):
                return answer(self, body, **found.groupdict())
        return self._send({"error": f"no such path: {path}"}, 404)

    def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        if isinstance(value, dict) and "error" in value:
            self.send_header("X-Error-Message", str(value["error"]))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _lost(self, code: str) -> None:
        self._send({"error": code}, 404, {"X-Error-Code": code})

    # What each path does

    def whoami(self, body: bytes) -> None:
        orgs = [{"name": "our-lab", "roleInOrg": "write"}]
        self._send({"name": USER, "orgs": orgs, "auth": {"accessToken": {"role": self.hub.role}}})

    def validate(self, body: bytes) -> None:
        """Check what the hub checks of a model's card, as far as tests need it."""
        text = json.loads(body)["content"]
        header = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        wrong = [key for key in ("base_model", "datasets") for name in _listed(header.get(key)) if not _is_name(name)]
        wrong += [key for key in ("license", "library_name", "pipeline_tag") if not _is_text(header.get(key))]
        errors = [{"message": f'"{key}" is not valid'} for key in wrong]
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if repo in self.hub.repos:
            return self._send(
                {"error": "You already created this model repo", "url": f"{self.hub.address}/{repo}"}, 409
            )
        self.hub.repos[repo] = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return self._send({"url": f"{self.hub.address}/{repo}"})

    def info(self, body: bytes, repo: str) -> None:
        if repo not in self.hub.repos:
            return self._lost("RepoNotFound")
        return self._send({"id": repo, "modelId": repo, "private": self.hub.repos[repo].private, "sha": "0" * 40})

    def branch(self, body: bytes, repo: str, branch: str) -> None:
        branches = self.hub.repos[repo].branches
        if branch in branches:
            return self._send({"error": "exists"}, 409)
        branches[branch] = dict(branches["main"])
        return self._send({})

    def tree(self, body: bytes, repo: str, branch: str) -> None:
        files = self.hub.files(repo, branch)
        self._send([{"type": "file", "path": n, "size": len(c), "oid": _git_hash(c)} for n, c in files.items()])

    def resolve(self, body: bytes, repo: str, branch: str, name: str) -> None:
        content = self.hub.files(repo, branch).get(name)
        if content is None:
            return self._lost("EntryNotFound")
        headers = {"ETag": f'"{_git_hash(content)}"', "X-Repo-Commit": "0" * 40, "Accept-Ranges": "bytes"}
        return self._send(content, headers=headers)

    def preupload(self, body: bytes, repo: str, branch: str) -> None:
        wanted = json.loads(body)["files"]
        modes = {one["path"]: "lfs" if one["size"] >= LARGE else "regular" for one in wanted}
        self._send(
            {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes.items()]}
        )

    def batch(self, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        made = [
            {**one, "actions": {"upload": {"href": f"{self.hub.address}/lfs/{one['oid']}"}}}
            for one in objects
            if one["oid"] not in self.hub.large
        ]
        self._send({"transfer": "basic", "objects": made + [one for one in objects if one["oid"] in self.hub.large]})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.large[oid] = body
        self._send({})

    def commit(self, body: bytes, repo: str, branch: str) -> None:
        files = self.hub.files(repo, branch)
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.hub.repos[repo].messages.append(value["summary"])
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self._send({"commitUrl": f"{self.hub.address}/{repo}/commit/1", "commitOid": "1" * 40})


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value) is not None


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", f"/api/models/{_REPO}", _Handler.info),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.branch),
    ("GET", f"/api/models/{_REPO}/tree/(?P<branch>[^/]+)/?", _Handler.tree),
    ("GET", f"/{_REPO}/resolve/(?P<branch>[^/]+)/(?P<name>.+)", _Handler.resolve),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<branch>.+)", _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]+)", _Handler.store),
    ("POST", f"/api/models/{_REPO}/commit/(?P<branch>.+)", _Handler.commit),
]
