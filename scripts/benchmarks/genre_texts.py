"""Two genres from the demo's corpus: Tang verse, which the shipped model knows, and Yuan drama.

Both are prepared in the same way: characters are simplified; entries that are damaged or hold
foreign characters, and repetitions, are dropped; a share is held out by a fixed seed; and
consecutive pieces are joined to articles.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from scripts.demo_model import corpus

YUAN = re.compile(r"package/dist/yuanqu/yuanqu\.json")
TEXT = re.compile(f"(?:{corpus.HAN}|[，。、；：？！])+")
SEED = 7292
TANG_HELD_OUT = 0.025  # with this seed, the same poems that the demo was not trained on
YUAN_HELD_OUT = 0.1
LENGTH = 1024  # the model's positions


@dataclasses.dataclass(frozen=True)
class Genre:
    """Articles, one a line, to train on and held out."""

    name: str
    train: list[str]
    held_out: list[str]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write both parts as text files with one article a line; returns their paths."""
        paths = folder / f"{self.name}.txt", folder / f"{self.name}-held-out.txt"
        for path, articles in zip(paths, (self.train, self.held_out), strict=True):
            path.write_text("".join(f"{article}\n" for article in articles), encoding="utf-8")
        return paths


def tang(tarball: Path, simplify: Callable[[str], str]) -> Genre:
    """Regular verse, as the demo was trained on."""
    poems = corpus.load(tarball, simplify, held_out_share=TANG_HELD_OUT, seed=SEED)
    return Genre("tang", *(_joined(part.values()) for part in (poems.train, poems.held_out)))


def yuan(tarball: Path, simplify: Callable[[str], str]) -> Genre:
    """Arias and dialogue: irregular lines, colloquial language."""
    entries = ["".join(paragraphs) for paragraphs in corpus.read_entries(tarball, YUAN)]
    pieces = [piece for piece in simplify("\n".join(entries)).split("\n") if TEXT.fullmatch(piece)]
    pieces = corpus.deduplicate(pieces)
    random.Random(SEED).shuffle(pieces)
    cut = int(len(pieces) * YUAN_HELD_OUT)
    return Genre("yuan", _joined([pieces[cut:]]), _joined([pieces[:cut]]))


def _joined(parts: Iterable[list[str]]) -> list[str]:
    """Articles of at most `LENGTH` characters; pieces of one part stay together."""
    return [
        article for pieces in parts for article in corpus.articles(pieces, length=LENGTH, seed=SEED)
    ]
