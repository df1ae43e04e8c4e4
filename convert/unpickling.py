"""Describe the tensors in a pickle without running anything in it.

PyTorch's own loader does not tell which record of the file holds a tensor, so the tensor's checksum
could not be compared. It also takes seconds to import and loads all tensors into memory. This
module knows the few functions that describe tensors, calls none of them, and refuses every other
name.

Source: torch/serialization.py, torch/_utils.py, torch/_weights_only_unpickler.py; Python's
pickletools.
"""

from __future__ import annotations

import dataclasses
import pickletools
from collections.abc import Callable
from typing import IO, Any

_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
    "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "ComplexDouble": "complex128", "ComplexFloat": "complex64",
    "QUInt8": "quint8", "QInt8": "qint8", "QInt32": "qint32", "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}  # fmt: skip
_DTYPES = {
    *_STORAGES.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "complex32",
}  # fmt: skip
# Functions whose result is no plain tensor, and the words for it in errors.
_NO_NUMBERS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch.nested._internal.nested_tensor._rebuild_njt": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor on the device meta",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "torch.device": "a device",
    "torch.serialization._get_layout": "a layout",
    "_codecs.encode": "bytes",
    "builtins.bytearray": "bytes",
    "builtins.set": "a set",
    "builtins.complex": "a complex number",
    "collections.Counter": "a counter",
}
_NAMES = {
    "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.Tensor", "torch.Size",
    "torch.per_tensor_affine", "torch.per_channel_affine", "torch.strided", "torch.sparse_coo",
    "torch.sparse_csr", "collections.OrderedDict", "torch._tensor._rebuild_from_type_v2",
    "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
    "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3", "torch.storage.UntypedStorage", "torch.UntypedStorage",
}  # fmt: skip
_MARK = object()
_MAX_DIMENSIONS = 8


class Refused(ValueError):
    """The pickle uses a name or an instruction that no state dict needs."""


@dataclasses.dataclass(frozen=True)
class Storage:
    """Elements in the file: `count` elements of `dtype`, from `start` on, in the record `key`."""

    key: str
    dtype: str
    count: int
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor as strides over a storage; offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    negative: bool = False  # to be negated when it is read (PyTorch's negative bit)


@dataclasses.dataclass(frozen=True)
class Opaque:
    """An object without numbers to read; `what` describes it in words."""

    what: str


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


class Items:
    """A dictionary as a list of pairs; nothing is hashed, so hostile keys can't make it slow."""

    def __init__(self, pairs: list[Any] | None = None) -> None:
        self.pairs: list[Any] = [] if pairs is None else pairs


def describe(file: IO[bytes], storages: dict[str, Storage] | None = None) -> Any:
    """The object that a pickle describes; afterwards the file is positioned after the pickle.

    Every storage that it refers to is added to `storages` under its key. Dictionaries are returned
    as `Items`, tensors as `Tensor`, storages as `Storage`, and other objects that PyTorch's
    restricted loader would accept as `Opaque`. Raises `Refused` for a pickle that the restricted
    loader would refuse, and `ValueError` for a damaged one.
    """
    machine = _Machine({} if storages is None else storages)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its pickle is malformed ({type(error).__name__})") from None
    raise ValueError("its pickle has no end")


class _Machine:
    """Pickle's stack machine, for the instructions that occur in state dicts."""

    def __init__(self, storages: dict[str, Storage]) -> None:
        self._storages = storages
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("its pickle is malformed (a mark)")
        return value

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        stack, memo = self._stack, self._memo
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack.append(tuple(reversed([self.pop() for _ in range(count)])))
        elif name in ("TUPLE", "LIST", "DICT"):
            values = self._to_mark()
            stack.append(tuple(values) if name == "TUPLE" else values)
            if name == "DICT":
                stack[-1] = _items(values)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ", 1) if name == "GLOBAL" else [self.pop(), self.pop()][::-1]
            stack.append(_global(*map(str, parts)))
        elif name == "BINPERSID":
            storage = _storage(self.pop())
            self._storages[storage.key] = storage
            stack.append(storage)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = self.pop()
            stack.append(_call(self.pop(), arguments))
        elif name == "BUILD":
            self._build(self.pop())
        elif name in ("APPEND", "APPENDS"):
            values = [self.pop()] if name == "APPEND" else self._to_mark()
            _expect(stack[-1], list).extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            values = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self._to_mark()
            _expect(stack[-1], Items).pairs.extend(_items(values).pairs)
        elif name == "POP":
            stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"it has the instruction {name}")

    def _to_mark(self) -> list[Any]:
        """Pop the values pushed since the last mark, and the mark."""
        values = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _build(self, state: Any) -> None:
        """Ignore an object's attributes (a state dict's `_metadata`), which nobody reads."""
        if not isinstance(self._stack[-1], Items | Opaque):
            raise Refused(f"it sets the state of {type(self._stack[-1]).__name__}")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK, "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": Items,
    "EMPTY_SET": lambda: Opaque("a set"),
}  # fmt: skip
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"its pickle is malformed ({type(value).__name__} for {kind.__name__})")
    return value


