"""Check that this installation computes the original's logits, on a tiny model with known answers.

The weights come from an integer recurrence, so they are the same on every machine. The answers come
from the TensorFlow reference in float64 (`python -m tests.golden` writes reference.json again).
Activations are near 1, where an approximate GELU or another epsilon shows; with real weights the
difference would be too small to notice.
"""

from __future__ import annotations

import json
from importlib import resources

import torch
from torch import Tensor

from gpt2ml_torch.checking.finding import Finding, judge
from gpt2ml_torch.config import GPT2MLConfig
from gpt2ml_torch.model import GPT2ML
from gpt2ml_torch.modelfile.format import expected_shapes

CONFIG = GPT2MLConfig(
    vocab_size=13,
    hidden_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=20,
    max_position_embeddings=8,
)
TOKEN_IDS = (12, 0, 5, 7, 1, 0, 3, 11)
TOLERANCE = 1e-10  # the answers are near 1; another GELU or epsilon is off by more than 1e-6


def known_weights() -> dict[str, Tensor]:
    """Float64 weights by their names in a model file: large, and the same on every machine."""
    weights = {}
    number = 1
    for name, shape in expected_shapes(CONFIG).items():
        values = []
        for _ in range(torch.Size(shape).numel()):
            number = (number * 1103515245 + 12345) % 2**31
            values.append(number / 2**31 - 0.5)
        weight = torch.tensor(values, dtype=torch.float64).reshape(shape)
        weights[name] = 1 + weight if name.endswith("norm.weight") else weight
    return weights


def known_logits() -> Tensor:
    """The TensorFlow reference's logits for `TOKEN_IDS`, (8, 13) in float64."""
    text = resources.files("gpt2ml_torch.checking").joinpath("reference.json").read_text()
    return torch.tensor(json.loads(text)["logits"], dtype=torch.float64)


@torch.inference_mode()
def check_arithmetic() -> Finding:
    """Compare this code's logits for the known model with the original's."""
    with torch.device("meta"):
        model = GPT2ML(CONFIG)
    model.load_state_dict(known_weights(), assign=True)
    found = model.eval()(torch.tensor([TOKEN_IDS]))[0]
    error = (found - known_logits()).abs().max().item()
    faults = []
    if not error <= TOLERANCE:
        faults.append(
            f"the logits of a known model are off by {error:.2g} (expected {TOLERANCE} at most): "
            "this installation does not compute the original's function"
        )
    text = f"the original's logits of a known model, within {error:.1g} in float64"
    return judge("arithmetic", faults, text, error=error)
