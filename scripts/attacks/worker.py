"""One attack's cases, one after the other: python -m scripts.attacks.worker NAME SEED FIRST SECONDS

With SECONDS 0 the one case FIRST runs, and its exception is shown whole.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

FINDING = "FINDING"
CASE_SECONDS = 30
MEMORY = 12 << 30  # bytes of address space; PyTorch maps some of them itself


def main(name: str, seed: str, first: str, seconds: str) -> None:
    end = time.monotonic() + float(seconds)  # the imports below take seconds themselves
    limit_memory()
    attacks = importlib.import_module(f"scripts.attacks.{name}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        attack = attacks.Attack(Path(folder))
        stack.callback(getattr(attack, "close", lambda: None))
        case = int(first)
        while True:
            print("case", case, flush=True)
            try:
                with deadline(CASE_SECONDS):
                    attack(random.Random(f"{name} {seed} {case}"))
            except Exception as error:
                if float(seconds) == 0:
                    raise
                place = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
                print(f"{FINDING} {name} --seed {seed} case {case}: {' '.join(what.split())[:600]}")
            case += 1
            if time.monotonic() >= end:
                return


def limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


class Hang(Exception):
    """A case took too long."""


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main(*sys.argv[1:])
