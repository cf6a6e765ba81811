"""What runs in the process of untrusted code: gives up what it can, then runs the code. Started as a script, with Python's own
library alone: it imports nothing of this project.

The job comes as JSON on one pipe, what happened goes out on another, each line after a token that only this process and its
parent know. What the code prints is no verdict.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import struct
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

NO_NEW_PRIVILEGES, SECCOMP = 38, 22  # of prctl
NEW_USER, NEW_NET = 0x10000000, 0x40000000  # of unshare
AGAIN, NOT_PERMITTED, NOT_THERE = 11, 1, 38  # errors that a refused system call returns
THREAD = 0x10000  # the flag of clone that makes a thread, not a process

# System calls by number. Refused for all arguments: what starts or touches other processes, opens a network, mounts, changes
# owners, permissions or clocks, or reaches parts of the kernel in which flaws are found often.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "x86_64": {
        "audit": 0xC000003E,
        "clone": 56,
        "clone3": 435,
        "signals": (62, 234),  # kill, tgkill
        "prlimit": 302,
        # fork vfork execve execveat socket tkill setrlimit ptrace process_vm_readv process_vm_writev process_madvise pidfd_open
        # pidfd_getfd pidfd_send_signal io_uring_setup io_uring_enter io_uring_register bpf perf_event_open userfaultfd add_key
        # request_key keyctl unshare setns mount umount2 pivot_root chroot reboot kexec_load kexec_file_load init_module
        # finit_module delete_module swapon swapoff acct quotactl settimeofday clock_settime adjtimex clock_adjtime sethostname
        # setdomainname mknod mknodat open_by_handle_at personality ioperm iopl kcmp syslog open_tree move_mount fsopen fsconfig
        # fsmount fspick mount_setattr rt_sigqueueinfo rt_tgsigqueueinfo chmod fchmod fchmodat fchmodat2 chown fchown lchown
        # fchownat setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr utime utimes futimesat utimensat
        "refused": (
            57, 58, 59, 322, 41, 200, 160, 101, 310, 311, 440, 434, 438, 424, 425, 426, 427, 321, 298, 323, 248, 249, 250, 272,
            308, 165, 166, 155, 161, 169, 246, 320, 175, 313, 176, 167, 168, 163, 179, 164, 227, 159, 305, 170, 171, 133, 259,
            304, 135, 173, 172, 312, 103, 428, 429, 430, 431, 432, 433, 442, 129, 297, 90, 91, 268, 452, 92, 93, 94, 260, 188,
            189, 190, 197, 198, 199, 132, 235, 261, 280,
        ),
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "clone": 220,
        "clone3": 435,
        "signals": (129, 131),
        "prlimit": 261,
        # The same, as far as this architecture has them.
        "refused": (
            221, 281, 198, 130, 164, 117, 270, 271, 440, 434, 438, 424, 425, 426, 427, 280, 241, 282, 217, 218, 219, 97, 268, 40,
            39, 41, 51, 142, 104, 294, 105, 273, 106, 224, 225, 89, 60, 170, 112, 171, 266, 161, 162, 33, 265, 92, 272, 116, 428,
            429, 430, 431, 432, 433, 442, 138, 240, 52, 53, 452, 54, 55, 5, 6, 7, 14, 15, 16, 88,
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


def leave_network(libc: ctypes.CDLL) -> bool:
    """Move into a network namespace without interfaces; return whether the kernel allowed it."""
    return libc.unshare(NEW_NET) == 0 or libc.unshare(NEW_USER | NEW_NET) == 0


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
    readable = {sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path, "/usr", "/lib", "/lib64", "/bin"}
    readable |= {"/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero"}
    allowed = [*((path, reading) for path in sorted(readable)), (directory, every), ("/dev/null", 0b111 | 1 << 14)]
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


def filter_calls(libc: ctypes.CDLL) -> bool:
    """Refuse system calls by a filter that can't be removed; return whether the kernel takes it."""
    calls = ARCHITECTURES.get(platform.machine())
    if calls is None:
        return False
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000, 0x80000000
    number, architecture = 0, 4  # offsets in the data of a call; its arguments, 8 bytes each, begin at 16

    def argument(index: int, high: bool = False) -> int:
        return 16 + 8 * index + 4 * high

    program = [
        (load, 0, 0, architecture),
        (equal, 1, 0, calls["audit"]),
        (give, 0, 0, kill),
        (load, 0, 0, number),
        (at_least, 0, 1, 0x40000000),  # the other numbering of x86-64
        (give, 0, 0, refuse | NOT_PERMITTED),
    ]
    for call in calls["refused"]:
        program += [(equal, 0, 1, call), (give, 0, 0, refuse | NOT_PERMITTED)]
    # Python then falls back to clone, whose flags can be seen.
    program += [(equal, 0, 1, calls["clone3"]), (give, 0, 0, refuse | NOT_THERE)]
    program += [
        (equal, 0, 4, calls["clone"]),
        (load, 0, 0, argument(0)),
        (bits, 0, 1, THREAD),
        (give, 0, 0, allow),
        (give, 0, 0, refuse | AGAIN),
    ]
    for call in calls["signals"]:  # to itself alone
        program += [
            (equal, 0, 4, call),
            (load, 0, 0, argument(0)),
            (equal, 0, 1, os.getpid()),
            (give, 0, 0, allow),
            (give, 0, 0, refuse | NOT_PERMITTED),
        ]
    program += [  # its limits may be read, not set
        (equal, 0, 6, calls["prlimit"]),
        (load, 0, 0, argument(2)),
        (equal, 0, 3, 0),
        (load, 0, 0, argument(2, high=True)),
        (equal, 0, 1, 0),
        (give, 0, 0, allow),
        (give, 0, 0, refuse | NOT_PERMITTED),
        (give, 0, 0, allow),
    ]
    packed = b"".join(struct.pack("HBBI", *line) for line in program)
    code = ctypes.create_string_buffer(packed, len(packed))
    whole = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    return libc.prctl(SECCOMP, 2, whole, 0, 0) == 0


def refuse_events() -> None:
    """Refuse, where the kernel doesn't, what Python reports before it does it: code that calls the system itself isn't seen."""
    refused = (
        "socket.", "subprocess.", "os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "pty.", "ctypes.",
        "os.chmod", "os.chown",
    )  # fmt: skip

    def look(event: str, arguments: tuple) -> None:
        if event.startswith(refused):
            raise PermissionError(f"{event} is refused here")

    sys.addaudithook(look)


def protect(job: dict, directory: str) -> dict:
    """Give up what the code must not have; return what the kernel enforces of it."""
    set_limits(job)
    enforced = {"network": False, "processes": False, "files": False}
    if sys.platform.startswith("linux"):
        libc = ctypes.CDLL(None, use_errno=True)
        enforced["network"] = leave_network(libc)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        enforced["files"] = restrict_files(libc, directory)
        enforced["processes"] = filter_calls(libc)
        enforced["network"] = enforced["network"] or enforced["processes"]
    if not enforced["processes"]:
        refuse_events()
    return enforced


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
    for number, piece in enumerate(pieces):
        try:
            run(piece, space)
            passed = True
        except BaseException:
            passed = False
        write(sink, f"{token} {'passed' if passed else 'failed'} {number}\n".encode())
        if not passed and number < job["needed"]:
            leave(1)
    leave(0)


if __name__ == "__main__":
    main()
