"""RunningTexts: the texts under way, one token each at a time.

Shapes:
    A  running texts       V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2ml_torch.generation import Generator
from gpt2ml_torch.generation.draft import DraftModel
from gpt2ml_torch.generation.finite import check_logits
from gpt2ml_torch.generation.sampler import Sampler, SamplingParams
from gpt2ml_torch.serving.handle import Piece
from gpt2ml_torch.serving.logprobs import wanted_infos
from gpt2ml_torch.serving.request import Request
from gpt2ml_torch.serving.rows import RowCache


class RunningTexts:
    """Texts whose windows are read: row r of the cache, of the logits and of the sampler belongs to
    `requests[r]`.
    """

    def __init__(self, generator: Generator, rows: RowCache) -> None:
        self.requests: list[Request] = []
        self.draft: DraftModel | None = None
        if generator.assistant is not None:
            self.draft = DraftModel(generator.assistant, generator.engine.limit)
        self._model = generator.model
        self._engine = generator.engine
        self._rows = rows
        self._logits: Tensor | None = None  # (A, V), after each text's last token
        self._sampler = self._new_sampler()

    def __len__(self) -> int:
        return len(self.requests)

    @torch.inference_mode()
    def add(self, request: Request, logits: Tensor) -> None:
        """Let a text run whose window was read, with the logits after it, (1, V)."""
        row = len(self.requests)
        if request.row != row:
            self._rows.copy(request.row, row, len(request.window))
        self.requests = [*self.requests, request]
        self._logits = logits if self._logits is None else torch.cat((self._logits, logits))
        self._sampler.select(range(row), self._sampler_rows(row + 1))
        self._sampler.add(
            row,
            request.text.constraints,
            SamplingParams.of(request.text.config),
            key=request.text.key,
            history=request.text.ids,
            step=request.text.count,
        )

    @torch.inference_mode()
    def choose(self) -> None:
        """Hand each text its next token."""
        assert self._logits is not None
        self._take(self._logits, self._pick(self._logits))

    @torch.inference_mode()
    def decode(self) -> None:
        """Read the token that each text was handed last."""
        last = [request.text.ids[-1] for request in self.requests]
        positions = [request.text.position for request in self.requests]
        self._logits = self._rows.decode(last, positions)

    @torch.inference_mode()
    def keep(self, requests: Sequence[Request]) -> None:
        """Go on with these of the texts; the last ones move to the rows set free."""
        if len(requests) == len(self.requests):
            return
        kept = {id(request) for request in requests}
        rows = [row for row, request in enumerate(self.requests) if id(request) in kept]
        order = list(range(len(rows)))
        holes = [row for row in order if row not in rows]
        movers = [row for row in rows if row >= len(rows)]
        for hole, mover in zip(holes, movers, strict=True):
            # The last token counts: it is there unless it was chosen a moment ago.
            self._rows.copy(mover, hole, self.requests[mover].text.position + 1)
            order[hole] = mover
        self.requests = [self.requests[row] for row in order]
        if order:
            self._sampler.select(order, self._sampler_rows(len(order)))
            assert self._logits is not None
            self._logits = self._logits[order]
        else:
            self.clear()

    def clear(self) -> None:
        """Run none any more."""
        self.requests, self._logits = [], None
        self._sampler = self._new_sampler()

    @torch.inference_mode()
    def speculate(self) -> bool:
        """Let the generator's assistant draft tokens of the only text, and check them in one step.

        A drafted token is kept where it is the one that is picked anyway, so the text stays what it
        is. Returns False where nothing could be drafted.
        """
        (request,) = self.requests
        text, size = request.text, request.text.config.num_assistant_tokens
        if self.draft is None or self._rows.whole or not size:
            return False
        if text.position + size >= self._engine.limit:
            return False
        drafted = self.draft.propose(text.ids[text.start :], size, self._sampler)
        if not drafted:
            return False
        checked = self._rows.read_all(0, [text.ids[-1], *drafted], text.position)  # (1 + size, V)
        for place, id_ in enumerate([*drafted, None]):
            self._logits = checked[place : place + 1]
            # What was not drafted right is picked at the next step, from these logits.
            if id_ is None or text.finished or text.to_come == 1:
                break
            picked = self._pick(self._logits)
            if int(picked[0]) != id_:
                break
            self._take(self._logits, picked)
        return True

    def _pick(self, logits: Tensor) -> Tensor:
        """The next token of each row of the sampler, bad words avoided; changes no state."""
        check_logits(self._model, logits)
        padded = self._pad(logits)
        ids = self._sampler.choose(padded)
        blocked: Tensor | None = None
        tried: set[tuple[int, int]] = set()  # a forced id comes again, as may the last one left
        while True:
            offenders = {
                (row, id_)
                for row, (request, id_) in enumerate(zip(self.requests, ids.tolist(), strict=False))
                if (row, id_) not in tried and request.text.offends(id_)
            }
            if not offenders:
                return ids
            tried |= offenders
            blocked = torch.zeros_like(padded, dtype=torch.bool) if blocked is None else blocked
            for row, id_ in offenders:
                blocked[row, id_] = True
            ids = self._sampler.choose(padded, blocked=blocked)

    def _take(self, logits: Tensor, picked: Tensor) -> None:
        """Hand the picked tokens to the running texts."""
        self._sampler.advance(picked)
        ids: list[int] = picked.tolist()[: len(self.requests)]
        infos = wanted_infos(logits, ids, [request.top_logprobs for request in self.requests])
        for request, id_, info in zip(self.requests, ids, infos, strict=True):
            count = request.text.count
            piece = request.text.put(id_)
            tokens = (info,) if request.text.count > count else ()
            request.handle.put(Piece(piece, tokens, request.text.finish_reason))

    def _sampler_rows(self, running: int) -> int:
        return self._rows.count if self._rows.whole else max(running, 1)

    def _new_sampler(self) -> Sampler:
        return Sampler(
            self._sampler_rows(0),
            vocab_size=self._model.config.vocab_size,
            device=self._model.device,
            per_row=self._engine.on_cuda,
        )

    def _pad(self, logits: Tensor) -> Tensor:
        """(A, V) with a row for every row of the sampler."""
        missing = self._sampler_rows(len(logits)) - len(logits)
        return torch.nn.functional.pad(logits, (0, 0, 0, missing)) if missing else logits
