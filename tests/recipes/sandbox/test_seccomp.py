"""The filter of system calls, run by a small interpreter of classic BPF for both architectures."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from recipes.sandbox.seccomp import ABSENT, ALLOW, KILL, REFUSE, build
from recipes.sandbox.syscalls import ALLOWED, REFUSED, X32_BIT, Architecture, architecture

HEADERS = {
    "x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "aarch64": "/usr/include/asm-generic/unistd.h",
}
PROCESS = 4321


def machine(name: str) -> Architecture:
    found = architecture(name)
    assert found is not None
    return found


def answer(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """What the kernel would do with a call."""
    data = struct.pack("<iIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    steps = list(struct.iter_unpack("<HBBI", program))
    accumulator, position = 0, 0
    while True:
        code, yes, no, operand = steps[position]
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, operand)
        elif code == 0x54:
            accumulator &= operand
        elif code == 0x05:
            position += operand
        elif code == 0x06:
            return int(operand)
        else:
            holds = accumulator == operand if code == 0x15 else accumulator >= operand
            position += yes if holds else no


@pytest.mark.parametrize("name", HEADERS)
def test_every_call_of_the_tables_gets_its_answer(name: str) -> None:
    here = machine(name)
    program = build(here, PROCESS)
    assert len(program) // 8 < 4096
    for number in here.refused.values():
        assert answer(program, here.audit, number) == REFUSE
    free = ("read", "write", "openat", "mmap", "futex", "exit_group", "prlimit64", "sendto")
    for call in free:
        assert answer(program, here.audit, here.calls[call]) == ALLOW
    known = {*here.calls.values(), *here.refused.values()}
    for number in set(range(500)) - known:
        assert answer(program, here.audit, number) == ABSENT
    assert answer(program, here.audit ^ 1, here.calls["read"]) == KILL
    if here.x32:
        assert answer(program, here.audit, X32_BIT + here.calls["read"]) == KILL


@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize(
    "call,arguments,allowed",
    [
        ("clone", (0x003D0F00,), True),
        ("clone", (0x01200011,), False),
        ("clone", (0x00010000 | 0x10000000,), False),
        ("kill", (PROCESS, 9), True),
        ("kill", (PROCESS | 1 << 32, 9), True),
        ("kill", (0xFFFFFFFF, 9), False),
        ("kill", (0, 9), False),
        ("tgkill", (PROCESS, 7, 9), True),
        ("tgkill", (1, 1, 9), False),
        ("prlimit64", (PROCESS,), True),
        ("prlimit64", (1,), False),
        ("fcntl", (3, 2), True),
        ("fcntl", (3, 8), False),
        ("fcntl", (3, 10), False),
        ("ioctl", (0, 0x5401), True),
        ("ioctl", (0, 0x5412), False),
        ("openat", (0, 0, 0o1001), True),
        ("openat", (0, 0, 0o1000), False),
        ("openat", (0, 0, 0o1003), False),
        ("socketpair", (1, 1 | 0o2000000), True),
        ("socketpair", (1, 2), False),
        ("socketpair", (2, 1), False),
        ("sendto", (3, 0, 0, 0, 0), True),
        ("sendto", (3, 0, 0, 0, 1 << 32), False),
        ("prctl", (15,), True),
        ("prctl", (1,), False),
    ],
)
def test_arguments_decide(name: str, call: str, arguments: tuple[int, ...], allowed: bool) -> None:
    here = machine(name)
    found = answer(build(here, PROCESS), here.audit, here.calls[call], *arguments)
    assert found == (ALLOW if allowed else REFUSE)


@pytest.mark.parametrize("name", HEADERS)
def test_numbers_are_those_of_the_kernel(name: str) -> None:
    header = Path(HEADERS[name])
    if not header.exists():
        pytest.skip(f"{header} is not there")
    found = re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", header.read_text())
    numbers = {call: int(number) for call, number in found}
    numbers["newfstatat"] = numbers.get("newfstatat", numbers.get("fstatat", 0))
    here = machine(name)
    for call, number in {**here.calls, **here.refused}.items():
        assert numbers.get(call, number) == number, call


def test_no_call_is_in_both_tables() -> None:
    allowed, refused = ({entry.split(":")[0] for entry in t.split()} for t in (ALLOWED, REFUSED))
    assert allowed & refused == set()
    for name in HEADERS:
        here = machine(name)
        assert set(here.calls.values()) & set(here.refused.values()) == set()
    assert architecture("riscv64") is None
