"""Damaged sources for the converter, each with what the error must say: the register, and tools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.helpers import checkpoint_factory as factory

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
    """Write the checkpoint again with other tensors."""
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
