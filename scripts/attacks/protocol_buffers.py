"""An index whose table and messages are damaged but have correct checksums: at most an error."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

from convert import bundle
from scripts.attacks.tools import ALLOWED, CHECKPOINT, damaged


class Attack:
    def __init__(self, folder: Path) -> None:
        self._entries = bundle.read_table(next(CHECKPOINT.glob("*.index")).read_bytes())

    def __call__(self, draw: random.Random) -> None:
        entries = dict(self._entries)
        for _ in range(draw.randint(1, 3)):
            key = draw.choice(list(entries))
            value = entries.pop(key)
            kind = draw.randrange(3)
            if kind == 0:
                entries[key] = damaged(draw, value)
            elif kind == 1:
                entries[damaged(draw, key)] = value
            else:
                entries[draw.randbytes(3)] = draw.randbytes(draw.randrange(40))
        with contextlib.suppress(*ALLOWED):
            bundle.read_index(bundle.write_table(sorted(entries.items())))
