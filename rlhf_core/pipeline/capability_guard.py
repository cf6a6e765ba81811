"""The guard of a pipeline's policies: capability tests of each, kept by the policy's content, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_core.config.capability_suites import CapabilityTestsConfig
from rlhf_core.config.yaml_file import dump_yaml
from rlhf_core.improvement.capability_tests import CapabilityChange, CapabilityResult, CapabilityTester
from rlhf_core.infra.files import replace_file
from rlhf_core.pipeline.stage_command import RunCommand
from rlhf_core.pipeline.stage_fingerprint import content_of, contents, fingerprint


class CapabilityGuard:
    """Runs a recipe's suites on policies, each policy once.

    Args:
        config: the suites, and what counts as a regression.
        directory: where results are kept, one file per policy.
        run: runs a command of `rlhf`: the tests load the policy in a process of their own.
        seed: of completions, where they are drawn.
    """

    def __init__(self, config: CapabilityTestsConfig, directory: Path, run: RunCommand, seed: int) -> None:
        self._tester = CapabilityTester(config)
        self._config, self._directory, self.run, self._seed = config, directory, run, seed
        values = config.model_dump(mode="json")
        files = contents(values)
        self._suites = {"suites": values["suites"], "files": files}
        self.rules = fingerprint({"tests": values, "files": files})
        """What a verdict depends on besides the policies: suites with the content of their files, and what is a regression."""

    def test(self, policy: str) -> CapabilityResult:
        """Return how a policy does; a result of the same weights and suites is taken from the file."""
        self._directory.mkdir(parents=True, exist_ok=True)
        suites = self._directory / "suites.yaml"
        values = self._config.model_dump(mode="json")
        key = fingerprint(
            {"policy": content_of(Path(policy).expanduser()) or policy, **self._suites, "seed": self._seed}
        )
        result = self._directory / f"{key[:16]}.json"
        if not result.exists():
            replace_file(suites, dump_yaml(values).encode())
            flags = ["--model", policy, "--seed", str(self._seed), "--output", str(result)]
            self.run(["test-capabilities", str(suites), *flags], log=self._directory / "tests.log")
        return CapabilityResult.load(result)

    def changes(self, before: CapabilityResult, after: CapabilityResult) -> list[CapabilityChange]:
        """Return how each suite changed; its `regressed` says whether the policy is given up."""
        return self._tester.changes(before, after)


def summary(result: CapabilityResult) -> dict[str, Any]:
    """Return suite → estimate, as the pipeline's record has it."""
    return {name: suite.estimate.as_json() for name, suite in result.suites.items()}
