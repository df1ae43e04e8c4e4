"""Peak memory and speed of fine-tuning, each setting in a process of its own, on random weights.

    scripts/bench finetune bfloat16 float32 lora lora-int8 transformers

Memory is the peak resident set (VmHWM) above that of a process which only imports torch. Speed is
of the last step;
the matmul rate is that of one layer's products, measured in the same process.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

SETTINGS = ("bfloat16", "float32", "lora", "lora-int8", "transformers")


def main() -> None:
    """Measure each setting and print one JSON object a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="+", choices=(*SETTINGS, "import"))
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments.settings[0], arguments)))
        return
    sizes = [f"--layers={arguments.layers}", f"--tokens={arguments.tokens}"]
    sizes.append(f"--steps={arguments.steps}")
    baseline = 0.0
    for setting in ("import", *arguments.settings):
        command = [
            sys.executable,
            "-m",
            "scripts.benchmarks.finetuning",
            setting,
            "--alone",
            *sizes,
        ]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        baseline = baseline or result["peak_gib"]
        result["above_import_gib"] = round(result["peak_gib"] - baseline, 3)
        print(json.dumps(result), flush=True)


def measure(setting: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Run a few steps of one setting in this process."""
    result: dict[str, object] = {"setting": setting}
    if setting == "import":
        import torch  # noqa: F401
    else:
        result |= _train(setting, arguments)
    return result | {"peak_gib": round(peak_gib(), 3)}


def peak_gib() -> float:
    """The largest resident set this process has had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def _train(setting: str, arguments: argparse.Namespace) -> dict[str, object]:
    import torch

    from gpt2ml_torch.finetuning.memory import tune_allocator

    tune_allocator()
    torch.manual_seed(0)
    model, step = (
        _transformers(arguments) if setting == "transformers" else _ours(setting, arguments)
    )
    ids = torch.randint(1, 21128, (1, arguments.tokens + 1))
    losses, seconds = [], 0.0
    for _ in range(arguments.steps):
        start = time.perf_counter()
        losses.append(round(step(ids), 4))
        seconds = time.perf_counter() - start
    weights = sum(p.numel() * p.itemsize for p in (*model.parameters(), *model.buffers()))
    del model
    gc.collect()
    return {
        "losses": losses,
        "weights_gib": round(weights / 2**30, 3),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(arguments.tokens / seconds, 2),
    }


def _random_model(setting: str, layers: int):
    import dataclasses

    import torch

    from gpt2ml_torch import GPT2ML, GPT2MLConfig

    config = dataclasses.replace(GPT2MLConfig.mega(), num_hidden_layers=layers)
    dtype = torch.float32 if setting == "float32" else torch.bfloat16
    with torch.device("meta"):
        model = GPT2ML(config)
    model = model.to(dtype).to_empty(device="cpu")
    _fill(model)
    model.gradient_checkpointing = True
    return model.train()


def _fill(model):
    """Random weights, one block of numbers over and over: drawing a billion takes minutes."""
    import torch

    block = torch.empty(1 << 20).normal_(std=0.0141421)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0 if "norm.weight" in name or "ln" in name else 0.0)
                continue
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), len(block)):
                part = flat[start : start + len(block)]
                part.copy_(block[: len(part)])


def _ours(setting: str, arguments: argparse.Namespace):
    import torch

    from gpt2ml_torch.finetuning import lora
    from gpt2ml_torch.finetuning.data import Rows
    from gpt2ml_torch.finetuning.objective import Objective
    from gpt2ml_torch.finetuning.optimizers import (
        Adafactor,
        AdamW,
        StepInBackward,
        parameter_groups,
    )

    model = _random_model(setting, arguments.layers)
    if setting.startswith("lora"):
        if setting == "lora-int8":
            lora.quantize_linears(model)
        lora.add_adapter(model, rank=16)
    groups = parameter_groups(model)
    optimizer = AdamW(groups) if setting.startswith("lora") else Adafactor(groups, lr=1e-5)
    in_backward = StepInBackward(optimizer)
    objective = Objective(model)

    def step(ids: torch.Tensor) -> float:
        places = torch.arange(arguments.tokens)[None]
        rows = Rows(ids[:, :-1], ids[:, 1:], places, torch.ones_like(places))
        in_backward.reset()
        loss = objective(rows) / arguments.tokens
        loss.backward()
        return float(loss)

    return model, step


def _transformers(arguments: argparse.Namespace):
    """GPT-2 of the same size with the same optimizer, for comparison."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from gpt2ml_torch.finetuning.optimizers import Adafactor, StepInBackward, parameter_groups

    config = GPT2Config(
        vocab_size=21130, n_positions=1024, n_embd=1536, n_layer=arguments.layers, n_head=24
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(config)
    model = cast(Any, model).to(torch.bfloat16).to_empty(device="cpu")
    _fill(model)
    model.tie_weights()
    model.gradient_checkpointing_enable()
    model.train()
    in_backward = StepInBackward(Adafactor(parameter_groups(model), lr=1e-5))

    def step(ids: torch.Tensor) -> float:
        in_backward.reset()
        loss = model(input_ids=ids[:, :-1], labels=ids[:, :-1]).loss
        loss.backward()
        return float(loss)

    return model, step


if __name__ == "__main__":
    main()
