"""The card of a run's model: its metadata, what it was made from, and nothing that is private."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

from rlhf_core import registry
from rlhf_core.infra.model_card import MARK, front_matter, licence_of, public_text, root_of
from rlhf_core.testing.tiny import save_tiny
from rlhf_core.training.run_card import _hub_datasets, papers

ROWS = [{"prompt": f"{n} and {n}: ", "response": f"{2 * n}"} for n in range(8)]
PAIRS = [{"prompt": f"{n}: ", "chosen": f"{n}", "rejected": f"{n}!"} for n in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny(tmp_path_factory.mktemp("private") / "tiny", 0)
    (path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\n---\n# Tiny\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def trainer(method: str, model: Path, data, output: Path | None, eval_data=None, **options):
    cls = registry.get("trainer", method)
    given = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-2, "logging": {"progress": False}} | options
    return cls(cls.Config(**given), model=str(model), data=data, eval_data=eval_data, output=output)


def test_the_card_says_what_was_made_from_what(base: Path, data: Path, tmp_path: Path) -> None:
    stop = {"metric": "eval_loss", "patience": 5}
    run = trainer(
        "sft", base, str(data), tmp_path / "run", ROWS[:3], lora={"rank": 4}, early_stopping=stop, eval_steps=1
    )
    result = run.train()
    text = (tmp_path / "run" / "model" / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.tags == ["rlhf_core", "sft", "lora"] and card.data.license == "other"
    assert card.data.to_dict()["license_name"] == "llama3" and "base_model" not in card.data.to_dict()
    for wanted in (
        "# tiny, trained by sft",
        "[Ouyang et al. 2022](https://arxiv.org/abs/2203.02155)",
        f"| training | rows.jsonl | 8 | 8 | `{hashlib.sha256(data.read_bytes()).hexdigest()}` |",
        hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest(),
        "| metric | before training | this model |",
        f"| {result.eval_metrics['eval_loss']:.4f} |",
        "| metric | first step | last step |",
        "learning_rate: 0.01",
        "AutoPeftModelForCausalLM",
        "The base model's licence is llama3, by the card of `tiny`.",
        "transformers ",
    ):
        assert wanted in text, wanted
    assert text.count(MARK) == 1


def test_nothing_private_is_in_it(base: Path, data: Path, tmp_path: Path) -> None:
    trainer("sft", base, str(data), tmp_path / "home" / "run", str(data)).train()
    text = (tmp_path / "home" / "run" / "model" / "README.md").read_text()
    for private in (str(base.parent), str(data.parent), str(tmp_path), "/tmp", "/home"):
        assert private not in text
    assert "| evaluation | rows.jsonl |" in text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("/home/ann/models/base", "base"),
        ("trained on /data/ann/rows.jsonl, then", "trained on rows.jsonl, then"),
        ("~/models/base", "base"),
        ("/srv/base+/srv/adapters/one", "base+one"),
        ("C:\\Users\\ann\\rows.jsonl", "rows.jsonl"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("runs/first/model", "runs/first/model"),
        ("tokens/s and and/or", "tokens/s and and/or"),
        ("hf_abcdefghijklmnopqrstuv", "[redacted]"),
        ("api_key: sesame", "api_key: [redacted]"),
    ],
)
def test_public_text(text: str, shown: str) -> None:
    assert public_text(text) == shown


def test_a_card_of_the_users_own_outlives_a_resume_and_ours_is_renewed(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer("sft", base, ROWS, run).train()
    card = run / "model" / "README.md"
    first = card.read_text()
    card.write_text(first.replace("# tiny", "# Renewed"))
    trainer("sft", base, ROWS, run).train(resume=True)
    assert "# tiny, trained by sft" in card.read_text()
    card.write_text("# Mine\n")
    trainer("sft", base, ROWS, run).train(resume=True)
    assert card.read_text() == "# Mine\n"


def test_a_reward_model_is_loaded_by_our_own_class(base: Path, tmp_path: Path) -> None:
    trainer("reward_model", base, PAIRS, tmp_path / "run").train()
    text = (tmp_path / "run" / "model" / "README.md").read_text()
    header = front_matter(text)
    assert (header["library_name"], header["pipeline_tag"]) == ("rlhf_core", "text-classification")
    assert "reward-model" in header["tags"] and "from rlhf_core import RewardModel" in text
    assert "AutoModel" not in text


def test_a_run_on_a_run_has_the_first_ones_ancestry(base: Path, tmp_path: Path) -> None:
    trainer("sft", base, ROWS, tmp_path / "first").train()
    card = tmp_path / "first" / "model" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: someone/base\n", 1))
    trainer("dpo", tmp_path / "first" / "model", PAIRS, tmp_path / "second", lora={"rank": 2}).train()
    text = (tmp_path / "second" / "model" / "README.md").read_text()
    assert front_matter(text)["base_model"] == "someone/base" and front_matter(text)["license"] == "other"
    assert "# first/model, trained by dpo" in text and root_of(str(tmp_path / "second" / "model")).endswith(
        "first/model"
    )


def test_licences_that_nothing_states_are_unknown(base: Path, tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", 0)
    assert "unknown: `plain` has no card on this machine" in licence_of(str(plain)).sentence
    for text in ("# No metadata", "---\ntags: [a]\n---\n", "---\n: {\n---\n", "---\n- a\n---\n"):
        (plain / "README.md").write_text(text)
        assert "the card of `plain` states none" in licence_of(str(plain)).sentence
    assert "unknown" in licence_of("someone/never-fetched").sentence


def test_data_of_the_hub_is_named_and_papers_are_those_that_the_code_cites() -> None:
    of_hub = SimpleNamespace(data=["openai/gsm8k:main", "rows.jsonl.gz/x/y"], eval_data="hf://datasets/openai/gsm8k")
    assert _hub_datasets(of_hub) == ["openai/gsm8k"]  # type: ignore[arg-type]
    numbers = [number for _, number in papers(registry.get("trainer", "dpo"))]
    assert "2305.18290" in numbers and len(numbers) == len(set(numbers))
    assert papers(type("Local", (), {})) == []
