"""Which tensors a model file holds: names, dtypes and shapes, plain or packed.

Linear weights are (out, in), as `nn.Linear` has them. In a quantised file the large matrices are
packed (`gpt2ml_torch.kernels.packing`), with their scales beside them under `..._scale`; the
position embedding, norms and biases stay plain. A file may keep the statistics of the optimizer
that made it, under `optimizer.`.
"""

from __future__ import annotations

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile.safetensors_writer import TensorSpec

WEIGHT_DTYPES = ("float64", "float32", "bfloat16", "float16")  # of what is not packed
QUANTIZATIONS = ("int8", "int4")
SCALE = "_scale"  # follows the name of a packed weight
SLOT = "optimizer."  # comes before the name of one of the optimizer's statistics


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


def slot_shapes(config: GPT2MLConfig) -> dict[str, tuple[int, ...]]:
    """Adafactor's statistics, all float32: `<weight>.vr` and `.vc` of a matrix, `.v` of a vector.

    Mean squares by row, (out,), and by column, (n, in), where n variables of the original are
    joined: it factored each by itself.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            shapes[f"{name}.v"] = shape
        else:
            joined = 3 if "qkv" in name else 1
            shapes[f"{name}.vr"] = (shape[0],)
            shapes[f"{name}.vc"] = (joined, shape[1])
    return shapes


def expected_slots(config: GPT2MLConfig) -> dict[str, TensorSpec]:
    """Every tensor of the optimizer in a file that keeps it."""
    return {SLOT + name: ("float32", shape) for name, shape in slot_shapes(config).items()}


def expected_tensors(
    config: GPT2MLConfig, dtype: str, quantization: str | None = None
) -> dict[str, TensorSpec]:
    """Every tensor of the file; `dtype`, by its name, is that of all that is not packed."""
    if quantization is None:
        return {name: (dtype, shape) for name, shape in expected_shapes(config).items()}
    from gpt2ml_torch.kernels import packing  # brings PyTorch, which converting does without

    tensors: dict[str, TensorSpec] = {}
    for name, shape in expected_shapes(config).items():
        precision = packed_precision(name, quantization)
        if precision is None:
            tensors[name] = (dtype, shape)
            continue
        packed = packing.packed_shapes(shape[0], shape[1], precision)
        assert packed.scale is not None
        tensors[name] = ("uint8", packed.weight)
        tensors[name + SCALE] = ("bfloat16", packed.scale)
    return tensors


def packed_precision(name: str, quantization: str | None) -> str | None:
    """That of a weight in a file so quantised, or None where it stays plain."""
    plain = name.endswith("bias") or "norm" in name or name == "position_embedding.weight"
    if quantization is None or plain:
        return None
    from gpt2ml_torch.kernels import packing  # as above

    is_embedding = name == "token_embedding.weight"
    return packing.embedding_precision(quantization) if is_embedding else quantization


def plain_weights(config: GPT2MLConfig, quantization: str | None) -> list[str]:
    """The weights that a file so quantised holds as they are; all of them, if it is not."""
    return [
        name for name in expected_shapes(config) if packed_precision(name, quantization) is None
    ]
