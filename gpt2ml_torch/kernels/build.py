"""Compiles the kernels at run time, once for each machine, and keeps the result on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gpt2ml_torch.cache import cache_root

FOLDER = Path(__file__).parent
SOURCES = tuple(sorted(FOLDER.glob("*.cpp"), key=lambda path: -path.stat().st_size))
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
TIMEOUT_SECONDS = 300
# No contraction: a * b + c would otherwise round differently in differently unrolled loops.
FLAGS = ("-std=c++20", "-O2", "-mtune=native", "-ffp-contract=off", "-fPIC")

# Instruction sets that the kernels are written for, best last, by the names that Linux gives their
# parts; those after "|" are used where there are any.
LEVELS = {
    "avx2": "avx2 fma f16c | avx_vnni",
    "avx512": "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni | avx512_bf16",
}
_CHOICE = "GPT2ML_KERNELS"  # a level, or "off"


def build() -> Path:
    """The compiled library; compiles it unless an earlier process did.

    $GPT2ML_KERNELS chooses a lower level than the CPU's own, or "off". Raises `OSError` where this
    CPU, compiler or folder won't do, `RuntimeError` where the compiler fails.
    """
    features = instructions(cpu_features(), os.environ.get(_CHOICE) or None)
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler was found; install g++ or set CXX")
    flags = (*FLAGS, *(f"-m{name.replace('_', '')}" for name in features))
    folder = cache_root()
    library = folder / f"kernels-{_key(compiler, flags)}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not library.exists():  # nor did another process make it meanwhile
                _compile(compiler, flags, library)
    return library


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system can do that: the others wait."""
    import fcntl  # not on Windows, where no CPU has the features

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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


def _key(compiler: str, flags: tuple[str, ...]) -> str:
    """Changes with everything that the compiled code depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = (
        *(path.read_bytes() for path in (*SOURCES, *HEADERS)),
        version,
        " ".join(flags).encode(),
        f"{torch.__version__} {platform.machine()} {platform.processor()}".encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    """Compile beside the final name and rename: nothing half-written is ever found."""
    torch_folder = Path(torch.__file__).parent
    include = ("-I", str(torch_folder / "include"))
    libraries = ("-L", str(torch_folder / "lib"), "-ltorch_cpu", "-lc10")
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in SOURCES]
        _run_all(
            (compiler, *flags, *include, "-c", str(source), "-o", target)
            for source, target in zip(SOURCES, objects, strict=True)
        )
        output = str(Path(scratch) / library.name)
        _run_all([(compiler, *flags, "-shared", *objects, "-o", output, *libraries)])
        os.replace(output, library)


def _run_all(commands: Iterable[tuple[str, ...]]) -> None:
    """Run commands, as many at once as there are cores, the first ones first."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for _ in pool.map(_run, commands):
            pass


def _run(command: tuple[str, ...]) -> None:
    """Raises `RuntimeError` where the command fails."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the compiler took more than {TIMEOUT_SECONDS} s") from None
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        raise RuntimeError(f"{command[0]} failed: {(errors or ['without a word'])[0]}")
