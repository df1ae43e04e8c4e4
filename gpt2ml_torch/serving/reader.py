"""PromptReader: reads the prompts of requests into rows of the cache, a part at a time.

Shapes:
    T  tokens of a part       V  vocabulary
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2ml_torch.serving.chunks import Pace
from gpt2ml_torch.serving.handle import TokenInfo
from gpt2ml_torch.serving.logprobs import token_infos
from gpt2ml_torch.serving.prefixes import PrefixCache, Window, common_length
from gpt2ml_torch.serving.request import Request
from gpt2ml_torch.serving.rows import RowCache


class PromptReader:
    """Reads windows, except for what running texts or the prefix cache know of them already."""

    def __init__(self, rows: RowCache, prefixes: PrefixCache, pace: Pace) -> None:
        self._rows = rows
        self._prefixes = prefixes
        self._pace = pace

    @torch.inference_mode()
    def read(self, request: Request, size: int, beside: Sequence[Request]) -> Tensor | None:
        """Read at most `size` tokens more of the request's window; the logits after the window,
        (1, V), once it is read to its end.

        `beside` are the texts that hold the first rows.
        """
        window = request.window
        logits: Tensor | None = None
        if not request.read:
            self._rows.use_adapter(request.row, request.adapter)
            if not request.prompt_logprobs:
                logits = self._share(request, window, beside)
                request.handle.cached_tokens = max(request.handle.cached_tokens, request.read)
            request.copy = self._prefixes.begin(_key(request, window), request.read)
        if request.read < len(window):
            end = request.read + (size if self._rows.chunked else len(window))
            part = window[request.read : end]
            began = time.perf_counter()
            logits = self._read_part(request, part)
            self._pace.note_read(len(part), time.perf_counter() - began)
            request.read += len(part)
        if request.copy is not None:
            request.copy.follow(self._rows.cache, request.row, request.read)
        if request.read < len(window):
            return None
        assert logits is not None
        if request.copy is not None:
            self._prefixes.add(request.copy, logits)
            request.copy = None
        request.after = len(window), logits
        return logits

    def _share(
        self, request: Request, window: Sequence[int], beside: Sequence[Request]
    ) -> Tensor | None:
        """Copy the beginning of a window that is known already; the logits after the window where
        all of it is. Otherwise the last token is left to read, for its logits.
        """
        lengths = [
            common_length(other.window, window) if other.adapter == request.adapter else 0
            for other in beside
        ]
        longest = max(lengths, default=0)
        source = lengths.index(longest) if longest else None
        kept, entry = self._prefixes.match(_key(request, window))
        if source is not None and longest >= kept:
            known, after = longest, beside[source].after
        elif entry is not None:
            known, after = kept, (len(entry.ids), self._prefixes.logits(entry))
        else:
            return None
        complete = after is not None and known == after[0] == len(window)
        if not complete:
            # Compiled steps read a window at once: any other size would have to be compiled.
            known = min(known, len(window) - 1) if self._rows.chunked else 0
        if source is not None and longest >= kept:
            self._rows.copy(source, request.row, known)
        elif entry is not None:
            self._prefixes.copy_to(entry, known, self._rows.cache, request.row)
        request.read = known
        return after[1] if complete and after is not None else None

    def _read_part(self, request: Request, part: Sequence[int]) -> Tensor:
        """Logits after the part, (1, V)."""
        if not request.prompt_logprobs:
            return self._rows.read(request.row, part, request.read)
        logits = self._rows.read_all(request.row, part, request.read)  # (T, V)
        ids = request.window[request.read + 1 : request.read + len(part) + 1]
        infos = token_infos(logits[: len(ids)], ids, request.top_logprobs or 0)
        first = () if request.handle.prompt_tokens else (TokenInfo(request.window[0], None),)
        request.handle.prompt_tokens += (*first, *infos)
        return logits[-1:]


def _key(request: Request, window: Sequence[int]) -> Window:
    return Window(tuple(window), request.adapter)
