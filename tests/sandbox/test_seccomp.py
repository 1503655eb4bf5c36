"""The filter of system calls, run by an interpreter of classic BPF written for this test."""

import errno
import re
import struct
from pathlib import Path

import pytest

from posttrain.sandbox.contained import seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}


def decision(machine: str, number: int, first: int = 0, fourth: int = 0, architecture: int | None = None) -> int:
    """What the filter returns for a call; positive numbers of errors as such."""
    code = seccomp.program(machine)
    steps = [struct.unpack_from("HBBI", code, place) for place in range(0, len(code), 8)]
    data = struct.pack(
        "<IIQ6Q", number, ARCHITECTURES[machine] if architecture is None else architecture, 0, first, 0, 0, fourth, 0, 0
    )
    place, accumulator = 0, 0
    while True:
        what, if_true, if_false, value = steps[place]
        place += 1
        match what:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, value)
            case 0x06:
                return value & 0xFFFF if value >> 16 == 5 else value
            case 0x15:
                place += if_true if accumulator == value else if_false
            case 0x35:
                place += if_true if accumulator >= value else if_false
            case 0x45:
                place += if_true if accumulator & value else if_false
            case _:
                raise AssertionError(what)


@pytest.mark.parametrize(("machine", "read", "clone", "socket", "unshare", "ptrace", "mmap"), [
    ("x86_64", 0, 56, 41, 272, 101, 9), ("aarch64", 63, 220, 198, 97, 117, 222),
])  # fmt: skip
def test_decisions(machine: str, read: int, clone: int, socket: int, unshare: int, ptrace: int, mmap: int) -> None:
    assert decision(machine, read) == ALLOW
    assert decision(machine, unshare) == decision(machine, ptrace) == errno.EPERM
    assert decision(machine, 435) == errno.ENOSYS  # clone3
    assert decision(machine, clone, 0x01200011) == ALLOW  # fork of the C library
    assert decision(machine, clone, 0x003D0F00) == ALLOW  # a thread
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert decision(machine, clone, 0x11 | flag) == errno.EPERM
    assert [decision(machine, socket, family) for family in (1, 2, 10, 16)] == [ALLOW] * 4
    assert {decision(machine, socket, family) for family in (0, 3, 17, 38, 40, 44)} == {errno.EAFNOSUPPORT}
    shared, private, validated, anonymous = 0x01, 0x02, 0x03, 0x20
    assert [decision(machine, mmap, 0, flags) for flags in (shared, private, private | anonymous)] == [ALLOW] * 3
    assert {decision(machine, mmap, 0, flags | anonymous) for flags in (shared, validated)} == {errno.EPERM}
    assert decision(machine, read, 0, shared | anonymous) == ALLOW
    assert decision(machine, read, architecture=0x40000003) == KILL  # 32-bit calls
    assert decision(machine, read | 0x40000000) == KILL  # x32


def test_numbers_are_those_of_the_kernels_headers() -> None:
    headers = [Path(f"/usr/include/{below}/unistd_64.h") for below in ("asm", "x86_64-linux-gnu/asm")]
    found = next((path for path in headers if path.exists()), None)
    if found is None or "__NR_arch_prctl" not in found.read_text():
        pytest.skip("no header of x86_64's system calls")
    numbers = {name: int(value) for name, value in re.findall(r"#define __NR_(\w+) (\d+)", found.read_text())}
    known = {name: pair[0] for name, pair in seccomp._REFUSED.items() if name in numbers}
    assert len(known) > 40
    assert known == {name: numbers[name] for name in known}


def test_numbers_of_aarch64_are_those_of_the_generic_table() -> None:
    found = Path("/usr/include/asm-generic/unistd.h")
    if not found.exists():
        pytest.skip("no generic header of system calls")
    numbers = {name: int(value) for name, value in re.findall(r"#define __NR3?2?6?4?_?(\w+) (\d+)", found.read_text())}
    known = {name: pair[1] for name, pair in seccomp._REFUSED.items() if name in numbers}
    assert len(known) > 40
    assert known == {name: numbers[name] for name in known}
