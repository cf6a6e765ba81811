"""GRPO and its family: the contract, each row against its paper, options, and runs that learn."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from online_helpers import digits, has_digit, prompts
from rlhf_plugins import GRPOConfig, GRPOTrainer
from rlhf_plugins.trainers.grpo_variants import VARIANTS
from trainers_helpers import assert_refused, small_policy

from rlhf_core.cli import main
from rlhf_core.infra.errors import NumbersError, PluginError
from rlhf_core.policy_gradient import ADVANTAGES
from rlhf_core.testing import TrainerContract
from rlhf_core.testing.interrupted_runs import metrics_of
from rlhf_core.testing.workbench import Workbench

OPTIONS: dict[str, Any] = {
    "generation": {"max_new_tokens": 8}, "rollout_epochs": 2, "minibatches": 2, "group_size": 4,
    "rewards": ["online_helpers:digits"],
}  # fmt: skip


class TestContract(TrainerContract):
    trainer = GRPOTrainer
    options: ClassVar[dict[str, Any]] = OPTIONS

    @pytest.mark.slow
    def test_every_option_does_something(self) -> None:
        super().test_every_option_does_something()


@pytest.mark.slow
class TestContractOfDAPO(TrainerContract):
    trainer = GRPOTrainer
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "variant": "dapo"}


@pytest.mark.slow
class TestContractOfReinforcePlusPlus(TrainerContract):
    trainer = GRPOTrainer
    options: ClassVar[dict[str, Any]] = {
        **OPTIONS, "variant": "reinforce_plus_plus", "correction": "token_truncated", "equal_groups": "skip",
    }  # fmt: skip


@pytest.mark.slow
class TestContractOfGMPO(TrainerContract):
    trainer = GRPOTrainer
    options: ClassVar[dict[str, Any]] = {**OPTIONS, "variant": "gmpo", "kl_weight": 0.05, "kl_importance": True}
    no_effect = ("kl_in",)  # an importance weight is for a KL in the loss alone


# Options


def test_a_row_can_be_overridden_part_by_part() -> None:
    config = GRPOConfig.parse({"variant": "dapo", "clip_options": {"high": 0.3}, "advantage": "leave_one_out"})
    row = config.row
    assert (row.advantage, row.aggregation, row.equal_groups) == ("leave_one_out", "token", "resample")
    assert config.part("clip") == ("ppo", {"low": 0.2, "high": 0.3})
    # Another clip doesn't get the options of the row's own.
    assert GRPOConfig.parse({"variant": "dapo", "clip": "cispo"}).part("clip") == ("cispo", {})
    assert GRPOConfig.parse({"variant": "dapo", "shaping": []}).row.shaping == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "drgrpo"}, "`variant`: must be 'grpo', 'dr_grpo'"),
        (
            {"advantage": "group_men"},
            "`advantage`: unknown advantage `group_men`; fix: did you mean `group_mean`?",
        ),
        ({"clip": "no_module:clip"}, "`clip`: unknown clip `no_module:clip`"),
        (
            {"clip_options": {"hi": 0.3}},
            "`clip_options.hi`: clip `ppo` has no option `hi`; got 0.3; fix: did you mean `high`?",
        ),
        (
            {"clip_options": {"low": 2}},
            "`clip_options.low`: option `low` of clip `ppo`: must be less than or equal to 1; got 2",
        ),
        (
            {"group_size": 1},
            "`group_size`: group_mean_std needs groups of at least 2; got a group of 1; fix: raise `group_size`",
        ),
        (
            {"advantage": "pass_at_k", "advantage_options": {"k": 16}},
            "pass_at_k with k = 16 needs groups of at least 16",
        ),
        ({"shaping": "overlng"}, "`shaping`: unknown shaping `overlng`; fix: did you mean `overlong`?"),
        ({"shaping_options": {"overlong": {}}}, "there are options of the shaping `overlong`, which isn't used"),
        ({"generation": {"temperature": 0}}, "`generation.temperature`: completions of temperature 0 are all alike"),
        (
            {"generation": {"repetition_penalty": 1.2}},
            "`generation.repetition_penalty`: ratios and KL would be those of the penalised policy",
        ),
        (
            {"variant": "reinforce_plus_plus", "group_size": 1, "equal_groups": "skip"},
            "`group_size`: rewards in a group of one are equal",
        ),
        ({"shaping": "group_normalised", "variant": "reinforce_plus_plus", "group_size": 1}, "`shaping`: "),
        ({"variant": "maxrl", "shaping": "overlong"}, "`shaping`: `group_mean_over_mean` needs rewards of at least 0"),
        ({"kl": "k2", "kl_weight": 0}, "`kl`: the KL has no weight, so it isn't used; got 'k2'; fix: set `kl_weight`"),
        ({"variant": "rloo", "kl_importance": True}, "`kl_importance`: it weights a KL in the loss"),
        ({"variant": "rloo", "kl_in": "loss"}, "`kl_in`: in the loss, k1 has a gradient that is 0 on average"),
        ({"variant": "dapo", "reference": "copy"}, "`reference`: nothing reads a reference"),
        ({"minibatches": 9, "batch_size": 4}, "`minibatches`: there are more minibatches than prompts in a step (4)"),
    ],
)
def test_what_is_said_of_wrong_options(options: dict[str, Any], message: str) -> None:
    assert_refused(GRPOConfig, options, message)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_resolved_options_of_every_row_are_accepted_again(variant: str) -> None:
    """They are what `config.yaml` of a run holds, every default among them."""
    config = GRPOConfig.parse({"variant": variant})
    assert GRPOConfig.parse(config.model_dump(mode="json")) == config


def test_a_group_of_one_is_enough_where_the_advantage_needs_no_other() -> None:
    assert GRPOConfig.parse({"variant": "reinforce_plus_plus", "group_size": 1}).group_size == 1


def test_show_prints_the_parts_of_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "grpo", "--variant", "dapo", "--clip_options.high", "0.3"]) == 0
    shown = capsys.readouterr().out
    assert "ppo (low 0.2, high 0.3)" in shown and "overlong (buffer 0.2, penalty 1.0)" in shown and "resample" in shown


def of_the_first_rows(completions: list[str], late: list[bool], **columns: Any) -> list[float]:
    """The share of digits; 0 for rows that come late, whose rollout then teaches nothing."""
    return [0.0 if last else sum(c.isdigit() for c in text) / 8 for text, last in zip(completions, late, strict=True)]


@pytest.mark.parametrize("equal_groups", ["skip", "resample"])
def test_rollouts_that_made_no_step_are_kept_and_replayed(equal_groups: str, tmp_path: Path) -> None:
    rows = [{**row, "late": number >= 4} for number, row in enumerate(prompts(count=12))]
    options: dict[str, Any] = {
        "batch_size": 4, "group_size": 4, "generation": {"max_new_tokens": 8}, "kl_weight": 0.0, "epochs": 1,
        "dataset": {"wrap": "none", "shuffle": False}, "equal_groups": equal_groups, "logging": {"rollouts": {"whole": True}},
    }  # fmt: skip

    def run(name: str, **more: Any) -> list[int]:
        config = GRPOConfig.parse({**options, **more})
        trainer = GRPOTrainer(
            config, model=small_policy(), data=rows, rewards=[of_the_first_rows], output=tmp_path / name
        )
        assert trainer.train().step == 1
        kept = [json.loads(line) for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]
        return sorted({row["row"] for row in kept})

    assert run("first") == run("again", replay=str(tmp_path / "first")) == list(range(12))


def test_a_replay_has_the_parts_of_rewards(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [{"name": "repetition"}, {"name": "length", "options": {"target": 4}}]
    options: dict[str, Any] = {
        "batch_size": 2, "group_size": 2, "max_steps": 2, "generation": {"max_new_tokens": 6}, "equal_groups": "keep",
        "rewards": [{"name": "ensemble", "options": {"members": members}}], "logging": {"rollouts": {"whole": True}},
    }  # fmt: skip

    def run(name: str, **more: Any) -> list[dict[str, float]]:
        config = GRPOConfig.parse({**options, **more})
        GRPOTrainer(config, model=small_policy(), data=prompts(count=4), output=tmp_path / name).train()
        kept = [json.loads(line)["rewards"] for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]
        steps = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return kept + [{key: value for key, value in step.items() if key.startswith("reward/")} for step in steps]

    first = run("first")
    assert all("ensemble/std" in row for row in first[:8]) and "reward/ensemble/std" in first[-1]
    assert run("again", replay=str(tmp_path / "first")) == first and "are scored again" not in caplog.text


# What an update is made of


@pytest.mark.parametrize("variant", ["grpo", "gspo", "gmpo", "rloo"])
def test_rounding_of_16_bits_clips_nothing_before_the_first_update(variant: str) -> None:
    """GSPO's bounds are a tenth of what bf16 makes of a completion's ratio to the engine."""
    bench = workbench(variant=variant, precision="bf16", generation={"max_new_tokens": 32})
    metrics = bench.step(bench.window()).metrics
    assert metrics["clipped"] == 0 and metrics["ratio"] == pytest.approx(1.0, abs=0.02)


def by_prompt(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """One reward for all completions of a prompt, and another for the next."""
    return [float(len(prompt)) for prompt in prompts]


def test_equal_rewards_in_each_group_end_no_run_whose_advantages_differ(tmp_path: Path) -> None:
    rows = [{"prompt": "1" * length} for length in range(1, 9)]

    def run(**options: Any) -> int:
        config = GRPOConfig.parse(
            {"batch_size": 4, "group_size": 2, "max_steps": 4, "max_idle_batches": 1, **options}
            | {"generation": {"max_new_tokens": 4}}
        )
        return GRPOTrainer(config, model=small_policy(), data=rows, rewards=[by_prompt]).train().step

    assert run(variant="reinforce_plus_plus") == 4
    for options in ({"variant": "grpo"}, {"variant": "rloo", "kl_weight": 0.1}):
        with pytest.raises(NumbersError, match="all rewards of each prompt are equal"):
            run(**options)


@pytest.mark.parametrize("variant", ["reinforce_plus_plus", "rloo"])
def test_a_kl_in_the_reward_keeps_no_run_alive_whose_rewards_are_all_zero(variant: str) -> None:
    """Its rounding is scaled up to no advantage either."""
    bench = workbench(variant=variant, rewards=[lambda completions, **columns: [0.0] * len(completions)])
    assert bench.window()["advantages"].abs().max() < 0.01
    trainer = bench.trainer
    config = trainer.config.model_copy(update={"max_steps": 6, "max_idle_batches": 1})
    run = GRPOTrainer(config, model=small_policy(), data=prompts(count=16), rewards=trainer.rewards)
    with pytest.raises(NumbersError, match="all rewards of each prompt are equal"):
        run.train()


def workbench(rewards: Any = None, **options: Any) -> Workbench:
    config = GRPOConfig.parse(
        {
            "batch_size": 4, "group_size": 4, "generation": {"max_new_tokens": 8}, "dataset": {"wrap": "none"},
            "variant": "dr_grpo", **options,
        }
    )  # fmt: skip
    return Workbench(GRPOTrainer(config, model=small_policy(), data=prompts(count=16), rewards=rewards or [digits]))


def test_no_reference_is_kept_where_the_kl_has_no_weight() -> None:
    assert "reference" not in workbench().trainer.models and not hasattr(workbench().trainer, "reference")
    assert hasattr(workbench(kl_weight=0.1).trainer, "reference")
    assert hasattr(workbench(kl_budget=0.1).trainer, "reference")


def test_old_log_probabilities_are_the_engines_unless_they_are_corrected() -> None:
    plain = workbench().window()
    assert torch.equal(plain["old_logps"], plain.engine_logps)
    corrected = workbench(correction="token_truncated").window()
    assert not torch.equal(corrected["old_logps"], corrected.engine_logps)
    torch.testing.assert_close(corrected["old_logps"], corrected.engine_logps, rtol=1e-4, atol=1e-4)


def test_the_first_update_has_a_ratio_of_one() -> None:
    made = workbench()
    found = made.step(made.window()).metrics
    assert found["ratio"] == pytest.approx(1, abs=1e-4) and found["clipped"] == 0


@pytest.mark.parametrize("aggregation", ["token", "sequence_mean", "sequence_sum", "constant"])
def test_truncated_completions_count_in_neither_sum(aggregation: str) -> None:
    """Masked, they give the update of the others alone, with their advantages, and aren't forwarded."""
    generation = {"max_new_tokens": 8, "stop_ids": list(range(30, 70))}  # so that some end before the limit
    made = workbench(aggregation=aggregation, mask_truncated=True, generation=generation)
    masked, whole = made.window(), workbench(aggregation=aggregation, generation=generation).window()
    truncated = whole["truncated"]
    assert 0 < int(truncated.sum()) < len(truncated) and not masked["truncated"].any()
    kept = whole.take((~truncated).nonzero().flatten())
    assert masked.num_responses == kept.num_responses
    ours, theirs = made.step(masked), made.step(kept)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert sum(made.trainer.weights(masked).values()) == sum(made.trainer.weights(kept).values())


