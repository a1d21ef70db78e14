"""The folder of a program: measured, and removed whatever is in it."""

from __future__ import annotations

import os
from pathlib import Path

from recipes.sandbox.folders import remove, usage


def test_usage_counts_bytes_on_disk_and_entries(tmp_path: Path) -> None:
    assert usage(str(tmp_path), 10) == (0, 0)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_bytes(bytes(1 << 16))
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 30)
    (tmp_path / "loop").symlink_to(tmp_path)
    num_bytes, num_entries = usage(str(tmp_path), 10)
    assert (1 << 16) <= num_bytes < 1 << 20 and num_entries == 4
    assert usage(str(tmp_path), 2)[1] == 3
    assert usage(str(tmp_path / "none"), 2) == (0, 0)


def test_a_hostile_folder_is_removed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "a").write_text("x")
    folder = tmp_path / "program"
    folder.mkdir()
    here = os.open(folder, os.O_RDONLY)
    os.symlink(kept, "link", dir_fd=here)
    os.mkdir("closed", 0, dir_fd=here)
    # Longer than any path may be.
    for _ in range(60):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    remove(str(folder))
    assert os.listdir(tmp_path) == ["kept"] and (kept / "a").read_text() == "x"
