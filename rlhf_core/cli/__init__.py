"""The command line, `rlhf`: results on stdout, logs and progress on stderr, faults as one line with an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from rlhf_core.infra.errors import RLHFError, printable

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. No traceback is shown without `--debug`."""
    tokens, debug, no_plugins = _global_switches(sys.argv[1:] if arguments is None else arguments)
    if no_plugins:
        from rlhf_core.registry import only_this_distribution

        only_this_distribution()
    try:
        code = 0 if _plainly(tokens) else _through_typer(tokens)
        sys.stdout.flush()
        if arguments is None:
            _end_of_results()
        return code
    except KeyboardInterrupt:
        if debug:
            raise
        print("error[interrupted] stopped by Ctrl-C", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) went away; what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        line, code = describe(error)
        if not getattr(error, "silent", False):
            print(line, file=sys.stderr)
        return code


def describe(error: Exception) -> tuple[str, int]:
    """Return the one line that is printed for an exception, and the exit code."""
    if isinstance(error, RLHFError):
        return error.line(), error.exit_code
    if hasattr(error, "format_message"):  # typer's usage errors
        usage = _usage_error(error)
        return usage.line(), usage.exit_code
    if isinstance(error, OSError) and error.errno in _STORAGE:
        from rlhf_core.infra.errors import StorageError

        fault = StorageError(error.strerror or str(error), place=str(error.filename or "input/output"))
        return fault.line(), fault.exit_code
    text = printable(" ".join(str(error).split()))
    fix = "run it again with `--debug` to see where, and report it if it isn't your plugin's"
    return f"error[internal] {type(error).__name__}: {text}; fix: {fix}", 1


def _plainly(tokens: Sequence[str]) -> bool:
    """Run a `list` or `show` in its usual forms without typer, whose import takes longer than either; else return False."""
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
    return False


def _end_of_results() -> None:
    """Turn stdout to stderr for the end of the process: what plugins print there is no part of the results."""
    if "rlhf_core.registry.load_class" in sys.modules:
        import atexit

        from rlhf_core.registry.guarded import redirect_stdout_for_good

        atexit.register(redirect_stdout_for_good)  # the last to be registered runs first


def _through_typer(tokens: Sequence[str]) -> int:
    if not tokens[0].startswith("-"):
        from rlhf_core.registry.discovery import installed

        installed()  # before anything imports pydantic or torch, which another package's malformed table would break
    from rlhf_core.cli.app import run

    return run(tokens)


_STORAGE = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EPERM)


def _usage_error(error: Exception) -> RLHFError:
    from rlhf_core.infra.errors import ConfigError

    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "rlhf"
    message = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
    return ConfigError(message[:1].lower() + message[1:], place=command, fix=f"`{command} --help` tells its use")


def _global_switches(arguments: Sequence[str]) -> tuple[list[str], bool, bool]:
    """Take `--debug` and `--no-plugins` out of the arguments: they may stand anywhere, before and after the verb."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    head, tail = list(arguments[:end]), list(arguments[end:])
    debug, no_plugins = "--debug" in head, "--no-plugins" in head
    tokens = [token for token in head if token not in ("--debug", "--no-plugins")] + tail
    return tokens or ["--help"], debug, no_plugins
