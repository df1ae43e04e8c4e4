"""Run one contestant in a process of its own: JSON requests on stdin, JSON answers on stdout.

`python -m scripts.benchmarks.contestant NAME PRECISION SIZE DEVICE FOLDER`; the first answer says
that it is ready.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks import peers, tf_peer
from scripts.benchmarks.ours import GPT2MLGenerator, NoCache
from scripts.benchmarks.weights import SIZES

Maker = Callable[[Any, str, Path, str], Any]

CONTESTANTS: dict[str, Maker] = {
    "ours": lambda c, p, f, d: GPT2MLGenerator(c, p, f, device=d),
    "ours, no kernels": lambda c, p, f, d: GPT2MLGenerator(c, p, f, device=d, kernels=False),
    "ours, no kernels, eager": lambda c, p, f, d: GPT2MLGenerator(
        c, p, f, device=d, kernels=False, compile=False
    ),
    "no cache, as bert4keras": lambda c, p, f, d: NoCache(c, p, f),
    "transformers GPT-2, eager": lambda c, p, f, d: peers.TransformersGPT2(c, p, f, compile=False),
    "transformers GPT-2, compiled": lambda c, p, f, d: peers.TransformersGPT2(
        c, p, f, compile=True
    ),
    "llama.cpp": lambda c, p, f, d: peers.LlamaCpp(c, p, f),
    "CTranslate2": lambda c, p, f, d: peers.CTranslate2(c, p, f),
    "TensorFlow, with cache": lambda c, p, f, d: tf_peer.TensorFlowReference(c, p, f),
}


def main() -> None:
    name, precision, size, device, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what libraries print out of the answers

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    started = time.perf_counter()
    try:
        contestant = CONTESTANTS[name](SIZES[size](), precision, Path(folder), device)
    except ImportError as error:
        return answer(absent=f"not installed ({error.name})")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    known = ("load_seconds", "first_seconds", "weight_bytes")
    facts = {key: getattr(contestant, key) for key in known if hasattr(contestant, key)}
    answer(ready=time.perf_counter() - started, peak=peak, threads=torch.get_num_threads(), **facts)
    for line in sys.stdin:
        request = json.loads(line)
        answer(seconds=getattr(contestant, request["what"])(*request["arguments"]))


if __name__ == "__main__":
    main()
