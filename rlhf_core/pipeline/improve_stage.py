"""A stage of self-improvement: sample from the policy, keep what a check finds right, train on that; in rounds.

With plain samples this is rejection sampling (expert iteration; Zelikman et al. 2022, "STaR", arXiv 2203.14465, restarts from the
first model in each round); with a search as the sampler, the search's answers are distilled into the policy.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.config.improvement_round import TRAINER, FlawFilterConfig, ImprovementConfig
from rlhf_core.config.online import RewardConfig
from rlhf_core.config.yaml_file import dump_yaml, overlay
from rlhf_core.generation.sampling_job import load_sampling_job
from rlhf_core.improvement.flaw_detectors import DETECTORS
from rlhf_core.improvement.flaw_rows import FLAWS, flaws_of
from rlhf_core.infra.errors import ConfigError, DataError, Mistakes, RLHFError, did_you_mean
from rlhf_core.infra.files import replace_file
from rlhf_core.infra.seeds import stream_seed
from rlhf_core.pipeline.run_metrics import read_rows, training_gain
from rlhf_core.pipeline.stage import (
    POLICY,
    Find,
    Need,
    Product,
    Stage,
    StageWork,
    check_model,
    check_prompts,
    reward_needs,
)
from rlhf_core.pipeline.stage_references import MODEL, references, resolved, spelled_out
from rlhf_core.pipeline.train_stage import train, trainer_options
from rlhf_core.registry.method_or_file import GivenValues, find_method
from rlhf_core.rewards import check_given
from rlhf_core.training.job import load_job

_SCORE = "check_score"
"""Column of the check's scores."""
_RECORD = "sft"


