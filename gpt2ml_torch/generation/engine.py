"""Engine: the two steps of decoding as plain functions, compiled if wanted.

A step is one graph, whose blocks, where all are equal, are calls of one nested region that is
compiled once (see `regions.py`). Sizes are padded up to a few, each with a graph of its own: CUDA
graphs replay fixed addresses, and a nested region loses what is written to a cache of symbolic size
(PyTorch 2.13). Packed weights on the CPU need none of that: all layers are one operator, compiled
already, which takes any number of rows, tokens and cache slots.

On the kernels a token's logits are the same, bit for bit, whatever other rows and tokens are read
with it, however a text is cut into chunks, and whatever the cache's size. Elsewhere they are the
same up to the rounding of differently shaped matrix products.

Shapes:
    B  batch rows       T  tokens in this call      S  slots of the cache      V  vocabulary
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2ml_torch.cache import cache_root
from gpt2ml_torch.generation import choice
from gpt2ml_torch.generation.choice import Chosen, SamplerState
from gpt2ml_torch.generation.regions import are_equal, outline
from gpt2ml_torch.generation.transfers import to_device
from gpt2ml_torch.kernels import Adapters, PackedAdapter, RowAdapters
from gpt2ml_torch.kv_cache import KVCache
from gpt2ml_torch.model import GPT2ML

_logger = logging.getLogger(__name__)

SLOTS = 128  # a cache holds a multiple of this many slots
SMALLEST_PREFILL = 16


class Plan(NamedTuple):
    """How a model's blocks run; see `GPT2ML.hidden_states`."""

    on_kernels: bool
    share_code: bool  # blocks are equal, and compiled
    cache_is_empty: bool = False


def prefill(
    model: GPT2ML,
    plan: Plan,
    token_ids: Tensor,
    places: Tensor,
    keys: Tensor,
    values: Tensor,
    adapters: RowAdapters | None = None,
) -> Tensor:
    """Read tokens from position places[0] on into the cache, (1, T); logits after the one at
    places[1] of them, (1, V).
    """
    positions = places[:1] + torch.arange(token_ids.shape[1], device=token_ids.device)[None]
    cache = KVCache.of(keys, values, adapters)
    h = model.hidden_states(token_ids, positions=positions, cache=cache, **plan._asdict())
    return model.logits(h.index_select(1, places[1:])[:, 0])


def decode(
    model: GPT2ML,
    plan: Plan,
    token_ids: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    adapters: RowAdapters | None = None,
) -> Tensor:
    """Read T more tokens of each row; logits after each, (B, T) -> (B, T, V)."""
    cache = KVCache.of(keys, values, adapters)
    h = model.hidden_states(token_ids, positions=positions, cache=cache, **plan._asdict())
    return model.logits(h)


def decode_and_choose(
    model: GPT2ML,
    plan: Plan,
    token_ids: Tensor,
    positions: Tensor,
    state: SamplerState,
    logprobs: bool,
    keys: Tensor,
    values: Tensor,
    adapters: RowAdapters | None = None,
) -> Chosen:
    """Read one more token of each row, (B, 1), and choose the next."""
    logits = decode(model, plan, token_ids, positions, keys, values, adapters)[:, -1]
    return choice.report(logits, choice.choose(logits, state), logprobs=logprobs)


