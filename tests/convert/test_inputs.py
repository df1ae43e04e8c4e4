"""What people really bring that must convert: folders of a Mac, other optimizers' state, other
scopes, the community's layout in today's files, names that a shell or an editor changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from convert.__main__ import main
from gpt2ml_torch.modelfile import ModelFile
from tests.helpers import checkpoint_factory as factory
from tests.helpers.damages import DATA, INDEX, PREFIX

WEIGHTS = factory.tf_weights()
MAC = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100) + b"\xff\xfe"


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return factory.write_folder(tmp_path_factory.mktemp("sound") / "ckpt")


@pytest.fixture
def folder(sound_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound_folder, tmp_path / "ckpt"))


@pytest.fixture
def community(tmp_path: Path) -> Path:
    """A folder without weights, with configuration and vocabulary."""
    (tmp_path / "community").mkdir()
    factory.write_beside(tmp_path / "community")
    return tmp_path / "community"


def assert_converts(
    source: Path | str, out: Path, capfd: pytest.CaptureFixture[str] | None = None
) -> str:
    """Convert; the file must hold the factory's weights and vocabulary. Returns the summary."""
    assert main([str(source), str(out), "--force"]) == 0
    file = ModelFile.open(out)
    found, expected = file.state_dict(), factory.expected_tensors(WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert file.vocab == factory.VOCAB
    return capfd.readouterr().out if capfd else ""


# Beside the checkpoint.


@pytest.mark.parametrize("kind", ["tf", "bin", "safetensors"])
def test_the_twins_that_a_mac_makes_are_left_alone(
    kind: str, folder: Path, community: Path, tmp_path: Path
) -> None:
    if kind != "tf":
        folder = community
        state = factory.community_state_dict(WEIGHTS)
        if kind == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            save_file({n: v.clone() for n, v in state.items()}, folder / "model.safetensors")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    for path in list(folder.iterdir()):
        path.with_name(f"._{path.name}").write_bytes(MAC)
    for name in ("._x-vocab.txt", "._a.json", "._model.ckpt-99.index", "._b.bin"):
        (folder / name).write_bytes(MAC)
    assert_converts(folder, tmp_path / "out")


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"short\n", b"\0" * 99])
def test_another_vocabulary_that_is_no_vocabulary_does_no_harm(
    content: bytes, folder: Path, tmp_path: Path
) -> None:
    for name in ("a-vocab.txt", "vocab_old.txt"):
        (folder / name).write_bytes(content)
    (folder / "my_vocab.txt").symlink_to(folder / "nowhere")
    assert_converts(folder, tmp_path / "out")


@pytest.mark.parametrize("end", ["\n", "\n\n\n", " \n", "\r\n"])
def test_blank_lines_at_the_end_of_a_vocabulary_are_no_tokens(
    end: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "vocab.txt").write_bytes((factory.VOCAB + end).encode())
    said = assert_converts(folder, tmp_path / "out", capfd)
    assert "blank lines at the end of" in said


# TensorFlow's checkpoints.


def test_a_data_file_of_another_count_is_left_alone(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / f"{PREFIX}.data-00000-of-00002").write_bytes(b"half of an older one")
    said = assert_converts(folder, tmp_path / "out", capfd)
    assert f"{PREFIX}.data-00000-of-00002 does not belong to it and was ignored" in said


@pytest.mark.parametrize("typed", [".", ".da", ".data", ".data-", ".data-00000", ".in"])
def test_a_prefix_that_the_shell_completed_too_far_is_understood(
    typed: str, folder: Path, tmp_path: Path
) -> None:
    (folder / f"{PREFIX}.meta").touch()
    assert_converts(folder / (PREFIX + typed), tmp_path / "out")


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (r"it\'s-70", "it's-70"),
        (r"\345\255\227\346\250\241-70", "字模-70"),
        (r"\xe5\xad\x97-70", "字-70"),
        (r"a\\b-70", None),
        (r"say\"x\"-70", 'say"x"-70'),
        ("字模-70", "字模-70"),
    ],
)
def test_escapes_in_the_state_file_are_undone(
    written: str, name: str | None, folder: Path, tmp_path: Path
) -> None:
    for suffix in (".index", ".data-00000-of-00001"):
        for other in ("x-1", name or "b-70"):
            shutil.copy(folder / (PREFIX + suffix), folder / (other + suffix))
    (folder / INDEX).unlink()
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "/home/x/{written}"\n')
    assert_converts(folder, tmp_path / "out")
    assert ModelFile.open(tmp_path / "out").source["name"] == (name or "b-70")


def test_the_state_file_may_be_written_with_single_quotes(folder: Path, tmp_path: Path) -> None:
    for suffix in (".index", ".data-00000-of-00001"):
        shutil.copy(folder / (PREFIX + suffix), folder / ("other-1" + suffix))
    (folder / "checkpoint").write_text(f"model_checkpoint_path: '{PREFIX}'\n")
    assert_converts(folder, tmp_path / "out")


