"""Run the cases of one attack: python -m scripts.attacks.worker NAME SEED FIRST SECONDS

With SECONDS 0 only the case FIRST runs, and its exception is shown in full.
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
CASE_SECONDS = 30  # of processor time, so that a busy machine causes no findings
WAITING_SECONDS = 240  # of wall-clock time
MEMORY = 12 << 30  # bytes of address space, including the part that PyTorch itself maps


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
                with deadline(CASE_SECONDS, WAITING_SECONDS):
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
def deadline(busy: float, waiting: float) -> Iterator[None]:
    """Raise `Hang` after `busy` seconds of processor time or `waiting` seconds on the clock."""

    def ring(number: int, _: object) -> None:
        limit = f"{busy} s of work" if number == signal.SIGPROF else f"{waiting} s"
        raise Hang(f"more than {limit}")

    before = {number: signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, busy)
    signal.setitimer(signal.ITIMER_REAL, waiting)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main(*sys.argv[1:])
