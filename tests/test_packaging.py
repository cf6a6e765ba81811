"""The wheel in an environment of its own, outside of the repository, alone and beside packages of third parties.

The environment is a fresh venv in which every installed distribution but ours is linked, metadata too: what is there of ours
is the wheel alone, and nothing heavy is downloaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
OURS = ("rlhf_core", "_editable_impl_rlhf_core", "__pycache__")


class Environment:
    """A virtual environment, and the directory outside of the repository that its commands run in."""

    def __init__(self, path: Path, work: Path) -> None:
        self.path, self.work = path, work
        venv.create(path, symlinks=True)
        site = Path(sysconfig.get_path("purelib", vars={"base": str(path), "platbase": str(path)}))
        for item in Path(sysconfig.get_path("purelib")).iterdir():
            if not item.name.startswith(OURS):
                (site / item.name).symlink_to(item)

    def variables(self) -> dict[str, str]:
        """Return the environment variables of its commands."""
        hidden = {"PYTHONPATH", "VIRTUAL_ENV", "PYTEST_ADDOPTS"}
        kept = {key: value for key, value in os.environ.items() if key not in hidden}
        return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(self, *command: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        program, *arguments = command
        done = subprocess.run(
            [str(self.path / "bin" / program), *arguments],
            cwd=self.work,
            env=self.variables(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == expect, f"{command} gave {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def install(self, *what: Path) -> None:
        # Without an index: a requirement that the environment doesn't meet fails here.
        self.run("python", "-m", "pip", "install", "--no-index", "--no-build-isolation", *(str(path) for path in what))

    def listed(self, *arguments: str) -> dict[str, dict[str, str]]:
        return {
            plugin["qualified"]: plugin for plugin in json.loads(self.run("rlhf", "list", "--json", *arguments).stdout)
        }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def clean(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("clean") / "venv", tmp_path_factory.mktemp("elsewhere"))
    environment.install(built[1])
    return environment


def test_the_archives_hold_what_they_should(built: tuple[Path, Path]) -> None:
    sdist, wheel = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "constraints.txt", "LICENSE", "tests/test_packaging.py", "rlhf_core/py.typed"} <= names
    inside = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in inside}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"rlhf_core", "rlhf_plugins"}
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "rlhf_core").rglob("*") if path.is_file()}
    assert {name for name in here if "__pycache__" not in name} == {
        name for name in inside if name.startswith("rlhf_core/")
    }


def test_the_wheel_works_alone(clean: Environment) -> None:
    from rlhf_core import __version__

    assert clean.run("rlhf", "--version").stdout == clean.run("python", "-m", "rlhf_core", "--version").stdout
    assert clean.run("rlhf", "--version").stdout == f"rlhf-core {__version__}\n"
    plugins = clean.listed()
    assert {"rlhf-core:sft", "rlhf-core:dpo"} <= set(plugins)
    assert all(plugin["status"] == "ok" for plugin in plugins.values()), plugins
    assert "beta" in clean.run("rlhf", "show", "dpo").stdout
    assert clean.listed("--check") == plugins
    code = (
        "import rlhf_core, sys; from importlib.metadata import distribution;"
        "points = distribution('rlhf-core').entry_points; [point.load() for point in points];"
        "assert rlhf_core.__file__.startswith(sys.prefix), rlhf_core.__file__; print(len(points))"
    )
    assert int(clean.run("python", "-c", code).stdout) >= len(plugins)
    assert "no problems" in clean.run("rlhf", "doctor").stdout


def write_package(root: Path, name: str, source: str, entries: Mapping[str, str]) -> Path:
    """Write a package of one module, as a third party would who doesn't use `rlhf new`."""
    module = name.replace("-", "_")
    path = root / name
    path.mkdir()
    table = "".join(f'{key} = "{module}:{value}"\n' for key, value in entries.items())
    (path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "{name}"\nversion = "0.1"\ndependencies = ["rlhf-core"]\n'
        f'[project.entry-points."rlhf_core.trainers"]\n{table}'
        f'[tool.hatch.build.targets.wheel]\ninclude = ["{module}.py"]\n'
    )
    (path / f"{module}.py").write_text(source)
    return path


METHOD = '''
from rlhf_core.config.training import TrainerConfig, TrainingStage
from rlhf_core.contracts.trainer import Loss, Trainer


class Theirs(Trainer[TrainerConfig]):
    """A third party's method."""

    api = 1
    record = "preference"
    stage = TrainingStage.PREFERENCE
    Config = TrainerConfig

    def weights(self, batch):
        return {"pull": batch.num_prompts}

    def loss(self, batch):
        return Loss({"pull": -self.policy.response_logps(batch).sum()})
'''


