"""Exported folders: what is in them, and that they are complete or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gpt2ml_torch import GPT2ML, Tokenizer
from gpt2ml_torch.__main__ import main
from gpt2ml_torch.export.folder import ExportOptions, export_folder
from gpt2ml_torch.export.names import exported_names
from tests.helpers.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer()
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    tiny_model(tokenizer).save_pretrained(
        path,
        tokenizer=tokenizer,
        source={"name": "tiny"},
        generation={"top_k": 5, "stop": ["。"], "max_new_tokens": 9},
    )
    return path


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for shard in folder.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }


def test_the_weights_are_ours_with_qkv_apart(file: Path, tmp_path: Path) -> None:
    weights = _weights(export_folder(file, tmp_path / "folder"))
    state = GPT2ML.from_pretrained(file).state_dict()
    for name, tensor in state.items():
        parts = [weights.pop(part) for part in exported_names(name)]
        assert torch.equal(torch.cat(parts), tensor)
    assert not weights


@pytest.mark.parametrize("size", ["20KB", "0.00002GB", "40 KiB"])
def test_shards_are_of_at_most_the_size_and_the_index_is_complete(
    file: Path, tmp_path: Path, size: str
) -> None:
    folder = export_folder(file, tmp_path / "folder", ExportOptions(shard_size=size))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    limit = ExportOptions(shard_size=size).shard_bytes
    for shard in set(index["weight_map"].values()):
        tensors = load_file(folder / shard)
        assert set(tensors) == {n for n, s in index["weight_map"].items() if s == shard}
        assert sum(t.nbytes for t in tensors.values()) <= limit
    assert _weights(folder).keys() == index["weight_map"].keys()


def test_a_precision_can_be_chosen(file: Path, tmp_path: Path) -> None:
    folder = export_folder(file, tmp_path / "folder", ExportOptions(dtype="bfloat16"))
    weights, state = _weights(folder), GPT2ML.from_pretrained(file).state_dict()
    found = weights["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(found, state["blocks.1.mlp.down.weight"].bfloat16())
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_generation_defaults_and_banned_ids_are_transformers_own(
    file: Path, tmp_path: Path
) -> None:
    folder = export_folder(file, tmp_path / "folder")
    values = json.loads((folder / "generation_config.json").read_text())
    assert (values["top_k"], values["do_sample"], values["max_new_tokens"]) == (5, True, 9)
    banned = Tokenizer.from_pretrained(file).banned_ids
    assert values["suppress_tokens"] == list(banned)
    assert "stop" not in values


def test_an_existing_folder_is_replaced_only_if_told_and_only_an_exported_one(
    file: Path, tmp_path: Path
) -> None:
    folder = export_folder(file, tmp_path / "folder")
    with pytest.raises(FileExistsError):
        export_folder(file, folder)
    export_folder(file, folder, ExportOptions(overwrite=True, code=False))
    assert not list(folder.glob("*.py"))
    (folder / "mine.txt").write_text("x")
    with pytest.raises(OSError, match="holds something other than an exported model"):
        export_folder(file, folder, ExportOptions(overwrite=True))
    assert (folder / "mine.txt").exists()
    (folder / "mine.txt").unlink()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OSError, match="holds something other than an exported model"):
        export_folder(file, folder, ExportOptions(overwrite=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


def test_a_killed_export_leaves_nothing_under_the_name(file: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from gpt2ml_torch.export import folder\n"
        "folder._replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder.export_folder(*sys.argv[1:])"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(file), str(tmp_path / "folder")])
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "folder").exists()
    assert (tmp_path / "folder.partial").is_dir()
    export_folder(file, tmp_path / "folder")  # takes over what was left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard-size", "many"], "--shard-size is 'many'; expected a size such as 5GB"),
        (["--shard-size", "9" * 400 + "GB"], "expected a size such as 5GB"),
        (["--shard-size", "0"], "--shard-size is '0'; expected a size such as 5GB"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_wrong_options_are_one_line(
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert main(["export", str(file), str(tmp_path / "folder"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "folder").exists()


def test_what_can_not_be_exported_says_why(file: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(file), "--out", str(tmp_path / "small.safetensors")]) == 0
    with pytest.raises(ValueError, match=r"int8 weights.*export the file that it was made from"):
        export_folder(tmp_path / "small.safetensors", tmp_path / "folder")
    with pytest.raises(ValueError, match="which would be replaced"):
        export_folder(file, file.parent, ExportOptions(overwrite=True))
    with pytest.raises(OSError, match="does not exist; create it first"):
        export_folder(file, tmp_path / "no" / "folder")
    with pytest.raises(NotADirectoryError, match="not a folder"):
        export_folder(file, file)


def test_exporting_needs_no_transformers(file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from gpt2ml_torch.__main__ import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 'transformers' in sys.modules or 'tokenizers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "export", str(file), str(tmp_path / "folder")]
    assert subprocess.run(command, env=os.environ).returncode == 0
