"""What is no file, and files that are damaged or change, by example and variation."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2ml_torch import GPT2ML
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers import checkpoint_factory as factory
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.register.conftest import Run


@pytest.mark.parametrize("place", ["pipe", "/dev/zero", "/dev/null", ".", "missing"])
def test_what_is_no_file_is_one_line_at_once(
    place: str,
    model_file: Path,
    tuning_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    tiny_model(tiny_tokenizer()).save_pretrained("plain.bin")
    tuned = tuning_files / "model.safetensors"
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for words in (
        ("generate", "plain.bin", "今天", "--vocab", place),
        ("score", "plain.bin", "今天", "--vocab", place),
        ("generate", model_file, "--file", place),
        ("score", model_file, "--file", place),
        ("info", place),
        ("generate", place, "今天"),
        ("check", place),
        ("quantize", place, "--out", "out"),
        ("merge", model_file, place, "--out", "out"),
        ("finetune", place, tuning_files / "text.txt", "--out", "out.safetensors"),
        ("convert", place, "out"),
        ("convert", place, "out", "--to-tf"),
    ):
        ran = run(*words)
        assert ran.is_one_line, words
        assert place in ran.err
    ran = run("finetune", tuned, place, "--out", "out.safetensors", "--cache", "cache", "--quiet")
    assert ran.status == 2
    assert "Traceback" not in ran.err
    assert time.monotonic() - began < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 << 10  # KiB


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 50, 0.5, 0.99])
def test_an_adapter_cut_off_anywhere_is_one_line(
    keep: float, model_file: Path, tmp_path: Path, run: Run
) -> None:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["mlp.up"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    file = tmp_path / "adapter_model.safetensors"
    save_file({"blocks.0.mlp.up.lora_A.weight": torch.ones(2, 32)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    ran = run("merge", model_file, tmp_path, "--out", tmp_path / "out")
    assert ran.is_one_line
    assert "adapter_model.safetensors is damaged" in ran.err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(64).to_sparse(),
        lambda: torch.zeros(64, device="meta"),
        lambda: torch.zeros(1).expand(64),
        lambda: torch.zeros(100).as_strided((64,), (0,)),
        lambda: torch.zeros(64, dtype=torch.bool),
    ],
    ids=["sparse", "meta", "expanded", "stride 0", "bool"],
)
def test_a_tensor_without_numbers_of_its_own_is_named(
    make: Callable[[], torch.Tensor], legacy: bool, tmp_path: Path, run: Run
) -> None:
    state = {**factory.community_state_dict(factory.tf_weights())}
    state["transformer.h.2.ln_1.weight"] = make()
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    factory.write_beside(tmp_path)
    ran = run.convert(tmp_path, tmp_path / "out.safetensors")
    assert ran.is_one_line
    assert "h.2.ln_1.weight" in ran.err


@pytest.mark.parametrize("change", ["cut", "replaced", "written over"])
def test_a_model_file_that_changes_while_it_is_read_is_one_line_or_the_old_one(
    change: str, tmp_path: Path
) -> None:
    path, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    for seed, name in enumerate((path, other)):
        tiny_model(tiny_tokenizer(), seed=seed).save_pretrained(name)
    expected = load_file(path)
    with ModelFile.open(path) as file:
        time.sleep(0.02)  # clocks of file systems tick slowly
        if change == "cut":
            os.truncate(path, 9000)
        elif change == "replaced":
            os.replace(other, path)
        else:
            path.write_bytes(other.read_bytes())
        if change == "replaced":
            found = GPT2ML.from_file(file).state_dict()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        else:
            with pytest.raises(ValueError, match=r"became shorter|was changed"):
                GPT2ML.from_file(file)


@pytest.mark.parametrize("tensor", ["token_embedding.weight", "blocks.1.attention.qkv.bias"])
def test_no_command_writes_weights_on_from_a_file_with_a_flipped_bit(
    tensor: str, tuning_files: Path, tmp_path: Path, run: Run
) -> None:
    path, out = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    data = bytearray((tuning_files / "model.safetensors").read_bytes())
    with ModelFile.open(tuning_files / "model.safetensors") as file:
        data[(file.tensors[tensor].start + file.tensors[tensor].end) // 2] ^= 0x10
    path.write_bytes(data)
    text, cache = tuning_files / "text.txt", tuning_files / "cache"
    for words in (
        ("info", path, "--verify"),
        ("quantize", path, "--out", out),
        ("export", path, out),
        ("convert", "--to-tf", path, out),
        ("finetune", path, text, "--out", out, "--cache", cache, "--quiet", "--steps", "1"),
    ):
        ran = run(*words)
        assert ran.status == 2
        assert f"tensor '{tensor}' is damaged" in ran.err
        assert not out.exists()
    checked = run("check", path, "--no-precisions")
    assert checked.status == 1
    assert tensor in checked.out
