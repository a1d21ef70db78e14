"""The filter of system calls: classic BPF, built as data and installed by prctl.

A call of another architecture, or of the x32 ABI, ends the process: its numbers would mean other
calls. What `syscalls.py` refuses fails with EPERM, so that a program sees a plain PermissionError
where it looks for one; the rest of what is not allowed fails with ENOSYS.

Conditions look at the low 32 bits of an argument, which are all that the kernel reads of an int.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from recipes.sandbox.syscalls import X32_BIT, Architecture

LOAD, AND, JUMP, IF_EQUAL, IF_AT_LEAST, RETURN = 0x20, 0x54, 0x05, 0x15, 0x35, 0x06
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
REFUSE = ERRNO | errno.EPERM
ABSENT = ERRNO | errno.ENOSYS

PR_SET_SECCOMP, MODE_FILTER = 22, 2

CLONE_THREAD, CLONE_NEW_ANY = 0x00010000, 0x7E020000
TRUNCATES, ACCESS_MODE = 0o1000, 0o3
UNIX_SOCKET, STREAM, SOCKET_TYPE = 1, 1, 0xF
# Duplicates, flags, locks and sizes of pipes: not the owner that gets a signal, nor which.
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032)
# Is it a terminal, how wide, how much is there to read, close on exec, do not block.
IOCTL = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5450, 0x5451, 0x5421)
# The name of a thread and of a mapping.
PRCTL = (15, 16, 0x53564D41)

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """An argument, masked, is one of the values; with `negated`, none of them."""

    argument: int
    values: tuple[int, ...]
    mask: int = 0xFFFFFFFF
    negated: bool = False
    high: bool = False


def conditions(process: int) -> Mapping[str, tuple[Condition, ...]]:
    """Of calls that are allowed in part. process: the one that is confined, which may signal
    itself alone."""

    def within(argument: int, *values: int) -> Condition:
        return Condition(argument=argument, values=values)

    def opens(argument: int) -> tuple[Condition, ...]:
        # Old Landlock guards no truncation, so a file is truncated only where it may be written.
        return (
            Condition(
                argument=argument,
                mask=TRUNCATES | ACCESS_MODE,
                values=(TRUNCATES, TRUNCATES | ACCESS_MODE),
                negated=True,
            ),
        )

    return {
        "clone": (
            Condition(argument=0, mask=CLONE_THREAD | CLONE_NEW_ANY, values=(CLONE_THREAD,)),
        ),
        "kill": (within(0, process),),
        "tgkill": (within(0, process),),
        "prlimit64": (within(0, 0, process),),
        "prctl": (within(0, *PRCTL),),
        "fcntl": (within(1, *FCNTL),),
        "ioctl": (within(1, *IOCTL),),
        "open": opens(1),
        "openat": opens(2),
        # An event loop wakes itself by a pair of sockets; a stream reaches nobody else.
        "socketpair": (
            within(0, UNIX_SOCKET),
            Condition(argument=1, mask=SOCKET_TYPE, values=(STREAM,)),
        ),
        "sendto": (within(4, 0), Condition(argument=4, values=(0,), high=True)),
    }


def build(machine: Architecture, process: int) -> bytes:
    """The filter's program for one process."""
    limited = conditions(process)
    program = [_load(4), (IF_EQUAL, 1, 0, machine.audit), _return(KILL), _load(0)]
    if machine.x32:
        program += [(IF_AT_LEAST, 0, 1, X32_BIT), _return(KILL)]
    free = [number for name, number in machine.calls.items() if name not in limited]
    program += _one_of(free, ALLOW)
    for name, wanted in limited.items():
        if name in machine.calls:
            body = [step for condition in wanted for step in _check(condition)]
            body.append(_return(ALLOW))
            program += [(IF_EQUAL, 0, len(body), machine.calls[name]), *body]
    program += [*_one_of(list(machine.refused.values()), REFUSE), _return(ABSENT)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def install(program: bytes, libc: ctypes.CDLL) -> None:
    """Filter the calls of this thread and of those it starts, for good. Needs no_new_privs.

    Raises OSError if the kernel takes no filter.
    """
    code = ctypes.create_string_buffer(program, len(program))
    length = len(program) // 8
    header = ctypes.create_string_buffer(
        struct.pack("@HxxxxxxP", length, ctypes.addressof(code)), 16
    )
    if libc.prctl(PR_SET_SECCOMP, MODE_FILTER, header, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _load(offset: int) -> Instruction:
    return (LOAD, 0, 0, offset)


def _return(action: int) -> Instruction:
    return (RETURN, 0, 0, action)


def _one_of(values: Sequence[int], action: int) -> list[Instruction]:
    """Return the action if the accumulator is one of the values, else go on. A jump reaches 255
    instructions."""
    program: list[Instruction] = []
    for start in range(0, len(values), 200):
        part = values[start : start + 200]
        program += [(IF_EQUAL, len(part) - index, 0, value) for index, value in enumerate(part)]
        program += [(JUMP, 0, 0, 1), _return(action)]
    return program


def _check(condition: Condition) -> list[Instruction]:
    """Refuse unless the condition holds, else go on."""
    load = _load(16 + 8 * condition.argument + 4 * condition.high)
    masked = [load, (AND, 0, 0, condition.mask)]
    if condition.negated:
        return masked + _one_of(condition.values, REFUSE)
    num = len(condition.values)
    tests = [(IF_EQUAL, num - index, 0, value) for index, value in enumerate(condition.values)]
    return [*masked, *tests, _return(REFUSE)]
