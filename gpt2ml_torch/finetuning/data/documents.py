"""Read documents from text and JSON files, a piece at a time.

A document is given in pieces so that one of any length fits in memory: pieces end where the
tokenizer separates words anyway, so the pieces have the same tokens as the whole.
"""

from __future__ import annotations

import collections
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Literal, NamedTuple

from gpt2ml_torch.finetuning.data.compressed import open_source
from gpt2ml_torch.finetuning.data.files import Source, shown
from gpt2ml_torch.finetuning.data.json_values import (
    begins_as_json,
    begins_as_strings,
    read_values,
)
from gpt2ml_torch.finetuning.data.lines import Numbered, complaint, read_blocks, read_lines
from gpt2ml_torch.finetuning.data.records import Fields, Record, read_record
from gpt2ml_torch.foreign import failed_download
from gpt2ml_torch.options import OptionError

logger = logging.getLogger(__name__)

Separator = Literal["blank-line", "file", "line"]
SEPARATORS: tuple[Separator, ...] = ("blank-line", "file", "line")
PLAIN_TEXT = "text files"  # the shape of documents that come from no JSON

PIECE_CHARACTERS = 1 << 18
_TABLES = frozenset((".csv", ".tsv", ".html", ".htm", ".xhtml", ".xml"))  # text with marks in it

# Characters after which the tokenizer always begins a new word.
_WORD_END = re.compile("[ \t\n\r\u3000\u4e00-\u9fff]")
# Unicode's other line ends: VT, FF, NEL, LINE and PARAGRAPH SEPARATOR.
_RARE_LINE_ENDS = "\x0b\x0c\x85\u2028\u2029"
_RARE_LINE_END = re.compile(f"[{_RARE_LINE_ENDS}]")


class Piece(NamedTuple):
    """A part of a document, in order."""

    text: str
    learned: bool = True  # False for what is read but not learned, such as a prompt
    ends: bool = True  # whether the document ends here


class BlankRule:
    """Whether a text is blank: the tokenizer makes no token of it.

    White space is blank, and so are zero width spaces, byte order marks and all other characters
    that the tokenizer drops. One character that it keeps decides, which is mostly the text's first.
    """

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._visible: dict[str, bool] = {}

    def __call__(self, text: str) -> bool:
        for character in text.lstrip():
            if character not in self._visible:
                self._visible[character] = bool(self._encode(character))
            if self._visible[character]:
                return False
        return True


