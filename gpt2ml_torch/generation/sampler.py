"""Sampler: chooses the next token of each row of a batch, every row with its own settings.

Rows can be added and dropped while others continue. The token that a row draws depends only on its
logits, settings, step number and random stream.

Shapes:
    B  batch rows       V  vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2ml_torch import sampling
from gpt2ml_torch.generation import choice
from gpt2ml_torch.generation.adjustments import Adjustments
from gpt2ml_torch.generation.choice import SamplerState
from gpt2ml_torch.generation.config import GenerationConfig
from gpt2ml_torch.generation.constraints import Constraints, RepeatedNGrams
from gpt2ml_torch.generation.transfers import to_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a row's tokens are drawn; None switches a rule off.

    `temperature` None takes the most probable token each time.
    """

    temperature: float | None = 1.0
    top_k: int | None = None
    top_p: float | None = None
    grover_top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None

    @classmethod
    def of(cls, config: GenerationConfig) -> SamplingParams:
        if not config.samples:
            return cls(temperature=None)
        top_p = None if config.top_p == 1 else config.top_p
        grover = config.top_p_rule == "grover"
        return cls(
            temperature=config.temperature,
            top_k=config.top_k or None,
            top_p=None if grover else top_p,
            grover_top_p=top_p if grover else None,
            min_p=config.min_p or None,
            typical_p=None if config.typical_p == 1 else config.typical_p,
        )

    def knobs(self, device: torch.device) -> sampling.Knobs:
        """The rules that these rows need, and no others, as 0-dimensional tensors."""
        if self.temperature is None:
            return sampling.Knobs()

        def tensor(value: float | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return None if value is None else torch.tensor(value, dtype=dtype, device=device)

        return sampling.Knobs(
            sample=torch.tensor(True, device=device),
            temperature=None if self.temperature == 1 else tensor(self.temperature),
            top_k=tensor(self.top_k, torch.int64),
            top_p=tensor(self.top_p),
            grover_top_p=tensor(self.grover_top_p),
            min_p=tensor(self.min_p),
            typical_p=tensor(self.typical_p),
        )


@dataclasses.dataclass
class _Row:
    constraints: Constraints
    params: SamplingParams
    ngrams: RepeatedNGrams | None
    step: int  # the number of the next token

    @property
    def forced(self) -> int | None:
        return self.constraints.forced.get(self.step)

    @property
    def may_end(self) -> bool:
        return self.step >= self.constraints.min_new_tokens


@dataclasses.dataclass(frozen=True)
class _Group:
    """Rows that are drawn by the same parameters; `rows` None: all of them, in order."""

    knobs: sampling.Knobs
    rows: Tensor | None


class Sampler:
    """Chooses the next token of each of `rows` rows, all of which are free at first.

    With `per_row`, for CUDA, every rule that any row uses runs for all rows at once, from the
    tensors in `state`, and nothing is read back to the host. Otherwise rows with equal settings are
    drawn together.
    """

    @torch.inference_mode()
    def __init__(
        self, rows: int, *, vocab_size: int, device: torch.device | str, per_row: bool = False
    ) -> None:
        self._device = torch.device(device)
        self._rows: list[_Row | None] = [None] * rows
        self._keys = torch.zeros(rows, dtype=torch.int64, device=device)
        self._steps = torch.zeros(rows, dtype=torch.int64, device=device)
        self._blocked = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)
        self._free = torch.full_like(self._keys, -1)  # no row is forced
        self._penalties: Tensor | None = None  # (B, 1) float32, if any row has one
        self._seen: Tensor | None = None  # (B, V) bool, if any row has a penalty
        self._adjustments: Adjustments | None = None  # if any row has one
        self._groups: list[_Group] | None = None  # made when rows have changed
        self._per_row = per_row

    @property
    def device(self) -> torch.device:
        """The device of its tensors."""
        return self._device

    # -- rows -------------------------------------------------------------------------------------

    @torch.inference_mode()
    def add(
        self,
        row: int,
        constraints: Constraints,
        params: SamplingParams,
        *,
        key: int,
        history: Sequence[int],
        step: int = 0,
    ) -> None:
        """Give a free row these settings.

        `key` is its random stream (`sampling.row_key`) and `step` the number of its next token.
        `history` is the list of its ids, prompt included, to which the caller continues to append.
        """
        size = constraints.no_repeat_ngram_size
        ngrams = RepeatedNGrams(history, size) if size else None
        self._rows[row] = _Row(constraints, params, ngrams, step)
        self._keys[row], self._steps[row] = key, step
        self._groups = None
        self._write_bans(row)
        self._write_penalty(row, constraints.repetition_penalty, history)
        self._write_adjustments(row, constraints, history[len(history) - step :])

    def drop(self, row: int) -> None:
        """Free a row; the tokens chosen for it from then on have no meaning."""
        self._rows[row] = None
        self._groups = None

    @torch.inference_mode()
    def select(
        self,
        rows: Sequence[int],
        size: int,
        *,
        histories: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Keep these rows in this order; a row may occur several times.

        Free rows follow, `size` in all. `histories` are the lists of the rows' ids, if those are
        other lists from now on.
        """
        index = to_device([*rows, *[0] * (size - len(rows))], self._device)
        chosen = [self._copy_row(row) for row in rows]
        for state, history in zip(chosen, histories or (), strict=bool(histories)):
            if state is not None and state.ngrams is not None:
                state.ngrams = state.ngrams.follow(history)
        self._rows = [*chosen, *[None] * (size - len(rows))]
        self._keys, self._steps = self._keys[index], self._steps[index]
        self._blocked, self._free = self._blocked[index], torch.full_like(index, -1)
        if self._seen is not None and self._penalties is not None:
            self._seen, self._penalties = self._seen[index], self._penalties[index]
        if self._adjustments is not None:
            self._adjustments.select(index)
        self._groups = None

    @torch.inference_mode()
    def copy(self) -> Sampler:
        """An independent copy, except for the n-grams to avoid."""
        other = Sampler.__new__(Sampler)
        other.__dict__.update(self.__dict__)
        other._rows = [self._copy_row(row) for row in range(len(self._rows))]
        other._steps, other._blocked = self._steps.clone(), self._blocked.clone()
        other._seen = None if self._seen is None else self._seen.clone()
        other._adjustments = None if self._adjustments is None else self._adjustments.copy()
        return other

    def _copy_row(self, row: int) -> _Row | None:
        state = self._rows[row]
        return None if state is None else dataclasses.replace(state)

    def _write_bans(self, row: int) -> None:
        state = self._rows[row]
        assert state is not None
        self._blocked[row] = state.constraints.banned
        if not state.may_end and state.constraints.end_ids:
            self._blocked[row, sorted(state.constraints.end_ids)] = True

    def _write_penalty(self, row: int, penalty: float, history: Sequence[int]) -> None:
        if self._seen is None or self._penalties is None:
            if penalty == 1 and not self._per_row:
                return
            self._seen = torch.zeros_like(self._blocked)
            self._penalties = torch.ones(len(self._rows), 1, device=self._device)
        self._penalties[row] = penalty
        self._seen[row] = False
        self._seen[row, torch.tensor(history, dtype=torch.int64, device=self._device)] = True

    def _write_adjustments(
        self, row: int, constraints: Constraints, written: Sequence[int]
    ) -> None:
        if self._adjustments is None:
            if not Adjustments.needed(constraints):
                return
            rows, vocab_size = self._blocked.shape
            self._adjustments = Adjustments(rows, vocab_size=vocab_size, device=self._device)
        self._adjustments.set(row, constraints, written)

    # -- choosing ---------------------------------------------------------------------------------

    @torch.inference_mode()
    def choose(self, logits: Tensor, *, blocked: Tensor | None = None) -> Tensor:
        """The next token of each row, (B, V) -> (B,) int64; changes no state.

        Tokens in `blocked`, (B, V) bool, are not chosen in this call.
        """
        if self._per_row:
            return choice.choose(logits, self.state(blocked))
        forced = {row: state.forced for row, state in enumerate(self._rows) if state is not None}
        ids = torch.zeros_like(self._keys)
        if not forced or None in forced.values():
            ids = self._draw(self._constrained(logits, blocked))
        for row, id_ in forced.items():
            if id_ is not None:
                ids[row] = id_
        return ids

    @torch.inference_mode()
    def state(self, blocked: Tensor | None = None) -> SamplerState:
        """The tensors that a choice with `per_row` depends on."""
        forced = [-1 if row is None or row.forced is None else row.forced for row in self._rows]
        free = all(id_ < 0 for id_ in forced)
        if self._groups is None:
            self._groups = [self._all_rows()]
        return SamplerState(
            knobs=self._groups[0].knobs,
            keys=self._keys,
            steps=self._steps,
            blocked=self._all_blocked(blocked),
            forced=self._free if free else to_device(forced, self._device),
            seen=self._seen,
            penalty=self._penalties,
            amounts=None if self._adjustments is None else self._adjustments.amounts,
        )

    @torch.inference_mode()
    def process(self, logits: Tensor) -> Tensor:
        """The logits, (B, V) float32, after all constraints; forbidden tokens have -inf."""
        scores = self._constrained(logits, None)
        for row, state in enumerate(self._rows):
            forced = None if state is None else state.forced
            if forced is not None:
                scores[row] = -torch.inf
                scores[row, forced] = logits[row, forced].float()
        return scores

    @torch.inference_mode()
    def advance(self, ids: Tensor) -> None:
        """Record the chosen tokens, (B,), and move every row on to its next step."""
        if self._seen is not None:
            self._seen.scatter_(1, ids[:, None], True)
        if self._adjustments is not None:
            self._adjustments.note(ids)
        self._steps += 1
        for row, state in enumerate(self._rows):
            if state is None:
                continue
            state.step += 1
            if state.step == state.constraints.min_new_tokens:
                self._write_bans(row)

    def _all_blocked(self, blocked: Tensor | None) -> Tensor:
        """The tokens that may not be chosen in this step, (B, V) bool."""
        blocked = self._blocked if blocked is None else self._blocked | blocked
        for row, state in enumerate(self._rows):
            repeated = state.ngrams.banned() if state is not None and state.ngrams else []
            if repeated:
                blocked = blocked.clone() if blocked is self._blocked else blocked
                blocked[row].index_fill_(0, to_device(repeated, self._device), True)
        return blocked

    def _constrained(self, logits: Tensor, blocked: Tensor | None) -> Tensor:
        blocked = self._all_blocked(blocked)
        if self._adjustments is not None:
            logits = self._adjustments.apply(logits)
        return sampling.process(logits, blocked=blocked, seen=self._seen, penalty=self._penalties)

    def _draw(self, scores: Tensor) -> Tensor:
        if self._groups is None:
            self._groups = self._grouped()
        keys, steps = self._keys, self._steps
        if len(self._groups) == 1 and self._groups[0].rows is None:
            return sampling.choose(scores, self._groups[0].knobs, keys=keys, steps=steps)
        ids = torch.zeros_like(keys)
        for group in self._groups:
            rows = group.rows
            assert rows is not None
            ids[rows] = sampling.choose(
                scores[rows], group.knobs, keys=keys[rows], steps=steps[rows]
            )
        return ids

    def _grouped(self) -> list[_Group]:
        """Groups of rows with equal parameters; each group runs only the rules that it uses."""
        members: dict[SamplingParams, list[int]] = {}
        for row, state in enumerate(self._rows):
            if state is not None:
                members.setdefault(state.params, []).append(row)
        whole = list(range(len(self._rows)))
        return [
            _Group(
                params.knobs(self._device),
                None if rows == whole else torch.tensor(rows, device=self._device),
            )
            for params, rows in members.items()
        ]

    def _all_rows(self) -> _Group:
        """All rows, with every rule that any of them uses.

        Each value is (B, 1), and neutral in rows that don't use the rule.
        """
        params = [
            SamplingParams(temperature=None) if state is None else state.params
            for state in self._rows
        ]

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self._device)[:, None]

        def rule(
            values: Sequence[float | None], neutral: float, dtype: torch.dtype = torch.float32
        ) -> Tensor | None:
            if all(value is None for value in values):
                return None
            return column([neutral if value is None else value for value in values], dtype)

        if all(p.temperature is None for p in params):
            return _Group(sampling.Knobs(), None)
        knobs = sampling.Knobs(
            sample=column([p.temperature is not None for p in params], torch.bool),
            temperature=column([p.temperature or 1.0 for p in params]),
            top_k=rule([p.top_k for p in params], 2**31, torch.int64),
            top_p=rule([p.top_p for p in params], 1.0),
            grover_top_p=rule([p.grover_top_p for p in params], 1.0),
            min_p=rule([p.min_p for p in params], 0.0),
            typical_p=rule([p.typical_p for p in params], 1.0),
        )
        return _Group(knobs, None)
