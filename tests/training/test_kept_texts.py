"""What is exported keeps what was trained with: the chat template, how plain text is read, special tokens, what ends a turn."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from tokenizers import AddedToken

from rlhf_core import registry
from rlhf_core.contracts.reward import Sample
from rlhf_core.data.collate import collate
from rlhf_core.data.encoder import Encoder
from rlhf_core.data.open_source import open_source
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import VOCAB_SIZE, save_tiny, tiny_tokenizer

NEW = (
    "{% for m in messages %}{{ '<|' + m.role + '|>NEW ' + m.content + '<|tool|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>NEW ' }}{% endif %}"
)
ASK = [{"role": "user", "content": "q"}]
PAIRS = [{"prompt": ASK, "chosen": "good", "rejected": "bad"}] * 4
ANSWERS = [{"prompt": ASK, "response": "good"}] * 4


def run(method: str, model, data, tmp_path, **options):
    kind = registry.get("trainer", method)
    settings = {"max_steps": 1, "batch_size": 4, "max_length": 64, "logging": {"progress": False}} | options
    trainer = kind(kind.Config(**settings), model=str(model), data=data, output=str(tmp_path / "out"))
    trainer.train()
    return trainer, tmp_path / "out" / "model"


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize(
    ("method", "data", "options"),
    [
        ("sft", ANSWERS, {}),
        ("sft", ANSWERS, {"lora": {"rank": 2}}),
        ("dpo", PAIRS, {}),
        ("reward_model", PAIRS, {"ensemble": {"size": 2, "share_backbone": False}}),
        ("process_reward", PAIRS, {"outcome_weight": 1.0}),
    ],
)
def test_every_export_has_the_template_that_was_trained_with(method, data, options, template, tmp_path):
    base = save_tiny(tmp_path / "base", layers=1, hidden=16, tokenizer=tiny_tokenizer(chat_template=template))
    _, model = run(method, base, data, tmp_path, dataset={"chat_template": NEW}, **options)
    folders = [model, *sorted(model.glob("member-*"))]
    assert len(folders) == (2 if "ensemble" in options else 1)
    for folder in folders:
        assert (folder / "chat_template.jinja").read_text() == NEW


def test_a_reward_reads_a_prompt_as_its_training_did(tmp_path):
    base = save_tiny(tmp_path / "base", layers=1, hidden=16)
    trainer, model = run("reward_model", base, PAIRS, tmp_path, dataset={"chat_template": NEW})
    rows = list(open_source(PAIRS[:1]).rows())
    row = Encoder(tiny_tokenizer(), "preference", chat_template=NEW).encode(rows)[0].row
    kind = registry.get("reward", "reward_model")
    score = kind(kind.Config(model=str(model))).score([Sample(ASK, "good")])[0]
    assert score == pytest.approx(trainer.models["reward"].eval().score(collate([row]))[0].item(), abs=1e-5)


def test_plain_text_trained_as_a_chat_is_a_chat_from_then_on(tmp_path):
    base = save_tiny(tmp_path / "base", layers=1, hidden=16)
    data = [{"prompt": "q", "response": "good"}] * 4
    _, model = run("sft", base, data, tmp_path, dataset={"wrap": "chat"})
    policy = PolicyModel.from_pretrained(model)
    for record in ("sft", "prompt"):
        texts, chats = (
            Encoder(policy.tokenizer, record).encode(list(open_source(rows).rows()))[0].row
            for rows in ([{"prompt": "q", "response": "a"}], [{"prompt": ASK, "response": "a"}])
        )
        assert texts.prompt_ids == chats.prompt_ids and texts.responses == chats.responses
    as_text, as_chat = policy.generate(["q", ASK], max_new_tokens=4, temperature=0)
    assert as_text == as_chat
    # The next stage takes it from there, unless it says otherwise.
    plain = Encoder(policy.tokenizer, "prompt", wrap="none").encode(list(open_source([{"prompt": "q"}]).rows()))[0].row
    assert policy.tokenizer.decode(plain.prompt_ids) == "<|bos|>q"


def test_special_tokens_that_data_may_use_are_kept(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=True)])
    base = save_tiny(tmp_path / "base", layers=1, hidden=16, tokenizer=tokenizer, vocab_size=VOCAB_SIZE + 1)
    rows = [{"prompt": ASK, "response": "<think>good"}] * 4
    _, model = run("sft", base, rows, tmp_path, dataset={"special_tokens": ["<think>"]})
    kept = PolicyModel.from_pretrained(model).tokenizer
    row = Encoder(kept, "sft").encode(list(open_source(rows[:1]).rows()))[0].row
    assert row.responses[0][0] == kept.convert_tokens_to_ids("<think>")


def test_what_ends_a_turn_ends_a_completion(tmp_path):
    base = save_tiny(tmp_path / "base", layers=1, hidden=16)
    _, model = run("sft", base, ANSWERS, tmp_path, dataset={"chat_template": NEW}, max_steps=150, learning_rate=1e-2)
    tokenizer = tiny_tokenizer()
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|tool|>")]
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == stops
    ((completion,),) = PolicyModel.from_pretrained(model).generate([ASK], max_new_tokens=12, temperature=0)
    assert (completion.text, completion.stop_reason, completion.ids[-1]) == ("good", "end", stops[1])


def test_a_reward_renders_a_sample_s_tools(tmp_path):
    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + NEW
    tools = [{"type": "function", "function": {"name": "f"}}]
    data = [row | {"tools": tools} for row in PAIRS]
    base = save_tiny(tmp_path / "base", layers=1, hidden=16)
    trainer, model = run("reward_model", base, data, tmp_path, dataset={"chat_template": template})
    row = (
        Encoder(tiny_tokenizer(), "preference", chat_template=template)
        .encode(list(open_source(data[:1]).rows()))[0]
        .row
    )
    kind = registry.get("reward", "reward_model")
    samples = [Sample(ASK, "good", columns=columns) for columns in ({"tools": tools}, {})]
    with_tools, without = kind(kind.Config(model=str(model))).score(samples)
    assert with_tools == pytest.approx(trainer.models["reward"].eval().score(collate([row]))[0].item(), abs=1e-5)
    assert with_tools != without


class Later(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 5, 6, tzinfo=tz)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("tag", ["", "{% generation %}"])
def test_a_template_that_writes_the_date_resumes_on_another_day(streaming, tag, tmp_path, monkeypatch):
    template = "{{ 'Day ' + strftime_now('%d %b %Y') + '\\n' if strftime_now is defined }}" + NEW
    if tag:
        said = "{{ m.content + '<|tool|>' }}"
        template = template.replace("+ m.content + '<|tool|>' }}", "}}" + tag + said + "{% endgeneration %}")
    base = save_tiny(tmp_path / "base", layers=1, hidden=16)
    settings = {
        "max_length": 64,
        "batch_size": 2,
        "max_steps": 4,
        "checkpoint": {"every": 1},
        "logging": {"progress": False},
    }
    settings |= {"dataset": {"chat_template": template, "streaming": streaming}}
    data = [{"prompt": ASK, "response": f"good {number}"} for number in range(8)]
    kind = registry.get("trainer", "sft")

    def trainer():
        return kind(kind.Config(**settings), model=str(base), data=data, output=str(tmp_path / "out"))

    def weights(self, batch, own=kind.weights):
        if len(list((tmp_path / "out").rglob("manifest.json"))) == 2:
            raise KeyboardInterrupt
        return own(self, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(kind, "weights", weights)
        trainer().train()
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    resumed = trainer()
    assert resumed.train(resume=True).step == 4
    assert '"run_resumed"' in (tmp_path / "out" / "events.jsonl").read_text()
    rows = list(open_source(data[:1]).rows())
    (outcome,) = Encoder(resumed.models["policy"].tokenizer, "sft").encode(rows)
    assert "Day 06 May 2031" in resumed.models["policy"].tokenizer.decode(outcome.row.prompt_ids)
    # The exported template still asks for the day.
    assert (tmp_path / "out" / "model" / "chat_template.jinja").read_text() == template
