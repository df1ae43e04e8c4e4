"""The format of a model file: names, dtypes and shapes of its tensors, and its metadata.

Linear weights are (out, in), as in `nn.Linear`. In a file with packed weights the large matrices
are packed (`gpt2ml_torch.kernels.packing`), each with its scale beside it under `..._scale`; the
position embedding, norms and biases stay plain. A file may keep the statistics of the optimizer
that made it, under `optimizer.`. docs/format.md specifies all of this for other programs.

Reader and writer are both built on this module, which needs no PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.precision import Precision

FORMAT_VERSION = 1

# PyTorch's name of a dtype: its code in the header, and the bytes of one element.
DTYPES: dict[str, tuple[str, int]] = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}

SCALE = "_scale"  # suffix of a packed weight's name
SLOT = "optimizer."  # prefix of the name of one of the optimizer's statistics
CHECKSUMS = "crc32c"  # metadata key: the checksum of each tensor
METADATA_CHECKSUM = "metadata_crc32c"  # metadata key: the checksum of the rest of the metadata

TensorSpec = tuple[str, Sequence[int]]  # dtype, by its name in `DTYPES`, and shape


def expected_shapes(config: GPT2MLConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of a model of these sizes, in the order of use."""
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

    They are mean squares by row, (out,), and by column, (n, in). n is the number of the original's
    variables that a weight joins, since each was factored separately.
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
    config: GPT2MLConfig, dtype: str, packed: Precision | None = None
) -> dict[str, TensorSpec]:
    """Every weight in a file; `dtype` names the dtype of every unpacked tensor."""
    tensors: dict[str, TensorSpec] = {}
    for name, shape in expected_shapes(config).items():
        precision = packed_precision(name, packed)
        if precision is None:
            tensors[name] = (str(dtype), shape)
            continue
        shapes = precision.packed_shapes(shape[0], shape[1])
        assert shapes.scale is not None
        tensors[name] = ("uint8", shapes.weight)
        tensors[name + SCALE] = ("bfloat16", shapes.scale)
    return tensors


def packed_precision(name: str, packed: Precision | None) -> Precision | None:
    """The packed precision of weight `name` in such a file, or None if it is stored unpacked."""
    plain = name.endswith("bias") or "norm" in name or name == "position_embedding.weight"
    if packed is None or plain:
        return None
    return packed.of_embedding if name == "token_embedding.weight" else packed


def plain_weights(config: GPT2MLConfig, packed: Precision | None) -> list[str]:
    """The weights that such a file stores unpacked: all, if it packs none."""
    return [name for name in expected_shapes(config) if packed_precision(name, packed) is None]


def dtype_name(dtype: Any) -> str:
    """The name in `DTYPES` of a `torch.dtype`, of a precision, or of a name itself."""
    return str(dtype).removeprefix("torch.")


def byte_size(spec: TensorSpec) -> int:
    """The bytes of a tensor."""
    dtype, shape = spec
    return math.prod(shape) * DTYPES[dtype][1]


def check_names(found: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raise `ValueError` unless the names are the expected ones, naming the first few others."""
    faults = []
    for what, names in (
        ("lacks", set(expected) - set(found)),
        ("has unknown", set(found) - set(expected)),
    ):
        if names:
            shown = ", ".join(repr(name[:80]) for name in sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            faults.append(f"{where} {what} {shown}{more}")
    if faults:
        raise ValueError(f"not the weights of this configuration: {'; '.join(faults)}")


def check_vocab(vocab: str | None, config: GPT2MLConfig) -> None:
    """Raise `ValueError` for a vocabulary that can't belong to this model."""
    if vocab is None:
        return
    try:
        vocab.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"damaged: the vocabulary is not valid Unicode ({error.reason})") from None
    lines = count_lines(vocab)
    if lines > config.vocab_size:
        raise ValueError(
            f"the vocabulary has {lines} lines, the model {config.vocab_size} rows: it belongs to "
            "another model"
        )


def count_lines(vocab: str) -> int:
    r"""The number of tokens in a vocabulary: lines separated by `\n` only.

    Two published tokens hold other line separators.
    """
    return len(vocab.removesuffix("\n").split("\n")) if vocab else 0
