"""Samplers in online runs: what they draw in rollouts and evaluations, the same after any stop, and what is refused."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from online_helpers import digits, prompts
from rlhf_plugins import GRPOConfig, GRPOTrainer, PPOTrainer
from trainers_helpers import small_policy

from rlhf_core import registry
from rlhf_core.cli import main
from rlhf_core.config.online import SamplingConfig
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.sampler import Sampler
from rlhf_core.generation.encoded_prompts import EncodedPrompts
from rlhf_core.generation.engine import Engine
from rlhf_core.generation.generate import prompt_batch
from rlhf_core.infra.errors import ConfigError, PluginError
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.models import RewardModel, ValueModel
from rlhf_core.testing.interrupted_runs import metrics_of
from rlhf_core.testing.simulated_processes import simulate
from rlhf_core.testing.tiny import save_tiny, tiny_policy
from rlhf_core.testing.workbench import Workbench
from rlhf_core.training.distribution import Distribution
from rlhf_core.training.run_samplers import RunSampler, check_samplers

OPTIONS: dict[str, Any] = {
    "generation": {"max_new_tokens": 6}, "group_size": 2, "batch_size": 4, "max_steps": 4, "learning_rate": 1e-3,
    "dataset": {"wrap": "none"}, "logging": {"progress": False, "rollouts": {"whole": True}},
    "rewards": ["online_helpers:digits"],
}  # fmt: skip
BEST: dict[str, Any] = {"name": "best_of_n", "options": {"candidates": 6}}


def run(output: Path | None = None, *, kind: Any = GRPOTrainer, held_out: int = 0, **options: Any) -> Any:
    config = kind.Config.parse({**OPTIONS, **options})
    data, test = prompts(), prompts("test", held_out) if held_out else None
    return kind(config, model=small_policy(), data=data, eval_data=test, output=output)


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.policy.state_dict().items()}


def rollouts_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]


class Kept(Sampler):
    """Keeps what it was asked, and draws plainly by an engine of its own, as a sampler of a package may."""

    api = 1
    Config = SamplingConfig
    config: SamplingConfig
    asked: ClassVar[list[tuple[list[Any], int, int]]] = []

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        self.asked.append((list(prompts), n, seed or 0))
        return Engine(self.policy, seed=seed).generate(prompt_batch(self.policy, prompts), n, self.config)


class Textual(Kept):
    """Returns completions without the probabilities of their tokens."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        found = super().sample(prompts, n, seed=seed)
        return [[replace(one, logprobs=(), raw_logprobs=(), kept_mass=()) for one in group] for group in found]


@pytest.fixture(autouse=True)
def samplers() -> Iterator[None]:
    Kept.asked.clear()
    registry.register("sampler", "kit-kept", Kept)
    registry.register("sampler", "kit-textual", Textual)
    yield
    registry.unregister("sampler", "kit-kept")
    registry.unregister("sampler", "kit-textual")


# What is drawn


def test_rollouts_are_the_best_of_what_the_policy_draws_by_the_runs_own_rewards() -> None:
    bench = Workbench(run(rollout_sampler=BEST))
    batch, config = next(bench.batches), bench.config
    completions, scores = bench.run.generate_and_score(batch, 2, config.generation)
    engine = Engine(bench.trainer.policy, seed=stream_seed(config.seed, "rollout sampler", 0, 0))
    drawn = engine.generate(EncodedPrompts(batch, bench.trainer.policy.tokenizer).batch, 6, config.generation)
    for number, group in enumerate(drawn):
        wanted = sorted(digits([one.text for one in group]), reverse=True)[:2]
        assert digits([one.text for one in completions[number]]) == wanted
        assert scores.total[2 * number : 2 * number + 2].tolist() == pytest.approx(wanted)
        assert {tuple(one.ids) for one in completions[number]} <= {tuple(one.ids) for one in group}
    tokens = int(batch.prompt_lengths.sum()) - 4 + sum(len(one.ids) for group in drawn for one in group)
    assert bench.logged()["forwarded/policy"] == tokens / 4


