"""Names of version 0.1.0 go on working for a release, with a warning."""

from __future__ import annotations

import pytest

import gpt2ml_torch
from gpt2ml_torch import finetuning

# What version 0.1.0 offered: the package's `__all__`, and fine-tuning's.
PACKAGE = (
    *("GPT2ML", "Completion", "GPT2MLConfig", "GenerationConfig", "Generator", "KVCache"),
    *("StreamDecoder", "Tokenizer"),
)
FINETUNING = (
    *("Adafactor", "AdamW", "BatchStream", "Event", "FinetuneConfig", "FinetuneResult"),
    *("Objective", "Prediction", "RowDataset", "Rows", "StepInBackward", "TrainConfig"),
    *("TrainResult", "Trainer", "finetune", "next_token_rows", "parameter_groups", "predict"),
    *("round_stochastically_", "tokenize_files"),
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_name_of_version_0_1_0_can_be_imported() -> None:
    assert [name for name in PACKAGE if not hasattr(gpt2ml_torch, name)] == []
    assert [name for name in FINETUNING if not hasattr(finetuning, name)] == []


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
