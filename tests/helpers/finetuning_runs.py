"""What tests of whole fine-tunings share: a tiny model, text to tune it on, and how to run it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from gpt2ml_torch import GPT2ML, GPT2MLConfig
from gpt2ml_torch.finetuning import Event, FinetuneConfig, FinetuneResult, finetune
from gpt2ml_torch.finetuning.reporting import read_metrics
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.writer import save

ROOT = Path(__file__).resolve().parents[2]
CHARACTERS = list(
    dict.fromkeys("春眠不觉晓处闻啼鸟夜来风雨声花落知多少床前明月光疑是地上霜举头望低思故乡")
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_files(folder: Path) -> Path:
    """A folder with model.safetensors and text.txt, 60 documents of 12 characters in all."""
    vocab = SPECIAL + CHARACTERS
    config = GPT2MLConfig(
        vocab_size=len(vocab) + 2,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2ML(config)
    save(
        folder / "model.safetensors",
        model.state_dict(),
        config,
        vocab="\n".join(vocab) + "\n",
        source={"name": "tiny"},
    )
    draw = random.Random(0)
    texts = ["".join(draw.choices(CHARACTERS[:12], k=draw.randint(8, 60))) for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    return folder


def settings(files: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Of a run of 12 steps, as `FinetuneConfig` takes them."""
    values: dict[str, Any] = {
        "model": str(files / "model.safetensors"),
        "data": (str(files / "text.txt"),),
        "out": str(out),
        "cache": str(files / "cache"),
        "learning_rate": 1e-2,
        "batch_size": 4,
        "steps": 12,
        "eval_every": 4,
        "valid_share": 0.1,
    }
    return values | changes


def run(files: Path, out: Path, stop_after: int | None = None, **changes: Any) -> FinetuneResult:
    """Fine-tune in this process; interrupted after so many steps."""
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked >= stop_after

    return finetune(FinetuneConfig(**settings(files, out, **changes)), should_stop=should_stop)


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return read_metrics(out.with_suffix(".run") / "metrics.jsonl")


def losses(out: Path) -> list[float]:
    """All training and validation losses of a run."""
    return [row["loss"] for row in metrics(out) if row["kind"] in ("step", "eval")]


def same_weights(one: Path, other: Path) -> bool:
    """Whether two model files hold the same, bit for bit."""
    expected, found = ModelFile.open(one).state_dict(), ModelFile.open(other).state_dict()
    return all(torch.equal(found[name], value) for name, value in expected.items())


def python(
    *arguments: str, processes: int = 1, timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """`python -m ARGUMENTS` from the repository's root, under torchrun for several processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    return subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},  # sums depend on it
        check=False,
    )


def record(events: list[Event]) -> Any:
    """A callback that appends each event to a list."""
    return events.append
