"""Layers with packed weights.

`PackedLinear` and `PackedEmbedding` are an `nn.Linear` and an `nn.Embedding` to whoever asks
(`in_features`, `embedding_dim`, LoRA's adapters), but `weight` is a buffer in the packed format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gpt2ml_torch.kernels import packing
from gpt2ml_torch.kernels.ops import (
    KERNEL_DTYPES,
    load_kernels,
    pack,
    pack_rows,
    packed_linear,
    unpacked_linear,
)
from gpt2ml_torch.precision import PANEL, Precision


class Packed(nn.Module):
    """Buffers `weight` and `weight_scale` (`None` unless integers); on `meta` until filled."""

    weight: Tensor
    weight_scale: Tensor | None

    def _allocate(
        self, outputs: int, inputs: int, precision: Precision | str, dtype: torch.dtype
    ) -> None:
        precision = Precision.of(precision)
        self.outputs, self.inputs, self.precision = outputs, inputs, precision
        self.dtype = dtype
        self.trainable = False
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

    def unpacked(self) -> nn.Module:
        """The plain layer that this one was packed from."""
        raise TypeError(f"{type(self).__name__} is no layer of a model")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with the model; the packed weight itself is a format, which no dtype changes.

        Raises `ValueError` for another dtype of the activations, which the packed weight would not
        follow.
        """
        for dtype in (torch.float32, torch.bfloat16):
            wanted = fn(torch.empty(0, dtype=dtype)).dtype
            if wanted not in (dtype, self.dtype):
                raise ValueError(
                    f"the model's large matrices are packed as {self.precision}, beside which "
                    f"activations stay {self.dtype}: load it with "
                    f"dtype={wanted} instead, or unpack it first (kernels.unpack_model)"
                )
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
        if x.device.type == "cpu" and self.has_kernel and x.dtype in KERNEL_DTYPES:
            return packed_linear(x, self.weight, scale, bias, bits=self.bits, outputs=self.outputs)
        return unpacked_linear(x, self.weight, scale, bias, self.bits, self.outputs)

    def plain_weight(self) -> Tensor:
        """The weight as it was, bit for bit; if it was rounded to integers, what they stand for."""
        if self.precision.is_integer:
            return self.dequantized().to(self.dtype)
        rows = self.weight.transpose(1, 2).flatten(2).flatten(0, 1)
        return rows[: self.outputs, : self.inputs].contiguous()

    def dequantized(self) -> Tensor:
        """The weight that the packed one stands for, float32 (outputs, inputs)."""
        return packing.unpack(self.weight, self.weight_scale, self.bits, self.outputs, self.inputs)


class PackedLinear(Packed, nn.Linear):
    """x Wᵀ + b with a packed weight: (..., K) -> (..., N), in the dtype of x."""

    weight: Tensor  # a buffer, where nn.Linear has a parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        precision: Precision | str,
        bias: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self._allocate(out_features, in_features, precision, dtype)
        values = torch.empty(out_features, device="meta", dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, False))

    @classmethod
    def pack(cls, linear: nn.Linear, precision: Precision | str) -> PackedLinear:
        """A packed copy of `linear`; the bias is shared, and frozen. On `meta` it is not filled."""
        dtype, has_bias = linear.weight.dtype, linear.bias is not None
        features = linear.in_features, linear.out_features
        packed = cls(*features, precision=precision, bias=has_bias, dtype=dtype)
        packed.trainable = linear.weight.requires_grad
        if linear.weight.is_meta:
            return packed
        packed._fill(linear.weight)
        if has_bias:
            packed.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
        return packed

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias)

    def unpacked(self) -> nn.Linear:
        """A plain layer again, with `plain_weight`."""
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, bias=has_bias, device="meta")
        linear.weight = nn.Parameter(self.plain_weight(), self.trainable)
        if has_bias:
            linear.bias = nn.Parameter(self.bias.detach(), self.trainable)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision}"


class PackedEmbedding(Packed, nn.Embedding):
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
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self._allocate(num_embeddings, embedding_dim, precision, dtype)
        self.plain_type: type[nn.Embedding] = nn.Embedding

    @classmethod
    def pack(cls, embedding: nn.Embedding, precision: Precision | str) -> PackedEmbedding:
        """A packed copy of `embedding`. On `meta` it is not filled."""
        weight = embedding.weight
        packed = cls(*weight.shape, precision=precision, dtype=weight.dtype)
        packed.plain_type, packed.trainable = type(embedding), weight.requires_grad
        if not weight.is_meta:
            packed._fill(weight)
        return packed

    def unpacked(self) -> nn.Embedding:
        """A plain embedding again, of the type that was packed, with `plain_weight`."""
        weight = self.plain_weight()
        plain = self.plain_type.from_pretrained(weight, freeze=not self.trainable)
        return plain.train(self.training)

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
