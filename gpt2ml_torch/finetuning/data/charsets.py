"""What a file that is not UTF-8 probably is, and how to convert it."""

from __future__ import annotations

import codecs
from typing import NamedTuple

_MAGIC = {
    b"\x1f\x8b": "gzip: name it .gz",
    b"\x28\xb5\x2f\xfd": "zstd: name it .zst",
    b"\xfd7zXZ\x00": "xz: name it .xz",
    b"BZh": "bzip2: unpack it with bunzip2",
    b"7z\xbc\xaf": "a 7-Zip archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"PK\x03\x04": "a zip archive (or .docx, .xlsx): unpack or export it as text",
    b"\xd0\xcf\x11\xe0": "an old Word or Excel file: export it as text in UTF-8",
    b"%PDF": "a PDF: export it as text",
    b"PAR1": "Parquet: export it as JSON Lines",
    b"SQLite format 3": "an SQLite database: export it as JSON Lines",
    b"\x89HDF": "HDF5: export it as JSON Lines",
    b"\x93NUMPY": "a NumPy array of numbers: expected the text they were made from",
}
_MARKS = {  # longest first: the mark of UTF-16 begins another
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x84\x31\x95\x33": "GB18030",
}
_PUNCTUATION = frozenset("，。、；：？！「」『』“”‘’（）《》…—\u3000")
_SAMPLE_BYTES = 1 << 14


class _Charset(NamedTuple):
    """A multibyte encoding, and which double bytes are its frequent characters."""

    name: str
    iconv: str
    codec: str
    level_codec: str
    first: int
    last: int


# The frequent characters of a standard form its first level: 3,755 of GB 2312, 5,401 of Big5.
# Text read in the wrong one of the two hits rare characters about every second time. Of equal
# guesses the first wins.
_CHARSETS = (
    _Charset("GB18030", "GB18030", "gb18030", "gb2312", 0xB0A1, 0xD7F9),
    _Charset("Big5", "CP950", "cp950", "big5", 0xA440, 0xC67E),
    _Charset("Big5", "BIG5-HKSCS", "big5hkscs", "big5", 0xA440, 0xC67E),
    _Charset("UTF-16", "UTF-16LE", "utf-16-le", "gb2312", 0xB0A1, 0xD7F9),
    _Charset("UTF-16", "UTF-16BE", "utf-16-be", "gb2312", 0xB0A1, 0xD7F9),
)


def describe_undecodable(data: bytes, bad: int, *, first: bool, seen_utf8: bool) -> str:
    """One line about the byte at `bad` of a block that is not UTF-8, and what to do.

    `first` says that the block is the file's first, `seen_utf8` that characters other than ASCII
    were read before: then the file is UTF-8, and damaged in this place.
    """
    nul = data[bad] == 0
    found = "found a NUL byte" if nul else f"byte 0x{data[bad]:02x} is not UTF-8"
    expected = "text" if nul else "UTF-8"
    hint = _hint(data, bad, first=first, seen_utf8=seen_utf8)
    return f"{found}{f' (perhaps {hint})' if hint else ''}; expected {expected}"


def _hint(data: bytes, bad: int, *, first: bool, seen_utf8: bool) -> str:
    if first:
        for magic, hint in _MAGIC.items():
            if data.startswith(magic):
                return hint
        for mark, name in _MARKS.items():
            if data.startswith(mark):
                return _conversion(name, name)
    if seen_utf8:
        return "damaged, or joined from files in several encodings: convert each by itself"
    start = 0 if bad < _SAMPLE_BYTES else data.rfind(b"\n", 0, bad) + 1
    found = _guess(data[start : start + _SAMPLE_BYTES])
    if found is not None:
        return _conversion(*found)
    if data[bad] == 0:
        return "no text at all"
    return "another encoding: `iconv -f ENCODING -t UTF-8 OLD > NEW` converts it"


def _conversion(name: str, iconv: str) -> str:
    return f"{name}: iconv -f {iconv} -t UTF-8 OLD > NEW"


def _guess(sample: bytes) -> tuple[str, str] | None:
    """The likeliest encoding and iconv's name for it, or None."""
    if b"\0" in sample:  # in text, the high bytes of ASCII in UTF-16
        zeros = [sample[side::2].count(0) for side in (0, 1)]
        if max(zeros) > 4 * min(zeros):
            return "UTF-16", "UTF-16BE" if zeros[0] > zeros[1] else "UTF-16LE"
        return None
    shares = {charset: _share_of_frequent(sample, charset) for charset in _CHARSETS}
    best = max(shares, key=shares.__getitem__)
    return (best.name, best.iconv) if shares[best] > 0.5 else None


def _share_of_frequent(sample: bytes, charset: _Charset) -> float:
    """The share of frequent ones among the characters outside ASCII; 0 for what can't be read."""
    decoder = codecs.getincrementaldecoder(charset.codec)()
    try:
        text = decoder.decode(sample)  # the last character may be cut off
    except UnicodeDecodeError:
        return 0.0
    characters = [c for c in text if not c.isascii()]
    frequent = sum(c in _PUNCTUATION or _is_frequent(c, charset) for c in characters)
    return frequent / len(characters) if characters else 0.0


def _is_frequent(character: str, charset: _Charset) -> bool:
    try:
        code = character.encode(charset.level_codec)
    except UnicodeEncodeError:
        return False
    return len(code) == 2 and charset.first <= int.from_bytes(code, "big") <= charset.last
