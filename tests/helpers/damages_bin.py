"""Files like the community's `.bin`, hostile, damaged or of something else."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from tests.helpers.damages import case, state_dict, truncate, write_bin


class RunsCode:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@case("not a plain state dict, or is hostile: .*; nothing was run")
def bin_would_run_code(folder: Path) -> list[str]:
    return write_bin(folder, {"wte.weight": RunsCode()})


@case("not a plain state dict, or is hostile: .*; nothing was run")
def bin_is_a_bare_hostile_pickle(folder: Path) -> list[str]:
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode()))
    return [str(folder / "pytorch_model.bin")]


@case("is damaged or truncated")
def bin_is_truncated(folder: Path) -> list[str]:
    arguments = write_bin(folder, state_dict())
    truncate(folder / "pytorch_model.bin", 100_000)
    return arguments


@case("pytorch_model.bin is empty, not a checkpoint: fetch it again")
def bin_is_empty(folder: Path) -> list[str]:
    (folder / "pytorch_model.bin").touch()
    return [str(folder / "pytorch_model.bin")]


@case("pytorch_model.bin is a zip archive, not a checkpoint: unpack it")
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
