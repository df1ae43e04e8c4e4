"""A whole fine-tuning run, from files to a file; `gpt2ml finetune` calls it too."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gpt2ml_torch import disk
from gpt2ml_torch.finetuning import lora
from gpt2ml_torch.finetuning.adapters import merge_adapter
from gpt2ml_torch.finetuning.checks import check_files, check_prompts, check_run_folder
from gpt2ml_torch.finetuning.components import (
    TrainingData,
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
from gpt2ml_torch.finetuning.events import Callback, Event
from gpt2ml_torch.finetuning.memory import SHORTEST, check_memory
from gpt2ml_torch.finetuning.objective import Objective
from gpt2ml_torch.finetuning.optimizers import Adafactor, SlicedOptimizer, start_from
from gpt2ml_torch.finetuning.optimizers.sliced import whole
from gpt2ml_torch.finetuning.reporting import TensorBoard
from gpt2ml_torch.finetuning.trainer import Sampler, Trainer, TrainResult
from gpt2ml_torch.finetuning.upcasting import cpu_lacks_bfloat16
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile import ModelFile, ModelWriter
from gpt2ml_torch.options import OptionError
from gpt2ml_torch.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FinetuneResult(TrainResult):
    """A `TrainResult` and the paths written; a run that stopped early writes no model."""

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

    `on_data` gets a summary of the data before anything is trained, `callback` the events of the
    run, and `should_stop` is called after each step. In a process group every process calls this
    with the same configuration. Raises `ValueError` and `OSError` for faults of settings, data or
    disk, before training if possible, and if another process is training in the folder.
    """
    with ModelFile.open(config.model) as file:
        check_files(config, file)
        check_memory(config, file.config)
        with _alone_in(config.run_folder, resume=config.resume):
            check_run_folder(config)
            return _finetune(
                _Job(config, file, file.tokenizer(), callback, should_stop), on_data, on_tokenizing
            )


@dataclasses.dataclass(frozen=True)
class _Job:
    """The objects that the parts of a run share."""

    config: FinetuneConfig
    file: ModelFile
    tokenizer: Tokenizer
    callback: Callback | None
    should_stop: Callable[[], bool] | None


@contextlib.contextmanager
def _alone_in(folder: Path, *, resume: bool) -> Iterator[None]:
    """Lock a run's folder; it is created if missing, and removed afterwards if it is empty."""
    if process_rank() > 0:
        yield
        return
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        raise OptionError(
            "nothing to resume: there is no {}; start without {resume=True}", str(folder)
        )
    held = disk.lock(
        folder / ".lock",
        f"another process is training in {folder}; wait for it to end, or choose another folder",
    )
    try:
        yield
    finally:
        disk.unlock(held)
        with contextlib.suppress(OSError):
            folder.rmdir()  # which an empty folder allows alone


def _finetune(
    job: _Job,
    on_data: Callable[[Summary], None] | None,
    on_tokenizing: Callable[[str, int, int], None] | None,
) -> FinetuneResult:
    config, sizes = job.config, job.file.config
    check_prompts(config, job.tokenizer)
    data = load_data(config, job.tokenizer, sizes, progress=on_tokenizing)
    summary = data.summary
    check_memory(config, sizes, length=min(summary.row_length, max(1, summary.longest - 1)))
    if on_data is not None:
        on_data(summary)
    for name in job.file.tensors:  # damaged weights would get valid checksums in the result
        job.file.verify_tensor(name)
    model, adapted = load_model(config, job.file)
    board = TensorBoard(config.run_folder / "tensorboard") if config.tensorboard else None
    trainer = _trainer(job, model, data, board)
    try:
        result = trainer.run(resume=config.resume)
    finally:
        if board is not None:
            board.close()
    written: tuple[Path | None, Path | None] = None, None
    if result.reason in ("done", "early stop"):
        trainer.restore_best()
        if adapted is None:
            written = _save_model(job, model, result), None
        else:
            written = _save_adapter(job, adapted, result)
    return FinetuneResult(**vars(result), model=written[0], adapter=written[1])