def test_a_prompt_draws_others_when_it_comes_again_and_the_same_whatever_it_is_drawn_with() -> None:
    policy, (row, other) = tiny_policy(), prompts()[:2]
    batch = replace(prompt_batch(policy, [row, other, row]), rows=(7, 8, 7), places=(7, 8, 47))
    (chosen,) = check_samplers(config_of(rollout_sampler="kit-kept"))
    sampler, sampling = RunSampler(chosen, policy, {}), SamplingConfig(max_new_tokens=6)

    def drawn(part: Batch, seed: int = 3) -> list[list[list[int]]]:
        found, _ = sampler.draw(part, 2, sampling, seed=seed, policy_version=5)
        assert all(one.policy_version == 5 for group in found for one in group)
        return [[list(one.ids) for one in group] for group in found]

    whole = drawn(batch)
    assert whole[0] != whole[2]
    # On two processes, each of which has some of the prompts.
    assert [*drawn(batch.select([0])), *drawn(batch.select([1, 2]))] == whole
    assert drawn(batch.select([2, 0, 1])) == [whole[2], whole[0], whole[1]]
    assert drawn(batch, seed=4) != whole
    assert drawn(batch.select([])) == []


@pytest.mark.slow
def test_two_processes_draw_what_one_does() -> None:
    def work(distribution: Distribution) -> dict[tuple[int, int], list[list[int]]]:
        trainer = run(rollout_sampler=BEST)
        trainer.data = [*prompts()[:6], *prompts()[:6]]  # each text in two rows
        bench, found = Workbench(trainer, distribution), {}
        for window in itertools.islice(bench.windows(), 3):
            texts = [bench.trainer.policy.tokenizer.decode(ids) for ids in window.batch.response_ids]
            for number, row in enumerate(window.batch.rows):
                found[bench.steps, row] = texts[2 * number : 2 * number + 2]
            bench.steps += 1
        return found

    (alone,), shared = simulate(1, work), simulate(2, work)
    assert len(alone) == 12 and {**shared[0], **shared[1]} == alone
    assert len({tuple(texts) for texts in alone.values()}) == 12


def test_each_draw_has_a_seed_of_its_own_and_each_evaluation_the_same() -> None:
    bench = Workbench(run(rollout_sampler="kit-kept", eval_sampler="kit-kept", held_out=4))
    batch = next(bench.batches)
    for step in (0, 0, 1):
        bench.steps = step
        bench.run.generate(batch, 2, bench.config.generation)
    for _ in range(2):
        bench.run.for_evaluation().evaluate_completions(batch)
    seeds = [seed for _, _, seed in Kept.asked]
    assert seeds[3] == seeds[4] and len(set(seeds)) == 4
    asked, n, _ = Kept.asked[0]
    assert n == 2 and [one["prompt"] for one in asked] == list(batch.prompts)
    assert [one["answer"] for one in asked] == [record["answer"] for record in batch.records]


def test_an_evaluation_draws_by_its_own_sampler_and_training_by_none(tmp_path: Path) -> None:
    options = {"held_out": 6, "eval_steps": 2, "max_steps": 2}
    trained = run(tmp_path / "best", eval_sampler={**BEST, "roles": {"reward": "online_helpers:digits"}}, **options)
    trained.train()
    plain = run(tmp_path / "plain", eval_temperature=1.0, **options)
    plain.train()
    assert all(torch.equal(value, weights_of(plain)[name]) for name, value in weights_of(trained).items())
    best, one = (metrics_of(tmp_path / name)[-1] for name in ("best", "plain"))
    assert best["eval_reward"] > one["eval_reward"] + 0.05
    assert best["eval_forwarded/policy"] > one["eval_length"] and "forwarded/policy" not in best
    bench = Workbench(run(eval_sampler="kit-kept", generation={"max_new_tokens": 5, "temperature": 0.7}, held_out=4))
    made = bench.samplers["eval_sampler"].sampler(bench.config.evaluated_sampling)
    assert made.config == SamplingConfig(max_new_tokens=5, temperature=0.7)


def test_an_evaluation_draws_from_several_models(tmp_path: Path) -> None:
    paths = [str(save_tiny(tmp_path / str(seed), layers=1, seed=seed)) for seed in (1, 2)]
    sampler = {"name": "ensemble", "roles": {"members": [paths[0], {"path": paths[1]}]}}
    run(tmp_path / "run", eval_sampler=sampler, held_out=4, eval_steps=1, max_steps=1).train()
    last = metrics_of(tmp_path / "run")[-1]
    assert last["eval_forwarded/members"] >= 2 * last["eval_length"]
    models = json.loads((tmp_path / "run" / "samplers.json").read_text())["eval_sampler"]["models"]
    assert {role: model["source"] for role, model in models.items()} == {"members[0]": paths[0], "members[1]": paths[1]}


