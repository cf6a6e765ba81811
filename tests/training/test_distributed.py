"""Several processes make the updates that one would. Each test has processes of its own and is judged by what they wrote."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_processes import run_script

from rlhf_core.config.training import DistributedConfig
from rlhf_core.infra.devices import DeviceManager
from rlhf_core.infra.errors import ConfigError, DataError, RLHFError, error_report, reported_error
from rlhf_core.infra.files import read_json
from rlhf_core.infra.safetensors_file import read_tensors
from rlhf_core.models.diagonal_fisher import DiagonalFisher
from rlhf_core.testing.tiny import save_tiny, tiny_model
from rlhf_core.training.distribution import Distribution, create_distribution
from rlhf_core.training.setup import check_config

OPTIONS: dict[str, Any] = {"max_steps": 6, "micro_batch_size": 2, "max_grad_norm": None, "eval_steps": 3}

FIRST_STEP = ("0.0", "0.1", "0.2")


def launch(
    output: Path,
    processes: int,
    *,
    options: dict[str, Any] | None = None,
    gone: tuple[int, ...] = (),
    torchrun: bool = False,
    **job: Any,
) -> list[int]:
    """Run the worker on so many processes; return the code that each one wrote.

    Args:
        gone: processes that don't end by themselves.
        torchrun: start them by `torchrun`, which notices how each ends.
    """
    output.mkdir(exist_ok=True)
    path = output.parent / f"{output.name}.job.json"
    # The toy's options, unless the job names a method.
    settings = {**({} if "method" in job else OPTIONS), **(options or {})}
    path.write_text(json.dumps({"output": str(output / "run"), "options": settings, **job}))
    worker = Path(__file__).with_name("worker.py")
    log = path.with_suffix(".log")
    if torchrun:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            subprocess.run([*start, worker, path], stdout=file, stderr=file, timeout=300, env=environment)
    else:
        run_script(worker, [str(path)], processes, log=log)
    codes = [output / "run" / f"code.{rank}" for rank in range(processes) if rank not in gone]
    assert all(code.exists() for code in codes), log.read_text()[-3000:]
    return [int(code.read_text()) for code in codes]


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]


def tensors(output: Path, name: str, rank: int = 0) -> dict[str, torch.Tensor]:
    return read_tensors(output / "run" / f"{name}.{rank}.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("one") / "1"
    assert launch(output, 1) == [0]
    return output


@pytest.mark.slow
def test_the_gradient_is_that_of_one_process(tmp_path: Path, one: Path) -> None:
    two = tmp_path / "2"
    assert launch(two, 2, torchrun=True) == [0, 0]
    expected, found = tensors(one, "gradients"), tensors(two, "gradients")
    assert len(expected) == 3 * OPTIONS["max_steps"] and expected.keys() == found.keys()
    for name in FIRST_STEP:  # Later steps start from weights that differ in their last bits.
        assert float((found[name] - expected[name]).norm() / expected[name].norm()) < 1e-5
    for row, same in zip(rows(two), rows(one), strict=True):
        for key in ("loss", "loss_nll", "mean_logp", "grad_norm"):
            assert row[key] == pytest.approx(same[key], rel=1e-3)
        assert row["tokens"] == same["tokens"]
    assert rows(two)[-1]["eval_loss"] == pytest.approx(rows(one)[-1]["eval_loss"], rel=1e-3)
    weights = tensors(two, "weights")
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors(two, "weights", 1).items())
    assert read_json(two / "run" / "run.json")["processes"] == 2
    heard = {path.name: path.read_text().split() for path in (two / "run").glob("heard.*")}
    assert heard == {"heard.0": [str(row["step"]) for row in rows(two)]}, "hooks listen in the first process alone"


@pytest.mark.slow
def test_elastic_weights_pull_the_same_in_one_process_and_two(tmp_path: Path) -> None:
    """The penalty's gradient is added once, not once per process; the anchor is elsewhere, so it counts from the first step."""
    weights = tiny_weights(0)
    information = DiagonalFisher({name: torch.ones_like(one) for name, one in weights.items()}, tiny_weights(1))
    ewc = {"fisher": [str(information.save(tmp_path / "f"))], "weight": 0.1}
    shared = {"batch_size": 8, "max_steps": 2, "max_length": 128, "learning_rate": 1e-3, "warmup_ratio": 0, "ewc": ewc}
    found = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, output in found.items():
        assert launch(output, processes, method="sft", options=shared) == [0] * processes
    assert first_gradients_differ_by(found[2], found[1]) < 1e-5
    far = sum(float((one - weights[name]).square().sum()) for name, one in tiny_weights(1).items())
    assert rows(found[1])[0]["ewc_penalty"] == pytest.approx(0.05 * far, rel=1e-4)
    for row, same in zip(rows(found[2]), rows(found[1]), strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-4)
        assert row["ewc_penalty"] == pytest.approx(same["ewc_penalty"], rel=1e-4)


