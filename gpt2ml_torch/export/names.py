"""Names of the weights in an exported folder, and the rows of our weights that they hold.

Tools parse these names: `q_proj`, `o_proj` and `up_proj` tell vLLM, peft and tensor-parallel plans
what a matrix is. Query, key and value are one matrix in our file and three in the folder; every
other weight has exactly one counterpart.
"""

from __future__ import annotations

from collections.abc import Mapping

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile.format import expected_shapes

MODEL_TYPE = "gpt2ml"  # in config.json
SCOPE, LAYER = "model.", "layers.{}."  # prefix of all modules, and after it of modules in layers
# Our names and the exported ones; three names divide the rows among themselves, in this order.
MODULES: Mapping[str, tuple[str, ...]] = {
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
# Our keys in config.json and tokenizer_config.json: the source, our defaults for generation, and
# lines of the vocabulary. Programs that load and save a folder keep keys that they don't know.
SOURCE_KEY, DEFAULTS_KEY, LINES_KEY = "gpt2ml_source", "gpt2ml_generation", "gpt2ml_vocab_lines"
HEAD = "lm_head.weight"  # the token embedding again, in folders whose program stored it twice


def exported_modules(module: str) -> tuple[str, ...]:
    """The exported names of one of our modules, such as `blocks.3.attention.qkv`.

    If there are three, each holds a third of the rows. Raises `KeyError` for an unknown module.
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
    """The shape of every weight of the exported model, in our order, without the tied output."""
    shapes = {}
    for name, shape in expected_shapes(config).items():
        parts = exported_names(name)
        for part in parts:
            shapes[part] = (shape[0] // len(parts), *shape[1:])
    return shapes