class ImproveStage(Stage):
    """A stage of self-improvement. Its keys are those of `ImprovementConfig`."""

    def _find_method(self) -> None:
        rounds = self.values.get("rounds", 1)
        self.makes = {MODEL: Product(POLICY, f"round-{rounds}/train/{MODEL}")}
        if self.entry.method is not None:
            fix = "name the sampler under `sampler`, and the trainer under `train`"
            place = self.entry.place("method")
            self.errors.append(ConfigError("a stage of self-improvement has no `method`", place=place, fix=fix))

    def _completed(self) -> dict[str, Any]:
        values = {"seed": self.recipe.recipe.seed, **self.values}
        sampler = values.get("sampler")
        if isinstance(sampler, Mapping):
            values["sampler"] = {**sampler, **self._sampler_models(sampler)}
        return values

    def _sampler_models(self, sampler: Mapping[str, Any]) -> dict[str, Any]:
        """Return the models of a sampler's roles, where a stage's name means its model; none of an unknown sampler."""
        try:
            _, method = find_method(sampler, {"": ""}, "sampler")
        except RLHFError:  # which `check` tells
            return {}
        found: dict[str, Any] = {}
        for role, kind in method.roles.items():
            if role != POLICY and sampler.get(role) is not None:
                given = spelled_out(sampler[role], self.recipe.names)
                several = given if isinstance(given, list) else [given]
                found[role] = [self.reward_by_stage(one) for one in several] if kind == "reward" else given
        return found

    def _needs(self) -> Sequence[Need]:
        sampler = self.values.get("sampler")
        rewards = [
            need
            for role, given in (sampler.items() if isinstance(sampler, Mapping) else ())
            for need in reward_needs(f"sampler.{role}", given)
        ]
        return [Need(MODEL, (POLICY,), "a policy, which is improved"), *rewards]

    def check(self, find: Find) -> list[RLHFError]:
        instead = {MODEL: "model", "prompts": ["prompts"]}
        values = resolved(self.values, find)
        config, wrong, found = ImprovementConfig.parse_sound(values, place=self.entry.places, instead=instead)
        mistakes = Mistakes(found)
        if config is None:
            return mistakes
        if "sampler" not in wrong:
            with mistakes.noted():
                job = load_sampling_job(GivenValues(self._sampling(config, 1, config.model), self._places("sampler")))
                job.rewards()
        if "prompts" not in wrong:
            given = {**config.sampler, "prompts": self.values["prompts"]}
            mistakes += check_prompts(given, self.entry.place("prompts"))
        if "check" not in wrong:
            with mistakes.noted():
                check_given([config.check], place={"": self.entry.place("check")})
        if config.flaws is not None:
            with mistakes.noted():
                self._check_flaws(config.flaws)
        if "train" not in wrong:
            with mistakes.noted():
                self._check_training(config)
        if MODEL in self.entry.values and MODEL not in wrong and not list(references(self.values[MODEL])):
            mistakes += check_model(config.model, self.entry.place(MODEL), self.earlier)
        return mistakes

    def trainer_options(self) -> set[str] | None:
        """Return the options of the trainer, of an unknown one those of the nearest; None where no name is near."""
        train = self.values.get("train", TRAINER)
        return trainer_options(train.get("method", TRAINER) if isinstance(train, Mapping) else train)

    def _check_flaws(self, config: FlawFilterConfig) -> None:
        """Check the detectors and the verifier. Raises RLHFError: there is none of a name, or its options are wrong."""
        place = self.entry.place("flaws")
        if unknown := next((name for name in config.detectors or () if name not in DETECTORS), None):
            fix = did_you_mean(unknown, DETECTORS)
            raise ConfigError(f"there is no detector `{unknown}`", place=self.entry.place("flaws.detectors"), fix=fix)
        if config.verifier is not None:
            check_given([config.verifier], place={"": place})

    def _check_training(self, config: ImprovementConfig) -> None:
        """Check the options of the training.

        Raises:
            RLHFError: they are wrong, or the method consumes rows of another record type.
        """
        values = self._training(config, config.model, Path("kept.jsonl"), Path())
        job = load_job(GivenValues(values, self._places("train")))
        record = job.method.record_type(job.options)
        if record != _RECORD:
            raise ConfigError(
                f"a round of self-improvement makes rows of the record type `{_RECORD}`, and `{values['method']}` consumes"
                f" `{record}`",
                place=self.entry.place("train"),
                fix="train with `sft`, or another method of that record type",
            )

    def run(self, work: StageWork) -> dict[str, Any]:
        config = self._config(work.find)
        rounds: list[dict[str, Any]] = []
        policy = config.model
        for number in range(1, config.rounds + 1):
            directory = work.directory / f"round-{number}"
            directory.mkdir(parents=True, exist_ok=True)
            kept = directory / "kept.jsonl"
            if not kept.exists():
                self._keep(work, config, number, policy, directory)
            target = directory / "train"
            start = config.model if config.restart else policy
            trained = train(
                work.run, self._training(config, start, kept, target), target, file=directory / "train.yaml"
            )
            rounds.append({**_counts(_judged(directory, config), kept, config), **trained})
            policy = str(target / MODEL)
        tokens, seconds = (sum(one[name] for one in rounds) for name in ("tokens", "seconds"))
        return {
            "rounds": rounds,
            "tokens": tokens,
            "seconds": seconds,
            "first": rounds[0]["first"],
            "last": rounds[-1]["last"],
        }

    def gain(self, metrics: Mapping[str, Any]) -> str:
        rounds = ", ".join(
            f"{one['share_right']:.1%} right, "
            + (f"{one['flawed']} of these with a flaw, " if "flawed" in one else "")
            + f"{one['kept']} kept"
            for one in metrics["rounds"]
        )
        return f"{rounds}; {training_gain(metrics)}".removesuffix("; ")

    def _keep(self, work: StageWork, config: ImprovementConfig, number: int, policy: str, directory: Path) -> None:
        """Sample a round's completions, score them, and write those that are kept."""
        log = directory / "sample.log"
        samples, scored = directory / "samples.jsonl", directory / "scored.jsonl"
        file = directory / "sample.yaml"
        replace_file(file, dump_yaml({**self._sampling(config, number, policy), "output": str(samples)}).encode())
        work.run(["sample", str(file), *_more(samples)], log=log)
        check, column = config.check, self._prompt_column(config)
        named = [f"--columns.prompt={column}"] if column != "prompt" else []
        flags = _option_flags("options", check.options)
        flags += [f"--data={samples}", f"--output={scored}", f"--score-column={_SCORE}", f"--runs-in={check.runs_in}"]
        work.run(["score", check.name, *flags, *named, *_more(scored)], log=log)
        judged = _judged(directory, config)
        if config.flaws is not None and not judged.exists():
            flags = [f"--data={scored}", f"--output={judged}", *_flaw_flags(config.flaws, check)]
            work.run(["find-flaws", *flags, *named], log=log)
        rows = list(kept_rows(read_rows(judged), config, prompt=column))
        if not rows:
            raise DataError(
                f"no completion of round {number} scored {config.at_least:g} or more"
                f"{'' if config.flaws is None else ' and has no flaw'}, so there is nothing to train on",
                place=str(judged),
                fix="sample more per prompt (`sampler.n`), take easier prompts, or lower `at_least`",
            )
        replace_file(
            directory / "kept.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        )

    def _config(self, find: Find) -> ImprovementConfig:
        return ImprovementConfig.parse(resolved(self.values, find), place=self.entry.places)

    def _sampling(self, config: ImprovementConfig, number: int, policy: str) -> dict[str, Any]:
        """Return the file of a round's sampling, as values."""
        seed = stream_seed(config.seed, "improvement round", number)
        return {"n": 8, "seed": seed, **config.sampler, MODEL: policy, "prompts": config.prompts}

    def _training(self, config: ImprovementConfig, policy: str, data: Path, output: Path) -> dict[str, Any]:
        """Return the file of a round's training, as values."""
        known = self.trainer_options() or set()
        defaults = {key: value for key, value in self.recipe.recipe.defaults.items() if key in known}
        values = overlay({"method": TRAINER, "seed": config.seed, **defaults}, config.train)
        return {**values, MODEL: policy, "data": str(data), "output": str(output)}

    def _places(self, group: str) -> dict[str, str]:
        """Return where the options of one group of the stage were set."""
        own = {
            key.removeprefix(f"{group}."): place
            for key, place in self.entry.places.items()
            if key.startswith(f"{group}.")
        }
        return {**own, "": self.entry.place(group)}

    def _prompt_column(self, config: ImprovementConfig) -> str:
        dataset = config.sampler.get("dataset")
        columns = dataset.get("columns") if isinstance(dataset, Mapping) else None
        return str(columns.get("prompt", "prompt")) if isinstance(columns, Mapping) else "prompt"


def kept_rows(rows: Sequence[Mapping[str, Any]], config: ImprovementConfig, *, prompt: str) -> Iterator[dict[str, Any]]:
    """Yield a row to train on for each completion that is kept: right by the check, ended by itself, not blank, without a flaw
    where they are dropped, its text not yet kept.

    Of a prompt at most `keep` are kept: the best first, of equal ones the first drawn.

    Args:
        prompt: the column that holds the prompt.
    """
    for number, row in enumerate(rows, 1):
        if prompt not in row:
            raise DataError(
                f"the row has no column `{prompt}`", place=f"row {number} of the prompts", got=", ".join(row)
            )
        drawn = zip(_several(row, "completion"), _several(row, "stop_reason"), _several(row, _SCORE), strict=True)
        found = flaws_of(row) if config.flaws is not None else [[]] * len(_several(row, "completion"))
        dropped = config.flaws is not None and config.flaws.action == "drop"
        right = [
            (text, score, flaws)
            for (text, reason, score), flaws in zip(drawn, found, strict=True)
            if reason != "length" and score >= config.at_least and text.strip() and not (dropped and flaws)
        ]
        best = sorted(right, key=lambda one: -one[1])
        texts = {text: flaws for text, _, flaws in reversed(best)}  # of equal texts the best one's
        for text in list(dict.fromkeys(text for text, _, _ in best))[: config.keep]:
            flagged = {FLAWS: texts[text]} if config.flaws is not None and not dropped else {}
            yield {"prompt": row[prompt], "response": text, **flagged}


def _several(row: Mapping[str, Any], column: str) -> list[Any]:
    """Return the values of a row's completions, of which there may be one alone."""
    value = row.get(f"{column}s", row.get(column))
    return value if isinstance(value, list) else [value]


def _judged(directory: Path, config: ImprovementConfig) -> Path:
    """Return the file of a round's completions with all that was found about them."""
    return directory / ("scored.jsonl" if config.flaws is None else "checked.jsonl")


def _flaw_flags(config: FlawFilterConfig, check: RewardConfig) -> list[str]:
    """Return the flags of `rlhf find-flaws`; the proxy is the check."""
    flags = [] if config.detectors is None else [f"--detectors={','.join(config.detectors)}"]
    if config.verifier is None:
        return flags
    for role, reward in (("proxy", check), ("verifier", config.verifier)):
        flags += [f"--{role}.name={reward.name}", f"--{role}.runs-in={reward.runs_in}"]
        flags += _option_flags(f"{role}.options", reward.options)
    return [*flags, f"--right-from={config.right_from}"]


def _option_flags(prefix: str, options: Mapping[str, Any]) -> list[str]:
    """Return options of a reward as flags."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return [f"--{prefix}.{key}={text}" for key, text in texts.items()]


def _counts(judged: Path, kept: Path, config: ImprovementConfig) -> dict[str, Any]:
    """Return how many completions of a round were right, how many of these have which flaw, and how many are trained on."""
    rows = read_rows(judged)
    scores = [score for row in rows for score in _several(row, _SCORE)]
    right = sum(score >= config.at_least for score in scores)
    flawed: dict[str, Any] = {}
    if config.flaws is not None:
        found = [flaws for row in rows for flaws in flaws_of(row)]
        of_right = [flaws for flaws, score in zip(found, scores, strict=True) if score >= config.at_least]
        by_flaw = Counter(name for flaws in of_right for name in flaws)
        flawed = {"flawed": sum(map(bool, of_right)), "flaws": dict(sorted(by_flaw.items()))}
    return flawed | {
        "completions": len(scores),
        "right": right,
        "share_right": right / len(scores),
        "kept": len(read_rows(kept)),
    }


def _more(output: Path) -> list[str]:
    """Return the flag that continues a file of rows, where a killed stage has left one."""
    return ["--resume"] if output.exists() and output.stat().st_size else []
