"""Wrong input to whatever generates or scores: one line that says what is wrong, where, and what to do; nothing is written."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_core import SamplingConfig
from rlhf_core.cli import main
from rlhf_core.infra.errors import ConfigError, DataError, ModelError, RLHFError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_policy, tiny_tokenizer

Command = Callable[..., Any]
"""Runs a command; returns its exit code, what it printed, and the last line of stderr: the fault."""
CHAT = [{"role": "user", "content": "Hi"}]
FUNCTIONS = "def score(prompts, completions):\n    return [0.0] * len(prompts)\n\n\nnumber = 3\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, whose tokenizer has no chat template."""
    plain = tiny_tokenizer(chat_template=False)
    path = tmp_path_factory.mktemp("base") / "model"
    return save_tiny(path, layers=1, hidden=16, max_positions=128, tokenizer=plain)


@pytest.fixture
def command(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Return a function that runs a command in this process, in a directory with `own_rewards.py` and `broken_rewards.py`."""
    (tmp_path / "own_rewards.py").write_text(FUNCTIONS)
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_that_name\n\n" + FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(*arguments: Any) -> Any:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, error=err.splitlines()[-1] if err else "")

    return run


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--prompts", "a" * 128], 3, "--prompts[0]: the prompt leaves no room for a completion"),
        (["--prompts", "a" * 128], 3, "got 129 tokens for 128 positions; fix: shorten the prompt"),
        (["--prompts", "rows.jsonl"], 3, "rows.jsonl:2: the prompt leaves no room for a completion"),
        (["--prompts", "a", "--n", "0"], 2, "--n: must be greater than or equal to 1; got 0"),
        (["--prompts", "a", "--n", "-1"], 2, "--n: must be greater than or equal to 1; got -1"),
        (["--prompts", "a", "--n", "two"], 2, "--n: must be a whole number"),
        (["--prompts", "a", "--output", "kept.jsonl"], 7, "kept.jsonl: the file exists; fix: "),
        (["--prompts", ""], 3, "the prompt is empty"),
        (["--prompts", "a", "--prompts", "  "], 3, "--prompts[1]: the prompt is empty"),
        (["--prompts", "empty.jsonl"], 3, "empty.jsonl:1: the prompt is empty"),
        (["--prompts", "gone.jsonl"], 3, "gone.jsonl: no such file"),
        (["--prompts", "a", "--temperature", "-1"], 2, "--temperature: must be greater than or equal to 0; got -1"),
        (["--prompts", "a", "--temperature", "nan"], 2, "--temperature: must be a finite number"),
        (["--prompts", "a", "--top_p", "0"], 2, "--top_p: must be greater than 0; got 0"),
        (["--prompts", "a", "--top_p", "1.1"], 2, "--top_p: must be less than or equal to 1; got 1.1"),
        (["--prompts", "a", "--top_k", "-1"], 2, "--top_k: must be greater than or equal to 0; got -1"),
        (["--prompts", "a", "--top_k", "2.5"], 2, "--top_k: must be a whole number"),
        (["--prompts", "a", "--min_p", "1"], 2, "--min_p: must be less than 1; got 1"),
        (["--prompts", "a", "--repetition_penalty", "0"], 2, "--repetition_penalty: must be greater than 0; got 0"),
        (["--prompts", "a", "--max_new_tokens", "0"], 2, "--max_new_tokens: must be greater than or equal to 1"),
        (["--prompts", "a", "--min_new_tokens", "9", "--max_new_tokens", "4"], 2, "`min_new_tokens` (9) is above"),
        (["--prompts", "a", "--stop", ""], 2, "an empty text is in every completion"),
        (["--prompts", "a", "--stop_ids", "-1"], 2, "token ids are whole numbers"),
        (["--prompts", "a", "--tempratur", "1"], 2, "did you mean `--temperature`?"),
    ],
)
def test_wrong_input_to_sample_is_one_line(
    command: Command,
    model: Path,
    write: Callable[..., Path],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    write([{"prompt": "a"}, {"prompt": "a" * 128}])
    write([{"prompt": ""}], "empty.jsonl")
    kept = write("precious", "kept.jsonl")
    output = [] if "--output" in arguments else ["--output", "out.jsonl"]
    ended = command("sample", "generate", "--model", model, "--dataset.wrap", "none", *output, *arguments)
    assert ended.code == code and message in ended.error, ended.err
    assert ended.error.startswith("error[") and "Traceback" not in ended.err
    assert kept.read_text() == "precious"
    assert not Path("out.jsonl").exists()


def test_unknown_samplers_and_rewards_name_the_nearest(command: Command, model: Path) -> None:
    sampled = command("sample", "genrate", "--model", model, "--prompts", "a")
    assert sampled.code == 2 and "unknown sampler `genrate`; fix: did you mean `generate`?" in sampled.error
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    scored = command("score", "exact_mach", "--data", "rows.jsonl", "--output", "out.jsonl")
    assert scored.code == 2 and "unknown reward `exact_mach`; fix: did you mean `exact_match`?" in scored.error


def test_a_stop_string_that_never_comes_is_no_error(command: Command, model: Path) -> None:
    options = ["--max_new_tokens", "4", "--stop", "a text that no four tokens make", "--dataset.wrap", "none"]
    ended = command("sample", "generate", "--model", model, "--prompts", "a", *options, "--json")
    assert ended.code == 0 and '"stop_reason": "length"' in ended.out, ended.err


def test_chats_need_a_chat_template(command: Command, base: Path, write: Callable[..., Path]) -> None:
    write([{"messages": CHAT}])
    ended = command("sample", "generate", "--model", base, "--prompts", "rows.jsonl", "--output", "out.jsonl")
    assert ended.code == 4 and "rows.jsonl:1: the data hold chat messages, and the tokenizer has no" in ended.error
    assert "dataset.chat_template" in ended.error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["BASE"],
            4,
            "the model has no chat template, so it can't read a conversation; fix: give one with `--template",
        ),
        (["MODEL", "--beside", "BASE"], 4, "the model has no chat template"),
        (["MODEL", "--temperature", "-1"], 2, "--temperature: must be greater than or equal to 0; got -1"),
        (["MODEL", "--top-p", "0"], 2, "--top-p: must be greater than 0; got 0"),
        (["MODEL", "--tempratur", "1"], 2, "unknown option `tempratur`; fix: did you mean `--temperature`?"),
        (["./gone"], 4, "./gone: no such model directory or file"),
        (["rows.jsonl"], 4, "rows.jsonl: is a file, and no model; fix: give a model's directory, or a `.gguf` file"),
        (["MODEL/model.safetensors"], 4, "is a file, and no model; fix: give the model's directory, "),
    ],
)
def test_wrong_input_to_chat_is_one_line(
    command: Command,
    model: Path,
    base: Path,
    write: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    write([{"prompt": "a"}])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    given = [word.replace("MODEL", str(model)).replace("BASE", str(base)) for word in arguments]
    ended = command("chat", *given, "--no-history")
    assert ended.code == code and message in ended.error and ended.out == "", ended.err


@pytest.mark.parametrize(
    ("reward", "code", "message"),
    [
        ("no_such_module:score", 2, "`no_such_module:score`: there is no module `no_such_module`; fix: install it"),
        ("broken_rewards:score", 5, "importing `broken_rewards` raised an error; got ModuleNotFoundError: No module"),
        ("broken_rewards:score", 5, "nothing_of_that_name"),
        ("own_rewards:scor", 2, "`own_rewards` has no `scor`; fix: did you mean `score`?"),
        ("own_rewards:number", 2, "`own_rewards:number` is neither a function nor a class of RewardFn; got 3"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_named_with_its_module_and_the_reason(
    command: Command, write: Callable[..., Path], reward: str, code: int, message: str
) -> None:
    write([{"prompt": "a", "completion": "b"}])
    ended = command("score", reward, "--data", "rows.jsonl", "--output", "out.jsonl")
    assert ended.code == code and message in ended.error, ended.err
    assert not Path("out.jsonl").exists()


def test_scores_replace_no_file(command: Command, write: Callable[..., Path]) -> None:
    write([{"prompt": "a", "completion": "b"}])
    kept = write("precious", "kept.jsonl")
    ended = command("score", "own_rewards:score", "--data", "rows.jsonl", "--output", "kept.jsonl")
    assert ended.code == 7 and "kept.jsonl: the file exists; fix: " in ended.error and kept.read_text() == "precious"


# From Python


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    return tiny_policy()


@pytest.mark.parametrize(
    ("prompts", "options", "kind", "message"),
    [
        (["a", "b" * 63], {}, DataError, r"prompts\[1\]: the prompt leaves no room .* got 64 tokens for 64 positions"),
        (["a"], {"n": 0}, ConfigError, "n must be a whole number, at least 1; got 0"),
        (["a"], {"n": 1.5}, ConfigError, "n must be a whole number, at least 1; got 1.5"),
        (["a"], {"n": True}, ConfigError, "n must be a whole number, at least 1; got True"),
        (["a", ""], {}, DataError, r"prompts\[1\]: the prompt is empty"),
        ([[{"role": "user", "content": ""}]], {}, DataError, r"prompts\[0\]: the prompt is empty"),
        ([[]], {}, DataError, r"prompts\[0\]: .* no messages"),
        ([3.0], {}, DataError, r"prompts\[0\]"),
        ("Hi there", {}, DataError, r"prompts: a list of prompts is needed; got one prompt; fix: .*`\[prompt\]`"),
        ({"prompt": "Hi"}, {}, DataError, "a list of prompts is needed; got one prompt"),
        (CHAT, {}, DataError, "a list of prompts is needed; got one prompt"),
        ([5, 6, 7], {}, DataError, "a list of prompts is needed; got one prompt"),
        ([[*CHAT, {"role": "assistant", "content": "Yo"}]], {}, DataError, "ends on an assistant turn"),
        (["a"], {"temperature": -1.0}, ConfigError, "`temperature`: must be greater than or equal to 0"),
        (["a"], {"top_p": 0.0}, ConfigError, "`top_p`: must be greater than 0"),
        (["a"], {"max_new_tokens": 0}, ConfigError, "`max_new_tokens`: must be greater than or equal to 1"),
    ],
)
def test_wrong_input_to_generate_is_refused(
    policy: PolicyModel, prompts: Any, options: dict[str, Any], kind: type[RLHFError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        policy.generate(prompts, **options)


def test_chats_need_a_chat_template_from_python() -> None:
    base = PolicyModel(tiny_model(layers=1, hidden=16, max_positions=64), tiny_tokenizer(chat_template=False))
    with pytest.raises(ModelError, match=r"prompts\[0\]: .*no chat template"):
        base.generate([CHAT])


def test_options_that_are_unknown_or_wrong_are_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown option `tempratur`; fix: did you mean `temperature`"):
        SamplingConfig.parse({"tempratur": 1})
    with pytest.raises(ConfigError, match="stands for bytes that"):
        SamplingConfig.parse({"stop": ["\ufffd"]})
