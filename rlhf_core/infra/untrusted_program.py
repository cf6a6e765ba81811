"""What runs in the process of untrusted code: gives up what it can, then runs the code. Started as a script, with Python's own
library alone: it imports nothing of this project.

The job comes as JSON on one pipe, what happened goes out on another, each line after a token that only this process and its
parent know. What the code prints is no verdict.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import functools
import json
import os
import platform
import resource
import signal
import struct
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PARENT_DEATH_SIGNAL, NO_NEW_PRIVILEGES, SECCOMP = 1, 38, 22  # of prctl
NEW_USER, NEW_NET = 0x10000000, 0x40000000  # of unshare
AGAIN, NOT_PERMITTED, NOT_THERE = 11, 1, 38  # errors that a refused system call returns
THREAD = 0x10000  # the flag of clone that makes a thread, not a process

# System calls by number. Refused for all arguments: what starts or touches other processes, opens a network, mounts, changes
# users, owners, permissions or clocks, or reaches parts of the kernel in which flaws are found often.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "x86_64": {
        "audit": 0xC000003E,
        "clone": 56,
        "clone3": 435,
        "signals": (62, 234),  # kill, tgkill
        "prlimit": 302,
        "prctl": 157,
        # fork vfork execve execveat socket tkill setrlimit ptrace process_vm_readv process_vm_writev process_madvise pidfd_open
        # pidfd_getfd pidfd_send_signal io_uring_setup io_uring_enter io_uring_register bpf perf_event_open userfaultfd add_key
        # request_key keyctl unshare setns mount umount2 pivot_root chroot reboot kexec_load kexec_file_load init_module
        # finit_module delete_module swapon swapoff acct quotactl settimeofday clock_settime adjtimex clock_adjtime sethostname
        # setdomainname mknod mknodat open_by_handle_at personality ioperm iopl kcmp syslog open_tree move_mount fsopen fsconfig
        # fsmount fspick mount_setattr rt_sigqueueinfo rt_tgsigqueueinfo chmod fchmod fchmodat fchmodat2 chown fchown lchown
        # fchownat setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr utime utimes futimesat utimensat setuid
        # setgid setreuid setregid setgroups setresuid setresgid setfsuid setfsgid
        "refused": (
            57, 58, 59, 322, 41, 200, 160, 101, 310, 311, 440, 434, 438, 424, 425, 426, 427, 321, 298, 323, 248, 249, 250, 272,
            308, 165, 166, 155, 161, 169, 246, 320, 175, 313, 176, 167, 168, 163, 179, 164, 227, 159, 305, 170, 171, 133, 259,
            304, 135, 173, 172, 312, 103, 428, 429, 430, 431, 432, 433, 442, 129, 297, 90, 91, 268, 452, 92, 93, 94, 260, 188,
            189, 190, 197, 198, 199, 132, 235, 261, 280, 105, 106, 113, 114, 116, 117, 119, 122, 123,
        ),
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "clone": 220,
        "clone3": 435,
        "signals": (129, 131),
        "prlimit": 261,
        "prctl": 167,
        # The same, as far as this architecture has them.
        "refused": (
            221, 281, 198, 130, 164, 117, 270, 271, 440, 434, 438, 424, 425, 426, 427, 280, 241, 282, 217, 218, 219, 97, 268, 40,
            39, 41, 51, 142, 104, 294, 105, 273, 106, 224, 225, 89, 60, 170, 112, 171, 266, 161, 162, 33, 265, 92, 272, 116, 428,
            429, 430, 431, 432, 433, 442, 138, 240, 52, 53, 452, 54, 55, 5, 6, 7, 14, 15, 16, 88, 146,
            144, 145, 143, 159, 147, 149, 151, 152,
        ),
    },
}  # fmt: skip


def set_limits(job: dict) -> None:
    """Limit processor time, memory, file size, open files, and, for users other than root, processes."""
    seconds = max(int(job["seconds"]), 1)
    limits = {
        resource.RLIMIT_CPU: (seconds + 1, seconds + 2),
        resource.RLIMIT_FSIZE: (job["file_bytes"],) * 2,
        resource.RLIMIT_NOFILE: (64, 64),
        resource.RLIMIT_CORE: (0, 0),
    }
    if sys.platform.startswith("linux"):  # macOS accepts a limit of address space and doesn't keep it
        limits[resource.RLIMIT_AS] = (job["memory_bytes"],) * 2
        limits[resource.RLIMIT_NPROC] = (256, 256)
    for kind, values in limits.items():
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            values = tuple(min(value, hard) for value in values)
        resource.setrlimit(kind, values)


def end_with_parent(libc: ctypes.CDLL | None, parent: int, seconds: float) -> None:
    """Have the kernel kill this process when its parent ends: on Linux at once, elsewhere a while after its time limit.

    For Linux the parent is the thread that started this process, which waits for it.
    """
    if libc is not None:
        libc.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    else:  # the parent ends it earlier if it can, so this timer ends what is left over
        signal.setitimer(signal.ITIMER_REAL, seconds + 5)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def leave_network(libc: ctypes.CDLL) -> bool:
    """Move into a network namespace without interfaces; return whether the kernel allowed it."""
    return libc.unshare(NEW_NET) == 0 or libc.unshare(NEW_USER | NEW_NET) == 0


def readable_paths() -> list[str]:
    """Return what may be read outside the code's own directory: Python and libraries, each with all below it."""
    readable = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path, "/usr", "/lib", "/lib64", "/bin"}
    return sorted(readable | {"/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero"})


