"""What this kernel offers to confine a process, and the calls of it that need no table."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

from recipes.sandbox import landlock
from recipes.sandbox.seccomp import MODE_FILTER, PR_SET_SECCOMP
from recipes.sandbox.syscalls import architecture

PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
PR_CAP_AMBIENT, CLEAR_AMBIENT = 47, 4
CAPABILITY_VERSION = 0x20080522
MOST_CAPABILITIES = 64


@dataclass(frozen=True, kw_only=True)
class SandboxReport:
    """What confines a program on this machine.

    landlock: its ABI, 0 for none. seccomp: whether the filter of system calls is there. leaks: what
    a first program could do that none should, by name.
    """

    system: str
    landlock: int
    seccomp: bool
    leaks: tuple[str, ...] = ()

    @property
    def missing(self) -> tuple[str, ...]:
        """What is not there, in words; empty if a program can do no harm."""
        found = []
        if not self.landlock:
            found.append("Landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK, landlock in lsm=)")
        if not self.seccomp:
            found.append("seccomp filters (Linux on x86_64 or aarch64, CONFIG_SECCOMP_FILTER)")
        if not found:
            found += [f"a refusal of {leak}" for leak in self.leaks]
        return tuple(found)

    def __str__(self) -> str:
        abi = f"Landlock ABI {self.landlock}" if self.landlock else "no Landlock"
        filters = "seccomp filters" if self.seccomp else "no seccomp filters"
        return f"{self.system}: {abi}, {filters}"


def load_libc() -> ctypes.CDLL:
    """The C library of this process, its errno kept."""
    return ctypes.CDLL(None, use_errno=True)


def probe(libc: ctypes.CDLL) -> SandboxReport:
    """What the kernel says that it has. Changes nothing."""
    uname = os.uname()
    system = f"{uname.sysname} {uname.release} {uname.machine}"
    known = architecture(uname.machine) is not None
    return SandboxReport(
        system=system,
        landlock=landlock.abi(libc) if known else 0,
        seccomp=known and _takes_filters(libc),
    )


def _takes_filters(libc: ctypes.CDLL) -> bool:
    """A kernel that has them looks for the filter, which is nowhere."""
    refused = libc.prctl(PR_SET_SECCOMP, MODE_FILTER, None, 0, 0) != 0
    return refused and ctypes.get_errno() == errno.EFAULT


def die_with_parent(libc: ctypes.CDLL, parent: int, signal_number: int) -> None:
    """Get the signal when the parent dies. Raises ProcessLookupError if it is dead."""
    _prctl(libc, PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        raise ProcessLookupError(errno.ESRCH, "the supervisor is gone")


def drop_privileges(libc: ctypes.CDLL) -> None:
    """Give up every capability, for good: root keeps its files and nothing else."""
    for capability in range(MOST_CAPABILITIES):
        # Fails beyond the last one, and for all where this process may not; it has none then.
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    libc.prctl(PR_CAP_AMBIENT, CLEAR_AMBIENT, 0, 0, 0)
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    if libc.capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "capset: capabilities cannot be given up")
    _prctl(libc, PR_SET_NO_NEW_PRIVS, 1)


def _prctl(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {option}: {os.strerror(code)}")
