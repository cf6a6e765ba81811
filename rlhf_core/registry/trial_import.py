"""Import plugins in another process, so that one that exits, crashes or hangs gets a status and a reason.

One child process imports them one after the other. A plugin that fails after others were imported is tried again alone in a new
child, for the others may be to blame. Where a child dies, a new one continues with the rest.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf_core.infra.child_process import ChildProcess, take_stdio
from rlhf_core.infra.errors import PluginError
from rlhf_core.registry.distributions import WITHOUT_CLASS

SECONDS = 60.0
"""The time limit of one import, unless another is given."""

_CODE = (
    "import sys, json; given = json.loads(sys.stdin.readline()); sys.path[:] = given['path'];"
    "from rlhf_core.infra.child_process import end_with_parent; end_with_parent(given['parent']);"
    "from rlhf_core.registry.trial_import import serve; serve(given['jobs'])"
)


@dataclass(frozen=True)
class Verdict:
    """The outcome of one trial import. `fatal`: the import ended the child process, and would end this one."""

    status: str = "ok"
    reason: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Summary, record, stage and api of the class, where it loaded."""
    fatal: bool = False


def try_imports(jobs: Sequence[tuple[str, str]], seconds: float = SECONDS) -> list[Verdict]:
    """Import plugins in child processes; return a verdict for each, in order.

    Args:
        jobs: (kind, target) of each plugin, such as ("trainer", "acme.margin:MarginTrainer").
        seconds: the time limit of each import.

    Raises:
        PluginError: no child process can be started.
    """
    verdicts: list[Verdict] = []
    while len(verdicts) < len(jobs):
        rest = jobs[len(verdicts) :]
        for number, verdict in enumerate(_in_one_child(rest, seconds)):
            again = verdict.status == "broken" and number > 0
            verdicts.append(_in_one_child(rest[number : number + 1], seconds)[0] if again else verdict)
    return verdicts


def serve(jobs: Sequence[tuple[str, str]]) -> None:
    """Import each plugin and write its verdict to the original stdout as a line of JSON; then end the child process."""
    from rlhf_core.registry.discovery import installed

    installed()  # before pydantic is imported, which another package's malformed table would break
    from rlhf_core.registry.load_class import LoadFault, describe_class, load_target

    _, answers = take_stdio()  # an import that asks a question gets no answer
    print("{}", file=answers, flush=True)
    process, path, environment = os.getpid(), list(sys.path), dict(os.environ)
    for kind, target in jobs:
        try:
            loaded = load_target(kind, target)
            verdict = Verdict(about=describe_class(loaded) if kind not in WITHOUT_CLASS else {})
        except LoadFault as fault:
            verdict = Verdict(fault.status, fault.reason)
        if os.getpid() != process:  # an import forked, and this is the copy
            os._exit(0)
        print(json.dumps(asdict(verdict)), file=answers, flush=True)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
    os._exit(0)  # without the `atexit` functions that plugins registered


def _in_one_child(jobs: Sequence[tuple[str, str]], seconds: float) -> list[Verdict]:
    """Return the verdicts of one child: of all jobs, or up to the one that ended the child or took too long."""
    child = _start(jobs)
    try:
        # Nobody's import is to blame for how long the core's own takes.
        if (line := child.next_line(max(seconds, SECONDS))) is None:
            raise PluginError(f"the process that imports plugins can't start: {child.how_it_ended()}", place="registry")
        verdicts: list[Verdict] = []
        while len(verdicts) < len(jobs):
            begin = time.monotonic()
            line = child.next_line(seconds)
            if line is not None:
                verdicts.append(Verdict(**json.loads(line)))
            elif time.monotonic() - begin >= seconds and child.process.poll() is None:
                return [*verdicts, Verdict("broken", f"importing it takes longer than {seconds:g} s")]
            else:
                return [
                    *verdicts,
                    Verdict("broken", f"importing it ended the process: {child.how_it_ended()}", fatal=True),
                ]
        return verdicts
    finally:
        child.kill()


def _start(jobs: Sequence[tuple[str, str]]) -> ChildProcess:
    """Return a child that imports the jobs' plugins and writes a line for each."""
    try:
        child = ChildProcess(_CODE)
    except OSError as error:
        raise PluginError(f"no process that imports plugins can be started: {error}", place="registry") from error
    path = [place for place in sys.path if isinstance(place, str)]
    child.send({"path": path, "jobs": list(jobs), "parent": os.getpid()}, last=True)
    return child