def restrict_files(libc: ctypes.CDLL, directory: str) -> bool:
    """Let this process read Python and libraries, and write its own directory, by Landlock; return whether the kernel does it."""
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return False
    every = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    if version == 4:
        every = (1 << 15) - 1
    # Bits 0 execute, 1 write, 2 read a file, 3 read a directory; those of a file alone are 0, 1, 2, 14 and 15.
    reading, of_a_file = 0b1101, 0b111 | 3 << 14
    network = 0b11 if version >= 4 else 0
    scope = 0b11 if version >= 6 else 0
    rules = struct.pack("QQQ", every, network, scope)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(444, rules, size, 0)
    if ruleset < 0:
        return False
    allowed = [*((path, reading) for path in readable_paths()), (directory, every), ("/dev/null", 0b111 | 1 << 14)]
    for path, access in allowed:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not Path(path).is_dir():
                access &= of_a_file
            rule = struct.pack("=Qi", access & every, descriptor)
            libc.syscall(445, ruleset, 1, rule, 0)
            os.close(descriptor)
    done = libc.syscall(446, ruleset, 0) == 0
    os.close(ruleset)
    return done


# A filter of system calls is a program of the kernel's packet filter, which the kernel runs on each call's data. A line is an
# operation, how many lines to skip where its test holds and where it doesn't, and a value.
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCHITECTURE = (LOAD, 0, 0, 0), (LOAD, 0, 0, 4)  # offsets in a call's data
ALLOW, KILL = (RETURN, 0, 0, 0x7FFF0000), (RETURN, 0, 0, 0x80000000)


def refuse(error: int) -> tuple:
    """Return the line that ends a call with an error."""
    return (RETURN, 0, 0, 0x00050000 | error)


def argument(index: int, high: bool = False) -> tuple:
    """Return the line that loads half of an argument; they begin at offset 16 and have 8 bytes each."""
    return (LOAD, 0, 0, 16 + 8 * index + 4 * high)


def of_call(number: int, *lines: tuple) -> list:
    """Return lines for one call alone, the last of which ends it; for other calls the program goes on behind them."""
    return [(EQUAL, 0, len(lines), number), *lines]


def filter_program(calls: dict) -> list:
    """Return the filter for the architecture with these system calls: what isn't refused is allowed."""
    refused = refuse(NOT_PERMITTED)
    return [
        ARCHITECTURE,
        (EQUAL, 1, 0, calls["audit"]),
        KILL,
        NUMBER,
        (AT_LEAST, 0, 1, 0x40000000),  # the other numbering of x86-64
        refused,
        *(line for call in calls["refused"] for line in of_call(call, refused)),
        # Python then falls back to clone, whose flags can be seen: threads are made, processes aren't.
        *of_call(calls["clone3"], refuse(NOT_THERE)),
        *of_call(calls["clone"], argument(0), (ANY_BIT, 0, 1, THREAD), ALLOW, refuse(AGAIN)),
        # Signals go to itself alone.
        *(
            line
            for call in calls["signals"]
            for line in of_call(call, argument(0), (EQUAL, 0, 1, os.getpid()), ALLOW, refused)
        ),
        # Its end with its parent stays.
        *of_call(calls["prctl"], argument(0), (EQUAL, 0, 1, PARENT_DEATH_SIGNAL), refused, ALLOW),
        # Its limits may be read, not set: the address of new ones must be 0.
        *of_call(
            calls["prlimit"], argument(2), (EQUAL, 0, 3, 0), argument(2, high=True), (EQUAL, 0, 1, 0), ALLOW, refused
        ),
        ALLOW,
    ]


