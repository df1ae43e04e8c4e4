"""What is wrong with a fine-tuning, found out before anything is loaded or written."""

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
from gpt2ml_torch.tokenizer import Tokenizer


def check_files(config: FinetuneConfig) -> ModelFile:
    """Look at the model file and at the places to write to; raises what `finetune` would."""
    file = ModelFile.open(config.model)
    check_model(config, file)
    _check_device(config)
    if file.vocab is None:
        raise ValueError(
            f"{config.model} holds no vocabulary, so text can't be tokenised; convert it again "
            "with --vocab"
        )
    _check_out(config)
    _check_run_folder(config)
    return file


def check_model(config: FinetuneConfig, file: ModelFile) -> None:
    """Raise `ValueError` for a model that can't be trained, or not with these settings."""
    if file.packed is not None:
        raise ValueError(
            f"{config.model} holds {file.packed} weights, which can't be trained; take "
            "the file it was made from (--lora-rank with --lora-base int8 needs as little memory)"
        )
    check_sizes(config, file.config)


def check_sizes(config: FinetuneConfig, sizes: GPT2MLConfig) -> None:
    """Raise `ValueError` for settings that this size of model or number of processes can't have."""
    if config.length is not None and config.length > sizes.max_position_embeddings:
        raise ValueError(
            f"length is {config.length}; the model has {sizes.max_position_embeddings} positions"
        )
    config.trains_layer(0, sizes.num_hidden_layers)
    _check_processes(config)


def check_prompts(config: FinetuneConfig, tokenizer: Tokenizer) -> None:
    """Raise `ValueError` for a prompt that can't be continued, before it would end the run."""
    for prompt in config.prompts:
        if not tokenizer.encode(prompt):
            raise ValueError(f"the prompt {prompt!r} holds no token; give at least one character")


def _check_device(config: FinetuneConfig) -> None:
    if torch.device(config.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {config.device}; PyTorch finds no CUDA device here, use cpu")


def _check_processes(config: FinetuneConfig) -> None:
    count = process_count()
    if count == 1:
        return
    if config.batch_size % count:
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible by {count} processes, which divide "
            f"the rows; use {-(-config.batch_size // count) * count}"
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
        raise ValueError(f"out is the model itself, {out}; give another name")
    if not out.parent.is_dir():
        raise OSError(
            errno.ENOENT, f"can't write {out}: there is no folder {out.parent}; create it first"
        )
    if out.exists() and not config.overwrite:
        raise FileExistsError(
            errno.EEXIST, f"{out} exists already; give another name, or overwrite (--force)"
        )
    if not os.access(out.parent, os.W_OK):
        raise PermissionError(errno.EACCES, f"can't write to {out.parent}: permission denied")


def _check_run_folder(config: FinetuneConfig) -> None:
    folder = config.run_folder
    steps = CheckpointFolder(folder / "checkpoints").steps()
    if config.resume and not folder.is_dir():
        raise ValueError(f"nothing to resume: there is no {folder}; start without --resume")
    if steps and not (config.resume or config.overwrite):
        raise FileExistsError(
            errno.EEXIST,
            f"{folder} holds a run of {steps[-1]} steps; go on with it (--resume), or start over "
            "(--force)",
        )