def _items(values: list[Any]) -> Items:
    """A dictionary from alternating keys and values."""
    if len(values) % 2:
        raise ValueError("its pickle is malformed (a key without a value)")
    return Items(list(zip(values[::2], values[1::2], strict=True)))


def _pairs(values: Any) -> list[Any]:
    """A copy of a list of pairs, to which the pickle may still append."""
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in _expect(values, list)):
        raise ValueError("its pickle is malformed (a dictionary that is not a list of pairs)")
    return [tuple(pair) for pair in values]


def _global(module: str, name: str) -> _Global:
    full = f"{module.replace('__builtin__', 'builtins')}.{name}"
    short = full.removeprefix("torch.cuda.").removeprefix("torch.")
    is_type = full.startswith("torch.") and (
        short in _DTYPES or short.removesuffix("Storage") in _STORAGES
    )
    if not is_type and full not in _NAMES and full not in _NO_NUMBERS:
        raise Refused(f"it asks for {full[:200]}")
    return _Global(full)


def _storage(reference: Any) -> Storage:
    """The storage of a persistent id.

    The id is ('storage', type, key, device, count), followed before PyTorch 1.6 by a view.
    """
    kind, storage_type, key, _, count, *view = _expect(reference, tuple)
    if kind != "storage" or not isinstance(key, str | int) or len(view) > 1:
        raise Refused("it refers to something other than a storage")
    dtype = _dtype(storage_type)
    if view and view[0] is not None:
        _, start, size = _expect(view[0], tuple)
        return Storage(str(key), dtype, _count(size), _count(start))
    return Storage(str(key), dtype, _count(count))


def _dtype(type_: Any) -> str:
    short = _expect(type_, _Global).name.removeprefix("torch.cuda.").removeprefix("torch.")
    if short in ("UntypedStorage", "storage.UntypedStorage"):
        return "uint8"
    if short not in _DTYPES and short.removesuffix("Storage") not in _STORAGES:
        raise ValueError(f"its pickle is malformed ({short[:40]} for a dtype)")
    return _STORAGES.get(short.removesuffix("Storage"), short)


def _call(function: Any, arguments: Any) -> Any:
    """A description of what PyTorch's function would return for these arguments."""
    name, arguments = _expect(function, _Global).name, _expect(arguments, tuple)
    short = name.rpartition(".")[2]
    if name == "collections.OrderedDict":
        return Items(_pairs(arguments[0]) if arguments else None)  # Python 2 gives pairs
    if name in _NO_NUMBERS:
        return Opaque(_NO_NUMBERS[name])
    if name == "torch.Size":
        return _sizes(arguments[0])
    if short == "_rebuild_from_type_v2":
        return _call(arguments[0], arguments[2])
    if short.startswith("_rebuild_parameter") or short in ("Parameter", "Buffer"):
        return arguments[0]
    if short in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        return _tensor(short, arguments)
    raise Refused(f"it calls {name[:200]}")


def _tensor(function: str, arguments: tuple[Any, ...]) -> Tensor:
    storage, offset, shape, strides, *rest = arguments
    dtype, last = _expect(storage, Storage).dtype, rest[2:]
    if function == "_rebuild_tensor_v3":
        dtype, last = _dtype(rest[2]), rest[3:]
    flags = last[0].pairs if last and isinstance(last[0], Items) else []
    negative = any(key == "neg" and value is True for key, value in flags)
    sizes, steps = _sizes(shape), _sizes(strides)
    if len(sizes) != len(steps):
        raise ValueError("its pickle is malformed (a tensor's strides)")
    return Tensor(storage, dtype, _count(offset), sizes, steps, negative)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > _MAX_DIMENSIONS:
        raise ValueError("its pickle is malformed (a shape)")
    return tuple(map(_count, values))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("its pickle is malformed (a size)")
    return value
