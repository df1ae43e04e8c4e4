"""Convert the model file back to a TensorFlow checkpoint that the original code reads."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from convert import configs, mapping
from convert.source import (
    Array,
    count_non_finite,
    round_to,
    rows_in_order,
    storage_dtype,
    widened,
)
from convert.tensorflow import Variable, write_checkpoint
from gpt2ml_torch.modelfile import ModelFile
from gpt2ml_torch.modelfile.format import SLOT
from gpt2ml_torch.modelfile.header import TensorInfo
from gpt2ml_torch.options import OptionError, OptionFileExistsError

_STATE = 'model_checkpoint_path: "{0}"\nall_model_checkpoint_paths: "{0}"\n'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a conversion, for the summary."""

    prefix: Path
    parameters: int
    step: int
    has_optimizer: bool
    files: list[str]
    size: int  # bytes of all files
    seconds: float


def to_tf(
    source: Path,
    folder: Path,
    *,
    overwrite: bool = False,
    allow_non_finite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Write `model.ckpt-STEP.*`, `checkpoint`, config.json and vocab.txt into a folder.

    The weights are written as float32, whatever the file's dtype, and with them the optimizer's
    statistics if the file holds them. Raises as `ModelFile.open` does, `ValueError` for a tensor
    that is damaged or, unless `allow_non_finite`, has NaN or infinity, and `FileExistsError`.
    """
    started = time.monotonic()
    with ModelFile.open(source) as file:
        step = _check_file(file)
        prefix = f"model.ckpt-{step}"
        names = _file_names(prefix, file)
        _check_folder(folder, names, overwrite)
        with _scratch(folder, prefix) as scratch:
            variables = _variables(file, allow_non_finite=allow_non_finite)
            _write_all(scratch, prefix, file, step, dict(variables), progress)
            for name in names:
                (scratch / name).replace(folder / name)
        return Report(
            prefix=folder / prefix,
            parameters=file.config.num_parameters,
            step=step,
            has_optimizer=bool(file.slots),
            files=names,
            size=sum((folder / name).stat().st_size for name in names),
            seconds=time.monotonic() - started,
        )


@contextlib.contextmanager
def _scratch(folder: Path, prefix: str) -> Iterator[Path]:
    """A folder for unfinished files inside `folder`, from which they are renamed at the end.

    It is removed afterwards; after an error, `folder` is removed too if it was created here. What a
    killed run leaves is removed by the next one.
    """
    created = not folder.exists()
    folder.mkdir(exist_ok=True)
    scratch = folder / f".{prefix}.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir()
        yield scratch
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        if created:
            with contextlib.suppress(OSError):  # not empty: somebody else wrote into it
                folder.rmdir()
        raise
    scratch.rmdir()


def _check_file(file: ModelFile) -> int:
    """The training step; raises `ValueError` for a file that TensorFlow's format can't hold."""
    if file.packed is not None:
        raise ValueError(
            f"{file.path} is quantised ({file.packed}), which TensorFlow's checkpoints can't hold; "
            "give the file that it was made from"
        )
    step = file.source.get("step", 0)
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"{file.path}: its source gives step {step!r}; expected a whole number")
    return step


def _check_folder(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected the name of a folder to write")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"the folder {folder.absolute().parent} does not exist; create it first"
        )
    existing = [name for name in names if (folder / name).exists()]
    if existing and not overwrite:
        raise OptionFileExistsError(
            "{} has {} already; {overwrite=True} overwrites it", folder, ", ".join(existing)
        )


def _file_names(prefix: str, file: ModelFile) -> list[str]:
    """The names of all files, in the order in which they are renamed."""
    vocabulary = ["vocab.txt"] if file.vocab is not None else []
    files = (f"{prefix}.data-00000-of-00001", f"{prefix}.index", "config.json")
    return [*files, *vocabulary, "checkpoint"]  # last, because it points to the others


def _write_all(
    folder: Path,
    prefix: str,
    file: ModelFile,
    step: int,
    variables: dict[str, Variable],
    progress: Callable[[int, int], None] | None,
) -> None:
    variables[mapping.TF_STEP] = Variable.of(np.array(step, np.int64))
    total = sum(math.prod(variable.shape) * 4 for variable in variables.values())
    write_checkpoint(
        folder / prefix,
        variables,
        progress=(lambda done: progress(done, total)) if progress else None,
    )
    config = json.dumps(configs.original_dialect(file.config), indent=2)
    (folder / "config.json").write_text(config + "\n")
    if file.vocab is not None:
        (folder / "vocab.txt").write_bytes(file.vocab.encode())
    (folder / "checkpoint").write_text(_STATE.format(prefix))


def _variables(file: ModelFile, *, allow_non_finite: bool) -> Iterator[tuple[str, Variable]]:
    """The variables by their TensorFlow names; values are read from the file when needed."""
    recipes = mapping.recipes(file.config.num_hidden_layers, mapping.TENSORFLOW)
    slots = mapping.slot_recipes(recipes, file.slots)
    flat = {
        name: dataclasses.replace(info, shape=(math.prod(info.shape),))
        for name, info in file.slots.items()
    }
    for key, recipe in {**recipes, **slots}.items():
        info = flat.get(key) or file.tensors[key]
        stored = SLOT + key if key in flat else key
        shape = recipe.source_shape(info.shape)
        for index, name in enumerate(recipe.sources):
            pieces = functools.partial(_pieces, file, stored, info, recipe, index)
            if not allow_non_finite:
                pieces = functools.partial(_finite, file, stored, pieces)
            yield name, Variable("float32", shape, pieces)


def _pieces(
    file: ModelFile, name: str, info: TensorInfo, recipe: mapping.Recipe, index: int
) -> Iterator[Array]:
    """One variable's values, some rows at a time."""
    if index == 0:
        file.verify_tensor(name)
    rows = info.shape[0] // len(recipe.sources)
    shape = (rows, *info.shape[1:])
    dtype = storage_dtype(info.dtype)
    size = math.prod(shape) * dtype.itemsize
    values = np.frombuffer(file.read_bytes(name, index * size, size), dtype).reshape(shape)
    for piece in rows_in_order(values.T if recipe.transpose else values):
        yield widened(piece) if info.dtype == "bfloat16" else round_to("float32", piece)


def _finite(file: ModelFile, name: str, pieces: Callable[[], Iterator[Array]]) -> Iterator[Array]:
    """The same pieces; raises `OptionError` at the first that has NaN or infinity."""
    for piece in pieces():
        if count_non_finite(piece):
            raise OptionError(
                "tensor {!r} of {} has values that are not finite (NaN or infinity): such a model "
                "writes nonsense; convert or train it again ({allow_non_finite=True} converts it "
                "anyway)",
                *(name, file.path),
            )
        yield piece
