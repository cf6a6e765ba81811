"""Models are uploaded to a hub with their cards; what can fail is checked before, and loses nothing after."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

import pytest
from hub_stand_in import Hub
from huggingface_hub import ModelCard, constants
from small_runs import ROWS, train

from rlhf_core import push_to_hub, registry
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.infra.model_card import front_matter


def test_a_runs_model_is_pushed_with_its_card(rlhf, hub: Hub, adapter_run: Path, base: Path) -> None:
    code, out, err = rlhf("push", adapter_run, "me/first", "--message", "A first one")
    assert code == 0 and out == f"pushed: {hub.address}/me/first\n"
    assert "`tiny`: others can't load it" in err
    files = hub.files("me/first")
    assert files["adapter_model.safetensors"] == (adapter_run / "model" / "adapter_model.safetensors").read_bytes()
    assert hub.large and hub.repos["me/first"].messages == ["A first one"] and not hub.repos["me/first"].private
    card = files["README.md"].decode()
    assert 'from_pretrained("me/first")' in card and "path/to/this/folder" not in card
    assert ModelCard(card).data.license == "apache-2.0"
    everything = b"".join(files.values()).decode(errors="replace")
    assert str(base.parent) not in everything
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "tiny"
    assert str(base) in (adapter_run / "model" / "adapter_config.json").read_text()  # the run is left as it is


def test_the_base_gets_its_name_on_the_hub(rlhf, hub: Hub, adapter_run: Path) -> None:
    code, _, err = rlhf("push", adapter_run, "first", "--base", "someone/tiny", "--revision", "v1", "--private")
    assert (code, err) == (0, "") and hub.repos["me/first"].private
    files = hub.files("me/first", "v1")
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "someone/tiny"
    card = files["README.md"].decode()
    assert front_matter(card)["base_model"] == "someone/tiny" and "local name" not in card
    assert hub.files("me/first") == {}


def test_weights_of_another_kind_are_replaced_and_a_card_of_the_users_own_is_kept(
    rlhf, hub: Hub, adapter_run: Path, tmp_path: Path
) -> None:
    assert rlhf("push", adapter_run, "me/first")[0] == 0
    hub.files("me/first")["README.md"] = b"# Mine"
    hub.files("me/first")["samples.txt"] = b"kept"
    assert rlhf("export", adapter_run, "--merged", "--output", tmp_path / "whole")[0] == 0
    code, _, err = rlhf("push", tmp_path / "whole", "me/first")
    assert code == 0 and "README.md of its own on the hub, which is kept" in err
    files = hub.files("me/first")
    assert "model.safetensors" in files and not any(name.startswith("adapter") for name in files)
    assert files["README.md"] == b"# Mine" and files["samples.txt"] == b"kept"


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["RUN", "you/first"], 2, "push to `me/first`, or use a token of a member of `you`"),
        (["RUN", "a b/c"], 2, "isn't a name that the hub allows"),
        (["RUN/checkpoints/step-1", "me/x"], 4, "a checkpoint is no model that can be loaded yet"),
        (["RUN/nothing", "me/x"], 4, "no such run or model"),
        (["RUN", "me/x", "--base", "../tiny"], 2, "must be a name on the hub"),
    ],
)
def test_careless_pushes_say_what_to_do(rlhf, hub: Hub, adapter_run: Path, arguments, code: int, said: str) -> None:
    found, _, err = rlhf("push", *(one.replace("RUN", str(adapter_run)) for one in arguments))
    assert found == code and said in err and not hub.repos


def test_a_public_repository_is_not_taken_for_a_private_one(rlhf, hub: Hub, adapter_run: Path) -> None:
    assert rlhf("push", adapter_run, "our-lab/first")[0] == 0
    code, _, err = rlhf("push", adapter_run, "our-lab/first", "--private")
    assert code == 2 and "the repository is public, and a private one was asked for" in err


@pytest.mark.parametrize(
    "fault, code, said",
    [
        ({"whoami": 401}, 2, "doesn't know the token"),
        ({"repos/create": 403}, 2, "the token may not write there"),
        ({"/lfs/": 403}, 2, "the token may not write there"),
        ({"/commit/": 500}, 7, "refused the upload with status 500"),
        ({"validate-yaml": 400}, 7, "refused the upload"),
    ],
)
def test_what_the_hub_refuses_is_one_line(rlhf, hub: Hub, adapter_run: Path, fault, code: int, said: str) -> None:
    hub.faults = fault
    found, _, err = rlhf("push", adapter_run, "me/first", "--base", "a/b")
    assert found == code and said in err.splitlines()[-1]


def test_tokens_that_are_missing_or_may_only_read_are_told(
    rlhf, hub: Hub, adapter_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.role = "read"
    code, _, err = rlhf("push", adapter_run, "me/first")
    assert code == 2 and "the token may only read" in err
    monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    code, _, err = rlhf("push", adapter_run, "me/first")
    assert code == 2 and "doesn't know the token" in err and "yyyy" not in err
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = rlhf("push", adapter_run, "me/first")
    assert code == 2 and "there is no token for the hub" in err and "hf auth login" in err


def test_a_hub_that_is_not_there(rlhf, hub: Hub, adapter_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    code, _, err = rlhf("push", adapter_run, "me/first")
    assert code == 7 and "the hub can't be reached" in err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = rlhf("push", adapter_run, "me/first")
    assert code == 2 and "HF_HUB_OFFLINE is set" in err


# At the end of a run


def test_a_run_pushes_its_model_at_its_end(hub: Hub, base: Path, tmp_path: Path) -> None:
    result = train(base, tmp_path / "run", push_to_hub="tiny-sft")
    assert result.pushed == f"{hub.address}/me/tiny-sft" and result.push_error is None
    files = hub.files("me/tiny-sft")
    assert files["model.safetensors"] == (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["pushed"] == result.pushed
    assert hub.repos["me/tiny-sft"].messages == ["Model after 2 steps"]
    assert push_to_hub(tmp_path / "run", "me/again") == f"{hub.address}/me/again"


def test_the_name_and_the_token_are_checked_before_anything_is_loaded(
    hub: Hub, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="can't write for this owner"):
        train(tmp_path / "no-such-model", tmp_path / "run", push_to_hub={"repo": "you/tiny"})
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ConfigError, match="no token for the hub"):
        train(tmp_path / "no-such-model", tmp_path / "run", push_to_hub="me/tiny")
    cls = registry.get("trainer", "sft")
    with pytest.raises(ConfigError, match="saves no model to push"):
        cls(cls.Config(max_steps=1, push_to_hub="me/tiny"), model=str(base), data=ROWS).train()


def test_a_failed_upload_loses_nothing(hub: Hub, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hub.faults = {"/commit/": 500}
    with caplog.at_level(logging.WARNING):
        result = train(base, tmp_path / "run", push_to_hub={"repo": "me/tiny", "private": True})
    assert result.pushed is None and "status 500" in str(result.push_error)
    assert f"`rlhf push {tmp_path / 'run'} me/tiny --private` tries again" in caplog.text
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["exit_code"]) == ("done", 0) and "status 500" in record["push_error"]
    with pytest.raises(StorageError, match="status 500"):
        push_to_hub(tmp_path / "run", "me/tiny", private=True)
    hub.faults = {}
    assert push_to_hub(tmp_path / "run", "me/tiny", private=True) == f"{hub.address}/me/tiny"
    assert "model.safetensors" in hub.files("me/tiny")


def test_the_command_says_by_its_exit_code_that_the_upload_failed(rlhf, hub: Hub, base: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--model", base, "--data", rows, "--max_steps", "1", "--batch_size", "2", "--push_to_hub", "me/tiny"]
    code, out, _ = rlhf("train", "sft", *flags, "--output", tmp_path / "good")
    assert code == 0 and f"pushed: {hub.address}/me/tiny" in out
    hub.faults = {"/preupload/": 403}
    code, out, err = rlhf("train", "sft", *flags, "--output", tmp_path / "bad")
    assert code == 7 and "the run is done and its model saved" in err.splitlines()[-1] and "done: 1 step," in out
    assert json.loads((tmp_path / "bad" / "status.json").read_text())["status"] == "done"