def test_equal_groups_are_skipped_or_replaced() -> None:
    kept = workbench([has_digit]).window()
    differs = kept["differs"]
    assert kept.loss_mask.any(dim=1).all() and 0 < int(differs.sum()) < len(differs)
    skipped = workbench([has_digit], equal_groups="skip").window()
    assert skipped.rows == kept.select(differs.nonzero().flatten()).rows
    assert workbench([has_digit], equal_groups="resample").window()["differs"].all()


# Runs


def test_a_run_raises_the_reward(tmp_path: Path) -> None:
    options = {
        "batch_size": 8, "group_size": 4, "learning_rate": 1e-2, "lr_schedule": "constant", "warmup_ratio": 0.0, "max_steps": 40,
        "generation": {"max_new_tokens": 8}, "rollout_epochs": 2, "minibatches": 2, "logging": {"progress": False},
        "dataset": {"wrap": "none"}, "variant": "dr_grpo", "eval_samples": 4, "eval_steps": 40,
    }  # fmt: skip
    run = GRPOTrainer(
        GRPOConfig.parse(options), model=small_policy(), data=prompts(), eval_data=prompts("test"), rewards=[digits],
        output=tmp_path,
    )  # fmt: skip
    after = run.train().eval_metrics
    rewards = [row["reward"] for row in metrics_of(tmp_path) if "reward" in row]
    assert len(rewards) == 10 and statistics.fmean(rewards[-2:]) > statistics.fmean(rewards[:2]) + 0.2
    assert after["eval_reward"] > rewards[0] + 5 * after["eval_reward_se"]


