"""Process reward models: steps found in ids, the losses against float64, aggregation, labels that don't fit, what is learned."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from batches import random_batch, relative
from hypothesis import given
from hypothesis import strategies as st
from rlhf_plugins.trainers.process_reward import (
    ProcessRewardModelConfig,
    ProcessRewardModelTrainer,
    first_wrong,
    step_loss,
)
from trainers_helpers import assert_same, built, gradients, small_policy

from rlhf_core.contracts.batch import Batch
from rlhf_core.data import PreferenceDataset, SFTDataset
from rlhf_core.data.collate import collate
from rlhf_core.data.step_labels import NO_LABEL, RIGHT, WRONG, read_step_labels
from rlhf_core.infra.errors import ConfigError, DataError, ModelError
from rlhf_core.models import ProcessRewardModel
from rlhf_core.models.reasoning_steps import AGGREGATIONS, step_ends
from rlhf_core.testing import TrainerContract, run_context
from rlhf_core.testing.arithmetic_task import ArithmeticTask, split_steps
from rlhf_core.testing.tiny import save_tiny, tiny_tokenizer


class TestProcessReward(TrainerContract):
    method = "process_reward"


@pytest.mark.slow
class TestProcessRewardByProduct(TrainerContract):
    method = "process_reward"
    options: ClassVar[dict[str, Any]] = {"aggregation": "product", "step_weight": 0.0, "ranking_weight": 1.0}


def encoded(*texts: str) -> Batch:
    data = SFTDataset([{"prompt": "?", "response": text} for text in texts], tiny_tokenizer())
    return collate([data[i] for i in range(len(texts))])


def ends_of(text: str, separator: str = "\n") -> list[int]:
    return step_ends(encoded(text), tiny_tokenizer(), separator)[0].nonzero().squeeze(1).tolist()


# The tiny tokenizer has one token per byte, and each response ends with its end token.
@pytest.mark.parametrize(
    ("text", "separator", "expected"),
    [
        ("ab\ncd\ne", "\n", [2, 5, 7]),  # the last step ends with the end token
        ("ab\ncd\n", "\n", [2, 5]),  # nothing follows the last separator
        ("a\n\nb", "\n", [1, 4]),  # a blank line is no step
        ("a\n\nb\nc", "\n\n", [2, 6]),
        ("abc", "\n", [3]),
        ("a. b. c", ". ", [2, 5, 7]),
    ],
)
def test_where_steps_end(text: str, separator: str, expected: list[int]) -> None:
    assert ends_of(text, separator) == expected


@given(st.lists(st.text(alphabet="0123456789+=é", min_size=1, max_size=6), min_size=1, max_size=5))
def test_as_many_ends_as_steps(steps: list[str]) -> None:
    assert len(ends_of("\n".join(steps))) == len(steps)


def test_golden_numbers() -> None:
    steps, labels = torch.tensor([[0.0, 2.0, 5.0]]), torch.tensor([[RIGHT, WRONG, NO_LABEL]])
    expected = [math.log(2), 2 + math.log1p(math.exp(-2)), 0.0]
    assert step_loss(steps, labels)[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_losses_and_gradients_equal_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = (3 * torch.randn(4, 6, generator=generator)).requires_grad_()
    labels = torch.randint(-1, 2, (4, 6), generator=generator).float()
    found = step_loss(steps, labels)
    p = 1 / (1 + torch.exp(-steps.double()))
    expected = torch.where(labels == RIGHT, -torch.log(p), torch.where(labels == WRONG, -torch.log(1 - p), 0.0))
    assert_same(found, expected, [steps])
    (ours,) = gradients(found, [steps])
    assert not ours[labels == NO_LABEL].any()
    assert ((ours < 0) == (labels == RIGHT)).all()


@given(st.lists(st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=5), min_size=1, max_size=4))
def test_aggregations_by_definition(rows: list[list[float]]) -> None:
    width = 2 * max(map(len, rows))
    steps, ends = torch.zeros(len(rows), width), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, values in enumerate(rows):
        for position, value in enumerate(values):
            steps[row, 2 * position + 1], ends[row, 2 * position + 1] = value, True

    def each(function: Any) -> list[float]:
        return [function(values) for values in rows]

    expected = {
        "min": each(min),
        "mean": each(lambda values: sum(values) / len(values)),
        "last": each(lambda values: values[-1]),
        "product": each(lambda values: math.log(math.prod(1 / (1 + math.exp(-v)) for v in values))),
    }
    for name, aggregate in AGGREGATIONS.items():
        assert aggregate(steps, ends).tolist() == pytest.approx(expected[name], rel=1e-4, abs=1e-5)


def test_first_wrong() -> None:
    assert first_wrong(torch.tensor([[False, True, True], [False] * 3, [True] * 3])).tolist() == [1, -1, 0]


def model() -> ProcessRewardModel:
    return ProcessRewardModel.on(small_policy().without_head(), seed=1).eval()


def test_scores_do_not_depend_on_padding_or_other_rows() -> None:
    reward, batch = model(), random_batch(4, 2, vocabulary=263, longest=20)
    with torch.no_grad():
        steps, outcome = reward.scores(batch)
        wide, same = reward.scores(batch.pad(2, 3, value=17))
        assert relative(wide[:, : steps.shape[1]], steps) < 1e-5 and relative(same, outcome) < 1e-5
        alone = torch.cat([reward.scores(batch.select([prompt]))[1] for prompt in range(4)])
    assert relative(alone, outcome) < 1e-5


def test_what_is_saved_scores_the_same(tmp_path: Path) -> None:
    reward, batch = model(), encoded("a\nb", "c")
    reward.save_pretrained(tmp_path / "prm")
    again = ProcessRewardModel.from_pretrained(tmp_path / "prm").eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again.scores(batch), reward.scores(batch), strict=True))
    with pytest.raises(ConfigError, match="trained with another separator"):
        ProcessRewardModel.from_pretrained(tmp_path / "prm", separator=". ")
    (tmp_path / "prm" / "process_reward_head.safetensors").unlink()
    with pytest.raises(ModelError, match="its scores would be random"):
        ProcessRewardModel.from_pretrained(tmp_path / "prm")
    with pytest.raises(ModelError, match="its scores would be random"):
        ProcessRewardModel.from_pretrained(save_tiny(tmp_path / "plain", hidden=32))


def run(tmp_path: Path, rows: Any, **options: Any) -> ProcessRewardModelTrainer:
    config = {"max_steps": 2, "batch_size": 4, "logging": {"progress": False}, **options}
    made = save_tiny(tmp_path / "model", hidden=32, layers=2, heads=2)
    return ProcessRewardModelTrainer(ProcessRewardModelConfig.parse(config), model=made, data=rows)


ROW = {"prompt": "1+1+1=?", "chosen": "1+1=2\n2+1=3", "rejected": "1+1=3\n3+1=4", "labels": [[1, 1], [0, 0]]}
STEPS = [["1+1=2", "2+1=3"], ["1+1=3", "3+1=4"]]
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "too few": (
        {"labels": [[1, 1], [0]]},
        r"`labels` has 1 entries for the 2 steps of `rejected`; got steps that end with '\\n'",
    ),
    "too many": ({"labels": [[1, 1, 1], [0, 0]]}, "`labels` has 3 entries for the 2 steps of `chosen`"),
    "flat": ({"labels": [1, 0]}, "`labels` must be two lists of true and false"),
    "no labels": ({"labels": [[1, 2], [0, 0]]}, "`labels` must be two lists of true and false"),
    "no texts": ({"steps": [["1+1=2", 3], STEPS[1]]}, "`steps` must be two lists of texts, for chosen and rejected"),
    "a list of texts": ({"steps": STEPS[0]}, "`steps` must be two lists of texts"),
    "fewer steps than labels": (
        {"steps": [STEPS[0], ["1+1=3"]]},
        "`steps` has 1 entries for the 2 steps of `rejected`",
    ),
    "other steps": (
        {"steps": [["1+1=2\n2+1=3"], STEPS[1]], "labels": None},
        "`steps` has 1 entries for the 2 steps of `chosen`; got steps that end with",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("streaming", [False, True])
def test_labels_and_steps_that_do_not_fit_are_refused(tmp_path: Path, case: str, streaming: bool) -> None:
    columns, said = MISFITS[case]
    rows = [ROW, {**ROW, "steps": STEPS, **columns}, ROW, ROW]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))  # a blank line is no row
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:3: {said}") as caught:
        run(tmp_path, path, dataset={"streaming": streaming, "shuffle": False}).train()
    assert caught.value.exit_code == 3


def test_held_out_rows_have_places_of_their_own(tmp_path: Path) -> None:
    for streaming in (False, True):
        trainer = run(tmp_path, [ROW] * 4, dataset={"streaming": streaming})
        trainer.eval_data = tmp_path / "held_out.jsonl"
        trainer.eval_data.write_text("".join(json.dumps({**ROW, "labels": labels}) + "\n" for labels in (None, [1])))
        with pytest.raises(DataError, match=r"/held_out.jsonl:2: `labels` must be two lists"):
            trainer.train()


def test_steps_that_fit_are_taken(tmp_path: Path) -> None:
    assert run(tmp_path, [{**ROW, "steps": STEPS}, {**ROW, "labels": None, "steps": STEPS}] * 2).train().step == 2


@pytest.mark.parametrize(
    ("room", "expected"),
    [(20, [RIGHT, WRONG]), (10, [RIGHT, NO_LABEL]), (6, [NO_LABEL]), (7, [RIGHT, NO_LABEL])],
)
def test_a_truncated_response_keeps_the_labels_of_its_whole_steps(room: int, expected: list[float]) -> None:
    row = {"prompt": "?", "chosen": "1+1=2\n2+1=4", "rejected": "no", "labels": [[1, 0], [0]]}
    data = PreferenceDataset([row], tiny_tokenizer(), max_length=2 + room)
    trainer = built(ProcessRewardModelTrainer, max_length=2 + room)
    (window,) = trainer.experience(iter([collate([data[0]])]), run_context(trainer))
    assert window["step_labels"][0][window["step_ends"][0]].tolist() == expected


def test_labels_and_steps_of_a_truncated_response_are_compared() -> None:
    row = {"labels": [[1, 0, 0], [0]], "steps": [["1", "2"], ["3"]]}
    truncated: dict[str, Any] = {"truncated": True, "separator": "\n", "place": lambda: "rows.jsonl:1"}
    with pytest.raises(DataError, match=r"rows.jsonl:1: `labels` has 3 entries for the 2 `steps` of `chosen`"):
        read_step_labels(row, 0, 1, **truncated)
    assert read_step_labels(row, 1, 1, **truncated) == [NO_LABEL]
    assert read_step_labels({"steps": row["steps"]}, 0, 1, **truncated) is None


def test_steps_are_found_behind_tokenizers_that_mark_words() -> None:
    """Alone, such a tokenizer decodes a piece without the blank that it begins with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {piece: number for number, piece in enumerate(["</s>", "a", "▁a", ".", "▁One", "One", "▁Two"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    ids = torch.tensor([[vocab[piece] for piece in ("One", ".", "▁Two", ".", "</s>")]])
    assert tokenizer.decode([vocab["▁Two"]]) == "Two"
    batch = encoded("x")
    batch = replace(
        batch, response_ids=ids, response_lengths=torch.tensor([5]), loss_mask=torch.ones(1, 5, dtype=torch.bool)
    )
    assert step_ends(batch, tokenizer, ". ")[0].nonzero().squeeze(1).tolist() == [2, 4]


def test_pairs_without_labels_train_by_ranking_alone(tmp_path: Path) -> None:
    plain = {name: value for name, value in ROW.items() if name != "labels"}
    result = run(tmp_path, [plain] * 4).train()
    assert "step_accuracy" not in result.metrics and "accuracy" in result.metrics
    with pytest.raises(DataError, match="no row has step `labels`"):
        run(tmp_path, [plain] * 4, ranking_weight=0.0, outcome_weight=0.0).train()
    with pytest.raises(ConfigError, match="so the loss is empty"):
        run(tmp_path, [plain] * 4, ranking_weight=0.0, outcome_weight=0.0, step_weight=0.0)


def test_steps_are_those_of_the_task() -> None:
    rows = list(ArithmeticTask(terms=3).rows("preference", 20))
    for row in rows:
        for name, steps in zip(("chosen", "rejected"), row["steps"], strict=True):
            assert split_steps(row[name]) == steps
            assert len(ends_of(row[name])) == len(steps)
