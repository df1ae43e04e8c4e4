"""Runs the attacks in turn, each in a process of its own, and gathers what they find."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from scripts.attacks import NAMES
from scripts.attacks.worker import FINDING

SLICE_SECONDS = 40.0  # about; the start of a worker is part of it
LEAST_SECONDS = 0.5  # each attack runs at least one case however little time there is
GRACE_SECONDS = 300.0  # beyond the slice, for a worker to start and end its last case


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/attack", description="Attack what reads and writes."
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, other cases (default: 0)"
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these attacks")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    first = dict.fromkeys(arguments.only, 0)
    findings: list[str] = []
    rounds = max(1, round(arguments.seconds / (SLICE_SECONDS * len(arguments.only))))
    turns = [name for _ in range(rounds) for name in arguments.only]
    for number, name in enumerate(turns):
        # Equal parts of what is left: a slow start costs the last attacks no more than others.
        share = max(end - time.monotonic(), 0.0) / (len(turns) - number)
        done, found = run_slice(name, arguments.seed, first[name], max(share, LEAST_SECONDS))
        first[name] += done
        findings += found
        print(f"{name}: {first[name]} cases", flush=True)
        for finding in found:
            print(finding, flush=True)
    print(f"{sum(first.values())} cases, {len(findings)} findings")
    return 1 if findings else 0


def run_slice(name: str, seed: int, first: int, seconds: float) -> tuple[int, list[str]]:
    """Run an attack for so long, its start included; how many cases ran, and the findings."""
    command = [
        sys.executable,
        "-m",
        "scripts.attacks.worker",
        name,
        str(seed),
        str(first),
        str(seconds),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + GRACE_SECONDS, check=False
        )
        output, ended = done.stdout, done.returncode
        trouble = f"the worker ended with status {ended}: {done.stderr[-2000:]}" if ended else ""
    except subprocess.TimeoutExpired as error:
        output = (
            (error.stdout or b"").decode()
            if isinstance(error.stdout, bytes)
            else error.stdout or ""
        )
        trouble = "the worker hung"
    lines = output.splitlines()
    cases = [int(line.split()[1]) for line in lines if line.startswith("case ")]
    found = [line for line in lines if line.startswith(FINDING)]
    last = cases[-1] if cases else first
    if trouble:
        found.append(f"{FINDING} {name} --seed {seed} case {last}: {trouble}")
    return last + 1 - first, found


if __name__ == "__main__":
    sys.exit(main())
