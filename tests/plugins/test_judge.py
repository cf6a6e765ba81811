"""The judge: what it is asked, which scores are read, and what a slow, busy, failing or babbling server leads to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rlhf_plugins.rewards.judge import JudgeConfig, JudgeReward

from rlhf_core.contracts.reward import Sample
from rlhf_core.generation.watching import counting_forwarded
from rlhf_core.infra.chat_api import ChatAPI
from rlhf_core.infra.errors import ConfigError, DataError, PluginError
from rlhf_core.rewards import open_rewards
from rlhf_core.testing import RewardContract
from rlhf_core.testing.tiny import save_tiny

SAMPLES = [Sample("1+1=", text, columns={"answer": "2"}) for text in ("2", "three", "4")]


class Server(ThreadingHTTPServer):
    """Answers as `answer` says: it gets a request and returns (status, body or its pieces, headers)."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.requests, self.headers, self.paths = answer, [], [], []
        self.at_once = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is no error."""


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(request)
            server.headers.append(dict(self.headers))
            server.paths.append(self.path)
            server.at_once += 1
            server.most = max(server.most, server.at_once)
        status, body, headers = server.answer(request)
        with server.lock:
            server.at_once -= 1
        pieces = (
            body if isinstance(body, Iterator) else [body if isinstance(body, bytes) else json.dumps(body).encode()]
        )
        if isinstance(pieces, list):
            headers = {**headers, "Content-Length": str(len(pieces[0]))}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for piece in pieces:
            self.wfile.write(piece)
            self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        pass


def says(text: Any) -> tuple[int, Any, dict[str, str]]:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(answer: Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def by_length(request: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
    """Rate the answer by its length, after a few words and a rating that isn't the last."""
    answer = request["messages"][-1]["content"].split("[Answer]\n")[1].split("\n[End")[0]
    return says(f"A first Rating: 3 was too hasty.\n**Rating: {len(answer)}**")


def judge(server: Server, **options: Any) -> Any:
    how = {name: options.pop(name) for name in ("concurrency", "time_limit") if name in options}
    given = {"model": "big", "base_url": server.url, **options}
    return open_rewards([{"name": "judge", "options": given, **how}])


def test_each_row_is_asked_about_and_the_last_rating_counts(serve) -> None:
    server = serve(by_length)
    scores = judge(server).score(SAMPLES, rows=[1, 2, 3]).by_name["judge"]
    assert scores == [0.0, 4 / 9, 0.0]
    assert judge(server, rescale=False).score(SAMPLES).by_name["judge"] == [1.0, 5.0, 1.0]
    request = server.requests[0]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("big", 0.0, 512)
    (turn,) = request["messages"]
    assert (
        turn["role"] == "user"
        and "[Question]\n1+1=\n" in turn["content"]
        and "from 1 (worst) to\n10" in turn["content"]
    )
    assert "Authorization" not in server.headers[0]


def test_the_prompt_is_an_option(serve) -> None:
    server = serve(lambda request: says("Score=0.5"))
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "1+1"},
    ]
    rewards = judge(
        server,
        prompt="{{ prompt }}|{{ messages | length }}|{{ completion }}|{{ answer }}",
        system="Be strict.",
        pattern=r"Score=([\d.]+)",
        lowest=0,
        highest=1,
    )
    assert rewards.score([Sample(chat, "2", columns={"answer": "two"})]).total.tolist() == [0.5]
    asked = server.requests[0]["messages"]
    assert asked[0] == {"role": "system", "content": "Be strict."}
    assert asked[1]["content"] == "user: Hi\n\nassistant: Yes?\n\nuser: 1+1|3|2|two"


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("No idea.", "reward `judge`, row 8: the judgement has no score; got 'No idea.'"),
        ("Rating: 11", "reward `judge`, row 8: the judgement's score is outside its bounds; got 11, not 1 to 10"),
        ("Rating: -1", "outside its bounds; got -1"),
    ],
)
def test_a_judgement_without_a_score_stops_the_run_or_gets_the_score_for_it(serve, said: str, error: str) -> None:
    server = serve(lambda request: says(said if "three" in request["messages"][0]["content"] else "Rating: 10"))
    with pytest.raises(DataError, match=error):
        judge(server).score(SAMPLES, rows=[7, 8, 9])
    assert judge(server, unreadable_score=-1).score(SAMPLES).total.tolist() == [1, -1, 1]


