"""Attacks on everything that reads or writes, for as long as one lets them.

    scripts/attack --seconds 600 --seed 1

An attack is a module of this package with one class of the name `Attack`: made once for a folder
of its own, then called with a random generator for each case. A case passes when the program does
what it promises for whatever it was given: a right result, or one line of error. Everything else
is a finding, printed with the words that make it again: another exception, a traceback, a wrong
result without a word, a hang, a crash, or too much memory.

Cases run in processes of their own, so that a crash ends none but the worker.
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
