"""Whatever is wrong with the input: one line on stderr, exit status 2, and no file."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.__main__ import main
from tests import checkpoint_factory as factory

PREFIX = f"model.ckpt-{factory.STEP}"
DATA, INDEX = f"{PREFIX}.data-00000-of-00001", f"{PREFIX}.index"

Damage = Callable[[Path], list[str] | None]
CASES: dict[str, tuple[Damage, str]] = {}


def case(expected: str) -> Callable[[Damage], Damage]:
    """Register a damage: a function of a sound checkpoint's folder, returning other arguments if
    need be."""

    def register(damage: Damage) -> Damage:
        CASES[damage.__name__] = damage, expected
        return damage

    return register


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


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def truncate(path: Path, keep: int) -> None:
    with path.open("r+b") as file:
        file.truncate(keep)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write the checkpoint anew with other tensors."""
    tensors: dict[str, Any] = factory.with_slots(factory.tf_weights())
    change(tensors)
    factory.write_tf(folder, tensors)


def configure(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**factory.CONFIG, **values}))


def write_bin(folder: Path, state: Any) -> list[str]:
    torch.save(state, folder / "pytorch_model.bin")
    return [str(folder / "pytorch_model.bin")]


def state_dict(prefix: str = "transformer.") -> dict[str, torch.Tensor]:
    return factory.community_state_dict(factory.tf_weights(), prefix=prefix)


# The source as a whole.


@case("does not exist")
def source_does_not_exist(folder: Path) -> list[str]:
    return [str(folder / "nowhere")]


@case("no checkpoint")
def folder_is_empty(folder: Path) -> list[str]:
    (folder / "empty").mkdir()
    return [str(folder / "empty")]


@case("neither a TensorFlow checkpoint nor")
def source_is_a_text_file(folder: Path) -> list[str]:
    return [str(folder / "vocab.txt")]


@case("neither a file nor a folder")
def source_is_a_pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe")
    return [str(folder / "pipe")]


@case("safetensors file already")
def source_is_converted_already(folder: Path) -> list[str]:
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return [str(folder / "x.safetensors")]


@case(f"{INDEX} is missing")
def index_is_missing(folder: Path) -> None:
    (folder / INDEX).unlink()


@case(f"{INDEX} is missing")
def index_is_missing_beside_the_data_file(folder: Path) -> list[str]:
    (folder / INDEX).unlink()
    return [str(folder / DATA)]


@case(f"{PREFIX}.index is missing")
def index_is_missing_for_the_prefix(folder: Path) -> list[str]:
    (folder / INDEX).unlink()
    return [str(folder / PREFIX)]


@case(rf"{DATA} is missing; the index expects [\d,]+ bytes of data, \d+ entries")
def data_is_missing(folder: Path) -> None:
    (folder / DATA).unlink()


@case(r"truncated: found [\d,]+ bytes, the index expects [\d,]+")
def data_is_truncated(folder: Path) -> None:
    truncate(folder / DATA, 1000)


@case("truncated: found 0 bytes")
def data_is_empty(folder: Path) -> None:
    truncate(folder / DATA, 0)


@case("'newslm/embeddings/LayerNorm_embed_norm/beta' .* is damaged")
def data_has_a_flipped_bit(folder: Path) -> None:
    flip(folder / DATA, 8 + 5)


@case("is damaged")
def data_is_of_another_checkpoint(folder: Path) -> None:
    size = (folder / DATA).stat().st_size
    (folder / DATA).write_bytes(np.random.default_rng(1).bytes(size))


@case("damaged or no TensorFlow checkpoint")
def index_is_empty(folder: Path) -> None:
    truncate(folder / INDEX, 0)


@case("damaged or no TensorFlow checkpoint")
def index_is_truncated(folder: Path) -> None:
    truncate(folder / INDEX, 500)


@case("damaged or no TensorFlow checkpoint")
def index_is_garbage(folder: Path) -> None:
    (folder / INDEX).write_bytes(np.random.default_rng(1).bytes(5000))


@case("damaged or no TensorFlow checkpoint")
def index_has_a_flipped_bit(folder: Path) -> None:
    flip(folder / INDEX, 100)


@case("is damaged|can't read|is no TensorFlow")
def index_is_a_web_page(folder: Path) -> None:
    (folder / INDEX).write_text("<html>404 Not Found</html>\n" * 100)