def test_a_busy_server_is_asked_again(serve) -> None:
    answers = iter(
        [(429, {"error": "slow down"}, {"Retry-After": "0.3"}), (503, b"", {}), (200, b"<html>", {}), (200, {}, {})]
    )
    server = serve(lambda request: next(answers, says("Rating: 10")))
    api = ChatAPI(server.url, "big", first_wait=0.01)
    began = time.monotonic()
    assert api.ask([{"role": "user", "content": "?"}]) == "Rating: 10"
    assert len(server.requests) == 5 and 0.3 <= time.monotonic() - began < 3


def test_what_a_server_refuses_is_an_error_at_once(serve, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret-key-1234567890")
    server = serve(lambda request: (401, {"error": "no such key: sk-very-secret-key-1234567890"}, {}))
    with pytest.raises(PluginError, match=r"row 7.*refused.*status 401.*check the key") as raised:
        judge(server, key_variable="JUDGE_KEY").score(SAMPLES[:1], rows=[7])
    assert server.headers[0]["Authorization"] == "Bearer sk-very-secret-key-1234567890"
    assert len(server.requests) == 1
    shown = [raised.value.line(), str(raised.value.__cause__), caplog.text]
    shown.append(json.dumps(judge(server, key_variable="JUDGE_KEY").describe()))
    assert "very-secret" not in "".join(shown) and "[redacted]" in shown[0]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((500, b"boom", {}), "no answer from the server in 3 tries; got status 500: boom"),
        ((200, b"garbage", {}), "no chat completion: garbage"),
        (says(None), "a message without text: None"),
        ((200, b"\xff\xfe" * 300, {}), "no chat completion"),
    ],
)
def test_a_failing_or_babbling_server_is_given_up(
    serve, answer: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_core.infra.chat_api.LONGEST_WAIT", 0.01)
    server = serve(lambda request: answer)
    with pytest.raises(PluginError, match=said):
        judge(server, retries=2).score(SAMPLES[:1])
    assert len(server.requests) == 3


def test_a_slow_server_is_given_up_within_the_time_limits(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_core.infra.chat_api.LONGEST_WAIT", 0.01)
    ended = threading.Event()

    def slow(request: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        ended.wait(20)
        return says("Rating: 10")

    server = serve(slow)
    with pytest.raises(
        PluginError, match=r"no answer from the server in 2 tries; got no whole answer within 0\.2 seconds"
    ):
        judge(server, timeout=0.2, retries=1).score(SAMPLES[:1])
    with pytest.raises(PluginError, match=r"reward `judge`, row 4: scoring took longer than 0\.5 seconds"):
        judge(server, time_limit=0.5).score(SAMPLES[:1], rows=[4])
    ended.set()


@pytest.mark.parametrize(("status", "said"), [(200, r"no whole answer within 0\.2 seconds"), (500, "got status 500;")])
def test_a_server_that_sends_a_byte_now_and_then_is_given_up(serve, status: int, said: str) -> None:
    def drips() -> Iterator[bytes]:
        for _ in range(40):
            time.sleep(0.05)
            yield b" "

    api = ChatAPI(serve(lambda request: (status, drips(), {})).url, "big", timeout=0.2, retries=0)
    began = time.monotonic()
    with pytest.raises(PluginError, match=said):
        api.ask([])
    assert time.monotonic() - began < 1.5  # the server takes 2 seconds


@pytest.mark.parametrize("said", ["sk-very-secr…", "sk-very-secr****7890", "(…very-secret-key-123)", "-key-1234567890"])
def test_a_part_of_the_key_is_not_shown_either(serve, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret-key-1234567890")
    server = serve(lambda request: (401, {"error": f"bad key {said} of you"}, {}))
    with pytest.raises(PluginError) as raised:
        judge(server, key_variable="JUDGE_KEY").score(SAMPLES[:1])
    shown = raised.value.line()
    assert "bad key" in shown and "[redacted]" in shown and "of you" in shown
    assert not any(part in shown for part in ("very", "secr", "12345"))


def test_parameters_of_an_address_stay_behind_the_path(serve) -> None:
    server = serve(lambda request: says("Rating: 10"))
    for end in ("", "/", "/d?api-version=2024-06-01", "/d/?a=b/&max_tokens=5"):
        ChatAPI(server.url + end, "big").ask([])
    assert server.paths == [
        "/v1/chat/completions",
        "/v1/chat/completions",
        "/v1/d/chat/completions?api-version=2024-06-01",
        "/v1/d/chat/completions?a=b/&max_tokens=5",
    ]


def test_nobody_listens() -> None:
    api = ChatAPI("http://127.0.0.1:9/v1", "big", retries=0)
    with pytest.raises(PluginError, match=r"127\.0\.0\.1:9: no answer from the server in 1 try; got URLError.*refused"):
        api.ask([])


def test_as_many_requests_at_once_as_asked_for(serve) -> None:
    def slowly(request: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        time.sleep(0.1)
        return says("Rating: 10")

    for concurrency in (2, None):
        server = serve(slowly)
        judge(server, **({} if concurrency is None else {"concurrency": concurrency})).score(SAMPLES[:1] * 16)
        assert server.most == concurrency if concurrency else 4 <= server.most <= 8


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a template that can't be read": ({"prompt": "{{ prompt"}, "is no Jinja template: line 1"),
    "a pattern without a group": ({"pattern": "Rating"}, "must have a group"),
    "a pattern that can't be read": ({"pattern": "("}, "is no regular expression"),
    "bounds the wrong way round": ({"lowest": 3, "highest": 3}, "`lowest` must be below `highest`"),
    "a key for a local model": ({"base_url": None, "key_variable": "X"}, "`key_variable` needs a `base_url`"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused(case: str) -> None:
    options, said = WRONG[case]
    with pytest.raises(ConfigError, match=said):
        JudgeConfig.parse({"model": "m", "base_url": "http://x/v1", **options})


def test_addresses_and_keys_that_cannot_work_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="the environment variable NO_SUCH_KEY isn't set"):
        open_rewards(
            [{"name": "judge", "options": {"model": "m", "base_url": "http://x/v1", "key_variable": "NO_SUCH_KEY"}}]
        ).prepare()
    for url in ("file:///etc/passwd", "x/v1", "https://me:hunter2@host/v1", "https://host/v1?a=b&api-key=hunter2"):
        with pytest.raises(ConfigError, match="base_url") as raised:
            ChatAPI(url, "m")
        assert "hunter2" not in str(raised.value)


def test_a_template_that_needs_what_a_row_lacks_or_does_what_it_may_not(serve) -> None:
    server = serve(by_length)
    with pytest.raises(DataError, match=r"row 3: the template .* 'rubric' is undefined; fix: the row has: answer"):
        judge(server, prompt="{{ rubric }}").score(SAMPLES[:1], rows=[3])
    with pytest.raises(DataError, match=r"the template `prompt` can't be filled in"):
        judge(server, prompt="{{ completion.__class__.__mro__ }}").score(SAMPLES[:1])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("judge") / "model")


def test_a_local_model_judges(local: Path) -> None:
    rewards = open_rewards([
        {"name": "judge", "options": {
            "model": str(local), "prompt": "{{ completion }}", "pattern": "(?s)(.*)", "max_tokens": 4, "unreadable_score": 0.25,
        }}
    ])  # fmt: skip
    # A random model writes no number, so every judgement is unreadable; which row is, the error says.
    assert rewards.score(SAMPLES).total.tolist() == [0.25] * 3
    assert any(name.endswith(".safetensors") for name in rewards.describe()["judge"]["files"])
    strict = open_rewards([{"name": "judge", "options": {"model": str(local), "max_tokens": 2}}])
    with pytest.raises(DataError, match="reward `judge`, row 5: the judgement has no score"):
        strict.score(SAMPLES[:1], rows=[5])


def test_a_local_judge_reads_its_rubric_once_for_all_calls(local: Path) -> None:
    rubric = "Rate the answer from 1 to 10, and be strict about what is wrong in it. "
    options = {"model": str(local), "prompt": rubric + "{{ completion }}", "max_tokens": 2, "unreadable_score": 0.0}
    rewards = open_rewards([{"name": "judge", "options": options}])
    counts: list[list[int]] = []
    for sample in SAMPLES[:2]:
        counts.append([])
        with counting_forwarded(counts[-1].append):
            rewards.score([sample])
    # One byte is a token of the tiny model.
    assert sum(counts[0]) > len(rubric) > 4 * sum(counts[1])


class TestJudge(RewardContract):
    """The contract, against a server that rates answers by their length."""

    method = "judge"
    options: ClassVar[dict[str, Any]] = {"model": "big", "highest": 1000, "lowest": 0}
    changes: ClassVar[dict[str, Any]] = {"rescale": False}

    @classmethod
    def setup_class(cls) -> None:
        cls.server = Server(by_length)
        cls.options = {**cls.options, "base_url": cls.server.url}

    @classmethod
    def teardown_class(cls) -> None:
        cls.server.shutdown()


def test_the_class_says_where_it_runs() -> None:
    remote = JudgeReward(JudgeConfig(model="m", base_url="http://x/v1"))
    near = JudgeReward(JudgeConfig(model="m"))
    assert (remote.runs_in, remote.by_row, near.runs_in, near.by_row) == ("thread", True, "main", False)
