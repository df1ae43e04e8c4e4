"""Train the demo checkpoint, `checkpoints/demo`: a small GPT2_ML that writes regular Tang verse.

    pip install opencc && python -m scripts.train_demo

It fetches the corpus with npm (or takes `--corpus TARBALL`), trains for three quarters of an hour
with the same loop as `gpt2ml finetune`, and writes a checkpoint like the original code's. If it is
stopped, the same command continues from the last saved state; `--export` writes the checkpoint from
that state without further training. Seeds are fixed, so runs on one machine with the same number of
threads agree bit for bit. Another CPU or PyTorch rounds matrix products differently: the weights
then differ, but losses and quality stay the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.finetuning import (
    Adafactor,
    Evaluated,
    Event,
    Objective,
    Rows,
    StepTaken,
    TrainConfig,
    Trainer,
    next_token_rows,
    parameter_groups,
)
from gpt2ml_torch.model import GPT2ML
from scripts.demo_model import card as demo_card
from scripts.demo_model import corpus as demo_corpus
from scripts.demo_model import export as demo_export
from scripts.demo_model.ngram import KneserNey

Articles = dict[int, list[Tensor]]  # by form, each (T,)

ROOT = Path(__file__).resolve().parent.parent

logger = logging.getLogger("train_demo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A number of steps on rows of one length."""

    steps: int
    rows: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the result depends on, besides the corpus.

    The short rows of the first stage save time, and the long ones of the last teach all positions.
    """

    model: GPT2MLConfig
    stages: tuple[Stage, ...]
    training: TrainConfig
    held_out_share: float = 0.025

    def schedule(self) -> str:
        """The stages in words."""
        stages = ", then ".join(
            f"{stage.steps:,} steps on {stage.rows} rows of {stage.length:,} tokens"
            for stage in self.stages
        )
        return (
            f"{stages};\nthe learning rate warms up over {self.training.warmup} steps to "
            f"{self.training.learning_rate:g}, stays there, and falls to 0 over the last "
            f"{self.training.cooldown:,} steps"
        )


DEMO = Recipe(
    model=GPT2MLConfig(
        vocab_size=4608,
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=512,
        # Five passes over the corpus do not overfit a model of this size, so dropout would only
        # cost.
        hidden_dropout_prob=0.0,
    ),
    stages=(
        Stage(steps=4600, rows=8, length=256),
        Stage(steps=1400, rows=2, length=1024),
    ),
    training=TrainConfig(
        steps=6000,
        precision="float32",  # twice as fast as mixed where the CPU has no bfloat16 products
        learning_rate=3e-3,
        schedule="constant",
        warmup=100,
        cooldown=1400,
        final_share=0.0,
        loss_chunk=2048,  # all positions of a step: this model's logits fit, and aren't made twice
        eval_every=500,
        checkpoint_minutes=2.0,
        keep=1,
        seed=7292,
    ),
)


class Data:
    """The corpus as ids, and each step's batch as a function of the step alone."""

    def __init__(self, corpus: demo_corpus.Corpus, recipe: Recipe) -> None:
        self.vocabulary = demo_corpus.build_vocabulary(corpus.counts, recipe.model.vocab_size)
        self.ids = {token: index for index, token in enumerate(self.vocabulary)}
        self.corpus = corpus
        self.recipe = recipe

    def encode(self, text: str) -> list[int]:
        """One id for each character; [UNK] for a character that the vocabulary lacks."""
        unknown = self.ids["[UNK]"]
        return [self.ids.get(character, unknown) for character in text]

    @property
    def steps_per_epoch(self) -> int:
        """The number of all steps; the stages determine how often the corpus is read."""
        return sum(stage.steps for stage in self.recipe.stages)

    def batch(self, index: int) -> Rows:
        """The rows of a step; half of them start at position 0, the others anywhere.

        The latter teach late positions with short rows too.
        """
        first = 0
        for stage in self.recipe.stages:
            if index < first + stage.steps:
                break
            first += stage.steps
        at = (index - first) * stage.rows
        texts = self._texts(stage)[at : at + stage.rows]
        generator = torch.Generator().manual_seed(self.recipe.training.seed + index)
        room = self.recipe.model.max_position_embeddings - stage.length
        starts = torch.randint(0, room + 1, (stage.rows, 1), generator=generator)
        starts[::2] = 0
        rows = next_token_rows(torch.tensor([self.encode(text) for text in texts]))
        return rows._replace(positions=rows.positions + starts)

    @functools.cache  # noqa: B019 (lives as long as the script)
    def _texts(self, stage: Stage) -> list[str]:
        """All rows of a stage, each of one form, the two forms mixed, reshuffled each epoch."""
        texts: list[str] = []
        seed = self.recipe.training.seed * 1000 + stage.length
        while len(texts) < stage.steps * stage.rows:
            seed += 1
            epoch = [
                row
                for poems in self.corpus.train.values()
                for row in demo_corpus.rows(poems, length=stage.length + 1, seed=seed)
            ]
            random.Random(seed).shuffle(epoch)
            texts += epoch
        return texts

    def articles(self, poems_by_form: dict[int, list[str]]) -> Articles:
        """Whole poems as articles (T,) of at most as many tokens as the model has positions."""
        length, seed = self.recipe.model.max_position_embeddings, self.recipe.training.seed
        return {
            form: [
                torch.tensor(self.encode(article))
                for article in demo_corpus.articles(poems, length=length, seed=seed)
            ]
            for form, poems in poems_by_form.items()
        }

    def held_out(self) -> Iterator[Rows]:
        """The held-out articles, one a batch."""
        for article in itertools.chain(*self.articles(self.corpus.held_out).values()):
            yield next_token_rows(article[None])

    def write(self, model: GPT2ML, prompts: Sequence[str], *, new_tokens: int) -> list[str]:
        """The model's continuation of each prompt."""
        ids = [self.encode(prompt) for prompt in prompts]
        seed = self.recipe.training.seed
        written = demo_export.sample(model, ids, new_tokens=new_tokens, top_k=5, seed=seed)
        return ["".join(self.vocabulary[id_] for id_ in continuation) for continuation in written]


