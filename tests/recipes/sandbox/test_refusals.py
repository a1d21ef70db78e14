"""What a program must not do: each attempt fails inside, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.sandbox.sandbox import Sandbox
from tests.helpers.sandboxes import open_sandbox, run

pytestmark = pytest.mark.slow

SHARED = "import multiprocessing.shared_memory as shared; shared.SharedMemory(None, True, 9)"
REFUSED = {
    "a socket": "import socket; socket.socket()",
    "a local socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a connection": "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "datagrams of a pair": "import socket; socket.socketpair(type=socket.SOCK_DGRAM)",
    "users of the machine": "open('/etc/passwd').read()",
    "a list of files": "os.listdir('/')",
    "another's environment": "open(f'/proc/{os.getppid()}/environ').read()",
    "its own environment": "open('/proc/self/environ').read()",
    "a file beside its folder": "open('../x', 'w')",
    "a file of the system": "open('/usr/x', 'w')",
    "the source of this module": "open(FILE).read()",
    "a link to a file": "os.symlink('/etc/passwd', 'link'); open('link').read()",
    "a link to write by": "os.symlink('/tmp', 'link'); open('link/sandbox_x', 'w')",
    "a hard link": "os.link(FILE, 'mine'); open('mine').read()",
    "moving its folder": "os.rename(os.getcwd(), '../elsewhere')",
    "deleting its folder": "os.rmdir(os.getcwd())",
    "a folder out of it": "os.mkdir('d'); os.rename('d', '../d')",
    "a mode": "os.chmod(FILE, 0)",
    "an owner": "os.chown(FILE, 1, 1)",
    "times": "os.utime(FILE)",
    "emptying a file": "os.truncate(FILE, 0)",
    "emptying a file that it may read": "os.open(os.__file__, os.O_RDONLY | os.O_TRUNC)",
    "a device": "import stat; os.mknod('d', stat.S_IFBLK)",
    "a process": "os.fork()",
    "a command": "import subprocess; subprocess.run(['true'])",
    "becoming another program": "os.execv('/usr/bin/true', ['true'])",
    "a session": "os.setsid()",
    "a group": "os.setpgid(0, os.getpgid(os.getppid()))",
    "its parent's life": "os.kill(os.getppid(), 9)",
    "all lives": "os.kill(-1, 9)",
    "its group's lives": "os.kill(0, 9)",
    "a run's life": "os.kill(RUN, 9)",
    "a handle of a process": "os.pidfd_open(RUN)",
    "a signal by a file": "import fcntl; r, w = os.pipe(); fcntl.fcntl(r, 8, RUN)",
    "limits of another": "import resource; resource.prlimit(RUN, resource.RLIMIT_CPU, (1, 1))",
    "higher limits": "import resource; resource.setrlimit(resource.RLIMIT_CPU, (9999, 9999))",
    "a priority": "os.setpriority(os.PRIO_PROCESS, RUN, 19)",
    "cores of another": "os.sched_setaffinity(RUN, {0})",
    "another user": "os.setuid(65534)",
    "shared memory": SHARED,
    "memory in a file": "os.memfd_create('x')",
    "another root": "os.chroot('.')",
    "the name of the machine": "import socket; socket.sethostname('x')",
}
OTHER_ERRORS = {
    # Of another file system, the kernel says so first.
    "a hard link": ("PermissionError", "OSError"),
    "higher limits": ("ValueError",),
}
BY_NUMBER = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "mount": (165, 40),
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "kexec_load": (246, 104),
    "perf_event_open": (298, 241),
    "prctl(PR_SET_PDEATHSIG)": (157, 167),
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    made = open_sandbox()
    yield made
    made.close()


def told(code: str) -> str:
    """A program that says how the code failed."""
    values = f"import os\nFILE, RUN = {__file__!r}, {os.getpid()}\n"
    refused = "except (OSError, ValueError) as e:\n    print(type(e).__name__)"
    return f"{values}try:\n    exec({code!r})\n{refused}"


@pytest.mark.parametrize("attempt", REFUSED)
def test_an_attempt_is_refused(sandbox: Sandbox, attempt: str) -> None:
    before = Path(__file__).stat()
    outcome = run(sandbox, told(REFUSED[attempt]))
    assert outcome.stdout.strip() in OTHER_ERRORS.get(attempt, ("PermissionError",))
    assert outcome.stderr == ""
    after = Path(__file__).stat()
    assert (before.st_mode, before.st_mtime, before.st_size) == (
        after.st_mode,
        after.st_mtime,
        after.st_size,
    )


@pytest.mark.parametrize("name", BY_NUMBER)
def test_a_call_without_a_python_name_is_refused(sandbox: Sandbox, name: str) -> None:
    number = BY_NUMBER[name][os.uname().machine != "x86_64"]
    outcome = run(
        sandbox,
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        f"print(c.syscall({number}, 1, 0, 0, 0, 0), ctypes.get_errno())",
    )
    assert outcome.stdout == "-1 1\n"


@pytest.mark.parametrize("name,number", [("openat2", 437), ("clone3", 435), ("a later one", 900)])
def test_a_call_that_is_in_no_table_is_not_there(sandbox: Sandbox, name: str, number: int) -> None:
    outcome = run(
        sandbox,
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        f"print(c.syscall({number}, 0, 0, 0, 0), ctypes.get_errno())",
    )
    assert outcome.stdout == "-1 38\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x32 is an ABI of x86_64")
def test_calls_of_another_abi_end_the_program(sandbox: Sandbox) -> None:
    outcome = run(
        sandbox, "import ctypes; ctypes.CDLL(None).syscall(ctypes.c_long(0x40000000 + 39))"
    )
    assert (outcome.ended, outcome.code) == ("signal", 31)


def test_root_keeps_no_capability(sandbox: Sandbox) -> None:
    code = """
