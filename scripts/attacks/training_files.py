"""Training files in many forms: all texts are read exactly; damage gives one line of error."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

from gpt2ml_torch import Tokenizer
from gpt2ml_torch.finetuning.data.documents import DocumentReader
from gpt2ml_torch.finetuning.data.files import find_sources
from scripts.attacks.tools import ALLOWED, TOKENS, any_json, damaged

SHAPES = ("strings", "text", "content", "lines", "alpaca", "messages", "turns")
BLANKS = ("\n\n", "\n\u200b\n", "\n \ufeff\n", "\r\n\r\n", "\r\r", "\n\u3000\n\n")


class Attack:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer = Tokenizer(TOKENS)

    def __call__(self, draw: random.Random) -> None:
        texts = [
            "".join(draw.choice("今天气不错春眠觉晓") for _ in range(draw.randint(1, 30)))
            for _ in range(draw.randint(1, 20))
        ]
        name, content = self._written(draw, texts)
        data = content.encode()
        right = draw.random() < 0.6
        if not right:
            data = damaged(draw, data)
        if draw.random() < 0.3:
            name, data = name + ".gz", gzip.compress(data)
            if not right:
                data = damaged(draw, data)
        path = self._folder / name
        path.write_bytes(data)
        found, trouble = self._read(path)
        path.unlink()
        assert len(trouble.splitlines()) <= 1, f"{trouble!r}"
        if right:
            assert found == texts, f"{name}: {trouble or found[:3]} for {content[:200]!r}"

    def _read(self, path: Path) -> tuple[list[str], str]:
        """The documents and no error, or no documents and the error."""
        reader = DocumentReader(self._tokenizer.encode)
        pieces = (piece for source in find_sources(path) for piece in reader.read(source))
        try:
            text = "".join(p.text * p.learned + ("\0" if p.ends else "") for p in pieces)
        except ALLOWED as error:
            return [], str(error)
        return [document.strip() for document in text.split("\0")[:-1]], ""

    def _written(self, draw: random.Random, texts: list[str]) -> tuple[str, str]:
        """The name and content of a file that holds these texts."""
        mark = draw.choice(("", "\ufeff"))
        if draw.random() < 0.3:
            return draw.choice(("a.txt", "a.text")), mark + draw.choice(BLANKS).join(texts)
        shape = draw.choice(SHAPES)
        values = [self._value(draw, shape, text) for text in texts]
        for _ in range(draw.randrange(3)):  # rows without a text
            empty = draw.choice(("", "\u200b ", " \n"))
            values.insert(draw.randrange(len(values) + 1), self._value(draw, shape, empty))
        ascii_only = draw.random() < 0.3
        suffix = draw.choice((".json", ".jsonl") if shape == "strings" else (".json", ".txt", ""))
        layout = draw.randrange(3)
        if layout == 0:
            indent = draw.choice((None, 1, 4, "\t"))
            return f"a{suffix}", mark + json.dumps(values, ensure_ascii=ascii_only, indent=indent)
        end = draw.choice(("\n", "\r\n", "\n\n", "\n\ufeff"))
        lines = (json.dumps(value, ensure_ascii=ascii_only) for value in values)
        return f"a{suffix or '.jsonl'}", mark + end.join(lines)

    def _value(self, draw: random.Random, shape: str, text: str) -> Any:
        if shape == "strings":
            return text
        if shape == "alpaca":
            return {"instruction": "今", "input": draw.choice(("", None, "天")), "output": text}
        if shape == "messages":
            turns = [{"role": "user", "content": "天"}, {"role": "assistant", "content": text}]
            return {"messages": turns}
        if shape == "turns":
            return {"conversation": [{"human": "天", "assistant": text}]}
        if shape == "lines":
            return {"paragraphs": [text], "id": 7}
        record = {shape: text}
        if draw.random() < 0.3:
            record["extra_" + str(draw.randrange(9))] = any_json(draw)
        return record
