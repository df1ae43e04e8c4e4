"""A process that tokenizes: batches of pieces on its standard input, their tokens on its output.

It runs by its path and imports neither torch nor the package's parts that need it, which would take
seconds and 200 MB in each worker.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from typing import Any


def serve() -> None:
    """Read the set-up, then batches until the input ends, which it does when the parent dies."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(2, 1)  # so that output of imported modules does not mix with the answers
    sys.path[:], tokenizer_bytes, end_id = pickle.load(source)
    from gpt2ml_torch.finetuning.data.encoding import encode_pieces

    tokenizer = pickle.loads(tokenizer_bytes)
    while True:
        batch = pickle.load(source)
        try:
            answer: Any = encode_pieces(tokenizer, batch, end_id=end_id)
        except Exception as error:
            answer = error
        pickle.dump(answer, sink, pickle.HIGHEST_PROTOCOL)
        sink.flush()


if __name__ == "__main__":
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        serve()
