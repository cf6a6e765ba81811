"""What data may mean by their texts: special tokens by name, plain text as a chat, each turn as a row."""

from __future__ import annotations

import logging

import pytest
from data_helpers import bpe_tokenizer, metaspace_tokenizer
from tokenizers import AddedToken

from rlhf_core import registry
from rlhf_core.config.training import DatasetConfig
from rlhf_core.data import SFTDataset, StreamingSFTDataset
from rlhf_core.data.data_stream import DataStream
from rlhf_core.data.encoder import EncodedRow, Encoder
from rlhf_core.data.open_source import open_source
from rlhf_core.infra.errors import ConfigError
from rlhf_core.testing.tiny import save_tiny, tiny_tokenizer

THINK = ["<think>", "</think>"]
ASK = {"role": "user", "content": "q"}
SAID = "<think>hm</think>yes <|end|>"


def thinking(*, special: bool = True):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in THINK])
    return tokenizer


def encoded(tokenizer, row, record="sft", **options) -> EncodedRow:
    return Encoder(tokenizer, record, **options).encode(list(open_source([row]).rows()))[0].row


@pytest.mark.parametrize(
    "row", [{"messages": [ASK, {"role": "assistant", "content": SAID}]}, {"prompt": "q", "response": SAID}]
)
def test_listed_tokens_are_themselves_and_all_others_text(row):
    tokenizer = thinking()
    think, end = tokenizer.convert_tokens_to_ids(THINK), tokenizer.eos_token_id
    ids = encoded(tokenizer, row, special_tokens=THINK).responses[0]
    assert [token for token in ids if token in think] == think and ids.count(end) == 1
    assert tokenizer.decode(ids) == SAID + "<|end|>"
    ids = encoded(tokenizer, row).responses[0]
    assert not set(ids) & {*think} and tokenizer.decode(ids) == SAID + "<|end|>"


def test_pairs_and_prompts_use_them_too():
    tokenizer = thinking()
    think = tokenizer.convert_tokens_to_ids("<think>")
    pair = encoded(
        tokenizer, {"prompt": "<think>a", "chosen": "<think>b", "rejected": "c"}, "preference", special_tokens=THINK
    )
    assert pair.prompt_ids.count(think) == pair.responses[0].count(think) == 1
    assert (
        encoded(
            tokenizer, {"prompt": [{**ASK, "content": "<think>"}]}, "prompt", special_tokens=THINK
        ).prompt_ids.count(think)
        == 1
    )


def test_text_behind_a_listed_token_is_encoded_as_the_tokenizer_does():
    tokenizer = metaspace_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=True, normalized=False)])
    ids = encoded(tokenizer, {"prompt": "a", "response": "b<think>c d"}, special_tokens=["<think>"]).responses[0]
    assert ids[1:-1] == tokenizer("b<think>c d", add_special_tokens=False)["input_ids"][2:]


def test_added_tokens_that_are_not_special_are_themselves_anyway():
    tokenizer = thinking(special=False)
    row = {"prompt": "q", "response": SAID}
    assert encoded(tokenizer, row) == encoded(tokenizer, row, special_tokens=THINK)


def test_a_token_that_the_tokenizer_lacks_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match=r"dataset\.special_tokens: the tokenizer has no such token; got '<thinks>'.*`<think>`"
    ):
        Encoder(thinking(), "sft", special_tokens=["<thinks>"])


@pytest.mark.parametrize("ending", ["{}", "{}\n", ""])
@pytest.mark.parametrize("make", [tiny_tokenizer, bpe_tokenizer])
def test_a_rendered_text_has_one_beginning_and_one_end(make, ending):
    tokenizer = make()
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    listed = [tokenizer.bos_token, tokenizer.eos_token]
    assert begin is not None and begin != end
    ending = ending.format(tokenizer.eos_token)
    rows = [
        {"prompt": f"{tokenizer.bos_token}q", "response": f"a b{ending}"},
        {"text": f"{tokenizer.bos_token}q a{ending}"},
    ]
    for row in rows:
        found = encoded(tokenizer, row, special_tokens=listed)
        ids = [*found.prompt_ids, *found.responses[0]]
        assert ids[0] == begin and ids[-1] == end and ids.count(begin) == ids.count(end) == 1
        assert all(found.masks[0])
    # What follows an end makes it none.
    found = encoded(tokenizer, {"prompt": "q", "response": f"a{tokenizer.eos_token}b"}, special_tokens=listed)
    assert found.responses[0].count(end) == 2 and found.responses[0][-1] == end


