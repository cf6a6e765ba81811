"""Check and measure on a machine with a GPU, in one command and ten minutes, with no network and nothing installed.

    python benchmarks/gpu.py [--wheels DIR] [--seconds 570] [--parts 'sft/*' tests] [--output gpu-results]

Parts run one after the other, the most important first, each in its own process with a time limit: the tests of
`tests/cuda`, training beside TRL with a profile of one step, and generation beside transformers' `generate`, its continuous
batching and vLLM where that is installed (`--list` names them all). `results.json` in the output directory is replaced after
each part, so that a killed run keeps the results that it had; `summary.md` is ready for docs/benchmarks.md. A part that fails is
recorded with its reason, and the rest go on.

It needs this checkout, torch and transformers. The package needn't be installed: its metadata, by which methods are found, is
written from `pyproject.toml` into a directory that the parts' `PYTHONPATH` names, with the wheels of `--wheels` unpacked beside
it. `--device cpu --size tiny` runs the same parts on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_report import report

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, TIMED = 3, 6
"""Steps that are left out, in which memory is touched for the first time, and steps that are timed."""
LEAST_SECONDS = 10
"""A part isn't begun with less."""
PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "peft", "datasets", "flash-attn", "triton", "pytest", "pydantic", "vllm",
)  # fmt: skip
CONTENDERS = ("ours", "generate", "continuous", "vllm", "ours-trained", "ours-launches")
"""Of `generation_contenders.py`, with a setting where it isn't a contender's first."""

Result = dict[str, Any]
Save = Callable[[Result], None]


@dataclass(frozen=True)
class Settings:
    """What every part is given."""

    device: str
    batch: int
    work: Path
    """Where models are made, and thrown away at the end."""
    seconds: float
    """The part's own limit."""


@dataclass(frozen=True)
class Part:
    """A part: what it does, and for how long at most. `run` may save what it has so far; what it returns is saved last."""

    run: Callable[[Settings, Save], Result]
    seconds: float
    measures: bool = True
    """Whether it takes figures of a GPU, and so is skipped where there is none, unless the CPU is asked for."""