@pytest.fixture(scope="module")
def crowded(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel beside a package from `rlhf new` and three that are wrong, each in its own way."""
    environment = Environment(tmp_path_factory.mktemp("crowded") / "venv", tmp_path_factory.mktemp("outside"))
    environment.install(built[1])
    environment.run("rlhf", "new", "trainer", "acme-margin")
    work = environment.work
    environment.install(
        work / "acme-margin",
        write_package(work, "acme-raises", "raise RuntimeError('no licence')\n" + METHOD, {"raises": "Theirs"}),
        write_package(work, "acme-second", METHOD, {"dpo": "Theirs"}),
        write_package(work, "acme-future", METHOD.replace("api = 1", "api = 2"), {"future": "Theirs"}),
    )
    return environment


def test_each_third_party_is_listed_with_its_status(crowded: Environment) -> None:
    plugins = crowded.listed()
    status = {name: plugin["status"] for name, plugin in plugins.items()}
    assert status["acme-margin:acme-margin"] == status["rlhf-core:sft"] == "ok"
    assert status["acme-second:dpo"] == status["rlhf-core:dpo"] == "conflict"
    assert status["acme-future:future"] == "wrong-api"
    assert "`acme-second:dpo`" in plugins["rlhf-core:dpo"]["reason"]
    checked = crowded.listed("--check")
    assert checked["acme-raises:raises"]["status"] == "broken"
    assert "no licence" in checked["acme-raises:raises"]["reason"]
    assert "no licence" in crowded.run("rlhf", "doctor", expect=5).stdout
    ambiguous = crowded.run("rlhf", "schema", "dpo", expect=5).stderr
    assert "acme-second:dpo" in ambiguous and "rlhf-core:dpo" in ambiguous
    assert crowded.run("rlhf", "schema", "dpo", "--no-plugins").stdout.startswith("{")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A tiny model, preference rows and sft rows."""
    from rlhf_core.testing.tiny import save_tiny

    root = tmp_path_factory.mktemp("inputs")
    pairs, rows = root / "pairs.jsonl", root / "rows.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": "0"}) + "\n" for n in range(16))
    )
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1=", "response": f"{n + 1}"}) + "\n" for n in range(16)))
    return Path(save_tiny(root / "model")), pairs, rows


@pytest.mark.parametrize("method", ["acme-margin", "sft", "rlhf-core:dpo", "acme-second:dpo"])
def test_every_other_method_trains(crowded: Environment, inputs: tuple[Path, Path, Path], method: str) -> None:
    model, pairs, rows = inputs
    output = crowded.work / f"run-{method.replace(':', '-')}"
    arguments = ["--model", str(model), "--data", str(rows if method == "sft" else pairs), "--output", str(output)]
    options = ["--max_steps", "3", "--batch_size", "4", "--max_length", "64", "--learning-rate", "1e-3", "--json"]
    done = crowded.run("rlhf", "train", method, *arguments, *options)
    assert json.loads(done.stdout)["step"] == 3
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert all({"loss", "learning_rate", "grad_norm", "tokens"} <= set(row) for row in metrics)
    assert f"rlhf train {method}" in (output / "command.txt").read_text()


def test_the_new_package_passes_its_own_tests(crowded: Environment) -> None:
    done = crowded.run("python", "-m", "pytest", "-q", str(crowded.work / "acme-margin"))
    assert " passed" in done.stdout and " failed" not in done.stdout
    crowded.run("rlhf", "check", "trainer:acme-margin")


@pytest.fixture(scope="module")
def online(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel beside an online trainer from `rlhf new`, and the data of its example."""
    environment = Environment(tmp_path_factory.mktemp("online") / "venv", tmp_path_factory.mktemp("beyond"))
    environment.install(built[1])
    environment.run("rlhf", "new", "trainer", "acme-rollouts", "--online")
    environment.install(environment.work / "acme-rollouts")
    environment.run("python", "-m", "rlhf_core.testing", "demo")
    return environment


def test_a_new_online_trainer_learns_from_its_example_and_resumes(online: Environment) -> None:
    example, run = str(online.work / "acme-rollouts" / "example.yaml"), online.work / "runs" / "acme-rollouts"
    done = json.loads(online.run("rlhf", "train", example, "--json").stdout)
    assert done["step"] == 40
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (sum(row["reward/digits"] for row in part) / 5 for part in (rows[:5], rows[-5:]))
    # About 0.05 before and 0.7 after.
    assert last > first + 0.3 and all(row["ratio"] == pytest.approx(1, abs=1e-4) for row in rows)
    killed = online.work / "runs" / "killed"
    going = subprocess.Popen(
        [str(online.path / "bin" / "rlhf"), "train", example, "--output", str(killed)],
        cwd=online.work,
        env=online.variables(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (killed / "checkpoints" / "step-10").exists():
        assert going.poll() is None, "it ended before its first checkpoint"
        time.sleep(0.02)
    going.kill()
    assert going.wait() == -signal.SIGKILL, "it ended before it was killed"
    again = online.run("rlhf", "train", example, "--output", str(killed), "--resume", "--json")
    assert json.loads(again.stdout)["step"] == 40
    ends = [(path / "model" / "model.safetensors").read_bytes() for path in (run, killed)]
    assert ends[0] == ends[1]


def test_the_new_online_trainer_passes_its_own_tests(online: Environment) -> None:
    done = online.run("python", "-m", "pytest", "-q", str(online.work / "acme-rollouts"))
    assert " passed" in done.stdout and " failed" not in done.stdout
    online.run("rlhf", "check", "trainer:acme-rollouts")
