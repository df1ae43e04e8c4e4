"""Checks of a run before anything is loaded or written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.finetuning.checkpoints import CheckpointFolder
from gpt2ml_torch.finetuning.config import FinetuneConfig
from gpt2ml_torch.finetuning.distributed import process_count
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.options import OptionError, OptionFileExistsError
from gpt2ml_torch.tokenizer import Tokenizer


def check_files(config: FinetuneConfig, file: ModelFile) -> None:
    """Check the model file and the output path; raises what `finetune` would raise."""
    check_model(config, file)
    _check_device(config)
    if file.vocab is None:
        raise ValueError(
            f"{config.model} holds no vocabulary, so text can't be tokenised; convert it again "
            "together with its vocabulary"
        )
    _check_out(config)


def check_model(config: FinetuneConfig, file: ModelFile) -> None:
    """Raise `ValueError` if the model can't be trained with these settings."""
    if file.packed is not None:
        raise OptionError(
            "{} holds {} weights, which can't be trained; take the file it was made from "
            "({lora_rank=16} with {lora_base=int8} needs as little memory)",
            config.model,
            file.packed,
        )
    check_sizes(config, file.config)


def check_sizes(config: FinetuneConfig, sizes: GPT2MLConfig) -> None:
    """Raise `ValueError` for settings that do not suit the model's size or the processes."""
    if config.length is not None and config.length > sizes.max_position_embeddings:
        raise OptionError(
            "{length} is {}; the model has {} positions",
            config.length,
            sizes.max_position_embeddings,
        )
    if config.lora_rank > sizes.hidden_size:
        raise OptionError(
            "{lora_rank} is {}; the model's matrices have rank {}, and an adapter is meant to have "
            "less: try 16",
            config.lora_rank,
            sizes.hidden_size,
        )
    config.trains_layer(0, sizes.num_hidden_layers)
    _check_processes(config)


def check_prompts(config: FinetuneConfig, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` for a prompt that can't be continued."""
    for prompt in config.prompts:
        if not tokenizer.encode(prompt):
            raise OptionError(
                "{prompts} holds {!r}, which has no token; give at least one character", prompt
            )


def check_run_folder(config: FinetuneConfig) -> None:
    """Raise `FileExistsError` if the folder holds a run that is neither resumed nor replaced."""
    folder = config.run_folder
    steps = CheckpointFolder(folder / "checkpoints").steps()
    if steps and not (config.resume or config.overwrite):
        raise OptionFileExistsError(
            "{} holds a run of {} steps; continue it ({resume=True}), or start over "
            "({overwrite=True})",
            str(folder),
            steps[-1],
        )


def _check_device(config: FinetuneConfig) -> None:
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            "{device} is {}; PyTorch finds no CUDA device here, use cpu", config.device
        )


def _check_processes(config: FinetuneConfig) -> None:
    count = process_count()
    if count == 1:
        return
    if config.batch_size % count:
        raise OptionError(
            "{batch_size} is {}, not divisible by {} processes, which divide the rows; use {}",
            config.batch_size,
            count,
            -(-config.batch_size // count) * count,
        )
    for setting, meant in (
        (config.lora_rank > 0, "LoRA"),
        (config.optimizer == "adamw8bit", "8-bit AdamW"),
        (bool(config.prompts), "sampling from prompts"),
    ):
        if setting:
            raise ValueError(f"{meant} works with one process; found {count}")


def _check_out(config: FinetuneConfig) -> None:
    out = Path(config.out)
    if out.resolve() == Path(config.model).resolve():
        raise OptionError("{out} is the model itself, {}; give another name", str(out))
    if not out.parent.is_dir():
        raise OSError(
            errno.ENOENT, f"can't write {out}: there is no folder {out.parent}; create it first"
        )
    if out.exists() and not config.overwrite:
        raise OptionFileExistsError(
            "{} exists already; give another name, or {overwrite=True}", str(out)
        )
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(errno.EACCES, f"can't write to {out.parent}: permission denied")
