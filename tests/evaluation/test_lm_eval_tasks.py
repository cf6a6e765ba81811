"""lm-eval's tasks through the engine: the results are those of lm-eval's own Hugging Face backend."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_core.config.lm_eval_run import LmEvalConfig
from rlhf_core.evaluation.lm_eval_tasks import TaskReport, check_tasks, run_lm_eval_tasks
from rlhf_core.generation.engine import Engine
from rlhf_core.infra.errors import ConfigError, DataError, ModelError
from rlhf_core.models import PolicyModel
from rlhf_core.testing.tiny import tiny_model, tiny_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="the extra `lm-eval` isn't installed")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from rlhf_core.evaluation.lm_eval_model import EngineLM  # noqa: E402

CHOICE = """\
task: local_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 3}}
"""
WRITTEN = """\
task: local_written
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs:
  until: ["x", "\\n\\n"]
  do_sample: false
  max_gen_toks: 24
metric_list:
  - metric: exact_match
filter_list:
  - name: first
    filter:
      - function: regex
        regex_pattern: "(.)"
      - function: take_first
"""
ROLLING = """\
task: local_rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {path}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
"""


def words(source: random.Random, count: int) -> str:
    return " ".join(
        "".join(source.choices("abcdefghij ü", k=source.randint(1, 7))).strip() or "a" for _ in range(count)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with task files and their data."""
    root, source = tmp_path_factory.mktemp("tasks"), random.Random(0)
    rows = [
        {
            "question": words(source, 1 + number % 5),
            "choices": [words(source, 1 + (number + k) % 3) for k in range(4)],
            "label": number % 4,
            "text": words(source, 3 + 40 * (number % 3)),
        }
        for number in range(24)
    ]
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("rolling", ROLLING)):
        (root / f"{name}.yaml").write_text(text.format(path=data))
    return root


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    """Return a policy with few positions, so that some requests are cut, and distributions far from even."""
    model = tiny_model(max_positions=192)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1.5)
    return PolicyModel(model.requires_grad_(False), tiny_tokenizer())


@pytest.fixture(scope="module")
def oracle(policy: PolicyModel) -> Any:
    """Return lm-eval's own backend on the same model."""
    return HFLM(pretrained=policy.causal_lm, tokenizer=policy.tokenizer, batch_size=8, device="cpu")


def by_oracle(oracle: Any, tasks: list[str], folder: Path, **options: Any) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        oracle, tasks=tasks, task_manager=TaskManager(include_path=str(folder), include_defaults=False), **options
    )


