"""Parse and check the metadata of a model file, which may come from a stranger."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.modelfile.format import (
    CHECKSUMS,
    FORMAT_VERSION,
    TensorSpec,
    check_names,
    plain_weights,
)
from gpt2ml_torch.modelfile.header import CURE, TensorInfo
from gpt2ml_torch.precision import FLOATING, INTEGER, Precision


def check_custom(custom: Any, entries: Mapping[str, Any]) -> dict[str, str]:
    """The metadata as strings, checked to be a model file of a version that this code reads."""
    if custom is None:
        custom = {}
    if not isinstance(custom, dict) or not all(isinstance(value, str) for value in custom.values()):
        raise ValueError("damaged: the metadata are not strings")
    version = custom.get("gpt2ml_format")
    if version is None:
        raise ValueError(f"a safetensors file, but not a converted GPT2_ML: {_what_it_is(entries)}")
    if not (version.isascii() and version.isdigit() and len(version) < 10 and int(version) >= 1):
        raise ValueError(f"damaged: gpt2ml_format is {version[:40]!r}; expected {FORMAT_VERSION}")
    if int(version) > FORMAT_VERSION:
        raise ValueError(
            f"format version {version}; this program reads up to {FORMAT_VERSION}: update "
            "gpt2ml_torch"
        )
    if "config" not in custom:
        raise ValueError(f"damaged: the metadata lack 'config'; {CURE}")
    return custom


def _what_it_is(entries: Mapping[str, Any]) -> str:
    names = list(entries)
    if any(name.endswith(("wte.weight", "attn.c_attn.weight")) for name in names):
        return (
            "it looks like a model of transformers or the community's conversion (wte, c_attn); "
            "`gpt2ml convert` makes a model file of the community's"
        )
    if any(name.startswith("base_model.model.") for name in names):
        return "it looks like a LoRA adapter; load it on top of a converted model"
    shown = ", ".join(repr(name[:60]) for name in names[:3]) or "nothing"
    more = ", ..." if len(names) > 3 else ""
    return f"it holds {len(names)} tensors ({shown}{more}) and no configuration; {CURE}"


def check_specs(
    tensors: Mapping[str, TensorInfo], expected: Mapping[str, TensorSpec], where: str
) -> None:
    """Raise `ValueError` unless the tensors have the expected names, dtypes and shapes."""
    check_names(tensors, expected, where)
    for name, (wanted, shape) in expected.items():
        info = tensors[name]
        if info.shape != tuple(shape):
            raise ValueError(
                f"tensor {name!r} has shape {info.shape}; the configuration says {tuple(shape)}"
            )
        if info.dtype != wanted:
            raise ValueError(f"tensor {name!r} is {info.dtype}; expected {wanted}")


def common_dtype(
    tensors: Mapping[str, TensorInfo], config: GPT2MLConfig, packed: Precision | None
) -> Precision:
    """The common dtype of the weights that are not packed; `ValueError` if they have several."""
    plain = plain_weights(config, packed)
    dtypes = {tensors[name].dtype for name in plain if name in tensors}
    if len(dtypes) > 1 or not dtypes <= set(FLOATING):
        found = ", ".join(sorted(dtypes))
        raise ValueError(f"weights of {found}; expected one of {', '.join(FLOATING)}")
    return Precision(dtypes.pop()) if dtypes else Precision.FLOAT32


def parse_checksums(text: str | None, entries: Mapping[str, TensorInfo]) -> dict[str, int]:
    if text is None:
        return {}
    values = parse_object(text, CHECKSUMS)
    try:
        checksums = {name: int(value, 16) for name, value in values.items()}
    except (TypeError, ValueError):
        raise ValueError(f"damaged: {CHECKSUMS} holds values that are not checksums") from None
    check_names(checksums, entries, f"{CHECKSUMS} in the metadata")
    return checksums


def parse_packed(text: str | None) -> Precision | None:
    """The precision of the packed matrices."""
    if text is None:
        return None
    if text not in INTEGER:
        raise ValueError(f"weights packed as {text[:40]!r}; update gpt2ml_torch")
    return Precision(text)


def parse_object(text: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged: {what} in the metadata is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"damaged: {what} in the metadata is not a JSON object")
    return value
