"""Which tensors a model file holds: names, dtypes and shapes, plain or packed.

Linear weights are (out, in), as `nn.Linear` has them. In a quantised file the large matrices are
packed (`gpt2ml_torch.kernels.packing`), with their scales beside them under `..._scale`; the
position embedding, norms and biases stay plain.
"""

from __future__ import annotations

import torch

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.kernels import packing
from gpt2ml_torch.safetensors_writer import TensorSpec

QUANTIZATIONS = ("int8", "int4")
SCALE = "_scale"  # follows the name of a packed weight


def expected_shapes(config: GPT2MLConfig) -> dict[str, tuple[int, ...]]:
    """Every weight of a model of these sizes, in the order in which it is used."""
    width, mlp = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (config.vocab_size, width),
        "position_embedding.weight": (config.max_position_embeddings, width),
        "embedding_norm.weight": (width,),
        "embedding_norm.bias": (width,),
    }
    linears = {
        "attention.qkv": (3 * width, width),
        "attention.output": (width, width),
        "mlp.up": (mlp, width),
        "mlp.down": (width, mlp),
    }
    for layer in range(config.num_hidden_layers):
        for name, (outputs, inputs) in linears.items():
            shapes[f"blocks.{layer}.{name}.weight"] = (outputs, inputs)
            shapes[f"blocks.{layer}.{name}.bias"] = (outputs,)
        for name in ("mlp_norm", "output_norm"):
            shapes[f"blocks.{layer}.{name}.weight"] = (width,)
            shapes[f"blocks.{layer}.{name}.bias"] = (width,)
    return shapes


def expected_tensors(
    config: GPT2MLConfig, dtype: torch.dtype, quantization: str | None = None
) -> dict[str, TensorSpec]:
    """Every tensor of the file; `dtype` is that of all that is not packed."""
    if quantization is None:
        return {name: (dtype, shape) for name, shape in expected_shapes(config).items()}
    tensors: dict[str, TensorSpec] = {}
    for name, shape in expected_shapes(config).items():
        precision = packed_precision(name, quantization)
        if precision is None:
            tensors[name] = (dtype, shape)
            continue
        packed = packing.packed_shapes(shape[0], shape[1], precision)
        assert packed.scale is not None
        tensors[name] = (torch.uint8, packed.weight)
        tensors[name + SCALE] = (torch.bfloat16, packed.scale)
    return tensors


def packed_precision(name: str, quantization: str | None) -> str | None:
    """That of a weight in a file so quantised, or None where it stays plain."""
    plain = name.endswith("bias") or "norm" in name or name == "position_embedding.weight"
    if quantization is None or plain:
        return None
    is_embedding = name == "token_embedding.weight"
    return packing.embedding_precision(quantization) if is_embedding else quantization
