"""Building the kernels: kept on disk, safe to race, and never needed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gpt2ml_torch.kernels import build

PRODUCT = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from gpt2ml_torch import kernels
torch.manual_seed(0)
weight, scale = kernels.pack(torch.randn(40, 64), "int8")
layer = lambda x: kernels.packed_linear(x, weight, scale, None, bits=8, outputs=40)
print(kernels.load_kernels(), kernels.load_kernels(), layer(torch.ones(1, 64)).sum().item())
"""

PLAIN = """
import sys
from gpt2ml_torch import GPT2ML, GPT2MLConfig
config = GPT2MLConfig(
    vocab_size=40, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64
)
GPT2ML(config).save_pretrained(sys.argv[1])
print(GPT2ML.from_pretrained(sys.argv[1]).runs_on_kernels)
"""

AVX2 = frozenset({"avx2", "fma", "f16c"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}

needs_compiler = pytest.mark.skipif(
    not build.cpu_features() >= AVX2, reason="no AVX2: there is nothing to build"
)


def start(
    cache: Path, program: str = PRODUCT, *arguments: str, **environment: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"GPT2ML_CACHE": str(cache)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output.split(), errors


@needs_compiler
def test_processes_that_start_together_build_once_for_all_and_agree(tmp_path: Path) -> None:
    cache, log, compiler = tmp_path / "cache", tmp_path / "log", tmp_path / "g++"
    real = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    compiler.write_text(f'#!/bin/sh\necho "$@" >>{log}\nexec {real} "$@"\n')
    compiler.chmod(0o755)
    processes = [start(cache, CXX=str(compiler)) for _ in range(3)]
    runs = [finish(process) for process in processes]
    assert [output for output, _ in runs] == [runs[0][0]] * 3
    assert runs[0][0][0] == "True"
    assert finish(start(cache, CXX=str(compiler)))[0] == runs[0][0]
    assert len(list(cache.glob("*.so"))) == 1
    assert not list(cache.glob("build-*"))  # nothing half-written
    assert log.read_text().count(" -shared ") == 1


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that writes what it was asked to, at once, and a line into `log` for it."""
    script = tmp_path / "c++"
    script.write_text(
        "#!/bin/bash\n"
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done\n'
        f'echo "$out" >>{tmp_path}/log\n'
        '[ -z "$out" ] || echo code >"$out"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("GPT2ML_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "instructions", lambda cpu, choice: ["avx2"])
    return script


def links(compiler: Path) -> int:
    return (compiler.parent / "log").read_text().count(".so\n")


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "flipped", "folder"])
def test_a_damaged_library_is_made_again(compiler: Path, damage: str) -> None:
    library = build.build()
    whole = library.read_bytes()
    assert build.build() == library
    assert links(compiler) == 1
    if damage == "folder":
        library.rename(library.with_suffix(".moved"))
        library.mkdir()
    else:
        library.write_bytes(
            {
                "cut": whole[: len(whole) // 2],
                "empty": b"",
                "foreign": b"\x7fELF of another program",
                "flipped": bytes([whole[0] ^ 1]) + whole[1:],
            }[damage]
        )
    if damage == "folder":
        with pytest.raises(OSError, match="directory"):
            build.build()
        return
    build.build()
    assert library.read_bytes() == whole
    assert links(compiler) == 2
    assert build.build(again=True) == library
    assert links(compiler) == 3


def test_what_killed_builds_left_is_removed(compiler: Path, tmp_path: Path) -> None:
    left = tmp_path / "cache" / "build-killed"
    left.mkdir(parents=True)
    (left / "linear.o").write_text("half")
    (tmp_path / "cache" / "tokens").mkdir()
    build.build()
    assert not left.exists()
    assert (tmp_path / "cache" / "tokens").exists()


def test_the_compiler_may_be_a_command_of_several_words(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", f"env LC_ALL=C '{compiler}'")
    assert build.build().exists()


def test_a_compiler_may_speak_another_language(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.write_text("#!/bin/bash\necho $'fatal error: \\xb4\\xed\\xff' >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match="failed: fatal error: \ufffd"):
        build.build()


@pytest.mark.parametrize("ending", ["time-out", "interrupt", "unnoticed interrupt"])
def test_no_process_of_a_compiler_outlives_the_build(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    compiler.write_text(
        "#!/bin/bash\n"
        '[ "$1" = --version ] && exit 0\n'
        f"sleep 1000 & echo $! >>{tmp_path}/children; wait\n"
    )
    children = tmp_path / "children"

    def interrupt() -> None:
        while not (children.exists() and children.read_text().endswith("\n")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    if ending == "time-out":
        monkeypatch.setattr(build, "TIMEOUT_SECONDS", 1)
        with pytest.raises(RuntimeError, match="took more than 1 s"):
            build.build()
    else:
        monkeypatch.setattr(build, "TIMEOUT_SECONDS", 30)
        began = time.monotonic()
        threading.Thread(target=interrupt, daemon=True).start()
        if ending == "unnoticed interrupt":  # the signal goes to a thread that isn't waiting
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with pytest.raises(KeyboardInterrupt):
                build.build()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        assert time.monotonic() - began < 20  # it was not the time-out that ended it
    started = [int(line) for line in children.read_text().split()]
    assert started
    for _ in range(100):
        if not any(Path(f"/proc/{number}").exists() for number in started):
            break
        time.sleep(0.02)  # until whoever adopted them has noticed
    assert not any(_runs(number) for number in started)
    assert not list((tmp_path / "cache").glob("build-*"))


def _runs(number: int) -> bool:
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


FORKING = """
import os, signal, torch
from gpt2ml_torch import kernels
from gpt2ml_torch.precision import Precision
torch.set_num_threads(2)
weight, scale = kernels.pack(torch.randn(4096, 1024), Precision.INT8)
x = torch.ones(64, 1024)
layer = lambda: kernels.packed_linear(x, weight, scale, None, bits=8, outputs=4096).sum().item()
before = layer()
if os.fork() == 0:
    signal.alarm(60)  # a child that hangs is killed
    os._exit(0 if layer() == before else 3)
print(os.waitstatus_to_exitcode(os.wait()[1]), torch.get_num_threads())
"""


def test_a_child_forked_after_use_works() -> None:
    process = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=200, check=True
    )
    assert process.stdout.split() == ["0", "2"]


def test_plain_weights_wait_for_no_kernels(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    output, _ = finish(start(cache, PLAIN, str(tmp_path / "model.safetensors")))
    assert output == ["False"]
    assert not cache.exists()


@pytest.mark.parametrize("compiler", ["/nonexistent/g++", "false"])
def test_without_a_compiler_pytorch_does_it_and_says_so_once(tmp_path: Path, compiler: str) -> None:
    output, errors = finish(start(tmp_path, CXX=compiler))
    assert output[:2] == ["False", "False"]
    assert errors.count("packed weights run on PyTorch's own operators") == 1
    assert "Traceback" not in errors


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("")
    output, errors = finish(start(occupied / "cache"))
    assert output[0] == "False"
    assert "Traceback" not in errors


def test_the_best_level_of_the_cpu_is_taken_unless_a_lower_one_is_chosen() -> None:
    assert build.instructions(AVX2, None) == ["avx2", "fma", "f16c"]
    assert build.instructions(AVX2 | {"avx_vnni"}, None)[-1] == "avx_vnni"
    assert build.instructions(AVX512, None)[-1] == "avx512_vnni"
    assert build.instructions(AVX512 | {"avx512_bf16"}, None)[-1] == "avx512_bf16"
    assert build.instructions(AVX512, "avx2") == ["avx2", "fma", "f16c"]


@pytest.mark.parametrize(
    ("features", "choice", "message"),
    [
        (frozenset(), None, "a CPU with avx2, f16c, fma"),
        (AVX2, "avx512", "a CPU with avx512_vnni"),
        (AVX512, "off", "GPT2ML_KERNELS is off"),
        (AVX512, "sse", "expected off, avx2, avx512"),
    ],
)
def test_a_level_that_cannot_be_is_an_error(
    features: frozenset[str], choice: str | None, message: str
) -> None:
    with pytest.raises(OSError, match=message):
        build.instructions(features, choice)


@pytest.mark.skipif(not build.cpu_features() > AVX512, reason="AVX2 is what the other tests run")
def test_the_lower_level_passes_the_tests_of_the_kernels_too() -> None:
    tests = ["tests/kernels/test_linear.py", "tests/kernels/test_layers.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"GPT2ML_KERNELS": "avx2"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert "skipped" not in result.stdout
