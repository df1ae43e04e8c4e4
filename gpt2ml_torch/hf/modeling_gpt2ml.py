"""GPT2_ML for transformers: the block of rowanz/grover, which is neither OpenAI's GPT-2 nor BERT.

Attention reads the *un-normalised* block input, and each block ends in a LayerNorm:

    h = LayerNorm(token embedding + position embedding)
    per block:  x = h + attention(h);  h = LayerNorm(x + mlp(LayerNorm(x)))
    logits = h @ token_embedding.T

An exported folder carries a copy of this file, so it imports nothing but torch and transformers.

Shapes:
    B  batch rows       T  tokens in this call    S  tokens seen so far, these included
    D  width            H  heads                  K  head size, D / H
    V  vocabulary
"""

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt2ml import GPT2MLConfig

# transformers 5.24 renamed the cache that models take and return. Every forward here takes both
# names: an unknown one would vanish in **kwargs, and each step would forget the tokens before it.
_NEW, _OLD = "cache", "past_key_values"
_CACHE = _NEW if _NEW in BaseModelOutputWithPast.__dataclass_fields__ else _OLD


def eager_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain tensor operations: outputs, (B, T, H, K), and weights, (B, H, T, S)."""
    scores = q @ k.transpose(2, 3) * scaling  # (B, H, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class GPT2MLAttention(nn.Module):
    """Causal multi-head self-attention, with no dropout on its weights."""

    def __init__(self, config: GPT2MLConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        # Separate, since a joined matrix would be split over devices at the wrong columns.
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = _one_of(cache, past_key_values)
        # -1: a device of several may hold only some of the heads.
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # (B, H, T, K)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, H, S, K)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        a, weights = attend(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )  # (B, T, H, K)
        return self.o_proj(a.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class GPT2MLMLP(nn.Module):
    """Up to the inner width, exact (erf) GELU, and down again."""

    def __init__(self, config: GPT2MLConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        for linear in (self.up_proj, self.down_proj):
            # The original draws these wider than all others.
            linear.initializer_range = config.mlp_initializer_range  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))


class GPT2MLDecoderLayer(GradientCheckpointingLayer):
    """One layer, as in the module's formula: (B, T, D) -> (B, T, D).

    Source: imcaspar/gpt2-ml, train/modeling.py, attention_layer and residual_mlp_layer.
    """

    def __init__(self, config: GPT2MLConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = GPT2MLAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GPT2MLMLP(config)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states, **kwargs)
        x = hidden_states + self.dropout(attended)  # (B, T, D)
        # The residual carries x, not its norm; the layer's own input is never normalised.
        return self.output_norm(x + self.dropout(self.mlp(self.mlp_norm(x))))


class GPT2MLPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the architecture."""

    config_class = GPT2MLConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPT2MLDecoderLayer"]
    _skip_keys_device_placement = [_OLD, _NEW]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": GPT2MLDecoderLayer, "attentions": GPT2MLAttention}

    def __init__(self, config: GPT2MLConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        tell_peft()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise weights as the original does: truncated normal; biases 0, gains of norms 1."""
        if isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            std = getattr(module, "initializer_range", self.config.initializer_range)
            init.trunc_normal_(module.weight, mean=0.0, std=std, a=-2 * std, b=2 * std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)


class GPT2MLModel(GPT2MLPreTrainedModel):
    """The model without its output layer: token ids, (B, T), to hidden states, (B, T, D).

    Raises `ValueError` for positions past the last one.
    """

    def __init__(self, config: GPT2MLConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            GPT2MLDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        cache = _one_of(cache, past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **_named(cache),
        )
        # After the mask, which detects packed sequences only if there is no cache.
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(inputs_embeds, attention_mask, cache)
        _check_positions(position_ids, self.config.max_position_embeddings)
        h = inputs_embeds  # (B, T, D)
        # In a pipeline of processes (vLLM), layers of other processes are identities. A process
        # without the first layer is given the hidden states of the process before it.
        if not isinstance(next(iter(self.layers), None), nn.Identity):
            h = self.embed_norm(h + self.embed_positions(position_ids))
        for layer in self.layers:
            h = layer(h, attention_mask=mask, **_named(cache), **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=h, **_named(cache if use_cache else None))


class GPT2MLForCausalLM(GPT2MLPreTrainedModel, GenerationMixin):
    """The language model; its output layer is the token embedding, without a bias.

    With `labels`, (B, T), the loss is the mean cross entropy of the next tokens. Labels of -100
    and, as in the original, of the padding id are left out of the mean. Raises `ValueError` for
    positions past the last one.
    Source: imcaspar/gpt2-ml, train/modeling.py, GroverModel.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan: Any = {"lm_head": (["hidden_states"], ["logits"])}

    def __init__(self, config: GPT2MLConfig) -> None:
        super().__init__(config)
        self.model = GPT2MLModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # transformers reads the names of the parameters from the signature.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, *args: Any, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        """Check the length here too, since a compiled step does not check positions."""
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        if length > limit and attention_mask is not None and attention_mask.ndim == 2:
            length = int(attention_mask.sum(-1).max())  # without padding
        _check_length(length, limit)
        inputs = {"attention_mask": attention_mask, **kwargs}
        return super().prepare_inputs_for_generation(input_ids, *args, **inputs)  # type: ignore

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **kwargs,
        )
        whole = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if whole else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])  # (B, T, V)
        loss = None
        if labels is not None:
            labels = labels.masked_fill(labels == self.config.pad_token_id, -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **_named(getattr(outputs, _CACHE)),
        )


def tell_peft() -> None:
    """Add this architecture's default LoRA targets to peft's tables, if peft has been imported.

    peft lists the architectures of transformers, and offers no other way to register one.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name in dir(constants) if constants is not None else ():
        table = getattr(constants, name)
        if name.endswith("TARGET_MODULES_MAPPING") and isinstance(table, dict) and "opt" in table:
            table.setdefault(GPT2MLConfig.model_type, ["q_proj", "v_proj"])


def _one_of(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache under its new name or its old one; raises `ValueError` for two."""
    if cache is not None and past_key_values is not None:
        raise ValueError("give either cache or past_key_values, which is the older name")
    return past_key_values if cache is None else cache


def _named(cache: Cache | None) -> dict[str, Any]:
    """The cache as the keyword argument that this transformers knows."""
    return {_CACHE: cache}


def _positions(inputs_embeds: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """The tokens' positions in their texts, (B, T); padding on the left is not counted."""
    T = inputs_embeds.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
    seen = cache.get_seq_length() if cache is not None else 0
    return (torch.arange(T, device=inputs_embeds.device) + seen)[None]


def _check_positions(position_ids: Tensor, limit: int) -> None:
    """Raise `ValueError` for a position past the last one; skipped while a graph is traced."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if traced or position_ids.device.type == "meta" or not position_ids.numel():
        return
    if position_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # values can't be read during capture
    _check_length(int(position_ids.max()) + 1, limit)


def _check_length(length: int, limit: int) -> None:
    if length > limit:
        raise ValueError(
            f"position {length - 1} was asked for; the model has positions 0 to {limit - 1}: "
            "shorten the prompt or max_new_tokens, or write long texts with gpt2ml_torch's "
            "Generator, whose window slides"
        )


__all__ = ["GPT2MLForCausalLM", "GPT2MLModel", "GPT2MLPreTrainedModel"]