import ctypes, struct
libc, data = ctypes.CDLL(None), ctypes.create_string_buffer(24)
libc.syscall(NUMBER, struct.pack("=Ii", 0x20080522, 0), data)
print(data.raw == bytes(24))
"""
    number = 125 if os.uname().machine == "x86_64" else 90
    outcome = run(sandbox, code.replace("NUMBER", str(number)))
    assert outcome.stdout == "True\n" or "ENOSYS" in outcome.stderr


def test_usual_programs_run(sandbox: Sandbox) -> None:
    code = """
import asyncio, collections, dataclasses, decimal, functools, itertools, json, pickle, random
import re, statistics, tempfile, threading, time
@dataclasses.dataclass
class Point:
    x: int
print(pickle.loads(pickle.dumps(Point(3))), __name__)
async def wait():
    await asyncio.sleep(0.001)
    return await asyncio.to_thread(lambda: 5)
print(asyncio.run(wait()))
with tempfile.TemporaryDirectory() as folder:
    with open(folder + "/a", "w") as file:
        file.write("é")
    print(open(folder + "/a").read())
done = []
threads = [threading.Thread(target=done.append, args=(i,)) for i in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
print(sorted(done), input(), input())
"""
    outcome = run(sandbox, code, stdin="one\ntwo\n")
    assert outcome.stdout == "Point(x=3) __main__\n5\né\n[0, 1, 2, 3] one two\n"
    assert outcome.finished and outcome.stderr == ""


def test_numpy_runs(sandbox: Sandbox) -> None:
    outcome = run(sandbox, "import numpy as np; print(int((np.eye(50) @ np.ones(50)).sum()))")
    assert outcome.stdout == "50\n"


def test_a_program_sees_nothing_of_the_run(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_TEST_SECRET", "hidden")
    made = open_sandbox()
    outcome = run(made, "import os; print(*sorted(os.environ))")
    made.close()
    assert outcome.stdout == "HOME LANG OMP_NUM_THREADS OPENBLAS_NUM_THREADS PATH TMPDIR\n"
    outcome = run(sandbox, "import os, sys; print(os.environ['HOME'] == os.getcwd(), sys.argv)")
    assert outcome.stdout == "True ['program.py']\n"
    # Nor files that are open in the supervisor.
    outcome = run(sandbox, "import os\nfor n in range(5, 32):\n os.fstat(n)")
    assert "Bad file descriptor" in outcome.stderr


def test_programs_see_nothing_of_each_other(sandbox: Sandbox) -> None:
    run(sandbox, "import builtins; builtins.mine = 1; open('left', 'w').write('x')")
    outcome = run(sandbox, "import os; print(os.listdir()); mine")
    assert outcome.stdout == "[]\n" and "NameError" in outcome.stderr


def test_a_supervisor_whose_run_is_killed_takes_its_program_along(tmp_path: Path) -> None:
    open_sandbox().close()
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import asyncio, os, threading
from recipes.sandbox.program import Program
from tests.helpers.sandboxes import open_sandbox, pids
sandbox = open_sandbox()
def kill():
    children = ""
    while not children:
        children = open(f"/proc/{{pids(sandbox)[0]}}/task/{{pids(sandbox)[0]}}/children").read()
    open({str(tmp_path / "pid")!r}, "w").write(children)
    os.kill(os.getpid(), 9)
threading.Thread(target=kill).start()
asyncio.run(sandbox.run(Program(code="import time; time.sleep(1000)")))
"""
    environment = {**os.environ, "TMPDIR": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], env=environment
    )
    assert done.returncode == -9
    pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{pid}").exists() or list(home.iterdir()):
        time.sleep(0.01)
