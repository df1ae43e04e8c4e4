"""Whatever is wrong with the input: one line on stderr, exit status 2, and no file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from convert.__main__ import main
from tests.helpers import checkpoint_factory as factory

# They register their cases when imported.
from tests.helpers import (  # noqa: F401
    damages_beside,
    damages_bin,
    damages_checkpoint,
    damages_foreign,
)
from tests.helpers.damages import CASES, DATA, INDEX, flip, truncate


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factory.write_folder(tmp_path_factory.mktemp("sound") / "ckpt")


@pytest.fixture
def folder(sound_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_folder, tmp_path / "ckpt"))


def run(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    try:
        status = main(arguments)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    captured = capfd.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_one_line(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    damage, expected = CASES[name]
    arguments = damage(folder) or [str(folder)]
    out = folder.parent / "out.safetensors"
    status, stdout, stderr = run([*arguments, str(out)], capfd)
    assert status == 2
    assert re.search(expected, stderr)
    assert_one_line(stderr)
    assert stdout == ""
    assert [path.name for path in folder.parent.iterdir()] == ["ckpt"], "left a file behind"
    assert not (folder / "ran").exists()


def assert_one_line(stderr: str) -> None:
    assert stderr.startswith("convert: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    assert stderr.removesuffix("\n").isprintable()
    assert "Traceback" not in stderr


def test_there_are_more_than_fifty_of_them() -> None:
    assert len(CASES) > 50


# The output.


def out_exists(folder: Path) -> Path:
    (folder / "out.safetensors").write_text("precious")
    return folder / "out.safetensors"


@pytest.mark.parametrize(
    ("make_out", "expected"),
    [
        (out_exists, "exists already; give another name, or --force to"),
        (lambda folder: folder, "it is a folder"),
        (lambda folder: folder / "no" / "out.safetensors", "does not exist; create it first"),
        (lambda folder: folder / "vocab.txt" / "out", "is not a folder"),
        (lambda folder: folder / DATA, "is the source itself|exists already"),
        (lambda folder: folder / ("x" * 300), "File name too long"),
        (lambda folder: Path("/dev/full"), "not a regular file"),
    ],
)
def test_an_impossible_output_is_one_line(
    make_out: Callable[[Path], Path],
    expected: str,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = make_out(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    status, _, stderr = run([str(folder), str(out)], capfd)
    assert status == 2
    assert re.search(expected, stderr)
    assert_one_line(stderr)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("name", [DATA, INDEX, "config.json", "vocab.txt"])
def test_force_does_not_overwrite_the_source_itself(
    name: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (folder / name).read_bytes()
    status, _, stderr = run([str(folder), str(folder / name), "--force"], capfd)
    assert status == 2
    assert stderr.endswith("is the source itself; give another name\n")
    assert (folder / name).read_bytes() == before


@pytest.mark.parametrize("obstacle", [os.mkfifo, os.mkdir])
def test_what_stands_where_the_unfinished_file_goes_is_left_alone(
    obstacle: Callable[[Path], None], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    partial = folder.parent / "out.partial"
    obstacle(partial)
    status, _, stderr = run([str(folder), str(folder.parent / "out")], capfd)
    assert status == 2
    assert re.search(r"out\.partial: (it is in the way; remove it|Is a directory)", stderr)
    assert_one_line(stderr)
    assert partial.exists()


def test_a_full_disk_is_one_line(folder: Path) -> None:
    """A limit on the size of files stands for the disk."""
    limited = f"ulimit -f 100; exec {sys.executable} -m convert {folder} {folder.parent}/out"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "writing" in done.stderr
    assert "failed" in done.stderr
    assert_one_line(done.stderr)
    assert [path.name for path in folder.parent.iterdir()] == ["ckpt"]


def test_a_process_of_its_own_says_no_more_than_that_line(folder: Path) -> None:
    flip(folder / DATA, 8 + 5)
    done = subprocess.run(
        [sys.executable, "-m", "convert", folder, folder / "out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert_one_line(done.stderr)


def truncated(path: Path) -> Path:
    truncate(path, path.stat().st_size - 1)
    return path


@pytest.mark.parametrize(
    ("damage", "target", "expected"),
    [
        (lambda path: path.with_name("nowhere"), "new", "can't read the model file"),
        (lambda path: path.parent.parent, "new", "is a folder without a model file"),
        (truncated, "new", "truncated: found"),
        (lambda path: path.with_name("vocab.txt"), "new", "is text .*, not a model file"),
        (lambda path: path, "ckpt/vocab.txt", "is a file; expected the name of a folder"),
        (lambda path: path, "no/new", "does not exist; create it first"),
        (lambda path: path, "ckpt", "already; --force overwrites it"),
    ],
)
def test_a_bad_file_does_not_go_back(
    damage: Callable[[Path], Path],
    target: str,
    expected: str,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = folder / "model.safetensors"
    assert run([str(folder), str(path)], capfd)[0] == 0
    source = damage(path)
    before = sorted(folder.parent.rglob("*"))
    status, _, stderr = run(["--to-tf", str(source), str(folder.parent / target)], capfd)
    assert status == 2
    assert re.search(expected, stderr)
    assert_one_line(stderr)
    assert sorted(folder.parent.rglob("*")) == before


def test_a_quantised_file_does_not_go_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = folder / "model.safetensors"
    assert run([str(folder), str(path), "--dtype", "int8"], capfd)[0] == 0
    status, _, stderr = run(["--to-tf", str(path), str(folder / "back")], capfd)
    assert status == 2
    assert "quantised (int8)" in stderr
    assert_one_line(stderr)
