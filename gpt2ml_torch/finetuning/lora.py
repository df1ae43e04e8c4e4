"""LoRA through `peft` on the plain linear layers, also over a base whose matrices are int8."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2ml_torch import checkpoint
from gpt2ml_torch.finetuning.config import LORA_TARGETS
from gpt2ml_torch.model import GPT2ML


def add_adapter(
    model: GPT2ML,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = LORA_TARGETS,
    dropout: float = 0.0,
) -> Any:
    """Freeze the model, put a float32 adapter on its linear layers, and return the `peft.PeftModel`
    around it.

    The model itself is changed in place and can go on being called; the PeftModel saves the
    adapter. `alpha` is twice the
    rank by default. Raises `ValueError` without peft (the extra `finetune`).
    """
    peft = _peft()
    settings = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha if alpha is not None else 2 * rank,
        target_modules=[f"{target}" for target in targets],
        lora_dropout=dropout,
        bias="none",
    )
    return peft.get_peft_model(model, settings)


def save_adapter(adapted: Any, folder: str | os.PathLike[str], *, base: str) -> None:
    """Save the adapter as peft does; `base` is the model file that it belongs to."""
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(folder), save_embedding_layers=False)


def merge_adapter(
    model_path: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Write the model with an adapter added to its weights, in the dtype of its file.

    Raises `OSError` and `ValueError` for files that are missing or don't belong together.
    """
    peft = _peft()
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise OSError(
            f"{adapter} is no adapter: expected a folder with adapter_config.json and "
            "adapter_model.safetensors"
        )
    metadata = checkpoint.read_metadata(model_path)
    model = GPT2ML.from_pretrained(model_path)
    try:
        merged = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the adapter {adapter} does not fit {model_path}: {reason}") from error
    checkpoint.save(
        out,
        merged.state_dict(),
        metadata.config,
        vocab=metadata.vocab,
        source={**metadata.source, "merged_adapter": str(Path(adapter).name)},
        generation=metadata.generation,
        overwrite=overwrite,
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ValueError(
            'LoRA needs the package peft: pip install "gpt2ml-torch[finetune]"'
        ) from None
    return peft


class Int8Linear(nn.Linear):
    """A frozen linear layer whose weight is int8 with a scale for each output; gradients pass
    through it.

    Products are computed in the dtype of the input: whole numbers up to 127 are exact in bfloat16
    and float16.
    """

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scale = weight.abs().amax(1).float().div_(127).clamp_(min=1e-12)  # (out,)
        levels = (weight.float() / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(levels, requires_grad=False)
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        y = _Int8Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class _Int8Product(torch.autograd.Function):
    """x @ (levels * scale).T, which keeps nothing of the size of the weight in floating point."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(levels, scale)
        return F.linear(x, levels.to(x.dtype)) * scale.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        levels, scale = ctx.saved_tensors
        return (gradient * scale.to(gradient.dtype)) @ levels.to(gradient.dtype), None, None


def quantize_linears(model: GPT2ML) -> None:
    """Replace the linear layers of all blocks by int8 ones, one at a time."""
    for block in model.blocks:
        for name, module in list(block.named_modules()):
            if type(module) is nn.Linear:
                block.set_submodule(name, Int8Linear(module))