def _trainer(job: _Job, model: GPT2ML, data: TrainingData, board: TensorBoard | None) -> Trainer:
    config = job.config

    def tell(event: Event) -> None:
        for listener in (board, job.callback):
            if listener is not None:
                listener(event)

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
        "multiple_of": SHORTEST,
    }

    def valid_batches() -> Iterator[Rows]:
        assert data.valid is not None
        return evaluation_batches(data.valid, batch_size=size, **place)

    return Trainer(
        objective,
        _optimizer(job, objective),
        BatchStream(data.train, batch_size=size, seed=config.seed, **place),
        config,
        valid_batches=valid_batches if data.valid is not None else None,
        valid_characters=data.valid.learned_characters() if data.valid is not None else None,
        folder=config.run_folder,
        data_key=_data_key(job.file, data),
        sampler=_sampler(job, model) if config.prompts else None,
        callback=tell,
        should_stop=job.should_stop,
    )


def _optimizer(job: _Job, objective: Objective) -> SlicedOptimizer:
    """Make the optimizer; it starts from the statistics in the model file if there are any."""
    config = job.config
    optimizer = make_optimizer(objective, config)
    if isinstance(optimizer, Adafactor) and not (config.lora_rank or config.fresh_optimizer):
        slots = job.file.optimizer_state()
        if slots:
            start_from(optimizer, objective.model, slots)
            logger.info("the optimizer continues from the statistics in %s", config.model)
    return optimizer


def _data_key(file: ModelFile, data: TrainingData) -> str:
    """A hash of the rows and of the base model's metadata."""
    model = json.dumps([file.config.to_dict(), file.source], sort_keys=True)
    digest = hashlib.blake2b(model.encode(), digest_size=16)
    digest.update(data.train.fingerprint().encode())
    return digest.hexdigest()


def _sampler(job: _Job, model: GPT2ML) -> Sampler:
    """Continue the prompts with the current weights, with the same random numbers each time."""
    from gpt2ml_torch.generation import Generator

    def sample(prompts: Sequence[str]) -> list[str]:
        generator = Generator(model, job.tokenizer, compile=False, pack=False)
        return list(
            generator.generate(
                list(prompts),
                return_full_text=False,
                max_new_tokens=job.config.sample_tokens,
                top_k=5,
                seed=job.config.seed,
            )
        )

    return sample


# -- the end of a run -----------------------------------------------------------------------------


def _save_model(job: _Job, model: GPT2ML, result: TrainResult) -> Path:
    """Write the tuned model; all processes gather sharded weights one at a time."""
    out, tensors = Path(job.config.out), model.state_dict()
    if process_rank() > 0:
        for tensor in tensors.values():
            whole(tensor)
        return out
    with ModelWriter(
        out,
        job.file.config,
        dtype=weight_dtype(job.config),
        vocab=job.file.vocab,
        source=_source(job, result),
        generation=_generation(job),
        overwrite=job.config.overwrite,
    ) as writer:
        for name, tensor in tensors.items():
            writer.write(name, whole(tensor))
    return out


def _save_adapter(job: _Job, adapted: Any, result: TrainResult) -> tuple[Path | None, Path]:
    """Save the adapter and, if `out` is a file, merge it into the model; return both paths."""
    config, out = job.config, Path(job.config.out)
    if out.suffix != ".safetensors":
        lora.save_adapter(adapted, out, base=config.model)
        return None, out
    folder = config.run_folder / "adapter"
    lora.save_adapter(adapted, folder, base=config.model)
    merge_adapter(
        config.model,
        folder,
        out,
        source=_source(job, result),
        generation=_generation(job),
        overwrite=config.overwrite,
    )
    return out, folder


def _generation(job: _Job) -> dict[str, Any]:
    """Defaults for generation: the model's own, and a stop at the end token if it was trained."""
    if job.config.end_token is None:
        return job.file.generation
    end = job.tokenizer.token_to_id(job.config.end_token)
    return {**job.file.generation, "eos_token_id": [end]}


def _source(job: _Job, result: TrainResult) -> dict[str, Any]:
    """The origin of the weights: the model's source, with this run appended."""
    config = job.config
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
    source = dict(job.file.source)
    return source | {"finetuned": [*source.get("finetuned", []), run]}