class DocumentReader:
    """Reads the documents of files, and counts their kinds.

    `encode` is the tokenizer's method. `separator` says whether text is cut into documents at blank
    lines, at every line, or not at all. In JSON each line is a document, or each element of the
    only array; `fields` names the fields with the text if they are not recognised. A record without
    anything to learn is left out and counted in `empty_texts`; `shapes` counts the documents of
    each shape.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        *,
        separator: Separator = "blank-line",
        fields: Fields | None = None,
    ) -> None:
        if separator not in SEPARATORS:
            raise ValueError(f"separator is {separator!r}; expected one of {', '.join(SEPARATORS)}")
        self.separator, self.fields = separator, fields or Fields()
        self.is_blank = BlankRule(encode)
        self.empty_texts = 0
        self.shapes: collections.Counter[str] = collections.Counter()

    def read(
        self, source: Source, *, progress: Callable[[int], None] | None = None
    ) -> Iterator[Piece]:
        """Yield the pieces of one file's documents; a file without any text gives nothing.

        `progress` is called now and then with the number of bytes of the file read since.

        Raises `OSError` for a file that cannot be read, and `ValueError`, with file and line, for
        bytes that are not UTF-8, damaged compression, bad JSON, JSON of no known shape, and a named
        file whose records are all empty.
        """
        _check_downloaded(source)
        with open_source(source) as (plain, file):
            report = _reporter(file, progress) if progress is not None else lambda: None
            blocks = read_blocks(source, plain, progress=report)
            is_json, blocks = (True, blocks) if source.kind == "json" else _peek(source, blocks)
            if is_json:
                yield from self._json_pieces(source, blocks)
            else:
                yield from self._text_pieces(source, read_lines(source, blocks))

    # -- text -------------------------------------------------------------------------------------

    def _text_pieces(self, source: Source, lines: Iterable[Numbered]) -> Iterator[Piece]:
        by_line = self.separator == "line"
        held: list[str] = []  # never empty inside a document, so that its last piece can be told
        size = 0
        for line in self._at_rare_ends(source, lines) if self.separator != "file" else lines:
            text = line.text
            if self.is_blank(text):
                if self.separator == "blank-line" and held:
                    yield from self._text_document(held)
                    held, size = [], 0
                continue
            if by_line:
                yield from self._text_document([text])
                continue
            if size >= PIECE_CHARACTERS:
                yield from portions("".join(held), ends=False)
                held, size = [], 0
            held.append(text)
            size += len(text)
        if held:
            yield from self._text_document(held)

    def _text_document(self, held: list[str]) -> Iterator[Piece]:
        self.shapes[PLAIN_TEXT] += 1
        return portions("".join(held))

    def _at_rare_ends(self, source: Source, lines: Iterable[Numbered]) -> Iterator[Numbered]:
        """Lines, cut at rare line ends where those make a blank line or are the file's only ones.

        Next to a line feed one of them is part of the same line end, as in CR LF. A single one
        inside a line, where web pages leave them, is white space.
        """
        warned = False
        for line in lines:
            if not _RARE_LINE_END.search(line.text):
                yield line
                continue
            parts = _RARE_LINE_END.split(_without_one_at_each_end(line.text.rstrip("\n")))
            only_ends = line.line == 1 and not line.text.endswith("\n")
            if self.separator == "blank-line":
                if not any(map(self.is_blank, parts)):
                    yield line
                    continue
            elif not only_ends:
                if not warned:
                    logger.warning(
                        "%s, line %d: U+%04X inside a line is kept as white space; lines end at "
                        "line feeds here",
                        shown(source.path),
                        line.line,
                        ord(_RARE_LINE_END.findall(line.text)[0]),
                    )
                warned = True
                yield line
                continue
            for part in parts:
                yield Numbered(line.line, part + "\n")

    # -- JSON -------------------------------------------------------------------------------------

    def _json_pieces(self, source: Source, blocks: Iterator[Numbered]) -> Iterator[Piece]:
        first_empty: int | None = None
        found: set[str] = set()
        for line, value in read_values(source, blocks):
            try:
                record = read_record(value, self.fields)
            except OptionError as error:
                template = "{}, line {}: " + error.template
                raise OptionError(template, shown(source.path), line, *error.values) from None
            except ValueError as error:
                raise complaint(source, line, str(error)) from None
            if all(self.is_blank(part.text) for part in record.parts if part.learned):
                self.empty_texts += 1
                first_empty = line if first_empty is None else first_empty
                continue
            if record.shape not in found:
                found.add(record.shape)
                logger.info("%s, line %d: read as %s", shown(source.path), line, record.shape)
            self.shapes[record.shape] += 1
            yield from _record_pieces(record)
        if first_empty is not None and not found and source.named:
            raise complaint(
                source, first_empty, "the text is empty, as in all the file; expected documents"
            )


def _check_downloaded(source: Source) -> None:
    """Raise `ValueError` for a git-lfs pointer, a web page or a partial download."""
    if source.path.suffix.lower() in _TABLES or source.compression is not None:
        return
    try:
        fault = failed_download(source.path, wanted="training file")
    except OSError:  # opening it will say why
        return
    if fault:
        raise ValueError(fault)


def _peek(source: Source, blocks: Iterator[Numbered]) -> tuple[bool, Iterator[Numbered]]:
    """Whether a text file holds JSON, which is logged, and its blocks from the beginning."""
    held = []
    for block in blocks:
        held.append(block)
        if not block.text.isspace():
            break
    text = held[-1].text if held else ""
    name = shown(source.path)
    if is_json := begins_as_json(text):
        logger.warning("%s holds JSON and is read as such, whatever its name", name)
    elif begins_as_strings(text):
        logger.warning("%s is read as text; JSON Lines of strings are named .jsonl", name)
    elif source.path.suffix.lower() in _TABLES:
        logger.warning(
            "%s is read as text, with all its marks; export its texts as JSON Lines, or as .txt",
            name,
        )
    return is_json, itertools.chain(held, blocks)


def _record_pieces(record: Record) -> Iterator[Piece]:
    """The record's parts up to the last learned one; what follows is useless."""
    last = max(number for number, part in enumerate(record.parts) if part.learned and part.text)
    for number, part in enumerate(record.parts[: last + 1]):
        if part.text:
            yield from portions(part.text, learned=part.learned, ends=number == last)


def portions(text: str, *, learned: bool = True, ends: bool = True) -> Iterator[Piece]:
    """Cut a long text at the ends of words, if there are any."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        cut = _WORD_END.search(text, start + PIECE_CHARACTERS)
        if cut is None or cut.end() == len(text):
            break
        yield Piece(text[start : cut.end()], learned, False)
        start = cut.end()
    yield Piece(text[start:] if start else text, learned, ends)


def _without_one_at_each_end(text: str) -> str:
    start = 1 if _RARE_LINE_END.match(text) else 0
    stop = len(text) - 1 if len(text) > 1 and _RARE_LINE_END.match(text[-1]) else len(text)
    return text[start:stop]


def _reporter(file: BinaryIO, progress: Callable[[int], None]) -> Callable[[], None]:
    before = 0

    def report() -> None:
        nonlocal before
        now = file.tell()
        progress(now - before)
        before = now

    return report
