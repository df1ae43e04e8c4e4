"""The scheduler's cache: a fixed number of rows, of which a step works on the first ones.

The kernels, and PyTorch's own operators, take a part of the rows as a view, and any part of a
text. Compiled steps have fixed sizes: there every step works on all rows, and a prompt is read at
once into a cache of its own.

Shapes:
    R  rows       A  running texts       T  tokens in this call       V  vocabulary
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2ml_torch.generation.engine import Engine, Plan, decode
from gpt2ml_torch.kv_cache import KVCache


class RowCache:
    """Keys and values of at most `max_rows` texts, as long as the model sees.

    On a CPU its memory is taken from the system only as tokens come. `max_memory`, in bytes,
    lowers the number of rows until they fit; raises `ValueError` where none does.
    """

    def __init__(self, engine: Engine, *, max_rows: int, max_memory: int | None) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}; expected 1 or more")
        self._engine = engine
        row_bytes = row_size(engine)
        fitting = max_rows if max_memory is None else max_memory // row_bytes
        if fitting < 1:
            raise ValueError(
                f"max_memory is {max_memory} bytes; one row of {engine.limit} tokens takes "
                f"{row_bytes}"
            )
        self.whole = engine.compiled
        self.chunked = not engine.compiled
        self.count = min(max_rows, fitting)
        if self.whole:
            self.cache = engine.new_cache(self.count, engine.limit)
            self.count = self.cache.batch_size
        else:
            self.cache = _lazy_cache(engine, self.count)

    def clear(self) -> None:
        """Forget everything."""
        for tensor in (self.cache.keys, self.cache.values):
            tensor.zero_()

    @torch.inference_mode()
    def use_adapter(self, row: int, adapter: str | None) -> None:
        """Read and write a row with this adapter from now on."""
        current, fresh = self.cache.adapters, self._engine.adapters.of_rows(self.count)
        if current is not None and fresh is not None:
            fresh.of_rows.copy_(current.of_rows)
        self.cache.adapters = fresh  # one may have been added since
        self.cache.use_adapter(row, self._engine.adapters.number(adapter))

    def copy(self, row: int, to: int, length: int) -> None:
        """Copy the first `length` slots of a row to another row."""
        self.cache.copy_row(row, self.cache, to, length)

    def read(self, row: int, ids: Sequence[int], start: int) -> Tensor:
        """Read the ids that come at position `start` of a row; logits after them, (1, V)."""
        if self.whole:
            return self._engine.read_into(self.cache, row, ids)
        model, device = self._engine.model, self.cache.keys.device
        positions = start + torch.arange(len(ids), device=device)[None]
        tokens = torch.tensor([ids], device=device)
        h = model.hidden_states(tokens, positions=positions, cache=self.cache.rows(row, row + 1))
        return model.logits(h[:, -1])

    def read_all(self, row: int, ids: Sequence[int], start: int) -> Tensor:
        """As `read`, with the logits after each id, (T, V)."""
        device = self.cache.keys.device
        positions = start + torch.arange(len(ids), device=device)[None]
        part, tokens = self.cache.rows(row, row + 1), torch.tensor([ids], device=device)
        if self.whole:  # any number of tokens: nothing to compile for
            plan = Plan(on_kernels=False, share_code=False)
            arguments = tokens, positions, *part.parts
            return decode(self._engine.model, plan, *arguments)[0]
        return self._engine.decode(tokens, positions, part)[0]

    def decode(self, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """One token of each of the first A rows; logits after them, (A, V)."""
        running, device = len(ids), self.cache.keys.device
        if self.whole:
            # What free rows write goes to the last slot, which a text writes before it reads it.
            free = self.count - running
            ids = [*ids, *[0] * free]
            positions = [*positions, *[self._engine.limit - 1] * free]
        cache = self.cache if self.whole else self.cache.rows(0, running)
        logits = self._engine.decode(
            torch.tensor(ids, device=device)[:, None],
            torch.tensor(positions, device=device)[:, None],
            cache,
        )
        return logits[:running, -1]


def row_size(engine: Engine) -> int:
    """Bytes of a row's keys and values."""
    config = engine.model.config
    size = config.num_hidden_layers * config.hidden_size * engine.limit
    return 2 * size * engine.model.dtype.itemsize


def _lazy_cache(engine: Engine, rows: int) -> KVCache:
    config, model = engine.model.config, engine.model
    shape = (
        config.num_hidden_layers,
        rows,
        engine.limit,
        config.num_attention_heads,
        config.head_size,
    )
    keys, values = (_lazy_zeros(shape, model.dtype, model.device) for _ in range(2))
    return KVCache.of(keys, values, engine.adapters.of_rows(rows))


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take memory only where they are written to, on a CPU."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, **private)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
