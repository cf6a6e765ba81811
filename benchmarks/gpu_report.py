"""The tables that `gpu.py` makes of its parts' results, in Markdown."""

from __future__ import annotations

from typing import Any

TARGETS = {"135m": (1.3, 0.7), "1b": (1.1, 0.7)}
"""Model → least speed and most memory, ours over the peer's."""


def report(results: dict[str, dict[str, Any]]) -> str:
    """Return what was measured, with what wasn't and why."""
    sections = [_machine(results.get("environment", {})), _tests(results.get("tests", {}))]
    cells = _cells(results)
    if cells:
        sections += [_speeds(cells), _profiles(cells), *(_operations(*item) for item in cells.items())]
    sections.append(_generation(results))
    troubles = [f"- `{name}`: {ended['reason']}" for name, ended in results.items() if ended["status"] != "done"]
    if troubles:
        sections.append("Not done:\n\n" + "\n".join(line.splitlines()[0][:300] for line in troubles))
    return "\n\n".join(section for section in sections if section) + "\n"


Cells = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""(method, model) → `ours` and `peer`, the peer's best setting, as far as they were timed."""


def _cells(results: dict[str, dict[str, Any]]) -> Cells:
    cells: Cells = {}
    for ended in results.values():
        if "tokens_per_second" not in ended:
            continue
        sides = cells.setdefault((ended["method"], ended["shape"]), {})
        before = sides.get(ended["side"])
        if before is None or before["tokens_per_second"] < ended["tokens_per_second"]:
            sides[ended["side"]] = ended
    return cells


def _machine(found: dict[str, Any]) -> str:
    if "device" not in found:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    missing = ", ".join(name for name, version in found["packages"].items() if not version)
    rates = ", ".join(f"{precision} {rate / 1e12:.1f}" for precision, rate in found["matmul_flops"].items())
    launch = f" A launch takes the host {found['launch_us']:.1f} µs." if "launch_us" in found else ""
    return (
        f"{found['device']}, {found['cores']} cores, Python {found['python']}, {versions}"
        + (f"; without {missing}" if missing else "")
        + f". Products of a 135M model's shapes, TFLOP/s: {rates}.{launch}"
    )


def _tests(found: dict[str, Any]) -> str:
    if "passed" not in found:
        return ""
    counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "error", "skipped"))
    return f"Tests of `tests/cuda`: {counts}." + "".join(f"\n- {line[:300]}" for line in found["failures"])


def _speeds(cells: Cells) -> str:
    rows = []
    for (method, shape), sides in cells.items():
        mine, other = sides.get("ours"), sides.get("peer")
        speed = memory = met = "–"
        if mine and other:
            ratios = mine["tokens_per_second"] / other["tokens_per_second"], mine["peak_bytes"] / other["peak_bytes"]
            speed, memory = (f"{ratio:.2f}×" for ratio in ratios)
            if shape in TARGETS:
                fastest, smallest = TARGETS[shape]
                met = "yes" if ratios[0] >= fastest and ratios[1] <= smallest else "no"
        rows.append(
            [
                method, shape, *(f"{s['tokens_per_second']:,.0f}" if s else "–" for s in (mine, other)), speed,
                *(f"{s['peak_bytes'] / 2**20:,.0f}" if s else "–" for s in (mine, other)), memory, met,
            ]
        )  # fmt: skip
    head = [
        "method", "model", "ours tokens/s", "TRL tokens/s", "speed", "ours MiB", "TRL MiB", "memory", "target met",
    ]  # fmt: skip
    return _table(head, rows)


def _profiles(cells: Cells) -> str:
    rows = []
    for (method, shape), sides in cells.items():
        for side, ended in sides.items():
            if not (profile := ended.get("profile")):
                continue
            busy = f"{profile['device_ms'] / ended['step_ms']:.0%}" if profile["device_ms"] is not None else "–"
            copies = ", ".join(f"{count} {way}" for way, count in sorted(profile["copies"].items())) or "–"
            figures = (profile[name] for name in ("operations", "kernels", "launches", "waits", "items"))
            rows.append(
                [method, shape, side, f"{ended['step_ms']:,.1f}", busy, *map(_figure, figures), copies]
            )  # fmt: skip
    if not rows:
        return ""
    head = [
        "method",
        "model",
        "side",
        "step ms",
        "GPU busy",
        "operations",
        "kernels",
        "launches",
        "waits",
        "values read",
    ]
    return _table([*head, "copies"], rows)


def _operations(cell: tuple[str, str], sides: dict[str, dict[str, Any]]) -> str:
    lines = []
    for side, ended in sides.items():
        profile = ended.get("profile", {})
        if tops := profile.get("top_operations"):
            shown = ", ".join(
                f"{row['name'].removeprefix('aten::')} {row['ms']:.1f} ({row['calls']})" for row in tops[:8]
            )
            lines.append(f"- {side}, ms (calls): {shown}")
        if places := profile.get("waits_at"):
            lines.append(f"- {side} waits at: " + ", ".join(f"`{place}` {count}×" for place, count in places.items()))
    return f"A step of {cell[0]} at {cell[1]}:\n\n" + "\n".join(lines) if lines else ""


def _generation(results: dict[str, dict[str, Any]]) -> str:
    """Return a table of generation: one row per model, kind of work and contender, with ours over each other one."""
    parts = {name: ended for name, ended in results.items() if name.startswith("generation/")}
    rows = []
    for name, ended in parts.items():
        _, shape, contender = name.split("/")
        mine = parts.get(f"generation/{shape}/ours", {})
        for kind in ("even", "uneven"):
            if kind not in ended:
                rows.append(
                    [
                        shape,
                        kind,
                        contender,
                        f"– ({(ended.get('reason') or 'not reached').splitlines()[0][:80]})",
                        "–",
                        "–",
                    ]
                )
                continue
            speed, over = ended[kind]["drawn_per_second"], ended[kind]["over_model_bytes"]
            ratio = (
                "–" if name.endswith("/ours") or kind not in mine else f"{mine[kind]['drawn_per_second'] / speed:.2f}×"
            )
            rows.append(
                [shape, kind, contender, f"{speed:,.0f}", ratio, "–" if over is None else f"{over / 2**20:,.0f}"]
            )
    if not rows:
        return ""
    return "Generation in bf16:\n\n" + _table(
        ["model", "work", "contender", "tokens/s", "ours over it", "MiB over the model"], rows
    )


def _figure(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
