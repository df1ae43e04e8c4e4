"""A process that tokenises: pieces on its standard input, their tokens on its output.

It is run by its path and not imported, so that the packages around it, and torch with them, stay
unloaded: a worker needs none of it, and it takes seconds and 200 MB.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any


def serve() -> None:
    """Read the set-up, then batches until the input ends, which it does when the parent dies."""
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(2, 1)  # so that nothing printed on import gets among the answers
    sys.path[:], packages, tokenizer_bytes, end_id = pickle.load(source)
    _stand_in_for(packages)
    from gpt2ml_torch.finetuning.data.encoding import encode_pieces

    tokenizer = _load(tokenizer_bytes, packages)
    while True:
        batch = pickle.load(source)
        try:
            answer: Any = encode_pieces(tokenizer, batch, end_id=end_id)
        except Exception as error:
            answer = error
        pickle.dump(answer, sink, pickle.HIGHEST_PROTOCOL)
        sink.flush()


def _stand_in_for(packages: Mapping[str, Sequence[str]]) -> None:
    """Let modules be found in these packages without running the packages' own code."""
    for name, path in packages.items():
        package = types.ModuleType(name)
        package.__path__ = list(path)
        sys.modules[name] = package


def _load(tokenizer_bytes: bytes, packages: Mapping[str, Sequence[str]]) -> Any:
    try:
        return pickle.loads(tokenizer_bytes)
    except (ImportError, AttributeError):  # another's class, which needs the packages themselves
        for name in packages:
            del sys.modules[name]
        return pickle.loads(tokenizer_bytes)


if __name__ == "__main__":
    with contextlib.suppress(EOFError, KeyboardInterrupt, BrokenPipeError):
        serve()
