"""Train the demo checkpoint, `checkpoints/demo`: a small GPT2_ML that writes regular Tang verse.

    pip install opencc && python scripts/train_demo.py

One command: it fetches the corpus with npm (or takes `--corpus TARBALL`), trains for about an hour,
and writes the checkpoint as the original code would have left it. Stopped at any moment, the same
command goes on from the last saved state; `--export` writes the checkpoint from that state without
training on. Seeds are fixed, so that runs on one machine with one number of threads agree bit for
bit; another CPU or PyTorch rounds matrix products differently, and the weights drift apart while
losses and quality stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import logging
import os
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # started as a script, from any folder

from gpt2ml_torch.finetuning.adafactor import Adafactor, parameter_groups  # noqa: E402
from gpt2ml_torch.finetuning.loss import next_token_loss  # noqa: E402

from gpt2ml_torch.config import GPT2MLConfig  # noqa: E402
from gpt2ml_torch.model import GPT2ML  # noqa: E402
from scripts.demo_model import card as demo_card  # noqa: E402
from scripts.demo_model import corpus as demo_corpus  # noqa: E402
from scripts.demo_model import export as demo_export  # noqa: E402
from scripts.demo_model.ngram import KneserNey  # noqa: E402

Articles = dict[int, list[Tensor]]  # by form, each (T,)

logger = logging.getLogger("train_demo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """So many steps on rows of one length; the first stage's short rows save time, the last one's
    teach all positions.
    """

    steps: int
    rows: int
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that the result depends on, besides the corpus."""

    model: GPT2MLConfig
    stages: tuple[Stage, ...]
    learning_rate: float
    warmup_steps: int
    held_out_share: float = 0.025
    seed: int = 7292
    compile: bool = True

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def schedule(self) -> str:
        """The stages in words."""
        stages = ", then ".join(
            f"{stage.steps:,} steps on {stage.rows} rows of {stage.length:,} tokens"
            for stage in self.stages
        )
        return (
            f"{stages};\nthe learning rate warms up over {self.warmup_steps} steps to "
            f"{self.learning_rate:g}, stays there, and falls to 0 over the last stage"
        )

    def rate(self, step: int) -> float:
        """Linear warm-up, a constant rate, and linear decay to 0 over the last stage."""
        last = self.stages[-1].steps
        return self.learning_rate * min(
            (step + 1) / self.warmup_steps, (self.steps - step) / last, 1.0
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
    learning_rate=3e-3,
    warmup_steps=100,
)


