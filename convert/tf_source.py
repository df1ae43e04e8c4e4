"""A TensorFlow checkpoint as a source, read by TensorFlow's own reader, which verifies each
tensor's checksum."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from convert import locate, mapping, published
from convert.sources import Entries, total_bytes

_OP = re.compile(r"\{\{[^}]*\}\}\s*| \[Op:.*")

# Integers are listed so that a variable of the wrong kind is called by its name; what is not here
# holds no numbers.
_NAMES = ("float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8")
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _NAMES}


def import_tensorflow() -> ModuleType:
    """TensorFlow, without the log lines that it writes to stderr when it starts.

    Raises `ValueError` with the cure where it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _silenced():
        try:
            import tensorflow as tf
        except ImportError as error:
            raise ValueError(
                f"TensorFlow checkpoints need TensorFlow ({error}): pip install '.[convert]' "
                "(a pytorch_model.bin converts without it)"
            ) from None
        tf.get_logger().setLevel("ERROR")
        tf.constant(0)  # the devices announce themselves at the first operation
    return tf


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Send the process's stderr nowhere: TensorFlow's C++ logs don't go through Python."""
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


class TFSource:
    """One checkpoint, by its prefix.

    Raises `OSError` for missing or truncated files, saying how large they should be, and
    `ValueError` for damaged ones.
    """

    format: mapping.Format = "tf"
    gives_away = True

    def __init__(self, location: locate.Location) -> None:
        self._prefix = str(location.path)
        self.name = location.path.name
        self._tf = import_tensorflow()
        try:
            self.data_files = locate.data_files(location.path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}{self._size_of_missing(location)}") from None
        self.entries = self._read_index(self._prefix, location)
        self._check_size(location)

    def read(self, name: str) -> Tensor:
        dtype = getattr(self._tf, str(self.entries[name][0]).removeprefix("torch."))
        try:
            (value,) = self._tf.raw_ops.RestoreV2(
                prefix=self._prefix, tensor_names=[name], shape_and_slices=[""], dtypes=[dtype]
            )
        except self._tf.errors.OpError as error:
            raise ValueError(
                f"tensor {name!r} of {self._prefix} is damaged: {_message(error)}; fetch the "
                "checkpoint again"
            ) from None
        return torch.from_dlpack(value)

    def step(self) -> int | None:
        if self.entries.get(mapping.TF_STEP) == (torch.int64, ()):
            return int(self.read(mapping.TF_STEP))
        return None

    def check(self) -> None:
        pass

    def _read_index(self, prefix: str, location: locate.Location) -> Entries:
        try:
            reader = self._tf.train.load_checkpoint(prefix)
            dtypes = reader.get_variable_to_dtype_map()
            shapes = reader.get_variable_to_shape_map()
        except Exception as error:  # TensorFlow raises OpError, ValueError or RuntimeError here
            raise ValueError(
                f"{location.index} is damaged or no TensorFlow checkpoint: {_message(error)}; "
                "fetch it again"
            ) from None
        return {
            name: (_DTYPES.get(dtypes[name].name), tuple(shapes[name])) for name in sorted(shapes)
        }

    def _size_of_missing(self, location: locate.Location) -> str:
        """How large the missing data should be: the index tells, once there is a file of its data's
        name."""
        with tempfile.TemporaryDirectory() as folder:
            prefix = Path(folder) / location.path.name
            prefix.with_name(prefix.name + ".index").write_bytes(location.index.read_bytes())
            prefix.with_name(prefix.name + ".data-00000-of-00001").touch()
            try:
                entries = self._read_index(str(prefix), location)
            except ValueError:
                return ""
        size = total_bytes(entries, entries)
        known = published.by_size(size)
        of = f" of the published {known.name}" if known else ""
        return f"; the index expects {size:,} bytes of data{of}, {len(entries):,} entries"

    def _check_size(self, location: locate.Location) -> None:
        found = sum(path.stat().st_size for path in self.data_files)
        expected = total_bytes(self.entries, self.entries)
        if found < expected:
            names = ", ".join(str(path) for path in self.data_files[:3])
            raise OSError(
                f"{names} is truncated: found {found:,} bytes, the index expects {expected:,}; "
                "fetch it again"
            )


def _message(error: Any) -> str:
    """TensorFlow's message, on one line and without its op's name and address."""
    text = " ".join(str(getattr(error, "message", None) or error).split())
    return _OP.sub("", text)[:300]