def tiny_weights(seed: int) -> dict[str, torch.Tensor]:
    return {name: one.detach() for name, one in tiny_model(seed).named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sft", {}),
        ("dpo", {"reference": "copy"}),
        ("dpo", {"reference": "precompute", "micro_batch_size": 2}),
        ("dpo", {"loss_type": "aot_unpaired", "beta": 0.5, "sft_weight": 0.1}),
        ("kto", {"kl": "ema"}),
        ("reward_model", {"ensemble": {"size": 2, "bootstrap": True}}),
    ],
)
def test_a_method_learns_the_same_from_one_process_and_two(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    shared = {"batch_size": 8, "max_steps": 3, "max_length": 128, "learning_rate": 1e-3, "lr_schedule": "constant"}
    found = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        assert (
            launch(output, processes, method=method, options={**shared, "warmup_ratio": 0, **options})
            == [0] * processes
        )
        found[processes] = output
    assert first_gradients_differ_by(found[2], found[1]) < 1e-5
    for row, same in zip(rows(found[2]), rows(found[1]), strict=True):
        assert row["tokens"] == same["tokens"]
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-3)
    assert rows(found[2])[-1]["eval_loss"] == pytest.approx(rows(found[1])[-1]["eval_loss"], rel=1e-3)


SFT: dict[str, Any] = {
    "batch_size": 8, "max_steps": 3, "max_length": 128, "learning_rate": 1e-3, "lr_schedule": "constant", "warmup_ratio": 0,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        # Orthogonal updates are computed in 16 bits, in which rounding in a gradient shows.
        pytest.param({"optimizer": "muon"}, 1e-2, id="muon"),
        # Moments are rounded to the nearest of 256 numbers, from which a last bit may lead to the next one.
        pytest.param({"optimizer": "adamw_8bit"}, 1e-2, id="adamw_8bit"),
        pytest.param({"neftune_alpha": 5.0}, 1e-3, id="neftune"),
        pytest.param({"freeze": ["embed_tokens", "layers.0.*"]}, 1e-3, id="freeze"),
        # The group of processes has threads by then, and each process is forked to encode its rows.
        pytest.param({"dataset": {"processes": 2}}, 1e-3, id="forks"),
    ],
)
def test_an_option_of_training_does_the_same_in_one_process_and_two(
    tmp_path: Path, options: dict[str, Any], tolerance: float
) -> None:
    """The first step's gradients up to rounding, and the weights after three up to a share of the way that they went."""
    if options.get("optimizer") == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed (extra `adamw-8bit`)")
    found = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, output in found.items():
        assert launch(output, processes, method="sft", options={**SFT, **options}) == [0] * processes
    assert first_gradients_differ_by(found[2], found[1]) < 1e-5
    for row, same in zip(rows(found[2]), rows(found[1]), strict=True):
        assert (row["tokens"], row["learning_rate"]) == (same["tokens"], same["learning_rate"])
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-3)
    two, one, start = tensors(found[2], "weights"), tensors(found[1], "weights"), tiny_weights(0)
    assert all(torch.equal(two[name], tensor) for name, tensor in tensors(found[2], "weights", 1).items())
    assert differ_by(two, one, start) < tolerance
    stayed = {start_name(name) for name in one if torch.equal(one[name], start_of(name, start))}
    frozen = {name for name in start if "embed_tokens" in name or ".layers.0." in name}
    assert stayed == (frozen if "freeze" in options else set())
    assert all(torch.equal(two[name], start_of(name, start)) for name in two if start_name(name) in stayed)
    if "neftune_alpha" in options:
        assert launch(tmp_path / "quiet", 1, method="sft", options=SFT) == [0]
        assert first_gradients_differ_by(tmp_path / "quiet", found[1]) > 1e-2


