"""Names of the weights in an exported folder, and which rows of ours they hold.

Tools take these names apart: `q_proj`, `o_proj`, `up_proj` tell vLLM, peft and tensor-parallel
plans what a matrix is. Query, key and value are joined in our file and separate there; everything
else has one name for one.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile.format import expected_shapes

MODEL_TYPE = "gpt2ml"  # in config.json
SCOPE, LAYER = "model.", "layers.{}."  # what stands before the modules, and before those in layers
MODULES: Mapping[str, tuple[str, ...]] = {  # ours: theirs; three share the rows, in this order
    "token_embedding": ("embed_tokens",),
    "position_embedding": ("embed_positions",),
    "embedding_norm": ("embed_norm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.o_proj",),
    "mlp_norm": ("mlp_norm",),
    "mlp.up": ("mlp.up_proj",),
    "mlp.down": ("mlp.down_proj",),
    "output_norm": ("output_norm",),
}
# Our keys in config.json and tokenizer_config.json: the origin, our defaults for generation, and
# lines of the vocabulary. Programs that load and save a folder keep what they don't know.
SOURCE_KEY, DEFAULTS_KEY, LINES_KEY = "gpt2ml_source", "gpt2ml_generation", "gpt2ml_vocab_lines"
HEAD = "lm_head.weight"  # the token embedding once more, where a program stores it


def exported_modules(module: str) -> tuple[str, ...]:
    """What one of our modules, such as `blocks.3.attention.qkv`, is called in the exported class.

    Three names stand for equal shares of its rows. Raises `KeyError` for an unknown module.
    """
    before, within = SCOPE, module
    if module.startswith("blocks."):
        _, layer, within = module.split(".", 2)
        before += LAYER.format(layer)
    return tuple(before + name for name in MODULES[within])


def exported_names(name: str) -> tuple[str, ...]:
    """The exported names of one of our weights, such as `blocks.3.attention.qkv.bias`."""
    module, _, kind = name.rpartition(".")
    return tuple(f"{exported}.{kind}" for exported in exported_modules(module))


def exported_shapes(config: GPT2MLConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of the exported model, in our order; the tied output is not stored."""
    shapes = {}
    for name, shape in expected_shapes(config).items():
        parts = exported_names(name)
        for part in parts:
            shapes[part] = (shape[0] // len(parts), *shape[1:])
    return shapes