def make_trainer(recipe: Recipe, data: Data, folder: Path) -> Trainer:
    """A run of the recipe from random weights, which keeps its state in a folder."""
    torch.manual_seed(recipe.training.seed)
    objective = Objective(GPT2ML(recipe.model), chunk=recipe.training.loss_chunk)
    return Trainer(
        objective,
        Adafactor(parameter_groups(objective)),
        data,
        recipe.training,
        valid_batches=data.held_out,
        folder=folder,
        data_key=hashlib.sha256(repr((recipe.model, recipe.stages)).encode()).hexdigest(),
        callback=log_event,
    )


def log_event(event: Event) -> None:
    """Log a line now and then."""
    if isinstance(event, StepTaken) and event.step % 50 == 0:
        rate = event.tokens_per_second
        logger.info("step %d loss %.4f %.0f tokens/s", event.step, event.loss, rate)
    elif isinstance(event, Evaluated):
        logger.info("step %d held out %.4f", event.step, event.loss)


@torch.no_grad()
def mean_loss(model: GPT2ML, articles: Iterable[Tensor]) -> float:
    """The mean loss in nats per character; the first character of an article isn't predicted."""
    objective = Objective(model.eval())
    total, count = 0.0, 0
    for article in articles:
        total += float(objective(next_token_rows(article[None])))
        count += len(article) - 1
    return total / count


def export(trainer: Trainer, data: Data, step: int, folder: Path) -> None:
    """Write the checkpoint and its card from the run as it stands."""
    model, optimizer = trainer.objective.model, trainer.optimizer
    demo_export.save_tf(folder, demo_export.tf_variables(model, optimizer.state, step))
    demo_export.save_beside(folder, model, data.vocabulary)
    demo_card.write_card(folder / "README.md", measure(model, data, step))
    size = sum(file.stat().st_size for file in folder.iterdir())
    logger.info("%s: %d bytes", folder, size)