@pytest.mark.slow
def test_a_run_on_two_processes_that_is_made_longer_is_the_one_that_was_planned_so(tmp_path: Path) -> None:
    """To the bit, and as one process would have run it up to rounding."""
    longer = {**SFT, "max_steps": 6}
    assert launch(tmp_path / "stretched", 2, method="sft", options=SFT) == [0, 0]
    assert launch(tmp_path / "stretched", 2, method="sft", options=longer, resume=True) == [0, 0]
    for name, processes in (("planned", 2), ("alone", 1)):
        assert launch(tmp_path / name, processes, method="sft", options=longer) == [0] * processes
    stretched, planned, alone = (tensors(tmp_path / name, "weights") for name in ("stretched", "planned", "alone"))
    assert all(torch.equal(planned[name], tensor) for name, tensor in stretched.items())
    assert differ_by(stretched, alone, tiny_weights(0)) < 1e-3
    assert [row["step"] for row in rows(tmp_path / "stretched")] == [1, 2, 3, 4, 5, 6]


def start_name(name: str) -> str:
    return name.removeprefix("policy.model.")


def start_of(name: str, start: dict[str, torch.Tensor]) -> torch.Tensor:
    return start[start_name(name)]


def differ_by(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """Return ‖found − expected‖ / ‖expected − start‖ over all weights."""
    apart = sum(float((found[name] - one).double().square().sum()) for name, one in expected.items())
    moved = sum(float((one - start_of(name, start)).double().square().sum()) for name, one in expected.items())
    return float((apart / moved) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("grpo", {"rewards": ["toy:digits"], "kl_weight": 0.1}),
        ("ppo", {"rewards": ["toy:digits"], "truncated": "score", "whiten_rewards": True}),
        ("distill", {"on_policy": 1.0, "prompts_only": True, "divergence": "reverse_kl"}),
    ],
)
def test_an_online_method_draws_and_learns_the_same_from_one_process_and_two(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    """One rollout and its step; groups of two and the normalisations over them are those of the whole step."""
    shared = {"batch_size": 4, "group_size": 2, "max_steps": 1, "max_length": 64, "eval_steps": None}
    drawn = {"generation": {"max_new_tokens": 8}, "rollout_epochs": 1, "logging": {"rollouts": {"whole": True}}}
    if method == "distill":
        options = {**options, "teacher": str(save_tiny(tmp_path / "teacher", seed=9))}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        assert launch(output, processes, method=method, options={**shared, **drawn, **options}) == [0] * processes
    one, two = ((tmp_path / name / "run" / "rollouts.jsonl").read_text().splitlines() for name in ("1", "2"))
    texts = [
        sorted((json.loads(line)["place"], json.loads(line)["completion"]) for line in lines) for lines in (one, two)
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 8
    assert first_gradients_differ_by(tmp_path / "2", tmp_path / "1") < 1e-5


def first_gradients_differ_by(found: Path, expected: Path) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all of the first step's gradients of two runs."""
    both, wanted = tensors(found, "gradients"), tensors(expected, "gradients")
    first = [name for name in wanted if name.startswith("0.")]
    assert first and wanted.keys() == both.keys()
    whole = [torch.cat([side[name].flatten() for name in first]) for side in (both, wanted)]
    return float((whole[0] - whole[1]).norm() / whole[1].norm())


@pytest.mark.slow
def test_the_number_of_steps_and_the_schedule_are_those_of_one_process(tmp_path: Path) -> None:
    """Steps of 12 leave four of 40 rows, and two of 38: fewer than there are processes."""
    for rows_used, steps in ((40, 4), (38, 4)):
        options = {"batch_size": 12, "max_steps": None, "epochs": rows_used / 40}
        for processes in (1, 2, 3):
            assert launch(tmp_path / f"{rows_used}-{processes}", processes, options=options) == [0] * processes
        expected = rows(tmp_path / f"{rows_used}-1")
        assert len(expected) == steps
        for processes in (2, 3):
            output = tmp_path / f"{rows_used}-{processes}"
            for row, same in zip(rows(output), expected, strict=True):
                assert (row["learning_rate"], row["tokens"]) == (same["learning_rate"], same["tokens"])
                assert row["loss"] == pytest.approx(same["loss"], rel=1e-3)
            found, wanted = tensors(output, "gradients"), tensors(tmp_path / f"{rows_used}-1", "gradients")
            assert found.keys() == wanted.keys()
            for name in FIRST_STEP:
                assert float((found[name] - wanted[name]).norm() / wanted[name].norm()) < 1e-5
            last = [name for name in wanted if name.startswith(f"{steps - 1}.")]
            both = [torch.cat([side[name].flatten() for name in last]) for side in (found, wanted)]
            assert float((both[0] - both[1]).norm() / both[1].norm()) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "reward_model", "process_reward", "simpo", "cpo", "orpo"])
