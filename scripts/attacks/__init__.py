"""Fuzz everything that reads or writes, for a given time.

    scripts/attack --seconds 600 --seed 1

An attack is a module of this package with one class of the name `Attack`: made once for a folder
of its own, then called with a random generator for each case. A case passes if the program gives a
correct result or one line of error. Everything else is a finding, printed with the command that
reproduces it: another exception, a traceback, a silently wrong result, a hang, a crash, or too much
memory.

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
