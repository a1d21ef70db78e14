"""Landlock: which files a program may open, and whom it may signal.

https://docs.kernel.org/userspace-api/landlock.html. It binds root too, needs no privilege, and
holds for good. What it does not guard (modes, owners and times of files, signals before its ABI 6)
the filter of system calls refuses.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
import sysconfig
from pathlib import Path

CREATE, ADD_RULE, RESTRICT = 444, 445, 446
VERSION_FLAG, PATH_BENEATH = 1, 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
MAKE_CHAR, MAKE_SOCK, MAKE_FIFO, MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 10, 1 << 11
IOCTL_DEV = 1 << 15
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Rights of files that an ABI knows: so many bits, the last row for later ones too."""
TCP = 0b11
SCOPES = 0b11
FIRST_TCP_ABI, FIRST_SCOPE_ABI = 4, 6

READ_ONLY_DEVICES = ("/dev/urandom", "/dev/random", "/dev/zero")
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/lib32", "/libx32")
# Where the dynamic linker finds libraries by name.
SYSTEM_FILES = ("/etc/ld.so.cache",)


def abi(libc: ctypes.CDLL) -> int:
    """The version that the running kernel offers, 0 for none."""
    found = libc.syscall(CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(VERSION_FLAG))
    return max(int(found), 0)


def readable_places() -> tuple[str, ...]:
    """What a Python program has to read: the system's libraries, and those of this interpreter,
    which may lie elsewhere, in a virtual environment."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    libraries = [sysconfig.get_path(name) for name in names]
    libraries += [str(Path(sys.base_prefix, "lib"))]
    places = [*SYSTEM_FOLDERS, *SYSTEM_FILES, *READ_ONLY_DEVICES, *libraries]
    return tuple(dict.fromkeys(os.path.realpath(p) for p in places if os.path.exists(p)))


class Ruleset:
    """What may be opened. version: see `abi`, above 0. Raises OSError where the kernel refuses."""

    def __init__(self, version: int, libc: ctypes.CDLL) -> None:
        self._libc = libc
        self._rights = (1 << FILE_RIGHTS[min(version, max(FILE_RIGHTS))]) - 1
        attributes = struct.pack("=Q", self._rights)
        if version >= FIRST_TCP_ABI:
            attributes += struct.pack("=Q", TCP)
        if version >= FIRST_SCOPE_ABI:
            attributes += struct.pack("=Q", SCOPES)
        self._fd = self._call(CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)

    def read(self, path: str) -> None:
        """Allow to read a file, or a folder with all in it."""
        self._allow(path, READ_FILE | READ_DIR)

    def write(self, path: str) -> None:
        """Allow everything in a folder but to run, and to make devices, sockets and pipes; of a
        file, to read and write it."""
        kept_out = EXECUTE | MAKE_CHAR | MAKE_BLOCK | MAKE_SOCK | MAKE_FIFO | IOCTL_DEV
        self._allow(path, self._rights & ~kept_out)

    def enforce(self) -> None:
        """Bind this thread and those it starts, for good. Needs no_new_privs."""
        self._call(RESTRICT, self._fd, 0)
        os.close(self._fd)

    def _allow(self, path: str, rights: int) -> None:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                rights &= READ_FILE | WRITE_FILE
            rule = struct.pack("=Qi", rights, fd)
            self._call(ADD_RULE, self._fd, PATH_BENEATH, rule, 0)
        finally:
            os.close(fd)

    def _call(self, number: int, *arguments: object) -> int:
        result = int(self._libc.syscall(number, *arguments))
        if result < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"Landlock: {os.strerror(code)}")
        return result
