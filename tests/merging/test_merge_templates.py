"""The chat template of a merged model, and rows that are added to its embeddings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from merge_helpers import merge, read_weights, tiny_family

from rlhf_core.infra.errors import ConfigError
from rlhf_core.merging.job import load_merge_job

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "3?"},
]
# The tiny tokenizer's first and last token are <|bos|> and <|end|>.
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4.<|im_end|>\n"
    "<|im_start|>user\n3?<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|bos|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "3?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<|bos|>[INST] Be brief.\n\n2+2? [/INST] 4.<|end|>[INST] 3? [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\n2+2?\n\n### Response:\n4.<|end|>\n\n### Instruction:\n3?\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]2+2?\n[|assistant|]4.[|endofturn|]\n[|user|]3?\n[|assistant|]",
    "{% for m in messages %}{{ m['content'] }};{% endfor %}": "Be brief.;2+2?;4.;3?;",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return tiny_family(tmp_path_factory.mktemp("templates"), 3, layers=1, hidden=16, heads=2, kv_heads=1)[1]


def rendered(path: Path) -> str:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return str(tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("template", RENDERED)
def test_a_template_by_name_or_text(template: str, models: list[Path], tmp_path: Path) -> None:
    merge("linear", models[:2], tmp_path / "out", chat_template=template)
    assert rendered(tmp_path / "out") == RENDERED[template]


def test_auto_is_what_most_models_have(models: list[Path], tmp_path: Path) -> None:
    copies = [shutil.copytree(model, tmp_path / model.name) for model in models]
    for copy in copies[1:]:
        (copy / "chat_template.jinja").unlink()
    # Templates may also stand among the tokenizer's settings, where one in the result would win or lose by chance.
    for copy, text in zip(copies, ("A", "B", [{"name": "default", "template": "B"}]), strict=True):
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": text}))
    merge("linear", copies, tmp_path / "out", chat_template="auto")
    assert rendered(tmp_path / "out") == "B"
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())


def test_a_template_that_is_none_is_named(models: list[Path], tmp_path: Path) -> None:
    for text, message in (
        ("chatlm", "did you mean `chatml`"),
        ("{% for %}", "is not a Jinja template"),
        ("{{ a", "Jinja"),
    ):
        with pytest.raises(ConfigError) as raised:
            merge("linear", models, tmp_path / "out", chat_template=text)
        assert message in raised.value.line()
    merge("linear", models, tmp_path / "tagged", chat_template="{% generation %}{{ messages }}{% endgeneration %}")
    assert not (tmp_path / "out").exists()


def test_rows_are_padded_with_zeros(models: list[Path], tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\ntokenizer: {source: union, pad_to_multiple_of: 64}\n"
        "chat_template: chatml\nmodels:\n" + "".join(f"  - model: {model}\n" for model in models)
    )
    load_merge_job(tmp_path / "theirs.yaml", flags=["--output", str(tmp_path / "out")]).merger().merge()
    merge("linear", models, tmp_path / "plain")
    table, plain = (read_weights(tmp_path / name)["model.embed_tokens.weight"] for name in ("out", "plain"))
    assert len(table) == 320 and torch.equal(table[:263], plain) and not bool(table[263:].any())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 320 and len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 263
    merge("linear", models, tmp_path / "as-they-are", pad_to_multiple_of=263)
    assert torch.equal(read_weights(tmp_path / "as-they-are")["model.embed_tokens.weight"], plain)
