"""Run one setting of fine-tuning in a process of its own.

`python -m scripts.benchmarks.tuning_contestant SETTING MODEL LAYERS TOKENS` takes a step for each
line on stdin and answers in JSON. Without arguments it only imports torch and reports the memory
that this takes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

SETTINGS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float32": {"precision": "float32"},
    "lora": {"lora_rank": 16, "optimizer": "adamw"},
    "lora-int8": {"lora_rank": 16, "optimizer": "adamw", "lora_base": "int8"},
    "lora-int4": {"lora_rank": 16, "optimizer": "adamw", "lora_base": "int4"},
}
Step = Callable[[torch.Tensor], float]


def settings_of(setting: str, *, model: str = "", length: int = 1024) -> Any:
    """The setting as a configuration of `gpt2ml finetune`."""
    from gpt2ml_torch.finetuning import FinetuneConfig

    return FinetuneConfig(
        model=model, data=("-",), out="out.safetensors", length=length, **SETTINGS[setting]
    )


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what libraries print out of the answers

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    if len(sys.argv) == 1:
        return answer(peak_gib=peak_gib())
    setting, model, layers, tokens = sys.argv[1:]
    from gpt2ml_torch.finetuning.memory import tune_allocator

    tune_allocator()
    torch.manual_seed(0)
    weights, flops, step = (
        _transformers(int(layers), int(tokens))
        if setting == "transformers"
        else _ours(setting, model, int(tokens))
    )
    answer(weights_gib=round(weights / 2**30, 3), flops=flops, tokens=int(tokens))
    ids = torch.randint(1, 21128, (1, int(tokens) + 1))
    for _ in sys.stdin:
        started = time.perf_counter()
        loss = step(ids)
        seconds = time.perf_counter() - started
        answer(seconds=seconds, loss=loss, peak_gib=peak_gib())


def peak_gib() -> float:
    """The peak resident set of this process, in GiB."""
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0]) / 2**20


def _bytes(module: torch.nn.Module) -> int:
    return sum(t.numel() * t.itemsize for t in (*module.parameters(), *module.buffers()))


def _flops(layers: int, tokens: int, *, adapter: bool) -> int:
    """Operations in products with the weights: forward, recomputation and backward."""
    width, inner, rows = 1536, 6144, 21130
    matrices = layers * (4 * width * width + 2 * width * inner) + width * rows
    passes = 3 if adapter else 4  # frozen weights have no gradient
    return passes * 2 * tokens * matrices


def _ours(setting: str, path: str, tokens: int) -> tuple[int, int, Step]:
    from gpt2ml_torch.finetuning import Objective, next_token_rows
    from gpt2ml_torch.finetuning.components import load_model, make_optimizer
    from gpt2ml_torch.finetuning.step import Stepper
    from gpt2ml_torch.modelfile import ModelFile

    config = settings_of(setting, model=path, length=tokens)
    with ModelFile.open(path) as file:
        model, _ = load_model(config, file)
    objective = Objective(model, chunk=config.loss_chunk)
    stepper = Stepper(objective, make_optimizer(objective, config), config)

    def step(ids: torch.Tensor) -> float:
        return stepper.step([next_token_rows(ids)], config.learning_rate_used).loss

    return _bytes(model), _flops(len(model.blocks), tokens, adapter=config.lora_rank > 0), step


def _transformers(layers: int, tokens: int) -> tuple[int, int, Step]:
    """GPT-2 of the same size in bfloat16, with our optimizer stepping in the backward pass."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from gpt2ml_torch.finetuning import Adafactor, StepInBackward, parameter_groups

    config = GPT2Config(vocab_size=21130, n_positions=1024, n_embd=1536, n_layer=layers, n_head=24)
    with torch.device("meta"):
        skeleton: Any = GPT2LMHeadModel(config)
    model = skeleton.to(torch.bfloat16).to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.constant_(parameter, float("ln" in name and "weight" in name))
    model.tie_weights()
    model.gradient_checkpointing_enable()
    model.train()
    in_backward = StepInBackward(Adafactor(parameter_groups(model), lr=1e-5))

    def step(ids: torch.Tensor) -> float:
        in_backward.reset()
        loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss
        loss.backward()
        return float(loss.detach())

    return _bytes(model), _flops(layers, tokens, adapter=False), step


if __name__ == "__main__":
    main()