# Runs


class Stopping(GRPOTrainer):
    """The method, which may end before a rollout."""

    api = 1
    record = "prompt"
    stop_at: int | None = None

    def rollout(self, batch: Batch, run: Any) -> Batch:
        if run.step == self.stop_at:
            raise KeyboardInterrupt
        return super().rollout(batch, run)


def test_a_run_that_was_stopped_resumes_to_the_same_bytes_and_replays_to_them(tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": Stopping, "rollout_sampler": BEST, "checkpoint": {"every": 2}, "minibatches": 2}
    whole = run(tmp_path / "whole", max_steps=8, **options)
    whole.train()
    stopped = run(tmp_path / "stopped", max_steps=8, **options)
    stopped.stop_at = 6
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = run(tmp_path / "stopped", max_steps=8, **options)
    resumed.train(resume=True)
    kept = [(tmp_path / name / "rollouts.jsonl").read_bytes() for name in ("whole", "stopped")]
    assert kept[0] == kept[1] and len({row["step"] for row in rollouts_of(tmp_path / "whole")}) == 4
    replayed = run(tmp_path / "replayed", max_steps=8, **options, replay=str(tmp_path / "whole"))
    replayed.train()
    assert (tmp_path / "replayed" / "rollouts.jsonl").read_bytes() == kept[0]
    assert all("forwarded/policy" not in row for row in metrics_of(tmp_path / "replayed"))  # nothing was drawn
    for other in (resumed, replayed):
        assert all(torch.equal(value, weights_of(whole)[name]) for name, value in weights_of(other).items())
    record = json.loads((tmp_path / "whole" / "samplers.json").read_text(encoding="utf-8"))
    assert record["rollout_sampler"]["plugin"]["name"] == "best_of_n"
    with pytest.raises(ConfigError, match="another sampler drew the rollouts"):
        run(replay=str(tmp_path / "whole")).train()


def test_a_resume_with_another_model_that_chooses_is_refused(tmp_path: Path) -> None:
    for seed in (1, 2):
        tiny = save_tiny(tmp_path / "tiny", hidden=32, heads=2, kv_heads=1)
        model = RewardModel.from_pretrained(tiny, new_head=True, seed=seed)
        model.save_pretrained(tmp_path / "reward")
        sampler = {**BEST, "roles": {"reward": str(tmp_path / "reward")}}
        trainer = run(tmp_path / "run", rollout_sampler=sampler, max_steps=seed, checkpoint={"every": 1})
        if seed == 1:
            trainer.train()
    trainer = run(tmp_path / "run", rollout_sampler=sampler, max_steps=1, checkpoint={"every": 1})
    with pytest.raises(PluginError, match="the rewards of `rollout_sampler` changed"):
        trainer.train(resume=True)


@pytest.mark.slow
def test_a_value_model_guides_the_rollouts_of_ppo_by_tree_search(tmp_path: Path) -> None:
    ValueModel.adopt(small_policy(), seed=1).save_pretrained(tmp_path / "value")
    options = {"simulations": 3, "max_step_tokens": 2}
    sampler = {"name": "mcts", "options": options, "roles": {"process_reward": str(tmp_path / "value")}}
    run(tmp_path / "run", kind=PPOTrainer, rollout_sampler=sampler, group_size=1, max_steps=1, rollout_epochs=1).train()
    (row,) = metrics_of(tmp_path / "run")
    assert row["forwarded/policy"] > 0 and row["forwarded/process_reward"] > 0
    assert row["logprob_gap"] < 1e-4  # each token has the probability with which the policy wrote it


# What is refused


def config_of(**options: Any) -> GRPOConfig:
    return GRPOConfig.parse({**OPTIONS, **options})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rollout_sampler": "best_of_m"}, "rollout_sampler.name: unknown sampler `best_of_m`.*`best_of_n`"),
    ({"rollout_sampler": {"name": "best_of_n", "options": {"candidate": 3}}}, "unknown option `candidate`"),
    ({"rollout_sampler": {"name": "best_of_n", "options": {"temperature": 0.5}}}, "belongs to `generation`"),
    ({"rollout_sampler": {"name": "best_of_n", "roles": {"policy": "x"}}}, "is the policy that the run trains"),
    ({"rollout_sampler": {"name": "best_of_n", "roles": {"rewards": "x"}}}, "no role `rewards`.*did you mean `reward`"),
    ({"rollout_sampler": {"name": "best_of_n", "roles": {"reward": "digts"}}}, "unknown reward `digts`"),
    (
        {"rollout_sampler": {"name": "best_of_n", "roles": {"reward": 3}}},
        "must be a name, or a group of options.*got 3",
    ),
    (
        {"rollout_sampler": {"name": "best_of_n", "options": {"choose": "majority"}, "roles": {"reward": "length"}}},
        "doesn't use its role `reward`",
    ),
    ({"rollout_sampler": "beam"}, "nothing is given for the sampler's role `process_reward`.*roles.process_reward"),
    ({"eval_sampler": BEST}, "role `reward`.*may read the answers"),
    ({"eval_sampler": "ensemble"}, "role `members`.*to a list of models' paths"),
    (
        {"eval_sampler": {"name": "ensemble", "roles": {"members": "other"}}},
        "eval_sampler.roles.members: must be a list of models; got 'other'",
    ),
    (
        {"rollout_sampler": {"name": "ensemble", "roles": {"members": ["other"]}}},
        "aren't drawn from the policy alone.*got `ensemble`.*`eval_sampler`",
    ),
    (
        {"eval_sampler": {"name": "generate", "options": {"temperature": 0.5}}, "eval_temperature": 0.5},
        "the temperature is set twice",
    ),
    (
        {"rollout_sampler": BEST, "correction": "token_truncated"},
        "`token_truncated` weights completions to be draws of the policy.*got `best_of_n`.*correction: none",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_can_not_work_is_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}") as caught:
        check_samplers(config_of(**options))
    assert caught.value.exit_code == 2


def test_a_held_out_sampler_needs_held_out_rows() -> None:
    with pytest.raises(ConfigError, match="evaluations need held-out data"):
        run(eval_sampler="generate").train()


def test_completions_without_probabilities_are_not_trained_on() -> None:
    with pytest.raises(PluginError, match=r"needs tokens with `logprobs`.*got . tokens with 0, 0 and 0"):
        run(rollout_sampler="kit-textual").train()


class Reticent(Sampler):
    """Has no options of sampling."""

    api = 1

    def sample(self, prompts: Sequence[Any], n: int = 1, *, seed: int | None = None) -> list[list[Completion]]:
        return [[Completion("", (), (), "end")] * n for _ in prompts]


def test_a_sampler_that_can_not_draw_as_the_updates_assume_draws_no_rollouts() -> None:
    registry.register("sampler", "kit-reticent", Reticent)
    try:
        assert check_samplers(config_of(eval_sampler="kit-reticent"))
        with pytest.raises(ConfigError, match="can't draw as `generation` says"):
            check_samplers(config_of(rollout_sampler="kit-reticent"))
    finally:
        registry.unregister("sampler", "kit-reticent")


def test_what_a_choice_means_for_a_policy_gradient_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    Workbench(run(rollout_sampler=BEST))
    (said,) = [record.getMessage() for record in caplog.records if "chooses completions" in record.getMessage()]
    assert "rejection sampling" in said
    caplog.clear()
    Workbench(run(rollout_sampler="generate", correction="token_truncated"))  # which chooses nothing
    assert not [record for record in caplog.records if "chooses completions" in record.getMessage()]


def test_flags_and_files_name_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = str(save_tiny(tmp_path / "tiny", layers=1)), tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in prompts()[:8]))
    own = ["train", "grpo", "--model", model, "--data", str(data), "--rewards", "online_helpers:digits", "--dry-run"]
    sampler = ["--rollout_sampler", "best_of_n", "--rollout_sampler.options.candidates", "5"]
    assert main([*own, *sampler]) == 0
    assert "candidates: 5" in capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(
        f"method: grpo\nmodel: {model}\ndata: {data}\nrewards: online_helpers:digits\n"
        "rollout_sampler:\n  name: best_of_n\n  options:\n    candidates: 0\n"
    )
    assert main(["train", str(tmp_path / "run.yaml"), "--dry-run"]) == 2
    assert "run.yaml:8" in capsys.readouterr().err