def filter_calls(libc: ctypes.CDLL) -> bool:
    """Refuse system calls by a filter that can't be removed; return whether the kernel takes it."""
    calls = ARCHITECTURES.get(platform.machine())
    if calls is None:
        return False
    program = filter_program(calls)
    packed = b"".join(struct.pack("HBBI", *line) for line in program)
    code = ctypes.create_string_buffer(packed, len(packed))
    whole = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    return libc.prctl(SECCOMP, 2, whole, 0, 0) == 0


REFUSED_EVENTS = (
    "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "pty.", "ctypes.", "os.chmod",
    "os.chown", "os.chflags", "os.setxattr", "os.removexattr",
)  # fmt: skip
"""Beginnings of the names of what Python reports, by `sys.audit`, before it does it."""

CHANGING_EVENTS: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.mkdir": ((0, 2),), "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)), "os.symlink": ((1, 2),), "os.truncate": ((0, None),), "os.utime": ((0, 3),),
    "sqlite3.connect": ((0, None),),
}  # fmt: skip
"""What changes files: (the argument with a path, the one with the open directory that the path begins at) of each path."""


def refuse_events(directory: str) -> None:
    """Refuse, where the kernel doesn't do all of it, what Python reports before it does it: network, processes, and files outside
    `directory`, of which those in `readable_paths` may be read. Code that calls the system itself isn't seen.
    """
    real, split, join, decode = (
        os.path.realpath,
        os.path.split,
        os.path.join,
        os.fsdecode,
    )  # before the code changes them
    own, is_directory = real(directory), os.path.isdir
    readable = [real(path) for path in readable_paths() if path]
    changing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def within(path: str, places: list[str]) -> bool:
        return any(path == place or path.startswith(place.rstrip("/") + "/") for place in places)

    def opens(path: Any, mode: Any, flags: int) -> bool:
        if isinstance(path, int):  # a descriptor, which was open before
            return True
        found = real(decode(path))
        if found == "/dev/null" or within(found, [own]):
            return True
        if flags & changing or {*"wax+"} & {*(mode or "")}:
            return False
        # A directory that is open could be changed by the names in it.
        return within(found, readable) and not (mode is None and is_directory(found))

    def changes(path: Any, beside: int) -> bool:
        if isinstance(path, int):
            return True
        head, name = split(decode(path))
        if beside >= 0 and not head.startswith("/"):  # `opens` lets directories be opened in its own one alone
            return ".." not in {name, *head.split("/")}
        return within(join(real(head), name), [own])

    def refusals(event: str, arguments: tuple) -> Iterator[bool]:
        yield event.startswith(REFUSED_EVENTS)
        if event == "open":
            yield not opens(*arguments)
        elif event in ("os.listdir", "os.scandir"):
            path = arguments[0]
            yield path is not None and not isinstance(path, int) and not within(real(decode(path)), [own, *readable])
        for at, start in CHANGING_EVENTS.get(event, ()):
            yield not changes(arguments[at], -1 if start is None else arguments[start])

    def look(event: str, arguments: tuple) -> None:
        if any(refusals(event, arguments)):
            raise PermissionError(f"{event} is refused here")

    sys.addaudithook(look)


def ignore_permissions(directory: str) -> None:
    """Have Python's functions that change permissions, owners and times do nothing to files in `directory`.

    The system calls are refused everywhere, as they can't be refused by place. Code that copies a file of its own, which copies
    its permissions, must not fail by that.
    """
    real, state, decode = os.path.realpath, os.stat, os.fsdecode
    own = real(directory)

    def ignoring(change: Callable) -> Callable:
        @functools.wraps(change)
        def ignored(path: Any, *arguments: Any, **options: Any) -> None:
            if isinstance(path, int) or any(options.get(name) is not None for name in ("dir_fd", "src_dir_fd")):
                return change(path, *arguments, **options)
            state(path, follow_symlinks=options.get("follow_symlinks", True))  # raises where there is no such file
            found = real(decode(path))
            if found != own and not found.startswith(own + "/"):
                return change(path, *arguments, **options)
            return None

        return ignored

    for name in ("chmod", "lchmod", "chown", "lchown", "utime"):
        change = getattr(os, name, None)
        if change is None:
            continue
        ignored = ignoring(change)
        setattr(os, name, ignored)
        for supports in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
            if change in supports:
                supports.add(ignored)


