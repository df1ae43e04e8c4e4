"""What a conversion asks of a checkpoint, whatever its file format."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from convert.arrays import Array
from convert.mapping import Layout


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor as the checkpoint declares it; `dtype` is None where it can't be read, and
    `instead` says what it is then."""

    dtype: str | None
    shape: tuple[int, ...]
    instead: str = "no numbers"


class Source(ABC):
    """A checkpoint whose tensors are read one by one, from several threads.

    `layouts` are the families of names that this format comes with, `files` the ones that hold the
    weights, `checksum` is the kind that `read` verifies, None where the format has none, and
    `notes` is what the user should know.
    """

    layouts: Sequence[Layout]
    checksum: str | None
    notes: tuple[str, ...] = ()

    def __init__(self, name: str, files: Sequence[Path], tensors: Mapping[str, Stored]) -> None:
        self.name = name
        self.files = list(files)
        self.tensors = tensors

    @abstractmethod
    def read(self, name: str) -> Array:
        """A tensor, memory-mapped where it can be; bfloat16, which NumPy lacks, as float32.

        Raises `ValueError` where it is damaged.
        """

    def verify_rest(self) -> None:
        """Verify the tensors that were not read, such as buffers, where the format has cheap
        checksums; raises `ValueError` where one is damaged."""
        return

    def step(self) -> int | None:
        """The number of training steps, if the checkpoint records it."""
        return None


class Joined(Source):
    """A checkpoint in several files (shards), each tensor in one of them.

    Raises `ValueError` where two shards hold the same name.
    """

    def __init__(self, name: str, shards: Sequence[Source]) -> None:
        self._shards: dict[str, Source] = {}
        for shard in shards:
            for key in shard.tensors:
                if key in self._shards:
                    raise ValueError(
                        f"{name}: {key[:80]!r} is in {self._shards[key].name} and in {shard.name}; "
                        "keep the shards of one checkpoint"
                    )
                self._shards[key] = shard
        self.layouts = shards[0].layouts
        checksums = {shard.checksum for shard in shards}
        self.checksum = checksums.pop() if len(checksums) == 1 else None
        files = [path for shard in shards for path in shard.files]
        tensors = {key: shard.tensors[key] for key, shard in self._shards.items()}
        super().__init__(name, files, tensors)

    def read(self, name: str) -> Array:
        return self._shards[name].read(name)

    def verify_rest(self) -> None:
        for shard in {id(shard): shard for shard in self._shards.values()}.values():
            shard.verify_rest()
