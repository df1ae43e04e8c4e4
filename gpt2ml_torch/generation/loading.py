"""Loading a model for generation in the precision that is the fastest safe one on its device."""

from __future__ import annotations

from os import PathLike

import torch

from gpt2ml_torch import kernels
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile.reader import read_metadata

AUTO = "auto"
SAFE = "int8"  # costs no measurable perplexity (benchmarks/quality.md), and half of bfloat16's time


def load_model(
    path: str | PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: str | None = AUTO,
) -> GPT2ML:
    """The model of a converted file, with what is left open chosen for speed.

    "auto" packs the large matrices as int8 on a CPU with kernels, or in `dtype` where one is asked
    for; elsewhere it leaves them as they are. A file of packed weights keeps them. Activations are
    bfloat16 by default, but for weights of another floating-point type, and where nothing is packed
    on the CPU.
    """
    if quantize == AUTO:
        # Asked here alone, since kernels may have to be built for the answer.
        fast = torch.device(device).type != "cpu" or kernels.load_kernels()
        quantize = None
        stored = read_metadata(path).quantization is not None
        if fast and not stored and torch.device(device).type == "cpu":
            wanted = SAFE if dtype is None else str(dtype).removeprefix("torch.")
            quantize = wanted if wanted in kernels.PRECISIONS else None
        if fast and dtype is None:
            dtype = torch.bfloat16
    elif quantize is not None and dtype is None:
        kept = getattr(torch, quantize, None)  # an unknown name is reported below
        floating = isinstance(kept, torch.dtype) and kept.is_floating_point
        dtype = kept if floating else torch.bfloat16
    return GPT2ML.from_pretrained(path, device=device, dtype=dtype, quantize=quantize)
