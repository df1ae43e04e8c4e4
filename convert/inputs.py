"""Find the files of one checkpoint from the path that the user gave.

Files whose names begin with a dot are ignored: macOS puts a `._` file beside every file.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from convert.safetensors_file import converted_already, is_converted
from gpt2ml_torch import foreign

Kind = Literal["tf", "bin", "safetensors"]

_TF_SHARD = re.compile(r"(?P<prefix>.+)\.data-(?P<index>\d{5})-of-(?P<count>\d{5})")
_SHARD = re.compile(r"(?P<name>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
_STATE = re.compile(
    rb"""^\s*model_checkpoint_path\s*:\s*(?P<quote>["'])(?P<path>(?:[^\\]|\\.)*?)(?P=quote)""",
    re.MULTILINE | re.DOTALL,
)
_ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|(.))", re.DOTALL)
_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b", b"f": b"\f",
            b"v": b"\v"}  # fmt: skip
_STATE_MAX_BYTES = 1 << 20
_INDEX_MAX_BYTES = 16 << 20
_FILE_NAME = re.compile(r"(?!\.)[^/\\\0:]{1,255}")
_MAX_LEVELS, _MAX_FOLDERS = 3, 100  # searched if the folder itself has no checkpoint
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# In the order of transformers: a pickled file beside model.safetensors may be older.
_USUAL = ("model.safetensors", "pytorch_model.bin", "model.pt", "pytorch_model.pt")
# Files that training programs write beside the weights.
_BESIDE = re.compile(
    r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|adapter_model|trainer)\b.*"
    r"|rng_state_\d+\..*|random_states_\d+\..*|.*_optim_states\.pt"
)


@dataclasses.dataclass(frozen=True)
class Location:
    """A checkpoint on disk: a TensorFlow prefix, or the files of a PyTorch or safetensors one."""

    path: Path
    kind: Kind
    files: tuple[Path, ...] = ()  # for `tf`, only the index, which names the data files
    notes: tuple[str, ...] = ()  # for the user, about the choice of this checkpoint

    @property
    def folder(self) -> Path:
        return self.path.parent


def _tf(prefix: Path) -> Location:
    return Location(prefix, "tf", (prefix.with_name(prefix.name + ".index"),))


def locate(source: Path) -> Location:
    """Find the checkpoint that a folder, prefix or file denotes.

    Raises `OSError` if there is none, and `ValueError` if there are several or it is something
    else.
    """
    source = expanded(source)
    if source.is_dir():
        return _in_folder(source)
    if source.exists() and not source.is_file():
        raise OSError(f"{source} is neither a file nor a folder")
    if source.is_file():
        foreign.check(source, text=source.name == "checkpoint" or _is_index(source))
    prefix = _prefix_of(source)
    if prefix is not None:
        return _tf(prefix)
    if source.with_name(source.name + ".index").is_file():
        return _tf(source)
    if source.is_file():
        return _loose_file(source)
    return _not_there(source)


def expanded(path: Path) -> Path:
    """The path with a leading `~` replaced by the home folder; in quotes shells leave it."""
    if path.parts and path.parts[0].startswith("~") and not path.exists():
        try:
            return path.expanduser()
        except RuntimeError:  # no such user
            return path
    return path


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """The files in a folder, sorted, except those whose names begin with a dot."""
    found = (path for path in folder.glob(pattern) if not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def _not_there(source: Path) -> Location:
    """The checkpoint for a path without a file, such as a prefix that the shell completed.

    Raises `FileNotFoundError`, with the likely reason, if there is none.
    """
    if reason := foreign.absence_of(source):
        raise FileNotFoundError(reason)
    if source.parent.is_dir():
        for index in visible(source.parent, "*.index"):
            prefix = index.with_suffix("")
            names = [index.name, *(path.name for path in tf_data_files(prefix))]
            if source.name.startswith(f"{prefix.name}.") and any(
                name.startswith(source.name) for name in names
            ):
                return _tf(prefix)
        if tf_data_files(source):
            raise FileNotFoundError(f"{source}.index is missing; it belongs beside the .data file")
    raise FileNotFoundError(
        f"{source} does not exist, nor does {source}.index; give a checkpoint's folder or prefix"
    )


def _is_index(path: Path) -> bool:
    """Whether a file is the list of a checkpoint's shards."""
    return path.name.endswith(".index.json")


def tf_data_files(prefix: Path) -> list[Path]:
    """The existing data files of a TensorFlow checkpoint."""
    return [
        path
        for path in visible(prefix.parent)
        if (match := _TF_SHARD.fullmatch(path.name)) and match["prefix"] == prefix.name
    ]


def _prefix_of(file: Path) -> Path | None:
    """The prefix, if `file` has the name of a TensorFlow checkpoint's file, otherwise None."""
    if file.suffix in (".index", ".meta"):
        prefix = file.with_suffix("")
    elif match := _TF_SHARD.fullmatch(file.name):
        prefix = file.with_name(match["prefix"])
    else:
        return None
    if not prefix.with_name(prefix.name + ".index").is_file():
        raise FileNotFoundError(f"{prefix}.index is missing; a TensorFlow checkpoint needs it")
    return prefix


def _loose_file(source: Path) -> Location:
    if source.name == "checkpoint":
        return _in_folder(source.parent)
    if source.name.startswith("adapter_model."):
        raise ValueError(_adapter(source))
    if _is_index(source):
        return _sharded(source)
    if match := _SHARD.fullmatch(source.name):
        return _shards(source.parent, match)
    kind = _kind(source)
    if kind is None:
        raise ValueError(
            f"{source} is neither a TensorFlow checkpoint nor a PyTorch file; expected a folder, "
            "prefix, .index, .bin or .safetensors"
        )
    return Location(source, kind, (source,))


def _kind(path: Path) -> Kind | None:
    """The kind of a PyTorch or safetensors file, by its first bytes; None for other files."""
    with path.open("rb") as file:
        start = file.read(16)
    # A safetensors file starts with its header's size, whose lowest byte may look like a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size:
        return "safetensors"
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "bin"
    return "safetensors" if path.suffix == ".safetensors" or start[8:9] == b"{" else None


def _sharded(index: Path) -> Location:
    """The checkpoint whose shards, files in the same folder, an index.json names.

    Raises `ValueError` for an index that is damaged or names files elsewhere, and
    `FileNotFoundError` for missing shards.
    """
    foreign.check(index, text=True)
    if index.stat().st_size > _INDEX_MAX_BYTES:
        raise ValueError(f"{index} is too large for an index of shards")
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{index} is not an index of shards (JSON with a weight_map); fetch it again"
        ) from None
    for name in names:
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name):
            raise ValueError(
                f"{index} names the shard {str(name)[:80]!r}; expected the name of a file beside it"
            )
    return _complete(index, sorted(names))


