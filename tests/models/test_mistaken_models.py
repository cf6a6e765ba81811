"""What isn't a model, or not a whole one, is refused with what it is and what may have been meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rlhf_core.infra.errors import ModelError
from rlhf_core.infra.model_files import check_files, locate
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import save_tiny, tiny_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 269060552\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def model(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a whole model, `models/tiny` in the working directory."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(whole, "models/tiny"))


def refused(name: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        locate(str(name))
    return str(caught.value)


def refused_weights(name: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        check_files(str(name))
    with pytest.raises(
        ModelError, match="^" + str(caught.value).partition(";")[0].replace("(", r"\(").replace(")", r"\)")
    ):
        PolicyModel.from_pretrained(name)
    return str(caught.value)


def test_a_file_of_a_model(model: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert refused(model / name) == (
            f"models/tiny/{name}: is a file, and no model; fix: give the model's directory, models/tiny"
        )
    assert "did you mean models/tiny/model.safetensors?" in refused("./models/tiny/model.safetensor")


def test_a_pattern(model: Path) -> None:
    assert refused("models/t*") == (
        "models/t*: a model is one directory; got a pattern that matches models/tiny; fix: name one of them: models/tiny"
    )
    assert refused("models/x*").endswith("got a pattern that matches no model")


def test_directories_without_a_model(model: Path) -> None:
    Path("empty").mkdir()
    assert refused("empty") == "empty: is an empty directory, and no model"
    assert refused("models").endswith("isn't a model: it has no config.json; fix: did you mean models/tiny?")
    for step in (500, 1000):
        shutil.copytree(model, f"theirs/checkpoint-{step}")
    assert refused("theirs").endswith("fix: did you mean theirs/checkpoint-1000 (of 2 models in it)?")
    Path("run/checkpoints/step-10").mkdir(parents=True)
    Path("run/run.json").write_text("{}")
    assert "it is a run directory; give the model in it, run/model" in refused("run")


def test_a_checkpoint_of_a_run(model: Path) -> None:
    checkpoint = Path("run/checkpoints/step-10")
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    text = refused(checkpoint)
    assert "is a checkpoint of a run, which holds the state of its training, and no model" in text
    assert "rlhf train … --resume" in text
    shutil.copytree(model, "run/model")
    assert refused(checkpoint).endswith("fix: give the model that the run exported, run/model")


@pytest.mark.parametrize("kept", [0, 5, 100, 20_000])
def test_weights_that_are_cut_off(model: Path, kept: int) -> None:
    file = model / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    text = refused_weights(model)
    assert text.startswith("models/tiny: model.safetensors is ") and "copy or download the file again" in text
    assert ("empty" if kept == 0 else "cut off") in text
    if kept == 20_000:
        assert f"cut off: 20,000 of {len(content):,} bytes" in text


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    text = refused_weights(model)
    assert f"models/tiny: {name} is a pointer of Git LFS, not the file itself" in text and "git lfs pull" in text


def test_a_model_without_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "models/tiny: has a config.json, and no weights; fix: copy its files" in refused_weights(model)


def test_the_kind_of_a_checkpoint_that_is_no_language_model(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 272,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    encoder = {"vocab_size": 272, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    for model, said in (
        (
            LlamaForSequenceClassification(LlamaConfig(**sizes, num_labels=3)),
            "the checkpoint is a LlamaForSequenceClassification, and no language model; got no `lm_head.weight`",
        ),
        (LlamaModel(LlamaConfig(**sizes)), "the checkpoint is a LlamaModel, and no language model"),
        (
            T5ForConditionalGeneration(T5Config(**encoder, decoder_start_token_id=0)),
            "the model is no causal language model, or none that transformers has; got a model of the family T5",
        ),
    ):
        place = tmp_path / type(model).__name__
        model.save_pretrained(place)
        tiny_tokenizer().save_pretrained(place)
        with pytest.raises(ModelError) as caught:
            PolicyModel.from_pretrained(place)
        assert str(caught.value).startswith(f"{place}: {said}")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (
            "vocab_size", 100,
            "the weights have other shapes than config.json describes; got `model.embed_tokens.weight` is [263, 64], and"
            " config.json makes it [100, 64]",
        ),
        ("num_hidden_layers", 1, "the checkpoint's layers from number 1 on (1 in all) are left out"),
    ],
)  # fmt: skip
def test_a_configuration_that_was_changed_since(
    model: Path, caplog: pytest.LogCaptureFixture, key: str, value: int, said: str
) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    try:
        PolicyModel.from_pretrained(model)
    except ModelError as error:
        assert said in str(error)
    else:
        assert said in caplog.text


def test_a_model_without_its_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="models/tiny: its tokenizer can't be read; got Expecting property name"):
        PolicyModel.from_pretrained("models/tiny")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="models/tiny: has no tokenizer; got none of tokenizer"):
        PolicyModel.from_pretrained("models/tiny")
