"""Run the attacks in turn, each in a process of its own, and collect their findings."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from scripts.attacks import NAMES
from scripts.attacks.worker import FINDING

SLICE_SECONDS = 40.0  # approximate length of a turn, including the start of the worker
LEAST_SECONDS = 0.5  # so that each attack runs at least one case
GRACE_SECONDS = 300.0  # beyond the slice, for a worker to start and end its last case


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/attack", description="Fuzz everything that reads or writes."
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="time for all attacks (default: 60)"
    )
    parser.add_argument("--seed", type=int, default=0, help="selects the cases (default: 0)")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="attacks to run")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    first = dict.fromkeys(arguments.only, 0)
    findings: list[str] = []
    rounds = max(1, round(arguments.seconds / (SLICE_SECONDS * len(arguments.only))))
    turns = [name for _ in range(rounds) for name in arguments.only]
    for number, name in enumerate(turns):
        # Equal shares of the remaining time, so that a slow start costs all attacks equally.
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
    """Run an attack for `seconds`, including its start, from case `first` on.

    Returns the number of cases and the findings.
    """
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
