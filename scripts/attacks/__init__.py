"""Fuzz everything that reads or writes, for a given time.

    scripts/attack --seconds 600 --seed 1

An attack is a module of this package with a class named `Attack`, and its name in `NAMES`. The
class is constructed once, with a folder of its own, and called with a random generator for each
case. A case passes if the program gives a correct result or a one-line error. Everything else is a
finding, printed with the seed and the case that reproduce it: another exception, a traceback, a
silently wrong result, a hang, a crash, or too much memory.

Cases run in worker processes, so a crash ends only the worker.
"""

NAMES = (
    "model_file",
    "metadata",
    "tensorflow_index",
    "snappy",
    "protocol_buffers",
    "pickles",
    "flags",
    "environments",
    "kills",
    "requests",
    "brought",
    "exported",
    "adapters",
    "training_files",
)
