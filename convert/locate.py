"""From what the user typed to the files of one checkpoint."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

_SHARD = re.compile(r"(?P<prefix>.+)\.data-(?P<index>\d{5})-of-(?P<count>\d{5})")
_STATE = re.compile(r'^\s*model_checkpoint_path\s*:\s*"(?P<path>(?:[^"\\]|\\.)*)"', re.MULTILINE)
_STATE_MAX_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Location:
    """A checkpoint on disk: a TensorFlow prefix, or a pickled PyTorch file, and what there is to
    tell about the choice."""

    path: Path
    kind: str  # "tf" or "bin"
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return self.path.parent

    def data_files(self) -> list[Path]:
        """The files that hold the weights, as far as they are there."""
        return [self.path] if self.kind == "bin" else _shards_of(self.path)

    def files(self) -> list[Path]:
        """All files of the checkpoint that are there."""
        return self.data_files() + ([self.index] if self.index.is_file() else [])

    @property
    def index(self) -> Path:
        return self.path.with_name(self.path.name + ".index")


def locate(source: Path) -> Location:
    """Find the checkpoint that a folder, prefix or file stands for.

    Raises `OSError` where there is none, `ValueError` where there are several.
    """
    if source.is_dir():
        return _in_folder(source)
    prefix = _prefix_of(source)
    if prefix is not None:
        return Location(prefix, "tf")
    if source.with_name(source.name + ".index").is_file():
        return Location(source, "tf")
    if source.is_file():
        return _loose_file(source)
    if source.exists():
        raise OSError(f"{source} is neither a file nor a folder")
    if source.parent.is_dir() and _shards_of(source):
        raise FileNotFoundError(f"{source}.index is missing; it belongs beside the .data file")
    raise FileNotFoundError(
        f"{source} does not exist, nor does {source}.index; give a checkpoint's folder or prefix"
    )


def data_files(prefix: Path) -> list[Path]:
    """The shards of a TensorFlow checkpoint, all of them.

    Raises `FileNotFoundError` naming those that are missing.
    """
    found = _shards_of(prefix)
    if not found:
        raise FileNotFoundError(f"{prefix}.data-00000-of-00001 is missing")
    counts = {int(_SHARD.fullmatch(path.name)["count"]) for path in found}  # type: ignore[index]
    if len(counts) > 1:
        raise ValueError(f"{prefix}.data-* belong to several checkpoints; keep those of one")
    count = counts.pop()
    names = [f"{prefix.name}.data-{i:05d}-of-{count:05d}" for i in range(count)]
    missing = [name for name in names if not (prefix.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"missing in {prefix.parent}: {', '.join(missing)}")
    return [prefix.parent / name for name in names]


def _shards_of(prefix: Path) -> list[Path]:
    return [
        path
        for path in sorted(prefix.parent.iterdir())
        if (match := _SHARD.fullmatch(path.name)) and match["prefix"] == prefix.name
    ]


def _prefix_of(file: Path) -> Path | None:
    """The prefix, if this is one of a TensorFlow checkpoint's files."""
    if file.suffix in (".index", ".meta"):
        prefix = file.with_suffix("")
    elif match := _SHARD.fullmatch(file.name):
        prefix = file.with_name(match["prefix"])
    else:
        return None
    if not prefix.with_name(prefix.name + ".index").is_file():
        raise FileNotFoundError(f"{prefix}.index is missing; a TensorFlow checkpoint needs it")
    return prefix


def _loose_file(source: Path) -> Location:
    if source.name == "checkpoint":
        return _in_folder(source.parent)
    with source.open("rb") as file:
        start = file.read(16)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return Location(source, "bin")
    if source.suffix == ".safetensors" or start[8:9] == b"{":
        raise ValueError(
            f"{source} is a safetensors file already; to go back to TensorFlow use --to-tf"
        )
    raise ValueError(
        f"{source} is neither a TensorFlow checkpoint nor a PyTorch file; expected a folder, "
        "prefix, .index or .bin"
    )


def _in_folder(folder: Path) -> Location:
    prefixes = [path.with_suffix("") for path in sorted(folder.glob("*.index")) if path.is_file()]
    bins = [path for path in sorted(folder.glob("*.bin")) if path.is_file()]
    if prefixes:
        location = _choose_prefix(folder, prefixes)
        if bins:
            note = f"{', '.join(path.name for path in bins)} beside it was left alone"
            return dataclasses.replace(location, notes=(*location.notes, note))
        return location
    if bins:
        return _choose_bin(folder, bins)
    orphans = [path.name for path in sorted(folder.iterdir()) if _SHARD.fullmatch(path.name)]
    if orphans:
        index = _SHARD.fullmatch(orphans[0])["prefix"] + ".index"  # type: ignore[index]
        raise FileNotFoundError(f"{folder} has {orphans[0]}, but {index} is missing")
    raise FileNotFoundError(
        f"no checkpoint (*.index with *.data-*, or pytorch_model.bin) in {folder}"
    )


def _choose_prefix(folder: Path, prefixes: list[Path]) -> Location:
    named = _named_by_state_file(folder)
    for prefix in prefixes:
        if prefix.name == named:
            return Location(prefix, "tf")
    if len(prefixes) == 1:
        return Location(prefixes[0], "tf")
    names = ", ".join(prefix.name for prefix in prefixes)
    why = (
        f"the file `checkpoint` names {named}, which is not there"
        if named
        else "no file `checkpoint` names one"
    )
    raise ValueError(
        f"several checkpoints in {folder}: {names}, and {why}; give one as {folder}/NAME"
    )


def _named_by_state_file(folder: Path) -> str | None:
    """The checkpoint that `checkpoint` names; of its folder, often one on someone else's machine,
    only the last part counts."""
    state = folder / "checkpoint"
    if not state.is_file() or state.stat().st_size > _STATE_MAX_BYTES:
        return None
    match = _STATE.search(state.read_bytes().decode("utf-8", errors="replace"))
    return re.split(r"[/\\]+", match["path"])[-1] if match else None


def _choose_bin(folder: Path, bins: list[Path]) -> Location:
    usual = [path for path in bins if path.name == "pytorch_model.bin"] or bins
    if len(usual) > 1:
        names = ", ".join(path.name for path in bins)
        raise ValueError(f"several .bin files in {folder}: {names}; give the one to convert")
    return Location(usual[0], "bin")
