"""Checkpoints as people have them, by example and variation: what stands around the weights does no
harm. More of each kind is in tests/convert/test_inputs.py."""

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

from gpt2ml_torch.__main__ import main
from tests.helpers import checkpoint_factory as factory
from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.register.brought import (
    MAC,
    WEIGHTS,
    assert_converts,
    community,
    refused,
    write_tensorflow,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound TensorFlow checkpoint."""
    (tmp_path / "ckpt").mkdir()
    write_tensorflow(tmp_path / "ckpt", WEIGHTS)
    return tmp_path / "ckpt"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A folder with a configuration and a vocabulary alone."""
    (tmp_path / "pt").mkdir()
    factory.write_beside(tmp_path / "pt")
    return tmp_path / "pt"


# 17: folders from a Mac, and what else lies about.


@pytest.mark.parametrize("kind", ["tensorflow", "bin", "shards"])
def test_the_twins_of_a_mac_are_left_alone(
    kind: str, folder: Path, empty: Path, capfd: Capture
) -> None:
    if kind == "bin":
        torch.save(community(), empty / "pytorch_model.bin")
    elif kind == "shards":
        write_shards(empty, ".bin", 2)
    source = folder if kind == "tensorflow" else empty
    for path in list(source.iterdir()):
        path.with_name(f"._{path.name}").write_bytes(MAC)
    (source / "__MACOSX").mkdir()
    (source / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert_converts(source, capfd)


@pytest.mark.parametrize("content", [MAC, "字\n".encode("utf-16"), b"", b"<!DOCTYPE html>", None])
def test_a_vocabulary_that_is_none_beside_one_that_fits_does_no_harm(
    content: bytes | None, folder: Path, capfd: Capture
) -> None:
    if content is None:
        (folder / "a-vocab.txt").mkdir()
        (folder / "b-vocab.txt").symlink_to("nowhere")
    else:
        (folder / "a-vocab.txt").write_bytes(content)
    assert_converts(folder, capfd)


# 18: other optimizers, other scopes.

STATE: dict[str, tuple[Callable[[str], list[str]], str]] = {
    "Adam": (lambda name: [f"{name}/Adam", f"{name}/Adam_1"], "optimiser slots"),
    "LAMB in a scope": (lambda name: [f"OptimizeLoss/{name}/lamb_m"], "optimiser slots"),
    "RMSProp": (lambda name: [f"{name}/RMSProp", f"{name}/RMSProp_1"], "optimiser slots"),
    "joined by an underscore": (lambda name: [f"{name}_adam_m"], "optimiser slots"),
    "copies under a scope": (lambda name: [f"accum_grads/{name}", f"Adam/v/{name}"], "slots"),
    "averages": (lambda name: [f"{name}/ExponentialMovingAverage"], "moving averages"),
    "averages in a scope": (lambda name: [f"ema/{name}"], "note .* moving averages"),
    "averages by another word": (lambda name: [f"{name}/moving_avg"], "note .* moving averages"),
}
SCALARS = {
    "beta1_power": np.float32(0.9),
    "loss_scale/good_steps": np.int64(3),
    "learning_rate": np.full(1, 1e-4, np.float32),
    "local_step": np.int32(5),
    "global_step": np.int64(70),
}


@pytest.mark.parametrize("scope", ["newslm/", "model/newslm/", ""])
@pytest.mark.parametrize("state", STATE)
def test_state_of_another_optimizer_is_dropped_and_counted(
    state: str, scope: str, tmp_path: Path, capfd: Capture
) -> None:
    weights = {name.replace("newslm/", scope, 1): value for name, value in WEIGHTS.items()}
    names, _ = STATE[state]
    slots = {slot: value + 1 for name, value in weights.items() for slot in names(name)}
    write_tensorflow(tmp_path, {**weights, **slots, **SCALARS})
    said = assert_converts(tmp_path, capfd)
    kind = "moving averages" if state.startswith("averages") else "optimiser slots"
    assert f"{len(slots)} {kind}" in said
    assert "4 scalars" in said
    assert "1 step counter" in said
    assert ("moving averages of weights were dropped" in said) == (kind == "moving averages")
    assert ("names begin with" in said) == (scope != "newslm/")


@pytest.mark.parametrize("change", [lambda name: f"{name}:0", lambda name: f"a/b/{name}"])
def test_names_with_something_around_them_are_recognised(
    change: Callable[[str], str], tmp_path: Path, capfd: Capture
) -> None:
    write_tensorflow(tmp_path, {change(name): value for name, value in WEIGHTS.items()})
    assert_converts(tmp_path, capfd)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({f"teacher/{name}": value for name, value in WEIGHTS.items()}, "keep one set of weights"),
        ({"newslm/pooler/kernel": np.zeros((64, 64), "f4")}, "unknown tensor 'newslm/pooler"),
        ({"newslm/layer00/adapter/kernel/Adam": np.zeros((64, 2), "f4")}, "unknown tensor"),
    ],
)
def test_what_may_be_part_of_the_model_is_no_state(
    extra: dict[str, Any], expected: str, tmp_path: Path, capfd: Capture
) -> None:
    write_tensorflow(tmp_path, {**WEIGHTS, **extra})
    assert expected in refused(tmp_path, capfd)