def measure(model: GPT2ML, data: Data, step: int) -> demo_card.Figures:
    """The card's figures: losses, the n-gram models' losses, metre and samples."""
    corpus = data.corpus
    train, held_out = data.articles(corpus.train), data.articles(corpus.held_out)
    losses = {form: mean_loss(model, ids) for form, ids in held_out.items()}
    targets = {form: sum(len(article) - 1 for article in ids) for form, ids in held_out.items()}
    prompts = demo_export.metre_prompts(corpus.held_out, count=100)
    written = data.write(model, [prompt for _, prompt in prompts], new_tokens=128)
    texts = [(form, prompt + text) for (form, prompt), text in zip(prompts, written, strict=True)]
    samples = data.write(model, demo_export.PROMPTS, new_tokens=96)
    clean, shared_lines = demo_corpus.without_shared_lines(corpus)
    text = "".join(poem for poems in corpus.train.values() for poem in poems)
    known = set(data.vocabulary)
    return demo_card.Figures(
        config=model.config,
        step=step,
        schedule=data.recipe.schedule(),
        poems=sum(map(len, corpus.train.values())),
        characters=len(text),
        held_out_poems=sum(map(len, corpus.held_out.values())),
        held_out_characters=sum(map(len, itertools.chain(*corpus.held_out.values()))),
        unknown_share=sum(character not in known for character in text) / len(text),
        loss=sum(losses[form] * targets[form] for form in losses) / sum(targets.values()),
        loss_by_form=losses,
        clean_loss=mean_loss(model, itertools.chain(*data.articles(clean).values())),
        shared_lines=shared_lines,
        ngram_losses={order: ngram_loss(train, held_out, order=order) for order in (2, 3, 4)},
        metre=demo_export.measure_metre(texts),
        metre_prompts=len(prompts),
        samples=[
            (prompt, text[: text.rfind("。") + 1] or text)
            for prompt, text in zip(demo_export.PROMPTS, samples, strict=True)
        ],
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


def ngram_loss(train: Articles, held_out: Articles, *, order: int) -> float:
    """The same mean loss of an n-gram model of the training text."""
    sequences = [article.numpy() for ids in train.values() for article in ids]
    ngrams = KneserNey(sequences, order=order, vocabulary_size=DEMO.model.vocab_size)
    scored = [
        ngrams.log_probabilities(article.numpy())[1:]
        for ids in held_out.values()
        for article in ids
    ]
    return -float(np.concatenate(scored).mean())


def simplifier() -> Any:
    """Traditional to simplified characters, text -> text."""
    try:
        from opencc import OpenCC
    except ImportError as error:
        raise OSError("OpenCC is not installed; install it: pip install opencc==1.4.2") from error
    return OpenCC("t2s").convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, help=f"the tarball of {demo_corpus.PACKAGE}")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "train_demo", help="downloads and state"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "checkpoints" / "demo")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--export", action="store_true", help="only write the checkpoint from the saved state"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    tarball = demo_corpus.fetch(arguments.work, arguments.corpus)
    corpus = demo_corpus.load(
        tarball, simplifier(), held_out_share=DEMO.held_out_share, seed=DEMO.training.seed
    )
    data = Data(corpus, DEMO)
    trainer = make_trainer(DEMO, data, arguments.work)
    step = restored_step(trainer) if arguments.export else trainer.run(resume=True).step
    export(trainer, data, step, arguments.out)


def restored_step(trainer: Trainer) -> int:
    """Load the last saved state without further training; raises `ValueError` if there is none."""
    assert trainer.snapshots is not None
    progress = trainer.snapshots.restore()
    if progress is None:
        raise ValueError(f"{trainer.folder} holds no saved state; train first")
    return progress.step


if __name__ == "__main__":
    main()
