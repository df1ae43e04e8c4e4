"""Whether all blocks of a model are the same, so that code compiled for one serves the others.

A nested region of `torch.compile` is traced once and reused, and PyTorch's own check of whether it
may be (2.13, 2.14) overlooks adapters, hooks, constants and subclasses. Here blocks count as equal
only where nothing that the trace could see differs, except for the values of their tensors; where
in doubt, they count as different. It is all blocks or none: beside a block that is compiled in
line, a region's writes to the cache are lost (PyTorch 2.13).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

_SIMPLE = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
# Their modules decide what they compute by their own attributes alone.
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
    """Everything about a module and those below it that decides what its forward does, except for
    the values of tensors: comparable, and equal for modules that run the same code.
    """
    # What a hook of all modules does may depend on which module it is called for.
    unique = id(module) if nn_module._has_any_global_hook() else None
    return (unique, *(_of_one(name, part) for name, part in module.named_modules()))


def outline(model: nn.Module) -> tuple[Any, ...]:
    """Which modules a model consists of, their hooks and constants: a quick look for changes."""
    modules = [
        (id(module), type(module), *(len(vars(module)[key]) for key in _HOOKS), _constants(module))
        for module in model.modules()
    ]
    dtypes = [(parameter.dtype, parameter.device) for parameter in model.parameters()]
    return (*modules, *dtypes, nn_module._has_any_global_hook())


def _constants(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Attributes that a trace takes as they are, such as `training` and a norm's `eps`."""
    kinds = (bool, int, float, str)
    return tuple((name, value) for name, value in vars(module).items() if type(value) in kinds)


def _of_one(name: str, module: nn.Module) -> tuple[Any, ...]:
    attributes = vars(module)
    # A hook, or a class that nobody here has read, may look at which module it runs for.
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
    """Something hashable that differs where the values do; for an unknown object its identity."""
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
