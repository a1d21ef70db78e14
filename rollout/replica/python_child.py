"""Python processes that this one starts: they find the modules that it finds, and no others."""

from __future__ import annotations

import os
import sys


def child_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs `module` in a process with `child_environment`.

    -P: the folder that a user stands in, which Python would search first, may have an `engine` of
    its own.
    """
    return [sys.executable, "-P", "-m", module, *arguments]


def child_environment(**unless_set: str) -> dict[str, str]:
    """This process's environment, with its search path as PYTHONPATH and `unless_set` where the
    environment has no such variable."""
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    return {**unless_set, **os.environ, "PYTHONPATH": path}
