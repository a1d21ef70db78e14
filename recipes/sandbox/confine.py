"""A process gives up what a program must not have, in an order in which each step can be taken."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

from recipes.sandbox import seccomp
from recipes.sandbox.kernel import SandboxReport, die_with_parent, drop_privileges
from recipes.sandbox.landlock import Ruleset
from recipes.sandbox.program import Limits
from recipes.sandbox.syscalls import architecture


def confine(
    libc: ctypes.CDLL,
    report: SandboxReport,
    limits: Limits,
    *,
    folder: str,
    places: tuple[str, ...],
    parent: int,
) -> None:
    """Confine this process, of one thread, for good; the kernel's features are those of the report.

    folder: the one it may write. places: files and folders it may read. parent: dies with it.
    Raises OSError for a step that the kernel refuses.
    """
    _set_limits(limits, may_start_threads=report.seccomp)
    drop_privileges(libc)
    die_with_parent(libc, parent, signal.SIGKILL)
    if report.landlock:
        rules = Ruleset(report.landlock, libc)
        for place in places:
            rules.read(place)
        rules.write(folder)
        rules.write(os.devnull)
        rules.enforce()
    machine = architecture(os.uname().machine)
    if report.seccomp and machine is not None:
        seccomp.install(seccomp.build(machine, os.getpid()), libc)


def _set_limits(limits: Limits, *, may_start_threads: bool) -> None:
    wanted = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: limits.open_files,
        resource.RLIMIT_CORE: 0,
    }
    if not may_start_threads:
        # No filter tells a thread from a process. The kernel counts both together with all others
        # of the user, and none of root's.
        wanted[resource.RLIMIT_NPROC] = 0
    for kind, most in wanted.items():
        _lower(kind, most, most)
    # A second more for a program that ignores the signal at the first.
    _lower(resource.RLIMIT_CPU, limits.cpu_s, limits.cpu_s + 1)


def _lower(kind: int, soft: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    hard = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (min(soft, hard), hard))
