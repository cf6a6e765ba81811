"""Replay of a run's rollouts: completions that another run kept whole, in place of generating them again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_core.config.online import OnlineConfig
from rlhf_core.config.training import TrainerConfig
from rlhf_core.config.yaml_file import load_yaml
from rlhf_core.contracts.batch import Batch
from rlhf_core.contracts.completion import Completion
from rlhf_core.contracts.reward import ScoreWithParts
from rlhf_core.infra.errors import ConfigError, StorageError
from rlhf_core.infra.files import read_json, storage_errors
from rlhf_core.infra.near_runs import near_run
from rlhf_core.rewards import Rewards, Scores, rewards_changed
from rlhf_core.training.rollout_log import ROLLOUTS, prompt_hash, row_of, unpack
from rlhf_core.training.run_directory import is_run

log = logging.getLogger(__name__)

_FIX = (
    "replay under the same data, `seed`, `batch_size` and `group_size`, and no further than the run kept its rollouts"
)


class SavedRollouts:
    """The rollouts that a run kept whole, found by step, prompt and number. Only their places in the file are held in memory.

    Args:
        run: the directory of the run.
        config: of the run that replays.
        rewards: of the run that replays. Where they are those that scored the rollouts, scores are taken from there, too.

    Raises:
        ConfigError: the run kept none whole, or drew them in another way.
        StorageError: it is no run's directory, or its file can't be read.
    """

    def __init__(self, run: str | Path, config: OnlineConfig, rewards: Rewards) -> None:
        self.run = Path(run).expanduser()
        self._path = self.run / ROLLOUTS
        self.used = False
        """Whether the method has asked for any."""
        if not is_run(self.run):
            raise StorageError(
                "is not a run's directory",
                place=f"replay: {self.run}",
                fix=near_run(self.run) or "give a run's directory",
            )
        self._offsets = self._find()
        if not self._offsets:
            raise ConfigError(
                "the run kept no whole rollouts", place=f"replay: {self.run}",
                fix="train it with `--logging.rollouts.whole true`, which keeps what a replay needs",
            )  # fmt: skip
        self._refuse_other_sampling(config)
        self.scored = self._scored_by(rewards)
        """Whether scores are taken from the run, too."""
        if len(rewards) and not self.scored:
            log.info("the rewards aren't those of %s: the rollouts that it kept are scored again", self.run)

    def check_model(self, models: Mapping[str, Any]) -> None:
        """Refuse rollouts that another model drew, where the files of both are known.

        Args:
            models: descriptions of the models by role, as `models.json` holds those of the other run.

        Raises:
            ConfigError: the policy's files differ.
        """
        path = self.run / "models.json"
        if not path.is_file():
            return
        with storage_errors(path):
            before = read_json(path)
        then, now = before.get("policy") if isinstance(before, dict) else None, models.get("policy")
        if not isinstance(then, dict) or not isinstance(now, Mapping):
            return
        if then.get("files") and now.get("files") and then["files"] != now["files"]:
            raise ConfigError(
                "another model drew the rollouts than the one that would learn from them", place=f"replay: {self.run}",
                got=f"a run of {then.get('source')}, whose files aren't those of {now.get('source')}",
                fix="replay with the model that the run began from",
            )  # fmt: skip

    def completions(self, step: int, batch: Batch, n: int) -> list[list[Completion]]:
        """Return the n completions of each prompt that were drawn after `step`.

        Raises:
            ConfigError: the run kept no such completions, or they answer another prompt.
        """
        return [[unpack(row) for row in group] for group in self._groups(step, batch, n)]

    def scores(self, step: int, batch: Batch, n: int, names: Sequence[str]) -> Scores:
        """Return the scores of these completions by the rewards of these names, with their parts, as the run has kept them."""
        rows = [row for group in self._groups(step, batch, n) for row in group]
        return Scores(
            torch.tensor([row["reward"] for row in rows], dtype=torch.float32),
            {name: [_with_parts(row["rewards"], name) for row in rows] for name in names},
            [prompt for prompt in range(batch.num_prompts) for _ in range(n)],
        )

    def _find(self) -> dict[tuple[int, int, int], int]:
        """Return where in the file each completion is: (step, place, number) → offset in bytes."""
        if not self._path.exists():
            return {}
        found, at = {}, 0
        with storage_errors(self._path), self._path.open("rb") as file:
            for line in file:
                row = row_of(line)
                if row is not None and "drawn" in row:
                    found[row["step"], row["place"], row["sample"]] = at
                at += len(line)
        return found

    def _groups(self, step: int, batch: Batch, n: int) -> list[list[dict[str, Any]]]:
        """Return the rows of n completions of each prompt of a batch."""
        self.used = True
        groups = []
        with storage_errors(self._path), self._path.open("rb") as file:
            for prompt, row in enumerate(batch.rows):
                place = batch.places[prompt] if batch.places else row
                group = []
                for number in range(n):
                    at = self._offsets.get((step, place, number))
                    if at is None:
                        raise self._missing(step, row, f"completion {number + 1} of {n} isn't there")
                    file.seek(at)
                    group.append(json.loads(file.readline()))
                if group and group[0]["drawn"]["prompt"] != prompt_hash(_prompt_ids(batch, prompt)):
                    raise self._missing(step, row, "the prompt there has other tokens")
                groups.append(group)
        return groups

    def _missing(self, step: int, row: int, what: str) -> ConfigError:
        place = f"replay: {self.run}, step {step}, row {row}"
        return ConfigError("the run kept no rollout to replay here", place=place, got=what, fix=_FIX)

    def _refuse_other_sampling(self, config: OnlineConfig) -> None:
        """Refuse rollouts drawn under other options than `generation`: their probabilities would be those of another policy.

        Or by another sampler: what it chose would be taken for what this one chooses.
        """
        path = self.run / "config.yaml"
        before = load_yaml(path)[0] if path.is_file() else {}
        chose = config.rollout_sampler.model_dump(mode="json") if config.rollout_sampler is not None else None
        if before and before.get("rollout_sampler") != chose:
            raise ConfigError(
                "another sampler drew the rollouts", place="rollout_sampler", got=f"not as in {path}",
                fix="replay under the run's own `rollout_sampler`",
            )  # fmt: skip
        drawn = before.get("generation")
        asked = config.generation.model_dump(mode="json")
        if drawn is not None and drawn != asked:
            different = sorted(name for name in asked if not isinstance(drawn, dict) or drawn.get(name) != asked[name])
            raise ConfigError(
                "the rollouts were drawn in another way", place="generation",
                got=f"{', '.join(different)}: not as in {path}", fix="replay under the run's own `generation`",
            )  # fmt: skip

    def _scored_by(self, rewards: Rewards) -> bool:
        """Return whether the run's record says that the same rewards scored its rollouts."""
        path = self.run / "rewards.json"
        if not len(rewards) or not path.is_file():
            return False
        with storage_errors(path):
            return not rewards_changed(read_json(path), rewards.describe())


def open_replay(config: TrainerConfig, rewards: Rewards) -> SavedRollouts | None:
    """Return the rollouts that a configuration asks for by `replay`; None where it asks for none.

    Raises:
        ConfigError, StorageError: as `SavedRollouts`.
    """
    if not isinstance(config, OnlineConfig) or config.replay is None:
        return None
    return SavedRollouts(config.replay, config, rewards)


def _with_parts(rewards: Mapping[str, float], name: str) -> float:
    """Return one reward's score of a completion, with its parts where it had any, as `Scores.named` wrote them."""
    parts = {key.removeprefix(f"{name}/"): value for key, value in rewards.items() if key.startswith(f"{name}/")}
    return ScoreWithParts(rewards[name], parts) if parts else rewards[name]


def _prompt_ids(batch: Batch, prompt: int) -> list[int]:
    return [int(token) for token in batch.prompt_ids[prompt, : int(batch.prompt_lengths[prompt])].tolist()]