def environment(settings: Settings, save: Save) -> Result:
    """Say what the machine is and has, and how fast it multiplies."""
    import torch
    from harness import matmul_rate, on_gpu

    found: Result = {"python": sys.version.split()[0], "packages": {}, "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            found["packages"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found["packages"][name] = None
    found["device"] = torch.cuda.get_device_name() if on_gpu() else "cpu"
    if on_gpu():
        properties = torch.cuda.get_device_properties(0)
        found["cuda"], found["memory_bytes"] = torch.version.cuda, properties.total_memory
        found["launch_us"] = _launch_time()
    found["matmul_flops"] = {precision: matmul_rate(precision) for precision in ("float32", "bf16")}
    return found


def _launch_time() -> float:
    """Return the microseconds that the CPU takes to launch a small operation, which bounds steps of many small kernels."""
    import torch

    x = torch.zeros(16, device="cuda")
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(200):
            x.add_(1)
        times.append((time.perf_counter() - began) / 200)
    return statistics.median(times) * 1e6


def tests(settings: Settings, save: Save) -> Result:
    """Run the tests for a GPU; those that had ended count where time runs out."""
    if importlib.util.find_spec("pytest") is None:
        raise Missing("pytest isn't installed")
    command = [sys.executable, "-m", "pytest", "tests/cuda", "-o", "addopts=--strict-markers", "-v", "-rfE"]
    command += ["-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
    log = settings.work / "tests.log"
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=settings.seconds - 5
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    text = log.read_text(errors="replace")
    # Either `tests/…::name PASSED` or, from several processes, `[gw0] [ 3%] PASSED tests/…`.
    lines = re.findall(
        r"^(?:tests/\S+ |\[gw\d+\] \[ *\d+%\] )(PASSED|FAILED|ERROR|SKIPPED)\b", text, flags=re.MULTILINE
    )
    found: Result = {name.lower(): lines.count(name) for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    found["failures"] = re.findall(r"^(?:FAILED|ERROR) tests/.*", text, flags=re.MULTILINE)[:40]
    if code is None:
        raise Unfinished("time ran out", found)
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code}: {text[-1500:]}")
    if code:
        raise Unfinished(f"{found['failed'] + found['error']} tests failed", found)
    return found


class Missing(Exception):
    """What a part needs isn't there, which is no fault of this project."""


class Unfinished(Exception):
    """A part ended before its time with something to show."""

    def __init__(self, reason: str, found: Result) -> None:
        super().__init__(reason)
        self.found = found


def train(method: str, shape: str, side: str, setting: str = "padded") -> Callable[[Settings, Save], Result]:
    """Return the part that trains one method on a model of one size, by us or by TRL, and then profiles a step."""

    def run(settings: Settings, save: Save) -> Result:
        import step_profile
        from harness import SIDES, Cell, Clock, encoded, forget_peak, peak_memory, step_tokens
        from random_models import make_rows, save_model

        if side == "peer":
            for package in ("trl", "datasets"):
                if importlib.util.find_spec(package) is None:
                    raise Missing(f"{package} isn't installed")
        last = WARM_UP + TIMED
        steps = last + step_profile.STEPS
        model = save_model(settings.work / f"model-{shape}", shape)
        rows = make_rows(method, shape, settings.batch * steps)
        cell = Cell(method, str(model), rows, "bf16", setting, settings.batch, steps)
        tokens = step_tokens(encoded(cell), settings.batch)
        profile = step_profile.StepProfile(last)
        found: Result = {"method": method, "shape": shape, "side": side, "setting": setting, "batch": settings.batch}

        def after(step: int) -> None:
            if step == last:
                speeds = [count / taken for count, taken in zip(tokens, clock.seconds, strict=False)][WARM_UP:]
                found.update(
                    tokens=tokens[WARM_UP:last],
                    seconds=clock.seconds[WARM_UP:],
                    tokens_per_second=statistics.median(speeds),
                    step_ms=statistics.median(clock.seconds[WARM_UP:]) * 1e3,
                    peak_bytes=peak_memory(),
                )
                save(found)
            profile.after(step)

        clock = Clock(after)
        forget_peak()
        SIDES[side](cell, clock)
        if len(clock.seconds) < steps:
            raise Unfinished(f"only {len(clock.seconds)} of {steps} steps were made", found)
        return found | {"profile": profile.found}

    return run


GENERATION = {"full": (8, 256), "tiny": (2, 8)}
"""Size → completions per prompt (of which there are as many as rows in a training step), and tokens of each."""


def draw(name: str, shape: str) -> Callable[[Settings, Save], Result]:
    """Return the part that draws completions with one contender, of even and of uneven lengths.

    Args:
        name: the contender, with a setting of its own where it isn't the first: `ours-trained`.
    """
    contender, _, chosen = name.partition("-")

    def run(settings: Settings, save: Save) -> Result:
        import generation
        import generation_contenders as contenders
        import torch
        from harness import on_gpu
        from random_models import make_rows, save_model
        from transformers import AutoTokenizer

        model = save_model(settings.work / f"model-{shape}", shape)
        tokenizer = AutoTokenizer.from_pretrained(model)
        prompts = [list(tokenizer(row["prompt"])["input_ids"]) for row in make_rows("sft", shape, settings.batch)]
        n, tokens = GENERATION["tiny" if shape == "tiny" else "full"]
        found: Result = {
            "contender": contender,
            "shape": shape,
            "completions": settings.batch * n,
            "most_tokens": tokens,
        }
        setting = chosen or next(iter(contenders.SETTINGS[contender]))
        for kind in ("even", "uneven"):
            gc.collect()  # the first kind's model
            work = contenders.Work(
                contender=contender, setting=setting, model=str(model), precision="bf16",
                device="cuda" if on_gpu() else "cpu", threads=torch.get_num_threads(), prompts=prompts,
                limits=generation.limits_of(kind, len(prompts), n, tokens), repeats=2,
            )  # fmt: skip
            try:
                measured = contenders.measure(work)
            except contenders.Missing as error:
                raise Missing(str(error)) from None
            seconds = statistics.median(call["seconds"] for call in measured["calls"])
            found[kind] = {
                "drawn_per_second": measured["tokens"] / seconds,
                # What the first kind took may still be held.
                "over_model_bytes": measured["over_model_bytes"] if kind == "even" else None,
                "first_call_seconds": measured["first_call_seconds"],
                "versions": measured["versions"],
            }
            save(found)
        return found

    return run


def parts(size: str) -> dict[str, Part]:
    """Return the parts, those of most worth first. A new kind of part is a function and a line here."""
    table = {"environment": Part(environment, 60, measures=False)}
    if size == "tiny":
        table |= {
            f"{method}/tiny/{side}": Part(train(method, "tiny", side), 120)
            for method in ("sft", "dpo", "reward_model", "kto")
            for side in ("ours", "peer")
        }
        table |= {f"generation/tiny/{name}": Part(draw(name, "tiny"), 120) for name in CONTENDERS}
        return table | {"tests": Part(tests, 120, measures=False)}
    flash = importlib.util.find_spec("flash_attn") is not None
    for methods, shape, seconds in (
        (("sft", "dpo"), "135m", 75),
        ((), "tests", 150),
        (("sft", "dpo"), "1b", 90),
        (("reward_model", "kto"), "135m", 75),
        (("reward_model", "kto"), "1b", 90),
    ):
        if shape == "tests":
            table["tests"] = Part(tests, seconds, measures=False)
            table |= {f"generation/135m/{name}": Part(draw(name, "135m"), 60) for name in CONTENDERS}
        for method in methods:
            for side in ("ours", "peer"):
                table[f"{method}/{shape}/{side}"] = Part(train(method, shape, side), seconds)
            if method == "sft" and flash:  # without flash-attn, the peer's packed rows would see one another
                table[f"sft/{shape}/peer-padding_free"] = Part(train("sft", shape, "peer", "padding_free"), seconds)
    return table | {f"generation/1b/{name}": Part(draw(name, "1b"), 75) for name in CONTENDERS}


# One part, in its own process


def run_part(name: str, part: Part, settings: Settings, path: Path) -> None:
    """Run a part and write its results and status to `path`, after each result and at its end."""
    began = time.monotonic()
    # So that this process ends, even where the one that started it was killed.
    signal.alarm(int(settings.seconds) + 10)

    def save(found: Result, status: str = "unfinished", reason: str | None = None) -> None:
        ended = {"status": status, "reason": reason, "seconds_taken": round(time.monotonic() - began, 1)}
        write(path, json.dumps({**ended, **found}) + "\n")

    kept: Result = {}
    try:
        if part.measures and settings.device == "auto" and not has_gpu():
            raise Missing("there is no GPU")
        found = part.run(settings, lambda found: (kept.update(found), save(found))[1])
    except Unfinished as error:
        save(error.found, "failed", str(error))
    except Missing as error:
        save(kept, "skipped", str(error))
    except BaseException as error:
        traceback.print_exc()
        save(kept, "failed", f"{type(error).__name__}: {error}"[:2000])
    else:
        save(found, "done")
    finally:
        signal.alarm(0)


def has_gpu() -> bool:
    from harness import on_gpu

    return on_gpu()


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


# All of them


class Run:
    """Runs parts in turn and keeps their results."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work = options, work
        self.deadline = time.monotonic() + options.seconds
        self.output: Path = options.output
        self.output.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Result] = {}
        self.environment = parts_environment(options, work)

    def part(self, name: str, limit: float) -> None:
        """Run one part in its own process and add its results."""
        left = self.deadline - time.monotonic()
        if left < LEAST_SECONDS:
            self.results[name] = {"status": "not run", "reason": "no time was left"}
            return
        limit = min(limit, left - 2)
        path = self.output / f"{name.replace('/', '-')}.json"
        path.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--work", str(self.work)]
        command += ["--part-seconds", str(limit), "--part-result", str(path.resolve()), "--size", self.options.size]
        command += ["--device", self.options.device, "--batch", str(self.options.batch)]
        log = self.work / "part.log"
        with log.open("w") as errors:
            process = subprocess.Popen(
                command, env=self.environment, stdout=errors, stderr=subprocess.STDOUT, start_new_session=True
            )
            reason = None
            try:
                if process.wait(limit):
                    reason = f"its process ended with {process.returncode}"
            except subprocess.TimeoutExpired:
                reason = f"stopped after {limit:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with what it started
                process.wait()
                found: Result = json.loads(path.read_text()) if path.is_file() else {}
                if found.get("status") not in ("done", "failed", "skipped"):
                    found |= {"status": "failed", "reason": reason or "it was interrupted"}
                if found["status"] == "failed":
                    found["log"] = log.read_text(errors="replace")[-4000:]
                self.results[name] = found
                self.save()
                path.unlink(missing_ok=True)

    def save(self) -> None:
        about = {"size": self.options.size, "device": self.options.device, "batch": self.options.batch}
        # Whoever sees the results finds their summary, too.
        write(self.output / "summary.md", report(self.results))
        write(self.output / "results.json", json.dumps(about | {"parts": self.results}, indent=1) + "\n")


def parts_environment(options: argparse.Namespace, work: Path) -> dict[str, str]:
    """Return the parts' environment: the checkout, its metadata and the wheels on the path, no network, the device asked for."""
    site = options.site or work / "site"
    site.mkdir(parents=True, exist_ok=True)
    write_metadata(site)
    if options.wheels is not None:
        install_wheels(options.wheels, site)
    paths = [site, ROOT, ROOT / "plugins", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    extra = {
        "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", "TMPDIR": str(work),
    }  # fmt: skip
    if options.device == "cpu":
        extra |= {"ACCELERATE_USE_CPU": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **extra}


def write_metadata(site: Path) -> None:
    """Write the package's name, version and entry points where Python looks for them, as an installer would."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    lines = [f"Name: {project['name']}", f"Version: {project['version']}"]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines]) + "\n", encoding="utf-8")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in points.items())
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")


def install_wheels(wheels: Path, site: Path) -> None:
    """Install wheels beside the metadata, without their dependencies, which the machine has or which are among the wheels."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(f"no wheels in {wheels}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command += ["--disable-pip-version-check", "--upgrade", "--target", str(site)]
    if subprocess.run([*command, *files], capture_output=True).returncode:
        for file in files:  # so that one that doesn't fit this Python keeps none of the others out
            done = subprocess.run([*command, file], capture_output=True, text=True)
            if done.returncode:
                print(f"{Path(file).name} can't be installed: {done.stderr.strip()[-300:]}", file=sys.stderr)


def main() -> None:
    options = parse()
    table = parts(options.size)
    if options.part:
        settings = Settings(options.device, options.batch, options.work, options.part_seconds)
        run_part(options.part, table[options.part], settings, options.part_result)
        return
    chosen = [name for name in table if any(fnmatch.fnmatch(name, pattern) for pattern in options.parts)]
    if not chosen:
        raise SystemExit(f"no part is called {' or '.join(options.parts)}; there are {', '.join(table)}")
    if options.list:
        print("\n".join(chosen))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with working_directory(options.work) as work:
        run = Run(options, work)
        try:
            for name in chosen:
                began = time.monotonic()
                run.part(name, table[name].seconds)
                ended = run.results[name]
                why = f": {ended['reason'].splitlines()[0][:150]}" if ended.get("reason") else ""
                print(f"{name}: {ended['status']} after {time.monotonic() - began:.0f} s{why}", flush=True)
        finally:
            run.save()
            print((options.output / "summary.md").read_text(), flush=True)
    if any(ended["status"] == "failed" for ended in run.results.values()):
        raise SystemExit(1)


@contextlib.contextmanager
def working_directory(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="rlhf-gpu-") as made:
        yield Path(made)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=["*"], help="patterns of the parts' names, such as 'dpo/*' (--list)"
    )
    parser.add_argument("--list", action="store_true", help="print the parts' names and stop")
    parser.add_argument("--seconds", type=float, default=570, help="limit for all parts together")
    parser.add_argument("--output", type=Path, default=ROOT / "gpu-results", help="where results are written")
    parser.add_argument("--wheels", type=Path, help="directory of wheels that the machine lacks")
    parser.add_argument("--site", type=Path, help="directory to unpack them into (default: a temporary one)")
    parser.add_argument("--work", type=Path, help="directory to keep random models in (default: a temporary one)")
    parser.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto takes a GPU where there is one")
    parser.add_argument("--size", choices=["full", "tiny"], default="full", help="models of 135M and 1B, or a tiny one")
    parser.add_argument("--batch", type=int, help="rows per step (default: 32, for the tiny model 4)")
    for hidden in ("--part", "--part-seconds", "--part-result"):
        kind = {"--part": str, "--part-seconds": float, "--part-result": Path}[hidden]
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch = options.batch or (4 if options.size == "tiny" else 32)
    return options


if __name__ == "__main__":
    main()
