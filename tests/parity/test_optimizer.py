"""One training step: weights and statistics after a step of Adafactor with the model's own
gradients, against the original's rule in TensorFlow (tests/helpers/tf_adafactor.py), in float64.
"""

from __future__ import annotations

import torch

from gpt2ml_torch.finetuning import Adafactor, parameter_groups
from tests.helpers.parity import cross_entropy, model_of, state_dict_of, to_torch
from tests.helpers.reference import GOLDEN

ODD = GOLDEN["odd"]


def test_an_adafactor_step_leaves_the_originals_weights(device: torch.device) -> None:
    after = ODD.adafactor_step()
    model, tokens = model_of(ODD).to(device), to_torch(ODD.ids).to(device)
    cross_entropy(model(tokens[:, :-1]), tokens).backward()
    Adafactor(parameter_groups(model), lr=1e-2).step()
    expected = state_dict_of({key: value for key, value in after.items() if "adafactor" not in key})
    moved = 0.0
    for name, before in state_dict_of(ODD.weights).items():
        found = model.get_parameter(name).detach().cpu()
        if name.endswith("qkv.bias"):
            # Adafactor makes steps of one size, whatever the size of the gradient. The keys' bias
            # has a gradient of rounding alone, so its steps are noise.
            width = ODD.sizes.width
            found[width : 2 * width] = expected[name][width : 2 * width]
        torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-9)
        moved = max(moved, (expected[name] - before).abs().max().item())
    assert moved > 1e-3, "a step that moves nothing would prove nothing"
