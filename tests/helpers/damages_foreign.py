"""What people bring in place of a checkpoint: pages, pointers, archives, unfinished downloads."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from tests.helpers.damages import DATA, INDEX, PREFIX, case, state_dict

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5585033776\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Google Drive - Virus scan warning</title>"
HDF5 = b"\x89HDF\r\n\x1a\n" + bytes(600)


def only(folder: Path, name: str, content: bytes) -> list[str]:
    """A folder that holds this file and no checkpoint."""
    other = folder / "other"
    other.mkdir()
    (other / name).write_bytes(content)
    return [str(other)]


@case("pytorch_model.bin is a git-lfs pointer, .*: run `git lfs pull` in")
def bin_is_a_pointer(folder: Path) -> list[str]:
    return only(folder, "pytorch_model.bin", LFS.encode())


@case(f"{DATA} is a git-lfs pointer, .*: run `git lfs pull`")
def data_is_a_pointer(folder: Path) -> None:
    (folder / DATA).write_text(LFS)


@case(f"{INDEX} is a git-lfs pointer")
def index_is_a_pointer(folder: Path) -> None:
    (folder / INDEX).write_text(LFS)


@case("vocab.txt is a git-lfs pointer")
def vocabulary_is_a_pointer(folder: Path) -> None:
    (folder / "vocab.txt").write_text(LFS)


@case("config.json is a git-lfs pointer")
def config_is_a_pointer(folder: Path) -> None:
    (folder / "config.json").write_text(LFS)


@case("model.safetensors is a git-lfs pointer")
def safetensors_is_a_pointer(folder: Path) -> list[str]:
    return only(folder, "model.safetensors", LFS.encode())


@case("pytorch_model.bin is a web page, not a checkpoint: .*fetch it again")
def bin_is_a_web_page(folder: Path) -> list[str]:
    return [only(folder, "pytorch_model.bin", PAGE.encode())[0] + "/pytorch_model.bin"]


@case("model.pt is a web page")
def pt_is_a_web_page_after_a_blank_line(folder: Path) -> list[str]:
    return only(folder, "model.pt", b"\xef\xbb\xbf\r\n  <html lang='zh'>")


@case(f"{DATA} is a web page")
def data_is_a_web_page(folder: Path) -> None:
    (folder / DATA).write_text(PAGE)


@case("gpt2.zip is a zip archive, not a checkpoint: unpack it and give the folder")
def source_is_a_zip(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "gpt2.zip", "w") as archive:
        archive.write(folder / INDEX, "ckpt/" + INDEX)
    return [str(folder / "gpt2.zip")]


@case("no checkpoint in .*: .*gpt2.tar is a tar archive, .*: unpack it")
def folder_holds_a_tar(folder: Path) -> list[str]:
    (folder / "other").mkdir()
    with tarfile.open(folder / "other" / "gpt2.tar", "w") as archive:
        archive.add(folder / INDEX, "ckpt/" + INDEX)
    return [str(folder / "other")]


@case("is a gzip file, .*: unpack it")
def source_is_a_tarball(folder: Path) -> list[str]:
    return [only(folder, "gpt2.tar.gz", gzip.compress(b"x" * 999))[0] + "/gpt2.tar.gz"]


@case("is a 7z archive")
def folder_holds_a_7z(folder: Path) -> list[str]:
    return only(folder, "mega.7z", b"7z\xbc\xaf\x27\x1c" + bytes(99))


@case(r"HDF5 file, as Keras's save_weights writes, .*save_weights_as_checkpoint\(PREFIX\)")
def source_is_hdf5(folder: Path) -> list[str]:
    return [only(folder, "best_model.weights", HDF5)[0] + "/best_model.weights"]


@case("no checkpoint in .*model.h5 is an HDF5 file")
def folder_holds_hdf5(folder: Path) -> list[str]:
    return only(folder, "model.h5", HDF5)


@case("a NumPy archive")
def source_is_npz(folder: Path) -> list[str]:
    np.savez(folder / "x.npz", a=np.zeros(3))
    return [str(folder / "x.npz")]


@case("a TorchScript program, .*: save the state_dict")
def bin_is_torchscript(folder: Path) -> list[str]:
    with zipfile.ZipFile(folder / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\2}.")
        archive.writestr("x/constants.pkl", b"\x80\2).")
    return [str(folder / "x.pt")]


@case(f"{DATA}.crdownload is a download that isn't finished")
def source_is_a_partial_download(folder: Path) -> list[str]:
    (folder / DATA).rename(folder / f"{DATA}.crdownload")
    return [str(folder / f"{DATA}.crdownload")]


@case(f"{DATA} is not there yet: {DATA}.crdownload is its unfinished download")
def data_is_still_coming(folder: Path) -> None:
    (folder / DATA).rename(folder / f"{DATA}.crdownload")


@case(f"{DATA} isn't complete: {DATA}.aria2 beside it")
def data_has_all_its_bytes_but_aria2_is_at_work(folder: Path) -> None:
    (folder / f"{DATA}.aria2").write_bytes(b"\0\1")


@case("pytorch_model.bin isn't complete: pytorch_model.bin.aria2 beside it")
def bin_is_still_coming(folder: Path) -> list[str]:
    torch.save(state_dict(), folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin.aria2").write_bytes(b"\0\1")
    return [str(folder / "pytorch_model.bin")]


@case("vocab.txt is macOS metadata|give vocab.txt instead|give pytorch_model.bin instead")
def source_is_the_twin_of_a_mac(folder: Path) -> list[str]:
    (folder / "._pytorch_model.bin").write_bytes(b"\0\5\x16\7" + bytes(99))
    return [str(folder / "._pytorch_model.bin")]


# Shards.


def shards(folder: Path, weight_map: object) -> list[str]:
    other = folder / "shards"
    other.mkdir()
    (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [str(other)]


@case("names the shard '../pytorch_model.bin'; expected the name of a file beside it")
def shard_lies_elsewhere(folder: Path) -> list[str]:
    torch.save(state_dict(), folder / "pytorch_model.bin")
    return shards(folder, {"wte.weight": "../pytorch_model.bin"})


@case("names the shard '/etc/passwd'")
def shard_is_absolute(folder: Path) -> list[str]:
    return shards(folder, {"wte.weight": "/etc/passwd"})


@case("names the shard '..'")
def shard_is_the_folder_above(folder: Path) -> list[str]:
    return shards(folder, {"wte.weight": ".."})


@case("names the shard '7'")
def shard_is_a_number(folder: Path) -> list[str]:
    return shards(folder, {"wte.weight": 7})


@case("missing in .*shards: pytorch_model-00002-of-00002.bin")
def shard_is_missing(folder: Path) -> list[str]:
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    arguments = shards(folder, dict(zip("ab", names, strict=True)))
    torch.save({}, folder / "shards" / names[0])
    return arguments


@case("missing in .*: model-00002-of-00003.safetensors, model-00003-of-00003.safetensors")
def shards_without_index_are_missing(folder: Path) -> list[str]:
    other = folder / "shards"
    other.mkdir()
    (other / "model-00001-of-00003.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return [str(other)]


@case("is not an index of shards")
def index_of_shards_is_a_list(folder: Path) -> list[str]:
    return shards(folder, ["pytorch_model-00001-of-00001.bin"])


@case("is not an index of shards")
def index_of_shards_is_nested_without_end(folder: Path) -> list[str]:
    arguments = shards(folder, {})
    (Path(arguments[0]) / "pytorch_model.bin.index.json").write_text("[" * 200_000)
    return arguments


@case("'transformer.wte.weight' is in a.bin and in b.bin")
def a_tensor_is_in_two_shards(folder: Path) -> list[str]:
    arguments = shards(folder, {"x": "a.bin", "y": "b.bin"})
    for name in "ab":
        torch.save(state_dict(), folder / "shards" / f"{name}.bin")
    return arguments


@case("adapter_model.safetensors is an adapter")
def folder_holds_an_adapter(folder: Path) -> list[str]:
    return only(folder, "adapter_model.safetensors", b"\2\0\0\0\0\0\0\0{}")


@case(f"no checkpoint in .* itself; give .*{PREFIX}|no checkpoint in .* itself; give .*/inner")
def folder_holds_the_folder(folder: Path) -> list[str]:
    outer = folder / "outer"
    (outer / "inner").mkdir(parents=True)
    shutil.copy(folder / INDEX, outer / "inner")
    return [str(outer)]


# Numbers that are not finite.


@case("tensor 'transformer.h.1.ln_2.bias' of .* has numbers that are not finite")
def bin_has_one_nan(folder: Path) -> list[str]:
    state = state_dict()
    state["transformer.h.1.ln_2.bias"][5] = float("nan")
    torch.save(state, folder / "pytorch_model.bin")
    return [str(folder / "pytorch_model.bin")]


@case("tensor 'transformer.h.0.mlp.c_fc.weight' of .* has numbers that are not finite")
def bin_has_one_infinity_and_is_to_be_packed(folder: Path) -> list[str]:
    state = state_dict()
    state["transformer.h.0.mlp.c_fc.weight"][0, -1] = float("-inf")
    torch.save(state, folder / "pytorch_model.bin")
    return [str(folder / "pytorch_model.bin"), "--dtype", "int8"]
