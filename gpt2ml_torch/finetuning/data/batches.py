"""The order of the rows: endless, fixed by a seed, the same for any number of processes.

There is one global sequence, the epochs' permutations one after the other. In step k, N processes
with b rows each read positions kNb to (k+1)Nb - 1; process r reads every N-th of them, starting at
r. So the number of the step is all that a run needs to resume.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2ml_torch.finetuning.data.rows import RowDataset, Rows, collate


class BatchStream:
    """This process's batches, (B, T) each, numbered 0, 1, 2 and so on without end.

    `batch_size` counts the rows of one process, which is `rank` of `world_size`. A batch that
    reaches over the end of an epoch is filled from the next. `multiple_of` cuts common padding off,
    as in `collate`.

    Raises `ValueError` for sizes and ranks that make no sense.
    """

    def __init__(
        self,
        rows: RowDataset,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        multiple_of: int | None = None,
    ) -> None:
        _check(batch_size, rank, world_size)
        self.rows, self.batch_size, self.seed, self.shuffle = rows, batch_size, seed, shuffle
        self.rank, self.world_size, self.multiple_of = rank, world_size, multiple_of
        self._permutation: tuple[int, npt.NDArray[np.integer[Any]]] | None = None
        self._place = 0  # of iterating, in the global sequence

    def batch(self, index: int) -> Rows:
        """This process's rows of batch number `index`."""
        return self.batch_at(index * self.batch_size * self.world_size)

    def batch_at(self, place: int) -> Rows:
        """This process's share of the step that begins at a position of the global sequence."""
        first = place + self.rank
        places = range(first, first + self.batch_size * self.world_size, self.world_size)
        return collate([self.rows[self.row_at(p)] for p in places], multiple_of=self.multiple_of)

    def __iter__(self) -> Iterator[Rows]:
        """Endless batches, from the current state on. Deprecated: call `batch`."""
        _warn_of_state("iterating over a BatchStream")
        return self._batches()

    def _batches(self) -> Iterator[Rows]:
        while True:
            batch = self.batch_at(self._place)
            self._place += self.batch_size * self.world_size
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The state of iteration. Deprecated: keep the number of the next batch."""
        _warn_of_state("BatchStream.state_dict")
        epoch, index = divmod(self._place, len(self.rows))
        return {"epoch": epoch, "index": index, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; `ValueError` for another stream's. Deprecated: call `batch`."""
        _warn_of_state("BatchStream.load_state_dict")
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(f"{name} is {value}; the state to go on from has {state[name]}")
        self._place = state["epoch"] * len(self.rows) + state["index"]

    def _identity(self) -> dict[str, Any]:
        return {"seed": self.seed, "shuffle": self.shuffle, "rows": self.rows.fingerprint()}

    def row_at(self, place: int) -> int:
        """The number of the row at a position of the global sequence."""
        epoch, index = divmod(place, len(self.rows))
        if not self.shuffle:
            return index
        if self._permutation is None or self._permutation[0] != epoch:
            dtype = np.uint32 if len(self.rows) < 1 << 32 else np.uint64
            order = np.arange(len(self.rows), dtype=dtype)
            np.random.Generator(np.random.PCG64([self.seed, epoch])).shuffle(order)
            self._permutation = epoch, order
        return int(self._permutation[1][index])

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was read at least once."""
        return -(-len(self.rows) // (self.batch_size * self.world_size))


def evaluation_batches(
    rows: RowDataset,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    multiple_of: int | None = None,
) -> Iterator[Rows]:
    """Every row once, in order, (B, T) each; all processes get as many batches.

    Missing rows at the end are padding without targets.
    """
    _check(batch_size, rank, world_size)
    step = batch_size * world_size
    padding = Rows(*(field * 0 for field in rows[0]))
    for place in range(0, len(rows), step):
        numbers = range(place + rank, place + rank + step, world_size)
        batch = [rows[number] if number < len(rows) else padding for number in numbers]
        yield collate(batch, multiple_of=multiple_of)


def _warn_of_state(what: str) -> None:
    message = f"{what} is deprecated; call batch(0), batch(1) and so on"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


def _check(batch_size: int, rank: int, world_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}; expected at least 1 row")
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank is {rank} of {world_size} processes; expected 0 <= rank < processes"
        )
