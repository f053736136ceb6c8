"""The system call filter, written as classic BPF: all is allowed but a list that answers EPERM.

A filter sees the call's number and its plain arguments. The layout of `struct seccomp_data` and the opcodes are those
of linux/seccomp.h, linux/audit.h and linux/bpf_common.h; call numbers are those of syscall_64.tbl in arch/x86
and of include/uapi/asm-generic/unistd.h (aarch64).

A list of what is denied, not of what is allowed, because Python and its libraries use many calls that differ from one
libc to the next, and a right program that is killed would be scored 0 without a word. Namespaces, limits and the
unprivileged user are the first wall; this one narrows what of the kernel can be reached at all.
"""

from __future__ import annotations

import errno
import platform
import struct

from prism_nemo.errors import InputError

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; both machines are little-endian
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_X32_BIT = 0x40000000
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET of linux/sched.h.
_NAMESPACE_FLAGS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

_ARCHES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column of the tables below

# Name -> number on (x86_64, aarch64); None where the machine has no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    # The network, also loopback, unix and netlink sockets. A socketpair stays: it reaches nobody (asyncio has one).
    "socket": (41, 198),
    # Other processes.
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # Namespaces and mounts.
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    # Large parts of the kernel that no program of this kind needs, and in which holes were found.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "fanotify_init": (300, 262), "memfd_secret": (447, 447), "modify_ldt": (154, None),
    "personality": (135, 92), "mbind": (237, 235), "set_mempolicy": (238, 237), "lookup_dcookie": (212, 18),
    # Inter-process objects that outlive their maker.
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # The machine.
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "sethostname": (170, 161), "setdomainname": (171, 162), "acct": (163, 89), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266), "syslog": (103, 116),
    "vhangup": (153, 58), "iopl": (172, None), "ioperm": (173, None), "uselib": (134, None),
}  # fmt: skip
# Without a process namespace, a program could leave its process group (and so be missed when the group is killed) ...
_LEAVING: dict[str, tuple[int | None, int | None]] = {"setsid": (112, 157), "setpgid": (109, 154)}
# ... and, under the caller's own user, signal the caller.
_SIGNALS: dict[str, tuple[int | None, int | None]] = {
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)


def filter_program(no_leaving: bool = False, no_signals: bool = False, machine: str | None = None) -> bytes:
    """The filter as an array of `struct sock_filter`, as ``bwrap --seccomp`` and ``prctl`` take it.

    Args:
        no_leaving: Deny leaving the session and process group.
        no_signals: Deny sending signals.
        machine: As `platform.machine` has it; this one's if None.

    Raises:
        InputError: For a machine whose call numbers are not known here.
    """
    machine = machine or platform.machine()
    if machine not in _ARCHES:
        raise InputError(
            f"rewards.sandbox: no system call filter for '{machine}'; code rewards need one of {', '.join(_ARCHES)}"
        )
    audit, column = _ARCHES[machine]
    denied = _DENIED | (_LEAVING if no_leaving else {}) | (_SIGNALS if no_signals else {})
    program = [
        # A call made in another ABI (int 0x80) has other numbers: nothing below would hold for it.
        (_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER),
    ]  # fmt: skip
    if machine == "x86_64":
        program += [(_AT_LEAST, 0, 1, _X32_BIT), _fail(errno.EPERM)]
    for numbers in denied.values():
        number = numbers[column]
        if number is not None:
            program += [(_EQUAL, 0, 1, number), _fail(errno.EPERM)]
    # clone3 has its flags in memory, where a filter cannot look; ENOSYS makes libc fall back to clone.
    program += [(_EQUAL, 0, 1, _CLONE3[column]), _fail(errno.ENOSYS)]
    program += [(_EQUAL, 0, 3, _CLONE[column]), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_ANY_BIT, 0, 1, _NAMESPACE_FLAGS)]
    program += [_fail(errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def denied_calls() -> dict[str, tuple[int | None, int | None]]:
    """Name -> number on (x86_64, aarch64) of what every filter denies."""
    return dict(_DENIED)


def _fail(number: int) -> tuple[int, int, int, int]:
    return (_RETURN, 0, 0, _ERRNO | number)
