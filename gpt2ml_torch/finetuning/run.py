"""A whole fine-tuning from files to a file: what `gpt2ml finetune` calls, and programs may too."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt2ml_torch.finetuning import lora
from gpt2ml_torch.finetuning.adapters import merge_adapter
from gpt2ml_torch.finetuning.checks import check_files, check_prompts
from gpt2ml_torch.finetuning.components import (
    Data,
    load_data,
    load_model,
    make_optimizer,
    upcasts,
    weight_dtype,
)
from gpt2ml_torch.finetuning.config import FinetuneConfig
from gpt2ml_torch.finetuning.data.batches import BatchStream, evaluation_batches
from gpt2ml_torch.finetuning.data.rows import Rows
from gpt2ml_torch.finetuning.data.summary import Summary
from gpt2ml_torch.finetuning.distributed import process_count, process_rank, shard
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers import Adafactor, SlicedOptimizer, start_from
from gpt2ml_torch.finetuning.optimizers.sliced import whole
from gpt2ml_torch.finetuning.reporting import Callback, Event, TensorBoard
from gpt2ml_torch.finetuning.trainer import Sampler, Trainer, TrainResult
from gpt2ml_torch.finetuning.upcasting import cpu_lacks_bfloat16
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile import ModelFile, ModelWriter
from gpt2ml_torch.tokenizer import Tokenizer

_LENGTH_STEP = 32  # rows are cut to the longest of their batch, in steps of so many tokens

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FinetuneResult(TrainResult):
    """`TrainResult`, and what was written: nothing after a spike or an interruption."""

    model: Path | None
    adapter: Path | None


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
    events, and `should_stop` is asked after each step. In a process group every process calls this
    with the same configuration. Raises `ValueError` and `OSError` for what is wrong with settings,
    data or disk, before training where it can be known.
    """
    metadata = check_files(config)
    tokenizer = Tokenizer.from_pretrained(config.model)
    check_prompts(config, tokenizer)
    data = load_data(config, tokenizer, metadata.config, progress=on_tokenizing)
    if on_data is not None:
        on_data(data.summary)
    model, adapted = load_model(config)
    board = TensorBoard(config.run_folder / "tensorboard") if config.tensorboard else None

    def tell(event: Event) -> None:
        for listener in (board, callback):
            if listener is not None:
                listener(event)

    trainer = _trainer(config, metadata, model, tokenizer, data, tell, should_stop)
    try:
        result = trainer.run(resume=config.resume)
    finally:
        if board is not None:
            board.close()
    written: tuple[Path | None, Path | None] = None, None
    if result.reason in ("done", "early stop"):
        trainer.restore_best()
        if adapted is None:
            written = save_model(config, metadata, tokenizer, model, result), None
        else:
            written = save_adapter(config, metadata, tokenizer, adapted, result)
    return FinetuneResult(**vars(result), model=written[0], adapter=written[1])


def _trainer(
    config: FinetuneConfig,
    metadata: ModelFile,
    model: GPT2ML,
    tokenizer: Tokenizer,
    data: Data,
    callback: Callback,
    should_stop: Callable[[], bool] | None,
) -> Trainer:
    objective = Objective(
        model, chunk=config.loss_chunk, mixed=config.precision == "mixed", packed=config.pack
    )
    shard(objective, upcast=upcasts(config))
    if config.precision == "mixed" and config.device == "cpu" and cpu_lacks_bfloat16():
        logger.warning(
            "this CPU has no bfloat16 instructions: precision float32 is faster than mixed here"
        )
    size = config.batch_size // process_count()
    place: dict[str, Any] = {
        "rank": process_rank(),
        "world_size": process_count(),
        "multiple_of": _LENGTH_STEP,
    }

    def valid_batches() -> Iterator[Rows]:
        assert data.valid is not None
        return evaluation_batches(data.valid, batch_size=size, **place)

    return Trainer(
        objective,
        _optimizer(config, objective, metadata),
        BatchStream(data.train, batch_size=size, seed=config.seed, **place),
        config,
        valid_batches=valid_batches if data.valid is not None else None,
        valid_characters=data.valid.learned_characters() if data.valid is not None else None,
        folder=config.run_folder,
        data_key=_data_key(metadata, data),
        sampler=_sampler(config, model, tokenizer) if config.prompts else None,
        callback=callback,
        should_stop=should_stop,
    )


def _optimizer(
    config: FinetuneConfig, objective: Objective, metadata: ModelFile
) -> SlicedOptimizer:
    """As the settings say, going on from the statistics in the model's file if it has any."""
    optimizer = make_optimizer(objective, config)
    if isinstance(optimizer, Adafactor) and not (config.lora_rank or config.fresh_optimizer):
        slots = metadata.optimizer_state()
        if slots:
            start_from(optimizer, objective.model, slots)
            logger.info("the optimizer goes on from the statistics in %s", config.model)
    return optimizer


def _data_key(metadata: ModelFile, data: Data) -> str:
    """Names the rows and the model that is tuned, the latter by what its file says of itself."""
    model = json.dumps([metadata.config.to_dict(), metadata.source], sort_keys=True)
    digest = hashlib.blake2b(model.encode(), digest_size=16)
    digest.update(data.train.fingerprint().encode())
    return digest.hexdigest()


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
