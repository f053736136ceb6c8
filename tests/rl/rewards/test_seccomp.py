"""The filter, run by an interpreter of its few instructions: for both machines, whichever this is."""

from __future__ import annotations

import errno
import re
import struct
from pathlib import Path

import pytest

from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.sandbox.seccomp import denied_calls, filter_program

ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000


def verdict(program: bytes, arch: int, number: int, argument: int = 0) -> int:
    """What the kernel would return: classic BPF as linux/filter.h defines it, over `struct seccomp_data`."""
    data = struct.pack("<iIQ6Q", number, arch, 0, argument, 0, 0, 0, 0, 0)
    instructions = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, constant = instructions[at]
        at += 1
        if code == 0x20:  # BPF_LD | BPF_W | BPF_ABS
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif code == 0x06:  # BPF_RET | BPF_K
            return constant
        else:
            holds = {0x15: accumulator == constant, 0x35: accumulator >= constant, 0x45: bool(accumulator & constant)}[
                code
            ]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", ARCHES)
def test_what_is_denied_and_what_is_not(machine):
    program, arch, column = filter_program(machine=machine), ARCHES[machine], list(ARCHES).index(machine)
    for name, numbers in denied_calls().items():
        if numbers[column] is not None:
            assert verdict(program, arch, numbers[column]) == ERRNO | errno.EPERM, name
    clone, clone3 = {"x86_64": (56, 435), "aarch64": (220, 435)}[machine]
    assert verdict(program, arch, clone3) == ERRNO | errno.ENOSYS
    assert verdict(program, arch, clone, 0x003D0F00) == ALLOW  # pthread_create's flags
    assert verdict(program, arch, clone, 17) == ALLOW  # fork's
    for bit in (17, 25, 26, 27, 28, 29, 30):
        assert verdict(program, arch, clone, 1 << bit | 17) == ERRNO | errno.EPERM
    for name, numbers in {"read": (0, 63), "write": (1, 64), "socketpair": (53, 199), "execve": (59, 221)}.items():
        assert verdict(program, arch, numbers[column]) == ALLOW, name


def test_other_abis():
    program = filter_program(machine="x86_64")
    assert verdict(program, 0x40000003, 1) == KILL  # i386, by int 0x80
    assert verdict(program, ARCHES["x86_64"], 0x40000000) == ERRNO | errno.EPERM  # x32's read
    assert verdict(filter_program(machine="aarch64"), 0x40000028, 1) == KILL  # 32-bit arm


@pytest.mark.parametrize(("machine", "setsid", "kill"), [("x86_64", 112, 62), ("aarch64", 157, 129)])
def test_the_additions_of_process_mode(machine, setsid, kill):
    arch = ARCHES[machine]
    plain = filter_program(machine=machine)
    assert [verdict(plain, arch, n) for n in (setsid, kill)] == [ALLOW, ALLOW]
    leaving = filter_program(no_leaving=True, machine=machine)
    assert [verdict(leaving, arch, n) for n in (setsid, kill)] == [ERRNO | errno.EPERM, ALLOW]
    silent = filter_program(no_leaving=True, no_signals=True, machine=machine)
    assert [verdict(silent, arch, n) for n in (setsid, kill)] == [ERRNO | errno.EPERM] * 2


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (0, ("x86_64-linux-gnu/asm/unistd_64.h", "asm/unistd_64.h")),
        (1, ("asm-generic/unistd.h",)),
    ],
)
def test_call_numbers_are_those_of_the_kernel_headers(column, names):
    headers = [path for name in names if (path := Path("/usr/include") / name).exists()]
    if not headers:
        pytest.skip("no kernel headers here (linux-libc-dev)")
    pattern = re.compile(r"^#define __NR(?:3264)?_(\w+) (\d+)$", re.MULTILINE)
    known = {name: int(number) for name, number in pattern.findall(headers[0].read_text())}
    ours = {name: numbers[column] for name, numbers in denied_calls().items() if numbers[column] is not None}
    checked = {name: number for name, number in ours.items() if name in known}
    assert len(checked) > len(ours) - 8  # headers may be older than a few calls
    assert checked == {name: known[name] for name in checked}


def test_a_machine_without_a_table_is_refused():
    with pytest.raises(InputError, match=r"no system call filter for 'ppc64le'.*x86_64, aarch64"):
        filter_program(machine="ppc64le")


def test_the_filter_fits_the_kernel_and_the_pipe_that_carries_it():
    assert len(filter_program(True, True)) // 8 < 4096  # BPF_MAXINSNS of linux/bpf_common.h
