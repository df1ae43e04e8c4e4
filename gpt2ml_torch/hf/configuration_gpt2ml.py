"""Configuration of GPT2_ML for transformers.

An exported folder carries a copy of this file, so it imports nothing but transformers.
"""

from transformers import PreTrainedConfig


class GPT2MLConfig(PreTrainedConfig):
    """Sizes and constants of a GPT2_ML; the defaults describe the published 15G model.

    Source: imcaspar/gpt2-ml, train/modeling.py, GroverConfig.
    """

    model_type = "gpt2ml"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # the latter since 5.24

    # How programs split each pair of matrices over several devices: first by column, then by row.
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "embed_positions": (["position_ids"], ["inputs_embeds"]),
        "embed_norm": (["inputs_embeds"], ["hidden_states"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
    }

    vocab_size: int = 21130
    hidden_size: int = 1536
    num_hidden_layers: int = 48
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    max_position_embeddings: int = 1024
    hidden_dropout_prob: float = 0.1
    initializer_range: float = 0.0141421
    mlp_initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None  # the model was trained without a begin and an end token
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    def validate_architecture(self) -> None:
        """Raise `ValueError` unless the width is divisible by the heads; transformers calls it."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}"
            )


__all__ = ["GPT2MLConfig"]
