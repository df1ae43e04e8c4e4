"""Build what a run needs from its settings: the data, the model and the optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gpt2ml_torch import kernels
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.finetuning.config import FinetuneConfig
from gpt2ml_torch.finetuning.data.cache import tokenize_files
from gpt2ml_torch.finetuning.data.corpus import Corpus
from gpt2ml_torch.finetuning.data.rows import RowDataset
from gpt2ml_torch.finetuning.data.summary import Summary, summarize
from gpt2ml_torch.finetuning.distributed import process_count, process_rank
from gpt2ml_torch.finetuning.lora import add_adapter
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers import Adafactor, AdamW, SlicedOptimizer, parameter_groups
from gpt2ml_torch.finetuning.train_config import TrainConfig
from gpt2ml_torch.finetuning.upcasting import cpu_lacks_bfloat16, upcast_products
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.pretrained import pack_from
from gpt2ml_torch.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """The rows for training and validation, and statistics about them."""

    train: RowDataset
    valid: RowDataset | None
    summary: Summary


def load_data(
    config: FinetuneConfig,
    tokenizer: Tokenizer,
    sizes: GPT2MLConfig,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> TrainingData:
    """Tokenise the files, or read them from the cache, and cut the documents into rows."""

    def read(files: Sequence[str]) -> Corpus:
        return tokenize_files(
            files,
            tokenizer,
            separator=config.separator,  # type: ignore[arg-type]  # checked by it
            fields=config.record_fields,
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
    return TrainingData(train, valid, summarize(train, tokenizer))


def load_model(config: FinetuneConfig, file: ModelFile) -> tuple[GPT2ML, Any]:
    """Load a model for training, with the `peft.PeftModel` around it if it has an adapter."""
    dtype = weight_dtype(config)
    if config.lora_base == "weights":
        model = GPT2ML.from_file(file, device=config.device, dtype=dtype)
    else:
        model = _load_packed(config, file, dtype)
    torch.manual_seed(config.seed)  # an adapter is initialised randomly
    return model, prepare_model(model, config)


def weight_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype in which the weights are stored and trained."""
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def _load_packed(config: FinetuneConfig, file: ModelFile, dtype: torch.dtype) -> GPT2ML:
    """Load a model and pack the matrices of its blocks one at a time, as they are read."""
    with torch.device("meta"):
        model = GPT2ML(file.config).to(dtype)
    pack_blocks(model, config.lora_base)
    pack_from(file, model, dtype)
    return model.to(config.device)


def pack_blocks(model: GPT2ML, quantize: str) -> None:
    """Pack the linear layers of all blocks as "int8" or "int4"; the embeddings stay plain."""
    for block in model.blocks:
        kernels.pack_model(block, quantize)


def prepare_model(model: GPT2ML, config: FinetuneConfig) -> Any:
    """Add the adapter, freeze, upcast and compile in place; return the `peft.PeftModel` or None."""
    model.gradient_checkpointing = config.gradient_checkpointing
    if config.dropout is not None:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
    adapted = None
    if config.lora_rank:
        adapted = add_adapter(
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
        for part in (model.token_embedding, model.position_embedding, model.embedding_norm):
            part.requires_grad_(False)
    if upcasts(config) and process_count() == 1:  # with several, `shard` does it
        upcast_products(model)
    pays = model.device.type == "cuda"
    if config.compile if config.compile is not None else pays:
        for block in model.blocks:
            block.compile()
    return adapted


def upcasts(config: FinetuneConfig) -> bool:
    """Whether bfloat16 weights are multiplied in float32."""
    if config.upcast is None:
        return config.precision == "bfloat16" and config.device == "cpu" and cpu_lacks_bfloat16()
    return config.upcast


def make_optimizer(objective: Objective, config: TrainConfig) -> SlicedOptimizer:
    """The optimizer of the trainable parameters, with the learning rate scaled for each layer."""
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