def test_a_last_step_of_two_rows_on_three_processes(tmp_path: Path, method: str) -> None:
    """24 rows in steps of 6, of which 20 are taken: the fourth step has two, and one process none."""
    options = {"batch_size": 6, "epochs": 20 / 24, "max_length": 128, "learning_rate": 1e-3}
    for processes in (1, 3):
        assert launch(tmp_path / str(processes), processes, method=method, options=options) == [0] * processes
    one_process, three = rows(tmp_path / "1"), rows(tmp_path / "3")
    assert len(one_process) == 4
    for row, same in zip(three, one_process, strict=True):
        assert (row["learning_rate"], row["tokens"]) == (same["learning_rate"], same["tokens"])
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-3)
        assert row["grad_norm"] == pytest.approx(same["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_at_the_same_step_and_resumes_exactly(tmp_path: Path) -> None:
    """Three processes: with more than two, the order in which gradients are added shows in the last bits."""
    options = {"batch_size": 9}
    assert launch(tmp_path / "stopped", 3, options=options, event="sigterm", torchrun=True) == [75, 75, 75]
    status = read_json(tmp_path / "stopped" / "run" / "status.json")
    assert (status["status"], status["exit_code"], status["step"]) == ("stopped", 75, 3)
    assert [p.name for p in (tmp_path / "stopped" / "run" / "checkpoints").iterdir()] == ["step-3"]
    assert launch(tmp_path / "stopped", 3, options=options, resume=True, torchrun=True) == [0, 0, 0]
    assert launch(tmp_path / "whole", 3, options=options, torchrun=True) == [0, 0, 0]
    whole = tensors(tmp_path / "whole", "weights")
    assert all(torch.equal(whole[name], t) for name, t in tensors(tmp_path / "stopped", "weights").items())


@pytest.mark.slow
def test_out_of_memory_on_one_process_halves_on_all_and_makes_the_same_update(tmp_path: Path, one: Path) -> None:
    assert launch(tmp_path / "hungry", 2, event="memory") == [0, 0]
    expected, found = tensors(one, "gradients"), tensors(tmp_path / "hungry", "gradients")
    for name in FIRST_STEP:
        assert float((found[name] - expected[name]).norm() / expected[name].norm()) < 1e-5
    events = (tmp_path / "hungry" / "run" / "events.jsonl").read_text()
    assert events.count('"out_of_memory"') == 1 and '"micro_batch_size": 1' in events


@pytest.mark.slow
def test_nan_on_one_process_is_the_same_fault_on_all(tmp_path: Path) -> None:
    assert launch(tmp_path / "nan", 2, event="nan") == [6, 6]
    status = read_json(tmp_path / "nan" / "run" / "status.json")
    assert status["exit_code"] == 6 and "step 2: the loss is not finite on rows" in status["message"]


def line(output: Path, rank: int) -> tuple[bool, str]:
    """Return whether a process left it to another to say how it ended, and the line."""
    silent, _, text = (output / "run" / f"line.{rank}").read_text().partition(" ")
    return silent == "True", text


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_by_one_of_the_others(tmp_path: Path) -> None:
    options = {"batch_size": 9, "checkpoint": {"every": 1}}
    assert launch(tmp_path, 3, options=options, event="killed", gone=(1,), torchrun=True) == [7, 7]
    lines = [line(tmp_path, rank) for rank in (0, 2)]
    assert [silent for silent, _ in lines] == [False, True]
    # The third process ends, too, once it has lost the second: before or after the first one looks.
    found = re.fullmatch(
        r"error\[lost\] process 0: process(?:es)? 1(?:, 2)? of 3 ended in the middle of the run; fix: start all processes again"
        r" with `resume=True`, from the checkpoint of step 2",
        lines[0][1],
    )
    assert found, lines[0][1]
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["status"], status["exit_code"]) == ("failed", 7) and " 1" in status["message"]
    assert launch(tmp_path, 3, options=options, resume=True) == [0, 0, 0]
    assert len(rows(tmp_path)) == 6


@pytest.mark.slow
def test_a_fault_of_one_process_is_said_by_that_one(tmp_path: Path) -> None:
    assert launch(tmp_path, 2, event="fault", torchrun=True) == [7, 3]
    assert line(tmp_path, 1) == (False, "error[data] rows.jsonl:7: bad") and line(tmp_path, 0)[0]
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["exit_code"], status["message"]) == (3, "process 1: rows.jsonl:7: bad")