# 19: the community's layout in today's files.


def write_shards(folder: Path, suffix: str, count: int, *, index: bool = True) -> list[Path]:
    state, weight_map, paths = community(), {}, []
    for number in range(count):
        part = {name: state[name] for name in sorted(state)[number::count]}
        stem = "pytorch_model" if suffix == ".bin" else "model"
        paths.append(folder / f"{stem}-{number + 1:05d}-of-{count:05d}{suffix}")
        if suffix == ".bin":
            torch.save(part, paths[-1])
        else:
            save_file(part, paths[-1])
        weight_map.update(dict.fromkeys(part, paths[-1].name))
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"{stem}{suffix}.index.json").write_text(text)
    return paths


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.model.{name}",
        lambda name: name.removeprefix("transformer."),
        lambda name: name.replace("h.1.", "h.1._orig_mod."),
        lambda name: f"_fsdp_wrapped_module.{name}".replace(".h.", ".h._fsdp_wrapped_module."),
        lambda name: name.replace(".attn.", "._checkpoint_wrapped_module.attn."),
    ],
)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_prefixes_and_wrappers_around_modules_are_understood(
    suffix: str, change: Callable[[str], str], empty: Path, capfd: Capture
) -> None:
    state = {change(name): value for name, value in community().items()}
    if suffix == ".bin":
        torch.save(state, empty / "pytorch_model.bin")
    else:
        save_file(state, empty / "model.safetensors")
    assert_converts(empty, capfd)


@pytest.mark.parametrize(
    "keys", [["state_dict"], ["checkpoint", "model"], ["学生"], ["net", "ema"]]
)
@pytest.mark.parametrize("name", ["model.pt", "last.ckpt"])
def test_a_state_dict_inside_dictionaries_is_found(
    name: str, keys: list[str], empty: Path, capfd: Capture
) -> None:
    value: Any = community()
    for key in reversed(keys):
        value = {"epoch": 3, key: value, "optimizer": {"param_groups": [{"lr": 1e-4}]}}
    torch.save(value, empty / name)
    for other in ("training_args.bin", "optimizer.pt", "zero_pp_rank_0_optim_states.pt"):
        torch.save({"x": torch.zeros(2)}, empty / other)
    assert_converts(empty, capfd)


