"""The end of a run: its weights as the one file, or its adapter in peft's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt2ml_torch.finetuning import lora
from gpt2ml_torch.finetuning.adapters import merge_adapter
from gpt2ml_torch.finetuning.config import FinetuneConfig
from gpt2ml_torch.finetuning.loop import TrainResult
from gpt2ml_torch.finetuning.optimizers.sliced import whole
from gpt2ml_torch.finetuning.preparation import weight_dtype
from gpt2ml_torch.finetuning.processes import process_rank
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile import ModelFile, ModelWriter
from gpt2ml_torch.tokenizer import Tokenizer


def save_model(
    config: FinetuneConfig,
    metadata: ModelFile,
    tokenizer: Tokenizer,
    model: GPT2ML,
    result: TrainResult,
) -> Path:
    """Write the tuned model; sharded weights are put together one at a time, by all processes."""
    out, tensors = Path(config.out), model.state_dict()
    if process_rank() > 0:
        for tensor in tensors.values():
            whole(tensor)
        return out
    with ModelWriter(
        out,
        metadata.config,
        dtype=weight_dtype(config),
        vocab=metadata.vocab,
        source=_source(config, metadata, result),
        generation=_generation(config, metadata, tokenizer),
        overwrite=config.overwrite,
    ) as writer:
        for name, tensor in tensors.items():
            writer.write(name, whole(tensor))
    return out


def save_adapter(
    config: FinetuneConfig,
    metadata: ModelFile,
    tokenizer: Tokenizer,
    adapted: Any,
    result: TrainResult,
) -> tuple[Path | None, Path]:
    """Save the adapter, and if OUT is a file, merge it into the model there; gives both places."""
    out = Path(config.out)
    if out.suffix != ".safetensors":
        lora.save_adapter(adapted, out, base=config.model)
        return None, out
    folder = config.run_folder / "adapter"
    lora.save_adapter(adapted, folder, base=config.model)
    merge_adapter(
        config.model,
        folder,
        out,
        source=_source(config, metadata, result),
        generation=_generation(config, metadata, tokenizer),
        overwrite=config.overwrite,
    )
    return out, folder


def _generation(
    config: FinetuneConfig, metadata: ModelFile, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The model's defaults for generation, which stops at the end token if one was learned."""
    if config.end_token is None:
        return metadata.generation
    return {**metadata.generation, "eos_token_id": [tokenizer.token_to_id(config.end_token)]}


def _source(config: FinetuneConfig, metadata: ModelFile, result: TrainResult) -> dict[str, Any]:
    """Where the weights come from: the model's own source, and this run after those before it."""
    run: dict[str, Any] = {
        "from": Path(config.model).name,
        "data": [Path(name).name for name in config.data],
        "steps": result.best_step or result.step,
        "validation_loss": result.best_loss,
        "optimizer": config.optimizer,
        "learning_rate": config.learning_rate_used,
        "precision": config.precision,
    }
    if config.lora_rank:
        run["lora_rank"] = config.lora_rank
    source = dict(metadata.source)
    return source | {"finetuned": [*source.get("finetuned", []), run]}
