"""Compiles the kernels at run time, once for each machine, and keeps the result on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from gpt2ml_torch import disk
from gpt2ml_torch.cache import cache_root

FOLDER = Path(__file__).parent / "csrc"
SOURCES = tuple(sorted(FOLDER.glob("*.cpp"), key=lambda path: -path.stat().st_size))
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
TIMEOUT_SECONDS = 300
# Ctrl-C doesn't end a wait that it comes just before, or that another thread is told of.
_POLL_SECONDS = 0.1
# No contraction: a * b + c would otherwise round differently in differently unrolled loops.
FLAGS = ("-std=c++20", "-O2", "-mtune=native", "-ffp-contract=off", "-fPIC")

# The instruction sets that the kernels support, best last, under Linux's names for CPU features;
# features after "|" are optional.
LEVELS = {
    "avx2": "avx2 fma f16c | avx_vnni",
    "avx512": "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni | avx512_bf16",
}
_CHOICE = "GPT2ML_KERNELS"  # a level, or "off"
_SCRATCH = "build-"  # prefix of the folders of running builds
_SEAL_BYTES = hashlib.sha256().digest_size


def build(*, again: bool = False) -> Path:
    """The compiled library; compiles it unless an earlier process did, or `again`.

    $GPT2ML_KERNELS chooses a lower level than the CPU's own, or "off". A library that is cut off,
    empty or another's is made again. Raises `OSError` where this CPU, compiler or folder won't do,
    `RuntimeError` where the compiler fails.
    """
    features = instructions(cpu_features(), os.environ.get(_CHOICE) or None)
    compiler = _find_compiler()
    flags = (*FLAGS, *(f"-m{name.replace('_', '')}" for name in features))
    folder = cache_root()
    key = _key(compiler, flags)
    library = folder / f"kernels-{key}.so"
    if again or not _is_whole(library, key):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if again or not _is_whole(library, key):  # nor did another process make it meanwhile
                _compile(compiler, flags, library, key)
    return library


def _find_compiler() -> tuple[str, ...]:
    """The C++ compiler as the words of a command: $CXX may be "ccache g++"."""
    named = shlex.split(os.environ.get("CXX") or "")
    found = named or [shutil.which("g++") or shutil.which("clang++") or ""]
    if not found[0]:
        raise OSError("no C++ compiler was found; install g++ or set CXX")
    return tuple(found)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process build at a time, where the file system has locks; the others wait."""
    try:
        held = disk.lock(
            folder / "kernels.lock", "another process compiles", patience=2 * TIMEOUT_SECONDS
        )
    except OSError:  # two builds harm nobody: each renames a whole library
        yield
        return
    try:
        for left in folder.glob(f"{_SCRATCH}*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        yield
    finally:
        disk.unlock(held)


def _is_whole(library: Path, key: str) -> bool:
    """Whether the file ends with the checksum of its content.

    The loader maps the file into memory, and reading beyond a cut would kill the process.
    """
    try:
        data = library.read_bytes()
    except OSError:
        return False
    code, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    return bool(code) and seal == _seal(code, key)


def _seal(code: bytes, key: str) -> bytes:
    return hashlib.sha256(code + key.encode()).digest()


def instructions(cpu: frozenset[str], choice: str | None) -> list[str]:
    """The instruction sets to compile for, on a CPU with these features.

    Raises `OSError` where the CPU has too few, or the choice is "off", unknown or beyond it.
    """
    if choice == "off":
        raise OSError(f"{_CHOICE} is off")
    if choice is not None and choice not in LEVELS:
        raise OSError(f"{_CHOICE} is {choice!r}; expected off, {', '.join(LEVELS)}")
    for level in [choice] if choice else reversed(LEVELS):
        needed, _, useful = LEVELS[level].partition("|")
        if cpu.issuperset(needed.split()):
            return needed.split() + [name for name in useful.split() if name in cpu]
    missing = sorted(set(LEVELS[choice or "avx2"].partition("|")[0].split()) - cpu)
    raise OSError(f"the kernels need a CPU with {', '.join(missing)}")


def cpu_features() -> frozenset[str]:
    """The CPU's feature flags as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").partition(":")[2].split())


def _key(compiler: tuple[str, ...], flags: tuple[str, ...]) -> str:
    """A hash of everything that the compiled code depends on."""
    asked = [*compiler, "--version"]
    try:
        version = subprocess.run(asked, capture_output=True, check=False, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{' '.join(asked)} took more than {TIMEOUT_SECONDS} s") from None
    parts = (
        *(path.read_bytes() for path in (*SOURCES, *HEADERS)),
        version.stdout,
        " ".join(flags).encode(),
        f"{torch.__version__} {platform.machine()} {platform.processor()}".encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: tuple[str, ...], flags: tuple[str, ...], library: Path, key: str) -> None:
    """Compile under another name, append the checksum and rename, so no partial file is loaded."""
    torch_folder = Path(torch.__file__).parent
    include = ("-I", str(torch_folder / "include"))
    libraries = ("-L", str(torch_folder / "lib"), "-ltorch_cpu", "-lc10")
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=_SCRATCH) as scratch:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in SOURCES]
        _run_all(
            (*compiler, *flags, *include, "-c", str(source), "-o", target)
            for source, target in zip(SOURCES, objects, strict=True)
        )
        output = Path(scratch) / library.name
        _run_all([(*compiler, *flags, "-shared", *objects, "-o", str(output), *libraries)])
        seal = _seal(output.read_bytes(), key)
        with open(output, "ab") as file:
            file.write(seal)
            file.flush()
            os.fsync(file.fileno())
        os.replace(output, library)


def _run_all(commands: Iterable[tuple[str, ...]]) -> None:
    """Run commands, as many at once as there are cores, the first ones first.

    Raises `RuntimeError` where one fails or takes too long. However this ends, by Ctrl-C too, no
    process of theirs is left.
    """
    compilers = _Compilers()
    pool = ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        running = {pool.submit(compilers.run, command) for command in commands}
        while running:
            done, running = wait(running, _POLL_SECONDS, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    finally:
        compilers.stop()
        pool.shutdown(cancel_futures=True)


class _Compilers:
    """Runs commands in threads, where no KeyboardInterrupt can come between starting a process
    and recording it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def run(self, command: tuple[str, ...]) -> None:
        """Run a command to its end; raises `RuntimeError` where it fails or takes too long."""
        with tempfile.TemporaryFile() as messages:
            with self._lock:
                if self._stopped:
                    return
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=messages,
                    start_new_session=True,  # a group of its own, with the compiler's children
                )
                self._running.append(process)
            try:
                status = process.wait(TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"the compiler took more than {TIMEOUT_SECONDS} s") from None
            if status:
                messages.seek(0)
                text = messages.read().decode("utf-8", "replace")  # in the user's language
                errors = [line for line in text.splitlines() if "error" in line]
                raise RuntimeError(f"{command[0]} failed: {(errors or ['without a word'])[0]}")

    def stop(self) -> None:
        """Start no more, and kill what runs, with its children."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