@pytest.fixture(scope="module")
def manager(folder: Path) -> Any:
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(autouse=True)
def own_tasks_alone(manager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the index of lm-eval's thousands of tasks takes seconds, and so does its report on the machine."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("rlhf_core.evaluation.lm_eval_tasks._task_manager", lambda include_path: manager)


def assert_equal(report: TaskReport, found: dict[str, Any], metrics: int) -> None:
    """Check that values, standard errors and rows are lm-eval's own."""
    compared = 0
    for task, values in found["results"].items():
        score = report.tasks[task]
        for key, value in values.items():
            name, comma, chosen = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            estimate, error = score.metrics[key], values[f"{name}_stderr,{chosen}"]
            assert estimate.value == pytest.approx(value, rel=1e-5, abs=1e-4)
            assert estimate.count == found["n-samples"][task]["effective"]
            if error == "N/A":
                assert estimate.error is None
            else:
                assert estimate.error == pytest.approx(error, rel=1e-4, abs=1e-4)
            rows = [row[name] for row in found["samples"][task] if row["filter"] == chosen and name in row]
            if key in score.by_row:
                assert score.by_row[key] == pytest.approx(rows, abs=1e-3)
            compared += 1
    assert compared == metrics


@pytest.mark.parametrize("options", [{}, {"num_fewshot": 3}, {"apply_chat_template": True, "num_fewshot": 1}])
def test_results_of_local_tasks_are_the_hugging_face_backends(
    policy: PolicyModel, oracle: Any, folder: Path, options: dict[str, Any]
) -> None:
    tasks = ["local_choice", "local_written"]
    report = run_lm_eval_tasks(policy, tasks, include_path=folder, **options)
    found = by_oracle(oracle, tasks, folder, **options)
    assert_equal(report, found, metrics=3)
    # Not only means: every likelihood and every text.
    assert report.tasks["local_choice"].by_row["acc,none"] != [0.0] * 24
    assert report.tasks["local_choice"].num_fewshot == options.get("num_fewshot", 0)
    assert report.tasks["local_choice"].version == "3"


def test_perplexities_are_the_hugging_face_backends(policy: PolicyModel, oracle: Any, folder: Path) -> None:
    report = run_lm_eval_tasks(policy, ["local_rolling"], include_path=folder, bootstrap=20)
    assert_equal(report, by_oracle(oracle, ["local_rolling"], folder, bootstrap_iters=20), metrics=2)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_each_answer_is_the_hugging_face_backends(policy: PolicyModel, oracle: Any) -> None:
    source = random.Random(1)
    engine = EngineLM(Engine(policy))
    texts = [words(source, 1 + number) for number in range(12)]
    pairs = [(text, " " + words(source, 1 + k)) for text in texts for k in range(3)]
    pairs += [("", "no context"), ("trailing blanks  ", "b"), ("<|bos|>written", " bos"), (words(source, 200), " long")]
    # What greedy decoding writes, so that some answers are greedy.
    until = {"until": ["x"], "max_gen_toks": 3, "do_sample": False}
    greedy = engine.generate_until(instances("generate_until", [(text, until) for text in texts]), disable_tqdm=True)
    pairs += [(text, written) for text, written in zip(texts, greedy, strict=True) if written]
    wanted = oracle.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    found = engine.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [each[0] for each in found] == pytest.approx([each[0] for each in wanted], abs=2e-4)
    assert [each[1] for each in found] == [each[1] for each in wanted]
    assert {each[1] for each in wanted} == {False, True}

    arguments = [(text, {"until": ["a", "zz"], "max_gen_toks": 1 + number}) for number, text in enumerate(texts)]
    arguments += [(words(source, 200), until), ("", {"until": ["\n"], "max_gen_toks": 9})]
    requests = instances("generate_until", arguments)
    assert engine.generate_until(requests, True) == oracle.generate_until(requests, True)

    long = instances("loglikelihood_rolling", [(words(source, count),) for count in (1, 30, 90, 200)])
    assert engine.loglikelihood_rolling(long, True) == pytest.approx(oracle.loglikelihood_rolling(long, True), abs=2e-3)


def test_what_contexts_share_is_read_once(policy: PolicyModel) -> None:
    counted: list[int] = []
    model = EngineLM(Engine(policy, counted=counted.append, memory=2**24))
    context = "the same examples in front of every question, which are long: "
    pairs = [(context + question, f" answer {letter}") for question in "abc" for letter in "wxyz"]
    model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    tokens = len(model.tok_encode(context))
    # The context once; three questions; of twelve answers the token in front of them and all tokens but the last.
    assert sum(counted) <= tokens + 3 + 12 * len(" answer w")
    assert len(pairs) * (tokens + len("a answer w")) > 4 * sum(counted)


def test_sampled_texts_follow_the_seed(policy: PolicyModel, folder: Path) -> None:
    def drawn(seed: int) -> list[str]:
        options = {"until": ["\n"], "do_sample": True, "temperature": 0.9, "max_gen_toks": 12}
        requests = instances("generate_until", [(text, options) for text in "abcd"])
        return EngineLM(Engine(policy, seed=seed)).generate_until(requests, True)

    assert drawn(0) == drawn(0) != drawn(1)


def test_options_are_given_by_name_or_whole(policy: PolicyModel, folder: Path) -> None:
    by_name = run_lm_eval_tasks(policy, ["local_choice"], include_path=folder, limit=3, num_fewshot=1)
    whole = run_lm_eval_tasks(policy, ["local_choice"], config=LmEvalConfig(limit=3, num_fewshot=1))
    assert whole.options == by_name.options
    assert whole.metrics == by_name.metrics


def test_a_report_is_written_and_shown(policy: PolicyModel, folder: Path, tmp_path: Path) -> None:
    before = random.getstate(), torch.get_rng_state()
    report = run_lm_eval_tasks(policy, ["local_choice", "local_written"], include_path=folder, limit=5)
    assert (random.getstate(), torch.get_rng_state().tolist()) == (before[0], before[1].tolist())
    report.write(tmp_path / "there" / "lm_eval.json")
    kept = json.loads((tmp_path / "there" / "lm_eval.json").read_text())
    accuracy = kept["tasks"]["local_choice"]["metrics"]["acc,none"]
    assert accuracy["count"] == 5 == len(kept["tasks"]["local_choice"]["by_row"]["acc,none"])
    assert accuracy["value"] == pytest.approx(sum(kept["tasks"]["local_choice"]["by_row"]["acc,none"]) / 5)
    assert kept["options"]["limit"] == 5 and kept["options"]["lm_eval"] == lm_eval.__version__
    assert report.metrics["local_choice/acc,none"].value == accuracy["value"]
    assert any(line.startswith("local_choice/acc,none: ") and line.endswith("(n = 5)") for line in report.lines())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"tasks": ["local_chioce"]}, "did you mean `local_choice`"),
        ({"tasks": []}, "no tasks are named"),
        ({"tasks": ["local_choice"], "limit": 0}, "`limit`: must be greater than or equal to 1"),
        ({"tasks": ["local_choice"], "num_few_shot": 3}, "did you mean `num_fewshot`"),
        ({"tasks": ["local_choice"], "config": LmEvalConfig()}, "options are given beside a configuration"),
        ({"tasks": ["local_written"], "generation": {"num_beams": 4}}, "`num_beams`"),
        ({"tasks": ["local_written"], "generation": {"max_gen_toks": 4000}}, "more new tokens"),
        ({"tasks": ["local_written"], "generation": {"do_sample": True, "top_p": 2}}, "top_p"),
    ],
)
def test_what_cannot_be_run_is_refused(
    policy: PolicyModel, folder: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        run_lm_eval_tasks(policy, include_path=folder, **{"limit": 2, **options})


def test_what_a_task_needs_is_checked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = PolicyModel(tiny_model(), tiny_tokenizer(chat_template=False))
    with pytest.raises(ModelError, match="no chat template"):
        run_lm_eval_tasks(bare, ["local_choice"], apply_chat_template=True)
    (tmp_path / "lost.yaml").write_text(CHOICE.format(path=tmp_path / "lost.jsonl").replace("local_", "lost_"))
    with pytest.raises(DataError, match="can't load a task"):
        run_lm_eval_tasks(bare, [str(tmp_path / "lost.yaml")])
    unsafe = (folder / "choice.yaml").read_text().replace("local_choice", "unsafe_choice") + "unsafe_code: true\n"
    (tmp_path / "unsafe.yaml").write_text(unsafe)
    with pytest.raises(ConfigError, match="runs code that the model writes"):
        run_lm_eval_tasks(bare, [str(tmp_path / "unsafe.yaml")])


def test_a_task_file_is_taken_as_it_is(folder: Path, manager: Any) -> None:
    check_tasks([str(folder / "choice.yaml")], manager)
    with pytest.raises(ConfigError, match="no such task"):
        check_tasks([str(folder / "absent.yaml")], manager)


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
