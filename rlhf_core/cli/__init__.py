"""The command line, `rlhf`: results on stdout, logs and progress on stderr, an error as one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rlhf_core.infra.errors import RLHFError, printable
from rlhf_core.infra.python_wording import said_for_flags

INTERRUPTED = 130
METHOD_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["--help", "-h"]}
"""Settings of a verb that takes any option of a method as a flag: flags unknown to typer are read once the method is known."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Tracebacks are shown with `--debug` only.

    Args:
        arguments: what follows `rlhf`; None for this process's own arguments.
    """
    tokens, debug, no_plugins = _global_switches(sys.argv[1:] if arguments is None else arguments)
    if no_plugins:
        from rlhf_core.registry import only_this_distribution

        only_this_distribution()

    def run() -> int:
        with _said_in_flags(tokens):
            code = 0 if _without_typer(tokens) else _with_typer(tokens)
        sys.stdout.flush()
        if arguments is None:
            _end_results()
        return code

    try:
        code = exit_code(run, debug=debug)
    except BaseException:
        if arguments is None and _may_hang():
            import traceback

            traceback.print_exc()
            _may_hang().leave(1)
        raise
    if arguments is None:
        # The program has ended, and Python's own clean-up follows: Ctrl-C during that would change the exit code.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if _may_hang():
            _may_hang().leave(code)
    return code


@contextmanager
def _said_in_flags(tokens: Sequence[str]) -> Iterator[None]:
    """Within this context, errors name options by their flags, unless the command line names a configuration file."""
    try:
        with said_for_flags():
            yield
    except RLHFError as error:
        from rlhf_core.cli.flag_wording import names_a_file, say_in_flags

        if not names_a_file(tokens):
            say_in_flags([error])
        raise


def _may_hang() -> Any:
    """Return the module that ends this process, where a call or a reward may have left threads that never end."""
    limits = sys.modules.get("rlhf_core.infra.time_limit")
    return limits if limits is not None and limits.exit_may_hang() else None


def exit_code(program: Callable[[], int | None], *, debug: bool = False) -> int:
    """Run a program and return its exit code; print an error as one line on stderr, and use the error's exit code.

    An error of several mistakes is a line for each.

    Args:
        program: returns its exit code, or None for 0.
        debug: let exceptions through, for their tracebacks.
    """
    try:
        return program() or 0
    except KeyboardInterrupt:
        if debug:
            raise
        print("error[interrupted] stopped by Ctrl-C", file=sys.stderr)
        _tell_torchrun("error[interrupted] stopped by Ctrl-C")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout (`| head`) has ended; what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        line, code = _line_and_code(error)
        silent = getattr(error, "silent", False)
        if not silent:
            print(line, file=sys.stderr)
        _tell_torchrun(line, consequence=silent)
        return code


def _tell_torchrun(line: str, *, consequence: bool = False) -> None:
    """Write an error's line where torchrun, if it started this process, looks for it.

    torchrun ends with a traceback of its own and a report of some twenty lines, which would push the line off the screen. With
    this the report ends with it.

    Args:
        consequence: whether another process has failed first, which the report names as the cause.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    import json
    import time
    from contextlib import suppress
    from pathlib import Path

    # The report shows the "call stack" of each process; the cause is the earliest of those, in whole seconds.
    about = {"py_callstack": line, "timestamp": str(int(time.time()) + consequence)}
    with suppress(OSError):
        Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": about}}), encoding="utf-8")


def _line_and_code(error: Exception) -> tuple[str, int]:
    """Return the line that is printed for an exception (of several mistakes a line each), and its exit code."""
    if isinstance(error, RLHFError):
        return "\n".join(one.line() for one in (error, *error.also)), error.exit_code
    if hasattr(error, "format_message"):  # typer's usage errors
        usage = _usage_error(error)
        return usage.line(), usage.exit_code
    if isinstance(error, OSError) and error.errno in _STORAGE:
        from rlhf_core.infra.errors import StorageError

        fault = StorageError(error.strerror or str(error), place=str(error.filename or "input/output"))
        return fault.line(), fault.exit_code
    text = printable(" ".join(str(error).split()))
    fix = "run it again with `--debug` for the traceback, and report it unless it comes from your plugin"
    return f"error[internal] {type(error).__name__}: {text}; fix: {fix}", 1


def _without_typer(tokens: Sequence[str]) -> bool:
    """Run `list`, `show` or a method's help in its usual forms without typer, whose import takes longer; return whether it was
    one of them."""
    verb, words = tokens[0], [token for token in tokens[1:] if not token.startswith("-")]
    switches = {token for token in tokens[1:] if token.startswith("-")}
    if "_RLHF_COMPLETE" in os.environ:
        return False
    if verb == "list" and len(words) <= 1 and switches <= {"--json", "--check"}:
        from rlhf_core.cli.listing import print_list

        print_list(*words, as_json="--json" in switches, check="--check" in switches)
        return True
    if verb == "show" and len(words) == 1 and switches <= {"--json", "--all"}:
        from rlhf_core.cli.listing import print_plugin

        print_plugin(*words, as_json="--json" in switches, every="--all" in switches)
        return True
    if verb == "train" and words and tokens[1] == words[0] and switches & {"--help", "-h"} and not _is_file(words[0]):
        from rlhf_core.cli.method_help import print_method_help

        print_method_help(words[0])
        return True
    return False


def _is_file(target: str) -> bool:
    """Tell whether what is to be trained is named by a configuration file, or a run's directory."""
    return target.endswith((".yaml", ".yml")) or os.sep in target


def _end_results() -> None:
    """Redirect stdout to stderr while the process ends: what plugins print there is no result."""
    if "rlhf_core.registry.load_class" in sys.modules:
        import atexit

        from rlhf_core.registry.guarded import redirect_stdout_for_good

        atexit.register(redirect_stdout_for_good)  # runs first, for it is registered last


def _with_typer(tokens: Sequence[str]) -> int:
    """Run any verb; return its exit code."""
    if not tokens[0].startswith("-"):
        from rlhf_core.registry.discovery import installed

        installed()  # before pydantic or torch is imported, which another package's malformed metadata would break
    from rlhf_core.cli.app import run
    from rlhf_core.infra.library_logs import keep_libraries_quiet

    keep_libraries_quiet()
    return run(tokens)


_STORAGE = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EPERM)


def _usage_error(error: Exception) -> RLHFError:
    """Return a usage error of typer's as a `ConfigError`."""
    from rlhf_core.infra.errors import ConfigError

    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "rlhf"
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    return ConfigError(message[:1].lower() + message[1:], place=command, fix=f"see `{command} --help`")


def _global_switches(arguments: Sequence[str]) -> tuple[list[str], bool, bool]:
    """Return the arguments without `--debug` and `--no-plugins`, which may stand anywhere, and whether each was there."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    head, tail = list(arguments[:end]), list(arguments[end:])
    debug, no_plugins = "--debug" in head, "--no-plugins" in head
    tokens = [token for token in head if token not in ("--debug", "--no-plugins")] + tail
    return tokens or ["--help"], debug, no_plugins