def _shards(folder: Path, match: re.Match[str]) -> Location:
    """The checkpoint that a shard belongs to, by its index.json or else by the shards' numbers."""
    index = folder / f"{match['name']}{match['suffix']}.index.json"
    if index.is_file():
        return _sharded(index)
    return _complete(index, _shard_names(match))


def _complete(index: Path, names: Sequence[str]) -> Location:
    """A checkpoint of these shards, all of which must be there."""
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise FileNotFoundError(
            f"missing in {index.parent}: {', '.join(missing[:5]) or 'any shard'}{more}; fetch the "
            "shards that are not there"
        )
    files = tuple(index.parent / name for name in names)
    for path in files:
        foreign.check(path)
    kinds = {_kind(path) for path in files}
    kind = kinds.pop() if len(kinds) == 1 else None
    if kind is None:
        raise ValueError(f"the shards of {index.name} are not all of one format; fetch them again")
    return Location(index, kind, files)


def _in_folder(folder: Path) -> Location:
    prefixes = [path.with_suffix("") for path in visible(folder, "*.index")]
    others = _pytorch_names(folder)
    if prefixes:
        location = _choose_prefix(folder, prefixes)
        return _with_note(location, others)
    if others:
        return _choose_pytorch(folder, others)
    for path in visible(folder):
        shard = _TF_SHARD.fullmatch(path.name)
        if shard or path.suffix == ".meta":
            index = (shard["prefix"] if shard else path.stem) + ".index"
            raise FileNotFoundError(f"{folder} has {path.name}, but {index} is missing")
    raise _nothing_in(folder)


def _with_note(location: Location, left: Iterable[str]) -> Location:
    names = ", ".join(left)
    if not names:
        return location
    notes = (*location.notes, f"{names} beside it was left alone")
    return dataclasses.replace(location, notes=notes)


def _nothing_in(folder: Path) -> Exception:
    """The error for a folder without a checkpoint; it names what is there instead, if known."""
    for path in visible(folder)[:200]:
        if fault := foreign.fault_of(path, text=True):
            return ValueError(f"no checkpoint in {folder}: {fault}")
        if path.name.startswith("adapter_model."):
            return ValueError(_adapter(path))
        if path.suffix == ".safetensors" and is_converted(path):
            return ValueError(f"no checkpoint in {folder}: {converted_already(path)}")
    for path in folder.iterdir():
        if path.suffix in (*_PICKLED, ".safetensors") and (reason := foreign.absence_of(path)):
            return FileNotFoundError(f"no checkpoint in {folder}: {reason}")
    if inner := _folders_with_checkpoints(folder):
        more = f" or {inner[1]}" if len(inner) > 1 else ""
        return FileNotFoundError(f"no checkpoint in {folder} itself; give {inner[0]}{more}")
    return FileNotFoundError(
        f"no checkpoint (*.index with *.data-*, pytorch_model.bin or model.safetensors) in {folder}"
    )


def _adapter(path: Path) -> str:
    return f"{path} is an adapter (LoRA), not a model; `gpt2ml merge` adds it to its model"