@pytest.mark.slow
def test_a_process_that_is_stuck_is_given_up(tmp_path: Path) -> None:
    options = {"distributed": {"timeout_minutes": 0.1}}
    assert launch(tmp_path, 2, options=options, event="stuck", gone=(1,), torchrun=True) == [7]
    assert "another of 2 processes gave no answer for 0.1 minutes" in line(tmp_path, 0)[1]


@pytest.mark.slow
def test_a_partner_that_never_joins_is_given_up(tmp_path: Path) -> None:
    """The first of two processes, started alone."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = tmp_path / "job.json"
    options = {**OPTIONS, "distributed": {"timeout_minutes": 0.05}}
    path.write_text(json.dumps({"output": str(tmp_path / "run"), "options": options}))
    code = (
        "import sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]);"
        "import json, worker; from pathlib import Path; job = json.loads(Path(sys.argv[1]).read_text());"
        "worker.trainer_of(job, Path(job['output'])).train()"
    )
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).with_name("worker.py")), str(path)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", **place},
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert "LostProcess: process 0: not all of 2 processes joined within 0.05 minutes" in last
    assert "start all of them" in last


@pytest.mark.slow
def test_the_process_group_is_closed_before_the_interpreter_shuts_down(tmp_path: Path) -> None:
    """Its threads need the interpreter for what they free: a late one aborted processes whose run had ended well."""
    script = tmp_path / "joins.py"
    script.write_text(
        "import atexit, sys\n"
        "import torch.distributed as dist\n"
        "from rlhf_core.config.training import DistributedConfig\n"
        "from rlhf_core.infra.devices import DeviceManager\n"
        "from rlhf_core.training.distribution import create_distribution\n"
        "say = lambda when: sys.stdout.write(f'{when}: {dist.is_initialized()}\\n')  # at once, for two processes write\n"
        "atexit.register(say, 'open at the end')  # runs last, for it is registered first\n"
        "joined = create_distribution(DistributedConfig(), DeviceManager('cpu'))\n"
        "joined.gather([1])\n"
        "say('open')\n"
    )
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(start, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["open at the end: False"] * 2 + ["open: True"] * 2


@pytest.mark.slow
def test_resuming_with_fewer_processes_continues_the_data(tmp_path: Path, one: Path) -> None:
    assert launch(tmp_path / "run", 2, event="sigterm", torchrun=True) == [75, 75]
    assert launch(tmp_path / "run", 1, resume=True) == [0]
    for row, same in zip(rows(tmp_path / "run"), rows(one), strict=True):
        assert row["tokens"] == same["tokens"] and row["loss"] == pytest.approx(same["loss"], rel=1e-3)


def test_a_fault_of_the_first_process_crosses_the_seam() -> None:
    fault = DataError("bad", place="file:3", got=4, fix="mend it")
    again = reported_error(json.loads(json.dumps(error_report(fault))))
    assert type(again) is DataError and str(again) == str(fault) and again.exit_code == 3


def test_a_fault_of_any_kind_reaches_the_processes_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two(Distribution):
        world_size = 2
        told: Any = None

        def broadcast(self, value: Any) -> Any:
            Two.told = json.loads(json.dumps(value)) if self.is_main else Two.told
            return Two.told

    main, other = Two(torch.device("cpu")), Two(torch.device("cpu"))
    other.rank = 1
    with pytest.raises(ZeroDivisionError):
        main.on_main(lambda: 1 // 0)
    with pytest.raises(RLHFError, match="ZeroDivisionError: integer division") as caught:
        other.on_main(lambda: None)
    assert type(caught.value) is RLHFError and caught.value.exit_code == 1


def test_a_fault_below_a_known_kind_keeps_its_kind() -> None:
    class Torn(DataError):
        """A kind of its own."""

    again = reported_error(error_report(Torn("torn", place="file:1")))
    assert type(again) is Torn and again.exit_code == 3


def test_the_number_of_processes_is_asserted(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = DeviceManager("cpu")
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="2 processes were asked for; got 3 running") as caught:
        create_distribution(DistributedConfig(world_size=2), devices)
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="one process was asked for; got `none` with 3 running"):
        create_distribution(DistributedConfig(strategy="none"), devices)
    # Started as one of three, and alone all the same: what runs is not what was started.
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(ConfigError, match="3 processes were started; got 1 that found each other"):
        create_distribution(DistributedConfig(), devices)


def test_rows_must_share_out_evenly() -> None:
    from toy import toy

    class Three(Distribution):
        world_size = 3

    with pytest.raises(ConfigError, match=r"8 rows can't be shared by 3 processes; got 8 = 2 × 3 \+ 2") as caught:
        check_config(toy(), Three(torch.device("cpu")), DeviceManager("cpu"))
    assert caught.value.fix == "set `batch_size` to 6 or 9" and caught.value.exit_code == 2


def test_clipping_scales_to_the_norm_and_leaves_what_is_not_finite() -> None:
    alone = Distribution(torch.device("cpu"))
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    norm = float(alone.norm(gradients))
    assert norm == 5.0
    alone.clip(gradients, norm, None)
    assert gradients[1].item() == 4.0
    alone.clip(gradients, norm, 1.0)
    assert gradients[0][0].item() == pytest.approx(0.6) and gradients[1].item() == pytest.approx(0.8)
    gradients[1] = torch.tensor([float("inf")])
    norm = float(alone.norm(gradients))
    alone.clip(gradients, norm, 1.0)
    assert norm == float("inf") and gradients[0][0].item() == pytest.approx(0.6)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [1, 3])
def test_processes_share_the_fixed_prompts(tmp_path: Path, prompts: int) -> None:
    """Each prompt is completed once, as by one process; one process may have none of them."""
    asked = [f"{number} + 1 = " for number in range(prompts)]
    samples = {"prompts": asked, "n": 2, "every": 2, "generation": {"max_new_tokens": 6}}
    options = {
        "max_steps": 4,
        "max_length": 64,
        "batch_size": 4,
        "learning_rate": 1e-30,
        "logging": {"samples": samples},
    }
    options |= {"dataset": {"wrap": "none"}}
    for processes in (1, 2):
        assert launch(tmp_path / str(processes), processes, method="sft", options=options) == [0] * processes
    one, two = ((tmp_path / str(count) / "run/samples.jsonl").read_text() for count in (1, 2))
    assert one == two and len(one.splitlines()) == 3 * 2 * prompts  # at steps 0, 2 and 4