def protect(job: dict, directory: str) -> dict:
    """Give up what the code must not have; return what the kernel enforces of it."""
    set_limits(job)
    enforced = {"network": False, "processes": False, "files": False}
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    if libc is not None:
        enforced["network"] = leave_network(libc)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        enforced["files"] = restrict_files(libc, directory)
    end_with_parent(libc, job["parent"], job["seconds"])
    if libc is not None:
        enforced["processes"] = filter_calls(libc)
        enforced["network"] = enforced["network"] or enforced["processes"]
    if not all(enforced.values()):
        refuse_events(directory)
    ignore_permissions(directory)
    return enforced


HEAP_TYPE = 1 << 9  # the flag of classes made in Python, whose attributes can be set
ADDED_BY_PYTHON = frozenset({"__annotations__", "__annotations_cache__"})  # to classes, on its own
SKIPS = {("unittest.case", "SkipTest"), ("_pytest.outcomes", "Skipped")}


def is_code(value: Any) -> bool:
    """Tell whether a value is what code calls: a function, a class, a method, a property."""
    return callable(value) or hasattr(type(value), "__get__")


def of_unittest(name: Any) -> bool:
    return isinstance(name, str) and name.partition(".")[0] == "unittest"


class ModulesBefore:
    """The functions and classes of the modules that are loaded now, to set back what code replaces in them.

    Data is left alone, as code may set that with reason, and so is what is new, unless it hides what was there. The classes of
    unittest are set back whole.
    """

    def __init__(self, space: dict) -> None:
        """Note what there is outside `space`, the namespace of the code."""
        self.space, self.by_name, self.loaded = space, sys.modules, dict(sys.modules)
        self.builtins, self.builtins_before = vars(builtins), dict(vars(builtins))
        self.modules: list[tuple[dict, dict, bool]] = []
        self.classes: list[tuple[type, dict, frozenset, tuple, bool]] = []
        self.functions: list[tuple[types.FunctionType, Any, Any, Any, bool]] = []
        self.seen: set[int] = set()
        for name, module in self.loaded.items():
            if issubclass(type(module), types.ModuleType):
                names = object.__getattribute__(module, "__dict__")
                if names is not space and names is not self.builtins:
                    kept = {key: value for key, value in names.items() if is_code(value)}
                    self.modules.append((names, kept, of_unittest(name)))
                    self.note(list(names.values()))

    def note(self, values: list) -> None:
        """Note functions, and classes with what is in them."""
        while values:
            value = values.pop()
            if type(value) in (staticmethod, classmethod):
                value = value.__func__
            elif type(value) is property:
                value = value.fget
            if id(value) in self.seen:
                continue
            if type(value) is types.FunctionType:
                self.seen.add(id(value))
                state = value.__code__, value.__defaults__, value.__kwdefaults__
                self.functions.append((value, *state, of_unittest(value.__module__)))
            elif issubclass(type(value), type) and type.__dict__["__flags__"].__get__(value) & HEAP_TYPE:
                self.seen.add(id(value))
                names = dict(type.__dict__["__dict__"].__get__(value))
                whole = of_unittest(names.get("__module__"))
                kept = names if whole else {key: one for key, one in names.items() if is_code(one)}
                self.classes.append((value, kept, frozenset(names), type.__dict__["__bases__"].__get__(value), whole))
                values += names.values()

    def set_back(self, *, everything: bool) -> bool:
        """Set back all modules, or unittest alone, which tests don't change; return whether unittest was changed."""
        if everything:
            # First these, without a call of any, as code may have replaced every one.
            for key, value in self.builtins_before.items():
                self.builtins[key] = value
            self.space["__builtins__"] = builtins
            sys.modules = self.by_name
            for name, module in self.loaded.items():
                if self.by_name.get(name) is not module:
                    self.by_name[name] = module
        found = [
            set_back_names(self.builtins_before, *one[:2]) and one[2] for one in self.modules if everything or one[2]
        ]
        for function, code, defaults, keywords, unit in self.functions:
            if everything or unit:
                if function.__code__ is not code:
                    function.__code__ = code
                    found.append(unit)
                if function.__defaults__ is not defaults or function.__kwdefaults__ is not keywords:
                    function.__defaults__, function.__kwdefaults__ = defaults, keywords
                    found.append(unit)
        found += [set_back_class(*one) and one[4] for one in self.classes if everything or one[4]]
        if everything:
            for where in (sys, threading):  # what is traced can be made to jump over an assert
                where.settrace(None)
                where.setprofile(None)
        return any(found)


