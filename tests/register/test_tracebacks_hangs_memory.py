"""What ended in a traceback, or took time and memory without bound, by example and variation."""

from __future__ import annotations

import gzip
import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt2ml_torch import GPT2ML, Generator
from gpt2ml_torch.generation.engine import Engine
from tests.generation.test_unequal_blocks import eager_backend, needs_compiler
from tests.helpers import checkpoint_factory as factory
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.register.conftest import Run

DEVICES = ["meta", "mps", "xla", "hpu", "vulkan", "privateuseone", "cuda:99", "cuda:x", "tpu", ""]

# Training without validation; the runs with every switch are in tests/commands.


@pytest.mark.parametrize(
    "options",
    [
        ["--valid-share", "0"],
        ["--valid-share", "0", "--prompt", "春", "--sample-every", "1", "--sample-tokens", "2"],
        ["--valid-share", "0", "--eval-every", "1", "--patience", "1", "--checkpoint-every", "1"],
        ["--valid-share", "0", "--lora-rank", "2", "--out", "adapter"],
    ],
    ids=" ".join,
)
def test_a_run_without_validation_ends_well(
    options: list[str],
    tuning_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    if "--lora-rank" in options:
        pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    words = ["finetune", tuning_files / "model.safetensors", tuning_files / "text.txt"]
    words += ["--cache", tuning_files / "cache", "--steps", "1", "--out", "out.safetensors"]
    ran = run(*words, *options)
    assert ran.status == 0
    assert "done: 1 steps; wrote " in ran.err
    assert "validation loss" not in ran.err


# Many sizes of a compiled step.


@needs_compiler
@pytest.mark.parametrize("size", ["rows", "slots", "prompt"])
def test_a_ninth_size_is_compiled_as_the_first(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    eager_backend(monkeypatch)
    model = tiny_model(tiny_tokenizer(), layers=1, positions=2048)
    used, plain = Engine(model, compile=True), Engine(model, compile=False)
    for number in range(1, 11):
        rows = number if size == "rows" else 1
        slots = 128 * number if size == "slots" else 256
        if size == "prompt":
            ids = [104 + n % 9 for n in range(number * 24)]
            found = used.prefill(ids, used.new_cache(1, 256))
            expected = plain.prefill(ids, plain.new_cache(1, 256))
        else:
            ones = torch.full((rows, 1), 120)
            found = used.decode(ones, ones * 0, plain.new_cache(rows, slots))
            expected = plain.decode(ones, ones * 0, plain.new_cache(rows, slots))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert used.compiled


# Sizes beyond reason.


@pytest.mark.parametrize(
    "options",
    [
        ["--repetition-penalty", "1e308"],
        ["--temperature", "inf"],
        ["--threads", "100000"],
        ["--batch-size", "1000000000"],
        ["-n", "1000000000"],
        ["--num-beams", "1000000"],
        ["--top-k", "99999999999999999999"],
        ["--max-new-tokens", "99999999999999999999"],
        ["--no-repeat-ngram-size", "2147483648"],
        ["--no-repeat-ngram-size", "99999"],
        ["--prompt-lookup", "99999"],
        ["--length-penalty", "1e308", "--num-beams", "2"],
        ["--length-penalty", "-1e308", "--num-beams", "2"],
        ["--presence-penalty", "-1e38"],
        ["--frequency-penalty", "-inf"],
        ["--end-id", "99999999999"],
        ["--seed", "9" * 40],
        ["--window-keep", "64"],
    ],
    ids=" ".join,
)
def test_a_size_beyond_reason_is_one_line(options: list[str], model_file: Path, run: Run) -> None:
    ran = run("generate", model_file, "今天", "--quiet", "--no-compile", *options)
    assert ran.is_one_line
    assert options[0] in ran.err
    assert "expected" in ran.err


@pytest.mark.parametrize(
    "defaults",
    [
        {"num_return_sequences": 10**6},
        {"max_new_tokens": 10**9},
        {"no_repeat_ngram_size": 2**31},
        {"num_beams": 10**6},
        {"temperature": float("nan")},
        {"stop": ["。"] * 10**5},
        {"suppress_tokens": [2**40]},
    ],
    ids=lambda defaults: next(iter(defaults)),
)
def test_defaults_in_a_hostile_file_are_bounded(
    defaults: dict[str, object], tmp_path: Path, run: Run
) -> None:
    path = tmp_path / "hostile.safetensors"
    model = tiny_model(tiny_tokenizer())
    try:
        model.save_pretrained(path, tokenizer=tiny_tokenizer(), generation=defaults)
    except ValueError:  # it isn't even written; a stranger's program would
        model.save_pretrained(path, tokenizer=tiny_tokenizer(), generation={"top_k": 5})
        rewrite_defaults(path, defaults)
    began = time.process_time()
    ran = run("generate", path, "今天", "--quiet", "--no-compile", "--max-new-tokens", "2")
    assert ran.is_one_line or len(ran.out) < 100
    assert time.process_time() - began < 5


def rewrite_defaults(path: Path, defaults: dict[str, object]) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["generation"] = json.dumps(defaults)
    header["__metadata__"].pop("checksums", None)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize("line", ["字" * 200_000, "##" + "a" * 200_000, "x" * 1025])
def test_a_vocabulary_with_an_endless_line_is_refused_with_its_number(
    line: str, tmp_path: Path, run: Run
) -> None:
    tokens = tiny_tokenizer().vocab_text.splitlines()
    file, model = tmp_path / "vocab.txt", tmp_path / "plain.safetensors"
    file.write_text("\n".join([*tokens[:-1], line]) + "\n", encoding="utf-8")
    tiny_model(tiny_tokenizer()).save_pretrained(model)
    for command in ("generate", "score"):
        ran = run(command, model, "今天", "--vocab", file, "--quiet", "--no-compile")
        assert ran.is_one_line
        assert f"{file}: line {len(tokens)} has {len(line):,} characters" in ran.err


def test_the_converter_refuses_such_a_vocabulary_too(tmp_path: Path, run: Run) -> None:
    torch.save(factory.community_state_dict(factory.tf_weights()), tmp_path / "pytorch_model.bin")
    factory.write_beside(tmp_path)
    tokens = factory.VOCAB.splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*tokens[:-1], "字" * 200_000]) + "\n")
    ran = run.convert(tmp_path, tmp_path / "out.safetensors")
    assert ran.is_one_line
    assert f"line {len(tokens)} has 200,000 characters" in ran.err


