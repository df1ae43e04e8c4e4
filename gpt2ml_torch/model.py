"""GPT2_ML in PyTorch: the block of rowanz/grover, which is neither OpenAI's GPT-2 nor BERT.

Attention reads the *un-normalised* block input, and each block ends in a LayerNorm:

    h = LayerNorm(token embedding + position embedding)
    per block:  x = h + attention(h);  h = LayerNorm(x + mlp(LayerNorm(x)))
    logits = h @ token_embedding.T

Shapes:
    B  batch rows       T  tokens in this call    S  slots of the key-value cache
    D  width            H  heads                  K  head size, D / H
    V  vocabulary
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from gpt2ml_torch import kernels
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.input_checks import check_inputs
from gpt2ml_torch.kv_cache import KVCache
from gpt2ml_torch.modelfile.pretrained import Pretrained


class TokenEmbedding(nn.Embedding):
    """The token embedding, which is the output layer too."""

    def logits(self, h: Tensor) -> Tensor:
        """Scores of every token, (..., D) -> (..., V)."""
        return F.linear(h, self.weight)


class Attention(nn.Module):
    """Causal multi-head self-attention, with no dropout on its weights."""

    def __init__(self, config: GPT2MLConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        h: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        B, T, D = h.shape
        qkv = self.qkv(h).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.unbind(2)  # each (B, T, H, K)
        if cache is not None:
            rows = torch.arange(B, device=h.device)[:, None]  # (B, 1)
            for slots, new in zip(cache, (k, v), strict=True):
                slots.index_put_((rows, positions), new)
            if mask is not None:  # else the cache was empty: these tokens attend to each other
                k, v = cache  # (B, S, H, K)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T or S, K)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.output(a.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Up to the inner width, exact (erf) GELU, and down again."""

    def __init__(self, config: GPT2MLConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """One layer.

    Source: imcaspar/gpt2-ml, train/modeling.py, attention_layer and residual_mlp_layer.
    """

    def __init__(self, config: GPT2MLConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        h: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        attended = self.attention(h, positions=positions, mask=mask, cache=cache)
        x = h + self.dropout(attended)  # (B, T, D)
        # The residual carries x, not its norm; the block's own input is never normalised.
        return self.output_norm(x + self.dropout(self.mlp(self.mlp_norm(x))))


class GPT2ML(Pretrained):
    """The language model: `model(token_ids)` gives next-token logits, (B, T) int64 -> (B, T, V).

    Its parameters have the names of the tensors in a model file; the output layer is the token
    embedding. `from_pretrained` and `save_pretrained` come from `modelfile.pretrained`.
    `gradient_checkpointing` may be set to recompute each block in the backward pass in training.
    Source: imcaspar/gpt2-ml, train/modeling.py, GroverModel.
    """

    def __init__(self, config: GPT2MLConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        # From empty tensors, since `nn.Embedding` draws numbers of its own, and on `meta` imports
        # the whole compiler for it.
        width, positions = config.hidden_size, config.max_position_embeddings
        tokens = torch.empty(config.vocab_size, width)
        self.token_embedding = TokenEmbedding.from_pretrained(tokens, freeze=False)
        self.position_embedding = nn.Embedding.from_pretrained(
            torch.empty(positions, width), freeze=False
        )
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks: Any = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        if self.device.type != "meta":
            self.initialize()

    @property
    def device(self) -> torch.device:
        return self.position_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations; the large matrices may be stored in another one."""
        return self.position_embedding.weight.dtype

    @property
    def runs_on_kernels(self) -> bool:
        """Whether all layers run as one operator over a key-value cache: packed, on this CPU."""
        return kernels.can_run_layers(
            self.blocks, like=self.position_embedding.weight, head_size=self.config.head_size
        )

    @torch.no_grad()
    def initialize(self) -> None:
        """Draw fresh weights as the original does: truncated normals, biases 0, norms 1 and 0."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm.weight" in name else 0.0)
                continue
            in_mlp = ".mlp." in name
            std = self.config.mlp_initializer_range if in_mlp else self.config.initializer_range
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)

    def forward(
        self,
        token_ids: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token at every place, (B, T) int64 -> (B, T, V).

        `positions`, (B, T) int64, defaults to 0..T-1 in each row. With a `cache`, the keys and
        values of these tokens are written to the slots of their positions, and each token attends
        to all slots up to its own: a text fed in any chunks has the same logits as the whole.
        Without one, `document_ids`, (B, T), keeps several documents of a row apart: a token attends
        only to those before it with its own id. Raises `ValueError` for ids outside the vocabulary
        and positions past the last; inside `torch.compile` the same checks raise `RuntimeError`.
        """
        check_inputs(self.config, self.dtype, token_ids, positions, cache, document_ids)
        h = self.hidden_states(
            token_ids, positions=positions, cache=cache, document_ids=document_ids
        )
        return self.logits(h)

    def hidden_states(
        self,
        token_ids: Tensor,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        document_ids: Tensor | None = None,
        cache_is_empty: bool = False,
        on_kernels: bool | None = None,
        share_code: bool = False,
    ) -> Tensor:
        """The last block's output, (B, T) -> (B, T, D); inputs are not checked.

        `cache` holds the tensors of a `KVCache`, keys and values, each (layers, B, S, H, K):
        compiled graphs take tensors, whose sizes may differ from call to call. With
        `cache_is_empty` the tokens are the first of their rows, at positions 0, 1, ..., and
        attention needs no mask. `on_kernels` is `runs_on_kernels` where the caller knows it. With
        `share_code`, which is for blocks that are equal except for their weights, a compiled graph
        holds the code of one block.
        """
        B, T = token_ids.shape
        if positions is None:
            positions = torch.arange(T, device=token_ids.device).expand(B, T)
        h = self.token_embedding(token_ids) + self.position_embedding(positions)
        h = self.embedding_norm(h)  # (B, T, D); the original has no dropout here
        if on_kernels is None:
            on_kernels = cache is not None and self.runs_on_kernels
        if on_kernels and cache is not None:
            return kernels.run_layers(self.blocks, h, positions, *cache.parts)
        mask = None  # plain causal attention among the tokens of this call
        if cache is not None and not cache_is_empty:
            mask = _slot_mask(positions, cache)
        elif document_ids is not None:
            mask = _document_mask(document_ids)
        for index, block in enumerate(self.blocks):
            if self.gradient_checkpointing and self.training and cache is None:
                h = recompute_in_backward(block, h, mask=mask, use_reentrant=False)
            else:
                layer = None if cache is None else cache.layer(index)
                run = _run_block_once_compiled if share_code else _run_block
                h = run(block, h, positions, mask, layer)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """Scores of every token of the vocabulary, (..., D) -> (..., V); no bias, no final norm."""
        return self.token_embedding.logits(h)


def _slot_mask(positions: Tensor, cache: KVCache) -> Tensor:
    """Each token attends to all slots up to its own: (B, T) -> (B, 1, T, S)."""
    slots = torch.arange(cache.length, device=positions.device)  # (S,)
    return (slots <= positions[:, :, None])[:, None]


def _document_mask(document_ids: Tensor) -> Tensor:
    """Each token attends to those before it in its document: (B, T) -> (B, 1, T, T)."""
    places = torch.arange(document_ids.shape[1], device=document_ids.device)  # (T,)
    same_document = document_ids[:, :, None] == document_ids[:, None, :]  # (B, T, T)
    return (same_document & (places <= places[:, None]))[:, None]


def _run_block(
    block: nn.Module,
    h: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    cache: tuple[Tensor, Tensor] | None,
) -> Tensor:
    result: Tensor = block(h, positions=positions, mask=mask, cache=cache)
    return result


# In a compiled graph, code for one layer that serves its equals; elsewhere the same function.
# It takes gradients too, but dropout and LoRA may break in it.
_run_block_once_compiled = torch.compiler.nested_compile_region(_run_block)
