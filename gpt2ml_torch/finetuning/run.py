"""A whole fine-tuning from files to a file: what `gpt2ml finetune` calls, and programs may call as
well.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpt2ml_torch import checkpoint
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.finetuning import lora
from gpt2ml_torch.finetuning.checkpoints import CheckpointFolder, load_tensors_into
from gpt2ml_torch.finetuning.config import FinetuneConfig, TrainConfig
from gpt2ml_torch.finetuning.data import (
    BatchStream,
    Corpus,
    RowDataset,
    Rows,
    Summary,
    evaluation_batches,
    summarize,
    tokenize_files,
)
from gpt2ml_torch.finetuning.loop import Sampler, Trainer, TrainResult
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers import (
    Adafactor,
    AdamW,
    SlicedOptimizer,
    parameter_groups,
)
from gpt2ml_torch.finetuning.reporting import Callback, TensorBoard
from gpt2ml_torch.finetuning.sharding import process_count, process_rank, shard
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.tokenizer import Tokenizer

# Rows are cut to the longest of their batch, in steps of this many tokens.
_LENGTH_STEP = 32


@dataclasses.dataclass(frozen=True)
class FinetuneResult(TrainResult):
    """`TrainResult`, and the files that were written: none of them after a spike or an
    interruption.
    """

    model: Path | None
    adapter: Path | None


@dataclasses.dataclass(frozen=True)
class Data:
    """Rows to train on and to validate with, and what is to be known of them."""

    train: RowDataset
    valid: RowDataset | None
    summary: Summary


def finetune(
    config: FinetuneConfig,
    *,
    callback: Callback | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_data: Callable[[Summary], None] | None = None,
    on_tokenizing: Callable[[str, int, int], None] | None = None,
) -> FinetuneResult:
    """Fine-tune a model on files and write the result.

    `on_data` is told what is in the files before anything is trained, `callback` gets the loop's
    events. In a process group every
    process calls this with the same configuration. Raises `ValueError` and `OSError` for what is
    wrong with
    settings, data or disk, before training where it can be known.
    """
    metadata = check_files(config)
    tokenizer = Tokenizer.from_pretrained(config.model)
    data = load_data(config, tokenizer, metadata.config, progress=on_tokenizing)
    if on_data is not None:
        on_data(data.summary)
    model, adapted = load_model(config)
    result = _train(config, model, adapted, tokenizer, data, callback, should_stop)
    model_file = adapter = None
    if result.reason in ("done", "early stop") and process_rank() == 0:
        model_file, adapter = _save(config, metadata, tokenizer, model, adapted, result)
    fields: dict[str, Any] = {
        field.name: getattr(result, field.name) for field in dataclasses.fields(TrainResult)
    }
    return FinetuneResult(**fields, model=model_file, adapter=adapter)


def check_files(config: FinetuneConfig) -> checkpoint.CheckpointMetadata:
    """Look at the model file and at the places to write to; raises what `finetune` would."""
    metadata = checkpoint.read_metadata(config.model)
    check_model(config, metadata.config)
    if metadata.vocab is None:
        raise ValueError(
            f"{config.model} holds no vocabulary, so text can't be tokenised; convert it "
            "again with --vocab"
        )
    out, folder = Path(config.out), config.run_folder
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
    steps = CheckpointFolder(folder / "checkpoints").steps()
    if config.resume and not steps:
        raise ValueError(f"nothing to resume: {folder / 'checkpoints'} holds no checkpoint")
    if steps and not (config.resume or config.overwrite):
        raise FileExistsError(
            errno.EEXIST,
            f"{folder} holds a run of {steps[-1]} steps; go on with it (--resume), or "
            "start over (--force)",
        )
    return metadata


def check_model(config: FinetuneConfig, sizes: GPT2MLConfig) -> None:
    """Raise `ValueError` for settings that this size of model, or this number of processes, can't
    have.
    """
    if config.length is not None and config.length > sizes.max_position_embeddings:
        raise ValueError(
            f"length is {config.length}; the model has {sizes.max_position_embeddings} positions"
        )
    config.trains_layer(0, sizes.num_hidden_layers)
    processes = process_count()
    if processes > 1:
        if config.batch_size % processes:
            raise ValueError(
                f"batch_size {config.batch_size} is not divisible by {processes} "
                "processes; give each as many rows"
            )
        for setting, meant in (
            (config.lora_rank > 0, "LoRA"),
            (config.optimizer == "adamw8bit", "8-bit AdamW"),
            (bool(config.prompts), "sampling from prompts"),
        ):
            if setting:
                raise ValueError(f"{meant} works with one process; found {processes}")
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"device is {config.device}; PyTorch finds no CUDA device here, use cpu")


def load_data(
    config: FinetuneConfig,
    tokenizer: Tokenizer,
    sizes: GPT2MLConfig,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Data:
    """Tokenise the files (or find them tokenised) and cut them into rows."""

    def read(files: Sequence[str]) -> Corpus:
        return tokenize_files(
            files,
            tokenizer,
            separator=config.separator,  # type: ignore[arg-type]
            end_token=config.end_token,
            cache_dir=config.cache,
            progress=progress,
        )

    def cut(corpus: Corpus, documents: Any) -> RowDataset:
        return RowDataset(
            corpus,
            documents=documents,
            length=config.length or sizes.max_position_embeddings,
            overlap=config.overlap,
            pack=config.pack,
            min_tokens=config.min_tokens,
        )

    corpus = read(config.data)
    valid: RowDataset | None = None
    if config.valid:
        train, held_out = cut(corpus, None), read(config.valid)
        valid = cut(held_out, range(min(len(held_out), config.valid_limit)))
    else:
        chosen, rest = corpus.split(config.valid_share, seed=config.seed)
        train = cut(corpus, chosen)
        if len(rest):
            valid = cut(corpus, rest[: config.valid_limit])
    return Data(train, valid, summarize(train, tokenizer))


def load_model(config: FinetuneConfig) -> tuple[GPT2ML, Any]:
    """The model, ready to train, and the `peft.PeftModel` around it, or None."""
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    torch.manual_seed(config.seed)  # an adapter begins with random weights
    model = GPT2ML.from_pretrained(config.model, device=config.device, dtype=dtype)
    return model, prepare_model(model, config)


def prepare_model(model: GPT2ML, config: TrainConfig) -> Any:
    """Freeze, quantise, adapt and compile as the settings say; returns the `peft.PeftModel`, or
    None.
    """
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    adapted = None
    if config.lora_rank:
        if config.lora_base == "int8":
            lora.quantize_linears(model)
        adapted = lora.add_adapter(
            model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            targets=config.lora_targets,
            dropout=config.lora_dropout,
        )
    for layer, block in enumerate(model.blocks):
        if not config.trains_layer(layer, len(model.blocks)):
            block.requires_grad_(False)
    if config.freeze_embeddings:
        for module in (model.token_embedding, model.position_embedding, model.embedding_norm):
            module.requires_grad_(False)
    pays = model.device.type == "cuda"
    if config.compile if config.compile is not None else pays:
        for block in model.blocks:
            block.compile()
    return adapted


def make_optimizer(objective: Objective, config: TrainConfig) -> SlicedOptimizer:
    """The optimizer of the settings over the trainable parameters, with their share of the learning
    rate.
    """
    layers = len(objective.model.blocks)

    def scale(name: str) -> float:
        layer = int(name.split("blocks.")[1].split(".")[0]) if "blocks." in name else -1
        return config.layer_decay ** (layers - 1 - layer)

    groups = parameter_groups(objective, weight_decay=config.weight_decay, scale=scale)
    common: dict[str, Any] = {
        "lr": config.learning_rate_used,
        "stochastic_rounding": config.stochastic_rounding,
        "seed": config.seed + process_rank(),
    }
    if config.optimizer == "adafactor":
        return Adafactor(groups, **common)
    return AdamW(groups, eight_bit=config.optimizer == "adamw8bit", **common)


def _train(
    config: FinetuneConfig,
    model: GPT2ML,
    adapted: Any,
    tokenizer: Tokenizer,
    data: Data,
    callback: Callback | None,
    should_stop: Callable[[], bool] | None,
) -> TrainResult:
    objective = Objective(
        model, chunk=config.loss_chunk, mixed=config.precision == "mixed", packed=config.pack
    )
    shard(objective)
    size = config.batch_size // process_count()
    place: dict[str, Any] = {
        "rank": process_rank(),
        "world_size": process_count(),
        "multiple_of": _LENGTH_STEP,
    }
    stream = BatchStream(data.train, batch_size=size, seed=config.seed, **place)

    def valid_batches() -> Iterator[Rows]:
        assert data.valid is not None
        return evaluation_batches(data.valid, batch_size=size, **place)

    board = TensorBoard(config.run_folder / "tensorboard") if config.tensorboard else None

    def tell(event: Any) -> None:
        for listener in (board, callback):
            if listener is not None:
                listener(event)

    trainer = Trainer(
        objective,
        make_optimizer(objective, config),
        stream,
        config,
        valid_batches=valid_batches if data.valid is not None else None,
        valid_characters=_characters(data.valid),
        folder=config.run_folder,
        data_key=data.train.fingerprint(),
        sampler=_sampler(config, model, tokenizer) if config.prompts else None,
        callback=tell,
        should_stop=should_stop,
    )
    try:
        return trainer.run(resume=config.resume)
    finally:
        if board is not None:
            board.close()


def _characters(rows: RowDataset | None) -> int | None:
    return rows.corpus.characters(rows.documents) if rows is not None else None


def _sampler(config: FinetuneConfig, model: GPT2ML, tokenizer: Tokenizer) -> Sampler:
    """Continuations of prompts by the model as it is; the same random numbers each time."""
    from gpt2ml_torch.generation import Generator

    def sample(prompts: Sequence[str]) -> list[str]:
        generator = Generator(model, tokenizer, compile=False)
        return list(
            generator.generate(
                list(prompts),
                return_full_text=False,
                max_new_tokens=config.sample_tokens,
                top_k=5,
                seed=config.seed,
            )
        )

    return sample


def _save(
    config: FinetuneConfig,
    metadata: checkpoint.CheckpointMetadata,
    tokenizer: Tokenizer,
    model: GPT2ML,
    adapted: Any,
    result: TrainResult,
) -> tuple[Path | None, Path | None]:
    """Write the result; gives the model file and the adapter's folder, whichever there are."""
    _restore_best(config, model, result)
    out = Path(config.out)
    if adapted is not None:
        merge = out.suffix == ".safetensors"
        folder = config.run_folder / "adapter" if merge else out
        lora.save_adapter(adapted, folder, base=config.model)
        if merge:
            lora.merge_adapter(config.model, folder, out, overwrite=config.overwrite)
        return (out if merge else None), folder
    generation = dict(metadata.generation)
    if config.end_token is not None:
        generation["eos_token_id"] = [tokenizer.token_to_id(config.end_token)]
    source = dict(metadata.source)
    source["finetuned"] = [*source.get("finetuned", []), _provenance(config, result)]
    checkpoint.save(
        out,
        model.state_dict(),
        metadata.config,
        vocab=metadata.vocab,
        source=source,
        generation=generation,
        overwrite=config.overwrite,
    )
    return out, None


def _restore_best(config: FinetuneConfig, model: GPT2ML, result: TrainResult) -> None:
    """Take the weights with the lowest validation loss, where they are not those of the end."""
    if result.best_step in (None, 0, result.step):
        return
    best = CheckpointFolder(config.run_folder / "checkpoints").at(result.best_step or 0)
    tensors = {
        f"model.model.{name}": parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    load_tensors_into(best, tensors)


def _provenance(config: FinetuneConfig, result: TrainResult) -> dict[str, Any]:
    return {
        "from": Path(config.model).name,
        "data": [Path(name).name for name in config.data],
        "steps": result.best_step or result.step,
        "validation_loss": result.best_loss,
        "optimizer": config.optimizer,
        "learning_rate": config.learning_rate_used,
        "precision": config.precision,
    }
