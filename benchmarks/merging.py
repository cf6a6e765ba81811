"""Merging speed and memory beside mergekit's, and beside the limit: every input read once, the output written once.

    python benchmarks/merging.py --model models/SmolLM2-135M-Instruct --peer PYTHON_OF_MERGEKIT [--set small large] [--rounds 3]

mergekit needs its own environment: `python -m venv mk && mk/bin/pip install mergekit==0.1.5`, then `--peer mk/bin/python`.
`small` is four float32 models of the shape of SmolLM2-135M with a base, `large` two bf16 models of 2.1 GB with a base; both
are made here, with random differences. Every cell is one command, ours and the peer's in turn, start-up included, on a
warm cache; `merging s` is our time without start-up. The limit is the best of all tries, and our best round is held against it;
the rest are medians of the rounds. Memory is the peak of anonymous pages, sampled every 20 ms. The peer's is read off its
process (RssAnon); ours are several, whose shared pages count once (the sum of Pss_Anon), which takes milliseconds to read, and
so another run that isn't timed. `--memory` instead measures how our memory grows from a checkpoint of 0.5 GB to one of
4 GB with the same largest tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file, save_file

METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "task_arithmetic": {},
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.2},
}
"""Method, by the peer's name → its options."""
WEIGHTS = {"small": [0.4, 0.3, 0.2, 0.1], "large": [0.6, 0.4]}
TARGETS = {"ties": 12.0, "dare_ties": 12.0, "linear": 2.0, "task_arithmetic": 2.0}


@dataclass(frozen=True)
class Cell:
    """One run: wall-clock seconds, peak anonymous memory, MB, and what it printed."""

    seconds: float
    megabytes: float
    printed: str = ""


def run(command: Sequence[str], memory: Callable[[int], int] = lambda pid: 0, **environment: str) -> Cell:
    """Run a command, sampling what `memory` says of its process."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        started, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, stdout=printed, stderr=errors, env={**os.environ, **environment})
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        outputs = []
        for file in (printed, errors):
            file.seek(0)
            outputs.append(file.read().decode(errors="replace"))
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{''.join(outputs)[-3000:]}")
    return Cell(seconds, peak / 1e6, outputs[0])


def own_anonymous(pid: int) -> int:
    """Return the anonymous memory of a process, bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def anonymous(pid: int) -> int:
    """Return the anonymous memory of a process and of those that it started, bytes, each page counted once."""
    total = 0
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon"))
    except (OSError, psutil.Error, StopIteration):  # one has just ended
        return 0
    return total


def make_small(folder: Path, model: Path) -> None:
    """Write a float32 base and four models near it."""
    base = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    for number, name in enumerate(["base", "m0", "m1", "m2", "m3"]):
        write(folder / name, model, base, number, torch.float32, {})


def make_large(folder: Path, model: Path) -> None:
    """Write a bf16 base of 1.07 G weights and two models near it."""
    hidden, inner, kv, vocabulary, layers = 2048, 5632, 256, 49152, 22
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (hidden, hidden),
            f"{at}self_attn.k_proj.weight": (kv, hidden),
            f"{at}self_attn.v_proj.weight": (kv, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, hidden),
            f"{at}mlp.gate_proj.weight": (inner, hidden),
            f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    generator = torch.Generator().manual_seed(99)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    config = {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": vocabulary,
    }  # fmt: skip
    for number, name in enumerate(["base", "m0", "m1"]):
        write(folder / name, model, base, number, torch.bfloat16, config)


def write(
    path: Path, model: Path, base: dict[str, Any], seed: int, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    """Write a model: the base where the seed is 0, else one near it."""
    generator = torch.Generator().manual_seed(seed)
    path.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, path)
    config = json.loads((path / "config.json").read_text())
    name = str(dtype).removeprefix("torch.")
    (path / "config.json").write_text(json.dumps({**config, **changes, "torch_dtype": name, "dtype": name}))
    moved = {
        key: (tensor + (0.001 * torch.randn(tensor.shape, generator=generator) if seed else 0)).to(dtype)
        for key, tensor in base.items()
    }
    save_file(moved, path / "model.safetensors", metadata={"format": "pt"})


def recipe(folder: Path, kind: str, method: str) -> Path:
    """Write the file that both sides read: the peer's own format."""
    models = [
        {"model": str(folder / f"m{number}"), "parameters": {"weight": weight, **METHODS[method]}}
        for number, weight in enumerate(WEIGHTS[kind])
    ]
    content: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "dtype": {"small": "float32", "large": "bfloat16"}[kind],
    }
    if method != "linear":
        content["base_model"] = str(folder / "base")
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def limit(folder: Path, kind: str, method: str) -> float:
    """Return the seconds that it takes to read every input once and write the output once: the best of three.

    The first is often several times slower, for the system has to find memory for the file's pages; what is timed next finds it
    at hand.
    """
    inputs = [folder / f"m{number}" / "model.safetensors" for number in range(len(WEIGHTS[kind]))]
    inputs += [folder / "base" / "model.safetensors"] if method != "linear" else []
    buffer = bytearray(1 << 22)
    out = folder / "limit.bin"
    found = []
    for _ in range(3):
        out.unlink(missing_ok=True)
        os.sync()  # what an earlier run wrote isn't to be waited for here
        started = time.perf_counter()
        for number, path in enumerate(inputs):
            with path.open("rb", buffering=0) as source, out.open("ab", buffering=0) as target:
                while got := source.readinto(buffer):
                    if number == 0:
                        target.write(memoryview(buffer)[:got])
        found.append(time.perf_counter() - started)
    out.unlink()
    return min(found)


