"""The options of a whole run: how to train, and the model, the data and the output."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from gpt2ml_torch.finetuning.data.documents import SEPARATORS
from gpt2ml_torch.finetuning.data.records import Fields
from gpt2ml_torch.finetuning.train_config import (
    MANY,
    TrainConfig,
    memory_option,
    run_option,
    training_option,
)
from gpt2ml_torch.options import OptionError, option


def _data(default: Any, help: str, **details: Any) -> Any:
    return option(default, help=help, group="data", **details)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """The options of a fine-tuning run: the model, the data, the output, and how to train.

    `out` is a .safetensors file, or with `lora_rank` a folder for the adapter. The run's own files
    (checkpoints, metrics.jsonl, loss.png) go to `folder`, by default OUT with the suffix .run.
    Raises as `TrainConfig` does; `finetune` checks the files.
    """

    model: str = option(
        help="a converted model, .safetensors", positional=True, path=True, resumable=True
    )
    data: tuple[str, ...] = option(
        help="text or JSON Lines: files, folders or patterns",
        positional=True,
        path=True,
        resumable=True,
    )
    out: str = option(
        help="the tuned model to write, or with --lora-rank a folder for the adapter",
        path=True,
        metavar="OUT",
        resumable=True,
    )
    valid: tuple[str, ...] = _data((), "validation data", metavar="FILE", path=True, resumable=True)
    valid_share: float = _data(
        0.05,
        "share of the documents held out if there is no validation data",
        low=0.0,
        below=1.0,
        metavar="SHARE",
    )
    valid_limit: int = _data(
        200, "most documents that an evaluation reads", low=1, high=MANY, metavar="DOCUMENTS"
    )
    separator: str = _data("blank-line", "what ends a document in a text file", choices=SEPARATORS)
    text_field: str | None = _data(
        None,
        "field of JSON data that holds the text",
        metavar="NAME",
        default_text="the fields are recognised",
    )
    prompt_field: str | None = _data(
        None, "field of JSON data that is read but not learned", metavar="NAME"
    )
    completion_field: str | None = _data(
        None, "field of JSON data that is learned after the prompt", metavar="NAME"
    )
    length: int | None = _data(
        None, "tokens in a row", low=2, metavar="TOKENS", default_text="the model's positions"
    )
    overlap: int | None = _data(
        None,
        "tokens that neighbouring rows of a long document share",
        low=0,
        metavar="TOKENS",
        default_text="an eighth of the length",
    )
    min_tokens: int = _data(0, "leave shorter documents out", low=0, metavar="TOKENS")
    pack: bool = _data(
        False, "put several documents into a row; they don't attend to each other", flags="--pack"
    )
    end_token: str | None = _data(
        None, 'token to append to each document, such as "[SEP]"', metavar="TOKEN"
    )
    cache: str | None = _data(
        None, "folder for tokenised data", metavar="DIR", path=True, resumable=True
    )
    folder: str | None = run_option(
        None,
        "folder for the run's own files",
        metavar="DIR",
        path=True,
        default_text="OUT with the suffix .run",
        resumable=True,
    )
    resume: bool = run_option(
        False, "continue from the last checkpoint", flags="--resume", resumable=True
    )
    overwrite: bool = run_option(
        False, "replace an earlier run and its result", flags="--force", resumable=True
    )
    fresh_optimizer: bool = training_option(
        False,
        "ignore Adafactor statistics in the model file",
        flags="--fresh-optimizer",
        resumable=True,
    )
    device: str = memory_option(
        "cpu", "cpu, cuda, cuda:1 ...", metavar="DEVICE", default_text="auto", resumable=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.record_fields
        if not self.data:
            raise OptionError("{data} is empty; give at least one file, folder or pattern")
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device):
            raise OptionError("{device} is {!r}; expected cpu, cuda or cuda:N", self.device)
        if self.lora_rank == 0 and Path(self.out).suffix != ".safetensors":
            raise OptionError("{out} is {}; expected a name that ends in .safetensors", self.out)

    @property
    def record_fields(self) -> Fields:
        """The named fields of JSON records, checked together."""
        return Fields(self.text_field, self.prompt_field, self.completion_field)

    @property
    def run_folder(self) -> Path:
        """The folder for the checkpoints, metrics and plots of this run."""
        return Path(self.folder) if self.folder else Path(self.out).with_suffix(".run")
