"""Becomes the sandbox: new namespaces, a root of its own, limits, no capabilities; then runs Python in it.

A program of its own (`python -I -S launcher.py PLAN`), since a process with threads cannot be forked safely. PLAN is
JSON, made by `sandbox`. Three processes come of it: this one waits outside, so that its end means that all others have
ended; the first process of the PID namespace collects orphans, and every process in there ends with it; and the script.
What arrives as stderr is for messages, and becomes file descriptor 3: "failed: STEP: REASON" where setting up fails,
"signal: NAME" where one ends the script.
"""

import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_NAMESPACES = 0x7E020000  # mount, cgroup, UTS, IPC, user, PID, network
_NOSUID, _NODEV, _NOEXEC, _DETACH, _PRIVATE = 2, 4, 8, 2, 0x44000  # mount(2); _PRIVATE is MS_REC | MS_PRIVATE
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442  # the same numbers on every machine
_CLONE_TREE, _RECURSIVE, _EMPTY_PATH, _FROM_EMPTY_PATH = 1 | os.O_CLOEXEC, 0x8000, 0x1000, 0x4
_READ_ONLY_NOSUID, _DEVICES_TOO = 0x1 | 0x2, 0x4  # MOUNT_ATTR_*: what attributes forbid
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _DROP_BOUNDING, _NO_NEW_PRIVS = 1, 4, 22, 24, 38  # prctl(2)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_NOBODY = 65534
_SPOKEN_ON = 3