def _folders_with_checkpoints(folder: Path) -> list[Path]:
    """The folders with a checkpoint inside a folder, up to three levels down.

    They are sorted by the last number in their names, usually a training step, highest first.
    """
    level, found = [folder], list[Path]()
    for _ in range(_MAX_LEVELS):
        children = (path for parent in level[:_MAX_FOLDERS] for path in parent.iterdir())
        level = [path for path in children if path.is_dir() and path.name[:1] not in "._"]
        found += [path for path in level if visible(path, "*.index") or _pytorch_names(path)]
    return sorted(found, key=lambda path: (-_last_number(path.name), str(path)))


def _last_number(name: str) -> int:
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1][:18]) if numbers else -1


def _choose_prefix(folder: Path, prefixes: list[Path]) -> Location:
    named = _named_by_state_file(folder)
    for prefix in prefixes:
        if prefix.name in named:
            return _tf(prefix)
    if len(prefixes) == 1:
        return _tf(prefixes[0])
    names = ", ".join(prefix.name for prefix in prefixes)
    why = (
        f"the file `checkpoint` names {named[0]}, which is not there"
        if named
        else "no file `checkpoint` names one"
    )
    raise ValueError(
        f"several checkpoints in {folder}: {names}, and {why}; give one as {folder}/NAME"
    )


def _named_by_state_file(folder: Path) -> list[str]:
    """The names of the checkpoint that the file `checkpoint` may mean, likeliest first.

    Only the last part of its path counts, since the folder is often on another machine. The path is
    escaped as in a protocol buffer's text form, unless somebody wrote it by hand; so both readings
    are returned.
    """
    state = folder / "checkpoint"
    if not state.is_file() or state.stat().st_size > _STATE_MAX_BYTES:
        return []
    match = _STATE.search(state.read_bytes())
    if match is None:
        return []
    paths = (_ESCAPE.sub(_unescaped, match["path"]), match["path"])
    return [re.split(r"[/\\]+", path.decode("utf-8", errors="replace"))[-1] for path in paths]


def _unescaped(match: re.Match[bytes]) -> bytes:
    octal, hexadecimal, other = match.groups()
    if octal or hexadecimal:
        return bytes([int(octal or hexadecimal, 8 if octal else 16) & 0xFF])
    return _ESCAPES.get(other, other if other in b"\\'\"?" else b"\\" + other)


def _pytorch_names(folder: Path) -> list[str]:
    """Files that may each hold a model's weights; for shards, their index or the first."""
    names: dict[str, str] = {}
    for path in visible(folder):
        shard = _SHARD.fullmatch(path.name)
        if _BESIDE.fullmatch(path.name) or path.suffix not in (*_PICKLED, ".safetensors", ".json"):
            continue
        if path.suffix == ".json" and not path.name.endswith(".index.json"):
            continue
        if path.suffix == ".safetensors" and is_converted(path):
            continue
        if path.suffix == ".ckpt" and _kind(path) != "bin":
            continue
        group = f"{shard['name']}{shard['suffix']}.index.json" if shard else path.name
        if not shard or group not in names or _is_more(shard, names[group], folder):
            names[group] = path.name
    return sorted(names.values())


def _is_more(shard: re.Match[str], other: str, folder: Path) -> bool:
    """Whether `shard`, and not `other`, should represent shards that have no index.

    They differ in the number of shards, so one may be left from an older checkpoint. The set that
    is complete, or has more files, is preferred.
    """
    known = _SHARD.fullmatch(other)
    if known is None or known["count"] == shard["count"]:
        return False
    return _there(folder, shard) > _there(folder, known)


def _there(folder: Path, shard: re.Match[str]) -> tuple[bool, int]:
    """Whether all shards of a checkpoint are there, and how many."""
    there = [(folder / name).is_file() for name in _shard_names(shard)]
    return all(there), sum(there)


def _shard_names(shard: re.Match[str]) -> list[str]:
    """The names of all shards of a checkpoint, from the name of one.

    Raises `ValueError` for more than 10,000.
    """
    first, count, suffix = shard["name"], shard["count"], shard["suffix"]
    if int(count) > 10_000:
        raise ValueError(f"{shard.string} is one of {int(count):,} shards: too many")
    return [f"{first}-{i + 1:05d}-of-{count}{suffix}" for i in range(int(count))]


def _choose_pytorch(folder: Path, names: list[str]) -> Location:
    by_rank = sorted(names, key=_rank)
    usual = [name for name in by_rank if _rank(name) < len(_USUAL)]
    if not usual and len(names) > 1:
        suffixes = {Path(name).suffix for name in names}
        kind = suffixes.pop() if len(suffixes) == 1 else "PyTorch"
        raise ValueError(
            f"several {kind} files in {folder}: {', '.join(names)}; give the one to convert"
        )
    chosen = by_rank[0]
    foreign.check(folder / chosen, text=_is_index(folder / chosen))
    return _with_note(_loose_file(folder / chosen), (name for name in names if name != chosen))


def _rank(name: str) -> int:
    """How common a name is for a model's weights: 0 is the most common."""
    if shard := _SHARD.fullmatch(name):
        name = shard["name"] + shard["suffix"]
    name = name.removesuffix(".index.json")
    return _USUAL.index(name) if name in _USUAL else len(_USUAL)
