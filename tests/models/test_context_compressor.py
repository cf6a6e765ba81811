"""Soft tokens and the compressor that makes them: against transformers' `inputs_embeds`, by invariances, and through files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from rlhf_core.config.training import LoraConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.infra.errors import ConfigError, ModelError
from rlhf_core.models import PolicyModel
from rlhf_core.models.context_compressor import (
    ContextCompressor,
    Summary,
    SummaryHead,
    check_reader,
    context_span,
)
from rlhf_core.models.soft_tokens import (
    SOFT,
    SoftVocabulary,
    end_soft_tokens,
    reads_soft_tokens,
    with_soft_tokens,
)
from rlhf_core.testing.tiny import save_tiny, tiny_model, tiny_tokenizer


def policy(seed: int = 0) -> PolicyModel:
    return PolicyModel(tiny_model(seed, layers=2), tiny_tokenizer())


def batch_of(prompt: list[int], response: list[int]) -> Batch:
    return Batch(
        torch.tensor([prompt]), torch.tensor([len(prompt)]), torch.tensor([response]), torch.tensor([len(response)]),
        torch.tensor([0]), torch.ones(1, len(response), dtype=torch.bool), rows=(0,),
    )  # fmt: skip


def test_rows_equal_to_embeddings_change_nothing() -> None:
    model, prompt, response = policy(), [9, 40, 77, 12], [30, 31, 32]
    plain = model.token_logps(batch_of(prompt, response))
    rows = model.network.get_input_embeddings().weight[[40, 77]]
    with with_soft_tokens(model.network, rows) as first:
        soft = model.token_logps(batch_of([9, first, first + 1, 12], response))
    assert torch.equal(plain, soft)
    assert torch.equal(model.token_logps(batch_of(prompt, response)), plain)


def test_soft_tokens_are_what_inputs_embeds_are() -> None:
    model, prompt, response = policy(), [9, 0, 0, 12], [30, 31, 32]
    rows = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    with with_soft_tokens(model.network, rows) as first:
        found = model.token_logps(batch_of([9, first, first + 1, 12], response))
        (gradient,) = torch.autograd.grad(found.sum(), rows)
    embedded = model.network.get_input_embeddings()(torch.tensor([prompt + response])).detach().clone()
    embedded[0, 1:3] = rows.detach()
    embedded.requires_grad_()
    logps = model.network(inputs_embeds=embedded).logits.log_softmax(-1)[0, 3:6]
    wanted = logps[torch.arange(3), torch.tensor(response)]
    torch.testing.assert_close(found[0], wanted, atol=1e-5, rtol=0)
    wanted.sum().backward()
    assert embedded.grad is not None
    torch.testing.assert_close(gradient, embedded.grad[0, 1:3], atol=1e-5, rtol=1e-4)


def test_a_network_reads_one_set_of_soft_tokens() -> None:
    model = policy()
    with (
        with_soft_tokens(model.network, torch.zeros(1, 64)),
        pytest.raises(RuntimeError, match="other soft tokens"),
        with_soft_tokens(model.network, torch.zeros(1, 64)),
    ):
        pass
    with pytest.raises(ValueError, match=r"\(N, 64\)"), with_soft_tokens(model.network, torch.zeros(1, 63)):
        pass


def test_ids_of_a_context_follow_from_its_name() -> None:
    ids = SoftVocabulary.ids_of("a context", 3)
    assert ids == SoftVocabulary.ids_of("a context", 3) and ids.start > SOFT
    assert not {*ids} & {*SoftVocabulary.ids_of("another", 3)}
    assert ids.stop < 1 << 63


def test_a_vocabulary_gives_each_id_its_row_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    model, vocabulary = policy(), SoftVocabulary()
    first, second = (SoftVocabulary.ids_of(name, 2) for name in ("one", "two"))
    rows = {ids: torch.full((2, 64), float(n)) for n, ids in enumerate((first, second), 1)}
    vocabulary.add(rows)
    vocabulary.attach(model.network)
    embedding = model.network.get_input_embeddings()
    found = embedding(torch.tensor([[second[1], 9, first[0], second[0]]]))[0]
    assert found[0].eq(2).all() and found[2].eq(1).all() and torch.equal(found[1], embedding.weight[9])
    monkeypatch.setattr("rlhf_core.models.soft_tokens.LARGEST", 1024)
    third = SoftVocabulary.ids_of("three", 2)
    vocabulary.add({third: torch.full((2, 64), 3.0)})
    assert first not in vocabulary and second in vocabulary and third in vocabulary
    with pytest.raises(RuntimeError, match="forgotten"):
        embedding(torch.tensor([[first[0]]]))
    # What is about to be read isn't forgotten, however old it is.
    vocabulary.add({first: torch.full((2, 64), 1.0)}, used=[second])
    assert first in vocabulary and second in vocabulary and third not in vocabulary
    end_soft_tokens(model.network)
    assert not reads_soft_tokens(model.network)
    with pytest.raises(IndexError):
        embedding(torch.tensor([[third[0]]]))


def test_a_copy_of_a_network_reads_the_same_soft_tokens_and_ends_alone() -> None:
    model, vocabulary = policy(), SoftVocabulary()
    vocabulary.attach(model.network)
    vocabulary.attach(model.network)  # by another model of the same network
    twin = copy.deepcopy(model)
    ids = SoftVocabulary.ids_of("later", 1)
    vocabulary.add({ids: torch.ones(1, 64)})
    found = [one.network.get_input_embeddings()(torch.tensor([[ids[0]]])) for one in (model, twin)]
    assert torch.equal(*found) and found[0].eq(1).all()
    end_soft_tokens(twin.network)
    assert reads_soft_tokens(model.network) and not reads_soft_tokens(twin.network)
    with pytest.raises(RuntimeError, match="other soft tokens"):
        SoftVocabulary().attach(model.network)


# The compressor


SUMMARIES = pytest.mark.parametrize("summary", get_args(Summary))


def compressor(summary: Summary = "memory", *, chunk: int = 8) -> ContextCompressor:
    return ContextCompressor.on(policy(), chunk=chunk, ratios=(2, 4), summary=summary, seed=3)


def test_pieces() -> None:
    model = compressor()
    assert model.pieces(8, 2) == [(8, 4)]
    assert model.pieces(9, 4) == [(4, 1), (5, 2)]
    assert model.pieces(0, 2) == []
    assert model.pieces(17, 2) == [(6, 3), (5, 3), (6, 3)]
    with pytest.raises(ConfigError, match="too few memory tokens"):
        model.pieces(8, 1.5)


@SUMMARIES
def test_embeddings_are_those_of_an_unbatched_forward_pass(summary: Summary) -> None:
    model = compressor(summary)
    contexts = [[9, 40, 77, 12, 30], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]]
    found = model(contexts, [2.0, 4.0])
    assert [len(one) for one in found] == [3, 4]
    pieces = [(contexts[0], 3), (contexts[1][:5], 2), (contexts[1][5:], 2)]
    network = model.backbone.network
    for (ids, count), rows in zip(pieces, [found[0], found[1][:2], found[1][2:]], strict=True):
        embedded, memory = network.get_input_embeddings()(torch.tensor(ids)), model.head.memory
        whole = [embedded, memory[:count]] if summary == "memory" else [memory, embedded]
        hidden = network.model(inputs_embeds=torch.cat(whole)[None]).last_hidden_state[0]
        hidden = hidden[-count:] if summary == "memory" else means(hidden[1:], count)
        normed = hidden / hidden.square().mean(-1, keepdim=True).add(torch.finfo(torch.float32).eps).sqrt()
        torch.testing.assert_close(rows, model.head.scale * normed @ model.head.outer.weight.T, atol=1e-5, rtol=1e-4)


def means(hidden: Tensor, count: int) -> Tensor:
    """The means over runs of tokens, token i of n in run ⌊i · count / n⌋."""
    runs: list[list[Tensor]] = [[] for _ in range(count)]
    for i, state in enumerate(hidden):
        runs[i * count // len(hidden)].append(state)
    return torch.stack([torch.stack(run).mean(0) for run in runs])


@SUMMARIES
def test_padded_and_packed_rows_give_the_same_embeddings(summary: Summary) -> None:
    packed, padded = compressor(summary), compressor(summary)
    padded.backbone.set_options(layout="padded")
    contexts = [[9, 40, 77], [20, 21, 22, 23, 24, 25, 26]]
    for one, other in zip(packed(contexts, [2.0, 2.0]), padded(contexts, [2.0, 2.0]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_equal_contexts_are_compressed_once_and_empty_ones_to_nothing() -> None:
    model = compressor()
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    one, empty, again = model.compress([[9, 40], [], [9, 40]], 2)
    assert calls == [2] and torch.equal(one, again) and tuple(empty.shape) == (0, 64)
    assert not one.requires_grad


@SUMMARIES
def test_embeddings_begin_as_long_as_the_reader_s(summary: Summary) -> None:
    model = compressor(summary)
    weight = model.backbone.network.get_input_embeddings().weight
    (rows,) = model.compress([[9, 40, 77, 12]], 2)
    assert float(rows.detach().square().mean().sqrt()) == pytest.approx(
        float(weight.detach().square().mean().sqrt()), rel=1e-3
    )
    assert float(model.head.memory.detach().square().mean().sqrt()) == pytest.approx(
        float(weight.detach().square().mean().sqrt()), rel=0.1
    )


@SUMMARIES
def test_files(tmp_path: Path, summary: Summary) -> None:
    model = compressor(summary)
    with torch.no_grad():
        model.head.outer.weight.add_(0.1)
    model.kept = (1, 7)
    model.save_pretrained(tmp_path / "saved")
    loaded = ContextCompressor.from_pretrained(tmp_path / "saved", frozen=True)
    slots = 4 if summary == "memory" else 1
    assert (loaded.chunk, loaded.ratios, loaded.head.slots, loaded.summary) == (8, (2.0, 4.0), slots, summary)
    assert loaded.kept == (1, 7)
    for one, other in zip(model.compress([[9, 40, 77]]), loaded.compress([[9, 40, 77]]), strict=True):
        assert torch.equal(one, other)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    if summary == "memory":
        with pytest.raises(ConfigError, match="needs 5 memory tokens"):
            ContextCompressor.from_pretrained(tmp_path / "saved", chunk=10)
    else:
        assert ContextCompressor.from_pretrained(tmp_path / "saved", chunk=10, ratios=(3,)).ratios == (3.0,)
        with pytest.raises(ConfigError, match="has pooled embeddings"):
            ContextCompressor.from_pretrained(tmp_path / "saved", summary="memory")


def test_a_language_model_is_no_compressor(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    with pytest.raises(ModelError, match="no compressor head") as error:
        ContextCompressor.from_pretrained(tmp_path / "model")
    assert "rlhf train context_compressor" in str(error.value)
    made = ContextCompressor.from_pretrained(tmp_path / "model", new_head=True, chunk=16, lora=LoraConfig(rank=2))
    assert made.head.slots == 8 and made.backbone.has_adapter


def test_pieces_fit_the_positions() -> None:
    short = PolicyModel(tiny_model(max_positions=64), tiny_tokenizer())
    with pytest.raises(ConfigError, match="doesn't fit the model's positions"):
        ContextCompressor.on(short, chunk=60, ratios=(2,), summary="memory")
    assert ContextCompressor.on(short, chunk=60, ratios=(2,), summary="pooled").chunk == 60


def test_a_reader_of_another_width_is_refused() -> None:
    model = compressor()
    other = PolicyModel(tiny_model(hidden=32), tiny_tokenizer())
    with pytest.raises(ModelError, match="can't read"):
        check_reader(model, other)


def test_an_adapter_is_merged_into_the_files(tmp_path: Path) -> None:
    model = ContextCompressor.on(policy().set_options(lora=LoraConfig(rank=2)), chunk=8, ratios=(2,))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    wanted: list[Tensor] = model.compress([[9, 40, 77]])
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(ContextCompressor.from_pretrained(tmp_path / "saved").compress([[9, 40, 77]]), wanted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_context_span() -> None:
    assert context_span(10, 2, 3) == slice(2, 7)
    assert context_span(4, 2, 3) == slice(2, 2)
    assert context_span(1, 2, 3) == slice(1, 1)


def test_memory_depends_on_its_seed_alone() -> None:
    torch.manual_seed(7)
    one = SummaryHead(8, 8, 4, seed=1)
    torch.manual_seed(8)
    assert torch.equal(one.memory, SummaryHead(8, 8, 4, seed=1).memory)
    assert not torch.equal(one.memory, SummaryHead(8, 8, 4, seed=2).memory)
