"""Locks and small files on the disk."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gpt2ml_torch import disk


def test_a_lock_is_refused_at_once_or_when_patience_ends(tmp_path: Path) -> None:
    held = disk.lock(tmp_path / "a.lock", "busy")
    for patience in (0, 0.1):
        with pytest.raises(OSError, match="busy"):
            disk.lock(tmp_path / "a.lock", "busy", patience=patience)
    disk.unlock(held)
    assert not (tmp_path / "a.lock").exists()


def test_a_lock_is_waited_for_with_patience(tmp_path: Path) -> None:
    held = disk.lock(tmp_path / "a.lock", "busy")
    timer = threading.Timer(0.2, disk.unlock, [held])
    timer.start()
    disk.unlock(disk.lock(tmp_path / "a.lock", "busy", patience=30))
    assert not held.is_locked
    timer.join()


def test_a_synced_text_file_keeps_its_line_ends(tmp_path: Path) -> None:
    disk.write_synced(tmp_path / "a.txt", "一\r\n二\n")
    assert (tmp_path / "a.txt").read_bytes() == "一\r\n二\n".encode()
