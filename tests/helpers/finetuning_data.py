"""What the tests of the fine-tuning data share: two small tokenizers and files to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from gpt2ml_torch.finetuning.data.cache import tokenize_files
from gpt2ml_torch.finetuning.data.corpus import Corpus
from gpt2ml_torch.tokenizer import Tokenizer

VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"春眠不觉晓处闻啼鸟夜来风雨声花落知多少,。abcσs",
    "##b",
]


def small_tokenizer() -> Tokenizer:
    return Tokenizer(VOCAB)


class NumberTokenizer:
    """Reads "17 18 19" as the ids 17, 18 and 19, so that a test knows each token by its number."""

    vocab_text = "numbers"
    num_embeddings = 1 << 20
    unk_id = 1

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def token_to_id(self, token: str) -> int | None:
        return {"[PAD]": 0, "[SEP]": 2}.get(token)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def write_jsonl(path: Path, objects: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in objects), encoding="utf-8")
    return path


def numbered_corpus(folder: Path, sizes: Sequence[int], prompts: Sequence[int] = ()) -> Corpus:
    """Documents of the sizes given, whose tokens count on from 10, with a gap after each."""
    first, objects = 10, []
    for index, size in enumerate(sizes):
        words = [str(number) for number in range(first, first + size)]
        prompt = prompts[index] if prompts else 0
        objects.append({"prompt": " ".join(words[:prompt]), "completion": " ".join(words[prompt:])})
        first += size + 1
    file = write_jsonl(folder / "numbers.jsonl", objects)
    return tokenize_files(file, NumberTokenizer(), cache_dir=folder / "cache")