def test_a_third_partys_advantage_and_reward_train(install: Any, tmp_path: Path) -> None:
    code = '''
import torch


def above_median(rewards, groups, *, factor: float = 1.0):
    """Return the reward minus the median of its group, times a factor."""
    found = torch.zeros_like(rewards)
    for group in groups.unique():
        of = groups == group
        found[of] = factor * (rewards[of] - rewards[of].median())
    return found


def letters(completions, **columns):
    return [sum(one.isalpha() for one in text) / 8 for text in completions]
'''
    install("acme-rl", {"acme_rl.py": code}, parts={"advantage.above_median": "acme_rl:above_median"})
    options = {
        "batch_size": 4, "group_size": 4, "max_steps": 2, "generation": {"max_new_tokens": 8}, "logging": {"progress": False},
        "dataset": {"wrap": "none"}, "kl_weight": 0.0, "advantage": "above_median", "advantage_options": {"factor": 2},
        "rewards": ["acme_rl:letters"],
    }  # fmt: skip
    runs = {}
    for name, given in {"installed": options, "path": {**options, "advantage": "acme_rl:above_median"}}.items():
        run = GRPOTrainer(GRPOConfig.parse(given), model=small_policy(), data=prompts(), output=tmp_path / name)
        assert run.train().step == 2
        runs[name] = [row["loss"] for row in metrics_of(tmp_path / name)]
    assert runs["installed"] == runs["path"] and any(runs["path"])


def test_a_part_of_a_third_party_trains_or_is_named() -> None:
    """Whitening without an epsilon trains; twice as many advantages as completions are the part's fault."""
    options = {**OPTIONS, "batch_size": 2, "max_steps": 1, "minibatches": 1, "rollout_epochs": 1, "rewards": []}
    ADVANTAGES.register("whitened", lambda rewards, groups: (rewards - rewards.mean()) / rewards.std())
    ADVANTAGES.register("too_many", lambda rewards, groups: torch.cat([rewards, rewards]))

    def train(name: str) -> Any:
        config = GRPOConfig.parse({**options, "advantage": name, "logging": {"progress": False}})
        return GRPOTrainer(config, model=small_policy(), data=prompts(count=2), rewards=[digits]).train()

    assert math.isfinite(train("whitened").metrics["loss"])
    with pytest.raises(PluginError, match="advantage `too_many`: must return one number per completion"):
        train("too_many")
