"""Packing a whole model, one layer at a time, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gpt2ml_torch.kernels import packing
from gpt2ml_torch.kernels.layers import is_untouched, runs_as_written
from gpt2ml_torch.kernels.modules import Packed, PackedEmbedding, PackedLinear
from gpt2ml_torch.kernels.ops import load_kernels, supports_layers
from gpt2ml_torch.precision import PACKABLE, Precision

_Module = TypeVar("_Module", bound=nn.Module)

_logger = logging.getLogger(__name__)


def pack_model(model: _Module, precision: Precision | str) -> _Module:
    """Replace the linear layers and the token embedding of a GPT2ML by packed ones, in place.

    With "int4" the embedding, which is the output layer too, has 8 bits. Each weight is freed as
    soon as it is packed. On `meta` the layers are only replaced, for packed tensors to be loaded
    into. Raises `ValueError` for a precision that weights can't be packed in.
    """
    if precision not in PACKABLE:
        raise ValueError(f"precision is {str(precision)!r}; expected one of {', '.join(PACKABLE)}")

    def is_large(layer: nn.Module) -> bool:
        is_embedding = layer is getattr(model, "token_embedding", None)
        return (isinstance(layer, nn.Linear) or is_embedding) and not isinstance(layer, Packed)

    for parent, name in _places(model, is_large):
        setattr(parent, name, _replacement(getattr(parent, name), Precision(precision)))
    return model


@torch.no_grad()
def fill_rows(model: nn.Module, name: str, rows: Tensor, first: int, dtype: torch.dtype) -> None:
    """Give a model that `pack_model` prepared on `meta` rows of one plain tensor of a state dict.

    A packed layer's weight is packed, `first` then being a multiple of 16; anything else is copied,
    in `dtype`.
    """
    path, leaf = name.rsplit(".", 1)
    module = model.get_submodule(path)
    if isinstance(module, Packed) and leaf == "weight":
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


def _places(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[nn.Module, str]]:
    """Where the wanted layers are, as (parent, attribute): no list holds on to the layers."""
    return [
        (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if wanted(layer)
    ]


def _replacement(layer: nn.Module, precision: Precision) -> nn.Module:
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding.pack(layer, precision.of_embedding)
    assert isinstance(layer, nn.Linear)
    return PackedLinear.pack(layer, precision)


def unpack_model(model: _Module) -> _Module:
    """Undo `pack_model` in place: plain layers again, bit for bit, unless they were rounded.

    Weights that were packed in a floating-point precision are what they were; integers become the
    numbers that they stand for. Each packed weight is freed as soon as it is unpacked. Parameters
    are new objects, so an optimizer must be made after this.
    """
    for parent, name in _places(model, lambda layer: isinstance(layer, Packed)):
        layer = getattr(parent, name)
        assert isinstance(layer, Packed)
        setattr(parent, name, layer.unpacked())
    if hasattr(model, "packed"):
        setattr(model, "packed", None)  # noqa: B010  # a GPT2ML's; a block has none
    return model


class PlainState(Mapping[str, Tensor]):
    """A packed model's state dict as it would be unpacked; each weight is made when asked for."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._tensors = model, model.state_dict()
        packed = [name for name, layer in model.named_modules() if isinstance(layer, Packed)]
        self._packed = {f"{name}.weight" for name in packed}
        for name in packed:
            self._tensors.pop(f"{name}.weight_scale", None)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._packed:
            return self._tensors[name]
        layer = self._model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, Packed)
        return layer.plain_weight()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def pack_for_decoding(model: Any) -> None:
    """Pack a plain GPT2ML in place, in its own precision, if that makes decoding faster here.

    Each weight is freed as soon as it is packed, so that there is no second copy; `unpack_model`
    restores the model bit for bit. One log line says what was done, or why it wasn't: a model in
    training, with adapters, hooks or shared weights is left alone, and so is one whose memory
    could not be freed where too little of it is left. Does nothing elsewhere than on a CPU with
    kernels.
    """
    if not _could_run_on_kernels(model) or not load_kernels():
        return
    reason = _obstacle(model)
    if reason is not None:
        _logger.info(
            "the weights stay plain, which decodes at about a third of the speed: %s",
            reason,
        )
        return
    mapped = getattr(model, "memory_mapped", False)
    for parent, name in _places(model, _is_packable):
        layer = getattr(parent, name)
        setattr(parent, name, _replacement(layer, Precision.of(model.dtype)))
        if mapped:
            packing.release_pages(layer.weight)
        del layer
    model.packed = Precision.of(model.dtype)
    _logger.info(
        "packed the weights for the CPU's kernels, in %s as they were; kernels.unpack_model undoes "
        "it, and pack=False leaves them plain",
        model.packed,
    )


def _could_run_on_kernels(model: Any) -> bool:
    plain = getattr(model, "packed", None) is None and hasattr(model, "blocks")
    return plain and supports_layers(model.position_embedding.weight, model.config.head_size)


def _obstacle(model: Any) -> str | None:
    """Why a model's weights must not be packed, or None."""
    layers = [getattr(parent, name) for parent, name in _places(model, _is_packable)]
    weights = [layer.weight for layer in layers]
    if any(weight.dtype != model.dtype for weight in weights):
        return "they have several dtypes; convert the model to one"
    if model.training or any(parameter.grad is not None for parameter in model.parameters()):
        return "it is being trained; call model.eval() and clear its gradients first"
    whole = len(layers) == 4 * len(model.blocks) + 1
    untouched = all(map(is_untouched, model.modules()))
    if not whole or not untouched or not all(runs_as_written(b, nn.Linear) for b in model.blocks):
        return "it has adapters, hooks or layers of other types; merge or remove them first"
    if len({id(weight) for weight in model.parameters()}) != sum(
        1 for _ in model.named_parameters(remove_duplicate=False)
    ):
        return "some of its weights are shared"
    kept = getattr(model, "memory_mapped", False)
    needed = sum(weight.nbytes for weight in weights) if kept else 0
    needed += max(weight.nbytes for weight in weights)
    free = packing.available_memory()
    if free is not None and free < needed:
        return (
            f"packing takes {needed / 2**30:.1f} GiB for a moment, and {free / 2**30:.1f} GiB are "
            "free; GPT2ML.from_pretrained(path, quantize=...) packs while it loads"
        )
    return None


def _is_packable(layer: nn.Module) -> bool:
    """Whether this very type of layer has a packed counterpart."""
    is_embedding = isinstance(layer, nn.Embedding) and hasattr(layer, "logits")
    return (type(layer) is nn.Linear or is_embedding) and not isinstance(layer, Packed)
