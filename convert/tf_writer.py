"""Writing a TensorFlow V2 checkpoint: `PREFIX.index` and `PREFIX.data-00000-of-00001`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convert.tf_source import import_tensorflow


def write_tf_checkpoint(prefix: Path, tensors: Mapping[str, NDArray[np.generic]]) -> None:
    """Write named arrays as a checkpoint, sorted by name as TensorFlow's own saver does.

    Raises `OSError` where the files can't be written.
    """
    tf = import_tensorflow()
    names = sorted(tensors)
    try:
        tf.raw_ops.SaveV2(
            prefix=str(prefix),
            tensor_names=names,
            shape_and_slices=[""] * len(names),
            tensors=[tf.constant(tensors[name]) for name in names],
        )
    except tf.errors.OpError as error:
        raise OSError(f"can't write {prefix}: {' '.join(str(error.message).split())}") from None