def set_back_names(builtins_before: dict, names: dict, kept: dict) -> bool:
    """Set back the names of a module that stood for code, and remove those that hide a builtin; return whether any changed."""
    changed = [key for key, value in kept.items() if names.get(key) is not value]
    hiding = [key for key in names if key in builtins_before and key not in kept and is_code(names[key])]
    hiding = [key for key in hiding if not key.startswith("__")]
    for key in changed:
        names[key] = kept[key]
    for key in hiding:
        del names[key]
    return bool(changed or hiding)


def set_back_class(one: type, kept: dict, known: frozenset, bases: tuple, whole: bool) -> bool:
    """Set back what of a class was code, or the `whole` class, and remove what hides an inherited attribute; return whether
    anything changed."""
    changed = False
    with contextlib.suppress(TypeError, AttributeError):  # classes that refuse it
        if type.__dict__["__bases__"].__get__(one) is not bases:
            type.__setattr__(one, "__bases__", bases)
            changed = True
        now = dict(type.__dict__["__dict__"].__get__(one))
        for key, value in kept.items():
            if now.get(key) is not value:
                type.__setattr__(one, key, value)
                changed = True
        for key in now.keys() - known - ADDED_BY_PYTHON:
            above = type.__dict__["__mro__"].__get__(one)[1:]
            if whole or any(key in type.__dict__["__dict__"].__get__(base) for base in above):
                type.__delattr__(one, key)
                changed = True
    return changed


def skips_itself(error: BaseException, tests: set[str]) -> bool:
    """Tell whether an exception is a test's own skip: no code but that of the tests and of libraries had part in it."""
    while True:
        if not any((one.__module__, one.__name__) in SKIPS for one in type(error).__mro__):
            return False
        step = error.__traceback__
        while step is not None:
            file = step.tb_frame.f_code.co_filename
            if file not in tests and not file.startswith("/"):
                return False
            step = step.tb_next
        cause = error.__cause__  # an earlier skip of the same test
        if cause is None or not any((one.__module__, one.__name__) in SKIPS for one in type(cause).__mro__):
            return True
        error = cause


def main() -> None:
    source, sink, directory = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    with os.fdopen(source, encoding="utf-8") as file:
        job = json.load(file)
    token, write, run, leave = job.pop("token"), os.write, exec, os._exit
    # What the code does to Python's functions must not change these, so they are bound before it runs.
    os.chdir(directory)
    tempfile.tempdir = directory
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    enforced = protect(job, directory)
    write(sink, f"{token} enforced {json.dumps(enforced)}\n".encode())
    # A program is the main module; what is tested isn't, so that it doesn't begin to read its input.
    name = "__main__" if job["stdin"] else "solution"
    module = types.ModuleType(name)
    sys.modules["__main__"] = sys.modules[name] = module
    space = module.__dict__
    sys.argv = ["program.py"]
    try:
        pieces = [compile(text, name, "exec") for name, text in job["pieces"]]
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        leave(1)
    if job["stdin"]:  # one program that talks by stdin and stdout: its own exit code counts
        run(pieces[0], space)
        return
    undo, before, errors = job["undo"], None, BaseException
    allowed = {name for name, _ in job["pieces"][undo + 1 :]} if undo is not None else set()
    for number, piece in enumerate(pieces):
        if number == undo:
            before = ModulesBefore(space)
        try:
            run(piece, space)
            verdict = "passed"
        except errors as error:
            verdict = "skipped" if before is not None and number > undo and skips_itself(error, allowed) else "failed"
        if before is not None:
            changed = before.set_back(everything=number == undo)
            if changed and number > undo:
                verdict = "failed"
        write(sink, f"{token} {verdict} {number}\n".encode())
        if verdict != "passed" and number < job["needed"]:
            leave(1)
    leave(0)


if __name__ == "__main__":
    main()
