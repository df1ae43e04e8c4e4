"""Building the kernels: kept on disk, safe to race, and never needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
    assert len(list(cache.iterdir())) == 1  # and no half-written file beside the library
    assert log.read_text().count(" -shared ") == 1


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
