"""Which system calls the sandbox refuses, as a program for the kernel (classic BPF, seccomp(2)).

Namespaces already leave nothing to reach; this takes away the ways to new ones (a user namespace gives all capabilities
again), to other processes' memory, to memory that no limit counts, and to parts of the kernel that scripts do not need.
"""

import errno
import platform
import socket
import struct

from gptoss_jax.errors import GptossError

# Name -> number on x86_64 and on aarch64: the kernel's asm/unistd_64.h and asm-generic/unistd.h.
_DENIED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "personality": (135, 92),
}
_CLONE, _CLONE3, _SOCKETS = (56, 220), 435, ((41, 198), (53, 199))  # socket, socketpair
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH_*

_LOAD, _RETURN = 0x20, 0x06  # BPF_LD|W|ABS, BPF_RET|K
_IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT = 0x15, 0x35, 0x45  # BPF_JMP|K with JEQ, JGE, JSET
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the argument's low half
_ALLOW, _ERROR, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_X32 = 0x40000000  # x86_64's second table of the same calls


def pivot_root_number() -> int:
    """The number of the one system call that setting up needs, and that differs by machine and has no wrapper."""
    return _DENIED["pivot_root"][_machine()[0]]


def program() -> bytes:
    """An array of `struct sock_filter`: calls outside this list are allowed.

    Raises:
        GptossError: a machine whose numbers are not known here.
    """
    column, architecture = _machine()
    refused = struct.pack("<HBBI", _RETURN, 0, 0, _ERROR | errno.EPERM)
    code = _step(_LOAD, _ARCHITECTURE) + _step(_IF_EQUAL, architecture, then=1) + _step(_RETURN, _KILL)
    code += _step(_LOAD, _NUMBER) + _step(_IF_AT_LEAST, _X32, otherwise=1) + refused
    for numbers in _DENIED.values():
        code += _step(_IF_EQUAL, numbers[column], otherwise=1) + refused
    # clone3 keeps its flags in memory, where a filter cannot look; the C library then takes clone, whose can be seen.
    code += _step(_IF_EQUAL, _CLONE3, otherwise=1) + _step(_RETURN, _ERROR | errno.ENOSYS)
    code += _if_call(_CLONE[column], _step(_IF_ANY_BIT, _NEW_NAMESPACES, otherwise=1) + refused)
    for numbers in _SOCKETS:  # AF_VSOCK, for one, reaches a machine's host from any network namespace
        unreachable = _step(_RETURN, _ERROR | errno.ENETUNREACH)
        code += _if_call(numbers[column], _step(_IF_EQUAL, socket.AF_UNIX, then=1) + unreachable)
    return code + _step(_RETURN, _ALLOW)


def _if_call(number: int, verdict: bytes) -> bytes:
    """For one system call: look at its first argument, and allow it unless `verdict` returns something else."""
    body = _step(_LOAD, _FIRST_ARGUMENT) + verdict + _step(_RETURN, _ALLOW)
    return _step(_IF_EQUAL, number, otherwise=len(body) // 8) + body


def _step(operation: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    """One instruction; of a condition, how many instructions are skipped where it holds, and where not."""
    return struct.pack("<HBBI", operation, then, otherwise, value)


def _machine() -> tuple[int, int]:
    name = platform.machine()
    if name not in _MACHINES:
        raise GptossError(f"the python tool's sandbox knows {' and '.join(_MACHINES)}, and this machine is {name}")
    return _MACHINES[name]