class Data:
    """The corpus as ids, and each step's batch as a function of the step alone."""

    def __init__(self, corpus: demo_corpus.Corpus, recipe: Recipe) -> None:
        self.vocabulary = demo_corpus.build_vocabulary(corpus.counts, recipe.model.vocab_size)
        self.ids = {token: index for index, token in enumerate(self.vocabulary)}
        self.corpus = corpus
        self.recipe = recipe

    def encode(self, text: str) -> list[int]:
        """One id a character; what the vocabulary lacks is [UNK]."""
        unknown = self.ids["[UNK]"]
        return [self.ids.get(character, unknown) for character in text]

    def batches(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Token ids (rows, length + 1) and positions (rows, length) from step `start` on."""
        step = 0
        for stage in self.recipe.stages:
            epochs = self._epochs(stage)
            for _ in range(stage.steps):
                rows = [next(epochs) for _ in range(stage.rows)]
                if step >= start:
                    yield (
                        torch.tensor([self.encode(row) for row in rows]),
                        self._positions(stage, step),
                    )
                step += 1

    def _epochs(self, stage: Stage) -> Iterator[str]:
        """Rows of one form each, the two forms mixed, reshuffled each time round."""
        seed = self.recipe.seed * 1000 + stage.length
        while True:
            seed += 1
            rows = [
                row
                for poems in self.corpus.train.values()
                for row in demo_corpus.rows(poems, length=stage.length + 1, seed=seed)
            ]
            random.Random(seed).shuffle(rows)
            yield from rows

    def _positions(self, stage: Stage, step: int) -> Tensor:
        """Half of the rows start at position 0, the others anywhere: short rows teach the late
        positions, too.
        """
        generator = torch.Generator().manual_seed(self.recipe.seed + step)
        room = self.recipe.model.max_position_embeddings - stage.length
        starts = torch.randint(0, room + 1, (stage.rows, 1), generator=generator)
        starts[::2] = 0
        return starts + torch.arange(stage.length)

    def articles(self, poems_by_form: dict[int, list[str]]) -> Articles:
        """Whole poems as articles (T,) of at most as many tokens as the model has positions."""
        length = self.recipe.model.max_position_embeddings
        return {
            form: [
                torch.tensor(self.encode(article))
                for article in demo_corpus.articles(poems, length=length, seed=self.recipe.seed)
            ]
            for form, poems in poems_by_form.items()
        }

    def write(self, model: GPT2ML, prompts: Sequence[str], *, new_tokens: int) -> list[str]:
        """The model's continuation of each prompt."""
        ids = [self.encode(prompt) for prompt in prompts]
        written = demo_export.sample(
            model, ids, new_tokens=new_tokens, top_k=5, seed=self.recipe.seed
        )
        return ["".join(self.vocabulary[id_] for id_ in continuation) for continuation in written]


@torch.no_grad()
def held_out_loss(model: GPT2ML, articles: Iterable[Tensor]) -> float:
    """Mean nats per character over all articles; each one's first character has nothing before it
    and is not counted.
    """
    model.eval()
    losses = [next_token_loss(model, article[None]) for article in articles]
    total = sum(float(loss.mean) * int(loss.targets) for loss in losses)
    return total / sum(int(loss.targets) for loss in losses)


class Run:
    """The model, its optimizer and the step, kept on disk so that little is ever lost."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.model = GPT2ML(recipe.model)
        self.optimizer = Adafactor(parameter_groups(self.model))
        self.step = 0
        self.file = folder / "state.pt"

    def save(self) -> None:
        state = {
            "recipe": repr(self.recipe),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }
        unfinished = self.file.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, self.file)

    def resume(self) -> None:
        """Go on from the saved state, if there is one; raises `ValueError` when another recipe left
        it.
        """
        if not self.file.exists():
            return
        state = torch.load(self.file, weights_only=True)
        if state["recipe"] != repr(self.recipe):
            raise ValueError(
                f"{self.file} was left by another recipe; expected this one: delete it"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def train(self, data: Data, *, save_every: float = 120.0) -> None:
        """Train to the end of the recipe, logging and saving."""
        loss_of = torch.compile(self._loss) if self.recipe.compile else self._loss
        started = saved = time.monotonic()
        seen, losses = 0, []
        for token_ids, positions in data.batches(self.step):
            self.model.train()
            loss = loss_of(token_ids, positions)
            loss.backward()
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.rate(self.step)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            seen += positions.numel()
            losses.append(float(loss.detach()))
            if self.step % 50 == 0 or self.step == self.recipe.steps:
                rate = seen / (time.monotonic() - started)
                mean = sum(losses) / len(losses)
                logger.info("step %d loss %.4f %.0f tokens/s", self.step, mean, rate)
                losses.clear()
            if self.step % 500 == 0:
                articles = itertools.chain(*data.articles(data.corpus.held_out).values())
                logger.info("step %d held out %.4f", self.step, held_out_loss(self.model, articles))
            if time.monotonic() - saved > save_every:
                self.save()
                saved = time.monotonic()
        self.save()

    def _loss(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        # Products in bfloat16, everything else in float32. One chunk: this model's logits fit, and
        # are not made twice.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return next_token_loss(
                self.model, token_ids, positions=positions, chunk_size=positions.numel()
            ).mean


def export(run: Run, data: Data, folder: Path) -> None:
    """Write the checkpoint and its card from the run as it stands."""
    variables = demo_export.tf_variables(run.model, run.optimizer.state, run.step)
    demo_export.save_tf(folder, variables)
    demo_export.save_beside(folder, run.model, data.vocabulary)
    demo_card.write_card(folder / "README.md", measure(run, data))
    size = sum(file.stat().st_size for file in folder.iterdir())
    logger.info("%s: %d bytes", folder, size)


def measure(run: Run, data: Data) -> demo_card.Figures:
    """The card's figures: losses, the n-gram models' losses, metre and samples."""
    model, corpus = run.model.eval(), data.corpus
    train, held_out = data.articles(corpus.train), data.articles(corpus.held_out)
    losses = {form: held_out_loss(model, ids) for form, ids in held_out.items()}
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
        step=run.step,
        schedule=run.recipe.schedule(),
        poems=sum(map(len, corpus.train.values())),
        characters=len(text),
        held_out_poems=sum(map(len, corpus.held_out.values())),
        held_out_characters=sum(map(len, itertools.chain(*corpus.held_out.values()))),
        unknown_share=sum(character not in known for character in text) / len(text),
        loss=sum(losses[form] * targets[form] for form in losses) / sum(targets.values()),
        loss_by_form=losses,
        clean_loss=held_out_loss(model, itertools.chain(*data.articles(clean).values())),
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
    """What `held_out_loss` is, of an n-gram model of the training text."""
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
        tarball, simplifier(), held_out_share=DEMO.held_out_share, seed=DEMO.seed
    )
    data = Data(corpus, DEMO)
    run = Run(DEMO, arguments.work)
    run.resume()
    if not arguments.export:
        run.train(data)
    export(run, data, arguments.out)


if __name__ == "__main__":
    main()