def test_a_tilde_in_quotes_is_the_home_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    vocabulary = folder / "vocab.txt"
    vocabulary.rename(tmp_path / "words.txt")
    arguments = ["~/ckpt", "~/out", "--vocab", "~/words.txt", "--config", "~/ckpt/config.json"]
    assert main(arguments) == 0
    assert (tmp_path / "out").is_file()


BIAS = "newslm/layer01/output/bias"
OTHER_STATE: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "Adam": lambda w: {
        **{f"{name}/Adam": value for name, value in w.items()},
        **{f"{name}/Adam_1": value for name, value in w.items()},
        "beta1_power": np.float32(0.9),
        "beta2_power": np.float32(0.999),
    },
    "Momentum": lambda w: {f"{name}/Momentum": value for name, value in w.items()},
    "LAMB": lambda w: {
        **{f"{name}/lamb_m": value for name, value in w.items()},
        **{f"{name}/lamb_v": value for name, value in w.items()},
    },
    "an optimizer in a scope": lambda w: {
        **{f"OptimizeLoss/{name}/Adam": value for name, value in w.items()},
        "OptimizeLoss/learning_rate": np.float32(1e-4),
        "OptimizeLoss/beta1_power": np.float32(0.9),
    },
    "accumulated gradients": lambda w: {
        **{f"{name}/accum_grad": value for name, value in w.items()},
        "local_step": np.array(3, np.int32),
    },
    "scaled losses": lambda w: {
        "current_loss_scale": np.float32(2**15),
        "loss_scale/good_steps": np.array(7, np.int64),
        "learning_rate": np.float32(1e-4),
    },
}


