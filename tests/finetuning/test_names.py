"""Names of version 0.1.0 go on working for a release, with a warning."""

from __future__ import annotations

import pytest

from gpt2ml_torch import finetuning


def test_every_public_name_is_there() -> None:
    for name in finetuning.__all__:
        assert getattr(finetuning, name) is not None


@pytest.mark.parametrize(
    ("old", "new"), [("predict", "estimate_memory"), ("Prediction", "MemoryEstimate")]
)
def test_a_name_that_changed_warns(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=new):
        assert getattr(finetuning, old) is getattr(finetuning, new)


def test_the_values_of_an_event_warn() -> None:
    event = finetuning.PromptContinued(step=3, prompt="a", text="b")
    with pytest.warns(DeprecationWarning, match="fields of the event"):
        assert event.values == {"prompt": "a", "text": "b"}
    assert event.kind == "sample"
