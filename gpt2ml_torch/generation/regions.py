"""Check whether all blocks of a model are alike, so that code compiled for one can serve all.

A nested region of `torch.compile` is traced once and reused. PyTorch's own check of whether that is
valid (2.13, 2.14) overlooks adapters, hooks, constants and subclasses. Here blocks count as equal
only if they differ in nothing that a trace can see, except the values of their tensors; in doubt
they count as different. Either all blocks are regions or none, because a region's writes to the
cache are lost beside a block that is compiled inline (PyTorch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

_SIMPLE = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
# What modules of these packages compute depends only on their own attributes.
_KNOWN_PACKAGES = ("gpt2ml_torch", "torch", "peft")
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_always_called",
)


def are_equal(blocks: Iterable[nn.Module]) -> bool:
    """Whether all blocks run the same code, each with tensors of its own."""
    return len({signature(block) for block in blocks}) == 1


def signature(module: nn.Module) -> tuple[Any, ...]:
    """Everything that decides what a module's forward does, except the values of tensors.

    It covers the submodules, can be compared, and is equal for modules that run the same code.
    """
    # A global hook may do something else for each module.
    unique = id(module) if nn_module._has_any_global_hook() else None
    return (unique, *(_of_one(name, part) for name, part in module.named_modules()))


def outline(model: nn.Module) -> tuple[Any, ...]:
    """A model's modules with their hooks and constants, for a quick check for changes."""
    modules = [
        (id(module), type(module), *(len(vars(module)[key]) for key in _HOOKS), _constants(module))
        for module in model.modules()
    ]
    dtypes = [(parameter.dtype, parameter.device) for parameter in model.parameters()]
    return (*modules, *dtypes, nn_module._has_any_global_hook())


def _constants(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Attributes that a trace treats as constants, such as `training` and a norm's `eps`."""
    kinds = (bool, int, float, str)
    return tuple((name, value) for name, value in vars(module).items() if type(value) in kinds)


def _of_one(name: str, module: nn.Module) -> tuple[Any, ...]:
    attributes = vars(module)
    # A hook or an unknown class may behave differently for each module.
    unique = any(attributes.get(hooks) for hooks in _HOOKS) or not _is_known(type(module))
    rest = {
        key: value
        for key, value in attributes.items()
        if key not in ("_modules", "_parameters", "_buffers", *_HOOKS)
    }
    return (
        name,
        type(module),
        id(module) if unique else None,
        tuple(key for key, value in module._modules.items() if value is None),
        _value(module._parameters),
        _value(module._buffers),
        _value(rest),
    )


def _is_known(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _KNOWN_PACKAGES


def _value(value: Any) -> Any:
    """A hashable value that differs if the attributes do; for an unknown object, its identity."""
    if isinstance(value, Tensor):
        layout = (tuple(value.shape), value.stride() if value.layout == torch.strided else None)
        return (type(value), *layout, value.dtype, value.device, value.requires_grad, value.layout)
    if isinstance(value, Mapping):
        return (type(value), tuple((_value(key), _value(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return (type(value), tuple(_value(item) for item in value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(_value(item) for item in value))
    return (type(value), value) if isinstance(value, _SIMPLE) else (type(value), id(value))
