"""A model file is opened once, and what is read comes from that one file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from gpt2ml_torch import GPT2ML, Generator
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.format import expected_shapes
from gpt2ml_torch.modelfile.writer import save
from tests.helpers.old_files import CONFIG, VOCAB, numbers

WEIGHTS = {name: numbers(name, shape) for name, shape in expected_shapes(CONFIG).items()}
ZEROS = {name: torch.zeros(shape) for name, shape in expected_shapes(CONFIG).items()}

COUNT = """
import sys
path, opened = sys.argv[1], []
sys.addaudithook(lambda event, args: event == "open" and args[0] == path and opened.append(path))
sys.argv[1:] = sys.argv[2:]
{}
print(len(opened), file=sys.stderr)
"""
START = {
    "assistant": (
        "from gpt2ml_torch import Generator; Generator.from_pretrained(path, assistant='int4')"
    ),
    "generate": (
        "from gpt2ml_torch.__main__ import main\\n"
        "assert main(['generate', path, '春眠', '--max-new-tokens', '2', '--no-compile']) == 0"
    ).replace("\\n", "\n"),
    "score": (
        "from gpt2ml_torch.__main__ import main\\n"
        "assert main(['score', path, '春眠不觉', '--no-compile']) == 0"
    ).replace("\\n", "\n"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save(path, WEIGHTS, CONFIG, vocab=VOCAB)
    return path


@pytest.mark.parametrize("start", START)
def test_a_start_opens_the_file_once(start: str, path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(START[start]), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "1"


def test_what_is_read_is_the_file_that_was_opened(path: Path) -> None:
    other = path.with_name("other")
    save(other, ZEROS, CONFIG, vocab="[PAD]\n[UNK]\nx")
    with ModelFile.open(path) as file:
        os.replace(other, path)
        model, generator = GPT2ML.from_file(file), Generator.from_file(file, compile=False)
        weights = file.state_dict(dtype=torch.bfloat16)
        tensor = file.tensor("embedding_norm.weight")
        assert file.tokenizer().encode("春") == [5]
    assert generator.tokenizer.encode("春") == [5]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, WEIGHTS[name])
        assert torch.equal(weights[name], WEIGHTS[name].bfloat16())
    assert torch.equal(tensor, WEIGHTS["embedding_norm.weight"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("precision", [None, "int8"])
def test_a_file_that_is_cut_while_it_is_read_is_one_line(
    dtype: torch.dtype | None, precision: str | None, path: Path
) -> None:
    with ModelFile.open(path) as file:
        os.truncate(path, 9000)
        with pytest.raises(ValueError, match=r"became shorter|was changed") as e:
            GPT2ML.from_file(file, dtype=dtype, precision=precision)
        with pytest.raises(ValueError, match="became shorter"):
            list(file.rows())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_file_that_is_overwritten_in_place_is_noticed(
    dtype: torch.dtype | None, path: Path
) -> None:
    other = path.with_name("other")
    save(other, ZEROS, CONFIG, vocab=VOCAB)
    with ModelFile.open(path) as file:
        time.sleep(0.02)  # clocks of file systems tick slowly
        path.write_bytes(other.read_bytes())
        with pytest.raises(ValueError, match="was changed while it was read; load it again"):
            GPT2ML.from_file(file, dtype=dtype)


def test_a_closed_file_says_so_and_keeps_what_was_mapped(path: Path) -> None:
    with ModelFile.open(path) as file:
        weights = file.state_dict()
    assert torch.equal(weights["embedding_norm.bias"], WEIGHTS["embedding_norm.bias"])
    for read in (file.state_dict, file.verify, lambda: file.tensor("embedding_norm.bias")):
        with pytest.raises(ValueError, match="was closed; open it again"):
            read()


def test_an_open_file_that_is_forgotten_is_closed(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(50):
        ModelFile.open(path)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_header_with_a_name_given_twice_takes_linear_time(tmp_path: Path) -> None:
    names = [f"a{index}" for index in range(60_000)]
    entries = ",".join(f'"{name}":0' for name in [*names, names[-1]])
    text = f"{{{entries}}}".encode()
    (tmp_path / "m").write_bytes(struct.pack("<Q", len(text)) + text)
    began = time.process_time()
    with pytest.raises(ValueError, match="'a59999' is in the header twice"):
        ModelFile.open(tmp_path / "m")
    assert time.process_time() - began < 2


def test_a_header_larger_than_any_model_needs_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "m", "wb") as file:
        file.write(struct.pack("<Q", 100 << 20) + b"{")
        file.truncate(200 << 20)
    with pytest.raises(ValueError, match="its header would take 104857600 bytes"):
        ModelFile.open(tmp_path / "m")


def test_info_is_valid_json_and_cannot_steer_a_terminal(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"name": "a\x1b[2J\x9b1m\x7f\u202e\nb", "loss": float("nan"), "deep": [float("inf")]}
    save(path, WEIGHTS, CONFIG, source=source)
    content = path.read_bytes()  # what another program may have written
    content = content.replace(b'\\"loss\\": null', b'\\"loss\\":  NaN')
    path.write_bytes(content)
    assert main(["info", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["source"] == {"name": source["name"], "loss": None, "deep": [None]}
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert all(character.isprintable() for character in shown.replace("\n", ""))
    assert len(shown.splitlines()) == len(found)