@case("missing in .*data-00001-of-00002")
def a_shard_is_missing(folder: Path) -> None:
    (folder / DATA).rename(folder / f"{PREFIX}.data-00000-of-00002")


@case("belong to several checkpoints")
def shards_of_two_checkpoints(folder: Path) -> None:
    shutil.copy(folder / DATA, folder / f"{PREFIX}.data-00000-of-00002")


def second_checkpoint(folder: Path) -> None:
    for name in (DATA, INDEX):
        shutil.copy(folder / name, folder / name.replace("-70.", "-80."))


@case("several checkpoints in .*: model.ckpt-70, model.ckpt-80, and no file")
def several_checkpoints(folder: Path) -> None:
    second_checkpoint(folder)


@case("several checkpoints in .*names model.ckpt-90, which is not there")
def several_checkpoints_and_the_state_file_names_another(folder: Path) -> None:
    second_checkpoint(folder)
    (folder / "checkpoint").write_text('model_checkpoint_path: "/home/x/model.ckpt-90"\n')


# The tensors.


@case("unknown tensor 'newslm/layer00/query_layer/kernle'")
def an_unknown_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer00/query_layer/kernle": np.zeros(3)}))


@case("unknown tensor 'newslm/other/adafactor_v'")
def a_slot_of_an_unknown_weight(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/other/adafactor_v": np.zeros(3)}))


@case("unknown tensor 'newslm/layer1/output/bias'")
def a_layer_number_of_one_digit(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer1/output/bias": np.zeros(3)}))


@case("missing tensor 'newslm/layer01/key_layer/bias'")
def a_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("newslm/layer01/key_layer/bias"))


@case("layer 1 is missing altogether")
def a_missing_layer(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "layer01" in name]:
            del tensors[name]

    rewrite(folder, change)


@case("layer 42 is missing altogether|num_hidden_layers 3 against 9000")
def a_layer_far_out(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer8999/output/bias": np.zeros(3)}))


@case(r"'newslm/layer02/output/kernel' has shape \(64, 96\), expected \(96, 64\)")
def a_transposed_kernel(folder: Path) -> None:
    name = "newslm/layer02/output/kernel"
    rewrite(folder, lambda t: t.update({name: t[name].T}))


@case(r"'newslm/layer00/query_layer/bias' has shape \(65,\), expected \(64,\)")
def a_wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer00/query_layer/bias": np.zeros(65, "f4")}))


@case("'newslm/layer00/query_layer/bias' holds int64, expected floating point")
def a_weight_of_integers(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer00/query_layer/bias": np.zeros(64, "i8")}))


@case("'newslm/layer00/query_layer/bias' holds no numbers")
def a_weight_of_strings(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/layer00/query_layer/bias": np.array([b"x"] * 64)}))


@case("'.*word_embed' is missing")
def no_embedding(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("newslm/embeddings/word_embed"))


@case("'.*word_embed' has shape")
def an_embedding_of_one_dimension(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"newslm/embeddings/word_embed": np.zeros(5, "f4")}))


@case(
    "unknown tensor 'x'; 'newslm/layer00/output/bias' holds int64, expected floating point; "
    r"'newslm/layer02/output/kernel' has shape \(96, 65\), expected \(96, 64\); "
    "layer 1 is missing altogether .*; missing tensor 'newslm/layer00/key_layer/bias'"
)
def faults_of_every_kind(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["x"] = np.zeros(3)
        tensors["newslm/layer00/output/bias"] = np.zeros(64, "i8")
        tensors["newslm/layer02/output/kernel"] = np.zeros((96, 65), "f4")
        del tensors["newslm/layer00/key_layer/bias"]
        for name in [name for name in tensors if "layer01" in name]:
            del tensors[name]

    rewrite(folder, change)


@case("no layers")
def no_layers(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if "newslm/layer" in name]:
            del tensors[name]

    rewrite(folder, change)


@case("'.*word_embed' is missing; unknown tensor 'bert/")
def another_model(folder: Path) -> None:
    factory.write_tf(folder, {"bert/embeddings/word_embeddings": np.zeros((5, 4), "f4")})


@case("'blocks.1.mlp.up.bias' has values like 70000, beyond the largest of float16, 65504")
def float16_overflows(folder: Path) -> list[str]:
    def change(tensors: dict[str, Any]) -> None:
        tensors["newslm/layer01/intermediate/bias"][3] = 70000

    rewrite(folder, change)
    return [str(folder), "--dtype", "float16"]


# The configuration.


@case("config.json is not JSON")
def config_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{hidden_size: 64}")


@case("config.json is not JSON")
def config_is_nested_without_end(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)


@case("config.json is not JSON")
def config_is_binary(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00" * 50)


@case("not a JSON object")
def config_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


@case("too large for a configuration")
def config_is_huge(folder: Path) -> None:
    (folder / "config.json").write_text(" " * (2 << 20) + "{}")


@case("no configuration of this model")
def config_is_of_something_else(folder: Path) -> None:
    (folder / "config.json").write_text('{"name": "x"}')


@case("contradicts the checkpoint: hidden_size 65 against 64")
def config_contradicts_the_width(folder: Path) -> None:
    configure(folder, hidden_size=65)


@case("num_hidden_layers 48 against 3 in the tensors, intermediate_size 7 against 96")
def config_contradicts_two_sizes(folder: Path) -> None:
    configure(folder, num_hidden_layers=48, intermediate_size=7)


@case("hidden_size 64 is not divisible by num_attention_heads 5")
def config_heads_do_not_divide(folder: Path) -> None:
    configure(folder, num_attention_heads=5)


@case("num_attention_heads is '4'; expected a whole number")
def config_has_a_string(folder: Path) -> None:
    configure(folder, num_attention_heads="4")


@case("hidden_dropout_prob is")
def config_has_an_impossible_probability(folder: Path) -> None:
    configure(folder, hidden_dropout_prob=float("nan"))


@case("contradicts itself: hidden_size 64, n_embd 128")
def config_dialects_disagree(folder: Path) -> None:
    configure(folder, n_embd=128)


@case("several configurations in")
def several_configs(folder: Path) -> None:
    (folder / "config.json").rename(folder / "a.json")
    shutil.copy(folder / "a.json", folder / "b.json")


@case("config.json is no file")
def given_config_is_a_pipe(folder: Path) -> list[str]:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return [str(folder), "--config", str(folder / "config.json")]


@case("nowhere.json")
def given_config_does_not_exist(folder: Path) -> list[str]:
    return [str(folder), "--config", str(folder / "nowhere.json")]


# The vocabulary.


@case("no vocabulary .* needs one of 45 lines")
def vocabulary_is_missing(folder: Path) -> None:
    (folder / "vocab.txt").unlink()


@case("has 44 lines; the checkpoint needs one of 45 lines")
def vocabulary_is_short(folder: Path) -> None:
    (folder / "vocab.txt").write_text("".join(f"{i}\n" for i in range(44)))


@case("has 46 lines; the checkpoint needs one of 45 lines")
def vocabulary_is_long(folder: Path) -> None:
    (folder / "vocab.txt").write_text(factory.VOCAB + "x")


@case("has 0 lines")
def vocabulary_is_empty(folder: Path) -> None:
    (folder / "vocab.txt").write_text("")


@case("vocab.txt, line 2: not UTF-8")
def vocabulary_is_in_another_encoding(folder: Path) -> None:
    (folder / "vocab.txt").write_bytes("[PAD]\n今天\n".encode("gb18030") * 20)


@case("several vocabularies fit: a-vocab.txt, b-vocab.txt")
def several_vocabularies(folder: Path) -> None:
    (folder / "vocab.txt").rename(folder / "a-vocab.txt")
    (folder / "b-vocab.txt").write_text(factory.VOCAB.replace("7", "八"))


@case("can't read the vocabulary")
def given_vocabulary_does_not_exist(folder: Path) -> list[str]:
    return [str(folder), "--vocab", str(folder / "nowhere.txt")]


@case("can't read the vocabulary")
def given_vocabulary_is_a_folder(folder: Path) -> list[str]:
    return [str(folder), "--vocab", str(folder)]


@case("can't read the vocabulary .*: it is no file")
def given_vocabulary_is_a_pipe(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe")
    return [str(folder), "--vocab", str(folder / "pipe")]


@case("not allowed with argument --vocab")
def a_vocabulary_and_none(folder: Path) -> list[str]:
    return [str(folder), "--vocab", str(folder / "vocab.txt"), "--no-vocab"]


@case("invalid choice: 'int3'")
def an_unknown_dtype(folder: Path) -> list[str]:
    return [str(folder), "--dtype", "int3"]


# The community's PyTorch file.


class RunsCode:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@case("no plain state dict, or hostile: .*; nothing was run")
def bin_would_run_code(folder: Path) -> list[str]:
    return write_bin(folder, {"wte.weight": RunsCode()})


@case("no plain state dict, or hostile: .*; nothing was run")
def bin_is_a_bare_hostile_pickle(folder: Path) -> list[str]:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode()))
    return [str(folder / "pytorch_model.bin")]


@case("is damaged or truncated")
def bin_is_truncated(folder: Path) -> list[str]:
    arguments = write_bin(folder, state_dict())
    truncate(folder / "pytorch_model.bin", 100_000)
    return arguments


@case("neither a TensorFlow checkpoint nor a PyTorch file")
def bin_is_empty(folder: Path) -> list[str]:
    (folder / "pytorch_model.bin").touch()
    return [str(folder / "pytorch_model.bin")]


@case("is damaged or truncated")
def bin_is_another_zip(folder: Path) -> list[str]:
    shutil.make_archive(str(folder / "x"), "zip", folder, "vocab.txt")
    (folder / "x.zip").rename(folder / "pytorch_model.bin")
    return [str(folder / "pytorch_model.bin")]


@case("is damaged or truncated: it would inflate to 100,000,001 bytes")
def bin_is_a_zip_bomb(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
        archive.writestr("archive/version", "3")
    return [str(folder / "pytorch_model.bin")]


@case("'h.1.ln_2.bias' holds no numbers")
def bin_has_a_nested_tensor(folder: Path) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are a prototype
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    return write_bin(folder, {**state_dict(), "transformer.h.1.ln_2.bias": nested})


@case("'h.1.ln_2.bias' holds no numbers")
def bin_has_a_tensor_without_memory(folder: Path) -> list[str]:
    empty = torch.empty(64, device="meta")
    return write_bin(folder, {**state_dict(), "transformer.h.1.ln_2.bias": empty})


@case("'h.1.ln_2.bias' holds complex64, expected floating point")
def bin_has_complex_numbers(folder: Path) -> list[str]:
    numbers = torch.ones(64, dtype=torch.complex64)
    return write_bin(folder, {**state_dict(), "transformer.h.1.ln_2.bias": numbers})


@case(r"unknown tensor 'h.0.\\x1b\[31mx'")
def bin_has_a_name_that_steers_the_terminal(folder: Path) -> list[str]:
    return write_bin(folder, {**state_dict(), "transformer.h.0.\x1b[31mx": torch.zeros(2)})


@case("holds list; expected a state dict")
def bin_holds_a_list(folder: Path) -> list[str]:
    return write_bin(folder, [torch.zeros(3)])


@case("'h.2.attn.c_attn.weight' holds no numbers")
def bin_has_a_value_that_is_no_tensor(folder: Path) -> list[str]:
    return write_bin(folder, {**state_dict(), "transformer.h.2.attn.c_attn.weight": 3})


@case("missing tensor 'h.1.ln_2.bias'")
def bin_lacks_a_tensor(folder: Path) -> list[str]:
    state = state_dict()
    del state["transformer.h.1.ln_2.bias"]
    return write_bin(folder, state)


@case("unknown tensor 'h.0.attn.q.weight'")
def bin_has_an_unknown_tensor(folder: Path) -> list[str]:
    return write_bin(folder, {**state_dict(), "transformer.h.0.attn.q.weight": torch.zeros(2)})


@case("lm_head.weight differs from wte.weight")
def bin_has_an_untied_output(folder: Path) -> list[str]:
    state = state_dict()
    return write_bin(folder, {**state, "lm_head.weight": state["lm_head.weight"] + 1})


@case("has 'wte.weight' twice")
def bin_has_a_tensor_with_and_without_prefix(folder: Path) -> list[str]:
    return write_bin(folder, {**state_dict(""), **state_dict()})


@case("several .bin files")
def several_bins(folder: Path) -> list[str]:
    other = folder / "bins"
    other.mkdir()
    for name in "ab":
        torch.save({}, other / f"{name}.bin")
    return [str(other)]


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
        (out_exists, "exists already; --force overwrites it"),
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
        (lambda path: path.parent, "new", "is a folder; expected a .safetensors file"),
        (truncated, "new", "truncated: found"),
        (lambda path: path.with_name("vocab.txt"), "new", "not a safetensors file|bytes"),
        (lambda path: path, "ckpt/vocab.txt", "is a file; --to-tf writes a folder"),
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
