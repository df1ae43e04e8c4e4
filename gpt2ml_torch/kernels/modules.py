"""Layers with packed weights, and their way into a model, one layer at a time.

`PackedLinear` and `PackedEmbedding` are an `nn.Linear` and an `nn.Embedding` to whoever asks
(`in_features`, `embedding_dim`, LoRA's adapters), but `weight` is a buffer in the packed format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2ml_torch.kernels import packing
from gpt2ml_torch.kernels.ops import (
    load_kernels,
    pack,
    pack_rows,
    packed_linear,
    unpacked_linear,
)
from gpt2ml_torch.precision import PACKABLE, PANEL, Precision

_Module = TypeVar("_Module", bound=nn.Module)


class _Packed(nn.Module):
    """Buffers `weight` and `weight_scale` (`None` unless integers); on `meta` until filled."""

    weight: Tensor
    weight_scale: Tensor | None

    def _allocate(self, outputs: int, inputs: int, precision: Precision | str) -> None:
        precision = Precision.of(precision)
        self.outputs, self.inputs, self.precision = outputs, inputs, precision
        self.bits = precision.bits
        shapes = precision.packed_shapes(outputs, inputs)
        dtype = packing.storage_dtype(precision)
        scale = None
        if shapes.scale is not None:
            scale = torch.empty(shapes.scale, dtype=torch.bfloat16, device="meta")
        self.register_buffer("weight", torch.empty(shapes.weight, dtype=dtype, device="meta"))
        self.register_buffer("weight_scale", scale)
        self.has_kernel = load_kernels()

    def _fill(self, weight: Tensor) -> None:
        packed, scale = pack(weight.detach().cpu(), self.precision)
        self.weight = packed.to(weight.device)
        self.weight_scale = None if scale is None else scale.to(weight.device)

    def fill_rows(self, rows: Tensor, first: int) -> None:
        """Pack rows of the plain weight from row `first` on, a multiple of 16."""
        if self.weight.is_meta:
            self.weight, self.weight_scale = packing.empty_packed(
                self.outputs, self.inputs, self.precision
            )
        pack_rows(rows, self.weight, self.weight_scale, self.precision, first=first)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with the model but keeps the buffers' dtypes: they are a format, no precision."""
        kept = {name: self._buffers.pop(name) for name in ("weight", "weight_scale")}
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            moved = None if buffer is None else fn(buffer)
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                moved = buffer.to(moved.device)
            self.register_buffer(name, moved)
        return self

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b: (..., K) -> (..., N)."""
        scale = self.weight_scale
        if x.device.type == "cpu" and self.has_kernel:
            return packed_linear(x, self.weight, scale, bias, bits=self.bits, outputs=self.outputs)
        return unpacked_linear(x, self.weight, scale, bias, self.bits, self.outputs)

    def dequantized(self) -> Tensor:
        """The weight that the packed one stands for, float32 (outputs, inputs)."""
        return packing.unpack(self.weight, self.weight_scale, self.bits, self.outputs, self.inputs)


class PackedLinear(_Packed, nn.Linear):
    """x Wᵀ + b with a packed weight: (..., K) -> (..., N), in the dtype of x."""

    weight: Tensor  # a buffer, where nn.Linear has a parameter

    def __init__(
        self, in_features: int, out_features: int, *, precision: Precision | str, bias: bool
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._allocate(out_features, in_features, precision)
        values = torch.empty(out_features, device="meta") if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, False))

    @classmethod
    def pack(cls, linear: nn.Linear, precision: Precision | str) -> PackedLinear:
        """A packed copy of `linear`; the bias is shared, and frozen."""
        packed = cls(linear.in_features, linear.out_features, precision=precision, bias=False)
        packed._fill(linear.weight)
        if linear.bias is not None:
            packed.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class PackedEmbedding(_Packed, nn.Embedding):
    """Embedding rows, and the scores against all of them, from one packed weight."""

    weight: Tensor  # a buffer, where nn.Embedding has a parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        precision: Precision | str,
        dtype: torch.dtype,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.dtype = num_embeddings, embedding_dim, dtype
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self._allocate(num_embeddings, embedding_dim, precision)

    @classmethod
    def pack(cls, embedding: nn.Embedding, precision: Precision | str) -> PackedEmbedding:
        weight = embedding.weight
        packed = cls(*weight.shape, precision=precision, dtype=weight.dtype)
        packed._fill(weight)
        return packed

    def forward(self, token_ids: Tensor) -> Tensor:
        panel, lane = token_ids // PANEL, token_ids % PANEL
        steps = self.weight[panel, :, lane]  # (..., K * bits / 32, 4 or 2)
        if self.weight_scale is None:
            rows = steps.flatten(-2)
        else:
            rows = packing.dequantize(steps, self.weight_scale[panel, :, lane], self.bits)
        return rows[..., : self.embedding_dim].to(self.dtype)  # (..., D)

    def logits(self, h: Tensor) -> Tensor:
        """Scores of every row, in float32 or wider: (..., D) -> (..., V)."""
        return self._product(h.to(torch.promote_types(h.dtype, torch.float32)), None)


def pack_model(model: _Module, precision: Precision | str) -> _Module:
    """Replace the linear layers and the token embedding of a GPT2ML by packed ones, in place.

    With "int4" the embedding, which is the output layer too, has 8 bits. Each weight is freed as
    soon as it is packed. On `meta` the layers are only replaced, for packed tensors to be loaded
    into. Raises `ValueError` for a precision that weights can't be packed in.
    """
    if precision not in PACKABLE:
        raise ValueError(f"precision is {str(precision)!r}; expected one of {', '.join(PACKABLE)}")
    for parent, name, layer in list(_layers(model)):
        setattr(parent, name, _replacement(layer, Precision(precision)))
    return model


@torch.no_grad()
def fill_rows(model: nn.Module, name: str, rows: Tensor, first: int, dtype: torch.dtype) -> None:
    """Give a model that `pack_model` prepared on `meta` rows of one plain tensor of a state dict.

    A packed layer's weight is packed, `first` then being a multiple of 16; anything else is copied,
    in `dtype`.
    """
    path, leaf = name.rsplit(".", 1)
    module = model.get_submodule(path)
    if isinstance(module, _Packed) and leaf == "weight":
        try:
            module.fill_rows(rows, first)
        except ValueError as error:
            raise ValueError(f"tensor {name!r}: {error}") from None
        return
    parameter = module.get_parameter(leaf)
    if parameter.is_meta:
        parameter = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="cpu"), False)
        module.register_parameter(leaf, parameter)
    parameter[first : first + len(rows)].copy_(rows)


def _layers(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The layers to pack: (parent, attribute, layer)."""
    for parent in model.modules():
        for name, layer in parent.named_children():
            is_linear = isinstance(layer, nn.Linear)
            if (is_linear or name == "token_embedding") and not isinstance(layer, _Packed):
                yield parent, name, layer


def _replacement(layer: nn.Module, precision: Precision) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        precision = precision.of_embedding
        if layer.weight.is_meta:
            dtype = layer.weight.dtype
            return PackedEmbedding(*layer.weight.shape, precision=precision, dtype=dtype)
        return PackedEmbedding.pack(layer, precision)
    assert isinstance(layer, nn.Linear)
    if layer.weight.is_meta:
        features = layer.in_features, layer.out_features
        return PackedLinear(*features, precision=precision, bias=layer.bias is not None)
    return PackedLinear.pack(layer, precision)