@pytest.mark.parametrize("optimizer", OTHER_STATE)
def test_other_optimizers_state_is_dropped_and_counted(
    optimizer: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = OTHER_STATE[optimizer](WEIGHTS)
    factory.write_tf(folder, {**WEIGHTS, **state, "global_step": np.array(70, np.int64)})
    said = assert_converts(folder, tmp_path / "out", capfd)
    slots = sum(np.ndim(value) > 0 for value in state.values())
    scalars = len(state) - slots
    counts = [(1, "step counter"), (slots, "optimiser slots"), (scalars, "scalars")]
    for count, what in counts:
        assert (f"{count} {what}" in said) == bool(count), said


def test_moving_averages_are_dropped_with_a_note(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    averages = {f"{name}/ExponentialMovingAverage": value * 2 for name, value in WEIGHTS.items()}
    factory.write_tf(folder, {**WEIGHTS, **averages})
    said = assert_converts(folder, tmp_path / "out", capfd)
    assert f"note        {len(WEIGHTS)} moving averages of weights were dropped" in said


@pytest.mark.parametrize("scope", ["model/newslm/", "", "tower_0/model/", "gpt/newslm/"])
def test_weights_under_another_scope_are_recognised(
    scope: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = factory.with_slots(WEIGHTS)
    moved = {name.replace("newslm/", scope, 1): value for name, value in tensors.items()}
    factory.write_tf(folder, moved)
    said = assert_converts(folder, tmp_path / "out", capfd)
    assert f"the weights' names begin with {scope!r}, not 'newslm/'" in said
    assert "1 step counter" in said
    out = tmp_path / "kept"
    assert main([str(folder), str(out), "--keep-optimizer"]) == 0
    found = ModelFile.open(out).optimizer_state()["blocks.1.mlp.down.bias.v"]
    assert np.array_equal(found, tensors[f"{BIAS}/adafactor_v"])


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"other/newslm/embeddings/word_embed": np.zeros((45, 64), "f4")}, "twice"),
        ({"newslm/layer00/query_layer/lora_a": np.zeros((64, 4), "f4")}, "unknown tensor"),
        ({"classifier/kernel": np.zeros((64, 2), "f4")}, "unknown tensor 'classifier/kernel'"),
        ({"newslm/layer00/new/kernel/Adam": np.zeros((64, 2), "f4")}, "unknown tensor"),
    ],
)
def test_what_is_ambiguous_or_unknown_stays_an_error(
    extra: dict[str, Any],
    expected: str,
    folder: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    factory.write_tf(folder, {**WEIGHTS, **extra})
    assert main([str(folder), str(tmp_path / "out")]) == 2
    assert expected in capfd.readouterr().err


def test_another_optimizers_state_can_not_be_kept(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    factory.write_tf(folder, {**WEIGHTS, **OTHER_STATE["Adam"](WEIGHTS)})
    assert main([str(folder), str(tmp_path / "out"), "--keep-optimizer"]) == 2
    assert "no optimizer state of Adafactor, only another's state" in capfd.readouterr().err


# The community's layout in today's files.


def split(state: dict[str, Any], count: int) -> list[dict[str, Any]]:
    names = sorted(state)
    return [{name: state[name].clone() for name in names[i::count]} for i in range(count)]


def write_shards(folder: Path, suffix: str, *, index: bool, count: int = 3) -> list[Path]:
    stem = "pytorch_model" if suffix == ".bin" else "model"
    weight_map, paths = {}, []
    for number, part in enumerate(split(factory.community_state_dict(WEIGHTS), count), 1):
        path = folder / f"{stem}-{number:05d}-of-{count:05d}{suffix}"
        if suffix == ".bin":
            torch.save(part, path)
        else:
            save_file(part, path, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, path.name))
        paths.append(path)
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
        (folder / f"{stem}{suffix}.index.json").write_text(text)
    return paths


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shards_are_joined(suffix: str, index: bool, community: Path, tmp_path: Path) -> None:
    paths = write_shards(community, suffix, index=index)
    assert_converts(community, tmp_path / "out")
    assert_converts(paths[1], tmp_path / "out")
    if index:
        assert_converts(next(community.glob("*.index.json")), tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_safetensors_in_the_communitys_layout_are_read(
    dtype: str, community: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = factory.community_state_dict(WEIGHTS)
    cast = {name: value.to(getattr(torch, dtype)) for name, value in state.items()}
    save_file(
        {name: value.clone() for name, value in cast.items()}, community / "model.safetensors"
    )
    assert main([str(community), str(tmp_path / "out")]) == 0
    assert "verified    nothing: this file format has no checksums" in capfd.readouterr().out
    found = ModelFile.open(tmp_path / "out").state_dict()
    for name, value in factory.expected_tensors(WEIGHTS).items():
        assert torch.equal(found[name], value.to(getattr(torch, dtype)).float()), name


@pytest.mark.parametrize("name", ["model.pt", "x.pth", "weights.bin", "gpt2ml.safetensors"])
def test_any_one_file_in_a_folder_is_found_beside_what_training_leaves(
    name: str, community: Path, tmp_path: Path
) -> None:
    state = {n: v.clone() for n, v in factory.community_state_dict(WEIGHTS).items()}
    if name.endswith(".safetensors"):
        save_file(state, community / name)
    else:
        torch.save(state, community / name)
    for other in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth",
                  "rng_state_0.pth", "scaler.pt", "optimizer.bin"):  # fmt: skip
        torch.save({"x": 1}, community / other)
    assert_converts(community, tmp_path / "out")


def test_what_was_converted_before_is_no_source(
    community: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(factory.community_state_dict(WEIGHTS), community / "pytorch_model.bin")
    out = community / "model.safetensors"
    assert_converts(community, out)
    assert_converts(community, out)
    (community / "pytorch_model.bin").unlink()
    capfd.readouterr()
    assert main([str(community), str(community / "again")]) == 2
    assert "converted safetensors file already: `gpt2ml generate`" in capfd.readouterr().err


def test_of_several_files_the_usual_one_is_taken_and_the_others_named(
    community: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save(factory.community_state_dict(WEIGHTS), community / "pytorch_model.bin")
    torch.save(factory.community_state_dict(factory.tf_weights(seed=1)), community / "old.bin")
    said = assert_converts(community, tmp_path / "out", capfd)
    assert "old.bin beside it was left alone" in said


def test_numbers_that_are_not_finite_are_converted_on_request(
    community: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    state = factory.community_state_dict(WEIGHTS)
    state["transformer.h.1.ln_2.bias"][[3, 4]] = torch.tensor([float("nan"), float("inf")])
    torch.save(state, community / "pytorch_model.bin")
    assert main([str(community), str(tmp_path / "out"), "--allow-non-finite"]) == 0
    assert "'blocks.1.output_norm.bias' has 2 numbers that are not finite" in capfd.readouterr().out
    found = ModelFile.open(tmp_path / "out").state_dict()["blocks.1.output_norm.bias"]
    assert torch.equal(found.isfinite().nonzero()[:4, 0], torch.tensor([0, 1, 2, 5]))


def test_the_data_of_every_way_are_the_same_bytes(
    folder: Path, community: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / name for name in ("tf", "bin", "safetensors")]
    assert_converts(folder, outs[0])
    state = {n: v.clone() for n, v in factory.community_state_dict(WEIGHTS).items()}
    torch.save(state, community / "pytorch_model.bin")
    assert_converts(community, outs[1])
    (community / "pytorch_model.bin").unlink()
    save_file(state, community / "model.safetensors")
    assert_converts(community, outs[2])
    sizes = [8 + int.from_bytes(out.read_bytes()[:8], "little") for out in outs]
    data = [out.read_bytes()[size:] for out, size in zip(outs, sizes, strict=True)]
    assert data[0] == data[1] == data[2]
    assert (folder / DATA).exists()
