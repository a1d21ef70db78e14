"""The Dockerfile and the unit of systemd, as far as they can be tried without either."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from rollout.http.config import ServeConfig
from tests.helpers.children import ROOT, child_environment

DOCKERFILE = ROOT / "deploy" / "Dockerfile"
UNIT = ROOT / "deploy" / "slipstream.service"
_FLAG = re.compile(r"--([a-z][a-z0-9-]+)")


def steps() -> list[tuple[str, str]]:
    """Instruction and arguments of every line of the Dockerfile, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def of(name: str) -> list[str]:
    return [rest for instruction, rest in steps() if instruction == name]


def tried(tmp_path: Path, *, installs: bool) -> Path:
    """Runs every COPY, and every RUN that needs no system of its own, in a folder that has nothing
    else; the environment that they make. installs: packages too, from the registry."""
    work, venv = tmp_path / "work", tmp_path / "venv"
    work.mkdir()
    values = {"PINS": "cpu", "EXTRAS": ""}
    for instruction, rest in steps():
        if instruction == "COPY":
            *sources, target = shlex.split(rest)
            for source in sources:
                place = work / target / Path(source).name if target.endswith("/") else work / target
                if target in (".", "./"):
                    place = work / source
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, place)
        elif instruction == "RUN" and "/opt/venv" in rest:
            command = re.sub(r"\$\{(\w+)\}", lambda m: values[m[1]], rest)
            command = command.replace("/opt/venv", str(venv)).replace("python3 ", "$PYTHON ")
            if not installs:
                make, _, _ = command.partition("&&")
                command = make.replace("-m venv", "-m venv --without-pip")
                command = command if "-m venv" in command else "true"
            subprocess.run(
                ["sh", "-ec", command],
                cwd=work,
                check=True,
                env={
                    k: v
                    for k, v in {**os.environ, "PYTHON": sys.executable}.items()
                    if k != "PYTHONPATH"
                },
            )
    return venv


@pytest.mark.slow
def test_what_is_copied_is_all_that_the_entry_point_needs(tmp_path: Path) -> None:
    """The steps in their order, with this environment's packages in place of the registry's."""
    venv = tried(tmp_path, installs=False)
    here = Path(sysconfig.get_paths()["purelib"])
    program, *arguments = eval(of("ENTRYPOINT")[0])
    assert program == "slipstream" and (venv / "bin" / "python").exists()
    done = subprocess.run(
        [venv / "bin" / "python", "-m", "rollout", *arguments, "--model", "nowhere"],
        cwd=tmp_path / "work",
        env=child_environment(here),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "nowhere" in done.stderr, done.stderr


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_every_step_from_the_registry(tmp_path: Path) -> None:
    venv = tried(tmp_path, installs=True)
    done = subprocess.run(
        [venv / "bin" / "slipstream", "serve", "--help"], cwd=tmp_path, check=True
    )
    assert done.returncode == 0
    subprocess.run([venv / "bin" / "python", "-m", "pip", "check"], check=True)


def test_the_image_is_pinned_and_runs_as_nobody_in_particular() -> None:
    bases = [rest.partition("=")[2] for rest in of("ARG") if rest.startswith("BASE=")]
    assert bases and all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)
    cuda = re.search(r"cuda:(\d+)\.", bases[0])
    assert cuda and cuda[1] == "13", "constraints/gpu.txt is for CUDA 13"
    instructions = [instruction for instruction, _ in steps()]
    assert instructions.index("USER") < instructions.index("ENTRYPOINT")
    assert of("USER") == ["slipstream"]
    installs = [rest for rest in of("RUN") if "pip install" in rest]
    assert len(installs) == 2 and all("--constraint constraints/" in rest for rest in installs)
    assert of("STOPSIGNAL") == ["SIGTERM"]


def test_every_package_of_the_project_is_copied() -> None:
    copied = {source for rest in of("COPY") for source in shlex.split(rest)[:-1]}
    include = re.search(r"include = \[([^]]+)\]", (ROOT / "pyproject.toml").read_text())
    assert include
    assert set(re.findall(r'"(\w+)\*"', include[1])) <= copied


def test_the_unit_is_one_for_systemd(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"/opt/venv/bin/slipstream", "/bin/true", UNIT.read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_units_and_images_give_requests_the_time_they_are_told() -> None:
    text = UNIT.read_text()
    drain = re.search(r"--drain-timeout-s (\d+)", text)
    stop = re.search(r"TimeoutStopSec=(\d+)", text)
    assert drain and stop and int(stop[1]) >= int(drain[1]) + 15
    fields = {name.replace("_", "-") for name in ServeConfig.__dataclass_fields__}
    command = " ".join(re.findall(r"^ExecStart=.*$", text, re.MULTILINE))
    assert set(_FLAG.findall(command)) <= fields
    assert set(_FLAG.findall(of("ENTRYPOINT")[0])) <= fields


def test_the_units_user_has_a_home_to_keep_kernels_in() -> None:
    text = UNIT.read_text()
    state = re.search(r"^StateDirectory=(.+)$", text, re.MULTILINE)
    home = re.search(r"^Environment=HOME=(.+)$", text, re.MULTILINE)
    assert state and home and home[1] == f"/var/lib/{state[1]}"


@pytest.mark.parametrize("path", [DOCKERFILE, UNIT], ids=lambda path: path.name)
def test_no_key_stands_on_a_command_line(path: Path) -> None:
    assert "api-key" not in path.read_text() and "SLIPSTREAM_ADMIN_API_KEY" in path.read_text()
