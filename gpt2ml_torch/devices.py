"""Choose a device by name, and test it before anything is loaded."""

from __future__ import annotations

import warnings

import torch

from gpt2ml_torch.options import OptionError


def choose_device(name: str | torch.device, *, present: bool = True) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or else the CPU.

    Raises `OptionError`, naming `device`, for a name that PyTorch doesn't know and, if `present`,
    for a device that can't be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with warnings.catch_warnings():  # about deprecated names of devices
            warnings.simplefilter("ignore")
            device = torch.device(name)
    except (RuntimeError, TypeError):
        template = "{device} is {!r}; expected auto, cpu, cuda, cuda:N or another PyTorch device"
        raise OptionError(template, name) from None
    if device.type == "cpu":
        return torch.device("cpu")  # without an index: there is only one
    if device.type == "meta":
        raise OptionError("{device} is {!r}, which holds no values; take cpu", name)
    if present:
        _try_out(device)
    return device


def _try_out(device: torch.device) -> None:
    """Compute 1 + 1 on the device."""
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        template = "{device} is {!r}; PyTorch sees {} GPUs here, use cpu or another number"
        raise OptionError(template, str(device), torch.cuda.device_count())
    try:
        works = torch.ones(1, device=device).add(1).item() == 2
    except Exception as error:  # backends raise AssertionError, ImportError, RuntimeError, ...
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # For a missing backend, PyTorch lists all others in thousands of characters.
        reason = lines[0] if len(lines[0]) <= 120 else "this build of it lacks the device"
        template = "{device} is {!r}, which PyTorch can't use here ({}); take cpu or cuda"
        raise OptionError(template, str(device), reason) from None
    if not works:
        raise OptionError("{device} is {!r}, which computes 1 + 1 wrongly here", str(device))