def main() -> None:
    """Set up, and wait until everything in there has ended."""
    plan = json.loads(sys.argv[1])
    os.dup2(2, _SPOKEN_ON)
    os.dup2(1, 2)  # what the script says on both is one text
    with step("user and other namespaces"):
        _unshare()
    with step("a process in the new PID namespace"):
        first = os.fork()
    if first == 0:
        _first_process(plan)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
    waits = select.poll()
    waits.register(os.pidfd_open(first), select.POLLIN)
    waits.register(0, 0)  # POLLHUP: whoever started this has died, or closed the sandbox
    if all(number == 0 for number, _ in waits.poll()):
        os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Ends the process with one line if what is in it fails."""
    try:
        yield
    except OSError as error:
        os.write(_SPOKEN_ON, f"failed: {name}: {error.strerror}\n".encode())
        os._exit(1)


def _call(function: str, *arguments: Any) -> int:
    result = getattr(_LIBC, function)(*arguments)
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _unshare() -> None:
    """New namespaces, whose users are named by a child that stayed in the old ones.

    Where the user is root, scripts run as nobody: root owns switches of the kernel, with capabilities or without.
    """
    read, write = os.pipe()
    user, group, this = os.geteuid(), os.getegid(), os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(write)
        os.read(read, 1)
        with step("names of users"):
            _name_users(this, user, group)
        os._exit(0)
    os.close(read)
    try:
        _call("unshare", _NEW_NAMESPACES)
    except OSError:
        os.kill(helper, signal.SIGKILL)
        raise
    os.close(write)
    if os.waitpid(helper, 0)[1]:
        os._exit(1)


def _name_users(process: int, user: int, group: int) -> None:
    if user != 0:
        _write(f"/proc/{process}/setgroups", "deny")
    for name, number in (("uid_map", user), ("gid_map", group)):
        as_root = f"0 {number} 1\n{_NOBODY} {_NOBODY} 1"
        _write(f"/proc/{process}/{name}", as_root if user == 0 else f"{_NOBODY} {number} 1")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _first_process(plan: dict[str, Any]) -> NoReturn:
    os.setsid()  # else a signal to "my process group" would reach the outside
    with step("a root of its own"):
        socket.sethostname("sandbox")
        _enter_root(plan)
    with step("another user"):
        _drop_bounding_set()
        _drop_user()
    _call("prctl", _SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # after the users, which clear it
    _call("prctl", _SET_DUMPABLE, 0, 0, 0, 0)
    with step("a process for the script"):
        script = os.fork()
    if script == 0:
        _script(plan)
    while True:
        ended, status = os.wait()
        if ended == script:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                os.write(_SPOKEN_ON, f"signal: {signal.Signals(-code).name}\n".encode())
            os._exit(0)


def _enter_root(plan: dict[str, Any]) -> None:
    """Makes a small tmpfs the root: folders and files of the plan in it, read-only, and one tmpfs to write to."""
    _mount(None, "/", None, _PRIVATE)
    trees = [(path, *_tree(path, nodev=True)) for path in plan["shown"]]
    trees += [(path, *_tree(path, nodev=False)) for path in _DEVICES]
    trees += [(inside, *_tree(outside, nodev=True)) for outside, inside in plan["shown_as"].items()]
    _mount("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    os.chdir("/tmp")
    for path, tree, is_folder in trees:
        _place(tree, f".{path}", is_folder)
    for path, target in plan["links"].items():
        if not os.path.lexists(f".{path}"):
            os.makedirs(os.path.dirname(f".{path}"), exist_ok=True)
            os.symlink(target, f".{path}")
    for path in plan["hidden"]:
        _mount("tmpfs", f".{path}", "tmpfs", _NOSUID | _NODEV | 1, "size=4k")  # 1 is MS_RDONLY
    os.makedirs("mnt/data")
    scratch = f"size={plan['disk_bytes']},nr_inodes=4096,mode=777"
    _mount("tmpfs", "mnt/data", "tmpfs", _NOSUID | _NODEV | _NOEXEC, scratch)
    os.symlink("mnt/data", "tmp")
    os.symlink("/mnt/data", "dev/shm")
    _call("syscall", plan["pivot_root"], b".", b".")
    _call("umount2", b".", _DETACH)
    _set_attributes(os.open("/", os.O_PATH), 0, _READ_ONLY_NOSUID)
    os.chdir("/mnt/data")


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    source_, kind_ = (text.encode() if text else None for text in (source, kind))
    _call("mount", source_, target.encode(), kind_, ctypes.c_ulong(flags), options.encode())


def _tree(path: str, nodev: bool) -> tuple[int, bool]:
    """A copy of the mounts at a path, read-only, not yet anywhere; and whether it is a folder."""
    tree = _call("syscall", _OPEN_TREE, -100, path.encode(), _CLONE_TREE | _RECURSIVE)
    _set_attributes(tree, _RECURSIVE, _READ_ONLY_NOSUID | (_DEVICES_TOO if nodev else 0))
    return tree, os.path.isdir(path)


def _set_attributes(tree: int, recursive: int, attributes: int) -> None:
    request = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # struct mount_attr
    _call("syscall", _MOUNT_SETATTR, tree, b"", _EMPTY_PATH | recursive, ctypes.byref(request), ctypes.sizeof(request))


def _place(tree: int, target: str, is_folder: bool) -> None:
    os.makedirs(target if is_folder else os.path.dirname(target), exist_ok=True)
    if not is_folder:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    _call("syscall", _MOVE_MOUNT, tree, b"", -100, target.encode(), _FROM_EMPTY_PATH)
    os.close(tree)


def _drop_user() -> None:
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def _script(plan: dict[str, Any]) -> NoReturn:
    """Limits, no capabilities, the filter of system calls; then Python, with four open files and no environment."""
    with step("limits"):
        for name, value in plan["limits"].items():
            hard = value + 1 if name == "RLIMIT_CPU" else value  # at the soft one a signal says why
            resource.setrlimit(getattr(resource, name), (value, hard))
    with step("no privileges"):
        _drop_capabilities()
        _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    with step("the filter of system calls"):
        _filter_system_calls(bytes.fromhex(plan["filter"]))
    os.closerange(_SPOKEN_ON + 1, 1 << 16)
    os.set_inheritable(_SPOKEN_ON, True)
    with step("Python in the sandbox"):
        os.execve(plan["command"][0], plan["command"], {})


def _drop_bounding_set() -> None:
    """So that no later exec gives a capability; before the users change, since it takes one."""
    for number in range(64):
        try:
            _call("prctl", _DROP_BOUNDING, number, 0, 0, 0)
        except OSError as error:
            if error.errno != errno.EINVAL:  # which is the first number that this kernel does not know
                raise
            return


def _drop_capabilities() -> None:
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3: two sets of 32
    _call("capset", ctypes.byref(header), ctypes.byref(none))


def _filter_system_calls(code: bytes) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))  # struct sock_fprog

    program = Program(len(code) // 8, code)
    _call("prctl", _SET_SECCOMP, 2, ctypes.byref(program), 0, 0)


if __name__ == "__main__":
    main()
