"""Import optional packages when they are needed, without their warnings; report missing ones."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any


def require(package: str, purpose: str) -> Any:
    """Import a package of the extra `finetune`; raises `ValueError` if it isn't installed."""
    try:
        with silenced():
            return importlib.import_module(package)
    except ImportError:
        raise ValueError(
            f"{purpose} needs the package {package.split('.')[0]}: pip install "
            '"gpt2ml-torch[finetune]"'
        ) from None


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Suppress warnings, and log lines below errors, of all libraries.

    peft imports torchao, which names each of its own files that doesn't load on this machine.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