class Engine:
    """A model's two steps, eager or compiled, and caches of suitable sizes.

    Compiling happens at the first call of a size, except for a model that runs on the kernels,
    which has nothing to compile; where it can't, steps run eagerly, and the log says why, once.
    `refresh` notices that the model's layers have changed, as by adapters, hooks, `train()` or
    another eps; weights may change at any time. No method checks ids or positions: `Generator`
    does.
    """

    def __init__(self, model: GPT2ML, *, compile: bool = True) -> None:
        self.model = model
        self.on_cuda = model.device.type == "cuda"
        self._compile_wanted = compile
        self._outline: object = None
        self.adapters = Adapters()
        self.refresh()

    def refresh(self) -> None:
        """Look at the model's layers again: if they have changed, compiled steps are dropped."""
        on_kernels = self.model.runs_on_kernels
        wanted = self._compile_wanted and not on_kernels
        # Where nothing is compiled, the rest of what may have changed needs no look at each call.
        found = outline(self.model) if wanted else on_kernels
        if found == self._outline:
            return
        if self.adapters.names and not on_kernels:
            raise ValueError(
                "the model's layers are no longer packed ones on a CPU with kernels, and only "
                "beside these can adapters be added; change them back, or merge the adapters"
            )
        self._outline = found
        self._steps: dict[tuple[object, ...], Callable[..., Any]] = {}
        self.on_kernels = on_kernels
        self.compiled = wanted and self._can_compile()
        share_code = self.compiled and are_equal(self.model.blocks)
        self._plan = Plan(self.on_kernels, share_code)

    def _can_compile(self) -> bool:
        obstacle = None if self.on_cuda else why_no_compiler()
        if obstacle is not None:
            _logger.warning("generation runs uncompiled: %s", obstacle)
            return False
        keep_compiled_code()
        return True

    @property
    def limit(self) -> int:
        """Tokens that the model can see at once."""
        return self.model.config.max_position_embeddings

    @property
    def weight_bytes(self) -> int:
        """Bytes that one decoding step reads: all weights except the position embedding."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        unread = self.model.position_embedding.weight.nbytes
        return sum(tensor.nbytes for tensor in tensors) - unread

    def add_adapter(self, name: str, adapter: PackedAdapter) -> None:
        """Raises `ValueError` for a model that does not run on the kernels, and a name in use."""
        if not self.on_kernels:
            packed = f"packed as {self.model.packed}" if self.model.packed else "not packed"
            raise ValueError(
                f"an adapter is added beside packed weights on a CPU with kernels, and this model "
                f"is {packed}, on {self.model.device}; merge the adapter into it, or pack the model"
            )
        self.adapters.add(name, adapter)

    @torch.inference_mode()
    def new_cache(self, rows: int, length: int, *, adapter: str | None = None) -> KVCache:
        """An empty cache of at least so many rows and slots (but no more than the positions), all
        of which use the adapter of this name.
        """
        model = self.model
        cache = KVCache(
            model.config,
            batch_size=self.padded_rows(rows),
            length=self._slots(length),
            device=model.device,
            dtype=model.dtype,
        )
        cache.adapters = self.adapters.of_rows(cache.batch_size, adapter)
        if self.compiled and self.on_cuda:
            for tensor in (cache.keys, cache.values):
                torch._dynamo.mark_static_address(tensor)
        return cache

    def padded_rows(self, wanted: int) -> int:
        """The size of batch that serves so many rows."""
        return 1 << (wanted - 1).bit_length() if self.compiled else wanted

    def padded_tokens(self, wanted: int) -> int:
        """The size of prefill that serves so many tokens."""
        if not self.compiled:
            return wanted
        return min(max(1 << (wanted - 1).bit_length(), SMALLEST_PREFILL), self.limit)

    def _slots(self, wanted: int) -> int:
        if self.on_kernels:
            return min(wanted, self.limit)
        blocks = -(-wanted // SLOTS)
        if self.compiled:
            blocks = 1 << (blocks - 1).bit_length()
        return min(blocks * SLOTS, self.limit)

    def read(
        self, token_ids: Sequence[int], *, adapter: str | None = None
    ) -> tuple[Tensor, KVCache]:
        """Logits after a text, (1, V), and a cache of its own that holds it."""
        cache = self.new_cache(1, self.padded_tokens(len(token_ids)), adapter=adapter)
        return self.prefill(token_ids, cache), cache

    def read_into(self, cache: KVCache, row: int, token_ids: Sequence[int]) -> Tensor:
        """Read a text into a row of a cache; logits after it, (1, V)."""
        return self.read_chunk(cache, row, token_ids, 0)

    def read_chunk(self, cache: KVCache, row: int, token_ids: Sequence[int], start: int) -> Tensor:
        """Read the next tokens of a text into a row whose slots before `start` hold what comes
        before them; logits after the last, (1, V).
        """
        if self.on_kernels:
            return self.prefill(token_ids, cache.rows(row, row + 1), start=start)
        end = start + len(token_ids)
        fits = start + self.padded_tokens(len(token_ids)) <= self.limit
        padded = start + self.padded_tokens(len(token_ids)) if fits else end
        own = self.new_cache(1, self.padded_tokens(padded))
        cache.copy_row(row, own, 0, start)
        logits = self.prefill(token_ids, own, start=start)  # a graph of one row, for each length
        own.copy_row(0, cache, row, end)
        return logits

    def warm_up(self, *, rows: int = 1, tokens: int | None = None) -> None:
        """Compile all sizes for texts of up to so many tokens (all that the model sees, if None)
        in batches of so many rows, so that nothing is compiled while text is written. On CUDA the
        steps that choose tokens are left out, since they differ by the rules of sampling.
        """
        if not self.compiled:
            return
        lengths = range(1, min(tokens or self.limit, self.limit) + 1)
        for size in sorted({self.padded_tokens(length) for length in lengths}):
            self.read([0] * size)
        for slots in sorted({self._slots(length) for length in lengths}):
            cache = self.new_cache(rows, slots)
            ids = torch.zeros(cache.batch_size, 1, dtype=torch.int64, device=self.model.device)
            self.decode(ids, ids, cache)

    @torch.inference_mode()
    def prefill(self, token_ids: Sequence[int], cache: KVCache, *, start: int = 0) -> Tensor:
        """Read tokens from position `start` on into a cache of one row; logits after the last,
        (1, V).
        """
        padded = self.padded_tokens(len(token_ids))
        padding = padded - len(token_ids) if start + padded <= cache.length else 0
        device = self.model.device
        ids = to_device([[*token_ids, *[0] * padding]], device)
        places = to_device([start, len(token_ids) - 1], device)
        # On the CPU attention reads the whole cache either way, in the order of sums that it has.
        plan = self._plan._replace(cache_is_empty=self.on_cuda and start == 0)
        logits: Tensor = self._run(prefill, ids, places, cache=cache, plan=plan)
        return logits

    @torch.inference_mode()
    def decode(self, token_ids: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Read T more tokens of each of the cache's rows, (B, T) -> (B, T, V)."""
        # Copies, because tensors made outside inference mode would be recompiled for.
        if self.compiled:
            token_ids, positions = token_ids.clone(), positions.clone()
        logits: Tensor = self._run(decode, token_ids, positions, cache=cache)
        return logits

    @torch.inference_mode()
    def decode_and_choose(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        state: SamplerState,
        *,
        logprobs: bool = False,
    ) -> Chosen:
        """Read one more token of each of the cache's rows, (B, 1), and choose the next: one graph
        for each set of rules.
        """
        arguments = token_ids.clone(), positions.clone(), state, logprobs
        key = (*state.rules, logprobs)
        found: Chosen = self._run(decode_and_choose, *arguments, cache=cache, key=key)
        # The next replay of a CUDA graph writes over what the last one gave.
        return found.map(torch.clone)

    def _run(
        self,
        function: Callable[..., Any],
        ids: Tensor,
        *others: Any,
        cache: KVCache,
        plan: Plan | None = None,
        key: tuple[object, ...] = (),
    ) -> Any:
        plan = self._plan if plan is None else plan
        arguments = (self.model, plan, ids, *others, *cache.parts)
        if not self.compiled:
            return function(*arguments)
        # Calls of the same key share a graph.
        key = (function, plan, *ids.shape, cache.length, *key)
        if key in self._steps:
            return self._steps[key](*arguments)
        name = "prefill" if function is prefill else "decode"
        step = self._compile(function, replay=name == "decode")
        _logger.info(
            "compiling %s (%d x %d tokens), once for each machine; kept in %s",
            *(name, *ids.shape, os.environ.get("TORCHINDUCTOR_CACHE_DIR")),
        )
        began = time.perf_counter()
        try:
            result = step(*arguments)
        except Exception as error:
            self.compiled = False
            self._compile_wanted = False
            _logger.warning("generation runs uncompiled: %s", _one_line(error))
            return function(*arguments)
        _logger.info("compiled %s in %.1f s", name, time.perf_counter() - began)
        self._steps[key] = step
        return result

    def _compile(self, function: Callable[..., Any], *, replay: bool) -> Callable[..., Any]:
        # Two pools of threads, PyTorch's and the generated code's, would fight over the cores; the
        # products, in which the time goes, run in PyTorch's.
        # The checks between operators take longer than some of the operators.
        options: dict[str, Any] = {
            "cpp.threads": 1,
            "size_asserts": False,
            "alignment_asserts": False,
        }
        if self.on_cuda:
            # A decoding step reads each weight for one row: tuning its loops for the memory, which
            # also turns products of one row into such loops, is worth a longer compilation.
            tuned = ("coordinate_descent_tuning", "triton.unique_kernel_names")
            options = dict.fromkeys(("triton.cudagraphs", *tuned), True) if replay else {}
        # Each size has one entry in a cache of its own, so there is nothing to tell apart at each
        # call, which takes 2 ms for 48 layers.
        options["guard_filter_fn"] = torch.compiler.skip_all_guards_unsafe
        compiled: Callable[..., Any] = torch.compile(
            _twin(function, len(self._steps)), fullgraph=True, dynamic=False, options=options
        )
        return compiled


def _twin(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The function with a code object of its own.

    PyTorch keeps what it compiled with the code object, and compiles no more than eight sizes of
    one: the ninth would run uncompiled, and every call would look through the others.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{number}")
    return FunctionType(code, function.__globals__, function.__name__)


def why_no_compiler() -> str | None:
    """What keeps `torch.compile` from working on the CPU here, or None."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or shutil.which(compiler) is None:
        return f"the C++ compiler {compiler or 'g++'} was not found; install g++ or set CXX"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return f"Python's headers are missing ({header}); install python3-dev"
    return None


def keep_compiled_code() -> None:
    """Let PyTorch keep compiled code beside our own, unless its own variable names a place."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # brings the compiler

    variable = "TORCHINDUCTOR_CACHE_DIR"
    if os.environ.get(variable, default_cache_dir()) != default_cache_dir():
        return
    try:
        folder = cache_root() / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # PyTorch then takes the folder for temporary files
    if os.access(folder, os.W_OK):
        os.environ[variable] = str(folder)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or [''])[0]}"
