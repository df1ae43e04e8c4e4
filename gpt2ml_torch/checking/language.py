"""Check that the weights know Chinese, and that no other interpretation of them knows it better.

A correctly converted language model finds sentences far more probable than the same characters
shuffled, or than the tokens one row further in the vocabulary. Some wrong conversions keep part of
that knowledge (blocks or positions one place off, two norms exchanged). They are detected by
rivals: the same weights, read with one such change. If a rival undoes the conversion's mistake, it
fits the sentences better than the file as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2ml_torch import kernels
from gpt2ml_torch.checking.finding import Finding, judge
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.kv_cache import KVCache
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.tokenizer import Tokenizer

# Our own sentences, and two Tang poems (Du Fu, Wang Wei), which are in the public domain.
SENTENCES = {
    "news": (
        "昨天上午，市气象台发布消息，受冷空气影响，未来三天全市气温将明显下降，"
        "请市民注意添衣保暖，减少外出。"
    ),
    "prose": (
        "清晨的阳光照进院子，母亲在厨房里忙着做早饭，弟弟还没有起床，"
        "屋子里飘着米粥的香味，一切都和从前一样。"
    ),
    "verse (Du Fu)": (
        "国破山河在，城春草木深。感时花溅泪，恨别鸟惊心。"
        "烽火连三月，家书抵万金。白头搔更短，浑欲不胜簪。"
    ),
    "verse (Wang Wei)": (
        "空山新雨后，天气晚来秋。明月松间照，清泉石上流。"
        "竹喧归浣女，莲动下渔舟。随意春芳歇，王孙自可留。"
    ),
}
LEAST_MARGIN = 1.0  # nats a token: e times as probable as shuffled or shifted
LARGEST_GAIN = 0.05  # nats a token by which a rival may fit better, by chance
LARGE = 10**8  # parameters; of each sentence, a larger model reads only FEW_TOKENS, to save time
FEW_TOKENS = 24
SHORTEST = 8  # tokens; the loss of a shorter text says too little
MOST_UNKNOWN = 0.2  # share of a sentence's tokens that may be [UNK]

Rival = Callable[[GPT2ML], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class Reading:
    """The mean loss of one sentence, in nats a token: as written, shuffled and shifted."""

    genre: str
    ids: Tensor  # (1, T)
    loss: float
    shuffled: float
    shifted: float

    @property
    def margin(self) -> float:
        return min(self.shuffled, self.shifted) - self.loss


def check_language(model: GPT2ML, readings: list[Reading]) -> Iterator[Finding]:
    """Check that vocabulary and weights belong together and that no rival reading fits better.

    `model` must be in evaluation mode; it is left unchanged.
    """
    yield _judge_margins(model, readings)
    best = best_of(readings)
    if best is not None and best.margin >= LEAST_MARGIN:
        yield _judge_rivals(best, rival_losses(model, best.ids))


def best_of(readings: list[Reading]) -> Reading | None:
    """The reading with the largest margin over nonsense; None if there are no readings."""
    return max(readings, key=lambda reading: reading.margin, default=None)


def is_large(config: GPT2MLConfig) -> bool:
    """Whether a forward pass takes so long that the checks use as few as they can."""
    return config.num_parameters > LARGE


@torch.inference_mode()
def read_sentences(model: GPT2ML, tokenizer: Tokenizer) -> list[Reading]:
    """Readings of the built-in sentences whose characters the vocabulary has, in one batch."""
    known: dict[str, Tensor] = {}
    rows: list[Tensor] = []
    for genre, text in SENTENCES.items():
        ids = torch.tensor(tokenizer.encode(text), device=model.device)
        longest = FEW_TOKENS if is_large(model.config) else len(ids)
        ids = ids[: min(longest, model.config.max_position_embeddings - 1)]
        unknown = (ids == tokenizer.unk_id).float().mean().item()
        if unknown > MOST_UNKNOWN or len(ids) < SHORTEST:
            continue
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        known[genre] = ids[None]
        rows += [ids, ids[order.to(ids.device)], (ids + 1) % model.config.vocab_size]
    losses = iter(mean_losses(model, rows) if rows else [])
    return [Reading(genre, ids, *islice(losses, 3)) for genre, ids in known.items()]


def _judge_margins(model: GPT2ML, readings: list[Reading]) -> Finding:
    name = "vocabulary and language"
    if not readings:
        text = f"the model has no positions for a sentence of {SHORTEST} tokens"
        if model.config.max_position_embeddings > SHORTEST:
            text = "the vocabulary lacks the characters of plain Chinese"
        return Finding(name, "fail", text)
    values = {
        r.genre: {"loss": r.loss, "shuffled": r.shuffled, "shifted": r.shifted} for r in readings
    }
    best = max(readings, key=lambda reading: reading.margin)
    text = (
        f"{best.genre}: {best.loss:.2f} nats a token, shuffled {best.shuffled:.2f}, one row off in "
        f"the vocabulary {best.shifted:.2f}"
    )
    faults = []
    if not best.margin >= LEAST_MARGIN:
        faults.append(
            f"no sentence is {LEAST_MARGIN} nats a token more probable than nonsense ({text}): "
            "weights and vocabulary don't belong together, or the conversion is wrong"
        )
    return judge(name, faults, text, sentences=values)


def _judge_rivals(best: Reading, losses: dict[str, float]) -> Finding:
    name = min(losses, key=lambda rival: losses[rival])
    faults = []
    if losses[name] < best.loss - LARGEST_GAIN:
        faults.append(
            f"read with {name}, the loss is {losses[name]:.2f} instead of {best.loss:.2f} nats a "
            "token: the conversion made that mistake"
        )
    text = f"{len(losses)} other readings fit worse; the nearest, {name}, by "
    text += f"{losses[name] - best.loss:.2f} nats a token"
    return judge("order of the weights", faults, text, loss=best.loss, rivals=losses)


@torch.inference_mode()
def rival_losses(model: GPT2ML, ids: Tensor) -> dict[str, float]:
    """The mean loss of a text, (1, T) ids, in nats a token under each rival reading."""
    text = ids[0]
    losses = {}
    for name, rival in rivals(model).items():
        with rival(model):
            losses[name] = mean_losses(model, [text])[0]
    for name, step in (("positions one later", 1), ("positions one earlier", -1)):
        losses[name] = mean_losses(model, [text], first_position=step)[0]
    shifted = [(text + step) % model.config.vocab_size for step in (1, -1)]
    names = ("tokens one later", "tokens one earlier")
    return losses | dict(zip(names, mean_losses(model, shifted), strict=True))


def mean_losses(model: GPT2ML, rows: list[Tensor], *, first_position: int = 0) -> list[float]:
    """Mean cross entropy of the tokens of each row, (T,) ids, after the first; in one batch."""
    # Padding at the end needs no mask: attention is causal.
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    positions = torch.arange(ids.shape[1], device=ids.device) + first_position
    positions %= model.config.max_position_embeddings
    cache = None
    if model.packed is not None and first_position == 0:  # all layers in one operator
        B, T = ids.shape
        cache = KVCache(
            model.config, batch_size=B, length=T, dtype=model.dtype, device=model.device
        )
    logits = model(ids, positions=positions.expand_as(ids), cache=cache)
    return [
        F.cross_entropy(of_row[: len(row) - 1].float(), row[1:]).item()
        for of_row, row in zip(logits, rows, strict=True)
    ]


# -- rival readings: each changes the model for the length of a `with` -----------------------------


def rivals(model: GPT2ML) -> dict[str, Rival]:
    """Mistakes that a conversion can make without any change of a tensor's shape, by name."""
    found: dict[str, Rival] = {
        f"{one} and {other} exchanged": _reordered(order)
        for one, other, order in (
            ("queries", "keys", (1, 0, 2)),
            ("keys", "values", (0, 2, 1)),
            ("queries", "values", (2, 1, 0)),
        )
    }
    found["the norms of each block exchanged"] = _exchanged_norms
    if len(model.blocks) > 1:
        found["blocks one later"] = _rotated_blocks(1)
        found["blocks one earlier"] = _rotated_blocks(-1)
    found["square kernels transposed"] = _transposed_kernels
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    if width % 64 == 0 and width // 64 != heads:
        found["heads of 64"] = _heads(width // 64)
    return found


def _reordered(order: tuple[int, int, int]) -> Rival:
    """Reorder the parts of the joined query, key and value output."""

    @contextlib.contextmanager
    def rival(model: GPT2ML) -> Iterator[None]:
        def reorder(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            parts = output.chunk(3, dim=-1)
            return torch.cat([parts[index] for index in order], dim=-1)

        with contextlib.ExitStack() as stack:
            for block in model.blocks:
                hook = block.attention.qkv.register_forward_hook(reorder)
                stack.callback(hook.remove)
            yield

    return rival


@contextlib.contextmanager
def _exchanged_norms(model: GPT2ML) -> Iterator[None]:
    def exchange() -> None:
        for block in model.blocks:
            block.mlp_norm, block.output_norm = block.output_norm, block.mlp_norm

    exchange()
    try:
        yield
    finally:
        exchange()


def _rotated_blocks(by: int) -> Rival:
    @contextlib.contextmanager
    def rival(model: GPT2ML) -> Iterator[None]:
        before = model.blocks
        blocks = list(before)
        model.blocks = nn.ModuleList(blocks[-by:] + blocks[:-by])
        try:
            yield
        finally:
            model.blocks = before

    return rival


@contextlib.contextmanager
def _transposed_kernels(model: GPT2ML) -> Iterator[None]:
    """Transpose the square kernels of the attention: query, key, value and output."""

    def product(linear: Any, x: Tensor) -> Tensor:
        weight, dtype = linear.weight, x.dtype
        if isinstance(linear, kernels.PackedLinear):
            # CPUs on which packing helps may multiply plain bfloat16 very slowly.
            weight, x = linear.plain_weight().float(), x.float()
        parts = weight.split(linear.in_features)
        y = torch.cat([x @ part for part in parts], dim=-1).to(dtype)
        return y if linear.bias is None else y + linear.bias

    layers = [
        layer for block in model.blocks for layer in (block.attention.qkv, block.attention.output)
    ]
    for layer in layers:
        layer.forward = lambda x, layer=layer: product(layer, x)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _heads(count: int) -> Rival:
    @contextlib.contextmanager
    def rival(model: GPT2ML) -> Iterator[None]:
        before = [block.attention.num_heads for block in model.blocks]
        try:
            for block in model.blocks:
                block.attention.num_heads = count
            yield
        finally:
            for block, heads in zip(model.blocks, before, strict=True):
                block.attention.num_heads = heads

    return rival