def header_of_twins(path: Path) -> None:
    text = ",".join(f'"a{n}":0' for n in [*range(60_000), 7])
    write_header(path, f"{{{text}}}")


def header_of_metadata(path: Path) -> None:
    text = ",".join(f'"k{n}":"v"' for n in [*range(60_000), 7])
    write_header(path, f'{{"__metadata__":{{{text}}}}}')


def header_of_brackets(path: Path) -> None:
    write_header(path, '{"a":' + "[" * 800_000)


def header_of_digits(path: Path) -> None:
    write_header(path, '{"a":' + "9" * 800_000 + "}")


def write_header(path: Path, text: str) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode())


@pytest.mark.parametrize(
    "write", [header_of_twins, header_of_metadata, header_of_brackets, header_of_digits]
)
def test_a_hostile_header_takes_linear_time(
    write: Callable[[Path], None], tmp_path: Path, run: Run
) -> None:
    path = tmp_path / "m.safetensors"
    write(path)
    began = time.process_time()
    assert run("info", path).is_one_line
    assert run.convert(path, tmp_path / "out").is_one_line
    assert time.process_time() - began < 4


@pytest.mark.parametrize("unit", [b"\n", b" \r", "\u3000\n".encode()])
def test_a_compressed_file_of_nothing_takes_seconds(
    unit: bytes, tuning_files: Path, tmp_path: Path, run: Run
) -> None:
    file = tmp_path / "a.txt.gz"
    file.write_bytes(gzip.compress(unit * ((4 << 20) // len(unit)), compresslevel=1))
    began = time.process_time()
    words = ("--out", tmp_path / "out.safetensors", "--cache", tmp_path / "cache", "--quiet")
    ran = run("finetune", tuning_files / "model.safetensors", file, *words)
    assert ran.status == 2
    assert "Traceback" not in ran.err
    assert time.process_time() - began < 4


@pytest.mark.parametrize(
    "options",
    [
        ["--train-layers", "0-99999999999"],
        ["--batch-size", "1000000000000"],
        ["--lora-rank", "99999999"],
        ["--loss-chunk", "999999999999"],
        ["--epochs", "1e308"],
        ["--keep", "99999999999999"],
        ["--checkpoint-minutes", "inf"],
    ],
    ids=" ".join,
)
def test_training_sizes_beyond_reason_are_one_line(
    options: list[str], tuning_files: Path, tmp_path: Path, run: Run
) -> None:
    words = [tuning_files / "model.safetensors", tuning_files / "text.txt", *options]
    out = tmp_path / "out.safetensors"
    ran = run("finetune", *words, "--out", out, "--cache", tmp_path / "cache")
    assert ran.is_one_line
    assert options[0] in ran.err
    assert os.listdir(tmp_path) == []


# Devices, and dtypes of packed models.


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_not_here_is_one_line_for_every_command(
    device: str, model_file: Path, tmp_path: Path, run: Run
) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has that device")
    text = tmp_path / "text.txt"
    text.write_text("今天天气不错\n\n春眠不觉晓\n", encoding="utf-8")
    for words in (
        ("generate", model_file, "今"),
        ("score", model_file, "今天"),
        ("check", model_file),
        ("finetune", model_file, text, "--out", tmp_path / "out.safetensors"),
    ):
        ran = run(*words, "--device", device)
        assert ran.is_one_line
        assert f"--device is '{device}'" in ran.err


@pytest.mark.parametrize("device", ["meta", "mps", torch.device("cuda:99"), "tpu", 99, None])
@pytest.mark.parametrize("load", [GPT2ML.from_pretrained, Generator.from_pretrained])
def test_python_callers_get_one_line_too(
    load: Callable[..., object], device: object, model_file: Path
) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has that device")
    with pytest.raises(ValueError, match=r"^device is [^\n]*$"):
        load(model_file, device=device)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_packed_model_says_why_it_keeps_its_dtype_and_the_cure_works(
    dtype: torch.dtype, precision: str, model_file: Path
) -> None:
    model = GPT2ML.from_pretrained(model_file, quantize=precision)
    changes: list[Callable[[], object]] = [lambda: model.to(dtype), lambda: model.type(dtype)]
    for change in changes:
        with pytest.raises(ValueError, match=f"load it with dtype={dtype} instead"):
            change()
    ids = torch.tensor([[104, 107]])
    expected = model(ids).float()
    loaded = GPT2ML.from_pretrained(model_file, quantize=precision, dtype=dtype)
    torch.testing.assert_close(loaded(ids).float(), expected, rtol=0.1, atol=0.3)
    assert loaded.dtype == dtype