def test_several_state_dicts_are_an_error_that_names_them(empty: Path, capfd: Capture) -> None:
    torch.save({"student": community(), "teacher": community()}, empty / "model.pt")
    assert "several state dicts, 'student' and 'teacher'" in refused(empty, capfd)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shards_are_joined_whatever_is_given_and_lies_beside(
    suffix: str, index: bool, empty: Path, capfd: Capture
) -> None:
    paths = write_shards(empty, suffix, 3, index=index)
    assert_converts(paths[2], capfd)
    stray = paths[0].with_name(paths[0].name.replace("of-00003", "of-00002"))
    shutil.copy(paths[0], stray)
    assert_converts(empty, capfd)
    paths[1].unlink()
    assert f"missing in {empty}: {paths[1].name}" in refused(empty, capfd)


def test_no_two_messages_send_each_other_round(empty: Path, capfd: Capture) -> None:
    save_file(community(), empty / "model.safetensors")
    assert main(["info", str(empty / "model.safetensors")]) == 2
    assert "`gpt2ml convert` makes a model file" in capfd.readouterr().err
    assert_converts(empty / "model.safetensors", capfd)


# 22: names that a shell, an editor or a script changed.


@pytest.mark.parametrize("typed", [".", ".da", ".data-00000-of-00001", ".ind"])
def test_a_prefix_completed_too_far_is_understood(typed: str, folder: Path, capfd: Capture) -> None:
    assert_converts(f"{folder}/model.ckpt-70{typed}", capfd)


def test_a_stray_shard_of_another_count_is_left_alone(folder: Path, capfd: Capture) -> None:
    for name in ("model.ckpt-70.data-00001-of-00002", "model.ckpt-70.data-00000-of-00003"):
        (folder / name).write_bytes(b"of an older one")
    assert "model.ckpt-70.data-00001-of-00002" in assert_converts(folder, capfd)


@pytest.mark.parametrize(
    ("written", "name"),
    [(r"it\'s-70", "it's-70"), (r"\345\255\227-7", "字-7"), (r"C:\\runs\\a-7", "a-7")],
)
def test_escapes_in_the_state_file_are_undone(
    written: str, name: str, folder: Path, capfd: Capture
) -> None:
    for suffix in (".index", ".data-00000-of-00001"):
        shutil.copy(folder / f"model.ckpt-70{suffix}", folder / f"{name}{suffix}")
    (folder / "checkpoint").write_text(f'model_checkpoint_path: "{written}"\n')
    assert f"from {name}" in assert_converts(folder, capfd)


@pytest.mark.parametrize("more", ["\n", "\n\n", " \r\n"])
def test_blank_lines_more_in_a_vocabulary_are_left_out(
    more: str, folder: Path, capfd: Capture
) -> None:
    with (folder / "vocab.txt").open("a", newline="") as file:
        file.write(more)
    assert "blank lines at the end" in assert_converts(folder, capfd)


def test_a_tilde_in_quotes_is_the_home_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(folder)
    assert main(["convert", "~/ckpt", "~/out.safetensors"]) == 0
    assert main(["info", "~/out.safetensors"]) == 0
    assert (folder.parent / "out.safetensors").is_file()


@pytest.mark.parametrize("words", [["info"], ["score", "今天"], ["generate", "今", "--no-compile"]])
def test_a_folder_with_one_model_file_stands_for_it(
    words: list[str], tmp_path: Path, capfd: Capture
) -> None:
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer).save_pretrained(tmp_path / "m.safetensors", tokenizer=tokenizer)
    (tmp_path / "._m.safetensors").write_bytes(MAC)
    (tmp_path / "adapter_model.safetensors").write_bytes(MAC)
    assert main([words[0], str(tmp_path), *words[1:]]) == 0, capfd.readouterr().err
    capfd.readouterr()
    assert main(["convert", "--to-tf", str(tmp_path), str(tmp_path / "back")]) == 0
    shutil.copy(tmp_path / "m.safetensors", tmp_path / "n.safetensors")
    assert main([words[0], str(tmp_path), *words[1:]]) == 2
    assert "m.safetensors, n.safetensors" in capfd.readouterr().err
    assert main(["convert", "--to-tf", str(tmp_path), str(tmp_path / "again")]) == 2
    assert "m.safetensors, n.safetensors" in capfd.readouterr().err
