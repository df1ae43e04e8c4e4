"""Devices: one line for each that can't be used here."""

from __future__ import annotations

import pytest
import torch

from gpt2ml_torch.devices import choose_device


def test_the_cpu_and_the_best_device_can_be_used() -> None:
    assert choose_device("cpu") == choose_device("cpu:7") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cuda:3", present=False) == torch.device("cuda:3")


@pytest.mark.parametrize(
    "name",
    [
        *[
            "meta",
            "mps",
            "xla",
            "hpu",
            "vulkan",
            "xpu",
            "mtia",
            "lazy",
            "opengl",
            "mkldnn",
            "privateuseone",
        ],
        *["cuda:99", "cuda:-1", "tpu9", "cuda:", "春"],
        *("", "auto "),
    ],
)
def test_a_device_that_is_not_here_is_one_short_line(
    name: str, recwarn: pytest.WarningsRecorder
) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has that device")
    with pytest.raises(ValueError, match=r"^device is '") as caught:
        choose_device(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "\n" not in message
    assert len(message) < 250
    assert not recwarn
