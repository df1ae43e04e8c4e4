"""What a path on the command line means."""

from __future__ import annotations

import os
from pathlib import Path

from gpt2ml_torch.foreign import in_place_of_models


def find_model(path: str) -> str:
    """The model file that `path` names: itself, or the only one in a folder.

    Raises `ValueError` for a folder without one and for a folder with several.
    """
    if not os.path.isdir(path):
        return path
    names = [
        name
        for name in sorted(os.listdir(path))
        if name.endswith(".safetensors") and not name.startswith((".", "adapter_model"))
    ]
    if not names:
        raise ValueError(
            in_place_of_models(Path(path))
            or f"{path} is a folder without a model file (.safetensors); make one: "
            f"gpt2ml convert {path} out.safetensors"
        )
    if len(names) > 1:
        first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"{path} holds {len(names)} model files ({first}); name one of them")
    return os.path.join(path, names[0])