def compare(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for kind in arguments.set:
        folder = arguments.folder / kind
        if not (folder / "base").is_dir():
            {"small": make_small, "large": make_large}[kind](folder, arguments.model)
        for method in arguments.method:
            path = recipe(folder, kind, method)
            cells: dict[str, list[Cell]] = {"ours": [], "peer": []}
            limits = []

            def one(side: str, memory: Callable[[int], int], path: Path = path, folder: Path = folder) -> Cell:
                out = folder / f"out-{side}"
                shutil.rmtree(out, ignore_errors=True)
                cell = run(command(side, path, out, arguments.peer), memory, OMP_NUM_THREADS="2")
                shutil.rmtree(out)
                return cell

            for _ in range(arguments.rounds):
                for side in cells:
                    if side == "peer" and arguments.peer is None:
                        continue
                    limits.append(limit(folder, kind, method))
                    cells[side].append(one(side, own_anonymous if side == "peer" else lambda pid: 0))
                    print(f"{kind}/{method}/{side}: {cells[side][-1].seconds:.2f} s", file=sys.stderr)
            rows.append(row(kind, method, cells, limits, one("ours", anonymous).megabytes))
            print_row(rows[-1])
    return rows


def command(side: str, path: Path, out: Path, peer: Path | None) -> list[str]:
    """Return the command of one cell."""
    if side == "peer":
        assert peer is not None
        return [str(peer.parent / "mergekit-yaml"), str(path), str(out)]
    return [str(Path(sys.executable).parent / "rlhf"), "merge", str(path), "--output", str(out), "--json"]


def row(kind: str, method: str, cells: dict[str, list[Cell]], limits: list[float], megabytes: float) -> dict[str, Any]:
    found: dict[str, Any] = {"set": kind, "method": method, "limit_s": min(limits), "ours_mb": megabytes}
    found["merging_s"] = statistics.median(json.loads(cell.printed)["seconds"] for cell in cells["ours"])
    for side, runs in cells.items():
        if runs:
            found[f"{side}_s"] = statistics.median(cell.seconds for cell in runs)
    if cells["peer"]:
        found["peer_mb"] = max(cell.megabytes for cell in cells["peer"])
    found["of_limit"] = min(cell.seconds for cell in cells["ours"]) / found["limit_s"]
    if "peer_s" in found:
        found["speed"] = found["peer_s"] / found["ours_s"]
        found["memory"] = found["ours_mb"] / found["peer_mb"]
    return found


def print_row(found: dict[str, Any]) -> None:
    peer = (
        f"| {found['peer_s']:.1f} | {found['speed']:.1f}× (target {TARGETS[found['method']]:.0f}×) | {found['ours_mb']:.0f}"
        f" | {found['peer_mb']:.0f} | {found['memory']:.2f}× |"
        if "speed" in found
        else f"| – | – | {found['ours_mb']:.0f} | – | – |"
    )
    print(
        f"| {found['set']} | {found['method']} | {found['ours_s']:.2f} | {found['merging_s']:.1f} {peer}"
        f" {found['limit_s']:.2f} | {found['of_limit']:.1f}× |",
        flush=True,
    )


def grow(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure memory on 0.5 GB and on 4 GB with the same largest tensor."""
    rows = []
    for gigabytes in (0.5, 4.0):
        folder = arguments.folder / f"memory-{gigabytes}"
        count = round(gigabytes * 1e9 / 4 / (4096 * 3072))
        for number, name in enumerate(["base", "m0", "m1"]):
            if (folder / name).is_dir():
                continue
            (folder / name).mkdir(parents=True)
            (folder / name / "config.json").write_text("{}")
            generator = torch.Generator().manual_seed(number)
            one = torch.randn(4096, 3072, generator=generator)
            tensors = {f"model.layers.{layer}.w.weight": one.roll(layer, 0) for layer in range(count)}
            save_file(tensors, folder / name / "model.safetensors")
        for method in ("linear", "ties", "dare_ties"):
            content = {
                "merge_method": method,
                "models": [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in ("m0", "m1")],
                **({"base_model": str(folder / "base")} if method != "linear" else {}),
            }
            path = folder / f"{method}.yaml"
            path.write_text(yaml.safe_dump(content))
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            cell = run(command("ours", path, out, None), anonymous)
            shutil.rmtree(out)
            rows.append(
                {"gigabytes": gigabytes, "method": method, "seconds": cell.seconds, "megabytes": cell.megabytes}
            )
            print(f"| {gigabytes} GB | {method} | {cell.seconds:.1f} s | {cell.megabytes:.0f} MB |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/SmolLM2-135M-Instruct"))
    parser.add_argument("--peer", type=Path, help="the Python of an environment that has mergekit")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-merging"), help="where inputs and outputs lie")
    parser.add_argument("--set", nargs="+", choices=list(WEIGHTS), default=list(WEIGHTS))
    parser.add_argument("--method", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="measure growth of memory instead")
    parser.add_argument("--output", type=Path, help="JSON of the figures")
    arguments = parser.parse_args()
    print(
        "| set | method | ours s | merging s | mergekit s | speed | ours MB | mergekit MB | memory | limit s | ours of limit |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    rows = grow(arguments) if arguments.memory else compare(arguments)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