def test_what_was_spelled_out_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        dataset = SFTDataset([{"messages": [ASK, {"role": "assistant", "content": SAID}]}], thinking())
    assert dataset.report.notes["control tokens in text, encoded as text"]["tokens"] == [
        "<think>",
        "</think>",
        "<|end|>",
    ]
    assert "`dataset.special_tokens` lists those that data may use" in caplog.text


# Plain text on a model with a chat template.


@pytest.mark.parametrize("record", ["sft", "preference", "unpaired", "prompt"])
def test_wrapped_text_is_a_chat(record):
    tokenizer = tiny_tokenizer()
    rest = {"response": "b", "chosen": "b", "rejected": "c", "label": "desirable"}
    texts = encoded(tokenizer, {"prompt": "q"} | rest, record, wrap="chat")
    chats = encoded(tokenizer, {"prompt": [ASK]} | rest, record)
    assert (texts.prompt_ids, texts.responses, texts.masks) == (chats.prompt_ids, chats.responses, chats.masks)
    assert tokenizer.decode(texts.prompt_ids) == "<|bos|><|user|>q<|end|><|assistant|>"
    # Chats are what they are, and whole texts answer nobody.
    assert encoded(tokenizer, {"prompt": [ASK]} | rest, record, wrap="chat") == chats


def test_a_text_without_a_prompt_is_not_wrapped():
    tokenizer = tiny_tokenizer()
    assert encoded(tokenizer, {"text": "all of it"}, wrap="chat") == encoded(tokenizer, {"text": "all of it"})


@pytest.mark.parametrize("kind", [SFTDataset, StreamingSFTDataset])
def test_plain_text_on_a_model_with_a_chat_template_is_warned_of_once(kind, caplog):
    def warnings(tokenizer, row, **options) -> int:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            list(kind([row] * 300, tokenizer, options=DatasetConfig(**options)))
        return sum("`dataset.wrap: chat`" in record.getMessage() for record in caplog.records)

    plain = {"prompt": "q", "response": "b"}
    assert warnings(tiny_tokenizer(), plain) == 1
    assert warnings(tiny_tokenizer(), plain, wrap="none") == warnings(tiny_tokenizer(), plain, wrap="chat") == 0
    assert warnings(tiny_tokenizer(chat_template=False), plain) == 0
    assert warnings(tiny_tokenizer(), {"messages": [ASK, {"role": "assistant", "content": "b"}]}) == 0


# Each turn as a row.

TALKS = [
    {"messages": [{"role": ("user", "assistant")[n % 2], "content": f"{talk}{n}"} for n in range(2 * (1 + talk % 3))]}
    for talk in range(20)
]
EACH = DatasetConfig(turns="each", shuffle_block=6)


def responses(rows) -> list[str]:
    return [tiny_tokenizer().decode(row.responses[0]) for row in rows]


def test_map_style_and_streaming_make_the_same_rows():
    mapped = SFTDataset(TALKS, tiny_tokenizer(), options=EACH)
    streamed = StreamingSFTDataset(TALKS, tiny_tokenizer(), options=EACH)
    turns = [f"{talk}{n}<|end|>" for talk in range(20) for n in range(1, 2 * (1 + talk % 3), 2)]
    assert responses(mapped.rows(range(len(mapped)))) == responses(streamed) == turns
    assert len(mapped) == len(turns) == streamed.report.kept


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 7])
def test_a_stream_resumes_within_a_conversation(taken):
    def stream() -> DataStream:
        return DataStream(StreamingSFTDataset(TALKS, tiny_tokenizer(), options=EACH), batch_size=1, epochs=2, seed=3)

    def ids(batches) -> list[list[int]]:
        return [batch.response_ids[0].tolist() for batch in batches]

    whole = ids(stream())
    before = stream()
    first = ids([next(before) for _ in range(taken)])
    after = stream()
    after.load_state_dict(before.state_dict())
    assert first + ids(after) == whole and len(whole) == 2 * sum(1 + talk % 3 for talk in range(20))


def test_rows_without_turns_are_refused():
    with pytest.raises(ConfigError, match=r"dataset\.turns: rows of `preference` have no turns"):
        Encoder(tiny_tokenizer(), "preference", turns="each")


def test_each_turn_trains(tmp_path):
    base = save_tiny(tmp_path / "base", layers=1, hidden=16)
    kind = registry.get("trainer", "sft")
    config = kind.Config(batch_size=5, max_length=128, logging={"progress": False}, dataset={"turns": "each"})
    trainer = kind(config, model=str(base), data=TALKS, output=str(tmp_path / "out"))
    assert trainer.train().step == -(-sum(1 + talk % 3 for talk in range(20)) // 5)
