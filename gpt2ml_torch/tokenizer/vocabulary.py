"""Find vocabulary files and split them into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpt2ml_torch.textfiles import read_text_file

# 8 MiB; the published files have 0.1, and one of 250,000 tokens has 5.
MAX_VOCABULARY_BYTES = 1 << 23


# Far longer than any word; a file without line breaks is something else.
MAX_TOKEN_CHARACTERS = 1024


def check_tokens(tokens: Sequence[str]) -> None:
    """Raise `ValueError`, with the line, for a token that is too long to be one."""
    for line, token in enumerate(tokens, 1):
        if len(token) > MAX_TOKEN_CHARACTERS:
            raise ValueError(
                f"line {line} has {len(token):,} characters; a vocabulary holds one token a line, "
                f"of at most {MAX_TOKEN_CHARACTERS:,}"
            )


def split_lines(text: str) -> list[str]:
    """Split a vocabulary as the original reads it: at "\\n" alone, each line stripped.

    TensorFlow's line reader, which the original used, drops every "\\r".
    """
    lines = text.removeprefix("\ufeff").replace("\r", "").split("\n")
    if lines[-1] == "":  # the end of the last line, not another line
        lines.pop()
    return [line.strip() for line in lines]


def join_lines(tokens: Sequence[str]) -> str:
    """The text of a vocabulary file with these tokens; `ValueError` for a line break in one."""
    for id_, token in enumerate(tokens):
        if "\n" in token:
            raise ValueError(f"token {id_} ({token!r}) holds a line break: tokens are single lines")
    return "".join(f"{token}\n" for token in tokens)


def find_vocabulary(path: Path) -> Path:
    """Return the file itself, or the one in a folder that holds the vocabulary."""
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(
                f"no file {path}: expected a converted .safetensors file, a vocab.txt or its folder"
            )
        if not path.is_file():
            raise OSError(f"{path} is not a regular file; expected a vocab.txt or a model file")
        return path
    for pattern in ("vocab.txt", "*vocab*.txt", "*.safetensors"):
        # macOS leaves a file whose name begins with a dot beside each file.
        found = sorted(file for file in path.glob(pattern) if file.name[0] != ".")
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} holds {len(found)} candidates ({names}): name one of them")
    raise FileNotFoundError(f"{path} holds neither a vocab.txt nor a converted .safetensors file")


def is_converted(path: Path) -> bool:
    """Whether a file, by its first bytes, is a converted model: a length, then JSON."""
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[7:] == b"\0{"


def read_vocabulary(path: Path) -> str:
    """The text of a vocabulary file; raises as `read_text_file` does."""
    expected = "a vocabulary, one token a line"
    return read_text_file(path, max_bytes=MAX_VOCABULARY_BYTES, expected=expected)
