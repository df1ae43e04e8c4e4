"""Compiles the kernels at run time, once for each machine, and keeps the result on disk."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / name for name in ("packed_linear.cpp", "cached_attention.cpp"))
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16")
TIMEOUT_SECONDS = 300
# No contraction: a * b + c would otherwise round differently in differently unrolled loops.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-shared")


def cache_folder() -> Path:
    """Where compiled kernels are kept: $GPT2ML_CACHE, or gpt2ml in the user's cache folder."""
    configured = os.environ.get("GPT2ML_CACHE")
    if configured:
        return Path(configured)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gpt2ml"


def build() -> Path:
    """The compiled library; compiles it unless an earlier process did.

    Raises `OSError` where this CPU, compiler or folder won't do, `RuntimeError` where the compiler
    fails.
    """
    features = cpu_features()
    missing = [name for name in NEEDED if name not in features]
    if missing:
        raise OSError(f"the kernels need a CPU with {', '.join(missing)}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler was found; install g++ or set CXX")
    folder = cache_folder()
    library = folder / f"kernels-{_key(compiler, features)}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compile(compiler, library)
    return library


def cpu_features() -> frozenset[str]:
    """The CPU's feature flags as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").partition(":")[2].split())


def _key(compiler: str, features: frozenset[str]) -> str:
    """Changes with everything that the compiled code depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = (
        *(path.read_bytes() for path in (*SOURCES, FOLDER / "vectors.h")),
        version,
        " ".join(sorted(features)).encode(),
        " ".join(FLAGS).encode(),
        f"{torch.__version__} {platform.machine()}".encode(),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(compiler: str, library: Path) -> None:
    """Compile beside the final name and rename: processes may race, the last one wins."""
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        output = Path(scratch) / library.name
        command = [
            *(compiler, *FLAGS, *map(str, SOURCES), "-o", str(output)),
            *("-I", str(torch_folder / "include")),
            *("-L", str(torch_folder / "lib"), "-ltorch_cpu", "-lc10"),
        ]
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{compiler} took more than {TIMEOUT_SECONDS} s") from None
        if result.returncode:
            errors = [line for line in result.stderr.splitlines() if "error" in line]
            raise RuntimeError(f"{compiler} failed: {(errors or ['without a word'])[0]}")
        os.replace(output, library)
