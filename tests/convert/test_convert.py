"""The converter on sound inputs: what it finds, what it writes, and the way back."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from convert.__main__ import main
from gpt2ml_torch import Tokenizer
from gpt2ml_torch.__main__ import main as gpt2ml
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers import checkpoint_factory as factory

PREFIX = f"model.ckpt-{factory.STEP}"
DATA, INDEX = f"{PREFIX}.data-00000-of-00001", f"{PREFIX}.index"


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factory.write_folder(tmp_path_factory.mktemp("sound") / "ckpt")


@pytest.fixture
def folder(sound_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_folder, tmp_path / "ckpt"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def run(*arguments: str | Path) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def assert_identical(path: Path, expected: Mapping[str, Tensor]) -> None:
    found = ModelFile.open(path).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        bits = found[name].contiguous().view(torch.uint8)
        assert torch.equal(bits, tensor.contiguous().view(torch.uint8)), name


def test_a_folder_converts_bit_for_bit(
    folder: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(folder, out)
    assert_identical(out, factory.expected_tensors(factory.tf_weights()))
    metadata = ModelFile.open(out)
    assert metadata.vocab == factory.VOCAB
    assert metadata.config.num_attention_heads == factory.HEADS
    assert metadata.source["name"] == PREFIX
    assert metadata.source["step"] == factory.STEP
    stdout, stderr = capfd.readouterr()
    assert stderr == ""
    assert f"{metadata.config.num_parameters:,} parameters" in stdout
    assert f"dropped: 1 step counter, {len(factory.tf_weights()) + 20} optimiser slots" in stdout
    assert f"python -m gpt2ml_torch generate {out}" in stdout


@pytest.mark.parametrize("name", [PREFIX, INDEX, DATA, "checkpoint"])
def test_any_of_its_names_stands_for_a_checkpoint(name: str, folder: Path, out: Path) -> None:
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{PREFIX}"\n')
    run(folder / name, out)
    assert_identical(out, factory.expected_tensors(factory.tf_weights()))


@pytest.mark.parametrize(
    "place", ["", "/home/somebody/gpt2/", "gs://bucket/run/", "C:\\\\models\\\\"]
)
def test_the_state_file_chooses_whatever_folder_it_names(
    place: str, folder: Path, out: Path
) -> None:
    other = factory.with_slots(factory.tf_weights(seed=1))
    factory.write_tf(folder, other, name="model.ckpt-80")
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{place}model.ckpt-80"\n')
    run(folder, out)
    assert_identical(out, factory.expected_tensors(factory.tf_weights(seed=1)))


def test_a_lone_checkpoint_needs_no_right_state_file(folder: Path, out: Path) -> None:
    (folder / "checkpoint").write_bytes(b"\xff\xfe garbage")
    run(folder, out)


def test_more_than_a_hundred_layers_are_read(folder: Path, out: Path) -> None:
    weights = factory.tf_weights(layers=101)
    factory.write_tf(folder, weights)
    (folder / "config.json").unlink()
    run(folder, out)
    found = ModelFile.open(out).state_dict()["blocks.100.mlp.down.bias"]
    assert np.array_equal(found, weights["newslm/layer100/output/bias"])


def test_several_shards_are_read(folder: Path, out: Path) -> None:
    run(factory.write_shards(folder, factory.with_slots(factory.tf_weights())), out)
    assert_identical(out, factory.expected_tensors(factory.tf_weights()))


@pytest.mark.parametrize("name", ["config.json", "bert_config.json", "mega.json"])
def test_the_other_dialect_is_read_under_any_usual_name(name: str, folder: Path, out: Path) -> None:
    (folder / "config.json").unlink()
    dialect = {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_ctx": 16, "n_positions": 16}
    (folder / name).write_text(json.dumps({**dialect, "n_inner": None, "resid_pdrop": 0.25}))
    run(folder, out)
    config = ModelFile.open(out).config
    assert (config.num_attention_heads, config.hidden_dropout_prob) == (8, 0.25)


def test_without_a_config_the_head_size_is_the_published_one(
    folder: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").unlink()
    run(folder, out)
    assert ModelFile.open(out).config.num_attention_heads == 1
    assert "took width 64 / 64 = 1" in capfd.readouterr().out


def test_of_the_vocabulary_size_the_tensor_counts(
    folder: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").write_text(json.dumps({**factory.CONFIG, "vocab_size": 8021}))
    run(folder, out)
    assert ModelFile.open(out).config.vocab_size == factory.ROWS
    assert "vocab_size 8021, but the tensor has 45 rows" in capfd.readouterr().out


def test_the_vocabulary_that_fits_is_chosen(folder: Path, out: Path) -> None:
    (folder / "vocab.txt").write_text("too\nshort\n")
    fitting = factory.VOCAB.removesuffix("\n").replace("字3\n", "a\u2028b\n")
    (folder / "clue-vocab.txt").write_text(fitting)
    run(folder, out)
    assert ModelFile.open(out).vocab == fitting


@pytest.fixture
def like_the_15g_checkpoint(folder: Path) -> Path:
    """21,130 rows, 21,128 lines of vocabulary, and a configuration that says 8,021."""
    weights = factory.with_slots(factory.tf_weights())
    weights["newslm/embeddings/word_embed"] = np.ones((21_130, factory.WIDTH), np.float32)
    factory.write_tf(folder, weights)
    (folder / "config.json").write_text(json.dumps({**factory.CONFIG, "vocab_size": 8021}))
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n" + "".join(f"{i}\n" for i in range(21_126)))
    return folder


def test_the_two_reserved_ids_of_the_15g_checkpoint_have_no_text_and_are_not_produced(
    like_the_15g_checkpoint: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(like_the_15g_checkpoint, out)
    said = capfd.readouterr().out
    assert "says vocab_size 8021, but the tensor has 21130 rows; took 21130" in said
    assert "2 rows of the embedding have no token (reserved; never produced)" in said
    tokenizer = Tokenizer.from_pretrained(out)
    assert (len(tokenizer), tokenizer.num_embeddings) == (21_128, 21_130)
    assert tokenizer.banned_ids[-2:] == (21_128, 21_129)
    assert tokenizer.decode([21_128, 21_129]) == ""


def test_the_other_published_vocabulary_is_told_apart_by_its_length(
    like_the_15g_checkpoint: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (like_the_15g_checkpoint / "vocab.txt").write_text("x\n" * 8_021)
    assert main([str(like_the_15g_checkpoint), str(out)]) == 2
    needed = "has 8021 lines; the checkpoint needs bert-base-chinese, 21,128 lines"
    assert needed in capfd.readouterr().err


def test_no_vocabulary_on_request(folder: Path, out: Path) -> None:
    run(folder, out, "--no-vocab")
    assert ModelFile.open(out).vocab is None


@pytest.mark.parametrize(
    ("rows", "lines", "fits"),
    [(21_130, 21_128, True), (21_130, 21_130, True), (21_130, 21_129, False), (99, 97, False)],
)
def test_only_the_published_15g_checkpoint_has_two_reserved_rows(
    rows: int, lines: int, fits: bool
) -> None:
    from convert.vocabulary import Vocabulary

    assert Vocabulary(Path("vocab.txt"), "x\n" * lines).fits(rows) is fits


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_16_bits_are_rounded_to_nearest(name: str, folder: Path, out: Path) -> None:
    dtype = getattr(torch, name)
    run(folder, out, "--dtype", name)
    exact = factory.expected_tensors(factory.tf_weights())
    assert_identical(out, {key: value.to(dtype) for key, value in exact.items()})


def test_float64_is_rounded_once(folder: Path, out: Path) -> None:
    """Just above the middle of two bfloat16 numbers; by way of float32 it would round to the
    middle, then to even."""
    weights: dict[str, Any] = factory.with_slots(factory.tf_weights())
    name = "newslm/layer00/output/bias"
    middle = 1 + 2**-8
    weights[name] = np.array([middle + 2**-40, middle - 2**-40, -middle - 2**-40, 0.3] * 16)
    factory.write_tf(folder, weights)
    run(folder, out, "--dtype", "bfloat16")
    found = ModelFile.open(out).state_dict()["blocks.0.mlp.down.bias"][:4].tolist()
    assert found == [1 + 2**-7, 1.0, -1 - 2**-7, torch.tensor(0.3).bfloat16().item()]


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64"])
def test_variables_of_other_dtypes_are_read(name: str, folder: Path, out: Path) -> None:
    tf = factory.tensorflow()
    weights = factory.tf_weights()
    cast = {key: tf.cast(value, getattr(tf, name)) for key, value in weights.items()}
    factory.write_tf(folder, cast)
    run(folder, out)
    dtype = getattr(torch, name)
    exact = factory.expected_tensors(weights)
    assert_identical(out, {key: value.to(dtype).float() for key, value in exact.items()})


@pytest.mark.parametrize("prefix", ["transformer.", ""])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_communitys_file_gives_the_same_data(
    prefix: str, legacy: bool, folder: Path, tmp_path: Path
) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    state = factory.community_state_dict(factory.tf_weights(), prefix=prefix)
    torch.save(state, bin_folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    for name in ("config.json", "vocab.txt"):
        shutil.copy(folder / name, bin_folder)
    run(folder, tmp_path / "tf.safetensors")
    run(bin_folder, tmp_path / "bin.safetensors")
    one, other = (ModelFile.open(tmp_path / f"{name}.safetensors") for name in ("tf", "bin"))
    assert (one.config, one.vocab, one.tensors) == (other.config, other.vocab, other.tensors)
    assert_identical(tmp_path / "bin.safetensors", factory.expected_tensors(factory.tf_weights()))


def test_the_communitys_tensors_may_lie_scattered_in_memory(folder: Path, out: Path) -> None:
    def scattered(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, -tensor], dim=-1)[..., 0]

    state = factory.community_state_dict(factory.tf_weights())
    path = folder / "pytorch_model.bin"
    torch.save({name: scattered(tensor) for name, tensor in state.items()}, path)
    run(path, out)
    assert_identical(out, factory.expected_tensors(factory.tf_weights()))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packing_at_once_is_packing_afterwards(
    precision: str, folder: Path, out: Path, tmp_path: Path
) -> None:
    plain, packed = tmp_path / "plain.safetensors", tmp_path / "packed.safetensors"
    run(folder, plain)
    assert gpt2ml(["quantize", str(plain), "--out", str(packed), "--to", precision]) == 0
    run(folder, out, "--dtype", precision)
    assert_identical(out, ModelFile.open(packed).state_dict())


def test_neither_way_needs_tensorflow(folder: Path, out: Path) -> None:
    torch.save(factory.community_state_dict(factory.tf_weights()), folder / "pytorch_model.bin")
    code = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "from convert.__main__ import main\n"
        f"folder, out = {str(folder)!r}, {str(out)!r}\n"
        "sys.exit(main([folder, out]) or main(['--to-tf', out, folder + '/back'])\n"
        "  or main([folder + '/pytorch_model.bin', out, '--force']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_float32_checkpoint_converts_before_pytorch_would_have_started(
    folder: Path, out: Path
) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from convert.__main__ import main\n"
        f"sys.exit(main([{str(folder)!r}, {str(out)!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_to_tensorflow_and_back_is_the_identity(folder: Path, out: Path, tmp_path: Path) -> None:
    run(folder, out)
    back, again = tmp_path / "back", tmp_path / "again.safetensors"
    run("--to-tf", out, back)
    run(back, again)
    assert again.read_bytes() == out.read_bytes()
    assert (back / "vocab.txt").read_text() == factory.VOCAB


def test_what_goes_back_is_what_the_original_code_restores(
    folder: Path, out: Path, tmp_path: Path
) -> None:
    """As the original does it: build the variables, and let a Saver restore them."""
    tf = factory.tensorflow()
    run(folder, out)
    run("--to-tf", out, tmp_path / "back")
    prefix = tf.train.latest_checkpoint(str(tmp_path / "back"))
    assert prefix == str(tmp_path / "back" / PREFIX)
    expected = {**factory.tf_weights(), "global_step": np.array(factory.STEP, np.int64)}
    assert {name for name, _ in tf.train.list_variables(prefix)} == expected.keys()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = {
            name: tf.compat.v1.get_variable(name, value.shape, tf.as_dtype(value.dtype))
            for name, value in expected.items()
        }
        tf.compat.v1.train.Saver().restore(session, prefix)
        for name, value in expected.items():
            assert np.array_equal(session.run(variables[name]), value), name


def test_going_back_keeps_what_is_there_unless_told(
    folder: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run(folder, out)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    capfd.readouterr()
    assert main(["--to-tf", str(out), str(folder)]) == 2
    assert "already; --force overwrites" in capfd.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    run("--to-tf", out, folder, "--force")


def test_a_published_size_with_another_hash_stops(
    folder: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from convert import published

    known = published.PUBLISHED[0]
    size = (folder / DATA).stat().st_size
    monkeypatch.setattr(published, "by_size", lambda found: known if found == size else None)
    assert main([str(folder), str(out)]) == 2
    assert re.search("has the size of the published .*another SHA-256", capfd.readouterr().err)
    assert not out.exists()
    run(folder, out, "--no-verify")


def test_a_published_checkpoint_is_recognised_by_its_hash(
    folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert import published

    known = published.PUBLISHED[0]
    monkeypatch.setattr(published, "may_be", lambda size, kind: True)
    monkeypatch.setattr(published, "by_hash", lambda sha256: known)
    run(folder, out)
    assert ModelFile.open(out).source == {
        "name": "model.ckpt-100000",
        "step": 100_000,
        "sha256": known.data_sha256,
        "published": "GPT2_ML, 15G corpus",
    }


@pytest.mark.parametrize("size", [0, 1, 65_536, 200_001])
def test_the_hash_is_that_of_the_whole_file_however_many_windows_it_takes(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert import published

    monkeypatch.setattr(published, "_WINDOW", 65_536)  # a multiple of every system's pages
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "file").write_bytes(content)
    found = published.file_sha256(tmp_path / "file", threading.Event())
    assert found == hashlib.sha256(content).hexdigest()


def test_killed_at_any_moment_it_leaves_the_old_file_or_the_new_one(
    folder: Path, out: Path
) -> None:
    """The child converts over and over, so that the kills land in every phase of it."""
    old = b"precious"
    run(folder, out)
    new = out.read_bytes()
    code = (
        "import sys; from convert.__main__ import main\n"
        f"arguments = [{str(folder)!r}, {str(out)!r}, '--force']\n"
        "main(arguments)\n"
        "print('ready', flush=True)\n"
        "while True: main(arguments)\n"
    )
    random = np.random.default_rng(0)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        while b"ready" not in child.stdout.readline():
            pass
        for _ in range(10):
            out.write_bytes(old)
            time.sleep(random.uniform(0, 0.02))
            child.send_signal(signal.SIGSTOP)  # as good as killed: nothing of it runs on
            assert out.read_bytes() in (old, new)
            child.send_signal(signal.SIGCONT)
        child.kill()
        child.wait()
        child.stdout.close()
        assert out.read_bytes() in (old, new)
    run(folder, out, "--force")
    assert out.read_bytes() == new
    assert sorted(os.listdir(out.parent)) == ["ckpt", out.name]
